"""From Hugging Face through a student and back: a sparse model of theirs teaches, a dense one of theirs comes out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from interop.zoo import far, inputs, our_logits, save, their_logits
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from switchkit import DistillModule
from switchkit.interop import export_hf, import_hf
from switchkit.interop.files import open_checkpoint, save_checkpoint


@pytest.mark.daily("mixtral-llama-AutoModelForCausalLM")
@pytest.mark.parametrize(
    ("name", "family", "cls"), [("switch", "t5", AutoModelForSeq2SeqLM), ("mixtral", "llama", AutoModelForCausalLM)]
)
def test_a_student_of_an_imported_teacher(tmp_path: Path, name: str, family: str, cls: type) -> None:
    one = save(name, tmp_path / "theirs")
    save_checkpoint(import_hf(one.folder), tmp_path / "teacher.ckpt")
    pupil = DistillModule(teacher=tmp_path / "teacher.ckpt", optimizer=torch.optim.SGD)
    tokens, targets = inputs(one)
    batch = {"tokens": tokens, "targets": tokens}
    if one.is_pair:
        batch = {"source": tokens, "tokens": targets, "targets": targets}
    before = far(our_logits(pupil, one), their_logits(one.model, one))
    optimizer = torch.optim.SGD(pupil.net.parameters(), lr=0.1)
    pupil.alpha = 1.0
    for _ in range(40):
        optimizer.zero_grad()
        pupil.training_step(batch, 0)["loss"].backward()
        optimizer.step()
    assert far(our_logits(pupil, one), their_logits(one.model, one)) < before
    save_checkpoint(pupil, tmp_path / "student.ckpt")
    (tmp_path / "teacher.ckpt").unlink()
    module = open_checkpoint(tmp_path / "student.ckpt")
    assert export_hf(module, tmp_path / "ours") == family
    theirs, info = cls.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert far(our_logits(pupil, one), their_logits(theirs.eval(), one)) < 1e-5

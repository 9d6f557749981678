"""What a teacher said beforehand: exact where all was kept, one bucket for the rest, of the very same examples."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pupils import pairs, student, t5_teacher, teacher
from small import NET, data, text_file, trainer, weights

from switchkit import DistillModule, ExpertChoice, MoELayer, SpanData, checkpoints
from switchkit.data.loader import Windows
from switchkit.distill.stored import FILES, WORDS, StoredTeacher, digests
from switchkit.distill.storing import store, top_k
from switchkit.distill.teacher import open_teacher


def windows(folder: Path, **more):
    found = data(folder, stride=8, **more)
    found.setup("fit")
    return found


def written(folder: Path, k: int, **more) -> Path:
    out = folder / f"words{k}"
    store(open_teacher(folder / "teacher.ckpt"), windows(folder), out, k=k, **more)
    return out


def steps(pupil: DistillModule, source) -> list[dict[str, torch.Tensor]]:
    """What is learned from each batch of an epoch, without dropout."""
    pupil.eval()
    with torch.no_grad():
        return [pupil._learn(batch)[2] for batch in source.train_loader(rank=0, world_size=1)]


@pytest.mark.daily("2.0-float16-0.005")
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float16", 5e-3)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_with_all_symbols_the_loss_is_the_live_teacher_s(tmp_path, dtype, tolerance, temperature):
    """In float16 a logarithm of 4 is rounded by 0.002 at most, so a divergence by about as much."""
    teacher(tmp_path)
    size = data(tmp_path).tokenizer.vocab_size
    folder = written(tmp_path, size, dtype=dtype, temperature=temperature)
    source = windows(tmp_path)
    live = steps(student(tmp_path, init="fresh", temperature=temperature), source)
    stored = steps(student(tmp_path, teacher=folder, init="fresh", temperature=temperature), source)
    for one, other in zip(live, stored, strict=True):
        assert torch.equal(one["cross_entropy"], other["cross_entropy"])
        assert other["divergence"].item() == pytest.approx(one["divergence"].item(), abs=tolerance)


def test_with_fewer_the_rest_is_one_bucket(tmp_path):
    """Every token of an epoch by loops over Python's floats."""
    taught = teacher(tmp_path, moe=None).eval()
    folder = written(tmp_path, 3, dtype="float32")
    source = windows(tmp_path)
    pupil = student(tmp_path, teacher=folder, init="fresh").eval()
    for batch, named in zip(source.train_loader(rank=0, world_size=1), steps(pupil, source), strict=True):
        with torch.no_grad():
            theirs, ours = (net(batch["tokens"]).logits.softmax(-1).tolist() for net in (taught.net, pupil.net))
        total = 0.0
        for p, q in ((p, q) for rows in zip(theirs, ours, strict=True) for p, q in zip(*rows, strict=True)):
            top = sorted(range(len(p)), key=lambda v: -p[v])[:3]
            total += sum(p[v] * math.log(p[v] / q[v]) for v in top)
            rest = 1 - sum(p[v] for v in top), 1 - sum(q[v] for v in top)
            total += rest[0] * math.log(rest[0] / rest[1])
        assert named["divergence"].item() == pytest.approx(total / batch["targets"].numel(), rel=1e-4, abs=1e-6)


def test_pairs_are_examples_too(tmp_path):
    """Batches of other pairs and other padding than those that were written; the encoder's half is in the words."""
    taught = t5_teacher(tmp_path)
    source = pairs(tmp_path, eval_batch_size=5)
    source.setup("fit")
    store(open_teacher(taught), source, tmp_path / "words", k=259 + 125, dtype="float32")
    live, stored = (
        DistillModule(teacher=given, tokenizer=source.tokenizer, warmup_steps=1)
        for given in (taught, tmp_path / "words")
    )
    stored.net.load_state_dict(live.net.state_dict())
    for one, other in zip(steps(live, source), steps(stored, source), strict=True):
        assert other["divergence"].item() == pytest.approx(one["divergence"].item(), abs=1e-6)


def spans(folder: Path, **more) -> SpanData:
    """Windows of 44 bytes of the small text, with holes known beforehand."""
    options = {"inputs_length": 40, "mean_span_length": 3.0, "batch_size": 4, "stride": 20, "draws": 2, **more}
    found = SpanData(str(text_file(folder)), **options)
    found.setup("fit")
    return found


@pytest.mark.slow
def test_text_with_holes(tmp_path):
    """The words belong to the very holes that the student reads, in each of their ways, in every epoch."""
    taught, source = t5_teacher(tmp_path), spans(tmp_path)
    store(open_teacher(taught), source, tmp_path / "words", k=384, dtype="float32")
    given = {"tokenizer": source.tokenizer, "warmup_steps": 1}
    live, stored = (DistillModule(teacher=teacher, **given) for teacher in (taught, tmp_path / "words"))
    stored.net.load_state_dict(live.net.state_dict())
    for one, other in zip(steps(live, source), steps(stored, source), strict=True):
        assert other["divergence"].item() == pytest.approx(one["divergence"].item(), abs=1e-6)
    trainer(tmp_path, steps=2 * len(source.train_loader(rank=0, world_size=1)) + 1).fit(stored.train(), source)
    for other in ({"seed": 1}, {"draws": 3}, {"stride": 19}, {"noise_density": 0.3}):
        changed = spans(tmp_path, **other)
        with pytest.raises(ValueError, match="was written for other training data"):
            steps(stored, changed)


def test_words_are_read_before_a_batch_moves(tmp_path, monkeypatch):
    """With the data: the step itself reads no file, and evaluation asks for none."""
    teacher(tmp_path)
    pupil = student(tmp_path, teacher=written(tmp_path, 4))
    attach, learn, seen = StoredTeacher.attach, DistillModule._learn, []

    def watched(self, batch):
        with monkeypatch.context() as patch:
            patch.setattr(StoredTeacher, "attach", lambda *given: pytest.fail("a file was read within the step"))
            seen.append({name: list(batch[name].shape) for name in WORDS})
            return learn(self, batch)

    reads = []
    monkeypatch.setattr(StoredTeacher, "attach", lambda self, batch: reads.append(1) or attach(self, batch))
    monkeypatch.setattr(DistillModule, "_learn", watched)
    source = data(tmp_path, stride=8)
    trainer(tmp_path, steps=8).fit(pupil, source)
    # The data are as they were for whoever reads them next.
    assert WORDS[0] not in next(iter(source.train_dataloader()))
    shapes = ([4, 8, 4], [4, 8, 4], [4, 8])
    assert seen == [dict(zip(WORDS, shapes, strict=True))] * 8
    assert len(reads) == 8
    monkeypatch.undo()
    plain = student(tmp_path, teacher=tmp_path / "words4", alpha=0.0)
    monkeypatch.setattr(StoredTeacher, "attach", lambda *given: pytest.fail("nobody asked"))
    trainer(tmp_path, steps=1).fit(plain, data(tmp_path, stride=8))


@pytest.mark.slow
def test_a_student_of_words_alone(tmp_path):
    """It begins with the non-expert weights, trains, and goes on bit for bit, where the checkpoint is gone."""
    taught = teacher(tmp_path)
    folder = written(tmp_path, 5)
    (tmp_path / "teacher.ckpt").unlink()
    pupil = student(tmp_path, teacher=folder)
    assert torch.equal(pupil.net.embed.weight, taught.net.embed.weight)
    assert pupil.inherited.copied
    assert [name for name, _ in pupil.closing_rows([], 1.0)] == ["compression"]

    def fit(where: str, steps: int, path: Path | None = None) -> torch.Tensor:
        pupil = student(tmp_path, teacher=folder, schedule="constant")
        torch.manual_seed(4)
        trainer(tmp_path / where, steps=steps).fit(pupil, data(tmp_path, stride=8), ckpt_path=path)
        return weights(pupil)

    whole = fit("whole", 30)
    fit("half", 13)
    assert torch.equal(fit("half", 30, checkpoints.last(tmp_path / "half")), whole)


def test_what_the_teacher_was_imported_with_is_in_the_folder(tmp_path):
    teacher(tmp_path)
    known = open_teacher(tmp_path / "teacher.ckpt")
    known.module.hugging_face = {"config": {"eos_token_id": 3}}
    store(known, windows(tmp_path), tmp_path / "words", k=2)
    assert student(tmp_path, teacher=tmp_path / "words").end_ids == (3,)


def test_sizes_on_disk(tmp_path):
    teacher(tmp_path)
    folder = written(tmp_path, 4)
    index = StoredTeacher(folder).index
    assert index.tokens == index.examples * 8
    assert np.load(folder / "log_probs.npy").dtype == np.float16
    assert np.load(folder / "ids.npy").dtype == np.uint16
    data_bytes = sum((folder / name).stat().st_size for name in FILES[:3])
    assert data_bytes - index.tokens * (4 * 4 + 2) == 3 * 128  # headers of numpy


def test_windows_cover_the_text():
    text = torch.arange(30)
    found = Windows(text, 8, 8)
    assert len(found) == 3
    batch = found.batch(torch.tensor([2, 0]))
    assert batch["tokens"][:, 0].tolist() == [16, 0]
    assert batch["targets"][0].tolist() == list(range(17, 25))
    assert len(Windows(text, 8, 1)) == 22
    with pytest.raises(ValueError, match="stride 0 is not possible"):
        Windows(text, 8, 0)


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"stride": None}, "set data.stride to that of"),
        ({"stride": 4}, "was written for other training data"),
        ({"context": 4}, "was written for other training data"),
    ],
    ids=str,
)
def test_other_examples(tmp_path, more, message):
    teacher(tmp_path)
    pupil = student(tmp_path, teacher=written(tmp_path, 4))
    source = data(tmp_path, **{"stride": 8, **more})
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, steps=1).fit(pupil, source)


def test_another_text(tmp_path):
    teacher(tmp_path)
    pupil = student(tmp_path, teacher=written(tmp_path, 4))
    source = windows(tmp_path)
    batch = next(iter(source.train_loader(rank=0, world_size=1)))
    pupil.training_step(batch, 0)
    batch["tokens"][0, 0] = (batch["tokens"][0, 0] + 1) % 20  # not a target: only the whole window tells
    with pytest.raises(ValueError, match="is not what it was"):
        pupil.training_step(batch, 0)


def test_what_words_alone_cannot_do(tmp_path):
    teacher(tmp_path)
    folder = written(tmp_path, 4)
    for more, message in (
        ({"temperature": 2.0}, "was written at temperature 1, and the student would learn at 2"),
        ({"init": "mean"}, "needs the teacher's experts"),
        ({"hidden_weight": 1.0}, "hidden states and attention are not in"),
        ({"teacher_precision": "bf16"}, "teacher_precision 'bf16' does nothing with .*, which has its words only"),
        ({"teacher_precision": "fp8"}, "teacher_precision must be null or 'bf16'; got 'fp8'"),
    ):
        with pytest.raises(ValueError, match=message):
            student(tmp_path, teacher=folder, **more)


@pytest.mark.parametrize("name", ["teacher.json", *FILES])
def test_a_damaged_folder(tmp_path, name):
    teacher(tmp_path)
    folder = written(tmp_path, 4)
    (folder / name).write_bytes((folder / name).read_bytes()[:-20])
    with pytest.raises(ValueError, match="write the folder again"):
        StoredTeacher(folder)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=r"write the folder again|folder without teacher.json"):
        StoredTeacher(folder)


@pytest.mark.parametrize("version", [0, 2])
def test_a_folder_of_another_version_is_refused(tmp_path, version):
    teacher(tmp_path)
    folder = written(tmp_path, 4)
    told = json.loads((folder / "teacher.json").read_text())
    (folder / "teacher.json").write_text(json.dumps({**told, "format_version": version}))
    with pytest.raises(ValueError, match=f"has format_version {version}; this switchkit reads 1; write the folder"):
        StoredTeacher(folder)


def test_an_index_cannot_name_what_is_no_part(tmp_path):
    teacher(tmp_path)
    folder = written(tmp_path, 4)
    told = json.loads((folder / "teacher.json").read_text())
    told["model"]["class_path"] = "subprocess.Popen"
    (folder / "teacher.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match="is not a part of a model"):
        StoredTeacher(folder)


def test_who_and_what_cannot_be_written_down(tmp_path):
    teacher(tmp_path)
    source, out = windows(tmp_path), tmp_path / "words"
    asked = open_teacher(tmp_path / "teacher.ckpt")
    for more, message in (
        ({"k": 0}, "k must be from 1 to 23"),
        ({"k": 24}, "got 24"),
        ({"k": 1, "dtype": "x"}, "dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            store(asked, source, out, **more)
    anywhere = data(tmp_path)
    with pytest.raises(ValueError, match="windows that begin anywhere have no numbers"):
        store(asked, anywhere, out, k=2)
    with pytest.raises(ValueError, match="holes drawn anew in each epoch, have no numbers: set data.stride, such as"):
        store(asked, spans(tmp_path, stride=None, draws=1), out, k=2)
    with pytest.raises(ValueError, match="the examples of SimpleNamespace have no numbers"):
        store(asked, SimpleNamespace(), out, k=2)
    choosy = teacher(tmp_path, net=partial(NET, allow_leak=True), moe=partial(MoELayer, router=ExpertChoice))
    with pytest.raises(ValueError, match="depend on what is beside it"):
        store(open_teacher(choosy), source, out, k=2)
    assert not out.exists()
    out.mkdir()
    with pytest.raises(ValueError, match="is there already"):
        store(asked, source, out, k=2)


def test_a_stop_in_the_middle_leaves_nothing(tmp_path):
    teacher(tmp_path)

    def stop(done: int, total: int) -> None:
        if done > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store(open_teacher(tmp_path / "teacher.ckpt"), windows(tmp_path), tmp_path / "words", k=2, told=stop)
    assert not [path for path in tmp_path.iterdir() if "words" in path.name]


def test_rows_that_are_cut_elsewhere_are_other_rows():
    """The same ids one after another, of which more are the source's in one of them."""
    valid = torch.tensor([[True, False], [True, True]])
    batch = {
        "tokens": torch.tensor([[1, 0], [1, 2]]),
        "targets": torch.tensor([[2, 0], [3, 4]]),
        "source": torch.tensor([[3, 4], [0, 0]]),
        "valid": valid,
        "source_valid": torch.tensor([[True, True], [False, False]]),
    }
    first, second = digests(batch)
    assert first != second
    # What stands at padding is not looked at.
    assert [*digests({**batch, "tokens": batch["tokens"].masked_fill(~valid, 9)})] == [first, second]


def test_what_is_kept_is_at_the_temperature():
    """The likeliest two of five symbols, and the mass of the other three."""
    logits = torch.randn(2, 3, 5)
    found = top_k(logits, 2, temperature=2.5)
    kept, ids = (logits / 2.5).softmax(-1).topk(2, -1)
    assert torch.equal(found.ids, ids)
    torch.testing.assert_close(found.log_probs.exp(), kept)
    torch.testing.assert_close(found.log_rest.exp(), 1 - kept.sum(-1))

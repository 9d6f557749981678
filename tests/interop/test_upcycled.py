"""Dense models of transformers, made sparse here, and read by transformers as its sparse families."""

from __future__ import annotations

import pytest
from interop.zoo import far, our_logits, save, their_logits

from switchkit import LanguageModule
from switchkit.convert.upcycling import upcycle
from switchkit.interop import export_hf, import_hf

hf = pytest.importorskip("transformers")
CLASSES = {
    "mixtral": hf.MixtralForCausalLM,
    "olmoe": hf.OlmoeForCausalLM,
    "qwen3_moe": hf.Qwen3MoeForCausalLM,
    "switch_transformers": hf.SwitchTransformersForConditionalGeneration,
}
# Their grouped products refuse widths that are no multiple of 16 bytes.
EAGER = {name: {} if name == "switch_transformers" else {"experts_implementation": "eager"} for name in CLASSES}


def exported(made: LanguageModule, folder, family: str):
    """Their model of an upcycled one of ours."""
    assert export_hf(made, folder, family=family) == family
    model, info = CLASSES[family].from_pretrained(folder, output_loading_info=True, **EAGER[family])
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


@pytest.mark.parametrize(
    ("name", "family", "options"),
    [
        ("llama", "mixtral", {}),
        ("mistral", "mixtral", {"num_experts": 4, "k": 3}),
        ("mistral", "mixtral", {"granularity": 2}),
        ("qwen3", "qwen3_moe", {}),
        ("qwen3", "qwen3_moe", {"sparse": [1], "num_experts": 3, "granularity": 2}),
        ("qwen3", "qwen3_moe", {"noise": 0.1, "drop": 0.5}),
    ],
)
def test_decoders(saved, tmp_path, name: str, family: str, options: dict) -> None:
    """Their sparse model has our logits, and where nothing was drawn, the logits of their dense one."""
    one = saved(name)
    made = upcycle(import_hf(one.folder), **options)
    theirs = their_logits(exported(made, tmp_path / "made", family), one)
    assert far(our_logits(made, one), theirs) < 1e-5
    if "drop" not in options:
        assert far(theirs, their_logits(one.model, one)) < 1e-5


def test_t5_becomes_switch(saved, tmp_path) -> None:
    """Switch has one choice of weight p: near the dense model, and equal to ours."""
    one = saved("t5")
    made = upcycle(import_hf(one.folder), k=1, num_experts=4)
    theirs = their_logits(exported(made, tmp_path / "made", "switch_transformers"), one)
    assert far(our_logits(made, one), theirs) < 1e-5
    assert 1e-6 < far(theirs, their_logits(one.model, one)) < 0.05


def test_what_transformers_has_no_family_for_is_refused(tmp_path) -> None:
    gated = upcycle(import_hf(save("t5_v1.1", tmp_path / "there").folder), k=1)
    with pytest.raises(ValueError, match="no family|GatedMlp"):
        export_hf(gated, tmp_path / "made")

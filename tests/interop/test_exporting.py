"""Ours as models of transformers, and what is refused because it would be another model there."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from interop.zoo import MODELS, Saved, V, far, our_logits, save, stored, their_logits

from switchkit import (
    Balance,
    Decoder,
    EncoderDecoder,
    Factor,
    Fixed,
    GatedMlp,
    LanguageModule,
    Mlp,
    MoELayer,
    Shared,
    Sigmoid,
    Switch,
    TopK,
)
from switchkit.attention import Attention, LatentAttention
from switchkit.experts.linear import Linear
from switchkit.experts.mixed import Mixed
from switchkit.experts.null import Null
from switchkit.interop import export_hf, import_hf
from switchkit.interop.exporting import SHARD_SIZE
from switchkit.layers import FeedForward

CLOSE = 1e-5


def loaded(cls, folder: Path):
    """Their model of a folder, with nothing missing and nothing left over."""
    model, info = cls.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shard_size", [SHARD_SIZE, 3000])
def test_the_round_trip_keeps_every_bit(saved, tmp_path, name: str, shard_size: int) -> None:
    one = saved(name)
    module = import_hf(one.folder)
    family = export_hf(module, tmp_path / "back", shard_size=shard_size)
    before, after = stored(one.folder), stored(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) == 1 if shard_size == SHARD_SIZE else 4
    # A model without a window is llama whatever its files called it.
    assert family == {"mistral": "mistral"}.get(name, one.model.config.model_type)
    theirs = loaded(type(one.model), tmp_path / "back")
    # Memory that is aligned otherwise is added in another order.
    assert far(their_logits(theirs, one), their_logits(one.model, one)) < 1e-6


@pytest.mark.parametrize("name", ["t5", "switch", "mixtral", "deepseek_v3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_half(tmp_path, name: str, dtype: torch.dtype) -> None:
    one = save(name, tmp_path / "there", dtype)
    export_hf(import_hf(one.folder), tmp_path / "back")
    before, after = stored(one.folder), stored(tmp_path / "back")
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    assert json.loads((tmp_path / "back/config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def decoder(**options) -> LanguageModule:
    """A model of ours that no file of transformers was ever made for."""
    llama = {
        "d_model": 12,
        "num_layers": 3,
        "num_heads": 2,
        "d_ff": 20,
        "context": 32,
        "norm": "rms",
        "sparse": [],
        "feed_forward": partial(FeedForward, gated=True, activation="silu"),
    }
    moe, losses = options.pop("moe", None), options.pop("losses", [])
    return LanguageModule(partial(Decoder, **{**llama, **options}), moe=moe, losses=losses, vocab_size=V)


def pair(moe=None, losses=(), **options) -> LanguageModule:
    sizes = {"d_model": 12, "encoder_layers": 2, "num_heads": 2, "d_ff": 20, "num_experts": 3}
    net = partial(EncoderDecoder, **{**sizes, **options})
    return LanguageModule(net, moe=moe, losses=list(losses), vocab_size=V)


TOP2 = partial(MoELayer, router=TopK, experts=GatedMlp)
RAW = partial(MoELayer, router=partial(TopK, k=3, normalize="never"), experts=GatedMlp)
OURS = {
    "llama": lambda: decoder(),
    "mistral": lambda: decoder(attention=partial(Attention, head_width=6, num_kv_heads=1), num_heads=5, tied=False),
    "qwen3": lambda: decoder(attention=partial(Attention, qk_norm="head", rope_base=50.0)),
    "mixtral": lambda: decoder(
        moe=TOP2, sparse="every(1)", losses=[partial(Balance, weight=0.5, layers="pooled", scale="k")]
    ),
    "olmoe": lambda: decoder(moe=RAW, sparse="every(1)", attention=partial(Attention, qk_norm="whole")),
    "qwen3_moe": lambda: decoder(moe=RAW, attention=partial(Attention, qk_norm="head"), sparse=[0, 2], expert_d_ff=8),
    "t5": lambda: pair(sparse=[], tied=False, start_id=3),
    # Without a limit in evaluation, whatever it is in training.
    "switch_transformers": lambda: pair(
        moe=partial(MoELayer, router=Switch, capacity=Factor, experts=partial(Mlp, dropout=0.4))
    ),
}


@pytest.mark.parametrize("family", OURS)
def test_models_of_ours(tmp_path, family: str) -> None:
    torch.manual_seed(0)
    module = OURS[family]().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    assert export_hf(module, tmp_path / "m") == family
    cls = next(cls for config, cls, _ in MODELS.values() if config.model_type == family)
    theirs = loaded(cls, tmp_path / "m")
    one = Saved(family, theirs, tmp_path / "m")
    assert far(our_logits(module, one), their_logits(theirs, one)) < CLOSE
    assert far(our_logits(import_hf(tmp_path / "m"), one), our_logits(module, one)) < CLOSE
    if family == "mixtral":
        assert theirs.config.router_aux_loss_coef == 0.5
    if family == "t5":
        assert theirs.generation_config.decoder_start_token_id == 3
        assert import_hf(tmp_path / "m").net.start_id == 3


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: decoder(norm="layer"), "llama: the model has layer norms"),
        (lambda: decoder(positions="learned"), "llama: "),
        (lambda: decoder(feed_forward=None), "llama: there is no blocks.0.mlp.gate (Linear)"),
        (lambda: decoder(sparse_attention=[1]), "llama: the model has sparse layers in attention"),
        (lambda: decoder(attention=partial(Attention, bias=True)), "llama: blocks.0.attention.qkv.bias is"),
        (lambda: decoder(attention=partial(Attention, scale=1.0)), "llama: blocks.0.attention.scale is 1.0"),
        (
            lambda: decoder(moe=partial(MoELayer, router=TopK, experts=Mlp), sparse=[0, 1, 2]),
            "mixtral: blocks.0.mlp.experts is a Mlp instead of a GatedMlp",
        ),
        (
            lambda: decoder(moe=partial(TOP2, capacity=partial(Fixed, eval=9)), sparse=[0, 1, 2]),
            "mixtral: blocks.0.mlp.capacity is 9 tokens instead of without a limit in evaluation",
        ),
        (
            lambda: decoder(moe=partial(MoELayer, router=Sigmoid, experts=GatedMlp), sparse=[0, 1, 2]),
            "mixtral: the router is a Sigmoid, where mixtral has a TopK",
        ),
        (
            lambda: decoder(
                attention=partial(LatentAttention, kv_rank=4, nope_width=4, rope_width=4, v_width=4, norm_eps=1e-3)
            ),
            "deepseek_v3: the model has no sparse layer",
        ),
        (
            lambda: decoder(moe=partial(MoELayer, router=TopK, experts=Mixed), sparse=[0, 1, 2]),
            "mixtral: blocks.0.mlp.experts is a Mixed instead of a GatedMlp",
        ),
        (
            lambda: decoder(moe=partial(MoELayer, router=TopK, experts=Linear), sparse=[0, 1, 2]),
            "mixtral: blocks.0.mlp.experts is a Linear instead of a GatedMlp",
        ),
        (
            lambda: decoder(
                moe=partial(MoELayer, experts=partial(Shared, experts=Null), router=TopK), sparse=[0, 1, 2]
            ),
            "mixtral: blocks.0.mlp.experts is a Shared instead of a GatedMlp",
        ),
        (lambda: decoder(moe=TOP2, sparse=[1]), "mixtral: blocks.0.mlp is a FeedForward instead of a MoELayer"),
        (lambda: pair(moe=partial(MoELayer, group="batch", capacity=partial(Fixed, eval=2))), "group is 'batch'"),
        (lambda: pair(moe=partial(MoELayer, capacity=partial(Factor, eval=1.0))), "capacity is"),
        (
            lambda: pair(moe=partial(MoELayer, dropped="input", capacity=partial(Fixed, eval=2))),
            "blocks.1.mlp.dropped is 'input' instead of 'zero'",
        ),
        (lambda: pair(sparse=[0], encoder_layers=3), "the encoder's sparse layers are [0]"),
        (lambda: pair(moe=TOP2), "switch_transformers: encoder.blocks.0.mlp.activation is 'relu' instead of 'silu'"),
    ],
)
def test_what_transformers_would_compute_otherwise_is_refused(tmp_path, make, told: str) -> None:
    with pytest.raises(ValueError, match="no family of transformers computes what this model does") as caught:
        export_hf(make(), tmp_path / "m")
    assert told in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("softmax", "normalize"), [("after", None), ("after", "never"), ("after", "after"), ("before", "after")]
)
@pytest.mark.parametrize(
    ("family", "attention"),
    [
        ("mixtral", None),
        ("olmoe", partial(Attention, qk_norm="whole")),
        ("qwen3_moe", partial(Attention, qk_norm="head")),
    ],
)
def test_a_sum_of_one_is_a_normalised_softmax_before(tmp_path, family: str, attention, softmax, normalize) -> None:
    """Whatever makes it so where nothing is dropped."""
    router = partial(TopK, softmax=softmax, normalize=normalize)
    module = decoder(
        moe=partial(MoELayer, router=router, experts=GatedMlp), attention=attention, sparse=[0, 1, 2], num_experts=4
    )
    assert export_hf(module, tmp_path / "m") == family
    theirs = loaded(MODELS[family][1], tmp_path / "m")
    one = Saved(family, theirs, tmp_path / "m")
    assert far(our_logits(module, one), their_logits(theirs, one)) < CLOSE


def test_one_family_of_several(saved, tmp_path) -> None:
    module = import_hf(saved("llama").folder)
    assert export_hf(module, tmp_path / "m", family="mistral") == "mistral"
    theirs = loaded(MODELS["mistral"][1], tmp_path / "m")
    assert far(their_logits(theirs, saved("llama")), our_logits(module, saved("llama"))) < CLOSE
    with pytest.raises(ValueError, match=r"unknown model_type 'mistrel'. Did you mean 'mistral'"):
        export_hf(module, tmp_path / "n", family="mistrel")
    with pytest.raises(ValueError, match="qwen3: blocks.0.attention.qk_norm is None instead of 'head'"):
        export_hf(module, tmp_path / "n", family="qwen3")


def test_like_another_config(saved, tmp_path) -> None:
    module = import_hf(saved("llama").folder)
    export_hf(module, tmp_path / "m", like={"eos_token_id": [7, 8], "pad_token_id": 5, "hidden_size": 999})
    config = json.loads((tmp_path / "m/config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"], config["hidden_size"]) == ([7, 8], 5, 16)
    assert config["bos_token_id"] is None


@pytest.mark.parametrize("like", [{"pad_token_id": V, "bos_token_id": 1}, {"eos_token_id": [2, V]}])
def test_ids_beyond_the_vocabulary_are_refused(tmp_path, like: dict) -> None:
    """transformers cannot make an embedding with such a padding, and never ends a text at such an end."""
    with pytest.raises(ValueError, match=f"like: (pad|eos)_token_id={V} is no token of this model, whose ids are 0 to"):
        export_hf(decoder(), tmp_path / "m", like=like)
    assert not list(tmp_path.iterdir())


def test_folders_are_not_overwritten(saved, tmp_path, monkeypatch) -> None:
    module = import_hf(saved("llama").folder)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="full is there already and not empty"):
        export_hf(module, tmp_path / "full")
    with pytest.raises(ValueError, match="mine is there already"):
        export_hf(module, tmp_path / "full/mine")
    with pytest.raises(ValueError, match=r"no folder .*nowhere: create it first"):
        export_hf(module, tmp_path / "nowhere/m")
    with pytest.raises(ValueError, match="shard_size must be at least 1 byte; got 0"):
        export_hf(module, tmp_path / "m", shard_size=0)
    (tmp_path / "link").symlink_to("empty")
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"\. is the working directory"):
        export_hf(module, ".")
    monkeypatch.chdir(tmp_path)
    export_hf(module, tmp_path / "link")
    assert sorted(os.listdir(tmp_path)) == ["empty", "full", "link"]
    assert {file.name for file in (tmp_path / "empty").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }


def test_nothing_is_left_of_an_export_that_fails(saved, tmp_path, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="the disk is full"):
        export_hf(import_hf(saved("llama").folder), tmp_path / "m")
    assert not list(tmp_path.iterdir())

"""What a config may say that is not built here: each is refused with its key, its value and the reason."""

from __future__ import annotations

import json
import shutil

import pytest
from interop.zoo import far, our_logits, their_logits

from switchkit.interop import import_hf
from switchkit.interop.config import Config

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
EVERY = ("llama", "mistral", "qwen3", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v3", "t5", "switch")
CASES = [
    (
        "llama",
        {"rope_parameters": YARN},
        r"rope_parameters=.*: scaled rotary angles \(type 'yarn'\) are not built here",
    ),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling=.*type 'linear'"),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "type 'llama3'"),
    ("llama", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "angles that differ between layers"),
    ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "rotating a part of a head"),
    ("llama", {"partial_rotary_factor": 0.25}, "partial_rotary_factor=0.25: rotating a part of a head"),
    ("llama", {"attention_bias": True}, "attention_bias=True: there is no such bias here"),
    ("llama", {"mlp_bias": True}, "mlp_bias=True: there is no such bias here"),
    ("llama", {"attention_dropout": 0.1}, "attention_dropout=0.1: dropout of attention weights alone"),
    ("llama", {"hidden_act": "relu2"}, "hidden_act='relu2': known here are relu, gelu, gelu_new"),
    ("llama", {"hidden_act": 3}, "hidden_act=3: known here"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config=.*: the weights are quantized"),
    ("llama", {"per_layer_config": {"0": {"num_attention_heads": 1}}}, "layers with settings of their own"),
    ("llama", {"num_attention_heads": 3, "head_dim": None}, "num_attention_heads=3: does not divide hidden_size=16"),
    ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes': must be true or false"),
    ("llama", {"rope_parameters": 3}, "rope_parameters=3: must be an object"),
    ("mistral", {"sliding_window": 32}, "sliding_window=32: tokens would see the last 32 only.*context of at most 32"),
    ("mistral", {"sliding_window": ..., "max_position_embeddings": 8192}, "would see the last 4096 only"),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 8}, "would see the last 8 only"),
    ("qwen3", {"layer_types": ["sliding_attention"] * 3, "sliding_window": 8}, "would see the last 8 only"),
    ("mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok=1: with normalised weights every weight is 1"),
    ("mixtral", {"num_experts": 7}, "num_experts=7: num_local_experts=4 means the same and says otherwise"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0: queries, keys and values that are clipped"),
    ("qwen2_moe", {"mlp_only_layers": [9]}, r"mlp_only_layers=\[9\]: must be a list of layers, 0 to 2"),
    ("qwen2_moe", {"mlp_only_layers": "all"}, "must be a list of layers"),
    ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq=2: dense blocks between sparse ones"),
    ("mixtral", {"moe_layer_freq": 2}, "moe_layer_freq=2: dense blocks between sparse ones"),
    ("deepseek_v3", {"num_key_value_heads": 1}, "num_key_value_heads=1: latent attention"),
    ("deepseek_v3", {"n_group": 3}, "groups=3 must divide num_experts=8"),
    ("deepseek_v3", {"attention_bias": True}, "attention_bias=True"),
    ("t5", {"feed_forward_proj": "gated-gelu-x"}, "feed_forward_proj='gated-gelu-x': must be an activation, or gated-"),
    ("t5", {"dense_act_fn": "mish"}, "dense_act_fn='mish': known here are"),
    ("t5", {"is_encoder_decoder": False}, "an encoder or a decoder alone is not built here"),
    ("t5", {"dropout_rate": 1.0}, "dropout_rate=1.0: must be below 1"),
    ("t5", {"decoder_start_token_id": 40}, "start_id must be a token, 0 to 39; got 40"),
    *((name, {"is_causal": False}, "is_causal=False: a decoder that sees what follows") for name in EVERY),
    ("switch", {"router_dtype": "bfloat16"}, "router_dtype='bfloat16': routers compute in float32 here"),
    ("switch", {"dense_act_fn": "gated-gelu"}, "dense_act_fn='gated-gelu': known here"),
]


def changed(saved, tmp_path, name: str, change: dict):
    folder = tmp_path / "m"
    shutil.copytree(saved(name).folder, folder)
    config = {**json.loads((folder / "config.json").read_text()), **change}
    text = json.dumps({key: value for key, value in config.items() if value is not ...})
    (folder / "config.json").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("name", "change", "told"), CASES, ids=[f"{n}-{next(iter(c))}-{i}" for i, (n, c, _) in enumerate(CASES)]
)
def test_what_is_not_built_is_refused(saved, tmp_path, name: str, change: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told) as caught:
        import_hf(changed(saved, tmp_path, name, change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mistral", {"sliding_window": 64}),
        ("qwen3", {"sliding_window": 8, "use_sliding_window": False}),
        ("llama", {"rope_parameters": None, "rope_theta": 10000.0}),
        ("llama", {"architectures": None, "unknown_key": [1], "torch_dtype": "float32"}),
        ("deepseek_v3", {"moe_layer_freq": 1}),
        ("switch", {"router_ignore_padding_tokens": True, "add_router_probs": True}),
    ],
)
def test_what_changes_nothing_is_accepted(saved, tmp_path, name: str, change: dict) -> None:
    one = saved(name)
    assert far(our_logits(import_hf(changed(saved, tmp_path, name, change)), one), their_logits(one.model, one)) < 1e-5


def test_a_window_that_short_sequences_never_meet(saved, tmp_path) -> None:
    folder = changed(saved, tmp_path, "mistral", {"sliding_window": 20})
    theirs = type(saved("mistral").model).from_pretrained(folder).eval()
    module = import_hf(folder, context=20)
    assert far(our_logits(module, saved("mistral")), their_logits(theirs, saved("mistral"))) < 1e-5
    with pytest.raises(ValueError, match="max_position_embeddings=64: is the longest context; got context=65"):
        import_hf(saved("llama").folder, context=65)
    with pytest.raises(ValueError, match="a model with relative positions has no longest context; got 20"):
        import_hf(saved("t5").folder, context=20)


@pytest.mark.parametrize("name", ["qwen2_moe", "mixtral_tied", "deepseek_v3"])
@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": {"type": "default"}},
        {"rope_scaling": {"rope_type": "default", "rope_theta": 50.0}},
        {"rope_scaling": {"type": "default"}, "rope_theta": 70.0},
        {"rope_scaling": {}},
    ],
    ids=["the family's", "its own", "the model's", "empty"],
)
def test_an_older_name_for_angles_replaces_the_newer(saved, tmp_path, name: str, change: dict) -> None:
    """A file of today, with a base of 30, that was edited in the way of yesterday."""
    folder = changed(saved, tmp_path, name, change)
    theirs = type(saved(name).model).from_pretrained(folder).eval()
    assert far(our_logits(import_hf(folder), saved(name)), their_logits(theirs, saved(name))) < 1e-5


def test_three_embeddings_that_differ(saved, tmp_path) -> None:
    """What transformers 5 makes of an untied Switch that it initialises itself."""
    from interop.zoo import MODELS

    config, cls, settings = MODELS["switch_untied"]
    cls(config(**settings)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="shared.weight and encoder.embed_tokens.weight differ, and the model has one"):
        import_hf(tmp_path)


def test_words_for_the_same() -> None:
    config = Config({"num_experts": 4, "num_local_experts": 4, "absent": None})
    assert config.integer("num_local_experts", "num_experts") == 4
    assert config.integer("absent", default=3) == 3
    with pytest.raises(ValueError, match="lacks absent"):
        config.integer("absent")

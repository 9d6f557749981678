"""A dense checkpoint, made sparse from the command line."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
import torch

from switchkit import Decoder, LanguageModule, TextData, TopK, checkpoints
from switchkit.interop.files import save_checkpoint
from switchkit.spec import describe_object

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture
def dense(folder) -> Path:
    """A checkpoint of a dense model and of the text of the folder."""
    data = TextData("text.txt", context=16, batch_size=4)
    net = partial(Decoder, d_model=16, num_layers=2, num_heads=2, d_ff=32, context=16, sparse=[])
    module = LanguageModule(net, losses=[], tokenizer=data.tokenizer)
    save_checkpoint(module, "dense.ckpt", data=describe_object(data), source=data.source_info())
    return Path("dense.ckpt")


def test_a_sparse_checkpoint_that_the_other_commands_take(dense, run) -> None:
    code, out, err = run("upcycle", str(dense), "--num_experts", "3", "--k", "2", "--every", "2", "--out", "made.ckpt")
    assert (code, out) == (0, ""), err
    difference, after, before = map(
        float, re.search(r"by (\S+) of the largest, loss (\S+) \(dense (\S+)\)", err).groups()
    )
    assert difference < 1e-6
    assert after == before
    assert "the optimizer starts afresh" in err
    old, new = checkpoints.read(dense), checkpoints.read("made.ckpt")
    assert new["global_step"] == 0
    assert new["optimizer_states"] == []
    assert new["switchkit"]["data"] == old["switchkit"]["data"] is not None
    assert new["switchkit"]["source"] == old["switchkit"]["source"] is not None
    module = LanguageModule.load_from_checkpoint("made.ckpt")
    assert module.sparse_layers == ["blocks.1.mlp"]
    assert module.tokenizer is not None
    assert isinstance(module.net.blocks[1].mlp.router, TopK)
    losses = []
    for path in (str(dense), "made.ckpt"):
        code, out, err = run("validate", "--ckpt_path", path)
        assert code == 0, err
        losses.append(float(re.search(r"val/loss\W+([\d.]+)", out)[1]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    code, _, err = run("fit", "--ckpt_path", "made.ckpt", "--trainer.max_steps", "1")
    assert code == 0, err
    given = ["--data", "TextData", "--data.path", "text.txt", "--data.context", "16"]
    code, _, err = run("fit", "--init_from", "made.ckpt", *given, "--trainer.max_steps", "2")
    assert code == 0, err
    code, out, err = run("generate", "--ckpt_path", "made.ckpt", "--prompt", "the", "--max_new_tokens", "3")
    assert code == 0, err


def test_what_is_drawn_follows_the_seed(dense, run) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert run("upcycle", str(dense), "--noise", "0.1", "--seed", seed, "--out", f"{name}.ckpt")[0] == 0
    a, b, c = (checkpoints.read(f"{name}.ckpt")["state_dict"] for name in "abc")
    name = "net.blocks.0.mlp.experts.w1"
    assert torch.equal(a[name], b[name])
    assert not torch.equal(a[name], c[name])


def test_mistakes_write_nothing(dense, run) -> None:
    assert run("upcycle", "last", "--default_root_dir", ".", "--out", "made.ckpt")[0] == 0
    for given, why in (
        (["--out", "made.ckpt"], "made.ckpt: it is there already"),
        (["--out", "no/made.ckpt"], "there is no folder 'no'"),
        (["--out", "x.ckpt", "--k", "9"], "k must be from 1 to 8"),
        (["--out", "x.ckpt", "--granularity", "5"], "divide the hidden width 32; got 5"),
        (["--out", "x.ckpt", "--every", "3"], "sparse='every(3)' needs n from 1 to num_layers=2"),
        (["--out", "x.ckpt", "--sparse", "odd"], "expected every(N), last(N) or blocks such as 1,3, got 'odd'"),
        (["--out", "x.ckpt", "--drop", "2"], "expected a number from 0 to 1, got '2'"),
        (["--out", "x.ckpt", "--num_expert", "2"], "Did you mean '--num_experts'?"),
    ):
        code, out, err = run("upcycle", str(dense), *given)
        assert (code, out) == (2, "")
        assert why in err
        assert err.count("\n") == 1
    code, _, err = run("upcycle", "made.ckpt", "--out", "x.ckpt")
    assert code == 2
    assert "has 2 sparse layers already" in err
    code, _, err = run("upcycle", "none.ckpt", "--out", "x.ckpt")
    assert code == 2
    assert "there is no checkpoint none.ckpt" in err
    assert not list(Path().glob("*x.ckpt*"))

"""Checkpoints with fewer experts, from the command line."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest

from switchkit import Decoder, LanguageModule, MoELayer, Switch, TextData, checkpoints
from switchkit.interop.files import save_checkpoint
from switchkit.spec import describe_object

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
COMMANDS = {
    "prune": (["--keep", "2"], 2),
    "merge": (["--experts", "2"], 2),
    "to-dense": ([], None),
}


@pytest.fixture
def sparse(folder) -> Path:
    """A checkpoint of a model of four experts and of the text of the folder."""
    data = TextData("text.txt", context=16, batch_size=4)
    net = partial(Decoder, d_model=16, num_layers=2, num_heads=2, d_ff=32, num_experts=4, context=16)
    module = LanguageModule(net, moe=partial(MoELayer, router=Switch), tokenizer=data.tokenizer)
    save_checkpoint(module, "sparse.ckpt", data=describe_object(data), source=data.source_info())
    return Path("sparse.ckpt")


def held_out(run, path: str) -> float:
    """What `validate` says of a checkpoint."""
    code, out, err = run("validate", "--ckpt_path", path)
    assert code == 0, err
    return float(re.search(r"val/loss\W+([\d.]+)", out)[1])


@pytest.mark.parametrize("command", COMMANDS)
def test_a_smaller_checkpoint_and_a_table_that_is_true(sparse, run, command: str) -> None:
    given, experts = COMMANDS[command]
    code, out, err = run(command, str(sparse), *given, "--out", "made.ckpt")
    assert code == 0, err
    numbers = {line.split("│")[1].strip(): line.split("│")[2:4] for line in out.splitlines() if "│" in line}
    module = LanguageModule.load_from_checkpoint("made.ckpt")
    found = {layer.num_experts for name in module.sparse_layers for layer in [module.net.get_submodule(name)]}
    assert found == (set() if experts is None else {experts})
    assert int(numbers["parameters"][1].replace(",", "")) == sum(p.numel() for p in module.parameters())
    for column, path in enumerate((str(sparse), "made.ckpt")):
        assert float(numbers["held-out loss, nats per token"][column]) == pytest.approx(held_out(run, path), abs=6e-5)
    old, new = checkpoints.read(sparse)["switchkit"], checkpoints.read("made.ckpt")["switchkit"]
    assert (new["data"], new["source"]) == (old["data"], old["source"])
    if command != "prune":
        return
    assert "switchkit fit --ckpt_path made.ckpt --trainer.max_steps 1000" in err
    code, _, err = run("fit", "--ckpt_path", "made.ckpt", "--trainer.max_steps", "1")
    assert code == 0, err
    code, _, err = run("generate", "--ckpt_path", "made.ckpt", "--prompt", "the", "--max_new_tokens", "2")
    assert code == 0, err


def test_without_data_nothing_is_measured(sparse, run) -> None:
    Path("text.txt").unlink()
    code, out, err = run("merge", str(sparse), "--experts", "2", "--out", "made.ckpt")
    assert code == 2
    assert "text.txt" in err
    assert "or --no_data" in err
    assert not Path("made.ckpt").exists()
    code, out, err = run("merge", str(sparse), "--experts", "2", "--no_data", "--out", "made.ckpt")
    assert code == 0, err
    assert "not measured" in out
    Path("other.txt").write_text("the lazy dog jumps.\n" * 50)
    code, out, err = run("to-dense", str(sparse), "--data.path", "other.txt", "--batches", "1", "--out", "dense.ckpt")
    assert code == 0, err


def test_mistakes_write_nothing(sparse, run) -> None:
    path = str(sparse)
    assert run("to-dense", path, "--out", "dense.ckpt")[0] == 0
    for line, why in (
        (["prune", path, "--out", "x.ckpt"], "required: --keep"),
        (["prune", path, "--keep", "4", "--out", "x.ckpt"], "keep must be from 1 to 3, fewer than the 4 experts"),
        (["prune", path, "--keep", "2", "--no_data", "--out", "x.ckpt"], "take --by similarity"),
        (["prune", path, "--keep", "2", "--by", "size", "--out", "x.ckpt"], "invalid choice: 'size'"),
        (["prune", path, "--keep", "2", "--k", "2", "--out", "x.ckpt"], "router Switch has no option k"),
        (["prune", "dense.ckpt", "--keep", "2", "--out", "x.ckpt"], "the model is dense"),
        (["merge", path, "--experts", "9", "--out", "x.ckpt"], "experts must be from 1 to 3"),
        (["merge", path, "--experts", "2", "--out", "dense.ckpt"], "dense.ckpt: it is there already"),
        (["to-dense", path, "--how", "median", "--out", "x.ckpt"], "invalid choice: 'median'"),
        (["to-dense", "none.ckpt", "--out", "x.ckpt"], "there is no checkpoint none.ckpt"),
    ):
        code, out, err = run(*line)
        assert (code, out) == (2, ""), line
        assert why in err
        assert err.count("\n") == 1
    assert not list(Path().glob("*x.ckpt*"))

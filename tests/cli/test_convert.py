"""upcycle, prune, merge and to-dense, from the command line: one checkpoint into another, or one line of why not."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from switchkit import ByteTokenizer, CharTokenizer, Decoder, EncoderDecoder, LanguageModule
from switchkit.cli import main
from switchkit.cli.conversion import Conversion
from switchkit.interop.files import save_checkpoint

# Of Lightning and jsonargparse, as in every run.

SHRINK = {"prune": ["--keep", "2"], "merge": ["--experts", "2"], "to-dense": []}


@pytest.mark.slow
def test_upcycle_keeps_vocabulary_and_data_and_trains_on(dense: Path, folder: Path, capsys) -> None:
    assert main(["upcycle", str(dense), "--num_experts", "4", "--every", "2", "--out", "made.ckpt"]) == 0
    told = capsys.readouterr().err
    assert "1 sparse layers" in told
    assert "step 0" in told
    assert "switchkit fit --ckpt_path made.ckpt --trainer.max_steps 1000" in told
    old, new = (LanguageModule.load_from_checkpoint(path) for path in (dense, "made.ckpt"))
    assert new.tokenizer == old.tokenizer
    tokens = torch.arange(12).unsqueeze(0)
    assert torch.allclose(new.eval()(tokens), old.eval()(tokens), atol=1e-6)
    # Its data settings came along.
    assert main(["validate", "--ckpt_path", "made.ckpt"]) == 0
    assert main(["fit", "--ckpt_path", "made.ckpt", "--trainer.accelerator", "cpu", "--trainer.max_steps", "1"]) == 0
    more = ["--data.path", "text.txt", "--data.batch_size", "2", "--data.context", "16", "--trainer.max_steps", "1"]
    begin = ["--init_from", "made.ckpt", "--data", "TextData", "--trainer.accelerator", "cpu"]
    assert main(["fit", *begin, *more, "--trainer.limit_val_batches", "1"]) == 0


def test_upcycling_draws_from_its_seed(folder: Path, capsys) -> None:
    """Whatever was drawn before."""
    net = partial(Decoder, d_model=8, num_layers=1, num_heads=2, d_ff=8, num_experts=2, context=8, sparse=[])
    save_checkpoint(LanguageModule(net, vocab_size=5), folder / "dense.ckpt")
    made = []
    for number, seed in enumerate(("1", "1", "2")):
        torch.manual_seed(number)
        options = ["--num_experts", "2", "--noise", "0.1", "--seed", seed, "--out", f"{number}.ckpt"]
        assert main(["upcycle", "dense.ckpt", *options]) == 0
        made.append(LanguageModule.load_from_checkpoint(f"{number}.ckpt").state_dict()["net.blocks.0.mlp.experts.w1"])
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


@pytest.mark.slow
def test_fewer_experts_are_measured_on_the_checkpoints_data(taught: Path, run) -> None:
    for command, options in SHRINK.items():
        out = f"{command}.ckpt"
        code, told, error = run(command, str(taught), *options, "--batches", "2", "--out", out)
        assert code == 0, error
        assert "held-out loss" in told
        assert "used blocks.1.mlp" in told
        made = LanguageModule.load_from_checkpoint(out)
        assert len(made.sparse_layers) == (0 if command == "to-dense" else 1)
        assert run("generate", "--ckpt_path", out, "--prompt", "the", "--max_new_tokens", "3")[0] == 0
    code, _, error = run("prune", str(taught), "--keep", "2", "--no_data", "--by", "similarity", "--out", "blind.ckpt")
    assert code == 0
    assert "nothing was measured" in error


BAD = [
    ("prune", ["--keep", "9"], "9 experts cannot be left of the 4 of blocks.1.mlp"),
    ("merge", ["--experts", "4"], "4 experts cannot be left"),
    ("prune", ["--keep", "0"], "expected an integer of at least 1, got '0'"),
    ("prune", [], "--keep"),
    (
        "prune",
        ["--keep", "2", "--no_data"],
        "--by weight is measured on data: leave --no_data out, or take --by similarity",
    ),
    ("merge", ["--experts", "2", "--how", "sum"], "sum"),
    ("merge", ["--experts", "2", "--no_data", "--how", "usage"], "--how usage is measured on data: leave --no_data"),
    ("to-dense", ["--no_data", "--batches", "3"], "--batches 3 and --no_data contradict each other"),
    ("to-dense", ["--out", ""], "--out needs the name of a file"),
    ("upcycle", [], "has 1 sparse layers already (blocks.1.mlp, ...)"),
    (
        "prune",
        ["--keep", "2", "--out", "text.txt"],
        "--out text.txt is there already: name another file",
    ),
    ("to-dense", ["--out", "nowhere/made.ckpt"], "there is no folder 'nowhere'"),
]


@pytest.mark.slow
def test_what_cannot_be_made_is_told_before_anything_is_measured(taught: Path, folder: Path, run, monkeypatch) -> None:
    def measured(*_: object, **__: object) -> None:
        raise AssertionError("this takes minutes")

    monkeypatch.setattr("switchkit.convert.measuring.measure", measured)
    code, _, error = run("to-dense", str(taught), "--no_data", "--out", "dense.ckpt")
    assert code == 0
    # The raw probability of the best of four.
    assert "only data tell what the router's weights come to in blocks.1.mlp, often less than 1" in error
    for given in (
        ["to-dense", "dense.ckpt"],
        ["prune", str(taught), "--keep", "9"],
        ["merge", str(taught), "--experts", "4"],
    ):
        code, _, error = run(*given, "--out", "made.ckpt")
        assert code == 2
        assert "dense already" in error or "experts cannot be left" in error


@pytest.mark.slow
def test_bad_input_is_one_line_and_writes_nothing(taught: Path, folder: Path, run) -> None:
    text = (folder / "text.txt").read_bytes()
    for command, options, why in BAD:
        out = [] if "--out" in options else ["--out", "made.ckpt"]
        code, _, error = run(command, str(taught), *options, *out)
        assert code == 2, (command, options)
        assert why in error.strip().splitlines()[-1]
        assert "Traceback" not in error
        assert not (folder / "made.ckpt").exists()
        assert not list(folder.glob(".*.part"))
    assert (folder / "text.txt").read_bytes() == text


def test_without_scipy_the_package_and_another_way_are_named(folder: Path, run, monkeypatch) -> None:
    """Before the checkpoint is looked at. In training the router says it, in one line too."""
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    for more, instead in ([], "usage"), (["--no_data"], "mean"):
        code, _, error = run("to-dense", "gone.ckpt", "--out", "made.ckpt", *more)
        assert (code, error.count("\n")) == (2, 1)
        assert f"pip install 'switchkit[base]', or take --how {instead}" in error
    base = ["--model.moe.router", "base", "--model.net.allow_leak", "true"]
    code, _, error = run("fit", "-c", "small.yaml", *base, "--trainer.max_steps", "1")
    assert code == 2
    assert "Traceback" not in error
    assert "pip install 'switchkit[base]'" in error.splitlines()[-1]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("mad.ckpt", "mad.ckpt: there is no such file. Did you mean 'made.ckpt'? Give last for the newest below runs"),
        ("https://a.b/c.ckpt", "https://a.b/c.ckpt: download the checkpoint first"),
    ],
)
def test_a_checkpoint_that_is_not_there(folder: Path, run, given: str, told: str) -> None:
    (folder / "made.ckpt").touch()
    code, _, error = run("prune", given, "--keep", "2", "--out", "other.ckpt")
    assert code == 2
    assert told in error


@pytest.mark.parametrize(
    ("net", "tokenizer", "data"),
    [
        (partial(Decoder, context=8), CharTokenizer("ab"), "TextData --data.path FILE"),
        (EncoderDecoder, ByteTokenizer(), "SpanData --data.path FILE"),
        (EncoderDecoder, CharTokenizer("ab"), "PairData --data.source FILE --data.target FILE"),
    ],
    ids=["decoder", "sentinels", "none"],
)
def test_without_data_the_command_to_go_on_with_names_some_that_the_model_reads(net, tokenizer, data: str) -> None:
    module = LanguageModule(partial(net, d_model=8, num_heads=2, d_ff=8, num_experts=2), tokenizer=tokenizer)
    work = Conversion(Path("in.ckpt"), Path("made.ckpt"), module, None, None)
    assert work.go_on == f"switchkit fit --ckpt_path made.ckpt --data {data} --trainer.max_steps 1000"


def test_a_folder_of_hugging_face_is_to_be_imported_first(folder: Path, run) -> None:
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text("{}")
    code, _, error = run("upcycle", "hf", "--out", "made.ckpt")
    assert code == 2
    assert error.splitlines()[-1].endswith(
        "make a checkpoint of it first, with switchkit import-hf hf --out model.ckpt"
    )

"""describe --twin writes a recipe that fit trains, and that the packaged twins are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from switchkit.cli.arguments import read_arguments
from switchkit.cli.lightning import build
from switchkit.cli.recipes import dump_yaml, load_yaml
from switchkit.cli.settings import compose
from switchkit.counts import count
from switchkit.interop.files import save_checkpoint

SMALL = ["--config", "small.yaml"]


def settings(*argv: str) -> dict[str, Any]:
    tree = compose("fit", read_arguments(argv))
    return {name: value for name, value in tree.items() if value is not None}


@pytest.mark.slow
def test_the_recipe_goes_to_stdout_and_the_table_to_stderr(run):
    code, out, err = run("describe", *SMALL, "--twin", "flops")
    assert code == 0
    found = yaml.safe_load(out)
    given = settings(*SMALL)
    net = found["model"]["init_args"].pop("net")
    assert net["init_args"] == {"d_model": 16, "num_layers": 2, "num_heads": 2, "d_ff": 32, "context": 16, "sparse": []}
    assert found["model"]["init_args"] == {"losses": [], "optimizer": given["model"]["init_args"]["optimizer"]}
    assert {name: found[name] for name in ("seed_everything", "data", "trainer")} == {
        name: given[name] for name in ("seed_everything", "data", "trainer")
    }
    for line in ("# The dense twin of: --config small.yaml\n", "# Left out: the loss balance, the loss router_z.\n"):
        assert line in out
    sparse = count(build(SMALL).model.net, 16)
    for text in (out, err):
        (row,) = (line for line in text.splitlines() if "without routers" in line)
        assert row.replace("│", "").split()[-3:] == [f"{sparse.matched:,}", f"{sparse.matched:,}", "equal"]


@pytest.mark.parametrize("match", ["flops", "params"])
@pytest.mark.slow
def test_fit_trains_it_as_it_is(run, match):
    argv = ["--config", "more.yaml", "--model.net.sparse", "every(1)", "--plugins", "mine"]
    Path("more.yaml").write_text(
        "model: {init_args: {moe: {init_args: {router: {class_path: sigmoid, init_args: {k: 2}}}}}}\n"
        "trainer: {callbacks: [{class_path: UpdateRouterBias, init_args: {rate: 0.1}}, "
        "{class_path: LearningRateMonitor}, {class_path: FreezeRouter}]}\n"
    )
    code, out, _ = run("describe", *SMALL, *argv, "--twin", match, "--out", "dense.yaml")
    assert (code, out) == (0, "dense.yaml: train it with `switchkit fit --config dense.yaml`\n")
    text = Path("dense.yaml").read_text()
    assert "the callback UpdateRouterBias, the callback FreezeRouter." in text
    (kept,) = load_yaml(text)["trainer"]["callbacks"]
    assert kept["class_path"].endswith("LearningRateMonitor")
    assert load_yaml(text)["plugins"] == ["mine"]
    sparse = count(build([*SMALL, *argv]).model.net, 16)
    dense = count(build(["--config", "dense.yaml"]).model.net, 16)
    if match == "flops":
        assert dense.flops == sparse.matched
    else:
        # The bias of `sigmoid` is a buffer, so that 4 experts and a router of 4 rows are worth 4 * 32 + 2.
        assert dense.parameters == sparse.parameters
    assert match == "params" or run("fit", "--config", "dense.yaml")[0] == 0
    assert sorted(path.name for path in Path().glob("*.yaml")) == ["dense.yaml", "more.yaml", "small.yaml"]


@pytest.mark.daily("tiny_shakespeare")
@pytest.mark.parametrize("name", ["tiny_shakespeare", "t5_span", "t5_translate"])
def test_the_packaged_twins_are_those_that_it_writes(run, name):
    code, _, err = run("describe", "--config", name, "--twin", "flops", "--out", "dense.yaml")
    assert code == 0, err
    assert settings("--config", "dense.yaml") == settings("--config", f"{name}_dense")


@pytest.mark.slow
def test_of_a_checkpoint(taught, run):
    code, out, _ = run("describe", "--ckpt_path", "last", "--trainer.default_root_dir", "taught", "--twin", "flops")
    assert code == 0
    found = load_yaml(out)
    assert not {"ckpt_path", "init_from", "weights_only"} & found.keys()
    Path("dense.yaml").write_text(out)
    code, _, err = run("fit", "--config", "dense.yaml", "--trainer.max_steps", "1", "--trainer.accelerator", "cpu")
    assert code == 0, err
    code, out, _ = run("describe", *SMALL, "--init_from", str(taught), "--twin", "flops")
    assert code == 0
    assert "which the sparse model begins from" in out
    assert "init_from" not in load_yaml(out)


def test_what_is_left_is_said(run):
    code, out, _ = run(
        "describe", *SMALL, "--model.moe.experts", "gated_mlp", "--model.net.expert_d_ff", "11", "--twin=flops"
    )
    assert code == 0
    assert "(no whole width is exact: -" in out


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--twin", "memory"], "--twin: invalid choice: 'memory' (choose from"),
        (["--twin", "flop"], "Did you mean 'flops'?"),
        (["--twin"], "--twin: expected one argument"),
        (["--twin", "flops", "--out"], "--out: expected one argument"),
        (["--twn", "flops"], "switchkit describe: unknown option '--twn'. Did you mean '--twin'?"),
        (["--confg", "x"], "fit has no option 'confg'. Did you mean 'config'?"),
        (["--out", "dense.yaml"], "give --twin flops or --twin params too"),
        (
            ["--twin", "flops", "--out", "text.txt"],
            "--out text.txt is there already: name another file",
        ),
        (["--twin", "flops", "--out", "none/dense.yaml"], "there is no folder 'none': create it first"),
        (["--twin", "flops", "--model.net.sparse=[]"], "this model is dense already: give one with sparse layers"),
        (["--twin", "flops", "--model.moe.router", "relu"], "relu lets a token choose any number of experts"),
        (["--twin", "params", "--model.net.sparse_attention=[0]"], "sparse_attention: a dense model has no place"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(run, argv, told):
    before = sorted(Path().iterdir())
    text = Path("text.txt").read_text()
    code, out, err = run("describe", *SMALL, *argv)
    assert (code, out) == (2, "")
    (line,) = (line for line in err.splitlines() if line.startswith("switchkit: error:"))
    assert told in line
    assert sorted(Path().iterdir()) == before
    assert Path("text.txt").read_text() == text


@pytest.mark.slow
def test_a_student_that_follows_from_its_teacher_is_dense_already(run):
    save_checkpoint(build(SMALL).model, Path("teacher.ckpt"))
    given = ["-c", "distill", "--model.teacher", "teacher.ckpt", "--data", "TextData", "--data.path", "text.txt"]
    code, out, err = run("describe", *given, "--data.context", "16", "--twin", "flops")
    assert (code, out) == (2, "")
    assert "this model is dense already" in err


def test_help_names_it(run):
    code, out, _ = run("describe", "--help")
    assert code == 0
    assert "--twin {flops,params}" in out


def test_yaml_that_is_written_is_read_as_it_was():
    values = {
        "text": ["1e3", "null", "on", "2020-01-01", "", " x", "a: b", "#", "\n", "ä", "12_0", ".5e1"],
        "numbers": [1e-5, 2.5e-3, 1e22, 3, -0.0, float("inf"), True, None],
        "nested": [{"a": [[1, 2], [3]]}, {}],
    }
    assert load_yaml(dump_yaml(values)) == values
    assert list(load_yaml(dump_yaml({"b": 1, "a": 2}))) == ["b", "a"]
    one = {"a": 1}
    assert "&" not in dump_yaml([one, one])

"""``switchkit compare`` on models of seconds: what it writes, how it goes on, what it refuses."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from switchkit.cli.recipes import comparisons
from switchkit.compare.definition import define
from switchkit.compare.plan import cli_of, composed, takes_seed
from switchkit.report import plots

COMPARISON = """\
# Small against smaller.
base: [small.yaml]
seeds: 2
budget: steps=6
runs:
  dense: {model: {init_args: {net: {init_args: {sparse: []}}, losses: []}}}
  moe:
    - small.yaml
    - model: {init_args: {moe: {init_args: {router: {init_args: {jitter: 0.1}}}}}}
"""

# A callback that ends the process's run as a kill or a signal would, once, at a step of one run.
ENDING = """\
import signal
from pathlib import Path
import lightning as L

class Killed(BaseException):
    pass

class EndAt(L.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, *rest) -> None:
        wanted = Path("end.txt")
        if trainer.global_step != self.step or not wanted.exists():
            return
        place, how = wanted.read_text().split()
        if place in str(trainer.default_root_dir):
            wanted.unlink()
            if how == "kill":
                raise Killed
            signal.raise_signal(getattr(signal, how))
"""
TIMES = {"seconds", "tokens_per_second", "faster_in_time"}


@pytest.fixture
def small(folder: Path) -> Path:
    (folder / "both.yaml").write_text(COMPARISON)
    (folder / "ending.py").write_text(ENDING)
    recipe = yaml.safe_load((folder / "small.yaml").read_text())
    recipe["data"]["init_args"]["validation_prefix"] = 0
    ending = {"class_path": "ending.EndAt", "init_args": {"step": 4}}
    recipe["trainer"] |= {"limit_val_batches": 1.0, "callbacks": [ending]}
    (folder / "small.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def untimed(path: Path) -> list[dict[str, str]]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows(path)]


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """They take as long as all the rest of a tiny comparison: one test has them."""
    if "done" not in request.fixturenames:
        monkeypatch.setattr(plots, "find_spec", lambda name: None)


EVERY = ("--every", "2", "--plugins", "ending")


@pytest.fixture
def done(small: Path, run) -> Path:
    code, out, err = run("compare", "both.yaml", "--out", "whole", *EVERY)
    assert code == 0, err
    assert "Small against smaller." in out
    return small / "whole"


@pytest.mark.slow
def test_what_a_comparison_writes(done: Path, small: Path, run) -> None:
    runs = rows(done / "runs.csv")
    assert [(row["run"], row["seed"], row["steps"]) for row in runs] == [
        ("dense", "0", "6"), ("dense", "1", "6"), ("moe", "0", "6"), ("moe", "1", "6")
    ]  # fmt: skip
    assert len({row["held_out_loss"] for row in runs}) == 4
    curves = rows(done / "curves.csv")
    assert [row["step"] for row in curves] == ["2", "4", "6"] * 4
    for row in runs:
        # All of the held-out text is read for both: by the curve, and by the trainer at the end.
        assert float(row["curve_loss"]) == pytest.approx(float(row["held_out_loss"]), abs=1e-6)
        last = [c for c in curves if (c["run"], c["seed"]) == (row["run"], row["seed"])][-1]
        assert float(last["flops"]) == 3 * int(row["flops_per_token"]) * int(row["tokens"])
        assert int(row["tokens"]) == 6 * 4 * 16
    assert runs[0]["dropped"] == "" != runs[2]["dropped"]
    page = (done / "README.md").read_text()
    assert page.startswith("# Small against smaller.")
    for name in ("steps", "flops", "time"):
        assert (done / f"loss_by_{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"![loss_by_{name}](loss_by_{name}.png)" in page
    # Nothing half-written stays, and nothing goes elsewhere.
    assert not list(done.rglob("*.part"))
    assert not Path("runs").exists()
    again = run("compare", "both.yaml", "--out", "whole", *EVERY)
    assert again[0] == 0
    assert "4 of 4 runs are finished already" in again[1]
    assert rows(done / "runs.csv") == runs
    # A run of it is a run of fit with the recipe that it wrote.
    argv = [
        "--config",
        "whole/recipes/moe.yaml",
        "--seed_everything",
        "1",
        "--data.seed",
        "1",
        "--trainer.max_steps",
        "6",
    ]
    assert run("fit", *argv, "--trainer.default_root_dir", "alone")[0] == 0
    ours = torch.load(next((done / "runs/moe/seed1").rglob("last.ckpt")), weights_only=True)["state_dict"]
    alone = torch.load(next(Path("alone").rglob("last.ckpt")), weights_only=True)["state_dict"]
    assert all(torch.equal(ours[name], alone[name]) for name in ours)
    # More seeds of the same comparison are added.
    assert run("compare", "both.yaml", "--out", "whole", *EVERY, "--seeds", "3")[0] == 0
    more = rows(done / "runs.csv")
    assert len(more) == 6
    assert [row for row in more if row["seed"] != "2"] == runs
    # Another comparison is not written over it.
    code, _, err = run("compare", "both.yaml", "--out", "whole", *EVERY, "--model.net.d_ff", "40")
    assert code == 2
    assert (
        "whole belongs to another comparison: recipes.dense.model.init_args.net.init_args.d_ff is 32 there and 40"
        in err
    )
    code, _, err = run("compare", "both.yaml", "--out", "whole", *EVERY, "--budget", "steps=7")
    assert code == 2
    assert "belongs to another comparison: budget is 'steps=6' there and 'steps=7' here" in err


SAVES = "{class_path: SaveLast, init_args: {every_n_steps: 3}}"


@pytest.mark.slow
def test_an_interrupted_comparison_ends_with_the_very_rows(small: Path, run) -> None:
    argv = ("compare", "both.yaml", *EVERY, "--trainer.callbacks+", SAVES)
    assert run(*argv, "--out", "whole")[0] == 0
    argv = (*argv, "--out", "out")
    for place, how, code in (
        ("dense/seed0", "SIGINT", 130),
        ("moe/seed0", "kill", None),
        ("dense/seed1", "SIGTERM", 143),
    ):
        (small / "end.txt").write_text(f"{place} {how}")
        if code is None:
            with pytest.raises(BaseException, match="^$") as raised:
                run(*argv)
            assert type(raised.value).__name__ == "Killed"
        else:
            found, _, err = run(*argv)
            assert found == code
            assert "go on with: switchkit compare both.yaml --every 2" in err
        ended = small / "out" / "runs" / place
        assert not (ended / "result.json").exists()
        assert list(ended.rglob("last.ckpt"))
    assert run(*argv)[0] == 0
    for name in ("dense/seed0", "moe/seed0", "dense/seed1"):
        # It went on, and did not begin again.
        assert len(list((small / "out" / "runs" / name).glob("version_*"))) == 2
    assert len(list((small / "out" / "runs/moe/seed1").glob("version_*"))) == 1
    for name in ("runs.csv", "curves.csv"):
        assert untimed(small / "out" / name) == untimed(small / "whole" / name)


@pytest.mark.slow
def test_a_run_with_a_logger_of_its_own_goes_on_too(small: Path, run) -> None:
    logger = "{class_path: CSVLogger, init_args: {save_dir: mine, version: one}}"
    argv = ("compare", "both.yaml", *EVERY, "--trainer.callbacks+", SAVES, "--trainer.logger", logger, "--seeds", "1")
    argv = (*argv, "--trainer.log_every_n_steps", "1")
    (small / "end.txt").write_text("dense/seed0 kill")
    with pytest.raises(BaseException, match="^$"):
        run(*argv, "--out", "out")
    (saved,) = small.rglob("last.ckpt")
    assert saved.is_relative_to(small / "out/runs/dense/seed0")
    assert run(*argv, "--out", "out")[0] == 0
    second = rows(small / "out/runs/dense/seed0/version_1/metrics.csv")
    assert min(int(row["step"]) for row in second) == 3
    assert list((small / "mine").rglob("metrics.csv"))


@pytest.mark.slow
def test_runs_of_a_seed_read_the_same_batches(small: Path) -> None:
    batches = {}
    for entry in define(["both.yaml"]).entries:
        tree = composed(entry, [], ["ending"])
        Path(f"{entry.name}.yaml").write_text(yaml.safe_dump(tree))
        for seed in (0, 1):
            data = cli_of(Path(f"{entry.name}.yaml"), 6, seed, small, takes_seed(tree)).datamodule
            data.setup("fit")
            read = iter(data.train_dataloader())
            batches[entry.name, seed] = torch.stack([next(read)["tokens"] for _ in range(3)])
    for seed in (0, 1):
        assert torch.equal(batches["dense", seed], batches["moe", seed])
    assert not torch.equal(batches["moe", 0], batches["moe", 1])


@pytest.mark.slow
def test_a_run_that_fails_is_told_and_the_others_go_on(small: Path, run) -> None:
    text = COMPARISON + "  wild: {model: {init_args: {optimizer: {init_args: {lr: 1e30}}, warmup_steps: 0}}}\n"
    (small / "both.yaml").write_text(text)
    code, out, told = run("compare", "both.yaml", "--out", "out", "--seeds", "1", "--plugins", "ending")
    assert code == 1
    assert "1 of the runs failed (wild of seed 0): non-finite" in told
    assert "To try one again, delete its folder: out/runs/wild/seed0" in told
    assert "wild, seed 0" in out
    assert "FAILED: non-finite" in out
    found = {row["run"]: row for row in rows(small / "out" / "runs.csv")}
    assert found["wild"]["status"] == "failed"
    assert found["wild"]["held_out_loss"] == ""
    assert found["moe"]["status"] == "finished"
    assert "wild, seed 0, failed after" in (small / "out" / "README.md").read_text()
    assert "NonFiniteError" in (small / "out" / "runs/wild/seed0/error.txt").read_text()
    before = json.loads((small / "out" / "runs/wild/seed0/result.json").read_text())
    assert run("compare", "both.yaml", "--out", "out", "--seeds", "1", "--plugins", "ending")[0] == 1
    assert json.loads((small / "out" / "runs/wild/seed0/result.json").read_text()) == before


@pytest.mark.slow
def test_a_full_disk_stops_everything(small: Path, run, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the runs is called failed."""

    def full(content: object, file: object) -> None:
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 704 vs 598") from None  # as torch.save does

    monkeypatch.setattr(torch, "save", full)
    code, _, told = run("compare", "both.yaml", "--out", "out", *EVERY)
    assert code == 2
    assert "checkpoints/last.ckpt: No space left on device: free some" in told
    assert "failed" not in told
    assert not list(small.rglob("result.json"))


@pytest.mark.slow
def test_another_text_under_the_same_name_is_another_comparison(small: Path, run) -> None:
    argv = ("compare", "both.yaml", "--out", "out", "--budget", "steps=1", "--seeds", "1", "--plugins", "ending")
    assert run(*argv)[0] == 0
    text = small / "text.txt"
    text.write_text(text.read_text().replace("quick", "kciuq"))
    code, _, err = run(*argv, "--seeds", "2")
    assert code == 2
    assert "out belongs to another comparison: text.dense is" in err


@pytest.mark.slow
def test_recipes_and_a_budget_of_operations(small: Path, run) -> None:
    """Two files; and without matplotlib everything but the pictures."""
    wide = yaml.safe_load((small / "small.yaml").read_text())
    wide["model"]["init_args"]["net"]["init_args"]["d_ff"] = 256
    (small / "wide.yaml").write_text(yaml.safe_dump(wide))
    argv = ("small.yaml", "wide.yaml", "--seeds", "1", "--budget", "flops", "--trainer.max_steps", "5", *EVERY)
    code, out, err = run("compare", *argv)
    assert code == 0, err
    assert "pip install 'switchkit[plot]'" in out
    first, second = rows(small / "runs/compare/small_vs_wide/runs.csv")
    assert int(first["steps"]) == 5 > int(second["steps"]) >= 1
    ratio = int(second["flops_per_token"]) / int(first["flops_per_token"])
    assert int(second["steps"]) == int(5 / ratio)
    assert not list((small / "runs/compare").rglob("*.png"))
    assert "With one seed nothing can be said" in out


@pytest.mark.slow
def test_a_budget_of_minutes(small: Path, run) -> None:
    code, out, err = run("compare", "both.yaml", "--seeds", "1", "--budget", "minutes=0.003", "--out", "out", *EVERY)
    assert code == 0, err
    assert "ms a step" in out
    planned = json.loads((small / "out" / "comparison.json").read_text())["steps"]
    for row in rows(small / "out" / "runs.csv"):
        assert 1 <= int(row["steps"]) <= planned[row["run"]]
    # What was measured is not measured again.
    code, out, err = run("compare", "both.yaml", "--seeds", "1", "--budget", "minutes=0.003", "--out", "out", *EVERY)
    assert code == 0, err
    assert "ms a step" not in out


BAD = {
    "one recipe": (["small.yaml"], "compare needs two recipes or more, or one comparison"),
    "no file": (["small.yaml", "smal"], "there is no such file, nor a recipe of that name"),
    "twice": (["small.yaml", "small.yaml"], "two recipes are called 'small'"),
    "a comparison among recipes": (["both.yaml", "small.yaml"], "both.yaml is a comparison already; give it alone"),
    "no budget": (["both.yaml", "--budget", "days=1"], "--budget days=1: expected steps, steps=N"),
    "too small": (["both.yaml", "--budget", "flops=10"], "too little for a single step of dense, moe; one step takes"),
    "no seed": (["both.yaml", "--seeds", "0"], "--seeds: expected an integer of at least 1, got '0'"),
    "a seed": (["both.yaml", "--seed_everything", "3"], "--seeds N trains seeds 0 to N - 1"),
    "no validation": (
        ["both.yaml", "--trainer.limit_val_batches", "0.0"],
        "runs are compared by their validation loss",
    ),
    "no training": (["both.yaml", "--trainer.limit_train_batches=0"], "runs that train on nothing cannot be compared"),
    "steps": (["both.yaml", "--trainer.max_steps", "2"], "the budget is steps=6: give --budget steps=2"),
    "time": (["both.yaml", "--trainer.max_time", "00:00:01:00"], "--budget says how long runs train"),
    "a seed of the data": (["both.yaml", "--data.seed", "7"], "--data.seed 7: --seeds N trains seeds 0 to N - 1"),
    "a place": (["both.yaml", "--trainer.default_root_dir", "there"], "--out FOLDER says where runs are"),
    "no folder": (["both.yaml", "--out", ""], "--out needs the name of a folder"),
    "a folder at home": (["both.yaml", "--out=~/full"], "/full: this is there already"),
    "a part": (["both.yaml", "--data", "Text"], "run dense: --data: unknown data module 'Text'"),
    "a checkpoint": (["both.yaml", "--ckpt_path=last"], "a comparison goes on by itself"),
    "config": (["--config", "both.yaml"], "recipes are given without it"),
    "what is of fit": (["both.yaml", "--print_config"], "--print_config and --KEY.help are of `switchkit fit` alone"),
    "no twin": (["both.yaml", "--twin", "dens"], "no run is called so. Did you mean 'dense'?"),
    "an option": (["both.yaml", "--budgt", "steps"], "unknown option '--budgt'. Did you mean '--budget'?"),
    "an option of the trainer": (["both.yaml", "--max_steps", "2"], "It belongs to the trainer: --trainer.max_steps"),
    "a setting": (["both.yaml", "--model.net.d_fff", "3"], "run dense: --model.net.d_fff: Decoder has no parameter"),
    "no value": (["both.yaml", "--trainer.max_steps"], "--trainer.max_steps needs a value"),
    "not a comparison's folder": (["both.yaml", "--out", "full"], "--out full: this is there already"),
    "devices": (["both.yaml", "--trainer.devices", "2"], "trainer.devices 2: a comparison trains on one device"),
    "fast": (["both.yaml", "--trainer.fast_dev_run", "true"], "fast_dev_run leaves nothing to compare"),
    "a part that does not fit": (["both.yaml", "--model.moe.router", "top_k", "--model.moe.router.k", "9"], "k=9"),
}


@pytest.mark.daily(but=["no twin", "a seed of the data", "steps", "too small", "a part that does not fit"])
@pytest.mark.parametrize("name", BAD)
def test_bad_command_lines(small: Path, run, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(small))
    (small / "full").mkdir()
    (small / "full" / "letter.txt").write_text("mine")
    argv, told = BAD[name]
    (small / "both.yaml").write_text(COMPARISON.partition("    - model")[0])
    code, _, err = run("compare", *argv, "--plugins", "ending")
    assert code == 2
    assert told in err
    assert err.count("\n") == 1, err
    assert not Path("runs").exists()
    assert [path.name for path in (small / "full").iterdir()] == ["letter.txt"]


FILES = {
    "runs: {a: {}}": "expected a mapping of two runs or more",
    "runs: [a, b]": "expected a mapping of two runs or more",
    "runs: {a: small.yaml, b: 3}": "runs.b: expected the name of a recipe, a mapping, or a list of these; got 3",
    "runs: {a: small.yaml, b/c: small.yaml}": "letters, digits and - _ . + only",
    "runs: {a: small.yaml, _b: small.yaml}": "none of _ and . first, for it names a folder",
    "runs: {on: small.yaml, off: small.yaml}": "run True: YAML reads this as no text: write the name in quotes",
    "runs: {2: small.yaml, 4: small.yaml}\ntwin: 3": "twin: no run is called '3'",
    "runs: {2: small.yaml, 4: small.yaml}\nequal_flops: {2: 3}": "equal_flops: no run is called '3'",
    "runs: {a: small.yaml, b: small.yaml}\nseed: 3": "a comparison has no key 'seed'. Did you mean 'seeds'?",
    "runs: {a: small.yaml, b: small.yaml}\nseeds: many": "seeds: expected a number of seeds from 1 up, got 'many'",
    "runs: {a: small.yaml, b: small.yaml}\ntwin: c": "twin: no run is called 'c'",
    "runs: {a: small.yaml, b: small.yaml}\nequal_flops: b": "equal_flops: expected a mapping of a run to a run",
    "runs: {a: small.yaml, bb: small.yaml}\nequal_flops: {a: cb}": "no run is called 'cb'. Did you mean 'bb'?",
    "runs: {a: small.yaml, b: small.yaml}\nequal_flops: {a: b, b: a}": "a takes its steps from another run",
    "runs: {a: small.yaml, b: {model: {init_args: {nett: {}}}}}": "run b: bad.yaml: runs.b: model",
    "runs: {a: small.yaml, b: [small.yaml, {trainer: {limit_val_batches: 0}}]}": (
        "run b: trainer.limit_val_batches 0: runs are compared by their validation loss: leave it out"
    ),
    "runs: {a: small.yaml, b: [small.yaml, {trainer: {limit_train_batches: 0}}]}": "runs that train on nothing",
    "runs: {a: small.yaml, b: [small.yaml, {trainer: {max_stepps: 1}}]}": "runs.b: trainer.max_stepps: Trainer",
}


def test_names_that_yaml_reads_as_numbers(small: Path) -> None:
    text = "runs: {2: small.yaml, 4: small.yaml, 8: small.yaml}\ntwin: 2\nequal_flops: {8: 4}"
    (small / "numbers.yaml").write_text(text)
    found = define(["numbers.yaml"])
    assert [entry.name for entry in found.entries] == ["2", "4", "8"]
    assert (found.twin, found.equal_flops) == ("2", {"8": "4"})


@pytest.mark.parametrize("text", FILES)
def test_bad_comparison_files(small: Path, run, text: str) -> None:
    (small / "bad.yaml").write_text(text)
    code, _, err = run("compare", "bad.yaml", "--plugins", "ending")
    assert code == 2
    assert FILES[text] in err
    assert err.count("\n") == 1
    assert not Path("runs").exists()


def test_a_comparison_is_no_recipe(small: Path, run) -> None:
    code, _, err = run("fit", "--config", "compare/capacity")
    assert code == 2
    assert "this is a comparison of recipes, not a recipe: switchkit compare compare/capacity" in err
    code, out, _ = run("list", "recipes")
    assert "compare/base" in out
    assert "compare/capacity" not in out
    code, out, _ = run("list", "comparisons")
    assert "compare/capacity" in out
    assert "compare/base" not in out
    assert len(comparisons()) == 7


@pytest.mark.slow
def test_two_processes_do_not_train_one_comparison(small: Path, run) -> None:
    import fcntl

    (small / "out").mkdir()
    with (small / "out" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        code, _, err = run("compare", "both.yaml", "--out", "out", "--plugins", "ending")
    assert code == 2
    assert "another process is training this comparison now" in err
    shutil.rmtree(small / "out")

"""The commands that run a Trainer, on a model of seconds."""

from __future__ import annotations

import csv
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from switchkit import report
from switchkit.cli import main
from switchkit.cli.arguments import read_arguments
from switchkit.cli.errors import UserError
from switchkit.cli.lightning import build
from switchkit.cli.settings import compose

SMALL = ("-c", "small.yaml")


STOPPING = """
trainer:
  callbacks: {class_path: lightning.pytorch.callbacks.EarlyStopping, init_args: {monitor: val/loss}}
"""


def test_early_stopping_asks_for_no_loss_before_a_validation(folder, run):
    """The run ends within its first epoch, and has not validated."""
    (folder / "stopping.yaml").write_text(STOPPING)
    steps = ["--trainer.max_steps=2", "--trainer.val_check_interval=1.0", "--trainer.check_val_every_n_epoch=1"]
    code, _, error = run("fit", *SMALL, "-c", "stopping.yaml", *steps, "--trainer.limit_train_batches=4")
    assert code == 0, error


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("BatchSizeFinder", "trainer.callbacks: BatchSizeFinder changes the batch size in mid-run"),
        ("LearningRateFinder", "When using the learning rate finder, either `model` or `model.hparams`"),
    ],
)
def test_what_a_finder_cannot_do_is_one_line(folder, run, name, said):
    code, _, error = run("fit", *SMALL, "--trainer.callbacks+", name)
    assert code == 2
    assert error.splitlines()[-1].startswith(f"switchkit: error: {said}")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The run folder of two steps with a TopK of the user's file."""
    return tmp_path_factory.mktemp("trained")


@pytest.fixture
def runs(folder, trained, run) -> Path:
    if not any(trained.iterdir()):
        argv = [
            *SMALL,
            "--plugins",
            "mine",
            "--model.moe.router",
            "mine_top_k",
            "--trainer.default_root_dir",
            str(trained),
        ]
        code, _, error = run("fit", *argv)
        assert code == 0, error
    return trained


def settings(command, *argv):
    return compose(command, read_arguments(argv))


def router(found):
    return found["model"]["init_args"]["moe"]["init_args"]["router"]


def test_fit_writes_below_the_run_folder(runs):
    assert (runs / "version_0" / "checkpoints" / "last.ckpt").is_file()
    assert not Path("runs").exists()


def test_the_saved_configuration_runs_again_and_holds_import_paths(runs, run):
    saved = yaml.safe_load((runs / "version_0" / "config.yaml").read_text())
    assert saved["plugins"] == ["mine"]
    assert saved["model"]["init_args"]["moe"]["init_args"]["router"]["class_path"] == "mine.MyTopK"
    code, out, _ = run("fit", "-c", str(runs / "version_0" / "config.yaml"), "--print_config")
    assert code == 0
    assert yaml.safe_load(out) == saved


def test_configurations_in_order_then_the_command_line():
    Path("top_k.yaml").write_text("model: {init_args: {moe: {init_args: {router: top_k}}}}\ntrainer: {max_steps: 5}\n")
    found = settings("fit", "--trainer.max_steps", "7", *SMALL, "-c", "top_k.yaml")
    moe = found["model"]["init_args"]["moe"]["init_args"]
    # Nothing of the recipe's Switch with its jitter of 0.3; everything beside it stays.
    assert moe["router"] == {"class_path": "switchkit.routing.token_choice.TopK", "init_args": {}}
    assert moe["capacity"]["init_args"] == {"train": 1.25}
    assert found["trainer"]["max_steps"] == 7


def test_variables_come_before_configurations(monkeypatch):
    monkeypatch.setenv("SWITCHKIT_FIT__TRAINER__MAX_STEPS", "9")
    monkeypatch.setenv("SWITCHKIT_FIT__TRAINER__MAX_EPOCHS", "9")
    monkeypatch.setenv("SWITCHKIT_DATA", "elsewhere")
    found = settings("fit", *SMALL)
    assert found["trainer"]["max_steps"] == 2
    assert found["trainer"]["max_epochs"] == 9
    assert found["data"]["init_args"]["path"] == "text.txt"


def test_variables_wait_for_the_class_that_they_belong_to(monkeypatch):
    monkeypatch.setenv("SWITCHKIT_FIT__DATA__EVAL_BATCH_SIZE", "3")
    monkeypatch.setenv("SWITCHKIT_FIT__DATA__CONTEXT", "999")  # which the recipe says
    monkeypatch.setenv("SWITCHKIT_FIT__MODEL__MOE__GROUP", "batch")
    found = settings("fit", *SMALL, "--trainer.max_steps", "4")
    assert found["data"]["init_args"]["eval_batch_size"] == 3
    assert found["data"]["init_args"]["context"] != 999
    assert found["model"]["init_args"]["moe"]["init_args"]["group"] == "batch"
    assert router(found)["init_args"] == {"jitter": 0.3}
    monkeypatch.setenv("SWITCHKIT_FIT__DATA__BATCH_SIZ", "3")
    with pytest.raises(UserError, match=r"SWITCHKIT_FIT__DATA__BATCH_SIZ: .*batch_size"):
        settings("fit", *SMALL)


def test_plugins_in_a_configuration_and_a_router_beside_it(folder):
    (folder / "far").mkdir()
    (folder / "mine.py").rename(folder / "far" / "beside.py")
    recipe = Path("small.yaml").read_text().replace("{class_path: switch, init_args: {jitter: 0.3}}", "mine_top_k")
    (folder / "far" / "recipe.yaml").write_text(recipe + "plugins: [beside]\n")
    found = settings("fit", "-c", "far/recipe.yaml", "--plugins", "beside")
    assert router(found)["class_path"] == "beside.MyTopK"
    # By its file, so that the saved configuration finds it from here.
    assert found["plugins"] == ["far/beside.py"]


def test_a_saved_configuration_serves_a_sister_command():
    Path("saved.yaml").write_text(Path("small.yaml").read_text() + "verbose: true\nreturn_predictions: null\n")
    assert "verbose" not in settings("fit", "-c", "saved.yaml")
    assert settings("test", "-c", "saved.yaml")["verbose"] is True


def test_what_is_built():
    from switchkit.callbacks import SaveLast, TrainingBar
    from switchkit.checkpoints import AtomicCheckpointIO

    cli = build(SMALL)
    assert cli.model.tokenizer is cli.datamodule.tokenizer
    assert type(cli.model.net.blocks[1].mlp.router).__name__ == "Switch"
    assert [type(term).__name__ for term in cli.model.losses] == ["Balance", "RouterZ"]
    # The default callbacks, and checkpoints that are written whole and read as plain data.
    for kind in (SaveLast, TrainingBar):
        assert sum(isinstance(callback, kind) for callback in cli.trainer.callbacks) == 1
    assert isinstance(cli.trainer.strategy.checkpoint_io, AtomicCheckpointIO)
    assert cli.settings.weights_only is True


@pytest.mark.slow
def test_a_default_callback_is_not_added_to_its_like_nor_where_it_is_switched_off():
    from switchkit.callbacks import SaveLast, TrainingBar

    added = ["--trainer.callbacks+", "{class_path: SaveLast, init_args: {every_n_steps: 7}}"]
    cli = build([*SMALL, *added, "--trainer.enable_progress_bar", "false"])
    assert [c.every_n_steps for c in cli.trainer.callbacks if isinstance(c, SaveLast)] == [7]
    assert not any(isinstance(c, TrainingBar) for c in cli.trainer.callbacks)


def test_settings_of_the_checkpoint_come_first(runs):
    last = ["--plugins", "mine", "--trainer.default_root_dir", str(runs), "--ckpt_path", "last"]
    alone = settings("validate", *last)
    assert router(alone)["class_path"] == "mine.MyTopK"
    assert alone["data"]["init_args"]["batch_size"] == 4
    assert alone["ckpt_path"] == str(runs / "version_0" / "checkpoints" / "last.ckpt")
    edited = settings("validate", *last, "--model.moe.router.k", "3", "--data.batch_size", "2")
    assert (router(edited)["class_path"], router(edited)["init_args"]["k"]) == ("mine.MyTopK", 3)
    assert edited["data"]["init_args"]["batch_size"] == 2
    Path("part.yaml").write_text("model: {init_args: {moe: {init_args: {router: switch}}}}\n")
    assert router(settings("validate", *last, "-c", "part.yaml"))["class_path"].endswith("Switch")


@pytest.mark.slow
def test_the_tokenizer_of_the_checkpoint_is_kept_with_other_data(runs):
    Path("other.txt").write_text("the lazy dog\n" * 400)
    last = ["--plugins", "mine", "--ckpt_path", str(runs / "version_0" / "checkpoints" / "last.ckpt")]
    data = ["--data", "{class_path: TextData, init_args: {path: other.txt, context: 16, validation_prefix: 512}}"]
    cli = build([*last, *data], "test")
    assert "q" in cli.datamodule.tokenizer.characters
    assert cli.model.tokenizer == cli.datamodule.tokenizer


def test_a_checkpoint_never_causes_an_import(runs, run):
    code, _, err = run("validate", "--ckpt_path", str(runs / "version_0" / "checkpoints" / "last.ckpt"))
    assert code == 2
    assert err.count("\n") == 1
    assert "mine.MyTopK" in err


def test_what_a_recipe_names_may_be_named_by_the_checkpoint(runs):
    last = ["--ckpt_path", str(runs / "version_0" / "checkpoints" / "last.ckpt")]
    found = settings("validate", *SMALL, "--model.moe.router", "mine.MyTopK", *last)
    assert router(found)["class_path"] == "mine.MyTopK"


@pytest.mark.slow
def test_fit_goes_on_where_the_checkpoint_ends(runs, run):
    last = ["--plugins", "mine", "--trainer.default_root_dir", str(runs), "--ckpt_path", "last"]
    code, _, _ = run("fit", *last, "--trainer.max_steps", "3", "--trainer.accelerator", "cpu")
    assert code == 0
    saved = torch.load(runs / "version_1" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("option", ["ckpt_path", "init_from"])
def test_data_that_a_checkpoint_names_from_another_folder(runs, run, monkeypatch, option):
    """Unless a path of one's own is given, which is one's own to mend."""
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    path = str(runs / "version_0" / "checkpoints" / "last.ckpt")
    argv = ["fit", "--plugins", "mine", f"--{option}", path, "--trainer.accelerator", "cpu", "--trainer.max_steps", "3"]
    code, _, error = run(*argv)
    assert code == 2
    assert "data.path 'text.txt' does not exist (from " in error
    assert f"The checkpoint {path} has it by this name: run in the folder that it was trained in, or give" in error
    code, _, error = run(*argv, "--data.path", "gone.txt")
    assert code == 2
    assert "data.path 'gone.txt' does not exist (from " in error
    assert "has it by this name" not in error


@pytest.mark.slow
def test_the_speed_of_a_run_that_goes_on_is_of_its_own_steps(runs, run, monkeypatch):
    """One step of 4 sequences of 16 tokens."""
    tokens = []

    def speed(cli, wall):
        tokens.append(real(cli, wall) * wall)

    real = report.run._speed
    monkeypatch.setattr(report.run, "_speed", speed)
    first = str(runs / "version_0" / "checkpoints" / "last.ckpt")
    argv = ["fit", "--plugins", "mine", "--ckpt_path", first, "--trainer.accelerator", "cpu"]
    assert run(*argv, "--trainer.max_steps", "3")[0] == 0
    assert tokens == [pytest.approx(4 * 16)]


@pytest.mark.slow
@pytest.mark.parametrize(("unit", "most", "reached"), [("step", 2, 2), ("step", 1, 2), ("epoch", 1, 1)])
def test_a_run_that_was_at_its_end_says_so(folder, run, unit, most, reached):
    begun = ["fit", *SMALL, "--trainer.limit_train_batches", "2", "--trainer.max_steps", "-1"]
    assert run(*begun, f"--trainer.max_{unit}s", str(reached))[0] == 0
    first = ["--ckpt_path", "runs/version_0/checkpoints/last.ckpt"]
    code, out, _ = run(*begun, *first, f"--trainer.max_{unit}s", str(most))
    assert code == 0
    told = f"the checkpoint is at {unit} {reached} already, and trainer.max_{unit}s is {most}. To go on, raise"
    assert f"Nothing was trained: {told} --trainer.max_{unit}s" in out
    assert "speed" not in out
    assert "Result" not in out


@pytest.mark.slow
@pytest.mark.parametrize(("bare", "result"), [("false", "Result on the "), ("true", "Result, with no validation")])
def test_a_run_without_rows_of_training(folder, run, bare, result):
    code, out, err = run("fit", *SMALL, "--trainer.log_every_n_steps", "0", "--trainer.barebones", bare)
    assert code == 0, err
    assert result in out
    assert Path("runs/version_0/metrics.csv").exists() == (bare == "false")
    assert bool(list(Path("runs").rglob("last.ckpt"))) == (bare == "false")


@pytest.mark.slow
def test_averaged_weights_of_the_best_checkpoint_are_shown(run):
    """Those of the first validation, as the rate is far too large."""
    often = [
        "--trainer.val_check_interval",
        "2",
        "--trainer.check_val_every_n_epoch",
        "null",
        "--trainer.max_steps",
        "6",
    ]
    averaging = ["--trainer.callbacks+", "EMAWeightAveraging", "--trainer.callbacks.decay", "0.5"]
    code, _, err = run("fit", *SMALL, "--trainer.max_steps", "6", *often, *averaging, "--model.optimizer.lr", "3")
    assert code == 0, err
    assert run("validate", *SMALL, "--ckpt_path", "runs/version_0/checkpoints/best.ckpt")[0] == 0

    def last(version):
        with Path(f"runs/version_{version}/metrics.csv").open() as file:
            return list(csv.DictReader(file))[-1]["val/loss"]

    assert last(0) == last(1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "longer"),
    [
        (["max_steps", "2"], "--trainer.max_steps 4"),
        (["max_steps", "-1", "--trainer.max_epochs", "1"], "--trainer.max_epochs 2"),
        (["max_steps", "10000", "--trainer.max_time", "00:00:00:01"], "--trainer.max_time null"),
    ],
)
def test_a_run_goes_on_by_what_ended_it(run, given, longer):
    code, out, err = run("fit", *SMALL, f"--trainer.{given[0]}", *given[1:])
    assert code == 0, err
    command = next(line for line in out.splitlines() if line.startswith("  switchkit fit"))
    assert command.endswith(f"last.ckpt {longer}")


def test_validate_prints_the_loss(runs, run):
    checkpoint = str(runs / "version_0" / "checkpoints" / "last.ckpt")
    code, out, _ = run("validate", "--plugins", "mine", "--ckpt_path", checkpoint, "--trainer.accelerator", "cpu")
    assert code == 0
    assert "val/loss" in out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--help"], "--trainer.max_steps"),
        (["--model.moe.router.help", "top_k"], "--model.moe.router.normalize"),
        ([*SMALL, "--model.net.help"], "--model.net.num_layers"),
        (["--trainer.callbacks.help", "ModelCheckpoint"], "--trainer.callbacks.monitor"),
    ],
)
def test_help(run, argv, said):
    code, out, _ = run("fit", *argv)
    assert code == 0
    assert said in out


def test_describe_trains_nothing(run):
    code, out, _ = run("describe", *SMALL)
    assert code == 0
    assert "switch" in out
    assert not Path("runs").exists()


def test_describe_needs_no_memory(run):
    """A model that no machine holds."""
    sizes = {
        "d_model": 65536,
        "num_heads": 2,
        "d_ff": 262144,
        "num_experts": 400,
        "num_layers": 2,
        "sparse": "every(1)",
    }
    code, out, err = run("describe", *SMALL, *(f"--model.net.{name}={size}" for name, size in sizes.items()))
    assert (code, err) == (0, "")
    experts = 2 * 400 * 2 * 65536 * 262144
    total = int(re.search(r"([\d,]+) in all", out)[1].replace(",", ""))
    assert experts < total < 1.01 * experts


def test_describe_builds_what_needs_memory(run):
    """A part whose constructor reads values is built as ever, and nothing is said of that."""
    Path("reads.py").write_text(
        "from switchkit import Switch\n\n\nclass Reads(Switch):\n    def __init__(self, *sizes, **named):\n"
        "        super().__init__(*sizes, **named)\n        self.mean = self.weight.mean().item()\n",
        encoding="utf-8",
    )
    code, out, err = run("describe", *SMALL, "--model.moe.router", "reads.Reads")
    assert (code, err) == (0, "")
    assert "Reads" in out


def test_generate(runs, run):
    argv = ["--plugins", "mine", "--ckpt_path", "last", "--default_root_dir", str(runs), "--device", "cpu"]
    argv += ["--prompt", "the quick", "--max_new_tokens", "12"]
    code, out, err = run("generate", *argv)
    assert code == 0
    assert out.startswith("the quick")
    assert len(out) == len("the quick") + 12 + 1
    assert str(runs) in err
    assert run("generate", *argv)[1] == out
    assert run("generate", *argv, "--seed", "5")[1] != out
    greedy = run("generate", *argv, "--temperature", "0")[1]
    assert run("generate", *argv, "--top_k", "1")[1] == greedy
    code, out, err = run("generate", *argv, "--prompt", "€")
    assert (code, out) == (2, "")
    assert "'€'" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--prompt", ""], "--prompt is empty"),
        (["--temperature", "-1"], "--temperature: expected a finite number of at least 0, got '-1'"),
        (["--temperature", "nan"], "--temperature"),
        (["--top_p", "0"], "--top_p: expected a number above 0 and at most 1, got '0'"),
        (["--top_k", "0"], "--top_k: expected an integer of at least 1, got '0'"),
        (["--max_new_tokens", "x"], "--max_new_tokens"),
        (["--tempratur", "1"], "unknown option '--tempratur'. Did you mean '--temperature'?"),
        (["--ckpt_path", "no.ckpt"], "no.ckpt"),
        (["--device", "tpu9"], "--device tpu9"),
        (["--device", "meta"], "--device meta: expected cpu"),
        (["--device", ""], "--device '': there is no such kind of device"),
        (["--temperature", "0", "--top_k", "5"], "--temperature 0 takes the likeliest token and draws nothing"),
        (["more", "words"], "'more' belongs to no option"),
    ],
)
def test_mistakes_of_generate(run, argv, said):
    code, out, err = run("generate", "--ckpt_path", "x.ckpt", "--prompt", "a", *argv)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert said in err


def test_generate_names_the_missing_option(run):
    assert "--prompt" in run("generate", "--ckpt_path", "x.ckpt")[2]
    assert main(["generate", "--prompt", "a"]) == 2


@pytest.mark.slow
def test_a_run_folder_at_home(run, folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder / "home"))
    assert run("fit", "-c", "small.yaml", "--trainer.default_root_dir", "~/runs")[0] == 0
    assert {path.name for path in (folder / "home/runs/version_0").iterdir()} == {
        "checkpoints",
        "config.yaml",
        "metrics.csv",
    }
    assert not Path("~").exists()
    code, _, error = run("validate", "-c", "small.yaml", "--ckpt_path", "last", "--trainer.default_root_dir", "~/runs")
    assert code == 0, error


@pytest.mark.slow
def test_a_whole_number_stays_one():
    """1 is a batch, and 1.0 all of them: which of `int | float` is tried first depends on what typing has cached."""
    for given, kind in (("1", int), ("1.0", float)):
        cli = build([*SMALL, "--trainer.limit_val_batches", given])
        assert type(cli.settings.trainer.limit_val_batches) is kind
        assert type(cli.trainer.limit_val_batches) is kind


@pytest.mark.slow
def test_the_commands_to_go_on_with_run_as_they_are_printed(run, folder):
    """From a folder whose name a shell would take apart and rich would colour, on a text without spaces."""
    Path("text.txt").write_text("天地玄黃宇宙洪荒\n日月盈昃辰宿列張\n" * 60)
    code, out, err = run("fit", "-c", "small.yaml", "--trainer.default_root_dir", "my runs[lr=0.1]")
    assert code == 0, err
    lines = [line.strip() for line in out.splitlines() if line.startswith("  switchkit ")]
    assert len(lines) == 3
    assert "my runs[lr=0.1]/version_0/checkpoints/" in out
    for line in lines:
        code, _, err = run(*shlex.split(line)[1:])
        assert code == 0, err


@pytest.mark.slow
def test_predictions_at_home(run, folder, monkeypatch):
    home = folder / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    assert run("predict", "-c", "small.yaml", "--out=~/new/p.jsonl")[0] == 0
    assert (home / "new/p.jsonl").is_file()
    assert run("describe", "-c", "small.yaml", "--twin", "flops", "--out=~/t.yaml")[0] == 0
    written = (home / "t.yaml").read_text()
    code, _, err = run("describe", "-c", "small.yaml", "--twin", "params", "--out=~/t.yaml")
    assert code == 2
    assert "is there already" in err
    assert (home / "t.yaml").read_text() == written
    assert not Path("~").exists()


@pytest.mark.slow
def test_ctrl_c_in_the_last_evaluation_says_that_the_run_had_ended(run, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning.pytorch.Trainer.validate", interrupted)
    code, _, err = run("fit", *SMALL)
    assert code == 130
    path = "runs/version_0/checkpoints/last.ckpt"  # no validation came before it
    told = f"switchkit: the run had ended, its last evaluation is missing: switchkit validate --ckpt_path {path}"
    assert told in err.splitlines()
    assert Path(path).is_file()


@pytest.mark.slow
def test_a_checkpoint_of_weights_alone_is_told(taught, run):
    content = torch.load(taught, weights_only=True)
    del content["optimizer_states"], content["lr_schedulers"]
    torch.save(content, "weights.ckpt")
    code, _, err = run("fit", "--ckpt_path", "weights.ckpt", "--trainer.max_steps", "4")
    assert code == 2
    told = "weights.ckpt has weights alone, from which no run can go on: begin a new one with --init_from weights.ckpt"
    assert err.splitlines()[-1] == f"switchkit: error: {told}, or load_state_dict in code"
    assert run("validate", "--ckpt_path", "weights.ckpt")[0] == 0
    assert run("fit", *SMALL, "--init_from", "weights.ckpt")[0] == 0


@pytest.mark.slow
def test_a_callback_with_an_enum_among_its_defaults(run):
    timer = "{class_path: Timer, init_args: {duration: '00:00:05:00'}}"
    code, _, err = run("fit", *SMALL, "--trainer.callbacks+", timer)
    assert code == 0, err
    config = "runs/version_0/config.yaml"
    written = yaml.safe_load(Path(config).read_text())["trainer"]["callbacks"]
    assert [callback["init_args"]["interval"] for callback in written] == ["step"]
    code, _, err = run("fit", "--config", config)
    assert code == 0, err

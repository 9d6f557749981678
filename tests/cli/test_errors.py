"""Each mistake of a user: exit code 2, and one line with the key, the value, the nearest name, what is accepted."""

from __future__ import annotations

import errno
import gzip
from argparse import ArgumentTypeError
from pathlib import Path

import pytest

from switchkit.cli.errors import UserError, first_process, one_line
from switchkit.cli.options import seed
from switchkit.cli.ranges import check_ranges, check_run

SMALL = ["fit", "--config", "small.yaml"]

MISTAKES = {
    # configurations
    "no model": (["fit"], ["no model is given", "--config NAME"]),
    "missing configuration": (["fit", "-c", "smal"], ["--config smal", "no such file", "Recipes:"]),
    "nearly a file": (["fit", "-c", "smal.yaml"], ["--config smal.yaml", "Did you mean 'small.yaml'?"]),
    "a configuration without a name": (["fit", "-c", ""], ["--config needs a file or the name of a recipe"]),
    "no number": (["fit", "-c", "number.yaml"], ["number.yaml: not valid YAML: invalid literal for int()"]),
    "very many brackets": (["fit", "-c", "deep.yaml"], ["deep.yaml: not valid YAML: maximum recursion depth"]),
    "the command line's": (["fit", "-c", "config.yaml"], ["config.yaml: config belongs to the command line alone"]),
    "a folder": (["fit", "-c", "."], ["--config .", "folder"]),
    "not UTF-8": (["fit", "-c", "latin.yaml"], ["latin.yaml: not a UTF-8 text", "byte 5"]),
    "not YAML": (["fit", "-c", "broken.yaml"], ["broken.yaml, line 3, column 2: not valid YAML"]),
    "a key twice": (["fit", "-c", "twice.yaml"], ["twice.yaml, line 2", "'model' is given twice"]),
    "not a mapping": (["fit", "-c", "list.yaml"], ["list.yaml: expected a mapping", "['a']"]),
    "no --config": (["fit", "small.yaml"], ["'small.yaml' is not an option", "--config small.yaml"]),
    "below fit": (["fit", "-c", "below.yaml"], ["below.yaml: fit:", "at the top of the file"]),
    "unknown key": (["fit", "-c", "key.yaml"], ["key.yaml: modle:", "Did you mean 'model'?"]),
    "a name in a file": (
        [*SMALL, "-c", "typo.yaml"],
        ["typo.yaml: model.moe.router: unknown router 'tpo_k'. Did you mean 'top_k'? Accepted: ", "round_robin"],
    ),
    "an argument beside init_args": (
        [*SMALL, "-c", "beside.yaml"],
        ["model.moe.router: 'k' stands beside", "init_args"],
    ),
    "no subconfiguration": ([*SMALL, "--model.moe", "no.yaml"], ["there is no file 'no.yaml'"]),
    # options
    "unknown option": ([*SMALL, "--confg", "a"], ["--confg: fit has no option 'confg'. Did you mean 'config'?"]),
    "a trainer option on top": ([*SMALL, "--max_steps", "3"], ["--max_steps", "--trainer.max_steps"]),
    "nearly a trainer option on top": ([*SMALL, "--max_step", "3"], ["Did you mean 'trainer.max_steps'?"]),
    "unknown trainer option": (
        [*SMALL, "--trainer.max_step", "3"],
        ["--trainer.max_step", "Did you mean 'max_steps'?"],
    ),
    "no value": ([*SMALL, "--trainer.max_steps"], ["--trainer.max_steps needs a value"]),
    # parts
    "unknown part": (
        [*SMALL, "--model.moe.router", "tpo_k"],
        ["--model.moe.router: unknown router 'tpo_k'", "'top_k'?"],
    ),
    "experts for a router": ([*SMALL, "--model.moe.router", "mixed"], ["'mixed' is experts, not a router"]),
    "wrong kind": ([*SMALL, "--model.moe.router", "balance"], ["'balance' is a loss, not a router", "top_k"]),
    "a loss among losses": (
        [*SMALL, "--model.losses", "[balanc]"],
        ["--model.losses[0]", "unknown loss", "'balance'?"],
    ),
    "abstract base": ([*SMALL, "--model.moe.router", "switchkit.Router"], ["abstract base", "top_k"]),
    "half a router": ([*SMALL, "--model.moe.router", "switchkit.routing.base.LinearRouter"], ["abstract base"]),
    "unknown module": ([*SMALL, "--model.moe.router", "no.Such"], ["cannot import 'no.Such'", "no module named 'no'"]),
    "unknown class": ([*SMALL, "--model.moe.router", "mine.NeedY"], ["module 'mine' has no 'NeedY'", "'Needy'?"]),
    "not a router": ([*SMALL, "--model.moe.router", "mine.NotARouter"], ["mine.NotARouter is not a router"]),
    "settings of a function": (
        [*SMALL, "--model.moe.router", "{class_path: mine.a_router, init_args: {k: 2}}"],
        ["a_router is a function and takes no settings"],
    ),
    "unknown callback": (
        [*SMALL, "--trainer.callbacks+=LearningRateMonitr"],
        ["--trainer.callbacks+: unknown Callback", "Did you mean 'LearningRateMonitor'?"],
    ),
    "no part": ([*SMALL, "--model.moe", "3"], ["--model.moe: expected", "got 3"]),
    "nothing to edit": (
        [*SMALL, "--model.moe.experts.width", "3"],
        ["--model.moe.experts: no class is named", "'width'"],
    ),
    # parameters
    "unknown parameter": (
        [*SMALL, "--model.moe.router.jiter", "3"],
        ["--model.moe.router.jiter: Switch has no parameter 'jiter'. Did you mean 'jitter'? Parameters: jitter, "],
    ),
    "unknown slot": ([*SMALL, "--model.moe.rooter", "switch"], ["MoELayer has no parameter 'rooter'", "'router'?"]),
    "half a word": ([*SMALL, "--data.batch", "3"], ["TextData has no parameter 'batch'. Did you mean 'batch_size'?"]),
    "a size": (
        [*SMALL, "--model.moe.router.d_model", "3"],
        ["--model.moe.router.d_model", "whatever builds the Switch"],
    ),
    "missing parameter": (
        [*SMALL, "--model.moe.router", "mine.Needy"],
        ["model.moe.router: Needy needs 'temperature', which was not given"],
    ),
    "wrong type": ([*SMALL, "--model.moe.router.jitter", "abc"], ["jitter: expected a number, got 'abc'"]),
    "no integer": ([*SMALL, "--model.net.d_model", "2.5"], ["--model.net.d_model: expected an integer, got '2.5'"]),
    "wrong choice": (
        [*SMALL, "--model.moe.group", "sequnce"],
        ["--model.moe.group: expected 'sequence', 'batch' or an integer, got 'sequnce'. Did you mean 'sequence'?"],
    ),
    "a number or a tensor": ([*SMALL, "--model.optimizer.lr", "x"], ["--model.optimizer.lr: expected a number"]),
    "a list": ([*SMALL, "--model.losses", "[balance"], ["--model.losses: '[balance' is not valid YAML"]),
    "the tokenizer's place": ([*SMALL, "--model.tokenizer", "CharTokenizer"], ["model.tokenizer", "data.tokenizer"]),
    # plugins
    "no plugin": ([*SMALL, "--plugins", "no_such"], ["--plugins: cannot import 'no_such'", "no such module"]),
    "a plugin that fails": (
        [*SMALL, "--plugins", "fails"],
        ["cannot import 'fails': ZeroDivisionError: division by zero (fails.py, line 1)"],
    ),
    "a plugin's file that fails": (
        [*SMALL, "--plugins", "fails.py"],
        ["cannot import 'fails.py': ZeroDivisionError: division by zero (fails.py, line 1)"],
    ),
    "nameless plugin": ([*SMALL, "--plugins"], ["--plugins needs the name"]),
    "plugins as a number": (
        [*SMALL, "-c", "plugins.yaml"],
        ["plugins.yaml: plugins: expected a list of modules, got 3"],
    ),
    # checkpoints
    "no checkpoint": ([*SMALL, "--ckpt_path", "no.ckpt"], ["--ckpt_path no.ckpt: there is no such file"]),
    "no last checkpoint": ([*SMALL, "--ckpt_path", "last"], ["no checkpoint below runs"]),
    "a checkpoint far away": ([*SMALL, "--ckpt_path", "https://a/b.ckpt"], ["download the checkpoint first"]),
    "a damaged checkpoint": (["validate", "--ckpt_path", "damaged.ckpt"], ["damaged.ckpt", "truncated or damaged"]),
    "another file": (
        ["validate", "--ckpt_path", "text.txt"],
        ["text.txt is no checkpoint, but a file of another kind"],
    ),
    "a folder of a run": (
        ["validate", "--ckpt_path", "one"],
        ["one is a folder and no whole checkpoint", "the newest below it is one/damaged.ckpt"],
    ),
    "a checkpoint without a name": ([*SMALL, "--ckpt_path", ""], ["--ckpt_path: expected a path or 'last', got ''"]),
    "a recipe's beginning and another": (
        [*SMALL, "--config", "resumed.yaml", "--init_from", "b.ckpt"],
        ["resumed.yaml: ckpt_path a.ckpt goes on with a run, and --init_from b.ckpt begins a new one"],
    ),
    "two beginnings": (
        [*SMALL, "--ckpt_path", "a.ckpt", "--init_from", "b.ckpt"],
        ["--ckpt_path a.ckpt goes on with a run, and --init_from b.ckpt begins a new one"],
    ),
    # of another command
    "predict's": (["validate", "-c", "small.yaml", "--out", "x"], ["--out: validate has no option", "to predict"]),
    "fit's": (["test", "-c", "small.yaml", "--init_from", "x"], ["--init_from: test has no option", "to fit"]),
    "a change of a recipe": (
        ["fit", "-c", "routing/base"],
        ["'moe' belongs to nothing", "give a recipe that does before it, such as --config tiny_shakespeare"],
    ),
    "a file as a plugin": ([*SMALL, "--plugins", "text.txt"], ["--plugins: 'text.txt' is no module", "my_file"]),
    "no devices": ([*SMALL, "--trainer.strategy", "expert_parallel_0"], ["unknown strategy 'expert_parallel_0'"]),
}

FILES = {
    "latin.yaml": b"# x: \xe9\n",
    "broken.yaml": b"model:\n  a: [1, 2\nb: 3\n",
    "twice.yaml": b"model: {}\nmodel: {}\n",
    "list.yaml": b"- a\n",
    "number.yaml": b"a: 0x_\n",
    "deep.yaml": b"a: " + b"[" * 3000,
    "config.yaml": b"config: small.yaml\n",
    "below.yaml": b"fit: {model: LanguageModule}\n",
    "key.yaml": b"modle: {}\n",
    "typo.yaml": b"model: {init_args: {moe: {init_args: {router: tpo_k}}}}\n",
    "beside.yaml": b"model: {init_args: {moe: {init_args: {router: {class_path: top_k, k: 2}}}}}\n",
    "plugins.yaml": b"plugins: 3\n",
    "fails.py": b"1 / 0\n",
    "damaged.ckpt": b"PK\x03\x04",
    "resumed.yaml": b"ckpt_path: a.ckpt",
    "one/damaged.ckpt": b"PK\x03\x04",
}


@pytest.mark.parametrize("name", MISTAKES)
def test_one_line_that_says_what_to_write(run, name):
    argv, said = MISTAKES[name]
    for file, content in FILES.items():
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).write_bytes(content)
    code, out, err = run(*argv)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("switchkit: error: ")
    assert [part for part in said if part not in err] == [], err


BUILDS = {
    "a value of a part": (
        ["--model.moe.router.jitter", "3"],
        ["error: model.moe.router.jitter: jitter must be in"],
    ),
    "a value of the model": (
        ["--model.warmup_steps", "-1"],
        ["error: model.warmup_steps: warmup_steps must be"],
    ),
    "a value of one of several losses": (
        ["--model.losses", "[balance, {class_path: router_z, init_args: {weight: -2}}]"],
        ["error: model.losses[1].weight: the weight of a loss must be a finite number >= 0; got -2.0"],
    ),
    "more choices than experts": (
        ["--model.moe.router", "top_k", "--model.moe.router.k", "9"],
        ["error: model.moe.router.k: k=9 choices of a token are impossible"],
    ),
    "no text": (["--data.path", "no.txt"], ["no.txt"]),
    "a text without a name": (["--data.path", ""], ["data.path is an empty name"]),
    "a compressed text": (["--data.path", "text.txt.gz"], ["'text.txt.gz' is compressed by gzip: unpack it"]),
    "a rate below 0": (["--model.optimizer.lr", "-1"], ["optimizer: Invalid learning rate: -1.0"]),
    "no rate": (["--model.optimizer.lr", ".inf"], ["optimizer AdamW: lr must be a finite number; got inf"]),
    "no decay": (["--model.optimizer.betas", "[0.9, 2]"], ["optimizer: Invalid beta parameter at index 1: 2.0"]),
    "a capacity beyond counting": (
        ["--model.moe.capacity.train", "1e30"],
        ["error: model.moe.capacity.train: capacity factor train must be at most 2147483647; got 1e+30"],
    ),
    "sources without an encoder": (["--data", "SpanData"], ["data SpanData: its batches have a source", "TextData"]),
    "long windows": (["--data.context", "32"], ["data.context 32 is longer than model.net.context 16"]),
    "a package that is not there": (
        ["--trainer.logger", "CometLogger"],
        ["comet"],
    ),
    "a package of one of several loggers that is not there": (
        ["--trainer.logger", "[{class_path: CSVLogger, init_args: {save_dir: runs}}, CometLogger]"],
        ["comet", "CometLogger"],
    ),
    "no GPU": (["--trainer.accelerator", "tpu"], ["trainer: ", "torch_xla"]),
    "no strategy": (["--trainer.strategy", "foo"], ["--trainer.strategy: ", "'foo'", "expert_parallel"]),
    "a run folder in a file": (["--trainer.default_root_dir", "text.txt/x"], ["text.txt is a file, and no folder"]),
    "validation beyond the epoch": (
        ["--trainer.val_check_interval", "100000", "--trainer.check_val_every_n_epoch", "1"],
        ["`val_check_interval` (100000)", "check_val_every_n_epoch=None"],
    ),
    "a callback's value": (
        ["--trainer.callbacks+", "{class_path: EarlyStopping, init_args: {monitor: a, mode: foo}}"],
        ["mode", "foo"],
    ),
    "a type of jsonargparse": (["--model.optimizer.betas", "[1, a]"], ["model.optimizer.betas: "]),
}


@pytest.mark.daily(
    "a value of a part",
    "no text",
    "a rate below 0",
    "a package that is not there",
    "no strategy",
    "a type of jsonargparse",
)
@pytest.mark.parametrize("name", BUILDS)
def test_errors_of_constructors_are_one_line_too(run, name):
    argv, said = BUILDS[name]
    Path("text.txt.gz").write_bytes(gzip.compress(b"some text"))
    code, _, err = run(*SMALL, *argv)
    told = [line for line in err.splitlines() if line.startswith("switchkit: error: ")]
    assert code == 2
    assert len(told) == 1
    assert "Traceback" not in err, err
    assert [part for part in said if part not in told[0]] == [], err


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--seed_everything", "-1", "seed_everything -1: expected an integer from 0 to 4294967295"),
        ("--trainer.accumulate_grad_batches", "0", "trainer.accumulate_grad_batches 0: expected a number of batches"),
        ("--trainer.log_every_n_steps", "-1", "trainer.log_every_n_steps -1: expected a number of steps from 1, or 0"),
        ("--trainer.check_val_every_n_epoch", "0", "trainer.check_val_every_n_epoch 0: expected a number of epochs"),
        ("--trainer.val_check_interval", "0", "trainer.val_check_interval 0: expected a number of batches from 1"),
        ("--trainer.gradient_clip_val", "-1", "trainer.gradient_clip_val -1"),
        (
            "--trainer.num_sanity_val_steps",
            "-3",
            "trainer.num_sanity_val_steps -3: expected a number of batches from 0",
        ),
        ("--trainer.num_nodes", "0", "trainer.num_nodes 0: expected a number of machines from 1"),
        ("--trainer.min_steps", "3", "trainer.min_steps 3: expected at most trainer.max_steps, which is 2"),
        ("--trainer.limit_train_batches", "0", "trainer.limit_train_batches 0: fit would read nothing"),
        ("--trainer.devices", "x", "trainer.devices x: expected a number from 1"),
        ("--trainer.devices", "-2", "trainer.devices -2: expected a number from 1"),
        ("--trainer.default_root_dir", "text.txt", "trainer.default_root_dir text.txt: this is a file; give a folder"),
    ],
)
def test_settings_that_lightning_trips_over_are_told_at_once(folder, run, option, value, said):
    code, out, error = run("fit", "-c", "small.yaml", option, value)
    assert (code, out) == (2, "")
    assert error.count("\n") == 1
    assert said in error
    assert not (folder / "runs").exists()


@pytest.mark.slow
def test_what_the_trainer_refuses_by_a_type_error_is_one_line(run):
    code, out, error = run("fit", "-c", "small.yaml", "--trainer.devices", "2,")
    assert (code, out) == (2, "")
    assert error.splitlines()[-1].startswith("switchkit: error: trainer: `devices` selected with `CPUAccelerator`")
    assert "Traceback" not in error


def test_what_is_read_is_not_written_over(folder, run):
    text = (folder / "text.txt").read_bytes()
    code, _, error = run("tokenizer", "train", "text.txt", "--vocab_size", "400", "--out", "./text.txt")
    assert code == 2
    assert "is one of the texts" in error
    code, _, error = run("predict", "-c", "small.yaml", "--out", "text.txt")
    assert code != 0
    assert "--out text.txt is there already: name another file" in error
    assert (folder / "text.txt").read_bytes() == text


@pytest.mark.parametrize(("command", "part"), [("validate", "val"), ("test", "test"), ("predict", "predict")])
def test_an_evaluation_of_nothing_is_refused(run, command, part):
    code, out, error = run(command, "-c", "small.yaml", f"--trainer.limit_{part}_batches", "0.0")
    assert (code, out) == (2, "")
    assert f"trainer.limit_{part}_batches 0: {command} would read nothing" in error


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_in_is_told_at_once(run, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # the superuser may write anywhere
    code, out, error = run("fit", "-c", "small.yaml", "--trainer.default_root_dir", "deep/down")
    assert (code, out) == (2, "")
    assert f"trainer.default_root_dir deep/down: the folder {Path.cwd()} cannot be written in" in error
    assert run("describe", "-c", "small.yaml", "--trainer.limit_train_batches", "0")[0] == 0  # which does neither


@pytest.mark.daily("EarlyStopping")
@pytest.mark.parametrize("name", ["EarlyStopping", "ModelCheckpoint"])
def test_a_metric_that_nobody_logs_is_one_line_with_those_that_are_there(run, name):
    """It is known at the first validation."""
    spec = f'{{"class_path": "{name}", "init_args": {{"monitor": "val/los"}}}}'
    code, _, error = run(*SMALL, "--trainer.val_check_interval", "1", "--trainer.callbacks", f"[{spec}]")
    assert code == 2
    line = error.splitlines()[-1]
    assert line.startswith("switchkit: error: ")
    assert name in line
    assert "val/los" in line
    assert "val/loss" in line
    assert "Traceback" not in error


@pytest.mark.slow
def test_weights_that_nobody_trained_are_told(run):
    code, _, error = run("validate", "-c", "small.yaml")
    assert code == 0
    assert "no --ckpt_path was given: validate runs the model with the weights that it begins with" in error


@pytest.mark.slow
def test_a_text_for_an_encoder_decoder(run):
    code, _, error = run("fit", "-c", "t5_span", "--data", "TextData", "--data.path", "text.txt")
    assert code == 2
    assert "data TextData: its batches have no source for the encoder of model.net: take SpanData" in error


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"])
def test_the_first_of_a_launcher_s_processes_speaks(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Of any launcher: torchrun and Lightning's own say RANK or LOCAL_RANK, SLURM its own."""
    for other in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(other, raising=False)
    assert first_process()
    monkeypatch.setenv(name, "0")
    assert first_process()
    monkeypatch.setenv(name, "1")
    assert not first_process()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_or_a_full_share_of_it(number: int) -> None:
    """Whoever writes."""
    error = OSError(number, "no room", "runs/a.ckpt")
    assert one_line(error) == "runs/a.ckpt: no room: free some, or write to another disk"
    assert one_line(OSError(errno.EIO, "broken", "runs/a.ckpt")) is None


def test_seeds_are_those_of_torch() -> None:
    assert seed(str(2**63 - 1)) == 2**63 - 1
    for wrong in ("-1", str(2**63), "1.5"):
        with pytest.raises(ArgumentTypeError, match="an integer from 0 to 2"):
            seed(wrong)


@pytest.mark.parametrize("devices", [0, -2])
def test_a_run_has_a_device(devices: int) -> None:
    check_ranges({"trainer": {"devices": -1}})
    with pytest.raises(UserError, match=f"trainer.devices {devices}: expected a number from 1, -1 for all, auto"):
        check_ranges({"trainer": {"devices": devices}})


def test_a_run_of_no_steps_may_read_nothing() -> None:
    check_run({"trainer": {"limit_train_batches": 0, "max_steps": 0}}, "fit")
    with pytest.raises(UserError, match="trainer.limit_train_batches 0: fit would read nothing"):
        check_run({"trainer": {"limit_train_batches": 0, "max_steps": 5}}, "fit")


def test_a_run_of_no_steps_has_no_least_number_of_them() -> None:
    check_ranges({"trainer": {"min_steps": 2, "max_steps": -1}})
    with pytest.raises(UserError, match=r"trainer.min_steps 2: expected at most trainer.max_steps, which is 0"):
        check_ranges({"trainer": {"min_steps": 2, "max_steps": 0}})

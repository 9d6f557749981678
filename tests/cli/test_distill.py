"""Distilling from the command line: what comes from the teacher, what a student's checkpoint does without one."""

from __future__ import annotations

import csv
import io
import json
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest

from switchkit import ByteTokenizer, Decoder, EncoderDecoder, LanguageModule, checkpoints, registry
from switchkit.cli.arguments import read_arguments
from switchkit.cli.lightning import build
from switchkit.cli.settings import compose
from switchkit.interop.files import save_checkpoint

SHORT = ["--trainer.max_steps", "4", "--trainer.val_check_interval", "2", "--trainer.accelerator", "cpu"]
SHORT += ["--trainer.num_sanity_val_steps", "0", "--trainer.enable_progress_bar", "false"]


@pytest.fixture
def distilled(taught, run) -> Path:
    before = taught.read_bytes()
    code, out, err = run("fit", "-c", "distill", "--model.teacher", str(taught), *SHORT)
    assert code == 0, err
    assert "compression" in out
    assert "0.75 cross-entropy + 0.25 divergence" in out
    assert taught.read_bytes() == before
    return checkpoints.last(Path("runs"))


@pytest.mark.slow
def test_everything_comes_from_the_teacher(taught):
    cli = build(["-c", "distill", "--model.teacher", str(taught)])
    assert cli.datamodule.path == "text.txt"
    assert cli.datamodule.batch_size == 4
    assert cli.model.tokenizer == cli.datamodule.tokenizer == cli.model.teacher.tokenizer
    assert cli.model.sparse_layers == []
    assert cli.model.net.context == 16
    assert cli.model.optimizer.keywords["lr"] == 1e-3
    assert (cli.model.alpha, cli.model.temperature, cli.model.init) == (0.25, 1.0, "non_expert")


def test_what_is_given_wins(taught):
    Path("other.txt").write_text("a lazy dog jumps.\n" * 100)
    given = ["--data.path", "other.txt", "--data.batch_size", "2", "--model.alpha", "0.5", "--model.init", "fresh"]
    given += ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.1", "--model.net", "Decoder"]
    given += ["--model.net.d_model", "8", "--model.net.num_heads", "2", "--model.net.sparse", "[]", "--model.losses"]
    cli = build(["-c", "distill", "--model.teacher", str(taught), *given, "[]"])
    assert cli.datamodule.path == "other.txt"
    assert cli.datamodule.batch_size == 2
    # The other text's own characters are fewer: the vocabulary stays the teacher's.
    assert cli.datamodule.tokenizer == cli.model.teacher.tokenizer
    assert cli.model.net.d_model == 8
    assert cli.model.spec["init_args"]["optimizer"]["class_path"] == "torch.optim.sgd.SGD"


@pytest.mark.slow
def test_a_student_lives_without_its_teacher(distilled, run):
    """Evaluated with and without the settings of its run, continued in text, and begun from."""
    shutil.rmtree("taught")
    module = LanguageModule.load_from_checkpoint(distilled)
    assert type(module) is LanguageModule
    assert not module.sparse_layers
    settings = str(next(Path("runs").rglob("config.yaml")))
    cpu = ["--trainer.accelerator", "cpu"]
    # What is typed is read as such beside the settings of a run that had a teacher too.
    for given in ([], ["-c", settings], ["-c", settings, "--trainer.limit_val_batches", "1"]):
        code, out, err = run("validate", *given, "--ckpt_path", str(distilled), *cpu)
        assert code == 0, err
        assert "val/loss" in out
    code, out, err = run("generate", "--ckpt_path", str(distilled), "--prompt", "the", "--max_new_tokens", "5")
    assert code == 0, err
    new = ["--init_from", str(distilled), "--data", "TextData", "--data.path", "text.txt", "--data.context", "16"]
    assert type(build(new).model).__name__ == "LanguageModule"


@pytest.mark.slow
def test_a_sparse_student_shrinks_without_its_teacher(taught, run):
    net = {"d_model": 8, "num_layers": 2, "num_heads": 2, "d_ff": 8, "context": 16, "num_experts": 4, "sparse": "[1]"}
    more = ["--model.net", "Decoder", "--model.init", "fresh"]
    more += [text for name, value in net.items() for text in (f"--model.net.{name}", str(value))]
    code, _, err = run("fit", "-c", "distill", "--model.teacher", str(taught), *more, *SHORT)
    assert code == 0, err
    student = checkpoints.last(Path("runs"))
    shutil.rmtree("taught")
    for command, options in {"prune": ["--keep", "2"], "to-dense": ["--how", "mean"]}.items():
        code, out, err = run(command, str(student), *options, "--batches", "2", "--out", f"{command}.ckpt")
        assert code == 0, err
        assert "held-out loss" in out


@pytest.mark.slow
def test_a_run_goes_on_with_its_teacher(taught, distilled, run):
    """By the checkpoint alone, and by the saved settings; as one that never stopped."""
    whole = checkpoints.read(distilled)["state_dict"]
    shutil.rmtree("runs")
    stop = [*SHORT, "--trainer.limit_train_batches", "4"]
    code, _, err = run("fit", "-c", "distill", "--model.teacher", str(taught), *stop, "--trainer.max_steps", "2")
    assert code == 0, err
    half = checkpoints.last(Path("runs"))
    settings = str(next(Path("runs").rglob("config.yaml")))
    assert type(build(["--ckpt_path", str(half), *SHORT]).model).__name__ == "DistillModule"
    # The schedule of the short run ended sooner, so only the first steps could be the same.
    for given in (["--ckpt_path", "last"], ["-c", settings, "--ckpt_path", "last"]):
        code, _, err = run("fit", *given, *SHORT)
        assert code == 0, err
    done = checkpoints.read(checkpoints.last(Path("runs")))
    assert done["global_step"] == 4
    assert done["state_dict"].keys() == whole.keys()
    assert done["switchkit"]["teacher"]["sha256"] == checkpoints.read(half)["switchkit"]["teacher"]["sha256"]
    Path(taught).rename("moved.ckpt")
    code, _, err = run("fit", "--ckpt_path", str(half), *SHORT)
    assert code == 2
    assert "last.ckpt: there is no such file" in err
    assert "if it was moved, say where to" in err
    more = ["--model.teacher", "moved.ckpt", "--trainer.max_steps", "6"]
    code, _, err = run("fit", "--ckpt_path", str(half), *SHORT, *more)
    assert code == 0, err


def test_no_teacher(run):
    code, _, err = run("fit", "-c", "distill")
    assert code == 2
    assert "switchkit fit --config tiny_shakespeare" in err
    assert "switchkit fit --config distill --model.teacher" in err
    assert err.count("\n") == 1


def test_what_does_not_fit(taught, run):
    given = ["fit", "-c", "distill", "--model.teacher", str(taught)]
    code, _, err = run(*given, "--data.tokenizer", "ByteTokenizer")
    assert code == 2
    assert "reads another vocabulary (CharTokenizer of" in err
    code, _, err = run(*given, "--model.net", "EncoderDecoder")
    assert code == 2
    assert "the teacher is a decoder and the student an encoder-decoder" in err
    code, _, err = run(*given, "--data", "SpanData", "--data.path", "text.txt")
    assert code == 2
    assert not Path("runs").exists() or not list(Path("runs").rglob("*.ckpt"))
    code, _, err = run(*given[:-1], "small.yaml")
    assert code == 2
    assert "small.yaml" in err


def test_an_imported_teacher_brings_no_data(folder, run):
    net = partial(Decoder, d_model=8, num_layers=1, num_heads=2, d_ff=8, num_experts=2, context=16, sparse=[0])
    save_checkpoint(LanguageModule(net, tokenizer=ByteTokenizer()), Path("bare.ckpt"))
    code, _, err = run("fit", "-c", "distill", "--model.teacher", "bare.ckpt")
    assert code == 2
    assert "brings no data" in err
    more = ["--data", "TextData", "--data.path", "text.txt", "--data.context", "16", *SHORT]
    code, _, err = run("fit", "-c", "distill", "--model.teacher", "bare.ckpt", *more)
    assert code == 0, err


@pytest.mark.slow
def test_pairs(folder, run):
    """Task data over a teacher of one's own."""
    lines = [f"red {n}" for n in range(40)]
    Path("en.txt").write_text("\n".join(lines) + "\n")
    Path("xx.txt").write_text("\n".join(line[::-1] for line in lines) + "\n")
    small = ["--model.net.d_model", "16", "--model.net.encoder_layers", "2", "--model.net.d_ff", "16"]
    files = ["--data.source", "en.txt", "--data.target", "xx.txt", "--data.batch_size", "4"]
    own = [*small, *files, *SHORT, "--trainer.callbacks", "[]"]
    code, _, err = run("fit", "-c", "t5_translate", *own, "--trainer.default_root_dir", "taught")
    assert code == 0, err
    path = str(checkpoints.last(Path("taught")))
    code, out, err = run("fit", "-c", "distill", "--model.teacher", path, *SHORT)
    assert code == 0, err
    assert "compression" in out


@pytest.mark.slow
@pytest.mark.parametrize("count", ["1", "1.0"])
def test_the_closing_table_has_both_on_the_same_text(dense, run, count):
    """A student with its teacher's weights and shape, untrained: no difference, on a part of the text or on all."""
    sizes = "{d_model: 16, num_layers: 2, num_heads: 2, d_ff: 32, context: 16, sparse: []}"
    net = f"{{class_path: Decoder, init_args: {sizes}}}"
    Path("same.yaml").write_text(f"model: {{init_args: {{net: {net}, losses: []}}}}\n")
    more = ["-c", "same.yaml", "--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0", *SHORT]
    more += ["--trainer.limit_val_batches", count, "--data.eval_batch_size", "2"]
    code, out, err = run("fit", "-c", "distill", "--model.teacher", str(dense), *more)
    assert code == 0, err
    assert ("Result on the first batch of the held-out text" in out) == (count == "1")
    assert "the student is 0.0000" in out
    loss = next(line for line in out.splitlines() if "validation loss" in line).split()[4]
    assert f"{loss} nats per token; the student" in out


# -- prepare --teacher -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_words_of_a_teacher(taught, run):
    """Written of its own data, and learned from where the checkpoint is gone, in the windows that were asked about."""
    code, _, err = run("prepare", "--teacher", str(taught), "--out", "words", "--k", "5", "--device", "cpu")
    assert code == 0, err
    assert "5 of 29 symbols for each of" in err
    Path(taught).unlink()
    cli = build(["-c", "distill", "--model.teacher", "words"])
    assert cli.datamodule.stride == 16
    code, out, err = run("fit", "-c", "distill", "--model.teacher", "words", *SHORT)
    assert code == 0, err
    assert "compression" in out
    path = checkpoints.last(Path("runs"))
    shutil.move("words", "other")
    code, out, err = run("validate", "--ckpt_path", str(path), "--trainer.accelerator", "cpu")
    assert code == 0, err
    more = ["--trainer.max_steps", "6"]
    code, _, err = run("fit", "--ckpt_path", str(path), "--model.teacher", "other", *SHORT, *more)
    assert code == 0, err


def test_words_on_another_text(taught, run):
    Path("other.txt").write_text("the lazy dog.\n" * 100)
    code, _, err = run("prepare", "other.txt", "--teacher", str(taught), "--out", "words", "--stride", "4")
    assert code == 0, err
    cli = build(["-c", "distill", "--model.teacher", "words"])
    assert (cli.datamodule.path, cli.datamodule.stride) == ("other.txt", 4)


def test_words_of_an_imported_teacher(folder, run):
    """It brings no data, so that the text is read as its model can."""
    Path("short.txt").write_text("the lazy dog.\n" * 500)
    asked = ["short.txt", "--k", "2", "--device", "cpu"]
    for kind, net in {
        "decoder": partial(Decoder, num_layers=1, context=16),
        "pair": partial(EncoderDecoder, encoder_layers=1),
    }.items():
        sizes = {"d_model": 8, "num_heads": 2, "d_ff": 8, "sparse": []}
        tokenizer = ByteTokenizer()
        save_checkpoint(LanguageModule(partial(net, **sizes), tokenizer=tokenizer, losses=[]), Path(f"{kind}.ckpt"))
        code, _, err = run("prepare", "--teacher", f"{kind}.ckpt", *asked, "--out", kind)
        assert code == 0, err
    found = {name: json.loads(Path(name, "teacher.json").read_text())["data"] for name in ("decoder", "pair")}
    assert found["decoder"]["init_args"]["context"] == 16
    assert found["pair"]["class_path"].endswith("SpanData")
    code, _, err = run("prepare", "--teacher", "decoder.ckpt", *asked, "--context", "9", "--out", "nine")
    assert code == 0, err
    assert json.loads(Path("nine/teacher.json").read_text())["data"]["init_args"]["context"] == 9
    for more, told in (
        (["decoder.ckpt", *asked, "--context", "17"], "data.context 17 is longer than model.net.context 16"),
        (["pair.ckpt", *asked, "--context", "9"], "--context 9: the data of pair.ckpt, SpanData, are no windows"),
        (["decoder.ckpt"], "does not say what it was trained on: name a text (prepare --teacher CKPT FILE)"),
    ):
        code, _, err = run("prepare", "--teacher", *more, "--out", "words")
        assert code == 2
        assert told in err.splitlines()[-1]


@pytest.mark.slow
def test_words_of_a_teacher_with_a_part_of_ones_own(folder, once, run):
    teacher = once("own", "--plugins", "mine", "--model.moe.router", "mine_top_k")
    forget("mine")
    argv = ("prepare", "--teacher", str(teacher), "--device", "cpu", "--out", "words")
    code, _, err = run(*argv)
    assert code == 2
    assert "mine.MyTopK is needed" in err
    code, _, err = run(*argv, "--plugins", "mine")
    assert code == 0, err
    forget("mine")
    code, _, err = run(
        "prune", str(teacher), "--keep", "2", "--batches", "1", "--out", "made.ckpt", "--plugins", "mine"
    )
    assert code == 0, err
    assert "Go on with: switchkit fit --ckpt_path made.ckpt --plugins mine --trainer.max_steps" in " ".join(err.split())


def forget(plugin: str) -> None:
    """As a process would that has not imported it."""
    module = sys.modules.pop(plugin, None)
    for name, cls in list(registry._table.items()):
        if cls.__module__ == plugin and module is not None:
            del registry._table[name]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["text.txt", "--k", "3"], "--k needs --teacher"),
        (["--teacher", "T", "--held_out", "0.2"], "--held_out is not for --teacher"),
        ([], "required: FILE"),
        (["text.txt", "small.yaml", "--teacher", "T"], "reads one text, or a folder of tokens; got 2"),
        (["--teacher", "gone.ckpt"], "--teacher gone.ckpt: there is no such file"),
        (["--teacher", "T", "--k", "100"], "k must be from 1 to 29"),
        (["--teacher", "T", "--k", "0"], "expected an integer of at least 1"),
    ],
    ids=str,
)
def test_bad_words(taught, run, more, message):
    given = [str(taught) if one == "T" else one for one in more]
    code, _, err = run("prepare", *given, "--out", "words")
    assert code == 2
    assert message in err.strip().splitlines()[-1]
    assert not Path("words").exists()


# -- distill-report --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_report(taught, distilled, dense, run):
    given = ["distill-report", "--device", "cpu", "--dense", str(dense), "--teacher", str(taught)]
    given += ["--student", f"mix={distilled}"]
    code, out, err = run(*given)
    assert code == 0, err
    assert "mix" in out
    assert "nats per" in out
    code, out, _ = run(*given, "--json")
    rows = {row["name"]: row for row in json.loads(out)["rows"]}
    assert list(rows) == ["dense", "teacher", "mix"]
    code, out, _ = run("validate", "--ckpt_path", str(dense), "--trainer.accelerator", "cpu")
    loss = float(next(line for line in out.splitlines() if "val/loss" in line).split()[3])
    # limit_val_batches is the run's, not the checkpoint's: validate reads the whole text too.
    assert rows["dense"]["loss"] == pytest.approx(loss, rel=1e-5)
    code, out, _ = run(*given, "--csv")
    listed = list(csv.DictReader(io.StringIO(out)))
    assert [row["name"] for row in listed] == ["dense", "teacher", "mix"]
    assert float(listed[2]["loss"]) == rows["mix"]["loss"]
    assert float(listed[2]["losses"]) == rows["mix"]["loss"]
    # A second seed of the student, here the dense model: each seed's loss in the order given, and their mean.
    by_seed = [rows["mix"]["loss"], rows["dense"]["loss"]]
    code, out, _ = run(*given, "--student", f"mix={dense}", "--json")
    mix = json.loads(out)["rows"][2]
    assert mix["losses"] == by_seed
    assert mix["loss"] == pytest.approx(sum(by_seed) / 2)


@pytest.mark.slow
def test_what_does_not_compare(taught, dense, run):
    given = ["distill-report", "--device", "cpu", "--dense", str(dense), "--teacher", str(taught), "--student"]
    Path("other.txt").write_text("the quick brown fox jumps over the lazy dog!\n" * 100)
    Path("same.txt").write_text("lazy dog. the quick brown fox jumps over the\n" * 100)
    for name in ("other", "same"):
        more = ["--data.path", f"{name}.txt", "--trainer.default_root_dir", name, "--trainer.max_steps", "1"]
        code, _, err = run("fit", "-c", "small.yaml", *more, "--trainer.limit_val_batches", "0")
        assert code == 0, err
    code, _, err = run(*given, f"x={checkpoints.last(Path('other'))}")
    assert code == 2
    assert "losses per token compare within one vocabulary only" in err
    same = f"x={checkpoints.last(Path('same'))}"
    code, _, err = run(*given, same)
    assert code == 2
    assert "was trained on another text" in err
    code, _, err = run(*given, same, "--text", "text.txt")
    assert code == 0, err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--student", "mix"], "expected NAME=CKPT"),
        (["--student", "teacher=x.ckpt"], "teacher is given by --teacher"),
        (["--student", "x=gone.ckpt"], "--student gone.ckpt: there is no such file"),
        (["--student", "x=gone.ckpt", "--json", "--csv"], "give one of them"),
        ([], "required: --student"),
    ],
    ids=str,
)
def test_bad_options(run, more, message):
    code, _, err = run("distill-report", "--dense", "text.txt", "--teacher", "text.txt", *more)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_a_recipe_names_the_teacher_and_changes_its_data(taught):
    """In one file: the data have no class before the teacher is read."""
    Path("mine.yaml").write_text(
        f"model: {{init_args: {{teacher: {taught}}}}}\ndata: {{init_args: {{batch_size: 3}}}}\n"
    )
    found = compose("fit", read_arguments(["-c", "distill", "-c", "mine.yaml"]))
    assert found["data"]["class_path"].endswith("TextData")
    assert found["data"]["init_args"]["batch_size"] == 3

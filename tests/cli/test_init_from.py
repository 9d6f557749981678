"""A new run from another one's model, vocabulary and weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch

from switchkit import CharTokenizer, Decoder, LanguageModule, checkpoints
from switchkit.cli.arguments import read_arguments
from switchkit.cli.lightning import build
from switchkit.cli.settings import compose

OWN = """\
import lightning as L
import torch


class Own(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def train_dataloader(self):
        return torch.utils.data.DataLoader([{"tokens": torch.ones(2)}])

    def training_step(self, batch, index):
        return (self.weight * batch["tokens"]).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
"""


@pytest.fixture
def first(taught: Path) -> Path:
    """The last checkpoint of a run of two steps."""
    return taught


def bare() -> None:
    """A checkpoint that says nothing of data: nothing was trained."""
    module = LanguageModule(
        partial(Decoder, d_model=8, num_layers=1, num_heads=2, d_ff=8, num_experts=2, context=8, sparse=[0]),
        tokenizer=CharTokenizer("abc"),
    )
    checkpoint = {"state_dict": module.state_dict(), "epoch": 0, "global_step": 0}
    module.on_save_checkpoint(checkpoint)
    torch.save({**checkpoint, "pytorch-lightning_version": L.__version__}, "bare.ckpt")


def weights(path: Path) -> dict[str, torch.Tensor]:
    return checkpoints.read(path)["state_dict"]


@pytest.mark.slow
def test_a_new_run_begins_with_the_weights_and_the_vocabulary_of_another(first, run):
    """Other text with fewer characters, another dropout and rate: the model is the first one's, at step 0."""
    Path("other.txt").write_text("the lazy dog.\n" * 200)
    new = ["--init_from", str(first), "--data", "TextData", "--data.path", "other.txt", "--data.context", "16"]
    new += ["--model.net.dropout", "0.2", "--trainer.accelerator", "cpu", "--trainer.max_steps", "2"]
    cli = build(new)
    assert cli.model.net.dropout.p == 0.2
    assert cli.model.tokenizer.characters == "".join(sorted(set(Path("text.txt").read_text())))
    for name, value in weights(first).items():
        assert torch.equal(cli.model.state_dict()[name], value)
    code, _, err = run("fit", *new, "--trainer.default_root_dir", "second", "--trainer.num_sanity_val_steps", "0")
    assert code == 0, err
    content = checkpoints.read(checkpoints.last(Path("second")))
    assert content["global_step"] == 2
    assert not torch.equal(content["state_dict"]["net.norm.weight"], weights(first)["net.norm.weight"])


@pytest.mark.slow
def test_without_data_of_its_own_it_takes_the_checkpoint_s(first, run):
    """As resuming does; what is said of them edits them, and another class replaces them whole."""
    cli = build(["--init_from", str(first), "--data.batch_size", "3"])
    assert (cli.datamodule.path, cli.datamodule.context, cli.datamodule.batch_size) == ("text.txt", 16, 3)
    assert build(["--init_from", str(first), "--data", "TextData"]).datamodule.path is None
    new = ["--trainer.accelerator", "cpu", "--trainer.max_steps", "1", "--trainer.limit_val_batches", "0"]
    code, out, err = run("fit", "--init_from", str(first), *new)
    assert code == 0, err
    assert "text.txt, 4,500 characters" in out
    assert "Result, with no validation" in out


@pytest.mark.parametrize(
    ("command", "option"),
    [("fit", "--init_from"), *((name, "--ckpt_path") for name in ("fit", "validate", "test", "predict"))],
)
def test_a_run_without_data_is_one_line(run, command, option):
    """A checkpoint that was imported says none."""
    bare()
    code, _, err = run(command, option, "bare.ckpt", "--trainer.accelerator", "cpu")
    assert code == 2
    assert err.splitlines()[-1].startswith(
        f"switchkit: error: {command} needs data: none were given, and bare.ckpt says none"
    )
    assert "Traceback" not in err
    assert not Path("runs").exists()


def test_a_module_of_ones_own_may_bring_its_data(run):
    Path("own.py").write_text(OWN)
    more = ["--trainer.fast_dev_run", "true", "--trainer.accelerator", "cpu"]
    code, _, err = run("fit", "--plugins", "own", "--model", "own.Own", *more)
    assert code == 0, err


def test_a_run_that_goes_on_keeps_its_own_weights(first):
    """The saved configuration of a fine-tuning run still says where it began; resuming does not go back there."""
    Path("saved.yaml").write_text(Path("small.yaml").read_text() + "init_from: gone.ckpt\n")
    argv = ["-c", "saved.yaml", "--ckpt_path", str(first)]
    assert compose("fit", read_arguments(argv))["ckpt_path"] == str(first)
    cli = build(argv)
    torch.manual_seed(1)
    assert not torch.equal(cli.model.net.blocks[0].mlp.up.weight, weights(first)["net.blocks.0.mlp.up.weight"])


@pytest.mark.slow
def test_a_model_of_other_sizes_is_refused(first, run):
    Path("wide.yaml").write_text(Path("small.yaml").read_text().replace("d_model: 16", "d_model: 8"))
    code, _, err = run("fit", "-c", "wide.yaml", "--init_from", str(first))
    assert code != 0
    assert "--init_from" in err
    assert "of another shape" in err
    assert "net.embed.weight [" in err
    assert "replaces the checkpoint's" in err


def test_a_missing_file_is_named(run):
    code, _, err = run("fit", "-c", "small.yaml", "--init_from", "gone.ckpt")
    assert code != 0
    assert "--init_from gone.ckpt: there is no such file" in err


@pytest.mark.slow
def test_a_model_without_data_is_described_and_audited_with_its_own_vocabulary(run, tmp_path):
    """As an imported checkpoint is: nothing was trained, so no data is in it."""
    bare()
    code, out, err = run("describe", "--ckpt_path", "bare.ckpt")
    assert code == 0, err
    assert "1, of which 1 sparse" in out
    code, out, err = run("audit", "--ckpt_path", "bare.ckpt")
    assert code == 0, err
    assert "on 3 sequences of 8 random tokens" in out

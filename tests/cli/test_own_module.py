"""A LightningModule, or data, of one's own: trained, gone on with, and what is shown of them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from switchkit import CharTokenizer, Decoder, LanguageModule, checkpoints
from switchkit.attention import Attention
from switchkit.cli.lightning import build
from switchkit.interop.files import save_checkpoint
from switchkit.layers import FeedForward

OWN = """\
import lightning as L
import torch
from torch.utils.data import DataLoader, IterableDataset

from switchkit import CharTokenizer


class Own(L.LightningModule):
    def __init__(self, width: int = 3):
        super().__init__()
        self.layer = torch.nn.Linear(width, 1)

    def training_step(self, batch, index):
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return DataLoader(torch.ones(8, 3), batch_size=2)


class Watched(Own):
    def validation_step(self, batch, index):
        self.log("val/loss", self.layer(batch).square().mean())

    val_dataloader = Own.train_dataloader


class Windows(L.LightningDataModule):
    tokenizer = CharTokenizer("abcdefgh")
    batch_size, context = 4, 16

    def windows(self):
        rows = torch.randint(8, (8, 17), generator=torch.Generator().manual_seed(0))
        return [{"tokens": row[:-1], "targets": row[1:]} for row in rows]

    def train_dataloader(self):
        return DataLoader(self.windows(), 4)


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


class Streamed(Windows):
    def val_dataloader(self):
        return DataLoader(Stream(self.windows()), 4)

    test_dataloader = predict_dataloader = val_dataloader
"""


@pytest.fixture(autouse=True)
def own(folder: Path) -> None:
    Path("own.py").write_text(OWN)


@pytest.mark.parametrize(("name", "shown"), [("Own", "wall time"), ("Watched", "val/loss")])
def test_a_module_of_ones_own_is_trained_and_gone_on_with(run, name, shown):
    argv = ("fit", "--model", f"own.{name}", "--trainer.accelerator", "cpu", "--trainer.max_steps")
    code, out, err = run(*argv, "4")
    assert code == 0, err
    assert shown in out
    last = Path("runs/version_0/checkpoints/last.ckpt")
    assert str(last) in out or "best.ckpt" in out
    code, out, err = run(*argv, "6", "--ckpt_path", "last")
    assert code == 0, err
    assert checkpoints.read("runs/version_1/checkpoints/last.ckpt", ours=False)["global_step"] == 6


def test_ours_refuses_what_another_module_wrote(run):
    assert run("fit", "--model", "own.Own", "--trainer.accelerator", "cpu", "--trainer.max_steps", "2")[0] == 0
    code, _, err = run("fit", "-c", "small.yaml", "--ckpt_path", "last")
    assert code == 2
    assert "last.ckpt was not written by switchkit (it holds epoch, global_step" in err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`:UserWarning")
def test_data_without_validation(run):
    code, out, err = run("fit", "-c", "small.yaml", "--data", "own.Windows", "--trainer.max_steps", "3")
    assert code == 0, err
    assert "Result, with no validation" in out
    assert "Next:" in out


@pytest.mark.slow
def test_held_out_data_without_a_length(run):
    argv = ("-c", "small.yaml", "--data", "own.Streamed", "--trainer.limit_val_batches", "1.0")
    code, out, err = run("fit", *argv, "--trainer.max_steps", "3")
    assert code == 0, err
    assert "Result on the whole held-out text" in out
    for command in ("validate", "test", "predict"):
        code, _, err = run(command, *argv, "--ckpt_path", "runs/version_0/checkpoints/last.ckpt")
        assert code == 0, err


def test_commands_read_a_checkpoint_whose_layers_have_dropout_of_their_own(run):
    """They take the model's where they are given none, so it stands beside their init_args."""
    layers = {"attention": partial(Attention, dropout=0.5), "feed_forward": partial(FeedForward, dropout=0.25)}
    sizes = {"d_model": 8, "num_heads": 2, "d_ff": 16, "num_experts": 2, "context": 8, "num_layers": 2}
    tokenizer = CharTokenizer.from_text(Path("text.txt").read_text(encoding="utf-8"))
    save_checkpoint(LanguageModule(partial(Decoder, **sizes, **layers), tokenizer=tokenizer), Path("made.ckpt"))
    argv = ("--ckpt_path", "made.ckpt", "--data", "TextData", "--data.path", "text.txt", "--data.context", "8")
    block = build(argv, "validate").model.net.blocks[0]
    assert (block.attention.dropout, block.mlp.dropout) == (0.5, 0.25)
    code, _, err = run("validate", *argv)
    assert code == 0, err

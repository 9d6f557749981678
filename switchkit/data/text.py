"""Language modelling on one text: the LightningDataModule of the recipes."""

from __future__ import annotations

from typing import Any

import lightning as L
from jaxtyping import Int
from torch import Tensor

from switchkit.data.loader import InOrder, RandomWindows
from switchkit.data.sources import Source, find_text
from switchkit.data.tokenizers import CharTokenizer, Tokenizer

__all__ = ["TextData"]


class TextData(L.LightningDataModule):
    """Tiny Shakespeare, or any text: the first nine tenths to train on, the last tenth held out.

    The text is found when first needed (see `find_text`), with `prepare_data` at the latest. While fitting, validation
    reads the beginning of the held-out text; `validate`, `test` and `predict` read all of it, on every device.

    Training goes on exactly where a checkpoint left it: the position in the data is in the checkpoint under "TextData".
    Lightning keeps a loader's own position too, and loses it where `configure_optimizers` asks for
    `estimated_stepping_batches`; where it does not, both are the same.

    Args:
        path: A UTF-8 text file; without one Tiny Shakespeare, from SWITCHKIT_DATA, the cache or the net.
        context: Tokens of a window.
        batch_size: Windows of a training batch, on each device.
        eval_batch_size: Windows of a batch in evaluation.
        validation_prefix: Tokens of the held-out text (characters, unless a tokenizer is given) that validation reads
            while fitting; 0 or null: all of it.
        fallback: Take a generated play where Tiny Shakespeare is not to be had.
        seed: Of the order of the training data, and of the generated play.
        tokenizer: The vocabulary; without one, the characters of the text.

    Raises:
        ValueError: a value out of range; later, a text that cannot be had, encoded or is too short.
    """

    def __init__(
        self,
        path: str | None = None,
        *,
        context: int = 128,
        batch_size: int = 16,
        eval_batch_size: int = 32,
        validation_prefix: int | None = 32768,
        fallback: bool = False,
        seed: int = 0,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("context", context), ("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if value < 1:
                raise ValueError(f"data.{name} {value} is not possible; it must be 1 or more")
        if validation_prefix is not None and (validation_prefix < 0 or validation_prefix == 1):
            raise ValueError(
                f"data.validation_prefix {validation_prefix} is not possible; "
                "it must be 2 or more tokens, or 0 for the whole held-out text"
            )
        self.path = path
        self.context = context
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.validation_prefix = validation_prefix
        self.fallback = fallback
        self.seed = seed
        self.given_tokenizer = tokenizer
        self._source: Source | None = None
        self._tokenizer = tokenizer
        self._parts: tuple[Tensor, Tensor] | None = None
        self._train: RandomWindows | None = None
        self._position: dict[str, Any] | None = None

    @property
    def source(self) -> Source:
        """The text and where it came from; looked for once."""
        if self._source is None:
            self._source = find_text("tinyshakespeare", path=self.path, fallback=self.fallback, seed=self.seed)
        return self._source

    @property
    def tokenizer(self) -> Tokenizer:
        """The given one, or the characters of the whole text."""
        if self._tokenizer is None:
            self._tokenizer = CharTokenizer.from_text(self.source.text)
        return self._tokenizer

    @property
    def train_tokens(self) -> Int[Tensor, "N"]:
        return self._split()[0]

    @property
    def held_out_tokens(self) -> Int[Tensor, "N"]:
        return self._split()[1]

    def source_info(self) -> dict[str, Any]:
        """Where the text came from, as plain data for a checkpoint."""
        source = self.source
        return {
            "description": source.description,
            "origin": source.origin,
            "generated": source.generated,
            "sha256": source.sha256,
            "characters": len(source.text),
        }

    def prepare_data(self) -> None:
        _ = self.source  # one process of a machine downloads, the others find it in the cache

    def setup(self, stage: str | None = None) -> None:
        self._split()
        if stage == "fit":
            self._train, self._position = None, None  # a position to resume from is loaded after this

    def train_dataloader(self) -> RandomWindows:
        position = self.state_dict()["train"]
        # Of a strategy that splits the model over devices, only the copies of the whole count.
        shares = (self.trainer.distributed_sampler_kwargs if self.trainer else None) or {"num_replicas": 1, "rank": 0}
        loader = RandomWindows(
            self.train_tokens,
            self.context,
            self.batch_size,
            seed=self.seed,
            rank=shares["rank"],
            world_size=shares["num_replicas"],
        )
        if self.trainer is not None:
            limit = self.trainer.limit_train_batches
            loader.ends_after = limit if isinstance(limit, int) else int(len(loader) * limit)
            loader.repeat = getattr(self.trainer, "overfit_batches", 0) > 0  # set, not declared
        if position is not None:
            loader.load_state_dict(position)
        self._train = loader
        return loader

    def val_dataloader(self) -> InOrder:
        fitting = self.trainer is not None and self.trainer.state.fn == "fit"
        return self._evaluation(self.validation_prefix if fitting else None)

    def test_dataloader(self) -> InOrder:
        return self._evaluation()

    def predict_dataloader(self) -> InOrder:
        return self._evaluation()

    def state_dict(self) -> dict[str, Any]:
        """The position in the training data; None: at the beginning."""
        return {"train": self._train.state_dict() if self._train is not None else self._position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The next training loader goes on there."""
        self._train, self._position = None, state_dict.get("train")

    def _evaluation(self, prefix: int | None = None) -> InOrder:
        return InOrder(self.held_out_tokens[: prefix or None], self.context, self.eval_batch_size)

    def _split(self) -> tuple[Tensor, Tensor]:
        if self._parts is None:
            tokens = self.tokenizer.encode(self.source.text)
            cut = len(tokens) * 9 // 10
            train, held_out = tokens[:cut], tokens[cut:]
            if min(len(train), len(held_out)) < self.context + 1:
                raise ValueError(
                    f"the text is too short: its parts have {len(train)} tokens to train on and {len(held_out)} held "
                    f"out, and data.context {self.context} needs {self.context + 1} in each "
                    f"({self.source.description}). Lower data.context or give a longer text"
                )
            self._parts = train, held_out
        return self._parts

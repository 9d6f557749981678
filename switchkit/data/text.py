"""Language modelling on one text: the LightningDataModule of the recipes."""

from __future__ import annotations

from typing import Any

from switchkit.data.base import require_positive
from switchkit.data.corpus import CorpusData
from switchkit.data.loader import AlignedWindows, InOrder, RandomWindows, Windows
from switchkit.data.tokenizers import Tokenizer

__all__ = ["TextData"]


class TextData(CorpusData):
    """Tiny Shakespeare, or any text: the first nine tenths to train on, the last tenth held out.

    The text is found when first needed (see `find_text`), with `prepare_data` at the latest. While fitting, validation
    reads the beginning of the held-out text; `validate`, `test` and `predict` read all of it, on every device.

    Training goes on exactly where a checkpoint left it: the position in the data is in the checkpoint under "TextData".

    Args:
        path: A UTF-8 text file, or a folder that `switchkit prepare` wrote, which is read from disk and has its own
            vocabulary; without one Tiny Shakespeare, from SWITCHKIT_DATA, the cache or the net.
        context: Tokens of a window.
        stride: Train on windows that begin at multiples of it, each once in an epoch, as logits that a teacher wrote
            down beforehand need; null: on windows that begin anywhere.
        batch_size: Windows of a training batch, on each device.
        eval_batch_size: Windows of a batch in evaluation.
        validation_prefix: Tokens of the held-out text (characters, unless a tokenizer is given) that validation reads
            while fitting; 0 or null: all of it.
        fallback: Take a generated play where Tiny Shakespeare is not to be had.
        seed: Of the order of the training data, and of the generated play.
        tokenizer: The vocabulary; without one, the folder's, or the characters of the text.

    Raises:
        ValueError: a value out of range; later, a text that cannot be had, encoded or is too short.
    """

    have_sources = False

    def __init__(
        self,
        path: str | None = None,
        *,
        context: int = 128,
        stride: int | None = None,
        batch_size: int = 16,
        eval_batch_size: int = 32,
        validation_prefix: int | None = 32768,
        fallback: bool = False,
        seed: int = 0,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        require_positive(context=context, stride=1 if stride is None else stride)
        super().__init__(
            path,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            validation_prefix=validation_prefix,
            fallback=fallback,
            seed=seed,
            tokenizer=tokenizer,
        )
        self.context = context
        self.stride = stride

    def needs(self) -> tuple[str, int, int]:
        return "context", self.context, self.context + 1

    def train_loader(self, *, rank: int, world_size: int) -> RandomWindows | AlignedWindows:
        given: dict[str, Any] = {"seed": self.seed, "rank": rank, "world_size": world_size}
        if self.stride is None:
            return RandomWindows(self.train_tokens, self.context, self.batch_size, **given)
        return AlignedWindows(self.train_tokens, self.context, self.batch_size, stride=self.stride, **given)

    def examples(self) -> Windows:
        """What training reads, by number.

        Raises:
            ValueError: its windows begin anywhere.
        """
        if self.stride is None:
            raise ValueError(f"windows that begin anywhere have no numbers: set data.stride, such as {self.context}")
        return Windows(self.train_tokens, self.context, self.stride)

    def evaluation_loader(self, prefix: int | None) -> InOrder:
        tokens = self.held_out_tokens
        return InOrder(tokens[:prefix] if prefix else tokens, self.context, self.eval_batch_size)

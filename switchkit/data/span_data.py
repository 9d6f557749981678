"""Pre-training of encoder-decoders on one text: span corruption, and other objectives by weights."""

from __future__ import annotations

from functools import cached_property, partial

from switchkit.data.base import require_positive
from switchkit.data.bytes import ByteTokenizer
from switchkit.data.corpus import CorpusData
from switchkit.data.drawn_windows import DrawnInTurn, DrawnWindows
from switchkit.data.mixture import Mixture
from switchkit.data.objective_windows import ObjectiveInOrder, ObjectiveWindows
from switchkit.data.objectives import Objective, ObjectiveFactory
from switchkit.data.span_corruption import SpanCorruption
from switchkit.data.spans import check_spans
from switchkit.data.tokenizers import Tokenizer

__all__ = ["SpanData"]


class SpanData(CorpusData):
    """Tiny Shakespeare, or any text, for encoder-decoders: they read a window with holes and write what is missing.

    The first nine tenths of the text are trained on, the last tenth is held out. A window has as many tokens as fill
    an input of `inputs_length` (`raw_length`: 512 at 0.15 and 3 take 568, and give targets of 114). While fitting,
    validation reads the beginning of the held-out text; `validate`, `test` and `predict` read all of it, on every
    device. It is cut into consecutive windows, whose holes are the same each time.

    Training goes on exactly where a checkpoint left it, holes included: the position in the data is in the checkpoint
    under "SpanData".

    Args:
        path: A UTF-8 text file, or a folder that ``switchkit prepare`` wrote; without one Tiny Shakespeare, from
            SWITCHKIT_DATA, the cache or the net.
        inputs_length: Tokens that the encoder reads, sentinels, mode and EOS included.
        noise_density: Share of the tokens taken out; null: 0.15, as in T5.
        mean_span_length: Tokens of a span on average; null: 20, as in ByT5, for bytes. T5 has 3, for sub-words.
        roll: Make every place as likely to be taken out; T5 never takes the first token and always the last.
        objectives: What is learned instead of plain span corruption, each row by one of them, drawn by their weights:
            SpanCorruption, PrefixLM, CausalLM, UL2 or your own, each with its own options.
        stride: Train on windows that begin at multiples of it, with holes that are known beforehand, as logits that a
            teacher wrote down need; null: on windows that begin anywhere, with holes drawn anew in each epoch.
        draws: With `stride`, sets of holes of each window; an epoch is a pass over the text for each.
        batch_size: Windows of a training batch, on each device.
        eval_batch_size: Windows of a batch in evaluation; it changes no result.
        validation_prefix: Tokens of the held-out text that validation reads while fitting; 0 or null: all of it.
        fallback: Take a generated play where Tiny Shakespeare is not to be had.
        seed: Of the order of the training data, of the holes, and of the generated play.
        tokenizer: The vocabulary, which needs sentinels; without one, bytes.

    Raises:
        ValueError: a value out of range, or options of span corruption beside `objectives`; later, a text that cannot
            be had, encoded or is too short, or a vocabulary with too few sentinels.

    Source: Raffel et al., arXiv 1910.10683, section 3.1.4; Xue et al., arXiv 2105.13626.
    """

    have_sources = True

    def __init__(
        self,
        path: str | None = None,
        *,
        inputs_length: int = 512,
        noise_density: float | None = None,
        mean_span_length: float | None = None,
        roll: bool = False,
        objectives: list[ObjectiveFactory] | None = None,
        stride: int | None = None,
        draws: int = 1,
        batch_size: int = 16,
        eval_batch_size: int = 32,
        validation_prefix: int | None = 32768,
        fallback: bool = False,
        seed: int = 0,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        require_positive(inputs_length=inputs_length, stride=1 if stride is None else stride, draws=draws)
        if draws > 1 and stride is None:
            raise ValueError(
                f"data.draws {draws} without data.stride: windows that begin anywhere get new holes each time; give "
                "data.stride too, or leave data.draws out"
            )
        super().__init__(
            path,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            validation_prefix=validation_prefix,
            fallback=fallback,
            seed=seed,
            tokenizer=tokenizer,
            default=_bytes,
        )
        if inputs_length < 4:
            raise ValueError(f"data.inputs_length {inputs_length} leaves no room for text; it must be 4 or more")
        if objectives is not None:
            own = {"noise_density": noise_density, "mean_span_length": mean_span_length, "roll": roll or None}
            if given := [f"data.{name}" for name, value in own.items() if value is not None]:
                raise ValueError(
                    f"{', '.join(given)} with data.objectives: each objective has its own options; "
                    "give them there (SpanCorruption: {noise_density: ...})"
                )
            if not objectives:
                raise ValueError("data.objectives is empty; name one or more, or leave it out for span corruption")
        self.inputs_length = inputs_length
        self.noise_density = noise_density
        self.mean_span_length = mean_span_length
        self.roll = roll
        self.objectives = objectives
        self.stride, self.draws = stride, draws
        self._spans = (
            0.15 if noise_density is None else noise_density,
            20.0 if mean_span_length is None else mean_span_length,
        )
        check_spans(*self._spans)

    @cached_property
    def objective(self) -> Objective:
        """What is learned from a window."""
        if self.objectives is None:
            density, mean = self._spans
            return SpanCorruption(self.tokenizer, noise_density=density, mean_span_length=mean, roll=self.roll)
        build = self.objectives[0] if len(self.objectives) == 1 else partial(Mixture, objectives=self.objectives)
        return build(tokenizer=self.tokenizer)

    @property
    def raw_length(self) -> int:
        """Tokens of a window before anything is taken out."""
        return self.objective.raw_length(self.inputs_length)

    @property
    def targets_length(self) -> int:
        """Tokens that the decoder writes, sentinels and EOS included: the most of all objectives."""
        return self.objective.lengths(self.raw_length)[1]

    def setup(self, stage: str | None = None) -> None:
        _ = self.targets_length  # says now whether there are sentinels enough
        super().setup(stage)

    def needs(self) -> tuple[str, int, int]:
        return "inputs_length", self.inputs_length, self.raw_length

    def train_loader(self, *, rank: int, world_size: int) -> ObjectiveWindows | DrawnInTurn:
        if self.stride is not None:
            return DrawnInTurn(self.examples(), self.batch_size, seed=self.seed, rank=rank, world_size=world_size)
        return ObjectiveWindows(
            self.train_tokens,
            self.objective,
            self.raw_length,
            self.batch_size,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
        )

    def examples(self) -> DrawnWindows:
        """What training reads, by number.

        Raises:
            ValueError: its windows begin anywhere, and their holes are drawn anew.
        """
        if self.stride is None:
            raise ValueError(
                "windows that begin anywhere, with holes drawn anew in each epoch, have no numbers: set data.stride, "
                f"such as {self.raw_length}"
            )
        given = self.train_tokens, self.objective, self.raw_length, self.stride, self.draws
        return DrawnWindows(*given, seed=self.seed)

    def evaluation_loader(self, prefix: int | None) -> ObjectiveInOrder:
        tokens = self.held_out_tokens
        return ObjectiveInOrder(
            tokens[:prefix] if prefix else tokens, self.objective, self.raw_length, self.eval_batch_size, seed=self.seed
        )


def _bytes(text: str) -> Tokenizer:
    """The vocabulary of any text."""
    return ByteTokenizer()

"""How good the translations are: BLEU, chrF, and some of them to read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import torch
from rich.console import Console
from torch import Tensor
from torchmetrics.functional.text import sacre_bleu_score

from switchkit.checks import at_least
from switchkit.data.tokenizers import Tokenizer
from switchkit.generation import generate
from switchkit.module import LanguageModule

__all__ = ["Translation", "Translations"]

Stage = Literal["val", "test"]


@dataclass(frozen=True)
class Translation:
    """One sentence: what was translated, what the model made of it, and what it should have."""

    source: str
    output: str
    target: str
    language: str
    """Empty where the data do not say."""


class Translations(L.Callback):
    """Translates held-out sentences and logs BLEU and chrF, in percent, as `val/bleu` and `val/chrf` (or `test/...`).

    With several languages also each language's own, as `val/bleu_de`. The sentences are the first of the batches, so
    that all validations of a run read the same; the reference is the target as the model sees it (cut, where the data
    cuts). BLEU is of the whole set, up to 4-grams, of the tokens that sacreBLEU's default
    makes (the WMT script `mteval-v13a`), case kept, without smoothing: 0 where no 4-gram is right. chrF is chrF2, of
    characters up to 6-grams without spaces, of the whole set as well, in sacreBLEU's way: F of the mean precision and
    recall.

    A few translations are printed when fitting, validating or testing ends, unless they are those printed last.

    Args:
        pairs: sentences translated at each validation.
        test_pairs: those translated in a test; null: all.
        max_new_tokens: of a translation, its end counted.
        num_beams: beginnings that beam search keeps; 1: greedy.
        samples: translations to print.

    Raises:
        ValueError: a number out of range; at the start, a module without a tokenizer that ends texts; in evaluation,
            batches without a source.

    Source: BLEU by sacreBLEU, arXiv 1804.08771; chrF, aclanthology.org/W15-3049.
    """

    def __init__(
        self,
        pairs: int = 96,
        *,
        test_pairs: int | None = None,
        max_new_tokens: int = 256,
        num_beams: int = 1,
        samples: int = 3,
    ) -> None:
        at_least(1, pairs=pairs, max_new_tokens=max_new_tokens, num_beams=num_beams)
        if test_pairs is not None:
            at_least(1, test_pairs=test_pairs)
        at_least(0, samples=samples)
        self.pairs, self.test_pairs = pairs, test_pairs
        self.max_new_tokens, self.num_beams, self.samples = max_new_tokens, num_beams, samples
        self.found: list[Translation] = []
        """Of the last evaluation."""
        self._printed: list[Translation] = []
        self._console = Console(emoji=False)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        tokenizer = getattr(pl_module, "tokenizer", None)
        if not isinstance(pl_module, LanguageModule) or getattr(tokenizer, "eos_id", None) is None:
            raise ValueError(
                f"Translations needs a LanguageModule whose tokenizer ends texts; got {type(pl_module).__name__} with "
                f"{type(tokenizer).__name__}: take ByteTokenizer, or leave the callback out"
            )

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.found = []

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int,
                                dataloader_idx: int = 0) -> None:  # fmt: skip
        most = self.test_pairs if trainer.testing else self.pairs
        left = len(batch["tokens"]) if most is None else most - len(self.found)
        if left > 0 and not trainer.sanity_checking:
            self.found += self._translated(trainer, pl_module, {name: rows[:left] for name, rows in batch.items()})

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.found:
            # Every rank reads the same batches and finds the same.
            pl_module.log_dict(scores(self.found, "val"), sync_dist=True)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._print(trainer)

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.found:
            pl_module.log_dict(scores(self.found, "test"), sync_dist=True)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._print(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._print(trainer)

    def _translated(self, trainer: L.Trainer, module: LanguageModule, batch: Mapping[str, Tensor]) -> list[Translation]:
        if "source" not in batch:
            raise ValueError(
                f"the batches have no source, only {', '.join(batch)}: Translations needs sentence pairs, as PairData "
                "gives; leave the callback out"
            )
        tokenizer = module.tokenizer
        assert tokenizer is not None
        made = generate(
            module.net,
            source=batch["source"],
            source_valid=batch["source_valid"],
            max_new_tokens=self.max_new_tokens,
            temperature=0.0,
            num_beams=self.num_beams,
            eos_id=tokenizer.eos_id,
        )
        sources = _texts(tokenizer, batch["source"], batch["source_valid"])
        outputs = _texts(tokenizer, made.tokens, made.valid)
        targets = _texts(tokenizer, batch["targets"], batch["valid"])
        names = getattr(getattr(trainer, "datamodule", None), "languages", ())
        numbers = batch["language"].tolist() if "language" in batch and names else []
        languages = [names[number] for number in numbers] or [""] * len(sources)
        return [Translation(*four) for four in zip(sources, outputs, targets, languages, strict=True)]

    def _print(self, trainer: L.Trainer) -> None:
        samples = self.found[: self.samples]
        if not trainer.is_global_zero or samples == self._printed:
            return
        self._printed = samples
        for found in samples:
            for name in ("source", "output", "target"):
                self._console.print(f"{name:<8}{getattr(found, name)}", markup=False, highlight=False, soft_wrap=True)
            self._console.print()


def scores(found: Sequence[Translation], stage: Stage) -> dict[str, Tensor]:
    """BLEU and chrF of some translations, in percent: of all, and of each language where there are several."""
    values: dict[str, Tensor] = {}
    languages = list(dict.fromkeys(one.language for one in found))
    for language in [None, *languages] if len(languages) > 1 else [None]:
        some = [one for one in found if language in (None, one.language)]
        outputs, targets = [one.output for one in some], [one.target for one in some]
        end = "" if language is None else f"_{language}"
        bleu = sacre_bleu_score(outputs, [[target] for target in targets], tokenize="13a")
        values[f"{stage}/bleu{end}"] = 100 * bleu
        values[f"{stage}/chrf{end}"] = torch.tensor(100 * _chrf(outputs, targets))
    return values


def _chrf(outputs: Sequence[str], targets: Sequence[str], order: int = 6, beta: float = 2.0) -> float:
    """chrF of all sentences together, as sacreBLEU counts it: F of the mean precision and the mean recall of those
    n-grams that both sides have."""
    # Not torchmetrics' `chrf_score`, which leaves the references of empty outputs out.
    precisions, recalls = [], []
    for n in range(1, order + 1):
        pairs = [(_grams(output, n), _grams(target, n)) for output, target in zip(outputs, targets, strict=True)]
        same = sum((output & target).total() for output, target in pairs)
        # Where a reference is shorter than the n-gram, those of the output are not held against it.
        made = sum(output.total() for output, target in pairs if target)
        asked = sum(target.total() for _, target in pairs)
        if made and asked:
            precisions.append(same / made)
            recalls.append(same / asked)
    if not any(precisions):
        return 0.0
    precision, recall = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    return (1 + beta**2) * precision * recall / (beta**2 * precision + recall)


def _grams(text: str, n: int) -> Counter[str]:
    """Runs of `n` characters, spaces left out."""
    letters = "".join(text.split())
    return Counter(letters[start : start + n] for start in range(len(letters) - n + 1))


def _texts(tokenizer: Tokenizer, ids: Tensor, valid: Tensor) -> list[str]:
    """Row by row, without special tokens and without ids that only the model has: they are no text."""
    special = {tokenizer.pad_id, tokenizer.eos_id, tokenizer.start_id, *tokenizer.sentinels}
    rows = (row[real].tolist() for row, real in zip(ids, valid, strict=True))
    return [tokenizer.decode([n for n in row if n < tokenizer.vocab_size and n not in special]) for row in rows]

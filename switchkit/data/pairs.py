"""Translation: the LightningDataModule of line-aligned pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from switchkit.data.base import ResumableData, require_positive
from switchkit.data.bytes import ByteTokenizer
from switchkit.data.encoded_pairs import EncodedPairs, PairEncoder, TooLong, prefixes_of
from switchkit.data.pair_loaders import BucketedPairs, PairsInOrder
from switchkit.data.parallel import LANGUAGES, PairFiles, Parallel, find_parallel, read_parallel
from switchkit.data.published import DataError
from switchkit.data.tokenizers import Tokenizer
from switchkit.data.toy_languages import TOY_LANGUAGES

__all__ = ["PairData"]


class PairData(ResumableData):
    """Multi30k from English into German, French and Czech at once, or any sentences and their translations.

    Line n of a target file translates line n of the source file. With several languages a source is told which one is
    meant by what comes before it: a token, or a text (`prefix`). A batch has `source` and `source_valid` [B, S],
    `tokens`, `targets` and `valid` [B, T], and `language` [B], numbered as in `languages`.

    The sentences are found when first needed, with `prepare_data` at the latest. While fitting, validation reads the
    first `validation_prefix` held-out pairs; `validate` reads all of them; `test` and `predict` read the test part, or
    the held-out pairs where there is none. Training goes on exactly where a checkpoint left it, and pairs that are left
    out or cut are counted in `source_info` and reported once.

    Args:
        source: A UTF-8 file of sentences, plain or gzip; without one Multi30k, from SWITCHKIT_DATA, the cache or the
            net.
        target: The file of their translations, or one for each language, as {de: FILE, fr: FILE}.
        val_source: Held-out sentences; without them the last tenth of `source` is held out.
        val_target: Their translations, for the same languages.
        test_source: Sentences to test on.
        test_target: Their translations, for the same languages.
        languages: Of Multi30k, any of de, fr, cs; null: all three.
        prefix: What comes before a source: a text with {language} in it, as "translate to {language}: "; null: one
            token, <language> where the vocabulary has it, else one of its last sentinels.
        max_source: Tokens of a source at most, prefix and end counted.
        max_target: Tokens of a target at most, end counted.
        too_long: Longer pairs are left out ("skip"), or their sentences "cut"; in evaluation too.
        batch_size: Pairs of a training batch, on each device.
        batch_tokens: Instead, tokens of a training batch on the longer side, padding counted; null: `batch_size`.
        buckets: Into so many buckets of like length the pairs are sorted; a batch is of one. 1: of any length.
        eval_batch_size: Pairs of a batch in evaluation.
        validation_prefix: Held-out pairs that validation reads while fitting; 0 or null: all of them.
        fallback: Take two generated toy languages where Multi30k is not to be had.
        seed: Of the order of the training data, and of the toy languages.
        tokenizer: The vocabulary; without one, bytes.

    Raises:
        ValueError: a value out of range, a source without a target; later, files that cannot be had, read or paired.
    """

    have_sources = True

    def __init__(
        self,
        source: str | None = None,
        target: str | dict[str, str] | None = None,
        *,
        val_source: str | None = None,
        val_target: str | dict[str, str] | None = None,
        test_source: str | None = None,
        test_target: str | dict[str, str] | None = None,
        languages: list[str] | None = None,
        prefix: str | None = None,
        max_source: int = 256,
        max_target: int = 256,
        too_long: TooLong = "skip",
        batch_size: int = 64,
        batch_tokens: int | None = None,
        buckets: int = 16,
        eval_batch_size: int = 64,
        validation_prefix: int | None = 768,
        fallback: bool = False,
        seed: int = 0,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        require_positive(max_source=max_source, max_target=max_target, buckets=buckets)
        require_positive(batch_tokens=1 if batch_tokens is None else batch_tokens)
        super().__init__(
            batch_size=batch_size, eval_batch_size=eval_batch_size, validation_prefix=validation_prefix, seed=seed
        )
        if validation_prefix is not None and validation_prefix < 0:
            raise DataError(
                f"data.validation_prefix {validation_prefix} is not possible; it must be 1 or more pairs, or 0 for all"
            )
        if too_long not in ("skip", "cut"):
            raise DataError(f"data.too_long {too_long!r} is not possible; it must be skip or cut")
        own = ["target"] if isinstance(target, str) else list(target or ())
        # A checkpoint says the languages that there were, chosen or not: files of one's own may take the place of any.
        unchosen = (own, list(LANGUAGES), list(TOY_LANGUAGES[1:]))
        if source is not None and languages is not None and list(languages) not in unchosen:
            raise DataError(
                "data.languages chooses from Multi30k; name those of your own files in data.target, and set "
                "data.languages to null where a checkpoint has them"
            )
        self.source, self.target = source, target
        self.val_source, self.val_target = val_source, val_target
        self.test_source, self.test_target = test_source, test_target
        self.given_languages = languages
        self.prefix = prefix
        self.max_source, self.max_target, self.too_long = max_source, max_target, too_long
        self.batch_tokens, self.buckets = batch_tokens, buckets
        self.fallback = fallback
        self._tokenizer = ByteTokenizer() if tokenizer is None else tokenizer
        self._files = self._named_files()
        self._parallel: Parallel | None = None
        self._encoder: PairEncoder | None = None
        self._encoded: dict[str, EncodedPairs] = {}

    @property
    def tokenizer(self) -> Tokenizer:
        """The given one, or bytes."""
        return self._tokenizer

    @property
    def parallel(self) -> Parallel:
        """The sentences and where they came from; looked for once."""
        if self._parallel is None:
            if self._files:
                self._parallel = read_parallel(self._files)
            else:
                self._parallel = find_parallel(self.given_languages, fallback=self.fallback, seed=self.seed)
        return self._parallel

    @property
    def languages(self) -> tuple[str, ...]:
        """What is translated into; the place is the number in a batch."""
        return self.parallel.languages

    def pairs(self, part: str) -> EncodedPairs:
        """The pairs of "train", "val" or "test" as tokens; encoded once."""
        if part not in self._encoded:
            if self._encoder is None:
                self._encoder = PairEncoder(
                    self.tokenizer,
                    prefixes_of(self.tokenizer, self.languages, self.prefix),
                    max_source=self.max_source,
                    max_target=self.max_target,
                    too_long=self.too_long,
                )
            found = self._encoder.encode(self.parallel.parts[part], self.parallel.source, self.languages)
            self._encoded[part] = found
            if told := _left_out(found):
                rank_zero_info(f"{part}: {len(found):,} pairs, {told}")
        return self._encoded[part]

    def source_info(self) -> dict[str, Any]:
        """Where the sentences came from, and what was made of them so far, as plain data for a checkpoint."""
        found = self.parallel
        return {
            "description": found.description,
            "origin": found.origin,
            "generated": found.generated,
            "sha256": found.sha256,
            "languages": list(found.languages),
            "pairs": {part: len(encoded) for part, encoded in self._encoded.items()},
            "left_out": {part: _left_out(encoded) for part, encoded in self._encoded.items()},
        }

    def prepare_data(self) -> None:
        _ = self.parallel  # one process of a machine downloads, the others find it in the cache

    def setup(self, stage: str | None = None) -> None:
        self.pairs("train" if stage == "fit" else "val")
        super().setup(stage)

    def train_loader(self, *, rank: int, world_size: int) -> BucketedPairs:
        return BucketedPairs(
            self.pairs("train"),
            self.batch_size,
            batch_tokens=self.batch_tokens,
            buckets=self.buckets,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
        )

    def examples(self) -> EncodedPairs:
        """What training reads, by number."""
        return self.pairs("train")

    def evaluation_loader(self, prefix: int | None) -> PairsInOrder:
        return PairsInOrder(self.pairs("val"), self.eval_batch_size, prefix)

    def test_dataloader(self) -> PairsInOrder:
        return PairsInOrder(self.pairs("test" if "test" in self.parallel.parts else "val"), self.eval_batch_size)

    def predict_dataloader(self) -> PairsInOrder:
        return self.test_dataloader()

    def _named_files(self) -> Mapping[str, PairFiles]:
        """The user's files by part; empty for Multi30k."""
        given = {
            "": (self.source, self.target),
            "val_": (self.val_source, self.val_target),
            "test_": (self.test_source, self.test_target),
        }
        found: dict[str, PairFiles] = {}
        for name, (source, target) in given.items():
            if (source is None) != (target is None or target == {}):
                raise DataError(f"data.{name}source and data.{name}target belong together; give both or neither")
            if source is not None and target is not None:
                by_language = {"target": target} if isinstance(target, str) else dict(target)
                found[name.rstrip("_") or "train"] = PairFiles(source, by_language)
        if found and "train" not in found:
            raise DataError("data.val_source and data.test_source go with data.source and data.target; give them too")
        return found


def _left_out(pairs: EncodedPairs) -> str:
    """Which pairs were left out or cut, for people; empty where none was."""
    told = [f"{count:,} left out ({reason})" for reason, count in pairs.skipped.items() if count]
    return ", ".join([*told, f"{pairs.cut:,} cut"] if pairs.cut else told)

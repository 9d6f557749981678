"""What Translations translates, logs and prints."""

from __future__ import annotations

import io
import math
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from rich.console import Console

from switchkit import EncoderDecoder, LanguageModule
from switchkit.callbacks import Translation, Translations, translate
from switchkit.data import PairData
from switchkit.data.bytes import ByteTokenizer
from switchkit.generation import Generated

NET = partial(
    EncoderDecoder, d_model=16, encoder_layers=1, num_heads=2, d_ff=24, num_experts=2, sparse="every(1)", tied=False
)


def pairs(folder: Path, lines: int = 40) -> PairData:
    target = {}
    for code, mark in (("en", "the"), ("de", "das"), ("fr", "le")):
        path = folder / code
        path.write_text("".join(f"{mark} number {number} of them all\n" for number in range(lines)))
        target[code] = str(path)
    return PairData(target.pop("en"), target, batch_size=12, eval_batch_size=3, validation_prefix=0)


def module(data: PairData) -> LanguageModule:
    return LanguageModule(NET, tokenizer=data.tokenizer)


def trainer(folder: Path, *callbacks: L.Callback, **more: Any) -> L.Trainer:
    return L.Trainer(
        default_root_dir=folder,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **more,
    )


@pytest.fixture
def perfect(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Every translation is the reference of its source, which generate is not told. Returns what it was asked."""
    asked: list[dict[str, Any]] = []
    tokenizer = ByteTokenizer()

    def made(net: Any, **options: Any) -> Generated:
        asked.append(options)
        rows = []
        for source in options["source"]:
            # The second language's id is above the first's, as sentinels count down and the last is the first's.
            mark = ("das", "le")[int(source[0]) - tokenizer.sentinels[-1]]
            text = tokenizer.decode(source[1:]).replace("the ", f"{mark} ", 1)
            rows.append(torch.cat([tokenizer.encode(text), torch.tensor([tokenizer.eos_id])]))
        valid = [torch.ones(len(row), dtype=torch.bool) for row in rows]
        pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        return Generated(pad(rows, padding_value=1), pad(valid), torch.zeros(len(rows)))

    monkeypatch.setattr(translate, "generate", made)
    return asked


# The scores.


def bleu(outputs: list[str], targets: list[str]) -> float:
    """Corpus BLEU of sentences whose tokens are their words."""
    logs = 0.0
    for order in range(1, 5):
        same = total = 0
        for output, target in zip(outputs, targets, strict=True):
            one, two = (Counter(tuple(w[i : i + order]) for i in range(len(w) - order + 1)) for w in
                        (output.split(), target.split()))  # fmt: skip
            same += (one & two).total()
            total += one.total()
        logs += math.log(same / total) / 4
    ours, theirs = (sum(len(text.split()) for text in texts) for texts in (outputs, targets))
    return 100 * math.exp(logs + min(0, 1 - theirs / ours))


def chrf(outputs: list[str], targets: list[str]) -> float:
    """Corpus chrF2: F2 of the mean precision and recall of the orders 1 to 6, of characters without spaces."""
    precisions, recalls = [], []
    for order in range(1, 7):
        same = ours = theirs = 0
        for output, target in zip(outputs, targets, strict=True):
            one, two = (Counter(w[i : i + order] for i in range(len(w) - order + 1)) for w in
                        (output.replace(" ", ""), target.replace(" ", "")))  # fmt: skip
            same += (one & two).total()
            ours += one.total()
            theirs += two.total()
        precisions.append(same / ours)
        recalls.append(same / theirs)
    p, r = sum(precisions) / 6, sum(recalls) / 6
    return 100 * 5 * p * r / (4 * p + r)


def test_scores_are_bleu_and_chrf_of_the_whole_and_of_each_language() -> None:
    outputs = ["a small dog runs in the park today", "two cats are there now", "il y a deux chats dans le parc"]
    targets = ["a small dog runs in the big park", "two cats sit there right now", "il y a trois chats dans le parc"]
    languages = ["de", "de", "fr"]
    found = [Translation("", *three) for three in zip(outputs, targets, languages, strict=True)]
    got = translate.scores(found, "val")
    assert set(got) == {f"val/{kind}{end}" for kind in ("bleu", "chrf") for end in ("", "_de", "_fr")}
    for end, part in (("", slice(0, 3)), ("_de", slice(0, 2)), ("_fr", slice(2, 3))):
        assert math.isclose(got[f"val/bleu{end}"], bleu(outputs[part], targets[part]), rel_tol=1e-5)
        assert math.isclose(got[f"val/chrf{end}"], chrf(outputs[part], targets[part]), rel_tol=1e-5)


def test_punctuation_is_a_token_of_its_own_and_case_counts() -> None:
    one = [Translation("", "a b c d .", "a b c d.", "")]
    other = [Translation("", "A b c d.", "a b c d.", "")]
    assert translate.scores(one, "test")["test/bleu"] == 100
    assert translate.scores(other, "test")["test/bleu"] < 99


def test_nothing_said_scores_nothing() -> None:
    got = translate.scores([Translation("a", "", "b", "")], "val")
    assert got == {"val/bleu": 0, "val/chrf": 0}


def test_a_sentence_without_an_output_lowers_chrf() -> None:
    """What sacreBLEU 2.6.0 says of the same, as of one that is shorter than a 6-gram."""
    outputs = ["", "the cat sat on the mat", "Hi."]
    targets = ["a long sentence that was never translated at all", "the cat sat on the mat", "Hi!"]
    found = [Translation("", *both, "") for both in zip(outputs, targets, strict=True)]
    assert math.isclose(translate.scores(found[:2], "val")["val/chrf"], 32.48, abs_tol=0.005)
    assert math.isclose(translate.scores(found[2:], "val")["val/chrf"], 38.89, abs_tol=0.005)


def test_a_reference_shorter_than_an_n_gram_holds_none_against_the_output() -> None:
    """Of 10 letters 7 are right, of the runs of 2 to 6 all that have a reference; nothing is missing."""
    found = [Translation("", "abcdef", "abcdef", ""), Translation("", "xyzw", "x", "")]
    p, r = (7 / 10 + 5) / 6, 1.0
    assert math.isclose(translate.scores(found, "val")["val/chrf"], 100 * 5 * p * r / (4 * p + r), rel_tol=1e-6)


# In a run.


def test_validation_translates_the_first_pairs_and_a_test_all(tmp_path: Path, perfect: list[dict[str, Any]]) -> None:
    data, callback = pairs(tmp_path), Translations(pairs=5, max_new_tokens=50, samples=0)
    model = module(data)
    runner = trainer(tmp_path, callback, max_steps=1, val_check_interval=1)
    runner.fit(model, datamodule=data)
    assert [(one.source, one.target, one.language) for one in callback.found] == [
        (f"the number {number} of them all", f"{mark} number {number} of them all", code)
        for number in (36, 37, 38)
        for mark, code in (("das", "de"), ("le", "fr"))
    ][:5]
    assert all(one.output == one.target for one in callback.found)
    assert [len(options["source"]) for options in perfect] == [3, 2]
    assert perfect[0]["temperature"] == 0
    assert perfect[0]["eos_id"] == 1
    assert perfect[0]["max_new_tokens"] == 50
    for name in ("val/bleu", "val/chrf", "val/bleu_de", "val/chrf_fr"):
        assert math.isclose(runner.callback_metrics[name], 100, rel_tol=1e-5)
    runner = trainer(tmp_path, callback)
    (found,) = runner.test(model, datamodule=data, verbose=False)
    assert len(callback.found) == 8
    assert math.isclose(found["test/bleu"], 100, rel_tol=1e-5)
    runner.validate(model, datamodule=data, verbose=False)
    assert len(callback.found) == 5


def test_the_output_is_the_likeliest_token_again_and_again(tmp_path: Path) -> None:
    """Against a loop of whole forwards over one sentence at a time."""
    data, callback = pairs(tmp_path), Translations(max_new_tokens=6, samples=0)
    model = module(data)
    trainer(tmp_path, callback).validate(model, datamodule=data, verbose=False)
    held_out = data.pairs("val")
    for index, found in enumerate(callback.found):
        batch = held_out.batch(torch.tensor([index]))
        tokens = torch.zeros(1, 1, dtype=torch.long)
        with torch.no_grad():
            for _ in range(6):
                logits = model.eval().net(tokens, source=batch["source"], source_valid=batch["source_valid"]).logits
                tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
        said = tokens[0, 1:].tolist()
        said = said[: said.index(1)] if 1 in said else said
        assert found.output == data.tokenizer.decode([number for number in said if 2 < number < 259])


def test_translating_leaves_training_as_it_was(tmp_path: Path) -> None:
    """The same weights with the callback and without."""
    weights = []
    for callbacks in ([], [Translations(pairs=4, max_new_tokens=3, samples=0)]):
        torch.manual_seed(0)
        data = pairs(tmp_path)
        model = module(data)
        trainer(tmp_path, *callbacks, max_steps=4, val_check_interval=2).fit(model, datamodule=data)
        weights.append(torch.cat([weight.detach().flatten() for weight in model.parameters()]))
    assert torch.equal(*weights)


def test_samples_are_printed_when_it_ends(tmp_path: Path, perfect: list[dict[str, Any]]) -> None:
    data, callback, out = pairs(tmp_path), Translations(samples=2), io.StringIO()
    callback._console = Console(file=out, width=20)
    model = module(data)
    trainer(tmp_path, callback, max_steps=2, val_check_interval=1).fit(model, datamodule=data)
    # The command line validates once more at the end: the same need not be read twice.
    trainer(tmp_path, callback).validate(model, datamodule=data, verbose=False)
    assert out.getvalue().splitlines() == [
        "source  the number 36 of them all",
        "output  das number 36 of them all",
        "target  das number 36 of them all",
        "",
        "source  the number 36 of them all",
        "output  le number 36 of them all",
        "target  le number 36 of them all",
        "",
    ]


# What cannot be.


@pytest.mark.parametrize("option", ["pairs", "test_pairs", "max_new_tokens", "num_beams"])
def test_numbers_out_of_range(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} must be at least 1; got 0"):
        Translations(**{option: 0})


def test_a_vocabulary_that_ends_no_text(tmp_path: Path) -> None:
    data = pairs(tmp_path)
    with pytest.raises(ValueError, match="needs a LanguageModule whose tokenizer ends texts.*with NoneType"):
        trainer(tmp_path, Translations()).validate(LanguageModule(NET, vocab_size=384), datamodule=data, verbose=False)


def test_batches_without_a_source(tmp_path: Path) -> None:
    data = pairs(tmp_path)
    batch = {"tokens": torch.zeros(1, 2, dtype=torch.long)}
    with pytest.raises(ValueError, match="the batches have no source, only tokens"):
        Translations()._translated(trainer(tmp_path), module(data), batch)

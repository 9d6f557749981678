"""Sizes and operations in the tables, held to torch's own counter."""

from __future__ import annotations

from functools import partial
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pupils
import pytest
import torch
from rich.console import Console
from small import data, module

from switchkit import (
    Decoder,
    Einsum,
    EncoderDecoder,
    Factor,
    LanguageModule,
    MoELayer,
    TopK,
)
from switchkit.callbacks import Translation, Translations
from switchkit.data.subwords import FileTokenizer
from switchkit.distill.table import TableRow
from switchkit.report import count
from switchkit.report.began import Began, ended
from switchkit.report.distillation import distill_table
from switchkit.report.numbers import three_digits, with_unit
from switchkit.report.run import _length, _speed, _translation
from switchkit.report.sample import command, sample
from switchkit.report.tables import console, fallback_box, figures, loads, model_table, pairs, source_rows
from switchkit.report.twins import both, twin_rows

CONTEXT = 8


@pytest.mark.parametrize(
    ("value", "said"),
    [(0, "0"), (999, "999"), (999.5, "1k"), (1234, "1.23k"), (999_400, "999k"), (999_500, "1M"), (999_600_000, "1G"),
     (47e9, "47G"), (1234e15, "1,234P"), (-1500, "-1.5k")],
)  # fmt: skip
def test_numbers_have_no_exponents(value: float, said: str) -> None:
    assert with_unit(value) == said


def test_three_digits() -> None:
    found = [three_digits(value) for value in (0.00123, 1.234, 99.94, 99.99, 100.4, 1023.4, -1300)]
    assert found == ["0.00123", "1.23", "99.9", "100", "100", "1,023", "-1,300"]
    assert three_digits(1300, "+") == "+1,300"
    assert three_digits(-2.345, "+") == "-2.35"


def decoder(**more: object) -> Decoder:
    sizes = {"d_model": 16, "num_layers": 3, "num_heads": 2, "d_ff": 24, "num_experts": 4, "context": CONTEXT}
    return Decoder(11, **{**sizes, **more})  # type: ignore[arg-type]


def test_the_table_names_parts_and_their_options() -> None:
    capacity = partial(Factor, 1.5, order="first_choices")
    moe = partial(MoELayer, router=TopK, capacity=capacity)
    model = decoder(sparse=[2], sparse_attention=[0], moe=moe, allow_leak=True)
    console = Console(width=160, file=StringIO())
    console.print(model_table(model, CONTEXT, []))
    shown = console.file.getvalue()
    for words in (
        "3, of which 1 sparse: [2]",
        "3 sparse layers for queries, keys and values, 4 experts (linear), router switch",
        "4 of width 24 (mlp), 2 per token",
        "factor (train 1.5, eval dropless, order first_choices), counted over the sequence",
    ):
        assert words in shown


@pytest.mark.parametrize("info", [None, {}, {"path": "made up"}, {"generated": False}])
def test_where_data_of_ones_own_came_from_may_be_said_in_any_words(info: dict[str, object] | None) -> None:
    assert source_rows(info) == []
    assert fallback_box(info) is None


def test_generated_data_are_told() -> None:
    console = Console(width=160, file=StringIO())
    console.print(fallback_box({"generated": True}))
    assert "generated text: of an unknown source." in console.file.getvalue()


def test_the_reason_of_generated_data_is_told_once() -> None:
    info = {"description": "a play, in place of a text (the cache has no file x)", "generated": True}
    console = Console(width=160, file=StringIO())
    console.print(fallback_box(info))
    assert "(the cache has no file x)" in console.file.getvalue()
    assert source_rows(info) == [("data", "a play, in place of a text")]
    assert source_rows({**info, "generated": False}) == [("data", info["description"])]


def rows_of(moe: object = None, **more: object) -> dict[str, str]:
    sizes = {"d_model": 16, "num_layers": 3, "num_heads": 2, "d_ff": 24, "num_experts": 4, "context": CONTEXT}
    net = partial(Decoder, **{**sizes, **more})  # type: ignore[arg-type]
    return dict(twin_rows(LanguageModule(net, moe=moe, vocab_size=11), CONTEXT))  # type: ignore[arg-type]


def test_the_twin_of_a_table_is_that_of_dense_spec() -> None:
    rows = rows_of(sparse=[0, 2], expert_d_ff=12, moe=partial(MoELayer, router=partial(TopK, k=2)))
    assert f"{count(decoder(sparse=[]), CONTEXT).parameters:,}" in rows["  parameters"]
    assert "d_ff 24:" in rows["dense twin"]
    assert "d_ff [48, 24, 24]" in rows_of(sparse=[0], expert_d_ff=48)["dense twin"]


def test_what_has_no_twin_says_so() -> None:
    assert rows_of(sparse=[])["dense twin"].startswith("none: this model is dense already")
    assert dict(twin_rows(torch.nn.Linear(2, 2), CONTEXT)).keys() == {"dense twin"}


def test_load_bars() -> None:
    (name, text), _ = loads(torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.25] * 4]), ["a", "b"], [4, 4])
    assert name == "load a"
    assert text.startswith("█▄▄·  largest 50.0%, smallest 0.0%")


def test_load_bars_of_an_output_without_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", TextIOWrapper(BytesIO(), encoding="ascii"))
    assert loads(torch.tensor([[0.5, 0.25, 0.05, 0.0]]), ["a"], [4])[0][1].startswith("8410  largest 50.0%")


def test_a_layer_with_fewer_experts_shows_its_own_alone() -> None:
    (_, few), (_, many) = loads(torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.25] * 4]), ["a", "b"], [2, 4])
    assert few == "██  largest 50.0%, smallest 50.0%"
    assert many.startswith("▄▄▄▄  ")


def test_the_table_names_all_widths_of_experts() -> None:
    console = Console(width=160, file=StringIO())
    console.print(model_table(decoder(d_ff=[16, 32, 48], sparse=[0, 1, 2]), CONTEXT))
    console.print(model_table(decoder(sparse=[0, 2]), CONTEXT))
    assert "4 of width 16 or 32 or 48 (mlp)" in console.file.getvalue()
    assert "4 of width 24 (mlp)" in console.file.getvalue()


def test_einsum_counts_no_rows_twice() -> None:
    """The closed form does not depend on the dispatcher."""
    assert count(decoder(moe=partial(MoELayer, dispatcher=Einsum)), CONTEXT) == count(decoder(), CONTEXT)


def test_figures_stand_on_the_right_and_words_on_the_left(capsys: pytest.CaptureFixture[str]) -> None:
    table = figures("Costs", ("what", "ms", "why"), frame=None, words=["why"])
    table.add_row("a", "1", "x")
    table.add_row("layer", "1,000", "no reason")
    console().print(table)
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [
        "Costs",
        "what      ms  why",
        "a          1  x",
        "layer  1,000  no reason",
    ]


def test_brackets_and_colons_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    path = "runs[lr=0.1]/a :x: b.txt"
    out = console()
    out.print(pairs(path, [("data", path)]))
    out.print(path, highlight=False)
    assert capsys.readouterr().out.count(path) == 3


@pytest.mark.parametrize("words", [{"[PAD]": 0, "[UNK]": 1, "a": 2}, {"[PAD]": 0, "b": 1}], ids=["a", "neither"])
def test_a_sample_begins_where_the_vocabulary_makes_nothing_of_a_line_end(words: dict[str, int]) -> None:
    package = pytest.importorskip("tokenizers")
    own = package.Tokenizer(package.models.WordLevel(words, "[UNK]"))
    own.pre_tokenizer = package.pre_tokenizers.Whitespace()
    own.add_special_tokens(["[PAD]"])
    tokenizer = FileTokenizer(content=own.to_str())
    assert not len(tokenizer.encode("\n"))
    net = partial(Decoder, d_model=8, num_layers=1, num_heads=2, d_ff=8, context=8, sparse=[])
    module = LanguageModule(net, losses=[], tokenizer=tokenizer)
    assert isinstance(sample(module, None, 4), str)
    if "a" not in words:
        assert "--prompt=-b --max" in command(module, None, "x.ckpt", "-b")  # no option of its own
    assert command(module, None, "x.ckpt", "b").endswith(
        f"--prompt {'ROMEO:' if 'a' in words else 'b'} --max_new_tokens 200"
    )


@pytest.mark.parametrize(
    ("limits", "told"),
    [
        ((1000, None), "1,000 steps"),
        ((-1, 1), "1 epoch"),
        ((1000, 3), "1,000 steps or 3 epochs, whichever comes first"),
        ((-1, -1), "until it is stopped"),
        ((0, None), "none: 0 steps"),
        ((-1, 0), "none: 0 steps"),
    ],
)
def test_the_length_of_a_run(limits: tuple[int, int | None], told: str) -> None:
    assert _length(SimpleNamespace(max_steps=limits[0], max_epochs=limits[1])) == told


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_speed_is_of_the_tokens_that_were_read(tmp_path: Path, accumulate: int) -> None:
    """The last step of an epoch of 3 batches has fewer than 4."""
    began, source = Began(), data(tmp_path)
    L.Trainer(
        max_epochs=2,
        limit_train_batches=3,
        limit_val_batches=0,
        accumulate_grad_batches=accumulate,
        callbacks=[began],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module(source), source)
    assert _speed(SimpleNamespace(began=began), 2.0) == 2 * 3 * 4 * 8 / 2
    assert not began.padded


def test_the_speed_of_padded_batches_says_so() -> None:
    began = Began()
    tokens = torch.zeros(3, 5)
    began.on_train_batch_end(SimpleNamespace(world_size=2), None, None, {"tokens": tokens, "valid": tokens > 0}, 0)  # type: ignore[arg-type]
    assert (began.tokens, began.padded) == (30, True)


def test_the_scores_of_some_sentences_say_of_how_many() -> None:
    callback = Translations(pairs=2)
    one = Translation("a", "b", "c", "")
    found = {"val/bleu": 12.34, "val/chrf": 45.6}
    other = Translations(pairs=1)
    other.found = [one]
    for sentences, told in ((1, ""), (2, ", on the first 2 sentences")):
        callback.found = [one] * sentences
        shown = _translation(SimpleNamespace(callbacks=[other, callback]), found)
        assert shown == f"BLEU 12.3, chrF 45.6 of 100{told}"


def test_two_models_side_by_side() -> None:
    """What both have alike is said to be equal, what has grown by its share, and of nothing no share is told."""
    small = Decoder(11, d_model=8, num_layers=1, num_heads=2, d_ff=8, context=8, sparse=[])
    large = Decoder(11, d_model=8, num_layers=1, num_heads=2, d_ff=16, context=8, sparse=[])
    rows = {name.strip(): told for name, _, _, told in both(small, large, 8)}
    of_each = 2 * 8 * 8
    whole = sum(p.numel() for p in small.parameters())
    assert rows["attention"] == rows["routers"] == rows["experts"] == "equal"
    assert rows["parameters"] == f"+{100 * of_each / whole:.3g}%"


def test_figures_of_distillation_fit_a_terminal() -> None:
    """80 columns: a number that is cut says another one."""
    rows = [
        TableRow("distilled, non_expert", (1.4, 1.41, 1.42), 1_234_567, 0.987, 123456.0, 4_938_268, None, None),
        TableRow("teacher", (1.3,), 135_526_912, 0.0, 43456.0, 542_107_648, None, None),
    ]
    shown = StringIO()
    Console(file=shown, width=80).print(distill_table(rows, "a text"))
    assert "…" not in shown.getvalue()
    for text in ("1.4100", "0.0100", "1.23M", "136M", "98.7%", "123,456", "4.71 MiB"):
        assert text in shown.getvalue(), text


def test_a_layer_that_nothing_was_sent_to_has_no_bar() -> None:
    (row,) = loads(torch.zeros(1, 3), ["blocks.0.mlp"], [3])
    assert row == ("load blocks.0.mlp", f"{3 * row[1][0]}  largest 0.0%, smallest 0.0%")


@pytest.mark.parametrize(
    ("limits", "told"),
    [
        ((5, None), "the checkpoint is at step 5 already, and trainer.max_steps is 5. "),
        ((-1, 2), "the checkpoint is at epoch 2 already, and trainer.max_epochs is 2. "),
        ((6, 3), None),
        ((-1, -1), None),
    ],
)
def test_a_checkpoint_at_the_very_end_is_told(limits: tuple[int, int | None], told: str | None) -> None:
    """Of step 5 and epoch 2."""
    trainer = SimpleNamespace(global_step=5, current_epoch=2, max_steps=limits[0], max_epochs=limits[1])
    found = ended(trainer)  # type: ignore[arg-type]
    assert found is None if told is None else told in (found or "")


def test_the_sample_of_a_translator_begins_with_what_it_translates(tmp_path: Path) -> None:
    """Without the token that says into which language."""
    source = pupils.pairs(tmp_path)
    source.setup("validate")
    net = partial(EncoderDecoder, d_model=8, encoder_layers=1, num_heads=2, d_ff=8, num_experts=2, sparse=[])
    written = sample(LanguageModule(net, tokenizer=source.tokenizer), source, length=2)
    first = (tmp_path / "en.txt").read_text().splitlines()[24 * 9 // 10]
    assert written.startswith(f"{first}\n-> target:")

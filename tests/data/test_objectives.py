"""What each objective makes of rows of tokens: nothing lost, widths that no draw changes, decoder inputs shifted."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch

from switchkit.data import UL2, ByteTokenizer, CausalLM, CharTokenizer, Mixture, Objective, PrefixLM, SpanCorruption
from switchkit.data.drawn_windows import DrawnWindows
from switchkit.data.spans import reconstruct

BYTES = ByteTokenizer()
MODES = {"r_mode": "<extra_id_124>", "s_mode": "<extra_id_123>", "x_mode": "<extra_id_122>"}
R, S, X = 259, 260, 261
OBJECTIVES = {
    "causal": CausalLM,
    "prefix": PrefixLM,
    "fixed prefix": partial(PrefixLM, prefix=0.75),
    "prefix with mode": partial(PrefixLM, mode="<extra_id_123>"),
    "spans": SpanCorruption,
    "rolled spans": partial(SpanCorruption, mean_span_length=8.0, roll=True, mode="<extra_id_124>"),
    "half": partial(SpanCorruption, noise_density=0.5),
    "UL2": partial(UL2, **MODES),
    "mixture": partial(Mixture, objectives=[partial(CausalLM, weight=2.0), SpanCorruption, PrefixLM]),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def text(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 248, (rows, length), generator=seeded(seed))


def pieces(batch: dict[str, torch.Tensor], row: int) -> tuple[list[int], list[int]]:
    return (
        batch["source"][row][batch["source_valid"][row]].tolist(),
        batch["targets"][row][batch["valid"][row]].tolist(),
    )


def test_a_member_without_weight_shortens_no_window() -> None:
    """Though its own inputs would have room for fewer tokens."""
    objectives = [CausalLM, partial(PrefixLM, weight=0.0)]
    mixed, short = (Mixture(BYTES, objectives=some) for some in (objectives, [CausalLM, PrefixLM]))
    assert (mixed.raw_length(20), short.raw_length(20)) == (20, 19)


@pytest.mark.parametrize(("length", "read"), [(9, 3), (8, 2), (7, 2), (2, 1)])
def test_a_share_of_a_row_is_rounded(length: int, read: int) -> None:
    """0.3 of 9 is 2.7; one token at least is read, and one written."""
    batch = PrefixLM(BYTES, prefix=0.3)(text(1, length), seeded())
    assert [len(piece) - 1 for piece in pieces(batch, 0)] == [read, length - read]


def test_the_mode_is_no_sentinel_of_its_objective() -> None:
    """Its spans take the next ones, so that it stands at the beginning alone."""
    objective = SpanCorruption(BYTES, mode="<extra_id_0>")
    batch = objective(text(4, 60), seeded())
    mode = BYTES.special_id("<extra_id_0>")
    assert all(row.tolist()[0] == mode and (row == mode).sum() == 1 for row in batch["source"])
    assert not (batch["targets"] == mode).any()


@pytest.mark.parametrize(("tokens", "windows"), [(30, 1), (39, 1), (40, 2), (50, 3)])
def test_the_last_window_of_a_text_may_end_with_it(tokens: int, windows: int) -> None:
    """Windows of 30 tokens, 10 apart, each in two ways."""
    drawn = DrawnWindows(text(1, tokens)[0], CausalLM(BYTES), 30, 10, 2)
    assert (drawn.windows, len(drawn)) == (windows, 2 * windows)
    last = drawn.batch(torch.tensor([2 * windows - 1]))
    assert last["targets"].tolist() == [drawn.tokens[10 * (windows - 1) :][:30].tolist()]


# All objectives.


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("length", [2, 3, 17, 64, 250])
def test_batches_have_one_shape_and_decoder_inputs_are_targets_one_later(name: str, length: int) -> None:
    objective: Objective = OBJECTIVES[name](tokenizer=BYTES)
    for seed in range(3):
        batch = objective(text(5, length, seed), seeded(seed))
        source, targets = objective.lengths(length)
        assert set(batch) == {"source", "source_valid", "tokens", "targets", "valid"}
        assert batch["source"].shape == batch["source_valid"].shape == (5, source)
        assert batch["tokens"].shape == batch["targets"].shape == batch["valid"].shape == (5, targets)
        assert {part.dtype for part in batch.values()} == {torch.long, torch.bool}
        assert (batch["tokens"][:, 0] == BYTES.start_id).all()
        assert torch.equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
        for ids, valid in (("source", "source_valid"), ("targets", "valid")):
            assert batch[valid][:, 0].all()
            assert not batch[ids][~batch[valid]].any()  # padding is id 0 ...
            assert (batch[ids][batch[valid]] > 0).all()  # ... and nothing else is
            assert (batch[valid].long().diff(dim=1) <= 0).all()  # at the end only


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("inputs", [5, 6, 7, 16, 128])
def test_no_input_is_longer_than_asked_for(name: str, inputs: int) -> None:
    objective: Objective = OBJECTIVES[name](tokenizer=BYTES)
    raw = objective.raw_length(inputs)
    assert raw >= 2
    assert objective.lengths(raw)[0] <= inputs


def test_an_input_without_room_is_refused() -> None:
    rolled = SpanCorruption(BYTES, roll=True, mode="<extra_id_124>")
    assert rolled.lengths(rolled.raw_length(5)) == (5, 4)
    for inputs in (3, 4):
        with pytest.raises(ValueError, match=f"inputs_length {inputs} leaves no room for"):
            rolled.raw_length(inputs)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_batch_is_a_function_of_rows_and_generator(name: str) -> None:
    objective = OBJECTIVES[name](tokenizer=BYTES)
    before = torch.get_rng_state()
    rows = text(6, 60)
    one, two = objective(rows, seeded(1)), objective(rows.clone(), seeded(1))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(rows, text(6, 60))


# Each of them.


def test_causal_reads_eos_and_writes_the_row() -> None:
    rows = text(3, 9)
    batch = CausalLM(BYTES)(rows, seeded())
    assert batch["source"].tolist() == [[1]] * 3
    assert torch.equal(batch["targets"], rows)
    assert batch["valid"].all()


def test_a_prefix_and_its_rest_are_the_row_cut_anywhere() -> None:
    rows, cuts = text(2000, 6), Counter()
    batch = PrefixLM(BYTES)(rows, seeded())
    for row in range(2000):
        source, target = pieces(batch, row)
        assert source[-1] == target[-1] == 1
        assert source[:-1] + target[:-1] == rows[row].tolist()
        cuts[len(source) - 1] += 1
    assert set(cuts) == {1, 2, 3, 4, 5}
    assert all(abs(count - 400) < 90 for count in cuts.values())  # five standard deviations


def test_a_fixed_prefix_is_that_share() -> None:
    rows = text(2, 100)
    source, target = pieces(PrefixLM(BYTES, prefix=0.75)(rows, seeded()), 1)
    assert source == [*rows[1, :75].tolist(), 1]
    assert target == [*rows[1, 75:].tolist(), 1]


@pytest.mark.parametrize("roll", [False, True])
def test_spans_give_the_row_back(roll: bool) -> None:
    rows = text(50, 90)
    objective = SpanCorruption(BYTES, roll=roll, mode="<extra_id_124>")
    batch = objective(rows, seeded())
    for row in range(50):
        source, target = pieces(batch, row)
        assert source[0] == R
        back = reconstruct(torch.tensor(source[1:]), torch.tensor(target), BYTES.sentinels, eos_id=1)
        assert torch.equal(back, rows[row])


def test_t5s_numbers_hold_for_a_vocabulary_with_sentinels_enough() -> None:
    objective = SpanCorruption(BYTES)
    assert objective.raw_length(512) == 568
    assert objective.lengths(568) == (512, 114)
    # The helper would take 69 tokens, for it counts no span there: the input would be one too long.
    assert SpanCorruption(BYTES, mean_span_length=20.0).raw_length(60) == 68


def test_ul2_draws_its_seven_denoisers_alike() -> None:
    """The mode token says which of three it was, the number of sentinels and of targets which of seven."""
    rows, seen = text(2100, 256), Counter()
    objective = UL2(BYTES, **MODES)
    batch = objective(rows, seeded())
    for row in range(2100):
        source, target = pieces(batch, row)
        seen[source[0], len(target)] += 1
    expected = {
        (R, 38 + 13 + 1),  # 38 of 256 taken out, in spans of 3
        (R, 38 + 5 + 1),
        (S, 64 + 1),
        (X, 128 + 43 + 1),
        (X, 128 + 16 + 1),
        (X, 38 + 1 + 1),
        (X, 128 + 2 + 1),
    }
    assert set(seen) == expected
    assert all(abs(count - 300) < 80 for count in seen.values())  # five standard deviations


def test_weights_are_shares_and_zero_is_none() -> None:
    factories = [partial(CausalLM, weight=3.0), partial(PrefixLM, weight=1.0), partial(SpanCorruption, weight=0.0)]
    mixture = Mixture(BYTES, objectives=factories)
    batch = mixture(text(4000, 10), seeded())
    causal = (batch["source_valid"].sum(1) == 1).sum()
    assert abs(causal - 3000) < 140  # five standard deviations
    assert not (batch["source"] > 258).any()


def test_all_members_of_a_mixture_get_rows_that_none_finds_too_long() -> None:
    mixture = Mixture(BYTES, objectives=[SpanCorruption, PrefixLM])
    assert mixture.raw_length(512) == 511  # a prefix of 511 and EOS; spans alone would take 568


# What cannot be.


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (partial(CausalLM, weight=-1.0), "weight of an objective"),
        (partial(CausalLM, weight=float("nan")), "weight of an objective"),
        (partial(PrefixLM, prefix=1.0), "prefix is the share"),
        (partial(PrefixLM, mode="[S2S]"), r"mode '\[S2S\]' is no special token of ByteTokenizer"),
        (partial(SpanCorruption, noise_density=1.5), "noise_density"),
        (partial(SpanCorruption, mean_span_length=0.0), "mean_span_length"),
        (partial(UL2, r_mode="<extra_id_1>"), "three different mode tokens, or none; got '<extra_id_1>', None, None"),
        (partial(UL2, r_mode="<unk>", s_mode="<unk>", x_mode="</s>"), "three different mode tokens"),
        (partial(Mixture, objectives=[]), "a weight above 0; got 0 objectives"),
        (partial(Mixture, objectives=[partial(CausalLM, weight=0.0)]), "a weight above 0; got 1 objectives"),
    ],
)
def test_bad_options_are_refused(build: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build(tokenizer=BYTES)


def test_a_vocabulary_without_special_ids_is_refused() -> None:
    with pytest.raises(ValueError, match=r"CausalLM needs a vocabulary with padding \(pad_id\), an end of text"):
        CausalLM(CharTokenizer("ab"))


def test_too_few_sentinels_are_named_with_the_numbers() -> None:
    objective = SpanCorruption(ByteTokenizer(262), mean_span_length=1.0)
    with pytest.raises(ValueError, match="100 tokens .* have 15 spans, and the vocabulary has 3 sentinels"):
        objective.lengths(100)


def test_one_token_is_refused() -> None:
    with pytest.raises(ValueError, match="rows of 1 tokens leave nothing to learn"):
        PrefixLM(BYTES)(text(2, 1), seeded())

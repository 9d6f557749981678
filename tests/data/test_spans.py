"""Span corruption: T5's counts and masks, what a mask makes of a text, and the text back."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
import torch

from switchkit.data.spans import (
    check_spans,
    corrupt,
    noise_mask,
    random_spans_helper,
    reconstruct,
    span_counts,
    span_lengths,
)

T5 = range(32099, -1, -1)
BYT5 = range(258, 247, -1)
EOS = 1


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def looped(tokens: list[int], gone: list[bool], sentinels: range) -> list[int]:
    """Oracle: token by token, a new sentinel where a gap begins."""
    out, used, before = [], 0, False
    for token, is_gone in zip(tokens, gone, strict=True):
        if not is_gone:
            out.append(token)
        elif not before:
            out.append(sentinels[used])
            used += 1
        before = is_gone
    return [*out, EOS]


def rows_of(padded) -> list[list[int]]:
    return [ids[valid].tolist() for ids, valid in zip(padded.ids, padded.valid, strict=True)]


# Counts and lengths.


@pytest.mark.parametrize(
    ("inputs", "density", "mean", "raw", "targets"),
    [
        (512, 0.15, 3.0, 568, 114),  # T5
        (1024, 0.15, 20.0, 1193, 189),  # ByT5
        (256, 0.15, 20.0, 298, 48),
        (128, 0.15, 3.0, 141, 29),
        (512, 0.5, 3.0, 766, 512),  # one token less than would fit, so that both are 512
    ],
)
def test_the_published_lengths(inputs: int, density: float, mean: float, raw: int, targets: int) -> None:
    assert random_spans_helper(inputs, density, mean) == (raw, targets)
    assert span_lengths(raw, density, mean) == (inputs, targets)


@pytest.mark.parametrize("density", [0.15, 0.6])
def test_the_helper_fills_the_input_but_at_a_half(density: float) -> None:
    """One token more would be too much, however long the target; only at 0.5 are equal lengths preferred."""
    raw, targets = random_spans_helper(100, density, 4.0)
    assert span_lengths(raw, density, 4.0) == (100, targets)
    assert span_lengths(raw + 1, density, 4.0)[0] > 100
    assert random_spans_helper(101, density, 4.0)[0] > raw


def test_t5_has_28_spans_and_byt5_9() -> None:
    assert span_counts(568, 0.15, 3.0) == (85, 28)
    assert span_counts(1193, 0.15, 20.0) == (179, 9)


def test_counts_are_rounded_in_single_precision_and_half_to_even() -> None:
    assert round(190 * 0.15) == 28  # 28.5 to even, as the helper has it
    assert span_counts(190, 0.15, 3.0)[0] == 29  # 28.500002: the mask has one more
    assert span_counts(5, 0.5, 1.0)[0] == 2  # 2.5 to even
    assert span_counts(7, 0.5, 1.0)[0] == 4  # 3.5 to even
    assert span_counts(100, 0.15, 6.0) == (15, 2)  # 2.5 spans to even


def test_there_is_always_a_span_where_the_helper_counts_none() -> None:
    for raw in range(2, 71):
        assert span_counts(raw, 0.15, 20.0)[1] == 1
    assert random_spans_helper(60, 0.15, 20.0)[1] == round(69 * 0.15) + 1  # raw 69, no span, EOS
    assert span_lengths(69, 0.15, 20.0) == (61, 12)


def test_where_single_precision_leaves_too_few_kept_tokens_spans_are_fewer() -> None:
    assert span_counts(3, 0.5, 1.0) == (2, 1)


@pytest.mark.parametrize(("density", "mean"), [(0.0, 3.0), (1.0, 3.0), (float("nan"), 3.0), (0.15, 0.5), (0.9, 1.0)])
def test_impossible_spans_are_refused(density: float, mean: float) -> None:
    with pytest.raises(ValueError, match="noise_density|mean_span_length"):
        check_spans(density, mean)


def test_the_refusal_says_what_would_do() -> None:
    with pytest.raises(ValueError, match=r"Raise mean_span_length to 9 or more"):
        check_spans(0.9, 1.0)
    check_spans(0.9, 9.01)


# Masks.


@pytest.mark.parametrize("length", [2, 3, 29, 30, 31, 64, 190, 568])
@pytest.mark.parametrize(("density", "mean"), [(0.15, 3.0), (0.5, 3.0), (0.15, 20.0), (0.3, 1.0)])
def test_every_mask_has_the_counts_begins_kept_and_ends_taken(length: int, density: float, mean: float) -> None:
    mask = noise_mask(50, length, density, mean, generator=seeded())
    noise, spans = span_counts(length, density, mean)
    assert mask.shape == (50, length)
    assert (mask.sum(1) == noise).all()
    begins = mask[:, 1:] & ~mask[:, :-1]
    assert (begins.sum(1) == spans).all()
    assert not mask[:, 0].any()
    assert mask[:, -1].all()


def test_all_masks_of_a_short_text_come_and_equally_often() -> None:
    """8 tokens, half taken out in 2 spans: 3 ways to cut 4 kept tokens times 3 ways to cut 4 taken ones."""
    mask = noise_mask(9000, 8, 0.5, 2.0, generator=seeded())
    possible = set()
    for kept, taken in itertools.product([(1, 3), (2, 2), (3, 1)], repeat=2):
        runs = zip(kept, taken, strict=True)
        possible.add(tuple(bit for k, t in runs for bit in [False] * k + [True] * t))
    seen = Counter(tuple(row) for row in mask.tolist())
    assert set(seen) == possible
    assert all(abs(count - 1000) < 150 for count in seen.values())  # five standard deviations


def test_a_text_of_one_span_has_one_mask_only() -> None:
    masks = {tuple(row) for row in noise_mask(100, 30, 0.15, 3.0, generator=seeded()).tolist()}
    assert masks == {(False,) * 26 + (True,) * 4}


def test_rolled_masks_are_as_likely_everywhere() -> None:
    mask = noise_mask(20_000, 30, 0.15, 3.0, generator=seeded(), roll=True)
    assert (mask.sum(1) == 4).all()
    share = mask.double().mean(0)
    assert (share - 4 / 30).abs().max() < 0.012  # five standard deviations
    assert len({tuple(row) for row in mask.tolist()}) == 30


def test_a_mask_is_a_function_of_the_generator() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one, two, other = (noise_mask(4, 64, 0.15, 3.0, generator=seeded(seed)) for seed in (7, 7, 8))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_one_token_is_kept() -> None:
    assert noise_mask(2, 1, 0.15, 3.0, generator=seeded()).tolist() == [[False], [False]]


# Inputs, targets and back.


def test_the_example_of_the_paper() -> None:
    """'Thank you [for inviting] me to your party [last] week' of figure 2, a word a token."""
    words = torch.tensor([[11, 12, 13, 14, 15, 16, 17, 18, 19, 20]])
    mask = torch.tensor([[False, False, True, True, False, False, False, False, True, False]])
    inputs, targets = corrupt(words, mask, T5, eos_id=EOS)
    assert rows_of(inputs) == [[11, 12, 32099, 15, 16, 17, 18, 32098, 20, EOS]]
    assert rows_of(targets) == [[32099, 13, 14, 32098, 19, 32097, EOS]]
    assert reconstruct(inputs.ids[0], targets.ids[0], T5, eos_id=EOS).tolist() == words[0].tolist()


@pytest.mark.parametrize("roll", [False, True])
def test_a_thousand_draws_equal_the_loop_and_give_the_text_back(roll: bool) -> None:
    draw, generator = random.Random(3), seeded(3)
    shapes = Counter()
    for _ in range(100):
        length, density, mean = draw.randint(2, 200), draw.uniform(0.05, 0.6), draw.choice([1.7, 3.0, 8.0, 20.0])
        tokens = torch.randint(2, 259, (10, length), generator=generator)
        mask = noise_mask(10, length, density, mean, generator=generator, roll=roll)
        inputs, targets = corrupt(tokens, mask, T5, eos_id=EOS)
        expected = [
            (looped(t, m, T5), looped(t, [not x for x in m], T5))
            for t, m in zip(*map(torch.Tensor.tolist, (tokens, mask)), strict=True)
        ]
        assert rows_of(inputs) == [source for source, _ in expected]
        assert rows_of(targets) == [target for _, target in expected]
        for padded in (inputs, targets):
            assert padded.ids.shape[1] == max(map(len, rows_of(padded)))
            assert not padded.ids[~padded.valid].any()
        if not roll:
            assert (inputs.ids.shape[1], targets.ids.shape[1]) == span_lengths(length, density, mean)
        for row in range(10):
            assert torch.equal(reconstruct(inputs.ids[row], targets.ids[row], T5, eos_id=EOS), tokens[row])
            shapes[bool(mask[row, 0]), bool(mask[row, -1])] += 1
    assert len(shapes) == (4 if roll else 1)


def test_byt5s_sentinels_do_not_meet_utf8() -> None:
    tokens = torch.tensor([[byte + 3 for byte in "Čeština a 日本語, obojí v UTF-8, a ještě něco navíc. 🎉".encode()]])
    mask = noise_mask(1, tokens.shape[1], 0.15, 3.0, generator=seeded())
    inputs, targets = corrupt(tokens, mask, BYT5, eos_id=EOS)
    assert (inputs.ids >= 248).sum() == span_counts(tokens.shape[1], 0.15, 3.0)[1]
    assert torch.equal(reconstruct(inputs.ids[0], targets.ids[0], BYT5, eos_id=EOS), tokens[0])


def test_too_few_sentinels_are_refused() -> None:
    mask = noise_mask(1, 200, 0.15, 1.0, generator=seeded())
    with pytest.raises(ValueError, match="30 spans need as many sentinels, and the vocabulary has 11"):
        corrupt(torch.zeros(1, 200, dtype=torch.long), mask, BYT5, eos_id=EOS)


@pytest.mark.parametrize(
    ("inputs", "targets"),
    [
        ([11, 32099, 12, EOS], [32099, 13, 32098, 14, 32097, 15, EOS]),  # a span more than the inputs have
        ([11, 32099, 12, 32098, 13, 32097, EOS], [32099, 14, EOS]),
        ([11, EOS], [12, EOS]),
        ([11, 32099, EOS], [32099, EOS]),
        ([11, 32099], [32099, 12, EOS]),
    ],
)
def test_what_is_not_of_one_text_is_refused(inputs: list[int], targets: list[int]) -> None:
    with pytest.raises(ValueError, match="not of one text|no EOS"):
        reconstruct(torch.tensor(inputs), torch.tensor(targets), T5, eos_id=EOS)

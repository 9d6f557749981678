"""Windows of tokens: where they begin, that every token is seen, and that a position is kept."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor

from switchkit.data import InOrder, RandomWindows
from switchkit.data.loader import AlignedWindows

TEXT = torch.arange(1000)  # a token is its own position


def windows(**changes: Any) -> RandomWindows:
    return RandomWindows(**{"tokens": TEXT, "context": 10, "batch_size": 5, **changes})


def starts(loader: RandomWindows | AlignedWindows, batches: int | None = None) -> list[list[int]]:
    return [batch["tokens"][:, 0].tolist() for batch in islice(loader, batches)]


def aligned(**changes: Any) -> AlignedWindows:
    return AlignedWindows(**{"tokens": TEXT, "context": 10, "batch_size": 5, "stride": 10, **changes})


# Windows at multiples of a stride.


@pytest.mark.parametrize("stride", [10, 7, 1])
def test_an_epoch_reads_every_aligned_window_once(stride: int) -> None:
    """But for less than a step of them; the last window has its last target in the text."""
    loader = aligned(stride=stride)
    every = range(0, 1000 - 10, stride)
    assert len(loader) == len(every) // 5
    first, second = ([start for batch in starts(loader) for start in batch] for _ in range(2))
    for read in (first, second):
        assert len(set(read)) == len(read) == len(loader) * 5
        assert set(read) <= set(every)
    assert first != second
    for batch in loader:
        assert torch.equal(batch["example"] * stride, batch["tokens"][:, 0])
        assert torch.equal(batch["targets"], batch["tokens"] + 1)


def test_ranks_share_aligned_windows_and_a_position_is_kept() -> None:
    alone = aligned(batch_size=6)
    ranks = [aligned(batch_size=2, rank=rank, world_size=3) for rank in range(3)]
    for whole, *parts in zip(starts(alone), *(starts(rank) for rank in ranks), strict=True):
        assert whole == [start for part in parts for start in part]
    loader, again = aligned(), aligned()
    iterator = iter(loader)
    for _ in range(4):
        next(iterator)
    again.load_state_dict(loader.state_dict())
    assert starts(again) == [batch["tokens"][:, 0].tolist() for batch in iterator]
    with pytest.raises(ValueError, match="tokens from window to window"):
        aligned(stride=5).load_state_dict(loader.state_dict())


def test_fewer_aligned_windows_than_a_step() -> None:
    with pytest.raises(
        ValueError, match="the text has 3 windows of context 10 at stride 10, fewer than the 4 of a step"
    ):
        aligned(tokens=TEXT[:35], batch_size=4)


# Training.


def test_a_window_is_followed_by_its_targets() -> None:
    loader = windows()
    batches = list(loader)
    assert len(batches) == len(loader) == 1000 // 50
    for batch in batches:
        assert set(batch) == {"tokens", "targets"}
        assert batch["tokens"].shape == batch["targets"].shape == (5, 10)
        assert batch["tokens"].dtype == torch.long
        assert torch.equal(batch["targets"], batch["tokens"] + 1)
        assert torch.equal(batch["tokens"], batch["tokens"][:, :1] + torch.arange(10))


def test_every_start_is_possible() -> None:
    """Of 12 tokens and context 10 there are two windows; both come, and nothing past the end."""
    loader = windows(tokens=TEXT[:12])
    assert len(loader) == 1
    assert {start for _ in range(20) for batch in starts(loader) for start in batch} == {0, 1}


def test_the_shortest_text_has_one_window() -> None:
    assert starts(windows(tokens=TEXT[:11])) == [[0] * 5]


def test_epochs_differ_and_seeds_differ_and_both_repeat() -> None:
    loader, again = windows(), windows()
    epochs = [starts(loader) for _ in range(3)]
    assert epochs == [starts(again) for _ in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    assert starts(windows(seed=1)) != epochs[0]
    assert starts(windows(seed=1)) != epochs[1]
    assert starts(windows(seed=-(2**70))) == starts(windows(seed=-(2**70)))


def test_repeat_gives_the_first_epoch_for_ever() -> None:
    loader = windows()
    loader.repeat = True
    assert starts(loader) == starts(loader) == starts(windows())


def test_the_global_random_state_is_neither_read_nor_changed() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = starts(windows())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert starts(windows()) == first


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_what_one_device_would_see(world_size: int) -> None:
    alone = windows(batch_size=2 * world_size)
    ranks = [windows(batch_size=2, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert {len(rank) for rank in ranks} == {len(alone)}
    for _ in range(2):
        together = [[start for part in parts for start in part] for parts in zip(*map(starts, ranks), strict=True)]
        assert together == starts(alone)


@pytest.mark.parametrize("stop", [0, 1, 7, 19, 20])
@pytest.mark.parametrize("epochs", [0, 2])
def test_a_loaded_position_goes_on_as_if_never_stopped(epochs: int, stop: int) -> None:
    straight = windows()
    expected = [batch for _ in range(epochs + 2) for batch in starts(straight)]

    first = windows()
    for _ in range(epochs):
        starts(first)
    seen = starts(first, stop) if stop else []
    second = windows()
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict()
    remaining = [expected[epochs * 20 + len(seen) :], []]
    while len(remaining[1]) < len(remaining[0]):
        remaining[1] += starts(second)
    assert remaining[0] == remaining[1]


def test_an_iterator_that_yields_nothing_begins_no_epoch() -> None:
    loader, once = windows(), windows()
    expected = [starts(once), starts(once)]
    iter(loader)
    iter(loader)
    assert starts(loader) == expected[0]
    iter(loader)
    assert loader.state_dict()["epoch"] == 0
    assert starts(loader) == expected[1]


def test_an_epoch_left_early_is_over() -> None:
    loader, straight = windows(), windows()
    starts(loader, 3)
    expected = [starts(straight), starts(straight)]
    assert starts(loader) == expected[1]


def test_where_the_reader_stops_early_the_position_there_is_the_end() -> None:
    first, second, straight = windows(), windows(), windows()
    first.ends_after = second.ends_after = 3
    assert len(first) == 20
    starts(first, 3)
    second.load_state_dict(first.state_dict())
    starts(straight)
    assert starts(second, 3) == starts(straight)[:3]


def test_a_position_is_plain_and_goes_to_other_devices() -> None:
    """16 windows of a step are 16 windows of a step, on one device or four."""
    one = windows(batch_size=16)
    starts(one, 2)
    state = one.state_dict()
    assert all(type(value) is int for value in state.values())
    fourth = windows(batch_size=4, world_size=4, rank=3)
    fourth.load_state_dict(state)
    straight = windows(batch_size=16)
    assert starts(fourth) == [batch[12:] for batch in starts(straight)[2:]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"context": 11}, r"\(context\): 10 in the checkpoint, 11 now"),
        ({"batch_size": 6}, r"\(batch_size times devices\): 5 in the checkpoint, 6 now"),
        ({"world_size": 2}, r"\(batch_size times devices\): 5 in the checkpoint, 10 now"),
        ({"seed": 1}, "seed: 0 in the checkpoint, 1 now"),
        ({"tokens": TEXT[:999]}, "tokens of the training text: 1000 in the checkpoint, 999 now"),
    ],
)
def test_a_position_in_other_data_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        windows(**change).load_state_dict(windows().state_dict())


# Evaluation.


@pytest.mark.parametrize("length", [2, 3, 10, 11, 12, 50, 51, 52, 101, 1000])
@pytest.mark.parametrize(("context", "batch_size"), [(10, 5), (1, 1), (7, 3), (2000, 4)])
def test_every_token_after_the_first_is_a_target_once(length: int, context: int, batch_size: int) -> None:
    text = 3 + TEXT[:length]
    loader = InOrder(text, context, batch_size)
    batches = list(loader)
    assert len(batches) == len(loader)
    pairs: list[tuple[int, int]] = []
    for batch in batches:
        tokens, targets, valid = batch["tokens"], batch["targets"], batch["valid"]
        assert tokens.shape == targets.shape == valid.shape
        assert tokens.shape[0] <= batch_size
        assert tokens.shape[1] == context
        assert valid.dtype == torch.bool
        assert tokens.dtype == targets.dtype == torch.long
        assert valid.any(1).all()
        assert not targets[~valid].any()
        assert not tokens[~valid].any()
        pairs += zip(tokens[valid].tolist(), targets[valid].tolist(), strict=True)
    assert pairs == list(zip(text[:-1].tolist(), text[1:].tolist(), strict=True))
    assert [b["tokens"].shape[0] for b in batches[:-1]] == [batch_size] * (len(batches) - 1)


def test_in_order_can_be_read_again() -> None:
    loader = InOrder(TEXT, 10, 5)
    assert all(torch.equal(a[k], b[k]) for a, b in zip(loader, loader, strict=True) for k in a)


# What cannot be.


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"context": 0}, "context 0"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"tokens": TEXT[:10]}, "needs 11 tokens, the text has 10"),
        ({"tokens": TEXT.view(10, 100)}, r"int64 of shape \[N\], got torch.int64 of shape \[10, 100\]"),
        ({"tokens": TEXT.int()}, "got torch.int32"),
        ({"rank": 1}, "rank 1 of world_size 1"),
    ],
)
def test_numbers_out_of_range_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        windows(**change)


@pytest.mark.parametrize("tokens", [TEXT[:1], TEXT[:0]])
def test_nothing_to_evaluate_is_refused(tokens: Tensor) -> None:
    with pytest.raises(ValueError, match="nothing to predict"):
        InOrder(tokens, 10, 5)

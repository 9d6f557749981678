"""Routers, each against what its paper says in a loop."""

from __future__ import annotations

import math
import re

import oracle
import pytest
import torch
from properties import takes
from shapes import unchecked
from torch import Tensor

from switchkit import (
    CapacityPolicy,
    Factor,
    NoTokenLeftBehind,
    Random,
    RoundRobin,
    Router,
    Sigmoid,
    Switch,
    TopK,
    named,
    token_choice,
)

D, E = 6, 4


def route(router: Router, tokens: Tensor, valid: Tensor | None = None, *, training: bool = False):
    if valid is None:
        valid = torch.ones(tokens.shape[:2], dtype=torch.bool)
    return router.train(training)(tokens, None, valid, torch.zeros(tokens.shape[:2], dtype=torch.long))


def tokens(groups: int = 2, size: int = 9) -> Tensor:
    return torch.randn(groups, size, D, dtype=torch.float64)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("normalize", [None, "before", "after", "never"])
def test_top_k_sorts_the_softmax(k: int, normalize: str | None) -> None:
    if k == 1 and normalize in ("before", "after"):
        return
    x, router = tokens(), TopK(D, E, k=k, normalize=normalize).double()
    r = route(router, x)
    for g in range(2):
        for s in range(9):
            logits = [sum(w * v for w, v in zip(row, x[g, s], strict=True)).item() for row in router.weight]
            total = sum(math.exp(v) for v in logits)
            best = sorted(range(E), key=lambda e, logits=logits: -logits[e])[:k]
            probs = [math.exp(logits[e]) / total for e in best]
            weight = [p / sum(probs) for p in probs] if k > 1 and normalize in (None, "before") else probs
            mine = slice(s * k, (s + 1) * k)
            assert r.token[g, mine].tolist() == [s] * k
            assert r.expert[g, mine].tolist() == best
            assert oracle.error(r.weight[g, mine], torch.tensor(weight)) < 1e-6
            assert oracle.error(r.logits[g, s], torch.tensor(logits)) < 1e-6
    assert r.k == router.k == k
    assert r.renormalize == (normalize == "after")


@pytest.mark.parametrize("normalize", [None, "before", "after", "never"])
@pytest.mark.parametrize("k", [2, 4])
def test_a_softmax_after_the_choice_is_one_before_it_normalised(k: int, normalize: str | None) -> None:
    """Mixtral's form: exp(l_i) / sum over the k of exp(l_j), in which the sum over all experts cancels."""
    x, before, after = tokens(), TopK(D, E, k=k).double(), TopK(D, E, k=k, softmax="after", normalize=normalize)
    after.double().load_state_dict(before.state_dict())
    a, b = route(before, x), route(after, x)
    assert torch.equal(a.expert, b.expert)
    assert oracle.error(a.weight, b.weight) < 1e-12
    assert torch.equal(a.probs, b.probs)
    assert b.renormalize == (normalize == "after")


@pytest.mark.parametrize("scale", [1.0, 16.0])
@pytest.mark.parametrize("normalize", ["before", "after", "never"])
@pytest.mark.parametrize("policy", [Factor(0.5), NoTokenLeftBehind(0.8, rounds=2)], ids=["factor", "overflow"])
def test_scale_multiplies_what_is_normalised(policy: CapacityPolicy, normalize: str, scale: float) -> None:
    """Token by token: probabilities, divided by their sum over all choices or over those that found room, times it."""
    x, router = tokens(), TopK(D, E, k=2, normalize=normalize, scale=scale).double()
    with torch.no_grad():
        r = policy.place(route(router, x), policy.limit(9, E, 2, training=True), training=True)
    assert not torch.equal(r.kept, r.chosen)
    for g in range(2):
        for s in range(9):
            mine = [n for n in (2 * s, 2 * s + 1) if r.kept[g, n]]
            asked = r.expert if r.asked is None else r.asked
            raw = sum(float(r.probs[g, s, asked[g, n]]) for n in (2 * s, 2 * s + 1))
            found = sum(float(r.probs[g, s, r.expert[g, n]]) for n in mine)
            for n in mine:
                p = float(r.probs[g, s, r.expert[g, n]])
                expected = scale * {"before": p / raw, "after": p / (found or 1), "never": p}[normalize]
                assert abs(float(r.weight[g, n]) - expected) < 1e-12 * scale


@pytest.mark.parametrize("router", [TopK, Sigmoid])
@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_groups_take_a_batch_of_nothing(router: type[Router], shape: tuple[int, int]) -> None:
    """An empty part of a batch, as the last one of a device."""
    routing = router(D, 8, k=2, groups=2, top_groups=1)(
        torch.zeros(*shape, D), None, torch.ones(shape, dtype=torch.bool)
    )
    assert routing.expert.shape == (shape[0], 2 * shape[1])


@pytest.mark.parametrize("softmax", ["before", "after"])
@pytest.mark.parametrize(("groups", "top_groups"), [(4, 2), (2, 1), (4, 4), (8, 3), (1, 1)])
def test_groups_hold_a_token_to_the_best_of_them(groups: int, top_groups: int, softmax: str) -> None:
    """DeepSeek-V2: groups in order of their best expert, the k best experts of the first `top_groups` of them."""
    x, size = tokens(), 8 // groups
    router = TopK(D, 8, k=3, softmax=softmax, groups=groups, top_groups=top_groups, normalize="never").double()
    r = route(router, x)
    for g in range(2):
        for s in range(9):
            p = r.logits[g, s].softmax(-1).tolist()
            order = sorted(range(groups), key=lambda n, p=p: -max(p[n * size : (n + 1) * size]))
            inside = [e for e in range(8) if e // size in order[:top_groups]]
            best = sorted(inside, key=lambda e, p=p: -p[e])[:3]
            total = 1 if softmax == "before" else sum(p[e] for e in best)
            assert r.expert[g, 3 * s : 3 * s + 3].tolist() == best
            assert oracle.error(r.weight[g, 3 * s : 3 * s + 3], torch.tensor([p[e] / total for e in best])) < 1e-6


def test_switch_is_the_top_one_with_its_raw_probability() -> None:
    x, switch, top = tokens(), Switch(D, E).double(), TopK(D, E, k=1).double()
    top.load_state_dict(switch.state_dict())
    a, b = route(switch, x), route(top, x)
    for name in ("logits", "probs", "token", "expert", "weight", "chosen"):
        assert torch.equal(getattr(a, name), getattr(b, name))
    assert torch.equal(a.weight, a.probs.max(-1).values)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_switch_samples_from_the_softmax(temperature: float) -> None:
    """Frequencies of 20 000 draws lie within five standard deviations, sqrt(p (1 - p) / n), of the softmax."""
    n = 20_000
    router = Switch(D, E, sample=True, temperature=temperature).double()
    # Releases of torch differ in how many numbers a truncated normal takes.
    torch.manual_seed(0)
    torch.nn.init.normal_(router.weight)
    x = tokens(1, 1).expand(1, n, D)
    r = route(router, x, training=True)
    p = (r.logits[0, 0] / temperature).softmax(-1)
    found = torch.bincount(r.expert[0], minlength=E) / n
    assert ((found - p).abs() <= 5 * (p * (1 - p) / n).sqrt()).all(), (found, p)
    # The bound is narrow enough to tell this temperature from another.
    other = (r.logits[0, 0] / (temperature * 1.5)).softmax(-1)
    assert ((found - other).abs() > 5 * (other * (1 - other) / n).sqrt()).any()
    # The weight stays the probability at temperature one, so that the gradient is that of the loss.
    assert torch.equal(r.weight, r.probs.gather(-1, r.expert.unsqueeze(-1)).squeeze(-1))


@pytest.mark.parametrize("name", [name for name, cls in named(Router).items() if takes(cls, "jitter")])
def test_jitter_multiplies_by_what_it_says(name: str) -> None:
    """With one input at a time, the ratio of logits with and without jitter is the factor: uniform in [0.7, 1.3]."""
    router = named(Router)[name](1, 2, jitter=0.3).double()
    x = torch.ones(1, 5000, 1, dtype=torch.float64)
    ratio = (route(router, x, training=True).logits / route(router, x).logits)[0, :, 0]
    assert 0.7 <= ratio.min() < 0.71
    assert 1.29 < ratio.max() <= 1.3
    assert abs(ratio.mean() - 1) < 5 * 0.3 / math.sqrt(3 * 5000)


def test_input_dropout_drops_entries_and_scales_the_rest() -> None:
    router = Switch(1, 2, input_dropout=0.25).double()
    x = torch.ones(1, 5000, 1, dtype=torch.float64)
    ratio = (route(router, x, training=True).logits / route(router, x).logits)[0, :, 0]
    dropped = ratio == 0
    torch.testing.assert_close(ratio[~dropped], torch.full_like(ratio[~dropped], 1 / 0.75))
    assert abs(dropped.double().mean() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 5000)


def test_linear_routers_start_small_and_truncated() -> None:
    """Truncated normal at two deviations, std sqrt(0.1 / d_model); truncation leaves 0.88 of the deviation."""
    std = math.sqrt(0.1 / 400)
    for cls in (Switch, TopK):
        weight = cls(400, 50).weight
        assert weight.abs().max() <= 2 * std
        assert abs(weight.std() / std - 0.88) < 0.02


@pytest.mark.parametrize("name", [name for name, cls in named(Router).items() if takes(cls, "init_std")])
def test_a_deviation_of_ones_own_is_not_truncated(name: str) -> None:
    weight = named(Router)[name](400, 50, init_std=0.5).weight
    assert abs(weight.std() / 0.5 - 1) < 0.02
    assert weight.abs().max() > 1.5


@pytest.mark.parametrize("name", [name for name, cls in named(Router).items() if cls(D, E).uneven is None])
@pytest.mark.parametrize("limit", [None, 3, 20])
def test_rows_that_experts_compute_are_those_of_the_load(name: str, limit: int | None) -> None:
    """Nothing dropped: what a plan counts beforehand is what the record holds."""
    router = named(Router)[name](D, E, **({"k": 3} if takes(named(Router)[name], "k") else {})).double()
    x = tokens(2, 9)
    r = router.eval()(x, limit, torch.ones(2, 9, dtype=torch.bool), torch.arange(18).view(2, 9))
    assert Factor(eval=None).place(r, None, training=False).load.sum(1).tolist() == [router.rows(9, limit)] * 2


@pytest.mark.parametrize("k", [1, 2, 4])
def test_random_draws_k_different_experts_evenly(k: int) -> None:
    n = 8000
    r = route(Random(D, E, k=k), torch.zeros(1, n, D), training=True)
    chosen = r.expert.view(n, k)
    assert all(len(set(row)) == k for row in chosen[:500].tolist())
    share, p = torch.bincount(r.expert[0], minlength=E) / n, k / E
    assert ((share - p).abs() <= 5 * math.sqrt(p * (1 - p) / n)).all()
    torch.testing.assert_close(r.weight, torch.full_like(r.weight, 1 / k))
    assert (r.probs == 1 / E).all()


def test_random_reads_a_table_by_position_in_evaluation() -> None:
    """The same for every sequence, token and instance; even enough; and not moved by padding."""
    n = 8000
    r = route(Random(D, E, k=2), tokens(2, n))
    again = route(Random(D, E, k=2), tokens(1, n))
    assert torch.equal(r.expert[0], r.expert[1])
    assert torch.equal(r.expert[0], again.expert[0])
    share = torch.bincount(r.expert[0], minlength=E) / n
    assert ((share - 0.5).abs() <= 5 * math.sqrt(0.25 / n)).all()
    pairs = torch.bincount((r.expert[0].view(n, 2) * torch.tensor([E, 1])).sum(1), minlength=E * E) / n
    assert ((pairs > 0).sum() == E * (E - 1)).item(), "every ordered pair occurs"
    first, p = r.expert[0, ::2], 1 / E**2
    neighbours = torch.bincount(first[:-1] * E + first[1:], minlength=E * E) / (n - 1)
    assert ((neighbours - p).abs() <= 5 * math.sqrt(p * (1 - p) / n)).all(), "one says nothing of the next"
    valid = torch.ones(1, n, dtype=torch.bool)
    valid[0, [0, 5, 6]] = False
    shifted = route(Random(D, E, k=2), tokens(1, n), valid)
    assert torch.equal(shifted.expert[shifted.chosen], again.expert[0, : -3 * 2])


@pytest.mark.parametrize("k", [1, 2, 3])
def test_round_robin_is_as_even_as_can_be(k: int) -> None:
    valid = torch.rand(3, 22) < 0.7
    r = route(RoundRobin(D, E, k=k), torch.zeros(3, 22, D), valid)
    for g in range(3):
        turns = [int(e) for e, chosen in zip(r.expert[g], r.chosen[g], strict=True) if chosen]
        assert turns == [i % E for i in range(len(turns))]


def test_routers_compute_in_float32_at_least() -> None:
    for name, cls in named(Router).items():
        for given, used in ((torch.bfloat16, torch.float32), (torch.float16, torch.float32)):
            r = route(cls(D, E).to(given), tokens().to(given))
            assert r.logits.dtype == r.weight.dtype == used, name
        r = route(cls(D, E).double(), tokens())
        assert r.logits.dtype == r.weight.dtype == torch.float64, name


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: TopK(D, E, k=5), "k=5 choices of a token are impossible: k must be from 1 to num_experts=4"),
        (lambda: TopK(D, E, k=0), "k=0"),
        (lambda: Random(D, E, k=5), "num_experts=4"),
        (lambda: RoundRobin(D, E, k=-1), "k=-1"),
        (lambda: TopK(D, E, k=1, normalize="before"), "normalize='before' with k=1 makes every weight 1"),
        (lambda: TopK(D, E, k=1, normalize="after"), "normalize='after' with k=1 makes every weight 1"),
        (lambda: TopK(D, E, normalize=True), "normalize must be 'before', 'after', 'never' or null; got True"),
        (lambda: TopK(D, E, k=1, softmax="after"), "softmax='after' with k=1 makes every weight 1"),
        (lambda: TopK(D, E, softmax="both"), "softmax must be 'before' or 'after'; got 'both'"),
        (lambda: TopK(D, E, groups=3, top_groups=1), "groups=3 must divide num_experts=4: choose a divisor"),
        (lambda: TopK(D, E, groups=2), "groups=2 needs top_groups"),
        (lambda: TopK(D, E, groups=2, top_groups=3), "top_groups must be from 1 to groups=2; got 3"),
        (lambda: TopK(D, E, k=3, groups=2, top_groups=1), "do not fit into the 2 experts of top_groups=1"),
        (lambda: TopK(D, E, jitter=-1), "jitter must be in [0, 1); got -1"),
        (lambda: Switch(D, E, jitter=1.0), "jitter must be in [0, 1); got 1.0"),
        (lambda: Switch(D, E, jitter=float("nan")), "got nan"),
        (lambda: Switch(D, E, input_dropout=1.5), "input_dropout must be in [0, 1); got 1.5"),
        (lambda: Switch(D, E, sample=True, temperature=0), "temperature must be a finite number > 0; got 0"),
        (lambda: Switch(D, E, temperature=2.0), "does nothing without sample=True: set it, or leave it out"),
        (lambda: Switch(D, 0), "num_experts must be at least 1; got 0"),
    ],
)
def test_bad_options_are_refused(make, says: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        make()
    assert says in str(caught.value)


@pytest.mark.parametrize("k", [2.0, 1.5, "2", True])
@pytest.mark.parametrize("name", ["top_k", "sigmoid", "cosine", "relu", "sinkhorn", "noisy_top_k", "hash", "random"])
def test_k_must_be_an_integer(name: str, k: object) -> None:
    with pytest.raises(ValueError, match=re.escape(f"k={k!r} choices of a token are impossible: k must be an integer")):
        named(Router)[name](D, E, k=k)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"expert": (2, 9)}, "expert must be [G, S, K] = [2, 9, K], as valid is [G, S]; got [2, 9]; a single choice"),
        ({"weight": (2, 9)}, "weight must be [G, S, K] = [2, 9, 1], as valid is [G, S]; got [2, 9]; a single choice"),
        ({"weight": (2, 9, 2)}, "weight must be [G, S, K] = [2, 9, 1], as valid is [G, S]; got [2, 9, 2]"),
        ({"chosen": (2, 9)}, "chosen must be [G, S, K] = [2, 9, 1], as valid is [G, S]; got [2, 9]"),
        ({"expert": (9, 2, 1)}, "expert must be [G, S, K] = [2, 9, K], as valid is [G, S]; got [9, 2, 1]"),
        ({"logits": (18, 4)}, "logits must be [G, S, E] = [2, 9, E], as valid is [G, S]; got [18, 4]"),
        ({"probs": (2, 9, 3)}, "probs must be [G, S, E] = [2, 9, 4], as valid is [G, S]; got [2, 9, 3]"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_choices_of_another_shape_are_named(change: dict, says: str) -> None:
    given = {"logits": (2, 9, E), "probs": (2, 9, E), "expert": (2, 9, 1), "weight": (2, 9, 1), **change}
    of = {"expert": torch.long, "chosen": torch.bool}
    tensors = {name: torch.zeros(size, dtype=of.get(name, torch.float32)) for name, size in given.items()}
    with unchecked(), pytest.raises(ValueError, match=re.escape(says)):
        token_choice(**tensors, valid=torch.ones(2, 9, dtype=torch.bool))

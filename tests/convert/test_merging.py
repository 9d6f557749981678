"""Experts merged into one: against permutations, naive sums, and layers where nothing may be lost."""

from __future__ import annotations

import itertools
import sys
from functools import partial

import pytest
import shapes
import torch
from torch import Tensor, nn

from switchkit import FeedForward, GatedMlp, Mixed, Mlp, MoELayer, Null, Rows, Shared, TopK
from switchkit.convert.merging import align, expert_of, feed_forward_of, stack_of

D, F, E = 6, 5, 4
KINDS = {
    "mlp": partial(Mlp),
    "mlp, biases": partial(Mlp, bias=True, activation="gelu"),
    "gated": partial(GatedMlp),
    "gated, biases": partial(GatedMlp, bias=True),
}


@pytest.fixture(params=KINDS)
def experts(request: pytest.FixtureRequest) -> Mlp | GatedMlp:
    made = KINDS[request.param](D, F, E).double()
    for weight in made.parameters():
        nn.init.normal_(weight)
    return made


def outputs(experts: nn.Module) -> Tensor:
    """All experts on the same five tokens."""
    x = torch.randn(5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    number = experts.num_experts
    return experts(Rows(x=x.expand(number, 5, D), load=torch.full((number,), 5)))


def filled(experts: nn.Module, stack: dict[str, Tensor]) -> nn.Module:
    with torch.no_grad():
        for name, weight in experts.named_parameters():
            weight.copy_(stack[name])
    return experts


def shuffled(stack: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """One expert, its hidden units in another order: by plain indexing, not by what is tested."""
    order = torch.randperm(F, generator=torch.Generator().manual_seed(seed))
    both = torch.cat([order, order + F]) if stack["w1"].shape[-1] == 2 * F else order
    moved = {"w1": stack["w1"][:, both], "w2": stack["w2"][order]}
    if "b1" in stack:
        moved |= {"b1": stack["b1"][both], "b2": stack["b2"]}
    return moved


def one(stack: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    return {name: weight[index] for name, weight in stack.items()}


def stacked(experts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([expert[name] for expert in experts]) for name in experts[0]}


def test_alignment_changes_no_function(experts: Mlp | GatedMlp) -> None:
    before = outputs(experts)
    stack = stack_of(experts)
    aligned = align(one(stack, 2), stack)
    assert not torch.equal(aligned["w1"], stack["w1"])
    torch.testing.assert_close(outputs(filled(experts, aligned)), before, rtol=1e-12, atol=1e-12)


def test_alignment_finds_a_permutation(experts: Mlp | GatedMlp) -> None:
    first = one(stack_of(experts), 0)
    found = align(first, stacked([shuffled(first, seed) for seed in range(E)]))
    for name, weight in found.items():
        assert torch.equal(weight, first[name].expand_as(weight)), name


@pytest.mark.parametrize("gated", [False, True])
def test_alignment_reads_biases(gated: bool) -> None:
    """Units that nothing else tells apart."""
    into = 2 * F if gated else F
    first = {"w1": torch.ones(D, into), "w2": torch.ones(F, D), "b1": torch.randn(into), "b2": torch.zeros(D)}
    found = align(first, stacked([shuffled(first, seed) for seed in range(E)]))
    assert torch.equal(found["b1"], first["b1"].expand(E, into))


def test_alignment_is_the_nearest_of_all_orders(experts: Mlp | GatedMlp) -> None:
    """Every one of the 120 orders of five units, by the squared distance of all weights."""
    stack = stack_of(experts)
    reference, other = one(stack, 0), one(stack, 1)

    def distance(order: tuple[int, ...]) -> float:
        both = [*order, *(i + F for i in order)] if "gated" in type(experts).__name__.lower() else list(order)
        total = (other["w1"][:, both] - reference["w1"]).square().sum()
        total += (other["w2"][list(order)] - reference["w2"]).square().sum()
        if "b1" in stack:
            total += (other["b1"][both] - reference["b1"]).square().sum()
        return float(total)

    found = one(align(reference, stacked([other])), 0)
    got = sum(float((found[n] - reference[n]).square().sum()) for n in found if n != "b2")
    assert got == pytest.approx(min(map(distance, itertools.permutations(range(F)))), rel=1e-12)


@pytest.mark.parametrize("how", ["mean", "usage", "most_used", "aligned"])
def test_merging_one_expert_with_its_permutations(how: str, experts: Mlp | GatedMlp) -> None:
    """Exact where units are matched, or only one is taken; the others lose something."""
    first = one(stack_of(experts), 0)
    stack = stacked([first, *(shuffled(first, seed) for seed in range(1, E))])
    found = expert_of(stack, how, usage=torch.tensor([1.0, 2.0, 3.0, 4.0]))
    same = filled(experts, stacked([found] * E))
    wanted = outputs(filled(type(experts)(D, F, E, bias="b1" in stack, activation=experts.activation).double(), stack))
    error = float((outputs(same) - wanted).detach().abs().max())
    assert error < 1e-12 if how in ("most_used", "aligned") else error > 1e-2


def test_the_means_are_what_they_say(experts: Mlp | GatedMlp) -> None:
    stack = stack_of(experts)
    usage, gate = torch.tensor([0.0, 3.0, 1.0, 4.0]), torch.tensor([0.5, 0.25, 1.0, 2.0])
    for how, parts in (
        ("mean", [0.25] * 4),
        ("usage", [0, 3 / 8, 1 / 8, 4 / 8]),
        ("most_used", [0, 0, 0, 1]),
    ):
        found = expert_of(stack, how, usage=usage, gate=gate)
        for name, weight in found.items():
            scale = gate.tolist() if name in ("w2", "b2") else [1.0] * E
            naive = sum(parts[e] * scale[e] * stack[name][e] for e in range(E))
            torch.testing.assert_close(weight, naive, rtol=1e-12, atol=1e-12)
    plain, twice = expert_of(stack, "mean"), expert_of(stack, "mean", gate=2.0)
    torch.testing.assert_close(twice["w2"], 2 * plain["w2"])
    assert torch.equal(twice["w1"], plain["w1"])


@pytest.mark.parametrize("kind", ["mlp", "gated"])
@pytest.mark.parametrize("how", ["mean", "usage", "most_used", "aligned"])
def test_a_layer_of_equal_experts_is_that_dense_layer(kind: str, how: str) -> None:
    layer = MoELayer(D, E, d_ff=F, router=partial(TopK, k=2), experts=KINDS[kind]).double()
    stack = stack_of(layer.experts)
    filled(layer.experts, {name: weight[:1].expand_as(weight) for name, weight in stack.items()})
    dense = FeedForward(D, F, gated=kind == "gated", activation=layer.experts.activation).double()
    dense.load_state_dict(feed_forward_of(layer, how, usage=torch.ones(E)))
    x = torch.randn(2, 7, D, dtype=torch.float64)
    torch.testing.assert_close(dense(x), layer(x)[0], rtol=1e-12, atol=1e-12)


def test_the_mean_gate_goes_to_the_output() -> None:
    """A switch layer whose router does not know the experts apart multiplies each by 1/E."""
    layer = MoELayer(D, E, d_ff=F, experts=partial(Mlp, alike=True)).double()
    nn.init.zeros_(layer.router.weight)
    dense = FeedForward(D, F).double()
    dense.load_state_dict(feed_forward_of(layer, "mean", gate=1 / E))
    x = torch.randn(2, 7, D, dtype=torch.float64)
    torch.testing.assert_close(dense(x), layer(x)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["mlp", "gated"])
def test_shared_experts_stay_beside_the_merged_ones(kind: str) -> None:
    experts = partial(Shared, experts=KINDS[kind], num_shared=2, width=3)
    layer = MoELayer(D, E, d_ff=F, router=partial(TopK, k=2), experts=experts).double()
    routed = layer.experts.routed
    filled(routed, {name: weight[:1].expand_as(weight) for name, weight in stack_of(routed).items()})
    dense = FeedForward(D, F + 6, gated=kind == "gated", activation=routed.activation).double()
    dense.load_state_dict(feed_forward_of(layer, "usage", usage=torch.ones(E)))
    x = torch.randn(2, 7, D, dtype=torch.float64)
    torch.testing.assert_close(dense(x), layer(x)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_stay(dtype: torch.dtype) -> None:
    layer = MoELayer(D, E, d_ff=F).to(dtype)
    assert {weight.dtype for weight in feed_forward_of(layer, "aligned").values()} == {dtype}


def test_what_cannot_be_expressed_is_refused() -> None:
    for experts, why in (
        (Null, "kind Null cannot be taken apart"),
        (Mixed, "kind Mixed cannot be taken apart"),
        (partial(Mlp, bias=True), "have biases"),
        (partial(Shared, mix="gate"), "mix='gate' are weighted by each token"),
    ):
        with pytest.raises(ValueError, match=why):
            feed_forward_of(MoELayer(D, E, d_ff=F, experts=experts), "mean")


@pytest.mark.parametrize(
    ("how", "usage", "why"),
    [
        ("usage", None, "how='usage' needs usage="),
        ("most_used", None, "how='most_used' needs usage="),
        ("usage", [1.0, 2.0], r"usage must be \[4\], one number for each expert; got \[2\]"),
        ("usage", [1.0, -1.0, 0.0, 0.0], "usage must be at least 0"),
        ("aligned", [0.0] * 4, "above 0 somewhere"),
        ("usage", [1.0, float("nan"), 0.0, 0.0], "finite"),
    ],
)
def test_bad_usage_is_refused(how: str, usage: list[float] | None, why: str) -> None:
    given = None if usage is None else torch.tensor(usage)
    with pytest.raises(ValueError, match=why):
        expert_of(stack_of(Mlp(D, F, E)), how, usage=given)


def test_another_word_is_refused() -> None:
    with shapes.unchecked(), pytest.raises(ValueError, match="'most_used' or 'aligned'; got 'median'"):
        expert_of(stack_of(Mlp(D, F, E)), "median")


def test_a_reference_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"of the reference is \[6, 4\], that of each expert \[6, 5\]"):
        align(one(stack_of(Mlp(D, 4, 1)), 0) | {"w2": torch.zeros(F, D)}, stack_of(Mlp(D, F, E)))


def test_without_scipy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    stack = stack_of(Mlp(D, F, E))
    with pytest.raises(ImportError, match=r"pip install 'switchkit\[base\]'"):
        expert_of(stack, "aligned")
    assert expert_of(stack, "mean")["w1"].shape == (D, F)

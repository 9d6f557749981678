"""The balance loss and its options, against loops and against Hugging Face."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import oracle
import pytest
import torch
from properties import Case, collapsed, run
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func as mixtral
from transformers.models.switch_transformers.modeling_switch_transformers import load_balancing_loss_func as switch

from switchkit import (
    Balance,
    CommunicationBalance,
    DeviceBalance,
    MoELayer,
    NoTokenLeftBehind,
    Routing,
    SequenceBalance,
    Switch,
    load,
)
from switchkit.capacity.base import place_by_arrival
from switchkit.losses.balance import balance
from switchkit.losses.base import alone
from switchkit.routing.base import token_choice


def top_k(logits: Tensor, k: int, valid: Tensor | None = None, limit: int | None = None) -> Routing:
    """The record of the k best of each token, one group per sequence."""
    probs = logits.softmax(-1)
    weight, expert = probs.topk(k, dim=-1)
    real = torch.ones(logits.shape[:2], dtype=torch.bool) if valid is None else valid
    record = token_choice(logits, probs, expert, weight, real)
    return place_by_arrival(replace(record, batch=len(logits)), limit)


def record(**options) -> Routing:
    return run(Case(k=2, **options).layer(), *Case().inputs())[1]


def test_it_is_its_definition() -> None:
    """E * sum_e f_e P_e, counted by hand; with scale="k" it is k times as much."""
    r = record()
    real = r.probs[r.valid]
    expected = 4 * sum(load(r)[e] / load(r).sum() * real[:, e].sum() / len(real) for e in range(4))
    # One part in 1e12: shares of the load in float32 would be off by 1e-8.
    assert oracle.error(Balance()([r]), expected.double()) < 1e-6
    share = load(r).double() / load(r).sum()
    assert oracle.error(Balance()([r]), 4 * (share * real.mean(0)).sum()) < 1e-12
    assert oracle.error(Balance(scale="k")([r]), 2 * Balance()([r])) < 1e-12


@pytest.mark.parametrize("group", ["sequence", "batch", 7])
@pytest.mark.parametrize("per", ["batch", "sequence"])
@pytest.mark.parametrize("choices", ["all", "first"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_every_option_is_a_loop(group, per: str, choices: str, when: str) -> None:
    """Count by hand, token by token, where the b-th sequence is tokens 7b ... 7b + 6 of the flattened groups."""
    r = record(group=group)
    assert not torch.equal(r.kept, r.chosen)
    size, probs, valid = r.valid.shape[1], r.probs.flatten(0, 1), r.valid.flatten()
    rows = [range(21)] if per == "batch" else [range(7 * b, 7 * b + 7) for b in range(3)]
    terms = []
    for tokens in rows:
        counts = torch.zeros(4, dtype=torch.float64)
        for t in tokens:
            g, s = divmod(t, size)
            for j in range(2 if choices == "all" else 1):
                n = s * 2 + j
                assert int(r.token[g, n]) == s
                if (r.chosen if when == "before" else r.kept)[g, n]:
                    counts[r.expert[g, n]] += 1
        real = [t for t in tokens if valid[t]]
        # A sequence may have lost all of its choices.
        terms.append(4 * (counts / counts.sum().clamp(min=1) * probs[real].mean(0)).sum())
    expected = torch.stack(terms).mean()
    assert oracle.error(Balance(per=per, choices=choices, load=when)([r]), expected) < 1e-12


@pytest.mark.parametrize("layers", ["mean", "sum", "pooled"])
@pytest.mark.parametrize(("router", "aim"), [("top_k", 2), ("relu", 2), ("expert_choice", 12 / 7)])
def test_scale_k_is_the_mean_number_of_choices_aimed_at(router: str, aim: float, layers: str) -> None:
    """k times the loop, where of expert_choice 6 experts take 2 of 7 tokens; at uniform probabilities, k itself."""
    case = Case(router=router, k=None if router == "expert_choice" else 2, num_experts=6, capacity="fixed")
    r = run(replace(case, capacity_options=(("eval", 2),)).layer(), *case.inputs())[1]
    counts = torch.zeros(6, dtype=torch.float64)
    for g in range(3):
        for n in range(r.expert.shape[1]):
            counts[r.expert[g, n]] += r.chosen[g, n]
    loop = 6 * sum(counts[e] / counts.sum() * r.probs[r.valid][:, e].sum() / r.valid.sum() for e in range(6))
    times = 2 if layers == "sum" else 1
    assert oracle.error(Balance(scale="k", layers=layers)([r, r]), times * aim * loop) < 1e-12
    even = replace(r, probs=torch.full_like(r.probs, 1 / 6))
    assert Balance(scale="k", layers=layers)([even, even]).item() == pytest.approx(times * aim)


@pytest.mark.parametrize("layers", ["mean", "sum"])
def test_counts_of_a_step_take_the_place_of_the_micro_batchs(layers: str) -> None:
    """A row for each layer, filled up to the widest; the probabilities are the micro-batch's own."""
    wide, narrow = record(), run(Case(k=2, num_experts=3).layer(), *Case().inputs())[1]
    counted = torch.tensor([[5, 1, 2, 8], [4, 3, 1, 0]])
    terms = []
    for r, row in ((wide, [5, 1, 2, 8]), (narrow, [4, 3, 1])):
        mean = r.probs[r.valid].mean(0)
        terms.append(len(row) * sum(count / sum(row) * p for count, p in zip(row, mean, strict=True)))
    expected = (terms[0] + terms[1]) / (2 if layers == "mean" else 1)
    loss = Balance(scope="rank", layers=layers)
    assert oracle.error(loss([wide, narrow], counted), expected) < 1e-12
    own = Balance(layers=layers)([wide, narrow])
    assert oracle.error(alone(loss, [wide, narrow]), own) < 1e-12


def test_pooled_layers_share_the_counts_of_a_step() -> None:
    first, second = record(), record(seed=1)
    mean = torch.cat([first.probs[first.valid], second.probs[second.valid]]).mean(0)
    expected = 4 * (torch.tensor([6, 3, 3, 12]) / 24 * mean).sum()
    found = Balance(scope="rank", layers="pooled")([first, second], torch.tensor([[5, 1, 2, 8], [1, 2, 1, 4]]))
    assert oracle.error(found, expected) < 1e-6


def test_first_choices_are_the_best() -> None:
    """GShard's c_e counts the best expert of each token."""
    r = record()
    best = torch.bincount(r.probs.argmax(-1)[r.valid], minlength=4).double()
    expected = 4 * (best / best.sum() * r.probs[r.valid].mean(0)).sum()
    assert oracle.error(Balance(choices="first")([r]), expected) < 1e-12


@pytest.mark.parametrize("change", [{"k": None}, {"extras": {"k": torch.ones(())}}], ids=["experts", "relu"])
def test_first_choices_need_a_list_of_choices(change: dict) -> None:
    with pytest.raises(ValueError, match="first choices need a router where every token makes k choices, best first"):
        Balance(choices="first")([replace(record(), **change)])


@pytest.mark.parametrize("router", ["soft", "local_experts", "relu", "expert_choice"])
def test_first_choices_of_lists_in_the_order_of_experts_are_refused(router: str) -> None:
    r = run(Case(router=router).layer(), *Case().inputs())[1]
    with pytest.raises(ValueError, match="first choices need a router where every token makes k choices, best first"):
        Balance(choices="first")([r])


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_pooled_is_mixtral(k: int, padded: bool) -> None:
    """The value and the gradient of Hugging Face's Mixtral family, with and without its attention mask."""
    logits = [(3 * torch.randn(3, 9, 5)).requires_grad_() for _ in range(4)]
    valid = torch.rand(3, 9) > 0.3 if padded else torch.ones(3, 9, dtype=torch.bool)
    ours = Balance(layers="pooled", scale="k")([top_k(x, k, valid) for x in logits])
    theirs = mixtral(tuple(x.flatten(0, 1) for x in logits), 5, k, valid if padded else None)
    assert oracle.error(ours, theirs) < 1e-6
    expected = torch.autograd.grad(theirs, logits)
    for found, grad in zip(torch.autograd.grad(ours, logits), expected, strict=True):
        assert oracle.error(found, grad) < 1e-5


def test_pooled_per_sequence_is_hugging_face_switch() -> None:
    """Layers concatenated along the tokens, f and P of each example."""
    logits = [(3 * torch.randn(3, 9, 5)).requires_grad_() for _ in range(4)]
    ours = Balance(layers="pooled", per="sequence")([top_k(x, 1, limit=2) for x in logits])
    together = torch.cat(logits, dim=1).softmax(-1)
    theirs = switch(together, together.argmax(-1))
    assert oracle.error(ours, theirs) < 1e-6
    expected = torch.autograd.grad(theirs, logits)
    for found, grad in zip(torch.autograd.grad(ours, logits), expected, strict=True):
        assert oracle.error(found, grad) < 1e-5


def test_pooled_hides_collapse() -> None:
    """Four layers, each collapsed on another expert: 1 pooled, 4 on average."""
    layers = [collapsed(e) for e in range(4)]
    assert Balance(layers="pooled")(layers).item() == pytest.approx(1)
    assert Balance()(layers).item() == pytest.approx(4)


def test_pooled_over_unlike_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cannot be pooled; got \[\(1, 3\), \(1, 4\)\]: use layers='mean'"):
        balance(collapsed(0), collapsed(0, num_experts=3))
    with pytest.raises(ValueError, match=r"needs one k; got \[1, 2\]"):
        Balance(layers="pooled", scale="k")([collapsed(0), collapsed(0, k=2)])
    assert balance() == 0
    assert Balance(layers="pooled")([]) == 0


def test_it_has_no_minimum_of_one() -> None:
    """A load that opposes the probabilities gives less than the uniform value: never assert the opposite."""
    away = replace(collapsed(0), probs=torch.tensor([0.1, 0.3, 0.3, 0.3]).double().expand(1, 6, 4))
    assert Balance()([away]) < 1


def test_it_pushes_the_busiest_expert_down() -> None:
    r = replace(collapsed(0), logits=torch.zeros(1, 6, 4).double().requires_grad_())
    r = replace(r, probs=r.logits.softmax(-1))
    grad = oracle.gradients(Balance()([r]), logits=r.logits)["logits"]
    assert (grad[..., 0] > 0).all()
    assert (grad[..., 1:] < 0).all()


def test_after_the_drop_needs_a_placed_record() -> None:
    with pytest.raises(ValueError, match=r"call capacity\.place"):
        Balance(load="after")([replace(record(), kept=None)])


# Sequences


def test_each_sequence_is_on_its_own() -> None:
    """Two sequences, each collapsed on another expert: even as a batch, 2 = E of 2 experts each by itself."""
    logits = torch.zeros(2, 6, 2).double()
    logits[0, :, 0] = logits[1, :, 1] = 100
    r = top_k(logits, 1)
    assert Balance()([r]).item() == pytest.approx(1)
    assert SequenceBalance()([r]).item() == pytest.approx(2)


def test_it_is_that_of_deepseek_v3() -> None:
    """Equations 17 to 20 sequence by sequence; one that is all padding is not in the mean."""
    logits = torch.randn(3, 6, 5, dtype=torch.float64)
    valid = torch.ones(3, 6, dtype=torch.bool)
    valid[0, 4:] = False
    valid[1] = False
    r = top_k(logits, 2, valid)
    terms = []
    for b in (0, 2):
        real = [t for t in range(6) if valid[b, t]]
        total = 0
        for e in range(5):
            chosen = sum(e in logits[b, t].topk(2).indices.tolist() for t in real)
            total = total + 5 / (2 * len(real)) * chosen * sum(r.probs[b, t, e] for t in real) / len(real)
        terms.append(total)
    assert oracle.error(SequenceBalance()([r]), (terms[0] + terms[1]) / 2) < 1e-12


@pytest.mark.parametrize("group", ["batch", 7, 3, 5, 6, 8, 20])
@pytest.mark.parametrize(
    "loss",
    [SequenceBalance(), DeviceBalance(devices=2, per="sequence"), CommunicationBalance(devices=2, per="sequence")],
)
def test_sequences_are_found_whatever_the_groups(group, loss) -> None:
    """Groups cut through the 3 sequences of 7 tokens; the last one of 5, 6, 8 and 20 is filled up, 6 and 8 to 24."""
    expected = loss([record(capacity="dropless")])
    assert oracle.error(loss([record(capacity="dropless", group=group)]), expected) < 1e-12


@pytest.mark.parametrize(("group", "groups"), [(5, 5), (6, 4), (20, 2), (50, 1)])
def test_sequences_that_a_record_does_not_tell_apart_are_refused(group: int, groups: int) -> None:
    """4 groups of 6 could be 3 sequences of 8, and are 3 of 7 here."""
    with pytest.raises(ValueError, match=f"3 sequences are routed in {groups} groups of {group} tokens"):
        SequenceBalance()([replace(record(group=group), length=None)])


@pytest.mark.parametrize(
    "loss",
    [
        Balance(),
        Balance(choices="first"),
        Balance(per="sequence"),
        Balance(per="group"),
        SequenceBalance(),
        DeviceBalance(),
        DeviceBalance(per="sequence"),
        CommunicationBalance(),
        CommunicationBalance(per="sequence"),
    ],
    ids=lambda loss: f"{type(loss).__name__}-{getattr(loss, 'choices', '')}-{getattr(loss, 'per', '')}",
)
def test_overflow_that_went_elsewhere_hides_no_collapse(loss) -> None:
    """All tokens choose expert 0, a quarter fits and the rest is spread evenly: E times its mean probability, not 1."""
    layer = MoELayer(8, 4, d_ff=8, router=Switch, capacity=partial(NoTokenLeftBehind, train=1.0)).double()
    with torch.no_grad():
        layer.router.weight.zero_()[0] = 1
    torch.manual_seed(0)
    _, r = layer(torch.rand(2, 16, 8, dtype=torch.float64))
    assert r.load.tolist() == [[16, 0, 0, 0]] * 2
    assert r.taken.tolist() == [[4] * 4] * 2
    # One count of all its tokens, in each sequence as in the batch.
    expected = 4 * sum(r.probs[b, s, 0] for b in range(2) for s in range(16)) / 32
    assert expected > 3
    assert oracle.error(loss([r]), expected) < 1e-12
    # What was kept is with the experts that have it.
    assert oracle.error(Balance(load="after")([r]), torch.ones(())) < 1e-6

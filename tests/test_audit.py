"""Each check on a clean model, and on one with a planted fault that turns it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
import shapes
import torch
from torch import nn

from switchkit import (
    Balance,
    Decoder,
    Dropless,
    Experts,
    Factor,
    LanguageModule,
    LinearRouter,
    Mlp,
    MoELayer,
    RouterZ,
    Switch,
    TopK,
    mean_probs,
    token_choice,
)
from switchkit.attention import Attention
from switchkit.audit import Finding, audit, sees_future, sequences_for, uniform_routing
from switchkit.losses.balance import balance
from switchkit.losses.base import Loss
from switchkit.losses.variation import load_variation
from switchkit.models import Cache, Output
from switchkit.registry import lookup
from switchkit.routing.base import Router

NET = partial(Decoder, d_model=16, num_layers=2, num_heads=2, d_ff=16, num_experts=4, context=32, sparse="every(1)")
CHECKS = [
    "future tokens",
    "declared leaks",
    "rest of the batch",
    "chance in evaluation",
    "padding",
    "cached generation",
    "router gradient, task",
    "router gradient, balance",
    "expert gradients",
    "gradient accumulation",
    "activation checkpointing",
    "float32 routing",
    "equal experts",
    "router saturation",
    "scale of balance",
]


@pytest.fixture(autouse=True, scope="module")
def fast() -> Iterator[None]:
    """Shapes are checked where the parts are tested; here that takes most of the time."""
    with shapes.unchecked():
        yield


def module(router=Switch, *, losses=(Balance,), allow_leak=True, net=NET, **layer) -> LanguageModule:
    torch.manual_seed(0)
    moe = partial(MoELayer, **{"router": router, "capacity": partial(Factor, train=1.25), **layer})
    return LanguageModule(partial(net, allow_leak=allow_leak), moe=moe, losses=list(losses), vocab_size=24)


def findings(router=Switch, **given) -> dict[str, Finding]:
    return {finding.check: finding for finding in audit(module(router, **given))}


def status(found: dict[str, Finding], check: str) -> str:
    return found[check].status


def faults(found: dict[str, Finding]) -> list[str]:
    return [check for check, finding in found.items() if finding.status == "fault"]


# -- planted faults -----------------------------------------------------------------------------------------------


class Noisy(Switch):
    """Draws in evaluation too."""

    def forward(self, tokens, limit, valid, ids=None):
        return super().forward(tokens * (0.5 + torch.rand_like(tokens)), limit, valid, ids)


class Wasteful(Switch):
    """Draws in evaluation what it has no use for; whoever draws next gets other numbers."""

    def forward(self, tokens, limit, valid, ids=None):
        torch.rand(())
        return super().forward(tokens, limit, valid, ids)


class Claims(Switch):
    """Chooses for real tokens alone, and says that all are."""

    def forward(self, tokens, limit, valid, ids=None):
        return replace(super().forward(tokens, limit, valid, ids), valid=torch.ones_like(valid))


class Later(Switch):
    """Sees the mean of the sequence, and does not say so."""

    def forward(self, tokens, limit, valid, ids=None):
        return super().forward(tokens - tokens.mean(1, keepdim=True), limit, valid, ids)


class AllValid(Switch):
    """Routes padding like any token."""

    def forward(self, tokens, limit, valid, ids=None):
        return super().forward(tokens, limit, torch.ones_like(valid), ids)


class Detached(LinearRouter):
    """Its probabilities are learned, its weights are not."""

    def forward(self, tokens, limit, valid, ids=None):
        logits = self.logits(tokens)
        weight, expert = logits.softmax(-1).topk(1)
        return token_choice(logits, logits.softmax(-1), expert, weight.detach(), valid)


class Cut(Detached):
    """Nothing of it is learned from a loss."""

    def forward(self, tokens, limit, valid, ids=None):
        routing = super().forward(tokens, limit, valid, ids)
        return replace(routing, logits=routing.logits.detach(), probs=routing.probs.detach())


class Half(LinearRouter):
    """Computes in the type of its input."""

    def forward(self, tokens, limit, valid, ids=None):
        logits = tokens @ self.weight.to(tokens.dtype).t()
        weight, expert = logits.softmax(-1).topk(1)
        return token_choice(logits, logits.softmax(-1), expert, weight, valid)


class Closing(Switch):
    """The last expert takes no token."""

    def logits(self, tokens):
        return self.closed(super().logits(tokens))

    def closed(self, logits):
        return logits.masked_fill(torch.arange(self.num_experts) == self.num_experts - 1, -torch.inf)


class Rounded(Closing):
    """Its products are of the type of its input, what it hands back is not."""

    def logits(self, tokens):
        low = tokens @ self.weight.to(tokens.dtype).t()
        return self.closed(low.to(torch.promote_types(low.dtype, torch.float32)))


class Single(LinearRouter):
    """Names float32, so that it cannot run in float64."""

    def forward(self, tokens, limit, valid, ids=None):
        logits = tokens.float() @ self.weight.t()
        weight, expert = logits.softmax(-1).topk(1)
        return token_choice(logits, logits.softmax(-1), expert, weight, valid)


class Float32Experts(Mlp):
    """Refuses float64."""

    def forward(self, rows):
        if rows.x.dtype == torch.float64:
            raise RuntimeError("float32 only")
        return super().forward(rows)


class Counter(Switch):
    """Another temperature at each call."""

    def __init__(self, d_model, num_experts):
        super().__init__(d_model, num_experts)
        self.calls = 0

    def forward(self, tokens, limit, valid, ids=None):
        self.calls += 1
        return super().forward(tokens * self.calls, limit, valid, ids)


class Twins(Mlp):
    """Copies of one expert."""

    def reset_parameters(self):
        super().reset_parameters()
        with torch.no_grad():
            self.w1[:] = self.w1[:1].clone()
            self.w2[:] = self.w2[:1].clone()


class HalfTwins(Twins):
    """Two of them equal, the rest apart."""

    def reset_parameters(self):
        Mlp.reset_parameters(self)
        with torch.no_grad():
            self.w1[2], self.w2[2] = self.w1[0], self.w2[0]


class Dead(Mlp):
    """Expert 1 is computed, and its output cut off."""

    def forward(self, rows):
        y = super().forward(rows)
        start, end = sum(rows.sizes[:1]), sum(rows.sizes[:2])
        return torch.cat([y[:start], y[start:end].detach(), y[end:]])


class OneEach(Experts):
    """A module for each expert; all are copies of one, and what the last ones say is cut off."""

    def __init__(self, d_model, d_ff, num_experts):
        super().__init__(d_model, d_ff, num_experts)
        one = nn.Sequential(nn.Linear(d_model, d_ff), nn.GELU(), nn.Linear(d_ff, d_model))
        self.each = nn.ModuleList(copy.deepcopy(one) for _ in range(num_experts))

    def forward(self, rows):
        *parts, rest = rows.x.split([*rows.load.tolist(), len(rows.x) - int(rows.load.sum())])
        first, *others = (expert(x) for expert, x in zip(self.each, parts, strict=True))
        return torch.cat([first, *(y.detach() for y in others), torch.zeros_like(rest)])


class Sure(Switch):
    """Starts saturated."""

    def reset_parameters(self):
        super().reset_parameters()
        with torch.no_grad():
            self.weight.mul_(1000)


class Summing(Loss):
    """Adds up what it was called with."""

    def __init__(self, weight: float = 0.01):
        super().__init__(weight)
        self.total = 0.0

    def __call__(self, routings):
        self.total = self.total + balance(*routings)
        return self.total


class CountsPadding(Loss):
    """A mean over all tokens."""

    def __init__(self, weight: float = 0.01):
        super().__init__(weight)

    def __call__(self, routings):
        return torch.stack([r.logits.square().mean() for r in routings]).sum()


class CountsPaddingsExperts(CountsPadding):
    """The balance loss of Hugging Face's: what padding would choose is counted."""

    def __call__(self, routings):
        shares = [nn.functional.one_hot(r.expert, 4).double().mean((0, 1)) for r in routings]
        return sum(share @ mean_probs(r) for share, r in zip(shares, routings, strict=True))


class Shy(Switch):
    """Says that it leaks, and does not."""

    leaks = "shy thinks it leaks"


class Everyone(Mlp):
    """Every row sees the mean of all rows: of other sequences, and of later tokens."""

    def forward(self, rows):
        return super().forward(replace(rows, x=rows.x + rows.x.mean(0, keepdim=True)))


# -- the checks ---------------------------------------------------------------------------------------------------


def test_a_clean_model_has_no_fault_and_every_check_once():
    found = audit(module())
    assert [finding.check for finding in found] == CHECKS
    assert not faults({finding.check: finding for finding in found})
    assert not sees_future(found)
    assert all(finding.evidence for finding in found)
    assert all(finding.fix for finding in found if finding.status != "ok")


def test_nothing_is_left_behind():
    model = module(partial(Switch, jitter=0.2), experts=partial(Mlp, dropout=0.2)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    first = audit(model)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert audit(model) == first


def test_noise_of_training_and_expert_dropout_are_no_leak():
    """Expert dropout follows the order of the rows, which an edit of the future changes: that is noise, not a leak."""
    noisy = partial(Switch, jitter=0.3)
    net = partial(NET, dropout=0.1)
    assert not faults(findings(noisy, experts=partial(Mlp, dropout=0.5), net=net))


@pytest.mark.parametrize(
    ("given", "fix"),
    [
        ({"router": lookup("expert_choice"), "capacity": Dropless}, "--model.moe.router"),
        ({"capacity": partial(Factor, train=1.0, order="probability")}, "--model.moe.capacity.order=arrival"),
        ({"capacity": partial(Factor, train=1.0, order="random")}, "--model.moe.capacity.order=arrival"),
        (
            {"router": TopK, "capacity": partial(Factor, train=1.0, order="first_choices")},
            "--model.moe.capacity.order=arrival",
        ),
        ({"capacity": partial(lookup("no_token_left_behind"), train=1.0)}, "--model.moe.capacity=factor"),
    ],
    ids=["expert_choice", "probability", "random", "first_choices", "no_token_left_behind"],
)
def test_a_declared_leak_is_seen_in_every_layer_and_named(given, fix):
    model = module(**given)
    found = audit(model)
    assert sees_future(found)
    assert found[0].status == "fault"
    assert fix in found[0].fix
    assert "first in blocks.0.mlp" in found[0].evidence
    assert found[1].status == "ok"
    assert "blocks.0.mlp, blocks.1.mlp: " in found[1].evidence


def test_first_choices_of_one_choice_do_not_leak():
    found = findings(capacity=partial(Factor, train=1.0, order="first_choices"))
    assert (status(found, "future tokens"), status(found, "declared leaks")) == ("ok", "ok")


@pytest.mark.parametrize("part", [{"router": Later}, {"experts": Everyone}], ids=["router", "experts"])
def test_a_leak_that_no_part_declares(part):
    found = findings(**part)
    assert faults(found)[:2] == ["future tokens", "declared leaks"]
    assert "blocks.0.mlp, blocks.1.mlp" in found["declared leaks"].evidence


def test_a_declared_leak_that_cannot_be_seen():
    found = findings(Shy, capacity=Dropless)
    assert (status(found, "future tokens"), status(found, "declared leaks")) == ("ok", "note")
    assert "shy thinks it leaks" in found["declared leaks"].evidence
    assert "nothing was dropped" in found["declared leaks"].evidence
    wide = findings(capacity=partial(Factor, train=4.0, order="probability"))
    assert status(wide, "declared leaks") == "note"
    assert not faults(wide)


class SomeLayers(Factor):
    """Holds nothing back in the second layer that is built, and says what the first says."""

    built = 0

    def __init__(self):
        super().__init__(train=1.0 if SomeLayers.built % 2 == 0 else 8.0, order="probability")
        SomeLayers.built += 1


def test_a_leak_seen_in_some_layers_of_those_that_declare_it_is_no_false_declaration():
    found = findings(capacity=SomeLayers)
    assert (status(found, "future tokens"), status(found, "declared leaks")) == ("fault", "note")
    assert "not seen to: blocks.1.mlp" in found["declared leaks"].evidence


FIRST = {"router": TopK, "capacity": partial(Factor, train=1.0, eval=1.0, order="first_choices")}


def test_a_group_of_many_sequences_is_filled_and_its_leak_is_seen():
    model = module(**FIRST, group=256)
    found = {finding.check: finding for finding in audit(model)}
    assert sees_future(found.values())
    assert "in a batch of 8" in found["rest of the batch"].evidence
    assert status(found, "rest of the batch") == "fault"
    few = {finding.check: finding for finding in audit(model, sequences=2)}
    assert [status(few, check) for check in CHECKS[:3]] == ["note"] * 3
    assert few["future tokens"].evidence.endswith(
        "not measured: 64 tokens do not fill a group of 256 in blocks.0.mlp, blocks.1.mlp"
    )
    assert few["future tokens"].fix == "--model.moe.group=64 or less, or sequence"


def test_a_group_that_nothing_is_decided_by_need_not_be_filled():
    found = findings(capacity=Dropless, group=1 << 13)
    assert {finding.status for finding in found.values()} == {"ok"}


@pytest.mark.parametrize(
    ("layer", "batch_size", "expected"),
    [
        ({"capacity": partial(Factor, train=1.0), "group": "sequence"}, 16, 3),
        ({"capacity": Dropless, "group": "batch"}, 0, 3),
        ({"capacity": Dropless, "group": "batch"}, 16, 16),
        # 2048 tokens are 64 sequences of 32.
        ({"capacity": partial(Factor, train=1.0), "group": "batch"}, 1000, 64),
        ({"capacity": partial(Factor, train=1.0), "group": 1000}, 4, 32),
        ({"capacity": partial(Factor, train=1.0), "group": 1000}, 40, 40),
        ({"capacity": partial(Factor, train=1.0), "group": 4096}, 4, 128),
        ({"capacity": partial(Factor, train=1.0), "group": 4097}, 4, 4),
        ({"capacity": Dropless, "group": 1000}, 4, 4),
        ({"router": lookup("expert_choice"), "capacity": Dropless, "group": 1000}, 4, 32),
    ],
)
def test_how_many_sequences_are_read(layer, batch_size, expected):
    assert sequences_for(module(**layer), 32, batch_size) == expected


def test_capacity_over_the_batch_depends_on_the_batch_in_training_only():
    found = findings(capacity=partial(Factor, train=1.0), group="batch")
    assert faults(found) == ["rest of the batch"]
    assert found["rest of the batch"].fix == "--model.moe.group=sequence"
    assert "evaluation, alone: unchanged" in found["rest of the batch"].evidence
    assert status(findings(capacity=Dropless, group="batch"), "rest of the batch") == "ok"
    both = findings(capacity=partial(Factor, train=1.0, eval=1.0), group=40)
    assert "evaluation, others replaced: changed" in both["rest of the batch"].evidence


def test_chance_in_evaluation():
    found = findings(Noisy)
    assert status(found, "chance in evaluation") == "fault"
    assert "blocks.0.mlp, blocks.1.mlp" in found["chance in evaluation"].evidence
    assert status(findings(partial(Switch, jitter=0.3, sample=True)), "chance in evaluation") == "ok"
    found = findings(Wasteful)
    assert faults(found) == ["chance in evaluation"]
    assert "unchanged; torch's generator moved, in blocks.0.mlp" in found["chance in evaluation"].evidence


def test_padding_that_is_routed():
    found = findings(AllValid)
    assert status(found, "padding") == "fault"
    assert "assignments are padding's" in found["padding"].evidence
    claimed = findings(Claims)["padding"]
    assert (claimed.status, "0 of " in claimed.evidence) == ("fault", True)


def test_padding_that_a_router_reads():
    found = findings(Later, capacity=Dropless)
    assert "places of padding change the logits" in found["padding"].evidence
    # Nothing limits it, so that this is no matter of a capacity.
    assert status(found, "padding") == "fault"
    assert "capacity" not in found["padding"].evidence


def test_padding_that_a_loss_counts():
    found = findings(losses=[CountsPadding, CountsPaddingsExperts])
    assert status(found, "padding") == "fault"
    told = found["padding"].evidence.split("; ")
    assert [line.partition(":")[0] for line in told] == [
        "CountsPadding counts padding",
        "CountsPaddingsExperts counts padding",
    ]


class Tight(Factor):
    """Has no option."""

    def __init__(self):
        super().__init__(train=1.0, eval=0.5)


@pytest.mark.parametrize(
    ("capacity", "fix"),
    [
        (partial(Factor, train=1.0, eval=0.5), "--model.moe.capacity.eval=null"),
        (Tight, "--model.moe.capacity=dropless"),
    ],
    ids=["factor", "without_options"],
)
def test_a_capacity_of_the_padded_length_is_a_note(capacity, fix):
    found = findings(capacity=capacity)
    assert status(found, "padding") == "note"
    assert found["padding"].fix == f"{fix} makes evaluation dropless"
    assert found["cached generation"].fix == fix


class Recent(Switch):
    """Routes a token by the one before it in what it is given, and does not say that it needs it."""

    def forward(self, tokens, limit, valid, ids=None):
        return super().forward(torch.cat([tokens[:, :1], tokens[:, :-1]], 1), limit, valid, ids)


class Forgetful(Decoder):
    """Throws its cache away."""

    def forward(self, tokens, valid=None, cache=None):
        out = super().forward(tokens, valid, None if cache is None else Cache())
        return replace(out, cache=cache)


def test_a_cache_changes_nothing_where_none_says_so():
    for net in (
        NET,
        partial(NET, positions="learned"),
        partial(NET, sparse_attention="every(2)"),
        partial(NET, sparse=[]),
    ):
        found = findings(TopK, net=net)["cached generation"]
        assert (found.status, found.fix) == ("ok", "")
        assert "16 of them one by one, then the rest: unchanged; the other way round: unchanged" in found.evidence


def test_a_cache_that_changes_what_is_computed_is_a_fault():
    found = findings(Recent)
    assert faults(found) == ["cached generation"]
    assert "; in blocks.0.mlp, blocks.1.mlp" in found["cached generation"].evidence
    found = findings(net=partial(Forgetful, **NET.keywords))
    assert faults(found) == ["cached generation"]
    assert found["cached generation"].evidence.endswith("; in no sparse layer")


@pytest.mark.parametrize(
    ("given", "reason", "fix"),
    [
        (
            {"capacity": partial(Factor, train=1.0, eval=0.5)},
            "Factor limits the capacity",
            "--model.moe.capacity.eval=null",
        ),
        ({"router": lookup("random")}, "Random decides by the place of a token", "--model.moe.router=top_k"),
        (
            {"router": lookup("expert_choice"), "capacity": Dropless},
            "ExpertChoice decides on several",
            "--model.moe.router",
        ),
    ],
)
def test_a_model_that_keeps_no_cache_says_why_and_the_layers_bear_it_out(given, reason, fix):
    found = findings(**given)["cached generation"]
    assert found.status == "note"
    assert f"uses no cache: {reason}" in found.evidence
    assert "changed by blocks.0.mlp " in found.evidence
    assert ", blocks.1.mlp " in found.evidence
    assert found.fix.startswith(fix)


def test_a_capacity_too_large_to_matter_is_told_as_unseen():
    found = findings(capacity=partial(Factor, train=1.0, eval=4.0))["cached generation"]
    assert found.status == "note"
    assert found.evidence.endswith("unchanged on these tokens")


def test_a_router_without_gradient_from_the_task():
    found = findings(Detached)
    assert faults(found) == ["router gradient, task"]
    assert "blocks.0.mlp 0" in found["router gradient, task"].evidence


def test_a_router_without_any_gradient():
    found = findings(Cut)
    assert faults(found) == ["router gradient, task", "router gradient, balance"]


@pytest.mark.slow
def test_a_loss_that_can_do_nothing_is_a_note():
    assert status(findings(lookup("random")), "router gradient, balance") == "note"
    even = findings(lookup("expert_choice"), capacity=Dropless)
    assert "exactly even" in even["router gradient, balance"].evidence
    off = findings(losses=[partial(Balance, weight=0.0)])
    assert "its weight is 0" in off["router gradient, balance"].fix


def test_the_gradient_norms_are_those_of_a_training_step():
    """By hand: one layer, the gradient of 0.5 times the balance loss of the records."""
    model = module(losses=[partial(Balance, weight=0.5)], net=partial(NET, sparse="last(1)"))
    torch.manual_seed(3)
    tokens = torch.randint(24, (3, 32), generator=torch.Generator().manual_seed(0))
    out = model.train().net(tokens)
    (0.5 * balance(*out.routings)).backward()
    norm = model.net.blocks[1].mlp.router.weight.grad.norm()
    evidence = {f.check: f for f in audit(model)}["router gradient, balance"].evidence
    assert evidence.endswith(f"blocks.1.mlp {float(norm):.2g}")


@pytest.mark.slow
def test_experts_without_gradient_are_told_apart():
    cut = findings(TopK, experts=Dead, capacity=Dropless)["expert gradients"]
    assert cut.status == "fault"
    assert "cut although tokens came: blocks.0.mlp 1, blocks.1.mlp 1" in cut.evidence
    many = findings(net=partial(NET, num_experts=48))["expert gradients"]
    assert many.status == "note"
    assert "no token came to" in many.evidence
    mixed = findings(TopK, experts=lookup("mixed"), capacity=Dropless)["expert gradients"]
    assert mixed.evidence.startswith("8 of 8 experts")
    shared = findings(TopK, experts=lookup("shared"), capacity=Dropless)["expert gradients"]
    assert shared.evidence.startswith("8 of 8 experts")


def test_a_loss_that_remembers_is_counted_more_than_once():
    found = findings(losses=[Summing])
    assert status(found, "gradient accumulation") == "fault"


def test_a_forward_that_counts_breaks_checkpointing():
    found = findings(Counter)
    assert status(found, "activation checkpointing") == "fault"


def test_routing_below_float32():
    found = findings(Half)
    assert faults(found) == ["float32 routing"]
    assert "on bfloat16 inputs: logits bfloat16, probs bfloat16, weight bfloat16" in found["float32 routing"].evidence


def test_a_router_that_closes_experts_is_measured_on_the_others():
    assert not faults(findings(Closing, losses=[]))
    found = findings(Rounded, losses=[])
    assert faults(found) == ["float32 routing"]
    assert "on bfloat16 inputs: float32 in the record, off by up to 0.0" in found["float32 routing"].evidence


@pytest.mark.parametrize("part", [{"router": Single}, {"experts": Float32Experts}], ids=["router", "experts"])
def test_parts_that_know_float32_only_are_measured_in_it(part):
    assert not faults(findings(**part))


@pytest.mark.parametrize("experts", [Twins, HalfTwins])
def test_equal_experts(experts):
    found = findings(experts=experts)
    assert faults(found) == ["equal experts"]
    assert "initial weights: blocks.0.mlp 0" in found["equal experts"].evidence


def test_experts_of_one_module_each_are_measured():
    found = findings(TopK, experts=OneEach, capacity=Dropless, net=partial(NET, sparse="last(1)"))
    # Experts that are equal teach the router nothing.
    assert faults(found) == ["router gradient, task", "expert gradients", "equal experts"]
    gets = found["expert gradients"].evidence
    assert gets.startswith("1 of 4 experts get a gradient from cross-entropy; cut although tokens came: blocks.1.mlp 1")
    assert "initial weights: blocks.1.mlp 0" in found["equal experts"].evidence


def test_a_saturated_router_is_a_fault_at_the_start_and_a_note_later():
    assert "router saturation" in faults(findings(Sure))
    later = {f.check: f for f in audit(module(Sure), trained=True)}
    assert later["router saturation"].status == "note"
    assert "trained weights" in later["router saturation"].evidence
    assert "trained weights" in later["equal experts"].evidence


@pytest.mark.daily("options1-2-0.01-ok", "options4-2-0.01-fault", "options6-1-0.05-note")
@pytest.mark.parametrize(
    ("options", "value", "each", "expected"),
    [
        ({}, 1, 0.005, "ok"),
        ({"layers": "sum"}, 2, 0.01, "ok"),
        ({"layers": "sum", "weight": 0.1}, 2, 0.1, "note"),
        ({"layers": "sum", "weight": 0.005}, 2, 0.005, "ok"),
        ({"scale": "k"}, 2, 0.01, "fault"),
        ({"scale": "k", "layers": "sum"}, 4, 0.02, "fault"),
        ({"weight": 0.1}, 1, 0.05, "note"),
        ({"per": "sequence", "choices": "first"}, 1, 0.005, "ok"),
        ({"stacks": [1, 1]}, 2, 0.01, "ok"),
        ({"stacks": [1, 1], "scale": "k"}, 4, 0.02, "fault"),
    ],
)
def test_the_scale_of_the_balance_loss(options, value, each, expected):
    """Two layers, two choices: a mean over layers gives each half the weight, a sum over layers or stacks the paper's.

    k doubles either.
    """
    found = findings(TopK, losses=[partial(Balance, **options)])["scale of balance"]
    assert found.status == expected
    assert found.evidence.startswith(f"{value} at uniform routing")
    assert found.fix.startswith("scale: one, or weight: 0.005" if expected == "fault" else "")
    if options.get("choices") != "first":
        assert f", {each:g} for each of 2 layers" in found.evidence
    assert "arXiv 2101.03961" in found.evidence


def test_other_losses_tell_their_value_and_another_weight():
    found = findings(losses=[RouterZ, partial(RouterZ, weight=0.1)])
    assert found["scale of router_z (1)"].evidence.startswith("1.922 at uniform routing")  # log(4) ** 2
    assert [found[f"scale of router_z ({i})"].status for i in (1, 2)] == ["ok", "note"]


class Counting(Loss):
    """The balance loss, by the counts that it must be handed."""

    scope = "global"

    def __init__(self, weight=0.01):
        super().__init__(weight)

    def __call__(self, routings, counts):
        return Balance(scope="global")(routings, counts)


def test_a_loss_that_reads_the_counts_of_the_step_gets_those_of_its_batch():
    found = findings(losses=[Counting, partial(Balance, weight=0.02)])
    names = ("router gradient, Counting", "router gradient, balance")
    assert [found[name].status for name in names] == ["ok", "ok"]
    first, second = (found[name].evidence.partition(": ")[2].split(", ")[0] for name in names)
    assert math.isclose(2 * float(first.split()[-1]), float(second.split()[-1]), rel_tol=0.05)
    assert found["scale of Counting"].evidence.startswith("1 at uniform routing")


def test_a_loss_of_noise_fits_its_router():
    losses = [lookup("importance"), lookup("load"), lookup("orthogonality")]
    assert not [c for c in faults(findings(lookup("noisy_top_k"), losses=losses)) if "gradient" in c or "scale" in c]
    with pytest.raises(ValueError, match="noisy_top_k"):
        findings(losses=losses)


def test_a_dense_model_and_one_without_losses():
    dense = audit(module(net=partial(NET, sparse=[])))
    assert [f.check for f in dense] == CHECKS[:6]
    assert {f.status for f in dense} == {"ok"}
    bare = audit(module(losses=[]))
    assert not any("balance" in f.check for f in bare)


class ByName(nn.Module):
    """A model that calls its sparse layer with names, in any order."""

    context = 8

    def __init__(self, vocab_size, *, moe):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, 8)
        self.moe = moe(d_model=8, num_experts=4, d_ff=8)
        self.head = nn.Linear(8, vocab_size)

    @property
    def uncacheable(self):
        return self.moe.uncacheable

    def forward(self, tokens, valid=None, cache=None):
        x = self.embed(tokens)
        y, routing = self.moe(ids=tokens, valid=valid, x=x)
        return Output(self.head(x + y), (routing,), cache)


def test_a_layer_that_is_called_by_names():
    ids = partial(lookup("hash"), k=1)
    leaking = {"capacity": partial(Factor, train=1.0, eval=0.5, order="random")}
    models = [partial(MoELayer, router=ids, **more) for more in ({}, leaking)]
    found = [{f.check: f for f in audit(LanguageModule(ByName, vocab_size=24, moe=moe, losses=[]))} for moe in models]
    assert not faults(found[0])
    assert "first in moe" in found[1]["future tokens"].evidence
    assert (
        "; outputs of sparse layers for pieces of the sequence: changed by moe"
        in found[1]["cached generation"].evidence
    )


class Peeking(nn.Module):
    """A model that mixes over time outside any sparse layer."""

    context = 8

    def __init__(self, vocab_size, moe=None):
        super().__init__()
        self.net = Decoder(vocab_size, d_model=8, num_layers=1, num_heads=1, d_ff=8, context=8, sparse=[])

    def forward(self, tokens, valid=None):
        out = self.net(tokens, valid)
        return replace(out, logits=out.logits + out.logits.mean(1, keepdim=True))


def test_a_leak_outside_the_sparse_layers():
    found = audit(LanguageModule(Peeking, vocab_size=24, losses=[]))
    assert sees_future(found)
    assert "in no sparse layer" in found[0].evidence
    assert "outside the sparse layers" in found[1].evidence


def test_attention_that_sees_later_tokens():
    net = partial(NET, attention=partial(Attention, causal=False), allow_leak=True)
    found = findings(net=net)
    assert found["future tokens"].status == "fault"
    cached = found["cached generation"]
    assert (cached.status, cached.fix) == ("note", "")
    assert "uses no cache: attention with causal false" in cached.evidence


@pytest.mark.parametrize(("given", "said"), [({"sequences": 1}, "at least 2"), ({"context": 1}, "context >= 2")])
def test_too_little_to_compare(given, said):
    with pytest.raises(ValueError, match=said):
        audit(module(), **given)


@pytest.mark.daily("3")
@pytest.mark.parametrize("context", [2, 3, 7])
def test_short_sequences(context):
    assert not sees_future(audit(module(), context=context))
    leaking = module(lookup("expert_choice"), capacity=Dropless)
    assert sees_future(audit(leaking, context=7))


def test_uniform_routing():
    like = module(TopK).net(torch.zeros(1, 8, dtype=torch.long)).routings[0]
    for k in (1, 2, 3):
        even, collapsed = (uniform_routing(like, k, collapsed=how) for how in (False, True))
        assert balance(even).item() == pytest.approx(1)
        assert balance(collapsed).item() == pytest.approx(4 / k)
        assert load_variation(even).item() == pytest.approx(0)


@pytest.mark.slow
def test_every_router_can_be_audited():
    from switchkit.registry import named

    for name, router in named(Router).items():
        found = findings(router, capacity=Dropless, losses=[])
        told = {check: f for check, f in found.items() if f.status == "fault"}
        # The cosine router's temperature is small for so few dimensions.
        assert set(told) <= {"future tokens"} | ({"router saturation"} if name == "cosine" else set()), (name, told)

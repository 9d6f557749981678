"""What holds for every loss on routing records; each one's own definition is in losses/."""

from __future__ import annotations

import math
from dataclasses import replace

import oracle
import pytest
import torch
from properties import Case, collapsed, run
from torch import Tensor

from switchkit import (
    L1,
    Balance,
    CommunicationBalance,
    DeviceBalance,
    Entropy,
    Importance,
    Load,
    Loss,
    MutualInformation,
    Orthogonality,
    RouterZ,
    Routing,
    SequenceBalance,
    named,
)
from switchkit.capacity.base import place_by_arrival
from switchkit.losses.base import built, over_layers

LOSSES = list(named(Loss).values())
PLACES = ("logits", "probs", "weight")
EXTRAS = ("noisy", "std", "rows")


def rich(record: Routing, seed: int = 0) -> Routing:
    """The record with everything that some loss needs: the noise of noisy_top_k, the rows of a linear router."""
    numbers = torch.Generator().manual_seed(seed)
    noise = torch.randn(record.logits.shape, generator=numbers, dtype=record.logits.dtype)
    rows = torch.randn(record.logits.shape[-1], 6, generator=numbers, dtype=record.logits.dtype)
    std = torch.full_like(record.logits, 0.5)
    return replace(record, extras={"noisy": record.logits + std * noise, "std": std, "rows": rows})


def records(number: int = 3) -> list[Routing]:
    """Three layers on three sequences, two of them with padding."""
    made = (run(Case(k=2, seed=seed).layer(), *Case(seed=seed).inputs())[1] for seed in range(number))
    return [rich(record, seed) for seed, record in enumerate(made)]


def experts_choose() -> Routing:
    """A record where each of 3 experts takes 2 of the 4 tokens of a group: an irregular list, one token is padding."""
    logits = torch.randn(2, 4, 3, dtype=torch.float64)
    valid = torch.tensor([[True] * 4, [True, True, True, False]])
    probs = logits.softmax(-1)
    token = probs.masked_fill(~valid.unsqueeze(-1), -1).topk(2, dim=1).indices.transpose(1, 2).flatten(1)
    expert = torch.arange(3).repeat_interleave(2).expand(2, 6)
    return place_by_arrival(
        Routing(
            logits=logits,
            probs=probs,
            token=token,
            expert=expert,
            weight=probs.transpose(1, 2).flatten(1).gather(1, expert * 4 + token),
            chosen=torch.ones(2, 6, dtype=torch.bool),
            valid=valid,
            batch=2,
        ),
        None,
    )


def with_values(record: Routing, values: dict[str, Tensor]) -> Routing:
    """The record with other numbers in it."""
    extras = {**record.extras, **{name: values[name] for name in EXTRAS if name in values}}
    return replace(record, extras=extras, **{name: values[name] for name in PLACES if name in values})


@pytest.mark.parametrize("cls", LOSSES, ids=lambda cls: cls.__name__)
class TestEveryLoss:
    def test_layers_are_averaged_or_added_one_by_one(self, cls: type[Loss]) -> None:
        layers = records()
        alone = torch.stack([cls()([r]) for r in layers])
        assert oracle.error(cls()(layers), alone.mean()) < 1e-12
        assert oracle.error(cls(layers="sum")(layers), alone.sum()) < 1e-12

    def test_a_model_without_sparse_layers_has_no_loss(self, cls: type[Loss]) -> None:
        assert cls()([]) == 0
        assert cls()(()) == 0

    def test_the_weight_is_applied_outside(self, cls: type[Loss]) -> None:
        layers = records()
        assert torch.equal(cls(weight=0.5)(layers), cls(weight=7)(layers))
        assert cls(weight=0).weight == 0

    def test_it_is_a_mean_over_tokens(self, cls: type[Loss]) -> None:
        """The same tokens twice give the same loss: weights do not depend on the size of a batch."""
        once = records(1)[0]
        double = {"slot": None, "kept": None, "load": None, "batch": 2 * once.batch}
        for name in ("logits", "probs", "token", "expert", "weight", "chosen", "valid"):
            double[name] = torch.cat([getattr(once, name)] * 2)
        extras = {name: torch.cat([once.extras[name]] * 2) for name in ("noisy", "std")}
        twice = place_by_arrival(replace(once, **double, extras={**once.extras, **extras}), None)
        assert oracle.error(cls()([twice]), cls()([once])) < 1e-12

    def test_padding_does_not_count(self, cls: type[Loss]) -> None:
        """Nothing in it is read, in values or gradients: neither 1000 nor NaN in place of it changes them."""
        (record,) = records(1)
        found = []
        for filler in (0.0, 1000.0, float("nan")):
            values = {"logits": record.logits, "probs": record.probs, "weight": record.weight, **record.extras}
            for name, value in values.items():
                if name != "rows":
                    padding = ~record.valid.gather(1, record.token) if name == "weight" else ~record.valid.unsqueeze(-1)
                    values[name] = value.masked_fill(padding, filler)
                values[name] = values[name].detach().requires_grad_()
            loss = cls()([with_values(record, values)])
            wanted = list(values.values())
            found.append([loss, *torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)])
        for nothing, *others in zip(*found, strict=True):
            assert all(torch.equal(nothing, something) for something in others)

    @pytest.mark.parametrize("shape", [(0, 7), (2, 0), (2, 5)], ids=str)
    @pytest.mark.parametrize("group", ["sequence", "batch", 3])
    def test_without_a_real_token_it_is_zero(self, cls: type[Loss], shape: tuple[int, int], group: str | int) -> None:
        layer = Case(k=2, group=group).layer()
        x = torch.randn(*shape, 6, dtype=torch.float64)
        record = rich(run(layer, x, torch.zeros(shape, dtype=torch.bool))[1])
        values = {name: getattr(record, name).detach().requires_grad_() for name in PLACES}
        values |= {name: record.extras[name].clone().requires_grad_() for name in EXTRAS}
        loss = cls()([with_values(record, values)])
        assert loss == 0
        for grad in torch.autograd.grad(loss, list(values.values()), allow_unused=True, materialize_grads=True):
            assert (grad == 0).all()

    def test_finite_differences_agree(self, cls: type[Loss]) -> None:
        """Gradients in float64, of a normalised score and of all else that the record holds, loads held fixed."""
        (record,) = records(1)
        names = (*PLACES, *EXTRAS)

        def function(*inputs: Tensor) -> Tensor:
            return cls()([with_values(record, dict(zip(names, inputs, strict=True)))])

        # Further from zero than the step of the differences.
        record = replace(record, probs=0.9 * record.probs + 0.1 / record.probs.shape[-1])
        inputs = [getattr(record, name) for name in PLACES] + [record.extras[name] for name in EXTRAS]
        assert torch.autograd.gradcheck(function, [x.detach().clone().requires_grad_() for x in inputs], fast_mode=True)

    def test_saturated_routers_keep_a_finite_gradient(self, cls: type[Loss]) -> None:
        """Probabilities of exactly 0 and 1, in float32."""
        record = rich(collapsed(0, k=2, dtype=torch.float32))
        logits = record.logits.clone().requires_grad_()
        rows = torch.zeros(4, 6, requires_grad=True)
        extras = {"noisy": logits + 0, "std": torch.zeros_like(logits), "rows": rows}
        probs = logits.softmax(-1)
        weight = probs.gather(-1, record.expert.view(1, 6, 2)).flatten(1)
        loss = cls()([replace(record, logits=logits, probs=probs, weight=weight, extras=extras)])
        found = torch.autograd.grad(loss, (logits, rows), allow_unused=True, materialize_grads=True)
        assert loss.isfinite()
        assert all(grad.isfinite().all() for grad in found)

    def test_one_expert_is_fine(self, cls: type[Loss]) -> None:
        record = rich(collapsed(0, num_experts=1))
        assert cls()([record]).isfinite()

    def test_experts_may_choose(self, cls: type[Loss]) -> None:
        if cls is not Load:
            assert cls()([rich(experts_choose())]).isfinite()

    @pytest.mark.daily("Balance", "Load", "RouterZ")
    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own compiler does
    def test_it_compiles_without_a_break(self, cls: type[Loss], unchecked: None) -> None:
        """As one graph: no branch on values, no wait for the device."""
        (record,) = records(1)
        # Dynamo asks inputs for a gradient, which those of an earlier graph answer by a warning.
        extras = {name: value.detach() for name, value in record.extras.items()}
        record = with_values(record, {**{name: getattr(record, name).detach() for name in PLACES}, **extras})
        loss = cls()
        graph = torch.compile(lambda r: loss([r]), fullgraph=True, backend="eager")
        assert oracle.error(graph(record), loss([record])) < 1e-12


WEIGHTS = {
    Balance: 0.01,
    SequenceBalance: 0.0001,
    DeviceBalance: 0.05,
    CommunicationBalance: 0.02,
    Importance: 0.1,
    Load: 0.1,
    Entropy: 0.01,
    MutualInformation: 0.01,
    Orthogonality: 0.01,
    L1: 1e-8,
    RouterZ: 0.001,
}


def test_default_weights_are_those_of_the_papers() -> None:
    assert {cls: cls().weight for cls in LOSSES if cls in WEIGHTS} == WEIGHTS


def even(k: int) -> Routing:
    """8 tokens with uniform probabilities that take the 4 experts in turn."""
    base = collapsed(0, k=k, tokens=8)
    expert = (torch.arange(8 * k) % 4).unsqueeze(0)
    flat = torch.zeros_like(base.logits)
    return place_by_arrival(
        replace(base, logits=flat, probs=flat.softmax(-1), expert=expert, slot=None, kept=None), None
    )


def spread() -> Routing:
    """8 certain tokens, 2 for each expert."""
    base = even(1)
    logits = torch.full_like(base.logits, -1e4).scatter(-1, base.expert.unsqueeze(-1), 0)
    return replace(base, logits=logits, probs=logits.softmax(-1))


def noisy(record: Routing) -> Routing:
    """With little noise, that happened to be none."""
    return replace(record, extras={"noisy": record.logits, "std": torch.full_like(record.logits, 0.1)})


LOG4 = math.log(4)
EXTREMES = {
    # name: (loss, record, closed form), with E = 4 experts
    "balance even": (Balance(), even(2), 1),
    "balance collapsed": (Balance(), collapsed(0, k=2), 4 / 2),
    "sequence_balance even": (SequenceBalance(), even(2), 1),
    "sequence_balance collapsed": (SequenceBalance(), collapsed(0), 4),
    "device_balance even": (DeviceBalance(devices=2), even(2), 1),
    # Experts 0 and 1, both on device 0.
    "device_balance collapsed": (DeviceBalance(devices=2), collapsed(0, k=2), 2),
    # Experts 1 and 2, one on each device.
    "device_balance spread": (DeviceBalance(devices=2), collapsed(1, k=2), 1),
    "communication_balance even": (CommunicationBalance(devices=4), even(2), 1),
    "communication_balance spread": (CommunicationBalance(devices=2), collapsed(1, k=2), 1),
    # Two choices, one device: f = (D / (M T) T, 0) = (1, 0).
    "communication_balance collapsed": (CommunicationBalance(devices=2), collapsed(0, k=2), 1),
    "communication_balance limited": (CommunicationBalance(devices=2, limit=1), collapsed(0, k=2), 2),
    "importance even": (Importance(), even(2), 0),
    "importance collapsed": (Importance(), collapsed(0), 3),
    "importance collapsed on two": (Importance(), collapsed(0, k=2), 1),
    "importance of probs": (Importance(of="probs"), collapsed(0, k=2), 1),
    "load even": (Load(), noisy(spread()), 0),
    "load collapsed": (Load(), noisy(collapsed(0)), 3),
    "load of undecided": (Load(), noisy(even(1)), 0),
    "entropy of the mean, even": (Entropy(), spread(), 0),
    "entropy of the mean, collapsed": (Entropy(), collapsed(0), LOG4),
    "entropy of tokens, certain": (Entropy(of="token"), spread(), LOG4),
    "entropy of tokens, undecided": (Entropy(of="token"), even(1), 0),
    "entropy of tokens lowered, certain": (Entropy(of="token", maximize=False), spread(), 0),
    "entropy of tokens lowered, undecided": (Entropy(of="token", maximize=False), even(1), LOG4),
    "mutual_information undecided": (MutualInformation(), even(1), 0),
    "mutual_information collapsed": (MutualInformation(), collapsed(0), 0),
    "mutual_information best": (MutualInformation(), spread(), -LOG4),
    # Weights of 1/k each: T tokens, E / (k T) * counts = 1 when even, E/k for each of k experts when collapsed.
    "l1 even": (L1(), even(2), 1),
    "l1 collapsed": (L1(), collapsed(0, k=2), 2),
    "l1 plain": (L1(refined=False), collapsed(0, k=2), 1),
    "router_z flat": (RouterZ(), even(1), LOG4**2),
}


@pytest.mark.parametrize("name", EXTREMES)
def test_extremes_have_their_closed_form(name: str) -> None:
    loss, record, expected = EXTREMES[name]
    assert loss([record]).item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_large_logits_stay_finite() -> None:
    record = replace(collapsed(0), logits=torch.full((1, 6, 4), 1e4))
    assert RouterZ()([record]).isfinite()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Balance(-0.1), "the weight of a loss must be a finite number >= 0; got -0.1"),
        (lambda: RouterZ(float("nan")), "got nan"),
        (lambda: Balance(layers="pool"), "layers must be 'mean', 'sum' or 'pooled'; got 'pool'"),
        (lambda: RouterZ(layers="max"), "layers must be 'mean' or 'sum'; got 'max'"),
        (lambda: Balance(scale="two"), "scale must be 'one' or 'k'; got 'two'"),
        (lambda: Balance(load="kept"), "load must be 'before' or 'after'; got 'kept'"),
        (lambda: Balance(choices="second"), "choices must be 'all' or 'first'; got 'second'"),
        (lambda: Balance(per="token"), "per must be 'batch', 'sequence' or 'group'; got 'token'"),
        (lambda: Balance(scope="node"), "scope must be 'micro', 'rank' or 'global'; got 'node'"),
        (lambda: Balance(scope="rank", load="after"), "scope='rank' counts all choices of the step before the drop"),
        (lambda: Balance(scope="global", per="sequence"), "leave load, choices and per at their defaults; got"),
        (lambda: Importance(of="logits"), "of must be 'weight' or 'probs'; got 'logits'"),
        (lambda: Load(threshold="all"), "threshold must be 'excluding' or 'kth'; got 'all'"),
        (lambda: Entropy(of="batch"), "of must be 'token' or 'mean'; got 'batch'"),
        (lambda: DeviceBalance(devices=0), "devices must be at least 1, or null; got 0"),
        (lambda: CommunicationBalance(limit=0), "limit must be at least 1, or null; got 0"),
        (lambda: over_layers([torch.zeros(())], "median"), "'mean' or 'sum'; got 'median'"),
        *(
            (lambda cls=cls: cls(layers="pool"), "got 'pool'")
            for cls in (SequenceBalance, DeviceBalance, CommunicationBalance, Importance, Load, Entropy, L1)
        ),
    ],
)
def test_bad_options_are_refused(make, says: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        make()
    assert says in str(caught.value)


def test_a_loss_may_hold_modules_that_have_no_state() -> None:
    class Own(RouterZ):
        def __init__(self) -> None:
            super().__init__()
            self.shares = torch.nn.Softmax(-1)

    assert [type(term) for term in built([Own, Balance])] == [Own, Balance]


@pytest.mark.parametrize("make", [Balance, RouterZ, lambda **o: Balance(layers="pooled", scale="k", **o)])
def test_stacks_have_a_term_each(make) -> None:
    """Two encoder layers, no decoder layer, one of a third stack: a term for each, added; none is 0."""
    made = records()
    alone, apart = make(), make(stacks=[2, 0, 1])
    assert oracle.error(apart(made), alone(made[:2]) + alone(made[2:])) < 1e-12
    assert oracle.error(make(stacks=[3])(made), alone(made)) < 1e-12
    assert abs(apart(made) - alone(made)) > 0.1, "one term for all is another number"
    assert make(stacks=[0, 0])([]) == 0
    assert make(stacks=[])([]) == 0


@pytest.mark.parametrize("make", [Balance, RouterZ])
def test_stacks_that_are_not_the_models_are_refused(make) -> None:
    with pytest.raises(ValueError, match=r"stacks=\[1, 1\] has 2 sparse layers, but the model has 3"):
        make(stacks=[1, 1])(records())
    with pytest.raises(ValueError, match=r"numbers of sparse layers.*got \[-1, 4\]"):
        make(stacks=[-1, 4])

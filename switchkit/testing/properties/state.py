"""State, randomness and precision."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from switchkit.capacity.base import CapacityPolicy
from switchkit.dispatch.base import Dispatcher, placed
from switchkit.experts.base import Experts
from switchkit.layers import MoELayer
from switchkit.losses.balance import Balance
from switchkit.models import Decoder
from switchkit.records import Routing, Rows
from switchkit.testing.cases import EXACT, Case, gradients, learned, results, run, seeded
from switchkit.testing.expect import Broken, breaks, error, expect, same

__all__ = [
    "checkpointing_changes_nothing",
    "compiles",
    "evaluation_is_certain",
    "experts_start_different",
    "exploration_stays_in_the_router",
    "forward_changes_nothing",
    "layers_start_different",
    "routing_is_float32",
]


def _random_states(device: str) -> list[Tensor]:
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if device == "cuda" else [])


DRAWS = 200
"""Some of so many differ, even where a router explores with one token in a thousand."""

# What a router's options do in training only; the rest decides in evaluation too.
_EXPLORATION = {"jitter", "input_dropout", "sample"}


@breaks("validation losses cannot be compared, and generation does not repeat")
def evaluation_is_certain(case: Case) -> None:
    """In evaluation two calls are equal bit for bit, no random number is drawn, and exploration is off."""
    layer = case.layer(training=False)
    x, valid, ids = case.inputs()
    states = _random_states(case.device)
    first, r = layer(x, valid, ids)
    second, s = layer(x, valid, ids)
    after = _random_states(case.device)
    equal = all(torch.equal(a, b) for a, b in zip(states, after, strict=True))
    expect(equal, "evaluation draws random numbers, none expected")
    expect(torch.equal(first, second), "two calls in evaluation give different outputs, equal bits expected")
    expect(torch.equal(r.expert, s.expert), "two calls in evaluation choose different experts")
    exploring = _EXPLORATION | ({"temperature"} if dict(case.options).get("sample") else set())
    plain = replace(
        case,
        options=tuple((name, value) for name, value in case.options if name not in exploring),
        expert_options=tuple((name, value) for name, value in case.expert_options if name != "dropout"),
    ).layer(training=False)
    plain.load_state_dict(layer.state_dict())
    expect(torch.equal(plain(x, valid, ids)[0], first), "exploration changes outputs in evaluation")


@breaks("activation checkpointing, torch.compile and gradient accumulation then give other results than plain steps")
def forward_changes_nothing(case: Case) -> None:
    """Neither the input, nor a parameter or buffer (value, dtype, identity), nor an attribute of any module."""
    for training in (True, False):
        layer = case.layer(training=training)
        x, valid, ids = case.inputs()
        given = (x.clone(), valid.clone(), ids.clone())
        before = copy.deepcopy(_everything(layer))
        identities = {name: id(value) for name, value in [*layer.named_parameters(), *layer.named_buffers()]}
        run(layer, x, valid, ids)
        after = _everything(layer)
        written = not all(torch.equal(a, b) for a, b in zip((x, valid, ids), given, strict=True))
        expect(not written, "forward wrote to its input")
        new = ", ".join(sorted(after.keys() - before.keys()))
        expect(before.keys() == after.keys(), f"forward set {new or 'an attribute'}")
        for name, value in before.items():
            now = after[name]
            if isinstance(value, Tensor):
                expect(value.dtype == now.dtype, f"forward turned {name} from {value.dtype} into {now.dtype}")
                expect(torch.equal(value, now), f"forward wrote to {name}")
            else:
                expect(value == now, f"forward set {name}")
        found = {name: id(value) for name, value in [*layer.named_parameters(), *layer.named_buffers()]}
        expect(found == identities, "forward replaced a parameter or buffer")


def _everything(layer: nn.Module) -> dict[str, Any]:
    """State dict, and every plain attribute of every module and of the parts that are no module."""
    found: dict[str, Any] = dict(layer.state_dict())
    for path, module in layer.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, CapacityPolicy | Dispatcher):
                found.update({f"{path}.{name}.{key}": repr(inner) for key, inner in vars(value).items()})
            elif name not in ("_parameters", "_buffers", "_modules"):
                found[f"{path}.{name}"] = value if isinstance(value, Tensor) else repr(value)
    return found


class Echo(Experts):
    """Every expert returns its tokens as they came."""

    def forward(self, rows: Rows) -> Tensor:
        if rows.x.dim() == 3:
            return rows.x * 1
        mine = torch.arange(len(rows.x), device=rows.x.device) < rows.load.sum()
        return rows.x * mine.unsqueeze(-1)


@breaks("experts train on tokens that are not those of the model, or exploration does nothing")
def exploration_stays_in_the_router(case: Case) -> None:
    """With exploration in training, the router decides on noise, while experts see the tokens as they are."""
    layer = case.layer(training=True)
    layer.experts = Echo(case.d_model, case.d_ff, case.num_experts)
    x, valid, ids = case.inputs()
    given = x.clone()
    y, r = run(layer, x, valid, ids)
    expect(torch.equal(x, given), "the router wrote to its input")
    share = torch.zeros_like(x[..., 0]).scatter_add(1, r.token, r.weight * placed(r)[1])
    expected = share.unsqueeze(-1) * x * valid.unsqueeze(-1)
    same({"output": y}, {"output": expected}, EXACT, "experts do not see the tokens as they are, so differs the")
    expect(
        any(_differs(layer, r, number, case) for number in range(1, DRAWS)),
        f"exploration is on, but {DRAWS} draws agree",
    )


def _differs(layer: MoELayer, r: Routing, number: int, case: Case) -> bool:
    """Whether the router decides otherwise than in a record, with other random numbers."""
    x, valid, ids = case.inputs()
    seeded(number)
    _, s = layer(x, valid, ids)
    pairs = ((r.logits[valid], s.logits[valid]), (r.expert, s.expert), (r.chosen, s.chosen), (r.weight, s.weight))
    return any(not torch.equal(a, b) for a, b in pairs)


@breaks("in bfloat16 the router picks other experts and training becomes unstable (arXiv 2101.03961, Table 2)")
def routing_is_float32(case: Case) -> None:
    """Under autocast the logits are those without it, bit for bit; with 16-bit weights they are float32 too."""
    case = replace(case, dtype=torch.float32, d_model=32, d_ff=16, shape=(3, 24))
    layer = case.layer()
    x, valid, ids = case.inputs()
    expected, r = run(layer, x, valid, ids)
    with torch.autocast(case.device, dtype=torch.bfloat16):
        y, s = run(layer, x, valid, ids)
    for name in ("logits", "probs", "weight"):
        dtype = getattr(s, name).dtype
        expect(dtype == torch.float32, f"under autocast `{name}` is {dtype}, float32 expected")
    for name in ("logits", "probs", "weight", "expert", "kept"):
        expect(torch.equal(getattr(r, name), getattr(s, name)), f"autocast changes the router's `{name}`")
    # bfloat16 rounds to 2^-9; three roundings in a row stay far below this, a different expert does not.
    off = error(y, expected)
    expect(off <= 2e-2, f"autocast changed the output (relative error {off:.2g}, at most 0.02 expected)")
    half = layer.to(torch.bfloat16)
    x = x.to(torch.bfloat16).requires_grad_()
    y, r = run(half, x, valid, ids)
    expect(y.dtype == torch.bfloat16, f"a bfloat16 layer returns {y.dtype}")
    for name in ("logits", "probs", "weight"):
        dtype = getattr(r, name).dtype
        expect(dtype == torch.float32, f"of a bfloat16 layer `{name}` is {dtype}, float32 expected")
    # The same numbers in a float32 router: only the order of a sum is open; products in bfloat16 would be off by 1e-3.
    full = copy.deepcopy(half.router).float()
    _, t = run(_alone(full), x.detach().float() * valid.unsqueeze(-1), valid, ids)
    off = error(r.logits, t.logits)
    expect(
        off <= 1e-6, f"the logits of a bfloat16 router are rounded (relative error {off:.2g}, at most 1e-6 expected)"
    )
    found = gradients(y.float().sum() + Balance()([r]), x=x, **learned(half))
    for name, grad in found.items():
        expect(grad.dtype == torch.bfloat16, f"the gradient of {name} is {grad.dtype}, bfloat16 expected")
        expect(bool(grad.isfinite().all()), f"the gradient of {name} is not finite in bfloat16")


def _alone(router: nn.Module) -> Callable[..., Any]:
    return lambda x, valid, ids: (x, router(x, None, valid, ids))


@breaks("torch.compile cannot be used, or changes what is trained")
def compiles(case: Case, *, around: Callable[[], AbstractContextManager[Any]] = nullcontext, **how: Any) -> None:
    """torch.compile without a graph break gives the same outputs, losses and gradients.

    `around` is entered first: what checks shapes at run time cannot be traced.
    """
    layer = case.layer()
    x, valid, ids = case.inputs()
    with around(), warnings.catch_warnings():
        # torch's own compiler does what torch deprecates.
        warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)
        expected = results(layer, x, valid, ids)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", **how)
        try:
            found = results(layer, x, valid, ids, compiled)
        except torch._dynamo.exc.TorchDynamoException as stopped:
            first = str(stopped).strip().splitlines()[0]
            raise Broken(f"torch.compile(fullgraph=True) stops ({first.rstrip('.')})") from stopped
        finally:
            torch.compiler.reset()
    same(found, expected, EXACT, "torch.compile changed")


@breaks("saving memory by activation checkpointing changes what is trained")
def checkpointing_changes_nothing(case: Case) -> None:
    """Non-reentrant activation checkpointing gives the same results, the gradient of routing losses included."""
    layer = case.layer(training=True)
    x, valid, ids = case.inputs()
    again = partial(checkpoint, layer, use_reentrant=False)
    found = results(layer, x, valid, ids, again)
    same(found, results(layer, x, valid, ids), EXACT, "activation checkpointing changed")


@breaks("experts that start as copies get the same gradient and stay alike")
def experts_start_different(case: Case) -> None:
    """Independent draws for every expert: of stacks [E, ...], and of experts that are one module each.

    What is constant, such as a gain of 1, starts alike on purpose.
    """
    for name, weight in _by_expert(case.layer().experts, case.num_experts):
        drawn = [e for e, own in enumerate(weight) if bool((own != own.flatten()[:1]).any())]
        for e, other in itertools.combinations(drawn, 2):
            off = error(weight[other], weight[e])
            expect(off > 0.5, f"{name} of experts {other} and {e} are alike (relative difference {off:.2g})")


def _by_expert(part: nn.Module, number: int, path: str = "") -> Iterator[tuple[str, Sequence[Tensor]]]:
    """Name and value for each expert of all that `number` experts have one of each."""
    for name, weight in part.named_parameters(recurse=False):
        if weight.dim() and len(weight) == number:
            yield path + name, weight.unbind()
    for name, child in part.named_children():
        if isinstance(child, nn.ModuleList) and len(child) == number:
            own = [dict(expert.named_parameters()) for expert in child]
            for inner, first in own[0].items():
                each = [weights[inner] for weights in own if inner in weights]
                # Experts of different widths cannot be copies.
                if len(each) == number and all(weight.shape == first.shape for weight in each):
                    yield f"{path}{name}[e].{inner}", each
        else:
            inside = child.num_experts if isinstance(child, Experts) else number
            yield from _by_expert(child, inside, f"{path}{name}.")


def layers_start_different() -> None:
    """Independent draws for every layer of a model."""
    model = Decoder(7, d_model=8, num_layers=2, num_heads=2, d_ff=8, num_experts=2, sparse="every(1)")
    first, second = (dict(block.mlp.named_parameters()) for block in model.blocks)  # type: ignore[union-attr]
    for name in first:
        expect(error(first[name], second[name]) > 0.5, f"{name} of two layers is alike")

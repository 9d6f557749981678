"""A copy of the model, what goes through it, and how what comes out is told."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from switchkit.audit.reading import Reading
from switchkit.experts.base import Experts
from switchkit.layers import MoELayer, moe_layers
from switchkit.losses.base import Loss, alone
from switchkit.models import EncoderDecoder, Output
from switchkit.models.base import causal_layers
from switchkit.module import LanguageModule
from switchkit.records import Routing
from switchkit.registry import name_of

__all__ = [
    "MODES",
    "Finding",
    "Probe",
    "Stack",
    "Status",
    "called",
    "changed",
    "counted_group",
    "drawing",
    "generator_state",
    "hooked",
    "learned",
    "make_probe",
    "percent",
    "short_name",
    "sparse_layers",
    "stacks",
    "without_drops",
]

Status = Literal["ok", "note", "fault"]
MODES = {False: "evaluation", True: "training"}


@dataclass(frozen=True)
class Finding:
    """One line of an audit."""

    check: str
    """What was looked at, the same words in every audit."""
    status: Status
    evidence: str
    """What was measured."""
    fix: str = ""
    """What to change, naming the option; empty when there is nothing to."""


@dataclass(frozen=True)
class Probe:
    """A copy of the model, and what goes through it."""

    net: nn.Module
    losses: list[Loss]
    layers: dict[str, MoELayer]
    tokens: Int[Tensor, "B S"]
    vocab: int
    tolerance: float
    seed: int
    still: list[Experts]
    """Experts that draw random numbers. Their draws follow the order of the rows, which any edit changes."""

    @property
    def causal(self) -> dict[str, MoELayer]:
        """The sparse layers that must not see later tokens: all but an encoder's."""
        return causal_layers(_inner(self.net))

    def __call__(
        self, tokens: Tensor, valid: Tensor | None = None, *, training: bool, steady: bool = True, seeded: bool = True
    ) -> Output:
        """Without gradient, with the same random numbers each time; `steady`: expert dropout is off."""
        with torch.no_grad():
            return self.forward(tokens, valid, training=training, steady=steady, seeded=seeded)

    def forward(
        self,
        tokens: Tensor,
        valid: Tensor | None = None,
        *,
        training: bool,
        steady: bool = False,
        seeded: bool = True,
        through: Callable[..., Any] | None = None,
    ) -> Output:
        self.net.train(training)
        for experts in self.still if steady else ():
            experts.eval()
        if seeded:
            torch.manual_seed(self.seed)
        return through(self.net, tokens, valid) if through else self.net(tokens, valid)

    def others(self, tokens: Tensor, seed: int) -> Tensor:
        """Another token at every place, where the vocabulary has one."""
        draw = torch.Generator().manual_seed(self.seed + seed)
        step = torch.randint(1, max(self.vocab, 2), tokens.shape, generator=draw).to(tokens.device)
        return (tokens + step) % self.vocab

    def terms(self, routings: Sequence[Routing]) -> list[Tensor]:
        return [alone(term, routings) for term in self.losses]

    def names(self) -> list[str]:
        """The name of each loss, numbered where one kind comes twice."""
        plain = [short_name(term) for term in self.losses]
        return [f"{name} ({i + 1})" if plain.count(name) > 1 else name for i, name in enumerate(plain)]

    def differ(self, a: Tensor, b: Tensor) -> float:
        """Largest difference as a share of the largest value; 0 where it is rounding."""
        if not a.numel():
            return 0.0
        largest = a.detach().abs().max().clamp(min=torch.finfo(a.dtype).tiny)
        found = float(((a - b).detach().abs().max() / largest).nan_to_num(nan=float("inf")))
        return found if found > self.tolerance else 0.0


def make_probe(module: LanguageModule, sequences: int, size: int, seed: int) -> Probe:
    vocab = module.tokenizer.vocab_size if module.tokenizer is not None else module.spec["init_args"]["vocab_size"]
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab, (sequences, size), generator=draw).to(module.device)
    losses = copy.deepcopy(module.losses)

    def copied(dtype: torch.dtype) -> nn.Module:
        own = copy.deepcopy(module.net).to(dtype)
        return Reading(own, size, seed) if isinstance(own, EncoderDecoder) else own

    net, tolerance = copied(torch.float64), 1e-9
    try:
        with torch.no_grad():
            net(tokens[:1])
    except (RuntimeError, TypeError):
        # A part that names float32 itself.
        net, tolerance = copied(torch.float32), 1e-4
    layers = sparse_layers(net)
    probe = Probe(net, losses, layers, tokens, vocab, tolerance, seed, [])
    experts = {name: layer.experts for name, layer in layers.items()}
    with drawing(experts) as drawn:
        probe(tokens, training=True)
    return replace(probe, still=[experts[name] for name in drawn])


def sparse_layers(net: nn.Module) -> dict[str, MoELayer]:
    """By their names in the model itself."""
    return moe_layers(_inner(net))


def _inner(net: nn.Module) -> nn.Module:
    """The model itself, where it is given a source to read."""
    return net.net if isinstance(net, Reading) else net


def counted_group(layer: MoELayer) -> int:
    """Tokens of a group that are fixed and that something is decided by, its capacity or the choices; else 0."""
    if layer.group in ("sequence", "batch"):
        return 0
    size, k = int(layer.group), layer.router.k
    limited = any(layer.capacity.limit(size, layer.num_experts, k, training=mode) is not None for mode in MODES)
    return size if limited or layer.router.leaks else 0


@contextmanager
def drawing(parts: dict[str, Any]) -> Iterator[list[str]]:
    """Collects the names of the parts whose forward moves torch's generator."""
    before: dict[str, Tensor] = {}
    drawn: list[str] = []

    def start(name: str) -> Callable[..., None]:
        return lambda *_: before.update({name: generator_state(parts[name])})

    def end(name: str) -> Callable[..., None]:
        def check(*_: Any) -> None:
            if name not in drawn and not torch.equal(before[name], generator_state(parts[name])):
                drawn.append(name)

        return check

    with ExitStack() as stack:
        for name, part in parts.items():
            stack.callback(part.register_forward_pre_hook(start(name)).remove)
            stack.callback(part.register_forward_hook(end(name)).remove)
        yield drawn


def generator_state(part: nn.Module) -> Tensor:
    first = next(iter(part.parameters()), torch.empty(0))
    states = [torch.get_rng_state()]
    if first.is_cuda:
        states.append(torch.cuda.get_rng_state(first.device))
    return torch.cat(states)


@contextmanager
def hooked(handles: Iterable[Any]) -> Iterator[None]:
    kept = list(handles)
    try:
        yield
    finally:
        for handle in kept:
            handle.remove()


def called(x: Tensor, valid: Tensor | None = None, ids: Tensor | None = None) -> tuple[Tensor, Any, Any]:
    """What a sparse layer was called with, by position or by name, in order."""
    return x, valid, ids


def learned(part: nn.Module) -> list[nn.Parameter]:
    return [p for p in part.parameters() if p.requires_grad]


@dataclass(frozen=True)
class Stack:
    """The routed weights of the experts of a layer, or of some of them where these come in several widths."""

    first: int
    """Number of the first expert."""
    stacked: list[nn.Parameter]
    """[E, ...] each."""
    modules: list[list[nn.Parameter]]
    """Those of each expert that is a module of its own, in a `ModuleList`; empty lists without one."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [*self.stacked, *(p for own in self.modules for p in own)]

    def by_expert(self, values: Iterable[Tensor]) -> list[Tensor]:
        """One flat tensor for each expert, of values that belong to `parameters`."""
        given = iter(values)
        rows = [[*row] for row in zip(*(next(given) for _ in self.stacked), strict=True)] or [[] for _ in self.modules]
        for row, own in zip(rows, self.modules, strict=True):
            row += [next(given) for _ in own]
        return [torch.cat([value.detach().double().flatten() for value in row]) for row in rows]


def stacks(experts: Experts) -> list[Stack]:
    """One entry for each part that holds routed weights of single experts: stacked, or as modules in a `ModuleList`."""
    always = {id(p) for p in experts.always_parameters()}
    found, first = [], 0
    for part in experts.modules():
        if isinstance(part, Experts):
            own = [p for p in part.parameters(recurse=False) if id(p) not in always and p.requires_grad]
            stacked = [p for p in own if p.dim() > 1 and p.shape[0] == part.num_experts]
            modules: list[list[nn.Parameter]] = [[] for _ in range(part.num_experts)]
            for several in _lists(part, part.num_experts):
                for mine, module in zip(modules, several, strict=False):
                    mine += [p for p in learned(module) if id(p) not in always]
            if stacked or all(modules):
                found.append(Stack(first, stacked, modules))
                first += part.num_experts
    return found


def _lists(part: nn.Module, number: int) -> Iterator[nn.ModuleList]:
    """The lists of so many modules, but for those of other experts within."""
    for child in part.children():
        if isinstance(child, nn.ModuleList) and len(child) == number:
            if not any(isinstance(inner, Experts) for inner in child.modules()):
                yield child
        elif not isinstance(child, Experts):
            yield from _lists(child, number)


def without_drops(layers: Iterable[MoELayer]) -> str:
    """The option that makes the evaluation of these layers dropless."""
    takes = all("eval" in inspect.signature(type(layer.capacity)).parameters for layer in layers)
    return "--model.moe.capacity.eval=null" if takes else "--model.moe.capacity=dropless"


def short_name(part: object) -> str:
    return name_of(type(part))


def changed(value: float) -> str:
    return f"changed by {value:.2g} of their size" if value else "unchanged"


def percent(share: float) -> str:
    return f"{share:.1%}"

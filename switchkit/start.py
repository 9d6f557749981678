"""What a model starts with: drawn when it is built, or later, block by block, when it is known who holds which part."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from switchkit.blocks import Block

__all__ = ["Start", "begin", "later"]

Warn = Callable[[str], object]

_LATER: ContextVar[Warn | None] = ContextVar("later", default=None)


@contextmanager
def later(wanted: bool = True, warn: Warn = rank_zero_warn) -> Iterator[None]:
    """Within: a `LanguageModule` gets shapes, but no memory; a strategy that cuts it up draws its values.

    ``trainer.init_module(empty_init=True)`` with `ExpertParallelStrategy` is this, and ``switchkit fit`` builds so with
    that strategy. `wanted` False: as ever, whatever stands around it. `warn` is told why a model gets memory after all.
    """
    token = _LATER.set(warn if wanted else None)
    try:
        yield
    finally:
        _LATER.reset(token)


def begin(build: Callable[[], nn.Module]) -> tuple[nn.Module, Start | None]:
    """The model of a factory, with its values and None; within `later` without memory, and what draws its values.

    A model that cannot be built so is built as ever, with a warning: one whose constructor reads values, or sets those
    of a block after it was put into the model, or shares them with another part.
    """
    warn = _LATER.get()
    if warn is None:
        return build(), None
    state = torch.get_rng_state()
    try:
        net = _outline(build)
    except (RuntimeError, TypeError) as error:
        torch.set_rng_state(state)
        # One that has nothing to do with memory is raised again here.
        net = build()
        why = (str(error).splitlines() or [type(error).__name__])[0]
        warn(
            "the model is built whole in the memory of every process: its constructor reads values, or sets those of a "
            f"block after it was put into the model ({why})"
        )
        return net, None
    return net, Start(build, state)


class Start:
    """Draws the values of a model that was built without memory: those that it would have had, bit for bit.

    The factory runs again from the state that torch's generator had, so that all numbers are drawn in their order; each
    block is handed over and freed when it is whole. There is never more than one block, and what is outside of blocks.
    """

    def __init__(self, build: Callable[[], nn.Module], state: Tensor) -> None:
        self.build, self.state = build, state

    def draw(self, net: nn.Module, take: Callable[[Tensor, Tensor], None]) -> None:
        """Hand over every parameter and buffer: ``take(value, where it belongs in net)``.

        `net` is the model that was built without memory, sharded or not, whose tensors have memory by now. torch's
        generator stays as it is.
        """
        blocks = iter([part for part in net.modules() if isinstance(part, Block)])
        freed: dict[int, Tensor] = {}

        def finished(block: Block) -> None:
            own = dict(next(blocks).named_parameters())
            for name, value in block.named_parameters():
                take(value.detach(), own[name].detach())
                value.data = freed[id(value)] = _nothing(value)

        with torch.random.fork_rng(devices=[]), _each_block(finished):
            torch.set_rng_state(self.state)
            drawn = self.build()
        parameters, buffers = dict(net.named_parameters()), dict(net.named_buffers())
        for name, value in drawn.named_parameters():
            if id(value) not in freed:
                take(value.detach(), parameters[name].detach())
        _check_untouched(freed.values())
        for name, value in drawn.named_buffers():  # type: ignore[assignment]
            take(value, buffers[name])


def _outline(build: Callable[[], nn.Module]) -> nn.Module:
    """The model without memory, if `Start.draw` can draw it.

    Raises:
        RuntimeError: says why not.
    """
    finished: list[nn.Module] = []
    kept: list[tuple[nn.Module, str, nn.Parameter, Tensor]] = []

    def note(block: Block) -> None:
        finished.append(block)
        for part in block.modules():
            for name, parameter in part.named_parameters(recurse=False):
                nothing = _nothing(parameter)
                kept.append((part, name, parameter, nothing))
                part.register_parameter(name, nn.Parameter(nothing, parameter.requires_grad))

    with torch.device("meta"), _each_block(note):
        net = build()
    _check_untouched(nothing for *_, nothing in kept)
    if len(list(net.named_parameters(remove_duplicate=False))) != len(list(net.parameters())):
        raise RuntimeError("parts share a parameter")
    for part, name, parameter, _ in kept:
        part.register_parameter(name, parameter)
    if [part for part in net.modules() if isinstance(part, Block)] != finished:
        raise RuntimeError("blocks stand in another order than they were built in")
    loose = [f"{type(part).__name__}.{name}" for part in net.modules() for name, value in vars(part).items()
             if isinstance(value, Tensor) and value.is_meta]  # fmt: skip
    if loose:
        raise RuntimeError(f"{loose[0]} is a tensor that is no buffer")
    return net


@contextmanager
def _each_block(act: Callable[[Block], None]) -> Iterator[None]:
    """Within: `act` on each block when it is put into another module, and so whole."""
    seen: set[nn.Module] = set()

    def registered(parent: nn.Module, name: str, part: nn.Module | None) -> None:
        if isinstance(part, Block) and part not in seen:
            seen.add(part)
            act(part)

    handle = register_module_module_registration_hook(registered)
    try:
        yield
    finally:
        handle.remove()


def _nothing(parameter: Tensor) -> Tensor:
    """A tensor of that shape and of one number, which cannot be set without being noticed."""
    return torch.full((), torch.nan, dtype=parameter.dtype, device="cpu").expand(parameter.shape)


def _check_untouched(placeholders: Iterable[Tensor]) -> None:
    if not all(nothing.as_strided((), ()).isnan() for nothing in placeholders):
        raise RuntimeError("values of a block were set after it was put into the model")

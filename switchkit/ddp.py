"""DDP as ``--trainer.strategy ddp`` names it."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry

from switchkit.checks import finite_above

__all__ = ["DataParallelStrategy", "use_for_ddp"]


class DataParallelStrategy(DDPStrategy):
    """Lightning's DDP, whose buffers are taken from the first process at the start and not before every forward pass.

    A router's bias is computed on every process from the counts of all, and a table of experts never changes: sending
    them again each time would be a collective for nothing, and would hide a process that computed another bias.

    Args:
        timeout_seconds: how long a process waits for the others before it gives up, start included; 30 minutes, as
            torch has it.
        find_unused_parameters: look in every step for parameters without a gradient; needed by experts of one's own
            that are no stacked tensors, where those without a token get none.
        gradient_as_bucket_view: let gradients lie in the memory that travels, which saves a copy of them.
        more: further arguments of Lightning's ``DDPStrategy``.

    Raises:
        ValueError: no positive timeout.
    """

    def __init__(
        self,
        *,
        timeout_seconds: float = 1800.0,
        find_unused_parameters: bool = False,
        gradient_as_bucket_view: bool = False,
        **more: Any,
    ) -> None:
        finite_above(0, timeout_seconds=timeout_seconds)
        super().__init__(
            timeout=timedelta(seconds=timeout_seconds),
            find_unused_parameters=find_unused_parameters,
            gradient_as_bucket_view=gradient_as_bucket_view,
            **more,
        )

    def configure_ddp(self) -> None:
        super().configure_ddp()
        # Not by its keyword: without it DDP takes the buffers at the start, with it (up to torch 2.12) it does not.
        name = "forward_sync_buffers" if hasattr(self.model, "forward_sync_buffers") else "broadcast_buffers"
        setattr(self.model, name, False)


def use_for_ddp() -> None:
    """Have Lightning's names (``ddp``, ``ddp_find_unused_parameters_true``, ...) mean this class in this process."""
    for name, entry in list(StrategyRegistry.items()):
        if entry["strategy"] is DDPStrategy:
            StrategyRegistry.register(
                name, DataParallelStrategy, entry["description"], override=True, **entry["init_params"]
            )

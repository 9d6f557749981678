"""Lightning strategies: FSDP2 and expert parallelism."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.strategies.launchers.launcher import _Launcher
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint as recompute

from switchkit import checkpoints
from switchkit.blocks import Block
from switchkit.capacity.policies import Dropless
from switchkit.layers import MoELayer
from switchkit.parallel.exchange import Exchange
from switchkit.parallel.experts import shard_experts, stacked
from switchkit.parallel.failure import watch
from switchkit.parallel.mesh import Layout, Meshes, check_experts, layout
from switchkit.parallel.norm import clip_norm
from switchkit.parallel.place import part_like, state_like

__all__ = ["ExpertParallelStrategy", "end_together", "parallelize"]

START = 120.0
"""Seconds that the processes have to meet at the start."""


class ExpertParallelStrategy(ModelParallelStrategy):
    """Shards a model over all devices by FSDP2, and its experts by the expert: `expert_parallel` by name.

    Every block is gathered when it computes and let go after; experts stay where they are, and tokens travel to them
    (`Exchange`). Each device reads its own share of the data. Gradients, clipped norm and losses are those of one
    process on all of it. Checkpoints are folders that any number of devices, and any sizes, can load.

    The model is built whole in the memory of every process, takes the values of the first one, and is cut up from
    there, so that what it starts with does not depend on the layout. Mixed precision is Lightning's ``precision``.

    Args:
        expert_parallel_size: devices that share out the experts of a layer; 1 is plain FSDP2. It divides the devices of
            a copy, and the experts of every sparse layer.
        data_parallel_replicate: copies of the model, each sharded over the others; more than one where the network
            between machines is slow.
        activation_checkpointing: keep the inputs of blocks only and compute the rest again in the backward pass, for
            less memory and about a third more time (tokens are exchanged again too).
        timeout_seconds: how long a device waits for the others before it gives up and the run ends; 30 minutes, as
            torch has it. At the start two minutes at least, as processes do not come up together.

    Raises:
        ValueError: a size below 1, no positive timeout; at the start, sizes that do not divide the devices or the
            experts (names those that do), experts without stacked weights.

    Source: the meshes of torchtitan; fully_shard (arXiv 2304.11277); expert parallelism of arXiv 2006.16668.
    """

    def __init__(
        self,
        expert_parallel_size: int = 1,
        *,
        data_parallel_replicate: int = 1,
        activation_checkpointing: bool = False,
        timeout_seconds: float = 1800.0,
    ) -> None:
        for name, size in (("expert_parallel_size", expert_parallel_size),
                           ("data_parallel_replicate", data_parallel_replicate)):  # fmt: skip
            if size < 1:
                raise ValueError(f"{name} must be at least 1; got {size}")
        if not 0 < timeout_seconds < float("inf"):
            raise ValueError(f"timeout_seconds must be a finite number > 0; got {timeout_seconds}")
        super().__init__(timeout=timedelta(seconds=max(timeout_seconds, START)))
        self.timeout_seconds = timeout_seconds
        self.expert_parallel_size = expert_parallel_size
        self.data_parallel_replicate = data_parallel_replicate
        self.activation_checkpointing = activation_checkpointing
        self.meshes: Meshes | None = None

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Nothing: the names are registered below, with this module."""

    # -- processes -----------------------------------------------------------------------------------------------

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Every process reads its own share."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    @property
    def layout(self) -> Layout:
        """What the sizes make of the devices."""
        return layout(self.world_size, self.expert_parallel_size, self.data_parallel_replicate)

    def _configure_launcher(self) -> None:
        # Lightning gives one to the first process only; the others have to be looked after too.
        assert self.cluster_environment is not None
        self._launcher = _SubprocessScriptLauncher(self.cluster_environment, self.num_processes, self.num_nodes)
        end_together(self._launcher)

    def setup_environment(self) -> None:
        super()._setup_distributed()
        self.meshes = self.layout.meshes(self.root_device.type)
        # torch gives the groups of a mesh its own default.
        for group in [dist.group.WORLD, *self.meshes.whole_dense.get_all_groups(),
                      *self.meshes.whole_sparse.get_all_groups()]:  # fmt: skip
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=self.timeout_seconds), group)

    def setup(self, trainer: L.Trainer) -> None:
        assert self.model is not None
        assert self.accelerator is not None
        assert self.meshes is not None
        # Of the records that a block returns; nothing is done to them in place.
        warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(.*\) returned a view tensor")
        self.accelerator.setup(trainer)
        self.model = self.precision_plugin.convert_module(self.model)
        module = self.lightning_module
        assert module is not None
        _warn_of_batches(module, self.world_size)
        parallelize(module, self.meshes, self.root_device, self.activation_checkpointing)
        self.model_to_device()
        self.barrier()
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        # torch's own clipping refuses gradients of several meshes.
        self.precision_plugin.clip_grad_by_norm = self._clip  # type: ignore[method-assign]
        if fitting:
            _optimizers_to_device(self.optimizers, self.root_device)

    def _clip(self, optimizer: Optimizer, clip_val: float) -> None:
        clip_norm(self.precision_plugin.main_params(optimizer), clip_val)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Within: gradients add up on each device and do not travel, as for all but the last micro-batch of a step."""
        assert self.model is not None
        parts = [part for part in self.model.modules() if isinstance(part, FSDPModule)]
        for part in parts:
            part.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for part in parts:
                part.set_requires_gradient_sync(True, recurse=False)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        self.lightning_module.load_state_dict(
            state_like(checkpoint["state_dict"], self.lightning_module), strict=strict
        )

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return getattr(optimizer, "_optimizer", optimizer).state_dict()

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(_sharded(state, optimizer))

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """All processes write their parts into one folder, which takes its place when all is there."""
        checkpoints.write_folder(checkpoint, Path(self.broadcast(filepath)))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """A folder of any layout, each process its parts; or a single file, of which each takes its parts later."""
        path = Path(self.broadcast(checkpoint_path))
        if not path.is_dir():
            return checkpoints.read(path)
        assert self.lightning_module is not None
        parameters = dict(self.lightning_module.named_parameters())
        targets = {f"model/{name}": p.detach() for name, p in parameters.items()}
        for index, optimizer in enumerate(self.optimizers):
            for number, parameter in enumerate(_parameters(optimizer)):
                targets[f"optimizer/{index}/{number}"] = parameter.detach()
        return checkpoints.read_folder(path, targets)


def end_together(launcher: _Launcher | None, tells: Callable[[BaseException], bool] | None = None) -> None:
    """`switchkit.parallel.watch` where the launcher is one of processes; call it before the Trainer launches.

    `ExpertParallelStrategy` does so itself; with Lightning's other strategies pass ``trainer.strategy.launcher``.
    """
    if isinstance(launcher, _SubprocessScriptLauncher):
        watch(launcher, tells)


def parallelize(module: nn.Module, meshes: Meshes, device: torch.device, checkpointing: bool = False) -> None:
    """Shard the children of a module over the meshes, in place; a second time it does nothing.

    All processes start from the values of the first. Units are the blocks, and within them the experts.

    Raises:
        ValueError: parameters of the module itself, experts that cannot be shared out.
    """
    if any(isinstance(part, FSDPModule) for part in module.modules()):
        return
    own = [name for name, _ in module.named_parameters(recurse=False)]
    if own:
        raise ValueError(f"{type(module).__name__} has parameters of its own ({own[0]}): put them into a child module")
    shares = meshes.expert.size()
    for name, part in module.named_modules():
        if isinstance(part, MoELayer) and shares > 1:
            # Before anything is changed.
            check_experts(name, part.num_experts, shares)
            stacked(name, part.experts)
    for tensor in [*module.parameters(), *module.buffers()]:
        _take_from_first(tensor.data, device)
    for name, part in list(module.named_modules()):
        if isinstance(part, MoELayer) and shares > 1:
            shard_experts(name, part.experts, meshes.expert)
            part.dispatcher = Exchange(part.dispatcher, meshes.expert.get_group())
            for owner in stacked(name, part.experts):
                fully_shard(owner, mesh=meshes.expert_data)
    for part in list(module.modules()):
        if isinstance(part, Block):
            if checkpointing:
                # On the instance, so that FSDP's hooks gather the weights around it.
                part.forward = partial(recompute, part.forward, use_reentrant=False)  # type: ignore[method-assign]
            fully_shard(part, mesh=meshes.dense)
    for child in module.children():
        if any(True for _ in child.parameters()):
            fully_shard(child, mesh=meshes.dense)


def _take_from_first(tensor: Tensor, device: torch.device) -> None:
    there = tensor.to(device)
    dist.broadcast(there, 0)
    tensor.copy_(there)


def _warn_of_batches(module: nn.Module, world: int) -> None:
    layers = [part for part in module.modules() if isinstance(part, MoELayer)]
    bound = [m for m in layers if m.group == "batch" and (m.router.k is None or not isinstance(m.capacity, Dropless))]
    if world > 1 and bound:
        rank_zero_warn(
            f"group='batch' counts capacity over the batch of each device: {world} devices drop other tokens than one "
            "would. group='sequence' does not depend on the devices"
        )


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    """In the order in which a state_dict numbers them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _sharded(state: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's state with whole tensors, each process's part of them."""
    parameters = _parameters(optimizer)
    found: dict[int, dict[str, Any]] = {}
    for number, entries in state["state"].items():
        like = parameters[int(number)]
        found[number] = {
            name: part_like(value, like)
            if isinstance(value, Tensor)
            and isinstance(like, DTensor)
            and not isinstance(value, DTensor)
            and value.shape == like.shape
            else value
            for name, value in entries.items()
        }
    return {**state, "state": found}


StrategyRegistry.register(
    "expert_parallel",
    ExpertParallelStrategy,
    description="FSDP2; for experts that are shared out give class_path and expert_parallel_size",
)
for _size in (2, 4, 8):
    StrategyRegistry.register(
        f"expert_parallel_{_size}",
        ExpertParallelStrategy,
        description=f"FSDP2, experts shared out over {_size} devices",
        expert_parallel_size=_size,
    )

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
import torch.distributed as dist
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.strategies.launchers.launcher import _Launcher
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from switchkit import checkpoints
from switchkit.checks import at_least, finite_above
from switchkit.optim import why_whole
from switchkit.parallel.failure import watch
from switchkit.parallel.mesh import Layout, Meshes, layout
from switchkit.parallel.norm import clip_norm
from switchkit.parallel.place import part_like, state_like
from switchkit.registry import resolve
from switchkit.sharding import parallelize, take_part
from switchkit.start import Start, later

__all__ = ["ExpertParallelStrategy", "draws_by_parts", "end_together"]

START = 120.0
"""Seconds that the processes have to meet at the start."""


class ExpertParallelStrategy(ModelParallelStrategy):
    """Shards a model over all devices by FSDP2, and its experts by the expert: `expert_parallel` by name.

    Every block is gathered when it computes and let go after; experts stay where they are, and tokens travel to them
    (`Exchange`). Each device reads its own share of the data. Gradients, clipped norm and losses are those of one
    process on all of it. Checkpoints are folders that any number of devices, and any sizes, can load.

    What a model starts with does not depend on the layout: it has the values that the first process drew, those of a
    run on one device with the same seed. ``switchkit fit`` (and ``with trainer.init_module(empty_init=True)`` around
    a `LanguageModule`) builds it without memory; the values are drawn block by block, and each process keeps its part.
    A model that is built before in another way is whole in the memory of every process, and is cut up from there.
    Mixed precision is Lightning's ``precision``.

    Args:
        expert_parallel_size: devices that share out the experts of a layer; 1 is plain FSDP2. It divides the devices of
            a copy, and the experts of every sparse layer.
        data_parallel_replicate: copies of the model, each sharded over the others; more than one where the network
            between machines is slow.
        activation_checkpointing: keep the inputs of blocks only and compute the rest again in the backward pass, for
            less memory and about a third more time (tokens are exchanged again too).
        compile: run blocks through torch.compile, each by itself; where experts are shared out, sparse layers stay as
            they are, as they wait for the device once to learn how many tokens travel. The first steps take long.
        timeout_seconds: how long a device waits for the others before it gives up and the run ends; 30 minutes, as
            torch has it. At the start two minutes at least, as processes do not come up together.

    Raises:
        ValueError: a size below 1, no positive timeout; at the start, sizes that do not divide the devices or the
            experts (names those that do), experts without stacked weights, torch's Adafactor, which needs whole
            parameters, callbacks that keep a copy of the whole model; at the start of `predict`, batches that are not
            as many on every device.

    Source: the meshes of torchtitan; fully_shard (arXiv 2304.11277); expert parallelism of arXiv 2006.16668.
    """

    def __init__(
        self,
        expert_parallel_size: int = 1,
        *,
        data_parallel_replicate: int = 1,
        activation_checkpointing: bool = False,
        compile: bool = False,
        timeout_seconds: float = 1800.0,
    ) -> None:
        at_least(1, expert_parallel_size=expert_parallel_size, data_parallel_replicate=data_parallel_replicate)
        finite_above(0, timeout_seconds=timeout_seconds)
        super().__init__(timeout=timedelta(seconds=max(timeout_seconds, START)))
        self.timeout_seconds = timeout_seconds
        self.expert_parallel_size = expert_parallel_size
        self.data_parallel_replicate = data_parallel_replicate
        self.activation_checkpointing, self.compile = activation_checkpointing, compile
        self.meshes: Meshes | None = None

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Nothing: the names are registered below, with this module."""

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """With `empty_init`, a `LanguageModule` gets shapes only; `setup` draws the values, and each device its part.

        Lightning's meta device would lose them.
        """
        with later() if empty_init else super().tensor_init_context(empty_init):
            yield

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
        self._check_callbacks()
        self.meshes = self.layout.meshes(self.root_device.type)
        # torch gives the groups of a mesh its own default.
        for group in [dist.group.WORLD, *self.meshes.whole_dense.get_all_groups(),
                      *self.meshes.whole_sparse.get_all_groups()]:  # fmt: skip
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=self.timeout_seconds), group)

    def _check_callbacks(self) -> None:
        """Before they are set up, which is where these copy the model."""
        assert self.lightning_module is not None
        for callback in self.lightning_module.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, StochasticWeightAveraging | WeightAveraging):
                raise ValueError(
                    f"{type(callback).__name__} keeps a copy of the whole model, of which each device has a part here: "
                    "leave the callback out, or take strategy ddp"
                )

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
        parallelize(
            module, self.meshes, self.root_device, checkpointing=self.activation_checkpointing, compiling=self.compile
        )
        if isinstance(start := getattr(module, "start", None), Start):
            net: nn.Module = module.net  # type: ignore[assignment]
            net.to_empty(device=self.root_device)
            start.draw(net, partial(take_part, self.root_device))
            module.start = None  # type: ignore[assignment]
        self.model_to_device()
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            # Made from parameters that are where they stay, and so is their state.
            self.setup_optimizers(trainer)
            for why in filter(None, map(why_whole, self.optimizers)):
                raise ValueError(why)
        self.setup_precision_plugin()
        # torch's own clipping refuses gradients of several meshes.
        self.precision_plugin.clip_grad_by_norm = self._clip  # type: ignore[method-assign]

    def on_predict_start(self) -> None:
        """All devices gather a block together: one with a batch more would wait for the others until the timeout."""
        super().on_predict_start()
        assert self.lightning_module is not None
        counts: list[Any] = [None] * self.world_size
        dist.all_gather_object(counts, self.lightning_module.trainer.num_predict_batches)
        if any(count != counts[0] for count in counts):
            raise ValueError(
                "predict needs as many batches on every device, as all compute each block together; got "
                f"{', '.join(str(sum(count)) for count in counts)}: give a number of rows that the devices times the "
                "batch size divide, or take one device, or strategy ddp"
            )

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
        own = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return own.state_dict()

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
            return checkpoints.read(path, ours=False)
        assert self.lightning_module is not None
        parameters = dict(self.lightning_module.named_parameters())
        targets = {f"model/{name}": p.detach() for name, p in parameters.items()}
        for index, optimizer in enumerate(self.optimizers):
            for number, parameter in enumerate(_parameters(optimizer)):
                targets[f"optimizer/{index}/{number}"] = parameter.detach()
        return checkpoints.read_folder(path, targets, ours=False)


def end_together(launcher: _Launcher | None, tells: Callable[[BaseException], bool] | None = None) -> None:
    """`switchkit.parallel.watch` where the launcher is one of processes; call it before the Trainer launches.

    `ExpertParallelStrategy` does so itself; with Lightning's other strategies pass ``trainer.strategy.launcher``.
    """
    if isinstance(launcher, _SubprocessScriptLauncher):
        watch(launcher, tells)


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


def draws_by_parts(strategy: Any) -> bool:
    """Whether a Trainer's ``strategy``, by name or as settings, is one whose models are built without memory."""
    if isinstance(strategy, str):
        # Its `get` would make one, which some cannot be without their library.
        found = dict(StrategyRegistry).get(strategy.lower(), {}).get("strategy")
    else:
        found = resolve(getattr(strategy, "class_path", ""))
    return isinstance(found, type) and issubclass(found, ExpertParallelStrategy)


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

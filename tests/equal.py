"""The same training in one process and in several, as far as it can be observed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import lightning as L
import torch
from distributed import Ranks
from lightning.pytorch.loggers import Logger
from torch import Tensor

from switchkit import Balance, Decoder, LanguageModule, MoELayer, RouterZ, TopK
from switchkit.callbacks import UpdateRouterBias

NET = partial(Decoder, d_model=16, num_layers=2, num_heads=2, d_ff=24, num_experts=8, context=8, sparse="every(1)")
MOE = partial(MoELayer, router=partial(TopK, k=2))
SGD = partial(torch.optim.SGD, lr=0.3, momentum=0.9)
VOCABULARY = 11


@dataclass
class Case:
    """What to train, and on what: `rows` sequences of 8 tokens for each of `ranks`, in each of `micro` micro-batches.

    Padding is uneven: the first rank has full sequences, the last hardly any tokens.
    """

    moe: Any = MOE
    losses: Sequence[Any] = (partial(Balance, weight=0.5), partial(RouterZ, weight=0.1))
    net: Any = NET
    optimizer: Any = SGD
    ranks: int = 2
    rows: int = 2
    micro: int = 1
    steps: int = 2
    padded: bool = True
    clip: float | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def module(self) -> LanguageModule:
        torch.manual_seed(1)
        module = LanguageModule(
            self.net,
            moe=self.moe,
            losses=list(self.losses),
            optimizer=self.optimizer,
            vocab_size=VOCABULARY,
            warmup_steps=0,
            schedule="constant",
        )
        generator = torch.Generator().manual_seed(5)
        for parameter in module.parameters():
            # Large enough that routing, losses and drops are far from their start.
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
        return module

    def batches(self) -> list[list[dict[str, Tensor]]]:
        """By micro-batch and rank."""
        generator = torch.Generator().manual_seed(7)
        found = []
        for _ in range(self.steps * self.micro):
            shares = []
            for rank in range(self.ranks):
                ids = torch.randint(VOCABULARY, (self.rows, 9), generator=generator)
                most = 8 if rank == 0 else 3 if rank == self.ranks - 1 else 6
                length = torch.randint(1, most + 1, (self.rows, 1), generator=generator) if self.padded else 8
                if rank == 0:
                    length = torch.full((self.rows, 1), 8)
                valid = torch.arange(8).expand(self.rows, 8) < length
                shares.append({"tokens": ids[:, :-1], "targets": ids[:, 1:], "valid": valid})
            found.append(shares)
        return found


@dataclass
class Observed:
    """What training did: by step, and by name of the parameter."""

    losses: list[dict[str, float]]
    gradients: list[dict[str, Tensor]]
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    load: list[Tensor]


class Watch(L.Callback):
    """Keeps gradients as the optimizer saw them, clipped, and the loads of all sparse layers."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.load: list[Tensor] = []
        self._step = 0

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, *rest: Any) -> None:
        self.load.append(outputs["stats"]["load"].clone())
        if trainer.global_step > self._step:
            self._step = trainer.global_step
            self.gradients.append({n: whole(p.grad) for n, p in module.named_parameters() if p.grad is not None})


class Kept(Logger):
    """Keeps what is logged, on every rank."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    @property
    def name(self) -> str:
        return "kept"

    @property
    def version(self) -> int:
        return 0

    def log_metrics(self, metrics: Any, step: Any = None) -> None:
        self.rows.append(dict(metrics))

    def log_hyperparams(self, *arguments: Any, **more: Any) -> None:
        pass


class Loader:
    """Batches as they are; a list of them would be taken for a list of loaders."""

    def __init__(self, batches: list[dict[str, Tensor]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self.batches)


def whole(x: Tensor) -> Tensor:
    """The tensor on this process alone, whatever it is a part of."""
    x = x.detach()
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).clone()


def train(
    case: Case, batches: list[dict[str, Tensor]], micro: int, callbacks: Sequence[L.Callback] = (), **trainer: Any
) -> Observed:
    """Train on these micro-batches, `micro` to a step."""
    watch, logger = Watch(), Kept()
    own = L.Trainer(
        accelerator="cpu",
        max_steps=trainer.pop("max_steps", len(batches) // micro),
        accumulate_grad_batches=micro,
        gradient_clip_val=case.clip,
        logger=logger,
        callbacks=[*callbacks, watch],
        log_every_n_steps=1,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        **trainer,
    )
    module = case.module()
    own.fit(module, Loader(batches), Loader(batches[:1]))
    parameters = {name: whole(p) for name, p in module.named_parameters()}
    buffers = {name: whole(b) for name, b in module.net.named_buffers()}
    return Observed(logger.rows, watch.gradients, parameters, buffers, watch.load)


def _bias(case: Case) -> list[L.Callback]:
    return [UpdateRouterBias(0.05)] if case.options.get("bias") else []


def alone(case: Case) -> Observed:
    """One process on the concatenated micro-batches."""
    joined = [{name: torch.cat([share[name] for share in shares]) for name in shares[0]} for shares in case.batches()]
    return train(case, joined, case.micro, _bias(case))


def one_by_one(case: Case) -> Observed:
    """One process for which the share of each rank is a micro-batch of its own."""
    return train(case, [share for shares in case.batches() for share in shares], case.micro * case.ranks, _bias(case))


def as_rank(rank: int, world: int, case: Case, strategy: Any) -> Observed:
    """This rank's part, of as many as the case has."""
    assert world == case.ranks
    own = strategy() if callable(strategy) else strategy
    batches = [shares[rank] for shares in case.batches()]
    plugins = [Ranks(rank, world)]
    return train(case, batches, case.micro, _bias(case), strategy=own, devices=world, plugins=plugins)


def as_ranks(rank: int, world: int, cases: dict[str, tuple[Case, Any]]) -> dict[str, Observed]:
    """`as_rank` of several cases, for the price of one start."""
    return {name: as_rank(rank, world, case, strategy) for name, (case, strategy) in cases.items()}


def differences(found: Observed, expected: Observed) -> dict[str, float]:
    """Relative distance of each tensor and loss, by kind and name."""
    assert len(found.gradients) == len(expected.gradients) > 0
    gaps: dict[str, float] = {}
    for step, (mine, theirs) in enumerate(zip(found.gradients, expected.gradients, strict=True)):
        assert mine.keys() == theirs.keys()
        gaps |= {f"gradient {step} {name}": distance(mine[name], theirs[name]) for name in theirs}
    for step, (mine, theirs) in enumerate(zip(found.losses, expected.losses, strict=True)):
        names = [name for name in theirs if name not in ("train/lr", "train/imbalance", "train/dropped")]
        gaps |= {f"{step} {n}": abs(mine[n] - theirs[n]) / max(abs(theirs[n]), 1e-9) for n in names}
    assert found.parameters.keys() == expected.parameters.keys()
    gaps |= {f"parameter {n}": distance(found.parameters[n], expected.parameters[n]) for n in expected.parameters}
    gaps |= {f"buffer {n}": distance(found.buffers[n], expected.buffers[n]) for n in expected.buffers}
    return gaps


def distance(a: Tensor, b: Tensor) -> float:
    """Norm of the difference over the norm of the second."""
    assert a.shape == b.shape
    a, b = a.double(), b.double()
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b).clamp(min=1e-12))


def worst(found: Observed, expected: Observed) -> tuple[str, float]:
    gaps = differences(found, expected)
    name = max(gaps, key=lambda key: gaps[key])
    return name, gaps[name]

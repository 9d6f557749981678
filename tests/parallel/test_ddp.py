"""Two processes under DDP do what one process does on both their batches."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from distributed import Ranks, run
from equal import MOE, Case, Loader, Observed, alone, as_rank, as_ranks, differences, distance, one_by_one, train, worst
from small import data, module
from torch import Tensor

from switchkit import Balance, ExpertChoice, Factor, MoELayer, RouterZ, Sigmoid
from switchkit.callbacks import SaveBest, SaveLast, UpdateRouterBias
from switchkit.checkpoints import AtomicCheckpointIO, read
from switchkit.step import MicroBatch, NonFiniteError


class Untold(Case):
    """The last rank has tokens, and no target to learn."""

    def batches(self) -> list[list[dict[str, Tensor]]]:
        found = super().batches()
        for shares in found:
            shares[-1]["targets"] = torch.full_like(shares[-1]["targets"], -100)
        return found


DROPS = partial(MOE, capacity=partial(Factor, train=0.5))
GLOBAL = (partial(Balance, weight=0.5, scope="global"), partial(RouterZ, weight=0.1))
BIAS = partial(MoELayer, router=partial(Sigmoid, k=2))
CHOICE = {
    "losses": [partial(RouterZ, weight=0.1)],
    "moe": partial(MoELayer, router=ExpertChoice),
    "net": partial(Case().net, allow_leak=True),
}
EXACT = {
    "dropless": Case(losses=GLOBAL),
    "drops": Case(losses=GLOBAL, moe=DROPS, clip=0.05),
    "accumulated": Case(losses=GLOBAL, micro=3),
    "a rank without targets": Untold(losses=GLOBAL, padded=False),
    "expert choice": Case(**CHOICE),
    "bias": Case(losses=GLOBAL, moe=BIAS, options={"bias": True}, micro=2, steps=4),
}
MICRO = Case(losses=(partial(Balance, weight=0.5), partial(RouterZ, weight=0.1)), micro=2)
RANK = Case(losses=[partial(Balance, weight=0.5, scope="rank")], micro=2, steps=1)


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Observed]]:
    """All cases by rank and name, in two processes."""
    return run(2, as_ranks, {name: (case, "ddp") for name, case in {**EXACT, "micro": MICRO, "rank": RANK}.items()})


@pytest.mark.parametrize("name", EXACT)
def test_two_ranks_equal_one_process_on_both_batches(ranks: list[dict[str, Observed]], name: str) -> None:
    case, expected = EXACT[name], alone(EXACT[name])
    for found in (rank[name] for rank in ranks):
        where, gap = worst(found, expected)
        assert gap < 2e-6, f"{where}: {gap:.1e}"
        if name == "dropless":
            assert (torch.stack(found.load).sum(0) == 0).any(), "an expert of this rank should get no token"
        if case.clip:
            norm = sum(float(g.square().sum()) for g in found.gradients[0].values()) ** 0.5
            assert norm == pytest.approx(case.clip, rel=1e-4)


def test_the_scope_of_a_micro_batch_makes_each_rank_one(ranks: list[dict[str, Observed]]) -> None:
    """f of each rank's micro-batch alone: one process that takes the shares one after another."""
    expected = one_by_one(MICRO)
    for found in (rank["micro"] for rank in ranks):
        where, gap = worst(found, expected)
        assert gap < 2e-6, f"{where}: {gap:.1e}"


def test_the_scope_of_a_rank_counts_its_own_micro_batches(ranks: list[dict[str, Observed]]) -> None:
    """The mean of what each rank would do by itself, weighted by its targets."""
    batches = RANK.batches()
    shares = [[micro[rank] for micro in batches] for rank in range(2)]
    targets = [sum(int(batch["valid"].sum()) for batch in share) for share in shares]
    by_itself = [train(RANK, share, 2).gradients[0] for share in shares]
    for found in (rank["rank"].gradients[0] for rank in ranks):
        for name, gradient in found.items():
            expected = sum(n * own[name] for n, own in zip(targets, by_itself, strict=True)) / sum(targets)
            assert distance(gradient, expected) < 2e-6, name


def mean_of_means(rank: int, world: int, case: Case) -> Observed:
    """What DDP does by itself: each rank's mean counts alike, however few its tokens."""
    MicroBatch.weights = lambda self, first: None  # type: ignore[method-assign]
    return as_rank(rank, world, case, "ddp")


def own_counts(rank: int, world: int, case: Case) -> Observed:
    """A global balance loss and a bias that see the counts of their own rank."""
    from switchkit.step import Seen

    everywhere = Seen.everywhere

    def faulty(self: Seen) -> Seen:
        every = everywhere(self)
        return Seen(every.targets, self.load, every.tokens, every.bad)

    Seen.everywhere = faulty  # type: ignore[method-assign]
    return as_rank(rank, world, case, "ddp")


@pytest.mark.parametrize(("fault", "kind"), [(mean_of_means, "gradient"), (own_counts, "gradient")])
def test_a_planted_fault_is_seen(fault: Any, kind: str) -> None:
    case = EXACT["dropless"]
    gaps = differences(run(2, fault, case)[0], alone(case))
    assert max(gap for name, gap in gaps.items() if name.startswith(kind)) > 1e-2


def loop(rank: int, world: int, folder: Path, **more: Any) -> L.Trainer:
    options = {"max_steps": 4, "limit_val_batches": 0, "enable_checkpointing": False, **more}
    return L.Trainer(
        accelerator="cpu",
        strategy="ddp",
        devices=world,
        plugins=[Ranks(rank, world), AtomicCheckpointIO()],
        default_root_dir=folder,
        logger=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        **options,
    )


class Seen(L.Callback):
    def __init__(self) -> None:
        self.tokens: list[torch.Tensor] = []
        self.biases: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        self.tokens.append(batch["tokens"])
        self.biases.append(torch.stack([b for name, b in module.net.named_buffers() if name.endswith("bias")]).clone())


def whole_run(rank: int, world: int, folder: str) -> dict[str, Any]:
    """A fit with router bias and an evaluation, of the package's own data."""
    seen = Seen()
    own_folder = Path(folder) / str(rank)
    own_folder.mkdir()
    source = data(own_folder, batch_size=4 // world)
    model = module(source, moe=BIAS)
    reductions = 0
    reduce = dist.all_reduce

    def counting(tensor: torch.Tensor, *rest: Any, **more: Any) -> Any:
        nonlocal reductions
        # Those of Lightning itself have no dimension.
        reductions += tensor.dtype == torch.long and tensor.dim() == 1
        return reduce(tensor, *rest, **more)

    dist.all_reduce = counting
    own = loop(
        rank,
        world,
        own_folder,
        callbacks=[UpdateRouterBias(0.1), seen],
        accumulate_grad_batches=2,
        limit_val_batches=2,
        num_sanity_val_steps=0,
    )
    own.fit(model, source)
    dist.all_reduce = reduce
    found = own.validate(model, source, verbose=False)[0]
    return {"tokens": seen.tokens, "biases": seen.biases, "metrics": found, "reductions": reductions}


def test_data_are_shared_out_biases_agree_and_metrics_are_of_all(tmp_path: Path) -> None:
    first, second = run(2, whole_run, str(tmp_path))
    torch.manual_seed(0)
    source = data(tmp_path, batch_size=4)
    expected = [batch["tokens"] for batch, _ in zip(_loader(source), range(8), strict=False)]
    assert [len(step) for step in first["tokens"]] == [2] * 8
    for mine, theirs, whole in zip(first["tokens"], second["tokens"], expected, strict=True):
        assert torch.equal(torch.cat([mine, theirs]), whole)
    assert torch.equal(torch.stack(first["biases"]), torch.stack(second["biases"]))
    assert torch.stack(first["biases"]).any()
    # Counts of load, targets and faults: one collective for each micro-batch, none for the step.
    assert first["reductions"] == 8
    assert first["metrics"] == second["metrics"]


def _loader(source: Any) -> Any:
    source.setup("fit")
    return source.train_loader(rank=0, world_size=1)


def evaluated(rank: int, world: int, case: Case, cut: list[int]) -> dict[str, Any]:
    """The metrics of an evaluation in which each rank has another share, of another size."""
    model = case.module()
    batches = case.batches()[0]
    tables = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    share = {name: table[cut[rank] : cut[rank + 1]] for name, table in tables.items()}
    own = loop(rank, world, Path(), limit_val_batches=1.0)
    return own.validate(model, Loader([share]), verbose=False)[0]


def test_metrics_are_over_the_tokens_of_all_ranks() -> None:
    case = Case(rows=4)
    first, second = run(2, evaluated, case, [0, 3, 8])
    whole = {name: torch.cat([batch[name] for batch in case.batches()[0]]) for name in ("tokens", "targets", "valid")}
    alone = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=1.0,
    )  # fmt: skip
    expected = alone.validate(case.module(), Loader([whole]), verbose=False)[0]
    assert first == second
    assert first == pytest.approx(expected, rel=1e-5)
    assert 0 < expected["val/accuracy"] < 1


class Poison(L.Callback):
    """Breaks the weights of the second rank, after DDP made all alike."""

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        if trainer.global_rank == 1:
            module.net.embed.weight.data[0] = float("nan")


def poisoned(rank: int, world: int, case: Case) -> str:
    batches = [{**shares[rank], "tokens": torch.zeros_like(shares[rank]["tokens"])} for shares in case.batches()]
    try:
        loop(rank, world, Path(), callbacks=[Poison()]).fit(case.module(), Loader(batches), Loader(batches[:1]))
    except NonFiniteError as error:
        return str(error)
    return "nothing was raised"


class Infinite(Balance):
    """A term that is infinite on the second rank, whose cross-entropy is good."""

    def __call__(self, routings: Any, counts: Any = None) -> Tensor:
        found = super().__call__(routings, counts)
        return found / 0 if dist.get_rank() == 1 else found


def infinite(rank: int, world: int, case: Case) -> tuple[str, bool]:
    batches = [shares[rank] for shares in case.batches()]
    model = replace(case, losses=[Infinite]).module()
    try:
        loop(rank, world, Path()).fit(model, Loader(batches), Loader(batches[:1]))
    except NonFiniteError as error:
        return str(error), all(bool(weight.isfinite().all()) for weight in model.parameters())
    return "nothing was raised", False


def test_groups_that_the_devices_cut_are_warned_of_whatever_the_strategy() -> None:
    net = partial(Case().net, allow_leak=True)
    model = Case(net=net, moe=partial(MOE, group="batch", capacity=partial(Factor, train=1.0))).module()
    model._trainer = SimpleNamespace(world_size=2)  # type: ignore[assignment]
    with pytest.warns(UserWarning, match="group='batch' decides over the batch of each device: 2 devices"):
        model.on_fit_start()


def test_a_term_that_is_infinite_on_one_rank_stops_all_ranks() -> None:
    for told, whole in run(2, infinite, Case(padded=False)):
        assert "non-finite loss at step 1" in told
        assert whole


def test_a_rank_with_nan_stops_all_ranks() -> None:
    for told in run(2, poisoned, Case(padded=False)):
        assert "non-finite router input (blocks.0.mlp: 16 tokens" in told
        assert "at step 1" in told


class Apart(L.LightningModule):
    """Each rank logs a validation loss of its own: the first's falls, the other's rises."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.loss = 4.0

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self.layer(batch).square().mean()

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.loss *= 0.5 if self.global_rank == 0 else 2.0
        self.log("val/loss", self.loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def saved_apart(rank: int, world: int, folder: str) -> tuple[Path | None, float]:
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=15), dist.group.WORLD)
    best, batches = SaveBest(), torch.utils.data.DataLoader(torch.ones(4, 1))
    more = {"max_steps": -1, "max_epochs": 3, "limit_val_batches": 1, "num_sanity_val_steps": 0}
    loop(rank, world, Path(folder), callbacks=[best], enable_checkpointing=True, **more).fit(Apart(), batches, batches)
    return best.path, best.value


def test_the_best_of_a_metric_that_ranks_do_not_share_is_the_first_one_s(tmp_path: Path) -> None:
    best = tmp_path / "checkpoints/best.ckpt"
    assert run(2, saved_apart, str(tmp_path)) == [(best, 0.5)] * 2
    assert torch.load(best, weights_only=True)["epoch"] == 2


def read_after(rank: int, world: int, folder: str) -> list[int]:
    """The steps that best.ckpt and last.ckpt are of when `fit` returns, on a slow disk."""
    real = os.fsync

    def slow(file: int) -> None:
        time.sleep(1.0)
        real(file)

    os.fsync = slow
    case, callbacks = Case(steps=4), [SaveBest(), SaveLast(2)]
    batches = [shares[rank] for shares in case.batches()]
    more = {"val_check_interval": 2, "limit_val_batches": 1.0, "num_sanity_val_steps": 0, "enable_checkpointing": True}
    own = loop(rank, world, Path(folder), callbacks=callbacks, **more)
    own.fit(case.module(), Loader(batches), Loader(case.batches()[0]))
    return [read(callback.path)["global_step"] for callback in callbacks]


@pytest.mark.slow
def test_when_fit_returns_every_rank_finds_the_last_file_in_its_place(tmp_path: Path) -> None:
    first, second = run(2, read_after, str(tmp_path))
    assert first == second
    assert first[1] == 4

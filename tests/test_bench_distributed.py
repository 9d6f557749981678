"""`switchkit bench --distributed`: the same step in several processes. Nothing here is timed."""

from __future__ import annotations

import json
import multiprocessing
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from distributed import run
from endings import fails, hangs
from test_bench import RECIPE
from torch import nn

from switchkit import Null, TopK
from switchkit.bench import command, distributed
from switchkit.bench import run as bench_run
from switchkit.bench.traffic import Traffic, covered, under_way
from switchkit.cli import main as program
from switchkit.layers import MoELayer

CPU = torch.device("cpu")
SHAPE = "{d_model: 16, num_layers: 2, num_heads: 2, d_ff: 32, num_experts: 4, context: 16}"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench_run, "keep_memory", lambda: False)
    # 28 symbols: an odd number of rows would be filled up to be shared out.
    Path("text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 100)
    # The term that is a mean over tokens is the same however the batch is cut.
    assert SHAPE in RECIPE
    Path("small.yaml").write_text(RECIPE.replace("losses: [balance]", "losses: [router_z]"))


@pytest.mark.slow
def test_the_same_step_in_two_processes(capsys: pytest.CaptureFixture[str]) -> None:
    """Each way to share out the work finds the gradient of one process, and sends what its layout has to send."""
    assert (
        command.run("bench", ["--distributed", "2", "--recipe", "small.yaml", "--rounds", "2", "--json", "found.json"])
        == 0
    )
    found = json.loads(Path("found.json").read_text("utf-8"))
    assert found["layers"] == []
    assert found["recipe"] is None
    found = found["distributed"]
    assert (found["processes"], found["backend"], found["tokens_per_step"]) == (2, "gloo", 64)
    assert found["threads"] == {"each": 1, "alone": 2}
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["one process", "ddp", "expert_parallel", "expert_parallel_2"]
    assert rows["one process"]["ratio"] == 1
    for name, row in rows.items():
        assert row["first_norm"] == pytest.approx(rows["one process"]["first_norm"], rel=1e-5), name
        assert 0 < row["min_ms"] <= row["ms"] <= row["max_ms"]
        if name != "one process":
            assert 0 < row["under_way"] <= 1
            assert row["not_counted"] == []
    # One all-reduce of the counts: targets, load [1, 4], tokens [1] and bad [1] as int64.
    counts, weights, experts = 8 * 7, 4 * found["parameters"], 4 * 4 * 2 * 16 * 32
    assert rows["ddp"]["sent_by_kind"] == {"all_reduce": counts + weights}
    shared = rows["expert_parallel"]["sent_by_kind"]
    # Of each parameter the other half is gathered for the forward pass, and that of the blocks again for the backward.
    assert shared["reduce_scatter"] == weights / 2
    assert weights / 2 < shared["all_gather"] <= weights
    alone = rows["expert_parallel_2"]["sent_by_kind"]
    # Experts stay where they are.
    assert alone["reduce_scatter"] == (weights - experts) / 2
    # Counts of 4 experts, then rows of 16 numbers there and back, twice: those that the other process's experts get.
    rows_sent = (alone["all_to_all"] - 4 * 8 / 2) / 4 / (16 * 4)
    assert 0 < rows_sent < 32
    assert "expert_parallel_2" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "seconds", "said"),
    [(fails, 100.0, "(?s)process 1 of 2 failed.*out of luck"), (hangs, 0.5, "not done within 0.5 seconds")],
)
def test_all_processes_end_with_the_first_that_fails_and_in_time(function: Any, seconds: float, said: str) -> None:
    before = multiprocessing.active_children()
    with pytest.raises(RuntimeError, match=said):
        distributed.launch(function, None, 2, seconds)
    assert multiprocessing.active_children() == before


@pytest.mark.parametrize("model", ["sparse", "dense"])
def test_a_batch_that_cannot_be_shared_out_is_told(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a dense model too, which has no twin and needs none."""
    if model == "dense":
        recipe = yaml.safe_load(Path("small.yaml").read_text())
        recipe["model"]["init_args"]["net"]["init_args"]["sparse"] = []
        Path("small.yaml").write_text(yaml.safe_dump(recipe))
    assert program(["bench", "--distributed", "3", "--recipe", "small.yaml"]) == 2
    told = capsys.readouterr().err
    assert "--distributed 3: the 4 sequences of small.yaml's batch cannot be shared out" in told
    assert "Traceback" not in told


def test_more_gpus_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(Exception, match="--distributed 2: there are 1 GPUs"):
        distributed.measure("small.yaml", torch.device("cuda"), 2, None, None)


@pytest.mark.parametrize(
    ("processes", "experts", "sizes"), [(1, 8, (1,)), (2, 8, (1, 2)), (8, 4, (1, 2, 4)), (6, 8, (1, 2)), (4, 3, (1,))]
)
def test_sizes_that_fit(processes: int, experts: int, sizes: tuple[int, ...]) -> None:
    layer = MoELayer(8, experts, d_ff=8, router=partial(TopK, k=2))
    assert distributed.expert_sizes(nn.Sequential(layer), processes) == sizes


def test_experts_without_stacked_weights_and_dense_models_leave_fsdp2() -> None:
    assert distributed.expert_sizes(nn.Sequential(MoELayer(8, 4, d_ff=8, experts=Null)), 2) == (1,)
    assert distributed.expert_sizes(nn.Linear(2, 2), 2) == (1,)


def test_overlapping_times_count_once() -> None:
    assert covered([]) == 0
    assert covered([(0, 2), (1, 3), (1.5, 2.5), (5, 6)]) == 4


def collectives(rank: int, world: int) -> dict[str, Any]:
    ones = torch.ones(6, 2)
    with Traffic() as traffic:
        dist.all_reduce(ones)
        dist.broadcast(ones, 0)
        dist.all_gather_into_tensor(torch.empty(6 * world, 2), ones)
        dist.reduce_scatter_tensor(torch.empty(6 // world, 2), ones)
        dist.all_to_all_single(torch.empty(6, 2), ones)
        # One row stays, the rest goes to the next process.
        splits = [0] * world
        splits[rank], splits[(rank + 1) % world] = 1, 5
        arrive = [0] * world
        arrive[rank], arrive[rank - 1] = 1, 5
        dist.all_to_all_single(torch.empty(6, 2), ones, arrive, splits)
        dist.barrier()
        dist.all_gather([torch.empty(6, 2) for _ in range(world)], ones)
    slept = under_way(lambda: time.sleep(0.05), 1, CPU)
    busy = under_way(lambda: dist.all_reduce(torch.ones(10)) if time.sleep(0.2 * rank) is None else None, 1, CPU)
    return {"sent": dict(traffic.sent), "calls": dict(traffic.calls), "unknown": sorted(traffic.unknown),
            "shares": (slept, busy)}  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_bytes_by_collective_and_time_under_way() -> None:
    first, second, third = run(3, collectives)
    size = 6 * 2 * 4
    assert first["sent"] == {
        "all_reduce": 2 * size * 2 / 3,
        "broadcast": size * 2 / 3,
        "all_gather": 2 * size,
        "reduce_scatter": size * 2 / 3,
        "all_to_all": size * 2 / 3 + size * 5 / 6,
    }
    assert first["sent"] == second["sent"] == third["sent"]
    assert first["calls"]["all_to_all"] == 2
    assert first["unknown"] == ["c10d.allgather_"]
    # The first waits in the collective for the others, the last comes when they are there.
    assert first["shares"][0] == 0
    assert first["shares"][1] > 0.5 > third["shares"][1]

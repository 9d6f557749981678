"""Sharded checkpoints: any layout to any other, never a mixture, never a changed byte, nothing that runs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from distributed import Ranks, run, worlds
from equal import Case, Loader, distance, whole

from switchkit import Balance, GatedMlp, LanguageModule, MoELayer, RouterZ, Shared, Sigmoid, checkpoints
from switchkit.callbacks import UpdateRouterBias
from switchkit.checkpoints import AtomicCheckpointIO
from switchkit.parallel import ExpertParallelStrategy, shards

# The stack of shared experts has one entry: it is cut along another dimension than the rest.
BIAS = partial(MoELayer, router=partial(Sigmoid, k=2), experts=partial(Shared, experts=GatedMlp))
TERMS = (partial(Balance, weight=0.1, scope="global"), partial(RouterZ, weight=0.1))
CASE = Case(losses=TERMS, moe=BIAS, ranks=4, rows=1, steps=6, optimizer=partial(torch.optim.AdamW, lr=0.01))
LAYOUTS: dict[str, tuple[int, Any]] = {
    "one": (1, "auto"),
    "one sharded": (1, ExpertParallelStrategy),
    "ddp": (2, "ddp"),
    "expert 1 of 2": (2, ExpertParallelStrategy),
    "expert 2 of 2": (2, partial(ExpertParallelStrategy, expert_parallel_size=2)),
    "expert 2 of 4": (4, partial(ExpertParallelStrategy, expert_parallel_size=2)),
    "expert 4 of 4": (4, partial(ExpertParallelStrategy, expert_parallel_size=4)),
    "copies": (4, partial(ExpertParallelStrategy, expert_parallel_size=2, data_parallel_replicate=2)),
}


class Stream(Loader):
    """Goes on in the next epoch where the last one ended, as the package's own loaders do."""

    def __init__(self, batches: list[dict[str, torch.Tensor]]) -> None:
        super().__init__(batches)
        self.left = iter(batches)

    def __len__(self) -> int:
        return 100

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return self.left


def share(rank: int, world: int) -> list[dict[str, torch.Tensor]]:
    """Of four sequences in each batch, those of this rank."""
    joined = [{name: torch.cat([s[name] for s in batch]) for name in batch[0]} for batch in CASE.batches()]
    each = 4 // world
    return [{name: x[rank * each : (rank + 1) * each] for name, x in batch.items()} for batch in joined]


def loop(rank: int, world: int, strategy: Any, **more: Any) -> L.Trainer:
    plugins: list[Any] = [AtomicCheckpointIO()] + ([] if world == 1 and strategy == "auto" else [Ranks(rank, world)])
    return L.Trainer(
        accelerator="cpu",
        strategy=strategy() if callable(strategy) else strategy,
        devices=world,
        plugins=plugins,
        callbacks=[UpdateRouterBias(0.05)],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        limit_val_batches=0,
        **more,
    )


def state(module: LanguageModule, trainer: L.Trainer) -> dict[str, torch.Tensor]:
    """Weights, biases and the optimizer's averages."""
    found = {name: whole(value) for name, value in module.state_dict().items()}
    optimizer = trainer.optimizers[0]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, parameter in enumerate(parameters):
        found |= {f"{number} {name}": whole(x) for name, x in optimizer.state[parameter].items()}
    return found


def begun(rank: int, world: int, paths: dict[str, str]) -> None:
    """Three steps in each layout of this many processes, and a checkpoint."""
    for name, path in paths.items():
        module = CASE.module()
        own = loop(rank, world, LAYOUTS[name][1], max_steps=3)
        batches = share(rank, world)
        own.fit(module, Stream(batches), Loader(batches[:1]))
        own.save_checkpoint(path)
        own.strategy.teardown()
        own.strategy.checkpoint_io.teardown()


def gone_on(rank: int, world: int, names: list[str], path: str) -> dict[str, dict[str, torch.Tensor]]:
    """Three steps more from a checkpoint, in each of these layouts."""
    found = {}
    for name in names:
        module = CASE.module()
        for parameter in module.parameters():
            parameter.data.zero_()
        own = loop(rank, world, LAYOUTS[name][1], max_steps=6)
        batches = share(rank, world)[3:]
        own.fit(module, Stream(batches), Loader(batches[:1]), ckpt_path=path, weights_only=True)
        found[name] = state(module, own)
    return found


def by_world(names: Any) -> dict[int, list[str]]:
    return {world: [name for name in names if LAYOUTS[name][0] == world] for world in (1, 2, 4)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each layout after three steps."""
    folder = tmp_path_factory.mktemp("saved")
    paths = {name: folder / f"{name.replace(' ', '_')}.ckpt" for name in LAYOUTS}
    for world, names in by_world(LAYOUTS).items():
        run(world, begun, {name: str(paths[name]) for name in names})
    return paths


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, torch.Tensor]:
    module = CASE.module()
    own = loop(0, 1, "auto", max_steps=6)
    batches = share(0, 1)
    own.fit(module, Stream(batches), Loader(batches[:1]))
    return state(module, own)


@pytest.mark.slow
def test_layouts_with_shards_make_folders(saved: dict[str, Path]) -> None:
    for name, path in saved.items():
        assert path.is_dir() == (name not in ("one", "ddp")), name
        assert checkpoints.intact(path)
        assert checkpoints.read_settings(path)["step"] == 3
    assert not list(saved["one"].parent.glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("world", worlds(1, 2, 4))
@pytest.mark.parametrize("source", ["one", "expert 2 of 2", "copies"])
def test_any_layout_goes_on_from_any_other(
    saved: dict[str, Path], uninterrupted: dict[str, torch.Tensor], source: str, world: int
) -> None:
    """Weights, biases and optimizer after three more steps are those of a run that was never stopped."""
    names = by_world(LAYOUTS)[world]
    for rank in run(world, gone_on, names, str(saved[source])):
        for name in names:
            assert rank[name].keys() == uninterrupted.keys()
            for key, value in uninterrupted.items():
                assert distance(rank[name][key], value) < 1e-4, f"{source} to {name}: {key}"


@pytest.mark.slow
def test_one_process_reads_the_whole_model_of_every_layout(saved: dict[str, Path]) -> None:
    expected = checkpoints.read(saved["one"])
    for name, path in saved.items():
        content = checkpoints.read(path)
        assert list(content["state_dict"]) == list(expected["state_dict"])
        for key, value in expected["state_dict"].items():
            assert distance(content["state_dict"][key], value) < 1e-4, f"{name}: {key}"
        moments = content["optimizer_states"][0]["state"]
        assert all(isinstance(x, torch.Tensor) for entries in moments.values() for x in entries.values())
        module = LanguageModule.load_from_checkpoint(path)
        assert torch.equal(module.net.embed.weight, content["state_dict"]["net.embed.weight"])


@pytest.mark.slow
def test_every_changed_byte_is_found(saved: dict[str, Path], tmp_path: Path) -> None:
    source = saved["expert 2 of 2"]
    names = sorted(path.name for path in source.iterdir())
    assert {"manifest.json", "meta.pt", "tensors.json"} < set(names)
    for name in names:
        copy = tmp_path / "copy.ckpt"
        shutil.copytree(source, copy)
        content = bytearray((copy / name).read_bytes())
        content[len(content) // 2] ^= 1
        (copy / name).write_bytes(content)
        assert not checkpoints.intact(copy)
        with pytest.raises(ValueError, match=f"{name}|manifest|damaged"):
            checkpoints.read(copy)
        (copy / name).unlink()
        with pytest.raises(ValueError, match=f"{name} is missing|manifest.json is missing"):
            checkpoints.read(copy)
        shutil.rmtree(copy)


class Hostile:
    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


@pytest.mark.slow
def test_nothing_in_a_folder_is_run(saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pickles in DCP's own place, in the settings and in a shard, under a manifest that fits them."""
    monkeypatch.chdir(tmp_path)
    shard = next(p.name for p in saved["copies"].iterdir() if p.suffix == ".distcp")
    for name in (".metadata", "meta.pt", shard):
        copy = tmp_path / "copy.ckpt"
        shutil.copytree(saved["copies"], copy)
        with (copy / name).open("wb") as file:
            pickle.dump(Hostile(), file) if name == ".metadata" else torch.save(Hostile(), file)
        (copy / "manifest.json").unlink()
        shards.seal(copy)
        if name == ".metadata":
            checkpoints.read(copy)
        else:
            with pytest.raises(ValueError, match="more than plain data|cannot be read: "):
                checkpoints.read(copy)
        assert not (tmp_path / "ran").exists()
        shutil.rmtree(copy)


def test_a_full_disk_is_told_of_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process could not write, torch tells all of them by an exception of its own."""

    def full(*rest: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards._Writer, "write_data", full)
    with pytest.raises(OSError, match="No space left on device") as found:
        checkpoints.write_folder({"state_dict": {}}, tmp_path / "last.ckpt")
    assert found.value.filename == str(tmp_path / "last.ckpt")


def test_weights_alone_stay_weights_alone(tmp_path: Path) -> None:
    """What goes on from them asks whether there is a state of the optimizers, not how many there are."""
    ours = {"format_version": 1, "model": {"class_path": "a.Model"}}
    checkpoints.write_folder({"state_dict": {"x": torch.ones(3)}, "switchkit": ours}, tmp_path / "weights.ckpt")
    assert "optimizer_states" not in checkpoints.read(tmp_path / "weights.ckpt")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("point", ["write_tensors", "torch.save", "seal", "rename 1", "rename 2", "rmtree"])
def test_a_kill_at_any_point_leaves_one_whole_checkpoint(
    tmp_path: Path, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The save breaks off before each of its steps; what is found afterwards is all old or all new."""

    def content(step: int) -> dict[str, Any]:
        ours = {"format_version": 1, "model": {"class_path": "a.Model"}}
        return {"state_dict": {"x": torch.full((3,), step)}, "global_step": step, "switchkit": ours}

    target = tmp_path / "last.ckpt"
    checkpoints.write_folder(content(1), target)
    before, count = os.rename, 0

    def killed(*arguments: Any, **options: Any) -> None:
        raise Killed

    def rename(*arguments: Any) -> None:
        nonlocal count
        count += 1
        if point == f"rename {count}":
            raise Killed
        before(*arguments)

    if point in ("write_tensors", "seal"):
        monkeypatch.setattr(shards, point, killed)
    elif point == "torch.save":
        monkeypatch.setattr(torch, "save", killed)
    elif point == "rmtree":
        remove = shutil.rmtree
        monkeypatch.setattr(
            shutil, "rmtree", lambda path, **o: killed() if "previous" in str(path) else remove(path, **o)
        )
    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(Killed):
        checkpoints.write_folder(content(2), target)
    monkeypatch.undo()
    found = checkpoints.read(checkpoints.last(tmp_path))
    expected = 2 if point == "rmtree" else 1
    assert found["global_step"] == expected
    assert found["state_dict"]["x"].tolist() == [expected] * 3
    checkpoints.write_folder(content(3), target)
    assert checkpoints.read(checkpoints.last(tmp_path))["global_step"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_another_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").mkdir()
    with pytest.raises(ValueError, match="no whole checkpoint of switchkit: its manifest.json is missing"):
        checkpoints.read(tmp_path / "x.ckpt")
    (tmp_path / "x.ckpt/manifest.json").write_text(json.dumps({"format": 99, "files": {}}))
    with pytest.raises(ValueError, match="has format 99; this one reads up to 1: upgrade"):
        checkpoints.read(tmp_path / "x.ckpt")


@pytest.mark.slow
def test_a_part_of_a_folder_is_refused(saved: dict[str, Path]) -> None:
    folder = next(path for path in saved.values() if path.is_dir())
    for part in folder.iterdir():
        with pytest.raises(ValueError, match=rf"{part.name} is a part of the checkpoint .*{folder.name}: give that"):
            checkpoints.read(part)

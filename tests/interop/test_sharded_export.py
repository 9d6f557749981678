"""Export from a sharded checkpoint: the files that its single file gives, without the whole model in memory."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("safetensors")

import torch
from distributed import run
from torch import Tensor

from switchkit import LanguageModule, checkpoints
from switchkit.cli import main
from switchkit.interop.config import Config
from switchkit.interop.families import family_named
from switchkit.interop.files import open_stored, save_checkpoint
from switchkit.parallel.mesh import layout
from switchkit.sharding import parallelize

LLAMA = {
    "vocab_size": 40, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-3, "hidden_act": "silu",
    "rope_parameters": {"rope_type": "default", "rope_theta": 30.0},
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        **LLAMA, "num_key_value_heads": 4, "moe_intermediate_size": 32, "n_routed_experts": 8, "n_shared_experts": 2,
        "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "kv_lora_rank": 6,
        "q_lora_rank": 5, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 7, "routed_scaling_factor": 1.7,
        "norm_topk_prob": True,
    },
}  # fmt: skip


def module(name: str) -> LanguageModule:
    plan = family_named(name).plan(Config(MODELS[name], "the test"), False, None)
    torch.manual_seed(0)
    made = LanguageModule(plan.net, moe=plan.moe, losses=list(plan.losses), vocab_size=plan.vocab_size)
    for buffer in made.net.buffers():
        buffer.normal_()
    return made


def sharded(rank: int, world: int, folder: str) -> None:
    """Each model as two processes that share out its experts save it, optimizer included."""
    for name in MODELS:
        made = module(name)
        parallelize(made, layout(world, 2).meshes("cpu"), torch.device("cpu"))
        state = {i: {"exp_avg": p.detach().clone()} for i, p in enumerate(made.parameters())}
        content: dict[str, Any] = {
            "state_dict": made.state_dict(),
            "global_step": 0,
            "optimizer_states": [{"state": state, "param_groups": []}],
        }
        made.on_save_checkpoint(content)
        checkpoints.write_folder(content, Path(folder) / f"{name}.ckpt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sharded")
    run(2, sharded, str(path))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_files_are_those_of_the_single_file(name: str, folder: Path, tmp_path: Path) -> None:
    save_checkpoint(module(name), tmp_path / "one.ckpt")
    for source, out in ((folder / f"{name}.ckpt", "shards"), (tmp_path / "one.ckpt", "one")):
        assert main(["export-hf", str(source), "--out", str(tmp_path / out), "--max_shard_size", "100KB"]) == 0
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len([file for file in files if file.endswith(".safetensors")]) > 3
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == files
    for file in files:
        assert (tmp_path / "shards" / file).read_bytes() == (tmp_path / "one" / file).read_bytes(), file


def alive() -> int:
    """Bytes of all tensors that have memory."""
    tensors = [x for x in gc.get_objects() if issubclass(type(x), Tensor) and not x.is_meta]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


@pytest.mark.slow
def test_a_few_tensors_are_held_at_a_time(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of six layers with two large tensors each, at most those of one file and two that were read."""
    seen: list[int] = []
    read = checkpoints.read_tensor

    def counted(path: Path, name: str) -> Tensor:
        found = read(path, name)
        if ".experts." in name:
            seen.append(alive())
        return found

    monkeypatch.setattr(checkpoints, "read_tensor", counted)
    size = sum(p.nbytes for p in module("mixtral").parameters())
    before = alive()
    given = [str(folder / "mixtral.ckpt"), "--out", str(tmp_path / "out"), "--max_shard_size", "100KB"]
    assert main(["export-hf", *given]) == 0
    assert len(seen) == 12, "each tensor is read once"
    assert max(seen) - before < 0.35 * size


@pytest.mark.slow
def test_a_damaged_folder_is_refused_before_anything_is_written(folder: Path, tmp_path: Path, capsys: Any) -> None:
    shard = next(path for path in (folder / "mixtral.ckpt").iterdir() if path.suffix == ".distcp")
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        assert main(["export-hf", str(folder / "mixtral.ckpt"), "--out", str(tmp_path / "out")]) != 0
    finally:
        shard.write_bytes(content)
    assert "is damaged: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_is_read_is_what_was_saved(folder: Path) -> None:
    found, read = open_stored(folder / "deepseek_v3.ckpt")
    assert all(p.is_meta for p in found.parameters())
    for name, value in module("deepseek_v3").state_dict().items():
        assert torch.equal(read(name), value), name

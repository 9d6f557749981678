"""The training step of a recipe: against its dense twin, and inside Lightning."""

from __future__ import annotations

import copy
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from switchkit.bench.overhead import Recipe, compare, quiet
from switchkit.bench.timing import clock_of, interleave
from switchkit.cli.errors import UserError
from switchkit.cli.lightning import build
from switchkit.cli.recipes import find_config
from switchkit.counts import count
from switchkit.losses.base import alone
from switchkit.metrics import cross_entropy
from switchkit.models.encoder_decoder import EncoderDecoder
from switchkit.module import LanguageModule
from switchkit.twins import dense_spec

__all__ = ["Bare", "check", "found_recipe", "measure", "pool", "read", "twin_of"]

POOL = 16
"""Batches that the steps go through in turn; drawing them is not measured."""


class Bare:
    """One training step as a loop of one's own would have it: forward, losses, backward, clip, optimizer, schedule.

    `mode`: the model runs through `torch.compile` in this mode, as by the callback `Compile`.
    """

    def __init__(self, module: LanguageModule, trainer: Trainer, mode: str | None = None) -> None:
        self.module, self.clip = module, trainer.gradient_clip_val
        if mode is not None:
            module.net.compile(mode=mode)
        self.context = trainer.precision_plugin.forward_context
        module.trainer = trainer
        configured = module.configure_optimizers()
        module.trainer = None
        self.optimizer = configured["optimizer"]
        self.scheduler = configured["lr_scheduler"]["scheduler"]

    def __call__(self, batch: dict[str, Tensor]) -> None:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        with self.context():
            out = self.module.net(batch["tokens"], batch.get("valid"))
            total, tokens = cross_entropy(out.logits, batch["targets"], batch.get("valid"))
            terms = (term.weight * alone(term, out.routings) for term in self.module.losses)
            loss = total / tokens.clamp(min=1) + sum(terms, 0.0)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if self.clip:
            nn.utils.clip_grad_norm_(self.module.parameters(), float(self.clip))
        self.optimizer.step()
        self.scheduler.step()


def check(name: str, device: torch.device) -> None:
    """Refuse now what `measure` would refuse after minutes of other measurements."""
    with tempfile.TemporaryDirectory() as folder, quiet():
        twin_of(name, read(["--config", found_recipe(name)], device, folder).module)


def measure(
    name: str, device: torch.device, rounds: int | None, steps: int, *, compiled: bool = False
) -> dict[str, Any]:
    """Every figure about a recipe, as plain data; `compiled`: of its steps under torch.compile too.

    Raises:
        UserError: a recipe that does not exist, has no sparse layer, or trains in a way that is not measured here.
    """
    with tempfile.TemporaryDirectory() as folder, quiet():
        sparse = read(["--config", found_recipe(name)], device, folder)
        twin = read(twin_of(name, sparse.module), device, folder)
        context = sparse.data.context
        counts, dense_counts = count(sparse.module.net, context), count(twin.module.net, context)
        batches_of = pool(sparse, device)
        tokens = batches_of[0]["tokens"].numel()
        modes: dict[str, str | None] = {"": None}
        if compiled:
            # CUDA graphs on a GPU, where a step of a small model waits for Python.
            modes[", compiled"] = "reduce-overhead" if device.type == "cuda" else "default"
        runs = {}
        for (suffix, mode), (label, recipe) in itertools.product(modes.items(), (("sparse", sparse), ("dense", twin))):
            bare, batches = Bare(copy.deepcopy(recipe.module), recipe.trainer, mode), itertools.cycle(batches_of)
            runs[label + suffix] = lambda bare=bare, batches=batches: bare(next(batches))
        timings = interleave(runs, clock_of(device), rounds)
        overheads = [
            compare(sparse, Bare(copy.deepcopy(sparse.module), sparse.trainer), batches_of, steps, folder, saves=saves)
            for saves in (False, True)
        ]
    return {
        "recipe": name,
        "data": sparse.data.source.description if hasattr(sparse.data, "source") else None,
        "tokens_per_step": tokens,
        "flops_per_token": {"sparse": counts.matched, "routers": counts.routers, "dense": dense_counts.flops},
        "flops_match": counts.matched == dense_counts.flops,
        "rounds": len(timings["sparse"].seconds),
        "ratio": timings["sparse"].median / timings["dense"].median,
        "mode": modes.get(", compiled"),
        "rows": [
            {
                "name": label,
                "ms": 1000 * timing.median,
                "min_ms": 1000 * timing.least,
                "max_ms": 1000 * max(timing.seconds),
                "tokens_per_second": tokens / timing.median,
            }
            for label, timing in timings.items()
        ],
        "overhead": overheads,
    }


def read(arguments: list[str], device: torch.device, folder: str) -> Recipe:
    """The recipe as ``switchkit fit`` would build it, on one device, its module moved there."""
    place = [
        f"--trainer.accelerator={'gpu' if device.type == 'cuda' else device.type}",
        f"--trainer.devices={[device.index or 0] if device.type == 'cuda' else 1}",
        f"--trainer.default_root_dir={folder}",
        "--trainer.logger=false",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
    ]
    built = build([*arguments, *place])
    module, trainer = built.model, built.trainer
    if not isinstance(module, LanguageModule):
        raise UserError(f"--recipe: expected the recipe of a LanguageModule; this one trains a {type(module).__name__}")
    if isinstance(module.net, EncoderDecoder):
        raise UserError("--recipe: expected the recipe of a decoder; the model of this one is an EncoderDecoder")
    if trainer.accumulate_grad_batches != 1 or trainer.precision not in ("32-true", "bf16-mixed"):
        raise UserError(
            "--recipe: only steps of one batch in precision 32-true or bf16-mixed are measured; the recipe has "
            f"accumulate_grad_batches {trainer.accumulate_grad_batches} and precision {trainer.precision}"
        )
    module.train()
    return Recipe(module.to(device), built.datamodule, trainer, device)


def twin_of(name: str, module: LanguageModule) -> list[str]:
    """The arguments of the dense twin: the recipe of that name with ``_dense``, else the same with `dense_spec`.

    Raises:
        UserError, ValueError: a dense model, one without a twin of equal FLOPs.
    """
    if not module.sparse_layers:
        raise UserError(f"--recipe {name}: this model is dense; give a recipe with sparse layers")
    path = Path(found_recipe(name))
    beside = path.with_name(f"{path.stem}_dense{path.suffix}")
    if beside.is_file():
        return ["--config", str(beside)]
    net: Any = module.net
    dense = dense_spec(module.spec, vocab_size=net.vocab_size)["init_args"]["net"]
    return ["--config", str(path), f"--model.net={json.dumps(dense)}", "--model.moe=null", "--model.losses=[]"]


def found_recipe(name: str) -> str:
    """The path of a recipe that ``--recipe`` names."""
    return str(find_config(name, "--recipe "))


def pool(recipe: Recipe, device: torch.device) -> list[dict[str, Tensor]]:
    """The first batches of a recipe, on the device."""
    recipe.data.prepare_data()
    recipe.data.setup("fit")
    batches = itertools.islice(recipe.data.train_dataloader(), POOL)
    return [{name: part.to(device) for name, part in batch.items()} for batch in batches]

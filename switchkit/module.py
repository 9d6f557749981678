"""The LightningModule of language models: one expression holds the whole loss."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import lightning as L
import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

import switchkit
from switchkit import checkpoints, origin
from switchkit.checks import at_least, one_of
from switchkit.data.tokenizers import Tokenizer
from switchkit.generation import continuation
from switchkit.layers import MoEFactory, moe_layers
from switchkit.losses.balance import Balance
from switchkit.losses.base import Loss, LossFactory, built, names_of
from switchkit.metrics import Evaluation, RoutingMetrics, count_targets, cross_entropy, step_stats
from switchkit.models import Decoder, NetFactory, Output
from switchkit.models.inputs import check_inputs
from switchkit.models.order import check_records, listened
from switchkit.optim import (
    OptimizerFactory,
    adamw,
    check_clipping,
    check_optimizer,
    decay_groups,
    last_step,
    learning_rate,
)
from switchkit.parallel.norm import total_norm
from switchkit.parallel.place import state_like
from switchkit.records import Routing
from switchkit.registry import full_path
from switchkit.spec import build, describe, described_data
from switchkit.start import begin, later
from switchkit.step import MicroBatch, NonFiniteError, Seen, Step, gradient_scale, warn_of_groups, weighted_means
from switchkit.step_callback import StepCallback

__all__ = ["LanguageModule"]


class LanguageModule(L.LightningModule):
    """Trains a causal language model with sparse layers.

    The loss is ``cross_entropy + sum(term.weight * term(routings))``; over micro-batches and devices it is the mean of
    theirs, weighted by real targets, whatever padding each holds (see `switchkit.step`). Weight decay spares norms,
    biases, embeddings and routers. The learning rate rises linearly over `warmup_steps`, then falls by a cosine
    towards `final_lr` of its peak at the trainer's last step (or stays).

    `training_step` returns `loss`, which is minimised and holds what this micro-batch weighs in its step, and for
    callbacks, detached and of this device's micro-batch alone: `own_loss`, a mean over its `targets`, and `stats`:
    `load` [L, E], `dropped` [L] (both in assignments), `tokens` [L] (real ones), `bad_tokens` [L] (which a router could
    not score).

    Args:
        net: builds the model, called with `vocab_size=, moe=`; null: `Decoder` with its defaults.
        moe: builds the sparse layers; null: `MoELayer` with its defaults.
        losses: build the terms on the routing records; null: `balance` alone. An empty list: none.
        optimizer: builds the optimizer from parameter groups; null: AdamW, rate 3e-3, betas 0.9 and 0.99, decay 0.1.
        warmup_steps: optimizer steps of the linear rise.
        schedule: "cosine" or "constant" after the rise.
        final_lr: share of the peak rate that the cosine would come to one step after the last.
        tokenizer: the vocabulary, kept in the checkpoint; the command line takes it from the data.
        vocab_size: symbols, where there is no tokenizer, or more than it has (published checkpoints fill the table up
            to a round number).

    Raises:
        ValueError: neither a tokenizer nor vocab_size, fewer symbols than the tokenizer has, values out of range, or a
            part that a checkpoint could not describe (a lambda, a local class). When a run begins: options that the
            optimizer refuses, data that the model cannot read.
    """

    def __init__(
        self,
        net: NetFactory | None = None,
        *,
        moe: MoEFactory | None = None,
        losses: list[LossFactory] | None = None,
        optimizer: OptimizerFactory | None = None,
        warmup_steps: int = 100,
        schedule: Literal["cosine", "constant"] = "cosine",
        final_lr: float = 0.1,
        tokenizer: Tokenizer | None = None,
        vocab_size: int | None = None,
    ) -> None:
        super().__init__()
        at_least(0, warmup_steps=warmup_steps)
        one_of("schedule", schedule, ("cosine", "constant"))
        if not 0 <= final_lr <= 1:
            raise ValueError(f"final_lr is a share of the peak rate, from 0 to 1; got {final_lr}")
        # A checkpoint's description of a tokenizer is a factory, like every part of it.
        self.tokenizer = tokenizer() if isinstance(tokenizer, partial) else tokenizer
        known = None if self.tokenizer is None else self.tokenizer.vocab_size
        size = vocab_size if known is None or vocab_size is not None else known
        if size is None:
            raise ValueError("a language model needs tokenizer= or vocab_size=")
        if known is not None and size < known:
            raise ValueError(f"vocab_size={size} is too small for the tokenizer, which has {known} symbols")
        arguments = {
            "net": net,
            "moe": moe,
            "losses": losses,
            "optimizer": optimizer,
            "warmup_steps": warmup_steps,
            "schedule": schedule,
            "final_lr": final_lr,
            "tokenizer": self.tokenizer,
            # Kept where the tokenizer says the same: the weights stay so many if a smaller vocabulary goes on.
            "vocab_size": vocab_size,
        }
        self.spec = {"class_path": full_path(type(self)), "init_args": describe(arguments, type(self).__name__)}
        self.vocab_size = size
        # Within `later` a model without memory, and what draws its values; a subclass may look at them.
        with later(False) if type(self) is not LanguageModule else nullcontext():
            self.net, self.start = begin(partial(net or Decoder, vocab_size=size, moe=moe))
        self.losses = built([Balance] if losses is None else losses)
        self._loss_names = names_of(self.losses)
        self.optimizer: OptimizerFactory = optimizer or adamw
        self.warmup_steps, self.schedule, self.final_lr = warmup_steps, schedule, final_lr
        self.sparse_layers = [*(layers := moe_layers(self.net))]
        experts = [layer.num_experts for layer in layers.values()]
        shape = len(experts), max(experts, default=0)
        self.train_routing = RoutingMetrics(len(experts), experts)
        self.evaluation = Evaluation(experts)
        self.last_load = torch.zeros(shape)  # of the last validation or test: shares [L, E]
        self.hugging_face: dict[str, Any] = {}  # what the files of an imported model said beside its sizes
        self._step = Step()
        self._heard = False  # whether the records of a run's first batch were held against the layers'

    def setup(self, stage: str) -> None:
        if stage == "fit":
            check_optimizer(self.optimizer)
        data = None if self._trainer is None else self.trainer.datamodule  # type: ignore[attr-defined]
        if stage == "fit" and data is not None and described_data(data) is None:
            rank_zero_warn(
                f"{type(data).__name__} cannot be written into a checkpoint (an argument of it is neither an attribute "
                "of that name nor kept by save_hyperparameters(), or more than numbers, text and parts): commands on "
                "this run's checkpoints need --data again"
            )
        if self._trainer is not None:
            check_inputs(self.net, self.trainer.datamodule)  # type: ignore[attr-defined]
            if self.trainer.precision == "64-true":
                # Lightning does so after it has read a checkpoint, whose weights would have gone through float32.
                self.double()
        self._heard = False
        # What a run left behind that broke off in the middle of a step belongs to no other.
        self._step.clear()
        if stage == "fit" and self._trainer is not None and self.global_step == 0:
            self.train_routing.reset()

    def on_fit_start(self) -> None:
        warn_of_groups(self, self.trainer.world_size)

    # -- steps ---------------------------------------------------------------------------------------------------

    def forward(self, tokens: Int[Tensor, "B S"], **inputs: Tensor) -> Float[Tensor, "B S V"]:
        """Logits of the next token; `inputs` are what else the model takes: valid, an encoder-decoder's source."""
        return self.net(tokens, **inputs).logits

    def _run(self, batch: Mapping[str, Tensor]) -> Output:
        """The model on a batch: an encoder-decoder's has a source.

        Raises:
            ValueError: it returns other than one record for each sparse layer, or, at a run's first batch, in another
                order.
        """
        source = {name: batch[name] for name in ("source", "source_valid") if name in batch}
        call = self.net if self._heard else partial(listened, self.net)
        out: Output = call(batch["tokens"], batch.get("valid"), **source)
        check_records(self.net, self.sparse_layers, out.routings)
        self._heard = True
        return out

    def training_step(self, batch: Mapping[str, Tensor], index: int) -> dict[str, Any]:
        out, learned, named = self._learn(batch)
        found = step_stats(out.routings, learned)
        targets = count_targets(batch["targets"], batch.get("valid"))
        if self._trainer is None:
            self._step.clear()  # called by hand, each is a step of its own
        micro = self._seen(Seen(targets, found["load"], found["tokens"], found["bad_tokens"]))
        terms = [self._term(term, out.routings).to(learned.device) for term in self.losses]
        routing = sum((t.weight * x for t, x in zip(self.losses, terms, strict=True)), learned.new_zeros(()))
        loss = learned + routing
        own_loss = loss.detach()
        self.train_routing.update(found)
        named_terms = dict(zip(self._loss_names, terms, strict=True))
        weights = self._step.add(micro, {"loss": learned, **named}, {"loss": routing, **named_terms})
        if weights is not None:
            loss = weights[0] * learned + weights[1] * routing
        return {"loss": loss, "own_loss": own_loss, "targets": targets, "stats": found}

    def _learn(self, batch: Mapping[str, Tensor]) -> tuple[Output, Float[Tensor, ""], dict[str, Tensor]]:
        """The model on a batch, what is minimised beside the terms on its records, and what of it is logged.

        Both are means over the real targets of the batch.
        """
        out = self._run(batch)
        total, tokens = cross_entropy(out.logits, batch["targets"], batch.get("valid"))
        entropy = total / tokens.clamp(min=1)
        return out, entropy, {"cross_entropy": entropy}

    def _seen(self, own: Seen) -> MicroBatch:
        """A micro-batch, counted over all devices, and for what reads the counts of the step."""
        devices = 1 if self._trainer is None else self.trainer.world_size
        micro = MicroBatch(own, own if devices == 1 else own.everywhere(), devices)
        if self._step_callbacks() or any(term.scope != "micro" for term in self.losses):
            self._step.count(micro)
        return micro

    def _term(self, term: Loss, routings: tuple[Routing, ...]) -> Tensor:
        """One loss on the records, with the counts of its scope where that is more than the micro-batch."""
        load = None if term.scope == "micro" else self._step.load(term.scope)
        value = term(routings) if load is None else term(routings, load)  # type: ignore[call-arg]
        if not isinstance(value, Tensor) or value.dim():
            got = list(value.shape) if isinstance(value, Tensor) else value
            raise ValueError(f"the loss {type(term).__name__} must return a tensor without dimensions; got {got}")
        return value

    def validation_step(self, batch: Mapping[str, Tensor], index: int) -> None:
        self.evaluation.update(self._run(batch), batch)

    test_step = validation_step

    def predict_step(self, batch: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
        """`nats` [B, S]: the surprise of each real target (0 for padding); `best` [B, S]: the likeliest token."""
        logits = self._run(batch).logits
        nats = F.cross_entropy(logits.flatten(0, 1).float(), batch["targets"].flatten(), reduction="none")
        nats = nats.view_as(batch["targets"])
        if batch.get("valid") is not None:
            nats = nats.masked_fill(~batch["valid"], 0)
        found = {"nats": nats, "best": logits.argmax(-1), "targets": batch["targets"]}
        return found if batch.get("valid") is None else {**found, "valid": batch["valid"]}

    def on_validation_start(self) -> None:
        # One that broke off left its counts.
        self.evaluation.reset()

    on_test_start = on_validation_start

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    def _log_evaluation(self, stage: str) -> None:
        values = {f"{stage}/{name}": value for name, value in self.evaluation.compute().items()}
        # The metrics are summed over ranks already, and the mean of equal numbers is that number.
        self.log_dict(values, sync_dist=True)
        if not self.trainer.sanity_checking:
            self.last_load = self.evaluation.routing.compute()["load"].cpu()
        self.evaluation.reset()

    def _log_training(self) -> None:
        """Straight to the loggers, and at the interval only: `self.log` costs a quarter of a millisecond a key."""
        numbers = weighted_means(self._step.batches)
        numbers["grad_norm"] = total_norm(self.parameters())  # before it is clipped
        numbers["lr"] = torch.as_tensor(self.trainer.optimizers[0].param_groups[0]["lr"])
        if self.sparse_layers:
            routing = self.train_routing.compute()
            numbers |= {"imbalance": routing["imbalance"].max(), "dropped": routing["dropped"].mean()}
        self.train_routing.reset()
        for logger in self.loggers:
            logger.log_metrics({f"train/{name}": float(x) for name, x in numbers.items()}, step=self.global_step)

    # -- optimisation --------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        decay, spare = decay_groups(self)
        optimizer = self.optimizer([{"params": decay}, {"params": spare, "weight_decay": 0.0}])
        check_clipping(optimizer, self.trainer.precision, self.trainer.gradient_clip_val)
        steps = last_step(self.trainer)
        if not math.isfinite(steps):
            if self.schedule != "constant":
                raise ValueError(
                    f"schedule {self.schedule!r} ends with the run, and this run has no last step: set the Trainer's "
                    "max_steps or max_epochs, or schedule 'constant'"
                )
            steps = 0  # which a constant rate does not read
        rate = partial(learning_rate, self.warmup_steps, int(steps), self.schedule, self.final_lr)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """One flag read per optimizer step, after the backward pass is on its way.

        Raises:
            NonFiniteError: a router was given NaN or infinity, or the loss is one; the weights are still good.
        """
        if not self._step.batches:
            return  # a subclass has a training_step of its own
        bad = self._step.bad()
        accumulate = self.trainer.accumulate_grad_batches
        scale = gradient_scale(self._step.batches, accumulate)
        wrong, factor = torch.stack([bad.sum() + self._step.broken(), scale.double()]).tolist()
        if wrong:
            where = [f"{name}: {n} tokens" for name, n in zip(self.sparse_layers, bad.tolist(), strict=True) if n]
            what = f"router input ({'; '.join(where)})" if where else "loss"
            raise NonFiniteError(
                f"non-finite {what} at step {self.global_step + 1}; the optimizer did not step and "
                f"{self._last_good()}. Lower the learning rate, or look at the data of that step"
            )
        if accumulate > 1 and factor != 1:
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (self.global_step + 1) % every == 0:
            self._log_training()
        self._step.batches.clear()

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        """The optimizer's step, then what callbacks do with its counts."""
        super().optimizer_step(*arguments, **options)
        counts = self._step.take_counts()
        if counts is not None:
            for callback in self._step_callbacks():
                callback.after_optimizer_step(self.trainer, self, counts[:, :-1], counts[:, -1])

    def _step_callbacks(self) -> list[StepCallback]:
        callbacks = [] if self._trainer is None else self.trainer.callbacks  # type: ignore[attr-defined]
        return [callback for callback in callbacks if isinstance(callback, StepCallback)]

    def _last_good(self) -> str:
        paths = [getattr(callback, "path", None) for callback in self.trainer.checkpoint_callbacks]
        saved = [path for path in paths if path is not None and path.exists()]
        newest = max(saved, key=lambda path: path.stat().st_mtime, default=None)
        return "nothing was saved yet" if newest is None else f"the last good checkpoint is {newest}"

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids that end a text: the tokenizer's, where it has one, or those of the files that were imported."""
        own = None if self.tokenizer is None else self.tokenizer.eos_id
        size = self.vocab_size if self.tokenizer is None else self.tokenizer.vocab_size
        return origin.end_ids(self.hugging_face, size) if own is None else (own,)

    @property
    def begin_ids(self) -> tuple[int, ...]:
        """What an imported decoder was trained to find before each text, as transformers' tokenizer puts it; or none.

        `generate` takes ids as they are; the command puts these before a prompt.
        """
        return origin.begin_ids(self.hugging_face, self.tokenizer, self.end_ids)

    # -- generation ----------------------------------------------------------------------------------------------

    def generate(
        self,
        ids: Int[Tensor, "S"],
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        num_beams: int = 1,
        length_penalty: float = 0.6,
        eos_id: int | Sequence[int] | None = None,
        use_cache: bool = True,
        generator: torch.Generator | None = None,
    ) -> Iterator[int]:
        """New token ids one by one, in evaluation mode while one is computed; see `switchkit.generation.stream`.

        `ids` is the prompt, and what an encoder-decoder reads. `eos_id`, or any of several (None: `end_ids`), ends the
        text and is left out; only ids that the tokenizer has are taken. With `num_beams` above 1 all come when
        the search is over, see `switchkit.generation.generate`.

        Raises:
            ValueError: an empty prompt, a negative temperature (0 takes the likeliest), top_k below 1, top_p outside
                (0, 1], beam search with options of drawing.
        """
        return continuation(
            self.net,
            ids.to(self.device),
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            num_beams=num_beams,
            length_penalty=length_penalty,
            eos_id=self.end_ids if eos_id is None else eos_id,
            use_cache=use_cache,
            symbols=None if self.tokenizer is None else self.tokenizer.vocab_size,
            generator=generator,
        )

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        data = self._trainer.datamodule if self._trainer is not None else None  # type: ignore[attr-defined]
        source = data.source_info() if data is not None and hasattr(data, "source_info") else None
        checkpoint["switchkit"] = {
            "format_version": checkpoints.FORMAT_VERSION,
            "version": switchkit.__version__,
            "model": self.spec,
            "data": None if data is None else described_data(data),
            "source": source,
            **({"hugging_face": self.hugging_face} if self.hugging_face else {}),
            "train_routing": self._counted_since_log(),
        }
        if (counts := self._step.saved()) is not None:
            checkpoint["switchkit"]["step_counts"] = counts

    def _counted_since_log(self) -> dict[str, Tensor]:
        """The interval metric, over all devices: this hook runs on each of them, and one file is written."""
        found = {name: torch.as_tensor(value).clone() for name, value in self.train_routing.metric_state.items()}
        if self._trainer is not None and self.trainer.world_size > 1:
            for value in found.values():
                dist.all_reduce(value)
        return {name: value.cpu() for name, value in found.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoints.check_ours(checkpoint)
        fits = self._trainer is not None and self.trainer.state.fn == "fit"
        if fits and "optimizer_states" not in checkpoint:
            path = self.trainer.ckpt_path or "this checkpoint"
            raise ValueError(
                f"{path} has weights alone, from which no run can go on: begin a new one with --init_from {path}, or "
                "load_state_dict in code"
            )
        ours = checkpoint["switchkit"]
        data = None if self._trainer is None else self.trainer.datamodule  # type: ignore[attr-defined]
        origin.tell_of_another_text(ours, data)
        self.hugging_face = origin.carried(ours, self.tokenizer)
        # What was counted on all devices goes on from the first of them.
        first = self._trainer is None or self.global_rank == 0
        for name, value in ours.get("train_routing", {}).items():
            setattr(
                self.train_routing, name, value.to(self.device) if first else torch.zeros_like(value).to(self.device)
            )
        counts = ours.get("step_counts")
        if counts is not None:
            self._step.restore(counts.to(self.device), first)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's; of whole tensors a sharded model takes its parts.

        Raises:
            ValueError: `state_dict` belongs to another model.
        """
        if self.start is not None and not assign:
            raise ValueError(
                "this model was built without memory (init_module(empty_init=True)), and has no place for weights yet: "
                "build it without empty_init, or give the Trainer ckpt_path"
            )
        self.start = None
        if strict:
            checkpoints.check_weights(state_dict, self.state_dict())
        return super().load_state_dict(state_like(state_dict, self), strict=strict, assign=assign)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: Any,
        map_location: str | torch.device | None = None,
        *,
        strict: bool = True,
        weights_only: bool | None = None,
        **arguments: Any,
    ) -> Self:
        """The model of a checkpoint, rebuilt from the file alone; `arguments` replace the constructor's own.

        Nothing is imported because a file names it, and nothing but plain data is read, whatever `weights_only` says.

        Args:
            checkpoint_path: a file, or a folder that several devices wrote.
            map_location: the device of the model; None: the CPU.
            strict: False: weights that the model lacks are left out, and those that the file lacks are fresh.
            weights_only: for Lightning's sake.

        Raises:
            ValueError: see `switchkit.checkpoints.read`; a part of your own that is not imported yet; weights that do
                not fit `arguments`; a map_location that is no device.
        """
        if not isinstance(map_location, str | torch.device | None):
            raise ValueError(f"map_location must be a device, such as 'cuda:0'; got {map_location!r}")
        content = checkpoints.read(Path(checkpoint_path))
        factory = build(content["switchkit"]["model"])
        if not issubclass(factory.func, cls):
            raise ValueError(f"{checkpoint_path} holds a {full_path(factory.func)}, which is no {cls.__name__}")
        with later(False):
            module = factory(**arguments)
        module.load_state_dict(content["state_dict"], strict=strict)
        module.on_load_checkpoint(content)
        return module.to(map_location or "cpu")

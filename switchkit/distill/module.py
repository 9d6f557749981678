"""The LightningModule that trains a student by a teacher."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from jaxtyping import Float
from torch import Tensor

from switchkit.checks import at_least, finite_above, one_of
from switchkit.data.base import ResumableData
from switchkit.data.tokenizers import Tokenizer
from switchkit.distill.agreement import FAMILIES, check_stored, check_vocabulary, family, short_path, twin_of
from switchkit.distill.evaluation import evaluate
from switchkit.distill.loss import Distilled, TopK, distillation_loss
from switchkit.distill.matching import Matching
from switchkit.distill.stored import StoredTeacher, is_stored
from switchkit.distill.student import Inherited, Init, inherit, inherit_experts
from switchkit.distill.teacher import Precision, Teacher, open_teacher
from switchkit.layers import MoEFactory
from switchkit.losses.base import LossFactory
from switchkit.models import NetFactory, Output
from switchkit.module import LanguageModule
from switchkit.optim import OptimizerFactory
from switchkit.origin import carried
from switchkit.registry import full_path
from switchkit.spec import build, describe

__all__ = ["DistillModule"]

INIT_BATCHES = 16
MEASURES_NOTHING = ("fresh", "non_expert")


class DistillModule(LanguageModule):
    """Trains a student to do as a teacher does, and as the text says.

    The loss is ``(1 - alpha) cross_entropy + alpha T^2 KL(teacher || student)`` over the real tokens (see
    `distillation_loss`), the optional terms of `Matching`, and those of the student's own sparse layers. The teacher is
    frozen, in evaluation mode and dropless; it is no part of the module's state, and moves to the device of the data.

    A checkpoint of the run holds the student alone, as a `LanguageModule`: whatever reads one reads it, and needs no
    teacher. What it takes to go on distilling is beside it, and a run goes on with the very same teacher only.

    Args:
        net: builds the student; null: the teacher's dense twin of equal FLOPs per token.
        teacher: a checkpoint of any switchkit model; a folder that ``switchkit prepare --teacher`` wrote, which takes
            the model's place; or in code a `LanguageModule`, which is copied.
        alpha: share of the teacher's part of the loss; 0.25 is the paper's. 0 is plain training, which asks no teacher.
        temperature: T, of both distributions in the divergence.
        init: how the student begins: "fresh"; "non_expert", with the teacher's weights outside sparse layers, as in the
            paper; or with these and, in place of each mixture, one layer made of its experts: their "mean", their mean
            by "usage", the "most_used" one, or their mean by usage once their hidden units are "aligned". Those measure
            the teacher on training batches first.
        init_batches: how many.
        teacher_precision: "bf16" keeps the teacher in bfloat16, in half the memory; null: float32, or as a given module
            is.
        hidden_weight: of the match of hidden states; 0: none.
        hidden_layers: pairs of a student's and a teacher's block, by number; null: evenly over the depth.
        attention_weight: of the match of relations in the last blocks' attention; 0: none.
        relation_heads: heads of these relations; null: the student's.
        moe: builds the student's sparse layers, where it has any; null: `MoELayer` with its defaults.
        losses: terms on the student's sparse layers; null: none for the twin, `balance` for a student of your own.
        optimizer: null: the teacher's, as its checkpoint has it.
        warmup_steps: optimizer steps of the linear rise; null: the teacher's.
        schedule: "cosine" or "constant"; null: the teacher's.
        final_lr: share of the peak rate at the end; null: the teacher's.
        tokenizer: the vocabulary, which must be the teacher's; the command line takes it from the data.
        vocab_size: symbols; null: as many as the teacher's logits have.

    Raises:
        ValueError: no teacher, one of another vocabulary or family than the student; a dense one without `net`; values
            out of range, or of an option that does nothing beside the others.

    Source: Hinton et al., arXiv 1503.02531; Fedus et al., arXiv 2101.03961, section 4.2 and Table 6.
    """

    def __init__(
        self,
        net: NetFactory | None = None,
        *,
        teacher: Any = None,
        alpha: float = 0.25,
        temperature: float = 1.0,
        init: Init = "non_expert",
        init_batches: int = INIT_BATCHES,
        teacher_precision: Precision | None = None,
        hidden_weight: float = 0.0,
        hidden_layers: list[list[int]] | None = None,
        attention_weight: float = 0.0,
        relation_heads: int | None = None,
        moe: MoEFactory | None = None,
        losses: list[LossFactory] | None = None,
        optimizer: OptimizerFactory | None = None,
        warmup_steps: int | None = None,
        schedule: Literal["cosine", "constant"] | None = None,
        final_lr: float | None = None,
        tokenizer: Tokenizer | None = None,
        vocab_size: int | None = None,
    ) -> None:
        if teacher is None:
            raise ValueError("a student needs a teacher: teacher=, the path of a checkpoint or a LanguageModule")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha is the teacher's share of the loss, from 0 to 1; got {alpha}")
        finite_above(0, temperature=temperature)
        one_of("init", init, get_args(Init))
        at_least(1, init_batches=init_batches)
        if init in MEASURES_NOTHING and init_batches != INIT_BATCHES:
            raise ValueError(
                f"init_batches {init_batches} does nothing with init {init!r}, which measures nothing: take init "
                "'mean', 'usage', 'most_used' or 'aligned', or leave init_batches out"
            )
        asked: Teacher | StoredTeacher
        if isinstance(teacher, (str, Path)) and is_stored(teacher):
            asked = StoredTeacher(teacher)
            check_stored(asked, temperature, init, hidden_weight or attention_weight, teacher_precision)
        else:
            asked = open_teacher(teacher, teacher_precision, cast=False)
        before = build(asked.spec).keywords
        given = tokenizer() if callable(tokenizer) else tokenizer
        check_vocabulary(given, asked)
        size = asked.vocab_size if vocab_size is None else vocab_size
        if size != asked.vocab_size:
            raise ValueError(f"vocab_size {size}: the teacher's logits have {asked.vocab_size} symbols; leave it out")
        own = net if net is not None else twin_of(asked, size)
        super().__init__(
            own,
            moe=moe,
            losses=[] if losses is None and net is None else losses,
            optimizer=optimizer if optimizer is not None else before.get("optimizer"),
            warmup_steps=before.get("warmup_steps", 100) if warmup_steps is None else warmup_steps,
            schedule=before.get("schedule", "cosine") if schedule is None else schedule,
            final_lr=before.get("final_lr", 0.1) if final_lr is None else final_lr,
            tokenizer=given if given is not None else asked.tokenizer,
            vocab_size=size,
        )
        # The ends and the beginning of a text are the vocabulary's, which is the teacher's.
        self.hugging_face = carried({"model": asked.spec, "hugging_face": asked.hugging_face}, self.tokenizer)
        shape = asked.net
        if (mine := family(self.net)) != (other := family(shape)):
            raise ValueError(
                f"the teacher is {FAMILIES[other]} and the student {FAMILIES[mine]}: they read different "
                "batches. Leave net out for the teacher's dense twin, or give one of its family"
            )
        self.alpha, self.temperature, self.init, self.init_batches = alpha, temperature, init, init_batches
        options = {
            "hidden_weight": hidden_weight,
            "hidden_layers": hidden_layers,
            "attention_weight": attention_weight,
            "relation_heads": relation_heads,
        }
        self.matching = Matching(self.net, shape, **options)  # type: ignore[arg-type]
        # In a tuple, where no hook of torch or Lightning finds it.
        self._asked = (asked,)
        self.inherited = inherit(self.net, asked.outside()) if init != "fresh" else Inherited()
        self._begun = False
        if init in MEASURES_NOTHING:
            self._begin()
        own_options = {"alpha": alpha, "temperature": temperature, "init": init, "init_batches": init_batches}
        self.resume_spec = {
            "class_path": full_path(type(self)),
            "init_args": {
                **self.spec["init_args"],
                **describe({**own_options, "teacher_precision": teacher_precision, **options}, type(self).__name__),
                "teacher": asked.about["path"],
            },
        }
        self.spec = {**self.spec, "class_path": full_path(LanguageModule)}

    @property
    def teacher(self) -> Teacher | StoredTeacher:
        """The model that is asked, or what it said."""
        return self._asked[0]

    # -- how it begins -------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        super().setup(stage)
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, ResumableData) and isinstance(self.teacher, StoredTeacher) and self.alpha:
            data.attach = self.teacher.attach
        if stage == "fit" and not self._begun:
            if not hasattr(data, "train_loader"):
                raise ValueError(
                    f"init {self.init!r} measures the teacher on training batches: fit with a data module of "
                    "switchkit, or call initialize(batches) before"
                )
            loader = data.train_loader(rank=0, world_size=1)
            batches = [batch for _, batch in zip(range(self.init_batches), loader, strict=False)]
            self.initialize(batches)

    def teardown(self, stage: str) -> None:
        super().teardown(stage)
        if isinstance(data := self.trainer.datamodule, ResumableData):  # type: ignore[attr-defined]
            data.attach = None

    def initialize(self, batches: Sequence[Mapping[str, Tensor]]) -> None:
        """Make the layers in place of mixtures of the teacher's experts, as `init` says, measured on some batches.

        `fit` does this by itself, once, unless weights were loaded.

        Raises:
            ValueError: `init` makes nothing of experts, or the experts cannot be merged into the student's layers.
        """
        assert isinstance(self.teacher, Teacher)
        self.inherited = inherit_experts(self.net, self.teacher.module, self.init, batches, self.inherited)
        self._begin()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        found = super().load_state_dict(state_dict, strict=strict, assign=assign)
        self._begin()
        return found

    def _begin(self) -> None:
        """The student has its weights, so the teacher's are no longer needed as the file has them."""
        self._begun = True
        if isinstance(self.teacher, Teacher):
            self.teacher.cast()

    # -- training ------------------------------------------------------------------------------------------------

    def _run(self, batch: Mapping[str, Tensor]) -> Output:
        self._check_kind(batch)
        return super()._run(batch)

    def _check_kind(self, batch: Mapping[str, Tensor]) -> None:
        own = family(self.net)
        if ("source" in batch) != (own == "encoder_decoder"):
            raise ValueError(
                f"the teacher and the student are {own.replace('_', '-')}s, and the data are for the other kind of "
                "model (batches with a source are an encoder-decoder's): give data of the teacher's kind"
            )

    def _learn(self, batch: Mapping[str, Tensor]) -> tuple[Output, Float[Tensor, ""], dict[str, Tensor]]:
        if not self.alpha and not self.matching.active:
            return super()._learn(batch)
        self._check_kind(batch)
        teacher = self.teacher
        if isinstance(teacher, StoredTeacher):
            out = self._run(batch)
            found = self._compared(out.logits, teacher.lookup(batch), batch)
            return out, found.loss, {"cross_entropy": found.cross_entropy, "divergence": found.divergence}
        ours, theirs = self.matching.watch(self.net, teacher.net)
        with theirs as within:
            logits = teacher(batch).logits
        with ours as seen:
            out = self._run(batch)
        found = self._compared(out.logits, logits, batch)
        terms = self.matching(seen, within, batch)
        loss = found.loss + self.matching.weighted(terms)
        return out, loss, {"cross_entropy": found.cross_entropy, "divergence": found.divergence, **terms}

    def _compared(self, logits: Tensor, teacher: Tensor | TopK, batch: Mapping[str, Tensor]) -> Distilled:
        options = {"alpha": self.alpha, "temperature": self.temperature}
        return distillation_loss(logits, teacher, batch["targets"], batch.get("valid"), **options)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        ours = checkpoint["switchkit"]
        ours["resume"] = self.resume_spec
        ours["teacher"] = dict(self.teacher.about)
        ours["projections"] = self.matching.extra()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        ours = checkpoint.get("switchkit", {})
        was = ours.get("teacher")
        if was is not None and was["sha256"] != self.teacher.about["sha256"]:
            raise ValueError(
                f"the run was distilled from {was['path'] or 'a module'} (step {was['step']}), and "
                f"{self.teacher.about['path'] or 'the given teacher'} (step {self.teacher.about['step']}) has other "
                "weights: resume with the same teacher, or begin a new run with --init_from"
            )
        if was is not None:
            self.matching.load_extra(ours.get("projections", {}))

    # -- what is told --------------------------------------------------------------------------------------------

    def opening_rows(self) -> list[tuple[str, str]]:
        """For the table before training."""
        about = self.teacher.about
        where = "a module" if about["path"] is None else short_path(about["path"])
        rows = [("teacher", f"{where}, step {about['step']:,}, {self.teacher.parameters:,} parameters")]
        begin = str(self.inherited) if self.inherited.copied else "fresh"
        later = "" if self._begun else f"; those in place of mixtures become the experts' {self.init}"
        rows.append(("student begins", begin + later))
        share = f"{1 - self.alpha:g} cross-entropy + {self.alpha:g} divergence at temperature {self.temperature:g}"
        return [*rows, ("learns from", share)]

    def closing_rows(self, batches: Iterable[Mapping[str, Tensor]], loss: float) -> list[tuple[str, str]]:
        """For the table after it: the teacher on the batches that gave the student this loss, and the compression."""
        own, other = sum(parameter.numel() for parameter in self.net.parameters()), self.teacher.parameters
        smaller = ("compression", f"{own:,} parameters of {other:,}: {1 - own / other:.1%} less")
        if isinstance(self.teacher, StoredTeacher):
            return [smaller]
        self.teacher.to(self.device)
        found = evaluate(self.teacher.net, batches)
        return [
            ("teacher", f"{found.loss:.4f} nats per token; the student is {abs(loss - found.loss):.4f} "
             f"{'above' if loss > found.loss else 'below'} it"),
            smaller,
        ]  # fmt: skip

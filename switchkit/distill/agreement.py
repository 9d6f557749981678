"""What a student and its teacher must agree on, and what follows from the teacher alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from switchkit.checks import one_of
from switchkit.data.tokenizers import Tokenizer
from switchkit.distill.stored import StoredTeacher
from switchkit.distill.teacher import Precision, Teacher
from switchkit.models import NetFactory
from switchkit.spec import build
from switchkit.twins import dense_spec

__all__ = ["FAMILIES", "check_stored", "check_vocabulary", "family", "short_path", "twin_of"]

FAMILIES = {"decoder": "a decoder", "encoder_decoder": "an encoder-decoder"}


def family(net: Any) -> str:
    """What kind of batches a model reads."""
    return "encoder_decoder" if hasattr(net, "start_id") else "decoder"


def short_path(path: str) -> str:
    """Below the working directory, without it."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return path


def check_stored(
    teacher: StoredTeacher, temperature: float, init: str, matched: float, precision: Precision | None
) -> None:
    """Refuses what only a teacher that is there can do."""
    where, own = teacher.folder, teacher.index.temperature
    if one_of("teacher_precision", precision, (None, "bf16")) is not None:
        raise ValueError(
            f"teacher_precision {precision!r} does nothing with {where}, which has its words only: leave it out, or "
            "give the teacher's checkpoint"
        )
    if temperature != own:
        raise ValueError(
            f"{where} was written at temperature {own:g}, and the student would learn at {temperature:g}: set "
            f"temperature to {own:g}, or write it again with --temperature {temperature:g}"
        )
    if init not in ("fresh", "non_expert"):
        raise ValueError(
            f"init {init!r} needs the teacher's experts, and {where} has its words only: give its checkpoint"
        )
    if matched:
        raise ValueError(f"hidden states and attention are not in {where}: give the teacher's checkpoint to match them")


def check_vocabulary(given: Tokenizer | None, teacher: Teacher | StoredTeacher) -> None:
    """Refuses data of other symbols than the teacher's."""
    if given is None or teacher.tokenizer is None:
        if given is not None and given.vocab_size > teacher.vocab_size:
            raise ValueError(
                f"the data's vocabulary has {given.vocab_size} symbols, the teacher's logits {teacher.vocab_size}: "
                "distil on data of the teacher's vocabulary"
            )
        return
    if given != teacher.tokenizer:
        raise ValueError(
            f"the teacher reads another vocabulary ({_told(teacher.tokenizer)}) than the data have ({_told(given)}), "
            "so its distribution is over other symbols: leave data.tokenizer out, or give data written with the "
            "teacher's"
        )


def _told(tokenizer: Tokenizer) -> str:
    return f"{type(tokenizer).__name__} of {tokenizer.vocab_size} symbols"


def twin_of(teacher: Teacher | StoredTeacher, vocab_size: int) -> NetFactory:
    """The student that follows from a teacher: its dense twin."""
    try:
        spec = dense_spec(teacher.spec, vocab_size=vocab_size)
    except ValueError as error:
        raise ValueError(f"no student follows from this teacher by itself ({error}); give net") from error
    factory: NetFactory = build(spec["init_args"]["net"])
    return factory

"""Writing down what a teacher says of every training example, so that it need not be there to train a student."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from switchkit.checks import finite_above, one_of
from switchkit.data.base import ResumableData
from switchkit.data.shard_index import dtype_for
from switchkit.data.shard_writer import new_folder
from switchkit.distill.loss import TopK
from switchkit.distill.stored import FILES, INDEX, StoredIndex, digests
from switchkit.distill.teacher import Teacher
from switchkit.models.base import uncacheable
from switchkit.spec import describe_object

__all__ = ["store", "top_k"]


def top_k(logits: Tensor, k: int, temperature: float = 1.0) -> TopK:
    """The K likeliest symbols of logits [B, S, V] at a temperature, and the log of the mass of all others."""
    logs = torch.log_softmax(logits.float() / temperature, -1)
    kept, ids = logs.topk(k, -1)
    return TopK(kept, ids, logs.scatter(-1, ids, -torch.inf).logsumexp(-1))


def store(
    teacher: Teacher,
    data: ResumableData,
    out: str | Path,
    *,
    k: int,
    temperature: float = 1.0,
    dtype: Literal["float16", "float32"] = "float16",
    device: str | torch.device = "cpu",
    told: Callable[[int, int], Any] = lambda done, total: None,
) -> StoredIndex:
    """Ask a teacher of every training example of some data, and write the folder that a student learns from.

    Every token takes k logarithms of probabilities and ids and one more logarithm: at k 64 in float16 with a vocabulary
    of up to 65,536 symbols 258 bytes. What a decoder says of a token depends on where its window begins, so the data
    must have examples that can be numbered: pairs, or windows at a stride, with holes that are known beforehand.

    Args:
        teacher: who is asked, in the precision that it has.
        data: set up for "fit".
        out: a folder that is not there yet; it appears whole or not at all.
        k: symbols kept, up to the vocabulary.
        temperature: of the distributions; a student must learn at the same.
        dtype: of the logarithms; float16 has 11 bits.
        device: where the teacher computes.
        told: called with the examples done and all of them.

    Raises:
        ValueError: data without numbered examples, a teacher whose words on one example depend on others, a value out
            of range, a folder that is there already.
    """
    if not 1 <= k <= teacher.vocab_size:
        raise ValueError(f"k must be from 1 to {teacher.vocab_size}, the symbols of the vocabulary; got {k}")
    finite_above(0, temperature=temperature)
    one_of("dtype", dtype, ("float16", "float32"))
    if (why := uncacheable(teacher.net)) is not None:
        raise ValueError(f"this teacher's words on an example depend on what is beside it ({why}): distil from it live")
    if not hasattr(data, "examples"):
        raise ValueError(
            f"the examples of {type(data).__name__} have no numbers, so that nothing can be written down for them: "
            "distil from the teacher's checkpoint"
        )
    examples = data.examples()
    size = data.eval_batch_size
    batches = [torch.arange(begin, min(begin + size, len(examples))) for begin in range(0, len(examples), size)]
    offsets = np.zeros(len(examples) + 1, dtype=np.int64)
    for index in batches:
        offsets[index.numpy() + 1] = _real(examples.batch(index)).sum(1).numpy()
    offsets = offsets.cumsum()
    tokens = int(offsets[-1])
    with new_folder(Path(out).expanduser()) as folder:

        def array(name: str, kind: str, *shape: int) -> Any:
            return np.lib.format.open_memmap(folder / name, mode="w+", dtype=np.dtype(kind), shape=shape)

        ids_dtype = dtype_for(teacher.vocab_size)
        log_probs, ids = array(FILES[0], dtype, tokens, k), array(FILES[1], ids_dtype, tokens, k)
        log_rest, marks = array(FILES[2], dtype, tokens), array(FILES[4], "uint64", len(examples))
        for index in batches:
            batch = examples.batch(index)
            here = {name: value.to(device) for name, value in batch.items()}
            found, real = top_k(teacher(here).logits, k, temperature), _real(batch).to(device)
            place = slice(int(offsets[index[0]]), int(offsets[index[-1] + 1]))
            log_probs[place] = found.log_probs[real].cpu().numpy()
            ids[place] = found.ids[real].cpu().numpy()
            log_rest[place] = found.log_rest[real].cpu().numpy()
            marks[index.numpy()] = digests(batch)
            told(int(index[-1]) + 1, len(examples))
        for part in (log_probs, ids, log_rest, marks):
            part.flush()
        np.save(folder / FILES[3], offsets)
        torch.save({name: value.detach().cpu() for name, value in teacher.outside().items()}, folder / FILES[5])
        written = StoredIndex(
            k=k,
            vocab_size=teacher.vocab_size,
            temperature=temperature,
            examples=len(examples),
            tokens=tokens,
            parameters=teacher.parameters,
            teacher=teacher.about,
            model=teacher.spec,
            data=describe_object(data),
            bytes={name: (folder / name).stat().st_size for name in FILES},
            hugging_face=teacher.hugging_face,
        )
        (folder / INDEX).write_text(written.to_json(), encoding="utf-8")
    return written


def _real(batch: dict[str, Tensor]) -> Tensor:
    valid = batch.get("valid")
    return torch.ones_like(batch["targets"], dtype=torch.bool) if valid is None else valid

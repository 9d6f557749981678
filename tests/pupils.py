"""Teachers and students at the smallest sizes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from small import NET, data, whole_file

from switchkit import (
    ByteTokenizer,
    DistillModule,
    EncoderDecoder,
    Factor,
    LanguageModule,
    MoELayer,
    PairData,
    RouterZ,
    Switch,
)
from switchkit.interop.files import save_checkpoint

MOE = partial(MoELayer, router=partial(Switch, jitter=0.1), capacity=partial(Factor, train=1.25, eval=0.5))
T5 = partial(EncoderDecoder, d_model=16, encoder_layers=2, num_heads=2, d_ff=24, num_experts=3, sparse=[1], dropout=0.1)


def teacher(folder: Path, **more: Any) -> LanguageModule:
    """A decoder with jitter, dropout and a capacity that binds in evaluation too, untrained, in a file."""
    torch.manual_seed(5)
    given = {"net": NET, "moe": MOE, "losses": [RouterZ], "tokenizer": data(folder).tokenizer, "warmup_steps": 3}
    module = LanguageModule(**{**given, **more})
    save_checkpoint(module, folder / "teacher.ckpt")
    return module


def student(folder: Path, **more: Any) -> DistillModule:
    torch.manual_seed(0)
    given = {"teacher": folder / "teacher.ckpt", "tokenizer": data(folder).tokenizer}
    return DistillModule(**{**given, **more})


def batch(folder: Path, rows: int = 3, size: int = 8, *, padded: bool = True) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(data(folder).tokenizer.vocab_size, (rows, size + 1), generator=draw)
    valid = torch.ones(rows, size, dtype=torch.bool)
    valid[0, size // 2 :] = False
    found = {"tokens": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous()}
    return {**found, "valid": valid} if padded else found


def pairs(folder: Path, **more: Any) -> PairData:
    """Two dozen lines and their translations."""
    words = ["red", "blue", "cat", "dog", "sun"]
    lines = [f"{words[n % 5]} {words[n * 3 % 5]} {n}" for n in range(24)]
    whole_file(folder / "en.txt", "\n".join(lines) + "\n")
    whole_file(folder / "xx.txt", "\n".join(line[::-1] for line in lines) + "\n")
    return PairData(str(folder / "en.txt"), str(folder / "xx.txt"), batch_size=4, validation_prefix=0, **more)


def t5_teacher(folder: Path) -> LanguageModule:
    torch.manual_seed(5)
    module = LanguageModule(T5, moe=MOE, losses=[RouterZ], tokenizer=ByteTokenizer(), warmup_steps=3)
    save_checkpoint(module, folder / "t5.ckpt")
    return module

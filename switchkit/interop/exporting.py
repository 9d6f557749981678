"""A model of ours as a folder that Hugging Face's transformers reads."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from switchkit.data.subwords import FileTokenizer
from switchkit.files import appearing
from switchkit.interop.config import Config
from switchkit.interop.families import FAMILIES, Family, family_named
from switchkit.interop.folder import INDEX, SINGLE
from switchkit.interop.importing import build_module
from switchkit.interop.keys import Keys
from switchkit.interop.structure import differences
from switchkit.module import LanguageModule
from switchkit.origin import SPECIAL_IDS, generation_of

__all__ = ["SHARD_SIZE", "export_hf"]

SHARD_SIZE = 5_000_000_000
"""Bytes of a file, as the Hub asks for."""
FORM = "5.23.0"
"""The version of transformers whose config.json is written."""
KEPT = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "initializer_range",
    "initializer_factor",
    "task_specific_params",
)
"""What a config says that a model does not know."""


def export_hf(
    module: LanguageModule,
    folder: str | Path,
    *,
    family: str | None = None,
    like: Mapping[str, Any] | None = None,
    shard_size: int = SHARD_SIZE,
    read: Callable[[str], Tensor] | None = None,
) -> str:
    """Write a model as transformers saves one, which `from_pretrained` reads; returns the family.

    In evaluation the logits are the same, and so are the bits of every tensor. What only training knows (dropout of
    experts, jitter, a capacity in training) is written where config.json has a place for it. The folder appears whole
    or not at all.

    Args:
        module: a module around a `Decoder` or an `EncoderDecoder`.
        folder: where to; it must not exist, or be empty, and not the working directory.
        family: a `model_type`, where several fit; null: the first that fits.
        like: a config.json that says what a model does not know, the ids of special tokens; null: that of the files
            it was imported from, or else the tokenizer's.
        shard_size: bytes of a file; more weights make several files and an index.
        read: of a module that has shapes only: reads one tensor by its name in ``state_dict()`` (see
            `switchkit.interop.files.open_stored`). Those of one file, and the last two that were read, are held at a
            time. null: the module has its weights.

    Raises:
        ValueError: a folder that is not empty, no family that computes the same (says what differs), an unknown family,
            ids of `like` beyond the vocabulary, a shard_size below 1, safetensors is not installed.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size must be at least 1 byte; got {shard_size}")
    # It is made beside what is there, which takes the place of a link too.
    target = Path(folder).expanduser().resolve()
    if target == Path.cwd().resolve():
        raise ValueError(f"{folder} is the working directory, whose place no other can take: name a folder in it")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is there already and not empty: name another folder, or remove it first")
    if not target.parent.is_dir():
        raise ValueError(f"there is no folder {target.parent}: create it first")
    _check_like(like or {}, module.vocab_size)
    save_file = _library()
    found, config = _described(module, family)
    own = {name.removeprefix("net."): tensor for name, tensor in module.state_dict().items()}
    table = list(found.keys(module.net))
    config = _completed(config, found, own, like or _known(module))
    with appearing(target, shared=True) as temporary:
        temporary.mkdir()
        _write_json(temporary / "config.json", config)
        kept = {} if like else generation_of(module.hugging_face)
        _write_json(temporary / "generation_config.json", _generation(config, kept))
        if isinstance(module.tokenizer, FileTokenizer):
            (temporary / "tokenizer.json").write_text(module.tokenizer.text, encoding="utf-8")
            _write_json(temporary / "tokenizer_config.json", _tokenizer_config(module.tokenizer, config))
        _write_tensors(temporary, table, own, shard_size, save_file, read)
        if target.exists():
            target.rmdir()
    return found.name


def _described(module: LanguageModule, name: str | None) -> tuple[Family, dict[str, Any]]:
    """The family that computes what the module does, and its config.

    Raises:
        ValueError: none does; says why, of each that was tried.
    """
    kind = type(module.net)
    tried = [family for family in FAMILIES.values() if family.net is kind] if name is None else [family_named(name)]
    if not tried:
        raise ValueError(f"only a Decoder or an EncoderDecoder can be exported; got a {kind.__name__}")
    reasons = []
    for family in tried:
        try:
            config = family.describe(module.net, module.losses)
            plan = family.plan(
                Config(config, "the model's config.json"), getattr(module.net, "head", None) is None, None
            )
            rebuilt = build_module(plan)
            first = next(differences(module.net, rebuilt.net), None) or _other_shape(module, rebuilt)
        except ValueError as error:
            first = str(error)
        if first is None:
            return family, config
        reasons.append(f"{family.name}: {first}")
    raise ValueError(f"no family of transformers computes what this model does. {'; '.join(reasons)}")


def _other_shape(module: LanguageModule, rebuilt: LanguageModule) -> str | None:
    ours, theirs = ({n: list(t.shape) for n, t in m.net.state_dict().items()} for m in (module, rebuilt))
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            return f"{name} is {ours.get(name, 'absent')} instead of {theirs.get(name, 'absent')}"
    return None


def _completed(
    config: Mapping[str, Any], family: Family, own: Mapping[str, Tensor], like: Mapping[str, Any]
) -> dict[str, Any]:
    """`config` with what every config.json says, and what `like` knows better."""
    kinds = [str(tensor.dtype).removeprefix("torch.") for tensor in own.values() if tensor.is_floating_point()]
    unknown = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    kept = {name: like[name] for name in KEPT if name in like}
    return {
        **unknown,
        **config,
        **kept,
        "architectures": [family.architecture],
        "model_type": family.name,
        # The commonest: DeepSeek's bias is float32 in any model.
        "dtype": Counter(kinds).most_common(1)[0][0],
        "transformers_version": FORM,
        "use_cache": True,
    }


def _known(module: LanguageModule) -> dict[str, Any]:
    """What the imported config.json said, over the ids of the tokenizer."""
    own: dict[str, Any] = {}
    if module.tokenizer is not None:
        # Null too: a family's usual end is another token of this vocabulary. But every T5 needs some padding.
        own["eos_token_id"] = module.tokenizer.eos_id
        if module.tokenizer.pad_id is not None:
            own["pad_token_id"] = module.tokenizer.pad_id
    return {**own, **(module.hugging_face.get("config") or {})}


def _tokenizer_config(tokenizer: FileTokenizer, config: Mapping[str, Any]) -> dict[str, Any]:
    """What has transformers take tokenizer.json as it is: a family's own class adds tokens to it, or fails on it."""
    found = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name in SPECIAL_IDS:
        given = config[name]
        # Of several ends it knows the first.
        first = given[0] if isinstance(given, list) and given else given
        text = tokenizer.token(first) if isinstance(first, int) and first >= 0 else None
        if text is not None:
            found[name.removesuffix("_id")] = text
    return found


def _check_like(like: Mapping[str, Any], vocab_size: int) -> None:
    """Refuses the ids of a larger vocabulary, over which transformers cannot build the model."""
    for name in SPECIAL_IDS:
        given = like.get(name)
        for number in given if isinstance(given, list) else [given]:
            if isinstance(number, int) and number >= vocab_size:
                raise ValueError(
                    f"like: {name}={number} is no token of this model, whose ids are 0 to {vocab_size - 1}: take the "
                    "config.json of a model with the same vocabulary"
                )


def _generation(config: Mapping[str, Any], kept: Mapping[str, Any]) -> dict[str, Any]:
    names = ("bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id")
    known = {name: kept.get(name, config.get(name)) for name in names}
    found = {name: value for name, value in known.items() if value is not None}
    return {"_from_model_config": True, **found, "transformers_version": FORM}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(dict(sorted(content.items())), indent=2) + "\n", encoding="utf-8")


def _write_tensors(
    folder: Path,
    table: Sequence[Keys],
    own: Mapping[str, Tensor],
    shard_size: int,
    save_file: Any,
    read: Callable[[str], Tensor] | None = None,
) -> None:
    """All tensors, in as many files as it takes; only those of one file are copied at a time."""
    # The experts of a layer come from one tensor of ours, one after the other: it is read once.
    whole = own.__getitem__ if read is None else lru_cache(maxsize=1)(lambda name: read(f"net.{name}"))
    shards: list[list[tuple[str, Keys, int]]] = [[]]
    held = total = 0
    for name, keys, index in _places(table):
        size = keys.split(own[keys.ours], index).nbytes
        if held and held + size > shard_size:
            shards.append([])
            held = 0
        shards[-1].append((name, keys, index))
        held, total = held + size, total + size
    files = [SINGLE] if len(shards) == 1 else [_shard(i + 1, len(shards)) for i in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        tensors = {
            name: keys.split(whole(keys.ours), index).detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, keys, index in shard
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if len(files) > 1:
        places = {name: file for file, shard in zip(files, shards, strict=True) for name, _, _ in shard}
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})


def _places(table: Sequence[Keys]) -> Iterator[tuple[str, Keys, int]]:
    for keys in table:
        for index, name in enumerate(keys.theirs):
            yield name, keys, index
        for name in keys.copies if keys.repeat else ():
            yield name, keys, 0


def _shard(number: int, count: int) -> str:
    return f"model-{number:05}-of-{count:05}.safetensors"


def _library() -> Any:
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise ValueError("writing this folder needs safetensors: pip install 'switchkit[hf]'") from None
    return save_file

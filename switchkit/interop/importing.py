"""A folder of Hugging Face's as a model of ours."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from switchkit.data.subwords import FileTokenizer
from switchkit.data.tokenizers import Tokenizer
from switchkit.interop.config import Config
from switchkit.interop.documents import read_object
from switchkit.interop.families import Family, Plan, family_of
from switchkit.interop.families.base import EVERY_MODEL
from switchkit.interop.folder import Folder
from switchkit.interop.keys import Keys
from switchkit.models import Decoder
from switchkit.module import LanguageModule
from switchkit.spec import OnMeta

__all__ = ["build_module", "import_hf", "module_of_config"]

LARGEST_TOKENIZER = 256 * 2**20
EMBEDDINGS = (
    "model.embed_tokens.weight",
    "shared.weight",
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
)
"""The names that embeddings go by."""


def import_hf(
    folder: str | Path, *, context: int | None = None, dtype: torch.dtype | None = None, tokenizer: bool = True
) -> LanguageModule:
    """The model of a folder that Hugging Face's transformers saved, with its losses and its tokenizer.

    Its logits are those of transformers. Nothing is downloaded, no pickle is opened, and nothing is approximated: what
    cannot be built exactly is refused with the reason. What config.json and generation_config.json said is the module's
    `hugging_face`, which goes along into checkpoints and `export_hf`.

    Args:
        folder: holds config.json and model.safetensors, or its shards and their index.
        context: the longest sequence of a decoder; null: `max_position_embeddings`.
        dtype: of the weights; null: as they are stored.
        tokenizer: read tokenizer.json too, where it is there.

    Raises:
        ValueError: no such folder, a damaged or hostile one, a model_type that is not known, a setting that is not
            built here, tensors that are missing, unexpected, or of another shape, a tokenizer with more ids than the
            model.
    """
    source = Folder(folder)
    values = read_object(source.config_path)
    generation = _generation(source)
    config = Config(_with_start(values, generation), tensors=len(source.tensors))
    family = family_of(config)
    plan = family.plan(config, family.tied(config) and not _own_head(source), context)
    vocabulary = _tokenizer(source) if tokenizer else None
    if vocabulary is not None and vocabulary.vocab_size > plan.vocab_size:
        raise ValueError(
            f"tokenizer.json has {vocabulary.vocab_size} ids, and config.json vocab_size={plan.vocab_size}: the model "
            "has no weights for the others. Leave the tokenizer out (--no_tokenizer), or give the model more rows with "
            "resize_token_embeddings of transformers"
        )
    module = build_module(plan, vocabulary)
    table = list(_matched(family, config, module.net, source))
    module.load_state_dict({f"net.{name}": tensor for name, tensor in _tensors(table, source)}, assign=True)
    module.hugging_face = {"config": values, "generation": generation}
    return module if dtype is None else module.to(dtype)


def module_of_config(path: str | Path, *, context: int | None = None) -> LanguageModule:
    """The module that a config.json describes, or that of a folder, without weights: on the meta device.

    Args:
        path: config.json, or its folder.
        context: the longest sequence of a decoder; null: `max_position_embeddings`. Other models have none.

    Raises:
        ValueError: no such file, a model_type that is not known, a setting that is not built here.
    """
    path = Path(path).expanduser()
    config = Config(read_object(path / "config.json" if path.is_dir() else path))
    family = family_of(config)
    return build_module(family.plan(config, family.tied(config), context if family.net is Decoder else None))


def build_module(plan: Plan, tokenizer: Tokenizer | None = None) -> LanguageModule:
    """The module of a plan, its net without memory.

    Raises:
        ValueError: sizes that do not fit.
    """
    net = OnMeta(plan.net.func, **plan.net.keywords)
    return LanguageModule(net, moe=plan.moe, losses=list(plan.losses), tokenizer=tokenizer, vocab_size=plan.vocab_size)


def _generation(source: Folder) -> dict[str, Any]:
    path = source.optional("generation_config.json")
    return {} if path is None else read_object(path)


def _with_start(values: Mapping[str, Any], generation: Mapping[str, Any]) -> dict[str, Any]:
    """The config, with the start token that newer versions keep in a file of its own."""
    start = generation.get("decoder_start_token_id")
    return {**values} if start is None else {"decoder_start_token_id": start, **values}


def _own_head(source: Folder) -> bool:
    """True: the output layer is stored beside the embedding, and is another."""
    head = "lm_head.weight"
    embed = next((name for name in EMBEDDINGS if name in source.tensors), None)
    if head not in source.tensors or embed is None:
        return False
    if source.tensors[head].shape != source.tensors[embed].shape:
        return True
    both = dict(source.load([head, embed]))
    return not torch.equal(both[head], both[embed])


def _matched(family: Family, config: Config, net: nn.Module, source: Folder) -> Iterable[Keys]:
    """The table of a model, every name of it found in the files, and every name of the files in it.

    Raises:
        ValueError: the first five names and the number of those that are missing, unexpected, of another shape.
    """
    own = net.state_dict()
    missing: list[str] = []
    wrong: list[str] = []
    used: set[str] = set()
    table: list[Keys] = []
    for keys in family.keys(net):
        if len(used) + len(missing) > 2 * len(source.tensors) + 1000:
            break
        theirs = keys.theirs
        if keys.copies and theirs[0] not in source.tensors:
            theirs = next(((name,) for name in keys.copies if name in source.tensors), theirs)
        for index, name in enumerate(theirs):
            stored = source.tensors.get(name)
            if stored is None:
                missing.append(name)
                continue
            expected = tuple(keys.split(own[keys.ours], index).shape)
            if stored.shape != expected:
                wrong.append(f"{name} {list(stored.shape)} for {list(expected)}")
        used.update(theirs)
        _check_copies(keys.copies, theirs[0], source)
        used.update(keys.copies)
        table.append(Keys(keys.ours, theirs, keys.rows, keys.experts))
    patterns = [re.compile(pattern) for pattern in (*EVERY_MODEL, *family.ignored(config))]
    others = sorted(name for name in source.tensors.keys() - used if not any(p.fullmatch(name) for p in patterns))
    if missing or wrong or others:
        kinds = (("missing", missing), ("unexpected", others), ("of another shape", wrong))
        found = "; ".join(f"{len(names)} {kind}: {', '.join(names[:5])}" for kind, names in kinds if names)
        raise ValueError(
            f"the tensors in {source.path} are not those of {family.architecture} with this config.json: {found}"
        )
    lacking = own.keys() - {keys.ours for keys in table}
    assert not lacking, lacking
    return table


def _check_copies(copies: tuple[str, ...], name: str, source: Folder) -> None:
    """Refuses names that should hold one tensor and hold several."""
    for copy in copies:
        if copy != name and copy in source.tensors and name in source.tensors:
            both = dict(source.load([name, copy]))
            if both[name].shape != both[copy].shape or not torch.equal(both[name], both[copy]):
                raise ValueError(f"{name} and {copy} differ, and the model has one tensor for both")


def _tensors(table: Iterable[Keys], source: Folder) -> Iterable[tuple[str, Tensor]]:
    for keys in table:
        tensors = [tensor for _, tensor in source.load(list(keys.theirs))]
        kinds = sorted({str(tensor.dtype) for tensor in tensors})
        if len(kinds) > 1:
            raise ValueError(f"{keys.theirs[0]} and those that go with it are stored as {' and '.join(kinds)}")
        yield keys.ours, keys.join(tensors)


def _tokenizer(source: Folder) -> Tokenizer | None:
    path = source.optional("tokenizer.json")
    if path is None:
        return None
    size = path.stat().st_size
    if size > LARGEST_TOKENIZER:
        raise ValueError(f"{path} has {size} bytes, more than the {LARGEST_TOKENIZER} that a vocabulary can need")
    return FileTokenizer(str(path))

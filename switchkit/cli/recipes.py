"""Finding and reading recipes and other configuration files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from switchkit.cli.errors import UserError, near, short
from switchkit.cli.plugins import importable

__all__ = ["comparisons", "dump_yaml", "find_config", "is_comparison", "load_yaml", "read_config", "recipes"]

_PACKAGE = Path(__file__).resolve().parents[1]
_SAVED = (b"PK\x03\x04", b"\x80\x02")
"""How files of torch.save begin, and began."""
_IS_CHECKPOINT = (
    "this is a checkpoint, and no recipe: --ckpt_path takes it, or --init_from of a new fit from its weights"
)


def recipes() -> dict[str, Path]:
    """The packaged recipes by name: ``recipes()["routing/expert_choice"]``."""
    return {name: path for name, path in _packaged().items() if not _compares(path)}


def comparisons() -> dict[str, Path]:
    """The packaged comparisons by name, which ``switchkit compare`` takes: ``comparisons()["compare/capacity"]``."""
    return {name: path for name, path in _packaged().items() if _compares(path)}


def is_comparison(values: Mapping[str, Any]) -> bool:
    """Whether the content of a file is a comparison and no recipe: it names runs."""
    return "runs" in values


def _packaged() -> dict[str, Path]:
    # In a wheel they lie inside the package, in a checkout beside it.
    folder = next((f for f in (_PACKAGE / "recipes", _PACKAGE.parent / "recipes") if f.is_dir()), None)
    if folder is None:
        return {}
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def _compares(path: Path) -> bool:
    # By its text: a list of names needs no parsed YAML.
    return path.parent.name == "compare" and re.search(r"^runs:", path.read_text("utf-8"), re.MULTILINE) is not None


def find_config(name: str, said: str = "--config ") -> Path:
    """The file that ``--config`` names: a path, a pipe too, or else the name of a packaged recipe.

    Args:
        name: of the file or recipe.
        said: what an error puts before the name.

    Raises:
        UserError: neither exists.
    """
    if not name.strip():
        raise UserError(f"{said}needs a file or the name of a recipe: {', '.join(recipes()) or 'none found'}")
    path = Path(name).expanduser()
    known = _packaged()
    recipe = name.removesuffix(".yaml").removesuffix(".yml").removeprefix("recipes/")
    if path.exists() and not path.is_dir():
        return path
    if recipe in known:
        return known[recipe]
    if path.is_dir():
        saved = path.suffix == ".ckpt"
        raise UserError(f"{said}{name}: {_IS_CHECKPOINT if saved else 'this is a folder; give a YAML file in it'}")
    beside = [str(other) for suffix in ("yaml", "yml") for other in path.parent.glob(f"*.{suffix}")]
    hint = next((hint for hint in (near(recipe, known), near(name, beside)) if hint != "."), ".")
    raise UserError(
        f"{said}{name}: there is no such file, nor a recipe of that name{hint} "
        f"Recipes: {', '.join(recipes()) or 'none'}"
    )


def read_config(path: Path) -> dict[str, Any]:
    """The mapping that a YAML (or JSON) file holds. Its folder becomes importable.

    Raises:
        UserError: unreadable, a checkpoint, not UTF-8, not YAML or not a mapping; says where in the file.
    """
    try:
        content = path.read_bytes() if path.is_file() else _piped(path)
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if content.startswith(_SAVED):
            raise UserError(f"--config {path}: {_IS_CHECKPOINT}") from None
        raise UserError(f"{path}: not a UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if path.is_file():
        importable(path.resolve().parent)
    try:
        values = load_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path}{_position(error)}") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{path}: expected a mapping such as `trainer: {{max_steps: 100}}`, got {short(values)}")
    return values


@cache
def _piped(path: Path) -> bytes:
    """What came through a pipe, which can be read once."""
    return path.read_bytes()


def load_yaml(text: str) -> Any:
    """YAML as jsonargparse reads it: ``1e-3`` is a number, a date and ``12:00:00`` are text.

    Raises:
        YAMLError: no YAML, or a key that is given twice.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except (ValueError, RecursionError) as error:  # of a number such as 0x_, and of very many brackets
        raise yaml.YAMLError(str(error)) from error


def dump_yaml(values: Any) -> str:
    """Text that `load_yaml` reads as these plain values, in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_FLOAT = (
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
)
# YAML 1.1, which PyYAML follows, takes 1e-3 for text, and 12:00:00 for 43,200.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if not tag.endswith((":timestamp", ":float", ":int"))]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(rf"^(?:{_FLOAT}|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN))$"),
    list("-+0123456789."),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^[-+]?(?:0b[01_]+|0[0-7_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)$"),
    list("-+0123456789"),
)


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would take for something else than text, and what is said twice is written twice."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> Any:
        # Lists of numbers and words read best on one line.
        plain = all(not isinstance(item, (dict, list)) for item in sequence)
        return super().represent_sequence(tag, sequence, flow_style=plain or flow_style)

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _position(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    context = getattr(error, "context", None)
    place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return f"{place}: not valid YAML: {problem}{f' ({context})' if context else ''}"

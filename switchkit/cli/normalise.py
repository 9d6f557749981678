"""Merging configurations into one tree that holds full import paths and every given setting.

Naming a class replaces what stood at that place whole, with the class's own defaults; giving only arguments edits it.
So nothing leaks from one part to the next. Names and places are read from the constructors' signatures.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from switchkit.cli.classes import check_strategy, find_class, named_strategy
from switchkit.cli.errors import UserError, listed, short
from switchkit.cli.recipes import load_yaml
from switchkit.cli.signatures import Parameter, Place, Signature, members, place_of, signature_of
from switchkit.cli.sources import Edit, Source, subconfig
from switchkit.cli.values import convert
from switchkit.optim import OptimizerFactory, adamw
from switchkit.registry import full_path, resolve

__all__ = ["default_of", "is_spec", "merge", "merge_arguments", "require", "target_of"]

_SPEC = {"class_path", "init_args", "dict_kwargs"}
_ANY = Place((), factory=True)


def merge(old: Any, new: Any, hint: Any, key: str, source: Source) -> Any:
    """`new` over `old`, at a place of type `hint`.

    Raises:
        UserError: an unknown name, parameter or type of value.
    """
    place = place_of(hint)
    if place is not None:
        return _merge_place(old, new, place, hint, key, source)
    if isinstance(new, Edit):
        if is_spec(old):
            return _merge_part(old, new, _ANY, key, source)
        if old is not None and not isinstance(old, dict):
            raise UserError(
                f"{source.where(key)}: {short(old)} has no setting {next(iter(new))!r} that could be changed"
            )
        return {
            **(old or {}),
            **{name: merge((old or {}).get(name), value, Any, f"{key}.{name}", source) for name, value in new.items()},
        }
    return convert(new, hint, source.where(key), typed=source.typed)


def merge_arguments(
    old: Mapping[str, Any], new: Any, signature: Signature, owner: str, key: str, source: Source, given: frozenset[str]
) -> dict[str, Any]:
    """The arguments of one constructor, with those of `new` over those of `old`."""
    if new is None:
        return dict(old)
    if not isinstance(new, Mapping):
        raise UserError(f"{source.where(key)}: expected a mapping of the parameters of {owner}, got {short(new)}")
    merged = dict(old)
    for written, value in new.items():
        name = str(written).removesuffix("+")
        path = f"{key}.{written}" if key else str(written)
        if name in given:
            raise UserError(f"{source.where(path)}: {name!r} is not set here; whatever builds the {owner} passes it")
        if name not in signature.parameters and not signature.open:
            known = [parameter for parameter in signature.parameters if parameter not in given]
            raise UserError(
                f"{source.where(path)}: {owner} has no parameter {name!r}{listed(name, known, 'Parameters')}"
            )
        hint = signature.parameters.get(name, Parameter(Any, False)).hint
        if str(written).endswith("+"):
            merged[name] = _append(merged.get(name), value, hint, path, source)
        else:
            merged[name] = merge(merged.get(name), value, hint, path, source)
    return merged


def require(tree: Any, hint: Any, key: str, filled: frozenset[str] = frozenset()) -> None:
    """Raise a UserError if a part of the tree lacks an argument that its class needs."""
    place = place_of(hint) or _ANY
    if isinstance(tree, list):
        for number, item in enumerate(tree):
            if is_spec(item):
                require(item, hint, f"{key}[{number}]")
        return
    if not is_spec(tree):
        return
    target = target_of(tree)
    arguments = tree.get("init_args") or {}
    if target is None:
        return
    signature = signature_of(target)
    for number, (name, parameter) in enumerate(signature.parameters.items()):
        known = name in arguments or name in place.given or name in (tree.get("dict_kwargs") or {})
        if parameter.required and not known and number >= place.positional and f"{key}.{name}" not in filled:
            raise UserError(f"{key}: {_name(target)} needs {name!r}, which was not given: set {key}.{name}")
        require(arguments.get(name), parameter.hint, f"{key}.{name}", filled)


def _merge_place(old: Any, new: Any, place: Place, hint: Any, key: str, source: Source) -> Any:
    if isinstance(new, str) and source.typed:
        new = _read(new, key, source)
    if new is None or (type(new) in members(hint) and not _names_class(new, place)):
        if isinstance(new, str):
            check_strategy(new, place, source.where(key))
        return new
    if isinstance(new, str) and (loaded := subconfig(new, source)) is not None:
        return _merge_place(old, loaded.values, place, hint, key, loaded)
    if isinstance(new, list) and place.many:
        return [_merge_part(None, item, place, f"{key}[{number}]", source) for number, item in enumerate(new)]
    names_class = isinstance(new, str) or (isinstance(new, Mapping) and "class_path" in new)
    if place.many and not names_class and isinstance(old, list):
        if not old:
            raise UserError(f"{source.where(key)}: the list is empty, so there is nothing to change in it")
        return [*old[:-1], _merge_part(old[-1], new, place, key, source)]
    if place.many and not place.one:
        return [_merge_part(None, new, place, key, source)]
    return _merge_part(old, new, place, key, source)


def _merge_part(old: Any, new: Any, place: Place, key: str, source: Source) -> Any:
    where = source.where(key)
    if isinstance(new, str):
        if place.text and resolve(new) is None and "." not in new and not new[:1].isupper():
            return new
        return _spec(find_class(new, place, where), {})
    if not isinstance(new, Mapping):
        raise UserError(f"{where}: expected a {place.word} (a name, or class_path and init_args), got {short(new)}")
    arguments = {name: value for name, value in new.items() if name not in _SPEC}
    if arguments and not isinstance(new, Edit) and _SPEC & set(new):
        raise UserError(
            f"{where}: {next(iter(arguments))!r} stands beside class_path or init_args; put it below init_args"
        )
    arguments = (
        {**(new.get("init_args") or {}), **arguments}
        if isinstance(new.get("init_args") or {}, Mapping)
        else new["init_args"]
    )
    if "class_path" in new:
        # `class_path: null` can only mean the part of that name.
        name = "null" if new["class_path"] is None else new["class_path"]
        if not isinstance(name, str):
            raise UserError(f"{where}: class_path must be a name or an import path, got {short(name)}")
        target, before = named_strategy(name, place) or (find_class(name, place, where), {})
    elif is_spec(old):
        target, before = target_of(old), dict(old.get("init_args") or {})
        if target is None:
            raise UserError(f"{where}: {old['class_path']} is not imported, so its arguments cannot be changed")
    else:
        target, before = named_strategy(old, place) or default_of(place) or (None, {})
        if target is None:
            first = next(iter(arguments), "init_args") if isinstance(arguments, Mapping) else "init_args"
            if isinstance(old, str):
                raise UserError(f"{where}: {old!r} has no setting {first!r}: set {key} to a class first")
            raise UserError(
                f"{where}: no class is named, so {first!r} belongs to nothing: set {key}.class_path, "
                "or give a recipe that does before it, such as --config tiny_shakespeare"
            )
    if not _is_class(target):
        if arguments:
            raise UserError(
                f"{where}: {_name(target)} is a function and takes no settings here; write a class for that"
            )
        return _spec(target, {})
    given = place.given - place.own
    merged = merge_arguments(before, arguments, signature_of(target), _name(target), key, source, given)
    kwargs = new.get("dict_kwargs") or (old.get("dict_kwargs") if "class_path" not in new and is_spec(old) else None)
    # As an init_arg jsonargparse would refuse it, or, not refused, put its default there where nobody gave it.
    kwargs = {**(kwargs or {}), **{name: merged.pop(name) for name in place.own & merged.keys()}}
    spec = _spec(target, merged)
    return {**spec, "dict_kwargs": kwargs} if kwargs else spec


def _names_class(new: Any, place: Place) -> bool:
    """Whether a text that its place would take as it is means a class: a path, or a name such as DDPStrategy."""
    if not isinstance(new, str):
        return False
    name = new.rpartition(".")[2]
    kinds = tuple(base.__name__ for base in place.bases)
    return name.isidentifier() and name[0].isupper() and (name != new or name.endswith(kinds))


def _append(old: Any, new: Any, hint: Any, key: str, source: Source) -> list[Any]:
    before = old if isinstance(old, list) else [] if old is None else [old]
    place = place_of(hint)
    if place is not None and not place.many:
        raise UserError(f"{source.where(key)}: this is one {place.word}, not a list that could be added to")
    if place is not None and old is None and key.startswith("model."):
        # Without losses a module takes a default one.
        raise UserError(
            f"{source.where(key)}: nothing has set {(name := key.removesuffix('+'))} yet, and its default need not be "
            f"empty: give the whole list, such as --{name} '[A, B]'"
        )
    if isinstance(new, str) and source.typed:
        new = _read(new, key, source)
    added = new if isinstance(new, list) else [new]
    if place is None:
        return [*before, *convert(added, hint, source.where(key), typed=source.typed)]
    return [*before, *(_merge_part(None, item, place, key, source) for item in added)]


def _read(text: str, key: str, source: Source) -> Any:
    """A value of the command line as YAML, where it may be a list or a mapping."""
    try:
        return load_yaml(text)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or error
        raise UserError(f"{source.where(key)}: {short(text)} is not valid YAML: {problem}") from error


def is_spec(value: Any) -> bool:
    return isinstance(value, dict) and "class_path" in value


def target_of(spec: Mapping[str, Any]) -> Any:
    return find_class(spec["class_path"], _ANY, "")


def default_of(place: Place) -> tuple[Any, dict[str, Any]] | None:
    """What stands where nothing is named, with its arguments: our optimizer, or the one class that a factory's type
    allows, when it is a class and no base of many."""
    if not place.factory or len(place.bases) != 1:
        return None
    base = place.bases[0]
    if place == place_of(OptimizerFactory):
        # Lists, as YAML has them.
        return adamw.func, {name: list(v) if isinstance(v, tuple) else v for name, v in adamw.keywords.items()}
    if base.__module__ in ("torch.nn.modules.module", "torch.optim.optimizer"):
        return None
    try:
        return find_class(full_path(base), place, ""), {}
    except UserError:
        return None


def _spec(target: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    path = f"{target.__module__}.{target.__qualname__}"
    return {"class_path": path, "init_args": arguments} if inspect.isclass(target) else path


def _is_class(target: Any) -> bool:
    return inspect.isclass(target)


def _name(target: Any) -> str:
    return target.__qualname__

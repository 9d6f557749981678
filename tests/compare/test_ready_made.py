"""The comparisons that come with switchkit: they build, and their runs differ in what they are named for alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from switchkit.cli.recipes import comparisons, find_config
from switchkit.cli.settings import Arguments, compose
from switchkit.compare.definition import Definition, define
from switchkit.compare.plan import composed, model_of

NET, MOE = "model.init_args.net.init_args", "model.init_args.moe.init_args"
ROUTER, CAPACITY = f"{MOE}.router", f"{MOE}.capacity"
# What runs of a comparison may differ in.
AXES = {
    "balance": {"model.init_args.losses", "trainer.callbacks"},
    "capacity": {f"{NET}.sparse", "model.init_args.losses", f"{ROUTER}.class_path", f"{CAPACITY}.init_args.train"},
    "dropless": {f"{CAPACITY}.class_path", f"{CAPACITY}.init_args.train", f"{CAPACITY}.init_args.eval"},
    "experts": {f"{NET}.sparse", f"{NET}.num_experts", "model.init_args.losses"},
    "exploration": {f"{ROUTER}.init_args.{name}" for name in ("sample", "input_dropout", "jitter")},
    "initialisation": {
        f"{NET}.attention.class_path",
        f"{NET}.attention.init_args.init_scale",
        f"{NET}.feed_forward.class_path",
        f"{NET}.feed_forward.init_args.init_scale",
        f"{ROUTER}.init_args.init_scale",
        f"{MOE}.experts.init_args.init_scale",
    },
    "precision": {"trainer.precision", f"{ROUTER}.init_args.precision"},
}


def flat(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict) and tree:
        for name, value in tree.items():
            yield from flat(value, f"{key}.{name}" if key else name)
    elif tree != {}:
        yield key, tree


# The dense model that spends as many operations as the costliest run, in the number of steps that they pay for.
EQUAL, DENSE = "dense-equal-flops", {f"{NET}.sparse": [], "model.init_args.losses": []}


def settings(definition: Definition) -> dict[str, dict[str, Any]]:
    return {entry.name: dict(flat(composed(entry, [], []))) for entry in definition.entries}


def test_every_one_is_listed_here() -> None:
    assert {name.removeprefix("compare/") for name in comparisons()} == set(AXES)


@pytest.mark.parametrize("name", AXES)
def test_runs_differ_in_what_they_say_alone(name: str) -> None:
    definition = define([f"compare/{name}"])
    found = settings(definition)
    last = found.pop(EQUAL)
    runs = list(found.values())
    different = set()
    for one in runs:
        for other in runs:
            different |= {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}
    assert different == AXES[name]
    base = found[definition.equal_flops[EQUAL]]
    assert {key for key in last.keys() | base.keys() if last.get(key) != base.get(key)} <= {*DENSE, *AXES[name]}
    assert last | DENSE == last
    # No two runs are the same.
    assert len({repr(sorted(run.items(), key=lambda item: item[0])) for run in runs}) == len(runs)


@pytest.mark.parametrize("name", AXES)
def test_the_first_line_says_what_is_compared_and_by_whom(name: str) -> None:
    definition = define([f"compare/{name}"])
    assert "arXiv" in definition.title
    assert 40 < len(definition.title) < 130
    assert (definition.seeds, definition.budget) == (3, "steps=1200")
    assert definition.twin in [entry.name for entry in definition.entries]


@pytest.mark.slow
def test_they_build() -> None:
    """One of each kind of run; the others differ in a number."""
    wanted = {
        "capacity": ["dense", "top2-1.25"],
        "precision": ["bfloat16"],
        "initialisation": ["scale-1.0"],
        "balance": ["loss-free"],
        "exploration": ["sample"],
    }
    text = [("data.path", "text.txt"), ("data.validation_prefix", "100")]
    for name, runs in wanted.items():
        for entry in define([f"compare/{name}"]).entries:
            if entry.name in runs:
                model = model_of(entry.name, composed(entry, text, []))
                assert model.sparse == (entry.name != "dense")
                assert model.cost.tokens == 32 * 64
                assert model.cost.flops == 3 * model.counts.flops * model.cost.tokens


@pytest.fixture(autouse=True)
def text(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog.\n" * 40)


def test_the_base_is_a_recipe_like_any_other() -> None:
    assert find_config("compare/base")
    assert compose("fit", Arguments(configs=["compare/base"]))["trainer"]["max_steps"] == 1200

"""Merging: naming a part replaces it whole, arguments alone edit it, nothing leaks from one to the next."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import Trainer
from torch.optim import Optimizer

import switchkit.strategies  # noqa: F401  (names `expert_parallel` to Lightning, as the commands do)
from switchkit.cli.errors import UserError
from switchkit.cli.normalise import merge
from switchkit.cli.settings import merge_all
from switchkit.cli.signatures import signature_of
from switchkit.cli.sources import Source, edit
from switchkit.layers import FeedForwardFactory, MoEFactory, RouterFactory
from switchkit.losses.base import LossFactory
from switchkit.optim import OptimizerFactory

TOP_K = "switchkit.routing.token_choice.TopK"
SWITCH = "switchkit.routing.token_choice.Switch"


def part(*sources, hint=RouterFactory | None, key="router"):
    """What is left at one place after several configurations (texts of YAML) and edits."""
    value = None
    for source in sources:
        if isinstance(source, tuple):
            first = edit(f"{key}{source[0]}", source[1])
            value = merge(value, first.values[key], hint, key, first)
        else:
            value = merge(value, yaml.safe_load(source), hint, key, Source({}, "file.yaml", Path()))
    return value


def test_a_name_becomes_a_path():
    assert part("top_k") == {"class_path": TOP_K, "init_args": {}}
    assert part("{class_path: top_k, init_args: {k: 3}}") == {"class_path": TOP_K, "init_args": {"k": 3}}
    assert part("null") is None


def test_naming_another_class_leaves_nothing_of_the_first():
    # Both have a jitter: with stock jsonargparse the 0.3 would go over to TopK.
    assert part("{class_path: switch, init_args: {jitter: 0.3}}", "top_k")["init_args"] == {}


@pytest.mark.parametrize("name", ["switch", "top_k"])
def test_a_class_path_beside_arguments_leaves_nothing_either(name):
    before = "{class_path: switch, init_args: {jitter: 0.3, sample: true}, dict_kwargs: {more: 1}}"
    found = part(before, f"{{class_path: {name}, init_args: {{init_std: 0.5}}}}")
    assert (found["init_args"], "dict_kwargs" in found) == ({"init_std": 0.5}, False)
    assert part(before, (".class_path", name))["init_args"] == {}


def test_naming_the_same_class_again_starts_from_its_defaults():
    assert part("{class_path: switch, init_args: {jitter: 0.3}}", "switch")["init_args"] == {}
    assert part("{class_path: switch, init_args: {jitter: 0.3}}", ("", "switch"))["init_args"] == {}


def test_arguments_alone_edit():
    found = part("{class_path: switch, init_args: {jitter: 0.3}}", "{init_args: {sample: true}}")
    assert found == {"class_path": SWITCH, "init_args": {"jitter": 0.3, "sample": True}}


@pytest.mark.parametrize("path", [".k", ".init_args.k"])
def test_the_command_line_edits(path):
    found = part("{class_path: top_k, init_args: {jitter: 0.3}}", (path, "3"))
    assert found == {"class_path": TOP_K, "init_args": {"jitter": 0.3, "k": 3}}


def test_the_command_line_names_then_edits():
    assert part("switch", ("", "top_k"), (".k", "3")) == {"class_path": TOP_K, "init_args": {"k": 3}}
    assert part("switch", (".class_path", "top_k"), (".k", "3")) == {"class_path": TOP_K, "init_args": {"k": 3}}
    assert part(("", "{class_path: top_k, init_args: {k: 3}}")) == {"class_path": TOP_K, "init_args": {"k": 3}}
    assert part("switch", ("", "null")) is None


def test_edits_reach_parts_within_parts():
    found = part(
        "{class_path: MoELayer, init_args: {router: switch, group: batch}}",
        "{init_args: {router: {class_path: top_k, init_args: {k: 2}}}}",
        (".router.k", "3"),
        hint=MoEFactory | None,
        key="moe",
    )
    router = {"class_path": TOP_K, "init_args": {"k": 3}}
    assert found["init_args"] == {"router": router, "group": "batch"}


def test_the_one_class_of_a_place_need_not_be_named():
    found = part((".router", "top_k"), hint=MoEFactory | None, key="moe")
    assert found["class_path"] == "switchkit.layers.MoELayer"
    with pytest.raises(UserError, match="no class is named"):
        part((".k", "3"))


def test_the_rate_of_an_optimizer_that_is_not_named_is_that_of_the_default():
    found = part((".lr", "0.001"), hint=OptimizerFactory | None, key="optimizer")
    arguments = {"lr": 0.001, "betas": [0.9, 0.99], "weight_decay": 0.1}
    assert found == {"class_path": "torch.optim.adamw.AdamW", "init_args": arguments}
    with pytest.raises(UserError, match="no class is named"):  # of a module that is not ours
        part((".lr", "0.001"), hint=Callable[[Any], Optimizer] | None, key="optimizer")


def test_a_text_that_is_a_name_elsewhere_stays_a_text():
    found = part("{class_path: mine.MyTopK, init_args: {service: random}}")
    assert found["init_args"] == {"service": "random"}


def test_class_path_null_is_the_part_of_that_name(monkeypatch):
    from switchkit import registry
    from switchkit.routing.token_choice import TopK

    monkeypatch.setitem(registry._table, "null", TopK)
    assert part("{class_path: null, init_args: {k: 2}}")["class_path"] == TOP_K


def test_lists_are_replaced_appended_to_and_edited_at_their_end():
    hint = list[LossFactory] | None
    first = "[balance, {class_path: router_z, init_args: {weight: 0.5}}]"
    names = ["switchkit.losses.balance.Balance", "switchkit.losses.router_z.RouterZ"]
    assert [item["class_path"] for item in part(first, hint=hint)] == names
    assert [item["class_path"] for item in part(first, "[router_z]", hint=hint)] == names[1:]
    assert part(first, "balance", hint=hint) == [{"class_path": names[0], "init_args": {}}]
    assert part(first, ("", "[balance]"), hint=hint) == [{"class_path": names[0], "init_args": {}}]
    assert part(first, (".weight", "2"), hint=hint)[1]["init_args"] == {"weight": 2.0}
    assert part(first, "[]", hint=hint) == []


def test_a_function_is_a_factory_too():
    assert part("mine.a_router") == "mine.a_router"
    assert part("{class_path: mine.a_router}") == "mine.a_router"


def test_a_subconfiguration_is_read_beside_its_configuration(folder):
    (folder / "parts").mkdir()
    (folder / "parts" / "three.yaml").write_text("class_path: top_k\ninit_args: {k: 3}\n")
    found = merge(None, "three.yaml", RouterFactory | None, "router", Source({}, "a.yaml", folder / "parts"))
    assert found == {"class_path": TOP_K, "init_args": {"k": 3}}


def test_nothing_is_changed_in_place():
    before = {"class_path": SWITCH, "init_args": {"jitter": 0.3}}
    source = edit("router.jitter", "0.1")
    merge(before, source.values["router"], RouterFactory | None, "router", source)
    assert before == {"class_path": SWITCH, "init_args": {"jitter": 0.3}}


EP = "switchkit.strategies.ExpertParallelStrategy"


def strategy(*sources):
    """The strategy that is left of sources in order; the Trainer's own type."""
    return part(*sources, hint=signature_of(Trainer).parameters["strategy"].hint, key="strategy")


@pytest.mark.parametrize(
    "name", ["switchkit.parallel.ExpertParallelStrategy", "ExpertParallelStrategy", "expert_parallel"]
)
def test_a_strategy_is_named_and_then_set(name):
    found = strategy(("", name), (".expert_parallel_size", "2"))
    assert found == {"class_path": EP, "init_args": {"expert_parallel_size": 2}}


def test_a_strategy_s_name_is_left_to_lightning_unless_it_has_settings():
    assert strategy("expert_parallel_4") == "expert_parallel_4"
    found = strategy("expert_parallel_4", (".activation_checkpointing", "true"))
    assert found == {"class_path": EP, "init_args": {"expert_parallel_size": 4, "activation_checkpointing": True}}
    assert strategy("class_path: expert_parallel_2") == {"class_path": EP, "init_args": {"expert_parallel_size": 2}}


def test_naming_a_strategy_anew_forgets_the_settings_of_the_one_before():
    assert strategy("expert_parallel", (".expert_parallel_size", "2"), "ddp") == "ddp"


def test_a_text_without_settings_says_so():
    with pytest.raises(UserError, match="'auto' has no setting 'expert_parallel_size': set strategy to a class"):
        strategy("auto", (".expert_parallel_size", "2"))


class Needs:
    def __init__(self, root: str, *, deep: bool) -> None: ...


class Passes(Needs):
    """As TensorBoardLogger: what its base needs it makes of its own parameters."""

    def __init__(self, save_dir: str, **more: object) -> None:
        super().__init__(root=save_dir, **more)


class Wraps(Needs):
    def __init__(self, *arguments: object, **more: object) -> None: ...


@pytest.mark.parametrize(
    ("cls", "needs"), [(Needs, ["root", "deep"]), (Passes, ["save_dir", "deep"]), (Wraps, ["root", "deep"])]
)
def test_what_a_class_needs(cls, needs):
    found = signature_of(cls).parameters
    assert [name for name, parameter in found.items() if parameter.required] == needs
    assert {"root", "deep"} <= found.keys()


def test_a_file_for_the_trainer_holds_for_the_trainer_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/t.yaml").write_text("max_steps: 3\n")
    (tmp_path / "data.yaml").write_text("class_path: TextData\n")
    values = {"trainer": "sub/t.yaml", "data": "data.yaml"}
    found = merge_all([Source(values, "split.yaml", tmp_path)], "fit")
    assert found["trainer"] == {"max_steps": 3}
    assert found["data"]["class_path"].endswith("TextData")


def test_nothing_is_added_to_losses_that_nobody_has_set(run):
    """Unset they are a balance loss, which one more entry would put out of its place."""
    code, _, err = run("fit", "--data", "TextData", "--model", "LanguageModule", "--model.losses+", "entropy")
    assert code == 2
    assert "--model.losses+: nothing has set model.losses yet" in err
    assert "--model.losses '[A, B]'" in err


def test_what_a_factory_is_called_with_may_be_given_where_it_says_so():
    """The model passes its dropout to a layer that has none of its own; its width it always passes."""

    def layer(*sources):
        return part(*sources, hint=FeedForwardFactory | None, key="feed_forward")

    given = "{class_path: FeedForward, init_args: {dropout: 0.5, gated: true}}"
    made = {"class_path": "switchkit.layers.FeedForward", "init_args": {"gated": True}, "dict_kwargs": {"dropout": 0.5}}
    assert layer(given) == layer(yaml.safe_dump(made)) == made
    assert layer(given, (".dropout", "0.25")) == made | {"dict_kwargs": {"dropout": 0.25}}
    assert layer(given, (".gated", "false"))["dict_kwargs"] == {"dropout": 0.5}
    assert "dict_kwargs" not in layer(given, "FeedForward")
    with pytest.raises(UserError, match="--feed_forward.dropout: expected a number, got 'much'"):
        layer(given, (".dropout", "much"))
    with pytest.raises(UserError, match="'d_ff' is not set here; whatever builds the FeedForward passes it"):
        layer(given, (".d_ff", "8"))

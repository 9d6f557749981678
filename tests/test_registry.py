"""Short names for parts."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

import switchkit
from switchkit import Dispatcher, Loss, MoELayer, Router, Switch, TopK, named, register, registry
from switchkit.routing.base import token_choice


@pytest.fixture(autouse=True)
def _own_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    registry.all_parts()
    monkeypatch.setattr(registry, "_table", dict(registry._table))


def mine() -> type[Router]:
    class ByLength(Router):
        """The longest entry of a token decides."""

        def forward(self, tokens, limit, valid, ids=None):
            logits = tokens[..., : self.num_experts]
            probs = logits.softmax(-1)
            expert = logits.argmax(-1, keepdim=True)
            return token_choice(logits, probs, expert, probs.gather(-1, expert), valid)

    return ByLength


def test_named_lists_the_parts_of_a_kind_in_order() -> None:
    routers = named(Router)
    assert routers["top_k"] is TopK
    assert list(routers) == sorted(routers)
    assert "balance" not in routers
    assert "balance" in named(Loss)
    assert {"einsum", "padded", "sorted"} <= set(named(Dispatcher))


def test_every_kind_has_its_base() -> None:
    for path in registry.KINDS.values():
        base = registry.resolve(path)
        assert base is not None
        assert named(base)


def test_a_name_is_needed() -> None:
    """Without parentheses the class itself is the argument."""
    for given in (mine(), "", None):
        with pytest.raises(ValueError, match=r"needs a name in parentheses, such as @register\('my_router'\)"):
            register(given)  # type: ignore[arg-type]


def test_a_part_of_ones_own_is_a_part_like_any_other() -> None:
    cls = register("by_length")(mine())
    assert named(Router)["by_length"] is cls
    assert registry.lookup("by_length", Router) is cls
    assert switchkit.ByLength is cls
    layer = MoELayer(8, 4, d_ff=4, router=cls)
    y, routing = layer(torch.eye(8).unsqueeze(0))
    assert y.shape == (1, 8, 8)
    assert routing.expert[0, :4].tolist() == [0, 1, 2, 3]


def test_a_part_need_not_be_registered() -> None:
    y, _ = MoELayer(8, 4, d_ff=4, router=mine())(torch.ones(1, 2, 8))
    assert y.shape == (1, 2, 8)


def test_one_name_for_two_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="'top_k' is taken") as caught:
        register("top_k")(mine())
    text = str(caught.value)
    assert "switchkit.routing.token_choice.TopK" in text
    assert registry.full_path(mine()) in text
    assert "another name" in text
    assert named(Router)["top_k"] is TopK


def test_the_same_class_may_come_again() -> None:
    assert register("top_k")(TopK) is TopK


@pytest.mark.parametrize(
    ("word", "meant"), [("topk", "top_k"), ("swich", "switch"), ("TOP_K", None), ("rround_robin", "round_robin")]
)
def test_an_unknown_name_is_answered_with_the_nearest_and_all_known(word: str, meant: str | None) -> None:
    with pytest.raises(ValueError, match=f"unknown Router '{word}'") as caught:
        registry.lookup(word, Router)
    text = str(caught.value)
    assert (f"Did you mean '{meant}'?" in text) == (meant is not None)
    for name in named(Router):
        assert name in text
    assert "my_file.MyClass" in text
    assert "plugins: [my_file]" in text


def test_a_name_of_another_kind_is_unknown() -> None:
    with pytest.raises(ValueError, match="unknown Router 'balance'"):
        registry.lookup("balance", Router)
    assert registry.lookup("balance") is named(Loss)["balance"]


def test_resolve_imports_nothing() -> None:
    assert registry.resolve("switch") is Switch
    assert registry.resolve("switchkit.routing.token_choice.Switch") is Switch
    assert registry.resolve("antigravity.Flight") is None
    assert registry.resolve("switchkit.routing.token_choice.check_k") is None
    assert registry.resolve("nonsense") is None


def test_nearest_is_silent_when_nothing_is_near() -> None:
    assert registry.nearest("qqqq", ["top_k"]) == ""


def test_a_factory_is_anything_that_takes_the_sizes() -> None:
    for factory in (TopK, partial(TopK, k=1), lambda *, d_model, num_experts: TopK(d_model, num_experts, k=3)):
        assert isinstance(MoELayer(8, 4, d_ff=4, router=factory).router, nn.Module)

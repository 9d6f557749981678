"""Parts as plain data and back."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch

from switchkit import Balance, ByteTokenizer, CharTokenizer, Decoder, Factor, MoELayer, SpanData, Switch, TopK
from switchkit.spec import build, describe, describe_object, described_data, find_class

LAYER = partial(MoELayer, router=partial(TopK, k=2), capacity=partial(Factor, train=1.5, eval=None), group=16)


def test_round_trip_builds_the_same_layer() -> None:
    spec = json.loads(json.dumps(describe(LAYER)))
    built = build(spec)(d_model=8, num_experts=4, d_ff=8)
    assert isinstance(built.router, TopK)
    assert (built.router.k, built.capacity.train, built.group) == (2, 1.5, 16)
    assert describe(build(spec)) == spec


def test_defaults_are_not_written_down() -> None:
    assert describe(Switch) == {"class_path": "switchkit.routing.token_choice.Switch", "init_args": {}}


def test_lists_and_objects() -> None:
    assert describe([Balance, partial(Balance, weight=0.5)])[1]["init_args"] == {"weight": 0.5}
    assert describe_object(CharTokenizer("ab")) == describe(CharTokenizer("ab"))
    assert build(describe(CharTokenizer("ab")))() == CharTokenizer("ab")


def local_class() -> type:
    class Local(Switch):
        pass

    return Local


@pytest.mark.parametrize(
    "value", [lambda **sizes: None, local_class(), partial(local_class()), object(), torch.ones(2)]
)
def test_what_cannot_be_rebuilt_is_refused_when_built(value: Any) -> None:
    with pytest.raises(ValueError, match="moe.router.*cannot be written into a checkpoint"):
        describe(partial(MoELayer, router=value), "moe") if not isinstance(value, torch.Tensor) else describe(
            value, "moe.router"
        )


def test_positional_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="by name"):
        describe(partial(Balance, 0.5))


def test_a_tokenizer_in_a_file_of_its_own_is_not_read() -> None:
    """A checkpoint holds its vocabulary; a path in it could be any file."""
    spec = {"class_path": "switchkit.data.subwords.FileTokenizer", "init_args": {"path": "/etc/passwd"}}
    with pytest.raises(ValueError, match="names a file: a checkpoint holds its vocabulary itself"):
        build(spec)


class KeptData(L.LightningDataModule):
    """Somebody's, whose arguments are where Lightning's idiom keeps them, or nowhere."""

    def __init__(self, *, shift: int = 0, order: str = "given", keep: bool = True) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=[] if keep else ["order"])


class MoreData(L.LightningDataModule):
    def __init__(self, **more: int) -> None:
        super().__init__()
        if more:
            self.save_hyperparameters()


@pytest.mark.parametrize(
    ("data", "arguments"),
    [
        (KeptData(shift=2), {"shift": 2, "order": "given", "keep": True}),
        (MoreData(shift=2), {"shift": 2}),
        (MoreData(shift=2, _instantiator=1), {"shift": 2}),  # as Lightning's CLI keeps it among them
        (L.LightningDataModule(), {}),
    ],
)
def test_arguments_of_data_of_ones_own_are_found(data: L.LightningDataModule, arguments: dict[str, Any]) -> None:
    assert described_data(data) == {**describe(type(data)), "init_args": arguments}


@pytest.mark.parametrize("data", [KeptData(shift=2, keep=False), MoreData()])
def test_data_that_keeps_an_argument_to_itself_has_no_description(data: L.LightningDataModule) -> None:
    """Built from its defaults, it might be other data."""
    assert described_data(data) is None


def test_what_is_no_plain_data_has_no_description_or_is_refused() -> None:
    """Of somebody else's data the first, of switchkit's kind the second, as a run of it could not go on."""

    def objective(**parts: Any) -> Any:
        """A local function."""

    assert described_data(KeptData(order=objective)) is None
    with pytest.raises(ValueError, match=r"objectives\[0\]: .* cannot be written into a checkpoint"):
        described_data(SpanData("my.txt", tokenizer=ByteTokenizer(), objectives=[objective]))


def test_find_class() -> None:
    assert find_class("switch") is Switch
    assert find_class("switchkit.models.Decoder") is Decoder
    with pytest.raises(ValueError, match="--plugins nowhere.at_all"):
        find_class("nowhere.at_all.Router")
    with pytest.raises(ValueError, match="no such class"):
        find_class("switchkit.models.Dekoder")
    with pytest.raises(ValueError, match="not a part"):
        find_class("pathlib.Path")

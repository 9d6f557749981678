"""What a model starts with, drawn at once or later: the same bits, in little memory; what cannot be drawn later."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from distributed import Ranks, run, worlds
from equal import MOE, NET, VOCABULARY, Loader, whole
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from switchkit import Decoder, EncoderDecoder, GatedMlp, Hash, LanguageModule, MoELayer, Sigmoid, sharding, strategies
from switchkit.parallel import ExpertParallelStrategy
from switchkit.start import begin, later

NETS = {
    "decoder": (partial(NET, positions="learned", tied=False, sparse_attention=[1]), MOE),
    "biased": (NET, partial(MoELayer, router=partial(Sigmoid, k=2), experts=partial(GatedMlp, bias=True))),
    "table": (NET, partial(MoELayer, router=partial(Hash, vocab_size=VOCABULARY, table="balanced"))),
    "two stacks": (partial(EncoderDecoder, d_model=16, encoder_layers=2, num_heads=2, d_ff=24), MOE),
}
LAYOUTS: dict[int, list[dict[str, int]]] = {
    1: [{}],
    2: [{}, {"expert_parallel_size": 2}],
    4: [{"expert_parallel_size": 2}, {"expert_parallel_size": 2, "data_parallel_replicate": 2}],
}


def trainer(rank: int, world: int, options: dict[str, Any], **more: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu", strategy=ExpertParallelStrategy(**options), devices=world, plugins=[Ranks(rank, world)],
        max_steps=0, limit_val_batches=0, logger=False, enable_checkpointing=False, enable_model_summary=False,
        enable_progress_bar=False, **more,
    )  # fmt: skip


def module(name: str) -> LanguageModule:
    net, moe = NETS[name]
    return LanguageModule(net, moe=moe, vocab_size=VOCABULARY)


def values(net: nn.Module) -> dict[str, Tensor]:
    return {name: whole(x) for name, x in [*net.named_parameters(), *net.named_buffers()]}


def started(rank: int, world: int) -> dict[str, dict[str, Tensor]]:
    """Of each model in each layout, where only the first process was seeded as `expected` is."""
    found = {}
    for options in LAYOUTS[world]:
        for name in NETS:
            torch.manual_seed(3 + rank)
            own = trainer(rank, world, options)
            with own.init_module(empty_init=True):
                made = module(name)
            assert all(x.is_meta for x in made.net.parameters())
            before = torch.get_rng_state()
            own.fit(made, Loader([{}]), Loader([{}]))
            assert torch.equal(torch.get_rng_state(), before)
            found[f"{name} {options}"] = values(made.net)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("world", worlds(*LAYOUTS))
def test_values_do_not_depend_on_the_layout(world: int) -> None:
    """Every parameter and buffer has the bits of the one that a single device draws with the seed."""
    expected = {}
    for name in NETS:
        torch.manual_seed(3)
        expected[name] = values(module(name).net)
    for rank in run(world, started):
        for label, found in rank.items():
            name = label.partition(" {")[0]
            assert found.keys() == expected[name].keys()
            for key, value in expected[name].items():
                assert torch.equal(found[key], value), f"{label}: {key}"


def alive() -> int:
    """Bytes of all tensors of this process that have memory."""
    tensors = [x for x in gc.get_objects() if issubclass(type(x), Tensor) and type(x) is not DTensor and not x.is_meta]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def peak(rank: int, world: int, empty: bool) -> tuple[int, int]:
    """Bytes of the whole model, and the most that were alive when a value was handed over."""
    seen = []
    for place, name in ((strategies, "take_part"), (sharding, "take_from_first")):
        take = getattr(place, name)

        def counted(*given: Any, take: Callable[..., None] = take) -> None:
            # Once a block, at its first large tensor.
            if any(isinstance(x, Tensor) and x.shape == (8, 64, 128) for x in given):
                seen.append(alive())
            take(*given)

        setattr(place, name, counted)
    own = trainer(rank, world, {"expert_parallel_size": 2})
    with own.init_module(empty_init=empty):
        made = LanguageModule(partial(NET, d_model=64, d_ff=128, num_layers=4), vocab_size=VOCABULARY)
    before = 0 if empty else sum(x.nbytes for x in made.net.parameters())
    before = alive() - before
    own.fit(made, Loader([{}]), Loader([{}]))
    return sum(p.numel() * 4 for p in made.net.parameters()), max(seen) - before


@pytest.mark.daily("True")
@pytest.mark.parametrize("empty", [True, False])
def test_memory_of_the_start(empty: bool) -> None:
    """Half of the model and one block of four; built at once, all of it."""
    for size, most in run(2, peak, empty):
        assert most / size < 0.8 if empty else most / size > 0.99, most / size


class Late(Decoder):
    """Sets all weights when everything is built, as many models do."""

    def __init__(self, vocab_size: int, **options: Any) -> None:
        super().__init__(vocab_size, d_model=8, num_layers=2, num_heads=2, d_ff=8, **options)
        self.set()

    def set(self) -> None:
        for parameter in self.parameters():
            nn.init.trunc_normal_(parameter, std=0.5)


class Zeroed(Late):
    def set(self) -> None:
        self.blocks[1].mlp.experts.w2.data.zero_()


class Reading(Late):
    def set(self) -> None:
        self.largest = self.embed.weight.max().item()


class Sharing(Late):
    def set(self) -> None:
        self.blocks[1].attention.qkv.weight = self.blocks[0].attention.qkv.weight


class Swapped(Late):
    def set(self) -> None:
        self.blocks = nn.ModuleList(list(self.blocks)[::-1])


class Loose(Late):
    def set(self) -> None:
        self.angles = torch.arange(4) * 0.5


@pytest.mark.parametrize("net", [Late, Zeroed, Reading, Sharing, Swapped, Loose])
def test_what_cannot_be_drawn_by_blocks_is_built_whole(net: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    expected = net(vocab_size=5, moe=None)
    after = torch.rand(1)
    torch.manual_seed(0)
    with later(), pytest.warns(UserWarning, match="the model is built whole in the memory of every process: "):
        found, start = begin(partial(net, vocab_size=5, moe=None))
    assert start is None
    assert torch.equal(torch.rand(1), after)
    for mine, theirs in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_wrong_option_is_told_as_ever() -> None:
    with later(), pytest.raises(ValueError, match="d_model must be at least 1; got 0"):
        LanguageModule(partial(Decoder, d_model=0), vocab_size=5)


class Own(LanguageModule):
    pass


def test_only_models_that_nobody_looks_at_wait() -> None:
    """A subclass may look at its weights, and a checkpoint brings them."""
    with later():
        assert not next(Own(NET, vocab_size=5).net.parameters()).is_meta
        module = LanguageModule(NET, vocab_size=5)
        weights = LanguageModule.state_dict(Own(NET, vocab_size=5))
    with pytest.raises(ValueError, match="was built without memory .* give the Trainer ckpt_path"):
        module.load_state_dict(weights)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.load_state_dict(weights, assign=True)
    assert module.start is None
    assert torch.equal(module.net.embed.weight, weights["net.embed.weight"])

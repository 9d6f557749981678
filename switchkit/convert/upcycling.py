"""A sparse model made of a dense one, whose feed-forward layers become the experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from switchkit.capacity.policies import Dropless, Factor
from switchkit.checks import at_least
from switchkit.convert.rebuilding import net_arguments, rebuilt
from switchkit.experts.feed_forward import GatedMlp, Mlp
from switchkit.layers import FeedForward, MoELayer, moe_layers
from switchkit.losses.balance import Balance
from switchkit.models import EncoderDecoder
from switchkit.module import LanguageModule
from switchkit.routing.token_choice import Switch, TopK
from switchkit.spec import describe

__all__ = ["upcycle"]

TINY = 1e-3
"""Deviation of the weights of a `switch` router, so that all probabilities begin near 1 / E."""


def upcycle(
    module: LanguageModule,
    *,
    num_experts: int = 8,
    k: int | None = None,
    sparse: str | Sequence[int] = "every(1)",
    decoder_sparse: str | Sequence[int] | None = None,
    granularity: int = 1,
    noise: float = 0.0,
    drop: float = 0.0,
    capacity_factor: float | None = None,
    router_std: float | None = None,
) -> LanguageModule:
    """The dense model with copies of its feed-forward layers as experts, and a fresh router before them.

    With k >= 2 the router is `top_k`, whose weights sum to one, so that copies compute what the dense layer did
    whatever the router chooses. With k = 1 it is `switch`, which multiplies by the probability p of the expert: its
    outputs are multiplied by E, and the router's weights begin tiny, so that p * E is near 1, and not exactly.

    With `granularity` g each copy is cut into g experts of a g-th of its width. The g pieces of a copy begin with the
    same row of the router (a virtual group), so that a token chooses whole copies, and w2 is multiplied by g, since
    each piece has a g-th of the weight of its copy. Megatron, whose weights are not normalised, divides w1 and w2
    between them the factor E g^2 / k instead, which is right only on average.

    Random numbers come from torch's generator. The optimizer's state is not carried over: none of it fits the experts.

    Args:
        module: all of its layers dense, with feed-forward layers of the class `FeedForward`; it stays as it is.
        num_experts: copies, E.
        k: choices of a token; null: 2, times the granularity. A multiple of the granularity.
        sparse: which blocks become sparse, as `Decoder` and `EncoderDecoder` take it; all by default.
        decoder_sparse: the same for the decoder of an encoder-decoder; null: as the encoder.
        granularity: pieces of each copy, a divisor of the hidden width.
        noise: deviation of a normal noise on the weights of the experts, as a share of the deviation of each matrix.
            Copies differ only by what they are sent until the router tells them apart; noise speeds that up.
        drop: share of each copy's hidden units that are drawn anew, for each copy others (drop-upcycling): normal, with
            the mean and the deviation of the weights that go. The paper found 0.5 best in the long run; it costs
            something at the start.
        capacity_factor: capacity in training, over the sequence; null: dropless. Evaluation is always dropless.
        router_std: deviation of the router's weights; null: sqrt(0.1 / d_model), and 0.001 for k = 1.

    Raises:
        ValueError: a model with sparse layers, or feed-forward layers of another class; a k, granularity or share that
            is impossible; a placement that does not exist, or is empty.

    Source: arXiv 2212.05055 (sparse upcycling), section 3; arXiv 2502.19261 (drop-upcycling), section 3.2; arXiv
    2410.07524, section 3 (virtual groups).
    """
    arguments = net_arguments(module)
    if module.sparse_layers:
        raise ValueError(
            f"the model has {len(module.sparse_layers)} sparse layers already ({module.sparse_layers[0]}, ...): "
            "only a dense model can be upcycled. `switchkit to-dense` makes one of it"
        )
    k = 2 * granularity if k is None else k
    dense = {name: layer for name, layer in module.net.named_modules() if isinstance(layer, FeedForward)}
    first = _checked(module, dense, num_experts, k, granularity, noise, drop)
    if isinstance(module.net, EncoderDecoder):
        arguments |= {"decoder_sparse": _plain(sparse if decoder_sparse is None else decoder_sparse)}
    elif decoder_sparse is not None:
        raise ValueError("decoder_sparse is of an encoder-decoder, and this model is a Decoder: leave it out")
    arguments |= {"num_experts": num_experts, "expert_d_ff": None, "sparse": _plain(sparse)}
    std = TINY if router_std is None and k == 1 else router_std
    router: Any = Switch if k == 1 else partial(TopK, k=k)
    router = router if std is None else partial(router, init_std=std)
    experts: Any = partial(GatedMlp if first.gate is not None else Mlp, activation=first.activation)
    moe = partial(
        MoELayer,
        router=router,
        capacity=Dropless if capacity_factor is None else partial(Factor, train=capacity_factor),
        experts=partial(experts, dropout=first.dropout) if first.dropout else experts,
        granularity=granularity,
    )
    losses = module.spec["init_args"]["losses"] or describe([Balance])
    made = rebuilt(module, arguments, moe=describe(moe), losses=losses)
    layers = moe_layers(made.net)
    if not layers:
        raise ValueError(f"sparse={sparse!r} makes no layer sparse: name one at least")
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    for name, layer in layers.items():
        up, down = (state.pop(f"net.{name}.{part}.weight") for part in ("up", "down"))
        gate = state.pop(f"net.{name}.gate.weight", None)
        into = up if gate is None else torch.cat([gate, up])
        w1, w2 = (weight.t().expand(num_experts, *weight.t().shape).clone() for weight in (into, down))
        _redraw(w1, w2, drop)
        # Gate and values lie side by side in w1, and are matrices of their own.
        for weight in (*w1.split(w2.shape[1], dim=-1), w2) if noise else ():
            weight += noise * weight.float().std().to(weight.dtype) * torch.randn_like(weight)
        w1, w2 = _cut(w1, w2, granularity)
        state[f"net.{name}.experts.w1"] = w1
        state[f"net.{name}.experts.w2"] = w2 * (num_experts if k == 1 else granularity)
        state[f"net.{name}.router.weight"] = _router_rows(layer, granularity).to(up)
    made.load_state_dict(state, assign=True)
    return made


def _checked(
    module: LanguageModule,
    dense: dict[str, FeedForward],
    num_experts: int,
    k: int,
    granularity: int,
    noise: float,
    drop: float,
) -> FeedForward:
    """The first of the layers to copy; or a ValueError."""
    blocks = [name for name, part in module.net.named_modules() if name.endswith(".mlp")]
    for name in blocks:
        part = module.net.get_submodule(name)
        if type(part) is not FeedForward:
            raise ValueError(f"{name} is a {type(part).__name__}, which experts cannot express; only FeedForward is")
    # Whether the granularity divides the width of each layer that becomes sparse, `MoELayer` checks.
    at_least(1, num_experts=num_experts, granularity=granularity)
    if not 1 <= k <= num_experts * granularity:
        raise ValueError(f"k={k} choices of a token are impossible: k must be from 1 to {num_experts * granularity}")
    if k % granularity:
        raise ValueError(
            f"k={k} with granularity={granularity} would choose parts of a copy: make k a multiple of {granularity}"
        )
    if not (math.isfinite(noise) and noise >= 0):
        raise ValueError(f"noise must be a finite number >= 0; got {noise}")
    if not 0 <= drop <= 1:
        raise ValueError(f"drop is a share of the hidden units, from 0 to 1; got {drop}")
    return next(iter(dense.values()))


def _redraw(w1: Float[Tensor, "E D H"], w2: Float[Tensor, "E F D"], share: float) -> None:
    """In place: another `share` of the hidden units of each expert drawn from the statistics of what they were.

    Each of the matrices into and out of the units has a mean and a deviation of its own, of the units that go alone.
    """
    width = w2.shape[1]
    count = math.floor(share * width)
    if not count:
        return
    for into, out in zip(w1, w2, strict=True):
        gone = torch.randperm(width, device=w1.device)[:count]
        for part in into.split(width, dim=-1):
            part[:, gone] = _like(part[:, gone])
        out[gone] = _like(out[gone])


def _like(weight: Tensor) -> Tensor:
    """A normal draw with the mean and the deviation of `weight`."""
    known = weight.float()
    return (known.mean() + known.std(correction=0) * torch.randn_like(known)).to(weight.dtype)


def _cut(w1: Float[Tensor, "E D H"], w2: Float[Tensor, "E F D"], pieces: int) -> tuple[Tensor, Tensor]:
    """Each expert as `pieces` neighbours of a part of its hidden units."""
    width = w2.shape[1] // pieces
    count, wide = len(w1), w2.shape[1]
    halves = torch.split(w1, wide, dim=-1)
    parts = [half.reshape(count, -1, pieces, width).transpose(1, 2) for half in halves]
    return torch.cat(parts, dim=-1).flatten(0, 1), w2.reshape(count * pieces, width, -1)


def _router_rows(layer: MoELayer, granularity: int) -> Float[Tensor, "E D"]:
    """A fresh router's weights, the same row for all pieces of a copy."""
    layer.router.to_empty(device="cpu")
    layer.router.reset_parameters()  # type: ignore[operator]
    weight = layer.router.weight
    assert isinstance(weight, nn.Parameter)
    return weight.detach()[::granularity].repeat_interleave(granularity, 0)


def _plain(placement: str | Sequence[int]) -> Any:
    return placement if isinstance(placement, str) else list(placement)

"""What experts are used for, against a loop over assignments."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from switchkit import (
    Cosine,
    Decoder,
    EncoderDecoder,
    Factor,
    GShard,
    Hash,
    LanguageModule,
    MoELayer,
    NoTokenLeftBehind,
    Sigmoid,
    Switch,
    TopK,
)
from switchkit.convert.comparing import change
from switchkit.convert.measuring import assumed, measure, weight_of_every_token

V = 11
TIGHT = partial(Factor, train=1.0, eval=0.6)


def decoder(router: partial, *, allow_leak: bool = False, **more) -> LanguageModule:
    net = partial(Decoder, d_model=8, num_layers=2, num_heads=2, d_ff=12, num_experts=3, context=10, sparse="every(1)")
    net = partial(net, allow_leak=allow_leak)
    return LanguageModule(net, moe=partial(MoELayer, router=router, **more), vocab_size=V)


def batches(source: bool = False) -> list[dict[str, torch.Tensor]]:
    made = []
    for rows, length in ((3, 10), (2, 7)):
        valid = torch.ones(rows, length, dtype=torch.bool)
        valid[0, 4:] = False
        one = {"tokens": torch.randint(V, (rows, length)), "targets": torch.randint(V, (rows, length)), "valid": valid}
        made.append({**one, "source": one["targets"], "source_valid": valid} if source else one)
    return made


@pytest.mark.parametrize("source", [False, True])
@pytest.mark.parametrize(
    "moe",
    [
        {"router": Switch},
        {"router": partial(TopK, k=2)},
        {"router": partial(TopK, k=2, normalize="after"), "capacity": TIGHT},
        {"router": Switch, "capacity": TIGHT},
        {"router": partial(Switch, offset=True)},
    ],
    ids=["switch", "top_k", "dropping", "switch_dropping", "offset"],
)
def test_measured_against_a_loop(moe: dict, source: bool) -> None:
    module = decoder(**moe)
    if source:
        net = partial(
            EncoderDecoder, d_model=8, encoder_layers=2, decoder_layers=1, num_heads=2, num_experts=3, sparse=[0]
        )
        module = LanguageModule(net, moe=partial(MoELayer, **moe), vocab_size=V)
    for name, parameter in module.named_parameters():
        if name.endswith(".offset"):
            torch.nn.init.normal_(parameter)  # of padding it is the only logit
    data = batches(source)
    found = measure(module, data)
    assert [use.layer for use in found.layers] == module.sparse_layers
    nats, count, seen = 0.0, 0, []
    for batch in data:
        more = {name: batch[name] for name in ("source", "source_valid") if name in batch}
        out = module.eval().net(batch["tokens"], batch["valid"], **more)
        seen.append(out.routings)
        for row in range(len(batch["tokens"])):
            for place in range(batch["tokens"].shape[1]):
                if batch["valid"][row, place]:
                    nats -= F.log_softmax(out.logits[row, place].detach(), -1)[batch["targets"][row, place]].item()
                    count += 1
    assert found.loss == pytest.approx(nats / count, rel=1e-6)
    for index, use in enumerate(found.layers):
        load, weight, tokens = [0] * 3, [0.0] * 3, 0
        undropped = 0.0
        logits = []
        for routings in seen:
            routing = routings[index]
            for g in range(len(routing.valid)):
                tokens += int(routing.valid[g].sum())
                logits += [routing.logits[g, s].detach() for s in range(routing.valid.shape[1]) if routing.valid[g, s]]
                for n in range(routing.token.shape[1]):
                    if routing.chosen[g, n]:
                        expert = int(routing.expert[g, n])
                        load[expert] += 1
                        undropped += float(routing.weight[g, n].detach())
                        weight[expert] += float(routing.weight[g, n].detach()) * bool(routing.kept[g, n])
        assert use.tokens == tokens
        assert use.load.tolist() == load
        assert use.weight.tolist() == pytest.approx(weight, rel=1e-5)
        assert use.gate == pytest.approx(sum(weight) / tokens, rel=1e-5)
        # Where what is kept is normalised, the weights of a token would sum to one.
        undropped = undropped if getattr(moe["router"], "func", moe["router"]) is Switch else tokens
        assert use.gate_undropped == pytest.approx(undropped / tokens, rel=1e-5)
        table = torch.stack(logits).double()
        cosine = F.cosine_similarity(table.t()[:, None], table.t()[None], dim=-1)
        torch.testing.assert_close(use.alike, cosine, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("router", [partial(Switch, init_std=3.0), partial(TopK, k=2, normalize="never", init_std=3.0)])
def test_overflow_that_went_elsewhere_counts_as_if_it_had_not(router: partial) -> None:
    """What its expert would weigh does not depend on the room that there was."""
    more = {"capacity": partial(NoTokenLeftBehind, train=1.0, eval=1.0)}
    module, (data, *_) = decoder(router, allow_leak=True, **more), batches()
    found = measure(module, [data]).layers[0]
    for layer in module.net.blocks:
        layer.mlp.capacity.eval = None
    free = measure(module, [data]).layers[0]
    assert found.gate < free.gate
    assert found.gate_undropped == pytest.approx(free.gate_undropped, rel=1e-5)


def test_the_model_stays_as_it_was() -> None:
    """A block that is frozen in evaluation mode stays there, too."""
    module = decoder(partial(Switch, jitter=0.5)).train()
    module.net.blocks[0].eval()
    modes = [part.training for part in module.modules()]
    first, second = (measure(module, batch) for batch in [batches()[:1]] * 2)
    assert [part.training for part in module.modules()] == modes
    assert change(module, module).logits == 0
    assert [part.training for part in module.modules()] == modes
    assert all(parameter.grad is None for parameter in module.parameters())
    assert first.loss == second.loss


def test_a_limit_reads_so_many() -> None:
    module, data = decoder(Switch), batches()
    assert measure(module, data, limit=1).loss == measure(module, data[:1]).loss
    assert measure(module, data).loss != measure(module, data[:1]).loss


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(ValueError, match="no batch with a real token"):
        measure(decoder(Switch), [])


class Wide(Hash):
    """With a matrix that has no row for each expert."""

    def __init__(self, *sizes: int, **given: int) -> None:
        super().__init__(*sizes, **given)
        self.weight = torch.nn.Parameter(torch.randn(5, self.d_model))


def test_without_data_all_are_used_alike() -> None:
    module = decoder(Switch)
    use = assumed(module).layers[1]
    assert use.share.tolist() == [pytest.approx(1 / 3)] * 3
    assert use.gate == 1.0
    rows = module.net.blocks[1].mlp.router.weight.detach()
    wanted = F.cosine_similarity(rows[:, None], rows[None], dim=-1)
    torch.testing.assert_close(use.alike.float(), wanted, rtol=1e-5, atol=1e-6)
    for rowless in (Hash, Wide):
        assert torch.equal(assumed(decoder(rowless)).layers[1].alike, torch.eye(3, dtype=torch.float64))
    cosine = decoder(Cosine)
    rows = cosine.net.blocks[1].mlp.router.embedding.detach()
    wanted = F.cosine_similarity(rows[:, None], rows[None], dim=-1)
    torch.testing.assert_close(assumed(cosine).layers[1].alike.float(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("router", "known"),
    [
        (partial(Sigmoid, k=2, scale=2.5), 2.5),
        (partial(Sigmoid, k=2, normalize=False), None),
        (partial(TopK, k=2, scale=3.0), 3.0),
        (partial(TopK, k=2, softmax="after", normalize="never"), 1.0),
        (partial(TopK, k=2, normalize="after", scale=2.0), 2.0),
        (partial(TopK, k=2, normalize="never"), None),
        (partial(TopK, k=3, normalize="never"), 1.0),
        (partial(GShard, eval_second="threshold", init_std=3.0), None),
        (partial(Hash, k=2), 1.0),
        (partial(Switch, init_std=1.0), None),
    ],
    ids=str,
)
def test_without_data_weights_sum_to_what_they_always_do(router: partial, known: float | None) -> None:
    """As data would say; to 1 where only data can say."""
    module = decoder(router)
    found = weight_of_every_token(module.net.blocks[0].mlp)
    assert found == (None if known is None else pytest.approx(known, rel=1e-5))
    assert assumed(module).layers[0].gate == pytest.approx(known or 1.0, rel=1e-5)
    if known is not None:
        assert measure(module, batches()).layers[0].gate == pytest.approx(known, rel=1e-5)

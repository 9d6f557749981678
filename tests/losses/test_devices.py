"""The losses on devices, against loops written from equations 23 to 31 of DeepSeek-V2."""

from __future__ import annotations

import oracle
import pytest
import torch
from properties import Case, collapsed, run

from switchkit import Balance, CommunicationBalance, DeviceBalance, Routing


def record(k: int = 3, experts: int = 6) -> Routing:
    return run(Case(k=k, num_experts=experts).layer(), *Case().inputs())[1]


def paper(r: Routing, devices: int, limit: int, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Device-level and communication balance of the sequences `rows` taken together."""
    experts = r.logits.shape[-1]
    real = [(g, s) for g in rows for s in range(r.valid.shape[1]) if r.valid[g, s]]
    choices = {t: set() for t in real}
    for g in rows:
        for n in range(r.expert.shape[1]):
            if r.chosen[g, n]:
                choices[g, int(r.token[g, n])].add(int(r.expert[g, n]))
    f = [experts / (r.k * len(real)) * sum(e in choices[t] for t in real) for e in range(experts)]
    p = [sum(r.probs[t][e] for t in real) / len(real) for e in range(experts)]
    size = experts // devices
    device = communication = torch.zeros((), dtype=torch.float64)
    for d in range(devices):
        mine = range(d * size, (d + 1) * size)
        total = sum(p[e] for e in mine)
        device = device + sum(f[e] for e in mine) / size * total
        sent = sum(any(e in choices[t] for e in mine) for t in real)
        communication = communication + devices / (limit * len(real)) * sent * total
    return device, communication


@pytest.mark.parametrize("devices", [1, 2, 3, 6])
def test_they_are_those_of_the_paper(devices: int) -> None:
    r = record()
    limit = min(devices, 2)
    device, communication = paper(r, devices, limit, [0, 1, 2])
    assert oracle.error(DeviceBalance(devices=devices)([r]), device) < 1e-12
    assert oracle.error(CommunicationBalance(devices=devices, limit=limit)([r]), communication) < 1e-12


def test_each_sequence_may_be_taken_by_itself() -> None:
    r = record()
    pairs = [paper(r, 3, 3, [row]) for row in range(3)]
    assert oracle.error(DeviceBalance(devices=3, per="sequence")([r]), sum(d for d, _ in pairs) / 3) < 1e-12
    assert oracle.error(CommunicationBalance(devices=3, per="sequence")([r]), sum(c for _, c in pairs) / 3) < 1e-12


@pytest.mark.parametrize("experts", [1, 3, 4])
def test_a_device_for_each_expert_is_the_balance_loss(experts: int) -> None:
    r = record(k=min(2, experts), experts=experts)
    assert oracle.error(DeviceBalance()([r]), Balance()([r])) < 1e-12
    assert oracle.error(CommunicationBalance()([r]), Balance()([r])) < 1e-12


def test_a_single_device_is_a_constant() -> None:
    assert DeviceBalance(devices=1)([record()]).item() == pytest.approx(1)


def test_a_token_counts_once_for_a_device() -> None:
    """Three choices on device 0 and one on device 1 of two: half of the traffic, three quarters of the work."""
    r = collapsed(1, k=4, num_experts=8)
    r = type(r)(**{**vars(r), "probs": torch.zeros(1, 6, 8).double().index_fill(-1, torch.tensor([0]), 1)})
    assert DeviceBalance(devices=2)([r]).item() == pytest.approx(2 * 3 / 4)
    assert CommunicationBalance(devices=2)([r]).item() == pytest.approx(2 * 1 / 2)


def test_sizes_that_do_not_fit_are_refused() -> None:
    for loss in (DeviceBalance(devices=4), CommunicationBalance(devices=4)):
        with pytest.raises(ValueError, match=r"devices=4 cannot hold equal shares of 6 experts: use one of \[1, 2, 3"):
            loss([record()])
    with pytest.raises(ValueError, match="limit=3 devices of a token are more than devices=2"):
        CommunicationBalance(devices=2, limit=3)([record()])


@pytest.mark.parametrize("devices", [2, 3, 6])
def test_overflow_that_went_elsewhere_counts_for_the_router_s_choice(devices: int) -> None:
    """Capacity policies come after the router's choice, as the paper's token dropping does."""
    case = Case(k=2, num_experts=6, capacity="no_token_left_behind", capacity_options=(("eval", 0.8),))
    layer, inputs = case.layer(), case.inputs()
    moved = run(layer, *inputs)[1]
    alone = layer.router(inputs[0].masked_fill(~inputs[1].unsqueeze(-1), 0), None, inputs[1], inputs[2])
    assert (moved.expert != alone.expert).any()
    device, communication = paper(alone, devices, 2, [0, 1, 2])
    assert oracle.error(DeviceBalance(devices=devices)([moved]), device) < 1e-12
    assert oracle.error(CommunicationBalance(devices=devices, limit=2)([moved]), communication) < 1e-12
    pairs = [paper(alone, devices, 2, [row]) for row in range(3)]
    each = (
        DeviceBalance(devices=devices, per="sequence"),
        CommunicationBalance(devices=devices, limit=2, per="sequence"),
    )
    for loss, terms in zip(each, zip(*pairs, strict=True), strict=True):
        assert oracle.error(loss([moved]), sum(terms) / 3) < 1e-12

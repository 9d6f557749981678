"""Plans: what fits, in which order, and why the rest does not."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from rich.console import Console

from switchkit import Decoder, EncoderDecoder, GatedMlp, MoELayer, Null, TopK
from switchkit.counts import count
from switchkit.plan import GPUS, PRECISIONS, Gpu, Work, gpu_from, plan, precision_named, state_bytes
from switchkit.report import plan as report

NET = partial(Decoder, d_model=64, num_layers=2, num_heads=4, d_ff=128, num_experts=6, context=32, sparse="every(1)")
ADAM = partial(torch.optim.AdamW, lr=1e-3)
WORK = Work(2, 32, PRECISIONS["bf16-true"])
NUMBERS = {"memory_gib": 80, "bf16_tflops": 1000, "fp32_tflops": 60, "node_gb_per_s": 400, "network_gb_per_s": 50}


def model(**options):
    with torch.device("meta"):
        return NET(vocab_size=100, moe=partial(MoELayer, router=partial(TopK, k=2), experts=GatedMlp), **options)


def made(net=None, work=WORK, gpu=GPUS["h100"], nodes=2, gpus=4, **more):
    return plan(net or model(), ADAM, work, gpu, nodes=nodes, gpus=gpus, **more)


def test_every_arrangement_is_there_once():
    found = made()
    names = [str(one.arrangement) for one in (*found.fits, *found.rest)]
    # Of 8 devices: any number of copies that leaves a multiple of the devices that share out the experts.
    sizes = [(e, r) for e in (1, 2) for r in (1, 2, 4, 8) if 8 // r % e == 0]
    wanted = [f"expert_parallel_size={e}, data_parallel_replicate={r}" for e, r in sizes]
    assert sorted(names) == sorted(["ddp", *wanted])
    assert [(one.what, one.why.partition(": ")[2]) for one in found.refused] == [
        ("expert_parallel_size=4", "use 1, 2, 3 or 6"),
        ("expert_parallel_size=8", "use 1, 2, 3 or 6"),
    ]
    dense = made(model(sparse=[]))
    assert not dense.refused
    assert len(dense.fits) == 5


def test_the_fastest_come_first():
    found = made(nodes=4)
    times = [one.per_token for one in found.fits]
    assert times == sorted(times)
    assert len(set(times)) > 5
    for one in found.fits:
        assert one.tokens == 16 * 64
        assert one.step.total == one.step.exchange + max(one.step.compute, one.step.collectives)


def test_computing_takes_three_forward_passes_and_with_recomputation_four():
    flops, gpu = count(model(), 32).flops, GPUS["h100"]
    (plain, *_), (again, *_) = (made(checkpointing=mode).fits for mode in (False, True))
    assert plain.step.compute == pytest.approx(64 * flops * 3 / (989e12 * 0.4))
    ours = next(one for one in made(checkpointing=True).fits if one.arrangement.activation_checkpointing)
    assert ours.step.compute == pytest.approx(64 * flops * 4 / (989e12 * 0.4))
    slow = made(work=replace(WORK, precision=PRECISIONS["32-true"])).fits[0]
    assert slow.step.compute == pytest.approx(64 * flops * 3 / (gpu.fp32_flops * 0.4))
    assert again is not plain


def test_a_terminal_of_80_columns_cuts_no_number(monkeypatch, capsys):
    monkeypatch.setattr(report, "console", lambda: Console(width=80))
    report.plan_tables(made(nodes=2, gpus=8), replace(WORK, accumulate=3), GPUS["h100"], 2, 8, 0.1, True, "")
    assert "tokens/s" in (told := capsys.readouterr().out)
    assert f"3 micro-batches, {2 * 8 * 3 * WORK.batch * WORK.context:,} tokens on all devices" in told
    assert "…" not in told


def test_memory_by_hand():
    """One machine of two devices, half precision: 2 bytes for a parameter, 2 for its gradient, 4 for Adam's two."""
    net = model()
    total = sum(p.numel() for p in net.parameters())
    found = {str(one.arrangement): one.memory for one in made(net, nodes=1, gpus=2).fits}
    ddp, half = found["ddp"], found["expert_parallel_size=1, data_parallel_replicate=1"]
    tensors = len(list(net.parameters()))
    assert (ddp.parameters, ddp.gradients, ddp.optimizer) == (2 * total, 2 * total, 4 * total + 4 * tensors)
    assert ddp.gathered == ddp.gradients
    assert (half.parameters, half.gradients, half.optimizer) == (total, total, 2 * total + 4 * tensors)
    # The root twice (weights, gradients), the largest block four times.
    root = sum(p.numel() for n, p in net.named_parameters() if not n.startswith("blocks."))
    block = sum(p.numel() for p in net.blocks[0].parameters())
    assert half.gathered == 2 * (2 * root + 4 * block)
    assert half.casts == 0
    mixed = made(net, replace(WORK, precision=PRECISIONS["bf16-mixed"]), nodes=1, gpus=2).fits
    copies = {str(one.arrangement): one.memory.casts for one in mixed}
    matrices = {n: p.numel() for n, p in net.named_parameters() if p.dim() > 1 and "router" not in n}
    experts = sum(size for name, size in matrices.items() if "experts" in name)
    again = made(net, replace(WORK, precision=PRECISIONS["bf16-mixed"]), nodes=1, gpus=2, checkpointing=True).fits
    recomputed = next(one for one in again if "data_parallel_replicate=2" in str(one.arrangement)).memory.casts
    of_blocks = [
        sum(size for n, size in matrices.items() if n.startswith(f"blocks.{i}.")) for i in range(len(net.blocks))
    ]
    assert recomputed == 2 * (sum(matrices.values()) - sum(of_blocks) + max(of_blocks))
    assert copies["ddp"] == 2 * sum(matrices.values())
    assert copies["expert_parallel_size=2, data_parallel_replicate=1"] == 2 * sum(matrices.values()) - experts


def test_accumulation_keeps_whole_gradients():
    net = model()
    total = sum(p.numel() for p in net.parameters())
    found = made(net, replace(WORK, accumulate=4), nodes=1, gpus=2)
    half = {str(one.arrangement): one for one in found.fits}["expert_parallel_size=1, data_parallel_replicate=1"]
    assert half.memory.gradients == total + 2 * total
    assert half.tokens == 4 * 2 * 64
    # What is gathered has its gradients there, but for the block that computes and the one before it.
    root = sum(p.numel() for n, p in net.named_parameters() if not n.startswith("blocks."))
    block = sum(p.numel() for p in net.blocks[0].parameters())
    assert half.memory.gathered == 2 * (root + 3 * block)
    others = [part.seconds(GPUS["h100"]) for part in half.collectives if part.what != "tokens"]
    assert half.step.collectives == pytest.approx(sum(others))
    assert "counts" in {part.what for part in half.collectives}


def test_what_does_not_fit_says_what_is_too_much():
    total = sum(p.numel() for p in model().parameters())
    # Room for the parts of eight devices and for all that is gathered, not for a copy of it all.
    gpu = Gpu("small", 3_000_000, 1e12, 1e12, 1e9, 1e8)
    found = made(gpu=gpu, headroom=0.0)
    assert found.fits
    why = {str(one.arrangement): one.why_not for one in found.rest}
    assert "most is optimizer state" in why["ddp"]
    assert 12 * total > 3_000_000
    needs = [one.memory.total for one in found.rest]
    assert needs == sorted(needs)
    assert all(one.memory.total <= 3_000_000 for one in found.fits)
    none = made(gpu=replace(gpu, memory=1000.0))
    assert not none.fits
    assert len(none.rest) == len(found.fits) + len(found.rest)


def test_blocks_are_computed_again_only_where_it_has_to_be():
    work = replace(WORK, batch=64)
    plain = made(work=work, checkpointing=False)
    most = max(one.memory.total for one in plain.fits)
    gpu = replace(GPUS["h100"], memory=most * 0.97)
    found = made(work=work, gpu=gpu, headroom=0.0).fits
    modes = {one.arrangement.activation_checkpointing for one in found}
    assert modes == {False, True}
    for one in found:
        if one.arrangement.activation_checkpointing:
            same = next(p for p in plain.fits if p.arrangement.layout == one.arrangement.layout)
            assert same.memory.total > gpu.memory


def test_a_busy_device_makes_all_wait():
    even, busy = (made(work=replace(WORK, imbalance=x)) for x in (1.0, 2.0))
    by_name = [{str(one.arrangement): one for one in found.fits} for found in (even, busy)]
    name = "expert_parallel_size=2, data_parallel_replicate=1"
    assert by_name[1][name].step.exchange == pytest.approx(2 * by_name[0][name].step.exchange)
    more = by_name[1][name].step.compute - by_name[0][name].step.compute
    assert more == pytest.approx(64 * count(model(), 32).experts * 3 / (989e12 * 0.4))


def test_an_encoder_decoder():
    with torch.device("meta"):
        net = EncoderDecoder(100, d_model=64, encoder_layers=2, d_ff=128, num_experts=4)
    found = made(net)
    assert len(found.fits) == 1 + 4 + 3 + 2
    assert found.counts.parameters == sum(p.numel() for p in net.parameters())


def test_experts_that_are_not_stacked_are_refused_where_they_are_shared_out():
    with torch.device("meta"):
        net = NET(vocab_size=100, num_experts=8, moe=partial(MoELayer, router=TopK, experts=Null))
    found = made(net)
    assert all(one.arrangement.layout.expert == 1 for one in found.fits)
    assert all("weights stacked" in one.why for one in found.refused)
    assert len(found.refused) == 3


def test_an_optimizer_of_whole_parameters_leaves_ddp_alone():
    found = plan(model(), torch.optim.Adafactor, WORK, GPUS["h100"], nodes=2, gpus=4)
    assert [str(one.arrangement) for one in (*found.fits, *found.rest)] == ["ddp"]
    (refused,) = found.refused
    assert refused.what == "expert_parallel"
    assert "Adafactor of torch cannot step on parameters of which each device has a part" in refused.why


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (torch.optim.AdamW, 8 * 24 + 4),
        (partial(torch.optim.AdamW, fused=True), 8 * 24 + 4),
        (partial(torch.optim.SGD, lr=0.1, momentum=0.9), 4 * 24),
        (partial(torch.optim.SGD, lr=0.1), 0),
        # A row, a column and the steps.
        (torch.optim.Adafactor, 4 * (6 + 4) + 4),
    ],
)
def test_the_state_of_an_optimizer(optimizer, expected):
    assert state_bytes(optimizer, [(6, 4)], torch.float32) == expected
    assert state_bytes(optimizer, [(6, 4)] * 3, torch.float32) == 3 * expected


def test_an_optimizer_that_asks_for_more_is_refused():
    with pytest.raises(ValueError, match=r"the optimizer's state of a parameter \[6, 4\] is not known"):
        state_bytes(torch.optim.LBFGS, [(6, 4)], torch.float32)


def test_a_device_of_a_file():
    found = gpu_from(NUMBERS, "mine.yaml")
    assert (found.memory, found.bf16_flops, found.network_bandwidth) == (80 * 2**30, 1e15, 5e10)
    assert (found.name, found.efficiency) == ("mine.yaml", 0.4)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"memory_gib": None}, "mine.yaml lacks memory_gib; a GPU is memory_gib, bf16_tflops"),
        ({"memory": 80}, "mine.yaml: unknown key 'memory'; known are memory_gib"),
        ({"bf16_tflops": "many"}, "bf16_tflops must be a number > 0; got 'many'"),
        ({"node_gb_per_s": -1}, "node_gb_per_s must be a number > 0; got -1"),
        ({"memory_gib": True}, "memory_gib must be a number > 0; got True"),
        ({"efficiency": 1.01}, "efficiency is a share of the peak, at most 1; got 1.01"),
        ({"efficiency": 40}, "efficiency is a share of the peak, at most 1; got 40"),
    ],
)
def test_bad_devices(change, text):
    with pytest.raises(ValueError, match=text):
        gpu_from({**NUMBERS, **change}, "mine.yaml")


def test_bad_sizes():
    with pytest.raises(ValueError, match="nodes must be at least 1; got 0"):
        made(nodes=0)
    with pytest.raises(ValueError, match="batch must be at least 1; got 0"):
        made(work=replace(WORK, batch=0))
    with pytest.raises(ValueError, match="precision '8-bit' is not planned here: use 32-true"):
        precision_named("8-bit")
    assert [precision_named(word).name for word in (None, 32, "bf16", "16-true")] == [
        "32-true",
        "32-true",
        "bf16-mixed",
        "16-true",
    ]

"""Terms on hidden states and on relations in attention: which layers they match, and what they count."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from pupils import MOE, batch, student, teacher
from small import NET, data, trainer

from switchkit import Decoder, LatentAttention
from switchkit.distill.matching import Matching, even_map, watched


def test_layers_are_paired_evenly():
    assert even_map(range(2), range(6)) == [(0, 2), (1, 5)]
    assert even_map([0, 1, 2], [3, 4, 5]) == [(0, 3), (1, 4), (2, 5)]
    assert even_map(range(4), range(2)) == [(0, 0), (1, 0), (2, 1), (3, 1)]
    for ours in range(1, 13):
        for theirs in range(1, 13):
            found = [other for _, other in even_map(range(ours), range(theirs))]
            assert found == sorted(found), (ours, theirs)
            assert found[-1] == theirs - 1, (ours, theirs)


def test_hooks_see_what_blocks_give_and_are_gone(tmp_path):
    net = teacher(tmp_path).eval().net
    given = batch(tmp_path)
    with watched(net, [0, 1], [1]) as inside:
        net(given["tokens"], given["valid"])
    assert {n: x.shape for n, x in inside.hidden.items()} == {0: (3, 8, 16), 1: (3, 8, 16)}
    # What the norm and the output layer make of the last one are the logits.
    logits = net.norm(inside.hidden[1]) @ net.embed.weight.t()
    assert torch.equal(logits, net(given["tokens"], given["valid"]).logits)
    assert [x.shape[-1] for x in inside.projected[1]] == [16, 16, 16]
    assert not any(part._forward_hooks for part in net.modules())


def test_the_terms_of_a_student(tmp_path):
    """Both terms fall to 0 for a student that is the teacher, and are in the loss with their weights."""
    taught = teacher(tmp_path).eval()
    given = batch(tmp_path)
    same = Matching(taught.net, taught.net, hidden_weight=2.0, attention_weight=3.0)
    ours, theirs = same.watch(taught.net, taught.net)
    with ours as seen, theirs as within:
        taught.net(given["tokens"], given["valid"])
    assert {name: x.item() for name, x in same(seen, within, given).items()} == {"hidden": 0, "relations": 0}
    pupil = student(tmp_path, alpha=0.0, hidden_weight=2.0, attention_weight=3.0)
    pupil.eval()
    _, loss, named = pupil._learn(given)
    assert loss.item() == pytest.approx(
        (named["cross_entropy"] + 2 * named["hidden"] + 3 * named["relations"]).item(), rel=1e-6
    )
    assert min(named["hidden"].item(), named["relations"].item()) > 0
    loss.backward()
    assert all(p.grad is not None for p in pupil.net.parameters())


def test_the_sides_of_an_encoder_decoder_are_matched_by_themselves(tmp_path):
    """Blocks of the encoder are counted over the source, which has another length and other padding."""
    from pupils import pairs, t5_teacher

    from switchkit import DistillModule

    t5_teacher(tmp_path)
    source = pairs(tmp_path)
    pupil = DistillModule(teacher=tmp_path / "t5.ckpt", hidden_weight=1.0, attention_weight=1.0)
    assert pupil.matching.pairs == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert pupil.matching.last == [(1, 1), (3, 3)]
    assert pupil.matching.encoder == {0, 1}
    source.setup("fit")
    given = next(iter(source.train_loader(rank=0, world_size=1)))
    assert given["source"].shape != given["tokens"].shape
    pupil.eval()
    first = pupil._learn(given)[1]
    padded = {**given, "source": given["source"].masked_fill(~given["source_valid"], 7)}
    assert torch.equal(first, pupil._learn(padded)[1])


def test_a_block_of_the_encoder_goes_with_none_of_the_decoder(tmp_path):
    from pupils import t5_teacher

    from switchkit import DistillModule

    t5_teacher(tmp_path)
    taught = partial(DistillModule, teacher=tmp_path / "t5.ckpt", hidden_weight=1.0)
    assert taught(hidden_layers=[[0, 1], [2, 3]]).matching.pairs == [(0, 1), (2, 3)]
    for pair in ([1, 2], [3, 0]):
        with pytest.raises(ValueError, match="a block of an encoder and one of a decoder, which read other tokens"):
            taught(hidden_layers=[[0, 1], pair])


def test_attention_without_plain_projections_is_refused(tmp_path):
    latent = partial(LatentAttention, kv_rank=8, nope_width=4, rope_width=4, v_width=8)
    teacher(tmp_path, net=partial(NET, attention=latent), moe=MOE)
    with pytest.raises(ValueError, match="LatentAttention are not one plain projection"):
        student(tmp_path, attention_weight=1.0)


@pytest.mark.parametrize(("ours", "theirs"), [((12, 6), (16, 2)), ((16, 2), (12, 6))])
def test_heads_of_relations_divide_the_widths_of_both(ours, theirs):
    """6 heads are those of one model, and cut 16 numbers into no equal parts."""
    student, teacher = (
        Decoder(vocab_size=5, d_model=width, num_layers=1, num_heads=heads, d_ff=8, context=8, sparse=[])
        for width, heads in (ours, theirs)
    )
    with pytest.raises(ValueError, match="relation_heads 6 does not divide 16"):
        Matching(student, teacher, attention_weight=1.0, relation_heads=6)


def test_a_narrow_student_is_taken_to_the_teacher_s_width(tmp_path):
    teacher(tmp_path)
    narrow = partial(Decoder, d_model=8, num_layers=1, num_heads=2, d_ff=24, context=8, sparse=[])
    pupil = student(tmp_path, net=narrow, losses=[], hidden_weight=1.0)
    assert {name: tuple(p.shape) for name, p in pupil.matching.named_parameters()} == {"from_0_to_1": (16, 8)}
    assert not any("from_0" in name for name in pupil.state_dict())
    pupil.training_step(batch(tmp_path), 0)["loss"].backward()
    assert pupil.matching.from_0_to_1.grad.abs().sum() > 0
    for other in ({"from_0_to_0": torch.zeros(16, 8)}, {"from_0_to_1": torch.zeros(16, 1)}):
        with pytest.raises(ValueError, match="resume with the hidden_layers and the model of the checkpoint"):
            pupil.matching.load_extra(other)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_the_learned_matrix_has_the_precision_of_the_run(tmp_path, precision):
    """The term is that of the same student in float32, to what its states are rounded to."""
    teacher(tmp_path)
    narrow = partial(Decoder, d_model=8, num_layers=1, num_heads=2, d_ff=24, context=8, sparse=[])
    found = []
    for dtype in (torch.float32, {"bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]):
        pupil = student(tmp_path, net=narrow, losses=[], hidden_weight=1.0).to(dtype)
        _, loss, named = pupil._learn(batch(tmp_path))
        loss.backward()
        assert pupil.matching.from_0_to_1.grad.dtype == dtype
        found.append(named["hidden"].item())
    assert found[1] == pytest.approx(found[0], rel=0.02 if precision == "bf16-true" else 1e-5)
    own = trainer(tmp_path, max_steps=1, precision=precision, limit_val_batches=0)
    own.fit(student(tmp_path, net=narrow, losses=[], hidden_weight=1.0), datamodule=data(tmp_path))
    assert own.global_step == 1


@pytest.mark.parametrize("padded", [True, False])
def test_halves_of_a_batch_with_ignored_targets_are_the_whole(tmp_path, padded):
    """Each half weighs as much as it has real targets, as micro-batches and devices do."""
    teacher(tmp_path)
    pupil = student(tmp_path, init="fresh", hidden_weight=2.0, attention_weight=3.0).eval()
    given = batch(tmp_path, rows=4, padded=padded)
    given["targets"][:2, 1:] = -100
    real = (given["targets"] != -100) & given.get("valid", torch.tensor(True))
    found = {}
    for name, rows in (("whole", slice(None)), ("first", slice(2)), ("second", slice(2, None))):
        pupil.zero_grad()
        _, loss, named = pupil._learn({key: value[rows] for key, value in given.items()})
        loss.backward()
        grads = {key: p.grad.clone() for key, p in pupil.named_parameters()}
        found[name] = {"loss": loss.detach(), **named, **grads}
    share = (real[:2].sum() / real.sum()).item()
    assert 0.05 < share < 0.2
    for key, value in found["whole"].items():
        parts = share * found["first"][key] + (1 - share) * found["second"][key]
        torch.testing.assert_close(parts, value, rtol=1e-4, atol=1e-6)

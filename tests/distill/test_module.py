"""Training by a teacher: what begins how, what is learned, what is left alone, and what a checkpoint holds."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from pupils import MOE, T5, batch, pairs, student, t5_teacher, teacher
from small import NET, data, module, trainer, weights

from switchkit import (
    Attention,
    Balance,
    ByteTokenizer,
    CharTokenizer,
    Decoder,
    DistillModule,
    Dropless,
    GatedMlp,
    LanguageModule,
    Mlp,
    MoELayer,
    checkpoints,
    distillation_loss,
)
from switchkit.convert.measuring import measure
from switchkit.convert.merging import feed_forward_of
from switchkit.data.loader import InOrder
from switchkit.distill.teacher import Teacher, fingerprint, open_teacher
from switchkit.interop.files import save_checkpoint
from switchkit.layers import FeedForward

TWIN = partial(Decoder, d_model=16, num_layers=2, num_heads=2, d_ff=24, context=8, sparse=[], dropout=0.1)


@pytest.fixture
def taught(tmp_path: Path) -> LanguageModule:
    return teacher(tmp_path)


class KillAt(L.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, *rest: Any) -> None:
        if trainer.global_step == self.step:
            raise KeyError("killed")


def net_state(module: LanguageModule) -> dict[str, torch.Tensor]:
    return module.net.state_dict()


# -- how it begins ---------------------------------------------------------------------------------------------------


def test_the_student_is_the_dense_twin_and_begins_with_the_non_expert_weights(taught, tmp_path):
    pupil = student(tmp_path)
    assert pupil.sparse_layers == []
    ours, theirs = net_state(pupil), net_state(taught)
    copied = set(pupil.inherited.copied)
    assert set(pupil.inherited.fresh) == {f"blocks.{i}.mlp.{part}.weight" for i in (0, 1) for part in ("up", "down")}
    assert copied == ours.keys() - set(pupil.inherited.fresh)
    for name in copied:
        assert torch.equal(ours[name], theirs[name]), name
    # What it is trained by is the teacher's, what the mixture alone needed is not.
    assert pupil.losses == []
    assert pupil.warmup_steps == 3
    assert pupil.spec["init_args"]["warmup_steps"] == 3


def test_a_fresh_student_is_that_of_plain_training(taught, tmp_path):
    pupil = student(tmp_path, init="fresh")
    torch.manual_seed(0)
    plain = LanguageModule(TWIN, tokenizer=data(tmp_path).tokenizer)
    assert torch.equal(weights(pupil), weights(plain))
    assert pupil.inherited.copied == ()


@pytest.mark.parametrize("init", ["mean", "usage", "most_used", "aligned"])
def test_layers_made_of_experts(taught, tmp_path, init):
    """As `feed_forward_of` makes them, measured on the batches that training begins with."""
    source = data(tmp_path)
    pupil = student(tmp_path, init=init, init_batches=3)
    source.setup("fit")
    loader = source.train_loader(rank=0, world_size=1)
    batches = [one for _, one in zip(range(3), loader, strict=False)]
    for layer in taught.modules():
        if isinstance(layer, MoELayer):
            layer.capacity = Dropless()
    wanted = {}
    for use in measure(taught, batches).layers:
        made = feed_forward_of(taught.net.get_submodule(use.layer), init, usage=use.load, gate=use.gate)
        wanted |= {f"{use.layer}.{name}": value for name, value in made.items()}
    begun = {}

    class Look(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            begun.update({name: value.clone() for name, value in pl_module.net.state_dict().items()})

    trainer(tmp_path, Look(), steps=1).fit(pupil, source)
    assert set(pupil.inherited.merged) == wanted.keys()
    assert pupil.inherited.fresh == ()
    for name, value in wanted.items():
        assert torch.equal(begun[name], value), name
    # Once: a second fit goes on from where it is.
    now = weights(pupil)
    trainer(tmp_path, steps=1, limit_train_batches=0).fit(pupil, source)
    assert torch.equal(weights(pupil), now)


def test_layers_of_one_expert_are_that_expert(tmp_path):
    """With identical experts the student computes what the teacher does, but for the router's probability."""
    taught = teacher(tmp_path, moe=partial(MoELayer), losses=[])
    with torch.no_grad():
        for layer in taught.net.modules():
            if isinstance(layer, MoELayer):
                for weight in layer.experts.parameters():
                    weight.copy_(weight[:1].expand_as(weight))
                layer.router.weight.zero_()  # every expert with probability 1/3
    pupil = student(tmp_path, teacher=taught, init="mean").eval()
    given = batch(tmp_path)
    pupil.initialize([given])
    ours, theirs = (m.net(given["tokens"], given["valid"]).logits[given["valid"]] for m in (pupil, taught.eval()))
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_weights_that_were_loaded_are_not_made_of_experts_again(taught, tmp_path):
    """As `fit --init_from` loads them: fine-tuned distillation of a student that was distilled before."""
    before = student(tmp_path, init="fresh")
    pupil = student(tmp_path, init="mean")
    pupil.load_state_dict(before.state_dict())
    trainer(tmp_path, steps=1, limit_train_batches=0).fit(pupil, data(tmp_path))
    assert torch.equal(weights(pupil), weights(before))


def test_a_smaller_mixture_learns_too(taught, tmp_path):
    """Half the experts and a narrower dense layer: the shapes that agree are copied, the rest is said."""
    net = partial(NET, num_experts=2, sparse=[1], d_ff=20)
    pupil = student(tmp_path, net=net, moe=MOE)
    assert [type(term) for term in pupil.losses] == [Balance]
    ours, theirs = net_state(pupil), net_state(taught)
    assert "blocks.0.mlp.up.weight" in pupil.inherited.fresh
    assert {name for name in ours if ".experts." in name or ".router." in name} <= set(pupil.inherited.fresh)
    for name in pupil.inherited.copied:
        assert torch.equal(ours[name], theirs[name])
    out = pupil.training_step(batch(tmp_path), 0)
    assert out["stats"]["load"].shape == (1, 2)
    wide = student(tmp_path, net=partial(TWIN, d_model=8, num_heads=2))
    assert "blocks.0.attention.qkv.weight" in wide.inherited.reshaped
    assert "of another shape" in str(wide.inherited)


# -- what is learned -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "temperature"), [(0.25, 1.0), (1.0, 2.0)])
def test_the_loss_of_a_step(taught, tmp_path, alpha, temperature):
    """The teacher in evaluation and dropless, though its own policy binds; the student in training."""
    pupil = student(tmp_path, alpha=alpha, temperature=temperature)
    given = batch(tmp_path)
    torch.manual_seed(1)
    loss = pupil.training_step(given, 0)["loss"]
    for layer in taught.modules():
        if isinstance(layer, MoELayer):
            layer.capacity = Dropless()
    theirs = taught.eval().net(given["tokens"], given["valid"]).logits
    torch.manual_seed(1)
    ours = pupil.net(given["tokens"], given["valid"]).logits
    wanted = distillation_loss(
        ours, theirs, given["targets"], given["valid"], alpha=alpha, temperature=temperature
    ).loss
    assert torch.equal(loss, wanted)
    assert loss.requires_grad


def test_nothing_to_learn_where_the_student_is_the_teacher(tmp_path):
    """A dense teacher, its own student: no divergence, no gradient."""
    taught = teacher(tmp_path, net=partial(TWIN, dropout=0.0), moe=None, losses=[])
    pupil = student(tmp_path, net=partial(TWIN, dropout=0.0), alpha=1.0, losses=[])
    assert torch.equal(weights(pupil.net), weights(taught.net))
    loss = pupil.training_step(batch(tmp_path), 0)["loss"]
    assert loss.item() == 0
    loss.backward()
    assert max(p.grad.abs().max() for p in pupil.parameters()) < 1e-6


def test_alpha_0_is_plain_training_bit_for_bit(taught, tmp_path, monkeypatch):
    def never(*given):
        raise AssertionError("the teacher was asked")

    monkeypatch.setattr(Teacher, "__call__", never)
    source = data(tmp_path)
    pupil = student(tmp_path, init="fresh", alpha=0.0)
    torch.manual_seed(7)
    trainer(tmp_path, steps=12).fit(pupil, source)
    torch.manual_seed(0)
    plain = LanguageModule(TWIN, tokenizer=source.tokenizer, losses=[], warmup_steps=3)
    torch.manual_seed(7)
    trainer(tmp_path, steps=12).fit(plain, data(tmp_path))
    assert torch.equal(weights(pupil), weights(plain))


def test_padding_changes_nothing(taught, tmp_path):
    given = batch(tmp_path)
    other = {**given, "tokens": given["tokens"].masked_fill(~given["valid"], 1)}
    other["targets"] = given["targets"].masked_fill(~given["valid"], -100)
    pupil = student(tmp_path, net=partial(TWIN, dropout=0.0), hidden_weight=1.0, attention_weight=1.0)
    losses = [pupil.training_step(one, 0)["loss"] for one in (given, other)]
    assert torch.equal(*losses)


def test_the_fingerprint_is_of_names_too():
    """A model that has the same numbers elsewhere is another one."""
    part = torch.nn.Linear(2, 2)
    first, again, other = (fingerprint(torch.nn.ModuleDict({name: part})) for name in ("gate", "gate", "up"))
    assert first == again != other


def test_the_teacher_is_left_alone(taught, tmp_path):
    """No part of the state or the optimizer, and unchanged, as is a module that was given."""
    before = fingerprint(taught)
    capacities = [type(layer.capacity) for layer in taught.modules() if isinstance(layer, MoELayer)]
    for given in (tmp_path / "teacher.ckpt", taught.train()):
        pupil = student(tmp_path, teacher=given, teacher_precision=None)
        inside = fingerprint(pupil.teacher.module)
        trainer(tmp_path, steps=5).fit(pupil, data(tmp_path))
        assert fingerprint(pupil.teacher.module) == inside == before == fingerprint(taught)
        own = {id(p) for p in pupil.parameters()}
        assert not own & {id(p) for p in pupil.teacher.module.parameters()}
        groups = pupil.trainer.optimizers[0].param_groups
        assert {id(p) for group in groups for p in group["params"]} == own
        assert not any("teacher" in name for name in pupil.state_dict())
        assert all(p.grad is None and not p.requires_grad for p in pupil.teacher.module.parameters())
        assert not pupil.teacher.module.training
    assert taught.training
    assert [type(layer.capacity) for layer in taught.modules() if isinstance(layer, MoELayer)] == capacities


def test_a_teacher_in_bfloat16(taught, tmp_path):
    pupil = student(tmp_path, teacher=taught, teacher_precision="bf16")
    assert {p.dtype for p in pupil.teacher.net.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in taught.net.parameters()} == {torch.float32}
    given = batch(tmp_path)
    exact = student(tmp_path).teacher(given).logits
    assert 0 < (pupil.teacher(given).logits.float() - exact).abs().max() < 0.05
    assert torch.isfinite(pupil.training_step(given, 0)["loss"])
    # A checkpoint says whose weights they are in the file, whatever they are kept in.
    assert pupil.teacher.about["sha256"] == fingerprint(taught)


@pytest.mark.gpu
def test_the_teacher_follows_the_data(taught, tmp_path):
    pupil = student(tmp_path).cuda()
    given = {name: value.cuda() for name, value in batch(tmp_path).items()}
    pupil.training_step(given, 0)["loss"].backward()
    assert {p.device.type for p in pupil.teacher.net.parameters()} == {"cuda"}


def test_the_teacher_is_measured_on_the_student_s_batches(taught, tmp_path):
    """By the batches that are given, each token counting once."""
    pupil = student(tmp_path)
    source = data(tmp_path)
    source.setup("fit")
    batches = [one for _, one in zip(range(2), source.evaluation_loader(None), strict=False)]
    nats, tokens = 0.0, 0
    for one in batches:
        logits = pupil.teacher(one).logits
        for row, wanted, real in zip(logits, one["targets"], one["valid"], strict=True):
            nats -= float(row.log_softmax(-1).gather(-1, wanted[:, None])[real].sum())
            tokens += int(real.sum())
    (_, told), _ = pupil.closing_rows(iter(batches), nats / tokens + 0.5)
    assert told == f"{nats / tokens:.4f} nats per token; the student is 0.5000 above it"


@pytest.mark.slow
def test_an_encoder_decoder_and_its_task(tmp_path):
    """Distilled on the pairs that the teacher learned: the student comes nearer to it."""
    taught = t5_teacher(tmp_path)
    source = pairs(tmp_path)
    trainer(tmp_path / "taught", steps=40, val_check_interval=5, limit_val_batches=1).fit(taught, source)
    torch.manual_seed(0)
    pupil = DistillModule(teacher=taught, tokenizer=source.tokenizer)
    assert "encoder.blocks.0.mlp.up.weight" in pupil.inherited.copied
    assert "decoder.blocks.1.mlp.up.weight" in pupil.inherited.fresh
    pupil = DistillModule(teacher=taught, tokenizer=source.tokenizer, alpha=1.0, init="fresh")
    assert pupil.sparse_layers == []
    given = next(iter(source.train_loader(rank=0, world_size=1)))
    pupil.eval()
    before = pupil._learn(given)[1].item()
    trainer(tmp_path, steps=40).fit(pupil.train(), source)
    pupil.eval()
    assert pupil._learn(given)[1].item() < 0.8 * before


# -- checkpoints -----------------------------------------------------------------------------------------------------

EXTRAS = {"hidden_weight": 0.5, "attention_weight": 0.5, "net": partial(TWIN, d_model=8)}


def fit(folder: Path, *callbacks: L.Callback, resume: bool = False, **more: Any) -> DistillModule:
    pupil = student(folder, **more)
    torch.manual_seed(1 if not resume else 99)
    path = checkpoints.last(folder / "runs") if resume else None
    trainer(folder / "runs", *callbacks, steps=20).fit(pupil, data(folder), ckpt_path=path)
    return pupil


@pytest.mark.daily("twin")
@pytest.mark.parametrize("more", [{}, EXTRAS, {"init": "usage"}], ids=["twin", "matching", "merged"])
def test_resume_is_bit_identical(taught, tmp_path, more):
    whole = fit(tmp_path, **more)
    for file in (tmp_path / "runs").rglob("*.ckpt"):
        file.unlink()
    with pytest.raises(KeyError, match="killed"):
        fit(tmp_path, KillAt(13), **more)
    assert torch.equal(weights(fit(tmp_path, resume=True, **more)), weights(whole))


def test_a_checkpoint_is_the_student_s_alone(taught, tmp_path):
    """Read where the teacher is not, by what reads any checkpoint; learned projections are beside it."""
    pupil = fit(tmp_path, **EXTRAS)
    assert len(list(pupil.matching.parameters())) == 2
    (tmp_path / "teacher.ckpt").unlink()
    path = checkpoints.last(tmp_path / "runs")
    read = LanguageModule.load_from_checkpoint(path)
    assert type(read) is LanguageModule
    assert torch.equal(weights(read), weights(pupil.net))
    assert checkpoints.read(path)["switchkit"]["projections"].keys() == dict(pupil.matching.named_parameters()).keys()
    assert list(read.generate(torch.tensor([1, 2]), 3))


def test_what_an_imported_teacher_s_files_said_is_the_student_s_too(tmp_path):
    """Where its texts begin and end; not where the student's vocabulary is not known to be the same."""
    teacher(tmp_path)
    known = open_teacher(tmp_path / "teacher.ckpt").module
    known.hugging_face = {"config": {"eos_token_id": 3}, "generation": {"eos_token_id": [3, 4]}}
    assert known.end_ids == (3, 4)
    pupil = student(tmp_path, teacher=known)
    save_checkpoint(pupil, tmp_path / "student.ckpt")
    assert pupil.hugging_face == known.hugging_face
    assert LanguageModule.load_from_checkpoint(tmp_path / "student.ckpt").end_ids == (3, 4)
    bare = LanguageModule(NET, vocab_size=26)
    bare.hugging_face = known.hugging_face
    assert student(tmp_path, teacher=bare, optimizer=torch.optim.SGD).end_ids == ()


def test_experts_of_another_activation_are_not_merged_into_a_layer(tmp_path):
    """It would compute something else with their weights; one of theirs computes what an expert does."""
    silu = partial(MOE, experts=partial(Mlp, activation="silu"))
    taught = teacher(tmp_path, moe=silu)
    with pytest.raises(ValueError, match="have the activation silu, and the student's layer there relu"):
        student(tmp_path, init="mean").initialize([batch(tmp_path)])
    pupil = student(tmp_path, init="mean", net=partial(TWIN, feed_forward=partial(FeedForward, activation="silu")))
    pupil.initialize([batch(tmp_path)])
    use = measure(pupil.teacher.module, [batch(tmp_path)]).layers[0]
    own, layer = (net.get_submodule(use.layer) for net in (pupil.net, taught.net))
    x = torch.randn(1, 3, 16)
    w1, w2 = layer.experts.w1.mean(0), layer.experts.w2.mean(0)
    assert torch.allclose(own.eval()(x), use.gate * torch.nn.functional.silu(x @ w1) @ w2, atol=1e-5)


class Squared(FeedForward):
    def forward(self, x):
        return self.down(self.up(x).relu().square())


def test_nor_into_one_of_a_class_of_one_s_own(taught, tmp_path):
    pupil = student(tmp_path, init="mean", net=partial(TWIN, feed_forward=Squared))
    with pytest.raises(ValueError, match="the student's blocks.0.mlp is a Squared"):
        pupil.initialize([batch(tmp_path)])


@pytest.mark.parametrize("init", ["non_expert", "mean", "usage"])
def test_a_student_begins_alike_whatever_its_teacher_is_kept_in(taught, tmp_path, init):
    """With the weights of the file, and not with them rounded."""
    pupils = [student(tmp_path, init=init, teacher_precision=precision) for precision in (None, "bf16")]
    for pupil in pupils:
        if init != "non_expert":
            pupil.initialize([batch(tmp_path)])
    exact, kept = (pupil.net.state_dict() for pupil in pupils)
    assert all(torch.equal(kept[name], value) for name, value in exact.items())
    assert torch.equal(kept["embed.weight"], taught.net.embed.weight)
    assert {p.dtype for p in pupils[1].teacher.net.parameters()} == {torch.bfloat16}


def test_resuming_with_another_teacher_is_refused(taught, tmp_path):
    with pytest.raises(KeyError, match="killed"):
        fit(tmp_path, KillAt(8))
    torch.manual_seed(11)
    other = LanguageModule(NET, moe=MOE, tokenizer=data(tmp_path).tokenizer)
    with pytest.raises(ValueError, match="has other weights: resume with the same teacher"):
        fit(tmp_path, resume=True, teacher=other)


def test_the_random_state_is_left_alone_by_a_teacher(taught, tmp_path):
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    open_teacher(tmp_path / "teacher.ckpt")
    assert torch.equal(torch.rand(3), wanted)


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"teacher": None}, "a student needs a teacher"),
        ({"teacher": 3}, "must be the path of a checkpoint or a LanguageModule; got a int"),
        ({"teacher": "gone.ckpt"}, "there is no checkpoint gone.ckpt"),
        ({"alpha": 1.5}, "alpha is the teacher's share of the loss, from 0 to 1; got 1.5"),
        ({"temperature": 0.0}, "temperature must be a finite number > 0; got 0.0"),
        ({"init": "half"}, "init must be"),
        ({"init_batches": 0}, "init_batches must be at least 1; got 0"),
        ({"teacher_precision": "fp8"}, "teacher_precision must be null or 'bf16'; got 'fp8'"),
        ({"tokenizer": CharTokenizer("abc")}, "reads another vocabulary"),
        ({"tokenizer": ByteTokenizer()}, "reads another vocabulary"),
        ({"vocab_size": 99}, "vocab_size 99: the teacher's logits have 23 symbols"),
        ({"net": T5}, "the teacher is a decoder and the student an encoder-decoder"),
        ({"hidden_weight": -1.0}, "hidden_weight must be a finite number of at least 0; got -1.0"),
        ({"hidden_weight": 1.0, "hidden_layers": [[0, 2]]}, r"got \[0, 2\]"),
        ({"hidden_weight": 1.0, "hidden_layers": []}, "hidden_layers is empty"),
        ({"attention_weight": 1.0, "relation_heads": 3}, "relation_heads 3 does not divide 16"),
        ({"hidden_layers": [[0, 1]]}, "hidden_layers .* does nothing while hidden_weight is 0: set it above 0"),
        ({"relation_heads": 2}, "relation_heads 2 does nothing while attention_weight is 0: set it above 0"),
        ({"init_batches": 3}, "init_batches 3 does nothing with init 'non_expert', which measures nothing: take init"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_cannot_be(taught, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        student(tmp_path, **more)


def test_a_dense_teacher_needs_a_student(tmp_path):
    teacher(tmp_path, net=TWIN, moe=None, losses=[])
    with pytest.raises(ValueError, match="by itself .this model is dense already.*give net"):
        student(tmp_path)


def test_data_of_the_other_kind(taught, tmp_path):
    given = {**batch(tmp_path), "source": torch.zeros(3, 4, dtype=torch.long)}
    with pytest.raises(ValueError, match="the data are for the other kind of model"):
        student(tmp_path).training_step(given, 0)


def test_experts_that_no_dense_layer_can_be_made_of(tmp_path):
    teacher(tmp_path, moe=partial(MoELayer, experts=GatedMlp))
    pupil = student(tmp_path, net=TWIN, init="mean")
    with pytest.raises(ValueError, match="the experts of blocks.0.mlp make a layer with"):
        pupil.initialize([batch(tmp_path)])


def test_a_merge_needs_data_of_ours(taught, tmp_path):
    source = data(tmp_path)
    source.setup("fit")
    loader = InOrder(source.train_tokens, 8, 4)
    with pytest.raises(ValueError, match="call initialize"):
        trainer(tmp_path, steps=1).fit(student(tmp_path, init="mean"), loader, loader)


def test_plain_modules_are_not_touched_by_the_split_of_the_step(tmp_path):
    """The seam that this module uses: what a plain module minimises is what it logs as cross-entropy."""
    plain = module(data(tmp_path))
    _, learned, named = plain._learn(batch(tmp_path))
    assert torch.equal(learned, named["cross_entropy"])
    assert isinstance(plain.net.blocks[0].attention, Attention)

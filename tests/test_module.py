"""The LightningModule: loss, steps, checkpoints, generation and bad numbers."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from small import MOE, NET, TOP2, data, module, trainer, weights
from torch import nn

from switchkit import (
    Balance,
    CharTokenizer,
    Decoder,
    EncoderDecoder,
    LanguageModule,
    Mlp,
    MoELayer,
    Null,
    RouterZ,
    Shared,
    Sigmoid,
    TextData,
    TopK,
    checkpoints,
)
from switchkit.callbacks import SaveLast, UpdateRouterBias
from switchkit.callbacks.router_bias import bias_update
from switchkit.callbacks.save import checkpoint_folder
from switchkit.losses.base import Loss
from switchkit.models import Output
from switchkit.optim import check_optimizer, decay_groups, learning_rate
from switchkit.sampling import probabilities, sample
from switchkit.step import NonFiniteError, Seen, weighted_means


def test_the_loss_is_cross_entropy_plus_weighted_terms(tmp_path: Path) -> None:
    source = data(tmp_path)
    model = module(source, moe=TOP2)
    loop = trainer(tmp_path, steps=1)
    loop.fit(model, source)
    model.eval()
    batch = next(iter(source.train_dataloader()))
    out = model.net(batch["tokens"])
    nats = [
        -F.log_softmax(row, -1)[t] for row, t in zip(out.logits.flatten(0, 1), batch["targets"].flatten(), strict=True)
    ]
    terms = 0.01 * Balance()(out.routings) + 0.01 * RouterZ()(out.routings)
    step = model.training_step(batch, 0)
    torch.testing.assert_close(step["loss"], torch.stack(nats).mean() + terms)
    assert step["stats"]["load"].shape == (2, 3)
    assert step["stats"]["load"].sum(-1).tolist() == [64, 64]
    assert not any(value.requires_grad for value in step["stats"].values())


def test_two_terms_of_a_kind_are_logged_each(tmp_path: Path) -> None:
    source = data(tmp_path)
    model = module(source, moe=TOP2, losses=[partial(Balance, weight=0.5), RouterZ, partial(Balance, weight=0.1)])
    batch = next(iter(source.train_dataloader()))
    model.training_step(batch, 0)
    means = weighted_means(model._step.batches)
    assert list(means) == ["loss", "cross_entropy", "balance", "router_z", "balance_2"]
    terms = sum(term.weight * means[name] for term, name in zip(model.losses, list(means)[2:], strict=True))
    assert math.isclose(means["loss"], means["cross_entropy"] + terms, rel_tol=1e-6)


def test_data_that_a_model_cannot_read_are_refused_before_the_first_batch(tmp_path: Path) -> None:
    model = module(data(tmp_path))
    long = TextData(str(tmp_path / "text.txt"), context=65)
    with pytest.raises(ValueError, match="data.context 65 is longer than model.net.context"):
        trainer(tmp_path, steps=1).fit(model, long)


def test_a_cosine_needs_a_last_step(tmp_path: Path) -> None:
    source = data(tmp_path)
    endless = {"steps": -1, "max_epochs": -1, "max_time": "00:00:00:01"}
    with pytest.raises(ValueError, match="schedule 'cosine' ends with the run, and this run has no last step"):
        trainer(tmp_path, **endless).fit(module(source), source)
    loop = trainer(tmp_path, **endless)
    loop.fit(module(source, schedule="constant"), source)
    assert loop.global_step > 0
    assert loop.optimizers[0].param_groups[0]["lr"] == 3e-3


def test_the_cosine_ends_with_the_epochs_where_they_end_first(tmp_path: Path) -> None:
    source = data(tmp_path)
    loop = trainer(tmp_path, steps=1000, max_epochs=1)
    loop.fit(module(source), source)
    assert 10 < loop.global_step < 100
    assert loop.optimizers[0].param_groups[0]["lr"] < 0.12 * 3e-3


@pytest.mark.parametrize("options", [{"log_every_n_steps": 0}, {"barebones": True}], ids=str)
def test_a_run_that_logs_nothing(tmp_path: Path, options: dict[str, Any]) -> None:
    source = data(tmp_path)
    none = dict.fromkeys(("enable_progress_bar", "enable_checkpointing", "logger", "enable_model_summary"), False)
    loop = L.Trainer(accelerator="cpu", max_steps=3, default_root_dir=tmp_path, **none, **options)
    loop.fit(module(source), source)
    assert loop.global_step == 3


def test_a_row_is_of_the_steps_since_the_last_one(tmp_path: Path) -> None:
    """What routers were counted, and the norm of the gradient as it was before it is clipped."""
    counted, rows, norms, routing = [], [], [], []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: Any, *rest: Any) -> None:
            counted.append(int(module.train_routing.load.sum()))

        def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, *rest: Any) -> None:
            norms.append(float(torch.cat([p.grad.flatten() for p in module.parameters()]).norm()))
            routing.append(module.train_routing.compute())

    class Kept(CSVLogger):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            rows.append(metrics)

    source = data(tmp_path)
    loop = trainer(tmp_path, Watch(), steps=5, gradient_clip_val=1e-3, num_sanity_val_steps=0)
    loop.loggers = [Kept(tmp_path, name="")]
    loop.fit(module(source), source)
    of_a_step = 2 * 4 * 8  # tokens, in two layers
    assert counted == [of_a_step, 0, of_a_step, 0, of_a_step]
    assert [row["train/grad_norm"] for row in rows] == pytest.approx(norms[1::2], rel=1e-5)
    # The worst layer, and the mean over layers.
    assert [row["train/imbalance"] for row in rows] == [max(found["imbalance"].tolist()) for found in routing[1::2]]
    assert [row["train/dropped"] for row in rows] == [float(found["dropped"].mean()) for found in routing[1::2]]


class Own(Loss):
    """Somebody's, which gives what it was made with."""

    def __init__(self, found: Any, begun: bool = True, scope: Any = "micro") -> None:
        if begun:
            super().__init__(1.0)
        self.found, self.scope = found, scope

    def __call__(self, routings: Any) -> Any:
        return self.found


class Learned(Loss, nn.Module):
    """With a number that it would learn."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        Loss.__init__(self, 1.0)
        self.scale = nn.Parameter(torch.ones(()))


class Holds(Loss):
    def __init__(self) -> None:
        super().__init__(1.0)
        self.part = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("losses", "text"),
    [
        (Balance, "losses must be a list of classes or functools.partials"),
        ([Learned], "the loss Learned has parameters or buffers, which would be neither trained nor saved"),
        ([Holds], "the loss Holds has parameters or buffers"),
        ([partial(Own, found=1.0, begun=False)], "the loss Own has no weight: call super"),
        (
            [partial(Own, found=1.0, scope="step")],
            "must be 'micro', 'rank' or 'global'; got 'step'",
        ),
        ([partial(Own, found=0.5)], "the loss Own must return a tensor without dimensions; got 0.5"),
        ([partial(Own, found=[1, 2])], "the loss Own must return a tensor without dimensions; got \\[1, 2\\]"),
    ],
)
def test_losses_that_are_none(tmp_path: Path, losses: Any, text: str) -> None:
    source = data(tmp_path)
    with pytest.raises(ValueError, match=text):
        module(source, losses=losses).training_step(next(iter(source.train_dataloader())), 0)


class OwnNet(nn.Module):
    """Somebody's, of two sparse layers that are called in another order than they stand in.

    `records`: which of them it returns, and how often.
    """

    def __init__(self, vocab_size: int, *, moe: Any = None, records: str = "late early") -> None:
        super().__init__()
        self.records = records.split()
        self.embed = nn.Embedding(vocab_size, 8)
        self.late = (moe or MoELayer)(d_model=8, num_experts=3, d_ff=8)
        self.early = (moe or MoELayer)(d_model=8, num_experts=3, d_ff=8)
        self.head = nn.Linear(8, vocab_size)

    def forward(self, tokens: torch.Tensor, valid: torch.Tensor | None = None) -> Output:
        x, found = self.embed(tokens), {}
        for name in ("early", "late"):
            y, found[name] = getattr(self, name)(x, valid, tokens)
            x = x + y
        return Output(self.head(x), tuple(found[name] for name in self.records))


@pytest.mark.parametrize("method", ["fit", "validate"])
@pytest.mark.parametrize(
    ("records", "text"),
    [
        (
            "early late",
            "OwnNet returned the records .* in the order early, late; return them in .* named_modules: late, e",
        ),
        (
            "late",
            r"OwnNet returned 1 routing records for 2 sparse layers \(late, early\): return one for each MoELayer",
        ),
        ("late early late", "OwnNet returned 3 routing records for 2 sparse layers"),
    ],
)
def test_records_are_one_for_each_layer_in_order(tmp_path: Path, method: str, records: str, text: str) -> None:
    source = data(tmp_path)
    model = module(source, net=partial(OwnNet, records=records))
    with pytest.raises(ValueError, match=text):
        getattr(trainer(tmp_path, steps=2, num_sanity_val_steps=0), method)(model, source)


def test_layers_may_be_called_in_any_order(tmp_path: Path) -> None:
    """And each router's bias moves by the load of its own layer."""
    source = data(tmp_path)
    model = module(source, net=OwnNet, moe=partial(MoELayer, router=partial(Sigmoid, k=1)), losses=[])
    loads = {}
    for name in ("late", "early"):
        layer = model.net.get_submodule(name)
        layer.register_forward_hook(lambda _layer, _given, out, name=name: loads.update({name: out[1].load.sum(0)}))
    trainer(tmp_path, UpdateRouterBias(0.1), steps=1, num_sanity_val_steps=0, limit_val_batches=0).fit(model, source)
    for name, load in loads.items():
        assert torch.equal(model.net.get_submodule(name).router.bias, bias_update(load, 0.1))
    assert not torch.equal(loads["late"], loads["early"])
    assert [len(layer._forward_hooks) for layer in (model.net.late, model.net.early)] == [1, 1]


class OwnStep(LanguageModule):
    """With nothing of the counting."""

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return self(batch["tokens"]).square().mean()


def test_a_subclass_may_have_a_step_of_its_own(tmp_path: Path) -> None:
    source = data(tmp_path)
    model = OwnStep(NET, moe=MOE, tokenizer=source.tokenizer)
    loop = trainer(tmp_path, steps=3)
    loop.fit(model, source)
    assert loop.global_step == 3


def test_steps_by_hand_are_steps_of_their_own(tmp_path: Path) -> None:
    source = data(tmp_path)
    model = module(source, net=partial(NET, dropout=0.0), moe=TOP2)
    batch = next(iter(source.train_dataloader()))
    half = {name: value[:2] for name, value in batch.items()}
    losses = [float(model.training_step(given, 0)["loss"].detach()) for given in (batch, half, batch)]
    assert losses[0] == losses[2]
    assert len(model._step.batches) == 1


class OwnData(L.LightningDataModule):
    """Somebody's, made with a path and a function."""

    def __init__(self, root: Path, transform: Any = None) -> None:
        super().__init__()
        self.root, self.transform = root, transform

    def train_dataloader(self) -> Any:
        return data(self.root).train_dataloader()

    def val_dataloader(self) -> Any:
        return data(self.root).val_dataloader()


def test_data_of_ones_own_need_no_description(tmp_path: Path) -> None:
    model = module(data(tmp_path))
    loop = trainer(tmp_path, SaveLast(2), steps=2)
    with pytest.warns(UserWarning, match="OwnData cannot be written into a checkpoint"):
        loop.fit(model, OwnData(tmp_path, transform=lambda batch: batch))
    path = checkpoint_folder(loop) / "last.ckpt"
    assert checkpoints.read(path)["switchkit"]["data"] is None
    LanguageModule.load_from_checkpoint(path)
    loop = trainer(tmp_path, SaveLast(2), steps=2)
    loop.fit(model, OwnData(tmp_path))
    found = checkpoints.read(checkpoint_folder(loop) / "last.ckpt")["switchkit"]["data"]
    assert found["init_args"] == {"root": str(tmp_path), "transform": None}


@pytest.mark.parametrize(
    ("optimizer", "text"),
    [
        (partial(torch.optim.AdamW, lr=-1.0), "optimizer: Invalid learning rate: -1"),
        (
            partial(torch.optim.SGD, lr=0.1, weight_decay=float("nan")),
            "optimizer SGD: weight_decay must be a finite number; got nan",
        ),
        (partial(torch.optim.SGD, rate=0.1), "optimizer: .*'rate'"),
    ],
)
def test_options_that_the_optimizer_refuses(tmp_path: Path, optimizer: Any, text: str) -> None:
    """When a run begins, and not where a model is loaded to generate."""
    source = data(tmp_path)
    model = module(source, optimizer=optimizer)
    with pytest.raises(ValueError, match=text):
        trainer(tmp_path, steps=1).fit(model, source)


def test_a_fused_optimizer_is_not_clipped_in_mixed_precision(tmp_path: Path) -> None:
    """Lightning's error comes in the first step, and does not name the options."""
    source = data(tmp_path)
    fused = {"optimizer": partial(torch.optim.AdamW, lr=1e-3, fused=True)}
    with pytest.raises(ValueError, match="a fused AdamW .* gradient_clip_val=1 in precision bf16-mixed: leave fused"):
        trainer(tmp_path, steps=1, precision="bf16-mixed").fit(module(source, **fused), source)
    trainer(tmp_path, steps=1).fit(module(source, **fused), source)
    trainer(tmp_path, steps=1, precision="bf16-mixed", gradient_clip_val=None).fit(module(source, **fused), source)


def test_an_optimizer_that_cannot_be_built_yet_is_left_to_the_run() -> None:
    def needs(error: Exception) -> Any:
        def factory(params: Any) -> Any:
            raise error

        return factory

    check_optimizer(needs(RuntimeError("FusedAdam requires cuda extensions")))
    check_optimizer(needs(ValueError("Default process group has not been initialized")))
    with pytest.raises(ValueError, match="optimizer: no"):
        check_optimizer(needs(ValueError("no")))


def test_padding_is_in_no_loss(tmp_path: Path) -> None:
    model = module(data(tmp_path)).eval()
    tokens, targets = torch.randint(9, (2, 8)), torch.randint(9, (2, 8))
    valid = torch.ones(2, 8, dtype=torch.bool)
    valid[1, 5:] = False
    got = model.predict_step({"tokens": tokens, "targets": targets, "valid": valid}, 0)["nats"]
    short = model.predict_step({"tokens": tokens[1:, :5], "targets": targets[1:, :5]}, 0)["nats"]
    torch.testing.assert_close(got[1, :5], short[0])
    assert (got[1, 5:] == 0).all()


def test_validation_loss_is_weighted_by_tokens(tmp_path: Path) -> None:
    """900 characters: 90 held out, windows of 8, so the last is ragged; the mean is over its real tokens alone."""
    source = data(tmp_path)
    model = module(source)
    result = trainer(tmp_path).validate(model, source, verbose=False)[0]
    with torch.no_grad():
        nats = torch.cat([model.eval().predict_step(b, 0)["nats"].flatten() for b in source.predict_dataloader()])
    assert math.isclose(result["val/loss"], float(nats.sum()) / 89, rel_tol=1e-5)
    assert 0 < result["val/accuracy"] < 1
    found = [model.predict_step(batch, 0) for batch in source.predict_dataloader()]
    right = [(one["best"] == one["targets"])[one["valid"]] for one in found]
    assert math.isclose(result["val/accuracy"], float(torch.cat(right).float().mean()), rel_tol=1e-5)
    assert math.isclose(result["val/bits"], result["val/loss"] / math.log(2), rel_tol=1e-5)
    assert math.isclose(result["val/perplexity"], math.exp(result["val/loss"]), rel_tol=1e-4)


@pytest.mark.parametrize("before", ["validate", "test"])
def test_a_run_begins_after_an_evaluation(tmp_path: Path, before: str) -> None:
    """With one Trainer, which validates in inference mode, and in training as well."""
    source = data(tmp_path)
    model = module(source)
    loop = trainer(tmp_path, steps=8, num_sanity_val_steps=0)
    getattr(loop, before)(model, source, verbose=False)
    loop.fit(model, source)
    assert loop.global_step == 8
    assert "val/loss" in loop.callback_metrics


class Break(L.Callback):
    """As an exception, or Ctrl-C in a notebook, does."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, self.breaks)

    def breaks(self, trainer: L.Trainer, *rest: Any) -> None:
        if not trainer.sanity_checking:
            raise KeyError("broke off")


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_an_evaluation_that_broke_off_is_no_part_of_the_next(tmp_path: Path, stage: str) -> None:
    source = data(tmp_path)
    model = module(source)
    with pytest.raises(KeyError, match="broke off"):
        trainer(tmp_path, Break("on_validation_batch_end"), steps=7).fit(model, source)
    first, again = (getattr(trainer(tmp_path), stage)(model, source, verbose=False) for _ in range(2))
    assert first == again


def test_the_last_load_is_no_sanity_check_s(tmp_path: Path) -> None:
    """Shares of an evaluation, and zeros before there is one."""
    source = data(tmp_path)
    model = module(source)
    trainer(tmp_path, steps=2, num_sanity_val_steps=1).fit(model, source)
    assert not model.last_load.any()
    trainer(tmp_path).validate(model, source, verbose=False)
    torch.testing.assert_close(model.last_load.sum(-1), torch.ones(2))


def test_a_run_that_broke_off_is_no_part_of_the_next(tmp_path: Path) -> None:
    """What it has counted since its last row."""
    source = data(tmp_path)
    model = module(source)
    with pytest.raises(KeyError, match="broke off"):
        trainer(tmp_path, Break("on_train_batch_end"), steps=7).fit(model, source)
    counted: list[float] = []
    model._log_training = lambda: counted.append(float(model.train_routing.load.sum()))
    trainer(tmp_path, steps=2).fit(model, source)
    assert counted == [2 * 2 * 4 * 8]  # tokens of two steps, in two layers


def test_validation_in_bfloat16_is_summed_in_full(tmp_path: Path) -> None:
    source = data(tmp_path, context=8)
    model = module(source)
    loop = trainer(tmp_path, precision="bf16-true")
    loop.validate(model, source, verbose=False)
    total, count = 0.0, 0
    model.eval()
    for batch in source.val_dataloader():
        logits = model.net(batch["tokens"], batch.get("valid")).logits.detach().double()
        nats = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="none")
        real = batch["valid"].flatten() if "valid" in batch else torch.ones_like(nats, dtype=torch.bool)
        total, count = total + float(nats[real].sum()), count + int(real.sum())
    assert math.isclose(float(loop.callback_metrics["val/loss"]), total / count, rel_tol=1e-5)


def test_accumulated_steps_equal_one_big_batch(tmp_path: Path) -> None:
    """Same windows in 1 x 8 and in 4 x 2, no dropout and no balance loss, which is not linear in the batch."""
    finals = []
    for size, accumulate in ((8, 1), (2, 4)):
        folder = tmp_path / str(size)
        folder.mkdir()
        source = data(folder, batch_size=size)
        model = LanguageModule(
            partial(NET, dropout=0.0), moe=TOP2, losses=[], tokenizer=source.tokenizer,
            optimizer=partial(torch.optim.SGD, lr=0.1),
        )  # fmt: skip
        torch.manual_seed(3)
        for p in model.parameters():
            p.data.normal_(std=0.1)
        trainer(folder, steps=3, accumulate_grad_batches=accumulate).fit(model, source)
        finals.append(weights(model))
    assert torch.linalg.norm(finals[0] - finals[1]) < 1e-5 * torch.linalg.norm(finals[0])


@pytest.mark.parametrize(
    ("scope", "ranks", "counted"),
    [("micro", 1, "own"), ("rank", 2, "sum"), ("global", 1, "sum"), ("global", 2, "both")],
)
@pytest.mark.parametrize("layers", ["mean", "sum", "pooled"])
def test_a_balance_loss_counts_over_its_scope(
    scope: str, ranks: int, counted: str, layers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two micro-batches of a step: f of the second from its own counts, from both, or from both of two equal ranks
    plus what the other rank has more of expert 0 each time; P always its own."""
    more = torch.tensor([[5, 0, 0, 0]])
    torch.manual_seed(0)
    model = LanguageModule(
        NET, moe=TOP2, losses=[partial(Balance, weight=1.0, layers=layers, scope=scope)], vocab_size=11
    )
    # Without a trainer each would be a step of its own.
    model._trainer = SimpleNamespace(world_size=ranks, callbacks=[])
    if ranks == 2:
        # Twice everything, and what the other rank has more.
        monkeypatch.setattr(
            Seen,
            "everywhere",
            lambda own: Seen(2 * own.targets, 2 * own.load + more[:, :3], 2 * own.tokens, own.bad),
        )
    batches = [{"tokens": torch.randint(0, 11, (3, 8)), "targets": torch.randint(0, 11, (3, 8))} for _ in range(2)]
    model.eval()  # the records are the same again below
    losses = [model.training_step(batch, i)["loss"] for i, batch in enumerate(batches)]
    outs = [model.net(batch["tokens"]) for batch in batches]
    entropy = F.cross_entropy(outs[1].logits.flatten(0, 1), batches[1]["targets"].flatten())
    counts = [torch.stack([r.load.sum(0) for r in out.routings]) for out in outs]
    both = counts[0] + counts[1]
    used = {"own": counts[1], "sum": both, "both": 2 * (both + more[:, :3])}[counted].double()
    probs = torch.stack([r.probs.mean((0, 1)) for r in outs[1].routings]).double()
    if layers == "pooled":
        used, probs = used.sum(0, keepdim=True), probs.mean(0, keepdim=True)
    terms = 3 * (used / used.sum(-1, keepdim=True) * probs).sum(-1)
    expected = entropy + (terms.sum() if layers == "sum" else terms.mean())
    assert math.isclose(losses[1].item(), expected.item(), rel_tol=1e-5)


def test_a_scope_lasts_one_optimizer_step(tmp_path: Path) -> None:
    """Two steps of two micro-batches: what the scope counts is gone after each."""
    source = data(tmp_path)
    model = LanguageModule(NET, moe=TOP2, losses=[partial(Balance, scope="rank")], tokenizer=source.tokenizer)
    trainer(tmp_path, steps=2, accumulate_grad_batches=2).fit(model, source)
    assert model._step.load("global") is None


def test_checkpoint_rebuilds_model_and_tokenizer(tmp_path: Path) -> None:
    source = data(tmp_path)
    model = module(source, moe=TOP2)
    trainer(tmp_path, steps=5).fit(model, source)
    path = tmp_path / "version_0/checkpoints/last.ckpt"
    again = LanguageModule.load_from_checkpoint(path)
    assert torch.equal(weights(again), weights(model))
    assert isinstance(again.net.blocks[0].mlp.router, TopK)
    assert again.tokenizer == source.tokenizer
    assert again.spec == model.spec
    assert [type(term) for term in again.losses] == [Balance, RouterZ]
    # A rebuilt model saves the same description, so that it can be rebuilt again.
    source_again = data(tmp_path, tokenizer=again.tokenizer)
    trainer(tmp_path, steps=1).fit(again, source_again)
    LanguageModule.load_from_checkpoint(tmp_path / "version_1/checkpoints/last.ckpt")


@pytest.mark.parametrize("changed", [False, True])
def test_another_text_under_the_name_of_the_checkpoint_s_is_told(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, changed: bool
) -> None:
    source = data(tmp_path)
    trainer(tmp_path, steps=1).fit(module(source), source)
    path = tmp_path / "version_0/checkpoints/last.ckpt"
    if changed:
        text = tmp_path / "text.txt"
        text.write_text(text.read_text()[::-1])
    again = TextData(str(tmp_path / "text.txt"), context=source.context, tokenizer=source.tokenizer)
    trainer(tmp_path, steps=1).validate(module(again), again, ckpt_path=path)
    told = [str(one.message) for one in recwarn if "the text is not the one that" in str(one.message)]
    assert len(told) == changed


def test_load_from_checkpoint_takes_what_lightning_s_takes(tmp_path: Path) -> None:
    source = data(tmp_path)
    loop = trainer(tmp_path, steps=1)
    loop.fit(module(source), source)
    path = checkpoint_folder(loop) / "last.ckpt"
    for given in ("cpu", torch.device("cpu"), None):
        LanguageModule.load_from_checkpoint(path, given, weights_only=True)
    with pytest.raises(ValueError, match="map_location must be a device, such as 'cuda:0'; got <function"):
        LanguageModule.load_from_checkpoint(path, lambda storage, place: storage)
    wider = partial(NET, sparse=[])
    with pytest.raises(ValueError, match="these weights belong to another model"):
        LanguageModule.load_from_checkpoint(path, net=wider)
    half = LanguageModule.load_from_checkpoint(path, net=wider, strict=False)
    whole = LanguageModule.load_from_checkpoint(path)
    assert torch.equal(half.net.embed.weight, whole.net.embed.weight)
    with pytest.raises(ValueError, match=r"last.ckpt holds a switchkit.module.LanguageModule, which is no Another"):
        Another.load_from_checkpoint(path)


class Another(LanguageModule):
    """Somebody's."""


def test_load_from_checkpoint_with_another_part(tmp_path: Path) -> None:
    source = data(tmp_path)
    trainer(tmp_path, steps=1).fit(module(source), source)
    path = tmp_path / "version_0/checkpoints/last.ckpt"
    assert LanguageModule.load_from_checkpoint(path, losses=[]).losses == []
    with pytest.raises(
        ValueError, match=r"another model: .*net.blocks.0.mlp.experts.w1 \[3, 16, 24\] for \[5, 16, 24\]"
    ):
        LanguageModule.load_from_checkpoint(path, net=partial(NET, num_experts=5))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "needs tokenizer= or vocab_size="),
        (
            {"vocab_size": 1, "tokenizer": CharTokenizer("ab")},
            "vocab_size=1 is too small for the tokenizer, which has 2",
        ),
        ({"vocab_size": 3, "warmup_steps": -1}, "warmup_steps must be at least 0; got -1"),
        ({"vocab_size": 3, "schedule": "linear"}, "'cosine' or 'constant'; got 'linear'"),
        ({"vocab_size": 3, "final_lr": 2.0}, "from 0 to 1; got 2.0"),
        ({"vocab_size": 3, "moe": lambda **sizes: None}, "LanguageModule.moe.*cannot be written into a checkpoint"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        LanguageModule(NET, **arguments)


class Poison(L.Callback):
    """Makes one token's embedding infinite before a step, in the middle of training."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, model: Any, batch: Any, index: int) -> None:
        if trainer.global_step == self.step:
            with torch.no_grad():
                model.net.embed.weight[batch["tokens"][0, 3]] = math.inf


def test_non_finite_router_input_stops_training_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    source = data(tmp_path)
    with pytest.raises(
        NonFiniteError, match=r"router input \(blocks.0.mlp: \d+ tokens.*at step 8; the optimizer did not"
    ):
        trainer(tmp_path, Poison(7), steps=20).fit(module(source), source)
    kept = LanguageModule.load_from_checkpoint(tmp_path / "version_0/checkpoints/last.ckpt")
    assert bool(torch.isfinite(weights(kept)).all())


@pytest.mark.parametrize(("every", "newest"), [(5, "best"), (8, "last")])
def test_the_last_good_checkpoint_is_the_newest(tmp_path: Path, every: int, newest: str) -> None:
    """best.ckpt is of step 7, last.ckpt of step 5 or 8."""

    class Settled(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *rest: Any) -> None:
            trainer.strategy.checkpoint_io.wait()  # saves of a running fit come into their place later

    source = data(tmp_path)
    with pytest.raises(NonFiniteError, match=rf"at step 9; .*the last good checkpoint is \S*{newest}\.ckpt\."):
        trainer(tmp_path, Settled(), Poison(8), every=every, steps=20).fit(module(source), source)


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    source = data(tmp_path)
    loop = trainer(tmp_path, steps=5)
    model = module(source)
    loop.fit(model, source)
    before = (tmp_path / "version_0/checkpoints/last.ckpt").read_bytes()
    saver = next(c for c in loop.callbacks if isinstance(c, SaveLast))
    saver._saved_at = -1
    with torch.no_grad():
        model.net.norm.weight[0] = math.nan
    with pytest.raises(
        NonFiniteError, match="net.norm.weight are not finite after step 5; the last good checkpoint is"
    ):
        saver.save(loop)
    assert (tmp_path / "version_0/checkpoints/last.ckpt").read_bytes() == before


def test_weights_whose_sum_overflows_are_saved(tmp_path: Path) -> None:
    source, loop = data(tmp_path), trainer(tmp_path, steps=1)
    model = module(source)
    loop.fit(model, source)
    saver = next(c for c in loop.callbacks if isinstance(c, SaveLast))
    saver._saved_at = -1
    with torch.no_grad():
        model.net.norm.weight.fill_(3e38)
    assert model.net.norm.weight.sum().isinf()
    saver.save(loop)
    assert saver._saved_at == 1


def test_decay_spares_norms_biases_embeddings_and_routers() -> None:
    model = LanguageModule(NET, moe=partial(MOE, experts=partial(Mlp, bias=True)), vocab_size=5)
    decay, spare = decay_groups(model)
    names = {id(p): n for n, p in model.named_parameters()}
    products = ("attention.qkv.weight", "attention.out.weight", "mlp.experts.w1", "mlp.experts.w2")
    assert {names[id(p)] for p in decay} == {f"net.blocks.{i}.{name}" for i in (0, 1) for name in products}
    assert {names[id(p)] for p in decay + spare} == set(names.values())
    assert len(decay + spare) == len(names)


class Gained(Mlp):
    """With a gain and a shift of each expert's output."""

    def __init__(self, d_model: int, d_ff: int, num_experts: int) -> None:
        super().__init__(d_model, d_ff, num_experts)
        self.gain = torch.nn.Parameter(torch.ones(num_experts, d_model))
        self.shift = torch.nn.Parameter(torch.zeros(num_experts, d_model))


@pytest.mark.parametrize(
    ("experts", "matrices"),
    [
        (Gained, {"w1", "w2"}),
        (partial(Null, constant=1), {"gate", "routed.w1", "routed.w2"}),
        (partial(Shared, mix="gate"), {"mix_weight", "routed.w1", "routed.w2", "shared.w1", "shared.w2"}),
    ],
)
def test_decay_spares_stacked_vectors_and_relative_positions(experts: Any, matrices: set[str]) -> None:
    sizes = {"d_model": 8, "encoder_layers": 1, "num_heads": 2, "d_ff": 8, "num_experts": 4, "sparse": "every(1)"}
    net = EncoderDecoder(11, **sizes, moe=partial(MoELayer, experts=experts))
    names = {id(p): n for n, p in net.named_parameters()}
    decay = {names[id(p)] for p in decay_groups(net)[0]}
    assert {n.partition(".experts.")[2] for n in decay if ".experts." in n} == matrices
    assert not any("relative" in name for name in decay)


def test_learning_rate_in_closed_form() -> None:
    rate = partial(learning_rate, 10, 110, "cosine", 0.1)
    assert [round(rate(step), 6) for step in (0, 4, 9, 10)] == [0.1, 0.5, 1.0, 1.0]
    assert math.isclose(rate(60), 0.55)
    assert math.isclose(rate(110), 0.1)
    assert math.isclose(rate(500), 0.1)
    assert learning_rate(0, 10, "constant", 0.1, 9) == 1.0


def test_generation_sees_the_context_only_and_repeats_with_its_seed(tmp_path: Path) -> None:
    model = module(data(tmp_path))
    prompt = torch.randint(model.tokenizer.vocab_size, (20,))
    draws = [list(model.generate(prompt, 12, generator=torch.Generator().manual_seed(s))) for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert model.training
    greedy = list(model.generate(prompt, 3, temperature=0))
    ids = prompt
    # The context of 8 is full at once, and its older half forgotten.
    for token, seen in zip(greedy, (8, 4, 5), strict=True):
        assert token == int(model.eval().net(ids[-seen:].view(1, -1)).logits[0, -1].argmax())
        ids = torch.cat([ids, torch.tensor([token])])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"temperature": -1}, "temperature must be a finite number >= 0.*got -1"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_k": 0}, "top_k must be at least 1; got 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]; got 0.0"),
        ({"top_p": 1.5}, "top_p"),
    ],
)
def test_bad_generation_options(tmp_path: Path, options: dict[str, Any], text: str) -> None:
    model = LanguageModule(NET, vocab_size=5)
    with pytest.raises(ValueError, match=text):
        model.generate(torch.tensor([1]), 3, **options)
    with pytest.raises(ValueError, match="prompt is empty"):
        model.generate(torch.tensor([], dtype=torch.long), 3)


def test_sampling_follows_the_softmax_and_its_cuts() -> None:
    """6,000 draws; five standard deviations of a share are 0.032 at most, and the temperature moves shares by more."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    generator = torch.Generator().manual_seed(0)

    def shares(temperature: float, top_k: int | None = None, top_p: float | None = None) -> torch.Tensor:
        drawn = sample(temperature, top_k, top_p, generator, logits.expand(6000, 4))
        return torch.bincount(drawn, minlength=4) / 6000

    def near(got: torch.Tensor, want: torch.Tensor) -> bool:
        return bool(((got - want).abs() < 0.032).all())

    assert near(shares(1.0), logits.softmax(-1))
    assert near(shares(2.0), (logits / 2).softmax(-1))
    assert not near(shares(2.0), logits.softmax(-1))
    assert near(shares(1.0, top_k=2), F.pad(logits[:2].softmax(-1), (0, 2)))
    # The two likeliest hold 0.64 + 0.24 of the probability: top_p = 0.7 needs both and no third.
    assert near(shares(1.0, top_p=0.7), F.pad(logits[:2].softmax(-1), (0, 2)))
    assert shares(1.0, top_p=0.01)[0] == 1
    assert sample(0, None, None, None, logits) == 0


@pytest.mark.parametrize(
    ("top_k", "top_p", "wanted"),
    [
        (None, 0.5, [0.5, 0.5, 0, 0]),  # two have reached it, so that no third stays
        (None, 0.51, [1 / 3, 1 / 3, 1 / 3, 0]),
        (3, 0.5, [0.5, 0.5, 0, 0]),  # of three with a third each
        (3, 1.0, [1 / 3, 1 / 3, 1 / 3, 0]),
    ],
)
def test_what_is_left_of_equal_tokens(top_k: int | None, top_p: float, wanted: list[float]) -> None:
    """Of four, at a temperature that their equality does not show; what is left adds up to 1."""
    torch.testing.assert_close(probabilities(torch.zeros(4), 0.7, top_k, top_p), torch.tensor(wanted))


def test_a_dense_model_trains_without_routing(tmp_path: Path) -> None:
    source = data(tmp_path)
    model = module(source, net=partial(Decoder, d_model=16, num_layers=2, num_heads=2, d_ff=24, context=8, sparse=[]))
    loop = trainer(tmp_path, steps=3)
    loop.fit(model, source)
    assert model.sparse_layers == []
    assert "val/imbalance" not in loop.callback_metrics


def test_a_dense_model_stays_on_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a record that would say where it is; `meta` stands for any device but the CPU."""
    net = partial(Decoder, d_model=16, num_layers=1, num_heads=2, d_ff=24, context=8, sparse=[])
    model = LanguageModule(net, losses=[Balance], vocab_size=20).to("meta")
    tokens = torch.zeros(2, 8, dtype=torch.long, device="meta")
    batch = {"tokens": tokens, "targets": tokens}
    out = model.training_step(batch, 0)
    (seen,) = model._step.batches
    kept = {**out["stats"], **(seen.values or {}), **(seen.terms or {}), "loss": out["loss"]}
    assert {value.device.type for value in kept.values()} == {"meta"}
    validated: list[dict[str, torch.Tensor]] = []
    monkeypatch.setattr(model.evaluation.routing, "update", validated.append)
    model.validation_step(batch, 0)
    assert {value.device.type for value in validated[0].values()} == {"meta"}

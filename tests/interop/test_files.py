"""The two commands, and the checkpoints between them."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import small
import torch
from interop.zoo import V, far, our_logits, save, stored, their_logits

from switchkit import Attention, Decoder, EncoderDecoder, LanguageModule, checkpoints
from switchkit.cli import main
from switchkit.data import FileTokenizer
from switchkit.interop import export_hf, import_hf
from switchkit.interop.files import open_checkpoint, save_checkpoint
from switchkit.layers import FeedForward


def run(capsys, *argv: object) -> tuple[int, str]:
    code = main([str(argument) for argument in argv])
    captured = capsys.readouterr()
    assert captured.out == ""
    return code, captured.err


@pytest.mark.parametrize("name", ["switch", "llama", "qwen2_moe"])
def test_there_and_back_by_the_commands(saved, tmp_path, capsys, name: str) -> None:
    one = saved(name)
    code, told = run(capsys, "import-hf", one.folder, "--out", tmp_path / "run.ckpt")
    assert code == 0
    assert told.startswith(f"switchkit: {one.model.config.model_type}, ")
    assert told.rstrip().endswith("run.ckpt")
    module = LanguageModule.load_from_checkpoint(tmp_path / "run.ckpt")
    assert far(our_logits(module, one), their_logits(one.model, one)) < 1e-5
    code, told = run(capsys, "export-hf", tmp_path / "run.ckpt", "--out", tmp_path / "back", "--max_shard_size", "4KB")
    assert code == 0
    assert one.model.config.model_type in told
    before, after = stored(one.folder), stored(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    # What only config.json knew went along.
    configs = [json.loads((folder / "config.json").read_text()) for folder in (one.folder, tmp_path / "back")]
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert configs[0][key] == configs[1][key]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "run.ckpt"]


def test_half_precision_goes_through_a_checkpoint(tmp_path) -> None:
    one = save("deepseek_v3", tmp_path / "there", torch.bfloat16)
    save_checkpoint(import_hf(one.folder), tmp_path / "run.ckpt")
    module = open_checkpoint(tmp_path / "run.ckpt")
    export_hf(module, tmp_path / "back")
    before, after = stored(one.folder), stored(tmp_path / "back")
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    kinds = {p.dtype for p in LanguageModule.load_from_checkpoint(tmp_path / "run.ckpt").parameters()}
    assert kinds == {torch.float32}, "training and generation compute in float32"


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["import-hf"], "the following arguments are required: FOLDER, --out"),
        (["import-hf", "x", "--out", "missing/run.ckpt"], "--out missing/run.ckpt: there is no folder 'missing'"),
        (
            ["import-hf", "x", "--out", "there.ckpt"],
            "--out there.ckpt is there already: name another file",
        ),
        (["import-hf", "x", "--out", "new.ckpt"], "there is no folder 'x'"),
        (["import-hf", "https://a.b/c", "--out", "new.ckpt"], "is an address; only local folders are read"),
        (
            ["import-hf", "x", "--out", "n.ckpt", "--context", "0"],
            "--context: expected an integer of at least 1, got '0'",
        ),
        (["import-hf", "x", "--ouf", "n.ckpt"], "the following arguments are required: --out"),
        (["export-hf", "there.ckpt", "--out", "m"], "checkpoint there.ckpt (0 bytes) is truncated or damaged"),
        (["export-hf", "ther.ckpt", "--out", "m"], "ther.ckpt: there is no such file. Did you mean 'there.ckpt'?"),
        (["export-hf", "https://a.b/c.ckpt", "--out", "m"], "https://a.b/c.ckpt: download the checkpoint first"),
        (["export-hf", "last", "--default_root_dir", "~/r", "--out", "m"], "no checkpoint below HOME/r"),
        (["export-hf", "last", "--out", "m"], "no checkpoint below runs"),
        (
            ["export-hf", "no.ckpt", "--out", "m", "--max_shard_size", "5 apples"],
            "expected a size such as 5GB or 500MB",
        ),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, argv: list[str], told: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "HOME")
    (tmp_path / "there.ckpt").touch()
    code, error = run(capsys, *argv)
    assert code == 2
    assert told in error
    assert error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["there.ckpt"]


@pytest.mark.parametrize("command", ["import-hf", "export-hf"])
def test_help_needs_no_torch(command: str, capsys, monkeypatch) -> None:
    for name in [name for name in sys.modules if name.startswith("switchkit.interop")]:
        monkeypatch.delitem(sys.modules, name)
    assert main([command, "--help"]) == 0
    assert f"usage: switchkit {command}" in capsys.readouterr().out
    assert not [name for name in sys.modules if name.startswith("switchkit.interop")]


def test_a_run_goes_on_from_an_import(saved, tmp_path) -> None:
    """At step 0, with a fresh optimizer, and the weights of the file."""
    before = import_hf(saved("mixtral").folder)
    save_checkpoint(before, tmp_path / "run.ckpt")
    source = small.data(tmp_path)
    spec = checkpoints.read(tmp_path / "run.ckpt")["switchkit"]["model"]["init_args"]
    assert spec["vocab_size"] == V
    assert source.tokenizer.vocab_size <= V
    module = LanguageModule.load_from_checkpoint(tmp_path / "run.ckpt", tokenizer=source.tokenizer, warmup_steps=1)
    trainer = small.trainer(tmp_path / "run", steps=2)
    trainer.fit(module, source, ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    assert trainer.global_step == 2
    after, start = (m.net.embed.weight.detach() for m in (module, before))
    assert 0 < (after - start).abs().max() < 0.1
    export_hf(LanguageModule.load_from_checkpoint(checkpoints.last(tmp_path / "run")), tmp_path / "back")


def test_a_vocabulary_goes_along(saved, tmp_path, capsys) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    shutil.copytree(saved("llama").folder, tmp_path / "m")
    words = {word: i for i, word in enumerate(["<unk>", "</s>", "a", "b", "c"])}
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    own.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    own.save(str(tmp_path / "m/tokenizer.json"))
    run(capsys, "import-hf", tmp_path / "m", "--out", tmp_path / "run.ckpt")
    module = LanguageModule.load_from_checkpoint(tmp_path / "run.ckpt")
    assert module.tokenizer.encode("a b").tolist() == [2, 3]
    assert module.net.vocab_size == V
    run(capsys, "export-hf", tmp_path / "run.ckpt", "--out", tmp_path / "back")
    assert (tmp_path / "back/tokenizer.json").read_text() == (tmp_path / "m/tokenizer.json").read_text()
    assert (
        main(["generate", "--ckpt_path", str(tmp_path / "run.ckpt"), "--prompt", "a b", "--max_new_tokens", "3"]) == 0
    )
    assert capsys.readouterr().out.startswith("a b")
    run(capsys, "import-hf", tmp_path / "m", "--out", tmp_path / "plain.ckpt", "--no_tokenizer")
    assert LanguageModule.load_from_checkpoint(tmp_path / "plain.ckpt").tokenizer is None
    own.add_special_tokens([f"<{i}>" for i in range(V)])
    own.save(str(tmp_path / "m/tokenizer.json"))
    with pytest.raises(ValueError, match=f"tokenizer.json has {V + 5} ids, and config.json vocab_size={V}: .*--no_tok"):
        import_hf(tmp_path / "m")
    (tmp_path / "m/tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer"):
        import_hf(tmp_path / "m")
    import_hf(tmp_path / "m", tokenizer=False)


@pytest.mark.parametrize(
    ("template", "named", "begin"),
    [
        ("<s> $A", 1, (1,)),
        ("<s> $A </s>", 1, (1,)),
        ("<s> $A", None, ()),
        ("$A </s>", 1, ()),
        ("$A </s>", 2, ()),
        (None, 1, ()),
    ],
)
def test_a_text_begins_as_the_vocabulary_has_it(
    saved, tmp_path, capsys, monkeypatch, template: str | None, named: int | None, begin: tuple[int, ...]
) -> None:
    """With <s>, which its file puts before each text, if config.json names it too; an end behind a text is none."""
    tokenizers = pytest.importorskip("tokenizers")
    shutil.copytree(saved("llama").folder, tmp_path / "m")
    words = {f"w{i}": i for i in range(3, V)} | {"<unk>": 0, "<s>": 1, "</s>": 2}
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    own.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if template is not None:
        special = [("<s>", 1), ("</s>", 2)]
        own.post_processor = tokenizers.processors.TemplateProcessing(single=template, special_tokens=special)
    own.save(str(tmp_path / "m/tokenizer.json"))
    for name in ("config.json", "generation_config.json"):
        path = tmp_path / "m" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token_id": named}))
    run(capsys, "import-hf", tmp_path / "m", "--out", tmp_path / "run.ckpt")
    assert LanguageModule.load_from_checkpoint(tmp_path / "run.ckpt").begin_ids == begin
    given: list[list[int]] = []
    monkeypatch.setattr(LanguageModule, "generate", lambda self, ids, *_, **__: given.append(ids.tolist()) or iter([9]))
    argv = ["generate", "--ckpt_path", str(tmp_path / "run.ckpt"), "--prompt", "w4 w5", "--json"]
    assert main(argv) == 0
    assert given == [[*begin, 4, 5]]
    assert json.loads(capsys.readouterr().out) == {"prompt": "w4 w5", "text": " w9"}


def test_like_another_folder(saved, tmp_path, capsys) -> None:
    net = partial(
        Decoder, d_model=8, num_layers=1, num_heads=2, d_ff=8, sparse=[], norm="rms", context=8,
        feed_forward=partial(FeedForward, gated=True, activation="silu"),
    )  # fmt: skip
    save_checkpoint(LanguageModule(net, vocab_size=9, losses=[]), tmp_path / "own.ckpt")
    run(capsys, "export-hf", tmp_path / "own.ckpt", "--out", tmp_path / "m", "--like", saved("llama").folder)
    config = json.loads((tmp_path / "m/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)


ENDS = {"bos_token_id": 3, "eos_token_id": [4, 0], "pad_token_id": 0, "initializer_range": 0.125}


@pytest.fixture
def fine_tuned(saved, tmp_path, monkeypatch, capsys) -> Callable[..., str]:
    """Imports a llama of 40 words, trains it two steps, then two more, each with options; the last checkpoint."""
    tokenizers = pytest.importorskip("tokenizers")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved("llama").folder, "m")
    config = json.loads(Path("m/config.json").read_text()) | ENDS
    Path("m/config.json").write_text(json.dumps(config))
    Path("m/generation_config.json").write_text(json.dumps({"eos_token_id": [4, 0, 7], "temperature": 0.5}))
    words = {f"w{i}": i for i in range(V)}
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    own.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    own.save("m/tokenizer.json")
    Path("text.txt").write_text(" ".join(f"w{i * i % V}" for i in range(600)))

    def train(*more: str) -> str:
        run(capsys, "import-hf", "m", "--out", "run.ckpt")
        usual = ["--data", "TextData", "--data.path", "text.txt", "--data.context", "8", "--data.batch_size", "2"]
        usual += ["--trainer.accelerator", "cpu", "--trainer.num_sanity_val_steps", "0", *more]
        for begin, steps in ((["--init_from", "run.ckpt"], "2"), (["--ckpt_path", "last"], "4")):
            assert main(["fit", *begin, *usual, "--trainer.max_steps", steps]) == 0, capsys.readouterr().err
        capsys.readouterr()
        return str(checkpoints.last(Path("runs")))

    return train


@pytest.mark.slow
def test_what_only_config_json_knew_survives_training(fine_tuned, capsys) -> None:
    path = fine_tuned()
    assert checkpoints.read_settings(path)["step"] == 4
    run(capsys, "export-hf", path, "--out", "back")
    there, back = (json.loads(Path(folder, "config.json").read_text()) for folder in ("m", "back"))
    assert {name: back[name] for name in ENDS} == ENDS
    # But for the version that wrote it.
    assert {k: v for k, v in back.items() if k in there} | {"transformers_version": there["transformers_version"]} == {
        k: v for k, v in there.items() if k in back
    }
    generation = json.loads(Path("back/generation_config.json").read_text())
    assert generation["eos_token_id"] == [4, 0, 7]
    assert LanguageModule.load_from_checkpoint(path).end_ids == (4, 0, 7)


@pytest.mark.slow
def test_another_vocabulary_has_other_ids(fine_tuned, capsys) -> None:
    letters = json.dumps({"class_path": "CharTokenizer", "init_args": {"characters": "w 0123456789"}})
    path = fine_tuned("--data.tokenizer", letters)
    run(capsys, "export-hf", path, "--out", "back")
    config = json.loads(Path("back/config.json").read_text())
    assert [config[name] for name in ENDS] == [None, None, None, 0.125]
    assert LanguageModule.load_from_checkpoint(path).end_ids == ()


def test_without_an_import_the_ids_are_the_tokenizers(tmp_path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "</s>": 1, "<pad>": 2}, unk_token="a"))
    own.save(str(tmp_path / "words.json"))
    net = partial(
        Decoder, d_model=8, num_layers=1, num_heads=2, d_ff=8, sparse=[], norm="rms", context=8,
        feed_forward=partial(FeedForward, gated=True, activation="silu"),
    )  # fmt: skip
    module = LanguageModule(net, tokenizer=FileTokenizer(str(tmp_path / "words.json")), losses=[])
    export_hf(module, tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (None, 1, 2)


@pytest.mark.parametrize("family", ["llama", "qwen3", "t5"])
def test_transformers_reads_the_vocabulary_as_it_is(tmp_path, family: str) -> None:
    """Not with the ends of the family's own tokenizers, which may lie beyond the model's rows."""
    tokenizers, hf = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    words = ["<unk>", "</s>", "<pad>", "a", "b", "c"]
    own = tokenizers.Tokenizer(tokenizers.models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>"))
    own.add_special_tokens(["</s>", "<pad>"])
    own.save(str(tmp_path / "words.json"))
    gated = partial(FeedForward, gated=True, activation="silu")
    sizes = {"d_model": 8, "num_heads": 2, "d_ff": 8, "sparse": []}
    heads = partial(Attention, qk_norm="head" if family == "qwen3" else None)
    net = partial(Decoder, num_layers=1, norm="rms", context=8, feed_forward=gated, attention=heads, **sizes)
    if family == "t5":
        net = partial(EncoderDecoder, encoder_layers=1, start_id=2, **sizes)
    tokenizer = FileTokenizer(str(tmp_path / "words.json"))
    assert export_hf(LanguageModule(net, tokenizer=tokenizer, losses=[]), tmp_path / "m") == family
    theirs = hf.AutoTokenizer.from_pretrained(tmp_path / "m")
    assert theirs("abca")["input_ids"] == tokenizer.encode("abca").tolist()
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.bos_token_id, len(theirs)) == (1, 2, None, 6)


def test_a_vocabulary_without_an_end_stays_without(tmp_path) -> None:
    """Token 1, at which T5 ends, is an ordinary one here."""
    tokenizers = pytest.importorskip("tokenizers")
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(9)}, unk_token="w0"))
    own.save(str(tmp_path / "words.json"))
    net = partial(EncoderDecoder, d_model=8, encoder_layers=1, num_heads=2, d_ff=8, sparse=[], start_id=3)
    module = LanguageModule(net, tokenizer=FileTokenizer(str(tmp_path / "words.json")), losses=[])
    export_hf(module, tmp_path / "m")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "m" / name).read_text()).get("eos_token_id") is None
    assert import_hf(tmp_path / "m").end_ids == module.end_ids == ()


def test_transformers_is_not_imported() -> None:
    import switchkit.interop

    files = list(Path(switchkit.interop.__file__).parent.rglob("*.py"))
    assert len(files) > 15
    assert not [
        file for file in files if "import transformers" in file.read_text() or "from transformers" in file.read_text()
    ]

"""``switchkit generate`` on models with random weights, written to files as `fit` writes them."""

from __future__ import annotations

import io
import json
import os
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from switchkit import CharTokenizer, Decoder, EncoderDecoder, Factor, LanguageModule, MoELayer, TopK
from switchkit.cli.generate import _texts
from switchkit.cli.prompts import Prompt, encoded
from switchkit.data import ByteTokenizer
from switchkit.data.encoded_pairs import prefixes_of
from switchkit.data.subwords import FileTokenizer
from switchkit.data.text_files import TextFile
from switchkit.data.train_tokenizer import train_tokenizer

SIZES = {"d_model": 16, "num_heads": 2, "d_ff": 16, "num_experts": 2}
NET = partial(Decoder, num_layers=2, context=24, **SIZES)
PAIR = partial(EncoderDecoder, encoder_layers=2, **SIZES)
LETTERS = CharTokenizer("\nabcdefgh ")


def save(path: str, module: LanguageModule, **ours: Any) -> LanguageModule:
    for p in module.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)
    module.on_save_checkpoint(content := {"state_dict": module.state_dict()})
    content["switchkit"] |= ours
    torch.save(content, path)
    return module.eval()


@pytest.fixture
def letters(folder: Path) -> LanguageModule:
    moe = partial(MoELayer, router=TopK)
    return save("letters.ckpt", LanguageModule(NET, moe=moe, tokenizer=LETTERS))


@pytest.fixture
def pairs(folder: Path) -> LanguageModule:
    data = {"class_path": "switchkit.data.pairs.PairData", "init_args": {"prefix": None}}
    module = LanguageModule(PAIR, tokenizer=ByteTokenizer())
    return save("pairs.ckpt", module, data=data, source={"languages": ["de", "fr"]})


def generate(run: Any, *argv: str, ckpt: str = "letters.ckpt") -> str:
    code, out, err = run("generate", "--ckpt_path", ckpt, "--device", "cpu", "--max_new_tokens", "20", *argv)
    assert code == 0, err
    return out


def stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))


def test_the_same_text_with_a_cache_and_without(letters, run):
    """20 tokens after 7: the context of 24 is left behind."""
    out = generate(run, "--prompt", "abc def")
    assert out.startswith("abc def")
    assert len(out) == 28
    assert generate(run, "--prompt", "abc def", "--no_cache") == out
    assert generate(run, "--prompt", "abc def", "--seed", "1") != out


def test_a_space_at_the_beginning_of_the_new_text_is_shown(folder, run):
    """A vocabulary whose tokens begin with their space, as SentencePiece makes them: alone, the first one has none."""
    words = Tokenizer(models.WordLevel({"<unk>": 0, "▁a": 1, "▁king": 2}, unk_token="<unk>"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    module = save("words.ckpt", LanguageModule(NET, tokenizer=FileTokenizer(content=words.to_str())))
    out = generate(run, "--prompt", "a king", "--temperature", "0", ckpt="words.ckpt")
    ids = module.tokenizer.encode("a king")
    told = list(module.generate(ids, 20, temperature=0))
    assert out.removesuffix("\n") == module.tokenizer.decode([*ids.tolist(), *told])
    assert "aking" not in out.replace(" ", "_")
    assert out.startswith("a king ")


def test_a_file_of_prompts(letters, run):
    Path("prompts.txt").write_bytes("abc\r\nd e f\n gh".encode("utf-8-sig"))
    out = generate(run, "--prompt_file", "prompts.txt", "--temperature", "0")
    alone = [generate(run, "--prompt", text, "--temperature", "0") for text in ("abc", "d e f", " gh")]
    assert out == f"{'-' * 20}\n".join(alone)


def test_prompts_from_a_pipe_with_a_name(letters, run):
    read, write = os.pipe()
    os.write(write, b"abc\n")
    os.close(write)
    out = generate(run, "--prompt_file", f"/dev/fd/{read}", "--temperature", "0")
    os.close(read)
    assert out == generate(run, "--prompt", "abc", "--temperature", "0")


def test_each_prompt_has_draws_of_its_own(letters, run):
    Path("prompts.txt").write_text("abc\nabc\n")
    lines = generate(run, "--prompt_file", "prompts.txt", "--json").splitlines()
    found = [json.loads(line) for line in lines]
    assert [set(line) for line in found] == [{"prompt", "text"}] * 2
    assert found[0]["text"] != found[1]["text"]
    for seed, line in enumerate(found):
        assert generate(run, "--prompt", "abc", "--seed", str(seed)) == f"abc{line['text']}\n"


@pytest.mark.slow
def test_prompts_from_stdin_are_answered_one_by_one(letters, run, monkeypatch):
    stdin(monkeypatch, b"abc\n\xff\n")
    code, out, err = run("generate", "--ckpt_path", "letters.ckpt", "--prompt_file", "-", "--json")
    assert code == 2
    assert json.loads(out)["prompt"] == "abc"
    assert "stdin, line 2 is not UTF-8 (byte 0xff at position 0)" in err


def test_beams_find_a_likelier_text_than_the_likeliest_tokens(letters, run):
    def nats(out: str) -> float:
        ids = LETTERS.encode(out[:-1])
        with torch.no_grad():
            logits = letters.net(ids.unsqueeze(0)).logits[0]
        return float(-logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])[2:].sum())

    texts = {n: generate(run, "--prompt", "abc", "--num_beams", n) for n in ("8", "2")}
    greedy = generate(run, "--prompt", "abc", "--temperature", "0")
    assert nats(texts["8"]) <= nats(texts["2"])
    assert nats(texts["8"]) < nats(greedy)


def test_a_translation_begins_with_its_language(pairs, run):
    prefix = prefixes_of(pairs.tokenizer, ["de", "fr"], None)[1]
    ids = torch.cat([prefix, pairs.tokenizer.encode("a dog"), torch.tensor([1])])
    want = pairs.tokenizer.decode(list(pairs.generate(ids, 20, temperature=0)))
    assert generate(run, "--prompt", "a dog", "--language", "fr", ckpt="pairs.ckpt") == f"{want}\n"
    Path("lines.txt").write_text("a dog\na cat\n")
    out = generate(run, "--prompt_file", "lines.txt", "--language", "fr", ckpt="pairs.ckpt")
    assert out.startswith(f"{want}\n")
    assert "-" * 20 not in out
    for argv, said in (
        ([], "--language is missing. This checkpoint translates into de, fr"),
        (["--language", "de_"], "--language de_ is not known. Did you mean 'de'? This checkpoint translates into"),
    ):
        code, out, err = run("generate", "--ckpt_path", "pairs.ckpt", "--prompt", "a dog", *argv)
        assert (code, out) == (2, "")
        assert said in err


def test_what_was_taken_out_of_a_source_is_written_as_its_sentinel(folder, run):
    module = save("spans.ckpt", LanguageModule(PAIR, tokenizer=ByteTokenizer()))
    out = generate(run, "--prompt", "a <extra_id_0> b <none>", "--temperature", "0", ckpt="spans.ckpt")
    text = module.tokenizer.encode
    ids = torch.cat([text("a "), torch.tensor([383]), text(" b <none>"), torch.tensor([1])])
    assert out == module.tokenizer.decode(list(module.generate(ids, 20, temperature=0))) + "\n"


def test_brackets_of_a_source_are_text_as_in_training(folder):
    Path("text.txt").write_text("see [1] and <b>bold</b> things\n" * 9)
    tokenizer = train_tokenizer([TextFile("text.txt")], 320, sentinels=2)
    empty = torch.empty(0, dtype=torch.long)
    found = encoded(Prompt("see [1] and <b>bold</b>", ""), tokenizer, empty, (1,))
    assert found.tolist() == [*tokenizer.encode("see [1] and <b>bold</b>").tolist(), 1]
    # Of several ids that end a text, as published models have them, one.
    found = encoded(Prompt("a", ""), ByteTokenizer(), empty, (1, 7))
    assert found.tolist() == [*ByteTokenizer().encode("a").tolist(), 1]
    found = encoded(Prompt("see [1] <extra_id_0> <b>", ""), tokenizer, empty)
    parts = [tokenizer.encode("see [1] "), torch.tensor([tokenizer.sentinel(0)]), tokenizer.encode(" <b>")]
    assert found.tolist() == torch.cat(parts).tolist()


def test_half_a_character_waits_for_its_other_half():
    """Nothing that was written can be taken back; what never becomes a character is written in the end."""
    bytewise = ByteTokenizer()
    ids = bytewise.encode("aé漢").tolist()
    before, *new = ids
    assert [*_texts(bytewise, iter(new), [before])] == ["é", "漢", ""]
    assert [*_texts(bytewise, iter(new[:-1]), [before])] == ["é", "\ufffd"]


def test_ids_that_the_tokenizer_lacks_are_never_taken(folder, run):
    """A published model has more rows than its tokenizer ids: here the others are likelier than any."""
    module = LanguageModule(NET, tokenizer=LETTERS, vocab_size=16)
    save("wide.ckpt", module)
    content = torch.load("wide.ckpt", weights_only=True)
    content["state_dict"]["net.embed.weight"][10:] *= 30
    torch.save(content, "wide.ckpt")
    assert len(generate(run, "--prompt", "abc", ckpt="wide.ckpt")) == 24


def test_a_checkpoint_without_a_vocabulary_says_how_to_get_one(folder, run):
    save("bare.ckpt", LanguageModule(NET, vocab_size=10))
    code, out, err = run("generate", "--ckpt_path", "bare.ckpt", "--prompt", "abc")
    assert (code, out) == (2, "")
    assert "has no tokenizer, so it cannot read a prompt. Import it again with its tokenizer.json in the folder" in err


PROMPTS = ["abc", "d e f", " gh", "a", "hhhh", "c", "ab", "b b"]


@pytest.mark.slow
@pytest.mark.parametrize("search", [["--temperature", "0"], ["--seed", "5"], ["--num_beams", "3"]])
def test_a_batch_gives_each_prompt_the_text_it_has_alone(letters, pairs, run, monkeypatch, search):
    """Eight prompts of six lengths, 3 at a time: the last batch has two. The same of an encoder-decoder's sources."""
    Path("prompts.txt").write_text("\n".join(PROMPTS))
    for more in (["--max_new_tokens", "18"], ["--language", "fr", "--max_new_tokens", "12"]):
        ckpt = "pairs.ckpt" if "--language" in more else "letters.ckpt"
        alone = generate(run, "--prompt_file", "prompts.txt", *search, *more, ckpt=ckpt)
        calls = count_calls(monkeypatch)
        argv = ["generate", "--ckpt_path", ckpt, "--prompt_file", "prompts.txt", "--device", "cpu"]
        code, out, err = run(*argv, *search, *more, "--batch_size", "3")
        assert (code, out) == (0, alone)
        assert "one prompt at a time" not in err
        assert len(set(alone.splitlines())) > 4, "the prompt decides"
        assert calls[0] == 3
        assert len(calls) <= 3 * 18, "a call computes a token of all"


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of each call of a model from now on."""
    calls: list[int] = []
    for kind in (Decoder, EncoderDecoder):
        before = kind.forward

        def counted(self: Any, tokens: Any, *rest: Any, before: Any = before, **more: Any) -> Any:
            calls.append(len(tokens))
            return before(self, tokens, *rest, **more)

        monkeypatch.setattr(kind, "forward", counted)
    return calls


@pytest.mark.slow
def test_where_a_batch_would_change_the_texts_each_is_made_alone(letters, folder, run, monkeypatch):
    """A capacity that binds, also in an encoder; and a context that the longest prompt leaves."""
    tight = partial(MoELayer, router=TopK, capacity=partial(Factor, train=0.5, eval=0.5))
    save("tight.ckpt", LanguageModule(NET, moe=tight, tokenizer=LETTERS))
    encoder = partial(EncoderDecoder, encoder_layers=2, decoder_sparse=[], **SIZES)
    save("reads.ckpt", LanguageModule(encoder, moe=tight, tokenizer=ByteTokenizer()))
    Path("prompts.txt").write_text("\n".join(PROMPTS))
    for ckpt, count, why in (
        ("tight.ckpt", "4", "Factor limits the capacity in evaluation"),
        ("reads.ckpt", "4", "Factor limits the capacity in evaluation"),
        ("letters.ckpt", "21", "the longest prompt with its new tokens (25) does not fit into the context of 24"),
    ):
        argv = ["--prompt_file", "prompts.txt", "--temperature", "0", "--max_new_tokens", count]
        alone = generate(run, *argv, ckpt=ckpt)
        code, out, err = run("generate", "--ckpt_path", ckpt, "--device", "cpu", *argv, "--batch_size", "8")
        assert (code, out) == (0, alone)
        assert f"one prompt at a time, for a batch would change the texts: {why}" in err
        assert err.count("one prompt at a time") == 1
    Path("same.txt").write_text("abc\ndef\n")
    argv = ["--prompt_file", "same.txt", "--temperature", "0", "--max_new_tokens", "40"]
    alone = generate(run, *argv)
    calls = count_calls(monkeypatch)
    assert generate(run, *argv, "--batch_size", "2") == alone
    assert set(calls) == {2}, "equally long prompts leave the context together"


def test_a_batch_of_stdin_is_answered_when_it_is_whole(letters, run, monkeypatch):
    stdin(monkeypatch, b"abc\nd\ne f\n\xff\n")
    argv = ["--prompt_file", "-", "--json", "--batch_size", "2", "--max_new_tokens", "4"]
    code, out, err = run("generate", "--ckpt_path", "letters.ckpt", *argv)
    assert code == 2
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["abc", "d"]
    assert "stdin, line 4 is not UTF-8" in err


def test_a_text_ends_where_an_imported_model_says(letters, run):
    """The vocabulary of letters has no end: each of two ids that the greedy text has cuts it short."""
    ids = list(letters.generate(LETTERS.encode("abc"), 20, temperature=0))
    first, second = dict.fromkeys(ids[1:]) if len(set(ids[1:])) == 2 else list(dict.fromkeys(ids[1:]))[:2]
    content = torch.load("letters.ckpt", weights_only=True)
    for ends in (second, [9, second], [second, first]):
        content["switchkit"]["hugging_face"] = {"config": {"eos_token_id": ends}}
        torch.save(content, "ends.ckpt")
        stops = {ends} if isinstance(ends, int) else set(ends)
        want = LETTERS.decode(ids[: min(i for i, token in enumerate(ids) if token in stops)])
        assert generate(run, "--prompt", "abc", "--temperature", "0", ckpt="ends.ckpt") == f"abc{want}\n"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "--prompt and --prompt_file are both missing: give --prompt TEXT, --prompt_file FILE with one prompt a"),
        (["--prompt", "a", "--prompt_file", "-"], "--prompt and --prompt_file contradict each other"),
        (["--prompt", ""], "--prompt is empty"),
        (["--prompt_file", "prompt.txt"], "--prompt_file prompt.txt: there is no such file. Did you mean 'prom"),
        (["--prompt_file", "latin.txt"], "latin.txt, line 2 is not UTF-8 (byte 0xe4 at position 1): save the file as"),
        (["--prompt_file", "gap.txt"], "gap.txt, line 2 is empty: give a prompt on every line"),
        (["--prompt_file", "empty.txt"], "empty.txt is empty: give one prompt a line"),
        (["--prompt_file", "prompts.txt"], "prompts.txt, line 2: the character 'x'"),
        (["--prompt", "a", "--num_beams", "2", "--top_k", "3"], "searches and draws nothing: leave out --top_k, or"),
        (["--prompt", "a", "--length_penalty", "1"], "--length_penalty 1 needs beam search: give --num_beams 4"),
        (["--prompt_file", ""], "--prompt_file needs the name of a file, or - for stdin"),
        (["--prompt", "-ab"], "expected one argument; a value that begins with - is written --prompt=-ab"),
        (["--prompt", "a", "--batch_size", "0"], "--batch_size: expected an integer of at least 1, got '0'"),
        (["--prompt", "a", "--num_beams", "0"], "--num_beams: expected an integer of at least 1, got '0'"),
        (["--prompt", "a", "--language", "de"], "--language de: this checkpoint was not trained to translate"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_nothing_is_printed(letters, run, argv, said):
    Path("prompts.txt").write_text("abc\nx\n")
    Path("latin.txt").write_bytes(b"abc\ng\xe4b\n")
    Path("gap.txt").write_text("abc\n\nabc\n")
    Path("empty.txt").write_text("")
    code, out, err = run("generate", "--ckpt_path", "letters.ckpt", *argv)
    assert (code, out) == (2, "")
    assert said in err.splitlines()[-1]
    assert len(err.splitlines()) <= 2

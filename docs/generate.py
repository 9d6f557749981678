"""Writes pages on parts, models and data from the docstrings: ``python docs/generate.py``.

A test holds them current.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

from switchkit.cli.listing import source
from switchkit.registry import KINDS, named

INTRODUCTIONS = {
    "routers": "A router decides which expert gets which token, and with what weight the output comes back.",
    "capacity": "A capacity policy decides how many tokens of a group an expert takes, and which ones.",
    "experts": "Experts are what is computed on the tokens that a router sent to them.",
    "losses": "A loss is a term of the training loss, computed from the routing records of all sparse layers.",
    "dispatchers": "A dispatcher moves tokens to experts and back. It changes the speed, never the result.",
}
MODELS = {
    "decoder": (
        "Decoder",
        """A recipe names it as the net of a `LanguageModule`, and so gives sizes once; routing is said under `moe`:

```yaml
model:
  class_path: LanguageModule
  init_args:
    net:
      class_path: Decoder
      init_args: {d_model: 256, num_layers: 6, num_heads: 8, d_ff: 1024, num_experts: 8, context: 256, sparse: every(2)}
    moe:
      class_path: MoELayer
      init_args: {router: {class_path: top_k, init_args: {k: 2}}, experts: gated_mlp}
data: {class_path: TextData, init_args: {context: 256}}
trainer: {max_steps: 2000}
```

The shape of the llama family, with grouped queries and norms of queries and keys as in Qwen3:

```yaml
    net:
      class_path: Decoder
      init_args:
        norm: rms
        tied: false
        attention:
          class_path: switchkit.attention.Attention
          init_args: {num_kv_heads: 2, qk_norm: head, rope_base: 1.0e6}
        feed_forward: {class_path: switchkit.layers.FeedForward, init_args: {gated: true, activation: silu}}
```

In code the parts are classes or partials: `Decoder(vocab_size, attention=partial(Attention, num_kv_heads=2), ...)`.
`out = model(tokens, valid)` has `logits` and `routings`; with `cache=Cache()` the output also has a cache, and the next
call gives only the tokens that follow.""",
        ("switchkit.models.Decoder", "switchkit.attention.Attention", "switchkit.attention.LatentAttention"),
    ),
    "encoder_decoder": (
        "EncoderDecoder",
        """It is the net of a `LanguageModule` like the decoder, whose batches also have a source:

```yaml
model:
  class_path: LanguageModule
  init_args:
    net:
      class_path: EncoderDecoder
      init_args: {d_model: 256, encoder_layers: 4, num_heads: 8, d_ff: 1024, num_experts: 8, dropout: 0.1}
    moe:
      class_path: MoELayer
      init_args:
        capacity: {class_path: factor, init_args: {train: 1.25, eval: null}}
        experts: {class_path: mlp, init_args: {dropout: 0.4}}
```

`out = model(tokens, valid, source=source, source_valid=source_valid)`: `tokens` is the decoder's input, which begins
with `start_id`. With `cache=Cache()` the source is read once, and later calls give only the tokens that follow.

On a CPU a learned bias has no gradient in PyTorch's fused attention, so training computes the scores explicitly; in
evaluation, and on a GPU, the fused kernel is used.""",
        ("switchkit.models.EncoderDecoder", "switchkit.attention.RelativeBias", "switchkit.layers.FeedForward"),
    ),
    "data": (
        "Data",
        """A data module is named under `data:` in a recipe, or given to a Trainer in code. Each goes on exactly where a
checkpoint left it, reads its share on several devices, and says in the checkpoint where its text came from.

| data module | for | batches |
| --- | --- | --- |
| `TextData` | decoders | `tokens`, `targets` [B, S], in evaluation `valid` |
| `SpanData` | text with holes | `source`, `source_valid` [B, S], `tokens`, `targets`, `valid` [B, T] |
| `PairData` | translation | the same, and `language` [B] |
| `StreamData` | streams of texts, read by `datasets` | `TextData`'s, or `SpanData`'s with `objectives` |

`data.path` is a UTF-8 file, or a folder that `switchkit prepare` wrote: token shards, read from mapped memory, so that
a corpus larger than memory trains.

```sh
switchkit tokenizer train --vocab_size 8000 --out words.json books/*.txt
switchkit prepare --tokenizer words.json --out shards books/*.txt        # or - for stdin; files may be .gz
switchkit fit --config tiny_shakespeare --data.path shards
switchkit fit --config t5_span --data.path shards
switchkit fit --config tiny_shakespeare --data StreamData --data.path 'books/*.jsonl' --data.validation_path held.jsonl
```

`tokenizer train` adds `<pad>`, `</s>`, `<unk>` and 100 sentinels `<extra_id_0>`, `<extra_id_1>`, ..., which
`SpanData` needs, to every vocabulary, and counts them and the 256 bytes in `--vocab_size`, which is thus 359 at
least. `--sentinels 0` leaves the sentinels out, for a decoder.

A vocabulary is a `Tokenizer`: `CharTokenizer` (the default of `TextData`), `ByteTokenizer` (of the others), or
`FileTokenizer`, any file of Hugging Face's `tokenizers`. It travels in the checkpoint.

## Published texts

Where no file is named, `TextData` and `SpanData` read Tiny Shakespeare, and `PairData` Multi30k. Each file is looked
for in the folder that `SWITCHKIT_DATA` names, then in the cache, and else downloaded into the cache; its checksum says
whether it is the right one.

| variable | names | default |
| --- | --- | --- |
| `SWITCHKIT_DATA` | a folder of data sets, which is only read | none |
| `SWITCHKIT_CACHE` | the folder for what was downloaded | `$XDG_CACHE_HOME/switchkit`, else `~/.cache/switchkit` |
| `SWITCHKIT_OFFLINE` | `1`: nothing is downloaded | unset |

Without a network, put the files into one of these folders by their names:

- `tinyshakespeare/input.txt`, from
  <https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt>;
- `multi30k/train.en.gz`, and so on: `train`, `val` and `test_2016_flickr`, each in `en`, `de`, `fr` and `cs`, from
  <https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw/train.en.gz>, and so on.

```sh
SWITCHKIT_DATA=~/texts switchkit fit --config tiny_shakespeare      # reads ~/texts/tinyshakespeare/input.txt
```

Where a text cannot be had, the recipes train on a generated one (`data.fallback: true`) and say so; without `fallback`
that is an error.""",
        (
            "switchkit.data.TextData",
            "switchkit.data.SpanData",
            "switchkit.data.SpanCorruption",
            "switchkit.data.PrefixLM",
            "switchkit.data.CausalLM",
            "switchkit.data.UL2",
            "switchkit.data.PairData",
            "switchkit.data.StreamData",
            "switchkit.data.ByteTokenizer",
            "switchkit.data.FileTokenizer",
        ),
    ),
}
GIVEN = {"self", "d_model", "d_ff", "num_experts"}
"""Arguments that whoever assembles the layer gives."""


def pages() -> Iterator[tuple[str, str]]:
    """File name and text of every page."""
    for kind, path in KINDS.items():
        module, _, name = path.rpartition(".")
        base = getattr(importlib.import_module(module), name)
        ours = {name: cls for name, cls in named(base).items() if cls.__module__.startswith("switchkit.")}
        lines = [
            f"# {kind.capitalize()}",
            "",
            f"{INTRODUCTIONS[kind]} In a recipe give the name, or the name with options; in code the class.",
            "This page is written by `python docs/generate.py` from the docstrings.",
            "",
            "| name | class | what it does | source |",
            "| --- | --- | --- | --- |",
        ]
        for part, cls in ours.items():
            first = inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[0].replace("\n", " ").replace("``", "`")
            cells = [f"[`{part}`](#{part})", f"`{cls.__name__}`", first, source(cls.__doc__ or "")]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        for part, cls in ours.items():
            lines += ["", f"## {part}", "", *_body(cls)]
        yield f"{kind}.md", "\n".join(lines) + "\n"
    for file, (title, introduction, paths) in MODELS.items():
        lines = [f"# {title}", "", *introduction.splitlines(), ""]
        lines.append("What follows is written by `python docs/generate.py` from the docstrings.")
        for path in paths:
            module, _, name = path.rpartition(".")
            lines += ["", f"## {name}", "", *_body(getattr(importlib.import_module(module), name))]
        yield f"{file}.md", "\n".join(lines) + "\n"


def _body(cls: type) -> list[str]:
    """The docstring with its sections as paragraphs, and the options with their defaults."""
    lines: list[str] = []
    for paragraph in inspect.cleandoc(cls.__doc__ or "").split("\n\n"):
        head, _, rest = paragraph.partition("\n")
        if head in ("Args:", "Raises:"):
            lines += [f"{head.rstrip(':')}:", "", *_entries(rest), ""]
        else:
            text = paragraph.replace("``", "`")
            text = re.sub(r"^(Elsewhere|Source):", r"**\1:**", text)
            lines += [*text.splitlines(), ""]
    options = [
        f"`{name}={p.default!r}`"
        for name, p in inspect.signature(cls).parameters.items()
        if name not in GIVEN and p.default is not p.empty
    ]
    return [*lines, f"Options: {', '.join(options)}." if options else "No options."]


def _entries(text: str) -> Iterator[str]:
    """``name: what it is`` in indented lines, as a list."""
    for entry in re.split(r"\n(?=\S)", inspect.cleandoc("x:\n" + text).partition("\n")[2]):
        name, _, rest = " ".join(entry.split()).partition(": ")
        yield f"- `{name}`: {rest.replace('``', '`')}"


def main() -> None:
    for name, text in pages():
        (Path(__file__).parent / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

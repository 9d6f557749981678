"""``switchkit generate``: texts continued by a checkpoint. The text goes to stdout, all else to stderr."""

from __future__ import annotations

import json
import math
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from switchkit.cli.devices import device_of
from switchkit.cli.errors import UserError
from switchkit.cli.options import OptionParser, number, positive, seed
from switchkit.cli.plugins import bring_in
from switchkit.cli.prompts import Prompt, check_prompts, encoded, language_prefix, read_prompts

if TYPE_CHECKING:
    from torch import Tensor

    from switchkit.data.tokenizers import Tokenizer
    from switchkit.module import LanguageModule

__all__ = ["run"]

BETWEEN = "-" * 20
"""The line between two texts."""


def run(command: str, argv: Sequence[str]) -> int:
    """Print the prompts and their continuations, as they come."""
    options = _parser(command).parse(argv)
    check_prompts(options)
    _check_search(options)
    bring_in(options.plugins)

    from switchkit.cli.checkpoint import checkpoint_path
    from switchkit.module import LanguageModule

    device = device_of(options.device)
    path = checkpoint_path(options.ckpt_path, options.default_root_dir)
    print(f"switchkit: {path}", file=sys.stderr)
    module = LanguageModule.load_from_checkpoint(path, map_location=device).to(device).eval()
    tokenizer = module.tokenizer
    if tokenizer is None:
        raise UserError(
            f"{path}: the checkpoint has no tokenizer, so it cannot read a prompt. Import it again with its "
            "tokenizer.json in the folder, or train it on data with a tokenizer (fit --init_from)"
        )
    prefix = _prefix(options, str(path), module, tokenizer)
    if prefix is not None and options.temperature is None and (options.top_k or options.top_p):
        given = "top_k" if options.top_k else "top_p"
        raise UserError(
            f"--{given}: an encoder-decoder takes the likeliest token unless --temperature is given: give both, or "
            "neither"
        )
    ends, begin = module.end_ids, module.begin_ids
    jobs: Any = ((prompt, encoded(prompt, tokenizer, prefix, ends, begin)) for prompt in read_prompts(options))
    if options.prompt_file != "-":
        jobs = list(jobs)  # a mistake in the last line is told before the first text
    for index, (prompt, ids, tokens) in enumerate(_answered(options, module, iter(jobs), reads=prefix is not None)):
        pieces = _texts(tokenizer, tokens, [] if prefix is not None else ids.tolist())
        if options.json:
            _write(json.dumps({"prompt": prompt.text, "text": "".join(pieces)}, ensure_ascii=False))
        else:
            _write_text(prompt, pieces, index, reads=prefix is not None)
        _write("\n")
    return 0


def _answered(
    options: Namespace, module: LanguageModule, jobs: Iterator[tuple[Prompt, Tensor]], *, reads: bool
) -> Iterator[tuple[Prompt, Tensor, Iterator[int]]]:
    """Each prompt, its tokens and the new ones, `batch_size` prompts at a time where that gives the same texts."""
    from switchkit.generation import completions, one_at_a_time

    told: set[str] = set()
    first = 0
    while batch := list(islice(jobs, min(options.batch_size, sys.maxsize))):
        prompts = [ids for _, ids in batch]
        why = None if len(batch) == 1 else one_at_a_time(module.net, prompts, options.max_new_tokens)
        if why is not None and why not in told:
            told.add(why)
            print(f"switchkit: one prompt at a time, for a batch would change the texts: {why}", file=sys.stderr)
        if len(batch) == 1 or why is not None:
            for index, (prompt, ids) in enumerate(batch, first):
                search = _search(options, [index], reads=reads)
                yield prompt, ids, module.generate(ids, options.max_new_tokens, **search)
        else:
            rows = [ids.to(module.device) for ids in prompts]
            search = _search(options, range(first, first + len(batch)), reads=reads)
            symbols = None if module.tokenizer is None else module.tokenizer.vocab_size
            found = completions(
                module.net, rows, options.max_new_tokens, eos_id=module.end_ids, symbols=symbols, **search
            )
            yield from ((prompt, ids, iter(new)) for (prompt, ids), new in zip(batch, found, strict=True))
        first += len(batch)


def _prefix(options: Namespace, path: str, module: LanguageModule, tokenizer: Tokenizer) -> Tensor | None:
    """What comes before a source; None for a model that reads none."""
    encoder = hasattr(module.net, "start_id")
    settings = {}
    if encoder:
        from switchkit.checkpoints import read

        settings = read(path)["switchkit"]
    return language_prefix(options.language, settings, tokenizer, encoder=encoder)


def _search(options: Namespace, numbers: Sequence[int], *, reads: bool) -> dict[str, Any]:
    """How the prompts of these numbers go on. Each has draws of its own, so that its text does not depend on others."""
    import torch

    given: dict[str, Any] = {"num_beams": options.num_beams, "use_cache": not options.no_cache}
    if options.length_penalty is not None:
        given["length_penalty"] = options.length_penalty
    if options.num_beams == 1:
        usual = 0.0 if reads else 0.8
        given["temperature"] = usual if options.temperature is None else options.temperature
        given |= {"top_k": options.top_k, "top_p": options.top_p}
        # On the CPU, so that a seed means the same on every device.
        draws = [torch.Generator().manual_seed(options.seed + number) for number in numbers]
        given["generator"] = draws[0] if len(draws) == 1 else draws
    return given


def _write_text(prompt: Prompt, pieces: Iterator[str], index: int, *, reads: bool) -> None:
    if not reads:
        _write((f"{BETWEEN}\n" if index else "") + prompt.text)
    for text in pieces:
        _write(text)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _check_search(options: Namespace) -> None:
    drawing = [name for name in ("temperature", "top_k", "top_p") if getattr(options, name) is not None]
    if options.num_beams == 1 and options.temperature == 0 and len(drawing) > 1:
        raise UserError(
            f"--temperature 0 takes the likeliest token and draws nothing: leave out --{', --'.join(drawing[1:])}, or "
            "--temperature"
        )
    if options.num_beams > 1 and drawing:
        raise UserError(
            f"--num_beams {options.num_beams} searches and draws nothing: leave out --{', --'.join(drawing)}, or "
            "--num_beams"
        )
    if options.num_beams == 1 and options.length_penalty is not None:
        raise UserError(
            f"--length_penalty {options.length_penalty:g} needs beam search: give --num_beams 4, or leave it out"
        )


def _parser(command: str) -> OptionParser:
    parser = OptionParser(
        command,
        "Continue texts with a trained model; with an encoder-decoder, give what it makes of them. Several texts have "
        f"a line {BETWEEN} between them, those of an encoder-decoder a line each.",
    )
    add = parser.add_argument
    add("--ckpt_path", required=True, metavar="PATH", help="a checkpoint, or 'last': the newest of --default_root_dir")
    add("--default_root_dir", default="runs", metavar="DIR", help="where 'last' is looked for (default: %(default)s)")
    add("--prompt", metavar="TEXT", help="the text to continue, or that an encoder reads")
    add("--prompt_file", metavar="FILE", help="a UTF-8 file with one prompt a line; - reads stdin")
    add("--language", metavar="CODE", help="what to translate into, with a checkpoint that knows several languages")
    add("--max_new_tokens", type=positive, default=200, metavar="N", help="tokens to add (default: %(default)s)")
    add(
        "--temperature",
        type=number(float, "a finite number of at least 0", lambda value: value >= 0 and math.isfinite(value)),
        metavar="T",
        help="below 1 more certain, above 1 more varied; 0: always the likeliest token (default: 0.8; of an "
        "encoder-decoder 0)",
    )
    add("--top_k", type=positive, metavar="K", help="draw from the K likeliest tokens only")
    add(
        "--top_p",
        type=number(float, "a number above 0 and at most 1", lambda value: 0 < value <= 1),
        metavar="P",
        help="draw from the likeliest tokens that hold the probability P together",
    )
    add(
        "--num_beams",
        type=positive,
        default=1,
        metavar="N",
        help="above 1: draw nothing, and find the likeliest text by beam search (default: %(default)s)",
    )
    add(
        "--length_penalty",
        type=number(float, "a finite number of at least 0", lambda value: value >= 0 and math.isfinite(value)),
        metavar="A",
        help="of beam search: log-probabilities are divided by ((5 + length) / 6) ** A (default: 0.6)",
    )
    add("--seed", type=seed, default=0, metavar="N", help="of the draws; prompt i has N + i (default: %(default)s)")
    add(
        "--batch_size",
        type=positive,
        default=1,
        metavar="N",
        help="prompts at a time, each with the text that it would have alone; above 1 a text comes when its batch is "
        "done (default: %(default)s)",
    )
    add("--no_cache", action="store_true", help="compute the whole text for every token: slower, and the same text")
    add("--json", action="store_true", help='one line for each prompt: {"prompt": ..., "text": ...}')
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: the fastest there is)")
    parser.add_plugins()
    return parser


def _texts(tokenizer: Tokenizer, tokens: Iterator[int], before: list[int]) -> Iterator[str]:
    """The new text, piece by piece. Decoded from the start each time: one token need not be a whole character.

    `before`: the tokens that it goes on from, with which a space at its beginning shows.
    """
    before = [number for number in before if number < tokenizer.vocab_size]
    ids = list(before)
    shown = tokenizer.decode(before) if before else ""
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    yield tokenizer.decode(ids)[len(shown) :] if ids else ""

"""``switchkit generate``: a text continued by a checkpoint. The text goes to stdout, all else to stderr."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence

from switchkit.cli.errors import UserError
from switchkit.cli.options import OptionParser, number
from switchkit.cli.plugins import import_plugins, load_entry_points, split_plugins

__all__ = ["run"]


def run(command: str, argv: Sequence[str]) -> int:
    """Print the prompt and its continuation, as it comes."""
    rest, plugins = split_plugins(argv)
    options = _parser(command).parse(rest)
    if not options.prompt:
        raise UserError("--prompt is empty: give at least one character to continue")
    load_entry_points()
    import_plugins(plugins, "--plugins")

    import torch

    from switchkit.cli.checkpoint import checkpoint_path
    from switchkit.module import LanguageModule

    device = _device(options.device)
    path = checkpoint_path(options.ckpt_path, options.default_root_dir)
    print(f"switchkit: {path}", file=sys.stderr)
    module = LanguageModule.load_from_checkpoint(path, map_location=device).to(device).eval()
    tokenizer = module.tokenizer
    if tokenizer is None:
        raise UserError(f"{path}: the checkpoint has no tokenizer, so it cannot read a prompt")
    ids = tokenizer.encode(options.prompt).to(device)
    generator = torch.Generator(device).manual_seed(options.seed)
    tokens = module.generate(
        ids,
        options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        generator=generator,
    )
    sys.stdout.write(options.prompt)
    for text in _texts(tokenizer, tokens):
        sys.stdout.write(text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0


def _parser(command: str) -> OptionParser:
    parser = OptionParser(command, "Continue a text with a trained model.")
    add = parser.add_argument
    add("--ckpt_path", required=True, metavar="PATH", help="a checkpoint, or 'last': the newest of --default_root_dir")
    add("--default_root_dir", default="runs", metavar="DIR", help="where 'last' is looked for (default: %(default)s)")
    add("--prompt", required=True, metavar="TEXT", help="the text to continue")
    positive = number(int, "an integer of at least 1", lambda value: value >= 1)
    add("--max_new_tokens", type=positive, default=200, metavar="N", help="tokens to add (default: %(default)s)")
    add(
        "--temperature",
        type=number(float, "a finite number of at least 0", lambda value: value >= 0 and math.isfinite(value)),
        default=0.8,
        metavar="T",
        help="below 1 more certain, above 1 more varied; 0: always the likeliest token (default: %(default)s)",
    )
    add("--top_k", type=positive, metavar="K", help="draw from the K likeliest tokens only")
    add(
        "--top_p",
        type=number(float, "a number above 0 and at most 1", lambda value: 0 < value <= 1),
        metavar="P",
        help="draw from the likeliest tokens that hold the probability P together",
    )
    seed = number(int, "an integer from 0 to 2^63 - 1", lambda value: 0 <= value < 2**63)
    add("--seed", type=seed, default=0, metavar="N", help="of the random draws (default: %(default)s)")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: the fastest there is)")
    add("--plugins", nargs="+", metavar="MODULE", help="modules to import first, such as my_file")
    return parser


def _device(name: str | None) -> str:
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).partition(chr(10))[0]}") from error
    return name


def _texts(tokenizer: object, tokens: Iterator[object]) -> Iterator[str]:
    """The new text, piece by piece. Decoded from the start each time: one token need not be a whole character."""
    ids: list[int] = []
    shown = ""
    for token in tokens:
        ids.append(int(token))  # type: ignore[call-overload]
        text = tokenizer.decode(ids)  # type: ignore[attr-defined]
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    yield tokenizer.decode(ids)[len(shown) :] if ids else ""  # type: ignore[attr-defined]

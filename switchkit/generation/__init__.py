"""Going on from a prompt, token by token: greedy, by random draws, or by beam search, with a key/value cache."""

from switchkit.generation.batch import completions, one_at_a_time
from switchkit.generation.complete import Generated, generate
from switchkit.generation.single import continuation
from switchkit.generation.steps import stream
from switchkit.generation.window import Window, pad_left

__all__ = ["Generated", "Window", "completions", "continuation", "generate", "one_at_a_time", "pad_left", "stream"]

"""Data: finding a text, making tokens of it, and batches that a run can be resumed in the middle of."""

from switchkit.data.loader import InOrder, RandomWindows
from switchkit.data.play import generated_play, speakers_of
from switchkit.data.sources import DataError, Source, find_text
from switchkit.data.text import TextData
from switchkit.data.tokenizers import CharTokenizer, Tokenizer

__all__ = [
    "CharTokenizer",
    "DataError",
    "InOrder",
    "RandomWindows",
    "Source",
    "TextData",
    "Tokenizer",
    "find_text",
    "generated_play",
    "speakers_of",
]

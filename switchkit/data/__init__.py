"""Data: finding a text, making tokens of it, and batches that a run can be resumed in the middle of."""

from switchkit.data.base import ResumableData
from switchkit.data.bytes import ByteTokenizer
from switchkit.data.loader import InOrder, RandomWindows
from switchkit.data.mixture import UL2, Mixture
from switchkit.data.objectives import CausalLM, Objective, PrefixLM
from switchkit.data.pairs import PairData
from switchkit.data.parallel import Parallel, find_parallel
from switchkit.data.play import generated_play, speakers_of
from switchkit.data.resumable import TrainingLoader
from switchkit.data.shards import ShardCorpus, ShardedTokens
from switchkit.data.sources import DataError, Source, find_text
from switchkit.data.span_corruption import SpanCorruption
from switchkit.data.span_data import SpanData
from switchkit.data.stream_data import StreamData
from switchkit.data.subwords import FileTokenizer
from switchkit.data.text import TextData
from switchkit.data.tokenizers import CharTokenizer, Tokenizer
from switchkit.data.toy_languages import toy_languages

__all__ = [
    "ByteTokenizer",
    "CausalLM",
    "CharTokenizer",
    "DataError",
    "FileTokenizer",
    "InOrder",
    "Mixture",
    "Objective",
    "PairData",
    "Parallel",
    "PrefixLM",
    "RandomWindows",
    "ResumableData",
    "ShardCorpus",
    "ShardedTokens",
    "Source",
    "SpanCorruption",
    "SpanData",
    "StreamData",
    "TextData",
    "Tokenizer",
    "TrainingLoader",
    "UL2",
    "find_parallel",
    "find_text",
    "generated_play",
    "speakers_of",
    "toy_languages",
]

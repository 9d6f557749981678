"""The generated play: reproducible, play-shaped, learnable but not trivial, its speakers told apart by their words."""

from __future__ import annotations

import math
import re
import time
from collections import Counter, defaultdict

import pytest

from switchkit.data import generated_play, speakers_of


@pytest.fixture(scope="module")
def play() -> str:
    return generated_play(0, 200_000)


def bits_per_character(text: str, order: int, train: int) -> float:
    """Witten-Bell model of `order` - 1 characters of context, fitted on the beginning, measured on the rest."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for length in range(order):
        for i in range(length, train):
            counts[text[i - length : i]][text[i]] += 1
    totals = {context: sum(following.values()) for context, following in counts.items()}
    bits = 0.0
    for i in range(train, len(text)):
        p = 1 / 128
        for length in range(order):
            if following := counts.get(context := text[i - length : i]):
                kinds = len(following)
                p = (following[text[i]] + kinds * p) / (totals[context] + kinds)
        bits -= math.log2(p)
    return bits / (len(text) - train)


def test_one_megabyte_of_ascii_at_once() -> None:
    start = time.process_time()
    text = generated_play()
    assert time.process_time() - start < 1
    assert len(text) == 1_000_000
    assert text.isascii()
    assert 40 <= len(set(text)) <= 70


def test_a_seed_decides_everything(play: str) -> None:
    assert generated_play(0, 200_000) == play
    assert generated_play(1, 5_000) != play[:5_000]
    assert generated_play(0, 7_777) == play[:7_777]


def test_characters_must_be_positive() -> None:
    with pytest.raises(ValueError, match="a play of 0 characters"):
        generated_play(0, 0)


def test_every_block_is_a_heading_a_direction_or_a_speech(play: str) -> None:
    acts = scenes = speeches = 0
    for block in play.rpartition("\n\n")[0].split("\n\n"):
        first, *lines = block.split("\n")
        if first.endswith(":"):
            speeches += 1
            assert first[:-1].isupper()
            assert lines
            assert all(line and line == line.strip() and len(line) <= 70 for line in lines)
            assert lines[-1][-1] in ".?!"
            assert not re.search(r"\ba (?:[aeio]|honest|heir)|\ban (?![aeiouh])", block)
        else:
            assert not lines
            acts += first.startswith("ACT ")
            scenes += first.startswith("SCENE ")
    assert acts > 5
    assert scenes > 3 * acts
    assert speeches > 10 * scenes


def test_a_bigram_is_far_from_what_can_be_learnt(play: str) -> None:
    bigram, longer = (bits_per_character(play, order, 180_000) for order in (2, 6))
    assert bigram > 2 * longer
    assert longer > 0.8  # not a loop that a model repeats by heart


def test_speeches_do_not_repeat(play: str) -> None:
    speeches = [block for block in play.split("\n\n") if block.count(" ") > 8 and ":\n" in block]
    assert len(set(speeches)) > 0.99 * len(speeches)


def test_words_tell_the_speaker(play: str) -> None:
    """A naive Bayes classifier on words names the speaker of nine unseen speeches of ten."""
    speeches = re.findall(r"([A-Z ]+):\n(.+?)\n\n", play, flags=re.DOTALL)
    cut = len(speeches) * 4 // 5
    words: dict[str, Counter[str]] = defaultdict(Counter)
    for name, speech in speeches[:cut]:
        words[name].update(re.findall(r"[a-z]+", speech.lower()))
    totals = {name: sum(count.values()) for name, count in words.items()}
    assert len(totals) >= 8

    def score(name: str, speech: str) -> float:
        found = re.findall(r"[a-z]+", speech.lower())
        return sum(math.log((words[name][word] + 0.1) / (totals[name] + 100)) for word in found)

    rest = speeches[cut:]
    right = sum(max(words, key=lambda who: score(who, speech)) == name for name, speech in rest)
    assert right > 0.9 * len(rest)
    assert max(Counter(name for name, _ in rest).values()) < 0.3 * len(rest)


def test_speakers_of_labels_what_is_said_only() -> None:
    text = "of the end.\n\nACT I\n\nFirst Citizen:\nSpeak,\nNote this:\nspeak.\n\n[Exeunt]\n\nGREY GHOST:\nI fade.\n"
    labels = speakers_of(text)
    assert len(labels) == len(text)
    said = defaultdict(str)
    for character, label in zip(text, labels, strict=True):
        said[label] += character
    assert said["First Citizen"] == "Speak,\nNote this:\nspeak.\n"
    assert said["GREY GHOST"] == "I fade.\n"
    assert set(said) == {None, "First Citizen", "GREY GHOST"}


def test_speakers_of_the_whole_play(play: str) -> None:
    labels = speakers_of(play)
    assert len(labels) == len(play)
    assert set(labels) - {None} == set(re.findall(r"^([A-Z ]+):$", play, flags=re.MULTILINE))
    assert labels.count(None) < 0.2 * len(play)
    assert speakers_of("") == []

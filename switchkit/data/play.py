"""A generated play: a corpus that is always there, with speakers whose habits can be told apart.

One small English-like grammar serves everybody; what differs from speaker to speaker is the words, the openings, the
pet phrases, the favourite shapes of sentence and the length of a line. So it can be measured which expert serves whom.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from typing import TypeVar

from switchkit.data.voices import PLACES, SHARED, VOICES, Voice

__all__ = ["generated_play", "speakers_of"]

T = TypeVar("T")

_HEADING = re.compile(r"[A-Z][A-Za-z' -]*:")


def generated_play(seed: int = 0, characters: int = 1_000_000) -> str:
    """A play of exactly `characters` ASCII characters, a speech as ``"NAME:\\nline\\nline\\n\\n"``.

    In parts, acts and scenes, which are headings of their own, as are stage directions. The same arguments give the
    same text on every platform; a shorter play is the beginning of a longer one.

    Raises:
        ValueError: `characters` is below 1.
    """
    if characters < 1:
        raise ValueError(f"a play of {characters} characters cannot be written; characters must be at least 1")
    stage = _Stage(seed)
    blocks: list[str] = []
    length = 0
    while length < characters:
        for block in stage.scene():
            blocks.append(block + "\n\n")
            length += len(blocks[-1])
    return "".join(blocks)[:characters]


def speakers_of(text: str) -> list[str | None]:
    """Who says each character of a play: one name per character of `text`.

    None for what nobody says: the names above the speeches, headings, stage directions, the empty lines between. A text
    cut in mid-speech begins with None. Reads Tiny Shakespeare as well.
    """
    labels: list[str | None] = []
    speaker: str | None = None
    heading_may_follow = True
    for line in text.splitlines(keepends=True):
        words = line.rstrip("\r\n")
        if not words:
            speaker, heading_may_follow = None, True
            labels += [None] * len(line)
        elif heading_may_follow and _HEADING.fullmatch(words):
            speaker, heading_may_follow = words[:-1], False
            labels += [None] * len(line)
        else:
            heading_may_follow = False
            labels += [speaker] * len(line)
    return labels


class _Stage:
    """Writes scene after scene. Every choice comes from ``random.Random(seed).random()``, whose stream is promised."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random
        self._scenes = 0
        self._forms: dict[str, Callable[[Voice], str]] = {
            "tell": self._tell,
            "ask": self._ask,
            "command": self._command,
            "liken": self._liken,
            "if": self._if,
            "praise": self._praise,
            "which": self._which,
            "count": self._count,
            "deny": self._deny,
            "reason": self._reason,
        }
        self._topic = self._pick(SHARED["nouns"])

    def scene(self) -> list[str]:
        """Headings, an entrance, the speeches and the way off: one block each."""
        part, act, scene = self._scenes // 20, self._scenes // 4 % 5, self._scenes % 4
        self._scenes += 1
        blocks = [f"THE PLAY, PART {_roman(part + 1)}"] if act == scene == 0 else []
        blocks += [f"ACT {_roman(act + 1)}"] if scene == 0 else []
        blocks.append(f"SCENE {_roman(scene + 1)}. {self._pick(PLACES)}.")
        cast = self._cast(2 + self._below(4))
        blocks.append(f"[Enter {_series([voice.name for voice in cast])}]")
        before, speaker = cast[1], cast[0]
        for _ in range(14 + self._below(26)):
            blocks.append(f"{speaker.name.upper()}:\n{self._speech(speaker, before)}")
            # Two people usually go on with each other.
            following = before if self._chance(0.6) else self._pick(cast)
            before, speaker = speaker, following if following is not speaker else before
        blocks.append("[Exeunt]")
        return blocks

    def _cast(self, size: int) -> list[Voice]:
        left = list(VOICES)
        return [left.pop(self._below(len(left))) for _ in range(size)]

    def _speech(self, voice: Voice, other: Voice) -> str:
        # A reply takes up the last topic or turns to one of the speaker's own, which the speech then keeps.
        if self._chance(0.5):
            self._topic = self._noun(voice)
        shortest, longest = voice.sentences
        sentences = []
        for _ in range(shortest + self._below(longest - shortest + 1)):
            sentences.append(self._forms[self._pick(voice.forms)](voice))
        if self._chance(0.45):
            sentences[0] = f"{self._pick(voice.openings)}, {_lower(sentences[0])}"
        elif self._chance(0.4):
            sentences[0] = f"{voice.address} {other.name}, {_lower(sentences[0])}"
        if self._chance(0.35):
            sentences.append(self._pick(voice.phrases))
        return _wrap(" ".join(map(_upper, sentences)), voice.width, voice.verse)

    # Sentences.

    def _tell(self, voice: Voice) -> str:
        return f"{self._clause(voice)}{self._where(voice)}."

    def _ask(self, voice: Voice) -> str:
        verb, thing = self._verb(voice), self._thing(voice)
        return self._pick(
            (
                f"dost thou {verb} {thing}?",
                f"who shall {verb} {thing}{self._where(voice)}?",
                f"why {self._pick(('do', 'must', 'shall'))} we {verb} {thing}?",
                f"where is the {self._noun(voice)} that {_third(verb)} {thing}?",
            )
        )

    def _command(self, voice: Voice) -> str:
        end = "!" if self._chance(0.5) else "."
        return f"{self._verb(voice)} {self._thing(voice)}, and {self._verb(voice)} {self._thing(voice)}{end}"

    def _liken(self, voice: Voice) -> str:
        adjective = self._adjective(voice)
        if self._chance(0.5):
            return f"the {self._topic} is as {adjective} as {_article(self._noun(voice))}."
        return (
            f"my {self._noun(voice)} is like {_article(self._noun(voice))}, {adjective} and {self._adjective(voice)}."
        )

    def _if(self, voice: Voice) -> str:
        return f"if {self._clause(voice)}, then {self._clause(voice)}."

    def _praise(self, voice: Voice) -> str:
        return f"O {self._adjective(voice)} {self._noun(voice)}! how {self._adjective(voice)} is the {self._topic}!"

    def _which(self, voice: Voice) -> str:
        first, second = _third(self._verb(voice)), self._verb(voice)
        return f"the {self._noun(voice)} that {first} {self._thing(voice)} shall {second} {self._thing(voice)}."

    def _count(self, voice: Voice) -> str:
        one, two = self._noun(voice), self._noun(voice)
        return (
            f"one {one}, two {_plural(one)}, three {_plural(two)}; and never {_article(self._noun(voice))} among them!"
        )

    def _deny(self, voice: Voice) -> str:
        verb = self._verb(voice)
        return f"no {self._noun(voice)}, no {self._noun(voice)}, nor any {self._noun(voice)} shall {verb} me."

    def _reason(self, voice: Voice) -> str:
        return f"{self._clause(voice)}, {self._pick(('for', 'because', 'and yet'))} {self._clause(voice)}."

    # Parts of a sentence.

    def _clause(self, voice: Voice) -> str:
        verb, thing = self._verb(voice), self._thing(voice)
        kind = self._random()
        if kind < 0.3:
            return f"{voice.person} {self._pick(('', 'will ', 'must ', 'did '))}{verb} {thing}"
        if kind < 0.45:
            return f"thou {self._pick(('dost', 'shalt', 'wilt'))} {verb} {thing}"
        if kind < 0.6:
            return f"{self._pick(('he', 'she'))} {_third(verb)} {thing}"
        if kind < 0.75:
            return f"the {_plural(self._noun(voice))} {verb} {thing}"
        return f"the {self._noun(voice)} {_third(verb)} {thing}"

    def _thing(self, voice: Voice) -> str:
        """An object, at times the topic again."""
        kind = self._random()
        if kind < 0.25:
            return f"the {self._topic}"
        if kind < 0.5:
            return _article(f"{self._adjective(voice)} {self._noun(voice)}")
        if kind < 0.7:
            return f"{self._pick(('my', 'thy', 'her', 'his'))} {self._noun(voice)}"
        if kind < 0.85:
            return f"the {self._adjective(voice)} {_plural(self._noun(voice))}"
        return f"{self._pick(('this', 'that', 'every'))} {self._noun(voice)}"

    def _where(self, voice: Voice) -> str:
        if self._chance(0.6):
            return ""
        return f" {self._pick(('in', 'under', 'by', 'beyond', 'without'))} the {self._noun(voice)}"

    def _noun(self, voice: Voice) -> str:
        return self._pick(voice.nouns if self._chance(0.7) else SHARED["nouns"])

    def _verb(self, voice: Voice) -> str:
        return self._pick(voice.verbs if self._chance(0.7) else SHARED["verbs"])

    def _adjective(self, voice: Voice) -> str:
        return self._pick(voice.adjectives if self._chance(0.7) else SHARED["adjectives"])

    # Chance: only `random()` itself is promised to give the same stream on every version of Python.

    def _below(self, bound: int) -> int:
        return int(self._random() * bound)

    def _chance(self, probability: float) -> bool:
        return self._random() < probability

    def _pick(self, choices: Sequence[T]) -> T:
        return choices[int(self._random() * len(choices))]


def _wrap(text: str, width: int, verse: bool) -> str:
    """Lines of at most `width` characters; in verse each begins with a capital."""
    lines, line = [], ""
    for word in text.split(" "):
        if line and len(line) + 1 + len(word) > width:
            lines.append(line)
            line = _upper(word) if verse else word
        else:
            line = f"{line} {word}" if line else word
    return "\n".join([*lines, line])


def _upper(text: str) -> str:
    return text[0].upper() + text[1:]


def _lower(text: str) -> str:
    return text if text.startswith(("I ", "O ")) else text[0].lower() + text[1:]


def _article(words: str) -> str:
    vowel = (words[0] in "aeiou" and not words.startswith("universal")) or words.startswith(("honest", "heir"))
    return f"an {words}" if vowel else f"a {words}"


def _third(verb: str) -> str:
    """``carry -> carries``, ``catch -> catches``, ``mend -> mends``."""
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ies"
    return verb + ("es" if verb.endswith(("s", "x", "z", "ch", "sh", "o")) else "s")


def _plural(noun: str) -> str:
    return _third(noun)


def _series(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]])


def _roman(number: int) -> str:
    steps = ((100, "C"), (90, "XC"), (50, "L"), (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I"))
    digits = ""
    for value, digit in steps:
        count, number = divmod(number, value)
        digits += digit * count
    return digits

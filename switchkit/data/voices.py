"""The speakers of the generated play: words, openings, favourite phrases, shapes of sentence and length of line."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PLACES", "SHARED", "VOICES", "Voice"]


@dataclass(frozen=True)
class Voice:
    """What makes a speaker one of a kind. Nouns and verbs are regular: plural and third person are made by rule."""

    name: str
    person: str
    """``"I"``, or ``"we"`` for who speaks of themselves so."""
    address: str
    """Before another's name."""
    openings: tuple[str, ...]
    phrases: tuple[str, ...]
    """Whole sentences, at the end of a speech."""
    nouns: tuple[str, ...]
    verbs: tuple[str, ...]
    adjectives: tuple[str, ...]
    forms: tuple[str, ...]
    """Shapes of sentence, as `play` names them; twice is twice as often."""
    sentences: tuple[int, int]
    """Fewest and most of a speech."""
    width: int
    """Characters of a line."""
    verse: bool = False


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


SHARED = {
    "nouns": _words(
        "house night day hand word heart brother sister door window road letter stranger morning friend name "
        "promise secret fire winter kingdom bridge river garden shadow answer"
    ),
    "verbs": _words("see hear know want leave follow seek remember call bring show ask help trust watch turn"),
    "adjectives": _words("good old long little dark strange true poor quiet last great cold honest young"),
}

PLACES = (
    "A hall in the palace",
    "The harbour, at dawn",
    "Before the mill",
    "A camp on the hill",
    "The walled garden",
    "A library, late",
    "The kitchen",
    "A street near the market",
    "The ruined chapel",
    "On board a ship",
)

VOICES = (
    Voice(
        name="Queen Isaura",
        person="we",
        address="Our loyal",
        openings=("By our command", "Let it be written", "As we are queen"),
        phrases=("So we have spoken.", "The crown remembers.", "Let no one gainsay it."),
        nouns=_words("crown throne realm banner treaty sceptre council subject decree palace heir ambassador"),
        verbs=_words("decree pardon crown banish summon grant reign forbid"),
        adjectives=_words("royal sovereign loyal gracious ancient golden lawful solemn"),
        forms=("tell", "tell", "which", "command", "if"),
        sentences=(2, 4),
        width=52,
        verse=True,
    ),
    Voice(
        name="Pipkin",
        person="I",
        address="Nuncle",
        openings=("Hey ho", "Riddle me this", "Tickle my nose", "Fiddle faddle"),
        phrases=("And that is why the goose laughed!", "Ha, ha, ha!", "Pay me with a pudding."),
        nouns=_words("pudding goose bell button nose drum cap egg cherry donkey tickle fiddle"),
        verbs=_words("tickle juggle whistle tumble fiddle nibble tease borrow"),
        adjectives=_words("merry foolish silly giddy plump spotted dizzy jolly"),
        forms=("count", "count", "ask", "liken", "praise"),
        sentences=(1, 3),
        width=34,
    ),
    Voice(
        name="Captain Barnaby",
        person="I",
        address="Avast,",
        openings=("Avast", "By salt and tar", "Mark the weather", "Ahoy there"),
        phrases=("The tide waits for no man.", "Haul away, lads, haul away!", "So says the sea."),
        nouns=_words("ship anchor sail mast harbour wave gull rope storm deck compass barrel tide"),
        verbs=_words("haul steer hoist row moor weather launch splice"),
        adjectives=_words("salty windy weathered tarry briny steady leeward rusty"),
        forms=("command", "command", "command", "tell", "deny"),
        sentences=(1, 4),
        width=44,
    ),
    Voice(
        name="Doctor Quill",
        person="I",
        address="Learned",
        openings=("It follows", "Consider", "In the first place", "As the ancients prove"),
        phrases=("The proof is left to the patient.", "I refer thee to the seventh chapter.", "Therefore I conclude."),
        nouns=_words("book theorem chapter argument proof axiom lantern page question error cause volume"),
        verbs=_words("prove deduce examine refute annotate conclude measure compare"),
        adjectives=_words("rational evident doubtful curious exact learned obscure universal"),
        forms=("if", "if", "reason", "reason", "which", "ask"),
        sentences=(2, 5),
        width=64,
    ),
    Voice(
        name="Nurse Tansy",
        person="I",
        address="My lamb",
        openings=("Bless me", "Well well", "Hush now", "Dear heart"),
        phrases=("There, there, eat thy broth.", "My poor knees!", "I said so, I always said so."),
        nouns=_words("cradle broth blanket apron kettle spoon lullaby fever bonnet pillow cupboard thimble"),
        verbs=_words("rock feed mend wash scold kiss stir comfort"),
        adjectives=_words("tender sleepy warm naughty sweet feverish tiny soft"),
        forms=("tell", "reason", "ask", "praise", "liken"),
        sentences=(2, 6),
        width=58,
    ),
    Voice(
        name="Sergeant Bruck",
        person="I",
        address="Soldier",
        openings=("Halt", "Stand fast", "To arms", "Eyes front"),
        phrases=("March!", "Not one step back.", "Blood and iron."),
        nouns=_words("sword shield trench drumbeat spear helmet wall battle enemy scar fortress musket"),
        verbs=_words("strike guard storm march besiege defend conquer sharpen"),
        adjectives=_words("bloody brave iron grim fallen fierce stubborn wounded"),
        forms=("command", "deny", "deny", "command", "tell"),
        sentences=(1, 2),
        width=30,
    ),
    Voice(
        name="Lady Mirabel",
        person="I",
        address="Gentle",
        openings=("Alas", "O moon", "Sweet heaven", "Ah me"),
        phrases=("And still he does not come.", "So sighs the nightingale.", "Love, be merciful."),
        nouns=_words("rose moon kiss sigh tear nightingale ribbon mirror dream lute lily veil"),
        verbs=_words("adore kiss mourn whisper embrace forgive beguile weep"),
        adjectives=_words("lovely pale silver fragrant faithful trembling fair dewy"),
        forms=("praise", "praise", "liken", "liken", "tell", "ask"),
        sentences=(2, 4),
        width=46,
        verse=True,
    ),
    Voice(
        name="Miller Hobb",
        person="I",
        address="Neighbour",
        openings=("Look ye", "By my grindstone", "Plain talk", "Marry"),
        phrases=("And flour is up a penny.", "That is honest weight.", "So grinds the mill."),
        nouns=_words("mill sack grain flour wheel cart ox loaf penny rat barn harvest"),
        verbs=_words("grind weigh sell plough thresh carry bake reap"),
        adjectives=_words("dusty heavy floury cheap muddy thrifty sturdy ripe"),
        forms=("reason", "tell", "count", "liken", "if"),
        sentences=(1, 4),
        width=40,
    ),
    Voice(
        name="Grey Ghost",
        person="I",
        address="Unhappy",
        openings=("Hear me", "From the grave", "When I had breath", "Beware"),
        phrases=("Remember the well.", "I fade, I fade.", "Dust to dust, and no rest."),
        nouns=_words("grave tomb worm candle raven ash oath crime silence bone curse midnight"),
        verbs=_words("haunt avenge bury betray murder accuse chill doom"),
        adjectives=_words("dead hollow pitiless eternal ghostly damned unburied black"),
        forms=("which", "deny", "tell", "praise", "if"),
        sentences=(1, 3),
        width=38,
        verse=True,
    ),
    Voice(
        name="Master Vance",
        person="we",
        address="Worthy",
        openings=("For a fair price", "Upon my ledger", "Between partners", "At five in the hundred"),
        phrases=("Sign here, and here.", "A bargain is a bargain.", "Gold never sleeps."),
        nouns=_words("ledger ducat cargo bargain silk spice debt contract purse interest warehouse coin"),
        verbs=_words("buy lend count insure trade invest owe appraise"),
        adjectives=_words("profitable costly imported solvent prudent rich double unpaid"),
        forms=("if", "ask", "ask", "count", "tell"),
        sentences=(2, 3),
        width=60,
    ),
)

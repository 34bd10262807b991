"""The kinds of sound source that a procedural clip can hold, and the words for them.

A kind has a sound (`sounds.SOUNDS`) and a look (`pictures.LOOKS`). Kinds that share a sound are
*sound-alikes*: only the picture tells them apart. Kinds that share a look are *look-alikes*: only the sound does.
"""

from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class Phrase:
    """One way to say that a source sounds: "a dog" with "barks" or "barking"."""

    subject: str
    verb: str
    gerund: str

    @property
    def clause(self) -> str:
        return f"{self.subject} {self.verb}"

    @property
    def noun_phrase(self) -> str:
        return f"{self.subject} {self.gerund}"


@dataclass(frozen=True)
class Kind:
    """A kind of source.

    Args:
        family (`str`): `"tonal"`, `"noisy"`, `"impulsive"`, `"speech-like"` or `"engine-like"`.
        sound (`str`): Key of `sounds.SOUNDS`.
        look (`str`): Key of `pictures.LOOKS`.
        noun (`str`): The words that name the kind in a caption, and no other kind.
        phrases (`tuple[Phrase, ...]`): The ways to say that it sounds; every subject contains the noun.
    """

    family: str
    sound: str
    look: str
    noun: str
    phrases: tuple[Phrase, ...]


def _phrases(subject: str, *verbs: str) -> tuple[Phrase, ...]:
    return tuple(Phrase(subject, *verb.split("/")) for verb in verbs)


KINDS: dict[str, Kind] = {
    "car": Kind("engine-like", "engine", "car", "car", _phrases("a car", "idles/idling", "drives/driving")),
    "boat": Kind("engine-like", "engine", "boat", "boat", _phrases("a boat", "motors/motoring", "speeds/speeding")),
    "rain": Kind("noisy", "hiss", "cloud", "rain", _phrases("rain", "falls/falling", "pours/pouring")),
    "pan": Kind("noisy", "hiss", "pan", "pan", _phrases("a pan", "sizzles/sizzling", "fries/frying")),
    "hammer": Kind("impulsive", "knock", "hammer", "hammer", _phrases("a hammer", "pounds/pounding", "bangs/banging")),
    "door": Kind("impulsive", "knock", "door", "door", _phrases("a door", "bangs/banging", "rattles/rattling")),
    "sheep": Kind("speech-like", "bleat", "sheep", "sheep", _phrases("a sheep", "bleats/bleating", "calls/calling")),
    "goat": Kind("speech-like", "bleat", "goat", "goat", _phrases("a goat", "bleats/bleating", "calls/calling")),
    "bell": Kind("tonal", "bell", "bell", "bell", _phrases("a bell", "rings/ringing", "chimes/chiming")),
    "siren": Kind("tonal", "siren", "ambulance", "siren", _phrases("a siren", "wails/wailing", "sounds/sounding")),
    "bird": Kind("tonal", "chirp", "bird", "bird", _phrases("a bird", "chirps/chirping", "sings/singing")),
    "duck": Kind("speech-like", "quack", "bird", "duck", _phrases("a duck", "quacks/quacking", "calls/calling")),
    "man": Kind("speech-like", "low voice", "person", "man", _phrases("a man", "speaks/speaking", "talks/talking")),
    "woman": Kind(
        "speech-like", "high voice", "person", "woman", _phrases("a woman", "speaks/speaking", "talks/talking")
    ),
    "dog": Kind("impulsive", "bark", "dog", "dog", _phrases("a dog", "barks/barking", "yaps/yapping")),
    "clock": Kind("impulsive", "tick", "clock", "clock", _phrases("a clock", "ticks/ticking", "clicks/clicking")),
    "wind": Kind("noisy", "wind", "tree", "wind", _phrases("wind", "blows/blowing", "howls/howling")),
    "helicopter": Kind(
        "engine-like", "rotor", "helicopter", "helicopter", _phrases("a helicopter", "flies/flying", "hovers/hovering")
    ),
}

# How captions name a shared sound whose source is not seen, by the name of the sound.
UNSEEN: dict[str, Kind] = {
    "engine": Kind("engine-like", "engine", "", "engine", _phrases("an engine", "runs/running", "hums/humming")),
    "hiss": Kind("noisy", "hiss", "", "hiss", _phrases("a hiss", "continues/continuing", "sounds/sounding")),
    "knock": Kind("impulsive", "knock", "", "something", _phrases("something", "knocks/knocking", "taps/tapping")),
    "bleat": Kind("speech-like", "bleat", "", "animal", _phrases("an animal", "bleats/bleating", "calls/calling")),
}

_sharers = Counter(kind.sound for kind in KINDS.values())
SOUND_ALIKES: frozenset[str] = frozenset(name for name, kind in KINDS.items() if _sharers[kind.sound] > 1)
"""The kinds that only the picture tells apart."""


def name_of(kind: str, seen: bool) -> str:
    """What a caption can call a sounding source: its kind, or its bare sound for an unseen sound-alike."""
    return kind if seen or kind not in SOUND_ALIKES else KINDS[kind].sound

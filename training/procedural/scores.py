"""Which sources of a procedural clip a caption names, and which it confuses or invents."""

from collections.abc import Sequence

import numpy as np

from .captions import names_in_caption
from .kinds import KINDS, SOUND_ALIKES, name_of
from .scenes import Event, Scene


COLUMNS = {
    "set": "clips whose caption names the right set of sources, and no other",
    "sound-alikes": "sound-alike sources on screen that are named: only the picture tells which of two it is",
    "twin": "sound-alike sources on screen that are called by the name of the other of the two",
    "bare": "sound-alike sources on screen that get the word of their pair, as those off screen do, and not their name",
    "off screen": "sound-alike sources off screen that get the word of their pair, as nobody can know more",
    "distinct": "all other sources that are named: the sound tells",
    "invented": "clips whose caption names a source that sounds like none of theirs",
}


def needs_picture(event: Event) -> bool:
    """Whether the source can be named, but only with the picture: a sound-alike on screen."""
    return event.kind in SOUND_ALIKES and event.place is not None


def count_names(sources: Sequence[Sequence[tuple[str, bool]]], captions: Sequence[str]) -> dict[str, np.ndarray]:
    """Counts what each caption names, for each of `COLUMNS`.

    Args:
        sources (`Sequence`): The sounding sources of each clip, as pairs of kind and whether it is on screen.
        captions (`Sequence[str]`): One caption for each clip.

    Returns:
        `dict[str, np.ndarray]`: Hits and possible hits of each clip, (clips, 2), by column.
    """
    counts = {column: np.zeros((len(captions), 2)) for column in COLUMNS}
    for place, (clip, caption) in enumerate(zip(sources, captions, strict=True)):
        said, heard = names_in_caption(caption), [name_of(kind, seen) for kind, seen in clip]
        counts["set"][place] = said == frozenset(heard), 1
        sounds = {KINDS[kind].sound for kind, _ in clip}
        counts["invented"][place] = any(_sound_of(name) not in sounds for name in said), 1
        for (kind, seen), name in zip(clip, heard):
            column = "distinct" if kind not in SOUND_ALIKES else "sound-alikes" if seen else "off screen"
            counts[column][place] += name in said, 1
            if column == "sound-alikes":
                alike = {other for other in said - {kind} if _sound_of(other) == KINDS[kind].sound}
                counts["twin"][place] += bool(alike & KINDS.keys()), 1
                counts["bare"][place] += bool(alike - KINDS.keys()) and not said & {kind}, 1
    return counts


def _sound_of(name: str) -> str:
    """The sound of a name in a caption: the sound of the kind, or the bare sound itself."""
    return KINDS[name].sound if name in KINDS else name


def score(scenes: list[Scene], captions: list[str]) -> dict[str, float]:
    """The shares, 0 to 1, that `COLUMNS` describes."""
    sources = [[(event.kind, event.place is not None) for event in scene.events] for scene in scenes]
    sums = {column: counts.sum(0) for column, counts in count_names(sources, captions).items()}
    return {column: float(hits / possible) for column, (hits, possible) in sums.items() if possible}

"""Captions of the procedural clips in the style of AudioCaps: what is heard, in its order, and what overlaps.

Also the closed vocabulary of these captions, a WordPiece tokenizer for it, and the parsing of a caption into the
sources that it names.
"""

import re
import string
from collections.abc import Sequence

import numpy as np
from transformers import BertTokenizer

from .kinds import KINDS, UNSEEN, Phrase


_NAMED = KINDS | UNSEEN
_NOUNS = {kind.noun: name for name, kind in _NAMED.items()}
_NOUN = re.compile(rf"\b({'|'.join(sorted(_NOUNS, key=len, reverse=True))})\b", re.IGNORECASE)

# Links between overlapping sounds and between sounds in a row, each with the form of the phrase that follows it.
_TOGETHER = (("while", "clause"), ("as", "clause"), ("and", "clause"), ("with", "noun_phrase"))
_IN_A_ROW = (("followed by", "noun_phrase"), ("and then", "clause"), ("then", "clause"), (", then", "clause"))


def _choose(options: Sequence, rng: np.random.Generator):
    """Draws an option, the n-th with a weight of 1 / n.

    Synonyms in real captions follow Zipf's law too. If all were equally frequent, the most probable caption would be a
    matter of chance.
    """
    weights = 1 / np.arange(1, len(options) + 1)
    return options[rng.choice(len(options), p=weights / weights.sum())]


def _join(parts: list[tuple[Phrase, ...]], rng: np.random.Generator) -> str:
    text = ""
    for position, group in enumerate(parts):
        link, form = ("", "clause") if position == 0 else _choose(_IN_A_ROW, rng)
        text += (link if link.startswith(",") else f" {link}") + f" {getattr(group[0], form)}"
        for phrase in group[1:]:
            link, form = _choose(_TOGETHER, rng)
            text += f" {link} {getattr(phrase, form)}"
    return text.strip()


def write_captions(groups: list[tuple[str, ...]], count: int, rng: np.random.Generator) -> list[str]:
    """Writes different captions of one clip.

    Args:
        groups (`list[tuple[str, ...]]`): The names of the sounds (keys of `KINDS` or `UNSEEN`): overlapping sounds in
            one group, the groups in the order in which they begin.
        count (`int`): Number of captions, all different.
        rng (`np.random.Generator`): Chooses the words.
    """
    captions: dict[str, None] = {}
    while len(captions) < count:
        parts = [tuple(_choose(_NAMED[name].phrases, rng) for name in group) for group in groups]
        if len(parts) == 1 and len(parts[0]) == 1:
            phrase = parts[0][0]
            forms = (phrase.clause, phrase.noun_phrase, f"the sound of {phrase.noun_phrase}")
            text = _choose(forms, rng)
        else:
            text = _join(parts, rng)
        captions[text[0].upper() + text[1:]] = None
    return list(captions)


def names_in_caption(caption: str) -> frozenset[str]:
    """The sources that a caption names: kinds, and bare sounds (`"engine"`, …) where it does not name the kind."""
    return frozenset(_NOUNS[noun.lower()] for noun in _NOUN.findall(caption))


def closed_vocabulary() -> list[str]:
    """Every word and mark that `write_captions` can use, sorted."""
    text = ["the sound of"] + [link for link, _ in _TOGETHER + _IN_A_ROW]
    for kind in _NAMED.values():
        for phrase in kind.phrases:
            text += [phrase.clause, phrase.noun_phrase]
    return sorted(set(re.findall(r"\w+|[^\w\s]", " ".join(text).lower())))


def build_tokenizer() -> BertTokenizer:
    """A lower-casing WordPiece tokenizer with one piece for each word of the captions.

    `[PAD]` is 0; `[CLS]` and `[SEP]` surround a text. Letters and digits are pieces too, so that an unknown word is
    spelled instead of lost.
    """
    characters = string.ascii_lowercase + string.digits
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *".'-", *characters, *(f"##{c}" for c in characters)]
    pieces += [word for word in closed_vocabulary() if word not in pieces]
    return BertTokenizer(vocab={piece: index for index, piece in enumerate(pieces)}, model_max_length=40)

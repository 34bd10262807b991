"""Oracle captioners (ours): they know the true sources of a procedural clip and make at most one kind of error.

Their scores show how much each kind of error costs in each caption metric.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..metrics.compute import METRICS, compute_metrics
from ..procedural.captions import write_captions
from ..procedural.kinds import KINDS, SOUND_ALIKES
from ..procedural.scenes import Event, Scene, make_scene
from ..procedural.scores import needs_picture, score


ORACLES = {
    "right": "names every source as the references do",
    "bare": "has only the word of their pair for sound-alikes, on screen or off",
    "guess": "calls every sound-alike, on screen or off, by one of the two names, by chance",
    "twin": "calls sound-alikes on screen by the name of the other of the two",
}
"""What each oracle does. It names everything else right."""


def judge_oracles(num_clips: int, seed: int = 0, metrics: Sequence[str] = METRICS) -> dict[str, Any]:
    """The scores of the captions of each oracle.

    Args:
        num_clips (`int`), seed (`int`, *optional*, defaults to 0): Of the test clips.
        metrics (`Sequence[str]`, *optional*, defaults to all): See [`~metrics.compute_metrics`].

    Returns:
        `dict[str, Any]`: `oracles`, the scores of each of `ORACLES` by metric and by column of `scores.COLUMNS`; and
        `skipped`, the metrics that could not be computed here.
    """
    scenes = [make_scene(seed, "test", index) for index in range(num_clips)]
    figures, skipped = {}, []
    for oracle in ORACLES:
        captions = [caption_of(oracle, scene) for scene in scenes]
        scores = compute_metrics(captions, [scene.captions for scene in scenes], metrics)
        figures[oracle] = scores["corpus"] | score(scenes, captions)
        skipped = list(scores["skipped"])
    return {"oracles": figures, "skipped": skipped}


def caption_of(oracle: str, scene: Scene) -> str:
    """One caption of an oracle, in one of the wordings that the references are drawn from."""
    chance = scene.rng("guess")
    groups = [tuple(_called(oracle, event, chance) for event in group) for group in scene.groups]
    # The published figures depend on the name of the generator.
    return write_captions(groups, 1, scene.rng("listener"))[0]


def _called(oracle: str, event: Event, chance: np.random.Generator) -> str:
    if event.kind not in SOUND_ALIKES:
        return event.name
    sound = KINDS[event.kind].sound
    pair = sorted(kind for kind in SOUND_ALIKES if KINDS[kind].sound == sound)
    if oracle == "bare":
        return sound
    if oracle == "guess":
        return pair[chance.integers(len(pair))]
    if oracle == "twin" and needs_picture(event):
        return next(kind for kind in pair if kind != event.kind)
    return event.name

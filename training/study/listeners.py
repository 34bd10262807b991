"""Captions of listeners that err in one way alone, to read the metrics of procedural clips by. (ours)"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..metrics.compute import METRICS, compute_metrics
from ..procedural.captions import write_captions
from ..procedural.kinds import KINDS, SOUND_ALIKES
from ..procedural.scenes import Event, Scene, make_scene
from ..procedural.scores import needs_picture, score


LISTENERS = {
    "right": "names every source as the references do",
    "bare": "has only the word of their pair for sound-alikes, on screen or off",
    "guess": "calls every sound-alike, on screen or off, by one of the two names, by chance",
    "twin": "calls sound-alikes on screen by the name of the other of the two",
}
"""What each does; all else they name right."""


def judge_listeners(num_clips: int, seed: int = 0, metrics: Sequence[str] = METRICS) -> dict[str, Any]:
    """
    What captions without a model get: the measure of what those of a model can get.

    Args:
        num_clips (`int`), seed (`int`, *optional*, defaults to 0): Of the test clips.
        metrics (`Sequence[str]`, *optional*, defaults to all): See [`~metrics.compute_metrics`].

    Returns:
        `dict[str, Any]`: `listeners`, the figures of each of `LISTENERS`, of the metrics and of the sources named; and
        `skipped`, the metrics that could not be computed here.
    """
    scenes = [make_scene(seed, "test", index) for index in range(num_clips)]
    figures, skipped = {}, []
    for listener in LISTENERS:
        captions = [caption_of(listener, scene) for scene in scenes]
        scores = compute_metrics(captions, [scene.captions for scene in scenes], metrics)
        figures[listener] = scores["corpus"] | score(scenes, captions)
        skipped = list(scores["skipped"])
    return {"listeners": figures, "skipped": skipped}


def caption_of(listener: str, scene: Scene) -> str:
    """One caption of a listener, in one of the wordings that the references are drawn from."""
    chance = scene.rng("guess")
    groups = [tuple(_called(listener, event, chance) for event in group) for group in scene.groups]
    return write_captions(groups, 1, scene.rng("listener"))[0]


def _called(listener: str, event: Event, chance: np.random.Generator) -> str:
    if event.kind not in SOUND_ALIKES:
        return event.name
    sound = KINDS[event.kind].sound
    pair = sorted(kind for kind in SOUND_ALIKES if KINDS[kind].sound == sound)
    if listener == "bare":
        return sound
    if listener == "guess":
        return pair[chance.integers(len(pair))]
    if listener == "twin" and needs_picture(event):
        return next(kind for kind in pair if kind != event.kind)
    return event.name

"""A captioner of pictures that has never read a caption of a sound, and 16 pairs that prompt it to speak of sounds (DALI)."""

from itertools import islice

from torch.utils.data import Dataset, Subset

from ...processing.processing_evacap import EVACapProcessor
from ..procedural.kinds import KINDS
from ..procedural.scenes import Scene
from ..train import TrainingRun
from .recaptioned import RecaptionedClips


PAIRS = 16
"""Pairs of picture and caption of the sound in prompt tuning (DALI)."""


def picture_caption(scene: Scene) -> str:
    """Names everything on the screen in alphabetical order, whether it sounds or not: "A bell and a dog"."""
    kinds = [event.kind for event in scene.events if event.place is not None]
    kinds += [silent.kind for silent in scene.silent_objects]
    text = " and ".join(KINDS[kind].phrases[0].subject for kind in sorted(kinds)) or "nothing"
    return text[0].upper() + text[1:]


class PictureCaptionedRun(TrainingRun):
    """A run whose captions say what is seen. It supports procedural clips only."""

    def make_clips(self, reader: EVACapProcessor) -> RecaptionedClips:
        """The clips of the configuration, with a [`picture_caption`] each."""
        clips = super().make_clips(reader)
        return RecaptionedClips(clips, {"text": [picture_caption(clips.scene(index)) for index in range(len(clips))]})


class PromptingRun(TrainingRun):
    """A run on the first 16 clips whose sources are all on the screen, with the usual captions, which say what is heard.

    DALI chooses its pairs by how well picture and caption fit. It supports procedural clips only.
    """

    def make_clips(self, reader: EVACapProcessor) -> Dataset:
        """The chosen ones among the clips of the configuration."""
        clips = super().make_clips(reader)
        numbers = range(len(clips))
        fitting = (n for n in numbers if all(event.place is not None for event in clips.scene(n).events))
        return Subset(clips, list(islice(fitting, PAIRS)))

"""Procedural clips with a caption of each stream, for the variant that reads them (CASE)."""

import os
from pathlib import Path

from accelerate import Accelerator

from ...processing.processing_evacap import EVACapProcessor
from ..evaluation.captioner import Captioner, MakeClips
from ..train import TrainingRun
from .recaptioned import RecaptionedClips


STREAMS = ("audio", "video")


def with_stream_captions(
    make_clips: MakeClips,
    study: str | os.PathLike,
    seed: int,
    output: str | os.PathLike,
    accelerator: Accelerator,
    num_workers: int = 0,
) -> MakeClips:
    """Gives clips the captions that `audio-only` and `video-only` of the study write of them, greedily.

    Of a run with seed 0 these captioners are of seed 1, of any other run of seed 0: its training clips are new to them.

    Args:
        make_clips (`MakeClips`): Makes [`ProceduralClips`].
        study (`str` or `os.PathLike`): The folder of the study's runs, where these captioners have to be.
        seed (`int`): The seed of the run that reads the captions.
        output (`str` or `os.PathLike`): Folder of the captions; it is continued.
        accelerator (`Accelerator`), num_workers (`int`): See [`~Captioner.caption`].
    """
    captions = {}
    for stream in STREAMS:
        folder = Path(study) / f"{stream}-only-seed{0 if seed else 1}" / "model"
        captioner = Captioner(stream, folder, output)
        options = {"num_beams": 1, "num_workers": num_workers}
        captions[f"{stream}_captions"] = captioner.caption_all(make_clips, accelerator, **options)

    def make(processor: EVACapProcessor) -> RecaptionedClips:
        return RecaptionedClips(make_clips(processor), captions)

    return make


class StreamCaptionedRun(TrainingRun):
    """A run whose clips come with captions of their streams, in a folder of the study. The captions are kept in its folder.

    It supports procedural clips only.
    """

    def make_clips(self, reader: EVACapProcessor) -> RecaptionedClips:
        """The clips of the configuration, with captions."""
        place = self.folder.parent, self.config.seed, self.folder / "captions" / "train"
        return with_stream_captions(super().make_clips, *place, self.accelerator)(reader)

"""The second stage of DALI: an aligned captioner of sounds learns from captions that it wrote with the picture in view."""

from pathlib import Path

from ...processing.processing_evacap import EVACapProcessor
from ..evaluation.captioner import Captioner
from ..train import TrainingRun
from .recaptioned import RecaptionedClips


class DistillationRun(TrainingRun):
    """A run whose captions are those of the `late_concat` captioner in the folder beside `model.start`.

    It supports a single process only, and procedural clips. The captions are kept in `output/captions`.

    Args:
        config ([`RunConfig`]): The configuration.
    """

    NUM_BEAMS = 4

    def make_clips(self, reader: EVACapProcessor) -> RecaptionedClips:
        """The clips of the configuration, with the captions of both streams."""
        folder = Path(self.config.model.start).with_name("late_concat")
        captioner = Captioner("late_concat", folder, self.folder / "captions")
        clips = super().make_clips(reader)
        options = {"data": f"{len(clips)} procedural clips, seed {self.config.seed}", "num_beams": self.NUM_BEAMS}
        captions = captioner.caption_all(super().make_clips, self.accelerator, **options)
        return RecaptionedClips(clips, {"text": captions})

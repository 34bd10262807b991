"""The second stage of DALI: an aligned captioner of sounds learns from captions that it wrote with the picture in view."""

from pathlib import Path

import torch
from torch.utils.data import Dataset

from ...processing.processing_evacap import EVACapProcessor
from ..components import make_clips
from ..evaluation.captioner import Captioner, Condition, list_clips, make_batches
from ..train import TrainingRun


class Recaptioned(Dataset):
    """Clips with other captions.

    Args:
        clips (`Dataset`): The clips, as the data collator takes them.
        captions (`list[str]`): A caption for each.
        processor ([`EVACapProcessor`]): Makes the labels.
    """

    def __init__(self, clips: Dataset, captions: list[str], processor: EVACapProcessor):
        self.clips, self.captions, self.processor = clips, captions, processor

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {**self.clips[index], "labels": self.processor(text=self.captions[index])["labels"][0]}


class DistillationRun(TrainingRun):
    """A run whose captions are those of the `late_concat` captioner in the folder beside `model.start`.

    It supports a single process only, and procedural clips. The captions are kept in `output/captions`.

    Args:
        config ([`RunConfig`]): The configuration.
    """

    NUM_BEAMS = 4
    CLIPS_AT_ONCE = 64

    def make_clips(self, reader: EVACapProcessor) -> Recaptioned:
        """The clips of the configuration, with the captions of both streams."""
        config = self.config

        def make(processor: EVACapProcessor) -> Dataset:
            return make_clips(config.data, processor, config.seed, kept_clips=config.resources.kept_clips)

        captioner = Captioner(
            "late_concat", Path(config.model.start).with_name("late_concat"), self.folder / "captions"
        )
        clips = make(reader)
        tested = list_clips(clips)
        pairs = captioner.pairs(Condition(), tested)
        options = {"data": f"{len(clips)} procedural clips, seed {config.seed}", "num_beams": self.NUM_BEAMS}
        found = captioner.caption(make_batches([pairs], self.CLIPS_AT_ONCE), tested, make, self.accelerator, **options)
        return Recaptioned(clips, [found[pair].text for pair in pairs], reader)

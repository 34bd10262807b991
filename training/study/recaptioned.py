"""Procedural clips with captions other than their own."""

from collections.abc import Mapping

import torch
from torch.utils.data import Dataset

from ..procedural.dataset import ProceduralClips


class RecaptionedClips(Dataset):
    """Procedural clips with other captions, or with captions of their streams.

    Args:
        clips ([`ProceduralClips`]): The clips.
        captions (`Mapping[str, list[str]]`): By the names of the processor, such as `"text"` and `"audio_captions"`, one for
            each clip.
    """

    def __init__(self, clips: ProceduralClips, captions: Mapping[str, list[str]]):
        self.clips, self.captions = clips, captions
        self.processor, self.split, self.seed = clips.processor, clips.split, clips.seed

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.processor(**{name: texts[index] for name, texts in self.captions.items()})
        return {**self.clips[index], **{name: values[0] for name, values in ids.items()}}

"""Procedural clips as a dataset to train on."""

from torch.utils.data import Dataset
from transformers.video_utils import VideoMetadata

from ..processing.processing_evacap import EVACapProcessor
from .clip_sounds import SAMPLING_RATE
from .clips import make_scene, render_frames, render_waveform


CLIP_FPS = 10


class ProceduralClips(Dataset):
    """Procedural clips as the data collator takes them, rendered when they are asked for.

    Args:
        processor ([`EVACapProcessor`]): Makes the features; a stream that it does not take is not rendered.
        num_clips (`int`): How many.
        split (`str`), seed (`int`): See [`~clips.make_scene`].
    """

    def __init__(self, processor: EVACapProcessor, num_clips: int, split: str = "train", seed: int = 0):
        self.processor = processor
        self.num_clips = num_clips
        self.split = split
        self.seed = seed

    def __len__(self) -> int:
        return self.num_clips

    def __getitem__(self, index: int) -> dict:
        scene = make_scene(self.seed, self.split, index)
        streams = {}
        if self.processor.modalities != "video":
            streams |= {"audio": render_waveform(scene), "sampling_rate": SAMPLING_RATE}
        if self.processor.modalities != "audio":
            # Only the frames that would be taken from the clip's file.
            metadata = VideoMetadata(total_num_frames=round(scene.duration * CLIP_FPS), fps=CLIP_FPS)
            timestamps = self.processor.video_processor.sample_frames(metadata) / CLIP_FPS
            size = self.processor.video_processor.crop_size["height"]
            streams |= {"videos": render_frames(scene, timestamps, size), "do_sample_frames": False}
        inputs = self.processor(**streams, text=scene.captions[0])
        return {name: values[0] for name, values in inputs.items()}

    def captions(self, index: int) -> list[str]:
        """All captions of a clip."""
        return make_scene(self.seed, self.split, index).captions

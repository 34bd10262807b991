"""Procedural clips as a dataset to train on."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers.video_utils import VideoMetadata

from ...processing.processing_evacap import EVACapProcessor
from ..files import whole_file
from . import kinds, pictures, scenes, sounds
from .scenes import Scene, make_scene, render_frames, render_waveform
from .sounds import SAMPLING_RATE


CLIP_FPS = 10
RENDERED_AT_ONCE = 64
RENDERERS = (kinds, pictures, sounds, scenes)
"""The modules whose code determines the content of a clip."""
ROUNDING = 1e-4
"""Tolerance for kept features. Between processes a feature was seen to differ by 2e-6."""


class ProceduralClips(Dataset):
    """Procedural clips as the data collator takes them, rendered on access.

    Args:
        processor ([`EVACapProcessor`]): Makes the features. Streams that it does not take are not rendered.
        num_clips (`int`): Number of clips.
        split (`str`), seed (`int`): See [`~scenes.make_scene`].
    """

    def __init__(self, processor: EVACapProcessor, num_clips: int, split: str = "train", seed: int = 0):
        self.processor = processor
        self.num_clips = num_clips
        self.split = split
        self.seed = seed

    def __len__(self) -> int:
        return self.num_clips

    def __getitem__(self, index: int) -> dict:
        streams = {}
        if self.processor.modalities != "audio":
            streams |= {"videos": self.frames(index), "do_sample_frames": False}
        inputs = self.processor(**streams, text=self.captions(index)[0])
        inputs = {name: values[0] for name, values in inputs.items()}
        if self.processor.modalities != "video":
            inputs["input_features"] = self.features(index)
        return inputs

    def scene(self, index: int) -> Scene:
        """The description of a clip."""
        return make_scene(self.seed, self.split, index)

    def captions(self, index: int) -> list[str]:
        """All captions of a clip."""
        return self.scene(index).captions

    def features(self, index: int) -> np.ndarray:
        """The sound of a clip: `input_features` (T, M) float32."""
        waveform = render_waveform(self.scene(index))
        return self.processor(audio=waveform, sampling_rate=SAMPLING_RATE)["input_features"][0]

    def frames(self, index: int) -> np.ndarray:
        """The picture of a clip: (frames, height, width, 3) uint8 RGB, the frames that would be sampled from its file."""
        scene, video_processor = self.scene(index), self.processor.video_processor
        metadata = VideoMetadata(total_num_frames=round(scene.duration * CLIP_FPS), fps=CLIP_FPS)
        timestamps = video_processor.sample_frames(metadata) / CLIP_FPS
        return render_frames(scene, timestamps, video_processor.crop_size["height"])


class KeptProceduralClips(ProceduralClips):
    """The clips of [`ProceduralClips`], rendered once and kept in a folder for all runs that train on them.

    Each stream is one NumPy file. Its name contains a hash of the settings and of the code that renders the clips, so
    other settings or other code use another file. A file is complete or absent; processes that start at the same time
    each write it for themselves. It is replaced if its first clip differs from what would be rendered now by more than
    `ROUNDING`.

    The alternative is to write media files and run `evacap prepare`. Training then reads a clip about as fast, but
    encoding one as MP4 takes 13 times as long as rendering it.

    Args:
        processor (`EVACapProcessor`), num_clips (`int`), split (`str`), seed (`int`): See [`ProceduralClips`].
        folder (`str` or `os.PathLike`): The folder; it is made if it is missing.
        num_workers (`int`, *optional*, defaults to 0): Number of rendering processes.

    Raises:
        OSError: If a file cannot be read or written.
    """

    def __init__(
        self,
        processor: EVACapProcessor,
        num_clips: int,
        split: str = "train",
        seed: int = 0,
        folder: str | os.PathLike = "clips",
        num_workers: int = 0,
    ):
        super().__init__(processor, num_clips, split, seed)
        self.paths = {}
        if processor.modalities != "video":
            self.paths["audio"] = self._keep("audio", processor.feature_extractor, Path(folder), num_workers)
        if processor.modalities != "audio":
            self.paths["video"] = self._keep("video", processor.video_processor, Path(folder), num_workers)

    def features(self, index: int) -> np.ndarray:
        """See [`ProceduralClips.features`]."""
        return np.array(np.load(self.paths["audio"], mmap_mode="r")[index])

    def frames(self, index: int) -> np.ndarray:
        """See [`ProceduralClips.frames`]."""
        return np.array(np.load(self.paths["video"], mmap_mode="r")[index])

    def _keep(self, stream: str, maker, folder: Path, num_workers: int) -> Path:
        rendered = _Stream(ProceduralClips(self.processor, self.num_clips, self.split, self.seed), stream)
        # The location of its code does not change what a processor computes.
        settings = {name: value for name, value in maker.to_dict().items() if name != "auto_map"}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
        for module in RENDERERS:
            digest.update(Path(module.__file__).read_bytes())
        path = folder / f"{self.split}-{self.seed}-{self.num_clips}-{stream}-{digest.hexdigest()[:12]}.npy"
        first = rendered[0]
        if path.exists() and _alike(np.load(path, mmap_mode="r")[0], first):
            return path
        loader = DataLoader(
            rendered,
            RENDERED_AT_ONCE,
            collate_fn=np.stack,
            num_workers=num_workers,
            # A generator of its own: rendering must not advance the one that the weights are drawn from.
            generator=torch.Generator(),
        )
        with (
            whole_file(path) as partial,
            open(partial, "wb") as file,
            tqdm(total=len(self), desc=f"rendering {stream}", unit="clip") as progress,
        ):
            header = {"descr": first.dtype.str, "fortran_order": False, "shape": (len(self), *first.shape)}
            np.lib.format.write_array_header_1_0(file, header)
            for clips in loader:
                file.write(clips.tobytes())
                progress.update(len(clips))
        return path


def _alike(kept: np.ndarray, rendered: np.ndarray) -> bool:
    return kept.shape == rendered.shape and np.allclose(kept, rendered, rtol=0, atol=ROUNDING)


class _Stream(Dataset):
    """One stream of procedural clips."""

    def __init__(self, clips: ProceduralClips, stream: str):
        self.clips, self.stream = clips, stream

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.clips.features(index) if self.stream == "audio" else self.clips.frames(index)

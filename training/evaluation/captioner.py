"""Captions of sounds with pictures: each clip with its own video, with another's, with fewer frames, or with none."""

import copy
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ...modeling_evacap.configuration_evacap import EVACapConfig
from ...modeling_evacap.language_model_evacap import captioner_class
from ...modeling_evacap.modeling_evacap import EVACapCaptioner
from ...processing.captioning_evacap import CaptionedBatch, caption_batch, has_gate
from ...processing.model_processor import load_processor, loading
from ...processing.processing_evacap import EVACapProcessor
from ..data.collator import EVACapDataCollator
from ..data.prepared_clips import PreparedClips
from ..files import JsonLines, check_settings, write_json
from ..procedural.scenes import make_scene, manifest_entry


MakeClips = Callable[[EVACapProcessor], Dataset]
"""Takes a processor and returns the clips that it makes: [`PreparedClips`] or [`ProceduralClips`]."""


@dataclass(frozen=True)
class TestedClip:
    """What is known of a test clip besides its sound and picture.

    Args:
        id (`str`): Its name.
        references (`list[str]`): Its captions.
        extra (`dict`): All other fields of its manifest.
        has_picture (`bool`): Whether it has a picture.
    """

    id: str
    references: list[str]
    extra: dict[str, Any]
    has_picture: bool


@dataclass(frozen=True)
class Condition:
    """A condition under which clips are captioned.

    Args:
        shuffle (`float`, *optional*, defaults to 0): Share of the clips that get the video of another clip.
        frames (`int`, *optional*): Number of frames of a video, 0 for no video; by default as many as the checkpoint
            takes.
    """

    shuffle: float = 0.0
    frames: int | None = None

    def __str__(self) -> str:
        if self.frames is not None:
            return "no video" if self.frames == 0 else f"{self.frames} frame{'s' * (self.frames > 1)}"
        return "own videos" if self.shuffle == 0 else f"{100 * self.shuffle:g} % of the videos swapped"


class Pair(NamedTuple):
    """A sound and a picture, by the numbers of their clips.

    Without a picture `video` is `None` and `frames` is 0. Otherwise `frames` is the number of frames, or `None` for as
    many as the checkpoint takes.
    """

    clip: int
    video: int | None
    frames: int | None


class Caption(NamedTuple):
    """The caption of a pair, with mean gate and mean attention entropy, and both over time; `None` without a gate."""

    text: str
    gate: float | None = None
    entropy: float | None = None
    gate_over_time: list[float] | None = None
    entropy_over_time: list[float] | None = None


def list_clips(clips: Dataset, max_clips: int | None = None) -> list[TestedClip]:
    """The clips of a split, or the first of them.

    Args:
        clips ([`PreparedClips`] or [`ProceduralClips`]): The split.
        max_clips (`int`, *optional*): The greatest number of clips to list.
    """
    count = len(clips) if max_clips is None else min(max_clips, len(clips))
    if isinstance(clips, PreparedClips):
        rows = clips.rows.data
        ids = rows.column("id")[:count].to_pylist()
        column = "frames" if clips.video_width is None else "video_features"
        with_picture = pc.greater(pc.list_value_length(rows.column(column)[:count]), 0).to_pylist()
        return [TestedClip(ids[i], clips.captions(i), clips.extra(i), with_picture[i]) for i in range(count)]
    scenes = [make_scene(clips.seed, clips.split, index) for index in range(count)]
    return [TestedClip(scene.id, scene.captions, manifest_entry(scene, ""), True) for scene in scenes]


def choose_videos(clips: Sequence[TestedClip], share: float, seed: int = 0) -> list[int | None]:
    """Chooses the video of each clip when a share of the videos is shuffled (paper, table 3; the choice is ours).

    Of n clips, `round(share · n)` with a picture are chosen, but at least two. Their videos are deranged: each goes to
    another of the chosen clips. The clips chosen for a smaller share are among those chosen for a larger one.

    Args:
        clips (`Sequence[TestedClip]`): All n clips.
        share (`float`): 0 to 1; at 0 every clip keeps its own video.
        seed (`int`, *optional*, defaults to 0): Seed of the choice.

    Returns:
        `list[int | None]`: For each clip the number of the clip whose video it gets; `None` for a clip without a
        picture.

    Raises:
        ValueError: If `share` is not between 0 and 1, or if fewer than two clips have a picture.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"a share of {share:g} of the videos cannot be shuffled; choose shares from 0 to 1")
    pictured = np.array([index for index, clip in enumerate(clips) if clip.has_picture], dtype=int)
    videos = [index if clip.has_picture else None for index, clip in enumerate(clips)]
    if share == 0:
        return videos
    if len(pictured) < 2:
        raise ValueError(f"{len(pictured)} of the {len(clips)} clips have a picture: there is none to shuffle")
    count = max(2, round(share * len(clips)))
    chosen = np.sort(np.random.default_rng([seed, len(clips)]).permutation(pictured)[:count])
    rng = np.random.default_rng([seed, len(clips), len(chosen)])
    deranged = chosen
    # About one permutation in e has no fixed point.
    while (deranged == chosen).any():
        deranged = rng.permutation(chosen)
    for clip, video in zip(chosen.tolist(), deranged.tolist()):
        videos[clip] = video
    return videos


class Captioner:
    """A checkpoint that captions pairs, and the files of its captions.

    Args:
        name (`str`): Name of the checkpoint.
        folder (`str` or `os.PathLike`): Its folder, or its name on the Hub.
        output (`str` or `os.PathLike`): Folder for the captions of all checkpoints, each in a subfolder.

    Raises:
        ValueError: If the checkpoint cannot be loaded.
    """

    def __init__(self, name: str, folder: str | os.PathLike, output: str | os.PathLike):
        self.name = name
        self.folder = os.fspath(folder)
        self.output = Path(output) / re.sub(r"[^\w.-]+", "-", name)
        with loading(self.folder):
            self.config = EVACapConfig.from_pretrained(self.folder)
        self.processor = load_processor(self.folder)

    def pairs(self, condition: Condition, clips: Sequence[TestedClip], seed: int = 0) -> list[Pair] | None:
        """The pairs of all clips under a condition.

        Pairs that the checkpoint cannot tell apart are equal, so that each is captioned once.

        Returns:
            `list[Pair]`, or `None` if the checkpoint needs the picture that the condition takes away.

        Raises:
            ValueError: If a clip has no picture but the checkpoint captions pictures alone.
        """
        video = self.processor.video_processor
        if self.processor.modalities == "audio":
            return [Pair(clip, None, 0) for clip in range(len(clips))]
        if self.processor.modalities == "video":
            if condition.frames == 0:
                return None
            for clip in clips:
                if not clip.has_picture:
                    raise ValueError(f"clip {clip.id!r} has no picture, but {self.name} captions pictures alone")
        # With a rate, the number of frames may follow the length of the clip.
        own = video.num_frames if video.fps is None or video.frame_sampling == "middle" else None
        frames = None if condition.frames == own else condition.frames
        videos = choose_videos(clips, condition.shuffle, seed)
        return [
            Pair(clip, None, 0) if video is None or frames == 0 else Pair(clip, video, frames)
            for clip, video in enumerate(videos)
        ]

    def caption(
        self,
        batches: Sequence[Sequence[Pair]],
        clips: Sequence[TestedClip],
        make_clips: MakeClips,
        accelerator: Accelerator,
        data: str = "",
        num_beams: int = 4,
        num_workers: int = 0,
        progress: tqdm | None = None,
    ) -> dict[Pair, Caption]:
        """Captions the pairs that have no caption yet.

        Each process of `accelerator` takes batches of its own. A batch is always made of the same pairs, so the
        captions depend neither on the number of processes nor on interruptions.

        Args:
            batches (`Sequence[Sequence[Pair]]`): Pairs in batches; all pairs of a batch have one number of frames.
            clips (`Sequence[TestedClip]`): The clips that the numbers in the pairs stand for.
            make_clips (`MakeClips`): Makes the clips.
            accelerator (`Accelerator`): Distributes the batches over the processes.
            data (`str`): Name of the clips. Captions that were made of clips with another name are refused.
            num_beams (`int`): Number of beams.
            num_workers (`int`): Reading processes for each process.
            progress (`tqdm`, *optional*): Counts the pairs of this process.

        Returns:
            `dict[Pair, Caption]`: The captions of all pairs, in every process.

        Raises:
            ValueError: If the folder holds captions of other settings, or if a clip cannot be read.
        """
        with loading(self.folder):
            model = captioner_class(self.config).from_pretrained(self.folder)
        self.parameters = model.num_parameters()
        self._settle(
            {
                "checkpoint": _fingerprint(model, self.processor),
                "data": data,
                "num_beams": num_beams,
                "precision": accelerator.mixed_precision,
            },
            accelerator,
        )
        numbers = {clip.id: number for number, clip in enumerate(clips)}
        done = self._read(numbers)
        # All processes have to read before one of them writes more.
        accelerator.wait_for_everyone()
        left = [batch for batch in batches if not all(pair in done for pair in batch)]
        own = left[accelerator.process_index :: accelerator.num_processes]
        # A disabled bar has no `initial`.
        progress = None if progress is None or progress.disable else progress
        if progress is not None:
            finished = max(0, sum(map(len, batches)) // accelerator.num_processes - sum(map(len, own)))
            progress.initial += finished
            progress.update(finished)
        if own:
            model.to(accelerator.device).eval()
            loader = DataLoader(
                _Batches(own, clips, self.processor, make_clips),
                batch_size=None,
                num_workers=num_workers,
                pin_memory=accelerator.device.type == "cuda",
            )
            file = JsonLines(self.output / f"captions-{accelerator.process_index}.jsonl", "clip")
            for pairs, inputs in zip(own, loader, strict=True):
                if isinstance(inputs, Exception):
                    raise inputs
                inputs = send_to_device(inputs, accelerator.device, non_blocking=True)
                with accelerator.autocast():
                    batch = caption_batch(model, self.processor, inputs, has_gate(self.config), num_beams=num_beams)
                captions = zip(pairs, _to_captions(batch), strict=True)
                file.append(_to_line(pair, caption, clips) for pair, caption in captions)
                if progress is not None:
                    progress.update(len(pairs))
        accelerator.wait_for_everyone()
        return self._read(numbers)

    def caption_all(
        self, make_clips: MakeClips, accelerator: Accelerator, batch_size: int = 64, **options
    ) -> list[str]:
        """The captions of all clips with their own pictures, in their order.

        Args:
            make_clips (`MakeClips`), accelerator (`Accelerator`), options: See [`~Captioner.caption`].
            batch_size (`int`, *optional*, defaults to 64): Clips of a batch.
        """
        clips = list_clips(make_clips(self.processor))
        pairs = self.pairs(Condition(), clips)
        found = self.caption(make_batches([pairs], batch_size), clips, make_clips, accelerator, **options)
        return [found[pair].text for pair in pairs]

    def _settle(self, settings: dict[str, Any], accelerator: Accelerator) -> None:
        """Makes sure that the folder can be continued with these settings."""
        path = self.output / "settings.json"
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            check_settings(self.output, before, settings, "Give another --output, or remove it.")
        elif accelerator.is_main_process:
            write_json(path, settings)
        if accelerator.is_main_process:
            for file in self.output.glob("captions-*.jsonl"):
                JsonLines(file, "clip").recover()
        accelerator.wait_for_everyone()

    def _read(self, numbers: dict[str, int]) -> dict[Pair, Caption]:
        lines = [
            line
            for path in sorted(self.output.glob("captions-*.jsonl"))
            for line in JsonLines(path, "clip", _from_line, "Remove the file to caption its clips again.").read()
        ]
        return {
            Pair(numbers[clip], None if video is None else numbers[video], frames): caption
            for clip, video, frames, caption in lines
            # An earlier call may have captioned clips that this one leaves out.
            if clip in numbers and (video is None or video in numbers)
        }


def _to_captions(batch: CaptionedBatch) -> list[Caption]:
    texts = [sequences[0] for sequences in batch.texts]
    if batch.gate is None:
        return [Caption(text) for text in texts]
    curves = (batch.gate, batch.entropy)
    means = [curve.mean(1).tolist() for curve in curves]
    rounded = [[[round(value, 4) for value in row] for row in curve.tolist()] for curve in curves]
    return [Caption(*fields) for fields in zip(texts, *means, *rounded, strict=True)]


def make_batches(stages: Iterable[Sequence[Pair]], batch_size: int) -> list[list[Pair]]:
    """The pairs of all stages, each once, in batches of one stage and one number of frames."""
    seen: set[Pair] = set()
    batches = []
    for pairs in stages:
        groups: dict[int | None, list[Pair]] = {}
        for pair in pairs:
            if pair not in seen:
                seen.add(pair)
                groups.setdefault(pair.frames, []).append(pair)
        for group in groups.values():
            batches += [group[first : first + batch_size] for first in range(0, len(group), batch_size)]
    return batches


class PairReader:
    """Reads the sound of one clip and the picture of another as one input.

    Args:
        processor ([`EVACapProcessor`]): The processor of the checkpoint.
        make_clips (`MakeClips`): Makes the clips.
        frames (`Iterable[int | None]`, *optional*): All numbers of frames that pairs will ask for.
    """

    def __init__(self, processor: EVACapProcessor, make_clips: MakeClips, frames: Iterable[int | None] = (None,)):
        both = processor.modalities
        self.sounds = make_clips(_view(processor, "audio")) if both != "video" else None
        self.pictures = {}
        if both != "audio":
            self.pictures = {n: make_clips(_view(processor, "video", n)) for n in sorted(frames, key=str) if n != 0}

    def __call__(self, pair: Pair) -> dict[str, torch.Tensor]:
        """The input of a pair as the data collator takes it, without a caption."""
        features = {}
        if self.sounds is not None:
            sound = self.sounds[pair.clip]
            features = {name: sound[name] for name in ("input_features", "audio_caption_ids") if name in sound}
        if pair.video is not None and pair.frames in self.pictures:
            picture = self.pictures[pair.frames][pair.video]
            names = ("video_features", "pixel_values_videos", "video_caption_ids")
            features |= {name: picture[name] for name in names if name in picture}
        return features


class _Batches(Dataset):
    """Collated batches. One that cannot be read is returned as an exception, whose message a worker would bury."""

    def __init__(
        self,
        batches: Sequence[Sequence[Pair]],
        clips: Sequence[TestedClip],
        processor: EVACapProcessor,
        make_clips: MakeClips,
    ):
        self.batches = batches
        self.clips = clips
        self.read = PairReader(processor, make_clips, {pair.frames for batch in batches for pair in batch})
        self.collator = EVACapDataCollator(p_mix=0.0)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor] | Exception:
        features = []
        for pair in self.batches[index]:
            try:
                features.append(self.read(pair))
            except (OSError, ValueError, KeyError) as error:
                names = [self.clips[number].id for number in {pair.clip: 0, pair.video: 0} if number is not None]
                return ValueError(
                    f"clip {' with the video of '.join(map(repr, names))} cannot be read ({error}): prepare it again"
                )
        return self.collator(features)


def _view(processor: EVACapProcessor, modalities: str, frames: int | None = None) -> EVACapProcessor:
    """A copy of a processor for one stream, with another number of frames."""
    processor = copy.deepcopy(processor)
    processor.modalities = modalities
    if frames is not None:
        video = processor.video_processor
        video.num_frames = frames
        if video.frame_sampling == "uniform":
            video.fps = None
    return processor


def _to_line(pair: Pair, caption: Caption, clips: Sequence[TestedClip]) -> dict[str, Any]:
    place = {
        "clip": clips[pair.clip].id,
        "video": None if pair.video is None else clips[pair.video].id,
        "frames": pair.frames,
    }
    return place | {name: value for name, value in caption._asdict().items() if value is not None}


def _from_line(fields: dict[str, Any]) -> tuple[str, str | None, int, Caption]:
    """The names of a clip and of the clip of its video, its frames, and the caption."""
    return fields.pop("clip"), fields.pop("video"), fields.pop("frames"), Caption(**fields)


def _fingerprint(model: EVACapCaptioner, processor: EVACapProcessor) -> str:
    """A hash of everything that a checkpoint computes with, independent of where it is stored."""
    unread = ("_name_or_path", "transformers_version", "auto_map")
    config = {k: v for k, v in model.config.to_dict().items() if k not in unread}
    digest = hashlib.sha256(json.dumps([config, processor.to_dict()], sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]

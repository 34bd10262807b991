"""Prepared clips as PyTorch datasets, with random access or streamed."""

import glob
import json
import os
from collections.abc import Iterator
from io import BytesIO
from typing import Any
from zlib import crc32

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import load_dataset
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from transformers.video_utils import VideoMetadata

from ...processing.processing_evacap import EVACapProcessor
from ..files import differences
from .augmentation import Augmentation
from .prepare import PREPARATION_FILE, describe


STREAMS_OF = {"audio_video": ("audio", "video"), "audio": ("audio",), "video": ("video",)}
"""The streams of which a processor of these `modalities` takes captions."""

GROUPS_AT_ONCE = 8
"""Number of row groups that a stream has in memory and shuffles together."""


class _Clips:
    """The common base of both datasets: converts rows of a prepared split to clips for the data collator."""

    def __init__(
        self,
        folder: str | os.PathLike,
        split: str,
        processor: EVACapProcessor,
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ):
        self.files, self.folder = fsspec.core.url_to_fs(os.fspath(folder))
        preparation = _check(self.files, self.folder, split, processor)
        self.frames, self.video_width = preparation["frames"], preparation.get("video_width")
        # Escaped, because the name of the folder may look like a pattern.
        self.shards = sorted(self.files.glob(f"{glob.escape(self.folder)}/data/{split}-*-of-*.parquet"))
        self.split = split
        self.processor = processor
        self.augmentation = augmentation
        self.seed = seed
        # In shared memory, because the workers of a data loader may outlive an epoch.
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, which the random choices depend on."""
        self._epoch.fill_(epoch)

    def _clip(self, row: pa.Table) -> dict[str, Any]:
        """The clip of a table with one row."""
        extractor = self.processor.feature_extractor
        captions = row["captions"][0].as_py()
        # The random choices of a clip depend neither on its position nor on the process.
        rng = np.random.default_rng([self.seed, self.epoch, crc32(row["id"][0].as_py().encode())])
        clip: dict[str, Any] = {}
        if captions:
            caption = captions[0] if self.augmentation is None else captions[rng.integers(len(captions))]
            clip["labels"] = self.processor(text=caption)["labels"][0]
        extra = json.loads(row["extra"][0].as_py())
        for stream in STREAMS_OF[self.processor.modalities]:
            if isinstance(extra.get(f"{stream}_caption"), str):
                clip[f"{stream}_caption_ids"] = self.processor(text=extra[f"{stream}_caption"])["labels"][0]
        if self.processor.modalities != "video":
            features = row["input_features"].chunk(0).flatten().to_numpy().reshape(-1, extractor.feature_size)
            features = features.astype(np.float32)
            if self.augmentation is not None:
                mask_value = (extractor.padding_value - extractor.mean) / extractor.std
                features = self.augmentation(features, rng, mask_value)
            clip["input_features"] = torch.from_numpy(features)
        if self.processor.modalities == "audio":
            return clip
        if self.video_width is not None:
            vectors = row["video_features"].chunk(0).flatten().to_numpy().reshape(-1, self.video_width)
            if len(vectors):
                clip["video_features"] = torch.from_numpy(vectors.copy())
            return clip
        frames = row["frames"].chunk(0).flatten()
        if len(frames):
            pictures = [np.asarray(Image.open(BytesIO(frames[i].as_buffer()))) for i in self._choose(len(frames), rng)]
            clip["pixel_values_videos"] = self.processor(
                videos=[np.stack(pictures)],
                do_sample_frames=False,
                do_resize=False,
                do_center_crop=False,
                return_tensors="pt",
            )["pixel_values_videos"][0]
        return clip

    def _choose(self, stored: int, rng: np.random.Generator) -> np.ndarray:
        """The numbers of the stored frames to take."""
        video = self.processor.video_processor
        if stored == 1:  # A still; the processor repeats it.
            return np.zeros(1, dtype=int)
        if self.augmentation is not None and self.augmentation.random_frames and stored > video.num_frames:
            first = self.augmentation.first_frame(stored, video.num_frames, rng)
            return np.arange(first, first + video.num_frames)
        return video.sample_frames(VideoMetadata(total_num_frames=stored, fps=self.frames["fps"]))


class PreparedClips(_Clips, Dataset):
    """The clips of a split made by [`prepare`], memory-mapped.

    `datasets` copies the shards into its cache on first use, and single clips are read from there.

    With an `augmentation`, for training, one of the captions of a clip, its augmentation and its run of frames are
    drawn at random. The draw depends only on `seed`, the epoch and the id of the clip. Without one, a clip has its
    first caption and the frames that the video processor samples: uniformly over the clip, or the middle run. If the
    video processor takes fewer frames than are stored, it samples the stored ones as if they were the whole video.
    (ours)

    Args:
        folder (`str` or `os.PathLike`): The folder made by [`prepare`].
        split (`str`): Name of the split.
        processor ([`EVACapProcessor`]): The processor of the model. It may take fewer frames, or only one stream, but
            must make the same features as the stored ones.
        augmentation ([`Augmentation`], *optional*): The augmentation, for training.
        seed (`int`, *optional*, defaults to 0): Seed of the random choices.

    Raises:
        FileNotFoundError: If the folder has no prepared clips.
        ValueError: If there is no such split, if its preparation is not finished, or if the processor makes other
            features; the message has the fields.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        split: str,
        processor: EVACapProcessor,
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ):
        super().__init__(folder, split, processor, augmentation, seed)
        shards = [glob.escape(self.files.unstrip_protocol(shard)) for shard in self.shards]
        self.rows = load_dataset("parquet", data_files=shards, split="train").with_format("arrow")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A clip for [`EVACapDataCollator`], without the streams that the clip or the model does not have.

        Returns:
            `input_features` (T, M) float32, `pixel_values_videos` (F, 3, H, W) float32, or, where the clips were prepared
            with them, `video_features` (F, D) float32, and `labels`, if it has a caption.
        """
        return self._clip(self.rows[int(index)])

    def captions(self, index: int) -> list[str]:
        """All captions of a clip."""
        return self.rows[int(index)]["captions"][0].as_py()

    def extra(self, index: int) -> dict[str, Any]:
        """The other fields of a clip in the manifest."""
        return json.loads(self.rows[int(index)]["extra"][0].as_py())


class StreamedClips(_Clips, IterableDataset):
    """The clips of a split, as in [`PreparedClips`], read from the shards without a copy.

    It is for more data than fits on the disk, and for remote folders (`hf://datasets/ORG/NAME`, `s3://…`, and
    everything else that `fsspec` opens). The order of all clips depends on `seed` and the epoch. Each process (rank)
    takes an equal part of it, up to one clip, and each worker of its data loader an equal part of that, so every clip
    is seen exactly once. Do not let Accelerate split it again: leave its data loader out of `accelerator.prepare`, or
    give `world_size=1`.

    Args:
        folder, split, processor, augmentation, seed: As in [`PreparedClips`].
        shuffle (`bool`, *optional*, defaults to `True`): Whether to shuffle the row groups of all shards, and then the
            clips within every `GROUPS_AT_ONCE` of them.
        even (`bool`, *optional*, defaults to `False`): Whether all processes get the same number of clips, so that
            none waits for the others forever. Then up to `world_size - 1` clips are left out, other ones in each
            shuffled epoch.
        rank (`int`, *optional*), world_size (`int`, *optional*): Number of this process, and number of processes; by
            default from `torch.distributed`, or from the environment variables `RANK` and `WORLD_SIZE`.

    Raises:
        FileNotFoundError, ValueError: If the folder or split does not fit, see [`PreparedClips`], or if `rank` is not
            below `world_size`.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        split: str,
        processor: EVACapProcessor,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        shuffle: bool = True,
        even: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
    ):
        super().__init__(folder, split, processor, augmentation, seed)
        self.shuffle = shuffle
        self.even = even
        self.rank, self.world_size = _place(rank, world_size)
        self.groups = [
            (shard, group, metadata.row_group(group).num_rows)
            for shard, metadata in enumerate(map(self._metadata, self.shards))
            for group in range(metadata.num_row_groups)
        ]
        self._skipped = torch.zeros(2, dtype=torch.long).share_memory_()

    def __len__(self) -> int:
        """The number of clips of this process."""
        return len(self._part(np.arange(sum(rows for _, _, rows in self.groups))))

    def skip(self, batches: int, batch_size: int) -> None:
        """Skips the first batches of the epoch, to resume a training. Call it after `set_epoch`.

        Args:
            batches (`int`): Number of batches that the data loader of this process has given, with the same number of
                workers.
            batch_size (`int`): The `batch_size` of the data loader.
        """
        self._skipped.copy_(torch.tensor([batches, batch_size]))

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self._skipped.zero_()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        # A data loader takes batches from its workers in turn. After a resume its first worker continues with the part
        # of the worker whose turn it was.
        batches, batch_size = self._skipped.tolist()
        number = (number + batches) % workers
        places = np.array_split(self._part(self._order()), workers)[number]
        places = places[len(range(number, batches, workers)) * batch_size :]
        held: dict[int, pa.Table] = {}
        for group, row in places:
            if group not in held:
                if len(held) == GROUPS_AT_ONCE:
                    held.pop(next(iter(held)))
                held[group] = self._read(*self.groups[group][:2])
            yield self._clip(held[group].slice(row, 1))

    def _order(self) -> np.ndarray:
        """The group and row of every clip of the split, in the order of this epoch: (clips, 2)."""
        rng = np.random.default_rng([self.seed, self.epoch])
        groups = np.arange(len(self.groups))
        if self.shuffle:
            rng.shuffle(groups)
        order = []
        for first in range(0, len(groups), GROUPS_AT_ONCE):
            chosen = groups[first : first + GROUPS_AT_ONCE]
            places = np.concatenate([[(group, row) for row in range(self.groups[group][2])] for group in chosen])
            order.append(rng.permutation(places) if self.shuffle else places)
        return np.concatenate(order)

    def _part(self, order: np.ndarray) -> np.ndarray:
        if self.even:
            order = order[: len(order) - len(order) % self.world_size]
        return np.array_split(order, self.world_size)[self.rank]

    def _metadata(self, shard: str) -> pq.FileMetaData:
        with self.files.open(shard) as file:
            return pq.read_metadata(file)

    def _read(self, shard: int, group: int) -> pa.Table:
        with self.files.open(self.shards[shard]) as file, pq.ParquetFile(file) as parquet:
            return parquet.read_row_group(group, use_threads=False).combine_chunks()


def _check(files: fsspec.AbstractFileSystem, folder: str, split: str, processor: EVACapProcessor) -> dict[str, Any]:
    """Checks that a processor fits the prepared features, and returns how they were prepared."""
    path = f"{folder}/{PREPARATION_FILE}"
    if not files.exists(path):
        raise FileNotFoundError(f"{path}: there is no such file; make the folder with `evacap prepare`")
    with files.open(path, encoding="utf-8") as file:
        preparation = json.load(file)
    if split not in preparation["splits"]:
        raise ValueError(f"{folder}: has no split {split!r}, but {', '.join(preparation['splits'])}")
    if "clips" not in preparation["splits"][split]:
        raise ValueError(f"{folder}: the split {split!r} is not complete; run the same `evacap prepare` again")
    expected, frames, video = describe(processor), preparation["frames"], processor.video_processor
    modalities = expected.pop("modalities")
    if preparation["modalities"] == "audio_video":
        # A model with one stream ignores the other.
        expected = {name: fields for name, fields in expected.items() if not _is_idle(name, modalities)}
    else:
        expected["modalities"] = modalities
    has_vectors = "video_width" in preparation
    if has_vectors:
        expected.pop("video_processor", None)
    looks = modalities != "audio" and not has_vectors
    different = differences(preparation, expected)
    if looks and video.fps is not None and video.fps != frames["fps"]:
        different.append(f"`frames.fps` is {frames['fps']!r} there and {video.fps!r} here")
    if looks and frames["num_frames"] is not None and video.num_frames > frames["num_frames"]:
        different.append(f"`frames.num_frames` is {frames['num_frames']} there and {video.num_frames} here")
    if different:
        raise ValueError(
            f"{folder}: was prepared for another processor: {'; '.join(different)}. Prepare the clips for this one, "
            "in a folder of its own."
        )
    return preparation


def _is_idle(component: str, modalities: str) -> bool:
    return component == {"audio": "video_processor", "video": "feature_extractor"}.get(modalities)


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    if (rank is None) != (world_size is None):
        rank, world_size = rank or 0, world_size or 0
    if rank is None or world_size is None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        else:
            rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if not 0 <= rank < world_size:
        raise ValueError(f"`rank` is {rank} and `world_size` {world_size}; ranks count from 0 to `world_size` - 1")
    return rank, world_size

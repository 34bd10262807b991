import json
import shutil
import subprocess
import sys
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pytest
import torch
from small_clips import captions_of, number_of, write_small_clips
from torch.utils.data import DataLoader
from transformers import AutoProcessor

import evacap
from evacap.training.data.augmentation import Augmentation
from evacap.training.data.collator import EVACapDataCollator
from evacap.training.data.manifest import read_manifest
from evacap.training.data.prepare import prepare
from evacap.training.data.prepared_clips import PreparedClips, StreamedClips
from evacap.training.procedural.scenes import write_dataset


SMALL_CLIPS, FRAMES = 23, 12


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(evacap.TINY)


def with_video(processor, **fields):
    """The processor with other sampling of frames."""
    other = deepcopy(processor)
    for name, value in fields.items():
        setattr(other.video_processor, name, value)
    return other


@pytest.fixture(scope="module")
def small(processor, tmp_path_factory) -> Path:
    """Small clips with all their twelve frames, in shards of five."""
    folder = tmp_path_factory.mktemp("small")
    manifest = write_small_clips(folder / "clips", SMALL_CLIPS, FRAMES)
    prepare(read_manifest(manifest), folder / "out", processor, num_frames=FRAMES, shard_size=5, num_workers=2)
    return folder / "out"


@dataclass
class Procedural:
    manifest: Path
    uniform: Path
    all_frames: Path


@pytest.fixture(scope="module")
def procedural(processor, tmp_path_factory) -> Procedural:
    """Two procedural clips, prepared with the frames that the processor takes, and with all of two a second."""
    folder = tmp_path_factory.mktemp("procedural")
    manifest = write_dataset(folder / "clips", "test", 2, seed=4)
    made = Procedural(manifest, folder / "uniform", folder / "all frames")
    prepare(read_manifest(manifest), made.uniform, processor, "test", num_workers=2)
    prepare(read_manifest(manifest), made.all_frames, processor, "test", fps=2, num_workers=2)
    return made


def numbers(clip: dict) -> list[int]:
    """The numbers of a small clip's frames."""
    mean, std = (np.array(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return [number_of((frame.numpy() * std + mean) * 255) for frame in clip["pixel_values_videos"]]


def as_lists(clips: list[dict]) -> list[dict]:
    return [{name: torch.as_tensor(value).tolist() for name, value in clip.items()} for clip in clips]


def test_a_clip_is_what_the_processor_makes_of_its_file(processor, procedural):
    clips = PreparedClips(procedural.uniform, "test", processor)
    entries = read_manifest(procedural.manifest)
    assert len(clips) == len(entries) == 2
    for index, entry in enumerate(entries):
        direct = processor(media=entry.media, text=entry.captions[0], return_tensors="pt")
        clip = clips[index]
        assert set(clip) == set(direct) == {"input_features", "pixel_values_videos", "labels"}
        assert clip["labels"] == direct["labels"][0].tolist()
        for name in ("input_features", "pixel_values_videos"):
            assert clip[name].shape == direct[name][0].shape and clip[name].dtype == torch.float32
        assert (clip["input_features"] - direct["input_features"][0]).abs().max() < 1e-3
        # One step of 255 is 0.017 after normalisation.
        assert (clip["pixel_values_videos"] - direct["pixel_values_videos"][0]).abs().mean() < 0.035
        assert clips.captions(index) == list(entry.captions) and clips.extra(index) == entry.extra


@pytest.mark.parametrize("num_frames", [1, 4, 8])
def test_the_middle_run_is_that_of_the_file(processor, procedural, num_frames):
    avcap = with_video(
        processor, frame_sampling="middle", fps=2, num_frames=num_frames, tubelet_size=min(num_frames, 2)
    )
    clips = PreparedClips(procedural.all_frames, "test", avcap)
    for index, entry in enumerate(read_manifest(procedural.manifest)):
        direct = avcap(media=entry.media, return_tensors="pt")["pixel_values_videos"][0]
        stored = clips[index]["pixel_values_videos"]
        assert stored.shape == direct.shape == (num_frames, 3, 64, 64)
        assert (stored - direct).abs().mean() < 0.035


@pytest.mark.parametrize(
    "num_frames, expected",
    [(12, [*range(12)]), (8, [0, 2, 3, 5, 6, 8, 9, 11]), (4, [1, 4, 7, 10]), (1, [6])],
)
def test_fewer_frames_are_spread_over_those_that_are_stored(processor, small, num_frames, expected):
    fewer = with_video(processor, num_frames=num_frames, tubelet_size=1)
    assert numbers(PreparedClips(small, "train", fewer)[0]) == expected


def test_a_random_run_of_frames(processor, small):
    clips = PreparedClips(small, "train", with_video(processor, num_frames=8), Augmentation())
    firsts = set()
    for epoch in range(3):
        clips.set_epoch(epoch)
        for index in range(len(clips)):
            run = numbers(clips[index])
            assert run == [*range(run[0], run[0] + 8)]
            firsts.add(run[0])
    assert firsts == {0, 1, 2, 3, 4}
    still = PreparedClips(small, "train", with_video(processor, num_frames=8), Augmentation(random_frames=False))
    assert {tuple(numbers(still[index])) for index in range(3)} == {(0, 2, 3, 5, 6, 8, 9, 11)}


def test_without_augmentation_nothing_is_random(processor, small):
    clips = PreparedClips(small, "train", processor)
    before = as_lists([clips[0], clips[5]])
    clips.set_epoch(3)
    assert as_lists([clips[0], clips[5]]) == before
    assert clips[5]["labels"] == processor(text=captions_of(5)[0])["labels"][0]


def test_the_choices_follow_from_seed_epoch_and_clip_alone(processor, small):
    augmentation = Augmentation()
    processor = with_video(processor, num_frames=4)

    def draw(seed=0, epoch=0, num_workers=0):
        clips = PreparedClips(small, "train", processor, augmentation, seed)
        clips.set_epoch(epoch)
        loader = DataLoader(clips, batch_size=None, num_workers=num_workers, sampler=[3, 1, 4, 1, 5])
        return as_lists(list(loader))

    first = draw()
    assert first[1] == first[3] and first[0]["input_features"] != first[1]["input_features"]
    assert draw() == draw(num_workers=2) == first
    assert draw(seed=1) != first and draw(epoch=1) != first


def test_captions_are_drawn_in_training(processor, small):
    clips = PreparedClips(small, "train", processor, Augmentation())
    expected = [processor(text=caption)["labels"][0] for caption in captions_of(5)]
    drawn = []
    for epoch in range(16):
        clips.set_epoch(epoch)
        drawn.append(clips[5]["labels"])
    counts = [drawn.count(labels) for labels in expected]
    assert min(counts) > 2 and sum(counts) == len(drawn)


def test_workers_that_stay_hear_of_the_epoch(processor, small):
    clips = PreparedClips(small, "train", processor, Augmentation())
    loader = DataLoader(clips, batch_size=None, num_workers=1, persistent_workers=True)
    epochs = []
    for epoch in range(2):
        clips.set_epoch(epoch)
        epochs.append(as_lists(list(loader)))
        assert epochs[-1] == as_lists([clips[index] for index in range(len(clips))])
    assert epochs[0] != epochs[1]


def test_masked_values_are_those_of_the_padding(processor, small):
    augmentation = Augmentation(freq_mask=0, time_mask=256, noise=False, roll=False)
    plain, masked = (PreparedClips(small, "train", processor, chosen) for chosen in (None, augmentation))
    changed = 0
    for index in range(5):
        before, after = plain[index]["input_features"], masked[index]["input_features"]
        different = before != after
        changed += different.sum()
        assert torch.allclose(after[different], before[-1, -1], atol=1e-3)
    assert changed > 0


def test_the_collator_takes_them(processor, small):
    loader = DataLoader(PreparedClips(small, "train", processor), 4, collate_fn=EVACapDataCollator(p_mix=0.5))
    batch = next(iter(loader))
    assert batch["input_features"].shape == (4, 256, 64)
    assert batch["pixel_values_videos"].shape == (4, 8, 3, 64, 64)


@pytest.mark.parametrize("modalities", ["audio", "video"])
def test_a_model_of_one_stream_needs_only_that(processor, small, modalities):
    one = deepcopy(processor)
    one.modalities = modalities
    # What the other stream would be like does not matter.
    if modalities == "audio":
        one.video_processor.size = {"shortest_edge": 224}
    else:
        one.feature_extractor.window_type = "hanning"
    present = {"audio": "input_features", "video": "pixel_values_videos"}[modalities]
    assert set(PreparedClips(small, "train", one)[0]) == {present, "labels"}


def test_a_clip_without_picture(processor, tmp_path):
    manifest = write_small_clips(tmp_path / "clips", 1)
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    manifest.write_text("\n".join(json.dumps({k: v for k, v in row.items() if k != "frames"}) for row in rows))
    prepare(read_manifest(manifest), tmp_path / "out", processor, num_workers=1)
    for clips in (
        PreparedClips(tmp_path / "out", "train", processor),
        StreamedClips(tmp_path / "out", "train", processor),
    ):
        (clip,) = clips
        assert set(clip) == {"input_features", "labels"}


def test_a_processor_that_does_not_fit_is_told_why(processor, small, procedural, tmp_path):
    hann = deepcopy(processor)
    hann.feature_extractor.window_type = "hanning"
    larger = with_video(processor, crop_size={"height": 96, "width": 96})
    cases = [
        (small, hann, "`feature_extractor.window_type` is 'hamming' there and 'hanning' here"),
        (small, larger, "`video_processor.crop_size.height` is 64 there and 96 here"),
        (small, with_video(processor, num_frames=18), "`frames.num_frames` is 12 there and 18 here"),
        (small, with_video(processor, fps=2.0), "`frames.fps` is None there and 2.0 here"),
    ]
    for kind in (PreparedClips, StreamedClips):
        for folder, chosen, expected in cases:
            with pytest.raises(ValueError, match=expected):
                kind(folder, "train", chosen)
        with pytest.raises(ValueError, match="has no split 'validation', but test"):
            kind(procedural.uniform, "validation", processor)
        with pytest.raises(FileNotFoundError, match="preparation.json: there is no such file.*evacap prepare"):
            kind(tmp_path, "train", processor)

    audio = deepcopy(processor)
    audio.modalities = "audio"
    prepare(read_manifest(procedural.manifest), tmp_path / "audio", audio, num_workers=1)
    with pytest.raises(ValueError, match="`modalities` is 'audio' there and 'audio_video' here"):
        PreparedClips(tmp_path / "audio", "train", processor)
    preparation = json.loads((tmp_path / "audio" / "preparation.json").read_text())
    del preparation["splits"]["train"]["clips"]
    (tmp_path / "audio" / "preparation.json").write_text(json.dumps(preparation))
    with pytest.raises(ValueError, match="'train' is not complete"):
        PreparedClips(tmp_path / "audio", "train", audio)


class Numbered(StreamedClips):
    """Streamed clips that are told apart by their number instead of their features."""

    def _clip(self, row):
        return json.loads(row["extra"][0].as_py())["number"]


def stream(small, processor, num_workers=0, epoch=0, batch_size=3, skip=0, **options) -> list[list[int]]:
    clips = Numbered(small, "train", processor, **options)
    clips.set_epoch(epoch)
    clips.skip(skip, batch_size)
    loader = DataLoader(clips, batch_size, num_workers=num_workers, collate_fn=list)
    return list(loader)


def test_streamed_clips_are_the_same_clips(processor, small):
    mapped = PreparedClips(small, "train", processor, Augmentation(), seed=7)
    streamed = StreamedClips(small, "train", processor, Augmentation(), seed=7, shuffle=False)
    for clips in (mapped, streamed):
        clips.set_epoch(2)
    assert len(streamed) == len(mapped)
    assert as_lists(list(streamed)) == as_lists([mapped[index] for index in range(len(mapped))])


def test_clips_are_streamed_from_elsewhere(processor, small):
    fsspec.filesystem("memory").put(str(small), "/prepared", recursive=True)
    here, there = (Numbered(folder, "train", processor) for folder in (small, "memory://prepared"))
    assert list(there) == list(here)


def test_a_folder_that_was_made_anew_is_read_anew(processor, tmp_path):
    manifest = write_small_clips(tmp_path / "clips", 2)
    entries = read_manifest(manifest)
    for captions in (("a dog barks",), ("a cat meows",)):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        prepare([replace(entry, captions=captions) for entry in entries], tmp_path / "out", processor, num_workers=1)
        assert PreparedClips(tmp_path / "out", "train", processor).captions(1) == list(captions)


def test_a_folder_whose_name_looks_like_a_pattern(processor, tmp_path):
    entries = read_manifest(write_small_clips(tmp_path / "clips", 2))
    prepare(entries, tmp_path / "out1", processor, num_workers=1)
    prepare(entries[1:], tmp_path / "out[1]", processor, num_workers=1)
    for kind in (PreparedClips, StreamedClips):
        assert len(kind(tmp_path / "out[1]", "train", processor)) == 1


@pytest.mark.parametrize("world_size, num_workers", [(1, 0), (2, 2), (3, 1), (8, 2)])
def test_every_clip_is_seen_once(processor, small, world_size, num_workers):
    shares = [
        [clip for batch in stream(small, processor, num_workers, rank=rank, world_size=world_size) for clip in batch]
        for rank in range(world_size)
    ]
    assert sorted(sum(shares, [])) == list(range(SMALL_CLIPS))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    for rank, size in enumerate(sizes):
        assert len(StreamedClips(small, "train", processor, rank=rank, world_size=world_size)) == size


def test_an_even_share_leaves_out_the_rest(processor, small):
    seen = []
    for epoch in range(2):
        shares = [stream(small, processor, 0, epoch, even=True, rank=rank, world_size=4) for rank in range(4)]
        clips = [clip for share in shares for batch in share for clip in batch]
        assert {sum(map(len, share)) for share in shares} == {5} and len(set(clips)) == 20
        seen.append(set(clips))
    assert seen[0] != seen[1]


def test_each_epoch_has_its_own_order(processor, small):
    order = [sum(stream(small, processor, epoch=epoch), []) for epoch in (0, 1, 0)]
    assert order[0] == order[2] != order[1] and order[0] != sorted(order[0])
    assert order[0] != sum(stream(small, processor, seed=1), [])
    assert sum(stream(small, processor, shuffle=False), []) == list(range(SMALL_CLIPS))


@pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
def test_a_stream_goes_on_where_it_was(processor, small, num_workers):
    options = {"rank": 1, "world_size": 2, "epoch": 1, "batch_size": 2}
    batches = stream(small, processor, num_workers, **options)
    assert len(batches) >= 6
    for skip in range(len(batches) + 1):
        assert stream(small, processor, num_workers, skip=skip, **options) == batches[skip:]


def test_the_next_epoch_skips_nothing(processor, small):
    clips = Numbered(small, "train", processor)
    clips.skip(2, 3)
    assert len(list(clips)) == SMALL_CLIPS - 6
    clips.set_epoch(1)
    assert len(list(clips)) == SMALL_CLIPS


def test_the_rank_is_that_of_the_launcher(processor, small, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    clips = StreamedClips(small, "train", processor)
    assert (clips.rank, clips.world_size, len(clips)) == (1, 2, SMALL_CLIPS // 2)
    with pytest.raises(ValueError, match="`rank` is 2 and `world_size` 2"):
        StreamedClips(small, "train", processor, rank=2, world_size=2)


RANK = """
import sys
import torch
from torch.utils.data import DataLoader
from transformers import AutoProcessor
import evacap
from evacap.training.data.prepared_clips import StreamedClips
torch.distributed.init_process_group("gloo")
clips = StreamedClips(sys.argv[1], "train", AutoProcessor.from_pretrained(evacap.TINY))
loader = DataLoader(clips, 4, num_workers=2, collate_fn=lambda batch: [clip["labels"] for clip in batch])
seen = [labels for batch in loader for labels in batch]
shares = [None, None]
torch.distributed.all_gather_object(shares, seen)
if torch.distributed.get_rank() == 0:
    print(shares)
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_of_torchrun_share_the_clips(processor, small, tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "rank.py",
        small,
    ]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    shares = json.loads(result.stdout.splitlines()[-1])
    assert sorted(len(share) for share in shares) == [SMALL_CLIPS // 2, SMALL_CLIPS - SMALL_CLIPS // 2]
    expected = [processor(text=captions_of(number)[0])["labels"][0] for number in range(SMALL_CLIPS)]
    assert sorted(shares[0] + shares[1]) == sorted(expected)
    assert len({tuple(labels) for labels in expected}) == SMALL_CLIPS

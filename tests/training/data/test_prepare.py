import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image
from small_clips import number_of, write_picture, write_small_clips, write_sound
from transformers import AutoProcessor
from transformers.utils import logging

import evacap
from evacap.processing.media_evacap import load_media
from evacap.training.data.audiocaps import read_audiocaps
from evacap.training.data.manifest import Entry, read_manifest
from evacap.training.data.prepare import FeatureMaker, _storing, prepare
from evacap.training.data.prepared_clips import PreparedClips
from evacap.training.files import locked
from evacap.training.procedural.scenes import write_dataset


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(evacap.TINY)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """The manifest of eleven small clips."""
    return write_small_clips(tmp_path_factory.mktemp("small"), 11)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "cache")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def report(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "report.jsonl").read_text().splitlines()]


def features(processor, **fields):
    storing = _storing(processor, fields.pop("num_frames", None), fields.pop("fps", None))
    return FeatureMaker(storing, 95)(Entry("x", ("x",), **fields))


def pixels(made) -> np.ndarray:
    return np.stack([np.asarray(Image.open(BytesIO(frame))) for frame in made.frames]).transpose(0, 3, 1, 2)


def test_procedural_clips_become_a_folder_of_datasets(processor, tmp_path):
    for split, clips in (("train", 3), ("test", 2)):
        manifest = write_dataset(tmp_path / split, split, clips, seed=1)
        counts = prepare(read_manifest(manifest), tmp_path / "out", processor, split, shard_size=2, num_workers=2)
        assert counts == {"rows": clips, "clips": clips, "without_picture": 0, "damaged": 0}
    assert sorted(content(tmp_path / "out")) == [
        "data/test-00000-of-00001.parquet",
        "data/train-00000-of-00002.parquet",
        "data/train-00001-of-00002.parquet",
        "preparation.json",
        "report.jsonl",
    ]
    assert report(tmp_path / "out") == []
    mapped = datasets.load_dataset(str(tmp_path / "out"))
    streamed = datasets.load_dataset(str(tmp_path / "out"), streaming=True)
    assert {split: len(rows) for split, rows in mapped.items()} == {"train": 3, "test": 2}
    assert mapped["train"].cache_files
    for split in mapped:
        assert list(mapped[split]) == list(streamed[split])

    entries = read_manifest(tmp_path / "test" / "manifest.jsonl")
    for row, entry in zip(mapped["test"], entries, strict=True):
        assert row["id"] == entry.id and row["captions"] == list(entry.captions)
        assert json.loads(row["extra"]) == entry.extra
        direct = processor(media=entry.media, do_rescale=False, do_normalize=False, return_tensors="np")
        assert len(row["frames"]) == len(direct["pixel_values_videos"][0]) == 8
        stored = np.array(row["input_features"]).reshape(direct["input_features"][0].shape)
        error = np.abs(stored - direct["input_features"][0])
        assert 0 < error.max() < 1e-3, "float16, and no more than that"
        frames = np.stack([np.asarray(Image.open(BytesIO(frame))) for frame in row["frames"]]).transpose(0, 3, 1, 2)
        error = frames.astype(float) - direct["pixel_values_videos"][0]
        assert 0 < (error**2).mean() < 255**2 / 10**3.8, "JPEG of more than 38 dB"


def test_the_number_of_workers_does_not_change_a_byte(processor, small, tmp_path):
    for workers in (1, 3):
        prepare(read_manifest(small), tmp_path / str(workers), processor, shard_size=4, num_workers=workers)
    assert content(tmp_path / "1") == content(tmp_path / "3")
    assert len(content(tmp_path / "1")) == 5


SCRIPT = """
import sys
from transformers import AutoProcessor
import evacap
from evacap.training.data.manifest import read_manifest
from evacap.training.data.prepare import prepare
if __name__ == "__main__":
    processor = AutoProcessor.from_pretrained(evacap.TINY)
    prepare(read_manifest(sys.argv[1]), sys.argv[2], processor, shard_size=2, num_workers=2)
"""


@pytest.mark.parametrize(
    "stop",
    [
        signal.SIGKILL,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_preparation_goes_on(processor, small, tmp_path, stop):
    (tmp_path / "script.py").write_text(SCRIPT)
    output = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "script.py", small, output], cwd=tmp_path, stderr=subprocess.DEVNULL, start_new_session=True
    )
    limit = time.monotonic() + 120
    while len(list(output.glob("data/*.parquet"))) < 2 and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.001)
    process.send_signal(stop)
    assert process.wait(60) != 0
    done = content(output)
    assert 2 <= len([name for name in done if name.endswith(".parquet")]) < 6
    while _processes_of(process.pid):  # The workers notice it, and leave.
        assert time.monotonic() < limit
        time.sleep(0.05)

    shards = {path: path.stat().st_mtime_ns for path in output.glob("data/*.parquet")}
    (output / "data" / ".train-00005-of-00006.parquet.123.partial").write_bytes(b"a half")
    prepare(read_manifest(small), output, processor, shard_size=2, num_workers=1)
    assert all(path.stat().st_mtime_ns == time_written for path, time_written in shards.items())
    prepare(read_manifest(small), tmp_path / "at once", processor, shard_size=2, num_workers=2)
    assert content(output) == content(tmp_path / "at once")


def _processes_of(session: int) -> list[str]:
    """The processes that were started in a session and are not zombies."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(status.parent.name)
    return found


def test_a_shard_that_was_removed_is_made_anew(processor, small, tmp_path):
    prepare(read_manifest(small), tmp_path, processor, shard_size=4, num_workers=1)
    before = content(tmp_path)
    (tmp_path / "data" / "train-00001-of-00003.parquet").unlink()
    prepare(read_manifest(small), tmp_path, processor, shard_size=4, num_workers=2)
    assert content(tmp_path) == before


def test_clips_that_cannot_be_used_are_reported(processor, tmp_path):
    sound = str(write_sound(tmp_path / "good.wav", 1))
    (tmp_path / "text.mp4").write_text("no media")
    (tmp_path / "cut.wav").write_bytes((tmp_path / "good.wav").read_bytes()[:-7001])
    entries = [
        Entry("good", ("x",), audio=sound),
        Entry("dead", ("x",)),
        Entry("missing", ("x",), media=str(tmp_path / "missing.mp4")),
        Entry("text", ("x",), media=str(tmp_path / "text.mp4")),
        Entry("cut", ("x",), media=str(tmp_path / "cut.wav")),
        Entry("no pictures", ("x",), audio=sound, frames=str(tmp_path / "nowhere")),
        Entry("soundless", ("x",), video=sound),
        Entry("too late", ("x",), audio=sound, start=7.0),
    ]
    counts = prepare(entries, tmp_path / "out", processor, shard_size=3, num_workers=2, accept_failures=True)
    assert counts == {"rows": 8, "clips": 2, "without_picture": 2, "damaged": 1}
    problems = report(tmp_path / "out")
    assert [(p["id"], p["file"], p["usable"]) for p in problems] == [
        ("dead", None, False),
        ("missing", str(tmp_path / "missing.mp4"), False),
        ("text", str(tmp_path / "text.mp4"), False),
        ("cut", str(tmp_path / "cut.wav"), True),
        ("no pictures", sound, False),
        ("soundless", sound, False),
        ("too late", sound, False),
    ]
    expected = ("no file", "no such file", "cannot be read", "breaks off", "nowhere", "no sound", "7")
    assert all(part in problem["reason"] for part, problem in zip(expected, problems, strict=True))
    assert {problem["split"] for problem in problems} == {"train"}
    rows = datasets.load_dataset(str(tmp_path / "out"), split="train")
    assert rows["id"][:] == ["good", "cut"] and rows["frames"][:] == [[], []]
    assert [row["id"] for row in datasets.load_dataset(str(tmp_path / "out"), split="train", streaming=True)] == [
        "good",
        "cut",
    ]


def test_passing_failures_keep_their_shards_open(processor, small, tmp_path):
    """Media that is away for a moment: a file, and the folder of a clip's pictures."""
    entries, output = read_manifest(small), tmp_path / "out"
    prepare(entries, tmp_path / "at once", processor, shard_size=4, num_workers=2)
    away = [Path(entries[1].audio), Path(entries[9].frames)]
    for path in away:
        path.rename(path.with_name(f"away-{path.name}"))
    try:
        for _ in range(2):
            with pytest.raises(
                RuntimeError, match="2 clips of the split 'train' failed for reasons that may pass.*same"
            ):
                prepare(entries, output, processor, shard_size=4, num_workers=2)
            assert [path.name for path in output.glob("data/*.parquet")] == ["train-00001-of-00003.parquet"]
            assert [(p["id"], p["passing"]) for p in report(output)] == [("clip-01", True), ("clip-09", True)]
            with pytest.raises(ValueError, match="'train' is not complete"):
                PreparedClips(output, "train", processor)
        prepare(entries, tmp_path / "accepted", processor, shard_size=4, num_workers=1, accept_failures=True)
        assert len(PreparedClips(tmp_path / "accepted", "train", processor)) == 9
    finally:
        for path in away:
            path.with_name(f"away-{path.name}").rename(path)
    # Only what is missing is made, and it is the same to the byte as if nothing had been.
    others = [
        replace(entry, audio=str(tmp_path / "x")) if i not in (1, 9) else entry for i, entry in enumerate(entries)
    ]
    prepare(others, output, processor, shard_size=4, num_workers=2)
    assert content(output) == content(tmp_path / "at once")


def test_clips_that_have_got_a_file_since_are_made(processor, small, tmp_path):
    """Of AudioCaps some clips are always missing: that completes a split, until they come."""
    entries = read_manifest(small)
    prepare(entries, tmp_path / "at once", processor, shard_size=4, num_workers=2)
    gone = [entry if i in (2, 8) else replace(entry, audio=None, frames=None) for i, entry in enumerate(entries)]
    assert prepare(gone, tmp_path / "out", processor, shard_size=4, num_workers=1)["clips"] == 2
    assert prepare(gone, tmp_path / "out", processor, shard_size=4, num_workers=1)["clips"] == 2
    assert prepare(entries, tmp_path / "out", processor, shard_size=4, num_workers=2)["clips"] == 11
    assert content(tmp_path / "out") == content(tmp_path / "at once")


def test_a_folder_from_before_there_were_open_shards(processor, tmp_path):
    (tmp_path / "text.mp4").write_text("no media")
    entries = [Entry("text", ("x",), media=str(tmp_path / "text.mp4"))]
    entries.append(Entry("good", ("x",), audio=str(write_sound(tmp_path / "good.wav", 1))))
    prepare(entries, tmp_path / "out", processor, num_workers=1)
    (shard,) = tmp_path.glob("out/data/*.parquet")
    account = json.loads(pq.read_metadata(shard).metadata[b"evacap"])
    for problem in account["report"]:
        del problem["passing"]
        problem["path"] = problem.pop("file")
    table = pq.read_table(shard)
    pq.write_table(table.replace_schema_metadata({b"evacap": json.dumps(account)}), shard)
    assert prepare(entries, tmp_path / "out", processor, num_workers=1)["clips"] == 1


def test_a_killed_worker_costs_no_clip(processor, tmp_path):
    """It is killed while it waits at a pipe; the clip comes when it is tried once more."""
    pipe, sound = tmp_path / "pipe.wav", write_sound(tmp_path / "good.wav", 1)
    os.mkfifo(pipe)
    entries = [Entry("a", ("x",), audio=str(pipe)), Entry("b", ("x",), audio=str(sound))]

    def serve():
        """Kills whoever reads the pipe the first time, and gives the sound to the second one."""
        with open(pipe, "wb"):
            (reader,) = [p for p in psutil.process_iter() if str(pipe) in _open_files(p) and p.pid != os.getpid()]
            pipe.rename(tmp_path / "first")
            os.mkfifo(pipe)
            reader.kill()
        with open(pipe, "wb") as file:
            file.write(sound.read_bytes())

    thread = threading.Thread(target=serve)
    thread.start()
    assert prepare(entries, tmp_path / "out", processor, num_workers=2)["clips"] == 2
    thread.join()
    assert report(tmp_path / "out") == []


def _open_files(process: psutil.Process) -> list[str]:
    folder = Path("/proc") / str(process.pid) / "fd"
    try:
        return [os.readlink(path) for path in folder.iterdir()]
    except OSError:
        return []


def test_two_preparations_in_one_folder(processor, small, tmp_path):
    with locked(tmp_path), pytest.raises(BlockingIOError, match=f"is being written by process {os.getpid()}"):
        prepare(read_manifest(small), tmp_path, processor, num_workers=1)
    assert list(tmp_path.iterdir()) == []


def test_a_clip_that_takes_too_long_is_left_out(processor, tmp_path):
    """A pipe from which nothing comes."""
    os.mkfifo(tmp_path / "pipe")
    entries = [Entry("pipe", ("x",), audio=str(tmp_path / "pipe"))]
    entries.append(Entry("good", ("x",), audio=str(write_sound(tmp_path / "good.wav", 1))))
    counts = prepare(entries, tmp_path / "out", processor, num_workers=2, time_limit=2.0)
    assert counts["clips"] == 1
    (problem,) = report(tmp_path / "out")
    assert problem["id"] == "pipe" and "more than 2 s" in problem["reason"] and not problem["passing"]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the memory of a process is read from /proc")
def test_a_clip_that_takes_too_much_memory_is_left_out(processor, tmp_path):
    """A picture of 200 kB that has 190 MB decoded."""
    picture, sound = tmp_path / "large.png", str(write_sound(tmp_path / "good.wav", 1))
    Image.new("RGB", (9000, 7000)).save(picture)
    entries = [Entry(name, ("x",), audio=sound) for name in "abc"]
    entries.insert(1, Entry("large", ("x",), audio=sound, video=str(picture)))
    counts = prepare(entries, tmp_path / "out", processor, num_workers=1, memory_limit=256 * 2**20)
    assert counts["clips"] == 3
    (problem,) = report(tmp_path / "out")
    assert problem["id"] == "large" and not problem["usable"]
    assert (
        problem["reason"]
        == f"{picture}: reading it takes more memory than the 256 MiB that its process may use; leave it out"
    )


def test_a_still_beside_a_sound(processor, tmp_path):
    """It is on display all the time, in the rows of a manifest too."""
    write_sound(tmp_path / "sound.wav", 1, seconds=3)
    write_picture(tmp_path / "still.png", 7)
    (tmp_path / "manifest.jsonl").write_text(
        json.dumps({"id": "a", "audio": "sound.wav", "video": "still.png", "caption": "x"})
        + "\n"
        + json.dumps(
            {"id": "b", "audio": "sound.wav", "video": "still.png", "start": 1, "duration": 2, "caption": "x"}
        )
    )
    counts = prepare(
        read_manifest(tmp_path / "manifest.jsonl"), tmp_path / "out", processor, num_frames=4, num_workers=1
    )
    assert counts == {"rows": 2, "clips": 2, "without_picture": 0, "damaged": 0}
    assert report(tmp_path / "out") == []
    rows = datasets.load_dataset(str(tmp_path / "out"), split="train")
    for row in rows:
        shown = [np.asarray(Image.open(BytesIO(frame))).transpose(2, 0, 1) for frame in row["frames"]]
        assert [number_of(picture) for picture in shown] == [7, 7, 7, 7]


@pytest.mark.parametrize("field", [{"id": "\ud83d"}, {"captions": ("a", "b\udcff")}, {"extra": {"a": ["\ud800"]}}])
def test_half_a_character_is_named(field):
    with pytest.raises(ValueError, match=rf"`{next(iter(field))}` of the clip .* holds .*half a character"):
        Entry(**{"id": "name", "captions": ("x",), **field})


def test_without_a_usable_clip_it_is_an_error_until_there_is_one(processor, tmp_path):
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match="no clip of the split 'train' can be used.*no file in the media folder"
        ):
            prepare([Entry("clip", ("x",))], tmp_path / "out", processor, num_workers=1)
    sound = str(write_sound(tmp_path / "clip.wav", 1))
    counts = prepare([Entry("clip", ("x",), audio=sound)], tmp_path / "out", processor, num_workers=1)
    assert counts["clips"] == 1 and report(tmp_path / "out") == []


def test_damage_is_reported_whatever_the_verbosity(processor, tmp_path):
    sound = write_sound(tmp_path / "cut.wav", 1)
    sound.write_bytes(sound.read_bytes()[:-7001])
    before = logging.get_verbosity()
    try:
        logging.set_verbosity_error()
        made = features(processor, audio=str(sound), num_frames=8)
        assert logging.get_verbosity() == logging.ERROR
    finally:
        logging.set_verbosity(before)
    assert made.usable and "breaks off" in made.problem


def test_other_settings_are_refused(processor, small, tmp_path):
    entries = read_manifest(small)[:2]
    prepare(entries, tmp_path, processor, num_workers=1)
    before = content(tmp_path)
    other = AutoProcessor.from_pretrained(evacap.TINY)
    other.feature_extractor.window_type = "hanning"
    cases = [
        (other, {}, "`feature_extractor.window_type` is 'hamming' there and 'hanning' here"),
        (processor, {"fps": 2}, "`frames.num_frames` is 8 there and None here; `frames.fps` is None there and 2 here"),
        (processor, {"num_frames": 4}, "`frames.num_frames` is 8 there and 4 here"),
        (processor, {"jpeg_quality": 80}, "`frames.jpeg_quality` is 95 there and 80 here"),
        (processor, {"shard_size": 1}, "`splits.train.shard_size` is 256 there and 1 here"),
    ]
    for chosen, options, expected in cases:
        with pytest.raises(ValueError, match=expected):
            prepare(entries, tmp_path, chosen, num_workers=1, **options)
    with pytest.raises(ValueError, match="`splits.train.manifest` is"):
        prepare([replace(entries[0], captions=("other",)), entries[1]], tmp_path, processor)
    for field in ("start", "duration"):
        with pytest.raises(ValueError, match="`splits.train.manifest` is"):
            prepare([replace(entries[0], **{field: 0.1}), entries[1]], tmp_path, processor)
    with pytest.raises(ValueError, match="`splits.train.rows` is 2 there and 1 here"):
        prepare(entries[:1], tmp_path, processor)
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"split": "a b"}, "`split` is 'a b'"),
        ({"split": "all"}, "`split` is 'all'"),
        ({"shard_size": 0}, "`shard_size` is 0"),
        ({"num_workers": -1}, "`num_workers` is -1"),
        ({"num_frames": 0}, "`num_frames` is 0"),
        ({"fps": float("nan")}, "`fps` is nan"),
        ({"jpeg_quality": 101}, "`jpeg_quality` is 101"),
        ({"time_limit": 0.0}, "`time_limit` is 0.0"),
        ({"num_frames": 4, "fps": 2}, "`num_frames` or `fps`, not both"),
    ],
)
def test_wrong_arguments_are_named(processor, tmp_path, options, expected):
    with pytest.raises(ValueError, match=expected):
        prepare([Entry("x", ("x",))], tmp_path / "out", processor, **options)
    assert not (tmp_path / "out").exists()


def test_the_frames_to_keep(processor, tmp_path):
    clip = str(write_dataset(tmp_path, "test", 1, seed=2).with_name("test-2-000000.mp4"))
    for options, times in (
        ({"fps": 2}, {"fps": 2}),
        ({"num_frames": 5}, {"num_frames": 5}),
    ):
        made = features(processor, media=clip, **options)
        direct = load_media(clip, audio=False, **times).frames
        expected = processor.video_processor(
            direct, do_sample_frames=False, do_rescale=False, do_normalize=False, tubelet_size=1, return_tensors="np"
        )["pixel_values_videos"][0]
        assert len(made.frames) == len(expected) == {"fps": 10, "num_frames": 5}[next(iter(options))]
        assert np.abs(pixels(made).astype(float) - expected).mean() < 4


def test_frames_of_pictures(processor, tmp_path):
    sound = str(write_sound(tmp_path / "clip.wav", 1))
    for frame in range(12):
        write_picture(tmp_path / f"frame_{frame}" / "clip[1].jpg", frame)
        write_picture(tmp_path / "folder" / f"{frame}.png", frame)
    patterns = {
        "pattern": os.path.join(tmp_path, "frame_*", "clip[[]1].jpg"),
        "folder": str(tmp_path / "folder"),
    }
    for frames in patterns.values():
        kept = pixels(features(processor, audio=sound, frames=frames, fps=2))
        assert [number_of(frame) for frame in kept] == list(range(10)), "5.12 s at 2 a second"
        kept = pixels(features(processor, audio=sound, frames=frames, num_frames=4))
        assert [number_of(frame) for frame in kept] == [1, 4, 7, 10]
    still = pixels(features(processor, audio=sound, frames=str(tmp_path / "folder" / "7.png"), fps=2))
    assert [number_of(frame) for frame in still] == [7]


def test_avcaps_folders_and_a_whole_video(processor, tmp_path):
    media = tmp_path / "media"
    write_sound(media / "waveforms" / "aaaaaaaaaaa_30000_40000.wav", 1, seconds=6.0)
    for frame in range(20):
        write_picture(media / "frames" / f"frame_{frame}" / "aaaaaaaaaaa_30000_40000.jpg", frame)
    write_sound(media / "bbbbbbbbbbb.wav", 2, seconds=25.0)
    write_sound(media / "ccccccccccc.wav", 3, seconds=12.0)
    (tmp_path / "train.csv").write_text(
        "audiocap_id,youtube_id,start_time,caption\n1,aaaaaaaaaaa,30,x\n2,bbbbbbbbbbb,10,x\n3,ccccccccccc,4,x\n"
    )
    make = FeatureMaker(_storing(processor, None, 2.0), 95)
    avcap, whole, cut = map(make, read_audiocaps(tmp_path / "train.csv", media))
    assert [number_of(frame) for frame in pixels(avcap)] == list(range(10))
    for made, name, start in ((whole, "bbbbbbbbbbb", 10.0), (cut, "ccccccccccc", 0.0)):
        direct = processor(audio=str(media / f"{name}.wav"), start=start, return_tensors="np")["input_features"][0]
        assert np.abs(made.input_features.reshape(direct.shape) - direct).max() < 1e-3


@pytest.mark.parametrize("modalities", ["audio", "video"])
def test_a_model_of_one_stream_stores_that(modalities, tmp_path):
    processor = AutoProcessor.from_pretrained(evacap.TINY)
    processor.modalities = modalities
    clip = str(write_dataset(tmp_path, "test", 1, seed=3).with_name("test-3-000000.mp4"))
    made = features(processor, media=clip, num_frames=8)
    assert (len(made.input_features) > 0, len(made.frames) > 0) == (modalities == "audio", modalities == "video")
    picture = str(write_picture(tmp_path / "picture.jpg", 5))
    made = features(processor, audio=str(write_sound(tmp_path / "clip.wav", 1)), frames=picture, num_frames=8)
    assert (len(made.input_features) > 0, len(made.frames) > 0) == (modalities == "audio", modalities == "video")


def test_a_missing_backend_is_no_fault_of_the_clips(tmp_path):
    processor = AutoProcessor.from_pretrained(evacap.TINY)
    processor.feature_extractor.backend = "torchaudio"
    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError, RuntimeError):
        with pytest.raises(ImportError, match="torchaudio"):
            features(processor, audio=str(write_sound(tmp_path / "clip.wav", 1)), num_frames=8)
    else:
        pytest.skip("torchaudio is installed")


def test_making_features_leaves_the_processor_alone(processor, tmp_path):
    before = processor.to_json_string()
    features(processor, audio=str(write_sound(tmp_path / "clip.wav", 1)), fps=4)
    assert processor.to_json_string() == before and processor.tokenizer is not None

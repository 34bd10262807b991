import json
import os
import shutil
import signal
import subprocess
import sys
import time

import datasets
import pytest

import evacap
from evacap.cli import main
from evacap.commands.prepare import split_of
from evacap.processing.processing_evacap import EVACapProcessor
from evacap.training.data.prepared_clips import PreparedClips
from evacap.training.procedural.scenes import write_dataset


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """The manifest of three procedural clips."""
    return write_dataset(tmp_path_factory.mktemp("clips") / "val", "validation", 3, seed=6)


def test_own_clips(clips, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    output = str(tmp_path / "out")
    call = ["prepare", "--manifest", str(clips), "--output", output, "--model", evacap.TINY, "--workers", "2"]
    assert main([*call, "--max-clips", "2"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "validation: 2 of 2 clips, 0 of them without a picture, 0 damaged but usable\n"
    assert "2/2" in printed.err and "clip/s" in printed.err
    assert main([*call, "--split", "whole", "--fps", "2"]) == 1
    assert "`frames.fps` is None there and 2.0 here" in capsys.readouterr().err
    assert main([*call, "--split", "whole"]) == 0
    rows = datasets.load_dataset(output)
    assert {split: len(rows[split]) for split in rows} == {"validation": 2, "whole": 3}


def test_audiocaps(clips, tmp_path, capsys):
    media = tmp_path / "media"
    media.mkdir()
    lines = ["audiocap_id,youtube_id,start_time,caption"]
    for number, file in enumerate(sorted(clips.parent.glob("*.mp4"))[:2]):
        (media / f"abcdefghij{number}_30.mp4").symlink_to(file)
        lines += [f'{number},abcdefghij{number},30,"a dog, {row}"' for row in range(5)]
    lines.append("9,deadlink999,30,a dog")
    (tmp_path / "test.csv").write_text("\n".join(lines))
    call = ["prepare", "--audiocaps", str(tmp_path / "test.csv"), "--output", str(tmp_path / "out")]
    assert main([*call, "--media", str(media), "--preset", "avcap", "--workers", "2"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "test: 2 of 3 clips, 0 of them without a picture, 0 damaged but usable"
    assert printed[1] == f"why: {tmp_path / 'out' / 'report.jsonl'}"
    preparation = json.loads((tmp_path / "out" / "preparation.json").read_text())
    assert preparation["frames"] == {"num_frames": None, "fps": 2, "jpeg_quality": 95}
    assert preparation["feature_extractor"]["window_type"] == "hanning"
    assert preparation["splits"]["test"]["clips"] == 2
    (problem,) = [json.loads(line) for line in (tmp_path / "out" / "report.jsonl").read_text().splitlines()]
    assert problem["id"] == "deadlink999_30" and not problem["usable"]


def test_a_file_that_is_away_for_a_moment(clips, tmp_path, capsys):
    rows = [json.loads(line) for line in clips.read_text().splitlines()]
    folder = tmp_path / "test"
    folder.mkdir()
    for row in rows:
        shutil.copy(clips.parent / row["media"], folder)
    shutil.copy(clips, folder)
    call = [
        "prepare",
        "--manifest",
        str(folder / clips.name),
        "--output",
        str(tmp_path / "out"),
        "--model",
        evacap.TINY,
    ]
    call += ["--workers", "2", "--shard-size", "2"]
    away = folder / rows[0]["media"]
    away.rename(tmp_path / "away")
    for _ in range(2):
        assert main(call) == 1
        printed = capsys.readouterr()
        assert (
            "evacap prepare: " in printed.err and "1 clip of the split 'test' failed for reasons that" in printed.err
        )
        assert not printed.out
    assert main([*call[:4], str(tmp_path / "accepted"), *call[5:], "--accept-failures"]) == 0
    assert capsys.readouterr().out.startswith("test: 2 of 3 clips, ")
    (tmp_path / "away").rename(away)
    assert main(call) == 0
    assert capsys.readouterr().out.startswith("test: 3 of 3 clips, ")


def test_clips_without_captions(clips, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "mine"
    folder.mkdir()
    for file in clips.parent.glob("*.mp4"):
        (folder / file.name).symlink_to(file)
    options = ["--model", evacap.TINY, "--workers", "1", "--split", "train", "--output"]
    call = ["prepare", "--folder", str(folder), *options, str(tmp_path / "folder")]
    assert main(call) == 1
    assert "has no caption" in capsys.readouterr().err
    assert main([*call, "--no-captions"]) == 0
    (folder / "metadata.csv").write_text(
        "file_name,place\n" + "".join(f"{f.name},here\n" for f in folder.glob("*.mp4"))
    )
    listed = ["prepare", "--folder", str(folder), *options, str(tmp_path / "listed"), "--no-captions"]
    assert main(listed) == 0
    # Captions that are there do not count.
    manifest = ["prepare", "--manifest", str(clips), *options, str(tmp_path / "manifest"), "--no-captions"]
    assert main(manifest) == 0
    processor = EVACapProcessor.from_pretrained(evacap.TINY)
    for name in ("folder", "listed", "manifest"):
        prepared = PreparedClips(tmp_path / name, "train", processor)
        assert len(prepared) == 3 and prepared.captions(0) == []
        assert prepared[0].keys() == {"input_features", "pixel_values_videos"}
    capsys.readouterr()
    command = ["evaluate", evacap.TINY, "--data", str(tmp_path / "folder"), "--split", "train"]
    assert main([*command, "--output", str(tmp_path / "evaluation")]) == 1
    assert "has no caption to compare with" in capsys.readouterr().err
    shards = ["prepare", "--webdataset", "a.tar", *options, str(tmp_path / "shards"), "--no-captions"]
    assert main(shards) == 1
    assert "--no-captions belongs to --folder and --manifest" in capsys.readouterr().err


def test_wrong_calls(clips, tmp_path, capsys):
    output = ["--output", str(tmp_path / "out")]
    for call, expected in (
        (["--audiocaps", "train.csv"], "--audiocaps needs --media, the folder with the clips"),
        (["--manifest", str(clips), "--media", "clips"], "--media belongs to --audiocaps, --clotho, --vggsound"),
        (["--manifest", "nowhere.jsonl"], "evacap prepare: nowhere.jsonl: no such file or directory"),
        (["--manifest", str(clips), "--model", str(tmp_path / "nowhere")], "nowhere"),
        (["--manifest", str(clips), "--fps", "0"], "`fps` is 0.0"),
    ):
        assert main(["prepare", *call, *output]) == 1
        assert expected in capsys.readouterr().err
    for call in ([], ["--manifest", "a", "--audiocaps", "b"], ["--manifest", "a", "--fps", "2", "--num-frames", "4"]):
        with pytest.raises(SystemExit) as stopped:
            main(["prepare", *call, *output])
        assert stopped.value.code == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "source, split",
    [
        ("audiocaps_train.csv", "train"),
        ("lists/audiocaps_val.csv", "validation"),
        ("test.csv", "test"),
        ("clips/dev/manifest.jsonl", "validation"),
        ("contest/manifest.jsonl", "train"),
    ],
)
def test_the_split_is_told_by_the_name(source, split, tmp_path):
    assert split_of(str(tmp_path.root + source)) == split


@pytest.mark.slow
def test_ctrl_c_can_be_gone_on_from(clips, tmp_path):
    call = [
        "prepare",
        "--manifest",
        str(clips),
        "--output",
        str(tmp_path / "out"),
        "--shard-size",
        "1",
        "--workers",
        "1",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "evacap", *call],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    limit = time.monotonic() + 120
    while not list(tmp_path.glob("out/data/*.parquet")) and time.monotonic() < limit:
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGINT)  # To the workers, too, as a terminal sends it.
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert printed == "evacap prepare: stopped; the same command goes on from here\n"
    assert main(call) == 0

"""Clotho, VGGSound, folders and WebDataset shards, with the real names of columns and files."""

import io
import json
import logging
import pickle
import tarfile
from pathlib import Path

import pytest
from transformers.utils.logging import disable_propagation, enable_propagation

from evacap.training.data.clotho import read_clotho
from evacap.training.data.media_folder import read_folder
from evacap.training.data.tar_members import TarMember, read_samples
from evacap.training.data.vggsound import read_vggsound
from evacap.training.data.webdataset import read_webdataset


CLOTHO = "file_name,caption_1,caption_2,caption_3,caption_4,caption_5\n"


def write(folder: Path, files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def test_clotho(tmp_path):
    row = (
        "Distorted AM Radio noise.wav,A muddled noise,Someone uses a radio,A radio tunes,Static plays,Noise is heard\n"
    )
    write(
        tmp_path,
        {
            "clotho_captions_development.csv": CLOTHO
            + row
            + '"ice, water.wav",a,b,"c, d",e,f\n'
            + "gone.wav,a,b,c,d,e\n",
            "development/Distorted AM Radio noise.wav": b"",
            "development/ice, water.flac": b"",
        },
    )
    clips = read_clotho(tmp_path / "clotho_captions_development.csv", tmp_path)
    assert [clip.id for clip in clips] == ["Distorted AM Radio noise", "ice, water", "gone"]
    assert len(clips[0].captions) == 5 and clips[1].captions[2] == "c, d"
    assert [clip.path and Path(clip.path).name for clip in clips] == [
        "Distorted AM Radio noise.wav",
        "ice, water.flac",
        None,
    ]
    write(tmp_path, {"metadata.csv": "file_name,keywords\na.wav,b\n", "empty.csv": CLOTHO + "a.wav,,,,,\n"})
    for name, reason in (("metadata.csv", "has no column caption_1"), ("empty.csv", "line 2: has no caption")):
        with pytest.raises(ValueError, match=reason):
            read_clotho(tmp_path / name, tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere: there is no such folder"):
        read_clotho(tmp_path / "empty.csv", tmp_path / "nowhere")


def test_vggsound(tmp_path):
    write(
        tmp_path,
        {
            "vggsound.csv": '---g-f_I2yQ,1,people marching,test\n--0PQM4-hqg,30,"waterfall, burbling",train\n'
            "--56QUhyDQM,185,playing tennis,train\n",
            "video/---g-f_I2yQ_000001.mp4": b"",
            "video/--0PQM4-hqg_000030.mp4": b"",
        },
    )
    first, second = read_vggsound(tmp_path / "vggsound.csv", tmp_path / "video")
    assert (first.id, first.captions) == ("--0PQM4-hqg_30", ("waterfall, burbling",))
    assert first.path.endswith("--0PQM4-hqg_000030.mp4") and second.path is None
    (test,) = read_vggsound(tmp_path / "vggsound.csv", tmp_path / "video", "test")
    assert test.captions == ("people marching",) and test.path.endswith("---g-f_I2yQ_000001.mp4")
    with pytest.raises(ValueError, match="no row of the split 'validation'; there are test, train"):
        read_vggsound(tmp_path / "vggsound.csv", tmp_path / "video", "validation")
    for bad in ("id,start,label,split\n", "---g-f_I2yQ,1,people marching\n"):
        write(tmp_path, {"bad.csv": bad})
        with pytest.raises(ValueError, match="line 1: expected VGGSound's columns"):
            read_vggsound(tmp_path / "bad.csv", tmp_path / "video")


def test_a_folder_with_metadata_or_text_files(tmp_path):
    write(
        tmp_path,
        {"a/metadata.csv": "file_name,text,place\nx/1.mp4,a dog barks,here\nx/1.mp4,a dog yaps,here\n2.wav,rain,\n"},
    )
    first, second = read_folder(tmp_path / "a")
    assert (first.id, first.captions, first.extra) == ("x/1", ("a dog barks", "a dog yaps"), {"place": "here"})
    assert first.media == str(tmp_path / "a" / "x" / "1.mp4") and second.id == "2"
    write(tmp_path, {"b/metadata.jsonl": '{"file_name": "1.mp4", "captions": ["a", "b"]}\n'})
    assert read_folder(tmp_path / "b")[0].captions == ("a", "b")
    write(tmp_path, {"c/1.mp4": b"", "c/1.txt": "a dog barks\n\na dog yaps\n", "c/1.wav": b"", "c/below/2.flac": b""})
    with pytest.raises(ValueError, match="2.flac: has no caption. Write one into 2.txt, or all into metadata.csv"):
        read_folder(tmp_path / "c")
    write(tmp_path, {"c/below/2.txt": "rain"})
    assert [(clip.id, clip.captions) for clip in read_folder(tmp_path / "c")] == [
        ("1.mp4", ("a dog barks", "a dog yaps")),
        ("1.wav", ("a dog barks", "a dog yaps")),
        ("below/2", ("rain",)),
    ]
    write(tmp_path, {"d/metadata.csv": "file_name,label\n1.mp4,dog\n", "e/notes.md": ""})
    for name, reason in (("d", "line 2: needs `file_name`"), ("e", "e: has no clips")):
        with pytest.raises(ValueError, match=reason):
            read_folder(tmp_path / name)


def write_shard(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_webdataset_shards(tmp_path, caplog):
    long = "x" * 150
    first = write_shard(
        tmp_path / "train-0.tar",
        {
            "a/1.mp4": b"video",
            "a/1.wav": b"sound",
            "a/1.json": json.dumps({"caption": "a dog barks", "source": "here"}).encode(),
            f"{long}.flac": b"flac",
            f"{long}.txt": b"rain falls\nit rains\n",
            "no_caption.mp4": b"",
            "no_clip.txt": b"a",
        },
    )
    second = write_shard(tmp_path / "train-1.tar", {"2.mp4": b"two", "2.json": b'{"captions": ["a", "b"]}'})
    enable_propagation()
    caplog.set_level(logging.WARNING)
    clips = read_webdataset([first, second])
    disable_propagation()
    assert "2 samples have no clip or no caption" in caplog.text and f"{first}/no_caption" in caplog.text
    assert [(clip.id, clip.captions) for clip in clips] == [
        ("a/1", ("a dog barks",)),
        (long, ("rain falls", "it rains")),
        ("2", ("a", "b")),
    ]
    assert clips[0].extra == {"source": "here"} and clips[0].path == f"{first}/a/1.mp4"
    for clip, content in zip(clips, (b"video", b"flac", b"two")):
        member = pickle.loads(pickle.dumps(clip)).media
        assert member.read() == content and member.read() == b"" and member.seek(-2, 2) == len(content) - 2
        assert member.read(1) + member.read(9) == content[-2:] and member.tell() == len(content)
        with pytest.raises(ValueError, match="before its beginning"):
            member.seek(-1)
    again = write_shard(tmp_path / "again.tar", {"2.mp4": b"two", "2.txt": b"a"})
    with pytest.raises(ValueError, match="again.tar/2.mp4: the key '2' was given to another clip before"):
        read_webdataset([second, again])
    with pytest.raises(ValueError, match="no sample has both a clip"):
        read_webdataset([write_shard(tmp_path / "other.tar", {"a.png": b"", "b.txt": b"b"})])
    with pytest.raises(ValueError, match="bad.tar/a.json: is not JSON"):
        read_webdataset([write_shard(tmp_path / "bad.tar", {"a.mp4": b"", "a.json": b"[1"})])


def test_damaged_shards_are_refused(tmp_path):
    whole = write_shard(tmp_path / "a.tar", {"1.mp4": bytes(5000), "1.txt": b"a"})
    packed = write_shard(tmp_path / "packed.tar", {"1.mp4": bytes(50)}, "w:gz")
    (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[:3000])
    (tmp_path / "text.tar").write_text("no archive" * 100)
    for path in (packed, tmp_path / "cut.tar", tmp_path / "text.tar"):
        with pytest.raises(ValueError, match=f"{path.name}: cannot be read as an uncompressed .tar archive"):
            list(read_samples(path))
    with pytest.raises(FileNotFoundError):
        list(read_samples(tmp_path / "nowhere.tar"))
    assert isinstance(next(read_samples(whole))[1][".mp4"], TarMember)

import csv
import json

import pytest

from evacap.training.data.manifest import Entry, read_manifest
from evacap.training.procedural.scenes import write_dataset


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_json_lines_and_csv_say_the_same(tmp_path):
    rows = [
        {"id": "one", "media": "a/one.mp4", "caption": "Ein Hund bellt, “laut”", "place": "park"},
        {"id": "two", "media": "/else/two.mp4", "caption": "rain, wind", "place": "roof"},
    ]
    clips = read_manifest(write_jsonl(tmp_path / "clips.jsonl", rows))
    assert clips == read_manifest(write_csv(tmp_path / "clips.csv", rows))
    assert clips == [
        Entry("one", ("Ein Hund bellt, “laut”",), str(tmp_path / "a/one.mp4"), extra={"place": "park"}),
        Entry("two", ("rain, wind",), "/else/two.mp4", extra={"place": "roof"}),
    ]


def test_sound_and_picture_may_be_apart_and_a_part_of_longer_files(tmp_path):
    row = {"id": 7, "audio": "7.wav", "frames": "frames/7", "captions": ["x", "y"], "start": 3, "duration": "2.5"}
    (clip,) = read_manifest(write_jsonl(tmp_path / "clips.jsonl", [row]))
    assert (clip.id, clip.captions, clip.start, clip.duration) == ("7", ("x", "y"), 3.0, 2.5)
    assert clip.audio == str(tmp_path / "7.wav") and clip.frames == str(tmp_path / "frames/7")
    assert clip.media is None and clip.video is None and clip.extra == {} and clip.path == clip.audio


def test_rows_of_one_clip_are_its_captions(tmp_path):
    rows = [{"id": name, "media": f"{name}.mp4", "caption": text} for name, text in ("ax", "by", "az")]
    clips = read_manifest(write_csv(tmp_path / "clips.csv", rows))
    assert [(clip.id, clip.captions) for clip in clips] == [("a", ("x", "z")), ("b", ("y",))]
    captions = [{"id": "a", "media": "a.mp4", "captions": '["x", "z"]'}]
    assert read_manifest(write_csv(tmp_path / "lists.csv", captions)) == clips[:1]


def test_the_procedural_clips_have_such_a_manifest(tmp_path):
    manifest = write_dataset(tmp_path, "test", 1, seed=5)
    (clip,) = read_manifest(manifest)
    assert clip.media == str(tmp_path / "test-5-000000.mp4") and len(clip.captions) == 5
    assert set(clip.extra) == {"names", "events", "silent_objects"}


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"media": "a.mp4", "caption": "x"}, "line 2.*`id` is missing"),
        ({"id": "a", "caption": "x"}, "line 2.*give `media`, or `audio`.*got none"),
        ({"id": "a", "media": "a.mp4", "audio": "a.wav", "caption": "x"}, "line 2.*got media, audio"),
        ({"id": "a", "video": "a.mp4", "frames": "a", "caption": "x"}, "line 2.*got video, frames"),
        ({"id": "a", "media": "a.mp4"}, "line 2.*`captions` must be a list.*got None"),
        ({"id": "a", "media": "a.mp4", "captions": []}, r"line 2.*`captions` must be a list.*got \[\]"),
        ({"id": "a", "media": 3, "caption": "x"}, "line 2.*`media` must be a path, got 3"),
        ({"id": None, "media": "a.mp4", "caption": "x"}, "line 2.*`id` is missing"),
        ({"id": "a", "media": "", "caption": "x"}, "line 2.*`media` must be a path, got ''"),
        ({"id": "a", "media": "a.mp4", "caption": " "}, "line 2.*`captions` must be a list"),
        (
            {"id": "a", "media": "a.mp4", "caption": "x", "start": "soon"},
            "line 2: `start` is 'soon', expected seconds",
        ),
        ({"id": "a", "media": "a.mp4", "caption": "x", "start": -1}, "line 2: `start` is -1, expected seconds"),
        ({"id": "a", "media": "a.mp4", "caption": "x", "start": float("nan")}, "line 2: `start` is nan"),
        ({"id": "a", "media": "a.mp4", "caption": "x", "duration": 0}, "line 2: `duration` is 0"),
        ({"id": "first", "media": "b.mp4", "caption": "x"}, "line 2: `id` 'first' was given to another clip"),
        ([], "line 2: is a list, expected an object"),
    ],
)
def test_a_wrong_row_is_named_with_its_line(tmp_path, row, expected):
    first = {"id": "first", "media": "a.mp4", "caption": "x"}
    path = write_jsonl(tmp_path / "clips.jsonl", [first, row])
    with pytest.raises(ValueError, match=f"clips.jsonl, {expected}"):
        read_manifest(path)


def test_wrong_files_are_named(tmp_path):
    cases = {
        "broken.jsonl": ("{", "broken.jsonl, line 1: is not JSON"),
        "empty.jsonl": ("\n", "empty.jsonl: has no rows"),
        "commas.csv": ("id,media,caption\na,a.mp4,rain, wind\n", "commas.csv, line 2: .*quotes"),
        "quote.csv": ('id,media,caption\na,a.mp4,"rain\nb,b.mp4,wind\n', "quote.csv, line 2: is not CSV .*quote"),
        "long.csv": ("id,media,caption\na,a.mp4," + "x" * 200_000, "long.csv, line 2: is not CSV .*larger"),
        "latin.csv": (b"id,media,caption\na,a.mp4,caf\xe9\n", "latin.csv: is not in UTF-8"),
        "latin.jsonl": (b'{"caption": "caf\xe9"}', "latin.jsonl: is not in UTF-8"),
        "clips.txt": ("", r"clips.txt: its name must end in .jsonl or .csv"),
    }
    for name, (content, expected) in cases.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ValueError, match=expected):
            read_manifest(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="nowhere.csv"):
        read_manifest(tmp_path / "nowhere.csv")


@pytest.mark.parametrize(
    "fields",
    [
        {"id": "\ud83d", "caption": "a"},
        {"id": "a", "caption": "\udc00 dog"},
        {"id": "a", "caption": "a", "x": "\ud800"},
    ],
)
def test_half_a_character_is_named_with_its_line(tmp_path, fields):
    rows = [{"id": "first", "caption": "a", "media": "a.mp4"}, {**fields, "media": "b.mp4"}]
    (tmp_path / "clips.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match="clips.jsonl, line 2: `(id|captions|extra)` of the clip .* half a character"):
        read_manifest(tmp_path / "clips.jsonl")


def test_a_path_need_not_be_utf_8(tmp_path):
    (tmp_path / "clips.jsonl").write_text(json.dumps({"id": "a", "caption": "a", "media": "\udcff.mp4"}))
    (entry,) = read_manifest(tmp_path / "clips.jsonl")
    assert entry.media == str(tmp_path / "\udcff.mp4")

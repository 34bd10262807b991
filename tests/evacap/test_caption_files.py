"""The files that `evacap.write_captions` writes, as other programs read them."""

import csv
import html
import json
import re
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import av
import pytest

import evacap
from evacap.caption_files import FORMATS, format_captions
from evacap.cli import main
from evacap.training.procedural.scenes import make_scene, write_clip


LONG = "a man speaks while a dog barks and an engine runs in the distance, then a bell rings four times over the water"
RESULT = {
    "file": 'a "b", c.mp4',
    "text": "…",
    "chunks": [
        {"timestamp": (0.0, 10.24), "text": "a dog barks"},
        {"timestamp": (10.24, 20.48), "text": "a <b>cat</b> & {\\an8}a --> dog, 1 < 2"},
        {"timestamp": (20.48, 30.72), "text": "nothing at all", "silent": True},
        {"timestamp": (3600.0, 3612.0), "text": LONG},
    ],
}
BROKEN = {"file": "bad.mp4", "error": "bad.mp4: cannot\nbe read"}


def cues_by_ffmpeg(path) -> list[tuple[int, int, str]]:
    """Start and end in milliseconds, and text, of the cues of a file of subtitles."""
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux() if packet.size]
        milliseconds = float(packets[0].time_base) * 1000
        return [
            (round(p.pts * milliseconds), round((p.pts + p.duration) * milliseconds), bytes(p).decode())
            for p in packets
        ]


@pytest.mark.parametrize("form", ["srt", "vtt"])
def test_subtitles_are_what_ffmpeg_reads(form, tmp_path):
    path = tmp_path / f"a.{form}"
    evacap.write_captions(RESULT, path)
    cues = cues_by_ffmpeg(path)
    assert [cue[:2] for cue in cues[:2]] == [(0, 10240), (10240, 20480)], "what is said of silence is left out"
    # The third caption is too long for two lines: its cues follow each other without a gap.
    (first, middle, text), (other, last, rest) = cues[2:]
    assert (first, last) == (3_600_000, 3_612_000) and middle == other and first < middle < last
    assert f"{text} {rest}".replace("\n", " ") == LONG
    lines = html.unescape(path.read_text()).splitlines()
    assert max(map(len, lines)) <= 42 and max(len(cue[2].splitlines()) for cue in cues) == 2
    numbers = [line for line in lines if line.isdecimal()]
    assert numbers == ["1", "2", "3", "4"]
    assert cues[0][2] == "a dog barks"
    expected = {
        "vtt": "a &lt;b&gt;cat&lt;/b&gt; &amp; {\\an8}a --&gt; dog, 1 &lt; 2",
        "srt": RESULT["chunks"][1]["text"],
    }
    assert cues[1][2].replace("\u2060", "") == expected[form]
    if form == "srt":
        # FFmpeg turns tags into those of ASS, and there are none.
        with av.open(str(path)) as container:
            subtitle = [frame for packet in container.demux() for frame in packet.decode()][1]
            assert "<b>cat" in subtitle.ass.decode().replace("\u2060", "")


def test_how_subtitles_look():
    result = {
        "text": "…",
        "chunks": [{"timestamp": (0, 5.0), "text": "A dog barks while a man speaks and rain falls."}],
    }
    assert format_captions(result, "srt") == (
        "1\n00:00:00,000 --> 00:00:05,000\nA dog barks while a man\nspeaks and rain falls.\n"
    )
    assert format_captions(result, "vtt", sdh=True, cue_settings="line:0 align:start") == (
        "WEBVTT\n\n1\n00:00:00.000 --> 00:00:05.000 line:0 align:start\n[A dog barks while a man\nspeaks and rain falls]\n"
    )
    for settings in ("line", "line:x", "size:101%", "colour:red", "line:0 line:1", "line:0\n\n2"):
        with pytest.raises(ValueError, match="not a cue setting"):
            format_captions(result, "vtt", cue_settings=settings)


def test_a_very_short_cue_lasts():
    chunks = [{"timestamp": (1.0, 1.0), "text": LONG}]
    for start, end in re.findall(r"(\S+) --> (\S+)", format_captions({"text": "", "chunks": chunks}, "vtt")):
        assert start < end


def test_tables_and_json_are_what_their_readers_read(tmp_path):
    results = [RESULT, {"file": "b.mp4", "text": "rain falls"}, BROKEN]
    for form, dialect in (("csv", "excel"), ("tsv", "excel-tab")):
        evacap.write_captions(results, tmp_path / f"a.{form}")
        with open(tmp_path / f"a.{form}", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, dialect=dialect))
        assert [row["file"] for row in rows] == [RESULT["file"]] * 4 + ["b.mp4", "bad.mp4"]
        assert [(float(row["start"]), float(row["end"]), row["text"]) for row in rows[:4]] == [
            (*chunk["timestamp"], chunk["text"]) for chunk in RESULT["chunks"]
        ]
        assert [row["silent"] for row in rows] == ["", "", "true", "", "", ""]
        assert rows[4]["start"] == rows[4]["end"] == "" and rows[4]["text"] == "rain falls"
        assert rows[5]["error"] == BROKEN["error"] and rows[5]["text"] == ""
    evacap.write_captions(results, tmp_path / "a.json")
    evacap.write_captions(iter(results), tmp_path / "a.jsonl")
    expected = json.loads(json.dumps(results))
    assert json.loads((tmp_path / "a.json").read_text()) == expected
    assert [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()] == expected
    evacap.write_captions(results[1], tmp_path / "A.TXT")
    assert (tmp_path / "A.TXT").read_text() == "rain falls\n"
    evacap.write_captions(results[1:], tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_text() == "b.mp4:\nrain falls\n\nbad.mp4:\nerror: bad.mp4: cannot be read\n"


def test_names_that_are_not_utf8(tmp_path):
    for form in set(FORMATS) - {"srt", "vtt"}:
        evacap.write_captions([{"file": "\udcff.mp4", "text": "é"}], tmp_path / f"a.{form}")
        assert b"\\udcff" in (tmp_path / f"a.{form}").read_bytes()[:200].replace(b"\n", b"") or form == "txt"


def test_what_is_refused_leaves_the_file_as_it_is(tmp_path):
    path = tmp_path / "a.srt"
    path.write_text("before")
    for results, reason in (
        ({"text": "a dog barks"}, "return_timestamps=True"),
        ([RESULT, RESULT], "of one clip, but there are 2"),
        (BROKEN, "no caption to write: bad.mp4"),
        (["a dog barks"], r"results\[0\]` must be a dict"),
        ([[RESULT]], r"results\[0\]` must be a dict"),
    ):
        with pytest.raises(ValueError, match=reason):
            evacap.write_captions(results, path)
        assert path.read_text() == "before"
    for name in ("a", "a.ass"):
        with pytest.raises(ValueError, match="its suffix must say the format"):
            evacap.write_captions(RESULT, tmp_path / name)
    with pytest.raises(ValueError, match="`sdh` belongs to"):
        evacap.write_captions(RESULT, tmp_path / "a.csv", sdh=True)
    with pytest.raises(ValueError, match="`cue_settings` belongs to"):
        evacap.write_captions(RESULT, path, cue_settings="line:0")
    assert [file.name for file in tmp_path.iterdir()] == ["a.srt"]


PAGE = """<!doctype html><video id=video muted width=320 src=clip.mp4>
<track default kind=captions srclang=en src=clip.vtt></video>"""
WATCH = """async () => {
    const video = document.getElementById("video"), track = video.textTracks[0], seen = [];
    const note = () => seen.push([video.currentTime, ...[...track.activeCues].map(cue => cue.text)]);
    track.addEventListener("cuechange", note);
    video.currentTime = 4.5;
    await video.play();
    await new Promise(resolve => { video.ontimeupdate = () => { if (video.currentTime > 5.6) resolve() } });
    video.pause();
    return {
        seen,
        error: video.error && video.error.message,
        cues: [...track.cues].map(cue => [cue.startTime, cue.endTime, cue.text, cue.line, cue.align]),
    };
}"""


def test_a_browser_shows_the_captions_of_a_playing_video(chromium, tmp_path):
    write_clip(make_scene(0, "test", 2, duration=10.0), tmp_path / "clip.mp4")
    (tmp_path / "index.html").write_text(PAGE)
    call = ["caption", str(tmp_path / "clip.mp4"), "--output", str(tmp_path / "clip.vtt"), "--quiet"]
    assert main([*call, "--sdh", "--cue-settings", "line:0 align:start", "--window", "5"]) == 0
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = chromium.new_page()
        page.goto(f"http://127.0.0.1:{server.server_port}/index.html")
        page.wait_for_function("document.getElementById('video').textTracks[0].cues?.length")
        found = page.evaluate(WATCH)
        page.close()
        server.shutdown()
    assert not found["error"]
    (first, second) = found["cues"]
    assert [cue[:2] for cue in found["cues"]] == [[0, 5], [5, 10]]
    assert first[3:] == [0, "start"]
    assert first[2].startswith("[") and second[2].endswith("]")
    during = [texts for time, *texts in found["seen"] if time < 5]
    after = [texts for time, *texts in found["seen"] if time >= 5]
    assert during[-1] == [first[2]] and after[-1] == [second[2]]

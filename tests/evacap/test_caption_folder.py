"""`evacap caption FOLDER --output FILE.jsonl`."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import psutil
import pytest
from media_files import tones, write_clip

import evacap
from evacap.cli import main
from evacap.commands.caption import open_results
from evacap.media_list import find_media
from evacap.processing import media_evacap
from evacap.processing.model_processor import load_processor


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sample") / "sample.mp4"
    assert main(["sample", str(path)]) == 0
    return path


@pytest.fixture
def folder(clip, tmp_path, monkeypatch) -> Path:
    """A folder with three clips, one of them below it, one bad clip, and files that are none."""
    monkeypatch.chdir(tmp_path)
    folder = Path("clips")
    (folder / "below").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for name in ("a.mp4", "c.MP4", "below/d é.mp4", ".a.mp4", ".hidden/e.mp4"):
        shutil.copy(clip, folder / name)
    (folder / "b.mp4").write_bytes(b"no video at all" * 50)
    (folder / "notes.txt").write_text("no clip")
    return folder


NAMES = ["clips/a.mp4", "clips/b.mp4", "clips/below/d é.mp4", "clips/c.MP4"]


def read(path: str | Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_a_folder_gives_a_line_for_each_clip(folder, capsys):
    found = find_media(["clips", "clips/a.mp4", "https://example.org/x"])
    assert found == [*map(Path, NAMES), "https://example.org/x"]
    assert main(["caption", "clips", "--output", "out/captions.jsonl"]) == 1
    lines = read("out/captions.jsonl")
    assert [line["file"] for line in lines] == NAMES
    assert [line.keys() for line in lines] == [{"file", "text"}, {"file", "error"}, {"file", "text"}, {"file", "text"}]
    assert lines[0]["text"] == lines[2]["text"] == lines[3]["text"] != ""
    assert "clips/b.mp4: " in lines[1]["error"]
    printed = capsys.readouterr()
    assert not printed.out and "4/4" in printed.err and "1 of 4 files failed" in printed.err

    for options in (["--batch-size", "2", "--workers", "0"], ["--batch-size", "3", "--workers", "2"]):
        output = f"{options[1]}.jsonl"
        assert main(["caption", "clips", "--output", output, *options, "--dtype", "float32"]) == 1
        assert read(output) == lines
    assert main(["caption", "clips/a.mp4", "--output", "gate.jsonl", "--json"]) == 0
    assert len(read("gate.jsonl")[0]["gate"]) > 0

    capsys.readouterr()
    assert main(["caption", "clips", "--json"]) == 1
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [result["file"] for result in printed] == NAMES
    assert [result.get("text") for result in printed] == [line.get("text") for line in lines]


def test_a_second_call_goes_on_where_the_first_stopped(folder, clip, capsys):
    call = ["caption", "clips", "--output", "captions.jsonl"]
    assert main(["caption", "clips/a.mp4", "clips/b.mp4", "--output", "captions.jsonl"]) == 1
    first = Path("captions.jsonl").read_bytes()
    with open("captions.jsonl", "ab") as file:
        file.write(b'{"file": "clips/c.MP4", "text": "half a li')
    capsys.readouterr()
    assert main(call) == 1
    assert "2 of 4 files are in captions.jsonl already" in capsys.readouterr().err
    assert Path("captions.jsonl").read_bytes().startswith(first)
    assert [line["file"] for line in read("captions.jsonl")] == NAMES
    assert main(["caption", "clips", "--output", "whole.jsonl"]) == 1
    assert read("captions.jsonl") == read("whole.jsonl")

    whole = Path("captions.jsonl").read_bytes()
    shutil.copy(clip, folder / "b.mp4")
    assert main(call) == 1 and Path("captions.jsonl").read_bytes() == whole, "what failed is left alone"
    assert main([*call, "--retry-failed"]) == 0
    lines = read("captions.jsonl")
    assert sorted(line["file"] for line in lines) == sorted(NAMES) and all("text" in line for line in lines)
    assert main(call) == 0


def test_another_file_is_left_as_it_is(folder, capsys):
    contents = (b'{"file": "a.mp4", "text": "a"}\n[1]\n', b"a,b\n1,2\n", b"no newline", b'{"media": "a.mp4"}\n')
    for content in contents:
        Path("other.jsonl").write_bytes(content)
        assert main(["caption", "clips", "--output", "other.jsonl"]) == 1
        assert "Give another --output" in capsys.readouterr().err
        assert Path("other.jsonl").read_bytes() == content
    (folder / "empty").mkdir()
    for call in (["clips/empty"], ["clips", "--retry-failed"]):
        assert main(["caption", *call]) == 1
        printed = capsys.readouterr().err
        assert (
            "clips/empty: no media files" if call == ["clips/empty"] else "--retry-failed needs --output"
        ) in printed


def test_an_output_that_cannot_be_written(folder, capsys):
    os.mkfifo("pipe.jsonl")
    os.mkfifo("pipe")
    Path("notes.md").write_text("notes")
    for output, reason in (
        ("clips", "what to write for each clip into this folder? Give --format"),
        ("new", "what to write for each clip into this folder? Give --format"),
        ("pipe.jsonl", "is not a regular file"),
        ("pipe", "is not a folder, and its suffix says no format"),
        ("notes.md", "is not a folder, and its suffix says no format"),
        ("captions.ass", "is not a folder, and its suffix says no format"),
        ("/dev/null", "is not a folder, and its suffix says no format"),
    ):
        assert main(["caption", "clips", "--output", output, "--model", "/not/loaded"]) == 1
        assert f"evacap caption: {output}" in (printed := capsys.readouterr().err) and reason in printed
    for options, reason in (
        (["--format", "srt"], "--format srt is for one clip, but there are 4"),
        (["--output", "a.vtt"], "a.vtt is for one clip, but there are 4"),
        (["--format", "csv", "--format", "txt"], "are files for a folder"),
        (["--format", "csv", "--output", "a.json"], "--format csv: where to?"),
        (["--output", "a", "--output", "b", "--format", "srt"], "b: one folder and one .jsonl file can be written"),
        (["--sdh", "--output", "a.csv"], "--sdh is for srt and vtt"),
        (["--json", "--format", "csv"], "--json is for json and jsonl"),
        (["--start", "5", "--end", "5"], "--end 5 is not after --start 5"),
    ):
        assert main(["caption", "clips", *options, "--model", "/not/loaded"]) == 1
        assert reason in capsys.readouterr().err
    assert not Path("new").exists() and Path("notes.md").read_text() == "notes"


def test_every_format_at_once_and_from_the_same_captions(folder, capsys):
    files = ["--output", "all.csv", "--output", "all.json", "--output", "all.jsonl"]
    assert main(["caption", "clips", "--output", "subs", "--format", "srt", "--format", "txt", *files]) == 1
    lines = read("all.jsonl")
    assert (
        [line["file"] for line in lines]
        == NAMES
        == [line["file"] for line in json.loads(Path("all.json").read_text())]
    )
    assert len(Path("all.csv").read_text().splitlines()) == 5
    stems = ["a", "below/d é", "c"]
    written = {path.relative_to("subs").as_posix() for path in Path("subs").rglob("*") if path.is_file()}
    assert written == {f"{stem}.{form}" for stem in stems for form in ("srt", "txt")}, "a clip with an error has none"
    assert Path("subs/a.txt").read_text() == lines[0]["text"] + "\n"
    assert "00:00:00,000 --> 00:00:05,000" in Path("subs/below/d é.srt").read_text()
    # From what is in the JSON lines, files that are missing are written again without a model.
    Path("subs/a.srt").unlink()
    Path("all.csv").unlink()
    capsys.readouterr()
    again = ["caption", "clips", "--output", "subs", "--format", "srt", *files, "--model", "/not/loaded"]
    assert main(again) == 1 and "4 of 4 files are in all.jsonl already" in capsys.readouterr().err
    assert Path("subs/a.srt").is_file() and len(Path("all.csv").read_text().splitlines()) == 5


def test_a_folder_goes_on_where_the_first_call_stopped(folder, clip, capsys):
    call = ["caption", "clips", "--output", "subs", "--format", "vtt"]
    assert main([*call[:1], "clips/a.mp4", *call[2:]]) == 0
    before = Path("subs/a.vtt").stat()
    assert main(call) == 1
    printed = capsys.readouterr().err
    assert "1 of 4 files are in subs already" in printed and "b.mp4: " in printed and "1 of 4 files failed" in printed
    shutil.copy(clip, folder / "b.mp4")
    assert main(call) == 0 and Path("subs/a.vtt").stat() == before and Path("subs/b.vtt").is_file()
    assert main([*call, "--model", "/not/loaded"]) == 0
    # Two clips that only differ in their suffix, and two that cannot be told apart.
    shutil.copy(clip, folder / "a.mkv")
    assert main(["caption", "clips/a.mkv", "clips/a.mp4", "--output", "two", "--format", "txt"]) == 0
    assert sorted(path.name for path in Path("two").iterdir()) == ["a.mkv.txt", "a.mp4.txt"]
    shutil.copy(clip, "a.mp4")
    assert main(["caption", "clips/a.mp4", "a.mp4", "--output", "two", "--format", "txt"]) == 1
    assert "clips/a.mp4 and a.mp4 would both be written to two/a.mp4.txt" in capsys.readouterr().err


def test_formats_on_the_terminal(folder, capsys):
    assert main(["caption", "clips/a.mp4", "--format", "srt", "--quiet"]) == 0
    assert capsys.readouterr().out.startswith("1\n00:00:00,000 --> 00:00:05,000\n")
    assert main(["caption", "clips", "--format", "csv", "--quiet"]) == 1
    rows = capsys.readouterr().out.splitlines()
    assert rows[0] == "file,start,end,text,silent,error" and len(rows) == 5
    assert main(["caption", "clips/b.mp4", "--format", "srt", "--quiet"]) == 1
    assert not capsys.readouterr().out


def test_finer_windows_and_a_part(folder, capsys):
    def chunks(*options):
        assert main(["caption", "clips/a.mp4", "--format", "json", *options]) == 0
        return json.loads(capsys.readouterr().out)[0]["chunks"]

    ends = [chunk["timestamp"] for chunk in chunks("--window", "2", "--format", "json")]
    assert ends == [[0, 2], [2, 4], [4, 5]]
    merged = chunks("--window", "2", "--hop", "1", "--start", "0.5", "--end", "4.5")
    assert merged[0]["timestamp"][0] == 0.5 and merged[-1]["timestamp"][1] == 4.5
    for one, other in zip(merged, merged[1:]):
        assert one["timestamp"][1] == other["timestamp"][0] and one["text"] != other["text"]
    for options, reason in (
        (["--window", "60"], "--window must be between 0.5 and 5.12 s here, got 60"),
        (["--window", "2", "--hop", "3"], "--hop must be between 0.5 and 2 s here, got 3"),
    ):
        assert main(["caption", "clips/a.mp4", *options]) == 1
        assert reason in capsys.readouterr().err


def test_shards_of_webdataset(folder, capsys):
    with tarfile.open(folder / "shard.tar", "w") as shard:
        for name, file in (("x/1.mp4", "a.mp4"), ("x/2.mp4", "b.mp4"), ("3.mp4", "c.MP4")):
            shard.add(folder / file, name)
    call = ["caption", "clips/shard.tar", "--output", "all.jsonl", "--output", "subs", "--format", "srt"]
    for workers in ("0", "2"):
        assert main([*call, "--workers", workers]) == 1
        lines = read("all.jsonl")
        assert [line["file"] for line in lines] == [
            f"clips/shard.tar/{name}" for name in ("x/1.mp4", "x/2.mp4", "3.mp4")
        ]
        assert lines[0]["text"] == lines[2]["text"] and "clips/shard.tar/x/2.mp4: " in lines[1]["error"]
        assert sorted(map(str, Path("subs").rglob("*.srt"))) == ["subs/shard.tar/3.srt", "subs/shard.tar/x/1.srt"]
        Path("all.jsonl").unlink()
    assert len(find_media(["clips", "clips/shard.tar"])) == len(NAMES) + 3
    (folder / "shard.tar").write_bytes((folder / "shard.tar").read_bytes()[:2000])
    assert main(call) == 1
    assert "clips/shard.tar: cannot be read as an uncompressed .tar archive" in capsys.readouterr().err


def test_names_are_paths_if_they_are_there(clip, tmp_path, monkeypatch, capsys):
    """A file called like a URL of another one."""
    (tmp_path / "here").mkdir()
    shutil.copy(clip, tmp_path / "other.mp4")
    monkeypatch.chdir(tmp_path / "here")
    name = "file:%2e%2e%2fother.mp4"
    Path(name).write_bytes(b"no video at all" * 50)
    for given in (".", name):
        assert main(["caption", given]) == 1
        printed = capsys.readouterr()
        assert not printed.out and f"{name}: " in printed.err
    Path(name).unlink()
    assert main(["caption", name]) == 0, "where there is no such file it is the URL that it looks like"


def test_names_reach_the_terminal_escaped(clip, tmp_path, monkeypatch):
    """Escape sequences, bidirectional overrides and bytes that are not UTF-8, in good and in bad files."""
    monkeypatch.chdir(tmp_path)
    good, bad = ["\x1b[2Ja.mp4", "b\r\nb.mp4", "\u202ec.mp4", "\udcff.mp4"], "d\x1b]0;title\x07.mp4"
    for name in good:
        os.link(clip, name)
    Path(bad).write_bytes(b"no video" * 99)
    environment = {**os.environ, "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii:strict"}
    call = [sys.executable, "-m", "evacap", "caption", "."]
    done = subprocess.run(call, capture_output=True, env=environment, timeout=300, text=True)
    assert done.returncode == 1
    # The progress of loading has carriage returns.
    assert not {
        character for character in done.stdout + done.stderr.replace("\r", "") if not " " <= character <= "~"
    } - {"\n"}
    for shown in (r"\x1b[2Ja.mp4", r"b\r\nb.mp4", r"\u202ec.mp4", r"\xff.mp4"):
        assert f"\n{shown}: " in f"\n{done.stdout}"
    assert r"d\x1b]0;title\x07.mp4" in done.stderr
    assert main(["caption", ".", "--output", "captions.jsonl"]) == 1
    assert sorted(line["file"] for line in read("captions.jsonl")) == sorted([*good, bad])


def test_a_folder_cannot_ask_to_run_its_code(tmp_path, monkeypatch, capsys):
    """Whatever a model folder says of itself, nobody is asked and nothing of it is run."""
    asked, trace = [], tmp_path / "trace"
    monkeypatch.setattr("builtins.input", lambda *text: asked.append(text) or "y")
    auto = dict.fromkeys(("AutoConfig", "AutoModel", "AutoProcessor", "AutoTokenizer"), "evil.Evil")
    configs = {"model_type": "evil", "processor_class": "Evil", "tokenizer_class": "Evil", "auto_map": auto}
    for name in ("config", "processor_config", "preprocessor_config", "tokenizer_config"):
        (tmp_path / f"{name}.json").write_text(json.dumps(configs))
    (tmp_path / "evil.py").write_text(f"open({str(trace)!r}, 'w')")
    (tmp_path / "clips.jsonl").write_text('{"id": "a", "audio": "a.wav", "caption": "a"}')
    monkeypatch.chdir(tmp_path)
    Path("x.mp4").touch()
    for call in (
        ["caption", "x.mp4", "--model", str(tmp_path)],
        [
            "prepare",
            "--manifest",
            str(tmp_path / "clips.jsonl"),
            "--output",
            str(tmp_path / "o"),
            "--model",
            str(tmp_path),
        ],
        ["publish", str(tmp_path), "--repo-id", "a/b", "--dry-run"],
    ):
        assert main(call) == 1
        assert capsys.readouterr().err.startswith(f"evacap {call[0]}: ")
    # With a model that is EVACap's, but for one part.
    for part in ("processor_config", "tokenizer_config"):
        mixed = Path(shutil.copytree(evacap.TINY, tmp_path / part))
        shutil.copy(tmp_path / f"{part}.json", mixed)
        main(["caption", "x.mp4", "--model", str(mixed)])
        with suppress(Exception):
            load_processor(mixed)
    assert not asked and not trace.exists()


HOLDER = """
import sys, time
from evacap.training.files import locked
with locked("captions.jsonl"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_one_call_at_a_time_writes_an_output(folder, capsys):
    assert main(["caption", "clips", "--output", "captions.jsonl"]) == 1
    before = Path("captions.jsonl").read_bytes()
    holder = subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        for options in ([], ["--retry-failed"]):
            capsys.readouterr()
            assert main(["caption", "clips", "--output", "captions.jsonl", *options]) == 1
            assert f"captions.jsonl is being written by process {holder.pid} on " in capsys.readouterr().err
            assert Path("captions.jsonl").read_bytes() == before
    finally:
        holder.kill()
        holder.wait()
    assert main(["caption", "clips/a.mp4", "--output", "captions.jsonl"]) == 0


def test_half_a_line_is_cut_off(tmp_path):
    path, line = tmp_path / "captions.jsonl", b'{"file": "a.mp4", "text": "a"}\n'
    assert open_results(path)[1] == {} and not path.exists()
    for length in range(len(line)):
        path.write_bytes(line + line[:length])
        assert open_results(path)[1] == {"a.mp4": {"text": "a"}}
        assert path.read_bytes() == line


def test_which_sound_is_heard(tmp_path, monkeypatch):
    """Of the two tracks the first is silent, and so is the first channel of the other file."""
    monkeypatch.chdir(tmp_path)
    sound = tones(1)
    write_clip(
        Path("stereo.wav"),
        video=None,
        audio="pcm_s16le",
        rate=16000,
        layout="stereo",
        sound=np.vstack([0 * sound, sound]),
    )
    with av.open("tracks.mkv", "w") as container:
        voices = [container.add_stream("flac", rate=16000, layout="mono") for _ in range(2)]
        for loudness, voice in enumerate(voices):
            frame = av.AudioFrame.from_ndarray(loudness * sound, format="flt", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 16000, 0, Fraction(1, 16000)
            for packet in [*voice.encode(frame), *voice.encode(None)]:
                container.mux(packet)

    def results(*options):
        assert main(["caption", *options, "--output", "heard.jsonl"]) == int("2" in options)
        found = read("heard.jsonl")
        Path("heard.jsonl").unlink()
        return found

    (average,), (first,) = results("stereo.wav"), results("stereo.wav", "--channels", "first")
    assert "silent" not in average and first["silent"]
    for workers in ("0", "1"):
        (zero,) = results("tracks.mkv", "--audio-track", "0", "--workers", workers)
        (one,) = results("tracks.mkv", "--audio-track", "1", "--workers", workers)
        assert zero["silent"] and "silent" not in one
    (two,) = results("tracks.mkv", "--audio-track", "2")
    assert "tracks.mkv: has 2 sound tracks, counted from 0, and no number 2" in two["error"]


def wait_for(condition: Callable[[], object]) -> object:
    """What `condition` returns once it is true; the limit is only there to end a test that hangs."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        result = condition()
        if result:
            return result
        time.sleep(0.05)
    raise TimeoutError(condition)


def open_when_read(fifo: str) -> int | None:
    """The writing end of a pipe, once a process reads it."""
    try:
        return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return None


@pytest.fixture
def stuck(folder):
    """The command at a pipe from which nothing comes, between two clips; the first one is done."""
    os.mkfifo("clips/b")
    names = ["clips/a.mp4", "clips/b", "clips/c.MP4"]
    options = ["--output", "captions.jsonl", "--workers", "1", "--batch-size", "1"]
    process = subprocess.Popen([sys.executable, "-m", "evacap", "caption", *names, *options])
    pipe = None
    try:
        pipe = wait_for(lambda: open_when_read("clips/b"))
        wait_for(lambda: Path("captions.jsonl").exists() and len(read("captions.jsonl")) == 1)
        yield process, [sys.executable, "-m", "evacap", "caption", names[0], names[2], *options]
    finally:
        if pipe is not None:
            os.close(pipe)
        process.kill()
        process.wait()


needs_fork = pytest.mark.skipif(
    multiprocessing.get_start_method() != "fork", reason="the reading process must be a child of the command"
)


@needs_fork
def test_a_clip_at_which_ffmpeg_does_not_return_loses_no_other(folder, shared, monkeypatch, capfd):
    # FFmpeg searches in it for seconds before it asks for more.
    shutil.copyfile(shared("faults/hostile/slow_open.mp4"), "clips/b.mp4")
    monkeypatch.setattr(media_evacap, "SECONDS_A_WINDOW", 0.5)
    names = ["clips/a.mp4", "clips/b.mp4", "clips/c.MP4"]
    options = ["--output", "captions.jsonl", "--workers", "1", "--batch-size", "1"]
    assert main(["caption", *names, *options]) == 1
    lines = read("captions.jsonl")
    assert [line["file"] for line in lines] == names
    assert lines[0]["text"] == lines[2]["text"] != ""
    assert lines[1].keys() == {"file", "error"} and len(lines[1]["error"].splitlines()) == 1
    assert "b.mp4: reading it takes more than 1 s; its process is ended" in capfd.readouterr().err


@pytest.mark.slow
@needs_fork
def test_after_kill_9(stuck):
    process, call = stuck
    process.kill()
    process.wait()
    before = read("captions.jsonl")
    assert subprocess.run(call).returncode == 0
    lines = read("captions.jsonl")
    assert lines[:1] == before and [line["file"] for line in lines] == ["clips/a.mp4", "clips/c.MP4"]


@pytest.mark.slow
@needs_fork
def test_a_call_beside_a_running_one_is_refused(stuck):
    process, call = stuck
    before = Path("captions.jsonl").read_bytes()
    for options in ([], ["--retry-failed"]):
        done = subprocess.run([*call, *options], capture_output=True, text=True)
        assert done.returncode == 1 and f"is being written by process {process.pid} on " in done.stderr
        assert Path("captions.jsonl").read_bytes() == before


@pytest.mark.slow
@needs_fork
def test_a_clip_that_ends_its_reader_loses_no_other(stuck):
    process, _ = stuck
    (reader,) = psutil.Process(process.pid).children()
    reader.kill()
    # It is read once more, alone; the clips after it are not lost.
    (alone,) = wait_for(lambda: [child for child in psutil.Process(process.pid).children() if child != reader])
    alone.kill()
    assert process.wait(timeout=120) == 1
    lines = read("captions.jsonl")
    assert [line["file"] for line in lines] == ["clips/a.mp4", "clips/b", "clips/c.MP4"]
    assert "ended the process that read it" in lines[1]["error"] and lines[2]["text"] == lines[0]["text"]

"""`make fuzz`, a little of it."""

import json
import subprocess
import sys
from pathlib import Path

import fuzz_media
import pytest
from media_files import tones, write_clip


def test_the_judge_finds_what_is_wrong(tmp_path):
    """The sequential decode that it compares with goes on behind a hole, and where the channels change."""
    half = {"video": None, "audio": "libmp3lame", "rate": 48000}
    parts = [
        write_clip(tmp_path / "one.mp3", sound=tones(3, 48000), **half),
        write_clip(tmp_path / "two.mp3", sound=tones(3, 48000, first=3).repeat(2, 0), layout="stereo", **half),
    ]
    joined = tmp_path / "joined.mp3"
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    clip = write_clip(tmp_path / "clip.mkv", seconds=6, audio="flac", rate=48000, sound=tones(6, 48000))
    data = bytearray(clip.read_bytes())
    where = len(data) // 4
    data[where : where + 4000] = b"\x55" * 4000
    clip.write_bytes(data)
    for path in (joined, clip):
        found = fuzz_media.ours(str(path))
        right = fuzz_media.reference(str(path), found)
        assert right["sounds"][5][1] == 5
        assert fuzz_media.judge(found, right) in ("whole", "damaged")
        for kind, value, outcome in (("sounds", 4, "off"), ("sounds", None, "lost"), ("pictures", 7, "off")):
            if found[kind]:
                wrong = {**found, kind: [*found[kind][:5], (found[kind][5][0], value), *found[kind][6:]]}
                assert fuzz_media.judge(wrong, right) == outcome


@pytest.mark.slow
def test_it_goes_on_where_it_stopped_and_finds_nothing(tmp_path):
    output = tmp_path / "fuzz.jsonl"
    command = [sys.executable, str(Path(__file__).with_name("fuzz_media.py")), "--seed", "7", "--output", str(output)]
    subprocess.run([*command, "--count", "12"], check=True, timeout=600)
    output.write_bytes(output.read_bytes()[:-20])  # as a kill leaves it
    result = subprocess.run([*command, "--count", "44"], check=True, timeout=600, capture_output=True, text=True)
    assert sorted(json.loads(line)["number"] for line in output.read_text().splitlines()) == list(range(44))
    assert result.stdout.splitlines()[-1].startswith("| all | 44 |")

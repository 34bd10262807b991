"""`make fuzz`, a little of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_it_goes_on_where_it_stopped_and_finds_nothing(tmp_path):
    output = tmp_path / "fuzz.jsonl"
    command = [sys.executable, str(Path(__file__).with_name("fuzz_media.py")), "--seed", "7", "--output", str(output)]
    subprocess.run([*command, "--count", "12"], check=True, timeout=600)
    output.write_bytes(output.read_bytes()[:-20])  # as a kill leaves it
    result = subprocess.run([*command, "--count", "44"], check=True, timeout=600, capture_output=True, text=True)
    assert sorted(json.loads(line)["number"] for line in output.read_text().splitlines()) == list(range(44))
    assert result.stdout.splitlines()[-1].startswith("| all | 44 |")

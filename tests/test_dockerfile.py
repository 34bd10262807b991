"""The Dockerfile fits the repository, as far as that can be seen without a container."""

import fnmatch
import json
import re
import subprocess
from pathlib import Path

import pytest

from evacap import cli
from evacap.commands import demo


ROOT = Path(__file__).resolve().parents[1]
TEXT = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
LINES = [line.split(maxsplit=1) for line in TEXT.splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize("command", [rest for name, rest in LINES if name == "RUN"])
def test_commands_are_valid_shell(command):
    assert subprocess.run(["bash", "-n", "-c", command], capture_output=True).returncode == 0


def test_the_page_is_served_at_the_exposed_port(monkeypatch):
    words = {name: rest for name, rest in LINES if name in ("ENTRYPOINT", "CMD", "EXPOSE")}
    assert json.loads(words["ENTRYPOINT"]) == ["evacap"]
    served = []
    monkeypatch.setattr(demo, "run", served.append)
    assert cli.main(json.loads(words["CMD"])) == 0
    assert served[0].port == int(words["EXPOSE"]) and served[0].host == "0.0.0.0"


def test_the_image_gets_what_its_commands_need():
    rules = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    given = {rule[1:] for rule in rules if rule.startswith("!")}
    assert rules[0] == "*" and all((ROOT / name).exists() for name in given)
    # What setup.py reads and installs, and the file that pip is told.
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "constraints.txt"} <= given
    for folder in ("evacap", "modeling_evacap", "processing", "training"):
        assert folder in given and not any(fnmatch.fnmatch(folder, rule) for rule in rules[1:] if rule[0] != "!")

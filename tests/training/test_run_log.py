import os
import subprocess
from pathlib import Path

import pytest

from evacap.training.run_log import _git_commit


def git(*arguments: str) -> str:
    options = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    return subprocess.run(["git", *options, *arguments], check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert _git_commit() is None
    git("init", "--quiet")
    assert _git_commit() is None, "there is no commit yet"
    Path("file").write_text("a")
    git("add", "file")
    git("commit", "--quiet", "--message", "a")
    return tmp_path


def test_the_commit_and_changes(repository):
    commit = git("rev-parse", "HEAD")
    assert _git_commit() == commit
    Path("untracked").write_text("b")
    assert _git_commit() == commit
    Path("file").write_text("b")
    assert _git_commit() == f"{commit}+changes"


def test_no_command_of_a_repository_is_run(repository):
    """All that git runs by itself, of what the repository says, to look at its files; and one in a submodule."""
    script = repository.parent / "script"
    trace = repository.parent / "trace"
    script.write_text(f"#!/bin/sh\ntouch {trace}\ncat\n")
    script.chmod(0o755)
    subprocess.run(["git", "clone", "--quiet", ".", "sub"], check=True)
    git("-c", "protocol.file.allow=always", "submodule", "--quiet", "add", "./sub", "sub")
    Path(".gitattributes").write_text("* filter=evil diff=evil\n")
    git("add", ".")
    git("commit", "--quiet", "--message", "b")
    hooks = repository.parent / "hooks"
    hooks.mkdir()
    for name in ("post-index-change", "fsmonitor-watchman", "reference-transaction", "post-checkout"):
        (hooks / name).symlink_to(script)
    settings = {
        "core.fsmonitor": script,
        "core.hooksPath": hooks,
        "filter.evil.clean": script,
        "filter.evil.smudge": script,
        "filter.evil.process": script,
        "filter.evil.required": "true",
        "diff.evil.textconv": script,
        "diff.evil.command": script,
        "diff.external": script,
        "core.pager": script,
        "alias.status": f"!{script}",
        "alias.rev-parse": f"!{script}",
    }
    for folder in (".", "sub"):
        for name, value in settings.items():
            git("-C", folder, "config", name, str(value))
    # Times that make git look at the content again.
    for path in (Path("file"), Path("sub/file")):
        os.utime(path, (1, 1))
    trace.unlink(missing_ok=True)
    commit = _git_commit()
    assert not trace.exists()
    assert len(commit.removesuffix("+changes")) == 40
    subprocess.run(["git", "status"], capture_output=True)
    assert trace.exists(), "a plain status runs them"

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_runs import forget_accelerator

import evacap
from evacap.cli import COMMANDS, main
from evacap.commands import sample


@pytest.fixture
def clip(tmp_path, capsys) -> str:
    path = tmp_path / "clips" / "sample.mp4"
    assert main(["sample", str(path), "--seed", "3"]) == 0
    assert str(path) in capsys.readouterr().out
    return str(path)


def test_help_lists_the_commands_and_each_has_its_own(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    listed = capsys.readouterr().out
    for name in COMMANDS:
        assert name in listed
        with pytest.raises(SystemExit) as stopped:
            main([name, "--help"])
        assert stopped.value.code == 0
        assert f"evacap {name}" in capsys.readouterr().out


def test_the_bare_command_lists_the_commands_with_a_line_each(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([]) == 2
    lines = capsys.readouterr().err.splitlines()
    for name, summary in COMMANDS.items():
        assert [line for line in lines if line.split() == [name, *summary.split()]], name


def test_a_wrong_call_ends_with_2(capsys):
    for call in (
        ["nothing"],
        ["caption"],
        ["caption", "clip.mp4", "--beams", "0"],
        ["caption", "clip.mp4", "--temperature", "0"],
    ):
        with pytest.raises(SystemExit) as stopped:
            main(call)
        assert stopped.value.code == 2


def test_the_same_seed_writes_the_same_sample(clip, tmp_path):
    assert main(["sample", str(tmp_path / "again.mp4"), "--seed", "3"]) == 0
    with open(clip, "rb") as first, open(tmp_path / "again.mp4", "rb") as second:
        assert first.read() == second.read()


def test_caption_with_the_bundled_checkpoint(clip, capsys):
    assert main(["caption", clip]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{clip}: ")
    assert "gate 0." in printed.out and "attention entropy " in printed.out
    assert "loaded" in printed.err and "for trying" in printed.err and "%" not in printed.err
    assert main(["caption", clip, "--model", evacap.TINY]) == 0
    assert "for trying" not in capsys.readouterr().err
    assert main(["caption", clip, "--quiet"]) == 0
    quiet = capsys.readouterr()
    assert quiet.out == printed.out.splitlines()[0] + "\n" and not quiet.err


def test_generation_options(clip, capsys):
    def text(*options):
        assert main(["caption", clip, "--json", *options]) == 0
        return json.loads(capsys.readouterr().out)["text"]

    caption = text()
    assert text("--beams", "1", "--threads", "1") and torch.get_num_threads() == 1
    assert text("--max-new-tokens", "2") == " ".join(caption.split()[:2])
    assert len({text("--temperature", "3") for _ in range(4)}) > 1


def test_standard_input(clip, capsys, monkeypatch):
    assert main(["caption", clip, "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)
    with open(clip, "rb") as file:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(file.read())))
    assert main(["caption", "-", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == expected | {"file": "-"}


def test_missing_files_are_noticed_before_the_model_is_loaded(clip, tmp_path, capsys, monkeypatch):
    broken = str(tmp_path)
    assert main(["caption", "nowhere.mp4", "--model", broken]) == 1
    assert capsys.readouterr().err == "evacap caption: nowhere.mp4: there is no such file; check the path\n"
    assert main(["check", "a.mp4", "b.mp4", "--model", broken]) == 1
    assert "there is none of the 2 files, such as a.mp4" in capsys.readouterr().err
    assert main(["caption", "nowhere.mp4", clip, "--model", broken]) == 1
    first, *_, last = capsys.readouterr().err.splitlines()
    assert "nowhere.mp4: there is no such file; the others are read" in first and "cannot be loaded" in last


def test_a_model_that_is_not_there(clip, capsys):
    for model in ("/missing", "./missing", "runs/missing/model", "~/missing"):
        assert main(["caption", clip, "--model", model]) == 1
        assert capsys.readouterr().err.endswith(f"{model}: there is no such model folder; check the path\n")
    assert main(["caption", clip, "--model", clip]) == 1
    assert "sample.mp4 is a file. Give the model folder" in capsys.readouterr().err
    assert main(["caption", clip, "--model", "runs/missing"]) == 1
    assert "(there is no such folder here, so it is a name on the Hub)" in capsys.readouterr().err


def test_the_shell_completes(tmp_path):
    pytest.importorskip("argcomplete")

    def completions(line: str) -> set[str]:
        found = tmp_path / "completions"
        environment = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": " "}
        environment |= {"_ARGCOMPLETE_STDOUT_FILENAME": str(found), "_ARGCOMPLETE_SHELL": "bash"}
        subprocess.run([sys.executable, "-m", "evacap"], env=os.environ | environment, timeout=120)
        return set(found.read_text().split())

    assert completions("evacap ca") == {"caption"}
    assert completions("evacap caption --te") == {"--temperature"}


def test_one_bad_file_leaves_the_others_and_the_exit_status_tells(clip, tmp_path, capsys):
    bad = tmp_path / "bad.mp4"
    bad.write_text("no media at all")
    assert main(["caption", str(bad), clip, str(tmp_path / "missing.mp4"), "--json"]) == 1
    printed = capsys.readouterr()
    results = [json.loads(line) for line in printed.out.splitlines()]
    assert [result["file"] for result in results] == [str(bad), clip, str(tmp_path / "missing.mp4")]
    assert ["error" in result for result in results] == [True, False, True]
    assert str(bad) in results[0]["error"] and "missing.mp4" in results[2]["error"]
    assert len(results[1]["gate"]) == len(results[1]["times"]) > 0


def test_an_error_is_one_line(clip, tmp_path, capsys):
    nowhere = str(tmp_path / "nowhere")
    calls = (
        (["caption", clip, "--model", nowhere], nowhere),
        (["caption", clip, "--device", "abacus"], "abacus"),
        (["sample", str(tmp_path)], str(tmp_path)),
        (["sample", str(tmp_path / "clip.txt")], "clip.txt"),
    )
    for call, named in calls:
        assert main(call) == 1
        printed = capsys.readouterr().err.strip().splitlines()
        assert printed[-1].startswith(f"evacap {call[0]}: ") and named in printed[-1]


def test_the_command_is_installed(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "evacap", "sample", "clip.mp4"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "clip.mp4").stat().st_size > 10_000
    assert sample.__doc__


DAMAGED = [
    ("model.safetensors", lambda content: content[: len(content) // 2]),
    ("model.safetensors", lambda content: b""),
    ("model.safetensors", lambda content: bytes(len(content))),
    ("config.json", lambda content: b"[]"),
    ("config.json", lambda content: b"3"),
    ("config.json", lambda content: b"\xff\xfe"),
    ("config.json", lambda content: content[:-40]),
    ("processor_config.json", lambda content: b"[]"),
    ("processor_config.json", lambda content: b'{"feature_extractor": 3}'),
    ("tokenizer.json", lambda content: b"[]"),
    ("tokenizer.json", lambda content: content[:100]),
    ("tokenizer_config.json", lambda content: b"[]"),
]


@pytest.mark.parametrize("name, damage", DAMAGED)
def test_a_damaged_model_folder_is_a_sentence(name, damage, tmp_path, capsys):
    folder = Path(shutil.copytree(evacap.TINY, tmp_path / "model"))
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    (tmp_path / "clips.jsonl").write_text('{"id": "a", "media": "a.mp4", "caption": "a dog"}')
    (tmp_path / "a.mp4").touch()
    output = ["--output", str(tmp_path / "out")]
    calls = {
        "caption": [str(tmp_path / "a.mp4"), "--model", str(folder)],
        "prepare": ["--manifest", str(tmp_path / "clips.jsonl"), "--model", str(folder), *output],
        "train": ["tiny", "model.preset=evacap-agreement", f"model.start={folder}", f"output={tmp_path / 'run'}"],
        "check-install": [str(folder)],
    }
    if name == "model.safetensors":
        calls.pop("prepare")
    forget_accelerator()
    for command, arguments in calls.items():
        assert main([command, *arguments]) == 1
        message = capsys.readouterr().err.splitlines()[-1]
        assert message.startswith(f"evacap {command}: {folder}") and "cannot be loaded" in message


def test_an_error_without_a_message_is_told(monkeypatch, capsys):
    """Of `MemoryError` the text is empty."""
    for error, expected in ((MemoryError(), "out of memory. Close"), (RuntimeError(), "RuntimeError")):

        def fail(arguments, error=error):
            raise error

        monkeypatch.setattr("evacap.commands.sample.run", fail)
        assert main(["sample", "x.mp4"]) == 1
        assert capsys.readouterr().err.startswith(f"evacap sample: {expected}")

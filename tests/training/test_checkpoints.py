import json
import os
import pickle
import random
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from training_runs import read_log, run, write_config

from evacap.training.checkpoints import TrainingState, load_states, random_states, save_states, set_random_states
from evacap.training.files import locked


@pytest.fixture
def config(tmp_path) -> Path:
    return write_config(tmp_path / "a.yaml", {"optimization": {"max_steps": 6, "epochs": 3}})


def checkpoints(config: Path) -> list[Path]:
    return sorted((config.with_suffix("") / "checkpoints").iterdir())


def test_the_newest_are_kept_and_leftovers_are_removed(config):
    assert run(config, "saving.every_steps=1", "saving.keep=2") == 0
    assert [path.name for path in checkpoints(config)] == ["step-00000005", "step-00000006"]
    leftovers = [checkpoints(config)[0].with_name(name) for name in (".step-00000007.partial", ".step-00000004.old")]
    for folder in leftovers:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
    assert run(config) == 0
    assert not any(folder.exists() for folder in leftovers)


def test_a_missing_or_cut_file_is_named(config):
    assert run(config) == 0
    newest = checkpoints(config)[-1]
    optimizer = newest / "optimizer.safetensors"
    optimizer.write_bytes(optimizer.read_bytes()[:-10])
    with pytest.raises(
        FileNotFoundError, match=r"optimizer.safetensors has \d+ bytes instead of \d+. Remove .*step-00000006"
    ):
        run(config)
    optimizer.unlink()
    with pytest.raises(FileNotFoundError, match="optimizer.safetensors is missing"):
        run(config)
    for content in (None, "half a f", "[]", '{"files": 3}'):
        (newest / "contents.json").unlink() if content is None else (newest / "contents.json").write_text(content)
        with pytest.raises(FileNotFoundError, match="contents.json cannot be read"):
            run(config)


def test_a_damaged_file_of_the_right_size_is_named(config):
    assert run(config) == 0
    files = [path for path in checkpoints(config)[-1].iterdir() if path.name != "contents.json"]
    assert sorted(path.name for path in files) == [
        "model.safetensors",
        "optimizer.safetensors",
        "progress.json",
        "random_states_0.safetensors",
    ]
    for path in files:
        whole = path.read_bytes()
        for damaged in (bytes(len(whole)), whole[:-1] + bytes([whole[-1] ^ 1])):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=rf"{path.name} is damaged.*Remove .*step-00000006"):
                run(config)
        path.write_bytes(whole)
    assert run(config) == 0


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mknod, (str(self.path),)


def test_no_pickle_is_loaded(config, tmp_path):
    assert run(config) == 0
    newest, trace = checkpoints(config)[-1], tmp_path / "trace"
    pickles = ("custom_checkpoint_0.pkl", "random_states_0.pkl", "optimizer.bin", "scheduler.bin", "scaler.pt")
    for name in pickles:
        (newest / name).write_bytes(pickle.dumps(Touch(trace)))
    assert run(config) == 0 and not trace.exists()
    # What was written before there were checksums.
    sizes = {path.name: path.stat().st_size for path in newest.iterdir() if path.name != "contents.json"}
    (newest / "contents.json").write_text(json.dumps({"num_processes": 1, "files": sizes}))
    with pytest.raises(
        ValueError, match="pickled objects that could run any code.*in a new `output`, with `model.start`"
    ):
        run(config)
    assert not trace.exists()


def test_states_come_back_to_the_bit(tmp_path):
    table = torch.randn(3, 2).bfloat16()
    states = {"a.b": table, "tied": table, "step": torch.tensor(3.0), "groups": [{"lr": 0.1 + 0.2, "betas": [0.9]}]}
    save_states(states, tmp_path / "file")
    loaded = load_states(tmp_path / "file")
    assert loaded["groups"] == states["groups"] and loaded.keys() == states.keys()
    assert all(torch.equal(loaded[name], states[name]) for name in ("a.b", "tied", "step"))

    before = random_states(torch.device("cpu"))
    save_states(before, tmp_path / "random")
    draws = [random.random(), np.random.normal(), torch.rand(3).tolist()]
    set_random_states(load_states(tmp_path / "random"), torch.device("cpu"))
    assert [random.random(), np.random.normal(), torch.rand(3).tolist()] == draws


def test_two_runs_in_one_folder(config):
    folder = config.with_suffix("")
    folder.mkdir()
    with locked(folder), pytest.raises(BlockingIOError, match=rf"a is being written by process {os.getpid()} on "):
        run(config)
    assert list(folder.iterdir()) == []
    assert run(config, "optimization.max_steps=1") == 0
    assert not (folder / ".lock").exists()


def test_another_number_of_processes_is_said(config):
    assert run(config) == 0
    contents = checkpoints(config)[-1] / "contents.json"
    contents.write_text(json.dumps({**json.loads(contents.read_text()), "num_processes": 2}))
    with pytest.raises(ValueError, match="was made by 2 processes, but there are 1: launch as many"):
        run(config)


def test_a_full_disk_is_a_line_and_leaves_the_checkpoint_before(config):
    assert run(config, "optimization.max_steps=4") == 0
    (run_json := config.with_suffix("") / "run.json").write_text(
        run_json.read_text().replace('"max_steps": 4', '"max_steps": 6')
    )
    before = {path: path.read_bytes() for path in checkpoints(config)[-1].iterdir()}
    # The largest file that may be written stands for a disk that is full: the model's has more bytes.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"step-00000006 could not be written .*GB are free there.*make room"):
            run(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert {path: path.read_bytes() for path in checkpoints(config)[-1].iterdir()} == before
    assert run(config) == 0
    assert [line["step"] for line in read_log(config.with_suffix(""))] == [1, 2, 3, 4, 5, 6]


def test_a_line_that_was_cut_and_lines_of_later_steps_are_dropped(config):
    assert run(config) == 0
    log = config.with_suffix("") / "log.jsonl"
    whole = log.read_text()
    log.write_text(whole + '{"step": 7, "loss": 1.0}\n{"step": 8, "lo')
    assert run(config) == 0
    assert log.read_text() == whole


def test_means_of_the_steps_since_the_last_line():
    state = TrainingState()
    for loss in (1.0, 2.0, 6.0):
        state.add({"loss": loss})
    restored = TrainingState()
    restored.load_state_dict(state.state_dict())
    assert restored.take_means() == {"loss": 3.0}
    restored.add({"loss": 5.0})
    assert restored.take_means() == {"loss": 5.0}

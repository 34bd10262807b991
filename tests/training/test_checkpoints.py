import json
import resource
import signal
from pathlib import Path

import pytest
from training_runs import read_log, run, write_config

from evacap.training.checkpoints import TrainingState


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
    optimizer = newest / "optimizer.bin"
    optimizer.write_bytes(optimizer.read_bytes()[:-10])
    with pytest.raises(FileNotFoundError, match=r"optimizer.bin has \d+ bytes instead of \d+. Remove .*step-00000006"):
        run(config)
    optimizer.unlink()
    with pytest.raises(FileNotFoundError, match="optimizer.bin is missing"):
        run(config)
    (newest / "contents.json").unlink()
    with pytest.raises(FileNotFoundError, match="contents.json cannot be read"):
        run(config)


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

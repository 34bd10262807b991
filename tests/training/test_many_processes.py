"""Two processes on processors (gloo) against one with the doubled batch."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import read_log, run, sum_of_objectives, write_config

from evacap.training.run_config import CONFIGS


pytestmark = pytest.mark.slow

TWO = {"optimization": {"batch_size": 2}}
# Without dropout, which draws other numbers in each process, and without swaps, which a process makes among its own
# clips: the paper's "within each mini-batch".
COMMON = [
    {
        "model": {
            "config": {"text_config": dict.fromkeys(["hidden_dropout_prob", "attention_probs_dropout_prob"], 0.0)}
        }
    },
    {"data": {"p_mix": 0.0}},
    # Nine clips: the last batch is not full, and one process gets clips that were there before.
    {"validation": {"every_steps": 4, "procedural": 9, "batch_size": 2, "metrics": ["rouge_l"]}},
]


def launch(config: Path, *target: str, launcher: str = "ddp") -> subprocess.Popen:
    options = [
        "--config_file",
        CONFIGS / "accelerate" / f"{launcher}.yaml",
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
    ]
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *options,
        *(target or ("-m", "evacap.training.train")),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*map(str, command), str(config)], env=environment, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> str:
    """Waits for the end and returns what it said."""
    try:
        return process.communicate(timeout=300)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        raise


def assert_same(folder: Path, reference: Path) -> None:
    log, expected = read_log(folder), read_log(reference)
    assert len(log) == len(expected) == 15
    for line, other in zip(log, expected, strict=True):
        assert line == pytest.approx(other, rel=1e-5)
    weights, others = (load_file(path / "model" / "model.safetensors") for path in (folder, reference))
    for name, value in others.items():
        torch.testing.assert_close(weights[name], value, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("one")
    assert run(write_config(folder / "one.yaml", *COMMON)) == 0
    return folder / "one"


def test_two_processes_are_one_with_the_doubled_batch(tmp_path, one):
    process = launch(write_config(tmp_path / "two.yaml", *COMMON, TWO))
    said = finish(process)
    assert process.returncode == 0, said
    assert_same(tmp_path / "two", one)


def test_fsdp_is_the_same_and_resumes(tmp_path, one):
    config = write_config(tmp_path / "two.yaml", *COMMON, TWO)
    script = str(Path(__file__).parents[1] / "fsdp_on_cpu.py")
    for _ in range(2):
        process = launch(config, script, launcher="fsdp")
        said = finish(process)
        assert process.returncode == 0, said
        assert_same(tmp_path / "two", one)
        assert "going on after step 8" in said or _ == 0
        # The second time it goes on from the checkpoint in the middle.
        shutil.rmtree(tmp_path / "two" / "checkpoints" / "step-00000012")
        shutil.rmtree(tmp_path / "two" / "model")


def test_the_heads_of_the_objectives_learn_on_two_processes(tmp_path):
    # Each process tells its own pictures from those of its own batch: other pairs than one process has.
    path = write_config(tmp_path / "a.yaml", {"model": {"preset": "evacap-caste-losses"}})
    process = launch(path)
    said = finish(process)
    assert process.returncode == 0, said
    for line in read_log(tmp_path / "a"):
        assert line["loss"] == pytest.approx(sum_of_objectives(line), rel=1e-4) and line["matching_loss"] > 0


def test_sigterm_to_the_launcher_saves_a_checkpoint(tmp_path):
    config = write_config(
        tmp_path / "two.yaml", *COMMON, TWO, {"optimization": {"epochs": 500}, "saving": {"every_steps": 5000}}
    )
    process, log = launch(config), tmp_path / "two" / "log.jsonl"
    while process.poll() is None and not log.exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = finish(process)
    assert "stopped after step" in said
    (checkpoint,) = (tmp_path / "two" / "checkpoints").iterdir()
    assert (checkpoint / "random_states_1.safetensors").exists()


def test_a_failing_process_takes_the_others_along(tmp_path):
    config = write_config(tmp_path / "two.yaml", *COMMON, TWO, {"optimization": {"epochs": 500}})
    process, log = launch(config), tmp_path / "two" / "log.jsonl"
    while process.poll() is None and not log.exists():
        time.sleep(0.05)
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=True
    )
    children = [int(pid) for pid in listed.stdout.split()]
    assert len(children) == 2
    os.kill(children[1], signal.SIGKILL)
    finish(process)
    assert process.returncode != 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)

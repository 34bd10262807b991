"""`evacap evaluate` on prepared clips: whole, wrong, killed, and on two processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from accelerate.state import AcceleratorState, GradientState

import evacap
from evacap.cli import main
from evacap.commands.evaluate import name_checkpoints
from evacap.training.procedural.scenes import write_dataset
from evacap.training.run_config import CONFIGS


NUM_CLIPS = 6
AUDIO_ONLY = str(Path(evacap.TINY).with_name("tiny_audio_only"))


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(autouse=True)
def accelerate_state():
    """Accelerate keeps its settings as long as a process lives."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    manifest = write_dataset(folder / "clips", "test", NUM_CLIPS, seed=0, size=64)
    # A clip that has a sound alone.
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    lines[2]["audio"] = lines[2].pop("media")
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["--manifest", manifest, "--model", evacap.TINY, "--output", folder / "prepared", "--workers", "1"]
    assert main(["prepare", *map(str, arguments), "--split", "test"]) == 0
    return folder / "prepared"


def run(prepared: Path, output: Path, *options: str, checkpoints: tuple[str, ...] = (evacap.TINY,)) -> int:
    fixed = ["--data", str(prepared), "--output", str(output), "--workers", "0", "--resamples", "50"]
    return main(["evaluate", *map(str, checkpoints), *fixed, "--metrics", "rouge_l", "--beams", "1", *options])


def read(output: Path) -> dict:
    return json.loads((output / "evaluation.json").read_text())


def test_tables_and_files(prepared, tmp_path, capsys):
    options = ["--shuffle", "0.5", "1", "--frames", "0", "--samples", "1"]
    checkpoints = (f"EVACap={evacap.TINY}", AUDIO_ONLY)
    assert run(prepared, tmp_path / "out", *options, checkpoints=checkpoints) == 0
    said = capsys.readouterr().out
    assert "EVACap           100 % swapped" in said and "tiny_audio_only" in said and "ROUGE-L" in said
    evaluation = read(tmp_path / "out")
    assert (evaluation["clips"], evaluation["with_picture"]) == (NUM_CLIPS, NUM_CLIPS - 1)
    assert evaluation["dataset"] == "prepared (test)"
    conditions = evaluation["checkpoints"]["EVACap"]["conditions"]
    assert [condition["swapped"] for condition in conditions] == [0, 3, 5, 0]
    for condition in conditions:
        assert condition["clips"][2]["video"] is None and condition["clips"][2]["gate"] == 0
    assert (tmp_path / "out" / "evaluation.md").exists()


def test_max_clips_and_another_share_later(prepared, tmp_path):
    assert run(prepared, tmp_path, "--max-clips", "3", "--shuffle", "0") == 0
    captions = tmp_path / "tiny" / "captions-0.jsonl"
    before = captions.read_text()
    assert run(prepared, tmp_path, "--max-clips", "3", "--shuffle", "0", "1") == 0
    assert captions.read_text().startswith(before)
    assert len(captions.read_text().splitlines()) == 3 + 2
    assert read(tmp_path)["clips"] == 3


@pytest.mark.parametrize(
    "change, message",
    [
        (["--split", "train"], "has no split 'train'"),
        (["--data", "nowhere"], "there is no such file; make the folder with `evacap prepare`"),
        (["--frames", "9"], "`frames.num_frames` is 8 there and 9 here"),
        (["--shuffle", "1.5"], "a share of 1.5"),
        (["--max-clips", "1"], "there is none to shuffle"),
    ],
)
def test_wrong_calls_are_a_line(change, message, prepared, tmp_path, capsys):
    assert run(prepared, tmp_path / "out", *change) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("evacap evaluate: ")]
    assert message in line


def test_a_damaged_picture_is_a_line(prepared, tmp_path, capsys):
    (source,) = (prepared / "data").glob("*.parquet")
    (tmp_path / "damaged" / "data").mkdir(parents=True)
    table = pq.read_table(source)
    frames = table.column("frames").to_pylist()
    frames[4][0] = b"no JPEG"
    place = table.schema.get_field_index("frames")
    table = table.set_column(place, table.schema.field(place), pa.array(frames, table.schema.field(place).type))
    pq.write_table(table, tmp_path / "damaged" / "data" / source.name)
    (tmp_path / "damaged" / "preparation.json").write_text((prepared / "preparation.json").read_text())
    assert run(tmp_path / "damaged", tmp_path / "out", "--shuffle", "0", "--workers", "1") == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("evacap evaluate: ")]
    assert "clip 'test-0-000004' cannot be read" in line and "Traceback" not in line


def test_names_of_checkpoints(tmp_path):
    for name in ("a/model", "b/model", "c=d"):
        (tmp_path / name).mkdir(parents=True)
    first, second, odd = (str(tmp_path / name) for name in ("a/model", "b/model", "c=d"))
    assert name_checkpoints([first]) == {"model": first}
    assert name_checkpoints([first, second]) == {"a/model": first, "b/model": second}
    assert name_checkpoints([f"A={first}", second, odd]) == {"A": first, "model": second, "c=d": odd}
    assert name_checkpoints(["org/name"]) == {"name": "org/name"}
    for twice in ([first, first], [f"x={first}", f"x={second}"]):
        with pytest.raises(ValueError, match="two checkpoints are called"):
            name_checkpoints(twice)


def start(prepared: Path, output: Path, *launcher: str) -> subprocess.Popen:
    command = ["evacap.cli", "evaluate", evacap.TINY, AUDIO_ONLY, "--data", prepared, "--output", output]
    command += ["--metrics", "bleu", "--frames", "0", "1", "--batch-size", "2", "--workers", "1", "--samples", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, *(["-m"] if launcher else []), *map(str, command)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def one(prepared, tmp_path_factory) -> dict:
    """What one process finds."""
    output = tmp_path_factory.mktemp("one")
    process = start(prepared, output)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said
    return read(output)


@pytest.mark.slow
def test_a_killed_run_goes_on(prepared, one, tmp_path):
    captions = tmp_path / "tiny" / "captions-0.jsonl"
    for at_least in (1, 500):
        process = start(prepared, tmp_path)
        while process.poll() is None and not (captions.exists() and captions.stat().st_size >= at_least):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        said = process.communicate(timeout=300)[1]
        assert process.returncode == -signal.SIGKILL, said
    process = start(prepared, tmp_path)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said
    assert read(tmp_path) == one


@pytest.mark.slow
def test_two_processes_find_the_same(prepared, one, tmp_path):
    config = str(CONFIGS / "accelerate" / "ddp.yaml")
    options = ["--config_file", config, "--num_processes", "2", "--main_process_port", "0", "--mixed_precision", "no"]
    process = start(prepared, tmp_path, "accelerate.commands.launch", *options)
    said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert read(tmp_path) == one
    # Both had a share, and one told of it.
    assert all((tmp_path / "tiny" / f"captions-{rank}.jsonl").stat().st_size for rank in (0, 1))
    assert said[0].count("bootstrap intervals") == 1

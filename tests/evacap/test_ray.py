"""Captions by Ray Data, as `docs/scale.md` shows it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evacap.ray import Captioner
from evacap.training.procedural.scenes import make_scene, write_clip


GUIDE = Path(__file__).parents[2] / "docs" / "scale.md"
CLIPS = 12
START_SECONDS = 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scale")
    for index in range(CLIPS - 1):
        write_clip(make_scene(0, "test", index), folder / "clips" / f"{index:02}.mp4")
    (folder / "clips" / "bad.mp4").write_bytes(b"no media")
    return folder


def test_a_batch_keeps_its_order_and_a_bad_file_is_a_row(folder):
    paths = [str(folder / "clips" / name) for name in ("02.mp4", "bad.mp4", "10.mp4")]
    captioner = Captioner(num_workers=1, call={"return_gate": True})
    by_path = captioner(pa.table({"path": paths, "id": [7, 8, 9]}))
    assert by_path.column_names == ["path", "id", "text", "error", "result"]
    assert by_path["id"].to_pylist() == [7, 8, 9] and by_path["path"].to_pylist() == paths
    said, errors = by_path["text"].to_pylist(), by_path["error"].to_pylist()
    assert "bell" in said[0] and said[1] is None and "car" in said[2]
    assert errors[0] is None and errors[1].startswith(f"{paths[1]}: cannot be read") and errors[2] is None
    results = [json.loads(result) for result in by_path["result"].to_pylist()]
    assert results[0]["text"] == said[0] and len(results[0]["gate"]) == 16 and results[1] == {"error": errors[1]}

    content = [Path(path).read_bytes() for path in paths]
    by_content = captioner(pa.table({"path": ["s3://a", "s3://b", "s3://c"], "bytes": content}))
    assert by_content.column_names == ["path", "text", "error", "result"]
    assert by_content["text"].to_pylist() == said
    assert by_content["error"][1].as_py().startswith("s3://b: cannot be read")

    with pytest.raises(TypeError, match="batch_format='pyarrow'"):
        captioner({"path": paths})
    with pytest.raises(ValueError, match="columns file, and not 'path'"):
        captioner(pa.table({"file": paths}))


def finished(folder: Path) -> list[Path]:
    return [path for path in folder.glob("captions_done/*.parquet") if not path.name.endswith(".pending.parquet")]


@pytest.mark.slow
def test_the_program_of_the_guide_goes_on_after_a_kill(folder):
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL) if "ray" in block)
    # Two actors, no GPU, and parts that are done one after the other.
    start = "import ray\nray.init(num_cpus=4, include_dashboard=False, object_store_memory=2**28)\n"
    for shown, here in (
        ("import ray\n", start),
        ("/shared/", f"{folder}/"),
        ("num_gpus=1", "num_cpus=1"),
        ("max_size=8", "max_size=2"),
        ("batch_size=64", "batch_size=2"),
        (', "dtype": "bfloat16"', ""),
        ("include_paths=True)", "include_paths=True, override_num_blocks=6)"),
    ):
        assert shown in code
        code = code.replace(shown, here)
    command = [sys.executable, "-c", code]
    with (folder / "log").open("w") as log:
        # A session of its own, so that all of Ray is killed.
        first = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)
        end = time.monotonic() + START_SECONDS
        while not finished(folder):
            assert first.poll() is None and time.monotonic() < end, (folder / "log").read_text()
            time.sleep(0.02)
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    before = sum(pq.read_table(path).num_rows for path in finished(folder))
    assert 0 < before < CLIPS
    second = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=START_SECONDS)
    assert second.returncode == 0, second.stderr
    assert f"{CLIPS - before} rows" in second.stderr
    rows = pq.read_table(folder / "captions").to_pylist()
    names = sorted(path.name for path in (folder / "clips").iterdir())
    assert sorted(Path(row["path"]).name for row in rows) == names
    assert [Path(row["path"]).name for row in rows if row["error"]] == ["bad.mp4"]
    assert all(row["text"] for row in rows if not row["error"])

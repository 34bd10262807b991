"""The page of `evacap demo`, served for tests."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from agreement_model import save_agreement_model


MEGABYTES, CLIP_SECONDS = 1, 12
START_SECONDS = 300


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Iterator[str]:
    """The address of an `evacap demo` with an agreement gate and small limits."""
    folder = tmp_path_factory.mktemp("demo")
    save_agreement_model(folder / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--model", str(folder / "model"), "--port", str(port)]
    options += ["--max-megabytes", str(MEGABYTES), "--max-clip-seconds", str(CLIP_SECONDS)]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "evacap", "demo", *options],
            stdout=log,
            stderr=log,
            # What Gradio keeps goes with the folder of the test.
            env={**os.environ, "GRADIO_TEMP_DIR": str(folder / "uploads"), "TMPDIR": str(folder)},
        )
    try:
        end = time.monotonic() + START_SECONDS
        while "Running on" not in (folder / "log").read_text():
            assert server.poll() is None and time.monotonic() < end, (folder / "log").read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()

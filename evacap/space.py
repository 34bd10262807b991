"""A Space on the Hub that shows a model by the page of `evacap demo`."""

import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib import metadata
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement

from . import modeling_evacap, processing, training
from .training.procedural.scenes import make_scene, write_clip


APP = '''"""The page of EVACap."""

import evacap
from evacap.app import launch
from transformers import pipeline


# The reading process imports this file, too.
if __name__ == "__main__":
    launch(pipeline(evacap.TASK, model={repo_id!r}))
'''
CARD = """---
title: {title}
sdk: gradio
sdk_version: {gradio}
app_file: app.py
license: apache-2.0
models:
- {repo_id}
---

Captions clips with [{repo_id}](https://huggingface.co/{repo_id}), and swaps the sounds of two. `evacap publish --space` made
it; `evacap/` is the code of the package, of version {version}.
"""
START_SECONDS = 300
CODE = (".py", ".yaml", ".md")


def space_files(repo_id: str) -> dict[str, bytes]:
    """The files of a Space that shows a model, by their names: its card, its page, and the code of this package.

    Args:
        repo_id (`str`): `ORG/NAME` of the model on the Hub.

    Raises:
        ImportError: If Gradio or Matplotlib is missing.
    """
    missing = [name for name in ("gradio", "matplotlib") if find_spec(name) is None]
    if missing:
        raise ImportError(f"a Space needs {' and '.join(missing)}: pip install 'evacap[app]'")
    found = {
        "README.md": CARD.format(
            title=json.dumps(repo_id.split("/")[-1]),
            gradio=metadata.version("gradio"),
            repo_id=repo_id,
            version=metadata.version("evacap"),
        ).encode(),
        "app.py": APP.format(repo_id=repo_id).encode(),
        "requirements.txt": "".join(f"{line}\n" for line in requirements()).encode(),
    }
    own = {"evacap": Path(__file__).parent}
    own |= {
        f"evacap/{room.__name__.split('.')[-1]}": Path(str(files(room)))
        for room in (modeling_evacap, processing, training)
    }
    for place, folder in own.items():
        for path in sorted(folder.rglob("*")):
            # The bundled checkpoints have a card, and no code.
            if path.suffix in CODE and path.is_file() and not path.relative_to(folder).parts[0].startswith("tiny"):
                found[f"{place}/{path.relative_to(folder).as_posix()}"] = path.read_bytes()
    return found


def requirements() -> list[str]:
    """What this package and its page need, as lines of a `requirements.txt`."""
    needed = map(Requirement, metadata.requires("evacap") or [])
    return sorted(
        f"{item.name}{item.specifier}"
        for item in needed
        if item.marker is None or item.marker.evaluate({"extra": "app"}) and not item.marker.evaluate({"extra": ""})
    )


def caption_by_space(found: Mapping[str, bytes], folder: Path, repo_id: str, environment: Mapping[str, str]) -> str:
    """Starts the page of a Space, offline and with its own code alone, and lets it caption a generated clip.

    Args:
        found (`Mapping[str, bytes]`): The files of the Space, see [`space_files`].
        folder (`Path`): The model folder.
        repo_id (`str`): Its name on the Hub.
        environment (`Mapping[str, str]`): The variables that the process gets.

    Returns:
        The caption.

    Raises:
        ValueError: If the page does not start or does not caption.
    """
    from gradio_client import Client, handle_file

    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        for name, content in found.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(content)
        # Its name is a folder here.
        (place / repo_id).parent.mkdir(exist_ok=True)
        (place / repo_id).symlink_to(folder)
        write_clip(make_scene(seed=0, split="test", index=0), place / "clip.mp4")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        settings = {"HOME": directory, "HF_HOME": directory, "TMPDIR": directory, "GRADIO_SERVER_PORT": str(port)}
        with (place / "log").open("wb") as log:
            page = subprocess.Popen(
                [sys.executable, "app.py"], cwd=place, env={**environment, **settings}, stdout=log, stderr=log
            )
        try:
            _wait_for(page, port, place / "log")
            client = Client(f"http://127.0.0.1:{port}", verbose=False)
            return client.predict(handle_file(str(place / "clip.mp4")), None, 1, api_name="/caption")["text"]
        except ValueError:
            raise
        except Exception as error:
            # The client raises errors without a common type.
            raise ValueError(f"the page of the Space does not caption: {error}") from error
        finally:
            page.terminate()
            page.wait()


def _wait_for(page: subprocess.Popen, port: int, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if page.poll() is None and time.monotonic() < end:
                time.sleep(0.2)
                continue
        last = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [f"status {page.poll()}"])[
            -1
        ]
        raise ValueError(f"the page of the Space does not start: {last}")

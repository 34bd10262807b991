"""Files that are whole or not there."""

import os
from pathlib import Path


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes `text` as UTF-8 beside `path` and moves it there, so that no reader ever sees a part of it."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)

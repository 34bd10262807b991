"""Captions from files, judged as those of checkpoints are: another system's, or a person's."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.manifest import read_rows
from ..metrics.bootstrap import RESAMPLES
from ..metrics.compute import METRICS
from .captioner import Caption, Condition, Pair, TestedClip
from .evaluate import judge


def evaluate_predictions(
    predictions: Mapping[str, str | os.PathLike],
    references: str | os.PathLike,
    output: str | os.PathLike,
    dataset: str | None = None,
    metrics: Sequence[str] = METRICS,
    seed: int = 0,
    resamples: int = RESAMPLES,
    **models: str | os.PathLike | None,
) -> dict[str, Any]:
    """Scores existing captions without a captioner, with bootstrap intervals and paired tests between the systems.

    Args:
        predictions (`Mapping[str, str]`): Files with one caption for each clip, see [`read_captions`], by their names
            in the tables.
        references (`str` or `os.PathLike`): A file with one or more captions for each clip, such as a manifest.
        output (`str` or `os.PathLike`): Folder of the slow scores; it is made if it is missing.
        dataset (`str`, *optional*): Name of the clips; by default that of the file.
        metrics, seed, resamples, **models: See [`~evaluate.evaluate`].

    Returns:
        The content of `evaluation.json`, see [`~report.write_report`].

    Raises:
        ValueError: If a file is wrong, with file and line, or if a clip does not have exactly one caption, with its
            id.
        OSError: If something cannot be read or written.
    """
    clips = [TestedClip(name, captions, {}, False) for name, captions in read_captions(references).items()]
    pairs = [Pair(number, None, 0) for number in range(len(clips))]
    said = {}
    for name, path in predictions.items():
        captions = read_captions(path)
        _check(path, references, captions, [clip.id for clip in clips])
        said[name] = {Condition(): (pairs, [Caption(captions[clip.id][0]) for clip in clips])}
    unknown = {"parameters": None, "fusion_type": None, "gate_type": None, "looks": False}
    described = {name: {"checkpoint": os.fspath(path), **unknown} for name, path in predictions.items()}
    settings = {"seed": seed, "num_beams": None, "precision": None, "resamples": resamples}
    dataset = dataset or Path(references).name
    return judge(said, clips, described, settings, metrics, Path(output), dataset, dataset, **models)


def read_captions(path: str | os.PathLike) -> dict[str, list[str]]:
    """The captions of each clip in a file of JSON lines (`.jsonl`), or in a CSV file with a header (`.csv`).

    Its fields: `id`, and `caption` or a list of `captions`; other fields do not matter. What `evacap caption` writes
    is read as well: `text` is the caption, and the name of `file` without its suffix is the id. A clip may have
    several rows. An empty caption is one.

    Raises:
        ValueError: If a row lacks a field or has a wrong one, with file and line, or if the file is empty.
        FileNotFoundError: If the file does not exist.
    """
    path = Path(path)
    clips: dict[str, list[str]] = {}
    for line, row in read_rows(path):
        try:
            name, captions = _fields(row)
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: {error}") from error
        clips.setdefault(name, []).extend(captions)
    if not clips:
        raise ValueError(f"{path}: has no rows")
    return clips


def _fields(row: Mapping[str, Any]) -> tuple[str, list[str]]:
    if "file" in row and "error" in row:
        raise ValueError(f"{row['file']!r} has an error and no caption ({row['error']}): caption it, or give it one")
    name = row.get("id")
    if name is None and isinstance(row.get("file"), str):
        name = Path(row["file"]).stem
    if name is None or not str(name):
        raise ValueError("`id` is missing")
    captions = next((row[field] for field in ("captions", "caption", "text") if field in row), None)
    captions = [captions] if isinstance(captions, str) else captions
    if not captions or not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"`caption` must be a sentence, or `captions` a list of some, got {captions!r}")
    return str(name), captions


def _check(
    path: str | os.PathLike, references: str | os.PathLike, captions: Mapping[str, list[str]], ids: Sequence[str]
) -> None:
    known = set(ids)
    problems = {
        f"have no caption (an empty one would do) but are in {references}": [
            name for name in ids if name not in captions
        ],
        f"are not in {references}": [name for name in captions if name not in known],
        "have more than one caption": [name for name, found in captions.items() if len(found) > 1],
    }
    for problem, names in problems.items():
        if names:
            some = ", ".join(map(repr, names[:3])) + ", …" * (len(names) > 3)
            raise ValueError(f"{path}: {len(names)} of its clips {problem}: {some}")

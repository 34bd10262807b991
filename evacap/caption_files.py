"""Files of captions: text, JSON, tables, and subtitles."""

import csv
import io
import json
import os
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .training.files import whole_file


FORMATS = ("txt", "json", "jsonl", "csv", "tsv", "srt", "vtt")
SUBTITLES = ("srt", "vtt")
TIMED = ("csv", "tsv", *SUBTITLES)
"""The formats that say when something is heard."""
COLUMNS = ("file", "start", "end", "text", "silent", "error")
LINE_LENGTH, LINES = 42, 2
"""Characters of a line of a subtitle, and lines of one that is on display at a time."""
PERCENT = r"(100(\.0+)?|\d{1,2}(\.\d+)?)%"
CUE_SETTINGS = {
    "vertical": "rl|lr",
    "line": rf"(-?\d+|{PERCENT})(,(start|center|end))?",
    "position": rf"{PERCENT}(,(line-left|center|line-right))?",
    "size": PERCENT,
    "align": "start|center|end|left|right",
}

Result = Mapping[str, Any]


def write_captions(
    results: Result | Iterable[Result],
    path: str | os.PathLike,
    format: str | None = None,
    *,
    sdh: bool = False,
    cue_settings: str = "",
) -> None:
    """Writes what the pipeline returns to a file, completely or not at all.

    Args:
        results (`dict` or iterable of `dict`): One result or many, each with `text` and, as far as they apply, `chunks`,
            `silent` and so on, or with `error`. The name of its clip is taken from `file`, if it is there. Subtitles are
            of one clip, and need `chunks`: pass `return_timestamps=True` to the pipeline.
        path (`str` or `os.PathLike`): The file. One that exists is replaced.
        format (`str`, *optional*): One of `FORMATS`; by default the suffix of `path` says it.
        sdh (`bool`, *optional*, defaults to `False`): Whether subtitles are in the style for the deaf and hard of
            hearing, `[dog barks]`.
        cue_settings (`str`, *optional*): Settings of each cue of WebVTT, such as `"line:0 align:start"`.

    Raises:
        ValueError: If the format or the settings are unknown, if subtitles lack times or are of several clips, or if a
            result is not one. No file is written then.
        OSError: If the file cannot be written.
    """
    form = format or format_of(path)
    text = format_captions(results, form, sdh=sdh, cue_settings=cue_settings)
    with whole_file(path) as partial:
        # The bytes of a name that is not UTF-8 cannot be written as text.
        partial.write_bytes(text.encode("utf-8", "backslashreplace"))


def format_of(path: str | os.PathLike) -> str:
    """The format that the suffix of a file says.

    Raises:
        ValueError: If it says none.
    """
    suffix = Path(path).suffix.lower().removeprefix(".")
    if suffix not in FORMATS:
        raise ValueError(f"{path}: its suffix must say the format: {', '.join(f'.{name}' for name in FORMATS)}")
    return suffix


def format_captions(
    results: Result | Iterable[Result], format: str, *, sdh: bool = False, cue_settings: str = ""
) -> str:
    """The text of a file of captions, see [`write_captions`]."""
    if format not in FORMATS:
        raise ValueError(f"`format` must be one of {', '.join(map(repr, FORMATS))}, got {format!r}.")
    if sdh and format not in SUBTITLES or cue_settings and format != "vtt":
        name, of = ("cue_settings", "'vtt'") if cue_settings else ("sdh", "'srt' and 'vtt'")
        raise ValueError(f"`{name}` belongs to {of}, but `format` is {format!r}.")
    results = [results] if isinstance(results, Mapping) else list(results)
    for index, result in enumerate(results):
        if not isinstance(result, Mapping) or not result.keys() & {"text", "error"}:
            raise ValueError(f"`results[{index}]` must be a dict with `text` or `error`, got {result!r}.")
    if format in ("csv", "tsv"):
        return _table(results, "excel-tab" if format == "tsv" else "excel")
    if format in SUBTITLES:
        check_cue_settings(cue_settings)
        return _subtitles(results, format, sdh, cue_settings)
    if format == "txt":
        return _text(results)
    lines = [json.dumps(dict(result)) for result in results]
    return "".join(f"{line}\n" for line in lines) if format == "jsonl" else "[\n" + ",\n".join(lines) + "\n]\n"


def check_cue_settings(settings: str) -> None:
    """Checks settings of a WebVTT cue, such as `"line:0 align:start"`.

    Raises:
        ValueError: If one of them is not WebVTT's, or is given twice.
    """
    names = []
    for setting in settings.split():
        name, _, value = setting.partition(":")
        names.append(name)
        if name not in CUE_SETTINGS or not re.fullmatch(CUE_SETTINGS[name], value) or names.count(name) > 1:
            raise ValueError(
                f"{setting!r} is not a cue setting of WebVTT, or comes twice. There are vertical:rl, line:0 or line:10%, "
                "position:50%, size:80% and align:start, center, end, left or right."
            )


def _chunks(result: Result) -> list[Result]:
    """The windows of a result; a single one without times where it has none."""
    return result.get("chunks") or [{"timestamp": (None, None), **result}]


def _text(results: Sequence[Result]) -> str:
    """The caption of each window on a line of its own, under the names of the clips if there are several."""
    blocks = []
    for result in results:
        lines = [f"{result['file']}:"] if len(results) > 1 and "file" in result else []
        if "error" in result:
            lines.append(f"error: {' '.join(result['error'].split())}")
        else:
            lines += [chunk["text"] for chunk in _chunks(result)]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def _table(results: Sequence[Result], dialect: str) -> str:
    """A row for each window, and one for an error."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", dialect=dialect, lineterminator="\n")
    writer.writeheader()
    for result in results:
        row = {"file": result.get("file", "")}
        if "error" in result:
            writer.writerow(row | {"error": result["error"]})
            continue
        for chunk in _chunks(result):
            start, end = ("" if time is None else round(time, 3) for time in chunk["timestamp"])
            row |= {"start": start, "end": end, "text": chunk["text"]}
            writer.writerow(row | {"silent": "true" if chunk.get("silent") else ""})
    return text.getvalue()


def _subtitles(results: Sequence[Result], format: str, sdh: bool, cue_settings: str) -> str:
    if len(results) != 1:
        raise ValueError(f"Subtitles are of one clip, but there are {len(results)} results: write a file for each.")
    (result,) = results
    if "error" in result:
        raise ValueError(f"There is no caption to write: {result['error']}")
    if "chunks" not in result:
        raise ValueError("The result has no times: call the pipeline with `return_timestamps=True`.")
    mark, escaped = (".", _escape_vtt) if format == "vtt" else (",", _escape_srt)
    settings = f" {' '.join(cue_settings.split())}" if cue_settings else ""
    blocks = ["WEBVTT\n"] if format == "vtt" else []
    for number, (start, end, lines) in enumerate(_cues(result["chunks"], sdh), 1):
        times = f"{_clock(start, mark)} --> {_clock(end, mark)}{settings}"
        blocks.append("\n".join([str(number), times, *map(escaped, lines)]) + "\n")
    return "\n".join(blocks)


def _cues(chunks: Iterable[Result], sdh: bool) -> Iterator[tuple[int, int, list[str]]]:
    """Start and end in milliseconds, and the lines, of each cue; what is said of silence is left out.

    A caption of more lines than a subtitle may have becomes several cues, each as long as its share of the characters.
    """
    for chunk in chunks:
        text = " ".join(chunk["text"].split())
        if chunk.get("silent") or not text:
            continue
        lines = _wrap(f"[{text.rstrip('.')}]" if sdh else text)
        parts = [lines[first : first + LINES] for first in range(0, len(lines), LINES)]
        sizes = [sum(map(len, part)) for part in parts]
        begin, length = chunk["timestamp"][0], chunk["timestamp"][1] - chunk["timestamp"][0]
        marks = [round(1000 * (begin + length * sum(sizes[:count]) / sum(sizes))) for count in range(len(parts) + 1)]
        for start, end, part in zip(marks, marks[1:], parts):
            # A cue that ends when it begins is not allowed.
            yield start, max(end, start + 1), part


def _wrap(text: str) -> list[str]:
    """As few lines as possible, of about the same length."""
    count = len(textwrap.wrap(text, LINE_LENGTH))
    widths = range(-(-len(text) // count), LINE_LENGTH + 1)
    return next(lines for width in widths if len(lines := textwrap.wrap(text, width)) == count)


def _clock(milliseconds: int, mark: str) -> str:
    seconds, milliseconds = divmod(milliseconds, 1000)
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}{mark}{milliseconds:03}"


def _escape_vtt(line: str) -> str:
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _escape_srt(line: str) -> str:
    # SRT has no escapes: a word joiner, which is not seen, keeps players from reading a tag or an arrow.
    return re.sub(r"([<{])(?=[A-Za-z/\\])", "\\1\u2060", line).replace("-->", "-\u2060->")

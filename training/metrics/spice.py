"""SPICE, by the program that comes with `pycocoevalcap` and the parser that does not."""

import json
import os
import platform
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..cores import usable_cores
from .java import Java, run_java, toolkit_path


# Size and SHA-256 of what SPICE needs of Stanford CoreNLP 3.6.0, in the order of its class path. Those of the archive
# and those of Maven (`edu.stanford.nlp:stanford-corenlp:3.6.0`, and its classifier `models`) are the same files.
JARS = {
    "stanford-corenlp-3.6.0.jar": (7_270_741, "d341d5863276f55782c5ef73212222d6b3b48e02ae1951ab6de7618d28b12742"),
    "stanford-corenlp-3.6.0-models.jar": (
        378_116_526,
        "d285157bd7887ee3018094b5dbae092e49088b023361ccdb550ee1daf9b2c9bd",
    ),
}

# Stands in for the JavaScript engine that SPICE has indent its output; see the source in that folder.
ENGINE = Path(__file__).with_name("spice_json")

# The parser's memory grows with the square of a caption's words, on each thread, and its time with their cube.
MEMORY = "3G"
MAX_THREADS = 4
MAX_WORDS = 100

# What SPICE's cache reaches into, and since when a Java has to be told of it.
OPENED = ("lang", "math", "net", "text", "util", "util.concurrent")
OPENING_SINCE = 9
NATIVE_ACCESS_SINCE = 22
PARSED_AT_ONCE = 2000


def jar_folder() -> Path:
    """Where `evacap install-spice` puts the parser: `evacap/spice` in `XDG_CACHE_HOME`, by default in `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "evacap" / "spice"


def spice(
    predictions: Sequence[str], references: Sequence[Sequence[str]], java: Java, timeout: float | None = None
) -> tuple[float, list[float]]:
    """The SPICE of a corpus and of each of its clips, as the MS-COCO toolkit computes it, synonyms included.

    Parsing takes nearly all the time. On Linux on x86-64, which SPICE's own cache is made for, every caption is parsed
    once, and the parses are kept beside the parser for the next time.

    Captions of more than 100 words, for which the parser may run out of memory, are cut there, with a warning. (ours)

    Args:
        predictions (`Sequence[str]`): One tokenised caption a clip.
        references (`Sequence[Sequence[str]]`): One or more tokenised captions a clip.
        java ([`Java`]): The runtime.
        timeout (`float`, *optional*): Seconds after which the program is killed: by default 15 minutes and 2 seconds
            for each caption.

    Returns:
        `tuple[float, list[float]]`: The mean of the clips' scores, and those.

    Raises:
        RuntimeError: If the parser is not there, or SPICE fails or hangs.
    """
    for name, (size, _) in JARS.items():
        jar = jar_folder() / name
        if not jar.is_file() or jar.stat().st_size != size:
            raise RuntimeError(
                f"SPICE is not installed ({jar} is missing or not whole): run `evacap install-spice` once, which fetches "
                "its parser"
            )
    long = [text for text in [*predictions, *(text for clip in references for text in clip)] if _is_long(text)]
    if long:
        warnings.warn(
            f"SPICE reads the first {MAX_WORDS} words of {len(long)} captions that are longer, such as {long[0][:50]!r}…"
        )
    predictions = [_shorten(prediction) for prediction in predictions]
    references = [[_shorten(reference) for reference in clip] for clip in references]
    with ExitStack() as stack:
        cache = _cache(stack) if (platform.system(), platform.machine()) == ("Linux", "x86_64") else None
        if cache is not None:
            texts = list(dict.fromkeys([*predictions, *(text for clip in references for text in clip)]))
            with tqdm(total=len(texts), desc="spice: parsing", unit="caption", disable=len(texts) <= 1) as progress:
                # In each call the program parses a caption as often as it is there, unless it is in the cache.
                for first in range(0, len(texts), PARSED_AT_ONCE):
                    part = texts[first : first + PARSED_AT_ONCE]
                    _run(part, [[]] * len(part), java, timeout, cache)
                    progress.update(len(part))
        per_clip = _run(predictions, references, java, timeout, cache)
    return sum(per_clip) / len(per_clip), per_clip


def _cache(stack: ExitStack) -> Path:
    """A folder for parses: beside the parser, or where that cannot be written, for this time only."""
    folder = jar_folder() / "parses"
    try:
        folder.mkdir(exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(stack.enter_context(tempfile.TemporaryDirectory()))


def _run(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    java: Java,
    timeout: float | None,
    cache: Path | None,
) -> list[float]:
    """The F-scores of the clips."""
    clips: list[dict[str, Any]] = [
        {"image_id": index, "test": prediction, "refs": list(clip)}
        for index, (prediction, clip) in enumerate(zip(predictions, references, strict=True))
    ]
    if timeout is None:
        timeout = 900 + 2 * sum(1 + len(clip) for clip in references)
    # The manifest of the program adds the libraries beside it to the class path.
    class_path = [*(jar_folder() / name for name in JARS), ENGINE, toolkit_path("spice/spice-1.0.jar")]
    options = [f"-Xmx{MEMORY}", "-cp", os.pathsep.join(map(str, class_path))]
    if cache is not None and java.version >= OPENING_SINCE:
        options += [f"--add-opens=java.base/java.{package}=ALL-UNNAMED" for package in OPENED]
    if cache is not None and java.version >= NATIVE_ACCESS_SINCE:
        options.append("--enable-native-access=ALL-UNNAMED")
    with tempfile.TemporaryDirectory() as folder:
        captions, answer = Path(folder, "captions.json"), Path(folder, "scores.json")
        captions.write_text(json.dumps(clips), encoding="ascii")
        arguments = [captions, "-out", answer, "-silent", "-threads", min(usable_cores(), MAX_THREADS)]
        arguments += [] if cache is None else ["-cache", cache]
        run_java(java, *options, "edu.anu.spice.SpiceScorer", *arguments, timeout=timeout)
        scores = {
            clip["image_id"]: float(clip["scores"]["All"]["f"])
            for clip in json.loads(answer.read_text(encoding="utf-8"))
        }
    return [scores[index] for index in range(len(clips))]


def _is_long(caption: str) -> bool:
    return caption.count(" ") >= MAX_WORDS


def _shorten(caption: str) -> str:
    return " ".join(caption.split(" ")[:MAX_WORDS])

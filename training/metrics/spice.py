"""SPICE, by the program that comes with `pycocoevalcap` and the parser that does not."""

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .java import Java, java_runtimes, run_java, toolkit_path


# Size and SHA-256 of what SPICE needs of Stanford CoreNLP 3.6.0, in the order of its class path.
JARS = {
    "stanford-corenlp-3.6.0.jar": (7_270_741, "d341d5863276f55782c5ef73212222d6b3b48e02ae1951ab6de7618d28b12742"),
    "stanford-corenlp-3.6.0-models.jar": (
        378_116_526,
        "d285157bd7887ee3018094b5dbae092e49088b023361ccdb550ee1daf9b2c9bd",
    ),
}


def jar_folder() -> Path:
    """Where `evacap install-spice` puts the parser: `evacap/spice` in `XDG_CACHE_HOME`, by default in `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "evacap" / "spice"


def find_spice_java() -> Java:
    """
    A Java that SPICE runs on: 8 to 14, with a JavaScript engine, which its output is written by.

    Raises:
        RuntimeError: If there is none; the message lists what was found.
    """
    found = []
    for java in java_runtimes(installed=True):
        if 8 <= java.version <= 14 and _has_javascript(java):
            return java
        found.append(f"{java.path} ({java.version})")
    raise RuntimeError(
        f"SPICE needs a Java of 8 to 14 with JavaScript (Nashorn), found {', '.join(found) or 'none'}: "
        "install one, such as Temurin 11, and set JAVA_HOME to it"
    )


def spice(
    predictions: Sequence[str], references: Sequence[Sequence[str]], timeout: float | None = None
) -> tuple[float, list[float]]:
    """
    The SPICE of a corpus and of each of its clips, as the MS-COCO toolkit computes it.

    Args:
        predictions (`Sequence[str]`): One tokenised caption a clip.
        references (`Sequence[Sequence[str]]`): One or more tokenised captions a clip.
        timeout (`float`, *optional*): Seconds after which the program is killed: by default 15 minutes and 10 seconds
            for each clip.

    Returns:
        `tuple[float, list[float]]`: The mean of the clips' scores, and those.

    Raises:
        RuntimeError: If the parser or a fitting Java is not there, or SPICE fails or hangs.
    """
    jars = [jar_folder() / name for name in JARS]
    for jar, (size, _) in zip(jars, JARS.values(), strict=True):
        if not jar.is_file() or jar.stat().st_size != size:
            raise RuntimeError(
                f"SPICE is not installed ({jar} is missing or not whole): run `evacap install-spice` once"
            )
    program = toolkit_path("spice/spice-1.0.jar")
    java = find_spice_java()
    clips = [
        {"image_id": index, "test": prediction, "refs": list(clip)}
        for index, (prediction, clip) in enumerate(zip(predictions, references, strict=True))
    ]
    with tempfile.TemporaryDirectory() as folder:
        captions, answer = Path(folder, "captions.json"), Path(folder, "scores.json")
        captions.write_text(json.dumps(clips), encoding="ascii")
        # The manifest of the program adds the libraries beside it to the class path.
        class_path = os.pathsep.join(map(str, [*jars, program]))
        run_java(
            java,
            *("-Xmx8G", "-cp", class_path, "edu.anu.spice.SpiceScorer"),
            *(captions, "-out", answer, "-silent"),
            timeout=900 + 10 * len(clips) if timeout is None else timeout,
        )
        scores = {
            clip["image_id"]: float(clip["scores"]["All"]["f"])
            for clip in json.loads(answer.read_text(encoding="utf-8"))
        }
    per_clip = [scores[index] for index in range(len(clips))]
    return sum(per_clip) / len(per_clip), per_clip


def _has_javascript(java: Java) -> bool:
    try:
        return java.version == 8 or "jdk.scripting.nashorn@" in run_java(java, "--list-modules", timeout=60)
    except RuntimeError:
        return False

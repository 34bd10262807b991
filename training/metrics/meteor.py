"""METEOR 1.5, by the program that comes with `pycocoevalcap`."""

import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

from .java import Java, java_command, last_words, toolkit_path


def meteor(
    predictions: Sequence[str], references: Sequence[Sequence[str]], java: Java, timeout: float | None = None
) -> tuple[float, list[float], list[list[float]]]:
    """The METEOR of a corpus and of each of its clips, as the MS-COCO toolkit computes it.

    Args:
        predictions (`Sequence[str]`): One tokenised caption a clip.
        references (`Sequence[Sequence[str]]`): One or more tokenised captions a clip.
        java ([`Java`]): The runtime.
        timeout (`float`, *optional*): Seconds after which the program is killed: by default 5 minutes, which loading
            its tables takes on no machine, and a second for each clip.

    Returns:
        `tuple`: The corpus score, which is not the mean of the clips' scores, those, and the 23 counts of each clip
        from whose sums the corpus score is computed.

    Raises:
        RuntimeError: If METEOR is not there, fails or hangs.
    """
    timeout = 300 + len(predictions) if timeout is None else timeout
    command = java_command(
        java, "-Xmx2G", "-jar", toolkit_path("meteor/meteor-1.5.jar"), *"- - -stdio -l en -norm".split()
    )
    with tempfile.TemporaryFile() as messages:
        process = subprocess.Popen(**command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=messages)
        # Killing is what ends a read that would wait for ever.
        alarm = threading.Timer(timeout, process.kill)
        alarm.start()
        begin = time.monotonic()
        try:
            statistics = [
                _ask(process, "SCORE", *map(_no_separator, [*clip, prediction]))
                for prediction, clip in zip(predictions, references, strict=True)
            ]
            scores = [float(_ask(process, "EVAL", *statistics))]
            scores += [float(process.stdout.readline()) for _ in predictions]
        except (OSError, ValueError) as error:
            late = time.monotonic() - begin >= timeout
            process.kill()
            process.wait()
            messages.seek(0)
            said = last_words(messages.read().decode(errors="replace"))
            reason = f"was killed after {timeout:g} s" if late else f"failed: {said}"
            raise RuntimeError(f"METEOR {reason}") from error
        finally:
            alarm.cancel()
            process.kill()
            process.wait()
            process.stdout.close()
            with suppress(OSError):
                process.stdin.close()
    return scores[-1], scores[:-1], [[float(count) for count in clip.split()] for clip in statistics]


def _ask(process: subprocess.Popen, *fields: str) -> str:
    process.stdin.write(" ||| ".join(fields) + "\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def _no_separator(caption: str) -> str:
    return caption.replace("|||", "")

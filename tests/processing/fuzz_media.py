"""Reads thousands of damaged files, and compares what comes out with a plain sequential decode of the same bytes.

    python tests/processing/fuzz_media.py --count 10000 --output fuzz.jsonl

Second `k` of every sound is a tone of 400 + 100·k Hz and every picture carries its number, so that it is known what a
window should hold. Number `i` of the damaged files follows from `--seed` and `i` alone. A line of the output is written as
each file is done: stopped at any moment, the same call goes on. The table at the end counts, for each container,

* whole: files that give what the undamaged one does
* damaged: files of which something is missing or wrong, where a sequential decode has nothing better
* refused: files that are an error with a message
* off: files of which a picture or a second of sound is another one than it should be, although a sequential decode of the
  same bytes has it right
* lost: files of which a second of sound is silent, although a sequential decode has it
* crashed, hung, strange: files that end the process, take more than the budget of time, or give another error
* over: files that take more than the budget of memory
"""

import argparse
import contextlib
import json
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import av
import numpy as np


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from media_files import damage, read_barcode, tones, write_clip  # noqa: E402

from evacap.processing import media_evacap  # noqa: E402


RATE, FPS, SECONDS, WINDOW, NUM_FRAMES = 16000, 25, 6, 2.0, 4
BUDGET_SECONDS, BUDGET_BYTES = 2 * media_evacap.SECONDS_A_WINDOW, media_evacap.MEMORY_A_PROCESS
CLIPS = {
    "mp4": ("libx264", "aac"),
    "mkv": ("libx264", "flac"),
    "webm": ("libvpx-vp9", "libopus"),
    "mov": ("mpeg4", "pcm_s16le"),
    "avi": ("mpeg4", "libmp3lame"),
    "ts": ("libx264", "aac"),
    "wav": (None, "pcm_s16le"),
    "mp3": (None, "libmp3lame"),
    "ogg": (None, "libopus"),
    "flac": (None, "flac"),
    "m4a": (None, "aac"),
}
OUTCOMES = ("whole", "damaged", "refused", "off", "lost", "crashed", "hung", "strange", "over")
# Damaged bytes may be decoded to noise far beyond full scale: a tone in it is chance.
LOUDEST = 2.0
# A picture may be as many frames off as codecs put between the clocks of sound and picture.
FRAMES_OFF = 3


def write_originals(folder: Path) -> dict[str, bytes]:
    originals = {}
    for extension, (video, audio) in CLIPS.items():
        path = write_clip(
            folder / f"original.{extension}",
            seconds=SECONDS,
            video=video,
            audio=audio,
            rate=48000,
            sound=tones(SECONDS, 48000),
        )
        originals[extension] = path.read_bytes()
        path.unlink()
    return originals


def second_heard(samples: np.ndarray, share: float = 0.1) -> int | None:
    """Which second of the original a second of sound is, by its tone; `None` for silence, -1 for something else."""
    samples = np.pad(samples, (0, RATE - len(samples)))
    middle = samples[len(samples) // 4 : 3 * len(samples) // 4]
    if np.abs(middle).max() < 0.01:
        return None
    if np.isnan(middle).any():
        return -1
    power = np.abs(np.fft.rfft(middle * np.hanning(len(middle)))) ** 2
    frequencies = np.arange(len(power)) * RATE / len(middle)
    shares = [power[np.abs(frequencies - 400 - 100 * second) < 30].sum() / power.sum() for second in range(SECONDS)]
    return int(np.argmax(shares)) if max(shares) > share else -1


def number_shown(picture: np.ndarray) -> int | None:
    """The number of a picture; `None` where it cannot be read."""
    with contextlib.suppress(AssertionError, ValueError):
        return read_barcode(picture)
    return None


def ours(path: str) -> dict[str, Any]:
    """What the reader finds in the seconds of sound, and at the moments at which pictures are chosen."""
    sounds, pictures, size = {}, {}, {}

    def look(media: media_evacap.Media):
        if media.waveform is not None:
            for second in range(int(len(media.waveform) / RATE + 0.5)):
                sounds[media.start + second] = second_heard(media.waveform[second * RATE : (second + 1) * RATE])
        if media.frames is not None:
            size.update(height=media.frames.shape[1], width=media.frames.shape[2])
            for index, frame in enumerate(media.frames):
                pictures[media.start + (index + 0.5) * media.duration / NUM_FRAMES] = number_shown(frame)

    with media_evacap.read_media(path, num_frames=NUM_FRAMES) as reader:
        while reader.position < 10 * SECONDS:
            look(reader.read(WINDOW))
            if not reader.goes_on(0.5):
                break
    with contextlib.suppress(media_evacap.MediaError):
        look(media_evacap.load_media(path, num_frames=NUM_FRAMES, start=3.0, duration=WINDOW))
    return {"sounds": list(sounds.items()), "pictures": list(pictures.items()), "size": size}


def reference(path: str, found: dict[str, Any], holds: bool = False) -> dict[str, Any]:
    """What a sequential decode has in the same seconds and at the same moments.

    It may hold on to all pictures, as a decoder that misses one fills in with what its free buffers hold.
    """
    waveform, shown = np.zeros(RATE * (10 * SECONDS + 4), np.float32), []
    for kind in ("audio", "video"):
        with contextlib.suppress(av.FFmpegError, IndexError, ValueError, OverflowError), av.open(path) as container:
            stream = getattr(container.streams, kind)[0]
            origin = max(0, container.start_time or 0) * 1e-6
            follows, held, waiting, kept = origin, [], [], None
            for packet in container.demux(stream):
                if packet.dts is not None:
                    waiting.append(float(packet.dts * packet.time_base))
                try:
                    frames = packet.decode()
                except av.FFmpegError:
                    with contextlib.suppress(TypeError, ValueError):  # no picture will take its time
                        waiting.remove(float(packet.dts * packet.time_base))
                    continue
                for frame in frames:
                    held += [frame] if holds else []
                    moment = follows if frame.time is None else frame.time
                    if kind == "video":
                        if container.format.name == "avi":
                            waiting.sort()
                            moment = waiting.pop(0) if waiting else moment
                        shown.append(
                            (moment - origin, number_shown(frame.to_ndarray(format="rgb24", **found["size"])))
                        )
                        continue
                    layout = (frame.format.name, frame.layout.name, frame.sample_rate)
                    if layout != kept:  # as a damaged frame may say; the resampler would refuse it and all that follow
                        kept = layout
                        resampler = av.AudioResampler(format="flt", layout="mono", rate=RATE)
                    follows = moment + frame.samples / frame.sample_rate
                    # PyAV reads beyond the planes of a frame with more channels.
                    wild = frame.layout.nb_channels > 8 or (
                        frame.format.name.startswith("flt") and np.abs(frame.to_ndarray()).max() > LOUDEST
                    )
                    for piece in resampler.resample(frame):
                        samples = piece.to_ndarray().reshape(-1)
                        first = round((moment - origin) * RATE)
                        if 0 <= first < len(waveform):
                            part = waveform[first : first + len(samples)]
                            part[:] = np.nan if wild else samples[: len(part)]
    sounds = [
        # What is to be better must be clearly so.
        (start, second_heard(waveform[round(start * RATE) : round((start + 1) * RATE)], share=0.3))
        for start, _ in found["sounds"]
    ]
    pictures = []
    for moment, _ in found["pictures"]:
        before = [number for time, number in shown if time <= moment + 1e-6]
        pictures.append((moment, before[-1] if before else shown[0][1] if shown else None))
    return {"sounds": sounds, "pictures": pictures}


def judge(found: dict[str, Any], other: dict[str, Any]) -> str:
    """The outcome of a file that could be read."""
    outcome = "whole" if found["sounds"] or found["pictures"] else "damaged"
    for (start, ours), (_, theirs) in zip(found["sounds"], other["sounds"], strict=True):
        right = int(start + 0.5)
        if ours == right:
            continue
        if theirs == right and start + 1 <= SECONDS:
            return "lost" if ours is None else "off"
        outcome = "damaged"
    for (moment, ours), (_, theirs) in zip(found["pictures"], other["pictures"], strict=True):
        right = min(int(moment * FPS), SECONDS * FPS - 1)
        if ours is not None and abs(ours - right) <= FRAMES_OFF:
            continue
        close = ours is not None and theirs is not None and abs(ours - theirs) <= FRAMES_OFF
        if theirs is not None and abs(theirs - right) <= FRAMES_OFF and not close:
            return "off"
        outcome = "damaged"
    return outcome


def work(connection: Connection) -> None:
    """Read the files that come through a pipe, and answer in two steps, so that a crash can be told apart."""
    media_evacap.guard_process()
    media_evacap.logger.setLevel("CRITICAL")
    while True:
        path = connection.recv()
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak of memory is counted anew
        begin = time.monotonic()
        try:
            answer = {"found": ours(path)}
        except media_evacap.MediaError as error:
            answer = {"outcome": "refused", "message": str(error)}
        except Exception as error:
            answer = {"outcome": "strange", "message": f"{type(error).__name__}: {error}"}
        answer["seconds"] = round(time.monotonic() - begin, 3)
        with contextlib.suppress(OSError):
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            answer["megabytes"] = int(status["VmHWM"].split()[0]) // 1024
        connection.send(answer)
        if "found" in answer:
            outcome = judge(answer["found"], answer["found"])
            if outcome != "whole":  # else there is nothing that could be better
                outcome = judge(answer["found"], reference(path, answer["found"]))
            if outcome == "off":  # unless it is chance what the bytes give
                outcome = judge(answer["found"], reference(path, answer["found"], holds=True))
            connection.send(outcome)


def read_one(worker: list, path: Path) -> dict[str, Any]:
    """The record of a file; `worker` is the process and the pipe to it, replaced where it is lost."""
    if not worker:
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(target=work, args=(there,), daemon=True)
        process.start()
        there.close()
        worker[:] = process, here
    process, pipe = worker
    outcome, record = "hung", {}
    try:
        pipe.send(str(path))
        if pipe.poll(BUDGET_SECONDS + 60):
            record = pipe.recv()
            outcome = record.pop("outcome", None)
            found = record.pop("found", None)
            if outcome is None:
                # What is compared with may end the process, too, which the next file is not to blame for.
                outcome = None
                with contextlib.suppress(EOFError):
                    outcome = pipe.recv() if pipe.poll(BUDGET_SECONDS + 60) else None
                if outcome is None:
                    outcome = "damaged"
                    process.kill()
                    worker.clear()
            if outcome in ("off", "lost"):
                record["found"] = found
            if record.get("megabytes", 0) * 2**20 > BUDGET_BYTES:
                outcome = "over"
            if record["seconds"] > BUDGET_SECONDS:
                outcome = "hung"
            return {"outcome": outcome, **record}
    except (EOFError, OSError):
        process.join()
        outcome, record = "crashed", {"exit": process.exitcode}
    process.kill()
    process.join()
    worker.clear()
    return {"outcome": outcome, **record}


def table(records: list[dict[str, Any]]) -> str:
    """The outcomes by container, as Markdown."""
    lines = [["container", "files", *OUTCOMES, "slowest", "most memory"]]
    for name in [*CLIPS, "all"]:
        rows = [record for record in records if name in ("all", record["container"])]
        counts = Counter(record["outcome"] for record in rows)
        slowest = max((record.get("seconds", 0) for record in rows), default=0)
        most = max((record.get("megabytes", 0) for record in rows), default=0)
        lines.append([name, len(rows), *(counts[outcome] for outcome in OUTCOMES), f"{slowest:.1f} s", f"{most} MB"])
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000, help="damaged files (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("fuzz.jsonl"), help="a line a file (default: %(default)s)")
    parser.add_argument("--keep", type=Path, help="folder in which the files stay that are off, lost, crashed or hung")
    arguments = parser.parse_args()
    from tqdm import tqdm

    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="fuzz_media."))
    lines = arguments.output.read_text().splitlines(keepends=True) if arguments.output.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    done = {record["number"] for record in records if record["seed"] == arguments.seed}
    worker: list = []
    try:
        originals = write_originals(folder)
        arguments.output.write_text("".join(line for line in lines if line.endswith("\n")))
        with arguments.output.open("a") as output:
            for number in tqdm(range(arguments.count), unit="file"):
                if number in done:
                    continue
                chance = random.Random(f"{arguments.seed} {number}")
                container = list(CLIPS)[number % len(CLIPS)]
                path = folder / f"{number}.{container}"
                path.write_bytes(damage(originals[container], chance))
                record = {"seed": arguments.seed, "number": number, "container": container, **read_one(worker, path)}
                records.append(record)
                output.write(json.dumps(record) + "\n")
                output.flush()
                if arguments.keep and record["outcome"] not in ("whole", "damaged", "refused"):
                    arguments.keep.mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, arguments.keep)
                path.unlink(missing_ok=True)
    finally:
        if worker:
            worker[0].kill()
        shutil.rmtree(folder)
    print(table(records))
    bad = sum(record["outcome"] in OUTCOMES[3:] for record in records)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

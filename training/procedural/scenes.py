"""Procedural audio-visual clips: synthesised sounds, drawn pictures of their sources, and captions, all from a seed.

    python -m evacap.training.procedural.scenes --output clips/test --split test --clips 300 --seed 0

A clip has one to three sounding sources, in a row or overlapping, under some room noise. By design

* the kinds of four pairs sound alike and look different (`kinds.SOUND_ALIKES`); two pairs look alike and sound
  different;
* a source can be off screen. It is heard, and the caption says what can be known: a sound-alike off screen gets the
  word that its pair shares ("an engine runs"), every other kind its own name;
* one or two silent objects can be on screen. They are never captioned, and their sound is unlike every sound of the
  clip.
"""

import argparse
import json
import os
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path

import av
import numpy as np
from tqdm.auto import tqdm

from ..files import whole_file
from .captions import write_captions
from .kinds import KINDS, SOUND_ALIKES, name_of
from .pictures import Actor, Place, draw
from .sounds import SAMPLING_RATE, background, synthesize


SPLITS = ("train", "validation", "test")
MAX_OBJECTS = 4
REFERENCES = {"train": 1, "validation": 5, "test": 5}
_SOUNDS = sorted({kind.sound for kind in KINDS.values()})
_MAKERS = {sound: [name for name, kind in KINDS.items() if kind.sound == sound] for sound in _SOUNDS}


@dataclass(frozen=True)
class Event:
    """One sounding source.

    Args:
        kind (`str`): Key of `KINDS`.
        onset (`float`), duration (`float`): Seconds.
        pitch (`float`), rhythm (`float`): Factors on the kind's usual pitch and rate.
        loudness (`float`): Decibels against the reference level, at most 0.
        place (`Place`, *optional*): Position of the source on the screen; `None` off screen.
    """

    kind: str
    onset: float
    duration: float
    pitch: float
    rhythm: float
    loudness: float
    place: Place | None

    @property
    def offset(self) -> float:
        return self.onset + self.duration

    @property
    def name(self) -> str:
        """The name that a caption can give it."""
        return name_of(self.kind, seen=self.place is not None)


@dataclass(frozen=True)
class SilentObject:
    """A source that is on the screen and makes no sound."""

    kind: str
    place: Place


@dataclass(frozen=True)
class Scene:
    """The complete description of a clip before it is rendered; made by `make_scene`.

    Args:
        seed (`int`), split (`str`), index (`int`): The arguments of `make_scene`.
        duration (`float`): Seconds.
        events (`tuple[Event, ...]`): The sounding sources, in the order of their onsets.
        silent_objects (`tuple[SilentObject, ...]`): The objects that are seen but not heard.
        noise (`float`): Level of the room noise in decibels against the reference level.
    """

    seed: int
    split: str
    index: int
    duration: float
    events: tuple[Event, ...]
    silent_objects: tuple[SilentObject, ...]
    noise: float

    @property
    def id(self) -> str:
        return f"{self.split}-{self.seed}-{self.index:06d}"

    @property
    def groups(self) -> list[tuple[Event, ...]]:
        """The events in groups: overlapping ones in one group, the groups in the order in which they begin."""
        groups: list[tuple[Event, ...]] = []
        for event in self.events:
            if groups and event.onset < max(earlier.offset for earlier in groups[-1]):
                groups[-1] += (event,)
            else:
                groups.append((event,))
        return groups

    @property
    def names(self) -> frozenset[str]:
        """The names in a right caption, to compare with `captions.names_in_caption`."""
        return frozenset(event.name for event in self.events)

    @cached_property
    def captions(self) -> list[str]:
        """One caption of a training clip, five of a validation or test clip."""
        names = [tuple(event.name for event in group) for group in self.groups]
        return write_captions(names, REFERENCES[self.split], self.rng("captions"))

    def rng(self, purpose: str) -> np.random.Generator:
        """A random generator for one purpose, with a seed of its own for each scene and purpose."""
        return np.random.default_rng([self.seed, SPLITS.index(self.split), self.index, *purpose.encode()])


@dataclass(frozen=True)
class RenderedClip:
    """A rendered scene.

    Args:
        waveform (`np.ndarray` of shape `(samples,)`): float32, mono, 16 kHz, within ±1.
        frames (`np.ndarray` of shape `(frames, height, width, 3)`): uint8 RGB.
        timestamps (`np.ndarray` of shape `(frames,)`): Seconds at which the frames begin.
    """

    waveform: np.ndarray
    frames: np.ndarray
    timestamps: np.ndarray
    sampling_rate: int = SAMPLING_RATE


def _times(rng: np.random.Generator, count: int, duration: float) -> list[tuple[float, float]]:
    """Draws onset and duration of each event, in segments of the clip, one for each group of overlapping events."""
    sizes = [count] if count < 3 and rng.random() < 0.5 else [1] * count
    if count == 3 and rng.random() < 0.6:
        sizes = [2, 1] if rng.random() < 0.5 else [1, 2]
    bounds = np.cumsum([0.0] + [1 + 0.3 * size + rng.uniform(0, 0.4) for size in sizes])
    bounds *= duration / bounds[-1]
    times = []
    for start, end, size in zip(bounds[:-1], bounds[1:], sizes, strict=True):
        length = end - start
        for position in range(size):
            onset = start + length * (rng.uniform(0.02, 0.12) + 0.12 * position)
            stop = end - length * rng.uniform(0.05, 0.2)
            times.append((round(float(onset), 2), round(float(stop - onset), 2)))
    return times


def _places(rng: np.random.Generator, count: int) -> list[Place]:
    """Draws places that do not overlap, at most `MAX_OBJECTS`; fewer places are larger."""
    if count <= 1:
        centres, radius = [(0.5, 0.5)], rng.uniform(0.28, 0.36)
    elif count == 2:
        side = rng.uniform(0.35, 0.65, 2)
        centres, radius = [(0.26, side[0]), (0.74, side[1])], rng.uniform(0.2, 0.23)
        if rng.random() < 0.5:
            centres = [(y, x) for x, y in centres]
    else:
        centres, radius = [(x, y) for x in (0.26, 0.74) for y in (0.26, 0.74)], rng.uniform(0.19, 0.22)
    jitter = rng.uniform(-0.12, 0.12, (len(centres), 2)) if count == 1 else rng.uniform(-0.02, 0.02, (len(centres), 2))
    chosen = rng.permutation(len(centres))[:count]
    return [
        Place(centres[i][0] + float(jitter[i][0]), centres[i][1] + float(jitter[i][1]), float(radius)) for i in chosen
    ]


def make_scene(seed: int, split: str, index: int, duration: float = 5.0) -> Scene:
    """Draws a scene. The same arguments give the same scene; no two splits share one.

    Args:
        seed (`int`): Seed of the whole dataset, 0 or more.
        split (`str`): `"train"`, `"validation"` or `"test"`.
        index (`int`): Number of the clip in its split, 0 or more.
        duration (`float`): Seconds, 5 to 10.

    Raises:
        ValueError: If an argument is outside these values.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown; choose one of {', '.join(SPLITS)}")
    if seed < 0 or index < 0:
        raise ValueError(f"seed={seed} and index={index} must both be 0 or more")
    if not 5 <= duration <= 10:
        raise ValueError(f"duration={duration} s is out of range; choose 5 to 10 s")
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    count = int(rng.choice([1, 2, 3], p=[0.35, 0.5, 0.15]))
    # No two sounds of a scene are alike, so sounds are drawn first, each with a weight of as many kinds as make it.
    weights = np.array([len(_MAKERS[sound]) for sound in _SOUNDS], dtype=float)
    sounds = rng.choice(len(_SOUNDS), count + 2, replace=False, p=weights / weights.sum())
    kinds = [str(rng.choice(_MAKERS[_SOUNDS[sound]])) for sound in sounds]
    on_screen = rng.random(count) < 0.8
    silent = min(int(rng.choice([0, 1, 2], p=[0.45, 0.4, 0.15])), MAX_OBJECTS - int(on_screen.sum()))
    places = _places(rng, int(on_screen.sum()) + silent)
    events = []
    for kind, seen, (onset, length) in zip(kinds[:count], on_screen, _times(rng, count, duration), strict=True):
        pitch, rhythm = 2.0 ** rng.uniform(-0.25, 0.25), 2.0 ** rng.uniform(-0.4, 0.4)
        place = places.pop() if seen else None
        events.append(Event(kind, onset, length, float(pitch), float(rhythm), float(rng.uniform(-9, 0)), place))
    silent_objects = tuple(SilentObject(kind, places.pop()) for kind in kinds[count : count + silent])
    events.sort(key=lambda event: event.onset)
    return Scene(seed, split, index, duration, tuple(events), silent_objects, float(rng.uniform(-45, -22)))


def render_waveform(scene: Scene) -> np.ndarray:
    """The sound of a scene: `np.ndarray` of shape `(samples,)`, float32, mono, 16 kHz, within ±1."""
    rng = scene.rng("sound")
    waveform = background(rng, round(scene.duration * SAMPLING_RATE), scene.noise)
    for event in scene.events:
        samples = synthesize(KINDS[event.kind].sound, rng, event.duration, event.pitch, event.rhythm)
        start = round(event.onset * SAMPLING_RATE)
        waveform[start : start + len(samples)] += samples[: len(waveform) - start] * 10 ** (event.loudness / 20)
    return waveform / max(1.0, np.abs(waveform).max())


def render_frames(scene: Scene, timestamps: np.ndarray, size: int = 64) -> np.ndarray:
    """Draws the picture of a scene at given times.

    Args:
        scene (`Scene`): The scene.
        timestamps (`np.ndarray` of shape `(frames,)`): Seconds.
        size (`int`): Width and height in pixels.

    Returns:
        `np.ndarray` of shape `(frames, size, size, 3)`, uint8 RGB.
    """
    actors = [Actor(KINDS[silent.kind].look, silent.place) for silent in scene.silent_objects]
    for event in scene.events:
        if event.place is not None:
            look, rate = KINDS[event.kind].look, 2.5 * event.rhythm
            actors.append(Actor(look, event.place, event.onset, event.offset, rate))
    return draw(tuple(actors), timestamps, size, scene.rng("picture"))


def render(scene: Scene, fps: float = 10.0, size: int = 64) -> RenderedClip:
    """Renders sound and picture of a scene.

    Args:
        scene (`Scene`): The scene.
        fps (`float`): Frames per second.
        size (`int`): Width and height of the picture in pixels.
    """
    timestamps = np.arange(round(scene.duration * fps)) / fps
    return RenderedClip(render_waveform(scene), render_frames(scene, timestamps, size), timestamps)


def write_clip(scene: Scene, path: str | os.PathLike, fps: int = 10, size: int = 128) -> None:
    """Writes a scene as an MP4 file with H.264 video and AAC sound.

    The same scene gives the same bytes with the same version of the codecs. The file appears when it is complete.

    Args:
        scene (`Scene`): The scene.
        path (`str` or `os.PathLike`): The file; its folder is made if it is missing.
        fps (`int`): Frames per second.
        size (`int`): Width and height of the picture in pixels, even.

    Raises:
        ValueError: If `size` is odd: H.264 with 4:2:0 colours cannot hold it.
    """
    if size % 2:
        raise ValueError(f"size={size} is odd, H.264 needs an even one; use {size + 1}")
    clip = render(scene, fps, size)
    write_mp4(path, clip.waveform, clip.frames, fps)


def write_mp4(path: str | os.PathLike, waveform: np.ndarray, frames: np.ndarray, fps: int) -> None:
    """Writes sound and picture as an MP4 file with H.264 video and AAC sound. The file appears when it is complete.

    Args:
        path (`str` or `os.PathLike`): The file; its folder is made if it is missing.
        waveform (`np.ndarray` of shape `(samples,)`): float32, mono, 16 kHz, within ±1.
        frames (`np.ndarray` of shape `(frames, height, width, 3)`): uint8 RGB, with even height and width.
        fps (`int`): Frames per second.
    """
    height, width = frames.shape[1:3]
    with (
        whole_file(Path(path)) as partial,
        av.open(partial, "w", format="mp4", options={"movflags": "+faststart"}) as container,
    ):
        video = container.add_stream("libx264", rate=fps, width=width, height=height, pix_fmt="yuv420p")
        video.options = {"preset": "veryfast", "crf": "20", "threads": "1"}
        audio = container.add_stream("aac", rate=SAMPLING_RATE, layout="mono", bit_rate=64_000)
        for array in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(video.encode())
        for start in range(0, len(waveform), 1024):
            block = av.AudioFrame.from_ndarray(waveform[None, start : start + 1024], format="fltp", layout="mono")
            block.sample_rate, block.time_base, block.pts = SAMPLING_RATE, Fraction(1, SAMPLING_RATE), start
            container.mux(audio.encode(block))
        container.mux(audio.encode())


def manifest_entry(scene: Scene, media: str) -> dict:
    """One line of a manifest: `id`, `media` (the name of the file), `captions`, and the true content of the clip."""
    return {
        "id": scene.id,
        "media": media,
        "captions": scene.captions,
        "names": sorted(scene.names),
        "events": [
            {
                "kind": event.kind,
                "onset": event.onset,
                "offset": round(event.offset, 2),
                "on_screen": event.place is not None,
                "sound_alike": event.kind in SOUND_ALIKES,
            }
            for event in scene.events
        ],
        "silent_objects": [silent.kind for silent in scene.silent_objects],
    }


def write_dataset(
    output: str | os.PathLike, split: str, clips: int, seed: int, duration: float = 5.0, fps: int = 10, size: int = 128
) -> Path:
    """Writes the first clips of a split as MP4 files, and `manifest.jsonl` with a line for each of them.

    A second call with the same arguments makes only the missing files.

    Args:
        output (`str` or `os.PathLike`): Folder; it is made if it is missing.
        split (`str`), seed (`int`), duration (`float`): See `make_scene`.
        clips (`int`): Number of clips; their indices are 0 to `clips` - 1.
        fps (`int`), size (`int`): See `write_clip`.

    Returns:
        `Path`: The manifest. It appears when all clips are there.
    """
    output = Path(output)
    manifest = output / "manifest.jsonl"
    with whole_file(manifest) as partial, partial.open("w", encoding="utf-8") as lines:
        for index in tqdm(range(clips), desc=f"{split} clips", unit="clip"):
            scene = make_scene(seed, split, index, duration)
            media = f"{scene.id}.mp4"
            if not (output / media).exists():
                write_clip(scene, output / media, fps, size)
            lines.write(json.dumps(manifest_entry(scene, media)) + "\n")
    return manifest


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m evacap.training.procedural.scenes", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--output", required=True, help="folder for the MP4 files and manifest.jsonl")
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--clips", type=int, default=100, help="number of clips (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the whole dataset (default: %(default)s)")
    parser.add_argument("--duration", type=float, default=5.0, help="seconds, 5 to 10 (default: %(default)s)")
    parser.add_argument("--fps", type=int, default=10, help="frames a second (default: %(default)s)")
    parser.add_argument("--size", type=int, default=128, help="width and height in pixels (default: %(default)s)")
    print(write_dataset(**vars(parser.parse_args(arguments))))


if __name__ == "__main__":
    main()

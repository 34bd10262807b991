"""Clips that are made in no time: half a second of sound and a picture, in the files that AVCap has."""

import json
import wave
from pathlib import Path

import numpy as np
from PIL import Image


SAMPLING_RATE = 16000


def write_sound(path: Path, number: int, seconds: float = 0.5) -> Path:
    """A WAV file with noise that no other number has."""
    samples = np.random.default_rng(number).normal(0, 3000, round(seconds * SAMPLING_RATE)).astype("<i2")
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLING_RATE)
        file.writeframes(samples.tobytes())
    return path


def picture(number: int) -> np.ndarray:
    """A smooth picture, (72, 96, 3), whose left half tells its number in the brightness, from 0 to 39."""
    pixels = np.full((72, 96, 3), 20 + 5 * number, dtype=np.uint8)
    pixels[:, 48:] = np.linspace(60, 180, 48)[None, :, None]
    return pixels


def number_of(pixels: np.ndarray) -> int:
    """The number of a picture (3, height, width), from 0 to 255, also after JPEG."""
    return round((float(pixels[:, 8:-8, 4:16].mean()) - 20) / 5)


def write_picture(path: Path, number: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(number)).save(path, quality=95)
    return path


def captions_of(number: int) -> list[str]:
    """Two captions that no other number has, of words that the tiny checkpoint knows."""
    return ["dog" + number * " barks", "rain" + number * " falls"]


def write_small_clips(folder: Path, count: int, frames: int = 3) -> Path:
    """Clips `clip-00`, …, each with its own sound and frames 0, 1, …; returns their manifest."""
    lines = []
    for number in range(count):
        name = f"clip-{number:02d}"
        write_sound(folder / "waveforms" / f"{name}.wav", number)
        for frame in range(frames):
            write_picture(folder / "frames" / name / f"{frame}.jpg", frame)
        row = {"id": name, "audio": f"waveforms/{name}.wav", "frames": f"frames/{name}"}
        lines.append(json.dumps(row | {"captions": captions_of(number), "number": number}))
    manifest = folder / "manifest.jsonl"
    manifest.write_text("\n".join(lines))
    return manifest

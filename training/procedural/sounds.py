"""Synthesised sounds of the procedural clips: one function per sound, in numpy."""

from collections.abc import Callable

import numpy as np


SAMPLING_RATE = 16_000
EVENT_LEVEL = 0.1
PEAK = 0.8

Sound = Callable[[np.random.Generator, int, float, float], np.ndarray]


def _grains(
    num_samples: int, starts: np.ndarray, frequencies: np.ndarray, amplitudes: np.ndarray, decay: float
) -> np.ndarray:
    """Adds a damped sum of sines at every start.

    Args:
        num_samples (`int`): Length of the result.
        starts (`np.ndarray` of shape `(grains,)`): First sample of each grain.
        frequencies (`np.ndarray` of shape `(grains, partials)` or `(partials,)`): Hertz.
        amplitudes (`np.ndarray`, broadcast to `(grains, partials)`): Amplitude of each partial.
        decay (`float`): Seconds in which a grain falls to 1/e; it is cut after five times as long.
    """
    time = np.arange(int(5 * decay * SAMPLING_RATE), dtype=np.float32) / SAMPLING_RATE
    frequencies = np.broadcast_to(frequencies, (len(starts), np.shape(frequencies)[-1])).astype(np.float32)
    amplitudes = np.broadcast_to(amplitudes, frequencies.shape).astype(np.float32)
    grains = sum(
        amplitudes[:, [partial]] * np.sin(2 * np.pi * frequencies[:, [partial]] * time)
        for partial in range(frequencies.shape[1])
    ) * np.exp(-time / decay)
    positions = starts[:, None] + np.arange(len(time))
    return np.bincount(positions.ravel(), grains.ravel(), num_samples)[:num_samples].astype(np.float32)


def _starts(rng: np.random.Generator, num_samples: int, rate: float, jitter: float = 0.1) -> np.ndarray:
    """Sample numbers of strokes, `rate` per second, each late by up to `jitter` of a beat."""
    beats = np.arange(max(1, int(num_samples / SAMPLING_RATE * rate + 0.7)))
    return ((beats + rng.uniform(0, jitter, len(beats))) * SAMPLING_RATE / rate).astype(int)


def _noise(rng: np.random.Generator, num_samples: int, low: float, high: float) -> np.ndarray:
    """White noise of unit root mean square between two frequencies in hertz, with soft edges."""
    spectrum = np.fft.rfft(rng.random(num_samples, dtype=np.float32) - 0.5)
    frequency = np.linspace(0, SAMPLING_RATE / 2, len(spectrum), dtype=np.float32) + 1
    spectrum *= 1 / (1 + (low / frequency) ** 4) / (1 + (frequency / high) ** 4)
    noise = np.fft.irfft(spectrum, num_samples).astype(np.float32)
    return noise / (np.sqrt(np.mean(noise**2)) + 1e-9)


def _seconds(num_samples: int) -> np.ndarray:
    return np.arange(num_samples, dtype=np.float32) / SAMPLING_RATE


def _bursts(num_samples: int, starts: np.ndarray, seconds: float) -> np.ndarray:
    """1 within `seconds` after a start and 0 elsewhere, with a sine-shaped rise and fall."""
    shape = np.abs(np.sin(np.linspace(0, np.pi, int(seconds * SAMPLING_RATE), dtype=np.float32))) ** 0.5
    envelope = np.zeros(num_samples + len(shape), np.float32)
    for start in starts[starts < num_samples]:
        envelope[start : start + len(shape)] = shape
    return envelope[:num_samples]


def _voice(
    rng: np.random.Generator, num_samples: int, fundamental: np.ndarray, formants: np.ndarray, weights: tuple
) -> np.ndarray:
    """Glottal pulses through formants.

    Args:
        fundamental (`np.ndarray` of shape `(num_samples,)`): Hertz.
        formants (`np.ndarray` of shape `(syllables, partials)`): Hertz; all syllables are equally long.
        weights (`tuple` of `partials` floats): Amplitudes of the formants.
    """
    cycles = np.cumsum(fundamental / SAMPLING_RATE)
    starts = np.flatnonzero(np.diff(np.floor(cycles)) > 0)
    syllable = starts * len(formants) // num_samples
    return _grains(num_samples, starts, formants[syllable], np.array(weights), 0.0025)


def engine(rng: np.random.Generator, num_samples: int, pitch: float, rhythm: float) -> np.ndarray:
    time = _seconds(num_samples)
    firing = 30 * rhythm * (1 + 0.15 * np.sin(2 * np.pi * rng.uniform(0.3, 0.8) * time + rng.uniform(0, 6)))
    starts = np.flatnonzero(np.diff(np.floor(np.cumsum(firing / SAMPLING_RATE))) > 0)
    strokes = _grains(num_samples, starts, pitch * np.array([95.0, 190.0, 410.0]), np.array([1, 0.7, 0.4]), 0.012)
    return strokes + 0.1 * _noise(rng, num_samples, 60, 900)


def hiss(rng: np.random.Generator, num_samples: int, pitch: float, rhythm: float) -> np.ndarray:
    starts = np.sort(rng.integers(0, num_samples, max(1, int(num_samples / SAMPLING_RATE * 25 * rhythm))))
    frequencies = pitch * rng.uniform(2500, 5500, (len(starts), 1))
    crackle = _grains(num_samples, starts, frequencies, rng.uniform(0.5, 4, (len(starts), 1)), 0.002)
    return _noise(rng, num_samples, 1500 * pitch, 7000) + crackle


def knock(rng: np.random.Generator, num_samples: int, pitch: float, rhythm: float) -> np.ndarray:
    starts = _starts(rng, num_samples, 4 * rhythm)
    loudness = rng.uniform(0.7, 1, (len(starts), 1))
    return _grains(num_samples, starts, pitch * np.array([240, 530, 880, 1500]), loudness * [1, 0.8, 0.5, 0.4], 0.018)


def tick(rng: np.random.Generator, num_samples: int, pitch: float, rhythm: float) -> np.ndarray:
    starts = _starts(rng, num_samples, 5 * rhythm, jitter=0)
    alternate = np.where(np.arange(len(starts))[:, None] % 2, 1.15, 1)
    return _grains(num_samples, starts, pitch * alternate * [2300, 3900, 5600], np.array([1, 0.8, 0.6]), 0.006)


def bleat(rng: np.random.Generator, num_samples: int, pitch: float, rhythm: float) -> np.ndarray:
    time = _seconds(num_samples)
    tremolo = np.sin(2 * np.pi * 9 * rhythm * time)
    voice = _voice(rng, num_samples, pitch * (260 + 20 * tremolo), np.array([[800, 1700, 2900]]), (1, 0.8, 0.5))
    calls = _bursts(num_samples, _starts(rng, num_samples, 1.3 * rhythm), 0.6 / rhythm)
    return voice * calls * (0.6 + 0.4 * tremolo)


def quack(rng: np.random.Generator, num_samples: int, pitch: float, rhythm: float) -> np.ndarray:
    calls = _bursts(num_samples, _starts(rng, num_samples, 3 * rhythm), 0.16)
    fundamental = np.full(num_samples, 160 * pitch)
    return calls * _voice(rng, num_samples, fundamental, pitch * np.array([[1150, 2250, 3600]]), (1, 0.9, 0.3))


def bark(rng: np.random.Generator, num_samples: int, pitch: float, rhythm: float) -> np.ndarray:
    starts = _starts(rng, num_samples, 2.4 * rhythm, jitter=0.25)
    envelope = _bursts(num_samples, starts, 0.13)
    voice = _voice(rng, num_samples, pitch * (330 + 250 * envelope), np.array([[650, 1250]]), (1, 0.6))
    return envelope * (voice + 0.25 * _noise(rng, num_samples, 500, 2500))


def _speech(rng: np.random.Generator, num_samples: int, fundamental: float, tract: float, rhythm: float) -> np.ndarray:
    syllables = max(1, int(num_samples / SAMPLING_RATE * 4.5 * rhythm))
    formants = tract * rng.uniform((300, 900, 2300), (800, 2100, 2900), (syllables, 3))
    melody = 1 + 0.12 * np.interp(np.arange(num_samples), np.linspace(0, num_samples, 9), rng.uniform(-1, 1, 9))
    stress = np.abs(np.sin(np.pi * syllables * np.arange(num_samples) / num_samples)) ** 0.5
    return stress * _voice(rng, num_samples, fundamental * melody, formants, (1, 0.6, 0.3))


def low_voice(rng: np.random.Generator, num_samples: int, pitch: float, rhythm: float) -> np.ndarray:
    return _speech(rng, num_samples, 105 * pitch, 0.92, rhythm)


def high_voice(rng: np.random.Generator, num_samples: int, pitch: float, rhythm: float) -> np.ndarray:
    return _speech(rng, num_samples, 225 * pitch, 1.12, rhythm)


def bell(rng: np.random.Generator, num_samples: int, pitch: float, rhythm: float) -> np.ndarray:
    starts = _starts(rng, num_samples, 1.7 * rhythm)
    partials = 620 * pitch * np.array([1, 1.19, 2, 2.74, 4.1])
    return _grains(num_samples, starts, partials, np.array([0.6, 0.6, 1, 0.6, 0.4]), 0.25)


def siren(rng: np.random.Generator, num_samples: int, pitch: float, rhythm: float) -> np.ndarray:
    sweep = np.sin(2 * np.pi * 0.9 * rhythm * _seconds(num_samples) + rng.uniform(0, 6))
    phase = 2 * np.pi * np.cumsum(pitch * (1000 + 350 * sweep) / SAMPLING_RATE).astype(np.float32)
    return np.sin(phase) + 0.4 * np.sin(2 * phase) + 0.2 * np.sin(3 * phase)


def chirp(rng: np.random.Generator, num_samples: int, pitch: float, rhythm: float) -> np.ndarray:
    starts = _starts(rng, num_samples, 5 * rhythm, jitter=0.4)
    envelope = _bursts(num_samples, starts, 0.1)
    wobble = np.sin(2 * np.pi * 11 * rhythm * _seconds(num_samples))
    phase = 2 * np.pi * np.cumsum(pitch * (4000 + 700 * wobble + 400 * envelope) / SAMPLING_RATE)
    return envelope * np.sin(phase.astype(np.float32))


def wind(rng: np.random.Generator, num_samples: int, pitch: float, rhythm: float) -> np.ndarray:
    gusts = 0.65 + 0.35 * np.sin(2 * np.pi * 0.7 * rhythm * _seconds(num_samples) + rng.uniform(0, 6))
    return gusts * _noise(rng, num_samples, 180 * pitch, 650 * pitch)


def rotor(rng: np.random.Generator, num_samples: int, pitch: float, rhythm: float) -> np.ndarray:
    time = _seconds(num_samples)
    blade = np.maximum(np.sin(2 * np.pi * 13 * rhythm * time), 0) ** 2
    whine = np.sin(2 * np.pi * 1900 * pitch * time)
    return blade * _noise(rng, num_samples, 60, 1300) + 0.12 * whine


SOUNDS: dict[str, Sound] = {
    "engine": engine,
    "hiss": hiss,
    "knock": knock,
    "bleat": bleat,
    "bell": bell,
    "siren": siren,
    "chirp": chirp,
    "quack": quack,
    "low voice": low_voice,
    "high voice": high_voice,
    "bark": bark,
    "tick": tick,
    "wind": wind,
    "rotor": rotor,
}


def synthesize(sound: str, rng: np.random.Generator, seconds: float, pitch: float, rhythm: float) -> np.ndarray:
    """One sound event at the reference level, faded in and out.

    Args:
        sound (`str`): Key of `SOUNDS`.
        rng (`np.random.Generator`): Draws the small variations of the event.
        seconds (`float`): Duration.
        pitch (`float`): Factor on the frequencies of the sound; 1 is its usual pitch.
        rhythm (`float`): Factor on the rate of strokes, syllables or turns; 1 is the usual rate.

    Returns:
        `np.ndarray` of shape `(samples,)`, float32, 16 kHz, with a root mean square of `EVENT_LEVEL` or a peak of
        `PEAK`, whichever is quieter.
    """
    # Whole hundredths of a second are lengths with a fast Fourier transform.
    num_samples = max(1, round(seconds * 100)) * SAMPLING_RATE // 100
    samples = np.asarray(SOUNDS[sound](rng, num_samples, pitch, rhythm), dtype=np.float32)
    fade = np.linspace(0, 1, min(320, num_samples // 2), dtype=np.float32)
    samples[: len(fade)] *= fade
    samples[num_samples - len(fade) :] *= fade[::-1]
    return samples * min(EVENT_LEVEL / np.sqrt(np.mean(samples**2)), PEAK / np.abs(samples).max())


def background(rng: np.random.Generator, num_samples: int, decibels: float) -> np.ndarray:
    """Room noise with a random tilt towards the low frequencies.

    Args:
        rng (`np.random.Generator`): Draws the noise and its tilt.
        num_samples (`int`): Length of the result.
        decibels (`float`): Level relative to `EVENT_LEVEL`; negative.

    Returns:
        `np.ndarray` of shape `(num_samples,)`, float32.
    """
    white = rng.random(num_samples + 16, dtype=np.float32) - 0.5
    total = np.cumsum(white, dtype=np.float64)
    low = (total[16:] - total[:-16]).astype(np.float32)
    noise = white[16:] + rng.uniform(0.2, 2) * low
    return noise * np.float32(EVENT_LEVEL * 10 ** (decibels / 20) / np.sqrt(np.mean(noise**2)))

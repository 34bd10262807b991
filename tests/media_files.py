"""Media files for the tests: every frame carries its number as a barcode, every second of sound begins with a beep."""

import random
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


WIDTH, HEIGHT, BITS = 160, 96, 10
BEEP_SECONDS = 0.25


def barcode(number: int) -> np.ndarray:
    """A picture `(96, 160, 3)` whose upper half shows `number` in ten stripes; the lower half is red."""
    picture = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    bits = [(number >> bit) & 1 for bit in range(BITS)]
    picture[: HEIGHT // 2] = np.repeat(bits, WIDTH // BITS)[None, :, None] * 255
    picture[HEIGHT // 2 :, :, 0] = 255
    return picture


def read_barcode(picture: np.ndarray) -> int:
    """The number of a picture that `barcode` drew, also after a lossy codec; it must be upright."""
    lower = picture[HEIGHT * 5 // 8 : HEIGHT * 7 // 8].mean(axis=(0, 1))
    assert lower[0] > 150 and lower[2] < 100, f"not an upright barcode: the lower half is {lower}"
    stripes = picture[HEIGHT // 8 : HEIGHT * 3 // 8].mean(axis=(0, 2)).reshape(BITS, -1)[:, 4:-4].mean(axis=1)
    return sum(1 << bit for bit, stripe in enumerate(stripes) if stripe > 128)


def read_barcodes(frames: np.ndarray) -> list[int]:
    return [read_barcode(frame) for frame in frames]


def beeps(seconds: float, rate: int, channels: int = 1) -> np.ndarray:
    """`(channels, samples)` float32: a tone of 500 Hz and amplitude 0.5 in the first quarter of every second.

    Channel `c` has the amplitude `0.5 / (c + 1)`.
    """
    time = np.arange(round(seconds * rate)) / rate
    tone = 0.5 * np.sin(2 * np.pi * 500 * time) * (time % 1 < BEEP_SECONDS)
    return np.stack([tone / (channel + 1) for channel in range(channels)]).astype(np.float32)


def beep_starts(waveform: np.ndarray, rate: int) -> list[float]:
    """When the beeps start, in seconds."""
    loud = np.convolve(np.abs(waveform), np.ones(rate // 100) / (rate // 100), mode="same") > 0.1
    return (np.flatnonzero(np.diff(loud.astype(int), prepend=0) == 1) / rate).tolist()


def tones(seconds: float, rate: int = 16000, first: int = 0) -> np.ndarray:
    """(1, samples): second `k` is a tone of 400 + 100·(first + k) Hz."""
    moments = np.arange(round(seconds * rate)) / rate
    return (0.4 * np.sin(2 * np.pi * (400 + 100 * (first + np.floor(moments))) * moments)).astype(np.float32)[None]


def write_clip(
    path: Path,
    *,
    seconds: float = 4.0,
    fps: int = 25,
    times: list[float] | None = None,
    video: str | None = "libx264",
    audio: str | None = "aac",
    rate: int = 44100,
    layout: str = "mono",
    sound: np.ndarray | None = None,
    audio_delay: float = 0.0,
    gop: int = 12,
    options: dict[str, str] | None = None,
    format: str | None = None,
) -> Path:
    """Write a clip with barcodes and beeps.

    Args:
        path: The file; its extension names the container unless `format` does.
        seconds: Length of sound and picture.
        fps: Frames a second.
        times: When each frame appears, in seconds, instead of `fps`.
        video: Encoder of the picture, `None` for none.
        audio: Encoder of the sound, `None` for none.
        rate: Samples a second.
        layout: Channels: `"mono"`, `"stereo"`, `"5.1"`, or another name that FFmpeg knows.
        sound: `(channels, samples)` instead of beeps.
        audio_delay: Time stamp of the first sample, in seconds. The beeps still begin with it.
        gop: Frames from key frame to key frame.
        options: Of the container, such as `{"movflags": "faststart"}`.
    """
    with av.open(str(path), "w", format=format, options=options or {}) as container:
        packets = []
        streams = []
        if video is not None:
            stream = container.add_stream(video, rate=fps)
            stream.width, stream.height = WIDTH, HEIGHT
            stream.pix_fmt = {"mjpeg": "yuvj420p", "png": "rgb24"}.get(video, "yuv420p")
            stream.codec_context.gop_size = gop
            if video == "libx265":
                stream.options = {"x265-params": f"keyint={gop}:log-level=none"}
            clock = Fraction(1, fps) if times is None else Fraction(1, 1000)
            stream.codec_context.time_base = clock
            streams.append(stream)
        if audio is not None:
            voice = container.add_stream(audio, rate=rate, layout=layout)
            streams.append(voice)
        if video is not None:
            stamps = [i / fps for i in range(round(seconds * fps))] if times is None else times
            for number, time in enumerate(stamps):
                frame = av.VideoFrame.from_ndarray(barcode(number), format="rgb24").reformat(format=stream.pix_fmt)
                frame.pts, frame.time_base = round(time / clock), clock
                packets += stream.encode(frame)
            packets += stream.encode(None)
        if audio is not None:
            samples = beeps(seconds, rate, voice.codec_context.layout.nb_channels) if sound is None else sound
            for first in range(0, samples.shape[1], 1024):
                chunk = np.ascontiguousarray(samples[:, first : first + 1024].T).reshape(1, -1)
                frame = av.AudioFrame.from_ndarray(chunk, format="flt", layout=layout)
                frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
                frame.pts = first + round(audio_delay * rate)
                packets += voice.encode(frame)
            packets += voice.encode(None)
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            container.mux(packet)
    return path


def video_track(data: bytes) -> int:
    """Where the picture's `trak` box begins in the bytes of an mp4 file."""
    handler = data.index(b"vide", data.index(b"moov"))
    return data.rindex(b"trak", 0, handler)


def rotate(path: Path, degrees: int):
    """Set the display matrix of an mp4 file: players turn the picture clockwise by `degrees`."""
    data = bytearray(path.read_bytes())
    sine, cosine = {0: (0, 1), 90: (1, 0), 180: (0, -1), 270: (-1, 0)}[degrees]
    matrix = [cosine << 16, sine << 16, 0, -sine << 16, cosine << 16, 0, 0, 0, 1 << 30]
    where = data.index(b"tkhd", video_track(data)) + 44
    data[where : where + 36] = struct.pack(">9i", *matrix)
    path.write_bytes(data)


def cut_by_edit_list(path: Path, seconds: float):
    """Let the picture of an mp4 file begin `seconds` later, by its edit list alone."""
    data = bytearray(path.read_bytes())
    track = video_track(data)
    timescale = struct.unpack_from(">I", data, data.index(b"mdhd", track) + 16)[0]
    movie_timescale = struct.unpack_from(">I", data, data.index(b"mvhd") + 16)[0]
    where = data.index(b"elst", track) + 12
    length, begin = struct.unpack_from(">Ii", data, where)
    struct.pack_into(">Ii", data, where, length - round(seconds * movie_timescale), begin + round(seconds * timescale))
    path.write_bytes(data)


def damage(data: bytes, chance: random.Random) -> bytes:
    """A copy with wrong bytes or numbers, holes, a missing end or something in between."""
    data, size = bytearray(data), len(data)
    kind = chance.choice(["bytes", "head", "tail", "numbers", "zeros", "cut", "insert"])
    if kind == "bytes":
        for _ in range(max(1, size // chance.choice([50, 500, 5000]))):
            data[chance.randrange(size)] = chance.randrange(256)
    elif kind in ("head", "tail"):
        for _ in range(chance.randint(1, 40)):
            where = chance.randrange(min(size, 3000))
            data[where if kind == "head" else -1 - where] = chance.randrange(256)
    elif kind == "numbers":
        for _ in range(chance.randint(1, 4)):
            where = chance.randrange(size - 4)
            data[where : where + 4] = chance.choice([b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"\0" * 4])
    elif kind == "zeros":
        where = chance.randrange(size)
        length = min(chance.randint(1, size // 4), size - where)
        data[where : where + length] = bytes(length)
    elif kind == "cut":
        del data[chance.randrange(20, size) :]
    else:
        where = chance.randrange(size)
        data[where:where] = chance.randbytes(chance.randint(1, 5000))
    return bytes(data)

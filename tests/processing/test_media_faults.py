"""Files that were read wrongly somewhere: clocks that break, stills, indexes that lie, silence, small files that cost much.

Second `k` of every sound is a tone of 400 + 100·k Hz, and every picture carries its number, so that the place of each can
be told.
"""

import http.server
import io
import logging
import struct
import threading
import time
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from media_files import HEIGHT, WIDTH, barcode, beep_starts, read_barcode, read_barcodes, tones, write_clip

from evacap.processing import media_evacap
from evacap.processing.feature_extraction_evacap import EVACapFeatureExtractor
from evacap.processing.media_evacap import MediaError, load_media, probe_media, read_media
from evacap.processing.video_processing_evacap import EVACapVideoProcessor


RATE = 16000


@pytest.fixture
def warnings():
    """The warnings of the reader, as a list."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    media_evacap.logger.addHandler(handler)
    yield messages
    media_evacap.logger.removeHandler(handler)


def heard(waveform: np.ndarray, rate: int = RATE) -> list[int | None]:
    """Which second of `tones` each whole second is; `None` for silence."""
    seconds = []
    for start in range(0, len(waveform) - rate + 1, rate):
        middle = waveform[start + rate // 4 : start + 3 * rate // 4]
        spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle))))
        frequency = spectrum.argmax() * rate / len(middle)
        seconds.append(round((frequency - 400) / 100) if np.abs(middle).max() > 0.01 else None)
    return seconds


def windows(source, seconds: float, **options) -> list:
    """All windows of a file, in one pass."""
    found = []
    with read_media(source, **options) as reader:
        while True:
            found.append(reader.read(seconds))
            if not reader.goes_on(0.5):
                return found


def wav(
    samples: np.ndarray, rate: int = RATE, byte_rate: int | None = None, sizes: tuple[int, int] | None = None
) -> bytes:
    """A WAV file of 16 bits `(channels, samples)`, of which the header may lie."""
    data = (samples.T * 32767).astype("<i2").tobytes()
    channels = len(samples)
    riff, length = sizes or (36 + len(data), len(data))
    header = (
        b"RIFF"
        + struct.pack("<I", riff)
        + b"WAVEfmt "
        + struct.pack("<IHHIIHH", 16, 1, channels, rate, byte_rate or 2 * channels * rate, 2 * channels, 16)
    )
    return header + b"data" + struct.pack("<I", length) + data


# One pass


@pytest.mark.parametrize("apart", [4, 15, 40])
@pytest.mark.parametrize("extension", ["mp4", "mkv", "ts"])
def test_slides_keep_their_sound(tmp_path, warnings, extension, apart):
    """Pictures far apart, coded out of order: what is decoded by now is not what is on display by then."""
    seconds = 24
    path = write_clip(
        tmp_path / f"slides.{extension}",
        times=[float(second) for second in range(0, 3 * apart + 1, apart)],
        sound=tones(seconds, 48000),
        rate=48000,
        gop=250,
    )
    found = windows(path, 6.0)[:4]
    assert [second for window in found for second in heard(window.waveform)] == list(range(seconds))
    for window in found:
        moments = window.start + (np.arange(18) + 0.5) / 3
        assert read_barcodes(window.frames) == [min(3, int(moment // apart)) for moment in moments]
    assert heard(load_media(path, start=13, duration=4).waveform) == [13, 14, 15, 16]
    assert warnings == []


def write_coded(path: Path, video: str, audio: str | None, seconds: int = 8, **options: str) -> Path:
    """A clip of 25 frames a second by an encoder with options of its own."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(video, rate=25, width=WIDTH, height=HEIGHT)
        stream.pix_fmt = options.pop("pix_fmt", "yuv420p")
        stream.options = options
        stream.codec_context.gop_size = 24
        packets = []
        for number in range(25 * seconds):
            frame = av.VideoFrame.from_ndarray(barcode(number), format="rgb24").reformat(format=stream.pix_fmt)
            frame.pts, frame.time_base = number, Fraction(1, 25)
            packets += stream.encode(frame)
        packets += stream.encode(None)
        if audio is not None:
            voice = container.add_stream(audio, rate=48000, layout="mono")
            sound = tones(seconds, 48000)
            for first in range(0, sound.shape[1], 1152):
                frame = av.AudioFrame.from_ndarray(sound[:, first : first + 1152].copy(), format="flt", layout="mono")
                frame.sample_rate, frame.pts, frame.time_base = 48000, first, Fraction(1, 48000)
                packets += voice.encode(frame)
            packets += voice.encode(None)
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            container.mux(packet)
    return path


CODED = {
    "open groups.mp4": ("libx264", "aac", {"x264-params": "open-gop=1:keyint=24:bframes=3"}),
    "open groups.ts": ("libx264", "aac", {"x264-params": "open-gop=1:keyint=24:bframes=3"}),
    "intra refresh.mp4": ("libx264", "aac", {"x264-params": "intra-refresh=1:keyint=24:bframes=0"}),
    "program stream.mpg": ("mpeg2video", "mp2", {"bf": "2"}),
    "xvid.avi": ("mpeg4", "libmp3lame", {"bf": "2"}),
    "x264.avi": ("libx264", "libmp3lame", {}),
    "fragments.webm": ("libvpx-vp9", "libopus", {"auto-alt-ref": "1", "lag-in-frames": "16"}),
}


@pytest.mark.parametrize("name", CODED)
def test_pictures_after_a_start_are_those_of_a_sequential_decode(tmp_path, name):
    video, audio, options = CODED[name]
    path = write_coded(tmp_path / name, video, audio, **options)
    whole = load_media(path, fps=25)
    numbers = dict(zip(whole.timestamps.round(4), read_barcodes(whole.frames)))
    assert list(numbers.values()) == list(range(200)), "the sequential decode itself"
    for start, duration in ((0.3, 1.0), (1.01, 0.5), (2.9, 3.0), (5.55, 2.0), (7.0, 1.0)):
        window = load_media(path, start=start, duration=duration, num_frames=7)
        moments = start + (np.arange(7) + 0.5) * window.duration / 7
        stamps = np.array(list(numbers))
        expected = [numbers[stamps[np.searchsorted(stamps, moment + 1e-6, side="right") - 1]] for moment in moments]
        assert read_barcodes(window.frames) == expected


def test_a_decoder_sees_the_first_packet_of_its_file(tmp_path):
    """Old x264 coded 4:4:4 in another way, and says which it is once, in front of the first picture."""
    path = write_coded(tmp_path / "old.mp4", "libx264", None, pix_fmt="yuv444p", qp="30")
    data = path.read_bytes()
    where = data.index(b"x264 - core ") + len(b"x264 - core ")
    path.write_bytes(data[:where] + b"120" + data[where + 3 :])
    whole = load_media(path, fps=25)
    for start in (2.0, 5.2):
        window = load_media(path, start=start, duration=1.0, num_frames=5)
        for stamp, frame in zip(window.timestamps + start, window.frames):
            assert np.array_equal(frame, whole.frames[np.abs(whole.timestamps - stamp).argmin()])


def test_a_file_is_opened_once(tmp_path, monkeypatch):
    opened = []
    real = av.open
    monkeypatch.setattr(av, "open", lambda *args, **options: opened.append(args) or real(*args, **options))
    path = write_clip(tmp_path / "clip.mp4", seconds=6)
    opened.clear()
    assert len(windows(path, 2.0)) == 3
    assert len(opened) == 1
    load_media(path, start=3, duration=2)
    assert len(opened) == 2


def test_windows_of_one_pass_are_those_that_are_asked_for_alone(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", seconds=9, sound=tones(9, 48000), rate=48000)
    for index, window in enumerate(windows(path, 2.5, num_frames=5)):
        alone = load_media(path, start=2.5 * index, duration=2.5, num_frames=5)
        assert np.array_equal(window.frames, alone.frames) and window.duration == pytest.approx(alone.duration)
        assert len(window.waveform) == len(alone.waveform)
        assert np.abs(window.waveform - alone.waveform).max() < 0.1, "half a sample off at most"


def test_pictures_that_are_too_many_bytes_are_read_in_a_pass_of_their_own(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "clip.mkv", seconds=6, gop=24, audio="flac")
    expected = windows(path, 2.0, num_frames=5)
    monkeypatch.setattr(media_evacap, "_QUEUE_BYTES", 10_000)
    for window, other in zip(windows(path, 2.0, num_frames=5), expected, strict=True):
        assert np.array_equal(window.frames, other.frames) and np.array_equal(window.waveform, other.waveform)


# Seeks by arithmetic


@pytest.mark.parametrize(
    "extension, kind", [("wav", "half"), ("wav", "double"), ("w64", "half"), ("aiff", None), ("au", None)]
)
def test_windows_of_sound_do_not_depend_on_the_byte_rate(tmp_path, warnings, extension, kind):
    path = tmp_path / f"sound.{extension}"
    if extension == "wav":
        path.write_bytes(wav(tones(12), byte_rate={"half": RATE, "double": 4 * RATE}[kind]))
    else:
        write_clip(
            path, video=None, audio="pcm_s16le" if extension == "w64" else "pcm_s16be", rate=RATE, sound=tones(12)
        )
        if kind:  # the byte rate stands behind the sampling rate
            data = path.read_bytes()
            rate = struct.pack("<I", RATE)
            where = data.index(rate) + 4
            path.write_bytes(data[:where] + rate + data[where + 4 :])
    assert heard(load_media(path, start=7, duration=3).waveform) == [7, 8, 9]
    assert [second for window in windows(path, 4.0) for second in heard(window.waveform)] == list(range(12))
    assert probe_media(path).duration == pytest.approx(12, abs=0.05)
    assert warnings == []


# Clocks


def write_stream(path: Path, parts: list[tuple[float, float]], seconds: float = 6.0) -> Path:
    """A transport stream whose clock shows `first` at the start of each part `(first, seconds)`."""
    sound, done, packets = tones(sum(length for _, length in parts), 48000), 0.0, []
    for first, length in parts:
        file = io.BytesIO()
        with av.open(file, "w", format="mpegts", options={"mpegts_copyts": "1", "muxdelay": "0"}) as container:
            stream = container.add_stream("libx264", rate=10, width=WIDTH, height=HEIGHT, pix_fmt="yuv420p")
            stream.options = {"x264-params": "bframes=2:keyint=10"}
            voice = container.add_stream("aac", rate=48000, layout="mono")
            queue = []
            for number in range(round(length * 10)):
                frame = av.VideoFrame.from_ndarray(barcode(number + round(done * 10)), format="rgb24")
                frame.pts, frame.time_base = round(first * 10) + number, Fraction(1, 10)
                queue += stream.encode(frame)
            queue += stream.encode(None)
            piece = sound[:, round(done * 48000) : round((done + length) * 48000)]
            for begin in range(0, piece.shape[1], 1024):
                frame = av.AudioFrame.from_ndarray(piece[:, begin : begin + 1024].copy(), format="flt", layout="mono")
                frame.sample_rate, frame.pts, frame.time_base = 48000, round(first * 48000) + begin, Fraction(1, 48000)
                queue += voice.encode(frame)
            queue += voice.encode(None)
            for packet in sorted(queue, key=lambda packet: packet.dts * packet.time_base):
                container.mux(packet)
        packets.append(file.getvalue())
        done += length
    path.write_bytes(b"".join(packets))
    return path


WRAP = 2**33 / 90000
CLOCKS = {
    "one part": [(10.0, 12.0)],
    "leaps ahead": [(10.0, 6.0), (2010.0, 6.0)],
    "begins anew": [(10.0, 6.0), (10.0, 6.0)],
    "runs back": [(5000.0, 6.0), (3.0, 6.0)],
    "three parts": [(10.0, 4.0), (800.0, 4.0), (1.0, 4.0)],
    "wraps": [(WRAP - 6.0, 12.0)],
}


@pytest.mark.parametrize("name", CLOCKS)
def test_seconds_are_counted_on_where_a_clock_breaks(tmp_path, name):
    path = write_stream(tmp_path / "clock.ts", CLOCKS[name])
    whole = load_media(path, num_frames=12)
    assert whole.duration == pytest.approx(12, abs=0.5)
    assert heard(whole.waveform) == list(range(12))
    for stamp, frame in zip(whole.timestamps, whole.frames):
        assert read_barcode(frame) / 10 == pytest.approx(stamp, abs=0.5)
    assert [second for window in windows(path, 3.0) for second in heard(window.waveform)] == list(range(12))
    assert heard(load_media(path, start=8, duration=2).waveform) == [8, 9]
    assert probe_media(path).duration == pytest.approx(whole.duration)


@pytest.mark.parametrize("audio", ["libopus", "flac"])
def test_chained_ogg_is_read_to_its_end(tmp_path, audio):
    parts = []
    for number in (0, 1):
        path = tmp_path / f"{number}.ogg"
        write_clip(path, video=None, audio=audio, rate=48000, sound=tones(4, 48000, first=4 * number))
        parts.append(path.read_bytes())
    chained = tmp_path / "chained.ogg"
    chained.write_bytes(parts[0] + parts[1])
    assert heard(load_media(chained).waveform)[:8] == list(range(8))
    assert heard(load_media(chained, start=5, duration=2).waveform) == [5, 6]


def test_a_clock_that_stands_still_is_counted(tmp_path):
    path = tmp_path / "still.mkv"
    with av.open(str(path), "w") as container:
        voice = container.add_stream("flac", rate=RATE, layout="mono")
        sound, packets = tones(6), []
        for first in range(0, sound.shape[1], 1024):
            frame = av.AudioFrame.from_ndarray(sound[:, first : first + 1024].copy(), format="flt", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = RATE, first, Fraction(1, RATE)
            packets += voice.encode(frame)
        for packet in [*packets, *voice.encode(None)]:
            packet.pts = packet.dts = 0
            container.mux(packet)
    assert [second for window in windows(path, 3.0) for second in heard(window.waveform)] == list(range(6))


def move_block(path: Path, kind: str, number: int, seconds: float):
    """Let a Matroska file say another time of one packet of its sound or picture."""
    with av.open(str(path)) as container:
        packets = [bytes(packet) for packet in container.demux(**{kind: 0}) if packet.size]
    data = bytearray(path.read_bytes())
    where = data.index(packets[number]) - 3  # behind the time, in milliseconds from that of the cluster, one of flags
    struct.pack_into(">h", data, where, struct.unpack_from(">h", data, where)[0] + round(1000 * seconds))
    path.write_bytes(data)


@pytest.mark.parametrize("extension, video, audio", [("mkv", "libx264", "flac"), ("webm", "libvpx-vp9", "libopus")])
def test_a_lone_wrong_time_costs_its_packet_alone(tmp_path, warnings, extension, video, audio):
    path = tmp_path / f"clip.{extension}"
    write_clip(path, seconds=6.2, video=video, audio=audio, rate=48000, sound=tones(6.2, 48000))
    move_block(path, "audio", 28 if audio == "flac" else 140, 2.3)
    assert heard(load_media(path).waveform)[:6] == list(range(6))
    assert [second for window in windows(path, 2.0) for second in heard(window.waveform)][:6] == list(range(6))
    assert heard(load_media(path, start=1, duration=3).waveform)[:3] == [1, 2, 3]


@pytest.mark.parametrize("seconds", [-1.5, 0.6, 3.0])
@pytest.mark.parametrize("extension, video", [("mkv", "libx264"), ("webm", "libvpx-vp9")])
def test_a_clock_that_is_wrong_for_a_while_costs_nothing(tmp_path, extension, video, seconds):
    """Half a second of sound and pictures, which one number places, is elsewhere or as if the clock had begun anew."""
    path = write_clip(
        tmp_path / f"clip.{extension}", seconds=8, video=video, audio="libopus", rate=48000, sound=tones(8, 48000)
    )
    data = bytearray(path.read_bytes())
    where = -1
    for _ in range(5):
        where = data.index(b"\x1f\x43\xb6\x75", where + 1)
    where = data.index(b"\xe7\x82", where) + 2
    struct.pack_into(">H", data, where, struct.unpack_from(">H", data, where)[0] + round(1000 * seconds))
    path.write_bytes(data)
    found = windows(path, 2.0, num_frames=8)[:4]
    assert [second for window in found for second in heard(window.waveform)] == list(range(8))
    for window in found:
        moments = window.start + (np.arange(8) + 0.5) / 4
        assert np.abs(read_barcodes(window.frames) - np.floor(25 * moments)).max() <= 3


def test_a_picture_without_a_credible_time_is_decoded(tmp_path, warnings):
    path = tmp_path / "clip.webm"
    write_clip(path, seconds=6, video="libvpx-vp9", audio="libopus", rate=48000, gop=25)
    move_block(path, "video", 55, 20.0)
    with read_media(path, num_frames=30) as reader:
        found = reader.read()
    moments = (np.arange(30) + 0.5) / 5
    assert read_barcodes(found.frames) == [int(25 * moment + 0.01) for moment in moments]
    assert found.duration == pytest.approx(6, abs=0.1)
    assert "time stamps damaged" in warnings[0]


def test_pictures_without_any_credible_time_are_counted_from_the_beginning(tmp_path):
    path = write_clip(tmp_path / "clip.avi", seconds=4, video="mpeg4", audio="libmp3lame", rate=48000)
    asked = [{"num_frames": 4}, {"num_frames": 4, "start": 2, "duration": 1}]
    intact = [read_barcodes(load_media(path, **options).frames) for options in asked]
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, data.index(b"vids") + 28, 64768)  # how many frames late the first is
    path.write_bytes(data)
    for options, expected in zip(asked, intact):
        assert read_barcodes(load_media(path, **options).frames) == pytest.approx(expected, abs=1)


def test_a_picture_without_a_time_is_not_late_by_the_length_that_the_last_one_claims(tmp_path):
    path = tmp_path / "clip.ts"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, width=WIDTH, height=HEIGHT, pix_fmt="yuv420p")
        stream.codec_context.gop_size = 12
        stream.options = {"x264-params": "scenecut=0"}
        packets = []
        for number in range(100):
            frame = av.VideoFrame.from_ndarray(barcode(number), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            packets += stream.encode(frame)
        packets += stream.encode(None)
        # The first twelve pictures say that they last five seconds each.
        slow = av.BitStreamFilterContext("h264_metadata=tick_rate=2/5", stream)
        for number, packet in enumerate(packets):
            for piece in slow.filter(packet) if number < 12 else [packet]:
                piece.stream = stream
                container.mux(piece)
    data = bytearray(path.read_bytes())
    where = -1
    for _ in range(3):
        where = data.index(b"\0\0\1\xe0", where + 1)
    data[where + 7] &= 0x3F  # no time stamps
    path.write_bytes(data)
    found = load_media(path, num_frames=20)
    assert found.duration == pytest.approx(4, abs=0.1)
    assert read_barcodes(found.frames) == [int(25 * (number + 0.5) / 5) for number in range(20)]


def spoil(path: Path, kind: str, numbers: range):
    """Overwrite packets of the sound or picture of a file."""
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(**{kind: 0}) if packet.size]
        places = [(packet.pos, bytes(packet)) for packet in packets]
    data = bytearray(path.read_bytes())
    for number in numbers:
        where = data.index(places[number][1], places[number][0])
        data[where : where + len(places[number][1])] = b"\x55" * len(places[number][1])
    path.write_bytes(data)


def test_pictures_that_come_too_late_are_waited_for(tmp_path):
    path = write_clip(tmp_path / "clip.mkv", seconds=4, video="mpeg4", audio=None)
    for number in range(40, 44):
        move_block(path, "video", number, 0.24)
    spoil(path, "video", range(3, 4))  # tells that the file is damaged
    found = load_media(path, fps=25)
    numbers = dict(zip(range(100), read_barcodes(found.frames)))
    assert [numbers[moment] for moment in (39, 40, 43, 44, 45, 50)] == [39, 39, 39, 44, 45, 50]


def test_sound_with_a_clock_ahead_gives_way_to_what_follows(tmp_path):
    path = write_clip(
        tmp_path / "clip.webm", seconds=6, video=None, audio="libopus", rate=48000, sound=tones(6, 48000)
    )
    for number in range(72, 86):  # of the second second, to the third
        move_block(path, "audio", number, 1.3)
    assert [second for window in windows(path, 3.0) for second in heard(window.waveform)] == list(range(6))


def test_sound_goes_by_its_display_time(tmp_path):
    """A transport stream may hold a decoding time, too, which is damaged twice here."""
    path, sound, packets = tmp_path / "clip.ts", tones(8, 48000), []
    with av.open(str(path), "w", options={"pes_payload_size": "0"}) as container:
        voice = container.add_stream("aac", rate=48000, layout="mono")
        for first in range(0, sound.shape[1], 1024):
            frame = av.AudioFrame.from_ndarray(sound[:, first : first + 1024].copy(), format="flt", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 48000, first, Fraction(1, 48000)
            packets += voice.encode(frame)
        for packet in [*packets, *voice.encode(None)]:
            packet.dts -= 960
            container.mux(packet)
    data = bytearray(path.read_bytes())
    where = -1
    for number in range(62):
        where = data.index(b"\0\0\1\xc0", where + 1)
        assert data[where + 7] == 0xC0, "both times"
        if number >= 60:
            data[where + 14 : where + 16] = b"\x1f\xff"  # a little before 0
    path.write_bytes(data)
    assert [second for window in windows(path, 2.0) for second in heard(window.waveform)] == list(range(8))


def test_sound_behind_a_short_hole_keeps_its_place(tmp_path):
    """Two packets are no longer than the jitter of time stamps."""
    paths = [tmp_path / name for name in ("intact.mkv", "damaged.mkv")]
    for path in paths:
        write_clip(path, seconds=4, video=None, audio="aac", rate=48000)
    spoil(paths[1], "audio", range(60, 62))
    intact, damaged = (beep_starts(load_media(path).waveform, RATE) for path in paths)
    assert damaged == pytest.approx(intact, abs=0.005)


def test_sound_without_a_time_behind_a_hole_keeps_its_place(tmp_path):
    path = write_clip(tmp_path / "clip.mkv", seconds=4, video=None, audio="flac", rate=48000, sound=tones(4, 48000))
    intact = load_media(path).waveform
    spoil(path, "audio", range(10, 15))
    move_block(path, "audio", 15, -0.096)  # to the time of the one before it
    found = load_media(path).waveform
    hole = slice(round(0.97 * RATE), round(1.43 * RATE))
    assert np.abs(found[hole]).max() < 0.01
    assert np.abs(found[hole.stop + 320 :] - intact[hole.stop + 320 :]).max() < 0.01


def test_a_sampling_rate_that_cannot_be(tmp_path):
    path = tmp_path / "rate.wav"
    path.write_bytes(wav(tones(1), rate=1_526_774_656))
    with pytest.raises(MediaError, match="some sound damaged; its sound cannot be decoded"):
        load_media(path)


def test_damaged_pictures_do_not_set_the_size(tmp_path):
    """Half of the pictures are damaged, of another size, and come first."""
    path = tmp_path / "clip.ts"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1, width=WIDTH, height=HEIGHT, pix_fmt="yuv420p")
        for number in range(4):
            coder = av.CodecContext.create("libx264", "w")
            coder.options = {"tune": "zerolatency"}
            coder.width, coder.height = (224 if number < 2 else WIDTH), HEIGHT
            coder.pix_fmt, coder.time_base = "yuv420p", Fraction(1, 1)
            frame = av.VideoFrame.from_ndarray(barcode(number), format="rgb24")
            (packet,) = coder.encode(frame.reformat(width=coder.width, format="yuv420p")) + coder.encode(None)
            data = bytes(packet)
            packet = av.Packet(data[:-12] + b"\x55" * 12 if number < 2 else data)
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, number, number, Fraction(1, 1)
            packet.is_keyframe = True
            container.mux(packet)
    found = load_media(path, num_frames=4)
    assert found.frames.shape == (4, HEIGHT, WIDTH, 3)
    assert read_barcodes(found.frames[2:]) == [2, 3]


# Stills


@pytest.mark.parametrize(
    "extension, video", [("png", "png"), ("gif", "gif"), ("jpg", "mjpeg"), ("avif", "libsvtav1"), ("apng", "apng")]
)
def test_a_file_of_one_picture_is_a_still(tmp_path, warnings, extension, video):
    path = tmp_path / f"still.{extension}"
    picture = av.VideoFrame.from_ndarray(barcode(77), format="rgb24")
    if extension in ("png", "jpg"):
        picture.save(path)
    else:
        pixels = {"gif": "rgb8", "avif": "yuv420p", "apng": "rgb24"}[extension]
        with av.open(str(path), "w") as container:
            stream = container.add_stream(video, rate=10, width=WIDTH, height=HEIGHT, pix_fmt=pixels)
            picture = picture.reformat(format=pixels)
            picture.pts, picture.time_base = 0, Fraction(1, 10)
            for packet in [*stream.encode(picture), *stream.encode(None)]:
                container.mux(packet)
    for start in (0.0, 12.0):
        media = load_media(path, start=start, duration=5, num_frames=3)
        assert media.duration == 0 and media.frames.shape[0] == 3 and media.timestamps.tolist() == [0, 0, 0]
        assert read_barcodes(media.frames) == [77, 77, 77]
    assert probe_media(path).duration == 0
    assert warnings == []


def test_animations(tmp_path):
    path = tmp_path / "moving.gif"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("gif", rate=10, width=WIDTH, height=HEIGHT, pix_fmt="rgb8")
        for number in range(20):
            frame = av.VideoFrame.from_ndarray(barcode(number), format="rgb24").reformat(format="rgb8")
            frame.pts, frame.time_base = number, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    media = load_media(path, num_frames=4)
    assert media.duration == pytest.approx(2) and read_barcodes(media.frames) == [2, 7, 12, 17]
    # The head of an extended WebP: the second bit says that it is animated.
    webp = b"RIFF" + struct.pack("<I", 100) + b"WEBPVP8X" + struct.pack("<I", 10) + b"\x02" + bytes(91)
    with pytest.raises(MediaError, match="animated WebP, which cannot be read; convert it to GIF"):
        load_media(webp)


# Sound


def test_channels_that_cancel_give_the_loudest(tmp_path, warnings):
    left = tones(4)[0]
    path = tmp_path / "phase.wav"
    path.write_bytes(wav(np.stack([left, -left])))
    media = load_media(path)
    assert heard(media.waveform) == [0, 1, 2, 3] and np.abs(media.waveform).max() == pytest.approx(0.4, abs=0.01)
    assert np.abs(np.abs(media.waveform) - np.abs(left)).max() < 1e-3, "one channel, and the same all the time"
    assert len(warnings) == 1 and "channels of its sound cancel each other" in warnings[0]
    assert np.abs(load_media(path, channels="first").waveform - left).max() < 1e-3
    warnings.clear()
    path.write_bytes(wav(np.stack([left, np.zeros_like(left)])))
    assert np.abs(load_media(path).waveform).max() == pytest.approx(0.2, abs=0.01), "half is not nothing"
    assert warnings == []


def test_arrays_have_the_same_rule():
    left = tones(1)[0]
    extractor = EVACapFeatureExtractor()
    alone = extractor([left], sampling_rate=RATE, return_tensors="pt").input_features
    opposite = extractor([np.stack([left, -left])], sampling_rate=RATE, return_tensors="pt").input_features
    torch.testing.assert_close(opposite, alone)
    with pytest.raises(ValueError, match=r"`raw_speech\[0\]` holds a sample of 1e\+30"):
        extractor([np.array([0.1, 1e30] * 400, dtype=np.float32)], sampling_rate=RATE)


def test_silence_is_told(tmp_path):
    path = tmp_path / "silence.wav"
    path.write_bytes(wav(np.zeros((1, RATE), np.float32)))
    assert load_media(path).silent
    path.write_bytes(wav(tones(1)))
    assert not load_media(path).silent
    assert not load_media(write_clip(tmp_path / "picture.mp4", seconds=1, audio=None)).silent, (
        "no sound is not silence"
    )


@pytest.mark.parametrize("value", [1e30, -5e4, np.nan, np.inf])
def test_a_wild_sample_is_an_error_of_its_file(tmp_path, value):
    samples = tones(2)[0]
    samples[RATE] = value
    header = b"RIFF" + struct.pack("<I", 36 + 4 * len(samples)) + b"WAVEfmt "
    header += struct.pack("<IHHIIHH", 16, 3, 1, RATE, 4 * RATE, 4, 32) + b"data" + struct.pack("<I", 4 * len(samples))
    path = tmp_path / "wild.wav"
    path.write_bytes(header + samples.astype("<f4").tobytes())
    with pytest.raises(MediaError, match=r"wild.wav: its sound holds a sample of \S+ at about 1.\d s"):
        load_media(path)


def test_which_sound_track(tmp_path):
    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as container:
        voices = [container.add_stream("flac", rate=RATE, layout="mono") for _ in range(2)]
        for number, voice in enumerate(voices):
            sound = tones(3, first=5 * number)
            frame = av.AudioFrame.from_ndarray(sound, format="flt", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = RATE, 0, Fraction(1, RATE)
            for packet in [*voice.encode(frame), *voice.encode(None)]:
                container.mux(packet)
    assert heard(load_media(path, audio_track=0).waveform) == [0, 1, 2]
    assert heard(load_media(path, audio_track=1).waveform) == [5, 6, 7]
    with pytest.raises(MediaError, match="has 2 sound tracks, counted from 0, and no number 2"):
        load_media(path, audio_track=2)


# False alarms, and alarms in the right words


def test_what_is_right_gives_no_warning(tmp_path, warnings):
    for sizes in ((0xFFFFFFFF, 0xFFFFFFFF), (0x7FFFFFFF, 0x7FFFFFFF - 36), (0, 0xFFFFFFFF)):
        path = tmp_path / "placeholder.wav"
        path.write_bytes(wav(tones(3), sizes=sizes))
        assert heard(load_media(path).waveform) == [0, 1, 2]
        assert probe_media(path).duration == pytest.approx(3)
    quiet = np.zeros((1, 5 * 44100), np.float32)
    quiet[0, : 3 * 44100] = tones(3, 44100)[0]
    path = tmp_path / "variable.mp3"
    with av.open(str(path), "w", options={"write_xing": "0"}) as container:
        voice = container.add_stream("libmp3lame", rate=44100, layout="mono")
        voice.options = {"compression_level": "5", "global_quality": str(6 * 118), "flags": "+qscale"}
        for first in range(0, quiet.shape[1], 1152):
            frame = av.AudioFrame.from_ndarray(quiet[:, first : first + 1152].copy(), format="flt", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 44100, first, Fraction(1, 44100)
            container.mux(voice.encode(frame))
        container.mux(voice.encode(None))
    assert heard(load_media(path).waveform)[:3] == [0, 1, 2]
    assert warnings == []


def test_a_header_without_samples(tmp_path):
    path = tmp_path / "nothing.wav"
    path.write_bytes(wav(np.zeros((1, 0), np.float32)))
    with pytest.raises(MediaError, match="nothing.wav: there is nothing in its tracks"):
        load_media(path)


# What small files cost


def png(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packer = zlib.compressobj(9)
    row = b"\0" + bytes(range(width % 250 + 1))[:1] * width
    rows = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
        + chunk(b"IDAT", rows)
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("width, height", [(20_000, 16), (16, 20_000), (500_000, 1)])
def test_a_strip_is_cut_before_it_is_enlarged(width, height, monkeypatch):
    resized = []
    real = EVACapVideoProcessor.resize
    monkeypatch.setattr(
        EVACapVideoProcessor,
        "resize",
        lambda self, frames, **kw: resized.append(tuple(frames.shape)) or real(self, frames, **kw),
    )
    pixels = EVACapVideoProcessor()(png(width, height), return_tensors="pt").pixel_values_videos
    assert pixels.shape == (1, 18, 3, 224, 224)
    assert len(resized) == 1 and resized[0][0] == 1, "a still is resized once"
    assert max(resized[0][2:]) <= 4 * min(resized[0][2:])
    with pytest.raises(ValueError, match="at most 100 times as long as the other"):
        EVACapVideoProcessor(do_center_crop=False)(png(width, height))


def test_a_long_picture_shows_its_middle():
    picture = np.zeros((32, 1000, 3), np.uint8)
    picture[:, 484:516] = 200
    whole = EVACapVideoProcessor(size={"shortest_edge": 32}, crop_size=32, do_normalize=False, num_frames=1)
    pixels = whole(picture, return_tensors="pt").pixel_values_videos
    assert (pixels * 255).round().unique().tolist() == [200.0]


def test_large_pictures_are_resized_a_few_at_a_time(monkeypatch):
    frames = np.random.default_rng(0).integers(0, 256, (6, 64, 80, 3), dtype=np.uint8)
    processor = EVACapVideoProcessor(num_frames=6, size={"shortest_edge": 32}, crop_size=32)
    expected = processor(frames, return_tensors="pt").pixel_values_videos
    monkeypatch.setattr("evacap.processing.video_processing_evacap._PIXELS_AT_ONCE", 2 * 64 * 80)
    assert torch.equal(processor(frames, return_tensors="pt").pixel_values_videos, expected)


def test_pictures_of_a_window_have_a_bound(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "clip.mp4", seconds=1, audio=None)
    monkeypatch.setattr(media_evacap, "_MAX_FRAME_BYTES", 18 * 3 * WIDTH * HEIGHT // 4)
    assert load_media(path).frames.shape == (18, HEIGHT // 2, WIDTH // 2, 3)


def test_sound_of_a_window_has_a_bound(tmp_path, monkeypatch):
    path = tmp_path / "long.wav"
    path.write_bytes(wav(tones(4)))
    monkeypatch.setattr(media_evacap, "_MAX_SOUND_BYTES", 4 * RATE * 3)
    with pytest.raises(MediaError, match="too much sound for one window; give a `duration`"):
        load_media(path)
    assert len(load_media(path, duration=2).waveform) == 2 * RATE


def test_a_chunk_that_is_longer_than_the_file(tmp_path):
    path = tmp_path / "list.wav"
    good = wav(tones(1))
    path.write_bytes(
        good[:12]
        + b"LIST"
        + struct.pack("<I", 2_000_000_000)
        + b"INFOIART"
        + struct.pack("<I", 1_999_999_000)
        + good[12:]
    )
    with pytest.raises(MediaError, match="list.wav: a chunk of its header has 2,000,000,000 bytes"):
        load_media(path)


def test_a_budget_of_time(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "clip.mp4", seconds=2)
    monkeypatch.setattr(media_evacap, "SECONDS_A_WINDOW", 0.0)
    with pytest.raises(MediaError, match="clip.mp4: reading it takes more than 0 s of processor time"):
        load_media(path)


# Addresses


class Server(http.server.BaseHTTPRequestHandler):
    """Answers by path; `content` is what a good answer holds."""

    content = b""

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        if self.path.startswith("/ftp"):
            self.send_response(302)
            self.send_header("Location", "ftp://127.0.0.1/other.mp4")
            self.end_headers()
        elif self.path.startswith("/again"):
            self.send_response(302)
            self.send_header("Location", "/clip%20%C3%BC.wav")
            self.end_headers()
        elif "Python" in self.headers.get("User-Agent", "Python"):
            self.send_error(403)
        elif self.path.startswith("/trickle"):
            self.send_response(200)
            self.end_headers()
            try:
                for _ in range(100):
                    self.wfile.write(b"x")
                    self.wfile.flush()
                    time.sleep(0.1)
            except OSError:
                pass
        elif self.path.startswith("/endless"):
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(bytes(2**16))
            except OSError:
                pass
        elif self.path.startswith("/packed"):
            body = zlib.compressobj(wbits=31)
            body = body.compress(self.content) + body.flush()
            self.send_response(200)
            self.send_header("Content-Encoding", "gzip")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        elif self.path == "/clip%20%C3%BC.wav":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.content)
        else:
            self.send_error(404)


@pytest.fixture
def address():
    Server.content = wav(tones(2))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("path", ["/clip ü.wav", "/clip%20%C3%BC.wav", "/packed.wav", "/again.wav"])
def test_addresses_as_people_write_them(address, path):
    assert heard(load_media(address + path).waveform) == [0, 1]


def test_downloads_have_bounds(address, monkeypatch):
    with pytest.raises(MediaError, match="/ftp.mp4: cannot be downloaded .*ftp"):
        load_media(f"{address}/ftp.mp4")
    monkeypatch.setattr(media_evacap, "DOWNLOAD_BYTES", 10**6)
    with pytest.raises(MediaError, match="/endless.mp4: has more than 1,000,000 bytes"):
        load_media(f"{address}/endless.mp4")
    monkeypatch.setattr(media_evacap, "DOWNLOAD_SECONDS", 0.5)
    with pytest.raises(MediaError, match="/trickle.mp4: takes more than 0.5 s to download"):
        load_media(f"{address}/trickle.mp4")


def test_a_data_address_is_not_repeated_whole():
    with pytest.raises(MediaError, match="data addresses are not supported") as error:
        load_media("data:video/mp4;base64," + "A" * 100_000)
    assert len(str(error.value)) < 300


def test_a_stream_without_end_is_refused(monkeypatch):
    class Endless(io.RawIOBase):
        def readable(self):
            return True

        def readinto(self, buffer):
            buffer[:] = bytes(len(buffer))
            return len(buffer)

    monkeypatch.setattr(media_evacap, "DOWNLOAD_BYTES", 10**6)
    with pytest.raises(MediaError, match="holds more than 1,000,000 bytes; store it in a file"):
        load_media(io.BufferedReader(Endless()))

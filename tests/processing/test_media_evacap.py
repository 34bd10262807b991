import functools
import http.server
import io
import logging
import random
import struct
import subprocess
import sys
import threading
from pathlib import Path

import av
import numpy as np
import pytest

from evacap.processing import media_evacap
from evacap.processing.media_evacap import (
    MediaError,
    MediaNotFoundError,
    file_source,
    load_media,
    open_media,
    probe_media,
)


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from media_files import (  # noqa: E402
    barcode,
    beep_starts,
    beeps,
    cut_by_edit_list,
    damage,
    read_barcode,
    read_barcodes,
    rotate,
    write_clip,
)


RATE = 16000
FASTSTART = {"movflags": "faststart"}

CLIPS = [
    ("mp4", "libx264", "aac"),
    ("mp4", "libx265", "aac"),
    ("mp4", "libsvtav1", "libopus"),
    ("mp4", "mpeg4", "libmp3lame"),
    ("mp4", "libvpx-vp9", "flac"),
    ("mov", "libx264", "pcm_s16le"),
    ("mov", "mpeg4", "aac"),
    ("mkv", "libx264", "flac"),
    ("mkv", "libx265", "pcm_s16le"),
    ("mkv", "libvpx-vp9", "libmp3lame"),
    ("webm", "libvpx-vp9", "libopus"),
    ("webm", "libsvtav1", "libopus"),
    ("avi", "mpeg4", "libmp3lame"),
    ("avi", "libx264", "pcm_s16le"),
    ("avi", "mjpeg", "pcm_s16le"),
    ("ts", "libx264", "aac"),
    ("ts", "libx265", "libmp3lame"),
    ("ts", "mpeg2video", "mp2"),
]
SOUNDS = [
    ("wav", "pcm_s16le"),
    ("flac", "flac"),
    ("mp3", "libmp3lame"),
    ("ogg", "libopus"),
    ("m4a", "aac"),
    ("aac", "aac"),
    ("mka", "flac"),
]


@pytest.fixture
def warnings(monkeypatch):
    """The warnings of the reader, as a list."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    media_evacap.logger.addHandler(handler)
    yield messages
    media_evacap.logger.removeHandler(handler)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """Four seconds, 25 frames a second, H.264 and AAC."""
    return write_clip(tmp_path_factory.mktemp("media") / "clip.mp4")


def shown(times, fps=25, first=0.0) -> list[int]:
    """Which frames of a clip with a constant rate are on display at `times`."""
    return [max(0, int((time - first) * fps + 1e-6)) for time in times]


def centres(duration, count=18) -> np.ndarray:
    return (np.arange(count) + 0.5) * duration / count


@pytest.mark.parametrize("extension, video, audio", CLIPS)
def test_picture_and_sound_of_every_container_and_codec(tmp_path, warnings, extension, video, audio):
    path = write_clip(tmp_path / f"clip.{extension}", video=video, audio=audio, rate=48000)
    whole = load_media(path)

    assert whole.frames.shape == (18, 96, 160, 3) and whole.frames.dtype == np.uint8
    assert whole.waveform.dtype == np.float32 and whole.waveform.ndim == 1
    assert whole.duration == pytest.approx(4.0, abs=0.06)
    assert len(whole.waveform) == pytest.approx(RATE * whole.duration, abs=RATE * 0.06)
    # Containers without edit lists put the encoder's priming before the picture.
    first = whole.timestamps[0] - read_barcode(whole.frames[0]) / 25
    assert 0 <= first < 0.05
    assert read_barcodes(whole.frames) == shown(centres(whole.duration), first=first)
    assert whole.timestamps == pytest.approx(np.array(read_barcodes(whole.frames)) / 25 + first, abs=2e-3)
    assert beep_starts(whole.waveform, RATE) == pytest.approx([first + second for second in range(4)], abs=0.03)

    window = load_media(path, start=1.5, duration=1.5)
    assert window.duration == pytest.approx(1.5)
    assert len(window.waveform) == pytest.approx(RATE * 1.5, abs=2)
    assert read_barcodes(window.frames) == shown(1.5 + centres(1.5), first=first)
    assert beep_starts(window.waveform, RATE) == pytest.approx([0.5 + first], abs=0.03)

    info = probe_media(path)
    assert (info.has_audio, info.has_video) == (True, True)
    assert info.duration == pytest.approx(whole.duration)
    assert warnings == []


@pytest.mark.parametrize("extension, audio", SOUNDS)
def test_sound_alone(tmp_path, warnings, extension, audio):
    path = write_clip(tmp_path / f"sound.{extension}", video=None, audio=audio, rate=48000)
    media = load_media(path)
    assert media.frames is None and media.timestamps is None
    assert len(media.waveform) == pytest.approx(4 * RATE, abs=0.04 * RATE)
    assert beep_starts(media.waveform, RATE) == pytest.approx([0, 1, 2, 3], abs=0.03)
    window = load_media(path, start=2.5, duration=1)
    assert len(window.waveform) == RATE
    assert beep_starts(window.waveform, RATE) == pytest.approx([0.5], abs=0.03)
    assert probe_media(path).has_video is False
    assert warnings == []


def test_every_kind_of_source(clip):
    expected = load_media(clip)
    sources = [str(clip), clip.as_uri(), clip.read_bytes(), io.BytesIO(clip.read_bytes())]
    for source in sources:
        media = load_media(source)
        assert np.array_equal(media.waveform, expected.waveform) and np.array_equal(media.frames, expected.frames)
    with open(clip, "rb") as file:
        assert np.array_equal(load_media(file).frames, expected.frames)
        assert np.array_equal(load_media(file).frames, expected.frames), "the file object must stay open"


def test_a_pipe_is_read_as_a_file(clip):
    with subprocess.Popen(["cat", clip], stdout=subprocess.PIPE) as process:
        assert load_media(process.stdout).waveform.shape == (4 * RATE,)


def test_names_that_ffmpeg_would_take_for_something_else(clip, tmp_path):
    for name in ("a:b.mp4", "frame%03d.mp4", "é b#c?.mp4", "concat:x|y.mp4"):
        path = tmp_path / name
        path.write_bytes(clip.read_bytes())
        assert load_media(str(path)).frames.shape[0] == 18


def test_a_url_is_downloaded_once(clip, tmp_path):
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format, *arguments):
            requests.append(arguments[0])

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=clip.parent))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/clip.mp4"
        with open_media(url) as file:
            assert probe_media(file).duration == 4.0
            assert load_media(file, start=1, duration=2).duration == 2
        assert len(requests) == 1
        with pytest.raises(MediaError, match="missing.mp4.*404"):
            load_media(url.replace("clip", "missing"))
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(MediaError, match="cannot be downloaded"):
        load_media(url)


def test_frames_a_second_and_the_middle_run(clip):
    media = load_media(clip, fps=2)
    assert read_barcodes(media.frames) == [6, 18, 31, 43, 56, 68, 81, 93]
    media = load_media(clip, fps=5, frame_sampling="middle", num_frames=4)
    assert read_barcodes(media.frames) == [42, 47, 52, 57]
    assert load_media(clip, fps=2, frame_sampling="middle", num_frames=18).frames.shape[0] == 8


def test_a_part_without_the_other(clip):
    assert load_media(clip, video=False).frames is None
    media = load_media(clip, audio=False)
    assert media.waveform is None and media.duration == 4.0 and media.sampling_rate == RATE


def test_fewer_frames_than_asked_for_repeat(tmp_path):
    media = load_media(write_clip(tmp_path / "short.mp4", seconds=0.2))
    assert read_barcodes(media.frames) == shown(centres(0.2))
    assert media.waveform.shape == (0.2 * RATE,)
    media = load_media(write_clip(tmp_path / "one.mp4", seconds=0.04, audio=None), num_frames=3)
    assert read_barcodes(media.frames) == [0, 0, 0]


@pytest.mark.parametrize("extension, video, audio", [("mp4", "libx264", "aac"), ("webm", "libvpx-vp9", "libopus")])
def test_variable_frame_rate_by_time(tmp_path, extension, video, audio):
    times = [0, 0.1, 0.15, 0.2, 1.0, 1.01, 1.02, 2.5, 2.6, 3.9]
    path = write_clip(tmp_path / f"variable.{extension}", times=times, video=video, audio=audio, rate=48000)
    media = load_media(path)
    numbers = [np.searchsorted(times, time + 1e-6, side="right") - 1 for time in centres(media.duration)]
    assert read_barcodes(media.frames) == numbers
    assert media.timestamps == pytest.approx(np.array(times)[numbers], abs=2e-3)


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation(tmp_path, degrees):
    path = write_clip(tmp_path / "rotated.mp4", audio=None)
    rotate(path, degrees)
    frames = load_media(path, num_frames=4).frames
    assert frames.shape == ((4, 96, 160, 3) if degrees == 180 else (4, 160, 96, 3))
    # Players turn it clockwise; the barcode is upright again after turning it back.
    assert [read_barcode(np.rot90(frame, degrees // 90)) for frame in frames] == shown(centres(4.0, 4))


def test_edit_list(tmp_path, warnings):
    path = write_clip(tmp_path / "cut.mp4", audio=None)
    cut_by_edit_list(path, 0.6)
    media = load_media(path)
    assert media.duration == pytest.approx(3.4)
    assert read_barcodes(media.frames) == shown(0.6 + centres(3.4))
    assert media.timestamps == pytest.approx(np.array(read_barcodes(media.frames)) / 25 - 0.6)
    assert read_barcodes(load_media(path, start=2, duration=1).frames) == shown(2.6 + centres(1.0))
    assert warnings == []


def test_edit_list_of_a_real_clip(shared, warnings):
    """The header counts 400 frames, 299 of them can be shown."""
    media = load_media(shared("clips/51_electric_shaver.mp4"), num_frames=299)
    assert media.timestamps[0] == 0
    assert media.timestamps[-1] == pytest.approx(298 * 3003 / 90000, abs=1e-4)
    assert warnings == []


def test_real_clips_have_nothing_to_warn_of(shared, warnings):
    clips = sorted(shared("clips").glob("*.mp4"))
    for path in clips:
        media = load_media(path, num_frames=2)
        assert media.waveform is not None and media.frames.shape[0] == 2
        assert len(media.waveform) == pytest.approx(media.duration * RATE, abs=1)
    assert len(clips) == 9 and warnings == []


@pytest.mark.parametrize("extension", ["mp4", "mkv"])
def test_sound_that_starts_late(tmp_path, warnings, extension):
    path = write_clip(tmp_path / f"late.{extension}", audio_delay=1.5)
    media = load_media(path)
    assert beep_starts(media.waveform, RATE) == pytest.approx([1.5, 2.5, 3.5, 4.5], abs=0.03)
    assert not media.waveform[: int(1.4 * RATE)].any()
    # The picture ends after 4 s and stays.
    assert read_barcodes(media.frames)[-1] == 99
    before = load_media(path, start=0.2, duration=0.7)
    assert before.waveform.shape == (round(0.7 * RATE),) and not before.waveform.any()
    assert beep_starts(load_media(path, start=2, duration=1).waveform, RATE) == pytest.approx([0.5], abs=0.03)
    assert warnings == []


@pytest.mark.parametrize("extension", ["mp4", "mkv", "ts"])
def test_time_starts_where_the_file_starts(tmp_path, warnings, extension):
    times = [10 + number / 25 for number in range(100)]
    path = write_clip(tmp_path / f"later.{extension}", times=times, audio="libmp3lame", audio_delay=10)
    media = load_media(path)
    assert media.duration == pytest.approx(4.0, abs=0.06)
    assert 0 <= media.timestamps[0] - read_barcode(media.frames[0]) / 25 < 0.05
    assert beep_starts(media.waveform, RATE) == pytest.approx([0, 1, 2, 3], abs=0.06)
    assert probe_media(path).duration == pytest.approx(media.duration)
    assert warnings == []


def test_picture_that_starts_late_shows_its_first_frame(tmp_path):
    path = write_clip(tmp_path / "late.mkv", times=[1 + i / 25 for i in range(50)], seconds=3)
    media = load_media(path, num_frames=6)
    assert read_barcodes(media.frames) == shown(centres(media.duration, 6), first=1.0)
    assert media.timestamps[:2] == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("layout, count", [("mono", 1), ("stereo", 2), ("5.1", 6), ("hexadecagonal", 16)])
def test_channels_are_averaged_without_gain(tmp_path, layout, count):
    path = write_clip(tmp_path / "channels.mkv", video=None, audio="pcm_f32le", layout=layout)
    average = load_media(path).waveform
    first = load_media(path, channels="first").waveform
    assert np.abs(first).max() == pytest.approx(0.5, abs=0.01)
    assert np.abs(average).max() == pytest.approx(0.5 * np.mean(1 / np.arange(1, count + 1)), abs=0.01)


def test_resampling_keeps_the_samples_where_they_are(tmp_path):
    sound = beeps(4, 44100)
    path = write_clip(tmp_path / "tone.wav", video=None, audio="pcm_f32le", sound=sound)
    assert np.abs(load_media(path, sampling_rate=44100).waveform - sound[0]).max() < 1e-6
    inside = slice(RATE // 10, RATE // 5)  # of the first beep, away from its edges
    assert np.abs(load_media(path).waveform - beeps(4, RATE)[0])[inside].max() < 1e-3


def test_cover_art_is_no_picture(tmp_path):
    path = tmp_path / "song.mkv"
    picture = av.VideoFrame.from_ndarray(barcode(1), format="rgb24")
    picture.save(tmp_path / "cover.png")
    with av.open(str(path), "w") as container:
        container.add_attachment("cover.png", "image/png", (tmp_path / "cover.png").read_bytes())
        stream = container.add_stream("flac", rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(beeps(1, RATE), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = RATE, 0
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    with av.open(str(path)) as container:
        assert container.streams.video, "FFmpeg must take the cover for a picture, or this test shows nothing"
    media = load_media(path)
    assert media.frames is None and media.waveform.shape == (RATE,)
    assert probe_media(path).has_video is False


@pytest.mark.parametrize("extension", ["png", "jpg"])
def test_still_image(tmp_path, warnings, extension):
    path = tmp_path / f"still.{extension}"
    av.VideoFrame.from_ndarray(barcode(77), format="rgb24").save(path)
    media = load_media(path, num_frames=3)
    assert read_barcodes(media.frames) == [77, 77, 77]
    assert media.waveform is None and media.duration == 0 and media.timestamps.tolist() == [0, 0, 0]
    assert probe_media(path).duration == 0
    assert read_barcodes(load_media(path, num_frames=2, duration=2.5).frames) == [77, 77]
    assert not warnings
    assert read_barcodes(load_media(path, start=100, num_frames=1).frames) == [77], "a still has no clock"


def test_windows_cover_the_file_and_end_with_it(clip):
    duration = probe_media(clip).duration
    windows = [load_media(clip, start=start, duration=1.5) for start in (0, 1.5, 3)]
    assert [window.duration for window in windows] == pytest.approx([1.5, 1.5, 1])
    assert sum(len(window.waveform) for window in windows) == duration * RATE
    with pytest.raises(MediaError, match="clip.mp4: nothing to read from 4.5 s on, the file ends at 4 s"):
        load_media(clip, start=4.5, duration=1.5)


@pytest.fixture
def decoded(monkeypatch) -> list[float]:
    """The times of the pictures that the reader decodes."""
    times = []
    decode = media_evacap._Pictures._decode

    def counted(pictures, packet):
        if packet is not None:
            times.append(packet.time)
        return decode(pictures, packet)

    monkeypatch.setattr(media_evacap._Pictures, "_decode", counted)
    return times


@pytest.mark.parametrize("extension, video, audio", [("mp4", "libx264", "aac"), ("ts", "libx264", "aac")])
def test_a_window_does_not_decode_what_lies_before_it(tmp_path, decoded, extension, video, audio):
    path = write_clip(tmp_path / f"long.{extension}", seconds=40, gop=25, video=video, audio=audio)
    load_media(path, start=30, duration=2)
    assert min(decoded) > 26


def test_frames_of_a_long_file_are_not_all_decoded(tmp_path, decoded):
    path = write_clip(tmp_path / "long.mp4", seconds=40, gop=5)
    media = load_media(path, audio=False)
    assert read_barcodes(media.frames) == shown(centres(40.0))
    assert len(decoded) < 300


# What cannot be read


def test_a_missing_file(tmp_path):
    with pytest.raises(MediaNotFoundError, match="nowhere.mp4: there is no such file"):
        load_media(tmp_path / "nowhere.mp4")
    with pytest.raises(FileNotFoundError):
        probe_media(str(tmp_path / "nowhere.mp4"))


def test_a_directory(tmp_path):
    with pytest.raises(MediaError, match="is a directory"):
        load_media(tmp_path)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "empty"),
        (b"A dog barks.\n" * 400, "cannot be read"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n", "git-LFS pointer"),
        (b"ffconcat version 1.0\nfile other.mp4\n", "cannot be read"),
        (b"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\nother.mp4\n#EXT-X-ENDLIST\n", "cannot be read"),
        (random.Random(0).randbytes(100_000), "cannot be read"),
    ],
    ids=["empty", "text", "lfs", "concat", "playlist", "noise"],
)
def test_what_is_not_media(tmp_path, clip, content, message):
    (tmp_path / "other.mp4").write_bytes(clip.read_bytes())  # must not be found in its place
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    for read in (load_media, probe_media):
        with pytest.raises(MediaError, match=f"clip.mp4: .*{message}") as raised:
            read(path)
        assert "\n" not in str(raised.value)


def test_sources_of_the_wrong_kind(tmp_path, clip):
    with pytest.raises(TypeError, match="`source` is a int"):
        load_media(3)
    with pytest.raises(MediaError, match="s3 addresses are not supported"):
        load_media("s3://bucket/clip.mp4")
    text = tmp_path / "text.txt"
    text.write_bytes(b"words \xff")
    with open(text, encoding="utf-8") as file, pytest.raises(MediaError, match="text.txt: opened as text"):
        load_media(file)
    with pytest.raises(MediaError, match="text.txt: the file object is closed"):
        load_media(file)
    for nothing in ({"bytes": None, "path": None}, {"bytes": None}):
        with pytest.raises(ValueError, match="names no file; give one of `bytes` and `path`"):
            file_source(nothing)


def test_truncated_behind_its_index(tmp_path, warnings):
    path = write_clip(tmp_path / "cut.mp4", seconds=20, options=FASTSTART)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 10])
    media = load_media(path)
    assert 2 < media.duration < 8
    assert read_barcodes(media.frames) == shown(centres(media.duration))
    assert len(warnings) == 1
    assert f"cut.mp4: the file breaks off; 20 s announced, {media.duration:.6g} s found" in warnings[0].replace(
        "some sound damaged; ", ""
    )
    assert probe_media(path).duration == pytest.approx(media.duration)


def test_truncated_before_its_index(tmp_path):
    path = write_clip(tmp_path / "cut.mp4")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 10])
    with pytest.raises(MediaError, match="cut.mp4: .*the file breaks off"):
        load_media(path)


def test_truncated_within_its_index(tmp_path, warnings):
    """What the index has lost must not pass for a silent video."""
    path = write_clip(tmp_path / "cut.mp4")
    path.write_bytes(path.read_bytes()[:-1000])
    try:
        load_media(path)
    except MediaError as error:
        assert "breaks off" in str(error)
    else:
        assert len(warnings) == 1 and "the file breaks off" in warnings[0]


@pytest.mark.parametrize(
    "extension, video, audio", [("mkv", "libx264", "flac"), ("webm", "libvpx-vp9", "libopus"), ("avi", "mpeg4", "mp2")]
)
def test_truncated_in_other_containers(tmp_path, warnings, extension, video, audio):
    path = write_clip(tmp_path / f"cut.{extension}", video=video, audio=audio, rate=48000)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 10])
    media = load_media(path)
    assert 0.5 < media.duration < 2.5
    assert read_barcodes(media.frames) == shown(centres(media.duration), first=media.timestamps[0])
    assert len(warnings) == 1 and f"cut.{extension}" in warnings[0]


def overwrite(path: Path, box: bytes, offset: int, length: int = 600):
    """Put random bytes behind the name of a box."""
    data = bytearray(path.read_bytes())
    begin = data.index(box) + offset
    data[begin : begin + length] = random.Random(1).randbytes(length)
    path.write_bytes(data)


def test_random_bytes_at_the_start_of_the_index(tmp_path):
    path = write_clip(tmp_path / "noise.mp4", options=FASTSTART)
    overwrite(path, b"moov", 4)
    with pytest.raises(MediaError, match="noise.mp4: has no readable sound or picture"):
        load_media(path)


def test_random_bytes_in_the_index_of_the_picture_leave_the_sound(tmp_path):
    path = write_clip(tmp_path / "noise.mp4", options=FASTSTART)
    expected = load_media(path).waveform
    overwrite(path, b"moov", 200)
    media = load_media(path)
    assert media.frames is None and np.array_equal(media.waveform, expected)


def test_random_bytes_inside_the_data(tmp_path, warnings):
    path = write_clip(tmp_path / "noise.mp4", options=FASTSTART)
    overwrite(path, b"mdat", 200)
    media = load_media(path)
    assert len(warnings) == 1 and "noise.mp4" in warnings[0] and "damaged" in warnings[0]
    # What lies behind the next key frame is whole, and still in its place.
    assert read_barcodes(media.frames[9:]) == shown(centres(4.0))[9:]
    assert beep_starts(media.waveform, RATE)[-2:] == pytest.approx([2, 3], abs=0.06)


def test_no_audio_track(tmp_path, warnings):
    media = load_media(write_clip(tmp_path / "silent.mp4", audio=None))
    assert media.waveform is None and media.frames.shape[0] == 18 and media.duration == 4
    assert warnings == []


def test_digital_silence_is_returned_as_it_is(tmp_path, warnings):
    media = load_media(write_clip(tmp_path / "silence.mp4", sound=np.zeros((1, 4 * 44100), np.float32)))
    assert media.waveform.shape == (4 * RATE,) and not media.waveform.any()
    assert warnings == []


@pytest.mark.parametrize("name", ["clip.mp3", "clip.wav", "clip.png", "clip.txt", "clip"])
def test_a_wrong_extension(tmp_path, clip, name):
    (tmp_path / name).write_bytes(clip.read_bytes())
    assert read_barcodes(load_media(tmp_path / name).frames) == shown(centres(4.0))


def test_a_track_without_decoder_counts_as_missing(tmp_path, warnings):
    path = write_clip(tmp_path / "odd.mkv", audio="flac")
    path.write_bytes(path.read_bytes().replace(b"A_FLAC", b"A_ZZZZ"))
    media = load_media(path)
    assert media.waveform is None and media.frames.shape[0] == 18
    assert len(warnings) == 1 and "its sound cannot be decoded" in warnings[0]


def patch(data: bytes, box: bytes, offset: int, value: bytes) -> bytes:
    where = data.index(box) + len(box) + offset
    return data[:where] + value + data[where + len(value) :]


@pytest.mark.parametrize("huge", [b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff"])
@pytest.mark.parametrize(
    "box, offset",
    [(b"mvhd", 16), (b"tkhd", 20), (b"mdhd", 16), (b"stts", 4), (b"stts", 8), (b"stts", 12), (b"stsz", 8)],
    ids=["movie duration", "track duration", "media duration", "runs", "frames in a run", "frame duration", "frames"],
)
def test_absurd_numbers_in_an_mp4_header(tmp_path, clip, box, offset, huge, warnings):
    path = tmp_path / "absurd.mp4"
    path.write_bytes(patch(clip.read_bytes(), box, offset, huge))
    try:
        media = load_media(path)
    except MediaError as error:
        assert "absurd.mp4" in str(error)
        return
    assert media.waveform.size <= 5 * RATE
    assert len(warnings) <= 1
    if box != b"stts":  # which are the time stamps themselves
        assert media.duration == pytest.approx(4.0) and read_barcodes(media.frames) == shown(centres(4.0))


@pytest.mark.parametrize("handler", [b"soun", b"vide"])
def test_absurdly_slow_clock_of_a_track(tmp_path, clip, warnings, handler):
    """One tick a second makes each packet last for minutes, the file for days."""
    data = clip.read_bytes()
    clock = data.rindex(b"mdhd", 0, data.index(handler, data.index(b"moov"))) + 16
    path = tmp_path / "slow.mp4"
    path.write_bytes(data[:clock] + struct.pack(">I", 1) + data[clock + 4 :])
    media = load_media(path)
    assert media.duration < path.stat().st_size / 10 + 3600
    assert len(warnings) == 1 and "slow.mp4: some time stamps damaged" in warnings[0]
    if handler == b"soun":
        assert media.waveform is None
        assert read_barcodes(media.frames) == shown(centres(4.0))
    else:
        assert len(media.waveform) == pytest.approx(4 * RATE, abs=RATE / 20)


def test_absurd_picture_size(tmp_path, warnings):
    path = write_clip(tmp_path / "huge.avi", video="mjpeg", audio="pcm_s16le")
    data = bytearray(path.read_bytes())
    for where in range(len(data) - 9):
        if data[where : where + 2] == b"\xff\xc0":  # the frame header: length, precision, height, width
            data[where + 5 : where + 9] = struct.pack(">HH", 16000, 16000)
    path.write_bytes(data)
    media = load_media(path)
    assert media.frames is None and len(media.waveform) == 4 * RATE
    assert len(warnings) == 1 and "its picture cannot be decoded" in warnings[0]


@pytest.mark.parametrize("extension", ["mkv", "webm"])
def test_absurd_duration_in_a_matroska_header(tmp_path, warnings, extension):
    codecs = {"mkv": ("libx264", "flac"), "webm": ("libvpx-vp9", "libopus")}[extension]
    path = write_clip(tmp_path / f"absurd.{extension}", video=codecs[0], audio=codecs[1], rate=48000)
    data = path.read_bytes()
    element = data.index(b"\x44\x89\x88")  # Duration, 8 bytes
    path.write_bytes(data[: element + 3] + struct.pack(">d", 1e12) + data[element + 11 :])
    media = load_media(path)
    assert media.duration == pytest.approx(4.0, abs=0.01)
    assert read_barcodes(media.frames) == shown(centres(media.duration))
    assert len(warnings) == 1 and "1e+09 s announced" in warnings[0]
    assert probe_media(path).duration == media.duration


@pytest.mark.parametrize(
    "argument, value",
    [
        ("sampling_rate", 0),
        ("num_frames", 0),
        ("fps", -1.0),
        ("frame_sampling", "random"),
        ("channels", "second"),
        ("start", -1.0),
        ("duration", 0.0),
        ("backend", "opencv"),
    ],
)
def test_arguments_out_of_range_are_named(clip, argument, value):
    with pytest.raises(ValueError, match=f"`{argument}` is {value!r}"):
        load_media(clip, **{argument: value})


def test_arguments_that_need_each_other(clip):
    with pytest.raises(ValueError, match="needs `fps`"):
        load_media(clip, frame_sampling="middle")
    with pytest.raises(ValueError, match="both False"):
        load_media(clip, audio=False, video=False)


def test_decord_is_asked_for_by_name_only(clip):
    program = (
        "import sys; from evacap.processing.media_evacap import load_media;"
        f"load_media({str(clip)!r}); assert 'decord' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_decord_backend(clip):
    try:
        import decord  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="pip install decord"):
            load_media(clip, backend="decord")
        return
    media = load_media(clip, backend="decord")
    assert read_barcodes(media.frames) == shown(centres(4.0))
    assert np.array_equal(media.waveform, load_media(clip).waveform)


# Damaged files, in processes of their own

READER = """
import resource, signal, sys
from evacap.processing.media_evacap import MediaError, load_media, probe_media

for path in sys.stdin.read().split("\\n"):
    print("reading", path, flush=True)
    signal.setitimer(signal.ITIMER_PROF, 10)  # of processor time, then the process is ended
    for read in (probe_media, load_media, lambda path: load_media(path, start=1, duration=1)):
        try:
            read(path)
        except MediaError as error:
            assert "\\n" not in str(error)
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_randomly_damaged_files_neither_crash_nor_hang(tmp_path):
    chance = random.Random(0)
    originals = [
        write_clip(tmp_path / f"{video}_{audio}.{extension}", video=video, audio=audio, rate=48000)
        for extension, video, audio in CLIPS
    ]
    originals += [
        write_clip(tmp_path / f"sound.{extension}", video=None, audio=audio, rate=48000) for extension, audio in SOUNDS
    ]
    paths = []
    for number in range(300):
        original = originals[number % len(originals)]
        paths.append(tmp_path / f"{number}_{original.name}")
        paths[-1].write_bytes(damage(original.read_bytes(), chance))
    result = subprocess.run(
        [sys.executable, "-c", READER],
        input="\n".join(map(str, paths)),
        capture_output=True,
        text=True,
        errors="replace",
        timeout=1200,
    )
    done = result.stdout.splitlines()
    assert result.returncode == 0, f"{done[-1]} ended with {result.returncode}: {result.stderr[-2000:]}"
    assert int(done[-1].split()[1]) < 5000, "one file took some gigabytes"
    strangers = [line for line in result.stderr.splitlines() if not line.endswith("using what could be read")]
    assert strangers == [], "FFmpeg or PyAV wrote to the terminal"

# Copyright 2026 The EVACap authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""A media file in, its sound and its picture out: one waveform and a few frames on one time line.

Header fields lie (durations, frame counts, rates), so nothing here depends on them: the packets of the wanted window are
read once for their time stamps, and the sound is decoded on the way; then only the wanted frames are decoded, each after
a jump to the key frame before it. The time line starts at 0, where the first stream of the file starts.
"""

import bisect
import errno
import http.client
import io
import math
import os
import re
import shutil
import tempfile
import urllib.parse
import urllib.request
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
from transformers.utils import logging


try:
    import av
except ImportError:
    av = None

# Below transformers' own logger, so that its verbosity holds here too.
logger = logging.get_logger(f"transformers.{__name__}")

# Play lists, concatenation scripts and picture sequences are left out: they would read other files than the one asked for.
_FORMATS = (
    "mov,matroska,avi,mpegts,mpeg,flv,asf,mxf,ogg,wav,w64,aiff,au,caf,flac,mp3,aac,ac3,eac3,amr,wv,"
    "gif,png_pipe,jpeg_pipe,webp_pipe,bmp_pipe,tiff_pipe"
)
_PREROLL = 0.5  # seconds a sound decoder gets to settle before the window starts
_INTERLEAVE = 10.0  # seconds by which the streams of one file may lag behind each other
_MAX_JITTER = 0.05  # seconds a time stamp may stray from the count of samples before it is believed
_MAX_JUMP = 3600.0  # seconds; a time stamp that leaps further ahead is damage, not a pause
_MAX_SOUND_PACKET = 10.0  # seconds; a packet of sound that claims to last longer is damaged
_MIN_BYTES_A_SECOND = 10  # what lies beyond the seconds that a file of its size can last is damage
_MAX_PIXELS = 2**26  # twice 8K; a picture with more is damaged
_TOLERANCE = 0.25  # seconds by which a file may be shorter than announced without being called truncated
_CLOCK = 1e-6  # seconds lost when time stamps become floats


class MediaError(ValueError):
    """A source that cannot be read as sound or picture; the message names it, what was found and what to do."""


class MediaNotFoundError(MediaError, FileNotFoundError):
    """There is no file at that path."""


@dataclass
class Media:
    """What [`load_media`] returns.

    Attributes:
        waveform: Sound, float32 of shape `(samples,)`, or `None` if there is no (readable) sound track.
        sampling_rate: Samples a second of `waveform`.
        frames: Pictures, uint8 RGB of shape `(frames, height, width, 3)`, or `None` if there is no (readable) picture.
        timestamps: When each frame appears, float64 of shape `(frames,)`, in seconds from the window's start: below 0 for
            a frame that was already on display then.
        start: Start of the window, in seconds from the start of the file.
        duration: Seconds of the window that the file really has; 0 for a still image.
    """

    waveform: np.ndarray | None
    sampling_rate: int
    frames: np.ndarray | None
    timestamps: np.ndarray | None
    start: float
    duration: float


@dataclass
class MediaInfo:
    """What [`probe_media`] returns: `duration` in seconds (0 for a still image) and which tracks there are."""

    duration: float
    has_audio: bool
    has_video: bool


class MediaFile:
    """A source that is open and can be read from any place, with the name that messages give it.

    It carries no `name` attribute on purpose: FFmpeg would guess the format from the extension, which may be wrong.
    """

    def __init__(self, file: BinaryIO, label: str):
        self.label = label
        self.read, self.tell, self._seek = file.read, file.tell, file.seek

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        try:
            return self._seek(offset, whence)
        except (OSError, ValueError):  # a place that damaged data names
            return -errno.EINVAL


def is_file(item: Any) -> bool:
    """Whether `item` names or holds a media file: path, URL, bytes, file object, open `MediaFile`, or the
    `{"bytes": …, "path": …}` of an undecoded `datasets` column."""
    if isinstance(item, dict):
        return bool(item) and item.keys() <= {"bytes", "path"}
    return isinstance(item, (str, os.PathLike, bytes, bytearray, memoryview)) or hasattr(item, "read")


def file_source(item: Any) -> "str | os.PathLike | bytes | BinaryIO | MediaFile":
    """What `load_media` reads for an `item` that is a file."""
    if not isinstance(item, dict):
        return item
    source = item.get("path") if item.get("bytes") is None else item["bytes"]
    if source is None:
        raise ValueError(f"{item} names no file; give one of `bytes` and `path`")
    return source


@contextmanager
def open_media(source: str | os.PathLike | bytes | BinaryIO | MediaFile) -> Iterator[MediaFile]:
    """Open a source once, to read several windows of it: a URL is downloaded once, a pipe is read once.

    Args:
        source: A path, a URL (`http:`, `https:`, `file:`), the bytes of a file, or a binary file object, which is read
            from its beginning and stays open.

    Raises:
        MediaError: The source is missing, a directory, closed, empty, not binary, or could not be downloaded.
    """
    if isinstance(source, MediaFile):
        yield source
        return
    label = _label(source)
    if getattr(source, "closed", False):
        raise MediaError(f"{label}: the file object is closed; open it again")
    if isinstance(source, io.TextIOBase):
        raise MediaError(f"{label}: opened as text; open it with mode 'rb'")
    with ExitStack() as opened:
        if isinstance(source, (bytes, bytearray, memoryview)):
            file = io.BytesIO(source)
        elif hasattr(source, "read"):
            file = source if _can_seek(source) else io.BytesIO(source.read())
        elif not isinstance(source, (str, os.PathLike)):
            raise TypeError(
                f"`source` is a {type(source).__name__}; it must be a path, URL, bytes or binary file object"
            )
        elif _scheme(source) in ("http", "https"):
            file = opened.enter_context(tempfile.TemporaryFile())
            _download(source, file)
        else:
            file = opened.enter_context(_open_path(source))
            if not _can_seek(file):
                file = io.BytesIO(file.read())
        file.seek(0)
        head = file.read(64)
        if not head:
            raise MediaError(f"{label}: the file is empty; get it again")
        if head.startswith(b"version https://git-lfs"):
            raise MediaError(f"{label}: a git-LFS pointer, not the media it stands for; run `git lfs pull`")
        yield MediaFile(file, label)


def probe_media(source: str | os.PathLike | bytes | BinaryIO | MediaFile) -> MediaInfo:
    """How long a file lasts and which tracks it has, without decoding it.

    The announced duration is checked against the last packets; only where they disagree is the whole file read.

    Args:
        source: See [`open_media`].

    Raises:
        MediaError: See [`load_media`].
    """
    with _reading(source) as reader:
        return MediaInfo(reader.length(), reader.audio is not None, reader.video is not None)


def load_media(
    source: str | os.PathLike | bytes | BinaryIO | MediaFile,
    *,
    sampling_rate: int = 16000,
    num_frames: int = 18,
    fps: float | None = None,
    frame_sampling: str = "uniform",
    channels: str = "average",
    start: float = 0.0,
    duration: float | None = None,
    audio: bool = True,
    video: bool = True,
    backend: str = "pyav",
) -> Media:
    """Read the sound and some frames of a file, or of a window of it.

    A frame is chosen by time, never by number: the one on display at that time, which is the last one with a time stamp
    at or before it. So a clip with fewer frames than asked for repeats them, a picture that ends before the sound stays,
    and before its first frame a picture that starts late shows that first frame. A still image is a clip of one frame,
    repeated as often as asked for. A sound that starts late, pauses, or is over before the window starts, is silent
    there; silence is not added where the sound merely ends earlier than the picture. (ours)

    Sound is resampled channel by channel, then reduced to one. (Not FFmpeg's mix to mono, (L + R)/√2, which is louder.)

    A track of which nothing can be decoded counts as missing. Where a file is damaged or shorter than it announces, what
    can be read is returned, with one warning. Digital silence is returned as it is.

    Args:
        source: See [`open_media`].
        sampling_rate: Samples a second of the waveform.
        num_frames: Frames to return. Not used for `fps` with `frame_sampling="uniform"`.
        fps: Frames a second, instead of `num_frames` frames however long the window is.
        frame_sampling: `"uniform"`: the window is cut into `num_frames` equal parts (paper), or parts of 1/`fps` seconds,
            and each gives the frame in its middle. `"middle"`: as with `fps`, which must be given, but of these only the
            middle run of `num_frames` (AVCap's evaluation), all of them if they are fewer.
        channels: `"average"` of all channels (ours) or the `"first"` (AVCap).
        start: Start of the window, in seconds.
        duration: Length of the window, in seconds; up to the end of the file by default, and never beyond it.
        audio: Whether to read the sound.
        video: Whether to read the picture. Cover art of a sound file is not a picture in this sense.
        backend: Reader of the frames: `"pyav"`, or `"decord"`, which picks wrong frames in files with an edit list, and
            can hang or end the process on others. The sound is PyAV's in either case: decord's stereo is not sound.

    Raises:
        MediaError: The source is missing, a directory, empty, damaged beyond reading, no media file, has neither sound
            nor picture, or ends before the window starts.
        ValueError: An argument is out of range.
        ImportError: The package of the backend is not installed.
    """
    _check_arguments(sampling_rate, num_frames, fps, frame_sampling, channels, start, duration, audio, video, backend)
    stop = math.inf if duration is None else start + duration
    with _reading(source) as reader:
        for reach in (2.0, 20.0, math.inf):
            waveform = _Waveform(sampling_rate, channels) if audio and reader.audio else None
            scan = reader.scan(start - reach, start, stop, waveform)
            if scan.complete:
                break
        end = 0.0 if reader.still else min(scan.end, stop)
        if end < start + _CLOCK and not (reader.still and start == 0):
            raise MediaError(
                f"{reader.label}: nothing to read from {start:g} s on, the file ends at {reader.length():g} s; "
                "choose an earlier start"
            )
        announced = min(reader.announced, stop)
        if announced - end > _TOLERANCE and reader.announced < math.inf:
            reader.note(f"{announced - start:.6g} s announced, {end - start:.6g} s found")
        media = Media(None, sampling_rate, None, None, start, end - start)
        if waveform is not None:
            media.waveform = waveform.cut(start, end)
            if scan.undecodable and not waveform.pieces:
                media.waveform = None
                reader.note("its sound cannot be decoded")
        if video and reader.video:
            read = reader.read_frames if backend == "pyav" else reader.read_frames_with_decord
            times = [start + time for time in frame_times(end - start, num_frames, fps, frame_sampling)]
            media.frames, timestamps = read(times, scan.keys)
            if media.frames is None:
                reader.note("its picture cannot be decoded")
            else:
                media.timestamps = timestamps - start
        if reader.problems and media.waveform is None and media.frames is None:
            raise MediaError(f"{reader.label}: {'; '.join(reader.problems)}; get it again")
        return media


@contextmanager
def _reading(source) -> Iterator["_Reader"]:
    """Open a reader; what went wrong becomes a `MediaError` or, where there is a result, one warning."""
    if av is None:
        raise ImportError("Reading media needs PyAV: `pip install av`")
    with open_media(source) as file:
        try:
            reader = _Reader(file)
            try:
                yield reader
            finally:
                reader.container.close()
        except av.FFmpegError as error:
            found = "the file breaks off" if _breaks_off(file) else error.strerror
            raise MediaError(
                f"{file.label}: cannot be read as sound or picture ({found}); check that it is a complete media file"
            ) from error
        if reader.problems:
            logger.warning(f"{file.label}: {'; '.join(reader.problems)}; using what could be read")


class _Reader:
    """An open container: its sound and its picture on a time line in seconds from the start of the file."""

    def __init__(self, file: MediaFile):
        self.file, self.label = file, file.label
        self.problems = ["the file breaks off"] if _breaks_off(file) else []
        file.seek(0, os.SEEK_END)
        self.longest = 1.0 + file.tell() / _MIN_BYTES_A_SECOND
        self._open()
        if self.audio is None and self.video is None:
            raise MediaError(f"{self.label}: has no readable sound or picture; check that it is a complete media file")
        self.still = self.container.format.name.endswith("_pipe")
        self.announced = math.inf if self.container.duration is None else self.container.duration * 1e-6
        if "matroska" in self.container.format.name:  # counts from 0, the others from their first time stamp
            self.announced -= self.origin

    def _open(self):
        self.file.seek(0)
        self.container = av.open(self.file, metadata_errors="replace", options={"format_whitelist": _FORMATS})
        cover = av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails
        self.audio = self.container.streams.best("audio")
        self.video = next((s for s in self.container.streams.video if not s.disposition & cover), None)
        if self.video is not None and self.video.codec_context is not None:
            self.video.codec_context.options = {"max_pixels": str(_MAX_PIXELS)}
        self.origin = max(0, self.container.start_time or 0) * 1e-6
        # AVI stores no display times, and FFmpeg's guesses are wrong for pictures that are not coded in order.
        self.decoding_times = self.container.format.name == "avi"
        self.fresh = True

    def note(self, problem: str):
        if problem not in self.problems:
            self.problems.append(problem)

    def go_to(self, time: float):
        """Read on from a key frame at or before `time`, as far as the container knows, or from the beginning."""
        if time > 0:
            self.fresh = False
            try:
                return self.container.seek(round((time + self.origin) * 1e6))
            except (av.FFmpegError, OverflowError):
                pass
        if not self.fresh:
            self.container.close()
            self._open()

    def packets(self, streams: list) -> Iterator[tuple]:
        """Yield `(time, packet)` up to the end of the file, or to damage that nothing can be read beyond."""
        self.fresh = False
        clocks = {stream.index: float(stream.time_base) for stream in streams}
        while True:
            try:
                for packet in self.container.demux(streams):
                    stamp = packet.dts if packet.pts is None or self.decoding_times else packet.pts
                    yield None if stamp is None else stamp * clocks[packet.stream.index] - self.origin, packet
                return
            except IndexError:  # a packet of a stream that PyAV does not know, as it came up after opening
                continue
            except av.FFmpegError:
                self.note("data damaged up to the end")
                return

    def decode(self, packet, time: float | None) -> Iterator[tuple]:
        """Yield `(time, frame)`; a frame without a time stamp gets `time`."""
        for frame in packet.decode():
            yield time if frame.time is None else frame.time - self.origin, frame

    def scan(self, since: float, start: float, stop: float, waveform: "_Waveform | None" = None) -> "_Scan":
        """Read the packets from `since` to `stop`, and decode the sound from `start` on."""
        self.go_to(since)
        streams = [stream for stream in (self.audio, self.video) if stream is not None]
        reached = {stream.index: max(since, 0.0) for stream in streams}
        missing = {} if since <= 0 else {s.index: max(start, self._starts(s)) for s in streams}
        scan = _Scan()
        for time, packet in self.packets(streams):
            index, is_sound = packet.stream.index, packet.stream.type == "audio"
            if time is not None:
                length = float((packet.duration or 0) * packet.time_base)
                jump = time - reached[index]
                if (
                    jump > _MAX_JUMP
                    or (jump > 1.0 and time > self.announced + 1.0)
                    or time > self.longest
                    or (is_sound and length > _MAX_SOUND_PACKET)
                ):
                    self.note("some time stamps damaged")
                    scan.undecodable = scan.undecodable or is_sound
                    continue
                if (is_sound or packet.is_keyframe) and time <= missing.get(index, -math.inf) + _CLOCK:
                    del missing[index]
                if packet.is_keyframe and not is_sound:
                    scan.keys.append(time)
                if not packet.is_discard:
                    reached[index] = max(reached[index], time + (length if length < _MAX_JUMP else 0.0))
                    scan.end = max(scan.end, reached[index])
            if is_sound and waveform is not None and start - _PREROLL < reached[index] and (time or 0.0) < stop:
                try:
                    for time_heard, frame in self.decode(packet, time):
                        waveform.add(frame, time_heard)
                except av.FFmpegError:
                    scan.undecodable = True
                    self.note("some sound damaged")
            if time is not None and (min(reached.values()) >= stop or time > stop + _INTERLEAVE):
                break
        scan.complete = not missing
        scan.keys.sort()
        return scan

    def _starts(self, stream) -> float:
        return -math.inf if stream.start_time is None else float(stream.start_time * stream.time_base) - self.origin

    def length(self) -> float:
        """Seconds up to the end of the last packet."""
        if self.still:
            return 0.0
        if self.announced < math.inf:
            end = self.scan(self.announced - _INTERLEAVE, 0.0, math.inf).end
            if abs(end - self.announced) <= _TOLERANCE:
                return end
        return max(0.0, self.scan(0.0, 0.0, math.inf).end)

    def read_frames(self, times: list[float], keys: list[float]) -> tuple[np.ndarray | None, np.ndarray]:
        """The frames on display at `times`, which ascend, and their time stamps; `keys` are the times of key frames."""
        frames, stamps, last = None, np.zeros(len(times)), None
        for i, (stamp, frame) in enumerate(self._shown(times, keys)):
            stamps[i] = stamp
            if frames is None:
                first = frame
            if frame is last:
                frames[i] = frames[i - 1]
                continue
            picture = frame.to_ndarray(format="rgb24", width=first.width, height=first.height)
            picture = np.rot90(picture, round(first.rotation / 90) % 4)
            if frames is None:
                frames = np.empty((len(times), *picture.shape), dtype=np.uint8)
            frames[i], last = picture, frame
            if frame.is_corrupt:
                self.note("some pictures damaged")
        return frames, stamps

    def _shown(self, times: list[float], keys: list[float]) -> Iterator[tuple]:
        pictures = shown = ahead = None
        jumps = True
        for time in times:
            here = ahead or shown
            key = keys[bisect.bisect(keys, time + _CLOCK) - 1] if keys and keys[0] <= time + _CLOCK else -math.inf
            if pictures is None or (jumps and key > here[0] + _CLOCK):
                for since in (key, key - 2.0, key - 20.0, -math.inf):
                    pictures, shown = self._pictures(since), None
                    ahead = next(pictures, None)
                    if since <= 0 or (ahead is not None and ahead[0] <= time + _CLOCK):
                        break
                jumps = since > 0 or key <= 0
            while ahead is not None and (shown is None or ahead[0] <= time + _CLOCK):
                shown, ahead = ahead, next(pictures, None)
            if shown is None:
                return
            yield shown

    def _pictures(self, since: float) -> Iterator[tuple]:
        """Decode from a key frame at or before `since`."""
        self.go_to(since)
        started, last, waiting = since <= 0, 0.0, deque()
        for time, packet in self.packets([self.video]):
            started = started or packet.is_keyframe
            if not started:
                continue
            if self.decoding_times and time is not None:
                waiting.append(time)
            try:
                for shown, frame in self.decode(packet, last if time is None else time):
                    # Pictures come out in display order: each takes the earliest time that is not taken yet.
                    last = waiting.popleft() if waiting else shown
                    yield last, frame
            except av.FFmpegError:
                self.note("some pictures damaged")

    def read_frames_with_decord(self, times: list[float], keys: list[float]) -> tuple[np.ndarray | None, np.ndarray]:
        """As `read_frames`, by decord."""
        try:
            import decord
        except ImportError as error:
            raise ImportError("backend='decord' needs decord: `pip install decord`") from error
        self.file.seek(0)
        try:
            reader = decord.VideoReader(self.file)
            stamps = reader.get_frame_timestamp(range(len(reader)))[:, 0]
            chosen = np.searchsorted(stamps, np.array(times) + _CLOCK, side="right") - 1
            chosen = chosen.clip(min=0)
            return reader.get_batch(chosen).asnumpy(), stamps[chosen]
        except decord.DECORDError as error:
            raise MediaError(f"{self.label}: decord cannot read it; try backend='pyav'") from error


@dataclass
class _Scan:
    """What the packets of a window tell."""

    end: float = -math.inf
    """When the last packet ends."""
    keys: list[float] = field(default_factory=list)
    """When the pictures come that can be decoded without others before them."""
    undecodable: bool = False
    """Whether some of the sound could not be decoded, or not be placed."""
    complete: bool = True
    """Whether the reading began early enough to have seen every track at the start of the window."""


class _Waveform:
    """Decoded sound in pieces, each continuous and placed by time stamp."""

    def __init__(self, sampling_rate: int, channels: str):
        self.sampling_rate, self.channels = sampling_rate, channels
        self.pieces: list[tuple[float, list[np.ndarray]]] = []
        self.resampler = self.layout = self.due = None

    def add(self, frame, time: float | None):
        time = (self.due or 0.0) if time is None else time
        layout = (frame.format.name, frame.layout.name, frame.sample_rate)
        if layout != self.layout or abs(time - self.due) > _MAX_JITTER:
            self._flush()
            # Not the planar "fltp": PyAV reads beyond the planes of a frame with more than eight channels.
            self.resampler = av.AudioResampler(format="flt", rate=self.sampling_rate)
            self.layout, self.due = layout, time
            self.pieces.append((time, []))
        self.due += frame.samples / frame.sample_rate
        self._keep(self.resampler.resample(frame))

    def _flush(self):
        if self.resampler is not None:
            self._keep(self.resampler.resample(None))
            self.resampler = self.layout = None

    def _keep(self, frames: list):
        for frame in frames:
            if frame is not None:
                samples = frame.to_ndarray().reshape(frame.samples, -1)
                self.pieces[-1][1].append(samples.mean(axis=1) if self.channels == "average" else samples[:, 0].copy())

    def cut(self, start: float, end: float) -> np.ndarray:
        """The sound from `start` to `end`, silent where there is none, up to the last there is."""
        self._flush()
        total = round((end - start) * self.sampling_rate)
        waveform, last = np.zeros(total, dtype=np.float32), 0
        # The last piece goes first: where time stamps run back, what was read earlier stays.
        for time, chunks in reversed(self.pieces):
            first = round((time - start) * self.sampling_rate)
            for chunk in chunks:
                part = chunk[max(0, -first) : max(0, total - first)]
                at = max(0, first)
                waveform[at : at + len(part)] = part
                first += len(chunk)
                if len(part):
                    last = max(last, at + len(part))
        return waveform[:last] if last else waveform


def _breaks_off(file: MediaFile) -> bool:
    """Whether the outermost boxes of an mp4, AVI or WAV file promise more bytes than there are."""
    file.seek(0, os.SEEK_END)
    size = file.tell()
    file.seek(0)
    head = file.read(12)
    if head[:4] == b"RIFF":
        length = int.from_bytes(head[4:8], "little")
        return length != 0xFFFFFFFF and length + 8 > size
    if head[4:8] != b"ftyp":
        return False
    position = 0
    while position + 8 <= size:
        file.seek(position)
        head = file.read(16)
        length = int.from_bytes(head[:4], "big")
        if length == 1:
            length = int.from_bytes(head[8:], "big")
        if length < 8:  # 0: up to the end of the file
            return False
        position += length
    return position > size


def frame_times(duration: float, num_frames: int, fps: float | None, frame_sampling: str) -> list[float]:
    """The centres of equal parts of `duration` seconds; see `load_media`."""
    count = num_frames if fps is None else max(1, round(duration * fps))
    part = duration / num_frames if fps is None else 1 / fps
    times = [(i + 0.5) * part for i in range(count)]
    if frame_sampling == "middle" and count > num_frames:
        first = (count - num_frames) // 2
        times = times[first : first + num_frames]
    return times


def _check_arguments(sampling_rate, num_frames, fps, frame_sampling, channels, start, duration, audio, video, backend):
    for name, value, ok, expected in (
        ("sampling_rate", sampling_rate, sampling_rate > 0, "above 0"),
        ("num_frames", num_frames, num_frames > 0, "above 0"),
        ("fps", fps, fps is None or 0 < fps < math.inf, "above 0 or None"),
        ("frame_sampling", frame_sampling, frame_sampling in ("uniform", "middle"), "'uniform' or 'middle'"),
        ("channels", channels, channels in ("average", "first"), "'average' or 'first'"),
        ("start", start, 0 <= start < math.inf, "at least 0"),
        ("duration", duration, duration is None or 0 < duration < math.inf, "above 0 or None"),
        ("backend", backend, backend in ("pyav", "decord"), "'pyav' or 'decord'"),
    ):
        if not ok:
            raise ValueError(f"`{name}` is {value!r}; it must be {expected}")
    if frame_sampling == "middle" and fps is None:
        raise ValueError("`frame_sampling='middle'` needs `fps`")
    if not (audio or video):
        raise ValueError("`audio` and `video` are both False; ask for at least one")


def _label(source) -> str:
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"<{len(source)} bytes>"
    name = getattr(source, "name", None)
    return name if isinstance(name, str) else f"<{type(source).__name__}>"


def _can_seek(file: BinaryIO) -> bool:
    return hasattr(file, "seek") and (not hasattr(file, "seekable") or file.seekable())


def _scheme(source: str | os.PathLike) -> str | None:
    """The scheme of a URL in lower case; `None` for a path."""
    match = re.match(r"(file):|([a-z][a-z0-9+.-]+)://", source, re.IGNORECASE) if isinstance(source, str) else None
    return match and (match[1] or match[2]).lower()


def _open_path(source: str | os.PathLike) -> BinaryIO:
    path, scheme = source, _scheme(source)
    if scheme == "file":
        path = urllib.request.url2pathname(urllib.parse.urlsplit(source).path)
    elif scheme is not None:
        raise MediaError(f"{source}: {scheme} addresses are not supported; open it and pass the file object")
    if os.path.isdir(path):
        raise MediaError(f"{source}: is a directory; pass one of its files")
    try:
        return open(path, "rb")
    except FileNotFoundError as error:
        raise MediaNotFoundError(f"{source}: there is no such file; check the path") from error
    except (OSError, ValueError) as error:
        raise MediaError(f"{source}: cannot be opened ({error})") from error


def _download(url: str, file: BinaryIO):
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            shutil.copyfileobj(response, file)
            expected = int(response.headers.get("Content-Length") or file.tell())
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise MediaError(f"{url}: cannot be downloaded ({error}); check the address") from error
    if file.tell() < expected:
        raise MediaError(f"{url}: the download broke off after {file.tell()} of {expected} bytes; try again")

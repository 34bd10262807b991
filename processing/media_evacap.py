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
"""Reading of a media file: its sound as one waveform, and a few frames on the same time line.

A file is read once, in the order in which it is written, and windows are cut from it as they fill. Header fields
(durations, frame counts, rates) and indexes can be wrong, so nothing depends on them. A jump is used only for a window
that begins later, and only in containers with a time stamp in every packet; the first packets there must confirm it.
The time line starts at 0 with the first stream of the file. If the clock of a broadcast breaks (wraps, leaps or starts
again), the time is counted on.
"""

import errno
import http.client
import io
import math
import os
import re
import tempfile
import threading
import time
import urllib.parse
import urllib.request
import zlib
from bisect import insort
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from transformers.utils import logging


try:
    import av
except ImportError:
    av = None

# Below transformers' own logger, so that its verbosity holds here too.
logger = logging.get_logger(f"transformers.{__name__}")

CHANNELS = ("average", "first")
FRAME_SAMPLING = ("uniform", "middle")
SILENCE = 1e-4
"""Sound that never exceeds this (80 dB below full scale) is silence."""
MAX_SAMPLE = 1000.0
"""A sample beyond this is damage, or a file of floats on another scale than ±1."""
SECONDS_A_WINDOW = 60.0
"""Processor time that reading one window may take."""
MEMORY_A_PROCESS = 2**32
"""Bytes that a process which reads files may take on top of what it has when it begins."""
OVER_TIME = 70
"""Exit status of a process that ended itself, as FFmpeg did not return; see [`guard_process`]."""
DOWNLOAD_BYTES, DOWNLOAD_SECONDS = 2**32, 600.0
"""The largest download, or stream that cannot be read twice, and the longest time that a download may take."""

# Play lists, concatenation scripts and picture sequences are left out: they would read other files than the one asked
# for.
_FORMATS = (
    "mov,matroska,avi,mpegts,mpeg,flv,asf,mxf,ogg,wav,w64,aiff,au,caf,flac,mp3,aac,ac3,eac3,amr,wv,"
    "gif,apng,png_pipe,jpeg_pipe,webp_pipe,bmp_pipe,tiff_pipe"
)
# Every packet of these has a time that does not depend on where reading began. Elsewhere a jump is a guess.
_SEEKABLE = ("mov,", "matroska,")
# The length of these is estimated from the bytes of the first seconds.
_ESTIMATED = ("mp3", "aac", "ac3", "eac3", "amr")
_PREROLL = 0.5  # seconds a sound decoder gets to settle before the window starts
_REACH = 2.0  # seconds by which a jump aims before the window starts
_INTERLEAVE = 10.0  # seconds by which the streams of one file may lag behind each other …
_LAG_BYTES = 2**25  # … and may at any rate where no more bytes than these lie between
_QUEUE_BYTES = 2**28  # pictures of a window that are kept as they are coded until its end is known
_SKIP = 2.0  # seconds; where wanted pictures lie further apart, what lies between is not decoded
_LOOK_AHEAD = 4  # pictures after a leap that tell whether it is damage
_MAX_REORDER = 8  # pictures by which one may come out too late in a damaged part: more than encoders put out of order
_MAX_JITTER = 0.05  # seconds a time stamp may stray from the count of samples before it is believed
_BACKWARD = 1.0  # seconds; a clock that runs back by more has begun anew
_LEAP = 0.25  # seconds; a clock that leaps ahead by more may be damaged: then it comes back …
_RUN = 5.0  # … within these
_PAUSE, _LONE_PAUSE = 10.0, 100.0  # seconds; a clock that leaps further has begun anew (the second: pictures alone)
_MAX_JUMP = 3600.0  # seconds; a time stamp that leaps further ahead is damage, not a pause
_MAX_RATE = 2**22  # samples a second; a higher rate is damage, and FFmpeg's filter for it takes gigabytes
_MAX_SOUND_PACKET = 10.0  # seconds; a packet of sound that claims to last longer is damaged
_MIN_BYTES_A_SECOND = 10  # what lies beyond the seconds that a file of its size can last is damage
_MAX_PIXELS = 2**26  # twice 8K; a picture with more is damaged
_MAX_FRAME_BYTES = 2**29  # pictures of one window; larger ones are shrunk to fit
_MAX_SOUND_BYTES = 2**30  # of one window
_TOLERANCE = 0.25  # seconds by which a file may be shorter than announced without being called truncated
_CLOCK = 1e-6  # seconds lost when time stamps become floats
_PLACEHOLDER = 0x7FFF0000  # bytes; what a WAV file announces while it is still being written
_LONGEST_NAME = 4096
_AGENT = "Mozilla/5.0 (compatible; EVACap)"  # some servers refuse programs that they do not know


class MediaError(ValueError):
    """A source that cannot be read as sound or picture; the message names it, what was found and what to do."""


class MediaNotFoundError(MediaError, FileNotFoundError):
    """There is no file at that path."""


@dataclass
class Media:
    """The result of [`load_media`].

    Attributes:
        waveform: Sound, float32 of shape `(samples,)`, or `None` if there is no (readable) sound track.
        sampling_rate: Samples per second of `waveform`.
        frames: Pictures, uint8 RGB of shape `(frames, height, width, 3)`, or `None` if there is no (readable) picture.
        timestamps: The time of each frame, float64 of shape `(frames,)`, in seconds from the start of the window;
            below 0 for a frame that was already on display.
        start: Start of the window, in seconds from the start of the file.
        duration: Seconds of the window that the file really has; 0 for a still image.
        name: The name of the file in messages.
    """

    waveform: np.ndarray | None
    sampling_rate: int
    frames: np.ndarray | None
    timestamps: np.ndarray | None
    start: float
    duration: float
    name: str = ""

    @property
    def silent(self) -> bool:
        """Whether there is a sound track, and nothing to hear in it."""
        return self.waveform is not None and is_silent(self.waveform)


@dataclass
class MediaInfo:
    """The result of [`probe_media`]: `duration` in seconds (0 for a still image), and which tracks there are."""

    duration: float
    has_audio: bool
    has_video: bool


class MediaFile:
    """An open source that can be read from any position, with its name in messages."""

    def __init__(self, file: BinaryIO, label: str):
        self.label = label
        self.read, self.tell, self._seek = file.read, file.tell, file.seek

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        try:
            return self._seek(offset, whence)
        except (OSError, ValueError):  # a place that damaged data names
            return -errno.EINVAL


def is_file(item: Any) -> bool:
    """Whether `item` is a media file or its name.

    That is a path, a URL, bytes, a file object, an open `MediaFile`, or the `{"bytes": …, "path": …}` of an undecoded
    `datasets` column.
    """
    if isinstance(item, dict):
        return bool(item) and item.keys() <= {"bytes", "path"}
    return isinstance(item, (str, os.PathLike, bytes, bytearray, memoryview)) or hasattr(item, "read")


def file_source(item: Any) -> "str | os.PathLike | bytes | BinaryIO | MediaFile":
    """The source that `load_media` reads for an `item` that is a file."""
    if not isinstance(item, dict):
        return item
    source = item.get("path") if item.get("bytes") is None else item["bytes"]
    if source is None:
        raise ValueError(f"{item} names no file; give one of `bytes` and `path`")
    return source


@contextmanager
def open_media(source: str | os.PathLike | bytes | BinaryIO | MediaFile) -> Iterator[MediaFile]:
    """Opens a source once, to read several windows of it: a URL is downloaded once, a pipe is read once.

    Args:
        source: A path, a URL (`http:`, `https:`, `file:`), the bytes of a file, or a binary file object, which is read
            from its beginning and stays open.

    Raises:
        MediaError: If the source is missing, a directory, closed, empty or not binary, or cannot be downloaded.
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
            file = source if _can_seek(source) else _read_stream(source, label)
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
                file = _read_stream(file, label)
        file.seek(0)
        head = file.read(64)
        if not head:
            raise MediaError(f"{label}: the file is empty; get it again")
        if head.startswith(b"version https://git-lfs"):
            raise MediaError(f"{label}: a git-LFS pointer, not the media it stands for; run `git lfs pull`")
        if head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X" and head[20] & 2:
            raise MediaError(f"{label}: an animated WebP, which cannot be read; convert it to GIF, APNG or MP4")
        if head[:4] == b"RIFF" and head[8:12] == b"WAVE":
            _check_chunks(file, label)
        yield MediaFile(file, label)


def probe_media(source: str | os.PathLike | bytes | BinaryIO | MediaFile) -> MediaInfo:
    """The duration and the tracks of a file, without decoding it.

    The announced duration is checked against the last packets. The whole file is read only if they disagree or cannot
    be reached by a jump.

    Args:
        source: See [`open_media`].

    Raises:
        MediaError: If the file cannot be read, see [`load_media`].
    """
    with read_media(source) as reader:
        return MediaInfo(reader.length(), reader.has_audio, reader.has_video)


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
    audio_track: int | None = None,
    backend: str = "pyav",
) -> Media:
    """Reads the sound and some frames of a file, or of a window of it.

    Frames are chosen by time, never by number: the frame on display at a time is the last one with a time stamp at or
    before it. So a clip with too few frames repeats them, a picture that ends before the sound stays, and a picture
    that starts late shows its first frame until then. A still image (a file with one picture and no sound) is on
    display at any time and repeated as often as needed. Where a sound starts late or pauses, or if it is over before
    the window starts, it is silent. No silence is added if the sound only ends before the picture. (ours)

    Sound is resampled channel by channel and then reduced to one channel, without FFmpeg's mix to mono, (L + R)/√2,
    which is louder.

    A track without any decodable data counts as missing. If a file is damaged or shorter than announced, the readable
    part is returned, with one warning. Digital silence is returned as it is, with `Media.silent` set.

    A window may cost 60 s of processor time, 1 GiB of sound and 512 MiB of pictures; larger pictures are shrunk.
    Animated pictures are read from GIF and APNG files, but not from WebP.

    Args:
        source: See [`open_media`].
        sampling_rate: Samples per second of the waveform.
        num_frames: Number of frames. It is ignored with `fps` and `frame_sampling="uniform"`.
        fps: Frames per second, instead of `num_frames` frames for any length of the window.
        frame_sampling: With `"uniform"`, the window is divided into `num_frames` equal parts (paper), or into parts of
            1/`fps` seconds, and the frame in the middle of each is taken. `"middle"` needs `fps` and takes only the
            middle run of `num_frames` of these frames (AVCap's evaluation), or all if there are fewer.
        channels: `"average"` of all channels (ours), or the `"first"` (AVCap). If channels cancel each other, so that
            their average is far below that of unrelated channels, the loudest is taken instead, with a warning.
        start: Start of the window, in seconds.
        duration: Length of the window, in seconds; up to the end of the file by default, and never beyond it.
        audio: Whether to read the sound.
        video: Whether to read the picture. Cover art of a sound file is not a picture in this sense.
        audio_track: The number of the sound track, counted from 0; FFmpeg's choice by default.
        backend: Reader of the frames: `"pyav"`, or `"decord"`, which picks wrong frames in files with an edit list,
            and may hang or crash on others. The sound is always read by PyAV, because decord reads stereo wrongly.

    Raises:
        MediaError: If the source is missing, a directory, empty, damaged beyond reading or not a media file; if it has
            neither sound nor picture, or ends before the window starts; if its sound has a sample that is not finite
            or beyond ±1000; or if it takes more time or memory than a window may.
        ValueError: If an argument is out of range.
        ImportError: If the package of the backend is not installed.
    """
    with read_media(
        source,
        sampling_rate=sampling_rate,
        num_frames=num_frames,
        fps=fps,
        frame_sampling=frame_sampling,
        channels=channels,
        start=start,
        audio=audio,
        video=video,
        audio_track=audio_track,
        backend=backend,
    ) as reader:
        return reader.read(duration)


@contextmanager
def read_media(source: str | os.PathLike | bytes | BinaryIO | MediaFile, **options) -> Iterator["MediaReader"]:
    """Opens a file to read its windows one after the other, in one pass.

    Problems become a `MediaError` or, if there are results, one warning at the end.

    Args:
        source: See [`open_media`].
        options: The options of [`load_media`] except `duration`.

    Raises:
        MediaError, ValueError, ImportError: If the file cannot be read, see [`load_media`]; also from the methods of
            the reader.
    """
    if av is None:
        raise ImportError("Reading media needs PyAV: `pip install av`")
    with open_media(source) as file:
        reader = None
        try:
            reader = MediaReader(file, **options)
            yield reader
        except MemoryError as error:
            bound = "there is" if _memory is None else f"the {_memory / 2**20:,.0f} MiB that its process may use"
            raise MediaError(f"{file.label}: reading it takes more memory than {bound}; leave it out") from error
        except av.FFmpegError as error:
            found = "the file breaks off" if _breaks_off(file) else error.strerror
            raise MediaError(
                f"{file.label}: cannot be read as sound or picture ({found}); check that it is a complete media file"
            ) from error
        finally:
            if reader is not None:
                reader.close()
        if reader.problems:
            logger.warning(f"{file.label}: {'; '.join(reader.problems)}; using what could be read")


class MediaReader:
    """Windows of an open file, one after the other; see [`read_media`].

    Attributes:
        label: The name of the file in messages.
        has_audio, has_video: Whether there is such a track.
        still: Whether the file is one picture.
        position: Where the next window starts, in seconds.
    """

    def __init__(
        self,
        file: MediaFile,
        *,
        sampling_rate: int = 16000,
        num_frames: int = 18,
        fps: float | None = None,
        frame_sampling: str = "uniform",
        channels: str = "average",
        start: float = 0.0,
        audio: bool = True,
        video: bool = True,
        audio_track: int | None = None,
        backend: str = "pyav",
    ):
        check_sampling(num_frames, fps, frame_sampling)
        check_options(
            ("sampling_rate", sampling_rate, sampling_rate > 0, "above 0"),
            ("channels", channels, channels in CHANNELS, " or ".join(map(repr, CHANNELS))),
            ("start", start, 0 <= start < math.inf, "at least 0"),
            ("audio_track", audio_track, audio_track is None or audio_track >= 0, "at least 0 or None"),
            ("backend", backend, backend in ("pyav", "decord"), "'pyav' or 'decord'"),
        )
        if not (audio or video):
            raise ValueError("`audio` and `video` are both False; ask for at least one")
        self.file, self.label, self.position = file, file.label, start
        self.sampling_rate, self.channels, self.backend = sampling_rate, channels, backend
        self.sampling = (num_frames, fps, frame_sampling)
        self.problems = _Problems()
        if _breaks_off(file):
            self.problems.note("the file breaks off")
        self.note = self.problems.note
        self.budget = _Budget(file.label)
        self.wanted = {"audio": audio, "video": video, "audio_track": audio_track}
        self.source = self._open(start)
        self.has_audio, self.has_video = self.source.sound is not None, self.source.picture is not None
        self.still = self.source.is_still()
        self.announced = self.source.announced
        self.sound = _Sound(self.source, sampling_rate, channels) if audio and self.has_audio else None
        self.pictures = _Pictures(self.source) if video and self.has_video else None
        self.sources = [self.source]

    def _open(self, start: float, **changes) -> "_Demuxer":
        return _Demuxer(self.file, start, self.problems, self.budget, **{**self.wanted, **changes})

    def close(self):
        """Releases everything with threads, for which a process that is forked later would wait at its end."""
        self.budget.end()
        if self.sound is not None:
            self.sound.waveform.resampler = None
        for source in self.sources:
            source.close()
        self.sound = self.pictures = None

    def read(self, duration: float | None = None) -> Media:
        """The next `duration` seconds, or all that follow.

        Raises:
            MediaError: If the file cannot be read, see [`load_media`].
        """
        check_options(("duration", duration, duration is None or 0 < duration < math.inf, "above 0 or None"))
        self.budget.begin()
        start, stop = self.position, math.inf if duration is None else self.position + duration
        self.source.needed = start
        if self.sound is not None:
            self.sound.hear(stop)
        end = 0.0 if self.still else self._end(stop)
        if end < start + _CLOCK and not self.still:
            for track in self.source.tracks.values():
                self.source.leave_out(track)
            last = self._end(math.inf)
            if last < _CLOCK:
                raise MediaError(f"{self.label}: there is nothing in its tracks; get it again")
            raise MediaError(
                f"{self.label}: nothing to read from {start:g} s on, the file ends at {last:g} s; choose an earlier start"
            )
        announced = min(self.announced, stop)
        if announced - end > _TOLERANCE and self.announced < math.inf and not self.still:
            self.note(f"{announced - start:.6g} s announced, {end - start:.6g} s found")
        media = Media(None, self.sampling_rate, None, None, start, max(0.0, end - start), self.label)
        if self.sound is not None:
            media.waveform = self.sound.cut(start, end)
            if media.waveform is None:
                self.note("its sound cannot be decoded")
        if self.pictures is not None:
            times = [start + time for time in frame_times(media.duration, *self.sampling)]
            media.frames, timestamps = self._frames([0.0] * len(times) if self.still else times)
            if media.frames is None:
                self.note("its picture cannot be decoded")
            else:
                media.timestamps = timestamps - (0.0 if self.still else start)
        if self.problems and media.waveform is None and media.frames is None:
            raise MediaError(f"{self.label}: {'; '.join(self.problems)}; get it again")
        if not self.still:
            self.position = stop
        return media

    def goes_on(self, seconds: float) -> bool:
        """Whether more than `seconds` follow after what has been read."""
        return not self.still and self._end(self.position + seconds + _CLOCK) > self.position + seconds

    def length(self) -> float:
        """Seconds up to the end of the last packet of the file; no window can be read afterwards."""
        if self.still:
            return 0.0
        self.budget.begin()
        if self.announced < math.inf and self.source.seekable:
            self._replace(self.announced - _INTERLEAVE)
            end = self._end(math.inf)
            if abs(end - self.announced) <= _TOLERANCE or not self.source.entered:
                return end
            self._replace(0.0)
        return self._end(math.inf)

    def _replace(self, start: float):
        self.source = self._open(start, audio=False, video=False)
        self.sources.append(self.source)

    def _end(self, stop: float) -> float:
        """Where the window up to `stop` ends."""
        while self.source.end < stop and self.source.read():
            self._bound_queue()
        return max(0.0, min(self.source.end, stop))

    def _bound_queue(self):
        """Read the pictures in a pass of their own where those of a window are too many bytes to be kept."""
        if self.pictures is None or self.pictures.source is not self.source:
            return
        if self.source.picture.bytes > _QUEUE_BYTES:
            self.source.leave_out(self.source.picture)
            self.sources.append(self._open(self.position, audio=False))
            self.pictures = _Pictures(self.sources[-1])

    def _frames(self, times: list[float]) -> tuple[np.ndarray | None, np.ndarray]:
        """The frames on display at `times`, which ascend, and their time stamps."""
        if self.backend == "decord":
            return self._frames_by_decord(times)
        chosen, stamps = [], np.zeros(len(times))
        for i, moment in enumerate(times):
            try:
                shown = self.pictures.at(moment)
            except _CannotSkip:
                self.sources.append(self._open(0.0, audio=False))
                self.pictures = _Pictures(self.sources[-1], skip=math.inf)
                shown = self.pictures.at(moment)
            if shown is None:
                return None, stamps
            stamps[i] = shown.time
            chosen.append(shown)
        # A damaged picture may have another size than all the others.
        intact = [picture for picture in chosen if not picture.frame.is_corrupt] or chosen
        sizes = [(picture.frame.width, picture.frame.height) for picture in intact]
        size = max(sizes, key=sizes.count)
        pictures = [self.pictures.to_array(picture, size, 1 if self.still else len(times)) for picture in chosen]
        if all(picture is pictures[0] for picture in pictures):
            return np.broadcast_to(pictures[0], (len(times), *pictures[0].shape)), stamps
        return np.stack(pictures), stamps

    def _frames_by_decord(self, times: list[float]) -> tuple[np.ndarray | None, np.ndarray]:
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


class _Problems(list):
    """The problems of a file, in words."""

    def note(self, problem: str):
        if problem not in self:
            self.append(problem)


class _Budget:
    """The processor time that a window may take, checked whenever FFmpeg returns."""

    current: "_Budget | None" = None  # of the file that is being read

    def __init__(self, label: str):
        self.label = label
        self.begin()

    def begin(self):
        self.began = time.process_time()
        self.limit = time.thread_time() + SECONDS_A_WINDOW
        _Budget.current = self

    def end(self):
        _Budget.current = None

    def is_over(self) -> bool:
        return time.thread_time() > self.limit

    def check(self):
        if self.is_over():
            raise MediaError(
                f"{self.label}: reading it takes more than {SECONDS_A_WINDOW:g} s of processor time a window; leave it out"
            )


_memory: int | None = None  # what `guard_process` allows this process


def guard_process(memory: int = MEMORY_A_PROCESS):
    """Limits memory and time of a process that only reads files.

    More memory fails with an error that names the file. If FFmpeg does not return within twice the time of a window,
    the process says so in one line and ends.

    Args:
        memory: Bytes that the process may use in addition to what it has; only on Linux.
    """
    global _memory
    try:
        import resource

        with open("/proc/self/statm") as sizes:
            used = int(sizes.read().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (used + memory, resource.getrlimit(resource.RLIMIT_DATA)[1]))
        _memory = memory
    except (ImportError, OSError, ValueError, IndexError):
        pass
    threading.Thread(target=_watch, daemon=True).start()


def _watch():
    while True:
        time.sleep(1.0)
        budget = _Budget.current
        if budget is not None and time.process_time() - budget.began > 2 * SECONDS_A_WINDOW:
            message = f"{budget.label}: reading it takes more than {2 * SECONDS_A_WINDOW:g} s; its process is ended\n"
            os.write(2, message.encode(errors="replace"))
            os._exit(OVER_TIME)


class _Cursor:
    """A file for one container: several may read the same one.

    It carries no `name` attribute on purpose: FFmpeg would guess the format from the extension, which may be wrong.
    """

    def __init__(self, file: MediaFile, budget: _Budget):
        self.file, self.budget, self.position = file, budget, 0

    def read(self, size: int) -> bytes:
        self.budget.check()
        self.file.seek(self.position)
        data = self.file.read(size)
        self.position += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if self.budget.is_over():  # PyAV prints an error here and goes on
            return -errno.EIO
        if whence == os.SEEK_CUR:
            offset, whence = self.position + offset, os.SEEK_SET
        position = self.file.seek(offset, whence)
        if position >= 0:
            self.position = position
        return position

    def tell(self) -> int:
        return self.position


@dataclass(slots=True)
class _Packet:
    """A packet with its display and decoding times on the time line of the file, in seconds."""

    data: Any
    time: float
    order: float
    counted: bool
    """Whether the time is counted because the packet has no credible one."""
    after_gap: bool = False
    """Whether packets before it were left out."""


class _Track:
    """A track of an open container: its packets that wait to be decoded, and its clock."""

    def __init__(self, stream, wanted: bool):
        self.stream, self.wanted = stream, wanted
        self.is_sound = stream.type == "audio"
        self.tick = float(stream.time_base)
        self.queue: deque[_Packet] = deque()
        self.bytes = 0
        self.first: _Packet | None = None  # of the file: it may say what no later one repeats
        self.seen = 0
        self.offset = 0.0  # seconds that its stamps are off since the clock broke
        self.former: float | None = None  # … and were before
        self.since = 0.0  # time that a jump aimed at
        self.entry = -math.inf  # … and that of the first packet after it
        self.damaged = False
        self.stamp: int | None = None
        self.order = -math.inf  # decoding time of the last packet
        self.next = -math.inf  # … and of the one expected after it
        self.step = math.inf  # seconds between the last two
        self.before_leap: float | None = None  # its decoding time before the clock leapt ahead
        self.landed = math.inf  # … and after, until it is clear whether that was damage
        self.pending: tuple[Any, float] | None = None  # a packet at which the clock seems to begin anew, and its time
        self.latest = self.end = -math.inf  # display time of the latest packet, and when it ends
        self.reached = -math.inf  # what is certain of the end: a picture may claim any length
        self.gap = False

    def length(self, data) -> float:
        return float((data.duration or 0) * self.tick)

    def stamp_of(self, data) -> int | None:
        """The time stamp that goes up from packet to packet: pictures are coded in another order than displayed."""
        first, second = (data.pts, data.dts) if self.is_sound else (data.dts, data.pts)
        return second if first is None else first

    def put(self, packet: _Packet):
        packet.after_gap, self.gap = self.gap, False
        self.queue.append(packet)
        self.bytes += packet.data.size

    def take(self) -> _Packet:
        packet = self.queue.popleft()
        self.bytes -= packet.data.size
        return packet

    def pull_back(self, time: float):
        """Move what waits behind a leap ahead to where it ends at `time`, as the clock is back there."""
        shift, most = time - self.next, self.before_leap - self.landed
        if shift < most - _LEAP:
            return  # This is where nothing leapt from: it is wrong itself.
        shift = max(shift, most)
        for packet in self.queue:
            # Of a picture, the decoding time alone may have been wrong.
            if packet.order >= self.landed and packet.time >= self.landed:
                packet.time += shift
                self.shift(packet.data, shift)
            if packet.order >= self.landed:
                packet.order += shift
        self.landed, self.latest, self.end, self.reached = math.inf, time, time, time

    def shift(self, data, seconds: float):
        ticks = round(seconds / self.tick)
        data.pts, data.dts = (None if value is None else value + ticks for value in (data.pts, data.dts))

    def drop(self, count: int):
        for _ in range(count):
            self.take()
        if count:
            if self.queue:
                self.queue[0].after_gap = True
            else:
                self.gap = True


class _Demuxer:
    """The packets of a file in their order, from the beginning or, where the container can be trusted, from `start`."""

    def __init__(
        self,
        file: MediaFile,
        start: float,
        problems: _Problems,
        budget: _Budget,
        audio: bool,
        video: bool,
        audio_track: int | None,
    ):
        self.file, self.note, self.budget = file, problems.note, budget
        self.wanted = {"audio": audio, "video": video, "audio_track": audio_track}
        self.needed = start
        self.skipping = True  # whether pictures before a key frame that is on display by then are left out
        self._open()
        self.entered = False
        self.entered = start > 0 and self.seekable and self._enter(start)

    def _open(self):
        self.container = av.open(
            _Cursor(self.file, self.budget),
            metadata_errors="replace",
            # The second for what FFmpeg decodes while it opens a file, such as cover art.
            options={"format_whitelist": _FORMATS, "max_pixels": str(_MAX_PIXELS)},
        )
        container, label = self.container, self.file.label
        name = container.format.name
        cover = av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails
        audio = self._choose_sound(container.streams, self.wanted["audio_track"])
        video = next((s for s in container.streams.video if not s.disposition & cover), None)
        if audio is None and video is None:
            raise MediaError(f"{label}: has no readable sound or picture; check that it is a complete media file")
        if video is not None and video.codec_context is not None:
            video.codec_context.options = {"max_pixels": str(_MAX_PIXELS)}
        self.sound = None if audio is None else _Track(audio, self.wanted["audio"])
        self.picture = None if video is None else _Track(video, self.wanted["video"])
        self.tracks = {track.stream.index: track for track in (self.sound, self.picture) if track is not None}
        start_time = (container.start_time or 0) * 1e-6
        # Just below 0 lies what a sound codec needs to get going; further below, a clock that wraps within the file.
        self.origin = 0.0 if -1.0 < start_time < 0 else start_time
        self.is_picture_format = name.endswith("_pipe")
        self.seekable = name.startswith(_SEEKABLE)
        self.restarts = bool(container.format.flags & av.format.Flags.ts_discont.value)  # its clock may begin anew
        # AVI stores no display times, and FFmpeg's guesses are wrong for pictures that are not coded in order.
        self.decoding_times = name == "avi"
        self.announced = self._announced(name)
        self.file.seek(0, os.SEEK_END)
        self.longest = 1.0 + self.file.tell() / _MIN_BYTES_A_SECOND
        self.offset = 0.0  # of the clock that broke last
        self.ended = False
        self.packets = container.demux([track.stream for track in self.tracks.values()])

    def _choose_sound(self, streams, number: int | None):
        if number is None:
            return streams.best("audio")
        if number >= len(streams.audio):
            raise MediaError(
                f"{self.file.label}: has {len(streams.audio)} sound tracks, counted from 0, and no number {number}; "
                "choose another `audio_track`"
            )
        return streams.audio[number]

    def _announced(self, name: str) -> float:
        """Seconds that the file claims to last; infinity where it does not say."""
        duration = self.container.duration
        if duration is None or self.restarts or name in _ESTIMATED and not _has_length_header(self.file):
            return math.inf
        # Matroska counts from 0, the others from their first time stamp.
        return duration * 1e-6 - (self.origin if name.startswith("matroska") else 0.0)

    def close(self):
        self.container.close()
        for track in self.tracks.values():
            track.queue.clear()
            track.stream = track.first = None
        self.packets = iter(())

    @property
    def end(self) -> float:
        return max(track.end if self.ended else track.reached for track in self.tracks.values())

    def is_still(self) -> bool:
        """Whether the file is one picture."""
        if self.is_picture_format:
            return True
        if self.sound is not None or self.entered:
            return False
        while self.picture.seen < 2 and self.read():
            pass
        return self.picture.seen == 1

    def leave_out(self, track: _Track):
        """Keep none of the packets of a track, of which only the times are needed."""
        track.wanted = False
        track.drop(len(track.queue))

    def _enter(self, start: float) -> bool:
        """Jump to where `start` can be read from; where that cannot be, the container is at its beginning."""
        tracks = self.tracks.values()
        for _ in range(100):
            if not self.read() or all(track.first for track in tracks):
                break
        # A still has no other place.
        entered = all(track.first for track in tracks) and not self.is_still() and self._jump(start)
        if not entered:
            self.container.close()
            self._open()
        return entered

    def _jump(self, start: float) -> bool:
        """Read on from before `start`; whether that is where the first packets of all tracks lie."""
        tracks = self.tracks.values()
        try:
            self.container.seek(round((start - _REACH + self.origin) * 1e6))
        except (av.FFmpegError, OverflowError):
            return False
        for track in tracks:
            first = track.first
            track.__init__(track.stream, track.wanted)
            track.first, track.gap, track.entry, track.since = first, True, math.inf, start - _REACH
        self.packets = self.container.demux([track.stream for track in tracks])
        while any(track.entry == math.inf for track in tracks) and self.read():
            if max(track.order for track in tracks) > start + _INTERLEAVE:
                return False
        latest = {True: start - _PREROLL, False: start}
        return all(track.entry <= latest[track.is_sound] + _CLOCK for track in tracks)

    def read(self) -> bool:
        """Put the next packet behind the others of its track; `False` at the end of the file."""
        self.budget.check()
        if self.ended:
            return False
        try:
            packet = next(self.packets, None)
        except IndexError:  # a packet of a stream that PyAV does not know, as it came up after opening
            self.note("a track that begins within the file is left out")
            self.packets = self.container.demux([track.stream for track in self.tracks.values()])
            return True
        except av.FFmpegError:
            self.note("data damaged up to the end")
            packet = None
        if packet is None:
            self.ended = True
            for track in self.tracks.values():
                if track.pending is not None:
                    self._put(track.pending[0], track, None)
                    track.pending = None
            return False
        # An empty one without a time ends the stream of packets.
        if packet.size or packet.dts is not None or packet.pts is not None:
            self._file(packet, self.tracks[packet.stream.index])
        return True

    def _file(self, data, track: _Track):
        """Put a packet behind the others of its track, if it is needed."""
        stamp = track.stamp_of(data)
        order = None if stamp is None else stamp * track.tick - self.origin + track.offset
        pending, track.pending = track.pending, None
        if order is not None and track.former is not None:
            former = order - track.offset + track.former
            # Else the clock has begun anew for good.
            if abs(former - track.next) < min(order - track.next, _BACKWARD):
                self.note("some time stamps damaged")
                track.offset = self.offset = track.former
                track.former, order = None, former
        if order is not None and self._breaks(track, order):
            if pending is None or not 0 <= order - pending[1] <= _BACKWARD:
                # One packet is not enough for a clock; the next ones decide.
                track.pending = data, order
                if pending is not None:
                    self._put(pending[0], track, None)
                return
            self._begin_anew(track, pending[1])
            self._put(pending[0], track, track.stamp_of(pending[0]))
        elif pending is not None:
            self.note("some time stamps damaged")
            self._put(pending[0], track, None)
        self._put(data, track, stamp)

    def _put(self, data, track: _Track, stamp: int | None):
        packet = self._place(data, track, stamp)
        if packet is None:
            return
        is_key = track.is_sound or data.is_keyframe
        if track.entry == math.inf:
            if not is_key:
                return
            track.entry = packet.time
        track.seen += 1
        if track.first is None:
            track.first = packet
        if not track.wanted or not data.size:
            return
        if track.is_sound:
            if packet.time + track.length(data) > self.needed - _PREROLL:
                track.put(packet)
            return
        track.put(packet)
        if is_key and self.skipping:
            self.skip()

    def skip(self):
        """Leave out the pictures before the last key frame that is on display at the time that is needed."""
        queue = self.picture.queue
        for number in range(len(queue) - 1, 0, -1):
            if queue[number].data.is_keyframe and queue[number].time <= self.needed + _CLOCK:
                return self.picture.drop(number)

    def _place(self, data, track: _Track, stamp: int | None) -> _Packet | None:
        """A packet on the time line of the file; `None` for one whose time stamps are damaged."""
        length = track.length(data)
        # The length that a picture claims may be damaged.
        due = track.next if track.is_sound else min(track.next, track.order + track.step)
        if due == -math.inf:
            due = 0.0 if track.entry == -math.inf else self.needed
        counted = stamp is None or (track.is_sound and stamp == track.stamp)
        if counted:
            time = order = due
            data.pts = data.dts = None
        else:
            time = order = stamp * track.tick - self.origin + track.offset
            if data.pts is not None and not self.decoding_times:
                time += (data.pts - stamp) * track.tick
            if track.offset:
                track.shift(data, track.offset)
        if self._is_damaged(track, time, length):
            self.note("some time stamps damaged")
            time = next((moment for moment in (order, due) if not self._is_damaged(track, moment, length)), None)
            if track.is_sound or time is None:
                return None
            # The pictures after it may depend on it.
            order, data.pts, data.dts = time, None, None
        if order < track.order - _LEAP and track.landed < math.inf:
            self.note("some time stamps damaged")
            track.pull_back(order)
        if order > max(due, track.since) + _LEAP:
            track.before_leap = max(track.order, track.since)
            track.landed = order if track.is_sound or data.dts is not None else math.inf  # else it goes up and down
        elif order > track.landed + _RUN:
            track.landed = math.inf
        track.stamp = track.stamp if stamp is None else stamp
        if order > track.order > -math.inf:
            track.step = order - track.order
        track.order, track.next = order, order + length
        if not data.is_discard:
            length = length if length < _MAX_JUMP else 0.0
            if time >= track.latest:
                track.latest, track.end = time, time + length
            track.reached = max(track.reached, time + length if track.is_sound else time)
        return _Packet(data, time, order, counted)

    def _is_damaged(self, track: _Track, time: float, length: float) -> bool:
        if track.is_sound and length > _MAX_SOUND_PACKET:
            track.damaged = True
            return True
        if self.restarts:
            return False
        leap = time - max(track.end, track.since)
        damaged = leap > _MAX_JUMP or (leap > 1.0 and time > self.announced + 1.0) or time > self.longest
        track.damaged = track.damaged or damaged
        return damaged

    def _breaks(self, track: _Track, order: float) -> bool:
        """Whether the clock of a track seems to begin anew with a packet."""
        if track.order == -math.inf:
            return False
        if order < track.order - _BACKWARD:
            # Else it is back from a leap that was damage.
            return track.before_leap is None or order < track.before_leap - _BACKWARD
        pause = _LONE_PAUSE if self.sound is None else _PAUSE
        return self.restarts and order > max(other.next for other in self.tracks.values()) + pause

    def _begin_anew(self, track: _Track, order: float):
        """Let a track count on from a packet at which its clock has begun anew."""
        raw, track.former = order - track.offset, track.offset
        # The other track may have begun anew before: its clock is the same.
        if not -_BACKWARD <= raw + self.offset - track.next <= _PAUSE:
            self.offset = max(other.next for other in self.tracks.values()) - raw
        track.offset = round(self.offset / track.tick) * track.tick
        track.before_leap, track.landed = None, math.inf

    def settle(self, track: _Track):
        """Read on, if the queue of a track begins behind a leap of its clock, until it is clear whether that was damage."""
        limit = sum(other.bytes for other in self.tracks.values()) + _LAG_BYTES
        while track.queue[0].order >= track.landed and self.read():
            if sum(other.bytes for other in self.tracks.values()) > limit:
                break


class _CannotSkip(Exception):
    """Decoding that began at a key frame does not give what it should."""


@dataclass(slots=True, eq=False)
class _Picture:
    time: float
    frame: Any
    array: np.ndarray | None = None
    size: tuple[int, int] | None = None
    """The size of the array before it is rotated."""


class _Pictures:
    """The pictures of a file, decoded as they are asked for."""

    def __init__(self, source: _Demuxer, skip: float = _SKIP):
        self.source, self.track = source, source.picture
        codec = self.track.stream.codec_context
        if source.decoding_times:
            skip = math.inf  # the times of pictures follow from their number
        elif codec is not None and codec.codec.intra_only:
            skip = min(skip, 0.0)
        self.skip = skip
        source.skipping = skip < math.inf
        self.shown: _Picture | None = None
        self.ahead: _Picture | None = None
        self.decoded: deque[_Picture] = deque()
        self.position = -math.inf  # time of the last picture that was decoded
        self.waiting: list[float] = []  # times that no picture has taken yet, where they go by number
        self.last = 0.0
        self.primed = self.drained = self.unproven = self.damaged = False
        self.rotation: int | None = None  # quarters of a turn

    def at(self, time: float) -> _Picture | None:
        """The picture on display at `time`, which is not before the one that was asked for last."""
        self.source.needed = time
        if self.ahead is None:
            self.ahead = self._next()
        while self.ahead is not None and (
            self.shown is None or self.ahead.time <= time + _CLOCK or self._is_late(time)
        ):
            self.shown, self.ahead = self.ahead, self._next()
        return self.shown

    def _is_late(self, time: float) -> bool:
        """Whether the next picture only seems to be on display later than `time`, as one behind it is not.

        Its time stamp is damaged then, and the one behind it becomes the next.
        """
        count = _LOOK_AHEAD if self.ahead.time > self.shown.time + _BACKWARD else 1
        count = _MAX_REORDER if self.damaged else count
        self._fill(count)
        for number in range(min(count, len(self.decoded))):
            if self.decoded[number].time <= time + _CLOCK:
                self.source.note("some time stamps damaged")
                for _ in range(number + 1):
                    self.ahead = self.decoded.popleft()
                return True
        return False

    def _next(self) -> _Picture | None:
        self._fill(1)
        if not self.decoded:
            return None
        picture = self.decoded.popleft()
        if self.unproven:
            self.unproven = False
            if not picture.frame.key_frame or picture.time > self.source.needed + _CLOCK:
                raise _CannotSkip
        self.position = max(self.position, picture.time)
        return picture

    def _fill(self, count: int):
        """Decode until there are so many pictures, as far as there are."""
        while len(self.decoded) < count and not self.drained:
            self.source.skipping = not self.decoded and self.source.needed - self.position > self.skip
            if self.source.skipping:
                self.source.skip()
                self._read_up_to(self.source.needed)
            packet = self._take()
            if packet is None and not self.source.ended:
                return
            self._decode(packet)

    def _read_up_to(self, time: float):
        """Read on until the last key frame before `time` is there."""
        while (not self.track.queue or self.track.queue[-1].order <= time) and self.source.read():
            pass

    def _take(self) -> _Packet | None:
        """The next packet; `None` at the end, or where the picture lags too far behind the sound."""
        since = None
        while not self.track.queue:
            others = self.source.sound
            if self.shown is not None and others is not None and others.order > self.source.needed + _INTERLEAVE:
                since = others.bytes if since is None else since
                if others.bytes - since > _LAG_BYTES:
                    return None
            if not self.source.read():
                return None
        self.source.settle(self.track)
        return self.track.take()

    def _decode(self, packet: _Packet | None):
        codec = self.track.stream.codec_context
        if codec is None:
            self.drained = packet is None
            return
        if not self.primed:
            self.primed = True
            if packet is not None and packet.data is not self.track.first.data:
                self._feed(self.track.first.data)
                codec.flush_buffers()
                self.unproven = True
        if packet is not None and packet.after_gap and self.position > -math.inf:
            codec.flush_buffers()
            self.unproven = True
        if packet is None:
            self.drained = True
        elif self.source.decoding_times:
            insort(self.waiting, packet.time)
        frames = self._feed(None if packet is None else packet.data)
        if frames is None:
            if packet is not None and packet.time in self.waiting:
                self.waiting.remove(packet.time)
            return
        for frame in frames:
            before = self.last
            if self.source.decoding_times:
                # Pictures come out in display order: each takes the earliest time that is not taken yet.
                self.last = self.waiting.pop(0) if self.waiting else self.last
            elif frame.pts is not None:
                self.last = frame.pts * self.track.tick - self.source.origin
            elif packet is not None:
                self.last = packet.order
            self.damaged = self.damaged or self.last < before
            self.decoded.append(_Picture(self.last, frame))

    def _feed(self, data) -> list | None:
        """The frames that come out for a packet, `None` if it is damaged."""
        self.source.budget.check()
        try:
            return self.track.stream.codec_context.decode(data)
        except EOFError:
            return []
        except av.FFmpegError:
            self.damaged = True
            self.source.note("some pictures damaged")
            return None

    def to_array(self, picture: _Picture, size: tuple[int, int], count: int) -> np.ndarray:
        """The picture (height, width, 3) in a size, or so much smaller that `count` fit."""
        fraction = min(1.0, math.sqrt(_MAX_FRAME_BYTES / (3 * size[0] * size[1] * count)))
        width, height = (max(1, int(side * fraction)) for side in size)
        if picture.array is None or picture.size != (width, height):
            frame = picture.frame
            how = {} if (width, height) == (frame.width, frame.height) else {"interpolation": "AREA"}
            array = frame.to_ndarray(format="rgb24", width=width, height=height, **how)
            # As the first one is turned, or they could not be stacked.
            self.rotation = round(frame.rotation / 90) % 4 if self.rotation is None else self.rotation
            picture.array = np.ascontiguousarray(np.rot90(array, self.rotation))
            picture.size = width, height
            if frame.is_corrupt:
                self.source.note("some pictures damaged")
        return picture.array


class _Sound:
    """The sound of a file, decoded as far as it is asked for."""

    def __init__(self, source: _Demuxer, sampling_rate: int, channels: str):
        self.source, self.track = source, source.sound
        self.waveform = _Waveform(sampling_rate, channels, source)
        self.primed = self.drained = self.undecodable = False

    def hear(self, stop: float):
        """Decode up to `stop`, as far as there is sound."""
        while not self.drained and self.waveform.due < stop + _MAX_JITTER:
            if not self._wait(stop):
                if not self.source.ended:
                    return
                self.drained = True
                self._decode(None)
                return
            self.source.settle(self.track)
            if self.track.queue[0].time > stop + _PREROLL:
                return
            self._decode(self.track.take())
            if self.waveform.bytes > _MAX_SOUND_BYTES:
                raise MediaError(
                    f"{self.source.file.label}: lasts more than {self.waveform.due:,.0f} s, which is too much sound for "
                    "one window; give a `duration`"
                )

    def _wait(self, stop: float) -> bool:
        """Read until a packet waits; `False` at the end, or where the sound lags too far behind the picture."""
        since = None
        while not self.track.queue:
            others = self.source.picture
            if others is not None and others.order > stop + _INTERLEAVE:
                since = others.bytes if since is None else since
                if others.bytes - since > _LAG_BYTES:
                    return False
            if not self.source.read():
                return False
        return True

    def _decode(self, packet: _Packet | None):
        codec = self.track.stream.codec_context
        if codec is None:
            self.undecodable = True
            return
        if not self.primed:
            self.primed = True
            if packet is not None and packet.data is not self.track.first.data:
                self._feed(self.track.first.data)
                codec.flush_buffers()
        for frame in self._feed(None if packet is None else packet.data):
            if frame.pts is not None:
                time = frame.pts * self.track.tick - self.source.origin
            else:
                # Further on, if packets before it could not be decoded.
                time = max(self.waveform.due, 0.0 if packet is None else packet.time)
            self.waveform.add(frame, time)

    def _feed(self, data) -> list:
        self.source.budget.check()
        try:
            frames = self.track.stream.codec_context.decode(data)
            if all(frame.sample_rate <= _MAX_RATE for frame in frames):
                return frames
        except EOFError:
            return []
        except av.FFmpegError:
            pass
        self.waveform.flush()  # what follows has a place of its own
        self.undecodable = True
        self.source.note("some sound damaged")
        return []

    def cut(self, start: float, end: float) -> np.ndarray | None:
        """The sound from `start` to `end`, or to its end, with silence in gaps; `None` if nothing can be decoded."""
        if self.drained:
            self.waveform.flush()
        if (self.undecodable or self.track.damaged) and not self.waveform.has_sound:
            return None
        return self.waveform.cut(start, end)


class _Waveform:
    """Decoded sound in pieces, each continuous and placed by time stamp."""

    def __init__(self, sampling_rate: int, channels: str, source: _Demuxer):
        self.sampling_rate, self.channels, self.source = sampling_rate, channels, source
        # Of each piece: where it starts, and the chunks, each with the number of samples before it in the piece.
        self.chunks: list[tuple[float, int, _Chunk]] = []
        self.resampler = self.layout = None
        self.due, self.start, self.count = -math.inf, 0.0, 0
        self.has_sound = False
        self.bytes = 0
        self.loudest = 0

    def add(self, frame, time: float):
        length = frame.samples / frame.sample_rate
        layout = (frame.format.name, frame.layout.name, frame.sample_rate)
        if layout != self.layout or abs(time - self.due) > _MAX_JITTER:
            self.flush()
            # Not the planar "fltp": PyAV reads beyond the planes of a frame with more than eight channels.
            self.resampler = av.AudioResampler(format="flt", rate=self.sampling_rate)
            self.layout, self.due, self.start, self.count = layout, time, time, 0
        self.due += length
        self._keep(self.resampler.resample(frame))

    def flush(self):
        if self.resampler is not None:
            self._keep(self.resampler.resample(None))
            self.resampler = self.layout = None

    def _keep(self, frames: list):
        for frame in frames:
            if frame is None or not frame.samples:
                continue
            samples = frame.to_ndarray().reshape(frame.samples, -1).T
            largest = np.abs(samples).max()
            if not largest <= MAX_SAMPLE:
                raise MediaError(
                    f"{self.source.file.label}: its sound holds a sample of {largest:g} at about {self.due:.1f} s, where "
                    "samples lie within ±1; scale it, or get it again"
                )
            chunk = _Chunk(samples, self.channels, self.loudest)
            self.loudest = chunk.loudest
            self.chunks.append((self.start, self.count, chunk))
            self.count += len(chunk)
            self.bytes += chunk.bytes
            self.has_sound = True

    def cut(self, start: float, end: float) -> np.ndarray:
        """The sound from `start` to `end`, after which what lies before `end` is forgotten."""
        total = round((end - start) * self.sampling_rate)
        places = [round((piece - start) * self.sampling_rate) + count for piece, count, _ in self.chunks]
        inside = [
            chunk for place, (_, _, chunk) in zip(places, self.chunks) if place < total and place + len(chunk) > 0
        ]
        cancels = _cancel(sum(c.mixed for c in inside), sum(c.unmixed for c in inside))
        if cancels:
            self.source.note("the channels of its sound cancel each other, the loudest is used")
        waveform, last = np.zeros(total, dtype=np.float32), 0
        # Where the clock runs back, what comes later stays: the clock was ahead by mistake until then.
        for place, (_, _, chunk) in zip(places, self.chunks):
            part = chunk.samples(cancels)[max(0, -place) : max(0, total - place)]
            if len(part):
                at = max(0, place)
                waveform[at : at + len(part)] = part
                last = max(last, at + len(part))
        self.chunks = [piece for place, piece in zip(places, self.chunks) if place + len(piece[2]) > total]
        self.bytes = sum(chunk.bytes for _, _, chunk in self.chunks)
        return waveform[:last] if last else waveform


class _Chunk:
    """A little of the sound as one channel, and the loudest one beside it where the channels cancel each other."""

    def __init__(self, samples: np.ndarray, channels: str, loudest: int):
        self.loudest = loudest
        self.mixed = self.unmixed = 0.0
        self.other = None
        if channels == "first" or len(samples) == 1:
            self.one = samples[0].copy()
        else:
            self.one = samples.mean(axis=0)
            energies = np.square(samples, dtype=np.float64).sum(axis=1)
            self.mixed = float(np.square(self.one, dtype=np.float64).sum())
            self.unmixed = float(energies.sum()) / len(samples) ** 2
            if _cancel(self.mixed, self.unmixed):
                # Two channels that cancel are as loud as each other: no change from one to the other and back.
                if loudest >= len(energies) or energies.max() > 4 * energies[loudest]:
                    self.loudest = int(energies.argmax())
                self.other = samples[self.loudest].copy()

    def __len__(self) -> int:
        return len(self.one)

    @property
    def bytes(self) -> int:
        return self.one.nbytes + (0 if self.other is None else self.other.nbytes)

    def samples(self, cancels: bool) -> np.ndarray:
        return self.other if cancels and self.other is not None else self.one


def _cancel(mixed: float, unmixed: float) -> bool:
    """Whether an average of channels has a hundredth of the energy that it would have of unrelated ones."""
    return mixed < 0.01 * unmixed


def mix_down(samples: Any, channels: str) -> Any:
    """One channel `(samples,)` of an array or tensor `(channels, samples)`, by the rule of [`load_media`]."""
    if channels == "first" or len(samples) == 1:
        return samples[0]
    mean = samples.mean(axis=0)
    energies = (samples**2).sum(axis=1)
    if _cancel(float((mean**2).sum()), float(energies.sum()) / len(samples) ** 2):
        return samples[int(energies.argmax())]
    return mean


def _breaks_off(file: MediaFile) -> bool:
    """Whether the outermost boxes of an mp4, AVI or WAV file promise more bytes than there are."""
    file.seek(0, os.SEEK_END)
    size = file.tell()
    file.seek(0)
    head = file.read(12)
    if head[:4] == b"RIFF":
        length = int.from_bytes(head[4:8], "little")
        return length < _PLACEHOLDER and length + 8 > size
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


def _check_chunks(file: BinaryIO, label: str):
    """Refuse a WAV file in which a chunk before the sound is longer than the file: FFmpeg would take memory for it."""
    size = file.seek(0, os.SEEK_END)
    position = 12
    while position + 8 <= size:
        file.seek(position)
        name, length = file.read(4), int.from_bytes(file.read(4), "little")
        if name == b"data":
            return
        position += 8 + length + length % 2
        if position > size + 1:
            raise MediaError(f"{label}: a chunk of its header has {length:,} bytes, the file {size:,}; get it again")


def _has_length_header(file: MediaFile) -> bool:
    """Whether the first frame of an MP3 file says how many there are."""
    file.seek(0)
    head = file.read(10)
    if head[:3] == b"ID3":
        file.seek(10 + sum((byte & 127) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0))))
        head = b""
    head += file.read(2048)
    return any(name in head for name in (b"Xing", b"Info", b"VBRI"))


def is_silent(samples: Any) -> bool:
    """Whether no sample of an array or tensor exceeds [`SILENCE`]."""
    return not bool((abs(samples) > SILENCE).any())


def frame_times(duration: float, num_frames: int, fps: float | None, frame_sampling: str) -> list[float]:
    """The centres of equal parts of `duration` seconds; see `load_media`."""
    count = num_frames if fps is None else max(1, round(duration * fps))
    part = duration / num_frames if fps is None else 1 / fps
    times = [(i + 0.5) * part for i in range(count)]
    if frame_sampling == "middle" and count > num_frames:
        first = (count - num_frames) // 2
        times = times[first : first + num_frames]
    return times


def check_options(*options: tuple[str, Any, bool, str]):
    """Raise a `ValueError` for the first of `(name, value, whether it is right, what it must be)` that is wrong."""
    for name, value, ok, expected in options:
        if not ok:
            raise ValueError(f"`{name}` is {value!r}; it must be {expected}")


def check_sampling(num_frames: int, fps: float | None, frame_sampling: str):
    """Raise a `ValueError` for options by which no frames can be chosen; see [`load_media`]."""
    check_options(
        ("num_frames", num_frames, num_frames > 0, "above 0"),
        ("fps", fps, fps is None or 0 < fps < math.inf, "above 0 or None"),
        ("frame_sampling", frame_sampling, frame_sampling in FRAME_SAMPLING, " or ".join(map(repr, FRAME_SAMPLING))),
    )
    if frame_sampling == "middle" and fps is None:
        raise ValueError("`frame_sampling='middle'` needs `fps`: frames are taken 1 / `fps` seconds apart")


def _label(source) -> str:
    if isinstance(source, (str, os.PathLike)):
        name = os.fspath(source)
        # A `data:` address holds the whole file.
        return name if len(name) <= _LONGEST_NAME else f"{name[:64]}… ({len(name)} characters)"
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"<{len(source)} bytes>"
    name = getattr(source, "name", None)
    return name if isinstance(name, str) else f"<{type(source).__name__}>"


def _can_seek(file: BinaryIO) -> bool:
    return hasattr(file, "seek") and (not hasattr(file, "seekable") or file.seekable())


def is_url(source: Any) -> bool:
    """Whether a string is read as an address (`http:`, `https:`, `file:`, and those that are refused), not as a path."""
    return isinstance(source, str) and _scheme(source) is not None


def _scheme(source: str | os.PathLike) -> str | None:
    """The scheme of a URL in lower case; `None` for a path."""
    match = (
        re.match(r"(file|data):|([a-z][a-z0-9+.-]+)://", source, re.IGNORECASE) if isinstance(source, str) else None
    )
    return match and (match[1] or match[2]).lower()


def _open_path(source: str | os.PathLike) -> BinaryIO:
    path, scheme, label = source, _scheme(source), _label(source)
    if scheme == "file":
        path = urllib.request.url2pathname(urllib.parse.urlsplit(source).path)
    elif scheme is not None:
        raise MediaError(f"{label}: {scheme} addresses are not supported; open it and pass the bytes or file object")
    if os.path.isdir(path):
        raise MediaError(f"{label}: is a directory; pass one of its files")
    try:
        return open(path, "rb")
    except FileNotFoundError as error:
        raise MediaNotFoundError(f"{label}: there is no such file; check the path") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise MediaError(f"{label}: cannot be opened ({reason})") from error


def _read_stream(stream: BinaryIO, label: str) -> BinaryIO:
    """What cannot be read twice, in memory."""
    data = io.BytesIO()
    # Not at once: Python takes the memory for all that it is asked to read, which is beyond the budget of a process.
    while piece := stream.read(2**20):
        data.write(piece)
        if data.tell() > DOWNLOAD_BYTES:
            raise MediaError(f"{label}: holds more than {DOWNLOAD_BYTES:,} bytes; store it in a file first")
    data.seek(0)
    return data


def _download(url: str, file: BinaryIO):
    label, problems = _label(url), []

    def fetch():
        try:
            problems.append(_fetch(url, file))
        except (OSError, ValueError, http.client.HTTPException, zlib.error) as error:
            problems.append(f"cannot be downloaded ({' '.join(str(error).split())}); check the address, or try again")

    # In a thread, as a server that sends a byte now and then can hold up any single call.
    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(DOWNLOAD_SECONDS)
    problem = problems[0] if problems else f"takes more than {DOWNLOAD_SECONDS:g} s to download; download it yourself"
    if problem is not None:
        raise MediaError(f"{label}: {problem}")


def _fetch(url: str, file: BinaryIO) -> str | None:
    """Write what is at an address to a file; what is wrong with it, if anything is."""
    # Those of `http` and `https` alone: the default ones let a server redirect to `ftp`.
    opener = urllib.request.OpenerDirector()
    for handler in ("Proxy", "HTTP", "HTTPS", "HTTPDefaultError", "HTTPRedirect", "Unknown"):
        opener.add_handler(getattr(urllib.request, f"{handler}Handler")())
    opener.add_handler(urllib.request.HTTPErrorProcessor())
    request = urllib.request.Request(_quoted(url), headers={"User-Agent": _AGENT, "Accept-Encoding": "identity"})
    received, limit = 0, time.monotonic() + DOWNLOAD_SECONDS
    with opener.open(request, timeout=10) as response:
        expected = response.headers.get("Content-Length")
        coding = response.headers.get("Content-Encoding", "identity").lower()
        if coding not in ("identity", "gzip", "x-gzip", "deflate"):
            return f"comes in the coding {coding!r}, which cannot be read; download it yourself"
        unpack = None if coding == "identity" else zlib.decompressobj(wbits=47)
        while data := response.read1(2**16):
            received += len(data)
            file.write(data if unpack is None else unpack.decompress(data))
            if file.tell() > DOWNLOAD_BYTES:
                return f"has more than {DOWNLOAD_BYTES:,} bytes; download it yourself"
            if time.monotonic() > limit:
                return None  # nobody waits for it any more
    if received < int(expected or 0):
        return f"the download broke off after {received} of {expected} bytes; try again"
    return None


def _quoted(url: str) -> str:
    """An address with escapes for blanks and letters beyond ASCII, in the way of browsers."""
    parts = urllib.parse.urlsplit(url)
    host = parts.netloc
    if not host.isascii():
        host = host.encode("idna").decode()
    path, query = (urllib.parse.quote(part, safe="%/:?#[]@!$&'()*+,;=~") for part in (parts.path, parts.query))
    return urllib.parse.urlunsplit((parts.scheme, host, path, query, ""))

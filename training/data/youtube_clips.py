"""The downloaded files of clips from YouTube."""

import glob
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any


CLIP_SECONDS = 10.0
YOUTUBE_ID_LENGTH = 11
# In the order of preference.
EXTENSIONS = {
    "video": (".mp4", ".mkv", ".webm", ".mov", ".m4v", ".avi", ".flv", ".wmv", ".mpg", ".mpeg", ".ts", ".3gp"),
    "audio": (".wav", ".flac", ".m4a", ".aac", ".opus", ".ogg", ".mp3"),
    "frames": (".jpg", ".jpeg", ".png", ".webp", ".bmp"),
}
_KINDS = {extension: (kind, rank) for kind, names in EXTENSIONS.items() for rank, extension in enumerate(names)}
_TITLE = re.compile(
    rf".*(?:\[(?P<bracketed>.{{{YOUTUBE_ID_LENGTH}}})\]|-(?P<dashed>.{{{YOUTUBE_ID_LENGTH}}}))", re.DOTALL
)
_TIMES = re.compile(r"(?:_(\d+(?:\.\d+)?))?(?:_(\d+(?:\.\d+)?))?")

Key = tuple[str, float | None]
"""YouTube id and start of the clip: the number in the name of the file, in seconds or milliseconds, or `None`."""


@dataclass(frozen=True)
class YouTubeClips:
    """The files that [`find_clips`] found, by kind, and by the clip that their name stands for."""

    files: dict[str, dict[Key, str]]

    def sources(self, name: str, start: float, numbers: Collection[str] = ()) -> dict[str, Any]:
        """The files of a clip, as the arguments of [`Entry`]; none if there are none.

        Args:
            name (`str`): The YouTube id.
            start (`float`): Start of the clip in the video, in seconds.
            numbers (`Collection[str]`, *optional*): The numbers of the clip in the data set.
        """
        keys = [(name, start), (name, start * 1000), (name, None), *((number, None) for number in numbers)]
        found = {kind: next((key for key in keys if key in paths), None) for kind, paths in self.files.items()}
        sources: dict[str, Any] = {kind: self.files[kind][key] for kind, key in found.items() if key}
        if "video" in sources:
            sources.pop("frames", None)
            if "audio" not in sources:
                sources = {"media": sources["video"]}
        return sources | {"start_in_whole": start if (name, None) in found.values() else None}


def find_clips(folder: str | os.PathLike, youtube_ids: set[str], numbers: Collection[str] = ()) -> YouTubeClips:
    """Finds the files of clips from YouTube, as AudioCaps, AudioSet and VGGSound have them.

    The folder is searched once, with all its subfolders. A file belongs to a clip if its name without the extension is

    * `ID_START_END` or `ID_START`, in seconds (`30`, `000030`, `30.000`) or milliseconds (`30000`), as in downloads of
      AudioSet and VGGSound;
    * `ID`, for a clip or for the whole video, which is read from the start time on if it is longer than a clip can be;
    * `TITLE [ID]` or `TITLE-ID`, for the whole video, as yt-dlp and youtube-dl name their files by default;
    * `ID`, `ID_START` or `ID_START_END` with a `Y` before it, as in the WAV files of AudioCaps;
    * the number of the clip in the data set.

    Pictures are the frames of a clip if their folder, the single picture, or the pictures in folders `frame_0`,
    `frame_1`, … have such a name (CAV-MAE, AVCap).

    If several files match, a name with the start time is preferred to one without, and both to a number; then the
    first extension in `EXTENSIONS`; then the path that sorts first. A video is preferred to frames, and a sound file to
    the sound track of a video. (ours) Links to folders are followed, each folder once under each name.

    Args:
        folder (`str` or `os.PathLike`): The folder of the clips.
        youtube_ids (`set[str]`): The videos that are wanted.
        numbers (`Collection[str]`, *optional*): The numbers of the clips in the data set.

    Raises:
        FileNotFoundError: If the folder does not exist.
        OSError: If a folder below it cannot be read.
    """
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder}: there is no such folder; give the one that holds the clips")
    best: dict[str, dict[Key, tuple[int, str]]] = {kind: {} for kind in EXTENSIONS}
    for parent, names in _walk(folder):
        above, own = os.path.split(parent)
        own_key = _key(own, youtube_ids, numbers)
        for name in names:
            stem, extension = os.path.splitext(name)
            kind, rank = _KINDS.get(extension.lower(), (None, 0))
            if kind is None:
                continue
            key, path = _key(stem, youtube_ids, numbers), os.path.join(parent, name)
            if kind == "frames" and re.fullmatch(r"frame_\d+", own):
                path = os.path.join(glob.escape(above), "frame_*", glob.escape(name))
            elif kind == "frames" and own_key:
                key, path, rank = own_key, parent, -1
            if key:
                best[kind][key] = min(best[kind].get(key, (rank, path)), (rank, path))
    return YouTubeClips({kind: {key: path for key, (_, path) in found.items()} for kind, found in best.items()})


def _walk(folder: str | os.PathLike) -> Iterator[tuple[str, list[str]]]:
    """A folder and all below it, each with the names in it; a link that leads back is followed once."""

    def stop(error: OSError):
        # What is left out in silence would be missing from what is prepared for good.
        raise error

    seen = set()
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=stop):
        kept = []
        for name in sorted(folders):
            state = os.stat(os.path.join(parent, name))
            # By its name as well, which can be that of the clip whose pictures it holds.
            place = state.st_dev, state.st_ino, name
            if place not in seen:
                seen.add(place)
                kept.append(name)
        folders[:] = kept
        yield parent, names


def _key(name: str, youtube_ids: set[str], numbers: Collection[str]) -> Key | None:
    """The clip that the name of a file or folder stands for; `None` if it is not one of the wanted clips."""
    if name in numbers:
        return name, None
    title = _TITLE.fullmatch(name)
    if title and (title["bracketed"] or title["dashed"]) in youtube_ids:
        return title["bracketed"] or title["dashed"], None
    for begin in (0, 1) if name.startswith("Y") else (0,):
        end = begin + YOUTUBE_ID_LENGTH
        times = _TIMES.fullmatch(name, end) if name[begin:end] in youtube_ids else None
        if times:
            start, stop = (None if time is None else float(time) for time in times.groups())
            # A clip is shorter than 100 s, so a longer range is in milliseconds.
            return name[begin:end], start / 1000 if stop is not None and stop - start > 100 else start
    return None

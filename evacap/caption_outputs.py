"""Where captions are written: what `--output` and `--format` ask for."""

import argparse
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .caption_files import FORMATS, SUBTITLES, check_cue_settings, format_of, write_captions
from .media_list import Media, StandardInput
from .training.data.tar_members import TarMember


@dataclass
class Outputs:
    """What is written.

    Args:
        journal (`Path`, *optional*): A file of JSON lines, written clip by clip.
        files (`list[Path]`): Other files of all clips, written at the end.
        folder (`Path`, *optional*): The folder that gets files for each clip.
        formats (`list[str]`): Their formats, or the one to print.
        subtitle_options (`dict`): The arguments of [`write_captions`] for subtitles.
    """

    journal: Path | None
    files: list[Path]
    folder: Path | None
    formats: list[str]
    subtitle_options: dict[str, Any]
    clip_files: dict[str, list[Path]] = field(default_factory=dict)

    @property
    def all_formats(self) -> set[str]:
        return {*self.formats, *map(format_of, self.files), *(["jsonl"] if self.journal else [])}

    def options(self, form: str) -> dict[str, Any]:
        """The arguments of [`write_captions`] that a format takes."""
        names = {"vtt": ("sdh", "cue_settings"), "srt": ("sdh",)}.get(form, ())
        return {name: self.subtitle_options[name] for name in names}

    def name_clips(self, media: list[Media], names: Iterable[str]) -> None:
        """Finds the files of each clip in the folder, which mirrors the folders that were named.

        Raises:
            ValueError: If two clips would have the same file, or if a file of subtitles is for several clips.
        """
        single = [path for path in self.files if format_of(path) in SUBTITLES]
        printed = [form for form in self.formats if self.folder is None and form in SUBTITLES]
        if len(media) > 1 and (single or printed):
            form = printed[0] if printed else format_of(single[0])
            raise ValueError(
                f"{single[0] if single else f'--format {form}'} is for one clip, but there are {len(media)}: give "
                f"--format {form} --output FOLDER, which gets a file for each"
            )
        if self.folder is None:
            return
        folders = [Path(name) for name in names if os.path.isdir(name)]
        places = [_place(file, folders) for file in media]
        stems = Counter(place.with_suffix("") for place in places)
        owners: dict[Path, Media] = {}
        for file, place in zip(media, places):
            stem = place.with_suffix("") if stems[place.with_suffix("")] == 1 else place
            paths = [self.folder / stem.with_name(f"{stem.name}.{form}") for form in self.formats]
            other = owners.setdefault(paths[0], file)
            if other is not file:
                raise ValueError(
                    f"{other} and {file} would both be written to {paths[0]}: name the folder that has them all, which is "
                    "mirrored"
                )
            self.clip_files[str(file)] = paths

    def write_clip(self, file: str, result: Mapping[str, Any]) -> None:
        """Writes the files of a clip into the folder; what has an error has none."""
        if "error" not in result:
            for path in self.clip_files.get(file, []):
                write_captions({"file": file, **result}, path, **self.options(format_of(path)))


def _place(file: Media, folders: list[Path]) -> Path:
    """Where a clip lies below the folder in which it was found; otherwise its name."""
    path = Path(str(file)) if isinstance(file, TarMember) else file
    for folder in folders:
        if isinstance(path, Path) and path.is_relative_to(folder):
            return path.relative_to(folder)
    if isinstance(file, TarMember):
        return Path(Path(file.archive).name, file.member)
    if isinstance(file, Path):
        return Path(file.name)
    name = "stdin" if isinstance(file, StandardInput) else Path(urlsplit(file).path).name
    return Path(re.sub(r"[^\w.-]", "_", name).strip(".") or "clip")


def plan_outputs(arguments: argparse.Namespace) -> Outputs:
    """Sorts what `--output` and `--format` ask for.

    Raises:
        ValueError: If they do not fit each other.
    """
    formats = list(dict.fromkeys(arguments.format))
    paths = list(dict.fromkeys(arguments.output))
    files = [path for path in paths if path.suffix.lower().removeprefix(".") in FORMATS and not path.is_dir()]
    folders = [path for path in paths if path not in files]
    for path in folders:
        if path.exists() and not path.is_dir() or not path.exists() and path.suffix:
            raise ValueError(
                f"{path}: is not a folder, and its suffix says no format; there are "
                f"{', '.join(f'.{name}' for name in FORMATS)}. --format without --output prints."
            )
        if not formats:
            raise ValueError(
                f"{path}: what to write for each clip into this folder? Give --format, such as --format srt"
            )
    for path in files:
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} is not a regular file. --format without --output prints the same.")
    journals = [path for path in files if format_of(path) == "jsonl"]
    if len(folders) > 1 or len(journals) > 1:
        raise ValueError(
            f"{(folders if len(folders) > 1 else journals)[1]}: one folder and one .jsonl file can be written"
        )
    unwritten = [form for form in formats if form not in map(format_of, files)]
    if files and not folders and unwritten:
        raise ValueError(f"--format {unwritten[0]}: where to? Give a file --output NAME.{unwritten[0]}, or a folder")
    if not files and not folders and len(formats) > 1:
        raise ValueError(f"--format {' --format '.join(formats)} are files for a folder: give --output FOLDER")
    outputs = Outputs(
        journals[0] if journals else None,
        [path for path in files if path not in journals],
        folders[0] if folders else None,
        formats if folders or not files else [],
        {"sdh": arguments.sdh, "cue_settings": arguments.cue_settings},
    )
    check_cue_settings(arguments.cue_settings)
    found = outputs.all_formats
    for option, given, needed in (
        ("--sdh", arguments.sdh, {"srt", "vtt"}),
        ("--cue-settings", arguments.cue_settings, {"vtt"}),
        ("--json", arguments.json and found, {"json", "jsonl"}),
    ):
        if given and not found & needed:
            raise ValueError(f"{option} is for {' and '.join(sorted(needed))}, which is not written here")
    if arguments.retry_failed and not outputs.journal:
        raise ValueError("--retry-failed needs --output FILE.jsonl: it says where the errors are")
    return outputs

"""What models of one stream say of media files, for a model that reads it beside sound and picture (`enrichment="case"`)."""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .training.files import JsonLines


STREAMS = ("audio", "video")

Captions = Mapping[str, Mapping[str, Any]]
"""By `"audio_caption"` and `"video_caption"`: what is said of each file, by its absolute path, as the pipeline takes it."""


def add_caption_arguments(parser: argparse.ArgumentParser) -> None:
    for stream in STREAMS:
        parser.add_argument(
            f"--{stream}-captions",
            type=Path,
            metavar="JSONL",
            help=f"for a model with enrichment='case': what `evacap caption --model {stream.upper()}_ONLY --output JSONL` has "
            "said of the same files",
        )


def read_captions(arguments: argparse.Namespace) -> Captions:
    """The captions that the options of [`add_caption_arguments`] name; empty without them.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If only one of the options is given, or if a file has other content.
    """
    captions = {}
    for stream in STREAMS:
        path = getattr(arguments, f"{stream}_captions", None)
        if path is not None:
            if not path.is_file():
                raise FileNotFoundError(f"{path}: there is no such file; check the path")
            lines = JsonLines(
                path, "file", _parse, "Give what `evacap caption --output NAME.jsonl` has written."
            ).read()
            captions[f"{stream}_caption"] = dict(lines)
    if len(captions) == 1:
        raise ValueError("--audio-captions and --video-captions belong together: give both")
    return captions


def _parse(result: dict[str, Any]) -> tuple[str, Any]:
    said = None if "error" in result else result["text"]
    return os.path.abspath(result["file"]), result.get("chunks", said)


def captions_of(captions: Captions, **sources: Any) -> dict[str, Any]:
    """What is said of one clip, as far as there is anything.

    Args:
        captions (`Captions`): Those of all files.
        sources: By `audio` and `video`, the file that the model of each stream has captioned.
    """
    paths = {f"{stream}_caption": os.path.abspath(str(source)) for stream, source in sources.items()}
    found = {name: captions[name].get(path) for name, path in paths.items()}
    return {name: said for name, said in found.items() if said is not None}


def require_captions(arguments: argparse.Namespace, model: str, reads_captions: bool) -> None:
    """Checks that there are captions for a model that reads them, and none for another one.

    Raises:
        ValueError: If not.
    """
    if reads_captions and not hasattr(arguments, "audio_captions"):
        raise ValueError(f"{model}: reads captions (enrichment='case'), which only `evacap caption` takes")
    given = getattr(arguments, "audio_captions", None) is not None
    if reads_captions != given:
        raise ValueError(
            f"{model}: reads what models of one stream say of the files (enrichment='case'): caption them with an audio-only "
            "and with a video-only model, each into a .jsonl file, and give these as --audio-captions and --video-captions"
            if reads_captions
            else f"{model}: reads no captions; leave out --audio-captions and --video-captions"
        )

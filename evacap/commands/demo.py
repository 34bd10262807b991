"""`evacap demo`: a page in the browser that captions clips, and swaps their sounds."""

import argparse

from ..cli import positive_int
from .caption import add_model_arguments, load_captioner


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, "model folder or Hub name (default: the bundled checkpoint, which is for trying)")
    parser.add_argument("--host", help="address to listen at; 0.0.0.0 for all (default: this machine alone)")
    parser.add_argument("--port", type=positive_int, help="(default: the first free one from 7860 on)")
    parser.add_argument("--share", action="store_true", help="also make a public link, through Gradio's servers")
    parser.add_argument("--max-megabytes", type=positive_int, help="size of an upload (default: 100)")
    parser.add_argument("--max-clip-seconds", type=positive_int, help="length of a clip (default: 120)")
    parser.add_argument(
        "--max-seconds", type=positive_int, help="time for reading a clip, and again for captioning it (default: 120)"
    )


def run(arguments: argparse.Namespace) -> None:
    from ..app import Limits, launch

    given = {
        "megabytes": arguments.max_megabytes,
        "clip_seconds": arguments.max_clip_seconds,
        "seconds": arguments.max_seconds,
    }
    limits = Limits(**{name: value for name, value in given.items() if value is not None})
    launch(
        load_captioner(arguments),
        limits,
        server_name=arguments.host,
        server_port=arguments.port,
        share=arguments.share,
        quiet=arguments.quiet,
    )

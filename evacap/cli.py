"""The command line `evacap COMMAND …`. The module of a command is imported only when it runs."""

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence

from . import __version__
from .training.terminal import PrintableRecord, explain


COMMANDS = {
    "caption": "caption media files",
    "check": "say whether the picture of media files belongs to their sound",
    "check-install": "see whether this machine captions as it should, and print the versions for a bug report",
    "sample": "write a procedural clip to try things on",
    "import-weights": "turn AVCap, CAV-MAE and GIT weights into a model folder",
    "prepare": "make the features of media files and captions, ready for training",
    "train": "train a captioner as a YAML file says",
    "evaluate": "score captioners on prepared clips, with own and with swapped pictures, or captions in files",
    "export": "write a model folder as ONNX graphs, or as programs of torch.export",
    "publish": "check a model folder, complete its card and upload it",
    "install-spice": "fetch the parser that the metric SPICE needs (385 MB)",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0, 1 after an explained error, 2 for wrong arguments."""
    argv = sys.argv[1:] if argv is None else list(argv)
    logging.setLogRecordFactory(PrintableRecord)
    for stream in (sys.stdout, sys.stderr):
        # The terminal may not have all letters of names and captions.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    parser = argparse.ArgumentParser(prog="evacap", description="Audio-visual captioning with EVACap.")
    parser.add_argument("--version", action="version", version=f"evacap {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    module = None
    for name, summary in COMMANDS.items():
        command_parser = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if argv[:1] == [name]:
            module = importlib.import_module(f"evacap.commands.{name.replace('-', '_')}")
            module.add_arguments(command_parser)
    arguments = parser.parse_args(argv)
    try:
        return module.run(arguments) or 0
    except (ValueError, OSError, RuntimeError, ImportError, MemoryError) as error:
        print(f"evacap {arguments.command}: {explain(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"evacap {arguments.command}: stopped", file=sys.stderr)
        return 130


def positive_int(text: str) -> int:
    """An argument that must be a whole number above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def whole_number(text: str) -> int:
    """An argument that must be a whole number, 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 0 or more")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())

"""The command line `evacap COMMAND …`. The module of a command is imported only when it runs."""

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import suppress

from . import __version__
from .training.terminal import PrintableRecord, explain


COMMANDS = {
    "caption": "caption media files",
    "check": "say whether the picture of a file belongs to its sound",
    "check-install": "see whether this machine captions correctly",
    "demo": "show a page in the browser that captions clips",
    "sample": "write a procedural clip to try things on",
    "import-weights": "turn AVCap, CAV-MAE and GIT weights into a model",
    "prepare": "make features for training from media files",
    "train": "train a captioner as a YAML file says",
    "evaluate": "score captioners, or captions in files",
    "export": "write a model as ONNX graphs or by torch.export",
    "publish": "check a model folder, and upload it with its card",
    "install-spice": "fetch the parser of the metric SPICE (385 MB)",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0, 1 after an explained error, 2 for wrong arguments."""
    argv = sys.argv[1:] if argv is None else list(argv)
    logging.setLogRecordFactory(PrintableRecord)
    for stream in (sys.stdout, sys.stderr):
        # The terminal may not have all letters of names and captions.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    parser = argparse.ArgumentParser(
        prog="evacap",
        usage="evacap [-h] [--version] COMMAND ...",
        description="Audio-visual captioning with EVACap. `evacap COMMAND --help` describes a command.",
        epilog="commands:\n" + "\n".join(f"  {name:<16}{summary}" for name, summary in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"evacap {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", help=argparse.SUPPRESS, prog="evacap")
    module = None
    # A shell that completes a line gives it in its environment.
    is_completion = "_ARGCOMPLETE" in os.environ
    words = os.environ["COMP_LINE"].split()[1:] if is_completion else argv
    for name, summary in COMMANDS.items():
        command_parser = commands.add_parser(name, description=summary[0].upper() + summary[1:] + ".")
        if words[:1] == [name]:
            module = importlib.import_module(f"evacap.commands.{name.replace('-', '_')}")
            module.add_arguments(command_parser)
    if is_completion:
        # An optional library, which ends the process here.
        with suppress(ImportError):
            import argcomplete

            argcomplete.autocomplete(parser)
    arguments = parser.parse_args(argv)
    if module is None:
        parser.print_help(sys.stderr)
        return 2
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


def positive(text: str) -> float:
    """An argument that must be a number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def whole_number(text: str) -> int:
    """An argument that must be a whole number, 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 0 or more")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())

"""Safe output on a terminal of names and messages with arbitrary content."""

import logging


def printable(text: object) -> str:
    """The text with escapes for everything that could move the cursor, change colours, or not be encoded."""
    return "".join(_escaped(character) for character in str(text))


def one_line(text: object) -> str:
    """As [`printable`], with spaces for line breaks, because some libraries wrap their messages."""
    return printable(" ".join(str(text).split()))


def explain(error: BaseException) -> str:
    """The message of an error on one line, or its type if it has no message."""
    if isinstance(error, MemoryError):
        return "out of memory. Close other programs, or give a smaller batch or fewer workers."
    if isinstance(error, OSError) and error.filename and error.strerror:
        # Python's own words begin with the number of the error.
        return one_line(f"{error.filename}: {error.strerror[0].lower()}{error.strerror[1:]}")
    return one_line(error) or type(error).__name__


class PrintableRecord(logging.LogRecord):
    """A log record that is [`printable`], for `logging.setLogRecordFactory`."""

    def getMessage(self) -> str:
        return "\n".join(map(printable, super().getMessage().split("\n")))


def _escaped(character: str) -> str:
    if character.isprintable():
        return character
    if "\udc80" <= character <= "\udcff":
        # A byte of a file name that is not UTF-8.
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")

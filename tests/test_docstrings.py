"""Docstrings have one form, as far as Ruff does not check it."""

import ast
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
FILES = [
    path
    for folder in ("benchmarks", "evacap", "examples", "modeling_evacap", "processing", "training")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


def docstrings(path: Path) -> list[str]:
    """All docstrings of a file, and the strings behind constants."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    values = [node.value for node in nodes if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)]
    return [value.value for value in values if isinstance(value.value, str)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_errors_are_documented_as_type_and_condition(path):
    for docstring in docstrings(path):
        section = re.search(r"^( *)Raises:\n((?:\1 +.*\n|\n)*)", f"{docstring}\n", re.MULTILINE)
        if section is None:
            continue
        margin, lines = section[1] + "    ", section[2].splitlines()
        entries = [line[len(margin) :] for line in lines if line.strip() and line[len(margin)] != " "]
        assert entries
        for entry in entries:
            assert re.match(r"\w+(, \w+)*: If ", entry), entry


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_docstring_begins_with_a_genitive(path):
    for docstring in docstrings(path):
        assert not re.match(r"\s*Of ", docstring), docstring

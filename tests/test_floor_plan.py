"""The packages import each other only downwards, as the floor plan in CONTRIBUTING.md says."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PACKAGES = ("evacap", "modeling_evacap", "processing", "training")
LICENCE = "# Copyright 2026 The EVACap authors.\n#\n# Licensed under the Apache License, Version 2.0"


def floor_plan() -> dict[str, int]:
    """The floor of each room, by its path."""
    rows = re.findall(
        r"^\| (\d) \| `([^`]+)` \|", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    return {room.rstrip("/"): int(floor) for floor, room in rows}


def room_of(path: Path, plan: dict[str, int]) -> str:
    """The innermost room that a file of the repository belongs to."""
    places = [path, *path.parents]
    return next(place.as_posix() for place in places if place.as_posix() in plan)


def source_files() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def imported_files(path: Path) -> Iterator[Path]:
    """The files of the repository that a file imports anywhere in it, relative to the root."""
    folder = path.relative_to(ROOT).parent
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom):
            module = [] if node.module is None else node.module.split(".")
            if node.level:
                # One dot is the package itself. The top-level folders are installed in the package `evacap`.
                package = folder.parts if folder.parts[0] == "evacap" else ("evacap", *folder.parts)
                module = [*package[: len(package) - node.level + 1], *module]
            names = [[*module, alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        for name in names:
            if name[0] == "evacap":
                inner = name[1:] if len(name) > 1 and name[1] in PACKAGES else name
                found = [Path(*inner[:end]) for end in range(len(inner), 0, -1)]
                candidates = [file for place in found for file in (place.with_suffix(".py"), place / "__init__.py")]
                yield next(file for file in candidates if (ROOT / file).is_file())


def test_every_room_of_the_plan_exists_and_every_file_has_one():
    plan = floor_plan()
    assert len(plan) >= 10
    assert all((ROOT / room).exists() for room in plan)
    for path in source_files():
        assert room_of(path.relative_to(ROOT), plan)


def test_no_import_goes_upwards_or_between_rooms_of_one_floor():
    plan = floor_plan()
    wrong, arrows = [], set()
    for path in source_files():
        place = path.relative_to(ROOT)
        room = room_of(place, plan)
        for imported in imported_files(path):
            other = room_of(imported, plan)
            if other != room:
                arrows.add((room, other))
                if plan[other] >= plan[room]:
                    wrong.append(f"{place} imports {imported}: from floor {plan[room]} to floor {plan[other]}")
    assert not wrong
    # The reading of imports works: these are there.
    assert {("training", "training/data"), ("evacap", "modeling_evacap")} <= arrows


@pytest.mark.parametrize(
    "path", [file for file in source_files() if file.name.endswith("_evacap.py")], ids=lambda p: p.name
)
def test_files_that_travel_have_the_licence_and_import_siblings_alone(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith(LICENCE)
    for imported in imported_files(path):
        assert imported.parent == path.relative_to(ROOT).parent and imported.name.endswith("_evacap.py")
    relative = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom) and node.level]
    assert all(node.level == 1 and node.module for node in relative)
    assert not re.search(r"^\s*(import|from) evacap", text, re.MULTILINE)

"""The versions that the project names in several places fit each other."""

import re
from pathlib import Path

from lowest_versions import lowest_versions
from packaging.version import Version

from evacap.modeling_evacap.versions_evacap import TESTED_TRANSFORMERS, UNTESTED_TRANSFORMERS


ROOT = Path(__file__).resolve().parents[1]


def constraints() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = (line.split("==") for line in lines if not line.startswith("#"))
    return {re.sub(r"[-_.]+", "-", name).lower(): Version(version) for name, version in pins}


def test_each_dependency_has_a_constraint_that_its_bound_allows():
    pinned, optional = constraints(), {"torchaudio", "decord"}
    for bound in lowest_versions():
        name, lowest = bound.removesuffix(".*").split("==")
        if name not in optional:
            assert pinned[name] >= Version(lowest), bound


def test_the_tested_transformers_is_the_one_of_the_constraints():
    tested, untested = Version(TESTED_TRANSFORMERS), Version(UNTESTED_TRANSFORMERS)
    assert constraints()["transformers"] == tested
    assert (untested.major, untested.minor) == (tested.major, tested.minor + 1)

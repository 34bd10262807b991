"""The benchmarks are not installed: they are imported from the repository's root."""

import sys
from pathlib import Path

import pytest
from transformers import logging


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


@pytest.fixture(scope="module", autouse=True)
def verbosity():
    """Benchmarks silence Transformers, which other tests listen to."""
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)

"""Warnings of the library where `caplog` finds them."""

import logging
from collections.abc import Iterator

import pytest
from transformers.utils.logging import disable_propagation, enable_propagation


@pytest.fixture(autouse=True)
def warnings_reach_caplog() -> Iterator[None]:
    """The logger of transformers passes nothing on by default, and gives some warnings once a process."""
    enable_propagation()
    logging.Logger.warning_once.cache_clear()
    yield
    disable_propagation()

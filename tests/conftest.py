"""What every test needs: no network, and the way to the known answers that are not part of the repository."""

import os


# Read by huggingface_hub when it is imported, so it has to be set before any test imports transformers.
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """`shared(name)` is the path of a file or folder of known answers, kept in `shared/` in or beside the repository.

    Without it the test is skipped, but on CI (`CI=true`), which must have it, it fails.
    """

    def find(name: str) -> Path:
        for parent in (ROOT, ROOT.parent):
            if (parent / "shared" / name).exists():
                return parent / "shared" / name
        message = f"shared/{name} is neither in {ROOT} nor beside it"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)

    return find

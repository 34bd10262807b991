"""What every test needs: no network, the right `evacap`, and the way to known answers that are not in the repository."""

import os
import shutil
import sys


# Read by huggingface_hub when it is imported, so it has to be set before any test imports transformers.
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import TYPE_CHECKING  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402


if TYPE_CHECKING:
    from playwright.sync_api import Browser


# Without a GPU, Triton's interpreter runs the kernels. Triton reads this when Transformers imports it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

TESTS = Path(__file__).resolve().parent

# pytest puts this folder on the path, where a folder `evacap` of tests would be taken for an editable install's package.
with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, "path", [folder for folder in sys.path if Path(folder).resolve() != TESTS])
    import evacap  # noqa: F401


@pytest.fixture(scope="module", autouse=True)
def verbosity() -> Iterator[None]:
    """Benchmarks and `--quiet` silence Transformers, which other tests listen to."""
    from transformers import logging

    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)


@pytest.fixture(scope="session")
def own_lines() -> Callable[[str], str]:
    """Leaves out of what a process printed the lines that torchao 0.18 makes PyTorch print wherever it is installed."""
    return lambda text: "".join(
        line for line in text.splitlines(keepends=True) if "torch/utils/_pytree.py" not in line
    )


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """`shared(name)` is the path of a file or folder of known answers, kept in `shared/` in or beside the repository.

    Without it the test is skipped, but on CI (`CI=true`), which must have it, it fails.
    """

    def find(name: str) -> Path:
        for parent in TESTS.parents[:2]:
            if (parent / "shared" / name).exists():
                return parent / "shared" / name
        message = f"shared/{name} is neither in {TESTS.parent} nor beside it"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)

    return find


@pytest.fixture(scope="session")
def spice_parser() -> None:
    """Skips a test of SPICE if its parser is not installed; fails it on CI with Maven, where `make spice` installs it."""
    from evacap.training.metrics.spice import JARS, jar_folder

    if all((jar_folder() / name).is_file() for name in JARS):
        return
    message = (
        f"SPICE's parser is not in {jar_folder()}: `make spice` fetches it by Maven, `evacap install-spice` without"
    )
    if os.environ.get("CI") == "true" and shutil.which("mvn"):
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="module")
def chromium() -> "Iterator[Browser]":
    """A headless Chromium of the system; without one the test is skipped."""
    from playwright.sync_api import sync_playwright

    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium is installed (on Debian: `apt-get install chromium`)")
    # It keeps an event loop in this thread, so no test of another module runs meanwhile.
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()

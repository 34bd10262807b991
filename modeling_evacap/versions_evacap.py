# Copyright 2026 The EVACap authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The versions that EVACap was tested with, and a warning where Transformers has moved on since."""

import logging
from importlib.metadata import PackageNotFoundError, version


# The newest release of Transformers that all tests ran on, and its next minor release, which none did.
TESTED_TRANSFORMERS = "5.24.0"
UNTESTED_TRANSFORMERS = "5.25"

logger = logging.getLogger("evacap.versions")


def installed_version(package: str) -> str | None:
    """The installed version of a package, or `None`; its metadata tells, the package is not imported."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def tested_versions() -> str:
    """What is installed, what was tested, and the command that installs it, as the end of a message."""
    return (
        f"installed is {installed_version('transformers')}, EVACap was tested with {TESTED_TRANSFORMERS}. "
        f"`pip install 'transformers<{UNTESTED_TRANSFORMERS}'` installs a tested one, if a newer EVACap does not help."
    )


def warn_if_untested() -> None:
    """Logs one warning a process where Transformers is newer than the newest that was tested."""
    installed = installed_version("transformers")
    if installed is None or getattr(logger, "has_warned", False):
        return
    if _minor(installed) > _minor(TESTED_TRANSFORMERS):
        # Kept by the logger, as the code of a saved folder is another copy of this module.
        logger.has_warned = True
        logger.warning(f"This version of Transformers is newer than EVACap knows: {tested_versions()}")


def _minor(release: str) -> tuple[int, int]:
    """Major and minor number; a development version counts as the release that it becomes."""
    major, minor = release.split(".")[:2]
    return int(major), int("".join(character for character in minor if character.isdigit()) or 0)

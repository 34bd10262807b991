"""Prints, as constraints for pip, the lowest release series that `setup.py` allows: `torch>=2.11` becomes `torch==2.11.*`."""

import re
from pathlib import Path


SETUP = Path(__file__).resolve().parents[1] / "setup.py"


def lowest_versions() -> list[str]:
    bounds = re.findall(r'"([A-Za-z0-9_-]+)(?:\[[a-z]+\])?>=([0-9.]+)"', SETUP.read_text(encoding="utf-8"))
    # Of the development tools any version will do.
    return [f"{name}=={version}.*" for name, version in bounds if name not in {"pytest", "ruff", "playwright"}]


if __name__ == "__main__":
    print("\n".join(lowest_versions()))

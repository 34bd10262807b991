"""Fetches the common tests of the installed Transformers from its source distribution.

`python tests/transformers_common/fetch.py FOLDER` prints the folder to put on `PYTHONPATH`.
"""

import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path


# The common tests import these, and the source distribution lacks them. What they hold is not tested here: export has
# tests of its own, generation is tested by `tests/modeling_evacap`.
LACKING = {
    "tests/__init__.py": "",
    "tests/exporters/__init__.py": "",
    "tests/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "tests/generation/__init__.py": "",
    "tests/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/fetch_hub_objects_for_ci.py": "def url_to_local_path(url, *args, **kwargs):\n    return url\n",
}


def fetch(folder: Path) -> Path:
    """The unpacked source distribution of the installed Transformers below `folder`, fetched once."""
    name = f"transformers-{version('transformers')}"
    root = folder / name
    if not (root / "utils").exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
        subprocess.run([*command, "--dest", str(folder), name.replace("-", "==")], check=True)
        with tarfile.open(folder / f"{name}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
        for path, content in LACKING.items():
            (root / path).parent.mkdir(exist_ok=True)
            if not (root / path).exists():
                (root / path).write_text(content, encoding="utf-8")
    return root


if __name__ == "__main__":
    print(fetch(Path(sys.argv[1])))

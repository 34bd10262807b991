"""`evacap publish`: checks a model folder, completes its card and uploads it to the Hub."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from huggingface_hub import ModelCard, create_repo, get_token, upload_folder
from huggingface_hub.utils import validate_repo_id

from ..model_card import check_metadata, fill_model_card, python_examples
from ..training.files import write_text
from ..training.procedural.scenes import make_scene, write_clip


CARD = "README.md"
UPLOADED = ("*.json", "*.safetensors", "*.py", "*.txt", CARD)
STATES = ("trainer_state.json",)
"""Files of a training run, which are not uploaded; neither are logs and optimizer states."""

_CHECK_SECONDS = 600
# The folder has to work without this package, even if it is installed.
_RUN_ALONE = """
import sys
sys.modules["evacap"] = None
from transformers.utils import logging
logging.disable_progress_bar()
exec(compile(sys.stdin.read(), "README.md", "exec"))
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="a model folder with its processor")
    parser.add_argument("--repo-id", required=True, metavar="ORG/NAME", help="where it goes on the Hub")
    parser.add_argument("--private", action="store_true", help="make the repository private where it is new")
    parser.add_argument("--dry-run", action="store_true", help="check and show everything, write and upload nothing")


def run(arguments: argparse.Namespace) -> None:
    publish(arguments.folder, arguments.repo_id, private=arguments.private, dry_run=arguments.dry_run)


def publish(folder: str | os.PathLike, repo_id: str, private: bool = False, dry_run: bool = False) -> None:
    """Checks a model folder, writes its card if it has none, and uploads it.

    The example code of the card has to caption a generated clip, in a process that has only the folder.

    Args:
        folder (`str` or `os.PathLike`): A model folder with its processor, written by `save_pretrained`.
        repo_id (`str`): `ORG/NAME` on the Hub; the repository is made if it does not exist.
        private (`bool`, defaults to `False`): Whether a new repository is private.
        dry_run (`bool`, defaults to `False`): Checks and shows everything, but writes and uploads nothing.

    Raises:
        FileNotFoundError: If a file of the folder is missing.
        PermissionError: If there is no token.
        ValueError: If the folder, the metadata of the card or `repo_id` is not valid.
        OSError: If the upload fails.
    """
    folder = Path(folder).resolve()
    if repo_id.count("/") != 1:
        raise ValueError(f"`repo_id` is {repo_id!r}, but it must be ORG/NAME.")
    validate_repo_id(repo_id)
    if not dry_run and get_token() is None:
        raise PermissionError("there is no token of the Hub. Log in with `hf auth login`, then publish again.")
    check_files(folder)

    card_path = folder / CARD
    is_new = not card_path.exists()
    card = fill_model_card(folder, repo_id) if is_new else ModelCard.load(card_path)
    check_metadata(card, str(card_path))
    captions = caption_alone(folder, repo_id, card)
    print("loads without this package and captions a generated clip:")
    print("\n".join(f"  {line}" for line in captions))
    print(f"card: complete; {_check_on_hub(repo_id, card, may_fail=dry_run)}")
    print(f"card: {'filled from the template' if is_new else f'{CARD} of the folder, as it is'}")
    if is_new and not dry_run:
        write_text(card_path, str(card))

    files = [path for pattern in UPLOADED for path in folder.glob(pattern) if path.name not in STATES]
    sizes = {path.name: path.stat().st_size for path in files}
    sizes[CARD] = len(str(card).encode())
    print(f"to https://huggingface.co/{repo_id}{' (private where new)' if private else ''}:")
    for name, size in sorted(sizes.items()):
        print(f"  {name:<36}{size:>14,} bytes")
    left_out = sorted(path.name for path in folder.iterdir() if path.name not in sizes)
    if left_out:
        print(f"not uploaded: {', '.join(left_out)}")
    if dry_run:
        print(
            f"dry run: nothing was written or uploaded. The card:\n\n{card}" if is_new else "dry run: nothing uploaded"
        )
        return
    _reach_hub(repo_id, create_repo, repo_id, private=private, exist_ok=True)
    commit = _reach_hub(repo_id, upload_folder, repo_id=repo_id, folder_path=folder, allow_patterns=sorted(sizes))
    print(f"uploaded: {commit.commit_url}")


def check_files(folder: Path) -> None:
    """Raises if the folder lacks a file that loading needs."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: it has no config.json. Give a folder that `save_pretrained` wrote.")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") != "evacap":
        raise ValueError(f"{folder}: its model type is {config.get('model_type')!r}, but 'evacap' was expected.")
    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"{folder}: it has no weights (*.safetensors). Save the model there.")
    if not (folder / "processor_config.json").is_file():
        raise FileNotFoundError(f"{folder}: it has no processor_config.json. Save the processor there, too.")
    classes = [*config.get("auto_map", {}).values()]
    classes += [task["impl"] for task in config.get("custom_pipelines", {}).values()]
    missing = {f"{name.split('.')[0]}.py" for name in classes or ["modeling_evacap.EVACapForConditionalGeneration"]}
    missing -= {path.name for path in folder.glob("*.py")}
    if missing:
        raise FileNotFoundError(
            f"{folder}: it lacks its code ({', '.join(sorted(missing))}). Load its model and its processor with `import "
            "evacap` and save both there again: `save_pretrained` then writes it."
        )


def caption_alone(folder: Path, repo_id: str, card: ModelCard) -> list[str]:
    """Runs the example code of `card` on a generated clip, offline, in a process that has only the folder.

    Returns:
        The output of the code.

    Raises:
        ValueError: If the code fails or prints no captions.
    """
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        write_clip(make_scene(seed=0, split="test", index=0), place / "clip.mp4")
        # The code on the card loads the repository by its name, which is a folder here.
        (place / repo_id).parent.mkdir()
        (place / repo_id).symlink_to(folder)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(place / "modules")}
        environment |= {"TRANSFORMERS_VERBOSITY": "error", "PYTHONUTF8": "1"}
        command = [sys.executable, "-c", _RUN_ALONE]
        code = python_examples(card)
        try:
            done = subprocess.run(
                command,
                input=code,
                cwd=place,
                env=environment,
                capture_output=True,
                text=True,
                encoding="utf-8",
                timeout=_CHECK_SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            raise ValueError(f"{folder}: the card's code took more than {_CHECK_SECONDS} s for one clip.") from error
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise ValueError(f"{folder}: the code on its card fails: {reason}")
    if not done.stdout.strip():
        raise ValueError(f"{folder}: the code on its card prints no caption: is there a ```python block?")
    return done.stdout.strip().splitlines()


def _check_on_hub(repo_id: str, card: ModelCard, may_fail: bool) -> str:
    """Lets the Hub validate the metadata of `card`; with `may_fail`, an unreachable Hub is ignored."""
    try:
        _reach_hub(repo_id, card.validate)
    except OSError:
        if not may_fail:
            raise
        return "the Hub, which has a check of its own, cannot be reached"
    return "the Hub's own check accepts it"


def _reach_hub(repo_id: str, call, *args, **kwargs):
    try:
        return call(*args, **kwargs)
    except ValueError as error:
        raise ValueError(f"{repo_id}: the Hub refuses it: {error}") from error
    except Exception as error:
        # The client of the Hub raises errors of its network library, without a common type of Python.
        raise OSError(
            f"{repo_id}: the Hub cannot be reached or refuses: {str(error).strip().splitlines()[0]}"
        ) from error

"""`evacap publish`: checks a model folder, completes its card and uploads it to the Hub."""

import argparse
import json
import os
import re
import site
import subprocess
import sys
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, ModelCard, create_commit, create_repo, get_token
from huggingface_hub.utils import validate_repo_id
from yaml import YAMLError

from .. import modeling_evacap, processing
from ..model_card import EVALUATION_FILE, TRAINING_FILE, check_metadata, example_code, fill_model_card
from ..modeling_evacap.configuration_evacap import EVACapConfig
from ..processing.captioning_evacap import reads_captions
from ..processing.known_answer_evacap import KNOWN_ANSWER_FILE, compare, read_known_answer, save_answer
from ..space import caption_by_space, space_files
from ..training.files import write_text
from ..training.procedural.scenes import make_scene, write_clip
from ..training.terminal import one_line, printable


CARD = "README.md"
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
UPLOADED = frozenset(
    {
        CARD,
        "LICENSE",
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "processor_config.json",
        "preprocessor_config.json",
        "video_preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.txt",
        TRAINING_FILE,
        EVALUATION_FILE,
        KNOWN_ANSWER_FILE,
        *(
            path.name
            for package in (modeling_evacap, processing)
            for path in files(package).iterdir()
            if path.name.endswith("_evacap.py")
        ),
    }
)
"""The files of a model, beside its weights: all else in the folder stays here. Code is that of this package, by name."""
ENVIRONMENT = re.compile(
    r"PATH|LANG|LC_\w+|TZ|TMPDIR|TEMP|TMP|SYSTEMROOT|VIRTUAL_ENV|PYTHONPATH|LD_LIBRARY_PATH|DYLD_LIBRARY_PATH|OMP_\w+"
    r"|MKL_\w+|CUDA_VISIBLE_DEVICES|CUDA_HOME"
)
"""What the example's process gets of the environment: nothing in which a token or a password could be."""

_CHECK_SECONDS = 600
# The folder has to work without this package, even if it is installed.
_RUN_ALONE = """
import sys
sys.modules["evacap"] = None
from transformers.utils import logging
logging.disable_progress_bar()
exec(compile(sys.stdin.read(), "README.md", "exec"))

import json, torch
from transformers import AutoModel, AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module
answer = get_class_from_dynamic_module("known_answer_evacap.answer", sys.argv[1])
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32)
print(json.dumps(answer(model, AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True))))
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="a model folder with its processor")
    parser.add_argument("--repo-id", required=True, metavar="ORG/NAME", help="where it goes on the Hub")
    parser.add_argument("--private", action="store_true", help="make the repository private where it is new")
    parser.add_argument(
        "--space", action="store_true", help="also make a Space of the same name that shows it, see `evacap demo`"
    )
    parser.add_argument("--dry-run", action="store_true", help="check and show everything, write and upload nothing")


def run(arguments: argparse.Namespace) -> None:
    publish(
        arguments.folder,
        arguments.repo_id,
        private=arguments.private,
        dry_run=arguments.dry_run,
        space=arguments.space,
    )


def publish(
    folder: str | os.PathLike, repo_id: str, private: bool = False, dry_run: bool = False, space: bool = False
) -> None:
    """Checks a model folder, writes its card if it has none, and uploads it.

    The example code of the card's template has to caption a generated clip, and the folder to reproduce its known
    answer, which is written where there is none yet: in a process that has only the folder, and neither the token nor
    any other secret of the environment. Code in a card that the folder has already is not run.

    Only files with known names are uploaded, see `UPLOADED`; links and folders never are.

    Args:
        folder (`str` or `os.PathLike`): A model folder with its processor, written by `save_pretrained`.
        repo_id (`str`): `ORG/NAME` on the Hub; the repository is made if it does not exist.
        private (`bool`, defaults to `False`): Whether a new repository is private.
        dry_run (`bool`, defaults to `False`): Checks and shows everything, but writes and uploads nothing.
        space (`bool`, defaults to `False`): Whether to make a Space of the same name, too, with the page of `evacap
            demo`. It holds the code of this package, and has to caption a generated clip first.

    Raises:
        ImportError: If Gradio is missing and a Space is wanted.
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
    card = fill_model_card(folder, repo_id) if is_new else _load_card(card_path)
    check_metadata(card, str(card_path))
    known = read_known_answer(folder)
    captions, found = caption_alone(folder, repo_id)
    print("loads without this package and captions a generated clip:")
    print("\n".join(f"  {printable(line)}" for line in captions))
    if known is None:
        print(f"known answer: none yet, made here: {printable(found['caption'])}")
        if not dry_run:
            save_answer(folder, found)
    else:
        is_right, reason = compare(known, found)
        if not is_right:
            raise ValueError(
                f"{folder}: it does not reproduce its known answer on this machine ({printable(reason)}). If the weights "
                f"were changed since, write it anew: `evacap check-install {folder} --write`."
            )
        print(f"known answer: reproduced, {printable(reason)}")
    print(f"card: complete; {_check_on_hub(repo_id, card, may_fail=dry_run)}")
    print(f"card: {'filled from the template' if is_new else f'{CARD} of the folder, as it is'}")
    if is_new and not dry_run:
        write_text(card_path, str(card))

    page = {}
    if space:
        page = space_files(repo_id)
        caption = caption_by_space(page, folder, repo_id, _safe_environment())
        print(f"Space: its page captions a generated clip: {printable(caption)}")

    names = uploaded_files(folder)
    sizes = {name: (folder / name).stat().st_size for name in names}
    sizes[CARD] = len(str(card).encode()) if is_new else sizes[CARD]
    print(f"to https://huggingface.co/{repo_id}{' (private where new)' if private else ''}:")
    for name, size in sorted(sizes.items()):
        print(f"  {name:<36}{size:>14,} bytes")
    left_out = sorted(path.name for path in folder.iterdir() if path.name not in sizes)
    if left_out:
        print(f"not uploaded: {', '.join(map(printable, left_out))}")
    if space:
        size = sum(map(len, page.values()))
        print(f"to https://huggingface.co/spaces/{repo_id}: {len(page)} files, {size:,} bytes:")
        print(f"  {', '.join(name for name in page if '/' not in name)}, and the code of this package in evacap/")
        if private:
            print("  the model is private: give the Space a token that reads it, as its secret HF_TOKEN")
    if dry_run:
        print("dry run: nothing was written or uploaded." + (" The card:\n" if is_new else ""))
        print("\n".join(map(printable, str(card).split("\n"))) if is_new else "", end="")
        return
    # Each file by its name: a pattern could take others along.
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in sorted(sizes)]
    _reach_hub(repo_id, create_repo, repo_id, private=private, exist_ok=True)
    commit = _reach_hub(repo_id, create_commit, repo_id, operations, commit_message="Upload a model of EVACap")
    print(f"uploaded: {commit.commit_url}")
    if space:
        _upload_space(repo_id, page, private)


def _upload_space(repo_id: str, page: dict[str, bytes], private: bool) -> None:
    kind = {"repo_type": "space"}
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in page.items()]
    _reach_hub(repo_id, create_repo, repo_id, private=private, exist_ok=True, space_sdk="gradio", **kind)
    commit = _reach_hub(
        repo_id, create_commit, repo_id, operations, commit_message="Upload the page of EVACap", **kind
    )
    print(f"uploaded: {commit.commit_url}")


def uploaded_files(folder: Path) -> list[str]:
    """The names of the files in a model folder that belong to a model; links and folders do not."""
    return sorted(
        path.name
        for path in folder.iterdir()
        if (path.name in UPLOADED or WEIGHTS.fullmatch(path.name)) and path.is_file() and not path.is_symlink()
    )


def check_files(folder: Path) -> None:
    """Raises if the folder lacks a file that loading needs."""
    for path in sorted(folder.glob("*")):
        if path.is_symlink() and (path.name in UPLOADED or WEIGHTS.fullmatch(path.name)):
            raise ValueError(
                f"{path}: a link, which is not followed: it could lead anywhere. Put a copy there instead."
            )
    names = set(uploaded_files(folder))
    if "config.json" not in names:
        raise FileNotFoundError(f"{folder}: it has no config.json. Give a folder that `save_pretrained` wrote.")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model_type = config.get("model_type")
        classes = [*config.get("auto_map", {}).values()]
        classes += [task["impl"] for task in config.get("custom_pipelines", {}).values()]
        modules = {name.split(".")[0] for name in classes or ["modeling_evacap.EVACapForConditionalGeneration"]}
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / 'config.json'}: not a configuration that `save_pretrained` wrote ({type(error).__name__}: "
            f"{error}). Save the model there again."
        ) from error
    if model_type != "evacap":
        raise ValueError(f"{folder}: its model type is {model_type!r}, but 'evacap' was expected.")
    if not any(map(WEIGHTS.fullmatch, names)):
        raise FileNotFoundError(f"{folder}: it has no weights (model*.safetensors). Save the model there.")
    if "processor_config.json" not in names:
        raise FileNotFoundError(f"{folder}: it has no processor_config.json. Save the processor there, too.")
    missing = {f"{module}.py" for module in modules | {"known_answer_evacap"}} - names
    if missing:
        raise FileNotFoundError(
            f"{folder}: it lacks its code ({', '.join(sorted(missing))}). Load its model and its processor with `import "
            "evacap` and save both there again: `save_pretrained` then writes it."
        )


def caption_alone(folder: Path, repo_id: str) -> tuple[list[str], dict[str, Any]]:
    """Runs the example code of the card's template on a generated clip, offline, in a process that has only the folder.

    Returns:
        The output of the code, and what the folder says of the clip of known answers, see [`answer`].

    Raises:
        ValueError: If the code fails or prints no captions.
    """
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        write_clip(make_scene(seed=0, split="test", index=0), place / "clip.mp4")
        # The code on the card loads the repository by its name, which is a folder here.
        (place / repo_id).parent.mkdir()
        (place / repo_id).symlink_to(folder)
        environment = {**_safe_environment(), "HOME": str(place), "HF_HOME": str(place / "hub")}
        command = [sys.executable, "-c", _RUN_ALONE, repo_id]
        code = example_code(repo_id, reads_captions(EVACapConfig.from_pretrained(folder)))
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
    *captions, found = done.stdout.strip().splitlines()
    if not any(captions):
        raise ValueError(f"{folder}: the code on its card prints no caption.")
    return captions, json.loads(found)


def _safe_environment() -> dict[str, str]:
    """The variables of a process that runs offline and without a token."""
    environment = {name: value for name, value in os.environ.items() if ENVIRONMENT.fullmatch(name)}
    # Packages of the user's are found through the home folder, which the process does not get, as the token is there.
    environment["PYTHONUSERBASE"] = site.getuserbase()
    return environment | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONUTF8": "1"}


def _load_card(path: Path) -> ModelCard:
    try:
        return ModelCard.load(path)
    except (ValueError, YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: its metadata cannot be read ({one_line(error)}). Mend it, or remove the file."
        ) from error


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

"""Scores captioners on procedural clips, each with its own video and with another clip's.

python -m evacap.training.procedural.scores tiny tiny-audio-only --num-clips 300
"""

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from ...modeling_evacap.modeling_evacap import EVACapForConditionalGeneration
from ...processing.processing_evacap import EVACapProcessor
from ..files import write_text
from ..metrics.bootstrap import roc_auc
from .captions import names_in_caption
from .kinds import KINDS, SOUND_ALIKES, name_of
from .scenes import Event, Scene, make_scene, write_clip


COLUMNS = {
    "set": "clips whose caption names the right set of sources, and no other",
    "sound-alikes": "sound-alike sources on screen that are named: only the picture tells which of two it is",
    "twin": "sound-alike sources on screen that are called by the name of the other of the two",
    "bare": "sound-alike sources on screen that get the word of their pair, as those off screen do, and not their name",
    "off screen": "sound-alike sources off screen that get the word of their pair, as nobody can know more",
    "distinct": "all other sources that are named: the sound tells",
    "invented": "clips whose caption names a source that sounds like none of theirs",
    "gate": "mean of the fusion gate",
    "gate AUC": "chance that the gate stands higher with a clip's own video than with another's, where each of the two "
    "shows a sounding sound-alike",
}


def write_clips(folder: str | os.PathLike, num_clips: int, seed: int) -> list[Scene]:
    """Writes the first test clips of a seed as MP4 files, where they are missing, and returns their scenes."""
    scenes = [make_scene(seed, "test", index) for index in range(num_clips)]
    for scene in tqdm(scenes, desc="test clips", unit="clip"):
        path = Path(folder) / f"{scene.id}.mp4"
        if not path.exists():
            write_clip(scene, path)
    return scenes


@torch.no_grad()
def caption_clips(
    model: EVACapForConditionalGeneration,
    processor: EVACapProcessor,
    files: list[Path],
    videos: list[Path] | None = None,
    batch_size: int = 50,
) -> tuple[list[str], torch.Tensor | None]:
    """Captions clips, on request with the pictures of others.

    Args:
        model ([`EVACapForConditionalGeneration`]), processor ([`EVACapProcessor`]): The captioner.
        files (`list[Path]`): The clips.
        videos (`list[Path]`, *optional*): The clips whose pictures are shown instead; `files` by default.
        batch_size (`int`): Clips at a time.

    Returns:
        The captions, and the mean gate of each clip, `None` for a model without one.
    """
    captions, gates = [], []
    model.eval()
    for first in tqdm(range(0, len(files), batch_size), desc="captions", unit="batch"):
        batch = files[first : first + batch_size]
        if videos is None or processor.modalities != "audio_video":
            inputs = processor(media=batch, return_tensors="pt")
        else:
            inputs = processor(audio=batch, videos=videos[first : first + batch_size], return_tensors="pt")
        encoded = model.get_encoder()(**inputs.to(model.device))
        tokens = model.generate(encoder_outputs=encoded)
        captions += processor.batch_decode(tokens, skip_special_tokens=True)
        if encoded.fusion_gate is not None:
            gates.append(encoded.fusion_gate.mean(1).cpu())
    return captions, torch.cat(gates) if gates else None


def needs_picture(event: Event) -> bool:
    """Whether only the picture tells what sounds, and does tell."""
    return event.kind in SOUND_ALIKES and event.place is not None


def count_names(sources: Sequence[Sequence[tuple[str, bool]]], captions: Sequence[str]) -> dict[str, np.ndarray]:
    """
    Counts, for the columns of `COLUMNS` but those of the gate, what each caption names.

    Args:
        sources (`Sequence`): The sounding sources of each clip: kind, and whether it is on screen.
        captions (`Sequence[str]`): One caption a clip.

    Returns:
        `dict[str, np.ndarray]`: Hits and possible hits of each clip, (clips, 2), by column.
    """
    counts = {column: np.zeros((len(captions), 2)) for column in COLUMNS if "gate" not in column}
    for place, (clip, caption) in enumerate(zip(sources, captions, strict=True)):
        said, heard = names_in_caption(caption), [name_of(kind, seen) for kind, seen in clip]
        counts["set"][place] = said == frozenset(heard), 1
        sounds = {KINDS[kind].sound for kind, _ in clip}
        counts["invented"][place] = any(_sound_of(name) not in sounds for name in said), 1
        for (kind, seen), name in zip(clip, heard):
            column = "distinct" if kind not in SOUND_ALIKES else "sound-alikes" if seen else "off screen"
            counts[column][place] += name in said, 1
            if column == "sound-alikes":
                alike = {other for other in said - {kind} if _sound_of(other) == KINDS[kind].sound}
                counts["twin"][place] += bool(alike & KINDS.keys()), 1
                counts["bare"][place] += bool(alike - KINDS.keys()) and not said & {kind}, 1
    return counts


def _sound_of(name: str) -> str:
    """The sound of what a caption names: that of the kind, or the bare sound itself."""
    return KINDS[name].sound if name in KINDS else name


def score(scenes: list[Scene], captions: list[str]) -> dict[str, float]:
    """The shares, 0 to 1, that `COLUMNS` describes, without those of the gate."""
    sources = [[(event.kind, event.place is not None) for event in scene.events] for scene in scenes]
    sums = {column: counts.sum(0) for column, counts in count_names(sources, captions).items()}
    return {column: float(hits / possible) for column, (hits, possible) in sums.items() if possible}


def score_model(
    folder: str | os.PathLike, scenes: list[Scene], clips: str | os.PathLike
) -> dict[str, dict[str, float]]:
    """Scores one captioner.

    Args:
        folder (`str` or `os.PathLike`): The saved model with its processor.
        scenes (`list[Scene]`), clips (`str` or `os.PathLike`): What `write_clips` returned, and its folder.

    Returns:
        `{"matched": …, "swapped": …}`, each as `score` returns it, with the figures of the gate for a model that has
        one. Swapped: every clip has the picture of the clip before it.
    """
    model = EVACapForConditionalGeneration.from_pretrained(folder)
    processor = EVACapProcessor.from_pretrained(folder)
    files = [Path(clips) / f"{scene.id}.mp4" for scene in scenes]
    figures, gates = {}, {}
    for condition, videos in (("matched", None), ("swapped", files[-1:] + files[:-1])):
        captions, gates[condition] = caption_clips(model, processor, files, videos)
        figures[condition] = score(scenes, captions)
        if gates[condition] is not None:
            figures[condition]["gate"] = gates[condition].mean().item()
    if gates["matched"] is not None:
        needed = torch.tensor([any(needs_picture(event) for event in scene.events) for scene in scenes])
        # A gate that opens for some pictures more than for others, whatever sounds, tells nothing: like with like.
        both = needed & needed.roll(1)
        if both.any():
            pair = gates["matched"][needed], gates["swapped"][both]
            figures["swapped"]["gate AUC"] = roc_auc(*(gate.double().numpy() for gate in pair))
    return figures


def as_table(figures: dict[str, dict[str, dict[str, float]]]) -> str:
    """The figures of some models as a Markdown table: percent, but the gate."""
    lines = ["| model | video | " + " | ".join(COLUMNS) + " |", "|---|---|" + "---|" * len(COLUMNS)]
    for model, conditions in figures.items():
        for condition, values in conditions.items():
            cells = [
                "–"
                if column not in values
                else f"{values[column]:.2f}"
                if "gate" in column
                else f"{values[column]:.1%}"
                for column in COLUMNS
            ]
            lines.append(f"| {model} | {condition} | " + " | ".join(cells) + " |")
    return "\n".join(lines + ["", *(f"* {column}: {meaning}" for column, meaning in COLUMNS.items())])


def save_evaluation(folder: str | os.PathLike, figures: dict[str, dict[str, float]], dataset: str) -> None:
    """Writes the figures of one model to `evaluation.json` in its folder, from which its model card takes them."""
    settings = {"matched": "own video", "swapped": "another clip's video"}
    results = [{"setting": settings[condition], "metrics": values} for condition, values in figures.items()]
    content = {"dataset": dataset, "dataset_id": "procedural-clips", "results": results}
    write_text(Path(folder) / "evaluation.json", json.dumps(content, indent=2) + "\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m evacap.training.procedural.scores", description=__doc__.splitlines()[0]
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folders of saved models")
    parser.add_argument("--num-clips", type=int, default=300, help="number of test clips (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the test clips (default: %(default)s)")
    parser.add_argument("--clips", help="folder to keep the clips in (default: a temporary one)")
    parser.add_argument("--save", action="store_true", help="write evaluation.json, for the model card, to each MODEL")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        clips = options.clips or temporary
        scenes = write_clips(clips, options.num_clips, options.seed)
        figures = {model: score_model(model, scenes, clips) for model in options.models}
    print(as_table(figures))
    if options.save:
        for model in options.models:
            save_evaluation(model, figures[model], f"{options.num_clips} procedural test clips")


if __name__ == "__main__":
    main()

"""Mismatches that are harder than the picture of another clip, and whether a captioner detects them (ours).

python -m evacap.training.study.lies MODEL
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ...processing.captioning_evacap import require_agreement
from ..metrics.bootstrap import roc_auc
from ..procedural.dataset import ProceduralClips
from ..procedural.kinds import KINDS
from ..procedural.scenes import Scene, make_scene, render_waveform
from ..procedural.sounds import SAMPLING_RATE
from .judge import load_captioner, print_judgement


LIES = {
    "another's": "the picture of another clip, as in training",
    "shared": "the picture of a clip that shares some sources, but not all, of two or more",
    "moved": "the own picture, and the sound moved by 1 to 3 s, its end to the beginning: only motion tells",
    "still": "the first frame of the own picture throughout",
    "half": "another's picture in the second half: each time step counts for itself",
    "black": "a black screen: the agreement is to say that there is nothing to see",
}
"""The kinds of mismatch."""
Span = tuple[str, float, float]
"""What can be heard or seen to move: the look of its source, when it begins and when it ends, in seconds."""


@torch.no_grad()
def judge_lies(
    checkpoint: str | os.PathLike, num_clips: int = 500, seed: int = 0, batch_size: int = 50
) -> dict[str, dict[str, Any]]:
    """Shows a captioner test clips with their own picture and with each of `LIES`.

    Args:
        checkpoint (`str` or `os.PathLike`): A captioner with `gate_type="agreement"`.
        num_clips (`int`), seed (`int`): Of the procedural test clips, and of the lies.
        batch_size (`int`): Clips at a time.

    Returns:
        For each lie `clips`, how many there are; and `auc`, the area under the ROC curve of the agreement with the own
        picture against that with the lie, or `nothing to see`, the share of the clips of which it says so. Beside it
        `oracle`, the area for a judge who knows every kind that is heard and seen, and when it sounds and moves.
    """
    model, processor = load_captioner(checkpoint, require_agreement)
    encoder = model.get_encoder()
    clips = ProceduralClips(processor, num_clips, "test", seed)
    scenes = [make_scene(seed, "test", index) for index in range(num_clips)]
    rng = np.random.default_rng([seed, num_clips])
    frames = np.stack([clips.frames(index) for index in tqdm(range(num_clips), desc="pictures", unit="clip")])
    sounds = [render_waveform(scene) for scene in tqdm(scenes, desc="sounds", unit="clip")]
    others = (np.arange(num_clips) + 1 + rng.integers(num_clips - 1)) % num_clips
    partners = _partners(scenes)
    shifts = rng.uniform(1, 3, num_clips)

    def look(heard: Sequence[np.ndarray], seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The agreement of clips (clips,) and of their time steps (clips, T)."""
        parts = []
        for first in range(0, len(heard), batch_size):
            inputs = processor(
                audio=list(heard[first : first + batch_size]),
                sampling_rate=SAMPLING_RATE,
                videos=list(seen[first : first + batch_size]),
                do_sample_frames=False,
                return_tensors="pt",
            ).to(model.device)
            encoded = encoder(inputs["input_features"], inputs["pixel_values_videos"])
            parts.append([encoded.agreement.double().cpu(), encoded.agreement_by_step.double().cpu()])
        return tuple(torch.cat(part).numpy() for part in zip(*parts))

    own, own_steps = look(sounds, frames)
    truth = [oracle(heard(scene), moving(scene), resting(scene)) for scene in scenes]
    half = np.stack([_half_dubbed(*pair) for pair in zip(frames, frames[others])])
    _, steps = look(sounds, half)
    times = (np.arange(steps.shape[1]) + 0.5) / steps.shape[1] * scenes[0].duration
    early = times < scenes[0].duration / 2
    known = np.array(
        [
            [_at(scene, scene if is_own else scenes[other], time) for time, is_own in zip(times, early)]
            for scene, other in zip(scenes, others)
        ]
    )
    moved = [np.roll(sound, int(shift * SAMPLING_RATE)) for sound, shift in zip(sounds, shifts)]
    chosen = np.array(list(partners))
    shown = {
        "another's": (np.arange(num_clips), sounds, frames[others], [(scenes[n], 0.0) for n in others]),
        "shared": (
            chosen,
            [sounds[n] for n in chosen],
            frames[list(partners.values())],
            [(scenes[n], 0.0) for n in partners.values()],
        ),
        "moved": (np.arange(num_clips), moved, frames, list(zip(scenes, shifts))),
        "still": (
            np.arange(num_clips),
            sounds,
            np.repeat(frames[:, :1], frames.shape[1], 1),
            [(None, 0.0)] * num_clips,
        ),
    }
    figures = {}
    for name, (rows, waveforms, pictures, told) in shown.items():
        said, _ = look(waveforms, pictures)
        judged = []
        for row, (picture, shift) in zip(rows, told):
            scene = scenes[row]
            still = moving(scene) + [(look, 0.0, 0.0) for look in resting(scene)]
            judged.append(
                oracle(heard(scene, shift), [], [look for look, *_ in still])
                if picture is None
                else oracle(heard(scene, shift), moving(picture), resting(picture))
            )
        figures[name] = {
            "clips": len(rows),
            "auc": roc_auc(own[rows], said),
            "oracle": roc_auc(np.array(truth)[rows], np.array(judged)),
        }
    figures["half"] = {
        "clips": num_clips,
        "auc": roc_auc(steps[:, early].ravel(), steps[:, ~early].ravel()),
        "oracle": roc_auc(known[:, early].ravel(), known[:, ~early].ravel()),
    }
    black, _ = look(sounds[:batch_size], np.zeros_like(frames[:batch_size]))
    figures["black"] = {"clips": len(black), "nothing to see": float(np.isnan(black).mean())}
    return figures


class HalfDubbedClips(ProceduralClips):
    """Procedural clips with the picture of the next clip in the second half, as after a cut to another scene."""

    def frames(self, index: int) -> np.ndarray:
        """See [`ProceduralClips.frames`]."""
        return _half_dubbed(super().frames(index), super().frames((index + 1) % len(self)))


def _half_dubbed(own: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.concatenate([own[: len(own) // 2], other[len(own) // 2 :]])


def heard(scene: Scene, shift: float = 0.0) -> list[Span]:
    """The sounds of a scene, moved by `shift` seconds, by the looks that could make them."""
    spans = []
    for event in scene.events:
        for kind in KINDS.values():
            if kind.sound == KINDS[event.kind].sound:
                spans.append((kind.look, *((time + shift) % scene.duration for time in (event.onset, event.offset))))
    return spans


def moving(scene: Scene) -> list[Span]:
    """What moves on the screen of a scene."""
    return [(KINDS[event.kind].look, event.onset, event.offset) for event in scene.events if event.place is not None]


def resting(scene: Scene) -> list[str]:
    """The looks that never move on the screen of a scene."""
    return [KINDS[silent.kind].look for silent in scene.silent_objects]


def oracle(sounds: Sequence[Span], motions: Sequence[Span], still: Sequence[str]) -> float:
    """How well a picture fits a sound, for a judge who knows all of both; 0 where nothing contradicts.

    What moves should sound, from the same moment to the same moment; what does not move should not sound. Where nothing
    moves, the picture may as well be another's.
    """
    against = 0.0
    for look, onset, offset in motions:
        gaps = [max(abs(onset - begin), abs(offset - end)) for other, begin, end in sounds if other == look]
        against += min([1.0, *gaps])
    # One of two that look alike may rest while the other one sounds.
    unseen = {look for look, *_ in sounds} - {look for look, *_ in motions}
    against += sum(look in unseen for look in still)
    return -against - 0.5 * (not motions)


def _at(sound: Scene, picture: Scene, time: float) -> float:
    """The oracle's word on one moment."""
    sounding = {look for look, onset, offset in heard(sound) if onset <= time <= offset}
    active = {look for look, onset, offset in moving(picture) if onset <= time <= offset}
    seen = {look for look, *_ in moving(picture)} | set(resting(picture))
    return -float(len(active - sounding) + len(sounding & seen - active)) - 0.5 * (not active)


def _partners(scenes: Sequence[Scene]) -> dict[int, int]:
    """For clips of two or more sources, the next clip that shares some of them, but not all."""
    kinds = [{event.kind for event in scene.events} for scene in scenes]
    partners = {}
    for row, own in enumerate(kinds):
        for step in range(1, len(scenes)):
            other = kinds[(row + step) % len(scenes)]
            if len(own) > 1 and len(other) > 1 and 0 < len(own & other) < min(len(own), len(other)):
                partners[row] = (row + step) % len(scenes)
                break
    return partners


def main(arguments: list[str] | None = None) -> None:
    description = "Shows a captioner procedural test clips with pictures that lie."
    print_judgement(judge_lies, "lies", description, "gate_type='agreement'", arguments)


if __name__ == "__main__":
    main()

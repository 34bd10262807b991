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
"""The known answer of a checkpoint: its caption of a made-up clip, to check whether another machine gives the same."""

import json
import math
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.video_utils import VideoMetadata

from .captioning_evacap import reads_captions


KNOWN_ANSWER_FILE = "known_answer.json"

# Number of logits of the first step that are kept, the highest ones.
NUM_LOGITS = 16
FRAMES_PER_SECOND = 4

# Tolerance for logits, in standard deviations of the first step's logits over the vocabulary.
TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}

PACKAGES = ("torch", "torchvision", "transformers", "numpy", "av")


def installed_versions(*packages: str) -> dict[str, str]:
    """The versions of Python and of the installed ones of `packages`."""
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def make_clip(sampling_rate: int, seconds: float) -> tuple[np.ndarray, np.ndarray]:
    """Makes the clip: a rising tone with pulses, and a bright bar that crosses a coloured ramp.

    It is made by formula, because random numbers differ between versions of libraries.

    Args:
        sampling_rate (`int`): Samples per second of the sound.
        seconds (`float`): Duration.

    Returns:
        The waveform (samples,), float32, and the frames (frames, 96, 128, 3), uint8, four per second.
    """
    time = np.arange(int(seconds * sampling_rate)) / sampling_rate
    pulses = 0.5 + 0.5 * np.sign(np.sin(2 * math.pi * 3 * time))
    waveform = 0.3 * np.sin(2 * math.pi * (200 + 60 * time) * time) + 0.1 * pulses * np.sin(2 * math.pi * 1700 * time)
    rows, columns = np.mgrid[:96, :128]
    frames = []
    for index in range(max(1, int(seconds * FRAMES_PER_SECOND))):
        frame = np.stack([2 * columns, 2 * rows, (columns + rows) // 2], axis=-1)
        frame[:, 8 * index % 128 : 8 * index % 128 + 16] = 230
        frames.append(frame.astype(np.uint8))
    return waveform.astype(np.float32), np.stack(frames)


@torch.no_grad()
def answer(model, processor) -> dict[str, Any]:
    """The answer of a model to the made-up clip, through its processor and by greedy search.

    Args:
        model ([`EVACapForConditionalGeneration`]): The model, on any device and in any precision.
        processor ([`EVACapProcessor`]): Its processor.

    Returns:
        `caption`, `tokens` (its ids), `score` (their mean log-probability, without the cache), `logits` (the highest
        of the first step, by token id), `scale` (their standard deviation over the vocabulary), `dtype`, `device` and
        `versions`.
    """
    rate = getattr(processor.feature_extractor, "sampling_rate", None)
    waveform, frames = make_clip(rate, processor.window_seconds)
    streams = {}
    if processor.modalities != "video":
        streams |= {"audio": [waveform], "sampling_rate": rate}
    if processor.modalities != "audio":
        # Some processors sample so many frames a second.
        metadata = VideoMetadata(total_num_frames=len(frames), fps=FRAMES_PER_SECOND)
        streams |= {"videos": [frames], "video_metadata": [metadata]}
    if reads_captions(model.config):
        streams |= {"audio_captions": ["a siren wails"], "video_captions": ["a bar crosses a screen"]}
    inputs = processor(**streams, return_tensors="pt").to(model.device)
    was_training = model.training
    model.eval()
    encoder_outputs = model.get_encoder()(**inputs, return_dict=True)
    tokens = model.generate(encoder_outputs=encoder_outputs, num_beams=1, do_sample=False)
    # A decoder of its own gives its start token back, a language model the caption alone.
    caption = tokens[:, 1:] if model.config.is_encoder_decoder else tokens
    # Without the cache, which breaks first when a library changes.
    scores = model(encoder_outputs=encoder_outputs, labels=caption, use_cache=False).logits.float()
    logits = scores[0, 0]
    scores = scores.log_softmax(-1).gather(-1, caption[..., None])
    model.train(was_training)
    highest = logits.topk(min(NUM_LOGITS, len(logits)))
    return {
        "caption": processor.batch_decode(tokens, skip_special_tokens=True)[0],
        "tokens": tokens[0].tolist(),
        "score": scores.mean().item(),
        "logits": dict(zip(map(str, highest.indices.tolist()), highest.values.tolist(), strict=True)),
        "scale": logits.std().item(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "versions": installed_versions(*PACKAGES),
    }


def write_known_answer(folder: str | os.PathLike, model, processor) -> dict[str, Any]:
    """Writes `known_answer.json` into a model folder, whole or not at all; returns its content, see [`answer`]."""
    known = answer(model, processor)
    save_answer(folder, known)
    return known


def save_answer(folder: str | os.PathLike, known: dict[str, Any]) -> None:
    """Writes what [`answer`] gave into a model folder, whole or not at all."""
    path = Path(folder) / KNOWN_ANSWER_FILE
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def read_known_answer(folder: str | os.PathLike) -> dict[str, Any] | None:
    """The content of the `known_answer.json` of a folder, or `None` if it has none.

    Raises:
        ValueError: If the file is damaged.
    """
    path = Path(folder) / KNOWN_ANSWER_FILE
    if not path.exists():
        return None
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        known["logits"] = {str(int(token)): float(value) for token, value in known["logits"].items()}
        known["tokens"] = [int(token) for token in known["tokens"]]
        known["scale"], known["score"] = float(known["scale"]), float(known["score"])
        TOLERANCE[known["dtype"]], str(known["caption"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: is not a known answer ({type(error).__name__}: {error}). Delete it, and write it anew on a "
            "machine that captions rightly: `evacap check-install FOLDER --write`."
        ) from error
    return known


def compare(known: dict[str, Any], found: dict[str, Any]) -> tuple[bool, str]:
    """Compares an answer with the known one.

    The logits may differ by the tolerance of the coarser of the two precisions. The caption must be the same if both
    are float32. In a coarser precision it may be another caption that is equally likely, within the same tolerance.

    Args:
        known (`dict`): The result of [`read_known_answer`].
        found (`dict`): The result of [`answer`].

    Returns:
        Whether they agree, and a sentence with the reason.
    """
    tolerance = max(TOLERANCE[each["dtype"]] for each in (known, found))
    says = f"it says {found['caption']!r}"
    is_same = found["tokens"] == known["tokens"]
    if not is_same:
        says += f" (score {found['score']:.2f}), known is {known['caption']!r} (score {known['score']:.2f})"
    # Two logits may swap places at the edge of the kept ones.
    kept = [token for token in known["logits"] if token in found["logits"]]
    if len(kept) < len(known["logits"]) / 2:
        return False, f"of the {len(known['logits'])} highest logits {len(kept)} are among the highest here; {says}"
    off = max(abs(known["logits"][token] - found["logits"][token]) for token in kept) / known["scale"]
    may_differ = not known["dtype"] == found["dtype"] == "float32"
    is_as_likely = may_differ and abs(found["score"] - known["score"]) <= tolerance
    logits = f"logits off by {off:.1e} of their deviation at most (tolerance {tolerance:g}, {found['dtype']})"
    return off <= tolerance and (is_same or is_as_likely), f"{logits}; {says}"

"""Calibrates the agreement of a captioner, so that it is a probability.

It fits the temperature of the matching head on clips that the captioner was not trained on, and writes it into its folder:

python -m evacap.training.evaluation.calibration MODEL --procedural 500
"""

import argparse
import json
import os
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from transformers import AutoModel

from ...processing.processing_evacap import EVACapProcessor
from ..data.collator import EVACapDataCollator
from ..data.prepared_clips import PreparedClips
from ..files import write_text
from ..procedural.dataset import ProceduralClips
from .captioner import MakeClips, choose_videos, list_clips


@torch.no_grad()
def agreement_logits(
    checkpoint: str | os.PathLike,
    make_clips: MakeClips,
    seed: int = 0,
    batch_size: int = 16,
    num_workers: int = 0,
    max_clips: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of the matching head for clips with matched and with swapped pictures, before any temperature.

    Args:
        checkpoint (`str` or `os.PathLike`): A captioner with `gate_type="agreement"`.
        make_clips (`MakeClips`): Makes the clips as its processor takes them.
        seed (`int`): Of the choice of the others' pictures, see [`choose_videos`].
        batch_size (`int`), num_workers (`int`): Clips at a time, and processes that read them.
        max_clips (`int`, *optional*): Only the first clips.

    Returns:
        The logits (clips,) of own and of others' pictures, of the clips that have something to see.

    Raises:
        ValueError: If the captioner has no matching head, or if fewer than two clips have a picture.
    """
    model = AutoModel.from_pretrained(checkpoint, trust_remote_code=False)
    if not model.config.has_matching_head:
        raise ValueError(
            f"{os.fspath(checkpoint)} has `gate_type={model.config.gate_type!r}`: only `'agreement'` has a matching head."
        )
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    encoder = model.to(device).eval().get_encoder()
    clips = make_clips(EVACapProcessor.from_pretrained(checkpoint))
    listed = list_clips(clips, max_clips)
    pictured = [number for number, clip in enumerate(listed) if clip.has_picture]
    others = choose_videos([listed[number] for number in pictured], 1.0, seed)
    loader = DataLoader(
        torch.utils.data.Subset(clips, pictured),
        batch_size,
        collate_fn=EVACapDataCollator(p_mix=0.0),
        num_workers=num_workers,
    )
    parts = []
    for batch in loader:
        audio = encoder.audio_tower(batch["input_features"].to(device))
        mask = batch.get("pixel_values_videos_mask")
        video = encoder.see(batch["pixel_values_videos"].to(device), None if mask is None else mask.to(device))
        parts.append([audio.last_hidden_state.cpu(), video.last_hidden_state.cpu(), video.attention_mask.cpu()])
    sounds, pictures, masks = (torch.cat(part) for part in zip(*parts))
    logits = []
    for chosen in (torch.arange(len(pictured)), torch.tensor(others)):
        streams = (sounds, pictures[chosen], masks[chosen])
        said = [
            encoder.matching_head(audio.to(device), video.to(device), None, mask.to(device))[0].cpu()
            for audio, video, mask in zip(*(stream.split(batch_size) for stream in streams))
        ]
        logits.append(torch.cat(said)[masks[chosen].any(1)])
    return logits[0], logits[1]


def fit_temperature(own: torch.Tensor, others: torch.Tensor) -> float:
    """The temperature with the highest likelihood for matched and swapped pictures.

    Args:
        own, others (`torch.Tensor` of shape `(clips,)`): Logits; the two groups weigh the same.
    """
    own, others = own.double(), others.double()
    log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_temperature], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        scale = (-log_temperature).exp()
        loss = F.softplus(-own * scale).mean() + F.softplus(others * scale).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(log_temperature.detach().exp())


def calibrate(checkpoint: str | os.PathLike, make_clips: MakeClips, **options) -> float:
    """Fits the temperature of a captioner on clips and writes it into the `config.json` of its folder.

    Args:
        checkpoint, make_clips, options: See [`agreement_logits`].

    Returns:
        The temperature.
    """
    temperature = fit_temperature(*agreement_logits(checkpoint, make_clips, **options))
    path = Path(checkpoint) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    write_text(path, json.dumps(config | {"agreement_temperature": temperature}, indent=2, sort_keys=True) + "\n")
    return temperature


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m evacap.training.evaluation.calibration",
        description="Fits the temperature of a captioner's matching head and writes it into its folder.",
    )
    parser.add_argument("model", metavar="MODEL", help="folder of the captioner")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prepared", metavar="FOLDER", help="clips that `evacap prepare` made")
    source.add_argument("--procedural", type=int, metavar="N", help="so many procedural clips")
    parser.add_argument("--split", default="validation", help="their split (default: %(default)s)")
    parser.add_argument("--num-workers", type=int, default=2, help="processes that read (default: %(default)s)")
    options = parser.parse_args(arguments)
    make_clips = (
        partial(ProceduralClips, num_clips=options.procedural, split=options.split)
        if options.prepared is None
        else partial(_prepared, options.prepared, options.split)
    )
    try:
        temperature = calibrate(options.model, make_clips, num_workers=options.num_workers)
    except (ValueError, OSError) as error:
        print(f"calibration: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(f"temperature {temperature:.3f}, written to {Path(options.model) / 'config.json'}")
    return 0


def _prepared(folder: str, split: str, processor: EVACapProcessor) -> PreparedClips:
    return PreparedClips(folder, split, processor)


if __name__ == "__main__":
    sys.exit(main())

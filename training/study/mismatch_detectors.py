"""Detection of mismatch: how well entropy, gate and similarity separate matched from swapped videos.

Each is measured by token, by head and by clip.
"""

import os
from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoModel

from ...modeling_evacap.fusion_evacap import EVACapGatedCrossAttention
from ...modeling_evacap.modeling_evacap import EVACapEncoder, EVACapEncoderOutput
from ...processing.processing_evacap import EVACapProcessor
from ..data.collator import EVACapDataCollator
from ..evaluation.captioner import MakeClips, TestedClip, choose_videos, list_clips
from ..metrics.bootstrap import roc_auc


SUBSETS: dict[str, Callable[[TestedClip], bool]] = {
    "all": lambda clip: True,
    "all on screen": lambda clip: all(event["on_screen"] for event in clip.extra["events"]),
    "picture needed": lambda clip: any(event["on_screen"] and event["sound_alike"] for event in clip.extra["events"]),
}
"""Subsets of the clips: all; those with all sources on screen; those with a source that only the picture identifies.

A swapped pair is in a subset if both the clip of its sound and the clip of its picture are. Otherwise a figure that only
depends on the kind of picture would appear to detect mismatch.
"""
BINS = 50
"""Number of bins of the histograms, from 0 to 1."""
FITTED = "entropy, fitted"
"""A linear readout of mean, deviation and minimum of the entropy of each head (ours).

It is fitted to one half of the clips and tested on the other, and shows what information the entropies of a clip contain.
"""
RIDGE = 0.01
CROSSED = 100
"""Number of clips whose sounds are combined with each of their pictures."""


@torch.no_grad()
def detect_mismatch(
    checkpoint: str | os.PathLike, make_clips: MakeClips, seed: int = 0, batch_size: int = 50, num_workers: int = 0
) -> dict[str, Any] | None:
    """Measures how well the figures of a captioner separate matched from swapped videos of procedural clips.

    The swapped videos are those of [`evaluate`] at a share of 100 %. The measure is the area under the ROC curve: 0.5 is
    chance, and below it the figure points in the wrong direction.

    Args:
        checkpoint (`str` or `os.PathLike`): A captioner with both towers.
        make_clips (`MakeClips`): Makes [`ProceduralClips`].
        seed (`int`): Seed of the choice of the videos.
        batch_size (`int`), num_workers (`int`): Clips of a batch, and processes that make them.

    Returns:
        `None` for a captioner without a video tower; otherwise

        * `auc`: the area of each figure, in each of `SUBSETS`. With a swapped video the entropy should be higher, and the
          gate and the cosine between the means of the towers' tokens should be lower. "by clip" is the mean over the tokens
          and heads of a clip, "by token" takes each token separately, and for the fitted one see [`FITTED`];
        * `paired`: the share of the clips whose entropy by clip is higher with the swapped video;
        * `gate`: w_g and b_g of an entropy gate; mean and deviation over the tokens; the shares of tokens below 0.05 and
          above 0.95; the deviation of a clip's mean;
        * `agreement`: what [`describe_agreement`] tells, of a captioner with a matching head;
        * `crossed`: of each figure by clip, what [`cross`] tells of the first `CROSSED` sounds, each with each of their
          pictures;
        * `histograms`: counts in `BINS` bins from 0 to 1, for clips and tokens, with matched and swapped videos.
    """
    processor = EVACapProcessor.from_pretrained(checkpoint)
    if processor.modalities != "audio_video":
        return None
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    model = AutoModel.from_pretrained(checkpoint, trust_remote_code=False).to(device).eval()
    encoder = model.get_encoder()
    dataset = make_clips(processor)
    clips = list_clips(dataset)
    loader = DataLoader(dataset, batch_size, collate_fn=EVACapDataCollator(p_mix=0.0), num_workers=num_workers)
    parts = {"audio": [], "video": []}
    for batch in loader:
        for stream, name in (("audio", "input_features"), ("video", "pixel_values_videos")):
            tokens = encoder.get_submodule(f"{stream}_tower")(batch[name].to(device)).last_hidden_state.cpu()
            captions = batch.get(f"{stream}_caption_ids")
            parts[stream].append([tokens] if captions is None else [tokens, captions])
    # The tokens of all clips, and behind them the captions that the model reads, if it does.
    heard, seen = (
        [pad_sequence([*chain(*part)], batch_first=True, padding_value=-100) for part in zip(*stream)]
        for stream in parts.values()
    )
    sounds, pictures = heard[0], seen[0]
    videos = np.array(choose_videos(clips, 1.0, seed))
    places = {"own": torch.arange(len(clips)), "swapped": torch.from_numpy(videos)}

    cosines = {
        name: F.cosine_similarity(sounds.mean(1), pictures.mean(1)[index]).numpy() for name, index in places.items()
    }
    figures = {"similarity": (cosines["own"], cosines["swapped"])}
    result: dict[str, Any] = {"paired": None, "gate": None, "histograms": None}
    means = [F.normalize(stream[:CROSSED].mean(1), dim=-1) for stream in (sounds, pictures)]
    crossed = {"similarity": (means[0] @ means[1].T).numpy()}
    if model.config.fusion_type == "gated_cross_attention":
        states = {
            name: _look(encoder, heard, _rows(seen, index), batch_size, device) for name, index in places.items()
        }
        (own, own_gate, *own_agreement), (swapped, swapped_gate, *swapped_agreement) = states["own"], states["swapped"]
        # What should be high with the own picture.
        figures |= {
            "entropy, by clip": (-own.mean((1, 2)), -swapped.mean((1, 2))),
            "entropy, by token": (-own.mean(1), -swapped.mean(1)),
            **{
                f"entropy, head {head + 1}": (-own[:, head].mean(1), -swapped[:, head].mean(1))
                for head in range(own.shape[1])
            },
            FITTED: _fitted(_summary(own), _summary(swapped)),
        }
        histograms = {"entropy": (own.mean(1), swapped.mean(1))}
        result["paired"] = _above(*figures["entropy, by clip"])
        if model.config.gate_type != "none":
            figures |= {
                "gate, by clip": (own_gate.mean(1), swapped_gate.mean(1)),
                "gate, by token": (own_gate, swapped_gate),
            }
            histograms["gate"] = (own_gate, swapped_gate)
            if own_agreement:
                names = ("agreement, by clip", "agreement, by step")
                figures |= dict(zip(names, zip(own_agreement, swapped_agreement)))
                result["agreement"] = describe_agreement(own_agreement[0], swapped_agreement[0])
            result["gate"] = _describe_gate(encoder.fusion, own_gate)
        result["histograms"] = {
            f"{name}, by {unit}": {
                place: np.histogram(values.mean(1) if unit == "clip" else values, BINS, (0, 1))[0].tolist()
                for place, values in zip(places, pair)
            }
            for name, pair in histograms.items()
            for unit in ("clip", "token")
        }
        rows = [
            _look(encoder, _repeated(heard, sound, len(means[1])), _rows(seen, slice(CROSSED)), batch_size, device)
            for sound in tqdm(range(len(means[0])), desc="sounds with all pictures", unit="sound")
        ]
        entropies, gates = (np.stack([row[place].mean(-1) for row in rows]) for place in (0, 1))
        crossed |= {"entropy": -entropies.mean(2)}
        crossed |= {f"entropy, head {head + 1}": -entropies[:, :, head] for head in range(entropies.shape[2])}
        if model.config.gate_type != "none":
            crossed["gate"] = gates
    areas = {}
    for subset, belongs in SUBSETS.items():
        chosen = np.array([belongs(clip) for clip in clips])
        if (chosen & chosen[videos]).any():
            areas[subset] = {name: own_above(*pair, chosen, videos) for name, pair in figures.items()}
    return {"auc": areas, **result, "crossed": {name: cross(table) for name, table in crossed.items()}}


def own_above(own: np.ndarray, swapped: np.ndarray, chosen: np.ndarray, videos: np.ndarray) -> float:
    """The probability that a figure is higher with the matched picture than with another one, among the chosen clips.

    Args:
        own (`np.ndarray` of shape `(clips, ...)`), swapped (`np.ndarray` of the same shape): The figure of each clip's
            sound with its own picture and with another one.
        chosen (`np.ndarray` of shape `(clips,)`): The chosen clips, bool.
        videos (`np.ndarray` of shape `(clips,)`): The clip of the picture in `swapped`, which must be chosen as well.

    Returns:
        `float`: The area under the ROC curve, 0 to 1. (ours)
    """
    return roc_auc(own[chosen].ravel(), swapped[chosen & chosen[videos]].ravel())


def describe_agreement(own: np.ndarray, swapped: np.ndarray, threshold: float = 0.5) -> dict[str, float]:
    """The calibration of the agreement, and its errors at a threshold.

    Args:
        own, swapped (`np.ndarray` of shape `(clips,)`): Agreement with the matched and with the swapped picture.
        threshold (`float`): The threshold below which a picture does not belong to the sound.

    Returns:
        `calibration error`: the expected calibration error in ten bins of equal width, with equally many matched and swapped
        pictures; `false alarms`: matched pictures below the threshold; `misses`: swapped pictures above it.
    """
    probabilities = np.concatenate([own, swapped])
    is_own = np.concatenate([np.ones(len(own)), np.zeros(len(swapped))])
    bins = np.minimum((probabilities * 10).astype(int), 9)
    error = sum(abs((probabilities[bins == place] - is_own[bins == place]).sum()) for place in np.unique(bins)) / len(
        probabilities
    )
    return {
        "calibration error": float(error),
        "false alarms": float((own < threshold).mean()),
        "misses": float((swapped >= threshold).mean()),
    }


def cross(table: np.ndarray) -> dict[str, float]:
    """Two-way analysis of variance of a figure of sounds with pictures (ours).

    Only the interaction, which depends on both together, can show whether sound and picture belong together.

    Args:
        table (`np.ndarray` of shape `(clips, clips)`): The figure, which should be high with the matched picture. Rows are
            sounds, columns are pictures.

    Returns:
        * `sound`, `picture`, `interaction`: their shares of the variance, 0 if there is none;
        * `own`: the probability that the figure of a sound is higher with its own picture than with another one;
        * `own, by interaction`: the same with the mean of each picture over all sounds subtracted.
    """
    sound = table.mean(1, keepdims=True) - table.mean()
    picture = table.mean(0, keepdims=True) - table.mean()
    interaction = table - table.mean() - sound - picture
    parts = {"sound": sound, "picture": picture, "interaction": interaction}
    variance = table.var()
    shares = {name: float(part.var() / variance) if variance else 0.0 for name, part in parts.items()}
    return shares | {"own": _own_above(table), "own, by interaction": _own_above(interaction)}


def _own_above(table: np.ndarray) -> float:
    others = table[~np.eye(len(table), dtype=bool)].reshape(len(table), -1)
    return _above(table.diagonal()[:, None], others)


def _rows(stream: list[torch.Tensor], index: Any) -> list[torch.Tensor]:
    return [values[index] for values in stream]


def _repeated(stream: list[torch.Tensor], index: int, times: int) -> list[torch.Tensor]:
    """A row as often as that, without copies."""
    return [values[index].expand(times, *values.shape[1:]) for values in stream]


def _look(
    encoder: EVACapEncoder,
    heard: list[torch.Tensor],
    seen: list[torch.Tensor],
    batch_size: int,
    device: torch.device,
) -> list[np.ndarray]:
    """The entropies (clips, heads, T_a), in [0, 1], and the gates (clips, T_a).

    With a matching head also the agreement of the clips (clips,) and of their time steps (clips, T).
    """
    parts = []
    for batch in zip(*(values.split(batch_size) for values in (*heard, *seen))):
        batch = [values.to(device) for values in batch]
        (sound, *audio_caption), (picture, *video_caption) = batch[: len(heard)], batch[len(heard) :]
        audio, video = (EVACapEncoderOutput(last_hidden_state=tokens) for tokens in (sound, picture))
        opening, matched = encoder.match(audio, video)
        encoder.enrich(audio, video, *audio_caption, *video_caption)
        outputs = encoder.fuse(audio, video, opening, output_attentions=True)
        weights = outputs.cross_attentions
        entropy = (torch.special.entr(weights).sum(-1) / np.log(weights.shape[-1])).clamp(0, 1)
        part = [entropy, outputs.fusion_gate]
        part += [matched[name] for name in ("agreement", "agreement_by_step") if name in matched]
        parts.append([figure.double().cpu() for figure in part])
    return [torch.cat(figure).numpy() for figure in zip(*parts)]


def _above(higher: np.ndarray, lower: np.ndarray) -> float:
    return float((higher > lower).mean() + (higher == lower).mean() / 2)


def _summary(entropies: np.ndarray) -> np.ndarray:
    """Mean, deviation and minimum of each clip, (clips, 3 · heads)."""
    return np.concatenate([entropies.mean(2), entropies.std(2), entropies.min(2)], 1)


def _fitted(own: np.ndarray, swapped: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The output of a linear discriminant with a ridge for held-out clips: `(own, swapped)`, (clips,) each."""
    scores = np.empty((2, len(own)))
    half = np.arange(len(own)) % 2 == 0
    for seen in (half, ~half):
        known = np.concatenate([own[seen], swapped[seen]])
        centre, scale = known.mean(0), known.std(0) + 1e-9
        one, other = ((values - centre) / scale for values in (own, swapped))
        within = np.cov(np.concatenate([values[seen] - values[seen].mean(0) for values in (one, other)]).T)
        direction = np.linalg.solve(within + RIDGE * np.eye(len(within)), one[seen].mean(0) - other[seen].mean(0))
        # The two readouts have different scales.
        spread = np.concatenate([one[seen], other[seen]]) @ direction
        for place, values in enumerate((one, other)):
            scores[place, ~seen] = (values[~seen] @ direction - spread.mean()) / (spread.std() + 1e-9)
    return scores[0], scores[1]


def _describe_gate(fusion: EVACapGatedCrossAttention, gates: np.ndarray) -> dict[str, float]:
    figures: dict[str, float] = {}
    if fusion.gate_type in ("entropy", "agreement"):
        figures = {"weight": fusion.gate_weight.item(), "bias": fusion.gate_bias.item()}
    return figures | {
        "mean": float(gates.mean()),
        "deviation over tokens": float(gates.std()),
        "deviation over clips": float(gates.mean(1).std()),
        "below 0.05": float((gates < 0.05).mean()),
        "above 0.95": float((gates > 0.95).mean()),
    }

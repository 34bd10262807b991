"""Named configurations: the rows of the paper's tables, each with its processing."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .configuration_evacap import EVACapConfig


PAPER_PROCESSING = {"window_type": "hamming", "channels": "average", "frame_sampling": "uniform"}
"""Hamming window and frames uniformly over the clip (paper); stereo is averaged (ours)."""

AVCAP_PROCESSING = {"window_type": "hanning", "channels": "first", "frame_sampling": "middle", "fps": 2}
"""Hann window, first channel, and the middle run of the frames of a clip sampled twice a second (AVCap)."""

LAVCAP_PROCESSING = {"window_type": "hanning", "channels": "first", "frame_sampling": "uniform", "fps": 2}
"""Hann window, first channel, and frames uniformly over a clip sampled twice a second (LAVCap; the instants are ours)."""


@dataclass(frozen=True)
class Preset:
    """A variant of the model.

    Args:
        description (`str`): A description of one line.
        fusion (`dict`): The fields of [`EVACapConfig`] that define it.
        processing (`Mapping`): `window_type` and `channels` of the feature extractor, `frame_sampling` and optionally
            `fps` of the video processor.
    """

    description: str
    fusion: Mapping[str, Any]
    processing: Mapping[str, Any]

    def config(self, **fields: Any) -> EVACapConfig:
        """The configuration at the paper's size; `fields` are further fields of [`EVACapConfig`]."""
        return EVACapConfig(**{**self.fusion, **fields})


AGREEMENT = {"gate_type": "agreement", "matching_weight": 0.25, "hearing_weight": 1.0}

PRESETS = {
    "audio-only": Preset("the sound alone (the paper's lower bound)", {"fusion_type": "audio_only"}, PAPER_PROCESSING),
    "avcap": Preset(
        "AVCap: the decoder reads the tokens of both streams", {"fusion_type": "concat"}, AVCAP_PROCESSING
    ),
    "evacap": Preset("EVACap: entropy-gated cross-attention", {"gate_type": "entropy"}, PAPER_PROCESSING),
    "evacap-agreement": Preset(
        "EVACap whose gate is shut where a matching head finds that the picture does not belong to the sound (ours)",
        AGREEMENT,
        PAPER_PROCESSING,
    ),
    "evacap-case": Preset(
        "EVACap behind CAE-AV's CASE: before the fusion each stream reads what a model of it alone says of the clip",
        {"gate_type": "entropy", "enrichment": "case"},
        PAPER_PROCESSING,
    ),
    "evacap-caste": Preset(
        "EVACap behind CAE-AV's CASTE: each stream is enriched where it agrees with the other, before the fusion",
        {"gate_type": "entropy", "enrichment": "caste"},
        PAPER_PROCESSING,
    ),
    "evacap-caste-losses": Preset(
        "EVACap with agreement behind CASTE, and objectives after CAE-AV: contrast with captions, agreement, entropy (ours)",
        {
            **AGREEMENT,
            "enrichment": "caste",
            "caption_contrast_weight": 0.1,
            "entropy_weight": 0.1,
        },
        PAPER_PROCESSING,
    ),
    "evacap-learned-gate": Preset(
        "a learned gate instead of the entropy's (the paper's w/o E)", {"gate_type": "learned"}, PAPER_PROCESSING
    ),
    "evacap-ungated": Preset(
        "cross-attention without a gate (the paper's w/o G)", {"gate_type": "none"}, PAPER_PROCESSING
    ),
    "late-concat": Preset(
        "a captioner of pictures and one of sounds with the same decoder, which reads the tokens of both (DALI)",
        {"fusion_type": "late_concat"},
        PAPER_PROCESSING,
    ),
    "lavcap": Preset(
        "LAVCap's fusion: one token a time step and one a picture, aligned by optimal transport",
        {
            "fusion_type": "optimal_transport",
            "audio_pooling": "frequency",
            "video_pooling": "frame",
            "num_joint_layers": 0,
        },
        LAVCAP_PROCESSING,
    ),
    "vact": Preset(
        "a decoder that weighs sound and picture for each word (ours, after the idea of V-ACT)",
        {"fusion_type": "concat", "num_joint_layers": 0, "text_fusion": "adaptive"},
        PAPER_PROCESSING,
    ),
    "video-only": Preset(
        "the picture alone (AVCap's `video_captioning`, not in the paper)",
        {"fusion_type": "video_only"},
        AVCAP_PROCESSING,
    ),
}


def get_preset(name: str) -> Preset:
    """Returns the preset called `name`.

    Raises:
        ValueError: If there is no such preset; the message lists the names.
    """
    if name not in PRESETS:
        raise ValueError(f"There is no preset {name!r}, but it must be one of {', '.join(map(repr, PRESETS))}.")
    return PRESETS[name]

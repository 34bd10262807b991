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
"""From a batch of inputs to captions, and to what the model tells besides: gate, agreement, confidence, transport."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from .processing_evacap import EVACapProcessor


STREAMS = (
    "input_features",
    "input_features_mask",
    "pixel_values_videos",
    "pixel_values_videos_mask",
    "video_features",
    "audio_caption_ids",
    "video_caption_ids",
)
"""The inputs of the encoder."""


@dataclass(frozen=True)
class CaptionedBatch:
    """The captions of a batch.

    Args:
        texts (`list[list[str]]`): The captions of each clip, `num_return_sequences` of them.
        gate, entropy (`torch.Tensor` of shape `(batch_size, steps)`, *optional*): Fusion gate and attention entropy of
            each audio time step, means over the mel rows; float64, on the CPU. `None` where they were not asked for.
        agreement (`torch.Tensor` of shape `(batch_size,)`, *optional*), agreement_by_step (`torch.Tensor` of shape
            `(batch_size, steps)`, *optional*): The probability that the picture belongs to the sound, of each clip and
            of each audio time step; NaN where there is nothing to see. The same holds.
        words (`list[list[list[dict]]]`, *optional*): Of each caption of each clip the words, `{"word": str, "audio":
            float, "video": float}` with the confidence in sound and picture, means over the tokens of a word.
        transport (`torch.Tensor` of shape `(batch_size, steps, pictures)`, *optional*): The mass that the transport plan
            moves between each audio time step and each picture; float64, on the CPU.
    """

    texts: list[list[str]]
    gate: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    agreement: torch.Tensor | None = None
    agreement_by_step: torch.Tensor | None = None
    words: list[list[list[dict[str, Any]]]] | None = None
    transport: torch.Tensor | None = None


def has_gate(config: PreTrainedConfig) -> bool:
    """Whether a model of this configuration has a fusion gate."""
    return config.fusion_type == "gated_cross_attention"


def require_gate(config: PreTrainedConfig) -> None:
    """Checks that a model has a fusion gate.

    Raises:
        ValueError: If a model of this configuration has none.
    """
    if not has_gate(config):
        raise ValueError(f"`return_gate=True`, but a model with fusion_type={config.fusion_type!r} has no gate.")


def has_agreement(config: PreTrainedConfig) -> bool:
    """Whether a model of this configuration says how far the picture belongs to the sound."""
    return has_gate(config) and config.gate_type == "agreement"


def require_agreement(config: PreTrainedConfig) -> None:
    """Refuses a model that does not say how far the picture belongs to the sound.

    Raises:
        ValueError: If a model of this configuration does not say how far the picture belongs to the sound.
    """
    if not has_agreement(config):
        found = f"gate_type={config.gate_type!r}" if has_gate(config) else f"fusion_type={config.fusion_type!r}"
        raise ValueError(f"The agreement of sound and picture needs a model with gate_type='agreement', not {found}.")


def reads_captions(config: PreTrainedConfig) -> bool:
    """Whether a model of this configuration reads a caption of each stream beside sound and picture."""
    return config.enrichment == "case"


def has_confidence(config: PreTrainedConfig) -> bool:
    """Whether a model of this configuration weighs sound and picture for each word."""
    return config.text_fusion == "adaptive"


def require_confidence(config: PreTrainedConfig) -> None:
    """Refuses a model that does not weigh sound and picture for each word.

    Raises:
        ValueError: If a model of this configuration does not.
    """
    if not has_confidence(config):
        raise ValueError(
            f"The confidence of words needs a model with text_fusion='adaptive', not {config.text_fusion!r}."
        )


def has_transport(config: PreTrainedConfig) -> bool:
    """Whether a model of this configuration aligns sound and picture by optimal transport."""
    return config.fusion_type == "optimal_transport"


def require_transport(config: PreTrainedConfig) -> None:
    """Refuses a model that does not align sound and picture by optimal transport.

    Raises:
        ValueError: If a model of this configuration does not.
    """
    if not has_transport(config):
        raise ValueError(
            f"The transport plan needs a model with fusion_type='optimal_transport', not {config.fusion_type!r}."
        )


def words_with_confidence(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], confidence: list[list[float]]
) -> list[dict[str, Any]]:
    """The words of a caption as in [`CaptionedBatch`]; special tokens are left out, and a token `##…` goes on with a word.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
        ids (`list[int]`): The tokens of the caption.
        confidence (`list[list[float]]`): The confidence in sound and picture with which each of them was predicted.
    """
    words: list[tuple[str, list[list[float]]]] = []
    for token, token_id, pair in zip(tokenizer.convert_ids_to_tokens(ids), ids, confidence):
        if token_id in tokenizer.all_special_ids:
            continue
        if token.startswith("##") and words:
            words[-1] = (words[-1][0] + token[2:], [*words[-1][1], pair])
        else:
            words.append((token, [pair]))
    return [
        {"word": word, "audio": fmean(audio for audio, _ in pairs), "video": fmean(video for _, video in pairs)}
        for word, pairs in words
    ]


def time_map(config: PreTrainedConfig, transport_map: torch.Tensor) -> torch.Tensor:
    """The transport plan of tokens (batch_size, T_a, T_v) as one of time steps and pictures (batch_size, steps, pictures)."""
    by_step = transport_map.unflatten(1, (config.audio_rows, -1)).sum(1)
    return by_step.unflatten(2, (-1, config.tokens_per_picture)).sum(3)


@torch.no_grad()
def caption_batch(
    model: PreTrainedModel,
    processor: EVACapProcessor,
    inputs: Mapping[str, torch.Tensor],
    return_gate: bool = False,
    return_agreement: bool = False,
    return_confidence: bool = False,
    return_transport: bool = False,
    **generate_kwargs: Any,
) -> CaptionedBatch:
    """Captions a batch: encodes it, generates, decodes the tokens, and averages the gate of each time step.

    Args:
        model ([`EVACapForConditionalGeneration`]): The captioner.
        processor ([`EVACapProcessor`]): Its processor.
        inputs (`Mapping[str, torch.Tensor]`): A batch on the model's device, of which `STREAMS` are read.
        return_gate (`bool`, *optional*, defaults to `False`): Whether gate and entropy are wanted.
        return_agreement (`bool`, *optional*, defaults to `False`): Whether the agreement of sound and picture is wanted.
        return_confidence (`bool`, *optional*, defaults to `False`): Whether the words with their confidence in sound and
            picture are wanted. They take one more pass of the decoder, over the finished captions.
        return_transport (`bool`, *optional*, defaults to `False`): Whether the transport plan is wanted.
        generate_kwargs: Arguments of `generate`.

    Raises:
        ValueError: If something is asked for that the model does not have. It does not run then.
    """
    inputs = {name: inputs[name] for name in STREAMS if name in inputs}
    if return_gate:
        require_gate(model.config)
    if return_agreement:
        require_agreement(model.config)
    if return_confidence:
        require_confidence(model.config)
    if return_transport:
        require_transport(model.config)
    if return_gate or return_agreement or return_confidence or return_transport:
        encoder_outputs = model.get_encoder()(**inputs, return_dict=True)
        # The inputs as well, for an assistant that has an encoder of its own.
        tokens = model.generate(**inputs, encoder_outputs=encoder_outputs, **generate_kwargs)
    else:
        tokens = model.generate(**inputs, **generate_kwargs)
    if isinstance(tokens, ModelOutput):
        tokens = tokens.sequences
    texts = [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]
    batch_size = len(next(iter(inputs.values())))
    sequences = len(texts) // batch_size

    def by_clip(captions: list) -> list[list]:
        return [captions[first : first + sequences] for first in range(0, len(captions), sequences)]

    curves: dict[str, Any] = {}
    if return_gate:
        steps = inputs["input_features"].shape[1] // model.config.audio_config.patch_size
        curves["gate"], curves["entropy"] = (
            # Tokens are numbered by mel row, then by time step.
            curve.cpu().double().unflatten(1, (-1, steps)).mean(1)
            for curve in (encoder_outputs.fusion_gate, encoder_outputs.attention_entropy)
        )
    if return_agreement:
        curves["agreement"] = encoder_outputs.agreement.cpu().double()
        curves["agreement_by_step"] = encoder_outputs.agreement_by_step.cpu().double()
    if return_confidence:
        # The state of each token predicts the next one.
        scored = model(encoder_outputs=encoder_outputs, decoder_input_ids=tokens[:, :-1], use_cache=False)
        pairs = zip(tokens[:, 1:].tolist(), scored.confidence.tolist(), strict=True)
        curves["words"] = by_clip([words_with_confidence(processor.tokenizer, *pair) for pair in pairs])
    if return_transport:
        found = encoder_outputs.transport_map
        if found is None:
            steps = encoder_outputs.last_hidden_state.shape[1] // model.config.audio_rows
            curves["transport"] = torch.zeros(batch_size, steps, 0, dtype=torch.float64)
        else:
            curves["transport"] = time_map(model.config, found).cpu().double()
    return CaptionedBatch(by_clip(texts), **curves)


__all__ = [
    "CaptionedBatch",
    "caption_batch",
    "has_agreement",
    "has_confidence",
    "has_gate",
    "has_transport",
    "reads_captions",
    "require_agreement",
    "require_confidence",
    "require_gate",
    "require_transport",
    "time_map",
    "words_with_confidence",
]

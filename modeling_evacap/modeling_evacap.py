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
"""PyTorch EVACap model: audio-visual captioning with entropy-gated cross-attention."""

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPVisionModelWithProjection
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPooling,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple, logging
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .adaptive_evacap import CONFIDENCE_BIAS, EVACapAdaptiveAttention, EVACapTextSelfAttention
from .attention_evacap import (
    EVACapTextAttention,
    all_where_none,
    blockwise_attention_forward,
    by_caption,
    by_clip,
    eager_attention_forward,
)
from .configuration_evacap import (
    LOSS_WEIGHTS,
    EVACapAudioConfig,
    EVACapCEDConfig,
    EVACapCLIPConfig,
    EVACapConfig,
    EVACapTextConfig,
    EVACapVideoConfig,
)
from .contrast_evacap import INITIAL_TEMPERATURE, EVACapContrastHead
from .enrichment_evacap import EVACapCASEStream, EVACapCASTEBlock, EVACapEnrichment
from .fusion_evacap import EVACapGatedCrossAttention
from .loss_evacap import gate_stability, heard_words, label_smoothed_kl, picture_entropy, semantic_consistency
from .matching_evacap import EVACapMatchingHead, match_in_batch, mean_and_max, picture_of_step
from .transport_evacap import INITIAL_SCALE, EVACapOptimalTransport, unit_length
from .versions_evacap import tested_versions


logger = logging.get_logger(f"transformers.{__name__}")

# Tokens of the longest caption, with [CLS] and [SEP] (AVCap).
MAX_CAPTION_LENGTH = 40

# Transformers calls it `cache` from 5.24 on, `past_key_values` before: in outputs as it does, as an argument either
# way, with its own warning of the old name where the new one is known.
CACHE_FIELD = "cache" if "cache" in {field.name for field in fields(Seq2SeqLMOutput)} else "past_key_values"
takes_both_cache_names = deprecate_kwarg(
    "past_key_values", version="5.40.0" if CACHE_FIELD == "cache" else "5.0.0", new_name="cache"
)

# Further keyword arguments that Transformers passes to a model, for its attention kernels or its loss.
PASSED_THROUGH = frozenset(
    {"output_attentions", "output_hidden_states", "return_dict", "num_items_in_batch", "is_causal"}
    | {f"{name}_{side}" for name in ("cu_seq_lens", "max_length") for side in "qk"}
)

# The standard deviation over the picture, of normalised pixel values, up to which a frame shows nothing: about 2 of 255.
UNIFORM_PICTURE = 0.03

# Tokens that pass an MLP at a time on a CPU: its inner results then take 11 MB in float32 at the paper's width.
ROWS_AT_ONCE = 896


@dataclass
class EVACapEncoderOutput(BaseModelOutput):
    r"""Output of [`EVACapEncoder`].

    T_a and T_v are the numbers of audio and video tokens. T is the length of the fused sequence: T_a, or T_a + T_v for
    `"concat"`, `"late_concat"` and `"optimal_transport"`, or T_v for `"video_only"`.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch_size, T, hidden_size)`): The fused sequence.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*): With `output_hidden_states=True`, the embeddings and the
            output of each block, of the audio tower (of the video tower for `"video_only"`), then of the joint blocks;
            `last_hidden_state` instead of the last of them.
        attentions (`tuple(torch.FloatTensor)`, *optional*): With `output_attentions=True`, the self-attention
            probabilities of the same blocks.
        cross_attentions (`torch.FloatTensor` of shape `(batch_size, num_heads, T_a, T_v)`, *optional*): With
            `output_attentions=True`, the attention probabilities of the fusion (paper, equation 1).
        video_hidden_states (`tuple(torch.FloatTensor)`, *optional*): As `hidden_states`, for a video tower beside an
            audio tower; with `"late_concat"` also for the video stream's joint blocks.
        video_attentions (`tuple(torch.FloatTensor)`, *optional*): As `attentions`, for the same blocks.
        attention_mask (`torch.BoolTensor` of shape `(batch_size, T)`, *optional*): `True` for tokens that exist;
            `None` if all exist.
        fusion_gate (`torch.FloatTensor` of shape `(batch_size, T_a)`, *optional*): The gate g in [0, 1] of each audio
            token, index = mel row · time steps + time step: 0 ignores the picture (paper, equation 3). `None`
            without `"gated_cross_attention"`.
        attention_entropy (`torch.FloatTensor` of shape `(batch_size, T_a)`, *optional*): The normalised entropy E in
            [0, 1] of each audio token's attention to the picture, mean over heads (paper, equation 2).
        agreement (`torch.FloatTensor` of shape `(batch_size,)`, *optional*): With `gate_type="agreement"`: the
            probability that the picture belongs to the sound. Not a number where there is nothing to see: without a
            picture, and where all of it is uniform, as a black screen is.
        agreement_by_step (`torch.FloatTensor` of shape `(batch_size, time_steps)`, *optional*): The same for each time
            step of the audio.
        matching_loss (`torch.FloatTensor` of shape `(1,)`, *optional*): With `picture_index`: the loss of the matching
            head.
        audio_summary (`torch.FloatTensor` of shape `(batch_size, 2 * hidden_size)`, *optional*): In training with a
            `hearing_weight` or a `caption_contrast_weight`: mean and maximum over the audio tower's tokens.
        video_summary (`torch.FloatTensor` of shape `(batch_size, 2 * video_hidden_size)`, *optional*): In training with a
            `caption_contrast_weight`: the same of the video tower; not a number for a clip without a picture.
        transport_map (`torch.FloatTensor` of shape `(batch_size, T_a, T_v)`, *optional*): With `"optimal_transport"`:
            the transport plan of audio and video tokens, which sums to 1; zeros for a clip without a picture.
        transport_loss (`torch.FloatTensor` of shape `(1,)`, *optional*): With `"optimal_transport"`: its loss.
        video_token_mask (`torch.BoolTensor` of shape `(batch_size, T)`, *optional*): With `"concat"` and a picture: the
            tokens of the picture.
    """

    cross_attentions: torch.FloatTensor | None = None
    video_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    video_attentions: tuple[torch.FloatTensor, ...] | None = None
    attention_mask: torch.Tensor | None = None
    fusion_gate: torch.FloatTensor | None = None
    attention_entropy: torch.FloatTensor | None = None
    agreement: torch.FloatTensor | None = None
    agreement_by_step: torch.FloatTensor | None = None
    matching_loss: torch.FloatTensor | None = None
    audio_summary: torch.FloatTensor | None = None
    video_summary: torch.FloatTensor | None = None
    transport_map: torch.FloatTensor | None = None
    transport_loss: torch.FloatTensor | None = None
    video_token_mask: torch.Tensor | None = None


@dataclass
class EVACapDecoderOutput(BaseModelOutputWithPastAndCrossAttentions):
    r"""Output of [`EVACapDecoder`].

    Args:
        confidence (`torch.FloatTensor` of shape `(text_batch_size, length, 2)`, *optional*): With
            `text_fusion="adaptive"`: the confidence κ in sound and in picture, from 0 to 1, with which the state of each
            text token predicts the next one; mean over the layers, in float32. That in the picture is exactly 0 for a
            clip without one.
    """

    confidence: torch.FloatTensor | None = None


@dataclass
class EVACapFeaturesOutput(BaseModelOutputWithPooling):
    r"""The tokens of one tower, with their mean as `pooler_output` (ours).

    Args:
        attention_mask (`torch.BoolTensor` of shape `(batch_size, T)`, *optional*): `True` for tokens that exist;
            `None` where all do. The mean is taken over these.
    """

    attention_mask: torch.Tensor | None = None


@dataclass
class EVACapSeq2SeqModelOutput(Seq2SeqModelOutput):
    r"""A [`Seq2SeqModelOutput`] with the outputs of the fusion.

    Args:
        encoder_attention_mask (`torch.BoolTensor` of shape `(batch_size, T)`, *optional*): As `attention_mask` of
            [`EVACapEncoderOutput`].
        fusion_gate, attention_entropy (`torch.FloatTensor` of shape `(batch_size, T_a)`, *optional*), agreement
            (`torch.FloatTensor` of shape `(batch_size,)`, *optional*), agreement_by_step (`torch.FloatTensor` of shape
            `(batch_size, time_steps)`, *optional*), matching_loss (`torch.FloatTensor` of shape `(1,)`, *optional*),
            audio_summary (`torch.FloatTensor` of shape `(batch_size, 2 * hidden_size)`, *optional*), video_summary
            (`torch.FloatTensor` of shape `(batch_size, 2 * video_hidden_size)`, *optional*), transport_map
            (`torch.FloatTensor` of shape `(batch_size, T_a, T_v)`, *optional*), transport_loss (`torch.FloatTensor` of
            shape `(1,)`, *optional*): As in [`EVACapEncoderOutput`].
        confidence (`torch.FloatTensor` of shape `(text_batch_size, length, 2)`, *optional*): As in
            [`EVACapDecoderOutput`].
    """

    encoder_attention_mask: torch.Tensor | None = None
    fusion_gate: torch.FloatTensor | None = None
    attention_entropy: torch.FloatTensor | None = None
    agreement: torch.FloatTensor | None = None
    agreement_by_step: torch.FloatTensor | None = None
    matching_loss: torch.FloatTensor | None = None
    audio_summary: torch.FloatTensor | None = None
    video_summary: torch.FloatTensor | None = None
    transport_map: torch.FloatTensor | None = None
    transport_loss: torch.FloatTensor | None = None
    confidence: torch.FloatTensor | None = None


@dataclass
class EVACapSeq2SeqLMOutput(Seq2SeqLMOutput):
    r"""A [`Seq2SeqLMOutput`] with the terms of the `loss` if there are regularisers, for the logs.

    The terms are not weighted, and not divided among the parts of an accumulated batch.

    Args:
        caption_loss (`torch.FloatTensor` of shape `(1,)`, *optional*): [`label_smoothed_kl`].
        gate_stability (`torch.FloatTensor` of shape `(1,)`, *optional*): [`gate_stability`], where its weight is
            above 0 and there is a gate.
        semantic_consistency (`torch.FloatTensor` of shape `(1,)`, *optional*): [`semantic_consistency`], where its
            weight is above 0 and a video of the batch was swapped.
        matching_loss (`torch.FloatTensor` of shape `(1,)`, *optional*): [`matching_loss`] of the clips and of their time
            steps, where its weight is above 0 and there are pictures.
        heard_words (`torch.FloatTensor` of shape `(1,)`, *optional*): [`heard_words`], where its weight is above 0.
        caption_contrast (`torch.FloatTensor` of shape `(1,)`, *optional*): [`caption_contrast`], where its weight is above 0.
        picture_entropy (`torch.FloatTensor` of shape `(1,)`, *optional*): [`picture_entropy`], where its weight is above 0
            and there are pictures.
        transport_loss (`torch.FloatTensor` of shape `(1,)`, *optional*): [`transport_loss`], where its weight is above 0
            and there are pictures.
        confidence (`torch.FloatTensor` of shape `(text_batch_size, length, 2)`, *optional*): As in
            [`EVACapDecoderOutput`].
    """

    caption_loss: torch.FloatTensor | None = None
    gate_stability: torch.FloatTensor | None = None
    semantic_consistency: torch.FloatTensor | None = None
    matching_loss: torch.FloatTensor | None = None
    heard_words: torch.FloatTensor | None = None
    caption_contrast: torch.FloatTensor | None = None
    picture_entropy: torch.FloatTensor | None = None
    transport_loss: torch.FloatTensor | None = None
    confidence: torch.FloatTensor | None = None


def _sincos(positions: torch.Tensor, dim: int) -> torch.Tensor:
    """Sine and cosine codes (n, dim) of `positions` (n,), with MAE's frequencies; an odd `dim` adds a zero column."""
    frequencies = 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angles = positions.to(torch.float64)[:, None] * frequencies
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, dim % 2))


def sincos_position_table(height: int, width: int, dim: int) -> torch.Tensor:
    """The 2-D sine-cosine position table (height · width, dim) of MAE and CAV-MAE.

    Half of the channels encode the column, the other half the row; index = row · width + column.
    """
    columns = _sincos(torch.arange(width), dim // 2).repeat(height, 1)
    rows = _sincos(torch.arange(height), dim - dim // 2).repeat_interleave(width, 0)
    return torch.cat([columns, rows], dim=1).float()


def interpolate_in_time(table: torch.Tensor, num_steps: int, step_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Position codes for `num_steps` time steps from a table of any length, by linear interpolation (ours).

    It interpolates over the steps that exist, so that a padded clip has the same codes as alone.

    Args:
        table (`torch.Tensor` of shape `(table_steps, tokens_per_step, dim)`): The learned table.
        num_steps (`int`): Time steps of the batch.
        step_mask (`torch.BoolTensor` of shape `(batch_size, num_steps)`, *optional*): The steps that exist.

    Returns:
        `torch.Tensor` of shape `(batch_size or 1, num_steps, tokens_per_step, dim)`.
    """
    table_steps = table.shape[0]
    if step_mask is None:
        if num_steps == table_steps:
            return table[None]
        step_mask = torch.ones(1, num_steps, dtype=torch.bool, device=table.device)
    length = step_mask.sum(1, keepdim=True).clamp(min=1)
    rank = (step_mask.cumsum(1) - 1).clamp(min=0)
    position = ((rank + 0.5) * (table_steps / length) - 0.5).clamp(0, table_steps - 1)
    lower = position.floor().long()
    upper = (lower + 1).clamp(max=table_steps - 1)
    weight = (position - lower).to(table.dtype)[..., None, None]
    return torch.lerp(table[lower], table[upper], weight)


class EVACapAttention(nn.Module):
    """Multi-headed bidirectional self-attention of a ViT block."""

    def __init__(self, config: EVACapAudioConfig | EVACapVideoConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        query = self.q_proj(hidden_states).view(heads).transpose(1, 2)
        if (
            self.config._attn_implementation == "sdpa"
            and query.device.type == "cpu"
            and query.dtype == torch.bfloat16
            and not torch.is_grad_enabled()
            # A compiled graph would unroll every block.
            and not torch.compiler.is_compiling()
        ):
            attention_interface = blockwise_attention_forward
        output, weights = attention_interface(
            self,
            query,
            self.k_proj(hidden_states).view(heads).transpose(1, 2),
            self.v_proj(hidden_states).view(heads).transpose(1, 2),
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.reshape(hidden_states.shape)), weights


class EVACapMLP(nn.Module):
    def __init__(self, config: EVACapAudioConfig | EVACapVideoConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # An exported graph would hold the pieces of one batch size.
        exporting = torch.compiler.is_exporting()
        if hidden_states.device.type == "cpu" and not torch.is_grad_enabled() and not exporting:
            # For results of many megabytes the system would map new memory pages in every call.
            pieces = hidden_states.flatten(0, -2).split(ROWS_AT_ONCE)
            return torch.cat([self._feed_forward(piece) for piece in pieces]).view_as(hidden_states)
        return self._feed_forward(hidden_states)

    def _feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class EVACapEncoderLayer(GradientCheckpointingLayer):
    """A pre-norm ViT block."""

    def __init__(self, config: EVACapAudioConfig | EVACapVideoConfig):
        super().__init__()
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = EVACapAttention(config)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = EVACapMLP(config)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> torch.Tensor:
        attention_output, _ = self.self_attn(self.layernorm_before(hidden_states), attention_mask, **kwargs)
        hidden_states = hidden_states + attention_output
        return hidden_states + self.mlp(self.layernorm_after(hidden_states))


class _PatchProjection:
    """A convolution whose kernels do not overlap, as one matrix product.

    In bfloat16 that is several times as fast, and as the channels of its result lie together, so do those of all blocks:
    with a convolution's own layout each layer norm would make a copy.
    """

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        dims = len(self.kernel_size)
        for dim, size in enumerate(self.kernel_size):
            inputs = inputs.unflatten(2 + 2 * dim, (-1, size))
        positions, kernels = range(2, 2 + 2 * dims, 2), range(3, 3 + 2 * dims, 2)
        patches = inputs.permute(0, *positions, 1, *kernels).flatten(1 + dims)
        return F.linear(patches, self.weight.flatten(1), self.bias).movedim(-1, 1)


class EVACapPatchProjection2d(_PatchProjection, nn.Conv2d):
    """Projects square patches (batch_size, channels, height, width) to (batch_size, hidden_size, rows, columns)."""


class EVACapPatchProjection3d(_PatchProjection, nn.Conv3d):
    """Projects tubelets (batch_size, channels, frames, height, width) to (batch_size, hidden_size, steps, rows, columns)."""


class EVACapAudioEmbeddings(nn.Module):
    """Cuts the (mel × time) picture in square patches; token index = mel row · time steps + time step (AVCap)."""

    def __init__(self, config: EVACapAudioConfig):
        super().__init__()
        self.config = config
        self.num_rows = config.num_mel_bins // config.patch_size
        self.num_steps = config.max_frames // config.patch_size
        self.patch_embeddings = EVACapPatchProjection2d(
            1, config.hidden_size, config.patch_size, stride=config.patch_size
        )
        self.position_embeddings = nn.Parameter(torch.empty(self.num_rows * self.num_steps, config.hidden_size))
        self.modality_embedding = nn.Parameter(torch.empty(config.hidden_size))

    def forward(
        self, input_features: torch.Tensor, frame_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        config = self.config
        if input_features.ndim != 3 or input_features.shape[2] != config.num_mel_bins:
            raise ValueError(
                f"`input_features` has shape {tuple(input_features.shape)}, but it must be (batch_size, frames, "
                f"{config.num_mel_bins}): normalised log-mel features as the feature extractor of this checkpoint "
                "makes them."
            )
        if input_features.shape[1] == 0 or input_features.shape[1] % config.patch_size:
            raise ValueError(
                f"`input_features` has {input_features.shape[1]} frames, but it must have a multiple of "
                f"{config.patch_size}; the feature extractor pads to {config.max_frames}."
            )
        input_features, step_mask = _mask_frames("input_features_mask", input_features, frame_mask, config.patch_size)
        token_mask = None if step_mask is None else step_mask.repeat(1, self.num_rows)
        weight = self.patch_embeddings.weight
        patches = self.patch_embeddings(input_features.to(weight.dtype).transpose(1, 2)[:, None])
        table = self.position_embeddings.unflatten(0, (self.num_rows, self.num_steps)).transpose(0, 1)
        positions = interpolate_in_time(table, patches.shape[3], step_mask).transpose(1, 2).flatten(1, 2)
        return patches.flatten(2).transpose(1, 2) + positions + self.modality_embedding, token_mask


class EVACapVideoEmbeddings(nn.Module):
    """Cuts the clip in tubelets; token index = time · tokens per frame + row · columns + column (AVCap)."""

    def __init__(self, config: EVACapVideoConfig):
        super().__init__()
        self.config = config
        self.num_steps = config.num_frames // config.tubelet_size
        self.grid_size = config.image_size // config.patch_size
        kernel = (config.tubelet_size, config.patch_size, config.patch_size)
        self.patch_embeddings = EVACapPatchProjection3d(config.num_channels, config.hidden_size, kernel, stride=kernel)
        self.position_embeddings = nn.Parameter(torch.empty(self.num_steps * self.grid_size**2, config.hidden_size))
        self.modality_embedding = nn.Parameter(torch.empty(config.hidden_size))

    def forward(
        self, pixel_values: torch.Tensor, frame_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        config = self.config
        frame = (config.num_channels, config.image_size, config.image_size)
        if pixel_values.ndim != 5 or pixel_values.shape[2:] != frame:
            raise ValueError(
                f"`pixel_values_videos` has shape {tuple(pixel_values.shape)}, but it must be (batch_size, frames, "
                f"{frame[0]}, {frame[1]}, {frame[2]}): normalised frames as the video processor of this checkpoint "
                "makes them."
            )
        if pixel_values.shape[1] == 0 or pixel_values.shape[1] % config.tubelet_size:
            raise ValueError(
                f"`pixel_values_videos` has {pixel_values.shape[1]} frames, but it must have a multiple of "
                f"{config.tubelet_size}, the tubelet size; the video processor repeats the last frame to get there."
            )
        pixel_values, step_mask = _mask_frames(
            "pixel_values_videos_mask", pixel_values, frame_mask, config.tubelet_size
        )
        token_mask = None if step_mask is None else step_mask.repeat_interleave(self.grid_size**2, 1)
        patches = self.patch_embeddings(pixel_values.to(self.patch_embeddings.weight.dtype).transpose(1, 2))
        table = self.position_embeddings.unflatten(0, (self.num_steps, -1))
        positions = interpolate_in_time(table, patches.shape[2], step_mask).flatten(1, 2)
        return patches.flatten(2).transpose(1, 2) + positions + self.modality_embedding, token_mask


def _mask_frames(
    name: str, frames: torch.Tensor, mask: torch.Tensor | None, frames_per_step: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Zeroes the frames (rows, frames, …) that do not exist; error messages call the mask `name`.

    Returns:
        The frames, and the time steps (rows, steps) whose frames all exist; `None` without a mask.
    """
    if mask is None:
        return frames, None
    if mask.shape != frames.shape[:2]:
        raise ValueError(
            f"`{name}` has shape {tuple(mask.shape)}, but it must be {tuple(frames.shape[:2])}: one entry a frame, true "
            "where the frame exists."
        )
    mask = mask.bool()
    missing = ~mask.reshape(*mask.shape, *[1] * (frames.ndim - 2))
    return frames.masked_fill(missing, 0), mask.unflatten(1, (-1, frames_per_step)).all(-1)


def _attention_mask(config, hidden_states: torch.Tensor, token_mask: torch.Tensor | None):
    """The mask with which all tokens see the tokens of `token_mask` (batch_size, tokens).

    It has the form of the attention implementation.
    """
    mask = all_where_none(token_mask)
    return create_bidirectional_mask(config=config, inputs_embeds=hidden_states, attention_mask=mask)


class EVACapPreTrainedModel(PreTrainedModel):
    """Weights initialisation, loading and saving."""

    config_class = EVACapConfig
    base_model_prefix = "model"
    main_input_name = "input_features"
    input_modalities = ("audio", "video", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = [
        "EVACapAudioEmbeddings",
        "EVACapVideoEmbeddings",
        "EVACapCEDEmbeddings",
        "EVACapEncoderLayer",
        "EVACapGatedCrossAttention",
        "EVACapMatchingHead",
        "EVACapCASTEBlock",
        "EVACapCASEBlock",
        "EVACapDecoderLayer",
        "EVACapAdaptiveDecoderLayer",
    ]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (EVACapAudioEmbeddings, EVACapVideoEmbeddings)):
            dim = module.config.hidden_size
            if isinstance(module, EVACapAudioEmbeddings):
                table = sincos_position_table(module.num_rows, module.num_steps, dim)
            else:
                table = sincos_position_table(module.grid_size, module.grid_size, dim).repeat(module.num_steps, 1)
            init.copy_(module.position_embeddings, table)
            init.normal_(module.modality_embedding, std=module.config.initializer_range)
        elif isinstance(module, EVACapDecoder) and module.prompt is not None:
            init.normal_(module.prompt, std=module.config.initializer_range)
        elif isinstance(module, EVACapCEDEmbeddings):
            init.normal_(module.time_embeddings, std=module.config.initializer_range)
            init.normal_(module.frequency_embeddings, std=module.config.initializer_range)
        elif isinstance(module, EVACapGatedCrossAttention) and hasattr(module, "gate_weight"):
            init.constant_(module.gate_weight, module.gate_weight_init)
            init.constant_(module.gate_bias, module.gate_bias_init)
        elif isinstance(module, EVACapMatchingHead):
            # Its products of three small numbers would hardly move from 0.
            for layer in module.children():
                init.normal_(layer.weight, std=layer.in_features**-0.5)
        elif isinstance(module, EVACapCASTEBlock):
            init.zeros_(module.scale)
            init.ones_(module.spatial_scale)
            init.ones_(module.temporal_scale)
        elif isinstance(module, EVACapCASEStream):
            init.zeros_(module.scale)
            init.ones_(module.temperature)
        elif isinstance(module, EVACapContrastHead):
            init.constant_(module.temperature, INITIAL_TEMPERATURE)
        elif isinstance(module, EVACapOptimalTransport) and hasattr(module, "logit_scale"):
            init.constant_(module.logit_scale, INITIAL_SCALE)
        elif isinstance(module, EVACapAdaptiveAttention):
            init.zeros_(module.confidence_weight)
            init.copy_(module.confidence_bias, torch.tensor(CONFIDENCE_BIAS))


class EVACapCEDEmbeddings(nn.Module):
    """Normalises each mel bin over the batch, cuts square patches, and adds a code of the time and one of the frequency."""

    def __init__(self, config: EVACapCEDConfig):
        super().__init__()
        self.config = config
        self.num_rows = config.num_mel_bins // config.patch_size
        self.num_steps = config.max_frames // config.patch_size
        # Its running statistics belong to the filterbank that it was trained with last.
        self.input_norm = nn.BatchNorm1d(config.num_mel_bins, momentum=0.01)
        self.patch_embeddings = EVACapPatchProjection2d(
            1, config.hidden_size, config.patch_size, stride=config.patch_size
        )
        self.time_embeddings = nn.Parameter(torch.empty(self.num_steps, config.hidden_size))
        self.frequency_embeddings = nn.Parameter(torch.empty(self.num_rows, config.hidden_size))

    def forward(
        self, input_features: torch.Tensor, frame_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        config = self.config
        num_steps = input_features.shape[1] // config.patch_size if input_features.ndim == 3 else 0
        if not 0 < num_steps <= self.num_steps or input_features.shape[2] != config.num_mel_bins:
            raise ValueError(
                f"`input_features` has shape {tuple(input_features.shape)}, but it must be (batch_size, frames, "
                f"{config.num_mel_bins}) with {config.patch_size} to {self.num_steps * config.patch_size} frames."
            )
        # A remainder of frames is dropped (CED).
        input_features = input_features[:, : num_steps * config.patch_size]
        frame_mask = None if frame_mask is None else frame_mask[:, : input_features.shape[1]]
        features = self.input_norm(input_features.to(self.input_norm.weight.dtype).transpose(1, 2)).transpose(1, 2)
        features, step_mask = _mask_frames("input_features_mask", features, frame_mask, config.patch_size)
        token_mask = None if step_mask is None else step_mask.repeat(1, self.num_rows)
        patches = self.patch_embeddings(features.transpose(1, 2)[:, None]).permute(0, 2, 3, 1)
        codes = self.frequency_embeddings[:, None] + self.time_embeddings[None, :num_steps]
        return (patches + codes).flatten(1, 2), token_mask


class EVACapTower(EVACapPreTrainedModel):
    """A ViT without a final norm (AVCap): embeddings, then `num_hidden_layers` blocks."""

    embeddings_class: type[nn.Module]
    _can_record_outputs = {"hidden_states": EVACapEncoderLayer, "attentions": EVACapAttention}

    def __init__(self, config: EVACapAudioConfig | EVACapVideoConfig):
        super().__init__(config)
        self.embeddings = self.embeddings_class(config)
        self.layers = nn.ModuleList([EVACapEncoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.patch_embeddings = value


class EVACapAudioTower(EVACapTower):
    """The audio ViT, over patches of the filterbank."""

    config_class = EVACapAudioConfig
    embeddings_class = EVACapAudioEmbeddings
    main_input_name = "input_features"
    input_modalities = ("audio",)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self, input_features: torch.Tensor, input_features_mask: torch.Tensor | None = None, **kwargs
    ) -> EVACapEncoderOutput:
        r"""Encodes the sound.

        Args:
            input_features (`torch.FloatTensor` of shape `(batch_size, frames, num_mel_bins)`): Filterbank.
            input_features_mask (`torch.Tensor` of shape `(batch_size, frames)`, *optional*): The frames that exist.
        """
        refuse_unknown(self, kwargs)
        hidden_states, token_mask = self.embeddings(input_features, input_features_mask)
        attention_mask = _attention_mask(self.config, hidden_states, token_mask)
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask, **kwargs)
        return EVACapEncoderOutput(last_hidden_state=hidden_states, attention_mask=token_mask)


class EVACapCEDTower(EVACapAudioTower):
    """CED, the audio tower of LAVCap: a pre-norm ViT with a batch norm before it and a layer norm behind it."""

    config_class = EVACapCEDConfig
    embeddings_class = EVACapCEDEmbeddings

    def __init__(self, config: EVACapCEDConfig):
        super().__init__(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def forward(self, *args: Any, **kwargs: Any) -> EVACapEncoderOutput:
        """As in [`EVACapAudioTower`]."""
        output = super().forward(*args, **kwargs)
        output.last_hidden_state = self.layernorm(output.last_hidden_state)
        return output


class EVACapCLIPTower(EVACapPreTrainedModel):
    """A CLIP vision model as the video tower of LAVCap: one projected vector for each frame."""

    config_class = EVACapCLIPConfig
    main_input_name = "pixel_values_videos"
    input_modalities = ("video",)

    def __init__(self, config: EVACapCLIPConfig):
        super().__init__(config)
        self.clip = CLIPVisionModelWithProjection(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.clip.get_input_embeddings()

    def forward(
        self, pixel_values_videos: torch.Tensor, pixel_values_videos_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> EVACapEncoderOutput:
        r"""Encodes the picture, frame by frame.

        Args:
            pixel_values_videos (`torch.FloatTensor` of shape `(batch_size, frames, channels, height, width)`): Frames.
            pixel_values_videos_mask (`torch.Tensor` of shape `(batch_size, frames)`, *optional*): The frames that exist.
        """
        size = self.config.image_size
        frame = (self.config.num_channels, size, size)
        if pixel_values_videos.ndim != 5 or pixel_values_videos.shape[2:] != frame:
            raise ValueError(
                f"`pixel_values_videos` has shape {tuple(pixel_values_videos.shape)}, but it must be (batch_size, frames, "
                f"{frame[0]}, {frame[1]}, {frame[2]})."
            )
        frames, mask = _mask_frames("pixel_values_videos_mask", pixel_values_videos, pixel_values_videos_mask, 1)
        dtype = self.clip.visual_projection.weight.dtype
        output = self.clip(frames.flatten(0, 1).to(dtype), **{**kwargs, "return_dict": True})

        def by_clip(states: tuple | None) -> tuple | None:
            return None if states is None else tuple(state.unflatten(0, frames.shape[:2]) for state in states)

        return EVACapEncoderOutput(
            last_hidden_state=output.image_embeds.unflatten(0, frames.shape[:2]),
            hidden_states=by_clip(output.hidden_states),
            attentions=by_clip(output.attentions),
            attention_mask=mask,
        )


class EVACapVideoTower(EVACapTower):
    """The video ViT, over tubelets."""

    config_class = EVACapVideoConfig
    embeddings_class = EVACapVideoEmbeddings
    main_input_name = "pixel_values_videos"
    input_modalities = ("video",)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self, pixel_values_videos: torch.Tensor, pixel_values_videos_mask: torch.Tensor | None = None, **kwargs
    ) -> EVACapEncoderOutput:
        r"""Encodes the picture.

        Args:
            pixel_values_videos (`torch.FloatTensor` of shape `(batch_size, frames, channels, height, width)`): Frames.
            pixel_values_videos_mask (`torch.Tensor` of shape `(batch_size, frames)`, *optional*): The frames that
                exist; a tubelet exists if all of its frames do.
        """
        refuse_unknown(self, kwargs)
        hidden_states, token_mask = self.embeddings(pixel_values_videos, pixel_values_videos_mask)
        shape = hidden_states.shape
        if self.config.attention == "frame":
            # Each tubelet is a sequence of its own, and either exists or not. So it needs no mask.
            hidden_states = hidden_states.reshape(-1, self.embeddings.grid_size**2, shape[2])
            attention_mask = None
        else:
            attention_mask = _attention_mask(self.config, hidden_states, token_mask)
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask, **kwargs)
        return EVACapEncoderOutput(last_hidden_state=hidden_states.view(shape), attention_mask=token_mask)


class EVACapJointEncoder(EVACapPreTrainedModel):
    """The blocks and the norm after the fusion (AVCap's `blocks_u` and `norm`)."""

    config_class = EVACapAudioConfig
    main_input_name = "hidden_states"
    _can_record_outputs = {"hidden_states": EVACapEncoderLayer, "attentions": EVACapAttention}

    def __init__(self, config: EVACapAudioConfig | EVACapVideoConfig, num_layers: int):
        super().__init__(config)
        self.layers = nn.ModuleList([EVACapEncoderLayer(config) for _ in range(num_layers)])
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self, hidden_states: torch.Tensor, token_mask: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutput:
        attention_mask = _attention_mask(self.config, hidden_states, token_mask)
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask, **kwargs)
        return BaseModelOutput(last_hidden_state=self.layernorm(hidden_states))


class EVACapEncoder(EVACapPreTrainedModel):
    """The towers, the fusion and the joint blocks: from features to the sequence that the decoder reads."""

    def __init__(self, config: EVACapConfig):
        super().__init__(config)
        self.main_input_name = main_input_name(config)
        if config.fusion_type != "video_only":
            audio_class = EVACapCEDTower if isinstance(config.audio_config, EVACapCEDConfig) else EVACapAudioTower
            self.audio_tower = audio_class(config.audio_config)
        if config.fusion_type != "audio_only":
            video_class = EVACapCLIPTower if config.has_clip_tower else EVACapVideoTower
            self.video_tower = video_class(config.video_config)
        if config.fusion_type == "gated_cross_attention":
            self.fusion = EVACapGatedCrossAttention(config)
        elif config.fusion_type == "optimal_transport":
            self.fusion = EVACapOptimalTransport(config)
        if config.enrichment is not None:
            self.enrichment = EVACapEnrichment(config)
        if config.has_matching_head:
            self.matching_head = EVACapMatchingHead(config)
        if config.has_joint_encoder:
            self.joint = EVACapJointEncoder(config.encoder_config, config.num_joint_layers)
        if config.fusion_type == "late_concat":
            self.video_joint = EVACapJointEncoder(config.video_config, config.num_joint_layers)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_features: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        pixel_values_videos_mask: torch.Tensor | None = None,
        video_features: torch.Tensor | None = None,
        audio_caption_ids: torch.Tensor | None = None,
        video_caption_ids: torch.Tensor | None = None,
        audio_index: torch.Tensor | None = None,
        video_index: torch.Tensor | None = None,
        picture_index: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> EVACapEncoderOutput:
        r"""Encodes sound and picture into the fused sequence.

        Args:
            input_features (`torch.FloatTensor` of shape `(batch_size, frames, num_mel_bins)`): The sound. Every
                `fusion_type` but `"video_only"` needs it.
            pixel_values_videos (`torch.FloatTensor` of shape `(batch_size, frames, channels, height, width)`,
                *optional*): The picture. Without it the gate of a gated model is exactly 0, and `"concat"`,
                `"late_concat"` and `"optimal_transport"` read the audio alone. `"audio_only"` ignores it.
            input_features_mask (`torch.Tensor` of shape `(batch_size, frames)`, *optional*): The filterbank frames
                that exist; all by default (AVCap).
            pixel_values_videos_mask (`torch.Tensor` of shape `(batch_size, frames)`, *optional*): The video frames
                that exist; all by default. A row of zeros is a clip without a picture.
            video_features (`torch.FloatTensor` of shape `(batch_size, frames, video_width)`, *optional*): What the video
                tower would give for each frame, computed before (LAVCap), instead of `pixel_values_videos`; with the same
                mask.
            audio_caption_ids, video_caption_ids (`torch.LongTensor` of shape `(batch_size, length)`, *optional*): The token
                ids of a caption of each sound and of each picture, padded by -100. A model with `enrichment="case"` needs
                both for clips with a picture; others ignore them.
            audio_index, video_index (`torch.LongTensor` of shape `(pairs,)`, *optional*): The rows of `input_features`
                and of `pixel_values_videos` that make each pair, for several pictures to one sound or several sounds
                to one picture; each row passes its tower once. By default row n goes with row n.
            picture_index (`torch.LongTensor` of shape `(pairs,)`, *optional*): The row of `input_features` to which the
                picture of each pair belongs; asks for the loss of the matching head.

        Raises:
            ValueError: If a stream that the variant needs is missing, or if a shape does not fit the configuration.
        """
        fusion_type = self.config.fusion_type
        outputs = {
            "output_attentions": self.config.output_attentions if output_attentions is None else output_attentions,
            "output_hidden_states": (
                self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
            ),
        }
        audio = video = None
        if fusion_type != "video_only":
            if input_features is None:
                raise ValueError(missing_stream(self.config))
            audio = self.hear(input_features, input_features_mask, **outputs)
            _select_rows(audio, audio_index)
        if fusion_type != "audio_only" and (pixel_values_videos is not None or video_features is not None):
            if video_features is None:
                video = self.see(pixel_values_videos, pixel_values_videos_mask, **outputs)
            else:
                video = self._read_features(video_features, pixel_values_videos, pixel_values_videos_mask)
            _select_rows(video, video_index)
            if audio is not None:
                _move(video, audio.last_hidden_state.device)
        if fusion_type == "video_only" and video is None:
            raise ValueError(missing_stream(self.config))

        summaries = self._summarise(audio, video)
        # Before the enrichment: a picture that its sound has enriched would tell that it is its own.
        opening, matched = self.match(audio, video, audio_index, picture_index)
        captions = ((audio_caption_ids, audio_index), (video_caption_ids, video_index))
        self.enrich(audio, video, *(ids if ids is None or index is None else ids[index] for ids, index in captions))

        main = video if audio is None else audio
        hidden_states, token_mask = main.last_hidden_state, main.attention_mask
        fused = EVACapEncoderOutput()
        if fusion_type == "gated_cross_attention":
            fused = self.fuse(audio, video, opening, outputs["output_attentions"])
            hidden_states = fused.last_hidden_state
        elif fusion_type == "optimal_transport":
            fused = self.transport(audio, video)
            hidden_states, token_mask = fused.last_hidden_state, fused.attention_mask
        elif fusion_type == "concat" and video is not None:
            streams = ((stream.last_hidden_state, stream.attention_mask) for stream in (audio, video))
            hidden_states, token_mask = _concatenate(*streams)
            is_video = torch.arange(hidden_states.shape[1], device=hidden_states.device)
            is_video = is_video >= audio.last_hidden_state.shape[1]
            fused.video_token_mask = is_video.expand(hidden_states.shape[0], -1)
        joint = BaseModelOutput(last_hidden_state=hidden_states)
        if self.config.has_joint_encoder:
            joint = self.joint(hidden_states, token_mask, **outputs)

        states = _chain(main.hidden_states, joint.hidden_states and joint.hidden_states[1:])
        beside = video if audio is not None and video is not None else BaseModelOutput()
        if fusion_type == "late_concat" and video is not None:
            seen = self.video_joint(video.last_hidden_state, video.attention_mask, **outputs)
            streams = (seen.last_hidden_state, video.attention_mask), (joint.last_hidden_state, token_mask)
            joint.last_hidden_state, token_mask = _concatenate(*streams)
            beside.hidden_states = _chain(video.hidden_states, seen.hidden_states and seen.hidden_states[1:])
            beside.attentions = _chain(video.attentions, seen.attentions)
        return EVACapEncoderOutput(
            last_hidden_state=joint.last_hidden_state,
            # As elsewhere in Transformers the last one is `last_hidden_state`, also without joint blocks.
            hidden_states=states and (*states[:-1], joint.last_hidden_state),
            attentions=_chain(main.attentions, joint.attentions),
            cross_attentions=fused.cross_attentions,
            video_hidden_states=beside.hidden_states,
            video_attentions=beside.attentions,
            attention_mask=token_mask,
            fusion_gate=fused.fusion_gate,
            attention_entropy=fused.attention_entropy,
            **matched,
            **summaries,
            transport_map=fused.transport_map,
            transport_loss=fused.transport_loss,
            video_token_mask=fused.video_token_mask,
        )

    def _summarise(
        self, audio: EVACapEncoderOutput | None, video: EVACapEncoderOutput | None
    ) -> dict[str, torch.Tensor]:
        """The summaries of the towers that the losses of a training read."""
        contrast, summaries = self.config.caption_contrast_weight > 0, {}
        if self.training and audio is not None and (contrast or self.config.hearing_weight > 0):
            summaries["audio_summary"] = mean_and_max(audio.last_hidden_state, all_where_none(audio.attention_mask), 1)
        if self.training and video is not None and contrast:
            tokens, mask = video.last_hidden_state, video.attention_mask
            exists = tokens.new_ones(len(tokens), 1, dtype=torch.bool) if mask is None else mask.any(1, keepdim=True)
            summary = mean_and_max(tokens, all_where_none(mask), 1)
            summaries["video_summary"] = summary.masked_fill(~exists, torch.nan)
        return summaries

    def enrich(
        self,
        audio: EVACapEncoderOutput | None,
        video: EVACapEncoderOutput | None,
        audio_caption_ids: torch.Tensor | None = None,
        video_caption_ids: torch.Tensor | None = None,
    ) -> None:
        """Enriches the tokens in the outputs of the towers, if `enrichment` says so and there is a picture.

        Args:
            audio, video ([`EVACapEncoderOutput`]): As in [`~EVACapEncoder.fuse`].
            audio_caption_ids, video_caption_ids: See [`~EVACapEncoder.forward`].

        Raises:
            ValueError: If captions are missing or are not one for each pair.
        """
        if self.config.enrichment is None or video is None:
            return
        captions = {"audio_caption_ids": audio_caption_ids, "video_caption_ids": video_caption_ids}
        sound, picture = audio.last_hidden_state, video.last_hidden_state
        for name, ids in captions.items() if self.config.enrichment == "case" else ():
            if ids is None or ids.ndim != 2 or len(ids) != len(sound):
                found = "is missing" if ids is None else f"has shape {tuple(ids.shape)}"
                text = name.removesuffix("_ids")
                raise ValueError(
                    f"`{name}` {found}, but a model with `enrichment='case'` needs ({len(sound)}, length): the token ids of what "
                    f"a model of the {text.removesuffix('_caption')} alone says of each clip, padded by -100. The processor "
                    f"makes them from `{text}s`; in the pipeline and in manifests they are called `{text}`."
                )
        tokens = self.enrichment(sound, picture, audio.attention_mask, video.attention_mask, tuple(captions.values()))
        # Where `device_map` has put the two blocks apart.
        audio.last_hidden_state, video.last_hidden_state = (stream.to(sound.device) for stream in tokens)

    def transport(self, audio: EVACapEncoderOutput, video: EVACapEncoderOutput | None) -> EVACapEncoderOutput:
        """Fuses the tokens of the towers by optimal transport.

        Args:
            audio, video ([`EVACapEncoderOutput`]): As in [`~EVACapEncoder.fuse`].
        """
        if video is None:
            sound = audio.last_hidden_state
            return EVACapEncoderOutput(
                last_hidden_state=unit_length(sound).to(sound.dtype), attention_mask=audio.attention_mask
            )
        streams = (audio.last_hidden_state, video.last_hidden_state)
        output = self.fusion(*streams, audio.attention_mask, video.attention_mask)
        return EVACapEncoderOutput(
            last_hidden_state=output.fused,
            attention_mask=output.mask,
            transport_map=output.transport_map,
            transport_loss=output.loss,
        )

    def fuse(
        self,
        audio: EVACapEncoderOutput,
        video: EVACapEncoderOutput | None,
        opening: torch.Tensor | None = None,
        output_attentions: bool = False,
    ) -> EVACapEncoderOutput:
        """Fuses the tokens of the towers, before the joint blocks.

        Args:
            audio, video ([`EVACapEncoderOutput`]): Outputs of the towers, with one row for each pair; `video` is `None`
                without a picture.
            opening (`torch.Tensor` of shape `(pairs, T_a)`, *optional*): As in [`EVACapGatedCrossAttention`].
            output_attentions (`bool`, *optional*, defaults to `False`): Whether to return the `cross_attentions`.
        """
        sound, token_mask = audio.last_hidden_state, audio.attention_mask
        if video is None:
            gate = sound.new_zeros(sound.shape[:2], dtype=torch.float32)
            return EVACapEncoderOutput(last_hidden_state=sound, fusion_gate=gate, attention_entropy=gate)
        fused, gate, entropy, weights = self.fusion(
            sound, video.last_hidden_state, video.attention_mask, output_attentions, opening
        )
        if token_mask is not None:
            padding = ~token_mask.to(gate.device)
            gate, entropy = gate.masked_fill(padding, 0.0), entropy.masked_fill(padding, 0.0)
        return EVACapEncoderOutput(
            last_hidden_state=fused,
            cross_attentions=weights,
            fusion_gate=gate,
            attention_entropy=entropy,
        )

    def hear(
        self, input_features: torch.Tensor, input_features_mask: torch.Tensor | None = None, **outputs
    ) -> EVACapEncoderOutput:
        """Runs the audio tower, and pools its tokens if `audio_pooling` says so.

        Args:
            input_features, input_features_mask, outputs: Arguments of [`EVACapAudioTower`].
        """
        audio = self.audio_tower(input_features, input_features_mask, **outputs)
        if self.config.audio_pooling == "frequency":
            rows = audio.last_hidden_state.unflatten(1, (self.audio_tower.embeddings.num_rows, -1))
            audio.last_hidden_state = rows.mean(1)
            if audio.attention_mask is not None:
                # A time step exists in all of its mel rows or in none.
                audio.attention_mask = audio.attention_mask[:, : rows.shape[2]]
        return audio

    def see(
        self, pixel_values_videos: torch.Tensor, pixel_values_videos_mask: torch.Tensor | None = None, **outputs
    ) -> EVACapEncoderOutput:
        """Runs the video tower, and pools its tokens if `video_pooling` says so.

        With `gate_type="agreement"`, uniform tubelets, as of a black screen, are removed from its mask, because nothing in
        them could agree or disagree with a sound (ours).

        Args:
            pixel_values_videos, pixel_values_videos_mask, outputs: Arguments of [`EVACapVideoTower`].
        """
        video = self.video_tower(pixel_values_videos, pixel_values_videos_mask, **outputs)
        tokens_per_picture = video.last_hidden_state.shape[1]
        tokens_per_picture //= pixel_values_videos.shape[1] // self.config.video_config.tubelet_size
        if self.config.has_matching_head:
            pixels = pixel_values_videos.to(video.last_hidden_state.device).float()
            pixels = pixels.unflatten(1, (-1, self.config.video_config.tubelet_size))
            seen = (pixels.std((-2, -1)) > UNIFORM_PICTURE).any(-1).any(-1).repeat_interleave(tokens_per_picture, 1)
            video.attention_mask = seen if video.attention_mask is None else video.attention_mask & seen
        if self.config.video_pooling == "frame":
            video.last_hidden_state = video.last_hidden_state.unflatten(1, (-1, tokens_per_picture)).mean(2)
            if video.attention_mask is not None:
                video.attention_mask = video.attention_mask[:, ::tokens_per_picture]
        return video

    def _read_features(
        self, features: torch.Tensor, pixels: torch.Tensor | None, mask: torch.Tensor | None
    ) -> EVACapEncoderOutput:
        """The output of a video tower that ran before."""
        width = self.config.video_width
        if pixels is not None or self.config.tokens_per_picture > 1 or self.config.has_matching_head:
            raise ValueError(
                "`video_features` are for models with one token a frame (`video_pooling='frame'`, or CLIP as video tower), "
                "without `gate_type='agreement'`, and stand instead of `pixel_values_videos`."
            )
        if features.ndim != 3 or features.shape[2] != width or (mask is not None and mask.shape != features.shape[:2]):
            raise ValueError(
                f"`video_features` has shape {tuple(features.shape)}, but it must be (batch_size, frames, {width}), and "
                "`pixel_values_videos_mask`, if there is one, (batch_size, frames)."
            )
        features, mask = _mask_frames("pixel_values_videos_mask", features, mask, 1)
        return EVACapEncoderOutput(last_hidden_state=features, attention_mask=mask)

    def match(
        self,
        audio: EVACapEncoderOutput | None,
        video: EVACapEncoderOutput | None,
        audio_index: torch.Tensor | None = None,
        picture_index: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """Tells how far the picture belongs to the sound, if there is a matching head.

        Args:
            audio, video ([`EVACapEncoderOutput`]): As in [`~EVACapEncoder.fuse`].
            audio_index, picture_index: See [`~EVACapEncoder.forward`].

        Returns:
            How far the gate of each audio token may open (pairs, T_a), `None` for all the way, and the outputs of the head
            by their names in [`EVACapEncoderOutput`].
        """
        config = self.config
        if not config.has_matching_head:
            return None, {}
        sound, num_rows = audio.last_hidden_state, config.audio_rows
        if video is None:
            nothing = sound.new_full((len(sound), sound.shape[1] // num_rows), torch.nan, dtype=torch.float32)
            return None, {"agreement": nothing[:, 0], "agreement_by_step": nothing}
        pictures, seen_tokens = video.last_hidden_state, video.attention_mask
        if seen_tokens is None:
            seen_tokens = torch.ones(pictures.shape[:2], dtype=torch.bool, device=pictures.device)
        streams = (sound, pictures, audio.attention_mask, seen_tokens)
        clip, step = logits = self.matching_head(*streams)
        outputs = {}
        if picture_index is not None:
            sound_index = torch.arange(len(sound), device=sound.device) if audio_index is None else audio_index
            outputs["matching_loss"] = match_in_batch(
                self.matching_head, *streams, *logits, sound_index, picture_index
            )
        both = (clip[:, None] + step) / 2
        if config.matching_weight == 0:
            opening = torch.sigmoid(both)
        elif picture_index is None:
            opening = (torch.sigmoid(both / config.agreement_temperature) >= config.agreement_threshold).to(step.dtype)
        else:
            opening = torch.ones_like(step)
        clip, step = (torch.sigmoid(logit.detach() / config.agreement_temperature) for logit in logits)
        outputs["agreement"] = clip.masked_fill(~seen_tokens.any(1), torch.nan)
        seen = seen_tokens.unflatten(1, (-1, self.matching_head.tokens_per_picture)).any(2)
        known = seen[:, picture_of_step(step.shape[1], seen.shape[1], seen.device)]
        if audio.attention_mask is not None:
            known = known & audio.attention_mask.unflatten(1, (num_rows, -1))[:, 0]
        outputs["agreement_by_step"] = step.masked_fill(~known, torch.nan)
        return opening.repeat(1, num_rows), outputs


def _chain(first: tuple | None, second: tuple | None) -> tuple | None:
    """The recorded states of a tower and of the joint blocks, as far as there are any."""
    return first if first is None or second is None else first + second


def _select_rows(output: EVACapEncoderOutput, index: torch.Tensor | None) -> None:
    """Selects the rows of a tower for the pairs."""
    if index is not None:
        output.last_hidden_state = output.last_hidden_state[index]
        output.attention_mask = None if output.attention_mask is None else output.attention_mask[index]


def _move(output: EVACapEncoderOutput, device: torch.device) -> None:
    """Moves the tokens of a tower to the device of the other tower, if `device_map` has placed them apart."""
    output.last_hidden_state = output.last_hidden_state.to(device)
    if output.attention_mask is not None:
        output.attention_mask = output.attention_mask.to(device)


def refuse_unknown(model: nn.Module, kwargs: dict[str, Any]) -> None:
    """Refuses unknown keyword arguments.

    Otherwise a misspelt name, or one that Transformers has changed, would be ignored, and the caption would be of
    something else.
    """
    unknown = sorted(name for name, value in kwargs.items() if name not in PASSED_THROUGH and value is not None)
    if unknown:
        raise TypeError(
            f"{type(model).__name__}.forward() got unexpected keyword arguments {', '.join(unknown)}. If they are not "
            f"yours, they come from Transformers: {tested_versions()}"
        )


def main_input_name(config: EVACapConfig) -> str:
    return "pixel_values_videos" if config.fusion_type == "video_only" else "input_features"


def missing_stream(config: EVACapConfig) -> str:
    if config.fusion_type == "video_only":
        return "`pixel_values_videos` is missing: a model with `fusion_type='video_only'` needs the picture."
    return (
        f"`input_features` is missing: a model with `fusion_type='{config.fusion_type}'` needs the sound. Only a model "
        "with `fusion_type='video_only'` captions a clip without it."
    )


def _fill_in_masks(*parts: tuple[torch.Tensor, torch.Tensor | None]) -> list[torch.Tensor] | list[None]:
    """The masks (rows, length) of `(tensor, mask)` parts: one for each part, or none if no part has one."""
    if all(mask is None for _, mask in parts):
        return [None] * len(parts)
    return [
        tensor.new_ones(tensor.shape[:2], dtype=torch.bool) if mask is None else mask.bool() for tensor, mask in parts
    ]


def _concatenate(*streams: tuple[torch.Tensor, torch.Tensor | None]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The tokens of `(tokens, mask)` streams one after the other, and their mask if any stream has one."""
    masks = _fill_in_masks(*streams)
    # Where `device_map` has put the streams apart.
    device = streams[0][0].device
    tokens = torch.cat([tokens.to(device) for tokens, _ in streams], dim=1)
    return tokens, None if masks[0] is None else torch.cat([mask.to(device) for mask in masks], dim=1)


class EVACapDecoderAttention(EVACapTextAttention):
    """The attention of a prefix language model.

    Prefix tokens see the prefix. A text token sees the prefix and the text up to itself. Queries, keys and values of both
    come from the same projections. The beams of a clip share one row of prefix keys and values, so the text may have `n`
    times as many rows as the prefix.
    """

    def __init__(self, config: EVACapTextConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.is_causal = False

    def forward(
        self,
        hidden_states: torch.Tensor,
        prefix_states: torch.Tensor | None,
        attention_mask: torch.Tensor,
        prefix_attention_mask: torch.Tensor | None,
        prefix_token_mask: torch.Tensor | None,
        cache: EncoderDecoderCache | None = None,
        is_last: bool = False,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0

        prefix_output = None
        prefix_key, prefix_value = self._keys_and_values(prefix_states, cache)
        # Nothing reads the prefix after the last layer.
        if prefix_states is not None and not is_last:
            attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation, eager_attention_forward
            )
            prefix_output, _ = attention_interface(
                self,
                self._heads(self.q_proj(prefix_states)),
                prefix_key,
                prefix_value,
                prefix_attention_mask,
                dropout=dropout,
                scaling=self.scaling,
                **kwargs,
            )
            prefix_output = self.o_proj(prefix_output.reshape(prefix_states.shape))

        key, value = self._heads(self.k_proj(hidden_states)), self._heads(self.v_proj(hidden_states))
        if cache is not None:
            key, value = cache.self_attention_cache.update(key, value, self.layer_idx)
        query = self._heads(self.q_proj(hidden_states)) * self.scaling

        clips, captions = prefix_key.shape[0], query.shape[0]
        prefix_scores = torch.matmul(by_clip(query, clips), prefix_key.transpose(2, 3))
        if prefix_token_mask is not None:
            prefix_scores = prefix_scores.masked_fill(
                ~prefix_token_mask[:, None, None, :], torch.finfo(prefix_scores.dtype).min
            )
        prefix_scores = by_caption(prefix_scores, captions)
        scores = torch.matmul(query, key.transpose(2, 3))
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)

        weights = F.softmax(torch.cat([prefix_scores, scores], dim=-1), dim=-1, dtype=torch.float32)
        weights = F.dropout(weights.to(query.dtype), p=dropout, training=self.training)
        prefix_weights, text_weights = weights.split([prefix_scores.shape[-1], scores.shape[-1]], dim=-1)

        context = by_caption(torch.matmul(by_clip(prefix_weights, clips), prefix_value), captions)
        context = context + torch.matmul(text_weights, value)
        output = self.o_proj(context.transpose(1, 2).flatten(2))
        return output, prefix_output, text_weights, prefix_weights


class EVACapDecoderLayer(GradientCheckpointingLayer):
    """A post-norm BERT layer over the text and over the prefix, unless its keys and values are cached."""

    def __init__(self, config: EVACapTextConfig, layer_idx: int):
        super().__init__()
        self.is_last = layer_idx == config.num_hidden_layers - 1
        self.self_attn = EVACapDecoderAttention(config, layer_idx)
        self.self_attn_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def _feed_forward(self, hidden_states: torch.Tensor, attention_output: torch.Tensor) -> torch.Tensor:
        hidden_states = self.self_attn_layer_norm(hidden_states + self.dropout(attention_output))
        return self._mlp(hidden_states)

    def _mlp(self, hidden_states: torch.Tensor) -> torch.Tensor:
        output = self.fc2(self.activation_fn(self.fc1(hidden_states)))
        return self.final_layer_norm(hidden_states + self.dropout(output))

    @takes_both_cache_names
    def forward(
        self,
        hidden_states: torch.Tensor,
        prefix_states: torch.Tensor | None,
        attention_mask: torch.Tensor,
        prefix_attention_mask: torch.Tensor | None = None,
        prefix_token_mask: torch.Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        attention_output, prefix_output, _, _ = self.self_attn(
            hidden_states,
            prefix_states,
            attention_mask,
            prefix_attention_mask,
            prefix_token_mask,
            cache=cache,
            is_last=self.is_last,
            **kwargs,
        )
        if prefix_output is not None:
            prefix_states = self._feed_forward(prefix_states, prefix_output)
        return self._feed_forward(hidden_states, attention_output), prefix_states


class EVACapAdaptiveDecoderLayer(EVACapDecoderLayer):
    """A post-norm layer that reads sound and picture as two memories, which stay as they are ([`EVACapAdaptiveAttention`])."""

    def __init__(self, config: EVACapTextConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.self_attn = EVACapTextSelfAttention(config, layer_idx)
        self.encoder_attn = EVACapAdaptiveAttention(config, layer_idx)
        self.encoder_attn_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    @takes_both_cache_names
    def forward(
        self,
        hidden_states: torch.Tensor,
        memory: torch.Tensor | None,
        attention_mask: torch.Tensor,
        token_mask: torch.Tensor | None = None,
        video_mask: torch.Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        output, _ = self.self_attn(hidden_states, attention_mask, cache)
        hidden_states = self.self_attn_layer_norm(hidden_states + self.dropout(output))
        output, _, confidence = self.encoder_attn(hidden_states, memory, token_mask, video_mask, cache)
        hidden_states = self.encoder_attn_layer_norm(hidden_states + self.dropout(output))
        return self._mlp(hidden_states), memory, confidence


class EVACapDecoder(EVACapPreTrainedModel):
    """The GIT-style prefix language model: the encoder's tokens are its prefix, the caption its text (AVCap)."""

    config_class = EVACapTextConfig
    main_input_name = "input_ids"
    input_modalities = ("text",)
    # Text attends to one prefix that all beams of a clip share. These kernels cannot do that.
    _supports_flash_attn = False
    _supports_flex_attn = False
    _can_record_outputs = {
        "hidden_states": EVACapDecoderLayer,
        "attentions": [OutputRecorder(EVACapDecoderAttention, index=2), EVACapTextSelfAttention],
        "cross_attentions": [OutputRecorder(EVACapDecoderAttention, index=3), EVACapAdaptiveAttention],
    }

    def __init__(self, config: EVACapTextConfig, encoder_hidden_size: int | None = None, text_fusion: str = "prefix"):
        super().__init__(config)
        self.text_fusion = text_fusion
        layer_class = EVACapAdaptiveDecoderLayer if text_fusion == "adaptive" else EVACapDecoderLayer
        encoder_hidden_size = config.hidden_size if encoder_hidden_size is None else encoder_hidden_size
        self.prefix_projection = nn.Linear(encoder_hidden_size, config.hidden_size)
        self.prefix_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.prefix_layer_norm_eps)
        self.prompt = None
        if config.num_prompt_tokens > 0:
            self.prompt = nn.Parameter(torch.empty(config.num_prompt_tokens, config.hidden_size))
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layernorm_embedding = nn.LayerNorm(config.hidden_size, eps=config.embedding_layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList([layer_class(config, index) for index in range(config.num_hidden_layers)])
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value

    @merge_with_config_defaults
    @capture_outputs
    @takes_both_cache_names
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: EncoderDecoderCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        encoder_hidden_states: torch.FloatTensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        encoder_video_mask: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> EVACapDecoderOutput:
        r"""Decodes the text.

        Args:
            input_ids (`torch.LongTensor` of shape `(text_batch_size, length)`): The text so far. `text_batch_size` is a
                multiple of `batch_size`, with the beams of a clip in consecutive rows.
            attention_mask (`torch.Tensor` of shape `(text_batch_size, total_length)`, *optional*): The text tokens
                that exist, cached ones first.
            position_ids (`torch.LongTensor` of shape `(text_batch_size, length)`, *optional*): Text positions, from 0.
            cache ([`EncoderDecoderCache`], *optional*): Keys and values: those of the text in its `self_attention_cache`,
                those of the prefix, once for each clip, in its `cross_attention_cache`.
            inputs_embeds (`torch.FloatTensor` of shape `(text_batch_size, length, hidden_size)`, *optional*): Instead
                of `input_ids`.
            encoder_hidden_states (`torch.FloatTensor` of shape `(batch_size, T, encoder_hidden_size)`): The fused
                sequence. It is read only if its keys and values are not in `cache`.
            encoder_attention_mask (`torch.Tensor` of shape `(batch_size, T)`, *optional*): The tokens of the fused
                sequence that exist.
            encoder_video_mask (`torch.BoolTensor` of shape `(batch_size, T)`, *optional*): Those that come from the
                picture, for `text_fusion="adaptive"`; none by default.

        Raises:
            ValueError: If the text is missing or too long, or if the prefix is missing or does not fit the text.
        """
        refuse_unknown(self, kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `decoder_input_ids` and `decoder_inputs_embeds`.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and cache is None:
            cache = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))

        batch_size, length = inputs_embeds.shape[:2]
        past_length = cache.get_seq_length() if cache is not None else 0
        if isinstance(past_length, int) and past_length + length > self.config.max_position_embeddings:
            raise ValueError(
                f"The text has {past_length + length} tokens, but `text_config.max_position_embeddings` is "
                f"{self.config.max_position_embeddings}: ask for fewer new tokens."
            )
        steps = torch.arange(length, device=inputs_embeds.device) + past_length
        if position_ids is None:
            position_ids = steps[None]
        key_length = cache.get_mask_sizes(length, 0)[0] if cache is not None else length
        text_mask = torch.arange(key_length, device=steps.device) <= steps[:, None]
        text_mask = text_mask[None, None]
        if attention_mask is not None:
            seen = F.pad(attention_mask.bool(), (0, key_length - attention_mask.shape[1]))
            text_mask = text_mask & seen[:, None, None, :]

        prefix_states = prefix_mask = token_mask = None
        if encoder_attention_mask is not None:
            token_mask = encoder_attention_mask.bool()
            if self.prompt is not None:
                token_mask = F.pad(token_mask, (0, len(self.prompt)), value=True)
        if cache is None or not cache.is_updated.get(0):
            if encoder_hidden_states is None:
                raise ValueError("`encoder_hidden_states` is missing: the decoder has no prefix to read.")
            if batch_size % encoder_hidden_states.shape[0]:
                raise ValueError(
                    f"The decoder got {batch_size} rows of text for {encoder_hidden_states.shape[0]} encoded clips, "
                    "but it needs the same number for each clip."
                )
            prefix_states = self.prefix_layer_norm(self.prefix_projection(encoder_hidden_states))
            if self.prompt is not None:
                prompt = self.prompt.to(prefix_states).expand(len(prefix_states), -1, -1)
                prefix_states = torch.cat([prefix_states, prompt], dim=1)
            if self.text_fusion == "prefix":
                prefix_mask = _attention_mask(self.config, prefix_states, token_mask)

        positions = self.embed_positions(position_ids).to(inputs_embeds.device)
        hidden_states = self.dropout(self.layernorm_embedding(inputs_embeds + positions))
        masks = (token_mask, encoder_video_mask) if self.text_fusion == "adaptive" else (prefix_mask, token_mask)
        confidences = []
        for layer in self.layers:
            hidden_states, prefix_states, *confidence = layer(
                hidden_states,
                prefix_states,
                text_mask,
                *masks,
                cache=cache,
                **kwargs,
            )
            confidences += confidence
        return EVACapDecoderOutput(
            last_hidden_state=hidden_states,
            **{CACHE_FIELD: cache if use_cache else None},
            confidence=torch.stack(confidences).mean(0) if confidences else None,
        )


def _pooled(output: EVACapEncoderOutput) -> EVACapFeaturesOutput:
    """The output of a tower with the mean of the tokens that exist."""
    tokens, mask = output.last_hidden_state, output.attention_mask
    if mask is None:
        mean = tokens.mean(1)
    else:
        mean = (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
    return EVACapFeaturesOutput(
        last_hidden_state=tokens,
        pooler_output=mean.to(tokens.dtype),
        hidden_states=output.hidden_states,
        attentions=output.attentions,
        attention_mask=mask,
    )


class EVACapModel(EVACapPreTrainedModel):
    """The encoder and the decoder without a language head."""

    # Only the towers support these kernels: attn_implementation={"audio_config": …, "video_config": …}.
    _supports_flash_attn = False
    _supports_flex_attn = False

    def __init__(self, config: EVACapConfig):
        if config.enrichment == "case":
            self._tied_weights_keys = {"encoder.enrichment.embed_tokens.weight": "decoder.embed_tokens.weight"}
        if not config.is_encoder_decoder:
            raise ValueError(
                f"`text_config` is that of a language model ({config.text_config.model_type}), which is the decoder of "
                "EVACapForCausalLM. `AutoModel` chooses the right class."
            )
        super().__init__(config)
        self.main_input_name = main_input_name(config)
        self.encoder = EVACapEncoder(config)
        self.decoder = EVACapDecoder(config.text_config, config.encoder_config.hidden_size, config.text_fusion)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.decoder.embed_tokens = value

    @can_return_tuple
    def get_audio_features(
        self,
        input_features: torch.Tensor,
        input_features_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> EVACapFeaturesOutput:
        """The tokens of the audio tower, before the fusion.

        Args:
            input_features (`torch.FloatTensor` of shape `(batch_size, frames, num_mel_bins)`): The sound.
            input_features_mask (`torch.Tensor` of shape `(batch_size, frames)`, *optional*): The frames that exist.

        Raises:
            ValueError: If the variant has no audio tower.
        """
        if self.config.fusion_type == "video_only":
            raise ValueError("A model with `fusion_type='video_only'` has no audio tower.")
        return _pooled(self.encoder.audio_tower(input_features, input_features_mask, return_dict=True, **kwargs))

    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: torch.Tensor,
        pixel_values_videos_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> EVACapFeaturesOutput:
        """The tokens of the video tower, before the fusion.

        Args:
            pixel_values_videos (`torch.FloatTensor` of shape `(batch_size, frames, channels, height, width)`): Frames.
            pixel_values_videos_mask (`torch.Tensor` of shape `(batch_size, frames)`, *optional*): The frames that
                exist.

        Raises:
            ValueError: If the variant has no video tower.
        """
        if self.config.fusion_type == "audio_only":
            raise ValueError("A model with `fusion_type='audio_only'` has no video tower.")
        return _pooled(
            self.encoder.video_tower(pixel_values_videos, pixel_values_videos_mask, return_dict=True, **kwargs)
        )

    @can_return_tuple
    @takes_both_cache_names
    @auto_docstring
    def forward(
        self,
        input_features: torch.FloatTensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        pixel_values_videos_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: EVACapEncoderOutput | tuple | None = None,
        cache: Cache | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        decoder_position_ids: torch.LongTensor | None = None,
        video_features: torch.FloatTensor | None = None,
        audio_caption_ids: torch.LongTensor | None = None,
        video_caption_ids: torch.LongTensor | None = None,
        audio_index: torch.LongTensor | None = None,
        video_index: torch.LongTensor | None = None,
        picture_index: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> EVACapSeq2SeqModelOutput:
        r"""Encodes the clips and decodes the text.

        Args:
            input_features (`torch.FloatTensor` of shape `(batch_size, frames, num_mel_bins)`): The sound.
            pixel_values_videos (`torch.FloatTensor` of shape `(batch_size, frames, channels, height, width)`,
                *optional*): The picture.
            input_features_mask (`torch.Tensor` of shape `(batch_size, frames)`, *optional*): Frames that exist.
            pixel_values_videos_mask (`torch.Tensor` of shape `(batch_size, frames)`, *optional*): Frames that exist;
                a row of zeros is a clip without a picture.
            encoder_outputs ([`EVACapEncoderOutput`] or `tuple`, *optional*): The output of the encoder, if it was run
                before. Only the first element of a tuple is read, `last_hidden_state`, and without a mask.
            cache ([`EncoderDecoderCache`], *optional*): See [`EVACapDecoder`].
            decoder_position_ids (`torch.LongTensor` of shape `(text_batch_size, length)`, *optional*): Text positions,
                from 0.
            video_features (`torch.FloatTensor` of shape `(batch_size, frames, video_width)`, *optional*): See
                [`EVACapEncoder`].
            audio_caption_ids (`torch.LongTensor` of shape `(batch_size, length)`, *optional*): See [`EVACapEncoder`].
            video_caption_ids (`torch.LongTensor` of shape `(batch_size, length)`, *optional*): See [`EVACapEncoder`].
            audio_index (`torch.LongTensor` of shape `(pairs,)`, *optional*): See [`EVACapEncoder`].
            video_index (`torch.LongTensor` of shape `(pairs,)`, *optional*): See [`EVACapEncoder`].
            picture_index (`torch.LongTensor` of shape `(pairs,)`, *optional*): See [`EVACapEncoder`].
        """
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_features,
                pixel_values_videos,
                input_features_mask,
                pixel_values_videos_mask,
                video_features=video_features,
                audio_caption_ids=audio_caption_ids,
                video_caption_ids=video_caption_ids,
                audio_index=audio_index,
                video_index=video_index,
                picture_index=picture_index,
                output_attentions=output_attentions,
                output_hidden_states=output_hidden_states,
                return_dict=True,
            )
        elif isinstance(encoder_outputs, tuple):
            if self.config.text_fusion == "adaptive":
                raise ValueError(
                    "`encoder_outputs` is a tuple, which does not tell the tokens of sound and picture apart, but a model with "
                    "`text_fusion='adaptive'` weighs them: pass the `EVACapEncoderOutput` of the encoder."
                )
            encoder_outputs = EVACapEncoderOutput(last_hidden_state=encoder_outputs[0])
        decoder_outputs = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            position_ids=decoder_position_ids,
            cache=cache,
            inputs_embeds=decoder_inputs_embeds,
            encoder_hidden_states=encoder_outputs.last_hidden_state,
            encoder_attention_mask=getattr(encoder_outputs, "attention_mask", None),
            encoder_video_mask=getattr(encoder_outputs, "video_token_mask", None),
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        return EVACapSeq2SeqModelOutput(
            last_hidden_state=decoder_outputs.last_hidden_state,
            **{CACHE_FIELD: decoder_outputs.get(CACHE_FIELD)},
            decoder_hidden_states=decoder_outputs.hidden_states,
            decoder_attentions=decoder_outputs.attentions,
            cross_attentions=decoder_outputs.cross_attentions,
            confidence=decoder_outputs.confidence,
            **encoder_fields(encoder_outputs),
        )


FROM_ENCODER = [
    field.name
    for field in fields(EVACapEncoderOutput)
    if field.name
    in {field.name for field in fields(EVACapSeq2SeqModelOutput)} - {"last_hidden_state", "cross_attentions"}
]
"""The fields that an output of the whole model has under the same name as that of its encoder."""


def encoder_fields(encoder_outputs: EVACapEncoderOutput) -> dict[str, Any]:
    """The fields of [`EVACapSeq2SeqModelOutput`] that come from the encoder."""
    return {
        "encoder_last_hidden_state": encoder_outputs.last_hidden_state,
        "encoder_hidden_states": encoder_outputs.hidden_states,
        "encoder_attentions": encoder_outputs.attentions,
        "encoder_attention_mask": getattr(encoder_outputs, "attention_mask", None),
        **{name: getattr(encoder_outputs, name, None) for name in FROM_ENCODER},
    }


def shift_tokens_right(labels: torch.Tensor, pad_token_id: int, decoder_start_token_id: int) -> torch.Tensor:
    """The decoder's input (batch_size, length) for `labels`: the start token, then the labels but their last."""
    shifted = F.pad(labels[:, :-1], (1, 0), value=decoder_start_token_id)
    return shifted.masked_fill(shifted == -100, pad_token_id)


class EVACapCaptioner(EVACapPreTrainedModel):
    """What captioners have in common, whatever their decoder: the pairs of a training batch, and the loss."""

    def _pair(
        self,
        pixel_values_videos: torch.Tensor | None,
        pixel_values_videos_mask: torch.Tensor | None,
        matched_videos: tuple[torch.Tensor | None, torch.Tensor | None],
        shuffled: torch.Tensor | None,
        video_index: torch.Tensor | None,
        is_encoded: bool,
    ) -> tuple[dict[str, torch.Tensor | None], torch.Tensor | None]:
        """The videos of a batch and their pairs with the sounds, as arguments of the encoder, and the swapped samples.

        `is_encoded` says that the encoder was run before. The samples are `None` where their own videos are not needed.
        """
        pairs = {"pixel_values_videos": pixel_values_videos, "pixel_values_videos_mask": pixel_values_videos_mask}
        swapped = None
        if (
            self.training
            and self.config.semantic_consistency_weight > 0
            and matched_videos[0] is not None
            and len(matched_videos[0]) > 0
        ):
            if shuffled is None or video_index is None or is_encoded:
                raise ValueError(
                    "The semantic-consistency term needs `shuffled`, `video_index`, and the streams instead of "
                    "`encoder_outputs`."
                )
            swapped = shuffled.nonzero().squeeze(1)
            pairs = self._add_matched_pairs(
                **pairs, matched_videos=matched_videos, swapped=swapped, video_index=video_index
            )
        if self.training and self.config.matching_weight > 0 and pixel_values_videos is not None and not is_encoded:
            own = torch.arange(len(pixel_values_videos), device=pixel_values_videos.device)
            pairs["picture_index"] = pairs.get("video_index", own if video_index is None else video_index)
        return pairs, swapped

    @staticmethod
    def _add_matched_pairs(
        pixel_values_videos: torch.Tensor,
        pixel_values_videos_mask: torch.Tensor | None,
        matched_videos: tuple[torch.Tensor, torch.Tensor | None],
        swapped: torch.Tensor,
        video_index: torch.Tensor,
    ) -> dict[str, torch.Tensor | None]:
        """The videos and pairs of a batch in which the rows `swapped` occur twice.

        In their place they have the other video, and in more rows behind the batch their own. The own video of every sample
        passes the tower once.
        """
        videos, mask = matched_videos
        if len(swapped) != len(videos):
            raise ValueError(
                f"`matched_pixel_values_videos` has {len(videos)} videos, but `shuffled` marks {len(swapped)} samples: "
                "it must hold the own video of each of those, in their order."
            )
        masks = _fill_in_masks((pixel_values_videos, pixel_values_videos_mask), (videos, mask))
        rows = torch.arange(len(pixel_values_videos), device=swapped.device)
        return {
            "pixel_values_videos": pixel_values_videos.index_copy(0, swapped, videos),
            "pixel_values_videos_mask": None if masks[0] is None else masks[0].index_copy(0, swapped, masks[1]),
            "audio_index": torch.cat([rows, swapped]),
            "video_index": torch.cat([video_index, swapped]),
        }

    def _compute_loss(
        self,
        logits: torch.Tensor,
        matched_logits: torch.Tensor,
        labels: torch.Tensor,
        outputs: EVACapSeq2SeqModelOutput,
        swapped: torch.Tensor | None,
        shuffled: torch.Tensor | None,
        num_items_in_batch: int | torch.Tensor | None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss, and its terms by name if there are regularisers.

        `matched_logits` belong to the samples `swapped` with their own video.
        """
        labels = labels.to(logits.device)
        loss = label_smoothed_kl(logits, labels, self.config.label_smoothing, num_items_in_batch)
        # The terms are means over this batch. If it is a part of a larger batch, they count for that part.
        share = 1 if num_items_in_batch is None else (labels != -100).sum() / num_items_in_batch
        caption_loss, terms = loss / share, {}
        if self.config.gate_stability_weight > 0 and outputs.fusion_gate is not None:
            gate, mask = outputs.fusion_gate[: len(labels)], outputs.encoder_attention_mask
            mask = None if mask is None else mask[: len(labels)].to(gate.device)
            terms["gate_stability"] = gate_stability(gate, self.config.audio_rows, mask).to(loss.device)
        if self.config.hearing_weight > 0 and outputs.audio_summary is not None:
            # The words' vectors are left to the captions.
            words = self.get_output_embeddings().weight.detach()
            summary = self.hearing_head(outputs.audio_summary[: len(labels)]).to(words.device)
            terms["heard_words"] = heard_words(F.linear(summary, words), labels)
        shuffled = None if shuffled is None else shuffled.to(loss.device).bool()
        if self.training and self.config.caption_contrast_weight > 0:
            summaries = (outputs.audio_summary, outputs.video_summary)
            summaries = [None if summary is None else summary[: len(labels)] for summary in summaries]
            if any(summary is not None for summary in summaries):
                words = self.get_output_embeddings().weight.detach()
                terms["caption_contrast"] = self.contrast_head(*summaries, labels, words, shuffled).to(loss.device)
        if self.training and self.config.entropy_weight > 0 and outputs.attention_entropy is not None:
            entropy, mask = outputs.attention_entropy[: len(labels)].to(loss.device), outputs.encoder_attention_mask
            mask = None if mask is None else mask[: len(labels)].to(loss.device)
            terms["picture_entropy"] = picture_entropy(entropy, shuffled, mask)
        if outputs.matching_loss is not None:
            terms["matching_loss"] = outputs.matching_loss.to(loss.device)
        if outputs.transport_loss is not None:
            terms["transport_loss"] = outputs.transport_loss.to(loss.device)
        if swapped is not None:
            rows = swapped.to(logits.device)
            terms["semantic_consistency"] = semantic_consistency(matched_logits, logits[rows], labels[rows])
        for name, term in terms.items():
            loss = loss + share * getattr(self.config, LOSS_WEIGHTS[name]) * term
        if terms:
            terms = {name: term.detach() for name, term in {"caption_loss": caption_loss, **terms}.items()}
        return loss, terms


# Inputs of the decoder, with one row for each caption.
TEXT_ARGUMENTS = ("decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds", "decoder_position_ids")


class EVACapForConditionalGeneration(EVACapCaptioner, GenerationMixin):
    """The captioner: [`EVACapModel`] with a language head on tied word embeddings, the loss, and `generate`.

    `AutoModel` loads this class for the model type `"evacap"`, so that `AutoModel.from_pretrained(…).generate(…)`
    captions.

    Example:
    ```python
    >>> from transformers import AutoModel, AutoProcessor
    >>> import evacap

    >>> processor = AutoProcessor.from_pretrained(evacap.TINY)
    >>> model = AutoModel.from_pretrained(evacap.TINY)
    >>> inputs = processor(media="clip.mp4", return_tensors="pt")
    >>> processor.batch_decode(model.generate(**inputs), skip_special_tokens=True)
    ```
    """

    # As in EVACapModel.
    _supports_flash_attn = False
    _supports_flex_attn = False
    _tied_weights_keys = {"lm_head.weight": "model.decoder.embed_tokens.weight"}

    def __init__(self, config: EVACapConfig):
        super().__init__(config)
        self.main_input_name = main_input_name(config)
        self.model = EVACapModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size)
        if config.hearing_weight > 0:
            self.hearing_head = nn.Linear(2 * config.audio_config.hidden_size, config.text_config.hidden_size)
        if config.caption_contrast_weight > 0:
            self.contrast_head = EVACapContrastHead(config)
        # A checkpoint's generation_config.json takes precedence.
        self.generation_config.max_length = MAX_CAPTION_LENGTH
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def get_audio_features(self, *args: Any, **kwargs: Any) -> EVACapFeaturesOutput:
        """See [`EVACapModel.get_audio_features`]."""
        return self.model.get_audio_features(*args, **kwargs)

    def get_video_features(self, *args: Any, **kwargs: Any) -> EVACapFeaturesOutput:
        """See [`EVACapModel.get_video_features`]."""
        return self.model.get_video_features(*args, **kwargs)

    @can_return_tuple
    @takes_both_cache_names
    @auto_docstring
    def forward(
        self,
        input_features: torch.FloatTensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        pixel_values_videos_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: EVACapEncoderOutput | tuple | None = None,
        cache: Cache | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        decoder_position_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        shuffled: torch.Tensor | None = None,
        video_index: torch.Tensor | None = None,
        matched_pixel_values_videos: torch.FloatTensor | None = None,
        matched_pixel_values_videos_mask: torch.Tensor | None = None,
        video_features: torch.FloatTensor | None = None,
        audio_caption_ids: torch.LongTensor | None = None,
        video_caption_ids: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> EVACapSeq2SeqLMOutput:
        r"""Predicts the text, and computes the loss if `labels` are given.

        Args:
            input_features (`torch.FloatTensor` of shape `(batch_size, frames, num_mel_bins)`): The sound.
            pixel_values_videos (`torch.FloatTensor` of shape `(batch_size, frames, channels, height, width)`,
                *optional*): The picture.
            input_features_mask (`torch.Tensor` of shape `(batch_size, frames)`, *optional*): Frames that exist.
            pixel_values_videos_mask (`torch.Tensor` of shape `(batch_size, frames)`, *optional*): Frames that exist;
                a row of zeros is a clip without a picture.
            decoder_input_ids (`torch.LongTensor` of shape `(batch_size, length)`, *optional*): The caption so far;
                by default it is made from `labels` by a shift to the right.
            encoder_outputs ([`EVACapEncoderOutput`] or `tuple`, *optional*): See [`EVACapModel`].
            cache ([`EncoderDecoderCache`], *optional*): See [`EVACapDecoder`].
            decoder_position_ids (`torch.LongTensor` of shape `(batch_size, length)`, *optional*): Text positions, from
                0.
            labels (`torch.LongTensor` of shape `(batch_size, length)`, *optional*): The caption without its start
                token, with `[SEP]` at its end, padded with -100. The loss is [`label_smoothed_kl`].
            shuffled (`torch.BoolTensor` of shape `(batch_size,)`, *optional*): The samples whose video the data
                collator swapped; used by the semantic-consistency term.
            video_index (`torch.LongTensor` of shape `(batch_size,)`, *optional*): The sample each video came from, as
                the data collator reports it; used by the matching and the semantic-consistency terms.
            matched_pixel_values_videos (`torch.FloatTensor` of shape `(swapped, frames, channels, height, width)`,
                *optional*): The matched videos of the swapped samples, in their order, for the semantic-consistency term.
            matched_pixel_values_videos_mask (`torch.Tensor` of shape `(swapped, frames)`, *optional*): The frames of
                the matched videos that exist.
            video_features (`torch.FloatTensor` of shape `(batch_size, frames, video_width)`, *optional*): See
                [`EVACapEncoder`].
            audio_caption_ids (`torch.LongTensor` of shape `(batch_size, length)`, *optional*): See [`EVACapEncoder`].
            video_caption_ids (`torch.LongTensor` of shape `(batch_size, length)`, *optional*): See [`EVACapEncoder`].
        """
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        elif labels is None:
            self._check_without_labels(decoder_input_ids is not None or decoder_inputs_embeds is not None)
        text = [decoder_input_ids, decoder_attention_mask, decoder_inputs_embeds, decoder_position_ids]
        pairs, swapped = (
            {"pixel_values_videos": pixel_values_videos, "pixel_values_videos_mask": pixel_values_videos_mask},
            None,
        )
        if labels is not None:
            pairs, swapped = self._pair(
                **pairs,
                matched_videos=(matched_pixel_values_videos, matched_pixel_values_videos_mask),
                shuffled=shuffled,
                video_index=video_index,
                is_encoded=encoder_outputs is not None,
            )
        if swapped is not None:
            text = [None if rows is None else rows[pairs["audio_index"]] for rows in text]
        outputs = self.model(
            input_features=input_features,
            input_features_mask=input_features_mask,
            video_features=video_features,
            audio_caption_ids=audio_caption_ids,
            video_caption_ids=video_caption_ids,
            **pairs,
            **dict(zip(TEXT_ARGUMENTS, text, strict=True)),
            encoder_outputs=encoder_outputs,
            cache=cache,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(outputs.last_hidden_state)
        loss, terms = None, {}
        if labels is not None:
            logits, matched_logits = logits.split([len(labels), len(logits) - len(labels)])
            loss, terms = self._compute_loss(
                logits, matched_logits, labels, outputs, swapped, shuffled, num_items_in_batch
            )
        return EVACapSeq2SeqLMOutput(
            loss=loss,
            logits=logits,
            **{CACHE_FIELD: outputs.get(CACHE_FIELD)},
            decoder_hidden_states=outputs.decoder_hidden_states,
            decoder_attentions=outputs.decoder_attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            encoder_attentions=outputs.encoder_attentions,
            confidence=None if outputs.confidence is None else outputs.confidence[: logits.shape[0]],
            **terms,
        )

    def _check_without_labels(self, has_text: bool) -> None:
        """Says what is missing where somebody else has the labels, as a `Trainer` with a loss of its own."""
        if not has_text:
            raise ValueError(
                "Give `labels`, `decoder_input_ids` or `decoder_inputs_embeds`. A `Trainer` with "
                "`label_smoothing_factor` or `compute_loss_func` keeps the labels to itself: give the model to the data "
                "collator, `EVACapDataCollator(model=model)`, which then makes `decoder_input_ids`."
            )
        weights = [f"`{LOSS_WEIGHTS[name]}`" for name in self.config.loss_terms]
        if self.training and weights:
            logger.warning_once(
                f"Without `labels` the model computes no loss: the terms of {', '.join(weights)} are left out of whatever "
                "is computed from its logits."
            )

    def prepare_decoder_input_ids_from_labels(self, labels: torch.LongTensor) -> torch.LongTensor:
        """The decoder's input (batch_size, length) for `labels`: the start token, then all labels but the last."""
        return shift_tokens_right(labels, self.config.text_config.pad_token_id, self.config.decoder_start_token_id)

    def prepare_inputs_for_generation(
        self, *args: Any, past_key_values: Cache | None = None, is_first_iteration: bool = False, **kwargs: Any
    ):
        """As in `GenerationMixin`, with an error if the last step has left nothing in the cache."""
        # Before 5.24 Transformers takes the old name only if it stands in this signature.
        if past_key_values is not None:
            kwargs["past_key_values"] = past_key_values
        inputs = super().prepare_inputs_for_generation(*args, is_first_iteration=is_first_iteration, **kwargs)
        if kwargs.get("use_cache") and not is_first_iteration:
            cache = inputs.get("cache", inputs.get("past_key_values"))
            # An assistant begins with an empty cache and the whole caption so far.
            is_part = inputs["decoder_input_ids"].shape[1] < args[0].shape[1]
            if is_part and (cache is None or not cache.is_updated.get(0)):
                raise RuntimeError(
                    "`generate` goes on with an empty cache: each step would start the caption anew. This version of "
                    f"Transformers hands the cache over in a way that this model does not know: {tested_versions()}"
                )
        return inputs

    def _prepare_generated_length(
        self, generation_config: GenerationConfig, has_default_max_length: bool, **kwargs: Any
    ) -> GenerationConfig:
        """Lets `max_new_tokens` replace the model's default `max_length` without a warning."""
        if generation_config.max_length == self.generation_config.max_length:
            has_default_max_length = has_default_max_length or generation_config.max_new_tokens is not None
        return super()._prepare_generated_length(generation_config, has_default_max_length, **kwargs)

    @staticmethod
    def create_masks_for_generate(attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
        """Leaves the mask to the decoder, which makes it from the length of the cache."""
        return attention_mask

    def _prepare_model_inputs(self, inputs: torch.Tensor | None, bos_token_id, model_kwargs: dict[str, Any]):
        """Refuses to generate without the main stream, for which `generate` would take start tokens."""
        if inputs is None and all(
            model_kwargs.get(name) is None for name in (self.main_input_name, "encoder_outputs")
        ):
            raise ValueError(missing_stream(self.config))
        return super()._prepare_model_inputs(inputs, bos_token_id, model_kwargs)

    def _expand_inputs_for_generation(self, expand_size: int = 1, **kwargs: Any):
        """Repeats the text for beams and sequences, but not the encoded clip, whose prefix is computed once."""
        encoder_outputs = kwargs.pop("encoder_outputs", None)
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, encoder_outputs=BaseModelOutput(), **kwargs
        )
        kwargs["encoder_outputs"] = encoder_outputs
        return input_ids, kwargs

    def _reorder_cache(self, cache: EncoderDecoderCache, beam_idx: torch.LongTensor) -> EncoderDecoderCache:
        """Reorders the text only: the beams of a clip share its prefix. A static cache stays where CUDA graphs read it."""
        text = cache.self_attention_cache
        if not text.is_compileable:
            text.reorder_cache(beam_idx)
            return cache
        for layer in text.layers:
            for states in (layer.keys, layer.values):
                states.copy_(states.index_select(0, beam_idx.to(states.device)))
        return cache


__all__ = [
    "EVACapAdaptiveAttention",
    "EVACapAudioTower",
    "EVACapCEDTower",
    "EVACapCLIPTower",
    "EVACapDecoder",
    "EVACapDecoderOutput",
    "EVACapEncoder",
    "EVACapEncoderOutput",
    "EVACapForConditionalGeneration",
    "EVACapGatedCrossAttention",
    "EVACapMatchingHead",
    "EVACapModel",
    "EVACapOptimalTransport",
    "EVACapPreTrainedModel",
    "EVACapSeq2SeqLMOutput",
    "EVACapVideoTower",
]

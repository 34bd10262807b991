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

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_evacap import EVACapAudioConfig, EVACapConfig, EVACapTextConfig, EVACapVideoConfig


# Tokens of the longest caption, with [CLS] and [SEP] (AVCap).
MAX_CAPTION_LENGTH = 40

# Where attention scores are not held all at once: how many bytes of them are, and of how many queries at most. On a CPU
# they stay in its cache.
SCORE_BYTES_AT_ONCE = {"cpu": 2**21, "cuda": 2**25}
QUERIES_AT_ONCE = 256

# Tokens that pass an MLP at a time on a CPU: its inner results then take 11 MB in float32 at the paper's width.
ROWS_AT_ONCE = 896


@dataclass
class EVACapEncoderOutput(BaseModelOutput):
    r"""
    Output of [`EVACapEncoder`]. T_a and T_v are the numbers of audio and video tokens, T the length of the fused
    sequence: T_a, for `"concat"` T_a + T_v, for `"video_only"` T_v.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch_size, T, hidden_size)`): The fused sequence.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*): With `output_hidden_states=True`: the embeddings and
            each block's output, of the audio tower (of the video tower for `"video_only"`), then of the joint blocks.
        attentions (`tuple(torch.FloatTensor)`, *optional*): With `output_attentions=True`: the self-attention
            probabilities of the same blocks.
        cross_attentions (`torch.FloatTensor` of shape `(batch_size, num_heads, T_a, T_v)`, *optional*): With
            `output_attentions=True`: the fusion's attention probabilities (paper, equation 1).
        video_hidden_states (`tuple(torch.FloatTensor)`, *optional*): As `hidden_states`, of the video tower, where it
            stands beside an audio tower.
        video_attentions (`tuple(torch.FloatTensor)`, *optional*): As `attentions`, of that video tower.
        attention_mask (`torch.BoolTensor` of shape `(batch_size, T)`, *optional*): `True` for tokens that exist;
            `None` where all do.
        fusion_gate (`torch.FloatTensor` of shape `(batch_size, T_a)`, *optional*): The gate g in [0, 1] of each audio
            token, index = mel row · time steps + time step: 0 ignores the picture (paper, equation 3). `None`
            without `"gated_cross_attention"`.
        attention_entropy (`torch.FloatTensor` of shape `(batch_size, T_a)`, *optional*): The normalised entropy E in
            [0, 1] of each audio token's attention to the picture, mean over heads (paper, equation 2).
    """

    cross_attentions: torch.FloatTensor | None = None
    video_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    video_attentions: tuple[torch.FloatTensor, ...] | None = None
    attention_mask: torch.Tensor | None = None
    fusion_gate: torch.FloatTensor | None = None
    attention_entropy: torch.FloatTensor | None = None


@dataclass
class EVACapSeq2SeqLMOutput(Seq2SeqLMOutput):
    r"""
    A [`Seq2SeqLMOutput`] whose `loss`, where a regulariser is on, comes with its terms, for the logs. They are not
    weighted, and not divided among the parts of an accumulated batch.

    Args:
        caption_loss (`torch.FloatTensor` of shape `(1,)`, *optional*): [`label_smoothed_kl`].
        gate_stability (`torch.FloatTensor` of shape `(1,)`, *optional*): [`gate_stability`], where its weight is
            above 0 and there is a gate.
        semantic_consistency (`torch.FloatTensor` of shape `(1,)`, *optional*): [`semantic_consistency`], where its
            weight is above 0 and a video of the batch was swapped.
    """

    caption_loss: torch.FloatTensor | None = None
    gate_stability: torch.FloatTensor | None = None
    semantic_consistency: torch.FloatTensor | None = None


def _sincos(positions: torch.Tensor, dim: int) -> torch.Tensor:
    """Sine and cosine codes (n, dim) of `positions` (n,), with MAE's frequencies; an odd `dim` gets a zero column."""
    frequencies = 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angles = positions.to(torch.float64)[:, None] * frequencies
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, dim % 2))


def sincos_position_table(height: int, width: int, dim: int) -> torch.Tensor:
    """
    The 2-D sine-cosine position table (height · width, dim) of MAE and CAV-MAE: half of the channels tell the column,
    the other half the row; index = row · width + column.
    """
    columns = _sincos(torch.arange(width), dim // 2).repeat(height, 1)
    rows = _sincos(torch.arange(height), dim - dim // 2).repeat_interleave(width, 0)
    return torch.cat([columns, rows], dim=1).float()


def interpolate_in_time(table: torch.Tensor, num_steps: int, step_mask: torch.Tensor | None = None) -> torch.Tensor:
    """
    Position codes for `num_steps` time steps from a table of any length, by linear interpolation over the steps that
    exist, so that a padded clip gets the codes that it gets alone (ours).

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


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def score_blocks(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None
) -> Iterator[tuple[tuple[slice, slice], torch.Tensor]]:
    """
    The scores of attention, block by block.

    Args:
        query (`torch.Tensor` of shape `(batch_size, num_heads, queries, head_dim)`): Already scaled.
        key (`torch.Tensor` of shape `(batch_size, num_heads, keys, head_dim)`): As many heads.
        mask (`torch.BoolTensor` of shape `(batch_size, keys)`, *optional*): The keys that exist.

    Yields:
        Where a block is, rows of `batch_size * num_heads` and queries, and its scores (rows, queries, keys). Those of
        masked keys are the least number of the dtype.
    """
    num_heads, num_keys = key.shape[1:3]
    query, key = query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2)
    size = SCORE_BYTES_AT_ONCE.get(query.device.type, SCORE_BYTES_AT_ONCE["cuda"]) // query.element_size()
    num_queries = min(query.shape[1], QUERIES_AT_ONCE, max(1, size // num_keys))
    num_rows = max(1, size // (num_queries * num_keys))
    hidden = None if mask is None else ~mask.repeat_interleave(num_heads, 0)[:, None]
    for row in range(0, query.shape[0], num_rows):
        rows = slice(row, row + num_rows)
        for start in range(0, query.shape[1], num_queries):
            block = rows, slice(start, start + num_queries)
            scores = torch.bmm(query[block], key[rows])
            if hidden is not None:
                scores.masked_fill_(hidden[rows], torch.finfo(scores.dtype).min)
            yield block, scores


def blockwise_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, None]:
    """
    Inference in bfloat16 on a CPU: eager attention over blocks of scores, which stay in the cache. PyTorch's fused
    kernel there is no faster in bfloat16 than in float32 (`benchmarks/README.md`).
    """
    output, values = torch.empty_like(query.flatten(0, 1)), value.flatten(0, 1)
    # Products with it are faster where the keys lie side by side.
    key = key.transpose(2, 3).contiguous().transpose(2, 3)
    # Bidirectional attention: all queries of a row see the same keys.
    mask = None if attention_mask is None else attention_mask[:, 0, 0].expand(query.shape[0], -1)
    for block, scores in score_blocks(query * scaling, key, mask):
        output[block] = torch.bmm(scores.softmax(-1), values[block[0]])
    return output.view_as(query).transpose(1, 2), None


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
            # A graph would hold every block.
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
        if hidden_states.device.type == "cpu" and not torch.is_grad_enabled():
            # The system hands out memory for results of many megabytes page by page, anew each time.
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


class EVACapAudioEmbeddings(nn.Module):
    """Cuts the (mel × time) picture in square patches; token index = mel row · time steps + time step (AVCap)."""

    def __init__(self, config: EVACapAudioConfig):
        super().__init__()
        self.config = config
        self.num_rows = config.num_mel_bins // config.patch_size
        self.num_steps = config.max_frames // config.patch_size
        self.patch_embeddings = nn.Conv2d(1, config.hidden_size, config.patch_size, stride=config.patch_size)
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
        self.patch_embeddings = nn.Conv3d(config.num_channels, config.hidden_size, kernel, stride=kernel)
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
    """
    Zeros in the frames (rows, frames, …) that do not exist, and the time steps (rows, steps) of which all frames do;
    `None` without a mask. Errors call the mask `name`.
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
    """
    The mask that lets all tokens see the tokens of `token_mask` (batch_size, tokens), in the attention
    implementation's own form. A row without any token sees all of its padding: its output is never used, but a
    softmax over nothing would be not a number.
    """
    if token_mask is not None:
        token_mask = token_mask | ~token_mask.any(1, keepdim=True)
    return create_bidirectional_mask(config=config, inputs_embeds=hidden_states, attention_mask=token_mask)


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
        "EVACapEncoderLayer",
        "EVACapGatedCrossAttention",
        "EVACapDecoderLayer",
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
        elif isinstance(module, EVACapGatedCrossAttention) and module.gate_type == "entropy":
            init.constant_(module.gate_weight, module.gate_weight_init)
            init.constant_(module.gate_bias, module.gate_bias_init)


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
        r"""
        Args:
            input_features (`torch.FloatTensor` of shape `(batch_size, frames, num_mel_bins)`): Filterbank.
            input_features_mask (`torch.Tensor` of shape `(batch_size, frames)`, *optional*): The frames that exist.
        """
        hidden_states, token_mask = self.embeddings(input_features, input_features_mask)
        attention_mask = _attention_mask(self.config, hidden_states, token_mask)
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask, **kwargs)
        return EVACapEncoderOutput(last_hidden_state=hidden_states, attention_mask=token_mask)


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
        r"""
        Args:
            pixel_values_videos (`torch.FloatTensor` of shape `(batch_size, frames, channels, height, width)`): Frames.
            pixel_values_videos_mask (`torch.Tensor` of shape `(batch_size, frames)`, *optional*): The frames that
                exist; a tubelet counts where all of its frames do.
        """
        hidden_states, token_mask = self.embeddings(pixel_values_videos, pixel_values_videos_mask)
        shape = hidden_states.shape
        if self.config.attention == "frame":
            # A tubelet is a sequence of its own here, whole or masked as a whole: no mask is needed.
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


def _count_visible(video: torch.Tensor, video_mask: torch.Tensor | None) -> torch.Tensor:
    """The number of video tokens that exist (batch_size, 1)."""
    if video_mask is None:
        return torch.full((video.shape[0], 1), video.shape[1], device=video.device)
    return video_mask.sum(1, keepdim=True)


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def attention_and_entropy(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Attention with its probabilities and their entropy in nats (paper, equations 1 and 2, before its normalisation).

    Args:
        query (`torch.Tensor` of shape `(batch_size, num_heads, T_a, head_dim)`): Of the audio.
        key, value (`torch.Tensor` of shape `(batch_size, num_heads, T_v, head_dim)`): Of the video.
        mask (`torch.BoolTensor` of shape `(batch_size, T_v)`, *optional*): The keys that exist.
        scaling (`float`): Factor of the scores.

    Returns:
        The context (batch_size, num_heads, T_a, head_dim), the entropy (batch_size, num_heads, T_a) and the
        probabilities (batch_size, num_heads, T_a, T_v), the last two in float32 or better.
    """
    scores = _at_least_float32(torch.matmul(query * scaling, key.transpose(2, 3)))
    hidden = None if mask is None else ~mask[:, None, None, :]
    if hidden is not None:
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    # What follows does not depend on the highest score, and would lose its digits where that is large.
    scores = scores - scores.detach().amax(-1, keepdim=True)
    # Masked scores are 0 in the product below, as their gradient would overflow.
    finite = scores if hidden is None else scores.masked_fill(hidden, 0.0)
    weights = scores.softmax(-1)
    # H = logsumexp(s) - sum(P s) is -sum(P log P) with a gradient that stays finite where P is 0.
    entropy = scores.logsumexp(-1) - (weights * finite).sum(-1)
    return torch.matmul(weights.to(value.dtype), value), entropy, weights


class _BlockwiseAttentionAndEntropy(torch.autograd.Function):
    """
    Attention and its entropy from blocks of scores, which the derivative computes again: dH/ds_j = -P_j (log P_j + H),
    beside what attention itself has. (ours)
    """

    @staticmethod
    def forward(query, key, value, mask, scaling):
        context, values = torch.empty_like(query.flatten(0, 1)), value.flatten(0, 1)
        dtype = torch.promote_types(query.dtype, torch.float32)
        entropy = torch.empty(context.shape[:2], dtype=dtype, device=query.device)
        for block, scores in score_blocks(query * scaling, key, mask):
            log_weights = _at_least_float32(scores).log_softmax(-1)
            weights = log_weights.exp()
            context[block] = torch.bmm(weights.to(value.dtype), values[block[0]])
            # Not as a dot product, which autocast would take in half precision.
            entropy[block] = -log_weights.mul_(weights).sum(-1)
        return context.view_as(query), entropy.view(query.shape[:3])

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.scaling = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, of_context, of_entropy):
        query, key, value, mask = ctx.saved_tensors
        queries, keys, values = (tensor.flatten(0, 1) for tensor in (query, key, value))
        of_context, of_entropy = of_context.flatten(0, 1).to(value.dtype), of_entropy.flatten(0, 1)[..., None]
        of_query = torch.empty_like(queries)
        # Sums over the blocks of queries.
        of_key, of_value = (torch.zeros_like(tensor, dtype=of_entropy.dtype) for tensor in (keys, values))
        for block, scores in score_blocks(query * ctx.scaling, key, mask):
            rows = block[0]
            log_weights = _at_least_float32(scores).log_softmax(-1)
            weights = log_weights.exp()
            of_value[rows] += torch.bmm(weights.to(value.dtype).transpose(1, 2), of_context[block])
            # Masked log-weights are as low as can be: 0 in the product with their weights, and before any other.
            terms = weights * log_weights
            of_weights = _at_least_float32(torch.bmm(of_context[block], values[rows].transpose(1, 2)))
            mean = (weights * of_weights - of_entropy[block] * terms).sum(-1, keepdim=True)
            of_scores = weights * (of_weights - mean) - of_entropy[block] * terms
            of_scores = (of_scores * ctx.scaling).to(key.dtype)
            of_query[block] = torch.bmm(of_scores, keys[rows])
            of_key[rows] += torch.bmm(of_scores.transpose(1, 2), queries[block])
        of_key, of_value = of_key.to(key.dtype).view_as(key), of_value.to(value.dtype).view_as(value)
        return of_query.view_as(query), of_key, of_value, None, None


def fused_attention_and_entropy(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> tuple[torch.Tensor, torch.Tensor, None]:
    """
    The same as [`attention_and_entropy`] without ever holding the probabilities of more than a block (ours). No kernel
    gives the entropy as well, and to find it beside one takes a second pass over the scores.
    """
    if mask is not None:
        # A row without any key sees all of its padding: its result is never used, but must not be not a number.
        mask = mask | ~mask.any(1, keepdim=True)
    return *_BlockwiseAttentionAndEntropy.apply(query, key, value, mask, scaling), None


class EVACapGatedCrossAttention(nn.Module):
    """
    The entropy-gated cross-attention (paper, equations 1 to 3): audio tokens query the picture, and a gate that
    closes where the attention is undecided mixes what they find into the audio.
    """

    def __init__(self, config: EVACapConfig):
        super().__init__()
        self.num_heads = config.audio_config.num_attention_heads
        self.head_dim = config.audio_config.hidden_size // self.num_heads
        self.scaling = self.head_dim**-0.5
        self.gate_type = config.gate_type
        self.gate_weight_init = config.gate_weight_init
        self.gate_bias_init = config.gate_bias_init
        width = config.audio_config.hidden_size
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(config.video_config.hidden_size, width)
        self.v_proj = nn.Linear(config.video_config.hidden_size, width)
        if self.gate_type == "entropy":
            self.gate_weight = nn.Parameter(torch.empty(1))
            self.gate_bias = nn.Parameter(torch.empty(1))
        elif self.gate_type == "learned":
            self.gate = nn.Linear(2 * width, 1)

    def forward(
        self,
        audio: torch.Tensor,
        video: torch.Tensor,
        video_mask: torch.Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        r"""
        Args:
            audio (`torch.Tensor` of shape `(batch_size, T_a, hidden_size)`): Audio tokens A, the queries.
            video (`torch.Tensor` of shape `(batch_size, T_v, video_hidden_size)`): Video tokens V, keys and values.
            video_mask (`torch.BoolTensor` of shape `(batch_size, T_v)`, *optional*): The video tokens that exist. A
                row without any keeps its audio as it is, with a gate and an entropy of exactly 0.
            output_attentions (`bool`, *optional*, defaults to `False`): Whether to return the probabilities, which
                otherwise are never held whole.

        Returns:
            The fused sequence (batch_size, T_a, hidden_size), the gate and the entropy (batch_size, T_a) and the
            attention probabilities (batch_size, num_heads, T_a, T_v) or `None`.
        """
        query = self.q_proj(audio).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        key = self.k_proj(video).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        value = self.v_proj(video).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

        attend = attention_and_entropy if output_attentions else fused_attention_and_entropy
        context, entropy, weights = attend(query, key, value, video_mask, self.scaling)
        context = context.transpose(1, 2).flatten(2)
        visible = _count_visible(video, video_mask)
        entropy = entropy.mean(1) / visible.clamp(min=2).log()
        entropy = entropy.clamp(0, 1).masked_fill(visible < 2, 0.0)

        if self.gate_type == "entropy":
            gate = torch.sigmoid(self.gate_weight.float() * entropy + self.gate_bias.float())
        elif self.gate_type == "learned":
            gate = torch.sigmoid(self.gate(torch.cat([audio, context], dim=-1)).float()).squeeze(-1)
        else:
            gate = torch.ones_like(entropy)
        gate = gate.masked_fill(visible == 0, 0.0)

        # A row without video takes its audio from the second branch, whatever its padding holds.
        fused = torch.lerp(_at_least_float32(audio), _at_least_float32(context), gate[..., None].to(entropy.dtype))
        fused = fused.to(audio.dtype)
        fused = torch.where((visible > 0)[..., None], fused, audio)
        return fused, gate, entropy, weights


class EVACapEncoder(EVACapPreTrainedModel):
    """The towers, the fusion and the joint blocks: from features to the sequence that the decoder reads."""

    def __init__(self, config: EVACapConfig):
        super().__init__(config)
        self.main_input_name = _main_input_name(config)
        if config.fusion_type != "video_only":
            self.audio_tower = EVACapAudioTower(config.audio_config)
        if config.fusion_type != "audio_only":
            self.video_tower = EVACapVideoTower(config.video_config)
        if config.fusion_type == "gated_cross_attention":
            self.fusion = EVACapGatedCrossAttention(config)
        self.joint = EVACapJointEncoder(config.encoder_config, config.num_joint_layers)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_features: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        pixel_values_videos_mask: torch.Tensor | None = None,
        audio_index: torch.Tensor | None = None,
        video_index: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> EVACapEncoderOutput:
        r"""
        Args:
            input_features (`torch.FloatTensor` of shape `(batch_size, frames, num_mel_bins)`): The sound. Needed by
                every `fusion_type` but `"video_only"`.
            pixel_values_videos (`torch.FloatTensor` of shape `(batch_size, frames, channels, height, width)`,
                *optional*): The picture. Without it a gated model's gate is exactly 0, and `"concat"` reads the audio
                alone. `"audio_only"` ignores it.
            input_features_mask (`torch.Tensor` of shape `(batch_size, frames)`, *optional*): The filterbank frames
                that exist; all by default (AVCap).
            pixel_values_videos_mask (`torch.Tensor` of shape `(batch_size, frames)`, *optional*): The video frames
                that exist; all by default. A row of zeros is a clip without a picture.
            audio_index, video_index (`torch.LongTensor` of shape `(pairs,)`, *optional*): The rows of `input_features`
                and of `pixel_values_videos` that make each pair, for several pictures to one sound or several sounds
                to one picture; each row passes its tower once. By default row n goes with row n.

        Raises:
            ValueError: a stream that the variant needs is missing, or a shape does not fit the configuration.
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
                raise ValueError(_missing_stream(self.config))
            audio = self.audio_tower(input_features, input_features_mask, **outputs)
            _select_rows(audio, audio_index)
        if fusion_type != "audio_only" and pixel_values_videos is not None:
            video = self.video_tower(pixel_values_videos, pixel_values_videos_mask, **outputs)
            _select_rows(video, video_index)
            if audio is not None:
                _move(video, audio.last_hidden_state.device)
        if fusion_type == "video_only" and video is None:
            raise ValueError(_missing_stream(self.config))

        main = video if audio is None else audio
        hidden_states, token_mask = main.last_hidden_state, main.attention_mask
        gate = entropy = cross_attentions = None
        if fusion_type == "gated_cross_attention":
            if video is None:
                gate = entropy = hidden_states.new_zeros(hidden_states.shape[:2], dtype=torch.float32)
            else:
                hidden_states, gate, entropy, cross_attentions = self.fusion(
                    hidden_states, video.last_hidden_state, video.attention_mask, outputs["output_attentions"]
                )
                if token_mask is not None:
                    padding = ~token_mask.to(gate.device)
                    gate, entropy = gate.masked_fill(padding, 0.0), entropy.masked_fill(padding, 0.0)
        elif fusion_type == "concat" and video is not None:
            masks = _fill_in_masks(
                (audio.last_hidden_state, audio.attention_mask), (video.last_hidden_state, video.attention_mask)
            )
            token_mask = None if masks[0] is None else torch.cat(masks, dim=1)
            hidden_states = torch.cat([hidden_states, video.last_hidden_state], dim=1)
        joint = self.joint(hidden_states, token_mask, **outputs)

        beside = video if audio is not None and video is not None else BaseModelOutput()
        return EVACapEncoderOutput(
            last_hidden_state=joint.last_hidden_state,
            hidden_states=None if joint.hidden_states is None else main.hidden_states + joint.hidden_states[1:],
            attentions=None if joint.attentions is None else main.attentions + joint.attentions,
            cross_attentions=cross_attentions,
            video_hidden_states=beside.hidden_states,
            video_attentions=beside.attentions,
            attention_mask=token_mask,
            fusion_gate=gate,
            attention_entropy=entropy,
        )


def _select_rows(output: EVACapEncoderOutput, index: torch.Tensor | None) -> None:
    """Brings a tower's rows into the order of the pairs."""
    if index is not None:
        output.last_hidden_state = output.last_hidden_state[index]
        output.attention_mask = None if output.attention_mask is None else output.attention_mask[index]


def _move(output: EVACapEncoderOutput, device: torch.device) -> None:
    """Brings a tower's tokens to the device of the other tower, where `device_map` has put them apart."""
    output.last_hidden_state = output.last_hidden_state.to(device)
    if output.attention_mask is not None:
        output.attention_mask = output.attention_mask.to(device)


def _main_input_name(config: EVACapConfig) -> str:
    return "pixel_values_videos" if config.fusion_type == "video_only" else "input_features"


def _missing_stream(config: EVACapConfig) -> str:
    if config.fusion_type == "video_only":
        return "`pixel_values_videos` is missing: a model with `fusion_type='video_only'` needs the picture."
    return (
        f"`input_features` is missing: a model with `fusion_type='{config.fusion_type}'` needs the sound. Only a model "
        "with `fusion_type='video_only'` captions a clip without it."
    )


def _fill_in_masks(*parts: tuple[torch.Tensor, torch.Tensor | None]) -> list[torch.Tensor] | list[None]:
    """The masks (rows, length) of `(tensor, mask)` parts: all of them, or none where no part has one."""
    if all(mask is None for _, mask in parts):
        return [None] * len(parts)
    return [
        tensor.new_ones(tensor.shape[:2], dtype=torch.bool) if mask is None else mask.bool() for tensor, mask in parts
    ]


class EVACapDecoderAttention(nn.Module):
    """
    The attention of a prefix language model: prefix tokens see the prefix; a text token sees the prefix and the text
    up to itself. Queries, keys and values of both come from the same projections.

    A clip's beams share one row of prefix keys and values: the text may have `n` times as many rows as the prefix.
    """

    def __init__(self, config: EVACapTextConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(
        self,
        hidden_states: torch.Tensor,
        prefix_states: torch.Tensor | None,
        attention_mask: torch.Tensor,
        prefix_attention_mask: torch.Tensor | None,
        prefix_token_mask: torch.Tensor | None,
        past_key_values: EncoderDecoderCache | None = None,
        is_last: bool = False,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0

        prefix_output = None
        if prefix_states is None:
            cached_layer = past_key_values.cross_attention_cache.layers[self.layer_idx]
            prefix_key, prefix_value = cached_layer.keys, cached_layer.values
        else:
            prefix_key = self._heads(self.k_proj(prefix_states))
            prefix_value = self._heads(self.v_proj(prefix_states))
            if past_key_values is not None:
                prefix_key, prefix_value = past_key_values.cross_attention_cache.update(
                    prefix_key, prefix_value, self.layer_idx
                )
                past_key_values.is_updated[self.layer_idx] = True
            # After the last layer nothing reads the prefix any more.
            if not is_last:
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
        if past_key_values is not None:
            key, value = past_key_values.self_attention_cache.update(key, value, self.layer_idx)
        query = self._heads(self.q_proj(hidden_states)) * self.scaling

        clips, beams = prefix_key.shape[0], query.shape[0] // prefix_key.shape[0]
        # The beams of a clip become more queries of one row: (clips, heads, beams * queries, head_dim).
        grouped_query = query.unflatten(0, (clips, beams)).transpose(1, 2).flatten(2, 3)
        prefix_scores = torch.matmul(grouped_query, prefix_key.transpose(2, 3))
        if prefix_token_mask is not None:
            prefix_scores = prefix_scores.masked_fill(
                ~prefix_token_mask[:, None, None, :], torch.finfo(prefix_scores.dtype).min
            )
        prefix_scores = prefix_scores.unflatten(2, (beams, -1)).transpose(1, 2).flatten(0, 1)
        scores = torch.matmul(query, key.transpose(2, 3))
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)

        weights = F.softmax(torch.cat([prefix_scores, scores], dim=-1), dim=-1, dtype=torch.float32)
        weights = F.dropout(weights.to(query.dtype), p=dropout, training=self.training)
        prefix_weights, text_weights = weights.split([prefix_scores.shape[-1], scores.shape[-1]], dim=-1)

        grouped_weights = prefix_weights.unflatten(0, (clips, beams)).transpose(1, 2).flatten(2, 3)
        context = torch.matmul(grouped_weights, prefix_value)
        context = context.unflatten(2, (beams, -1)).transpose(1, 2).flatten(0, 1)
        context = context + torch.matmul(text_weights, value)
        output = self.o_proj(context.transpose(1, 2).flatten(2))
        return output, prefix_output, text_weights, prefix_weights


class EVACapDecoderLayer(GradientCheckpointingLayer):
    """A post-norm BERT layer over the text and, where its keys and values are not cached yet, the prefix."""

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
        output = self.fc2(self.activation_fn(self.fc1(hidden_states)))
        return self.final_layer_norm(hidden_states + self.dropout(output))

    def forward(
        self,
        hidden_states: torch.Tensor,
        prefix_states: torch.Tensor | None,
        attention_mask: torch.Tensor,
        prefix_attention_mask: torch.Tensor | None = None,
        prefix_token_mask: torch.Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        attention_output, prefix_output, _, _ = self.self_attn(
            hidden_states,
            prefix_states,
            attention_mask,
            prefix_attention_mask,
            prefix_token_mask,
            past_key_values=past_key_values,
            is_last=self.is_last,
            **kwargs,
        )
        if prefix_output is not None:
            prefix_states = self._feed_forward(prefix_states, prefix_output)
        return self._feed_forward(hidden_states, attention_output), prefix_states


class EVACapDecoder(EVACapPreTrainedModel):
    """The GIT-style prefix language model: the encoder's tokens are its prefix, the caption its text (AVCap)."""

    config_class = EVACapTextConfig
    main_input_name = "input_ids"
    input_modalities = ("text",)
    _can_record_outputs = {
        "hidden_states": EVACapDecoderLayer,
        "attentions": OutputRecorder(EVACapDecoderAttention, index=2),
        "cross_attentions": OutputRecorder(EVACapDecoderAttention, index=3),
    }

    def __init__(self, config: EVACapTextConfig, encoder_hidden_size: int | None = None):
        super().__init__(config)
        encoder_hidden_size = config.hidden_size if encoder_hidden_size is None else encoder_hidden_size
        self.prefix_projection = nn.Linear(encoder_hidden_size, config.hidden_size)
        self.prefix_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.prefix_layer_norm_eps)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layernorm_embedding = nn.LayerNorm(config.hidden_size, eps=config.embedding_layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList([EVACapDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        encoder_hidden_states: torch.FloatTensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(text_batch_size, length)`): The text so far; `text_batch_size` is
                a multiple of `batch_size`, a clip's beams following each other.
            attention_mask (`torch.Tensor` of shape `(text_batch_size, total_length)`, *optional*): The text tokens
                that exist, cached ones first.
            position_ids (`torch.LongTensor` of shape `(text_batch_size, length)`, *optional*): Text positions, from 0.
            past_key_values ([`EncoderDecoderCache`], *optional*): Keys and values: of the text in its
                `self_attention_cache`, of the prefix, once a clip, in its `cross_attention_cache`.
            inputs_embeds (`torch.FloatTensor` of shape `(text_batch_size, length, hidden_size)`, *optional*): Instead
                of `input_ids`.
            encoder_hidden_states (`torch.FloatTensor` of shape `(batch_size, T, encoder_hidden_size)`): The fused
                sequence. Read only while its keys and values are not in `past_key_values`.
            encoder_attention_mask (`torch.Tensor` of shape `(batch_size, T)`, *optional*): The tokens of it that
                exist.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `decoder_input_ids` and `decoder_inputs_embeds`.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))

        batch_size, length = inputs_embeds.shape[:2]
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        if isinstance(past_length, int) and past_length + length > self.config.max_position_embeddings:
            raise ValueError(
                f"The text has {past_length + length} tokens, but `text_config.max_position_embeddings` is "
                f"{self.config.max_position_embeddings}: ask for fewer new tokens."
            )
        steps = torch.arange(length, device=inputs_embeds.device) + past_length
        if position_ids is None:
            position_ids = steps[None]
        key_length = past_key_values.get_mask_sizes(length, 0)[0] if past_key_values is not None else length
        text_mask = torch.arange(key_length, device=steps.device) <= steps[:, None]
        text_mask = text_mask[None, None]
        if attention_mask is not None:
            seen = F.pad(attention_mask.bool(), (0, key_length - attention_mask.shape[1]))
            text_mask = text_mask & seen[:, None, None, :]

        prefix_states = prefix_mask = token_mask = None
        if encoder_attention_mask is not None:
            token_mask = encoder_attention_mask.bool()
        if past_key_values is None or not past_key_values.is_updated.get(0):
            if encoder_hidden_states is None:
                raise ValueError("`encoder_hidden_states` is missing: the decoder has no prefix to read.")
            if batch_size % encoder_hidden_states.shape[0]:
                raise ValueError(
                    f"The decoder got {batch_size} rows of text for {encoder_hidden_states.shape[0]} encoded clips, "
                    "but it needs the same number for each clip."
                )
            prefix_states = self.prefix_layer_norm(self.prefix_projection(encoder_hidden_states))
            prefix_mask = _attention_mask(self.config, prefix_states, token_mask)

        positions = self.embed_positions(position_ids).to(inputs_embeds.device)
        hidden_states = self.dropout(self.layernorm_embedding(inputs_embeds + positions))
        for layer in self.layers:
            hidden_states, prefix_states = layer(
                hidden_states,
                prefix_states,
                text_mask,
                prefix_mask,
                token_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=hidden_states, past_key_values=past_key_values if use_cache else None
        )


class EVACapModel(EVACapPreTrainedModel):
    """The encoder and the decoder without a language head."""

    def __init__(self, config: EVACapConfig):
        super().__init__(config)
        self.main_input_name = _main_input_name(config)
        self.encoder = EVACapEncoder(config)
        self.decoder = EVACapDecoder(config.text_config, config.encoder_config.hidden_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.decoder.embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        input_features: torch.FloatTensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        pixel_values_videos_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: EVACapEncoderOutput | tuple | None = None,
        past_key_values: Cache | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        decoder_position_ids: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqModelOutput:
        r"""
        The streams and their masks are [`EVACapEncoder`]'s, the decoder arguments [`EVACapDecoder`]'s.

        Args:
            encoder_outputs ([`EVACapEncoderOutput`] or `tuple`, *optional*): What the encoder returned, to encode a
                clip once and use it often. Of a tuple only the first, `last_hidden_state`, is read: it has no mask.
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
                output_attentions=output_attentions,
                output_hidden_states=output_hidden_states,
                return_dict=True,
            )
        elif isinstance(encoder_outputs, tuple):
            encoder_outputs = EVACapEncoderOutput(last_hidden_state=encoder_outputs[0])
        if (
            decoder_input_ids is None
            and decoder_inputs_embeds is None
            and self.config.decoder_start_token_id is not None
        ):
            rows = encoder_outputs.last_hidden_state.shape[0]
            decoder_input_ids = torch.full(
                (rows, 1), self.config.decoder_start_token_id, device=encoder_outputs.last_hidden_state.device
            )
        decoder_outputs = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            position_ids=decoder_position_ids,
            past_key_values=past_key_values,
            inputs_embeds=decoder_inputs_embeds,
            encoder_hidden_states=encoder_outputs.last_hidden_state,
            encoder_attention_mask=getattr(encoder_outputs, "attention_mask", None),
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=decoder_outputs.last_hidden_state,
            past_key_values=decoder_outputs.past_key_values,
            decoder_hidden_states=decoder_outputs.hidden_states,
            decoder_attentions=decoder_outputs.attentions,
            cross_attentions=decoder_outputs.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )


def shift_tokens_right(labels: torch.Tensor, pad_token_id: int, decoder_start_token_id: int) -> torch.Tensor:
    """The decoder's input (batch_size, length) for `labels`: the start token, then the labels but their last."""
    shifted = F.pad(labels[:, :-1], (1, 0), value=decoder_start_token_id)
    return shifted.masked_fill(shifted == -100, pad_token_id)


def label_smoothed_kl(
    logits: torch.Tensor, labels: torch.Tensor, epsilon: float, num_items_in_batch: int | torch.Tensor | None = None
) -> torch.Tensor:
    """
    The KL divergence of the prediction to the smoothed target: probability 1 - epsilon on the true class,
    epsilon / (n - 1) on each other (AVCap). With `epsilon=0` it is the cross-entropy.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, length, n)`): Scores over the vocabulary.
        labels (`torch.LongTensor` of shape `(batch_size, length)`): True classes; -100 is not counted.
        epsilon (`float`): Probability taken from the true class.
        num_items_in_batch (`int` or `torch.Tensor`, *optional*): Tokens to divide by, where a batch is accumulated in
            parts; by default the tokens of `labels`.
    """
    counted = labels != -100
    log_probabilities = logits.float().log_softmax(-1)
    true_class = log_probabilities.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    loss = -true_class
    if epsilon > 0:
        share = epsilon / (logits.shape[-1] - 1)
        others = log_probabilities.sum(-1) - true_class
        negative_entropy = (1 - epsilon) * math.log(1 - epsilon) + epsilon * math.log(share)
        loss = negative_entropy - (1 - epsilon) * true_class - share * others
    total = loss.masked_fill(~counted, 0.0).sum()
    return total / (counted.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)


def gate_stability(gate: torch.Tensor, num_rows: int, token_mask: torch.Tensor | None = None) -> torch.Tensor:
    """
    The mean squared difference between the gates of neighbouring audio time steps (the paper names the term, the
    formula is ours). A clip without a picture counts as perfectly stable.

    Args:
        gate (`torch.Tensor` of shape `(batch_size, num_rows * steps)`): The gate of each audio token, mel row by row.
        num_rows (`int`): Mel rows, over which the gates are averaged first.
        token_mask (`torch.BoolTensor` of shape `(batch_size, num_rows * steps)`, *optional*): The tokens that exist.
    """
    change = gate.unflatten(1, (num_rows, -1)).mean(1).diff(dim=1).square()
    if token_mask is None:
        return change.sum() / max(change.numel(), 1)
    exists = token_mask.unflatten(1, (num_rows, -1))[:, 0]
    pairs = exists[:, 1:] & exists[:, :-1]
    return change.masked_fill(~pairs, 0.0).sum() / pairs.sum().clamp(min=1)


def semantic_consistency(matched: torch.Tensor, swapped: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    KL(p(y|a,v) ‖ p(y|a,v̂)), mean over the tokens of samples whose video was swapped, without a gradient through the
    matched side (the paper names the term, the formula is ours).

    Args:
        matched (`torch.Tensor` of shape `(samples, length, n)`): Scores with the own video.
        swapped (`torch.Tensor` of shape `(samples, length, n)`): Scores with the other video.
        labels (`torch.LongTensor` of shape `(samples, length)`): -100 is not counted.
    """
    counted = labels != -100
    target = matched.detach()[counted].float().log_softmax(-1)
    prediction = swapped[counted].float().log_softmax(-1)
    return F.kl_div(prediction, target, reduction="sum", log_target=True) / counted.sum().clamp(min=1)


class EVACapForConditionalGeneration(EVACapPreTrainedModel, GenerationMixin):
    """
    The captioner: [`EVACapModel`] with a language head on tied word embeddings, the loss, and `generate`.

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

    _tied_weights_keys = {"lm_head.weight": "model.decoder.embed_tokens.weight"}

    def __init__(self, config: EVACapConfig):
        super().__init__(config)
        self.main_input_name = _main_input_name(config)
        self.model = EVACapModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size)
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

    @can_return_tuple
    def forward(
        self,
        input_features: torch.FloatTensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        pixel_values_videos_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: EVACapEncoderOutput | tuple | None = None,
        past_key_values: Cache | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        decoder_position_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        shuffled: torch.Tensor | None = None,
        video_index: torch.Tensor | None = None,
        matched_pixel_values_videos: torch.FloatTensor | None = None,
        matched_pixel_values_videos_mask: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> EVACapSeq2SeqLMOutput:
        r"""
        Args:
            input_features (`torch.FloatTensor` of shape `(batch_size, frames, num_mel_bins)`): The sound.
            pixel_values_videos (`torch.FloatTensor` of shape `(batch_size, frames, channels, height, width)`,
                *optional*): The picture.
            input_features_mask (`torch.Tensor` of shape `(batch_size, frames)`, *optional*): Frames that exist.
            pixel_values_videos_mask (`torch.Tensor` of shape `(batch_size, frames)`, *optional*): Frames that exist;
                a row of zeros is a clip without a picture.
            decoder_input_ids (`torch.LongTensor` of shape `(batch_size, length)`, *optional*): The caption so far;
                made from `labels` by a shift to the right where those are given.
            labels (`torch.LongTensor` of shape `(batch_size, length)`, *optional*): The caption without its start
                token, with `[SEP]` at its end, padded with -100; the loss is [`label_smoothed_kl`]'s.
            shuffled (`torch.BoolTensor` of shape `(batch_size,)`, *optional*): The samples whose video the data
                collator swapped; used by the semantic-consistency term.
            video_index (`torch.LongTensor` of shape `(batch_size,)`, *optional*): The sample each video came from, as
                the data collator reports it; used by the same term.
            matched_pixel_values_videos (`torch.FloatTensor` of shape `(swapped, frames, channels, height, width)`,
                *optional*): The own videos of the swapped samples, in their order, for the semantic-consistency term.
            matched_pixel_values_videos_mask (`torch.Tensor` of shape `(swapped, frames)`, *optional*): Frames of
                those that exist.
        """
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = shift_tokens_right(
                labels, self.config.text_config.pad_token_id, self.config.decoder_start_token_id
            )

        swapped = audio_index = tower_index = None
        if self.training and labels is not None and matched_pixel_values_videos is not None:
            if self.config.semantic_consistency_weight > 0 and len(matched_pixel_values_videos) > 0:
                if shuffled is None or video_index is None or encoder_outputs is not None:
                    raise ValueError(
                        "The semantic-consistency term needs `shuffled`, `video_index`, and the streams instead of "
                        "`encoder_outputs`."
                    )
                swapped = shuffled.nonzero().squeeze(1)
                if len(swapped) != len(matched_pixel_values_videos):
                    raise ValueError(
                        f"`matched_pixel_values_videos` has {len(matched_pixel_values_videos)} videos, but `shuffled` "
                        f"marks {len(swapped)} samples: it must hold the own video of each of those, in their order."
                    )
                # Every sample's own video passes the tower once; the swapped samples then come twice, with the other
                # video and, as more rows, with their own.
                masks = _fill_in_masks(
                    (pixel_values_videos, pixel_values_videos_mask),
                    (matched_pixel_values_videos, matched_pixel_values_videos_mask),
                )
                pixel_values_videos = pixel_values_videos.index_copy(0, swapped, matched_pixel_values_videos)
                if masks[0] is not None:
                    pixel_values_videos_mask = masks[0].index_copy(0, swapped, masks[1])
                audio_index = torch.cat([torch.arange(len(shuffled), device=swapped.device), swapped])
                tower_index = torch.cat([video_index, swapped])
                decoder_input_ids, decoder_attention_mask, decoder_inputs_embeds, decoder_position_ids = (
                    None if rows is None else rows[audio_index]
                    for rows in (
                        decoder_input_ids,
                        decoder_attention_mask,
                        decoder_inputs_embeds,
                        decoder_position_ids,
                    )
                )
        if encoder_outputs is None:
            encoder_outputs = self.model.encoder(
                input_features,
                pixel_values_videos,
                input_features_mask,
                pixel_values_videos_mask,
                audio_index=audio_index,
                video_index=tower_index,
                output_attentions=output_attentions,
                output_hidden_states=output_hidden_states,
                return_dict=True,
            )
        outputs = self.model(
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            decoder_inputs_embeds=decoder_inputs_embeds,
            decoder_position_ids=decoder_position_ids,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(outputs.last_hidden_state)
        loss, terms = None, {}
        if labels is not None:
            labels = labels.to(logits.device)
            logits, matched_logits = logits.split([len(labels), len(logits) - len(labels)])
            loss = label_smoothed_kl(logits, labels, self.config.label_smoothing, num_items_in_batch)
            # Means over this batch; where it is a part of a larger one, they count as its part.
            share = 1 if num_items_in_batch is None else (labels != -100).sum() / num_items_in_batch
            caption_loss = loss / share
            gate = getattr(encoder_outputs, "fusion_gate", None)
            if self.config.gate_stability_weight > 0 and gate is not None:
                mask = encoder_outputs.attention_mask
                terms["gate_stability"] = gate_stability(
                    gate[: len(labels)],
                    self.model.encoder.audio_tower.embeddings.num_rows,
                    None if mask is None else mask[: len(labels)].to(gate.device),
                ).to(loss.device)
                loss = loss + share * self.config.gate_stability_weight * terms["gate_stability"]
            if swapped is not None:
                rows = swapped.to(logits.device)
                terms["semantic_consistency"] = semantic_consistency(matched_logits, logits[rows], labels[rows])
                loss = loss + share * self.config.semantic_consistency_weight * terms["semantic_consistency"]
            if terms:
                terms = {name: term.detach() for name, term in {"caption_loss": caption_loss, **terms}.items()}
        return EVACapSeq2SeqLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            decoder_hidden_states=outputs.decoder_hidden_states,
            decoder_attentions=outputs.decoder_attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            encoder_attentions=outputs.encoder_attentions,
            **terms,
        )

    @staticmethod
    def create_masks_for_generate(attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
        """The decoder makes its mask from the cache's own length, which costs nothing and compiles as well."""
        return attention_mask

    def _prepare_model_inputs(self, inputs: torch.Tensor | None, bos_token_id, model_kwargs: dict[str, Any]):
        """Without the main stream, `generate` would take start tokens for it."""
        if inputs is None and all(
            model_kwargs.get(name) is None for name in (self.main_input_name, "encoder_outputs")
        ):
            raise ValueError(_missing_stream(self.config))
        return super()._prepare_model_inputs(inputs, bos_token_id, model_kwargs)

    def _expand_inputs_for_generation(self, expand_size: int = 1, **kwargs: Any):
        """Repeats the text for beams and sequences, but not the encoded clip: its prefix is computed once."""
        encoder_outputs = kwargs.pop("encoder_outputs", None)
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, encoder_outputs=BaseModelOutput(), **kwargs
        )
        kwargs["encoder_outputs"] = encoder_outputs
        return input_ids, kwargs

    def _reorder_cache(self, past_key_values: EncoderDecoderCache, beam_idx: torch.LongTensor) -> EncoderDecoderCache:
        """Reorders the text only: the beams of a clip share its prefix."""
        past_key_values.self_attention_cache.reorder_cache(beam_idx)
        return past_key_values


__all__ = [
    "EVACapAudioTower",
    "EVACapDecoder",
    "EVACapEncoder",
    "EVACapEncoderOutput",
    "EVACapForConditionalGeneration",
    "EVACapGatedCrossAttention",
    "EVACapModel",
    "EVACapPreTrainedModel",
    "EVACapSeq2SeqLMOutput",
    "EVACapVideoTower",
]

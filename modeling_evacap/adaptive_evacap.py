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
"""Decoder layers that read sound and picture as two memories, and weigh each by a confidence that the text gives.

The idea is that of V-ACT, "Visually-Aware Audio Captioning with Adaptive Audio-Visual Attention" (Liu et al., Interspeech
2023). Its formula is not in the published code, so this one is ours. For the state t of a text token after causal
self-attention, and the tokens A of the sound and V of the picture:

    c_a = MHA(t, A, A),  c_v = MHA(t, V, V)      with the same projections, each with a softmax of its own
    κ_a = σ(w_a · [t; c_a] + b_a)                one number for each text token, in float32
    κ_v = σ(w_v · [t; c_v] + b_v)                exactly 0 for a clip without a picture
    t' = LN(t + W (κ_a c_a + κ_v c_v))           W is the output projection

w starts at 0, b_a at 4 and b_v at 0: the sound is trusted, the picture half.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import EncoderDecoderCache

from .attention_evacap import at_least_float32
from .configuration_evacap import EVACapTextConfig


CONFIDENCE_BIAS = (4.0, 0.0)
"""The confidence in sound and picture before training, as a logit."""


class EVACapTextAttention(nn.Module):
    """The projections of an attention whose queries are text tokens."""

    def __init__(self, config: EVACapTextConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _keys_and_values(
        self, memory: torch.Tensor | None, cache: EncoderDecoderCache | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of the encoded clips, which are in the cache if `memory` is `None`."""
        if memory is None:
            layer = cache.cross_attention_cache.layers[self.layer_idx]
            return layer.keys, layer.values
        key, value = self._heads(self.k_proj(memory)), self._heads(self.v_proj(memory))
        if cache is not None:
            key, value = cache.cross_attention_cache.update(key, value, self.layer_idx)
            cache.is_updated[self.layer_idx] = True
        return key, value

    def _weights(self, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        scores = torch.matmul(query * self.scaling, key.mT)
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)

    def _dropout(self, weights: torch.Tensor) -> torch.Tensor:
        return F.dropout(weights, self.config.attention_probs_dropout_prob, self.training)


class EVACapTextSelfAttention(EVACapTextAttention):
    """Causal self-attention of the text."""

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor, cache: EncoderDecoderCache | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = self._heads(self.k_proj(hidden_states)), self._heads(self.v_proj(hidden_states))
        if cache is not None:
            key, value = cache.self_attention_cache.update(key, value, self.layer_idx)
        weights = self._weights(self._heads(self.q_proj(hidden_states)), key, attention_mask)
        context = torch.matmul(self._dropout(weights), value)
        return self.o_proj(context.transpose(1, 2).flatten(2)), weights


class EVACapAdaptiveAttention(EVACapTextAttention):
    """Attention of the text to sound and picture, each weighed by a confidence (ours, after V-ACT)."""

    def __init__(self, config: EVACapTextConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.confidence_weight = nn.Parameter(torch.empty(2, 2 * config.hidden_size))
        self.confidence_bias = nn.Parameter(torch.empty(2))

    def forward(
        self,
        hidden_states: torch.Tensor,
        memory: torch.Tensor | None,
        token_mask: torch.Tensor | None = None,
        video_mask: torch.Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        r"""Reads both memories, whose keys and values all captions of a clip share.

        Args:
            hidden_states (`torch.Tensor` of shape `(text_batch_size, length, hidden_size)`): The text.
            memory (`torch.Tensor` of shape `(batch_size, T, hidden_size)`, *optional*): The tokens of sound and picture;
                `None` if their keys and values are in `cache`.
            token_mask (`torch.BoolTensor` of shape `(batch_size, T)`, *optional*): The tokens that exist; all by default.
            video_mask (`torch.BoolTensor` of shape `(batch_size, T)`, *optional*): The tokens of the picture; none by
                default.
            cache ([`EncoderDecoderCache`], *optional*): See [`EVACapDecoder`].

        Returns:
            The output (text_batch_size, length, hidden_size), the attention probabilities (text_batch_size, num_heads,
            length, T), which sum to 1 over the sound and to 1 over the picture, and the confidence (text_batch_size,
            length, 2) in sound and picture, in float32.
        """
        key, value = self._keys_and_values(memory, cache)
        exists = torch.ones_like(key[:, 0, :, 0], dtype=torch.bool) if token_mask is None else token_mask
        is_video = torch.zeros_like(exists) if video_mask is None else video_mask
        # (clips, 2, 1, 1, T)
        streams = torch.stack([exists & ~is_video, exists & is_video], dim=1)[:, :, None, None]
        clips, captions = key.shape[0], hidden_states.shape[0]
        query = by_clip(self._heads(self.q_proj(hidden_states)), clips)
        # A memory without tokens has no weights.
        weights = by_caption((self._weights(query[:, None], key[:, None], streams) * streams).sum(1), captions)
        # (clips, 2, num_heads, captions * length, head_dim)
        context = torch.matmul(by_clip(self._dropout(weights), clips)[:, None] * streams, value[:, None])
        # (text_batch_size, length, 2, hidden_size)
        context = by_caption(context.flatten(1, 2), captions).transpose(1, 2).unflatten(2, (2, -1)).flatten(3)
        states = torch.cat([hidden_states[:, :, None].expand_as(context), context], dim=-1)
        # As a sum of products, because autocast would take a dot product in half precision.
        logits = (at_least_float32(states) * self.confidence_weight).sum(-1) + self.confidence_bias
        confidence = torch.sigmoid(at_least_float32(logits))
        is_empty = ~streams.any(-1)[..., 0].mT.repeat_interleave(captions // clips, 0)
        confidence = confidence.masked_fill(is_empty, 0.0)
        mixed = (confidence[..., None] * context).sum(2).to(hidden_states.dtype)
        return self.o_proj(mixed), weights, confidence


def by_clip(states: torch.Tensor, clips: int) -> torch.Tensor:
    """The captions of a clip as more queries of one row: (clips, num_heads, captions * length, n)."""
    return states.unflatten(0, (clips, -1)).transpose(1, 2).flatten(2, 3)


def by_caption(states: torch.Tensor, captions: int) -> torch.Tensor:
    """What [`by_clip`] has put together apart again: (captions, num_heads, length, n)."""
    return states.unflatten(2, (captions // states.shape[0], -1)).transpose(1, 2).flatten(0, 1)


__all__ = ["EVACapAdaptiveAttention", "EVACapTextAttention", "EVACapTextSelfAttention"]

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
from torch import nn
from transformers.cache_utils import EncoderDecoderCache

from .attention_evacap import EVACapTextAttention, at_least_float32, by_caption, by_clip
from .configuration_evacap import EVACapTextConfig


CONFIDENCE_BIAS = (4.0, 0.0)
"""The confidence in sound and picture before training, as a logit."""


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


__all__ = ["EVACapAdaptiveAttention", "EVACapTextSelfAttention"]

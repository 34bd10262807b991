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

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scores = torch.matmul(query * self.scaling, key.mT)
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        dropped = F.dropout(weights, self.config.attention_probs_dropout_prob, self.training)
        return torch.matmul(dropped, value), weights


class EVACapTextSelfAttention(EVACapTextAttention):
    """Causal self-attention of the text."""

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor, cache: EncoderDecoderCache | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = self._heads(self.k_proj(hidden_states)), self._heads(self.v_proj(hidden_states))
        if cache is not None:
            key, value = cache.self_attention_cache.update(key, value, self.layer_idx)
        context, weights = self._attend(self._heads(self.q_proj(hidden_states)), key, value, attention_mask)
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
        stream_masks: torch.Tensor,
        cache: EncoderDecoderCache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        r"""Reads both memories, whose keys and values all captions of a clip share.

        Args:
            hidden_states (`torch.Tensor` of shape `(text_batch_size, length, hidden_size)`): The text.
            memory (`torch.Tensor` of shape `(batch_size, T, hidden_size)`, *optional*): The tokens of sound and picture;
                `None` if their keys and values are in `cache`.
            stream_masks (`torch.BoolTensor` of shape `(batch_size, 2, T)`): The tokens of the sound, and those of the
                picture.
            cache ([`EncoderDecoderCache`], *optional*): See [`EVACapDecoder`].

        Returns:
            The output (text_batch_size, length, hidden_size), the attention probabilities (text_batch_size, num_heads,
            length, T), which sum to 1 over the sound and to 1 over the picture, and the confidence (text_batch_size,
            length, 2) in sound and picture, in float32.
        """
        if memory is None:
            layer = cache.cross_attention_cache.layers[self.layer_idx]
            key, value = layer.keys, layer.values
        else:
            key, value = self._heads(self.k_proj(memory)), self._heads(self.v_proj(memory))
            if cache is not None:
                key, value = cache.cross_attention_cache.update(key, value, self.layer_idx)
                cache.is_updated[self.layer_idx] = True
        clips, captions = key.shape[0], hidden_states.shape[0] // key.shape[0]
        # The captions of a clip become more queries of one row: (clips, 1, heads, captions * length, head_dim).
        query = self._heads(self.q_proj(hidden_states)).unflatten(0, (clips, captions)).transpose(1, 2).flatten(2, 3)
        context, weights = self._attend(query[:, None], key[:, None], value[:, None], stream_masks[:, :, None, None])

        exists = stream_masks.any(-1)
        weights = weights.masked_fill(~exists[..., None, None, None], 0).sum(1)
        weights = weights.unflatten(2, (captions, -1)).transpose(1, 2).flatten(0, 1)
        # (text_batch_size, length, 2, hidden_size)
        context = context.unflatten(3, (captions, -1)).permute(0, 3, 4, 1, 2, 5).flatten(4).flatten(0, 1)
        states = torch.cat([hidden_states[:, :, None].expand_as(context), context], dim=-1)
        # As a sum of products, because autocast would take a dot product in half precision.
        logits = (at_least_float32(states) * self.confidence_weight).sum(-1) + self.confidence_bias
        confidence = torch.sigmoid(at_least_float32(logits))
        confidence = confidence.masked_fill(~exists.repeat_interleave(captions, 0)[:, None], 0.0)
        mixed = (confidence[..., None] * context).sum(2).to(hidden_states.dtype)
        return self.o_proj(mixed), weights, confidence


__all__ = ["EVACapAdaptiveAttention", "EVACapTextAttention", "EVACapTextSelfAttention"]

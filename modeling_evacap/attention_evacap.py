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
"""What the attentions of the model share: scores in blocks, for little memory, and what those of the text have in common."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import EncoderDecoderCache
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .configuration_evacap import EVACapTextConfig


# Size of a block of attention scores in bytes, and its greatest number of queries. On a CPU a block fits the cache.
SCORE_BYTES_AT_ONCE = {"cpu": 2**21, "cuda": 2**25}
QUERIES_AT_ONCE = 256


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def all_where_none(mask: torch.Tensor | None) -> torch.Tensor | None:
    """A mask (batch_size, tokens) in which a row without any token has all of its padding.

    What is computed for such a row is never used, but a softmax or a mean over nothing would not be a number.
    """
    return None if mask is None else mask | ~mask.any(1, keepdim=True)


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
    """The scores of attention, block by block.

    Args:
        query (`torch.Tensor` of shape `(batch_size, num_heads, queries, head_dim)`): The scaled queries.
        key (`torch.Tensor` of shape `(batch_size, num_heads, keys, head_dim)`): The keys.
        mask (`torch.BoolTensor` of shape `(batch_size, keys)`, *optional*): The keys that exist.

    Yields:
        The slices of a block, over `batch_size * num_heads` rows and over queries, and its scores (rows, queries,
        keys). The scores of masked keys are the lowest number of the dtype.
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
    """Eager attention in blocks of scores that fit the cache, for inference in bfloat16 on a CPU.

    The fused kernel of PyTorch is not faster there in bfloat16 than in float32 (`benchmarks/README.md`).
    """
    output, values = torch.empty_like(query.flatten(0, 1)), value.flatten(0, 1)
    # Products are faster if the keys are contiguous.
    key = key.transpose(2, 3).contiguous().transpose(2, 3)
    # Bidirectional attention: all queries of a row see the same keys.
    mask = None if attention_mask is None else attention_mask[:, 0, 0].expand(query.shape[0], -1)
    for block, scores in score_blocks(query * scaling, key, mask):
        output[block] = torch.bmm(scores.softmax(-1), values[block[0]])
    return output.view_as(query).transpose(1, 2), None


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


def by_clip(states: torch.Tensor, clips: int) -> torch.Tensor:
    """The captions of a clip as more queries of one row: (clips, num_heads, captions * length, n)."""
    return states.unflatten(0, (clips, -1)).transpose(1, 2).flatten(2, 3)


def by_caption(states: torch.Tensor, captions: int) -> torch.Tensor:
    """What [`by_clip`] has put together apart again: (captions, num_heads, length, n)."""
    return states.unflatten(2, (captions // states.shape[0], -1)).transpose(1, 2).flatten(0, 1)

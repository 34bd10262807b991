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
"""Attention block by block, for towers and fusion: the whole map of scores is never held."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs


# Where attention scores are not held all at once: how many bytes of them are, and of how many queries at most. On a CPU
# they stay in its cache.
SCORE_BYTES_AT_ONCE = {"cpu": 2**21, "cuda": 2**25}
QUERIES_AT_ONCE = 256


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


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
    """Inference in bfloat16 on a CPU: eager attention over blocks of scores, which stay in the cache. PyTorch's fused
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

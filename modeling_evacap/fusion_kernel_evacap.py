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
"""Triton kernels for the fusion on a GPU: attention and its entropy in one pass over the keys."""

import contextlib
from collections.abc import Iterator

import torch


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


# The kernels compute powers and logarithms of two, as GPUs do.
LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
MAX_HEAD_DIM = 128
# Queries, keys, warps and pipeline stages of the three kernels, by (float32, head_dim above 64). The first row was the
# fastest of 18 on an H200; the others spill few or no registers on compute capability 9.0. All fit in the 99 KB of
# shared memory of 8.6 and 8.9.
BLOCKS = {
    (False, False): ((128, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 2)),
    (False, True): ((128, 32, 8, 2), (64, 32, 8, 2), (32, 64, 8, 2)),
    (True, False): ((64, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
    (True, True): ((32, 32, 4, 2), (32, 32, 8, 1), (32, 32, 8, 1)),
}


def has_kernel(query: torch.Tensor) -> bool:
    """Whether the kernels run on this tensor (…, head_dim); without Triton, and in float64, they do not."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    return triton is not None and query.is_cuda and query.dtype in dtypes and query.shape[-1] <= MAX_HEAD_DIM


if triton is not None:
    _LOG2_E, _LN_2 = tl.constexpr(LOG2_E), tl.constexpr(LN_2)

    @triton.jit
    def _places(clip, head, rows, num_rows, num_heads, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
        """Where `rows` of one head are in a tensor (clips, num_rows, num_heads, HEAD_DIM), and which of them exist."""
        columns = tl.arange(0, WIDTH)
        start = (clip.to(tl.int64) * num_rows * num_heads + head) * HEAD_DIM
        places = start + rows[:, None] * (num_heads * HEAD_DIM) + columns[None, :]
        return places, (rows < num_rows)[:, None] & (columns < HEAD_DIM)[None, :]

    @triton.jit
    def _load(tensor, clip, head, rows, num_rows, num_heads, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
        places, exist = _places(clip, head, rows, num_rows, num_heads, HEAD_DIM, WIDTH)
        return tl.load(tensor + places, mask=exist, other=0.0)

    @triton.jit
    def _store(tensor, tile, clip, head, rows, num_rows, num_heads, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
        places, exist = _places(clip, head, rows, num_rows, num_heads, HEAD_DIM, WIDTH)
        tl.store(tensor + places, tile.to(tensor.dtype.element_ty), mask=exist)

    @triton.jit
    def _visible(mask, clip, columns, num_keys, MASKED: tl.constexpr):
        """The keys `columns` of a clip that exist."""
        visible = columns < num_keys
        if MASKED:
            visible &= tl.load(mask + clip.to(tl.int64) * num_keys + columns, mask=visible, other=0) != 0
        return visible

    @triton.jit
    def _forward_kernel(
        query,
        key,
        value,
        mask,
        context,
        entropy,
        highest,
        log_total,
        scaling,
        num_heads,
        num_queries,
        num_keys,
        MASKED: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        WIDTH: tl.constexpr,
        PRECISION: tl.constexpr,
        QUERIES: tl.constexpr,
        KEYS: tl.constexpr,
    ):
        """The forward pass of a block of queries of one head.

        Besides the sums of e^s and e^s v of an online softmax, it keeps the sum of s e^s, all relative to the highest
        score so far.
        """
        num_blocks = tl.cdiv(num_queries, QUERIES)
        pair = tl.program_id(0) // num_blocks
        clip, head = pair // num_heads, pair % num_heads
        rows = tl.program_id(0) % num_blocks * QUERIES + tl.arange(0, QUERIES)

        queries = _load(query, clip, head, rows, num_queries, num_heads, HEAD_DIM, WIDTH)
        # Finite, because differences are taken before the first block with a visible key.
        peak = tl.full([QUERIES], -1e38, tl.float32)
        total = tl.zeros([QUERIES], tl.float32)
        products = tl.zeros([QUERIES], tl.float32)
        mixed = tl.zeros([QUERIES, WIDTH], tl.float32)
        for start in range(0, num_keys, KEYS):
            columns = start + tl.arange(0, KEYS)
            visible = _visible(mask, clip, columns, num_keys, MASKED)[None, :]
            keys = _load(key, clip, head, columns, num_keys, num_heads, HEAD_DIM, WIDTH)
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * (scaling * _LOG2_E)
            new_peak = tl.maximum(peak, tl.max(tl.where(visible, scores, -1e38), 1))
            scores -= new_peak[:, None]
            weights = tl.exp2(tl.where(visible, scores, float("-inf")))
            drop = peak - new_peak
            shrink = tl.exp2(drop)
            products = shrink * (products + drop * total) + tl.sum(weights * scores, 1)
            total = shrink * total + tl.sum(weights, 1)
            values = _load(value, clip, head, columns, num_keys, num_heads, HEAD_DIM, WIDTH)
            mixed = tl.dot(weights.to(values.dtype), values, mixed * shrink[:, None], input_precision=PRECISION)
            peak = new_peak

        _store(context, (mixed / total[:, None]), clip, head, rows, num_queries, num_heads, HEAD_DIM, WIDTH)
        places = pair.to(tl.int64) * num_queries + rows
        exist = rows < num_queries
        tl.store(entropy + places, (tl.log2(total) - products / total) * _LN_2, mask=exist)
        tl.store(highest + places, peak, mask=exist)
        tl.store(log_total + places, tl.log2(total), mask=exist)

    @triton.jit
    def _query_gradient_kernel(
        query,
        key,
        value,
        mask,
        context,
        entropy,
        highest,
        log_total,
        of_context,
        of_entropy,
        of_query,
        mean,
        scaling,
        num_heads,
        num_queries,
        num_keys,
        MASKED: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        WIDTH: tl.constexpr,
        PRECISION: tl.constexpr,
        QUERIES: tl.constexpr,
        KEYS: tl.constexpr,
    ):
        """The gradient of a block of queries, and the `mean` over the keys to subtract in the gradient of every score."""
        num_blocks = tl.cdiv(num_queries, QUERIES)
        pair = tl.program_id(0) // num_blocks
        clip, head = pair // num_heads, pair % num_heads
        rows = tl.program_id(0) % num_blocks * QUERIES + tl.arange(0, QUERIES)

        queries = _load(query, clip, head, rows, num_queries, num_heads, HEAD_DIM, WIDTH)
        of_contexts = _load(of_context, clip, head, rows, num_queries, num_heads, HEAD_DIM, WIDTH)
        contexts = _load(context, clip, head, rows, num_queries, num_heads, HEAD_DIM, WIDTH)
        places = pair.to(tl.int64) * num_queries + rows
        exist = rows < num_queries
        of_entropies = tl.load(of_entropy + places, mask=exist, other=0.0)
        means = tl.sum(contexts.to(tl.float32) * of_contexts.to(tl.float32), 1)
        means += of_entropies * tl.load(entropy + places, mask=exist, other=0.0)
        tl.store(mean + places, means, mask=exist)
        peak = tl.load(highest + places, mask=exist, other=0.0)
        logs = tl.load(log_total + places, mask=exist, other=0.0)

        gradient = tl.zeros([QUERIES, WIDTH], tl.float32)
        for start in range(0, num_keys, KEYS):
            columns = start + tl.arange(0, KEYS)
            visible = _visible(mask, clip, columns, num_keys, MASKED)[None, :]
            keys = _load(key, clip, head, columns, num_keys, num_heads, HEAD_DIM, WIDTH)
            values = _load(value, clip, head, columns, num_keys, num_heads, HEAD_DIM, WIDTH)
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * (scaling * _LOG2_E)
            log_weights = (scores - peak[:, None]) - logs[:, None]
            weights = tl.exp2(tl.where(visible, log_weights, float("-inf")))
            of_weights = tl.dot(of_contexts, tl.trans(values), input_precision=PRECISION)
            of_scores = of_weights - means[:, None] - (of_entropies * _LN_2)[:, None] * log_weights
            of_scores = (weights * of_scores).to(keys.dtype)
            gradient = tl.dot(of_scores, keys, gradient, input_precision=PRECISION)
        _store(of_query, (gradient * scaling), clip, head, rows, num_queries, num_heads, HEAD_DIM, WIDTH)

    @triton.jit
    def _key_value_gradient_kernel(
        query,
        key,
        value,
        mask,
        highest,
        log_total,
        of_context,
        of_entropy,
        mean,
        of_key,
        of_value,
        scaling,
        num_heads,
        num_queries,
        num_keys,
        MASKED: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        WIDTH: tl.constexpr,
        PRECISION: tl.constexpr,
        QUERIES: tl.constexpr,
        KEYS: tl.constexpr,
    ):
        """The gradients of a block of keys and of their values."""
        num_blocks = tl.cdiv(num_keys, KEYS)
        pair = tl.program_id(0) // num_blocks
        clip, head = pair // num_heads, pair % num_heads
        columns = tl.program_id(0) % num_blocks * KEYS + tl.arange(0, KEYS)
        visible = _visible(mask, clip, columns, num_keys, MASKED)[:, None]

        keys = _load(key, clip, head, columns, num_keys, num_heads, HEAD_DIM, WIDTH)
        values = _load(value, clip, head, columns, num_keys, num_heads, HEAD_DIM, WIDTH)
        key_gradient = tl.zeros([KEYS, WIDTH], tl.float32)
        value_gradient = tl.zeros([KEYS, WIDTH], tl.float32)
        for start in range(0, num_queries, QUERIES):
            rows = start + tl.arange(0, QUERIES)
            queries = _load(query, clip, head, rows, num_queries, num_heads, HEAD_DIM, WIDTH)
            of_contexts = _load(of_context, clip, head, rows, num_queries, num_heads, HEAD_DIM, WIDTH)
            places = pair.to(tl.int64) * num_queries + rows
            exist = rows < num_queries
            peak = tl.load(highest + places, mask=exist, other=0.0)
            logs = tl.load(log_total + places, mask=exist, other=0.0)
            of_entropies = tl.load(of_entropy + places, mask=exist, other=0.0)
            means = tl.load(mean + places, mask=exist, other=0.0)
            scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * (scaling * _LOG2_E)
            log_weights = (scores - peak[None, :]) - logs[None, :]
            weights = tl.exp2(tl.where(visible, log_weights, float("-inf")))
            value_gradient = tl.dot(weights.to(values.dtype), of_contexts, value_gradient, input_precision=PRECISION)
            of_weights = tl.dot(values, tl.trans(of_contexts), input_precision=PRECISION)
            of_scores = of_weights - means[None, :] - (of_entropies * _LN_2)[None, :] * log_weights
            of_scores = (weights * of_scores).to(keys.dtype)
            key_gradient = tl.dot(of_scores, queries, key_gradient, input_precision=PRECISION)
        _store(of_key, (key_gradient * scaling), clip, head, columns, num_keys, num_heads, HEAD_DIM, WIDTH)
        _store(of_value, value_gradient, clip, head, columns, num_keys, num_heads, HEAD_DIM, WIDTH)


def _options(query: torch.Tensor, mask: torch.Tensor | None) -> dict:
    """The constants that the kernels are compiled with, for a query (clips, queries, heads, head_dim)."""
    head_dim = query.shape[-1]
    # Three TF32 products have the precision of float32; one is enough if the user has allowed TF32.
    precise = query.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return {
        "MASKED": mask is not None,
        "HEAD_DIM": head_dim,
        "WIDTH": max(16, triton.next_power_of_2(head_dim)),
        "PRECISION": ("tf32x3" if torch.version.hip is None else "ieee") if precise else "tf32",
    }


def _blocks(query: torch.Tensor) -> Iterator[dict[str, int]]:
    """The block sizes of the forward kernel, of the gradient of the queries, and of that of keys and values."""
    for sizes in BLOCKS[query.dtype == torch.float32, query.shape[-1] > 64]:
        yield dict(zip(("QUERIES", "KEYS", "num_warps", "num_stages"), sizes, strict=True))


def _on(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """The device of the tensors, on which Triton has to start a kernel; compiled code takes care of it itself."""
    if torch.compiler.is_compiling() or not tensor.is_cuda:
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


class _AttentionAndEntropy(torch.autograd.Function):
    """The kernels with their gradients; tensors are (clips, length, heads, head_dim), as the projections leave them."""

    @staticmethod
    def forward(ctx, query, key, value, mask, scaling):
        clips, num_queries, num_heads, _ = query.shape
        sizes = (num_heads, num_queries, key.shape[1])
        context = torch.empty_like(query)
        entropy, highest, log_total = (
            query.new_empty(clips, num_heads, num_queries, dtype=torch.float32) for _ in range(3)
        )
        blocks, _, _ = _blocks(query)
        grid = (clips * num_heads * triton.cdiv(num_queries, blocks["QUERIES"]),)
        with _on(query):
            _forward_kernel[grid](
                *(query, key, value, mask, context, entropy, highest, log_total, scaling, *sizes),
                **_options(query, mask),
                **blocks,
            )
        ctx.save_for_backward(query, key, value, mask, context, entropy, highest, log_total)
        ctx.scaling = scaling
        return context, entropy

    @staticmethod
    def backward(ctx, of_context, of_entropy):
        query, key, value, mask, context, entropy, highest, log_total = ctx.saved_tensors
        of_context, of_entropy = of_context.contiguous(), of_entropy.contiguous()
        clips, num_queries, num_heads, _ = query.shape
        num_keys = key.shape[1]
        sizes = (ctx.scaling, num_heads, num_queries, num_keys)
        of_query, of_key, of_value = (torch.empty_like(tensor) for tensor in (query, key, value))
        mean = torch.empty_like(entropy)
        options = _options(query, mask)
        _, query_blocks, key_blocks = _blocks(query)
        with _on(query):
            grid = (clips * num_heads * triton.cdiv(num_queries, query_blocks["QUERIES"]),)
            _query_gradient_kernel[grid](
                *(query, key, value, mask, context, entropy, highest, log_total, of_context, of_entropy),
                *(of_query, mean, *sizes),
                **options,
                **query_blocks,
            )
            grid = (clips * num_heads * triton.cdiv(num_keys, key_blocks["KEYS"]),)
            _key_value_gradient_kernel[grid](
                *(query, key, value, mask, highest, log_total, of_context, of_entropy, mean),
                *(of_key, of_value, *sizes),
                **options,
                **key_blocks,
            )
        return of_query, of_key, of_value, None, None


def kernel_attention_and_entropy(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and its entropy, with their gradients, by Triton kernels.

    Each pass reads keys and values once for each block of queries, and keeps no scores outside the multiprocessors.
    The online softmax is Milakov's and Gimelshein's, the order of the blocks is that of FlashAttention-2, the entropy
    is ours. With s the scores minus their maximum, an online softmax keeps sum(e^s). Together with sum(s e^s) this
    gives the entropy H = log(sum(e^s)) - sum(s e^s) / sum(e^s). Its derivative dH/ds_j = -P_j (log P_j + H) is added
    to that of attention.

    Args:
        query (`torch.Tensor` of shape `(batch_size, num_heads, T_a, head_dim)`): In bfloat16, float16 or float32;
            `head_dim` at most 128.
        key, value (`torch.Tensor` of shape `(batch_size, num_heads, T_v, head_dim)`): Of the same dtype.
        mask (`torch.BoolTensor` of shape `(batch_size, T_v)`, *optional*): The keys that exist, at least one a row.
        scaling (`float`): Factor of the scores.

    Returns:
        The context (batch_size, num_heads, T_a, head_dim) and the entropy (batch_size, num_heads, T_a) in nats, in
        float32. float32 is computed as TF32 where `torch.set_float32_matmul_precision` allows that.
    """
    mask = None if mask is None else mask.contiguous()
    tensors = (tensor.transpose(1, 2).contiguous() for tensor in (query, key, value))
    context, entropy = _AttentionAndEntropy.apply(*tensors, mask, scaling)
    return context.transpose(1, 2), entropy

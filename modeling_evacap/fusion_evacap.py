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
"""The fusion of EVACap: cross-attention from sound to picture, and the gate that its entropy closes.

A are the audio tokens (T_a, d), and queries Q come from them; keys K and values U come from the T_v video tokens. For
each head, and for each audio token with the attention probabilities P_j over the video tokens j:

    P = softmax(Q Kᵀ / √d_head)                  paper, equation 1
    F = P U                                      heads concatenated, no output projection
    E = -Σ_j P_j log P_j / log T_v               paper, equation 2; in [0, 1], mean over heads
    g = σ(w_g E + b_g)                           paper, equation 3; w_g and b_g are learned
    fused = (1 - g) A + g F

High entropy means that the attention finds nothing to hold on to: the picture does not fit, and the gate should close.
T_v counts the video tokens that exist (the T_a in the paper's equation 2 is a slip). With one of them E is 0, and with
none g is 0 and the audio passes unchanged.

`attention_and_entropy` is the definition. `fused_attention_and_entropy` computes the same without holding P.
"""

import torch
from torch import nn

from .attention_evacap import all_where_none, at_least_float32, score_blocks
from .configuration_evacap import EVACapConfig
from .fusion_kernel_evacap import has_kernel, kernel_attention_and_entropy


def _count_visible(video: torch.Tensor, video_mask: torch.Tensor | None) -> torch.Tensor:
    """The number of video tokens that exist (batch_size, 1)."""
    if video_mask is None:
        return torch.full((video.shape[0], 1), video.shape[1], device=video.device)
    return video_mask.sum(1, keepdim=True)


def attention_and_entropy(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention with its probabilities and their entropy in nats (paper, equations 1 and 2, before its normalisation).

    Args:
        query (`torch.Tensor` of shape `(batch_size, num_heads, T_a, head_dim)`): Queries of the audio tokens.
        key, value (`torch.Tensor` of shape `(batch_size, num_heads, T_v, head_dim)`): Keys and values of the video
            tokens.
        mask (`torch.BoolTensor` of shape `(batch_size, T_v)`, *optional*): The keys that exist.
        scaling (`float`): Factor of the scores.

    Returns:
        The context (batch_size, num_heads, T_a, head_dim), the entropy (batch_size, num_heads, T_a) and the
        probabilities (batch_size, num_heads, T_a, T_v), the last two in float32 or better.
    """
    scores = at_least_float32(torch.matmul(query * scaling, key.transpose(2, 3)))
    hidden = None if mask is None else ~mask[:, None, None, :]
    if hidden is not None:
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    # Neither result depends on a constant in the scores, but both would lose digits where the scores are large.
    scores = scores - scores.detach().amax(-1, keepdim=True)
    # In the product below masked scores are 0: with the lowest number its gradient would overflow.
    finite = scores if hidden is None else scores.masked_fill(hidden, 0.0)
    weights = scores.softmax(-1)
    # H = logsumexp(s) - sum(P s) is -sum(P log P) with a gradient that stays finite where P is 0.
    entropy = scores.logsumexp(-1) - (weights * finite).sum(-1)
    return torch.matmul(weights.to(value.dtype), value), entropy, weights


class _BlockwiseAttentionAndEntropy(torch.autograd.Function):
    """Attention and its entropy from blocks of scores (ours).

    The backward pass computes the blocks again. Besides the usual gradient of attention, the scores get that of the entropy
    H, dH/ds_j = -P_j (log P_j + H).
    """

    @staticmethod
    def forward(query, key, value, mask, scaling):
        context, values = torch.empty_like(query.flatten(0, 1)), value.flatten(0, 1)
        dtype = torch.promote_types(query.dtype, torch.float32)
        entropy = torch.empty(context.shape[:2], dtype=dtype, device=query.device)
        for block, scores in score_blocks(query * scaling, key, mask):
            log_weights = at_least_float32(scores).log_softmax(-1)
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
            log_weights = at_least_float32(scores).log_softmax(-1)
            weights = log_weights.exp()
            of_value[rows] += torch.bmm(weights.to(value.dtype).transpose(1, 2), of_context[block])
            # A masked key has the weight 0 and the lowest finite log-weight. Their product is 0; any other product
            # with the log-weight could overflow, so this one comes first.
            terms = weights * log_weights
            of_weights = at_least_float32(torch.bmm(of_context[block], values[rows].transpose(1, 2)))
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
    """As [`attention_and_entropy`], but with the probabilities of only one block in memory (ours).

    It uses Triton kernels on a GPU, and otherwise computes block by block. PyTorch's kernels do not give the entropy, and
    computing it separately would take a second pass over the scores.
    """
    mask = all_where_none(mask)
    if torch.compiler.is_exporting():
        # An exported graph would hold the blocks of one batch size, or kernels that no other runtime has.
        return *attention_and_entropy(query, key, value, mask, scaling)[:2], None
    attend = kernel_attention_and_entropy if has_kernel(query) else _BlockwiseAttentionAndEntropy.apply
    return *attend(query, key, value, mask, scaling), None


class EVACapGatedCrossAttention(nn.Module):
    """The entropy-gated cross-attention (paper, equations 1 to 3).

    Audio tokens query the picture. A gate mixes the result into the audio, and closes where the attention is undecided.

    With `gate_type="agreement"`, the gate is that of the paper if a matching head finds that the picture belongs to the
    sound, and otherwise exactly 0, as for a clip without a picture (ours). For the tokens of the time step t it is

        g · 1[σ((z + z_t) / 2τ) ≥ threshold]

    with the logits z of the clip and z_t of the step, and the temperature τ of their calibration. In training the head only
    learns, and the gate is g for every picture.
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
        self.k_proj = nn.Linear(config.video_width, width)
        self.v_proj = nn.Linear(config.video_width, width)
        if self.gate_type in ("entropy", "agreement"):
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
        opening: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        r"""Fuses the tokens of sound and picture.

        Args:
            audio (`torch.Tensor` of shape `(batch_size, T_a, hidden_size)`): Audio tokens A, the queries.
            video (`torch.Tensor` of shape `(batch_size, T_v, video_hidden_size)`): Video tokens V, keys and values.
            video_mask (`torch.BoolTensor` of shape `(batch_size, T_v)`, *optional*): The video tokens that exist. A
                row without any keeps its audio as it is, with a gate and an entropy of exactly 0.
            output_attentions (`bool`, *optional*, defaults to `False`): Whether to return the probabilities, which
                otherwise are never held whole.
            opening (`torch.Tensor` of shape `(batch_size, T_a)`, *optional*): How far the gate of each token may
                open, from 0 to 1: a factor of it.

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

        if self.gate_type in ("entropy", "agreement"):
            gate = torch.sigmoid(self.gate_weight.float() * entropy + self.gate_bias.float())
        elif self.gate_type == "learned":
            gate = torch.sigmoid(self.gate(torch.cat([audio, context], dim=-1)).float()).squeeze(-1)
        else:
            gate = torch.ones_like(entropy)
        if opening is not None:
            gate = gate * opening
        gate = gate.masked_fill(visible == 0, 0.0)

        # A row without video takes its audio from the second branch, whatever its padding holds.
        fused = torch.lerp(at_least_float32(audio), at_least_float32(context), gate[..., None].to(entropy.dtype))
        fused = fused.to(audio.dtype)
        fused = torch.where((visible > 0)[..., None], fused, audio)
        return fused, gate, entropy, weights

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
"""The fusion of LAVCap: optimal transport between the tokens of sound and picture, and its loss.

LAVCap is "LLM-based Audio-Visual Captioning using Optimal Transport" (Rho et al., ICASSP 2025). For a clip with N_a audio
tokens and N_v video tokens of unit length, A (N_a, d) and V (N_v, d):

    S = V Aᵀ                                     cosines, (N_v, N_a)
    P = Sinkhorn(S / ε)                          rows sum to 1 / N_v, columns to 1 / N_a; without a gradient
    A' = A + Pᵀ V,   V' = V + P A                OT-Att
    fused = [A'; V']

The rows and columns of P sum to less than 1, so OT-Att changes an audio token by at most 1 / N_a of its length and a video
token by at most 1 / N_v, as published. With `ot_context="mean"` the contexts are means, N_a Pᵀ V and N_v P A (ours).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils.generic import maybe_autocast

from .attention_evacap import at_least_float32
from .configuration_evacap import EVACapConfig


# The scale of the loss: its initial value and its upper limit, ln(1 / 0.07) and ln(100). The reference has them in float32.
INITIAL_SCALE = math.log(1 / 0.07)
LARGEST_SCALE = 4.6052


@dataclass
class TransportOutput:
    """What [`EVACapOptimalTransport`] computes.

    Args:
        fused (`torch.Tensor` of shape `(batch_size, T_a + T_v, hidden_size)`): The fused sequence, audio first.
        mask (`torch.BoolTensor` of shape `(batch_size, T_a + T_v)`, *optional*): The tokens that exist; `None` if all do.
        transport_map (`torch.Tensor` of shape `(batch_size, T_a, T_v)`): The transport plan, in float32 or better.
        loss (`torch.Tensor` of shape `(1,)`, *optional*): [`transport_loss`], where its weight is above 0.
    """

    fused: torch.Tensor
    mask: torch.Tensor | None
    transport_map: torch.Tensor
    loss: torch.Tensor | None = None


def sinkhorn(
    scores: torch.Tensor,
    iterations: int,
    row_mask: torch.Tensor | None = None,
    column_mask: torch.Tensor | None = None,
    row_weights: torch.Tensor | None = None,
    column_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""The logarithm of the entropic transport plan between two marginals, by Sinkhorn's algorithm (LAVCap).

    Columns are scaled last: their sums are exact, those of the rows in the limit.

    Args:
        scores (`torch.Tensor` of shape `(batch_size, rows, columns)`): Similarities divided by epsilon, float32 or better.
        iterations (`int`): Rounds; there is no other stopping criterion.
        row_mask (`torch.BoolTensor` of shape `(batch_size, rows)`, *optional*), column_mask (`torch.BoolTensor` of shape
            `(batch_size, columns)`, *optional*): Rows and columns that exist; all by default.
        row_weights (`torch.Tensor` of shape `(batch_size, rows)`, *optional*), column_weights (`torch.Tensor` of shape
            `(batch_size, columns)`, *optional*): The sums of the rows and of the columns, above 0 for those that exist;
            uniform by default.

    Returns:
        `torch.Tensor` of shape `(batch_size, rows, columns)`: The log-plan, with minus infinity outside the masks. Each plan
        has a total mass of 1, but where a clip has no rows or no columns.
    """
    batch_size, num_rows, num_columns = scores.shape
    if row_mask is None:
        row_mask = scores.new_ones((batch_size, num_rows), dtype=torch.bool)
    if column_mask is None:
        column_mask = scores.new_ones((batch_size, num_columns), dtype=torch.bool)
    scores = scores.masked_fill(~(row_mask[:, :, None] & column_mask[:, None, :]), -math.inf)
    # A clip without one of the two has no plan, and potentials of 0.
    has_plan = row_mask.any(1, keepdim=True) & column_mask.any(1, keepdim=True)
    rows, columns = row_mask & has_plan, column_mask & has_plan
    row_share, column_share = (
        -mask.sum(1, keepdim=True).clamp(min=1).to(scores.dtype).log() if weights is None else weights.log()
        for mask, weights in ((rows, row_weights), (columns, column_weights))
    )
    of_rows, of_columns = scores.new_zeros(batch_size, num_rows), scores.new_zeros(batch_size, num_columns)
    for _ in range(iterations):
        of_rows = (row_share - (scores + of_columns[:, None, :]).logsumexp(2)).masked_fill(~rows, 0.0)
        of_columns = (column_share - (scores + of_rows[:, :, None]).logsumexp(1)).masked_fill(~columns, 0.0)
    return scores + of_rows[:, :, None] + of_columns[:, None, :]


def transport_loss(
    similarity: torch.Tensor,
    log_plan: torch.Tensor,
    scale: torch.Tensor,
    use_log: bool = True,
    video_mask: torch.Tensor | None = None,
    audio_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""The alignment loss of LAVCap: each token's similarities to the other stream tell it from the others of its stream.

    With W the log-plan, or the plan, and s the scale:

        M_v = s W Sᵀ,   M_a = s Wᵀ S
        loss = mean_u -log softmax_i(M_v[i, u])[i = u] + mean_u -log softmax_j(M_a[j, u])[j = u]

    The softmax runs over the tokens of W, not over those of S. No gradient passes through W. The means are over the tokens of
    a clip, then over the clips that have both streams.

    Args:
        similarity (`torch.Tensor` of shape `(batch_size, T_v, T_a)`): Cosines S of video and audio tokens.
        log_plan (`torch.Tensor` of shape `(batch_size, T_v, T_a)`): The result of [`sinkhorn`].
        scale (`torch.Tensor` of shape `(1,)`): The scale s.
        use_log (`bool`, *optional*, defaults to `True`): Whether W is the log-plan (as published) or the plan.
        video_mask (`torch.BoolTensor` of shape `(batch_size, T_v)`, *optional*), audio_mask (`torch.BoolTensor` of shape
            `(batch_size, T_a)`, *optional*): The tokens that exist.
    """
    weights = log_plan.masked_fill(log_plan == -math.inf, 0.0) if use_log else log_plan.exp()
    weights = weights.detach()
    if video_mask is not None:
        similarity = similarity.masked_fill(~video_mask[:, :, None], 0.0)
    if audio_mask is not None:
        similarity = similarity.masked_fill(~audio_mask[:, None, :], 0.0)
    of_video = _own_class(scale * torch.matmul(weights, similarity.mT), video_mask)
    of_audio = _own_class(scale * torch.matmul(weights.mT, similarity), audio_mask)
    losses = of_video + of_audio
    if video_mask is None and audio_mask is None:
        return losses.mean()
    counted = torch.ones_like(losses, dtype=torch.bool)
    for mask in (video_mask, audio_mask):
        counted = counted if mask is None else counted & mask.any(1)
    return losses.masked_fill(~counted, 0.0).sum() / counted.sum().clamp(min=1)


def _own_class(logits: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The cross-entropy of each column of logits (batch_size, T, T) with its own row, mean over the columns of a clip."""
    if mask is None:
        return -logits.log_softmax(1).diagonal(dim1=1, dim2=2).mean(1)
    logits = logits.masked_fill(~mask[:, :, None], torch.finfo(logits.dtype).min)
    losses = -logits.log_softmax(1).diagonal(dim1=1, dim2=2)
    return losses.masked_fill(~mask, 0.0).sum(1) / mask.sum(1).clamp(min=1)


class EVACapOptimalTransport(nn.Module):
    """Fuses sound and picture by optimal transport (LAVCap, "OT-Att").

    It has no parameters but the scale of its loss. A clip without a picture keeps its audio tokens, of unit length.
    """

    def __init__(self, config: EVACapConfig):
        super().__init__()
        self.epsilon = config.ot_epsilon
        self.iterations = config.ot_iterations
        self.attention = config.ot_attention
        self.context = config.ot_context
        self.use_log = config.ot_use_log
        if config.ot_loss_weight > 0:
            self.logit_scale = nn.Parameter(torch.empty(()))

    def forward(
        self,
        audio: torch.Tensor,
        video: torch.Tensor,
        audio_mask: torch.Tensor | None = None,
        video_mask: torch.Tensor | None = None,
    ) -> TransportOutput:
        r"""Fuses the tokens of sound and picture.

        Args:
            audio (`torch.Tensor` of shape `(batch_size, T_a, hidden_size)`): Audio tokens.
            video (`torch.Tensor` of shape `(batch_size, T_v, hidden_size)`): Video tokens.
            audio_mask (`torch.BoolTensor` of shape `(batch_size, T_a)`, *optional*), video_mask (`torch.BoolTensor` of shape
                `(batch_size, T_v)`, *optional*): The tokens that exist.
        """
        # Half precision would round the map, which sums to 1 over many tokens.
        with maybe_autocast(audio.device.type, enabled=False):
            sound, picture = unit_length(audio), unit_length(video)
            similarity = torch.matmul(picture, sound.mT)
            with torch.no_grad():
                log_plan = sinkhorn(similarity / self.epsilon, self.iterations, video_mask, audio_mask)
                plan = log_plan.exp()
            loss = None
            if hasattr(self, "logit_scale"):
                loss = transport_loss(similarity, log_plan, self._scale(), self.use_log, video_mask, audio_mask)
            if self.attention:
                to_audio, to_video = plan.mT, plan
                if self.context == "mean":
                    to_audio, to_video = to_audio * _count(audio, audio_mask), to_video * _count(video, video_mask)
                sound, picture = sound + torch.matmul(to_audio, picture), picture + torch.matmul(to_video, sound)
        fused = torch.cat([sound, picture], dim=1).to(audio.dtype)
        mask = None
        if audio_mask is not None or video_mask is not None:
            masks = (
                tokens.new_ones(tokens.shape[:2], dtype=torch.bool) if given is None else given
                for tokens, given in ((audio, audio_mask), (video, video_mask))
            )
            mask = torch.cat(list(masks), dim=1)
        return TransportOutput(fused, mask, plan.mT, loss)

    def _scale(self) -> torch.Tensor:
        """The scale of the loss, limited; in training the parameter itself is, so that it gets a gradient at the limit."""
        if self.training:
            with torch.no_grad():
                self.logit_scale.clamp_(0, LARGEST_SCALE)
            return at_least_float32(self.logit_scale)
        return at_least_float32(self.logit_scale).clamp(0, LARGEST_SCALE)


def unit_length(tokens: torch.Tensor) -> torch.Tensor:
    """The tokens divided by their length, in float32 or better; a token of zeros stays one."""
    return F.normalize(at_least_float32(tokens), dim=-1)


def _count(tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | int:
    """The number of tokens that exist, (batch_size, 1, 1) if there is a mask."""
    return tokens.shape[1] if mask is None else mask.sum(1)[:, None, None]

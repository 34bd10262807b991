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
"""Enrichment of the tokens of sound and picture before their fusion, guided by the agreement of the two (CAE-AV)."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention_evacap import at_least_float32
from .configuration_evacap import EVACapConfig


class EVACapCASTEBlock(GradientCheckpointingLayer):
    r"""Enriches the tokens of one stream (CASTE of CAE-AV, Hu, Li and Zhang 2026).

    For the tokens x of a segment, whose mean is x̄, and the mean ȳ of the other stream in the same segment:

        p = W_p x̄ + b_p,   q = W_q ȳ + b_q,   c = cos(p, q)
        (w_s, w_t) = softmax(MLP([p; q; p - q; p ⊙ q]) + [c; -c])
        k = Σ softmax(W_i x) W_k x,   S = x + γ_s LN(W_o (W_v x ⊙ k))          over the tokens of the segment
        E = x + γ_t LN(pointwise(depthwise(x)))                               over three neighbouring time steps
        x ← x + γ m ⊙ (w_s S + w_t E)

    with m = 1 for the 30 % of the tokens of a segment that have the greatest norm, but at least one, and else 0. γ is initially
    0, so that the block changes nothing. γ_s and γ_t are initially 1 (ours; there 0), so that both branches learn from the
    second step on.
    """

    def __init__(self, hidden_size: int, other_size: int, gate_size: int):
        super().__init__()
        self.own_proj = nn.Linear(hidden_size, gate_size)
        self.other_proj = nn.Linear(other_size, gate_size)
        self.gate_fc = nn.Linear(4 * gate_size, gate_size // 2)
        self.gate_out = nn.Linear(gate_size // 2, 2)
        self.score_proj = nn.Linear(hidden_size, 1)
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)
        self.spatial_norm = nn.LayerNorm(hidden_size)
        self.depthwise = nn.Conv1d(hidden_size, hidden_size, 3, padding=1, groups=hidden_size)
        self.pointwise = nn.Linear(hidden_size, hidden_size)
        self.temporal_norm = nn.LayerNorm(hidden_size)
        self.scale, self.spatial_scale, self.temporal_scale = (nn.Parameter(torch.empty(1)) for _ in range(3))

    def forward(
        self, tokens: torch.Tensor, exists: torch.Tensor, segments: torch.Tensor, other: torch.Tensor
    ) -> torch.Tensor:
        r"""Enriches the tokens that exist; the others stay as they are.

        Args:
            tokens (`torch.Tensor` of shape `(batch_size, rows, steps, hidden_size)`): The stream, by place and time step.
            exists (`torch.BoolTensor` of shape `(batch_size, steps)`): The steps that exist.
            segments (`torch.LongTensor` of shape `(batch_size, steps)`): The segment to which each step belongs.
            other (`torch.Tensor` of shape `(batch_size, num_segments, other_size)`): The means of the other stream.

        Returns:
            `torch.Tensor` of the shape of `tokens`.
        """
        rows = tokens.shape[1]
        numbers = torch.arange(other.shape[1], device=tokens.device)[:, None]
        is_member = (segments[:, None] == numbers) & exists[:, None]
        own = segment_means(tokens.mean(1), is_member)
        own, other = self.own_proj(own), self.other_proj(other)
        agreement = F.cosine_similarity(at_least_float32(own), at_least_float32(other), dim=-1)
        logits = self.gate_out(F.relu(self.gate_fc(torch.cat([own, other, own - other, own * other], -1))))
        weights = (at_least_float32(logits) + torch.stack([agreement, -agreement], -1)).softmax(-1)
        weights = _of_steps(weights, segments)[:, None].to(tokens.dtype)

        is_member = is_member.repeat(1, 1, rows)
        scores = at_least_float32(self.score_proj(tokens)).flatten(1)[:, None].expand(is_member.shape)
        attention = scores.masked_fill(~is_member, torch.finfo(scores.dtype).min).softmax(-1)
        key = torch.matmul(attention.to(tokens.dtype), self.k_proj(tokens).flatten(1, 2))
        key = _of_steps(key, segments)[:, None]
        spatial = tokens + self.spatial_scale * self.spatial_norm(self.out_proj(self.v_proj(tokens) * key))

        neighbours = tokens.masked_fill(~exists[:, None, :, None], 0).flatten(0, 1)
        neighbours = self.pointwise(self.depthwise(neighbours.mT).mT).view(tokens.shape)
        temporal = tokens + self.temporal_scale * self.temporal_norm(neighbours)

        energy = at_least_float32(tokens.detach()).square().sum(-1)
        candidates = energy.flatten(1)[:, None].expand(is_member.shape).masked_fill(~is_member, -1)
        most = max(1, candidates.shape[-1] * 3 // 10)
        last = (is_member.sum(-1, keepdim=True) * 3 // 10).clamp(min=1) - 1
        threshold = candidates.topk(most).values.gather(-1, last).squeeze(-1)
        is_chosen = (energy >= threshold.gather(1, segments)[:, None]) & exists[:, None]
        enriched = tokens + self.scale * (weights[..., :1] * spatial + weights[..., 1:] * temporal)
        return torch.where(is_chosen[..., None], enriched.to(tokens.dtype), tokens)


class EVACapEnrichment(nn.Module):
    """CASTE for both streams of a clip, which are assumed to cover the same time; its segments are those of the pictures.

    A clip without a picture stays as it is. What is missing at the end of a stream takes no time, so that a padded clip is
    enriched as alone. With `gate_type="agreement"` a black end of the picture is missing, too.
    """

    def __init__(self, config: EVACapConfig):
        super().__init__()
        audio, video, gate = config.audio_config.hidden_size, config.video_width, config.enrichment_hidden_size
        self.audio_rows = config.audio_rows
        self.tokens_per_picture = config.tokens_per_picture
        self.audio_block = EVACapCASTEBlock(audio, video, gate)
        self.video_block = EVACapCASTEBlock(video, audio, gate)

    def forward(
        self,
        audio: torch.Tensor,
        video: torch.Tensor,
        audio_mask: torch.Tensor | None = None,
        video_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        r"""Enriches both streams, each as it was before.

        Args:
            audio (`torch.Tensor` of shape `(batch_size, rows * T, hidden_size)`): Audio tokens, mel row by row.
            video (`torch.Tensor` of shape `(batch_size, T_v, video_hidden_size)`): Video tokens, picture by picture.
            audio_mask (`torch.BoolTensor` of shape `(batch_size, rows * T)`, *optional*), video_mask (`torch.BoolTensor` of
                shape `(batch_size, T_v)`, *optional*): The tokens that exist.

        Returns:
            The tokens of the sound and those of the picture, in the shapes of `audio` and `video`.
        """
        # A time step exists in all of its mel rows or in none, and so does a picture in all of its tokens.
        sound = audio.unflatten(1, (self.audio_rows, -1))
        picture = video.unflatten(1, (-1, self.tokens_per_picture)).transpose(1, 2)
        heard, seen = (
            stream.new_ones(stream.shape[0], stream.shape[2], dtype=torch.bool) for stream in (sound, picture)
        )
        if audio_mask is not None:
            heard = audio_mask[:, : sound.shape[2]]
        if video_mask is not None:
            seen = video_mask[:, :: self.tokens_per_picture]
        both = heard.any(1, keepdim=True) & seen.any(1, keepdim=True)
        heard, seen = heard & both, seen & both

        steps, pictures = (torch.arange(mask.shape[1], device=audio.device) for mask in (heard, seen))
        num_steps, num_pictures = _length(heard, steps), _length(seen, pictures)
        # Steps behind the end have no part in anything, but need a number.
        picture_of_step = (steps * num_pictures // num_steps).clamp(max=pictures.shape[0] - 1)
        step_of_picture = pictures * num_steps // num_pictures
        # Of a sound that has fewer steps than there are pictures, several pictures share one.
        together = torch.where(
            (num_steps >= num_pictures)[..., None],
            picture_of_step[:, None] == pictures[:, None],
            step_of_picture[..., None] == steps,
        )
        heard_then = segment_means(sound.mean(1), together & heard[:, None])
        seen_then = picture.mean(1).masked_fill(~seen[..., None], 0)
        enriched = self.audio_block(sound, heard, picture_of_step, seen_then)
        shown = self.video_block(picture, seen, pictures.expand(seen.shape), heard_then)
        return enriched.flatten(1, 2), shown.transpose(1, 2).flatten(1, 2)


def segment_means(steps: torch.Tensor, is_member: torch.Tensor) -> torch.Tensor:
    """The means (batch_size, segments, hidden_size) over the steps of each segment, 0 where there are none.

    Args:
        steps (`torch.Tensor` of shape `(batch_size, steps, hidden_size)`): The steps.
        is_member (`torch.BoolTensor` of shape `(batch_size, segments, steps)`): The steps of each segment.
    """
    shares = is_member / is_member.sum(-1, keepdim=True).clamp(min=1)
    return torch.matmul(shares.to(steps.dtype), steps)


def _of_steps(values: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
    """The values (batch_size, steps, n) of the segments to which the steps belong."""
    return values.gather(1, segments[..., None].expand(-1, -1, values.shape[-1]))


def _length(mask: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """The number of steps (batch_size, 1) up to the last one that exists, at least 1."""
    return (mask * (numbers + 1)).amax(1, keepdim=True).clamp(min=1)

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
"""Enrichment of the tokens of sound and picture before their fusion (CAE-AV): by their agreement, or by captions of each."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention_evacap import all_where_none, at_least_float32
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

    def forward(self, tokens: torch.Tensor, segments: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        r"""Enriches the tokens of the segments; the others stay as they are.

        Args:
            tokens (`torch.Tensor` of shape `(batch_size, rows, steps, hidden_size)`): The stream, by place and time step.
            segments (`torch.BoolTensor` of shape `(batch_size, num_segments, steps)`): The steps of each segment, each step
                in one segment or, where it does not exist, in none.
            other (`torch.Tensor` of shape `(batch_size, num_segments, other_size)`): The means of the other stream.

        Returns:
            `torch.Tensor` of the shape of `tokens`.
        """
        own = self.own_proj(segment_means(tokens.mean(1), segments))
        other = self.other_proj(other)
        agreement = F.cosine_similarity(at_least_float32(own), at_least_float32(other), dim=-1)
        logits = self.gate_out(F.relu(self.gate_fc(torch.cat([own, other, own - other, own * other], -1))))
        weights = (at_least_float32(logits) + torch.stack([agreement, -agreement], -1)).softmax(-1)
        weights = to_steps(weights.to(tokens.dtype), segments)

        members = segments.repeat(1, 1, tokens.shape[1])
        scores = at_least_float32(self.score_proj(tokens)).flatten(1)[:, None]
        attention = torch.where(members, scores, torch.finfo(scores.dtype).min).softmax(-1)
        key = torch.matmul(attention.to(tokens.dtype), self.k_proj(tokens).flatten(1, 2))
        attended = self.out_proj(self.v_proj(tokens) * to_steps(key, segments))
        spatial = tokens + self.spatial_scale * self.spatial_norm(attended)
        neighbours = mix_steps(tokens, segments, self.depthwise, self.pointwise)
        temporal = tokens + self.temporal_scale * self.temporal_norm(neighbours)

        energy = at_least_float32(tokens.detach()).square().sum(-1).flatten(1)
        is_chosen = strongest(energy[:, None], members).any(1).view(tokens.shape[:3])
        enriched = tokens + self.scale * (weights[..., :1] * spatial + weights[..., 1:] * temporal)
        return torch.where(is_chosen[..., None], enriched.to(tokens.dtype), tokens)


class EVACapCASEAttention(nn.Module):
    """LN(x + dropout(MHA(x, y, y))), with CAE-AV's 8 heads, or fewer where they divide the width, and its rates of dropout."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.num_heads = math.gcd(8, hidden_size)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(hidden_size, hidden_size) for _ in range(4))
        self.norm = nn.LayerNorm(hidden_size)
        self.attention_dropout, self.dropout = nn.Dropout(0.1), nn.Dropout(0.2)

    def forward(self, tokens: torch.Tensor, others: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Lets tokens (batch_size, n, hidden_size) read the others (batch_size, m, hidden_size) that are `visible`.

        `visible` has the shape (batch_size, n or 1, m). A token that sees nothing reads zeros.
        """
        query, key, value = (
            proj(states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for proj, states in ((self.q_proj, tokens), (self.k_proj, others), (self.v_proj, others))
        )
        sees = visible.any(-1, keepdim=True)[:, None]
        dropout = self.attention_dropout.p if self.training else 0.0
        context = F.scaled_dot_product_attention(query, key, value, visible[:, None] | ~sees, dropout)
        output = self.o_proj(context.masked_fill(~sees, 0).transpose(1, 2).flatten(2))
        return self.norm(tokens + self.dropout(output))


class EVACapCASEFeedForward(nn.Module):
    """LN(x + dropout(MLP(x))), with CAE-AV's rate of dropout."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(hidden_size, 2 * hidden_size), nn.Linear(2 * hidden_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size)
        self.dropout = nn.Dropout(0.2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.norm(tokens + self.dropout(self.fc2(F.relu(self.fc1(tokens)))))


class EVACapCASEStream(nn.Module):
    """One stream of [`EVACapCASEBlock`]: it reads its caption, then the other stream, and takes over what it has read."""

    def __init__(self, hidden_size: int, other_size: int, caption_size: int, bottleneck: int):
        super().__init__()
        self.caption_down = nn.Linear(caption_size, bottleneck)
        self.caption_up = nn.Linear(bottleneck, hidden_size)
        self.caption_self_attn = EVACapCASEAttention(hidden_size)
        self.caption_feed_forward = EVACapCASEFeedForward(hidden_size)
        self.self_attn = EVACapCASEAttention(hidden_size)
        self.caption_attn = EVACapCASEAttention(hidden_size)
        self.cross_attn = EVACapCASEAttention(hidden_size)
        self.other_proj = nn.Linear(other_size, hidden_size)
        self.feed_forward = EVACapCASEFeedForward(hidden_size)
        self.depthwise = nn.Conv1d(hidden_size, hidden_size, 3, padding=1, groups=hidden_size)
        self.pointwise = nn.Linear(hidden_size, hidden_size)
        self.temporal_norm = nn.LayerNorm(hidden_size)
        self.norm = nn.LayerNorm(hidden_size)
        self.temperature, self.scale = (nn.Parameter(torch.empty(1)) for _ in range(2))

    def read(
        self, tokens: torch.Tensor, segments: torch.Tensor, caption: torch.Tensor, words: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Lets the tokens read each other and the caption.

        Args:
            tokens, segments, caption, words: Those of this stream, as in [`EVACapCASEBlock`].

        Returns:
            The tokens (batch_size, rows * steps, hidden_size) and the caption (batch_size, length, hidden_size).
        """
        caption = self.caption_up(F.gelu(self.caption_down(caption)))
        caption = self.caption_self_attn(caption, caption, words)
        rows, tokens = tokens.shape[1], tokens.flatten(1, 2)
        together = torch.matmul(segments.mT.float(), segments.float()) > 0
        tokens = self.self_attn(tokens, tokens, together.repeat(1, rows, rows))
        return self.caption_attn(tokens, caption, words), caption

    def take_over(
        self,
        tokens: torch.Tensor,
        segments: torch.Tensor,
        read: torch.Tensor,
        other: torch.Tensor,
        meets: torch.Tensor,
        caption: torch.Tensor,
        words: torch.Tensor,
    ) -> torch.Tensor:
        """Lets the tokens read the other stream, and adds what they have read to those that stand out.

        Args:
            tokens, segments, words: Those of this stream, as in [`EVACapCASEBlock`].
            read, caption: What [`~EVACapCASEStream.read`] has returned.
            other (`torch.Tensor` of shape `(batch_size, m, other_size)`): What it has returned of the other stream.
            meets (`torch.BoolTensor` of shape `(batch_size, rows * steps, m)`): The tokens of the other stream to read.

        Returns:
            `torch.Tensor` of the shape of `tokens`.
        """
        refined = self.feed_forward(self.cross_attn(read, self.other_proj(other), meets)).view(tokens.shape)
        refined = self.temporal_norm(mix_steps(refined, segments, self.depthwise, self.pointwise)).flatten(1, 2)
        members = segments.repeat(1, 1, tokens.shape[1])

        means = segment_means(refined, members), segment_means(self.caption_feed_forward(caption), words)
        agreement = F.cosine_similarity(*map(at_least_float32, means), dim=-1).sigmoid()[..., None]
        energy = at_least_float32(refined).square().sum(-1)[:, None]
        shares = members.to(energy.dtype)
        if self.training:
            # Not the lowest number, which a temperature below 1 would make infinite.
            scores = torch.where(members, energy, -1e9)
            energy = shares = shares * F.gumbel_softmax(scores, self.temperature.clamp(min=1e-3), dim=-1)
        shares = shares * strongest(energy, members)
        shares = shares / shares.sum(-1, keepdim=True).clamp(min=torch.finfo(shares.dtype).tiny)
        gain = (members * (agreement * shares + 1 - agreement)).sum(1).view(tokens.shape[:3])[..., None]
        enriched = self.norm(tokens + gain.to(tokens.dtype) * refined.view(tokens.shape))
        enriched = tokens + self.scale * (enriched - tokens)
        return torch.where(segments.any(1)[:, None, :, None], enriched.to(tokens.dtype), tokens)


class EVACapCASEBlock(GradientCheckpointingLayer):
    r"""Enriches both streams by a caption of each (CASE of CAE-AV, Hu, Li and Zhang 2026).

    For the tokens x of a segment of one stream, those y of the other, and its caption κ, where att(q, k) = LN(q +
    MHA(q, k, k)) and ff(x) = LN(x + MLP(x)), each with weights of its own:

        κ ← att(c, c),   κ ← W GELU(W' κ),   κ ← att(κ, κ)                    c: the word embeddings of the caption
        x' = att(att(x, x), κ),   y' likewise,   x'' = ff(att(x', W y'))
        u = LN(pointwise(depthwise(x'')))                                     over three neighbouring time steps
        w = σ(cos(ū, mean(ff(κ))))                                            ū: the mean of u over the segment
        x ← x + γ (LN(x + w m ⊙ u + (1 - w) u) - x)

    m is shared equally by the 30 % of the tokens of the segment that have the greatest norm of u, but at least one. In training
    it is the softmax of the squared norms with Gumbel noise and a learned temperature, over those 30 % of it. As u comes from a
    layer norm, the norms hardly differ before training.

    With γ = 1 this computes what the published module does, without its heads for losses, whose formulas were not published.
    γ is ours: it is initially 0, so that the block changes nothing. Ours are also the word embeddings (there CLIP's text
    encoder), the gradient of w, from which the last ff(κ) learns (there it learns from the losses alone), and a temperature
    of each stream (there one for both).
    """

    def __init__(self, audio_size: int, video_size: int, caption_size: int, bottleneck: int):
        super().__init__()
        self.caption_attn = EVACapCASEAttention(caption_size)
        self.audio = EVACapCASEStream(audio_size, video_size, caption_size, bottleneck)
        self.video = EVACapCASEStream(video_size, audio_size, caption_size, bottleneck)

    def forward(
        self,
        audio: torch.Tensor,
        video: torch.Tensor,
        audio_segments: torch.Tensor,
        video_segments: torch.Tensor,
        meets: torch.Tensor,
        audio_caption: torch.Tensor,
        video_caption: torch.Tensor,
        audio_words: torch.Tensor,
        video_words: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        r"""Enriches the tokens of the segments; the others stay as they are.

        Args:
            audio (`torch.Tensor` of shape `(batch_size, rows, steps, hidden_size)`), video (`torch.Tensor` of shape
                `(batch_size, places, pictures, video_hidden_size)`): The streams, by place and time step.
            audio_segments (`torch.BoolTensor` of shape `(batch_size, num_segments, steps)`), video_segments
                (`torch.BoolTensor` of shape `(batch_size, num_segments, pictures)`): The steps of each segment.
            meets (`torch.BoolTensor` of shape `(batch_size, pictures, steps)`): The steps that sound during each picture.
            audio_caption, video_caption (`torch.Tensor` of shape `(batch_size, length, caption_size)`): The word embeddings
                of the captions.
            audio_words, video_words (`torch.BoolTensor` of shape `(batch_size, 1, length)`): Their words that exist.

        Returns:
            The tokens of the sound and those of the picture, in the shapes of `audio` and `video`.
        """
        captions = ((audio_caption, audio_words), (video_caption, video_words))
        captions = [(self.caption_attn(caption, caption, words), words) for caption, words in captions]
        heard, audio_caption = self.audio.read(audio, audio_segments, *captions[0])
        seen, video_caption = self.video.read(video, video_segments, *captions[1])
        meets = meets.repeat(1, video.shape[1], audio.shape[1])
        return (
            self.audio.take_over(audio, audio_segments, heard, seen, meets.mT, audio_caption, audio_words),
            self.video.take_over(video, video_segments, seen, heard, meets, video_caption, video_words),
        )


class EVACapEnrichment(nn.Module):
    """CASTE or CASE for the streams of a clip, which are assumed to cover the same time; segments are those of the pictures.

    A clip without a picture stays as it is. What is missing at the end of a stream takes no time, so that a padded clip is
    enriched as alone. With `gate_type="agreement"` a black end of the picture is missing, too.
    """

    def __init__(self, config: EVACapConfig):
        super().__init__()
        audio, video, width = config.audio_config.hidden_size, config.video_width, config.enrichment_hidden_size
        self.audio_rows = config.audio_rows
        self.tokens_per_picture = config.tokens_per_picture
        self.reads_captions = config.enrichment == "case"
        if self.reads_captions:
            text = config.text_config
            self.embed_tokens = nn.Embedding(text.vocab_size, text.hidden_size)
            self.block = EVACapCASEBlock(audio, video, text.hidden_size, width)
        else:
            self.audio_block = EVACapCASTEBlock(audio, video, width)
            self.video_block = EVACapCASTEBlock(video, audio, width)

    def forward(
        self,
        audio: torch.Tensor,
        video: torch.Tensor,
        audio_mask: torch.Tensor | None = None,
        video_mask: torch.Tensor | None = None,
        captions: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        r"""Enriches both streams, each as it was before.

        Args:
            audio (`torch.Tensor` of shape `(batch_size, rows * T, hidden_size)`): Audio tokens, mel row by row.
            video (`torch.Tensor` of shape `(batch_size, T_v, video_hidden_size)`): Video tokens, picture by picture.
            audio_mask (`torch.BoolTensor` of shape `(batch_size, rows * T)`, *optional*), video_mask (`torch.BoolTensor` of
                shape `(batch_size, T_v)`, *optional*): The tokens that exist.
            captions (`tuple` of two `torch.LongTensor` of shape `(batch_size, length)`, *optional*): The token ids of a
                caption of the sound and of one of the picture, padded by -100; CASE needs them.

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
        # By picture and step.
        sounds = ((steps * num_pictures // num_steps)[:, None] == pictures[:, None]) & heard[:, None]
        shown = (pictures[:, None] == pictures) & seen[:, None]
        # Of a sound that has fewer steps than there are pictures, several pictures share one.
        shared = (pictures * num_steps // num_pictures)[..., None] == steps
        meets = torch.where((num_steps >= num_pictures)[..., None], sounds, shared & heard[:, None])

        if self.reads_captions:
            words = [all_where_none(caption != -100)[:, None] for caption in captions]
            vectors = [self.embed_tokens(caption.clamp(min=0)) for caption in captions]
            sound, picture = self.block(sound, picture, sounds, shown, meets & seen[..., None], *vectors, *words)
        else:
            means = segment_means(sound.mean(1), meets), picture.mean(1).masked_fill(~seen[..., None], 0)
            sound, picture = (
                self.audio_block(sound, sounds, means[1]),
                self.video_block(picture, shown, means[0]),
            )
        return sound.flatten(1, 2), picture.transpose(1, 2).flatten(1, 2)


def segment_means(tokens: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
    """The means (batch_size, segments, hidden_size) over the tokens of each segment, 0 where there are none.

    Args:
        tokens (`torch.Tensor` of shape `(batch_size, n, hidden_size)`): Tokens, or means over the rows of time steps.
        segments (`torch.BoolTensor` of shape `(batch_size, segments, n)`): Those of each segment.
    """
    shares = segments / segments.sum(-1, keepdim=True).clamp(min=1)
    return torch.matmul(shares.to(tokens.dtype), tokens)


def to_steps(values: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
    """The values (batch_size, segments, n) of the segments at each of their steps (batch_size, 1, steps, n), elsewhere 0."""
    return torch.matmul(segments.mT.to(values.dtype), values)[:, None]


def mix_steps(
    tokens: torch.Tensor, segments: torch.Tensor, depthwise: nn.Conv1d, pointwise: nn.Linear
) -> torch.Tensor:
    """A separable convolution along time, place by place, with zeros for the steps of no segment.

    Args:
        tokens (`torch.Tensor` of shape `(batch_size, rows, steps, hidden_size)`): The tokens.
        segments (`torch.BoolTensor` of shape `(batch_size, segments, steps)`): The steps of each segment.
        depthwise ([`nn.Conv1d`]), pointwise ([`nn.Linear`]): Its two parts.
    """
    tokens = tokens.masked_fill(~segments.any(1)[:, None, :, None], 0)
    return pointwise(depthwise(tokens.flatten(0, 1).mT).mT).view(tokens.shape)


def strongest(values: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
    """The 30 % of the tokens of each segment with the greatest values, but at least one (batch_size, segments, n).

    Args:
        values (`torch.Tensor` of shape `(batch_size, 1 or segments, n)`): The value of each token.
        segments (`torch.BoolTensor` of shape `(batch_size, segments, n)`): The tokens of each segment.
    """
    candidates = torch.where(segments, values, torch.finfo(values.dtype).min)
    most = max(1, segments.shape[-1] * 3 // 10)
    last = (segments.sum(-1, keepdim=True) * 3 // 10).clamp(min=1) - 1
    return segments & (candidates >= candidates.topk(most).values.gather(-1, last))


def _length(mask: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """The number of steps (batch_size, 1) up to the last one that exists, at least 1."""
    return (mask * (numbers + 1)).amax(1, keepdim=True).clamp(min=1)

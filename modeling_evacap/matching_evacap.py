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
"""The matching head, which predicts whether a sound and a picture belong together, and its loss."""

import torch
import torch.nn.functional as F
from torch import nn

from .attention_evacap import all_where_none, at_least_float32
from .configuration_evacap import EVACapConfig
from .loss_evacap import matching_loss


# Number of other pictures with which each sound of a batch is compared in training (ours).
OTHERS = 2


class EVACapMatchingHead(nn.Module):
    r"""Predicts whether a picture belongs to a sound, for the clip and for each audio time step.

    It is ours; similar are the agreement of CAE-AV and the matching of ALBEF. Each audio token attends to the picture, and
    each video token to the sound:

        S = (A W_q)(V W_k)ᵀ / √w,   c = softmax_video(S) V W_v,   e = softmax_audio(Sᵀ) A W_a
        h = GELU(W_h [A W_a; c; A W_a ⊙ c]),   k = GELU(W_m [V W_v; e; V W_v ⊙ e])
        z = MLP([mean h; max h; mean k; max k])
        z_t = MLP([mean_t h; max_t h; mean_t k; max_t k])

    with mean and maximum over all tokens that exist and, with an index t, over those of the time step t: the mel rows of the
    sound, and the picture that is shown then. Sound and picture are assumed to cover the same time.
    """

    def __init__(self, config: EVACapConfig):
        super().__init__()
        audio, video, width = (
            config.audio_config.hidden_size,
            config.video_width,
            config.matching_hidden_size,
        )
        self.num_rows = config.audio_rows
        self.tokens_per_picture = config.tokens_per_picture
        self.scaling = width**-0.5
        self.q_proj = nn.Linear(audio, width)
        self.k_proj = nn.Linear(video, width)
        self.audio_proj = nn.Linear(audio, width)
        self.video_proj = nn.Linear(video, width)
        self.audio_compare = nn.Linear(3 * width, width)
        self.video_compare = nn.Linear(3 * width, width)
        self.clip_fc = nn.Linear(4 * width, width)
        self.clip_out = nn.Linear(width, 1)
        self.step_fc = nn.Linear(4 * width, width)
        self.step_out = nn.Linear(width, 1)

    def forward(
        self,
        audio: torch.Tensor,
        video: torch.Tensor,
        audio_mask: torch.Tensor | None = None,
        video_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        r"""Predicts the logits of agreement.

        Args:
            audio (`torch.Tensor` of shape `(batch_size, num_rows * T, hidden_size)`): Audio tokens, mel row by row.
            video (`torch.Tensor` of shape `(batch_size, T_v, video_hidden_size)`): Video tokens.
            audio_mask (`torch.BoolTensor` of shape `(batch_size, num_rows * T)`, *optional*): The audio tokens that exist.
            video_mask (`torch.BoolTensor` of shape `(batch_size, T_v)`, *optional*): The video tokens that exist. The
                logits of a row without any are meaningless but finite.

        Returns:
            The logits of the clips (batch_size,) and of their audio time steps (batch_size, T), in float32 or better.
        """
        audio_mask, video_mask = all_where_none(audio_mask), all_where_none(video_mask)
        heard, seen = self.audio_proj(audio), self.video_proj(video)
        scores = at_least_float32(torch.matmul(self.q_proj(audio) * self.scaling, self.k_proj(video).mT))
        lowest = torch.finfo(scores.dtype).min
        over_video = scores if video_mask is None else scores.masked_fill(~video_mask[:, None, :], lowest)
        over_audio = scores if audio_mask is None else scores.masked_fill(~audio_mask[:, :, None], lowest)
        picture = torch.matmul(over_video.softmax(2).to(seen.dtype), seen)
        sound = torch.matmul(over_audio.softmax(1).mT.to(heard.dtype), heard)
        of_audio = F.gelu(self.audio_compare(torch.cat([heard, picture, heard * picture], -1)))
        of_video = F.gelu(self.video_compare(torch.cat([seen, sound, seen * sound], -1)))

        pooled_audio, pooled_video = mean_and_max(of_audio, audio_mask, 1), mean_and_max(of_video, video_mask, 1)
        clip = self.clip_out(F.gelu(self.clip_fc(torch.cat([pooled_audio, pooled_video], -1))))

        # A time step exists in all of its mel rows or in none, and so does a picture in all of its tokens.
        rows = of_audio.unflatten(1, (self.num_rows, -1))
        sounds = torch.cat([rows.mean(1), rows.amax(1)], -1)
        if video_mask is not None:
            of_video = of_video.masked_fill(~video_mask[..., None], 0)
        tokens = of_video.unflatten(1, (-1, self.tokens_per_picture))
        seen_then = picture_of_step(sounds.shape[1], tokens.shape[1], video.device)
        pictures = torch.cat([tokens.mean(2), tokens.amax(2)], -1)[:, seen_then]
        step = self.step_out(F.gelu(self.step_fc(torch.cat([sounds, pictures], -1))))
        return at_least_float32(clip).squeeze(-1), at_least_float32(step).squeeze(-1)


def picture_of_step(time_steps: int, pictures: int, device: torch.device | None = None) -> torch.Tensor:
    """The picture that is seen in each audio time step (time_steps,), where both streams cover the same time."""
    return torch.arange(time_steps, device=device) * pictures // time_steps


def mean_and_max(tokens: torch.Tensor, mask: torch.Tensor | None, dim: int) -> torch.Tensor:
    """Mean and maximum over the tokens that exist: (batch_size, 2 * hidden_size)."""
    if mask is None:
        return torch.cat([tokens.mean(dim), tokens.amax(dim)], -1)
    missing = ~mask[..., None]
    mean = tokens.masked_fill(missing, 0).sum(dim) / mask.sum(dim, keepdim=True)
    return torch.cat([mean, tokens.masked_fill(missing, torch.finfo(tokens.dtype).min).amax(dim)], -1)


def match_in_batch(
    head: EVACapMatchingHead,
    audio: torch.Tensor,
    video: torch.Tensor,
    audio_mask: torch.Tensor | None,
    video_mask: torch.Tensor,
    clip: torch.Tensor,
    step: torch.Tensor,
    sound_index: torch.Tensor,
    picture_index: torch.Tensor,
) -> torch.Tensor:
    """[`matching_loss`] over the pictures of a batch (ours).

    Each sound is compared with its present picture and with those of the next samples. For the time steps it is also
    compared with its own picture before a cut and another one behind it, or the reverse. No picture passes its tower again.

    Args:
        head ([`EVACapMatchingHead`]), audio, video, audio_mask, video_mask: The head and its arguments.
        clip, step (`torch.Tensor` of shape `(pairs,)` and `(pairs, T)`): The logits of the head for the present pictures.
        sound_index, picture_index (`torch.LongTensor` of shape `(pairs,)`): The samples to which the sound and the
            picture of each pair belong.

    Returns:
        The mean (1,) of the losses of the clips and of the time steps.
    """
    heard = torch.ones_like(step, dtype=torch.bool)
    if audio_mask is not None:
        heard = audio_mask.unflatten(1, (-1, step.shape[1]))[:, 0]

    def shift(places: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The pictures that many samples further on, their masks, and whether they are the sound's own."""
        return video.roll(places, 0), video_mask.roll(places, 0), sound_index == picture_index.roll(places)

    own = sound_index == picture_index
    clips, steps = [(clip, own, video_mask.any(1))], [(step, own[:, None], heard & video_mask.any(1, keepdim=True))]
    for places in range(1, OTHERS + 1):
        others, mask, is_own = shift(places)
        logits = head(audio, others, audio_mask, mask)
        clips.append((logits[0], is_own, mask.any(1)))
        steps.append((logits[1], is_own[:, None], heard & mask.any(1, keepdim=True)))
    pictures = video.shape[1] // head.tokens_per_picture
    if pictures > 1:
        cut, is_reversed = (torch.randint(*ends, (), device=video.device) for ends in ((1, pictures), (0, 2)))
        kept = (torch.arange(pictures, device=video.device) < cut) != is_reversed.bool()
        tokens = kept.repeat_interleave(head.tokens_per_picture)
        times = kept[picture_of_step(step.shape[1], pictures, video.device)]
        others, mask, is_own = shift(OTHERS + 1)
        spliced = torch.where(tokens[:, None], video, others), audio_mask, torch.where(tokens, video_mask, mask)
        targets = torch.where(times, own[:, None], is_own[:, None])
        seen = torch.where(times, video_mask.any(1, keepdim=True), mask.any(1, keepdim=True))
        steps.append((head(audio, *spliced)[1], targets, heard & seen))
    return (_balanced(clips) + _balanced(steps)) / 2


def _balanced(groups: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """[`matching_loss`] of several groups of logits, targets and what is counted."""
    groups = [(logits, targets.expand_as(logits), counted) for logits, targets, counted in groups]
    return matching_loss(*(torch.cat(parts) for parts in zip(*groups)))

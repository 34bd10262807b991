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
"""The head that compares the streams of a clip with its caption, in training alone."""

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_evacap import EVACapConfig
from .enrichment_evacap import segment_means
from .loss_evacap import caption_contrast


INITIAL_TEMPERATURE = 0.2
"""The temperature of the contrast before training (CAE-AV)."""


class EVACapContrastHead(nn.Module):
    """Brings sound, picture and caption to one width, and contrasts the clips of a batch (ours, after CAE-AV).

    It reads what the towers give, before they hear and see each other: a picture that had been enriched by its sound could be
    told by the sound in it.
    """

    def __init__(self, config: EVACapConfig):
        super().__init__()
        width = config.text_config.get_text_config(decoder=True).hidden_size
        if config.fusion_type != "video_only":
            self.audio_proj = nn.Linear(2 * config.audio_config.hidden_size, width)
        if config.fusion_type != "audio_only":
            self.video_proj = nn.Linear(2 * config.video_width, width)
        self.caption_proj = nn.Linear(width, width)
        self.temperature = nn.Parameter(torch.empty(1))

    def forward(
        self,
        audio: torch.Tensor | None,
        video: torch.Tensor | None,
        labels: torch.Tensor,
        words: torch.Tensor,
        swapped: torch.Tensor | None = None,
    ) -> torch.Tensor:
        r"""Computes [`caption_contrast`], the mean of that of the sounds and that of the pictures.

        Args:
            audio (`torch.Tensor` of shape `(batch_size, 2 * hidden_size)`), video (`torch.Tensor` of shape `(batch_size, 2 *
                video_hidden_size)`): Mean and maximum over the tokens of a tower, not a number for a clip without a picture;
                `None` without that stream.
            labels (`torch.LongTensor` of shape `(batch_size, length)`): The captions; -100 is not counted.
            words (`torch.Tensor` of shape `(n, text_hidden_size)`): The vectors of the vocabulary.
            swapped (`torch.BoolTensor` of shape `(batch_size,)`, *optional*): The clips with another's picture, which is not
                compared.
        """
        captions = segment_means(F.embedding(labels.clamp(min=0), words), (labels != -100)[:, None]).squeeze(1)
        captions = self.caption_proj(captions)
        losses = []
        if audio is not None:
            losses.append(caption_contrast(self.audio_proj(audio), captions, self.temperature))
        if video is not None:
            seen = ~video.isnan().any(1)
            video = video.masked_fill(~seen[:, None], 0)
            seen = seen if swapped is None else seen & ~swapped
            losses.append(caption_contrast(self.video_proj(video), captions, self.temperature, seen))
        return torch.stack(losses).mean()

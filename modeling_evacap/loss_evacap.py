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
"""The loss of EVACap and its regularisers."""

import math

import torch
import torch.nn.functional as F
from transformers.utils.generic import maybe_autocast

from .attention_evacap import at_least_float32


def label_smoothed_kl(
    logits: torch.Tensor, labels: torch.Tensor, epsilon: float, num_items_in_batch: int | torch.Tensor | None = None
) -> torch.Tensor:
    """The KL divergence between the smoothed target and the prediction (AVCap).

    The target has the probability 1 - epsilon for the true class and epsilon / (n - 1) for each other one. With
    `epsilon=0` it is the cross-entropy.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, length, n)`): Scores over the vocabulary.
        labels (`torch.LongTensor` of shape `(batch_size, length)`): True classes; -100 is not counted.
        epsilon (`float`): Probability taken from the true class.
        num_items_in_batch (`int` or `torch.Tensor`, *optional*): Number of tokens to divide by, if a batch is
            accumulated in parts; by default the tokens of `labels`.
    """
    counted = labels != -100
    log_probabilities = logits.float().log_softmax(-1)
    true_class = log_probabilities.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    loss = -true_class
    if epsilon > 0:
        share = epsilon / (logits.shape[-1] - 1)
        others = log_probabilities.sum(-1) - true_class
        negative_entropy = (1 - epsilon) * math.log(1 - epsilon) + epsilon * math.log(share)
        loss = negative_entropy - (1 - epsilon) * true_class - share * others
    total = loss.masked_fill(~counted, 0.0).sum()
    return total / (counted.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)


def gate_stability(gate: torch.Tensor, num_rows: int, token_mask: torch.Tensor | None = None) -> torch.Tensor:
    """The mean squared difference between the gates of neighbouring audio time steps.

    The paper names the term; the formula is ours. A clip without a picture counts as perfectly stable.

    Args:
        gate (`torch.Tensor` of shape `(batch_size, num_rows * steps)`): The gate of each audio token, mel row by row.
        num_rows (`int`): Mel rows, over which the gates are averaged first.
        token_mask (`torch.BoolTensor` of shape `(batch_size, num_rows * steps)`, *optional*): The tokens that exist.
    """
    change = gate.unflatten(1, (num_rows, -1)).mean(1).diff(dim=1).square()
    if token_mask is None:
        return change.sum() / max(change.numel(), 1)
    exists = token_mask.unflatten(1, (num_rows, -1))[:, 0]
    pairs = exists[:, 1:] & exists[:, :-1]
    return change.masked_fill(~pairs, 0.0).sum() / pairs.sum().clamp(min=1)


def semantic_consistency(matched: torch.Tensor, swapped: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """KL(p(y|a,v) ‖ p(y|a,v̂)), mean over the tokens of the samples with a swapped video.

    There is no gradient through the matched side. The paper names the term; the formula is ours.

    Args:
        matched (`torch.Tensor` of shape `(samples, length, n)`): Scores with the matched video.
        swapped (`torch.Tensor` of shape `(samples, length, n)`): Scores with the swapped video.
        labels (`torch.LongTensor` of shape `(samples, length)`): -100 is not counted.
    """
    counted = labels != -100
    target = matched.detach()[counted].float().log_softmax(-1)
    prediction = swapped[counted].float().log_softmax(-1)
    return F.kl_div(prediction, target, reduction="sum", log_target=True) / counted.sum().clamp(min=1)


def matching_loss(logits: torch.Tensor, targets: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of the logits of the matching head, with equal weight of own and other pictures (ours).

    It is 0 if one of the two is missing, because the other alone would teach the head a constant answer.

    Args:
        logits (`torch.Tensor` of shape `(pairs,)` or `(pairs, T)`): Logits of sounds with pictures.
        targets (`torch.BoolTensor` of the same shape): Whether the picture is the sound's own.
        counted (`torch.BoolTensor` of the same shape): Whether there is both sound and picture.
    """
    losses = F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none")
    own, others = counted & targets, counted & ~targets
    parts = [losses.masked_fill(~part, 0.0).sum() / part.sum().clamp(min=1) for part in (own, others)]
    return (parts[0] + parts[1]) / 2 * (own.any() & others.any())


def heard_words(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the words of each caption, in any order, predicted from the audio tower alone (ours).

    It is the mean over the words. What only the picture shows is learned here as a guess, which captions never read.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, n)`): Scores over the vocabulary.
        labels (`torch.LongTensor` of shape `(batch_size, length)`): -100 is not counted.
    """
    counted = labels != -100
    log_probabilities = logits.float().log_softmax(-1).gather(1, labels.clamp(min=0))
    return -log_probabilities.masked_fill(~counted, 0.0).sum() / counted.sum().clamp(min=1)


def caption_contrast(
    streams: torch.Tensor, captions: torch.Tensor, temperature: torch.Tensor, counted: torch.Tensor | None = None
) -> torch.Tensor:
    """Contrast of the clips of a batch with their captions (CAE-AV names the term, the formula is ours).

    With s_ij = cos(stream_i, caption_j) / max(temperature, 0.01) it is the mean of the cross-entropies of the rows and of the
    columns of s, in which row i and column i belong together (InfoNCE).

    Args:
        streams (`torch.Tensor` of shape `(batch_size, n)`): Sounds or pictures.
        captions (`torch.Tensor` of shape `(batch_size, n)`): Captions.
        temperature (`torch.Tensor` of shape `(1,)`): The temperature.
        counted (`torch.BoolTensor` of shape `(batch_size,)`, *optional*): The clips that take part; all by default.
    """
    # Half precision would round the scores, which the temperature makes large.
    with maybe_autocast(streams.device.type, enabled=False):
        streams, captions = (F.normalize(at_least_float32(side), dim=-1) for side in (streams, captions))
        scores = torch.matmul(streams, captions.mT) / at_least_float32(temperature).clamp(min=0.01)
    if counted is None:
        counted = torch.ones_like(scores[0], dtype=torch.bool)
    scores = scores.masked_fill(~(counted[:, None] & counted), torch.finfo(scores.dtype).min)
    losses = -(scores.log_softmax(0) + scores.log_softmax(1)).diagonal() / 2
    return losses.masked_fill(~counted, 0.0).sum() / counted.sum().clamp(min=1)


def picture_entropy(
    entropy: torch.Tensor, swapped: torch.Tensor | None = None, token_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The mean entropy of the attention to own pictures, plus one minus that to swapped pictures (ours, after CAE-AV).

    To minimise it makes the attention to own pictures sharp, and to swapped ones uniform. It is a mean over tokens, then over
    clips; those without a picture, whose entropy is exactly 0, do not count.

    Args:
        entropy (`torch.Tensor` of shape `(batch_size, tokens)`): The normalised entropy of each audio token's attention.
        swapped (`torch.BoolTensor` of shape `(batch_size,)`, *optional*): The clips with another's picture; none by default.
        token_mask (`torch.BoolTensor` of shape `(batch_size, tokens)`, *optional*): The tokens that exist.
    """
    tokens = entropy.shape[1] if token_mask is None else token_mask.sum(1).clamp(min=1)
    if token_mask is not None:
        entropy = entropy.masked_fill(~token_mask, 0.0)
    entropy, looks = entropy.sum(1) / tokens, (entropy > 0).any(1)
    swapped = torch.zeros_like(looks) if swapped is None else swapped
    terms = []
    for values, counted in ((entropy, looks & ~swapped), (1 - entropy, looks & swapped)):
        terms.append(values.masked_fill(~counted, 0.0).sum() / counted.sum().clamp(min=1))
    return terms[0] + terms[1]

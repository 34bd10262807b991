"""The distance between the tokens of a sound and those of a picture, both as sets (DALI).

DALI is "An Eye for an Ear: Zero-shot Audio Description Leveraging an Image Captioner using Audiovisual Distribution
Alignment" (Malard et al., NeurIPS 2024). For a clip with audio tokens x_1 … x_n of weights a and video tokens y_1 … y_m of
weights b, each of sum 1 and 0 for padding:

    MMD = Σ_pq s_p s_q K(z_p, z_q),   z = x ∪ y,   s = (a, -b),   K = Σ_i exp(-‖z_p - z_q‖² / (h 2^i)),   i = -2 … 2
    OT  = min_P Σ_ij P_ij ‖x_i - y_j‖²   over plans P with row sums a and column sums b

with h the mean of ‖z_p - z_q‖² over p ≠ q, without a gradient. Neither the order nor the place of a token enters.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils.generic import maybe_autocast

from ..modeling_evacap.attention_evacap import at_least_float32
from ..modeling_evacap.loss_evacap import caption_contrast
from ..modeling_evacap.transport_evacap import sinkhorn


CONTRAST_TEMPERATURE = 0.05
"""Temperature of the similarities (CAV-MAE, DALI)."""
SCORE_TEMPERATURE = 20.0
"""Temperature of the scores of [`TokenScorers`] (DALI)."""


def uniform_weights(tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The same weight for each token that exists.

    Args:
        tokens (`torch.Tensor` of shape `(batch_size, T, hidden_size)`): Tokens, for their number and dtype.
        mask (`torch.BoolTensor` of shape `(batch_size, T)`, *optional*): The tokens that exist; all by default.

    Returns:
        `torch.Tensor` of shape `(batch_size, T)`: Weights with a sum of 1; zeros for a clip without any token.
    """
    exists = tokens.new_ones(tokens.shape[:2]) if mask is None else mask.to(tokens.dtype)
    return exists / exists.sum(1, keepdim=True).clamp(min=1)


def squared_distances(sound: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
    """‖x_i - y_j‖² of the tokens (batch_size, n, hidden_size) and (batch_size, m, hidden_size): (batch_size, n, m)."""
    squares = sound.square().sum(2)[:, :, None] + picture.square().sum(2)[:, None, :]
    return (squares - 2 * torch.matmul(sound, picture.mT)).clamp(min=0)


def mean_discrepancy(
    sound: torch.Tensor,
    picture: torch.Tensor,
    sound_weights: torch.Tensor,
    picture_weights: torch.Tensor,
    bandwidth: torch.Tensor | None = None,
) -> torch.Tensor:
    """The squared maximum mean discrepancy (MMD) of two sets of tokens under five Gaussian kernels (DALI).

    Args:
        sound (`torch.Tensor` of shape `(batch_size, n, hidden_size)`), picture (`torch.Tensor` of shape `(batch_size, m,
            hidden_size)`): Tokens, float32 or better.
        sound_weights (`torch.Tensor` of shape `(batch_size, n)`), picture_weights (`torch.Tensor` of shape `(batch_size, m)`):
            Their weights; 0 for those that do not exist.
        bandwidth (`torch.Tensor` of shape `(batch_size,)`, *optional*): The bandwidth h; by default the mean of the squared
            distances of different tokens.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`: The biased estimate for each clip.
    """
    tokens, signed = torch.cat([sound, picture], 1), torch.cat([sound_weights, -picture_weights], 1)
    distances = squared_distances(tokens, tokens)
    if bandwidth is None:
        exists = (signed != 0).to(tokens.dtype)
        count = exists.sum(1)
        total = torch.einsum("bi,bij,bj->b", exists, distances.detach(), exists)
        # Where all tokens are equal, any bandwidth is right.
        bandwidth = (total / (count * (count - 1)).clamp(min=1)).clamp(min=torch.finfo(tokens.dtype).tiny * 2**10)
    kernel = sum(torch.exp(-distances / (bandwidth * 2.0**power)[:, None, None]) for power in range(-2, 3))
    return torch.einsum("bi,bij,bj->b", signed, kernel, signed)


def transport_cost(
    sound: torch.Tensor,
    picture: torch.Tensor,
    sound_weights: torch.Tensor,
    picture_weights: torch.Tensor,
    solver: str = "sinkhorn",
    epsilon: float = 0.05,
    iterations: int = 200,
) -> torch.Tensor:
    """The cost of optimal transport between two sets of tokens, which is the squared Euclidean distance (DALI).

    The gradient is that of the exact problem: the plan for the distances, the centred dual potentials for the weights.

    Args:
        sound, picture, sound_weights, picture_weights: As in [`mean_discrepancy`].
        solver (`str`, *optional*, defaults to `"sinkhorn"`): `"sinkhorn"`, the entropic plan, or `"exact"`, by the network
            simplex of POT, clip by clip on the CPU.
        epsilon (`float`, *optional*, defaults to 0.05): Entropic regularisation, relative to the mean distance of a clip.
        iterations (`int`, *optional*, defaults to 200): Rounds of Sinkhorn's algorithm.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`: Σ P_ij ‖x_i - y_j‖² for each clip; 0 where one of the sets is empty.

    Raises:
        ImportError: If POT is not installed and `solver` is `"exact"`.
    """
    distances = squared_distances(sound, picture)
    with torch.no_grad():
        costs, sides = distances.detach(), (sound_weights.detach(), picture_weights.detach())
        plan, potentials = (
            _exact(costs, *sides) if solver == "exact" else _entropic(costs, *sides, epsilon, iterations)
        )
    total = (plan * distances).sum((1, 2))
    for weights, potential in zip((sound_weights, picture_weights), potentials):
        # Their value is 0.
        total = total + (potential * (weights - weights.detach())).sum(1)
    return total


def _entropic(
    costs: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, epsilon: float, iterations: int
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The entropic plan (batch_size, n, m) and its centred potentials (batch_size, n) and (batch_size, m)."""
    pairs = (rows > 0)[:, :, None] & (columns > 0)[:, None, :]
    scale = (costs * pairs).sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)
    scores = -costs / (epsilon * scale).clamp(min=torch.finfo(costs.dtype).tiny * 2**10)[:, None, None]
    log_plan = sinkhorn(scores, iterations, rows > 0, columns > 0, rows, columns)
    both = ((log_plan - scores) * (epsilon * scale)[:, None, None]).masked_fill(~pairs, 0.0)
    potentials = [both.sum(axis) / pairs.sum(axis).clamp(min=1) for axis in (2, 1)]
    return log_plan.exp(), [_centred(potential, side > 0) for potential, side in zip(potentials, (rows, columns))]


def _exact(costs: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """As [`_entropic`], but the optimal plan."""
    try:
        import ot
    except ImportError as error:
        raise ImportError("`alignment.solver: exact` needs POT: pip install 'evacap[align]'") from error
    plan, potentials = torch.zeros_like(costs), [torch.zeros_like(rows), torch.zeros_like(columns)]
    for clip, (cost, *sides) in enumerate(zip(costs.double().cpu(), rows.double().cpu(), columns.double().cpu())):
        first, second = (side.nonzero().squeeze(1) for side in sides)
        if len(first) and len(second):
            weights = [side[side > 0] / side.sum() for side in sides]
            found, log = ot.lp.emd(*(side.numpy() for side in weights), cost[first][:, second].numpy(), log=True)
            plan[clip, first[:, None], second] = torch.from_numpy(found).to(plan)
            for potential, index, dual in zip(potentials, (first, second), (log["u"], log["v"])):
                potential[clip, index] = torch.as_tensor(dual - dual.mean()).to(potential)
    return plan, potentials


def _centred(potential: torch.Tensor, exists: torch.Tensor) -> torch.Tensor:
    mean = (potential * exists).sum(1, keepdim=True) / exists.sum(1, keepdim=True).clamp(min=1)
    return (potential - mean) * exists


class TokenScorers(nn.Module):
    """The weights of the tokens in attentive transport: low for what is only seen or only heard (DALI).

    The tokens of each stream ask those of the other one, by attention without residual or norm. A softmax over the means of
    the answers, with a temperature of 20, is half of the weight of a token; the other half is uniform.

    Args:
        hidden_size (`int`): Width of the tokens.
        num_heads (`int`, *optional*, defaults to 8): Heads of each attention; fewer if they do not divide the width.
    """

    def __init__(self, hidden_size: int, num_heads: int = 8):
        super().__init__()
        heads = math.gcd(hidden_size, num_heads)
        for stream in ("sound", "picture"):
            self.add_module(f"{stream}_maps", nn.ModuleList(nn.Linear(hidden_size, hidden_size) for _ in range(3)))
            self.add_module(f"{stream}_attention", nn.MultiheadAttention(hidden_size, heads, batch_first=True))

    def forward(
        self, sound: torch.Tensor, picture: torch.Tensor, sound_weights: torch.Tensor, picture_weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weighs the tokens.

        Args:
            sound, picture: As in [`mean_discrepancy`].
            sound_weights, picture_weights: The [`uniform_weights`].

        Returns:
            Two `torch.Tensor`s of the shapes of the uniform weights: the weights of the tokens, at least half of these.
        """
        as_query, as_key, as_value = self.sound_maps
        of_query, of_key, of_value = self.picture_maps
        heard, _ = self.sound_attention(
            as_query(sound), of_key(picture), of_value(picture), _padding(picture_weights), need_weights=False
        )
        seen, _ = self.picture_attention(
            of_query(picture), as_key(sound), as_value(sound), _padding(sound_weights), need_weights=False
        )
        return _mixed(heard, sound_weights), _mixed(seen, picture_weights)


def _padding(weights: torch.Tensor) -> torch.Tensor | None:
    """The tokens that attention does not see; of a clip without any it sees all, as over nothing it is not a number."""
    exists = weights > 0
    return ~(exists | ~exists.any(1, keepdim=True))


def _mixed(answers: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    scores = (answers.mean(2) / SCORE_TEMPERATURE).masked_fill(uniform == 0, torch.finfo(answers.dtype).min)
    return (scores.softmax(1) * (uniform > 0) + uniform) / 2


def entropy(*weights: torch.Tensor) -> torch.Tensor:
    """The sum of the entropies, in nats, of the weights (batch_size, T) of each stream; mean over the clips."""
    return sum(torch.special.entr(each).sum(1) for each in weights).mean()


def most_agreeing(sounds: torch.Tensor, pictures: torch.Tensor, counted: torch.Tensor, keep: float) -> torch.Tensor:
    """The clips of a batch whose sound and picture agree most (ours, instead of DALI's choice of clips by captions).

    A clip whose source is off screen teaches what is wrong. The agreement is the cosine of the means of the tokens, less the
    mean of the batch in each stream, which all clips share.

    Args:
        sounds (`torch.Tensor` of shape `(batch_size, hidden_size)`), pictures (`torch.Tensor` of the same shape): Means of the
            tokens.
        counted (`torch.BoolTensor` of shape `(batch_size,)`): The clips that have both.
        keep (`float`): The share of them that is kept, rounded up.

    Returns:
        `torch.BoolTensor` of shape `(batch_size,)`.
    """
    with torch.no_grad():
        number = counted.sum()
        centred = [means - means[counted].mean(0) for means in (sounds, pictures)]
        agreement = F.cosine_similarity(*centred).masked_fill(~counted, -math.inf)
        rank = agreement.argsort(descending=True).argsort()
        # 0.6 · 25 is more than 15 in float32.
        return counted & (rank < (keep * number * (1 - 1e-6)).ceil())


def alignment_loss(
    loss: str,
    sound: torch.Tensor,
    picture: torch.Tensor,
    sound_mask: torch.Tensor | None = None,
    picture_mask: torch.Tensor | None = None,
    scorers: TokenScorers | None = None,
    keep: float = 1.0,
    **transport,
) -> torch.Tensor:
    """The distance between the tokens of sounds and those of their pictures, mean over the clips that have both.

    It is computed in float32 or better, as squared distances overflow in half precision.

    Args:
        loss (`str`): `"mmd"`, `"ot"`, `"attentive_ot"` or `"contrast"`, of the means of the tokens.
        sound (`torch.Tensor` of shape `(batch_size, n, hidden_size)`), picture (`torch.Tensor` of shape `(batch_size, m,
            hidden_size)`): The tokens.
        sound_mask (`torch.BoolTensor` of shape `(batch_size, n)`, *optional*), picture_mask (`torch.BoolTensor` of shape
            `(batch_size, m)`, *optional*): The tokens that exist; all by default.
        scorers ([`TokenScorers`], *optional*): The weights of `"attentive_ot"`.
        keep (`float`, *optional*, defaults to 1.0): The share of the clips that count, see [`most_agreeing`].
        transport: Options of [`transport_cost`].
    """
    with maybe_autocast(sound.device.type, enabled=False):
        sound, picture = at_least_float32(sound), at_least_float32(picture)
        weights = uniform_weights(sound, sound_mask), uniform_weights(picture, picture_mask)
        counted = weights[0].any(1) & weights[1].any(1)
        sounds, pictures = ((side * weight[..., None]).sum(1) for side, weight in zip((sound, picture), weights))
        if keep < 1:
            counted = most_agreeing(sounds, pictures, counted, keep)
        if loss == "contrast":
            return caption_contrast(sounds, pictures, sounds.new_tensor(CONTRAST_TEMPERATURE), counted)
        if loss == "attentive_ot":
            weights = scorers(sound, picture, *weights)
        if loss == "mmd":
            losses = mean_discrepancy(sound, picture, *weights)
        else:
            losses = transport_cost(sound, picture, *weights, **transport)
        return losses.masked_fill(~counted, 0.0).sum() / counted.sum().clamp(min=1)

"""Bootstrap intervals, the paired bootstrap test, and the area under the ROC curve."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


CONFIDENCE = 0.95
RESAMPLES = 2000


@dataclass(frozen=True)
class Statistic:
    """A figure of a set of clips that is computed from sums over the clips, and so for any resample of them.

    Args:
        counts (`np.ndarray` of shape `(clips, terms)`): The terms of each clip.
        combine (`Callable`): Computes figures (…) from sums (…, terms).
    """

    counts: np.ndarray
    combine: Callable[[np.ndarray], np.ndarray]

    @property
    def value(self) -> float:
        """The figure of all clips."""
        return float(self.combine(self.counts.sum(0)))

    def resampled(self, draws: np.ndarray) -> np.ndarray:
        """The figure of each resample of [`draw`]: (resamples,)."""
        return self.combine(draws @ self.counts)


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Statistic:
    """The ratio of two sums over the clips; NaN where the denominator is 0."""
    return Statistic(np.stack([numerators, denominators], 1).astype(float), _divide)


def mean(scores: Sequence[float]) -> Statistic:
    """The mean of the scores of the clips."""
    return ratio(scores, np.ones(len(scores)))


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Statistic]:
    """BLEU-1 to 4 of a corpus, as `pycocoevalcap` computes it.

    The counts of a clip are its n-grams, those of them that its references have, its words, and the words of the
    reference whose length is closest.

    Args:
        predictions (`Sequence[str]`): One tokenised caption for each clip.
        references (`Sequence[Sequence[str]]`): One or more tokenised captions for each clip.
    """
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    counts = []
    for prediction, clip in zip(predictions, references, strict=True):
        scorer = BleuScorer(prediction, clip)
        found = scorer.ctest[0]
        closest = min((abs(length - found["testlen"]), length) for length in scorer.crefs[0][0])[1]
        counts.append([*found["correct"], *found["guess"], found["testlen"], closest])
    counts = np.array(counts, dtype=float)
    return {f"bleu_{order}": Statistic(counts, _Bleu(order)) for order in range(1, 5)}


@dataclass(frozen=True)
class _Bleu:
    order: int

    def __call__(self, sums: np.ndarray) -> np.ndarray:
        # The toolkit adds these numbers against a division by zero.
        precisions = (sums[..., : self.order] + 1e-15) / (sums[..., 4 : 4 + self.order] + 1e-9)
        length = (sums[..., 8] + 1e-15) / (sums[..., 9] + 1e-9)
        return precisions.prod(-1) ** (1 / self.order) * np.exp(np.minimum(0, 1 - 1 / length))


def meteor(counts: Sequence[Sequence[float]]) -> Statistic:
    """METEOR 1.5 of a corpus, with its weights for English, from the `counts` of `compute_metrics`.

    Args:
        counts (`Sequence[Sequence[float]]` of shape `(clips, 23)`): Words of the caption and of the reference,
            function words of both; for each kind of match (exact, stem, synonym, paraphrase) the content words of both
            that match, and the function words of both; chunks, and the words of both that match.
    """
    counts = np.array(counts, dtype=float)
    # If all words match in one chunk, there is no fragmentation penalty.
    whole = (counts[:, 21:23] == counts[:, 0:2]).all(1) & (counts[:, 20] == 1)
    counts[whole, 20] = 0
    return Statistic(counts, _meteor)


METEOR_ALPHA, METEOR_BETA, METEOR_GAMMA, METEOR_DELTA = 0.85, 0.2, 0.6, 0.75
METEOR_MATCHES = np.array([1.0, 0.6, 0.8, 0.6])


def _meteor(sums: np.ndarray) -> np.ndarray:
    matches = sums[..., 4:20].reshape(*sums.shape[:-1], 4, 4)
    shares = []
    with np.errstate(divide="ignore", invalid="ignore"):
        for side in (0, 1):
            words, function_words = sums[..., side], sums[..., 2 + side]
            matched = METEOR_DELTA * matches[..., side] + (1 - METEOR_DELTA) * matches[..., 2 + side]
            length = METEOR_DELTA * (words - function_words) + (1 - METEOR_DELTA) * function_words
            shares.append((matched @ METEOR_MATCHES) / length)
        precision, recall = shares
        f_mean = precision * recall / (METEOR_ALPHA * precision + (1 - METEOR_ALPHA) * recall)
        chunks = sums[..., 20] / (sums[..., 21:23].mean(-1))
        score = f_mean * (1 - METEOR_GAMMA * chunks**METEOR_BETA)
    # Nothing matches.
    return np.nan_to_num(score, nan=0.0)


def draw(num_clips: int, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Draws resamples with replacement: how often each clip is in each of them, (resamples, clips), float64.

    Figures of the same draw come from the same clips, so their differences and ratios are paired.
    """
    rng = np.random.default_rng([seed, num_clips])
    return rng.multinomial(num_clips, np.full(num_clips, 1 / num_clips), resamples).astype(float)


def interval(figures: np.ndarray, confidence: float = CONFIDENCE) -> list[float] | None:
    """The percentile interval of resampled figures, or `None` if there are none. Resamples without a figure are skipped."""
    figures = figures[np.isfinite(figures)]
    if not len(figures):
        return None
    return np.quantile(figures, [(1 - confidence) / 2, (1 + confidence) / 2]).tolist()


def p_value(differences: np.ndarray) -> float | None:
    """The two-sided p-value of a paired bootstrap test.

    It is twice the share of the resamples in which the difference does not have its usual sign, with one resample
    added so that it is never 0, and at most 1. It is the level at which the percentile interval of the difference
    begins to include 0. It covers the choice of the clips, but not the choice of a training seed.

    Args:
        differences (`np.ndarray` of shape `(resamples,)`): Differences of two figures in the same resamples.
    """
    differences = differences[np.isfinite(differences)]
    if not len(differences):
        return None
    rarer = min((differences <= 0).sum(), (differences >= 0).sum())
    return min(1.0, 2 * float(rarer + 1) / (len(differences) + 1))


def roc_auc(higher: np.ndarray, lower: np.ndarray, draws: np.ndarray | None = None) -> float | np.ndarray:
    """The area under the ROC curve of a score that should separate two groups.

    It is the probability that a member of the first group has a higher score than a member of the second; ties count
    half.

    Args:
        higher (`np.ndarray` of shape `(clips,)`): Scores of the group in which they should be high.
        lower (`np.ndarray` of shape `(clips,)`): Scores of the other group, of the same clips if `draws` is given.
        draws (`np.ndarray` of shape `(resamples, clips)`, *optional*): Resamples from [`draw`].

    Returns:
        `float`, or with `draws` `np.ndarray` of shape `(resamples,)` with NaN for a resample without clips.
    """
    values, places = np.unique(np.concatenate([higher, lower]), return_inverse=True)
    places = np.split(places.ravel(), [len(higher)])
    areas = []
    for weights in [None] if draws is None else draws:
        high, low = (np.bincount(place, weights, len(values)) for place in places)
        areas.append(_divide(np.array([high @ (low.cumsum() - low / 2), high.sum() * low.sum()])))
    return float(areas[0]) if draws is None else np.array(areas)


def _divide(sums: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return sums[..., 0] / sums[..., 1]

"""Intervals, tests and areas against what is known of them, and against the toolkit on the resampled corpus itself."""

import numpy as np
import pytest

from evacap.training.metrics.bootstrap import bleu, draw, interval, mean, meteor, p_value, ratio, roc_auc


WORDS = "a dog barks while rain falls on the roof and men speak loudly then an engine hums".split()


def random_corpus(clips: int, seed: int = 0) -> tuple[list[str], list[list[str]]]:
    """Captions that share many words with their references; one is empty, one equals a reference."""
    rng = np.random.default_rng(seed)

    def sentence() -> str:
        return " ".join(rng.choice(WORDS, rng.integers(3, 12)))

    references = [[sentence() for _ in range(rng.integers(1, 6))] for _ in range(clips)]
    predictions = [" ".join(clip[0].split()[:6] + sentence().split()[:3]) for clip in references]
    predictions[0], predictions[1] = "", references[1][0]
    return predictions, references


def repeated(values: list, counts: np.ndarray) -> list:
    return [value for value, count in zip(values, counts.astype(int)) for _ in range(count)]


def test_bleu_of_resamples_is_the_toolkits_of_the_resampled_corpus():
    scorer = pytest.importorskip("pycocoevalcap.bleu.bleu").Bleu(4)
    predictions, references = random_corpus(30)
    statistics = bleu(predictions, references)
    draws = np.concatenate([np.ones((1, 30)), draw(30, 5)])
    for place, counts in enumerate(draws):
        texts, truths = repeated(predictions, counts), repeated(references, counts)
        expected, _ = scorer.compute_score(
            dict(enumerate(truths)), {n: [text] for n, text in enumerate(texts)}, verbose=0
        )
        for order, value in enumerate(expected, start=1):
            assert statistics[f"bleu_{order}"].resampled(draws)[place] == pytest.approx(value, rel=1e-12)


def test_meteor_from_counts_is_the_programs():
    pytest.importorskip("pycocoevalcap")
    from evacap.training.metrics.java import find_java
    from evacap.training.metrics.meteor import meteor as run_meteor

    predictions, references = random_corpus(20)
    # Nothing matches; all matches.
    predictions[2], references[2] = "zebra", ["giraffe"]
    predictions[3], references[3] = "rain falls", ["rain falls"]
    score, clips, counts = run_meteor(predictions, references, find_java())
    statistic = meteor(counts)
    assert statistic.value == pytest.approx(score, abs=1e-12)
    for clip, value in zip(counts, clips):
        assert meteor([clip]).value == pytest.approx(value, abs=1e-12)
    # A resample is of the same sums.
    counts_of_clips = np.arange(20.0)[None]
    assert statistic.resampled(counts_of_clips)[0] == meteor(repeated(counts, counts_of_clips[0])).value


def test_draws_are_of_as_many_clips_and_follow_from_the_seed():
    draws = draw(7, 50, seed=3)
    assert draws.shape == (50, 7) and (draws.sum(1) == 7).all()
    assert (draws == draw(7, 50, seed=3)).all()
    assert (draws != draw(7, 50, seed=4)).any()


def test_the_interval_of_a_mean_is_that_of_its_normal_approximation():
    scores = np.random.default_rng(0).normal(5, 2, 500)
    low, high = interval(mean(scores).resampled(draw(500, 4000)))
    half = 1.96 * scores.std() / np.sqrt(500)
    assert mean(scores).value == pytest.approx(scores.mean())
    assert [low, high] == pytest.approx([scores.mean() - half, scores.mean() + half], abs=0.1 * half)


def test_a_ratio_is_of_the_sums_and_a_resample_without_any_is_left_out():
    statistic = ratio([1, 0, 0], [1, 0, 3])
    assert statistic.value == 0.25
    draws = np.array([[0.0, 3, 0], [1, 1, 1]])
    assert np.isnan(statistic.resampled(draws)[0])
    assert interval(statistic.resampled(draws)) == [0.25, 0.25]
    assert interval(statistic.resampled(draws[:1])) is None
    assert p_value(statistic.resampled(draws[:1])) is None


def test_p_values_without_a_difference_are_uniform():
    rng = np.random.default_rng(0)
    values = []
    for trial in range(300):
        first, second = rng.normal(0, 1, (2, 60))
        draws = draw(60, 300, seed=trial)
        values.append(p_value(mean(second).resampled(draws) - mean(first).resampled(draws)))
    assert 0.01 < np.mean(np.array(values) < 0.05) < 0.1
    assert 0.4 < np.mean(values) < 0.6


def test_p_values_of_no_and_of_a_clear_difference():
    scores = np.random.default_rng(0).normal(0, 1, 100)
    draws = draw(100, 999)
    assert p_value(np.zeros(999)) == 1
    # No resample has the other sign: the least that as many resamples can tell.
    assert p_value(mean(scores + 1).resampled(draws) - mean(scores).resampled(draws)) == pytest.approx(0.002)
    assert p_value(mean(scores - 1).resampled(draws) - mean(scores).resampled(draws)) == pytest.approx(0.002)


def test_the_area_is_the_share_of_pairs_in_the_right_order():
    rng = np.random.default_rng(0)
    high, low = rng.integers(0, 8, (2, 40)) / 8
    high += 0.125

    def by_pairs(high: np.ndarray, low: np.ndarray) -> float:
        return np.mean((high[:, None] > low) + 0.5 * (high[:, None] == low))

    assert roc_auc(high, low) == pytest.approx(by_pairs(high, low))
    assert roc_auc(high, low) == pytest.approx(1 - roc_auc(low, high))
    draws = draw(40, 5)
    for counts, area in zip(draws, roc_auc(high, low, draws)):
        assert area == pytest.approx(by_pairs(np.array(repeated(high, counts)), np.array(repeated(low, counts))))
    assert np.isnan(roc_auc(high, low, np.zeros((1, 40)))).all()

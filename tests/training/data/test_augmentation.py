import numpy as np
import pytest

from evacap.training.data.augmentation import Augmentation


ONLY = {"freq_mask": 0, "time_mask": 0, "noise": False, "roll": False, "random_frames": False}


def features(frames=1024, bins=128):
    return np.random.default_rng(5).normal(size=(frames, bins)).astype(np.float32)


def test_the_same_draw_gives_the_same_clip_and_leaves_the_original_alone():
    original = features()
    kept = original.copy()
    first, again, other = (Augmentation()(original, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(original, kept)
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert first.shape == original.shape and first.dtype == np.float32


def test_nothing_is_changed_when_all_is_off():
    assert np.array_equal(Augmentation(**ONLY)(features(), np.random.default_rng(0)), features())


@pytest.mark.parametrize("name, axis, mask, size", [("freq_mask", 1, 48, 128), ("time_mask", 0, 192, 1024)])
def test_masks_have_the_distribution_of_torchaudio(name, axis, mask, size):
    augmentation = Augmentation(**{**ONLY, name: mask})
    rng = np.random.default_rng(0)
    widths, starts = [], []
    for _ in range(4000):
        masked = (augmentation(np.zeros((1024, 128), np.float32), rng, mask_value=1.0) == 1).all(axis=1 - axis)
        (where,) = np.nonzero(masked)
        widths.append(len(where))
        if len(where):
            assert np.array_equal(where, np.arange(where[0], where[-1] + 1))
            starts.append((where[0] + 0.5) / (size - len(where)))
    counts = np.bincount(widths, minlength=mask)
    assert len(counts) == mask
    expected = len(widths) / mask
    assert ((counts - expected) ** 2 / expected).sum() < mask + 5 * (2 * mask) ** 0.5  # chi-squared
    assert abs(np.mean(starts) - 0.5) < 5 * (1 / 12 / len(starts)) ** 0.5
    assert min(starts) < 0.01 and max(starts) > 0.99


def test_masks_are_cut_to_what_there_is():
    augmentation = Augmentation(**{**ONLY, "freq_mask": 48, "time_mask": 192})
    rng = np.random.default_rng(0)
    shares = [(augmentation(np.zeros((20, 16), np.float32), rng, 1.0) == 1).mean() for _ in range(300)]
    assert max(shares) < 1 and np.mean(shares) > 0.5


def test_noise_is_uniform_and_scaled_by_one_draw():
    augmentation = Augmentation(**{**ONLY, "noise": True})
    rng = np.random.default_rng(0)
    scales = []
    for _ in range(2000):
        noise = augmentation(np.zeros((64, 32), np.float32), rng)
        assert noise.min() >= 0
        scales.append(2 * noise.mean())
    assert max(scales) < 0.105 and abs(np.mean(scales) - 0.05) < 5 * 0.1 * (1 / 12 / len(scales)) ** 0.5
    assert abs(np.quantile(scales, 0.25) - 0.025) < 0.005 and abs(np.quantile(scales, 0.75) - 0.075) < 0.005


def test_the_roll_is_uniform_and_loses_nothing():
    augmentation = Augmentation(**{**ONLY, "roll": True})
    clip = np.arange(16, dtype=np.float32)[:, None].repeat(2, axis=1)
    rng = np.random.default_rng(0)
    shifts = []
    for _ in range(3200):
        rolled = augmentation(clip, rng)
        shifts.append(int(np.argmin(rolled[:, 0])))
        assert np.array_equal(np.roll(rolled, -shifts[-1], axis=0), clip)
    counts = np.bincount(shifts, minlength=16)
    assert ((counts - 200) ** 2 / 200).sum() < 15 + 5 * 30**0.5


def test_the_noise_comes_after_the_masks_and_the_roll_last():
    clip = np.full((32, 8), 5, np.float32)
    rng = np.random.default_rng(3)
    wrapped = 0
    for _ in range(50):
        changed = Augmentation(freq_mask=6, time_mask=20)(clip, rng, mask_value=-1.0)
        assert (changed == -1).mean() < 0.01, "masked values are noisy, too"
        rows = (changed < 0).all(axis=1)
        # Only a roll brings a mask around the end of the clip.
        wrapped += rows[0] and rows[-1] and not rows.all()
    assert wrapped > 5


def test_every_run_of_frames_is_as_likely():
    rng = np.random.default_rng(0)
    firsts = [Augmentation().first_frame(20, 18, rng) for _ in range(3000)]
    assert np.bincount(firsts).shape == (3,) and np.bincount(firsts).min() > 900
    assert {Augmentation().first_frame(20, 20, rng) for _ in range(10)} == {0}


@pytest.mark.parametrize("name", ["freq_mask", "time_mask"])
def test_a_wrong_width_is_named(name):
    with pytest.raises(ValueError, match=f"{name}=-1 is below 0"):
        Augmentation(**{name: -1})

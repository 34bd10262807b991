"""Random changes of the clips that a model learns from, as AVCap makes them."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Augmentation:
    """AVCap's augmentation of a clip, for training only: a band of mel bins and a stretch of time are masked
    (SpecAugment), noise is added, and the clip is rolled in time, in this order; of the frames a random run is taken.

    Args:
        freq_mask (`int`, *optional*, defaults to 48): The masked band has fewer mel bins than this, as that of
            torchaudio's `FrequencyMasking`: a uniformly drawn number of them, at a uniformly drawn place. 0 for none.
        time_mask (`int`, *optional*, defaults to 192): The same in frames, as torchaudio's `TimeMasking`.
        noise (`bool`, *optional*, defaults to `True`): Whether to add uniform noise of [0, 1) to every value, all of
            it scaled by one uniform draw from [0, 0.1).
        roll (`bool`, *optional*, defaults to `True`): Whether to roll the frames by a uniform number of them, around
            the end. AVCap has one switch for noise and roll.
        random_frames (`bool`, *optional*, defaults to `True`): Whether to take a random run of consecutive pictures.

    Raises:
        ValueError: If a mask is below 0.
    """

    freq_mask: int = 48
    time_mask: int = 192
    noise: bool = True
    roll: bool = True
    random_frames: bool = True

    def __post_init__(self):
        for name in ("freq_mask", "time_mask"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} is below 0; give the width of the mask, 0 for none")

    def __call__(self, features: np.ndarray, rng: np.random.Generator, mask_value: float = 0.0) -> np.ndarray:
        """Args:
            features (`np.ndarray` of shape `(frames, mel bins)`): Normalised log-mel filterbank, left as it is.
            rng (`np.random.Generator`): Decides everything.
            mask_value (`float`): What masked values become. AVCap masks with 0 before it normalises: its masked values
                are those of the padding, `(0 - mean) / std`.

        Returns:
            `np.ndarray`: The same shape and type, in a new array.
        """
        features = features.copy()
        for axis, mask in ((1, self.freq_mask), (0, self.time_mask)):
            masked = _mask(features.shape[axis], mask, rng)
            features[(slice(None),) * axis + (masked,)] = mask_value
        if self.noise:
            scale = rng.random() / 10
            features += rng.random(features.shape, features.dtype) * features.dtype.type(scale)
        if self.roll:
            features = np.roll(features, rng.integers(-len(features), len(features)), axis=0)
        return features

    def first_frame(self, stored: int, num_frames: int, rng: np.random.Generator) -> int:
        """Where a run of `num_frames` of the `stored` frames begins, every place being as likely."""
        return int(rng.integers(stored - num_frames + 1))


def _mask(size: int, mask: int, rng: np.random.Generator) -> slice:
    width = rng.random() * min(mask, size)
    start = int(rng.random() * (size - width))
    return slice(start, start + int(width))

"""The augmentation of training clips (AVCap)."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Augmentation:
    """The augmentation of a training clip (AVCap).

    In this order: a band of mel bins and a stretch of time are masked (SpecAugment), noise is added, and the clip is
    rolled in time. Of the pictures a random run is taken.

    Args:
        freq_mask (`int`, *optional*, defaults to 48): The width of the masked band is drawn uniformly below so many
            mel bins, and its position is drawn uniformly, as in torchaudio's `FrequencyMasking`. 0 for none.
        time_mask (`int`, *optional*, defaults to 192): The same in frames, as in torchaudio's `TimeMasking`.
        noise (`bool`, *optional*, defaults to `True`): Whether to add uniform noise from [0, 1) to every value, scaled
            by one uniform draw from [0, 0.1).
        roll (`bool`, *optional*, defaults to `True`): Whether to roll the frames by a uniformly drawn number. AVCap
            has one switch for noise and roll.
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
        """Augments the sound of a clip.

        Args:
            features (`np.ndarray` of shape `(frames, mel bins)`): Normalised log-mel filterbank; it is not changed.
            rng (`np.random.Generator`): Draws all random numbers.
            mask_value (`float`): The value of masked places. AVCap masks with 0 before it normalises, so its masked
                values are those of the padding, `(0 - mean) / std`.

        Returns:
            `np.ndarray`: A new array of the same shape and type.
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
        """Draws the start of a run of `num_frames` frames among the `stored` ones, uniformly."""
        return int(rng.integers(stored - num_frames + 1))


def _mask(size: int, mask: int, rng: np.random.Generator) -> slice:
    width = rng.random() * min(mask, size)
    start = int(rng.random() * (size - width))
    return slice(start, start + int(width))

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
"""Waveforms to the log-mel filterbank pictures that EVACap listens to."""

import warnings
from functools import lru_cache

import numpy as np
import torch
from transformers import BatchFeature, SequenceFeatureExtractor
from transformers.audio_utils import mel_filter_bank, optimal_fft_length
from transformers.utils import TensorType, logging

from .media_evacap import CHANNELS, MAX_SAMPLE, mix_down


# Below transformers' own logger, so that its verbosity holds here too.
logger = logging.get_logger(f"transformers.{__name__}")

WINDOWS = {"hamming": torch.hamming_window, "hanning": torch.hann_window}
BACKENDS = ("torch", "torchaudio")
LOG_FLOOR = torch.finfo(torch.float32).eps


@lru_cache(maxsize=8)
def _mel_filters(num_mel_bins: int, n_fft: int, sampling_rate: int, low_freq: float, high_freq: float) -> torch.Tensor:
    """Kaldi's triangular mel filters, (n_fft // 2 + 1, num_mel_bins).

    They are cached outside the feature extractor, because all of its attributes are saved in its JSON file.
    """
    with warnings.catch_warnings():
        # Kaldi's filters are narrower than an FFT bin at low frequencies: some see none and stay at the log floor.
        warnings.filterwarnings("ignore", message="At least one mel filter has all zero values")
        filters = mel_filter_bank(
            n_fft // 2 + 1,
            num_mel_bins,
            low_freq,
            high_freq,
            sampling_rate,
            mel_scale="kaldi",
            triangularize_in_mel_space=True,
        )
    return torch.from_numpy(filters).float()


class EVACapFeatureExtractor(SequenceFeatureExtractor):
    r"""Turns mono 16 kHz waveforms into normalised Kaldi log-mel filterbanks with a fixed number of frames (AVCap, CAV-MAE).

    The filterbanks are HTK-compatible, without dither and energy. The mean of the whole waveform is subtracted, the
    filterbank is computed and zero-padded or cut to `max_frames`, and only then normalised by `(x - mean) / std`
    (AVCap). So padded frames have the value `(0 - mean) / std`.

    Args:
        feature_size (`int`, *optional*, defaults to 128): Number of mel bins.
        sampling_rate (`int`, *optional*, defaults to 16000): Expected rate of the waveforms in Hz.
        padding_value (`float`, *optional*, defaults to 0.0): Value of the padded frames, before normalisation.
        max_frames (`int`, *optional*, defaults to 1024): Frames of the output; 1024 of 10 ms are 10.24 s.
        frame_length_ms (`float`, *optional*, defaults to 25): Length of an analysis window in milliseconds.
        frame_shift_ms (`float`, *optional*, defaults to 10): Hop between analysis windows in milliseconds.
        low_freq (`float`, *optional*, defaults to 20): Lower edge of the first mel filter in Hz.
        high_freq (`float`, *optional*, defaults to 8000): Upper edge of the last mel filter in Hz.
        preemphasis (`float`, *optional*, defaults to 0.97): Pre-emphasis coefficient.
        window_type (`str`, *optional*, defaults to `"hamming"`):
            `"hamming"` (EVACap's paper) or `"hanning"`, the symmetric Hann window (AVCap).
        mean (`float`, *optional*, defaults to -4.346): Mean of the log-mel values (AVCap).
        std (`float`, *optional*, defaults to 4.332): Standard deviation of the log-mel values (AVCap).
        channels (`str`, *optional*, defaults to `"average"`):
            What becomes of a `(channels, samples)` array: `"average"` (ours; the loudest one where they cancel each
            other) or `"first"` (AVCap).
        backend (`str`, *optional*, defaults to `"torch"`):
            `"torch"` is the built-in filterbank; `"torchaudio"` calls `torchaudio.compliance.kaldi.fbank`.
        return_attention_mask (`bool`, *optional*, defaults to `False`):
            Whether to return `input_features_mask`, 1 for the frames that hold sound. AVCap uses no mask.

    Raises:
        ValueError: If `window_type`, `channels`, `backend`, `high_freq` or a size has an illegal value.
    """

    def __init__(
        self,
        feature_size: int = 128,
        sampling_rate: int = 16000,
        padding_value: float = 0.0,
        max_frames: int = 1024,
        frame_length_ms: float = 25,
        frame_shift_ms: float = 10,
        low_freq: float = 20,
        high_freq: float = 8000,
        preemphasis: float = 0.97,
        window_type: str = "hamming",
        mean: float = -4.346,
        std: float = 4.332,
        channels: str = "average",
        backend: str = "torch",
        return_attention_mask: bool = False,
        **kwargs,
    ):
        super().__init__(
            feature_size=feature_size,
            sampling_rate=sampling_rate,
            padding_value=padding_value,
            return_attention_mask=return_attention_mask,
            **kwargs,
        )
        for name, value, legal in (
            ("window_type", window_type, tuple(WINDOWS)),
            ("channels", channels, CHANNELS),
            ("backend", backend, BACKENDS),
        ):
            if value not in legal:
                raise ValueError(f"`{name}` must be one of {', '.join(map(repr, legal))}, got {value!r}.")
        for name, value in (
            ("feature_size", feature_size),
            ("max_frames", max_frames),
            ("frame_length_ms", frame_length_ms),
            ("frame_shift_ms", frame_shift_ms),
            ("std", std),
        ):
            if value <= 0:
                raise ValueError(f"`{name}` must be positive, got {value}.")
        if not 0 <= low_freq < high_freq <= sampling_rate / 2:
            raise ValueError(
                f"`low_freq` and `high_freq` must satisfy 0 <= low_freq < high_freq <= {sampling_rate / 2:g} Hz (half "
                f"of `sampling_rate`), got {low_freq} and {high_freq}."
            )
        self.max_frames = max_frames
        self.frame_length_ms = frame_length_ms
        self.frame_shift_ms = frame_shift_ms
        self.low_freq = low_freq
        self.high_freq = high_freq
        self.preemphasis = preemphasis
        self.window_type = window_type
        self.mean = mean
        self.std = std
        self.channels = channels
        self.backend = backend

    @property
    def model_input_names(self) -> list[str]:
        return ["input_features", "input_features_mask"] if self.return_attention_mask else ["input_features"]

    @property
    def frame_length(self) -> int:
        """Samples of an analysis window."""
        return int(self.sampling_rate * self.frame_length_ms * 0.001)

    @property
    def hop_length(self) -> int:
        """Samples between the starts of two analysis windows."""
        return int(self.sampling_rate * self.frame_shift_ms * 0.001)

    @property
    def window_seconds(self) -> float:
        """Seconds of sound that the output covers: `max_frames` hops, 10.24 s by default."""
        return self.max_frames * self.hop_length / self.sampling_rate

    def __call__(
        self,
        raw_speech,
        sampling_rate: int | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | TensorType | None = None,
        device: "str | torch.device | None" = None,
        **kwargs,
    ) -> BatchFeature:
        """Computes the features of one clip or of a batch.

        Args:
            raw_speech (array, tensor, list of floats, or a list of them):
                One clip or a batch, floats in [-1, 1]. One clip is `(samples,)`; a batch is a list of clips of any
                lengths, a `(batch, samples)` or a `(batch, channels, samples)` array. A clip *within a list* may also
                be `(channels, samples)`: wrap a single stereo array in a list.
            sampling_rate (`int`, *optional*):
                Rate of `raw_speech` in Hz. Pass it, so that a wrong rate is an error instead of wrong features.
            return_attention_mask (`bool`, *optional*, defaults to `self.return_attention_mask`):
                Whether to return `input_features_mask`.
            return_tensors (`str` or [`~utils.TensorType`], *optional*):
                `"pt"`, `"np"`, or `None` for a list of numpy arrays.
            device (`str` or `torch.device`, *optional*):
                Where to compute; with `return_tensors="pt"` the result stays there. Defaults to the CPU, or the
                device of the first clip if that is a tensor.
            kwargs: Accepted because callers pass feature extractors `padding`, `truncation` and the like, and ignored:
                the output always has `max_frames` frames.

        Returns:
            [`BatchFeature`] with `input_features` (batch, max_frames, feature_size) float32 and, if asked for,
            `input_features_mask` (batch, max_frames) int64.

        Raises:
            ValueError: If `sampling_rate` is wrong, if a clip is empty, has integers or the wrong shape, or if it has
                NaN, infinity or a sample beyond ±1000.
        """
        if sampling_rate is None:
            logger.warning_once(
                f"It is strongly recommended to pass the `sampling_rate` argument to `{self.__class__.__name__}()`. "
                "Failing to do so can result in silent errors that might be hard to debug."
            )
        elif sampling_rate != self.sampling_rate:
            raise ValueError(
                f"`sampling_rate` is {sampling_rate} but this {self.__class__.__name__} was made for "
                f"{self.sampling_rate}: resample `raw_speech` to {self.sampling_rate} Hz first."
            )
        clips = self.split_batch(raw_speech)
        if device is None:
            device = clips[0].device if isinstance(clips[0], torch.Tensor) else "cpu"
        waveforms = [self._prepare_waveform(clip, index, device) for index, clip in enumerate(clips)]
        num_frames = torch.tensor(
            [1 + (len(waveform) - self.frame_length) // self.hop_length for waveform in waveforms]
        )
        mask = torch.arange(self.max_frames) < num_frames[:, None]

        filterbank = self._torchaudio_filterbank if self.backend == "torchaudio" else self._torch_filterbank
        log_mel = filterbank(torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True))
        features = log_mel.new_full((len(waveforms), self.max_frames, self.feature_size), self.padding_value)
        features[:, : log_mel.shape[1]] = log_mel
        features.masked_fill_(~mask.to(features.device)[..., None], self.padding_value)
        features = (features - self.mean) / self.std

        data = {"input_features": features}
        if self.return_attention_mask if return_attention_mask is None else return_attention_mask:
            data["input_features_mask"] = mask.to(features.device, torch.long)
        if return_tensors != "pt":
            data = {name: list(value.cpu().numpy()) for name, value in data.items()}
        return BatchFeature(data, tensor_type=return_tensors)

    def split_batch(self, raw_speech, name: str = "raw_speech") -> list:
        """The clips of the input, which errors call `name`: each an array, a tensor or a list of numbers."""
        if isinstance(raw_speech, (np.ndarray, torch.Tensor)):
            if raw_speech.ndim not in (1, 2, 3):
                raise ValueError(
                    f"`{name}` must be (samples,), (batch, samples) or (batch, channels, samples), got shape "
                    f"{tuple(raw_speech.shape)}."
                )
            if raw_speech.ndim == 2:
                self._check_samples_last(name, raw_speech)
            clips = [raw_speech] if raw_speech.ndim == 1 else list(raw_speech)
        elif isinstance(raw_speech, (list, tuple)):
            one_clip = len(raw_speech) > 0 and isinstance(raw_speech[0], (int, float, np.number))
            clips = [raw_speech] if one_clip else list(raw_speech)
        else:
            raise ValueError(f"`{name}` must be an array, a tensor or a list, got {type(raw_speech).__name__}.")
        if not clips:
            raise ValueError(f"`{name}` is empty: expected at least one clip.")
        return clips

    @staticmethod
    def _check_samples_last(name: str, array: "np.ndarray | torch.Tensor"):
        if array.shape[0] > array.shape[1] > 0:
            raise ValueError(
                f"`{name}` has shape {tuple(array.shape)}: samples must come last, (channels, samples) or (batch, "
                "samples). Transpose it."
            )

    def to_waveform(self, clip, name: str) -> torch.Tensor:
        """One clip as a tensor of floats, (samples,) or (channels, samples), or an error that calls it `name`."""
        if isinstance(clip, (list, tuple)):
            try:
                clip = np.asarray(clip)
            except (ValueError, TypeError):
                clip = None
            if clip is None or clip.dtype.kind not in "fiu":
                raise ValueError(f"`{name}` is not a list of numbers, nor of channels of the same length.")
        if isinstance(clip, np.ndarray) and clip.dtype.kind == "f":
            clip = torch.from_numpy(np.array(clip, dtype=np.float32, order="C"))
        if not isinstance(clip, torch.Tensor) or not clip.is_floating_point():
            raise ValueError(
                f"`{name}` must be an array, a tensor or a list of floats in [-1, 1] (16-bit samples divided by "
                f"32768), got {getattr(clip, 'dtype', type(clip).__name__)}."
            )
        if clip.ndim == 2:
            self._check_samples_last(name, clip)
        if clip.ndim not in (1, 2):
            raise ValueError(f"`{name}` must be (samples,) or (channels, samples), got shape {tuple(clip.shape)}.")
        if clip.numel() == 0:
            raise ValueError(f"`{name}` is empty: shape {tuple(clip.shape)}.")
        largest = clip.abs().max()
        if not torch.isfinite(largest):
            raise ValueError(f"`{name}` holds NaN or infinite values.")
        if largest > MAX_SAMPLE:
            raise ValueError(f"`{name}` holds a sample of {largest:g}, expected floats in [-1, 1].")
        return clip

    def _prepare_waveform(self, clip, index: int, device) -> torch.Tensor:
        """One clip as a mono, mean-free float32 waveform, no longer than `max_frames` need and at least one frame."""
        clip = self.to_waveform(clip, f"raw_speech[{index}]").to(device, torch.float32)
        if clip.ndim == 2:
            clip = mix_down(clip, self.channels)
        # The mean is the whole waveform's, as in AVCap, also where only its beginning is used.
        used = (self.max_frames - 1) * self.hop_length + self.frame_length
        clip = clip[:used] - clip.mean()
        return torch.nn.functional.pad(clip, (0, max(0, self.frame_length - len(clip))))

    def _torch_filterbank(self, waveforms: torch.Tensor) -> torch.Tensor:
        """Kaldi's log-mel filterbank of (batch, samples): (batch, frames, feature_size)."""
        n_fft = optimal_fft_length(self.frame_length)
        frames = waveforms.unfold(-1, self.frame_length, self.hop_length)
        frames = frames - frames.mean(dim=-1, keepdim=True)
        previous = torch.nn.functional.pad(frames, (1, 0), mode="replicate")[..., :-1]
        window = WINDOWS[self.window_type](self.frame_length, periodic=False, device=waveforms.device)
        frames = (frames - self.preemphasis * previous) * window
        power = torch.fft.rfft(frames, n=n_fft).abs().square()
        filters = _mel_filters(self.feature_size, n_fft, self.sampling_rate, self.low_freq, self.high_freq)
        return (power @ filters.to(waveforms.device)).clamp(min=LOG_FLOOR).log()

    def _torchaudio_filterbank(self, waveforms: torch.Tensor) -> torch.Tensor:
        try:
            from torchaudio.compliance import kaldi
        except (ImportError, OSError, RuntimeError) as error:
            raise ImportError(
                f"backend='torchaudio' needs a torchaudio that loads ({error}): install it, or use backend='torch'."
            ) from error
        return torch.stack(
            [
                kaldi.fbank(
                    waveform[None],
                    htk_compat=True,
                    sample_frequency=self.sampling_rate,
                    use_energy=False,
                    window_type=self.window_type,
                    num_mel_bins=self.feature_size,
                    dither=0.0,
                    frame_length=self.frame_length_ms,
                    frame_shift=self.frame_shift_ms,
                    low_freq=self.low_freq,
                    high_freq=self.high_freq,
                    preemphasis_coefficient=self.preemphasis,
                )
                for waveform in waveforms
            ]
        )


__all__ = ["EVACapFeatureExtractor"]

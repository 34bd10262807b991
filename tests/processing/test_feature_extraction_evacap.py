import json
import logging

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers.utils.logging import get_verbosity, set_verbosity, set_verbosity_error

from evacap.processing.feature_extraction_evacap import EVACapFeatureExtractor


RATE = 16000


def noise(seconds: float, seed: int = 0, channels: int | None = None) -> np.ndarray:
    shape = (int(seconds * RATE),) if channels is None else (channels, int(seconds * RATE))
    return np.random.default_rng(seed).uniform(-0.5, 0.5, shape).astype(np.float32)


def features(extractor: EVACapFeatureExtractor, clips, **kwargs) -> torch.Tensor:
    return extractor(clips, sampling_rate=RATE, return_tensors="pt", **kwargs).input_features


@pytest.mark.parametrize("window_type", ["hamming", "hanning"])
def test_equals_kaldi(shared, window_type):
    answers = load_file(shared("parity/kaldi_fbank.safetensors"))
    names = [key.removesuffix(".waveform") for key in answers if key.endswith(".waveform")]
    assert len(names) == 8
    extractor = EVACapFeatureExtractor(window_type=window_type)
    batch = features(extractor, [answers[f"{name}.waveform"] for name in names]) * extractor.std + extractor.mean
    for name, log_mel in zip(names, batch):
        expected = answers[f"{name}.{window_type}"]
        off = (log_mel[: len(expected)] - expected).abs()
        # 70 dB below the loudest band of its frame a band is what the Fourier transform rounds, on each processor in its
        # own way: the sidelobes of a chirp are there.
        is_heard = expected > expected.amax(1, keepdim=True) - 16
        assert off[is_heard].max() < 5e-4 and off.max() < 0.05, name
        assert log_mel[len(expected) :].abs().max() < 1e-6, "frames past the end are zero before normalisation"


@pytest.mark.parametrize("window_type", ["hamming", "hanning"])
def test_torchaudio_backend_agrees(window_type):
    pytest.importorskip("torchaudio.compliance.kaldi", exc_type=(ImportError, OSError, RuntimeError))
    clips = [noise(1.3), noise(0.01, seed=1), noise(2, seed=2)]
    ours, theirs = (
        features(EVACapFeatureExtractor(window_type=window_type, backend=backend, frame_shift_ms=20), clips)
        for backend in ("torch", "torchaudio")
    )
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)


def test_pads_before_normalising_and_cuts():
    extractor = EVACapFeatureExtractor()
    short, long = features(extractor, [noise(1), noise(12, seed=1)])
    assert short.shape == (1024, 128)
    torch.testing.assert_close(short[98:], torch.full((1024 - 98, 128), 4.346 / 4.332))
    # The part that is cut away has no say but in the mean of the waveform, which a filterbank does not see.
    torch.testing.assert_close(long, features(extractor, noise(12, seed=1)[: int(10.3 * RATE)])[0], atol=1e-3, rtol=0)


def test_batch_of_unequal_lengths_equals_single_clips():
    extractor = EVACapFeatureExtractor(max_frames=300)
    clips = [noise(0.5), noise(2, seed=1), noise(0.001, seed=2), noise(5, seed=3)]
    batch = extractor(clips, sampling_rate=RATE, return_tensors="pt", return_attention_mask=True)
    assert batch.input_features_mask.sum(-1).tolist() == [48, 198, 1, 300]
    for clip, row in zip(clips, batch.input_features):
        torch.testing.assert_close(row, features(extractor, clip)[0], atol=1e-5, rtol=0)


def test_input_kinds_give_the_same():
    extractor = EVACapFeatureExtractor(max_frames=64)
    clip = noise(0.5)
    expected = features(extractor, clip)
    read_only = clip.copy()
    read_only.flags.writeable = False
    for same in (
        clip.astype(np.float64),
        torch.from_numpy(clip),
        clip.tolist(),
        [clip.tolist()],
        clip[None],
        read_only,
    ):
        torch.testing.assert_close(features(extractor, same), expected)
    assert features(extractor, np.stack([clip, clip])).shape == (2, 64, 128)
    arrays = extractor(clip, sampling_rate=RATE)["input_features"]
    assert isinstance(arrays, list) and isinstance(arrays[0], np.ndarray)
    stacked = extractor([clip, clip], sampling_rate=RATE, return_tensors="np")["input_features"]
    assert isinstance(stacked, np.ndarray) and stacked.shape == (2, 64, 128) and stacked.dtype == np.float32


def test_stereo_is_averaged_or_reduced_to_the_first_channel():
    stereo = noise(0.5, channels=2)
    average, first = EVACapFeatureExtractor(max_frames=64), EVACapFeatureExtractor(max_frames=64, channels="first")
    torch.testing.assert_close(features(average, [stereo]), features(average, stereo.mean(0)))
    torch.testing.assert_close(features(first, [torch.from_numpy(stereo)]), features(average, stereo[0]))
    assert features(average, stereo[None]).shape == features(average, [stereo]).shape == (1, 64, 128)


def test_tiny_configuration_and_its_window():
    extractor = EVACapFeatureExtractor(feature_size=64, max_frames=256, frame_shift_ms=20)
    assert extractor.window_seconds == pytest.approx(5.12)
    batch = extractor(noise(1), sampling_rate=RATE, return_tensors="pt", return_attention_mask=True)
    assert batch.input_features.shape == (1, 256, 64)
    assert batch.input_features_mask.sum() == 1 + (RATE - 400) // 320
    assert EVACapFeatureExtractor().window_seconds == pytest.approx(10.24)


def test_sampling_rate(caplog):
    extractor = EVACapFeatureExtractor(max_frames=64)
    with pytest.raises(ValueError, match="`sampling_rate` is 44100 .* 16000"):
        extractor(noise(0.1), sampling_rate=44100)
    with caplog.at_level(logging.WARNING):
        extractor(noise(0.1))
        extractor(noise(0.1))
    assert [record.getMessage()[:43] for record in caplog.records] == ["It is strongly recommended to pass the `sam"]


def test_warnings_follow_the_verbosity_of_transformers(caplog):
    before = get_verbosity()
    set_verbosity_error()
    try:
        EVACapFeatureExtractor(max_frames=64)(noise(0.1))
    finally:
        set_verbosity(before)
    assert not caplog.records


@pytest.mark.parametrize(
    ("clips", "message"),
    [
        ([], "`raw_speech` is empty"),
        (np.zeros(0, np.float32), r"`raw_speech\[0\]` is empty"),
        ([noise(0.1), []], r"`raw_speech\[1\]` is empty"),
        (np.array([0.1, np.nan, 0.2] * 200), r"`raw_speech\[0\]` holds NaN or infinite"),
        ([noise(0.1), torch.tensor([0.0, float("inf")])], r"`raw_speech\[1\]` holds NaN or infinite"),
        (np.zeros((1600, 2), np.float32), "samples must come last"),
        ([np.zeros((1600, 2), np.float32)], r"`raw_speech\[0\]` .*samples must come last"),
        (np.zeros((1, 1, 1, 9), np.float32), r"got shape \(1, 1, 1, 9\)"),
        ([np.zeros((1, 1, 9), np.float32)], r"`raw_speech\[0\]` .*got shape \(1, 1, 9\)"),
        (np.zeros(1600, np.int16), r"floats in \[-1, 1\] .*, got int16"),
        ([0, 12000, -7] * 100, r"`raw_speech\[0\]` must be .*floats in \[-1, 1\] .*, got int"),
        ([[0, 12000, -7] * 100], r"`raw_speech\[0\]` must be .*floats in \[-1, 1\] .*, got int"),
        ([["a", "b"]], r"`raw_speech\[0\]` is not a list of numbers"),
        ([[[0.1, 0.2], [0.3]]], r"`raw_speech\[0\]` is not a list of numbers"),
        ([[0.1, None]], r"`raw_speech\[0\]` is not a list of numbers"),
        ("clip.wav", "`raw_speech` must be an array, a tensor or a list, got str"),
    ],
)
def test_bad_input(clips, message):
    with pytest.raises(ValueError, match=message) as error:
        EVACapFeatureExtractor()(clips, sampling_rate=RATE)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("window_type", "hann"), ("channels", "mix"), ("backend", "kaldi"), ("max_frames", 0), ("high_freq", 9000)],
)
def test_bad_configuration(argument, value):
    with pytest.raises(ValueError, match=f"`{argument}`"):
        EVACapFeatureExtractor(**{argument: value})


def test_round_trip_is_exact_and_small(tmp_path):
    extractor = EVACapFeatureExtractor(
        feature_size=64, max_frames=256, frame_shift_ms=20, window_type="hanning", channels="first", mean=-4.1, std=3.3
    )
    before = features(extractor, noise(1))
    extractor.save_pretrained(tmp_path)
    saved = (tmp_path / "preprocessor_config.json").read_text()
    assert len(saved) < 1000 and json.loads(saved)["window_type"] == "hanning"
    loaded = EVACapFeatureExtractor.from_pretrained(tmp_path)
    assert loaded.to_dict() == extractor.to_dict()
    assert torch.equal(features(loaded, noise(1)), before)


def test_device_argument():
    extractor = EVACapFeatureExtractor(max_frames=64)
    assert features(extractor, noise(0.2), device="cpu").device.type == "cpu"
    if torch.cuda.is_available():
        on_gpu = features(extractor, noise(0.2), device="cuda")
        assert on_gpu.is_cuda
        torch.testing.assert_close(on_gpu.cpu(), features(extractor, noise(0.2)), atol=1e-3, rtol=0)
        assert features(extractor, torch.from_numpy(noise(0.2)).cuda()).is_cuda

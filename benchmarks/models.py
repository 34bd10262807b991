"""Models with random weights and random inputs for the benchmarks."""

import torch
import transformers

from benchmarks.measure import DTYPES
from evacap.modeling_evacap.configuration_evacap import EVACapConfig
from evacap.modeling_evacap.modeling_evacap import EVACapForConditionalGeneration
from evacap.modeling_evacap.presets import get_preset


_SMALL_TOWER = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
_SMALL = {
    "audio_config": {**_SMALL_TOWER, "num_mel_bins": 32, "max_frames": 64},
    "video_config": {**_SMALL_TOWER, "image_size": 32},
    "text_config": {**_SMALL_TOWER, "vocab_size": 999, "bos_token_id": 1, "eos_token_id": 2},
}
SIZES = {"full": {"audio_config": {}, "video_config": {}, "text_config": {}}, "small": _SMALL}
"""`full` is the paper's size. `small` only checks that a benchmark runs; its speed means nothing."""


def make_config(variant: str, frames: int = 18, size: str = "full", attention: str = "full") -> EVACapConfig:
    """The configuration of a preset for clips of `frames` frames.

    Args:
        variant (`str`): `"audio-only"`, `"avcap"`, `"evacap"` or another preset.
        frames (`int`, defaults to 18): Frames of the position table, 1 or even; 0 is for clips without a picture.
        size (`str`, defaults to `"full"`): `"full"` or `"small"`.
        attention (`str`, defaults to `"full"`): The video tower's attention.
    """
    fields = SIZES[size]
    video = {**fields["video_config"], "num_frames": frames or 18, "attention": attention}
    return get_preset(variant).config(**{**fields, "video_config": video})


def make_model(config: EVACapConfig, dtype: str = "float32", device: str = "cpu") -> EVACapForConditionalGeneration:
    """A model with random weights, in evaluation mode."""
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    with torch.device(device):
        return EVACapForConditionalGeneration(config).to(DTYPES[dtype]).eval()


def make_inputs(config: EVACapConfig, batch: int, frames: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    """`batch` random clips with `frames` frames (none for 0) and a sound as long as the position table."""
    generator = torch.Generator().manual_seed(0)
    audio, video = config.audio_config, config.video_config
    inputs = {"input_features": torch.randn(batch, audio.max_frames, audio.num_mel_bins, generator=generator)}
    if frames and config.fusion_type != "audio_only":
        shape = (batch, frames, video.num_channels, video.image_size, video.image_size)
        inputs["pixel_values_videos"] = torch.randn(shape, generator=generator)
    return {name: values.to(device) for name, values in inputs.items()}

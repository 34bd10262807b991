"""The counted operations are those that PyTorch's own counter sees, and the weights those that the model has."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from benchmarks import roofline
from benchmarks.fusion import plain
from benchmarks.models import make_config, make_inputs, make_model


BATCH, FRAMES, BEAMS = 2, 4, 3


def eager_model(variant: str, **options):
    config = make_config(variant, FRAMES, "small", **options)
    model = make_model(config)
    # The counter does not see the fused attention of a CPU.
    model.set_attn_implementation("eager")
    return config, model


def count(function, *args, **kwargs) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function(*args, **kwargs)
    return counter.get_total_flops()


@pytest.mark.parametrize("attention", ["full", "frame"])
@pytest.mark.parametrize("variant", ["audio-only", "avcap", "late-concat", "video-only"])
def test_encoder(variant, attention):
    config, model = eager_model(variant, attention=attention)
    inputs = make_inputs(config, BATCH, FRAMES)
    if variant == "video-only":
        inputs.pop("input_features")
    assert roofline.flops(roofline.encoder(config, BATCH, FRAMES)) == count(model.get_encoder(), **inputs)


@pytest.mark.parametrize("variant", ["evacap", "avcap"])
def test_encoder_of_clips_without_a_picture(variant):
    config, model = eager_model(variant)
    counted = count(model.get_encoder(), **make_inputs(config, BATCH, 0))
    assert roofline.flops(roofline.encoder(config, BATCH, 0)) == counted


def test_encoder_with_fusion():
    """The module may multiply more than the formula needs, to build less: what is counted is the formula."""
    config, model = eager_model("evacap")
    encoder, inputs = model.get_encoder(), make_inputs(config, BATCH, FRAMES)
    with torch.no_grad():
        audio = encoder.audio_tower(inputs["input_features"]).last_hidden_state
        video = encoder.video_tower(inputs["pixel_values_videos"]).last_hidden_state
    counted = count(encoder, **inputs) - count(encoder.fusion, audio, video)
    counted += count(plain, encoder.fusion, audio, video)
    assert roofline.flops(roofline.encoder(config, BATCH, FRAMES)) == counted


@pytest.mark.parametrize("variant", ["audio-only", "avcap", "evacap"])
def test_decoder(variant):
    config, model = eager_model(variant)
    prefix = roofline.prefix_tokens(config, FRAMES)
    with torch.no_grad():
        encoder_outputs = model.get_encoder()(**make_inputs(config, BATCH, FRAMES))
    assert encoder_outputs.last_hidden_state.shape[1] == prefix
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    ids = torch.ones(BATCH * BEAMS, 1, dtype=torch.long)
    options = {"decoder_input_ids": ids, "encoder_outputs": encoder_outputs, "cache": cache}
    counted = [count(model, **options, use_cache=True) for _ in range(3)]
    assert counted[0] == roofline.flops(roofline.prefill(config, BATCH, BEAMS, prefix))
    assert sum(counted[1:]) == roofline.flops(roofline.decoding(config, BATCH, BEAMS, prefix, new_tokens=3))


@pytest.mark.parametrize("variant", ["audio-only", "avcap"])
def test_training_step(variant):
    length = 7
    config, model = eager_model(variant)
    inputs = {**make_inputs(config, BATCH, FRAMES), "labels": torch.ones(BATCH, length, dtype=torch.long)}
    assert roofline.training_step(config, BATCH, FRAMES, length) == 3 * count(model, **inputs)


def test_weight_bytes():
    config, model = eager_model("evacap")
    parts = itertools.chain(model.model.decoder.layers.parameters(), model.lm_head.parameters())
    assert roofline.step_weight_bytes(config, "bfloat16") == 2 * sum(parameter.numel() for parameter in parts)


def test_floor():
    config = make_config("evacap", FRAMES, "small")
    floor = roofline.floor(config, 1, FRAMES, 1, 5, "float32", "cpu")
    assert all(seconds > 0 for seconds in floor.values())
    assert floor["total"] == pytest.approx(floor["encoder"] + floor["prefill"] + floor["decoding"])

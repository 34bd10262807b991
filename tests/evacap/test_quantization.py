"""The bundled checkpoint with quantised weights, saved and loaded again."""

import pytest
import torch
from transformers import AutoModel, AutoProcessor

import evacap
from benchmarks.quantization import WAYS, captions, load
from evacap.training.data.collator import EVACapDataCollator
from evacap.training.procedural.dataset import ProceduralClips


QUANTISED = [way for way, options in WAYS.items() if "quantization_config" in options]


@torch.no_grad()
@pytest.mark.parametrize("way", QUANTISED)
def test_a_quantised_model_is_saved_and_says_the_same(way, tmp_path):
    processor = AutoProcessor.from_pretrained(evacap.TINY)
    clips = ProceduralClips(processor, 8, "test", seed=2)
    batch = EVACapDataCollator(p_mix=0.0)([clips[index] for index in range(len(clips))])
    streams = {key: batch[key] for key in ("input_features", "pixel_values_videos")}
    whole = AutoModel.from_pretrained(evacap.TINY)
    quantised = load(evacap.TINY, way)
    linear = quantised.get_encoder().audio_tower.layers[0].mlp.fc1.weight
    assert type(linear) is not torch.nn.Parameter or linear.dtype in (torch.int8, torch.uint8)
    quantised.save_pretrained(tmp_path / "saved")
    weights = sum(file.stat().st_size for file in (tmp_path / "saved").glob("*.safetensors"))
    assert weights < 0.45 * sum(value.nbytes for value in whole.state_dict().values())
    again = AutoModel.from_pretrained(tmp_path / "saved")
    found = [model.generate(**streams).tolist() for model in (whole, quantised, again)]
    assert found[1] == found[2]
    # Of 300 clips, at least 290 say the same.
    assert sum(one == other for one, other in zip(found[0], found[1])) >= 6


@pytest.mark.slow
def test_captions_of_quantised_weights():
    same = captions(300, "cpu")
    assert all(number >= 285 for number in same.values()), same

"""Prefix tuning: learned vectors behind the tokens of the clip."""

import pytest
import torch
from tiny import tiny_config, tiny_inputs, tiny_labels

from evacap.modeling_evacap.configuration_evacap import EVACapConfig
from evacap.modeling_evacap.modeling_evacap import EVACapForConditionalGeneration


def make_model(number: int = 3) -> EVACapForConditionalGeneration:
    torch.manual_seed(0)
    config = tiny_config(fusion_type="video_only").to_dict()
    config["text_config"]["num_prompt_tokens"] = number
    return EVACapForConditionalGeneration(EVACapConfig.from_dict(config)).eval()


def test_the_text_reads_them_with_and_without_a_cache_and_beside_padding():
    model = make_model()
    model.model.decoder.prompt.data.normal_()
    pixels = tiny_inputs()["pixel_values_videos"]
    labels = tiny_labels()[: len(pixels)]
    whole = model(pixel_values_videos=pixels, labels=labels).logits
    with torch.no_grad():
        model.model.decoder.prompt.mul_(-1)
        assert not torch.allclose(model(pixel_values_videos=pixels, labels=labels).logits, whole)
        model.model.decoder.prompt.mul_(-1)
    # The last frames are padding; the vectors behind them are read all the same.
    padded = torch.cat([pixels, torch.randn_like(pixels)], 1)
    mask = torch.arange(padded.shape[1]).expand(len(pixels), -1) < pixels.shape[1]
    found = model(pixel_values_videos=padded, pixel_values_videos_mask=mask, labels=labels).logits
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": 2, "pixel_values_videos": padded}
    cached, plain = (
        model.generate(pixel_values_videos_mask=mask, use_cache=use_cache, **options) for use_cache in (True, False)
    )
    assert torch.equal(cached, plain)


def test_they_are_saved_begin_small_and_take_half_precision(tmp_path):
    model = make_model()
    assert 0 < model.model.decoder.prompt.std() < 0.1
    model.save_pretrained(tmp_path)
    loaded = EVACapForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(loaded.model.decoder.prompt, model.model.decoder.prompt)
    pixels = tiny_inputs()["pixel_values_videos"]
    logits = loaded.to(torch.bfloat16)(pixel_values_videos=pixels, labels=tiny_labels()[: len(pixels)]).logits
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
    # A model without them can begin with them, and then nothing else needs to learn.
    without = make_model(0)
    assert without.model.decoder.prompt is None and "model.decoder.prompt" not in without.state_dict()
    without.save_pretrained(tmp_path / "without")
    begun = EVACapForConditionalGeneration.from_pretrained(tmp_path / "without", config=model.config)
    assert begun.model.decoder.prompt.isfinite().all() and 0 < begun.model.decoder.prompt.std() < 0.1


def test_other_numbers_are_refused():
    with pytest.raises(ValueError, match="num_prompt_tokens"):
        make_model(-1)
    with pytest.raises(ValueError, match="num_prompt_tokens"):
        EVACapConfig(text_config={"num_prompt_tokens": 2}, text_fusion="adaptive", fusion_type="concat")
    with pytest.raises(ValueError, match="with a language model"):
        EVACapConfig(text_config={"model_type": "llama", "num_prompt_tokens": 2})

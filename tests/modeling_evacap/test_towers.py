"""CED and CLIP as towers, and features that were computed before."""

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_config, tiny_inputs, tiny_labels
from transformers import AutoModel, CLIPVisionModelWithProjection

from evacap.modeling_evacap.configuration_evacap import EVACapCEDConfig, EVACapCLIPConfig, EVACapConfig
from evacap.modeling_evacap.modeling_evacap import EVACapCEDTower, EVACapForConditionalGeneration
from evacap.modeling_evacap.tower_weights import ced_state


CED = {"model_type": "ced", "embed_dim": 24, "depth": 2, "num_heads": 4, "n_mels": 64, "target_length": 128}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 16,
    "projection_dim": 24,
    "num_frames": 4,
}


@pytest.fixture(scope="module")
def known(shared):
    return load_file(shared("peers/lavcap/ced_small.safetensors"))


def part(known: dict[str, torch.Tensor], start: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(start): value for name, value in known.items() if name.startswith(start)}


def make_tower(state: dict[str, torch.Tensor]) -> EVACapCEDTower:
    tower = EVACapCEDTower(EVACapCEDConfig(**CED)).eval()
    dtype = state["norm.weight"].dtype
    converted, unused = ced_state(state, tower.embeddings.num_steps)
    assert unused and all(name.startswith(("output", "front_end")) for name in unused)
    tower.to(dtype).load_state_dict(converted)
    return tower


@pytest.mark.parametrize(("dtype", "share"), [("f64", 1e-9), ("f32", 1e-5)])
def test_ced_is_the_references(known, dtype, share):
    case = part(known, f"{dtype}/")
    tower = make_tower(part(case, "weights/"))

    def assert_equal(found, expected):
        assert (found - expected).abs().max() <= share * max(1.0, expected.abs().max())

    with torch.no_grad():
        assert_equal(tower(case["features"]).last_hidden_state, case["tokens_eval"])
        for frames in (96, 100):
            assert_equal(tower(case["features"][:, :frames]).last_hidden_state, case[f"tokens_eval_{frames}_frames"])
        assert_equal(tower.train()(case["features"]).last_hidden_state, case["tokens_train"])
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert_equal(getattr(tower.embeddings.input_norm, name), case[f"{name}_after"])


def test_a_published_ced_file_is_read(known):
    tower = make_tower(part(known, "loading/file/"))
    with torch.no_grad():
        found = tower(known["loading/features"]).last_hidden_state
    torch.testing.assert_close(found, known["loading/tokens_eval"], atol=1e-5, rtol=1e-5)


def lavcap_towers(**kwargs) -> EVACapConfig:
    fields = {"fusion_type": "optimal_transport", "audio_pooling": "frequency", "num_joint_layers": 0}
    config = tiny_config().to_dict() | fields | {"audio_config": CED, "video_config": CLIP} | kwargs
    return EVACapConfig.from_dict(config)


def inputs(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_features": torch.randn(3, 128, 64, generator=generator),
        "pixel_values_videos": tiny_inputs()["pixel_values_videos"],
    }


def test_clip_gives_one_projected_vector_a_frame(tmp_path):
    torch.manual_seed(0)
    model = EVACapForConditionalGeneration(lavcap_towers()).eval()
    clip = CLIPVisionModelWithProjection(EVACapCLIPConfig(**CLIP)).eval()
    clip.load_state_dict(model.model.encoder.video_tower.clip.state_dict())
    pixels = inputs()["pixel_values_videos"]
    with torch.no_grad():
        expected = clip(pixels.flatten(0, 1)).image_embeds.unflatten(0, (3, 4))
        features = model.get_video_features(pixels)
        output = model.get_encoder()(**inputs())
        before = model.get_encoder()(inputs()["input_features"], video_features=expected)
    torch.testing.assert_close(features.last_hidden_state, expected)
    assert output.last_hidden_state.shape == (3, 8 + 4, 24)
    torch.testing.assert_close(before.last_hidden_state, output.last_hidden_state)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.generate(**inputs(), max_new_tokens=4), model.generate(**inputs(), max_new_tokens=4))


def test_the_statistics_of_ced_are_kept_with_the_checkpoint(tmp_path):
    model = EVACapForConditionalGeneration(lavcap_towers()).train()
    model(**inputs(), labels=tiny_labels()).loss.backward()
    norm = model.model.encoder.audio_tower.embeddings.input_norm
    assert norm.running_mean.any() and norm.num_batches_tracked == 1
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).model.encoder.audio_tower.embeddings.input_norm
    assert torch.equal(loaded.running_mean, norm.running_mean)
    assert torch.equal(loaded.running_var, norm.running_var)


@pytest.mark.parametrize("enrichment", [None, "caste", "case"])
@pytest.mark.parametrize("fusion_type", ["gated_cross_attention", "concat"])
def test_the_towers_serve_every_fusion_and_masks_hold(fusion_type, enrichment):
    torch.manual_seed(0)
    config = lavcap_towers(fusion_type=fusion_type, num_joint_layers=1, enrichment=enrichment)
    model = EVACapForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("_block.scale", "audio.scale", "video.scale")):
            parameter.data.fill_(0.5)
        if name.endswith("temporal_norm.weight"):
            # CASE would else choose its tokens by rounding errors.
            parameter.data.copy_(torch.linspace(0.1, 2, len(parameter)))
    frames, mask = torch.ones(3, 128, dtype=torch.bool), torch.ones(3, 4, dtype=torch.bool)
    frames[1, 64:], mask[1, 2:], mask[2] = False, False, False
    given = inputs()
    captions = {"audio_caption_ids": tiny_labels(1), "video_caption_ids": tiny_labels(2)}
    own = {name: ids[1:2] for name, ids in captions.items()}
    with torch.no_grad():
        mixed = model.get_encoder()(**given, **captions, input_features_mask=frames, pixel_values_videos_mask=mask)
        alone = model.get_encoder()(given["input_features"][1:2, :64], given["pixel_values_videos"][1:2, :2], **own)
        unseen = model.get_encoder()(given["input_features"][2:])
    for row, expected in ((1, alone), (2, unseen)):
        exists = mixed.attention_mask[row] if mixed.attention_mask is not None else slice(None)
        torch.testing.assert_close(
            mixed.last_hidden_state[row][exists], expected.last_hidden_state[0], atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_features": torch.zeros(1, 128, 32)}, "frames, 64"),
        ({"input_features": torch.zeros(1, 144, 64)}, "16 to 128 frames"),
        ({"pixel_values_videos": torch.zeros(3, 4, 3, 16, 16)}, "3, 32, 32"),
        ({"video_features": torch.zeros(3, 4, 24)}, "instead of `pixel_values_videos`"),
        ({"video_features": torch.zeros(3, 4, 32), "pixel_values_videos": None}, "frames, 24"),
    ],
)
def test_wrong_inputs_say_what_to_do(given, message):
    model = EVACapForConditionalGeneration(lavcap_towers())
    with pytest.raises(ValueError, match=message):
        model.get_encoder()(**{**inputs(), **given})


@pytest.mark.parametrize(
    ("kwargs", "field"),
    [
        ({"video_config": {**CLIP, "projection_dim": 32}}, "video_config.projection_dim"),
        ({"video_config": {**CLIP, "num_frames": 0}}, "video_config.num_frames"),
        ({"audio_config": {**CED, "n_mels": 60}}, "audio_config.num_mel_bins"),
        ({"fusion_type": "video_only", "audio_pooling": None}, "video_config.model_type"),
    ],
)
def test_illegal_values_name_the_field(kwargs, field):
    with pytest.raises(ValueError, match=f"`{field}`"):
        lavcap_towers(**kwargs)

import json

import pytest

from evacap.modeling_evacap.configuration_evacap import EVACapConfig, EVACapTextConfig


@pytest.mark.parametrize(
    ("kwargs", "field", "legal"),
    [
        ({"fusion_type": "late"}, "fusion_type", "'concat', 'late_concat', 'optimal_transport'"),
        ({"gate_type": "soft"}, "gate_type", "'entropy', 'agreement', 'learned', 'none'"),
        ({"label_smoothing": 1.0}, "label_smoothing", "below 1"),
        ({"semantic_consistency_weight": -1.0}, "semantic_consistency_weight", "from 0 up"),
        ({"label_smoothing": "0.1"}, "label_smoothing", "a number"),
        ({"gate_stability_weight": None}, "gate_stability_weight", "a number"),
        ({"gate_weight_init": "a"}, "gate_weight_init", "a number"),
        ({"num_joint_layers": True}, "num_joint_layers", "a whole number"),
        ({"audio_config": EVACapTextConfig()}, "audio_config", "an EVACapAudioConfig"),
        ({"fusion_type": "audio_only", "semantic_consistency_weight": 1.0}, "semantic_consistency_weight", "0 with"),
        ({"num_joint_layers": -1}, "num_joint_layers", "from 0 up"),
        ({"audio_config": {"num_attention_heads": 7}}, "audio_config.num_attention_heads", "768"),
        ({"audio_config": {"num_mel_bins": 100}}, "audio_config.num_mel_bins", "multiple of"),
        ({"audio_config": {"num_hidden_layers": 0}}, "audio_config.num_hidden_layers", "above 0"),
        ({"video_config": {"num_frames": 5}}, "video_config.num_frames", "video_config.tubelet_size` (2)"),
        ({"video_config": {"image_size": 100}}, "video_config.image_size", "multiple of"),
        ({"video_config": {"attention": "row"}}, "video_config.attention", "'full', 'frame'"),
        ({"text_config": {"num_attention_heads": 5}}, "text_config.num_attention_heads", "768"),
        ({"text_config": 3}, "text_config", "a dict"),
        ({"fusion_type": "concat", "video_config": {"hidden_size": 384}}, "video_config.hidden_size", "768"),
        ({"fusion_type": "late_concat", "video_config": {"hidden_size": 384}}, "video_config.hidden_size", "768"),
        (
            {"fusion_type": "late_concat", "video_config": {"model_type": "clip_vision_model"}},
            "video_config.model_type",
            "'late_concat'",
        ),
    ],
)
def test_illegal_values_name_the_field_and_what_is_legal(kwargs, field, legal):
    with pytest.raises(ValueError) as error:
        EVACapConfig(**kwargs)
    assert f"`{field}`" in str(error.value)
    assert legal in str(error.value)


def test_one_frame_means_one_frame_tubelets():
    assert EVACapConfig(video_config={"num_frames": 1}).video_config.tubelet_size == 1


def test_special_tokens_are_the_text_configs():
    config = EVACapConfig(text_config={"vocab_size": 9, "pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 2})
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (3, 1, 2)
    assert config.decoder_start_token_id == 1


def test_json_round_trip(tmp_path):
    config = EVACapConfig(
        fusion_type="concat",
        label_smoothing=0.2,
        audio_config={"num_hidden_layers": 3},
        video_config={"num_frames": 8, "attention": "frame"},
        text_config={"vocab_size": 77, "bos_token_id": 1, "eos_token_id": 2},
    )
    config.save_pretrained(tmp_path)
    loaded = EVACapConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.video_config.attention == "frame"
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model_type"] == "evacap"
    assert stored["audio_config"]["num_hidden_layers"] == 3

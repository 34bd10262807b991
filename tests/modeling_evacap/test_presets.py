import pytest

from evacap.modeling_evacap.presets import PRESETS, get_preset


@pytest.mark.parametrize(
    ("name", "fusion_type", "gate_type"),
    [
        ("audio-only", "audio_only", None),
        ("avcap", "concat", None),
        ("evacap", "gated_cross_attention", "entropy"),
        ("evacap-learned-gate", "gated_cross_attention", "learned"),
        ("late-concat", "late_concat", None),
        ("lavcap", "optimal_transport", None),
        ("evacap-ungated", "gated_cross_attention", "none"),
        ("vact", "concat", None),
        ("video-only", "video_only", None),
    ],
)
def test_preset_is_the_row(name, fusion_type, gate_type):
    config = get_preset(name).config()
    assert config.fusion_type == fusion_type
    assert gate_type is None or config.gate_type == gate_type
    assert config.video_config.num_frames == 18


def test_avcap_has_its_own_processing():
    assert PRESETS["avcap"].processing == {
        "window_type": "hanning",
        "channels": "first",
        "frame_sampling": "middle",
        "fps": 2,
    }
    assert PRESETS["evacap"].processing["window_type"] == "hamming"


def test_fields_override_the_preset():
    config = get_preset("evacap").config(video_config={"num_frames": 4}, num_joint_layers=2)
    assert (config.video_config.num_frames, config.num_joint_layers) == (4, 2)


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match="'evacap2'.*'audio-only', 'avcap'"):
        get_preset("evacap2")

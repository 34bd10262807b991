from pathlib import Path

import pytest
import yaml

from evacap.modeling_evacap.presets import get_preset
from evacap.training.run_config import flatten, load_run_config, shipped_configs


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", shipped_configs())
def test_shipped_configurations_are_right(name):
    config = load_run_config(name, [] if name == "tiny" else ["data.prepared=audiocaps"])
    get_preset(config.model.preset)


def test_the_rows_of_the_paper():
    shipped = [name for name in shipped_configs() if name != "tiny"]
    rows = {name: load_run_config(name, ["data.prepared=audiocaps"]) for name in shipped}
    agreement = rows.pop("evacap_agreement")
    assert (agreement.model.preset, agreement.data.p_mix) == ("evacap-agreement", 0.0)
    lavcap = rows.pop("lavcap")
    assert (lavcap.model.preset, lavcap.data.p_mix, lavcap.model.lora.r) == ("lavcap", 0.0, 8)
    align = rows.pop("align")
    assert (align.model.preset, align.data.p_mix, align.alignment.loss) == ("audio-only", 0.0, "ot")
    vact = rows.pop("vact")
    assert (vact.model.preset, vact.data.p_mix) == ("vact", 0.0)
    assert {name: (config.model.preset, config.data.p_mix) for name, config in rows.items()} == {
        "audio_only": ("audio-only", 0.0),
        "avcap": ("avcap", 0.0),
        "evacap": ("evacap", 0.05),
        "evacap_without_sms": ("evacap", 0.0),
        "evacap_without_entropy": ("evacap-learned-gate", 0.05),
        "evacap_without_sms_and_entropy": ("evacap-learned-gate", 0.0),
        "evacap_without_gate": ("evacap-ungated", 0.05),
    }
    # All else is the same in all of them.
    settled = [
        {
            key: value
            for key, value in flatten(config).items()
            if key not in ("output", "model.preset", "data.p_mix", "data.augmentation")
        }
        for config in rows.values()
    ]
    assert all(values == settled[0] for values in settled)
    assert settled[0]["optimization.learning_rate"] == 1e-4 and settled[0]["optimization.betas"] == [0.95, 0.999]


def test_a_file_changes_its_base_and_arguments_change_the_file(tmp_path):
    write(
        tmp_path / "first.yaml",
        "output: out\ndata: {procedural: 5, p_mix: 0.5}\nmodel: {config: {label_smoothing: 0}}",
    )
    path = write(tmp_path / "second.yaml", "base: first.yaml\nseed: 3\ndata: {p_mix: 0.25}")
    config = load_run_config(path, ["optimization.learning_rate=1e-3", "model.config.gate_type=none", "output=there"])
    assert (config.output, config.seed, config.data.procedural, config.data.p_mix) == ("there", 3, 5, 0.25)
    assert config.optimization.learning_rate == 1e-3
    assert config.model.config == {"label_smoothing": 0, "gate_type": "none"}


def test_lists_are_replaced_and_nothing_is_none(tmp_path):
    path = write(tmp_path / "a.yaml", "output: out\ndata: {procedural: 5}\nmodel: {freeze: [a, b]}")
    config = load_run_config(path, ["model.freeze=[c]", "optimization.max_grad_norm=null"])
    assert config.model.freeze == ["c"] and config.optimization.max_grad_norm is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimization.lerning_rate=1", r"`optimization.lerning_rate` is not a key.*`optimization.learning_rate`"),
        ("p_mix=0", r"`p_mix` is not a key.*`data.p_mix`"),
        ("zzz=0", r"`zzz` is not a key.*There are `output`"),
        ("optimization.epochs=1.5", r"`optimization.epochs` is 1.5, but it must be a whole number"),
        ("optimization.epochs=true", r"`optimization.epochs` is True"),
        (
            "alignment={teacher: a, scorers_learning_rate: -1}",
            r"`alignment.scorers_learning_rate` is -1.0, but it must be at least 0",
        ),
        ("optimization.epochs=0", r"`optimization.epochs` is 0, but it must be at least 1"),
        ("optimization.learning_rate=high", r"`optimization.learning_rate` is 'high', but it must be a number"),
        ("optimization.betas=[0.9]", r"`optimization.betas`.*two numbers"),
        ("optimization.betas=0.9", r"`optimization.betas` is 0.9, but it must be a list"),
        ("model.freeze=[1]", r"`model.freeze\[0\]` is 1, but it must be text"),
        ("model.config=3", r"`model.config` is 3, but it must be keys with values"),
        ("model=evacap", r"`model` is 'evacap', but it must hold keys"),
        ("resources.mixed_precision=fp8", r"`resources.mixed_precision` is 'fp8'.*'no', 'bf16', 'fp16'"),
        ("saving.code=maybe", r"`saving.code` is 'maybe', but it must be true or false"),
        ("data.prepared=folder", r"either `data.prepared`.*or `data.procedural`"),
        ("seed", r"'seed' is not a change.*KEY=VALUE"),
        ("seed=[", r"'seed=\[': the value is not YAML"),
    ],
)
def test_wrong_keys_and_values_are_named(override, message):
    with pytest.raises(ValueError, match=message):
        load_run_config("tiny", [override])


def test_wrong_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.*evacap_without_sms"):
        load_run_config("nowhere")
    with pytest.raises(ValueError, match="a.yaml: not a YAML file"):
        load_run_config(write(tmp_path / "a.yaml", "a: ["))
    with pytest.raises(ValueError, match="a.yaml: it holds a list"):
        load_run_config(write(tmp_path / "a.yaml", "- 1"))
    with pytest.raises(ValueError, match="leads back to itself"):
        load_run_config(write(tmp_path / "a.yaml", "base: a.yaml"))
    with pytest.raises(ValueError, match="`output` is missing"):
        load_run_config(write(tmp_path / "a.yaml", "seed: 1"))


def test_no_is_a_precision(tmp_path):
    path = write(tmp_path / "a.yaml", yaml.safe_dump({"base": "tiny", "resources": {"mixed_precision": False}}))
    assert load_run_config(path).resources.mixed_precision == "no"
    assert load_run_config("tiny", ["resources.mixed_precision=no"]).resources.mixed_precision == "no"

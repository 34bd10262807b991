"""LAVCap from its parts to a model: import, `evacap train lavcap` with adapters, checkpoints, merging."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from training_runs import read_log, run
from transformers import AutoModel, AutoProcessor

import evacap
from evacap.cli import main
from evacap.training.adapters import add_adapters, merged
from evacap.training.procedural.dataset import ProceduralClips
from evacap.training.run_config import LoraSection, load_run_config


sys.path.insert(0, str(Path(__file__).parents[1]))

from language_models import save_ced, save_clip, save_language_model  # noqa: E402


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lavcap")
    command = ["import-weights", "--output", str(folder / "start")]
    command += ["--ced", str(save_ced(folder / "ced")), "--clip", str(save_clip(folder / "clip"))]
    assert main([*command, "--language-model", str(save_language_model(folder / "llama"))]) == 0
    return folder / "start"


@pytest.fixture(scope="module")
def trained(start) -> Path:
    """The configuration of a run that is over."""
    values = {
        "base": "lavcap",
        "output": str(start.parent / "run"),
        "model": {"start": str(start)},
        "data": {"procedural": 12, "augmentation": None},
        "optimization": {"max_steps": 4, "learning_rate": 1e-2, "warmup_epochs": 0},
        "validation": {"every_steps": None},
        "saving": {"every_steps": 2, "keep": 3, "code": False},
        "logging": {"every_steps": 1, "trackers": []},
        "resources": {"mixed_precision": "no", "cpu": True, "num_workers": 0},
    }
    config = start.parent / "run.yaml"
    config.write_text(yaml.safe_dump(values))
    assert run(config) == 0
    return config


def test_the_parts_are_where_they_belong(start):
    model, processor = AutoModel.from_pretrained(start), AutoProcessor.from_pretrained(start)
    assert type(model) is evacap.EVACapForCausalLM
    assert (model.config.fusion_type, model.config.audio_pooling, model.config.label_smoothing) == (
        "optimal_transport",
        "frequency",
        0.0,
    )
    parts = start.parent
    language_model = load_file(parts / "llama" / "model.safetensors")
    assert all(torch.equal(model.language_model.state_dict()[name], value) for name, value in language_model.items())
    clip = load_file(parts / "clip" / "model.safetensors")["visual_projection.weight"]
    assert torch.equal(model.encoder.video_tower.clip.visual_projection.weight, clip)
    qkv = load_file(parts / "ced" / "model.safetensors")["encoder.blocks.1.attn.qkv.weight"]
    attention = model.encoder.audio_tower.layers[1].self_attn
    assert torch.equal(torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]), qkv)
    assert processor.video_processor.image_mean[0] == pytest.approx(0.48145466)
    assert (processor.feature_extractor.feature_size, processor.video_processor.num_frames) == (64, 20)
    inputs = {"input_features": torch.zeros(1, 1024, 64), "pixel_values_videos": torch.zeros(1, 20, 3, 32, 32)}
    # 64 time steps and 20 frames (LAVCap).
    assert model.get_encoder()(**inputs).last_hidden_state.shape == (1, 84, 24)


def test_parts_that_do_not_go_together_are_refused(start, capsys):
    parts = start.parent
    command = ["import-weights", "--output", str(parts / "other"), "--ced", str(parts / "ced")]
    assert main(command) == 1
    assert "only with a `language_model`" in capsys.readouterr().err
    assert main([*command, "--language-model", str(parts / "llama")]) == 1
    assert "from `ced` and `clip`" in capsys.readouterr().err
    command = [*command, "--clip", str(parts / "clip"), "--language-model", str(parts / "nothing")]
    assert main(command) == 1
    assert "nothing: there is no such model folder" in capsys.readouterr().err
    assert not (parts / "other").exists()


def test_checkpoints_hold_what_was_trained_and_the_statistics(trained, start):
    folder = trained.with_suffix("") / "checkpoints"
    weights = load_file(folder / "step-00000004" / "model.safetensors")
    kinds = ("lora_A", "lora_B", "multi_modal_projector", "fusion.logit_scale", "input_norm")
    assert {kind for name in weights for kind in kinds if kind in name} == set(kinds)
    assert all(any(kind in name for kind in kinds) for name in weights)
    assert sum("lora_" in name for name in weights) == 2 * 2 * 2 * 2
    assert not any(name.endswith(("input_norm.weight", "input_norm.bias")) for name in weights)
    terms = read_log(trained.with_suffix(""))[-1]
    assert terms["loss"] == pytest.approx(terms["caption_loss"] + terms["transport_loss"], rel=1e-4)


def test_the_run_goes_on_bit_for_bit(trained):
    folder = trained.with_suffix("")
    expected = load_file(folder / "checkpoints" / "step-00000004" / "model.safetensors")
    shutil.rmtree(folder / "checkpoints" / "step-00000004")
    assert run(trained) == 0
    found = load_file(folder / "checkpoints" / "step-00000004" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_model_is_a_plain_folder_with_the_adapters_in_its_weights(trained, start):
    folder = trained.with_suffix("")
    model, base = AutoModel.from_pretrained(folder / "model"), AutoModel.from_pretrained(start)
    assert model.state_dict().keys() == base.state_dict().keys()
    changed = {name for name, value in base.state_dict().items() if not torch.equal(value, model.state_dict()[name])}
    assert all(
        name.endswith(("q_proj.weight", "v_proj.weight"))
        or "projector" in name
        or "fusion" in name
        or "input_norm.running" in name
        or "num_batches" in name
        for name in changed
    )
    assert sum("q_proj" in name for name in changed) == 4

    with_adapters = AutoModel.from_pretrained(start)
    add_adapters(with_adapters, LoraSection())
    state = load_file(folder / "checkpoints" / "step-00000004" / "model.safetensors")
    with_adapters.load_state_dict(state, strict=False)
    processor = AutoProcessor.from_pretrained(folder / "model")
    clip = ProceduralClips(processor, 1, "test")[0]
    batch = evacap.EVACapDataCollator(p_mix=0)([clip])
    logits = [each.eval()(**batch).logits for each in (with_adapters, model, base)]
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=1e-4)
    assert (logits[1] - logits[2]).abs().max() > 1e-2
    assert main(["check-install", str(folder / "model")]) == 0


def test_layers_that_hold_their_weights_transposed_are_merged_too():
    torch.manual_seed(0)
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=9, n_positions=8)).eval()
    plain = GPT2LMHeadModel(model.config).eval()
    add_adapters(model, LoraSection(target_modules=r".*c_attn"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.eval()  # the dropout of adapters as well
    plain.load_state_dict(merged(model, model.state_dict()))
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(plain(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_a_pattern_without_a_module_is_named(start):
    config = load_run_config(
        "lavcap",
        [
            f"model.start={start}",
            "data.procedural=1",
            "validation.every_steps=null",
            "model.lora.target_modules=nothing",
        ],
    )
    with pytest.raises(ValueError, match=r"`model.lora.target_modules` is 'nothing'"):
        add_adapters(AutoModel.from_pretrained(start), config.model.lora)

"""LAVCap from its parts to a model: import, `evacap train lavcap` with adapters, checkpoints, merging."""

import json
import re
import shutil
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_clips import write_small_clips
from training_runs import read_log, run
from transformers import AutoModel, AutoProcessor

import evacap
from evacap.cli import main
from evacap.training.adapters import add_adapters, merged
from evacap.training.data.prepared_clips import PreparedClips
from evacap.training.evaluation.captioner import list_clips
from evacap.training.evaluation.evaluate import evaluate
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


def test_vectors_of_frames_that_were_made_before(start, tmp_path, monkeypatch):
    """As LAVCap stores them: a `.npy` file for each clip. The last one has no picture."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    model, processor = AutoModel.from_pretrained(start).eval(), AutoProcessor.from_pretrained(start)
    manifest = write_small_clips(tmp_path / "clips", 4)
    command = ["prepare", "--manifest", str(manifest), "--model", str(start), "--workers", "1", "--split", "train"]
    assert main([*command, "--output", str(tmp_path / "pictures")]) == 0
    pictures = PreparedClips(tmp_path / "pictures", "train", processor)
    pixels = [clip["pixel_values_videos"] for clip in pictures]
    vectors = [model.encoder.video_tower(video[None]).last_hidden_state[0].detach() for video in pixels]
    (tmp_path / "clip").mkdir()
    for number in range(3):
        np.save(tmp_path / "clip" / f"clip-{number:02d}.npy", vectors[number].half().numpy())
    command += ["--video-features", str(tmp_path / "clip"), "--output", str(tmp_path / "vectors")]
    assert main(command) == 0
    clips = PreparedClips(tmp_path / "vectors", "train", processor)
    assert [clip.has_picture for clip in list_clips(clips)] == [True] * 3 + [False]

    batch = evacap.EVACapDataCollator(p_mix=0)([clips[index] for index in range(4)])
    width = model.config.video_width
    assert batch["video_features"].shape == (4, 3, width) and batch["video_features"].dtype == torch.float32
    assert batch["pixel_values_videos_mask"].all(1).tolist() == [True] * 3 + [False]
    seen = [{**pictures[index]} for index in range(4)]
    seen[3].pop("pixel_values_videos")
    same = evacap.EVACapDataCollator(p_mix=0)(seen)
    expected = model(**same)
    torch.testing.assert_close(model(**batch).logits, expected.logits, atol=1e-2, rtol=0)
    swapped = evacap.EVACapDataCollator(p_mix=1, fixed_points=False)([clips[index] for index in range(4)])
    index = swapped["video_index"]
    assert swapped["shuffled"].all() and torch.equal(swapped["video_features"], batch["video_features"][index])
    with pytest.raises(ValueError, match="keep_matched"):
        evacap.EVACapDataCollator(keep_matched=True)([clips[0]])

    values = {
        "base": "lavcap",
        "output": str(tmp_path / "run"),
        "model": {"start": str(start)},
        "data": {"prepared": str(tmp_path / "vectors"), "augmentation": None},
        "optimization": {"max_steps": 2, "batch_size": 2, "warmup_epochs": 0},
        "validation": {"every_steps": 2, "split": "train", "metrics": ["rouge_l"], "best": "rouge_l", "batch_size": 2},
        "saving": {"every_steps": 2, "code": False},
        "logging": {"trackers": []},
        "resources": {"mixed_precision": "no", "cpu": True, "num_workers": 0},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    assert run(tmp_path / "run.yaml") == 0
    result = evaluate(
        {"run": tmp_path / "run" / "model"},
        lambda processor: PreparedClips(tmp_path / "vectors", "train", processor),
        tmp_path / "evaluation",
        "four clips",
        shares=(1,),
        frames=(),
        num_beams=1,
        metrics=("rouge_l",),
        resamples=10,
    )
    videos = [clip["video"] for clip in result["checkpoints"]["run"]["conditions"][1]["clips"]]
    assert sorted(videos[:3]) == ["clip-00", "clip-01", "clip-02"] and videos[3] is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros((3, 4, 5), np.float32), r"float32 of shape \(3, 4, 5\)"),
        (np.full((3, 4), np.nan, np.float32), "finite floats"),
        (np.zeros((3, 5), np.float32), r"shape \(frames, 4\)"),
        (b"no array", "not a .npy file"),
    ],
)
def test_a_file_of_other_vectors_costs_its_clip_alone(start, tmp_path, content, message):
    manifest = write_small_clips(tmp_path / "clips", 2)
    (tmp_path / "clip").mkdir()
    np.save(tmp_path / "clip" / "clip-00.npy", np.zeros((20, 4), np.float32))
    bad = tmp_path / "clip" / "clip-01.npy"
    bad.write_bytes(content) if isinstance(content, bytes) else np.save(bad, content)
    command = ["prepare", "--manifest", str(manifest), "--model", str(start), "--workers", "1", "--split", "train"]
    assert main([*command, "--video-features", str(tmp_path / "clip"), "--output", str(tmp_path / "out")]) == 0
    (problem,) = [json.loads(line) for line in (tmp_path / "out" / "report.jsonl").read_text().splitlines()]
    assert problem["id"] == "clip-01" and re.search(message, problem["reason"]), problem

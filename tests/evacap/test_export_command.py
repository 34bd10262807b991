"""Exported graphs caption as the model does, whatever the batch, the frames and the variant."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

import evacap
from evacap.cli import main
from evacap.commands import export as command
from evacap.commands.export import OUTPUTS, export


sys.path[:0] = [str(Path(__file__).parents[1] / "processing"), str(Path(__file__).parents[2] / "examples")]

from test_pipeline_evacap import ADAPTIVE, make_model, make_processor  # noqa: E402


def make_clips(config, batch: int, frames: int) -> dict[str, torch.Tensor]:
    """Noise; the first clip has no picture, the last one half of its frames."""
    generator = torch.Generator().manual_seed(1)
    audio, video = config.audio_config, config.video_config
    clips = {"input_features": torch.randn(batch, audio.max_frames, audio.num_mel_bins, generator=generator)}
    shape = (batch, frames, 3, video.image_size, video.image_size)
    mask = torch.ones(batch, frames, dtype=torch.bool)
    mask[0], mask[-1, frames // 2 :] = config.fusion_type == "video_only", False
    clips |= {
        "pixel_values_videos": torch.randn(shape, generator=generator),
        "pixel_values_videos_mask": mask,
    }
    unread = {"audio_only": "pixel_values", "video_only": "input_features"}.get(config.fusion_type, "-")
    return {name: values for name, values in clips.items() if not name.startswith(unread)}


def greedy(folder: Path, clips: dict[str, torch.Tensor], start: int, words: int) -> torch.Tensor:
    prefill, step = (torch.export.load(folder / f"{name}.pt2").module() for name in ("prefill", "step"))
    text = torch.full((len(next(iter(clips.values()))), 1), start)
    logits, *states = prefill(decoder_input_ids=text, **clips)
    for _ in range(words):
        text = torch.cat([text, logits.argmax(-1, keepdim=True)], dim=1)
        logits, *states[:2] = step(decoder_input_ids=text[:, -1:], **dict(zip(OUTPUTS["prefill"][1:], states)))
    return text


def assert_captions(folder: Path, model) -> None:
    frames = 3 * model.config.video_config.tubelet_size
    for batch in (1, 4):
        clips = make_clips(model.config, batch, frames)
        expected = model.generate(**clips, num_beams=1, do_sample=False, min_new_tokens=6, max_new_tokens=6)
        suppressed = model.generation_config.eos_token_id
        found = greedy(folder, clips, model.config.decoder_start_token_id, 6)
        # `min_new_tokens` takes the other words' end; up to there both are the same.
        for row, other in zip(found.tolist(), expected.tolist()):
            end = row.index(suppressed) if suppressed in row else len(row)
            assert row[:end] == other[:end]


@pytest.mark.slow
def test_the_bundled_checkpoint_as_a_program_of_torch_export(tmp_path, capsys):
    assert main(["export", evacap.TINY, "--to", "torch", "--output", str(tmp_path / "out")]) == 0
    assert "greatest difference of the logits: prefill" in capsys.readouterr().out
    assert_captions(tmp_path / "out", AutoModel.from_pretrained(evacap.TINY, dtype=torch.float32).eval())
    assert json.loads((tmp_path / "out" / "export.json").read_text())["format"] == "torch"


SLOW = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("concat", "late_concat", "adaptive", "audio_only", "video_only")
]


@pytest.mark.parametrize("fusion_type", ["gated_cross_attention", *SLOW])
def test_every_variant(tmp_path, fusion_type):
    fields = ADAPTIVE if fusion_type == "adaptive" else {"fusion_type": fusion_type}
    enrichment = None if fusion_type.endswith("_only") else "caste"
    model = make_model(**fields, enrichment=enrichment).eval()
    model.save_pretrained(tmp_path / "model")
    make_processor().save_pretrained(tmp_path / "model")
    assert max(export(tmp_path / "model", "torch", tmp_path / "out").values()) < 1e-5
    assert_captions(tmp_path / "out", model)


@pytest.mark.slow
def test_onnx_runtime_captions_as_the_model(tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    from onnx_caption import caption

    from evacap.training.procedural.dataset import ProceduralClips

    assert max(export(evacap.TINY, "onnx", tmp_path / "out").values()) < 1e-4
    processor = command.load_processor(evacap.TINY)
    clips = ProceduralClips(processor, 50, split="test")
    features = {
        name: torch.stack([torch.as_tensor(clips[index][name]) for index in range(len(clips))])
        for name in ("input_features", "pixel_values_videos")
    }
    model = AutoModel.from_pretrained(evacap.TINY, dtype=torch.float32).eval()
    tokens = model.generate(**features, num_beams=1, do_sample=False)
    found = caption(str(tmp_path / "out"), {name: values.numpy() for name, values in features.items()})
    assert found == processor.batch_decode(tokens, skip_special_tokens=True)


@torch.no_grad()
def test_the_exporter_of_transformers():
    exporters = pytest.importorskip("transformers.exporters", reason="Transformers has no exporters before 5.20")
    from transformers.exporters.utils import decompose_for_generation

    model = make_model().eval()
    clips = make_clips(model.config, 2, 3 * model.config.video_config.tubelet_size)
    exported = exporters.DynamoExporter().export_for_generation(model, clips, exporters.DynamoConfig())
    for name, (part, inputs) in decompose_for_generation(model, clips).items():
        streams = {key: value for key, value in inputs.items() if not isinstance(value, bool)}
        found = exported.components[name].program.module()(**streams)
        torch.testing.assert_close(found["logits"], part(**inputs).logits, atol=1e-5, rtol=1e-5)


def test_a_folder_that_exists_stays(tmp_path, capsys):
    assert main(["export", evacap.TINY, "--to", "torch", "--output", str(tmp_path)]) == 1
    assert "exists already" in capsys.readouterr().err


def test_without_onnx_it_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None if "onnx" in name else importlib.util.find_spec(name))
    assert main(["export", evacap.TINY, "--to", "onnx", "--output", str(tmp_path / "out")]) == 1
    assert "pip install 'evacap[onnx]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_graph_that_differs_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "_run", lambda form, path, inputs: torch.zeros(()))
    with pytest.raises(RuntimeError, match="prefill.pt2 differ by .* nothing was written"):
        export(evacap.TINY, "torch", tmp_path / "out")
    assert not (tmp_path / "out").exists()

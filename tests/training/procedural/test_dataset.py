"""Procedural clips that are rendered once and kept are those that are rendered each time."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from evacap.processing.processing_evacap import EVACapProcessor
from evacap.training.procedural import sounds
from evacap.training.procedural.dataset import KeptProceduralClips, ProceduralClips
from evacap.training.tiny import tiny_processor


@pytest.mark.parametrize("fusion_type", ["gated_cross_attention", "audio_only", "video_only"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_kept_clips_are_the_rendered_ones(tmp_path, fusion_type, num_workers):
    processor = tiny_processor(fusion_type)
    rendered = ProceduralClips(processor, 70, "validation", 3)
    kept = KeptProceduralClips(processor, 70, "validation", 3, tmp_path, num_workers)
    assert len(kept) == 70 and len(list(tmp_path.iterdir())) == len(kept.paths)
    for index in (0, 1, 63, 64, 69):
        one, other = rendered[index], kept[index]
        assert one.keys() == other.keys()
        for name, value in one.items():
            # The last digits of a sum differ from process to process.
            np.testing.assert_allclose(value, other[name], rtol=0, atol=1e-5)
            assert type(value) is type(other[name])


def test_clips_are_rendered_once_for_all_that_hear_the_same(tmp_path):
    folder = tmp_path / "clips"
    kept = KeptProceduralClips(tiny_processor(), 4, folder=folder)
    for path in kept.paths.values():
        os.utime(path, (0, 0))
    again = KeptProceduralClips(tiny_processor(), 4, folder=folder)
    tiny_processor().save_pretrained(tmp_path / "processor")
    loaded = KeptProceduralClips(EVACapProcessor.from_pretrained(tmp_path / "processor"), 4, folder=folder)
    listener = KeptProceduralClips(tiny_processor("audio_only"), 4, folder=folder)
    assert again.paths == loaded.paths == kept.paths and listener.paths == {"audio": kept.paths["audio"]}
    assert {path.stat().st_mtime for path in folder.iterdir()} == {0.0}


def test_other_clips_are_kept_beside_them(tmp_path):
    first = KeptProceduralClips(tiny_processor(), 4, folder=tmp_path)
    processor = tiny_processor()
    processor.feature_extractor.frame_shift_ms = 25
    KeptProceduralClips(processor, 4, folder=tmp_path)
    KeptProceduralClips(tiny_processor(), 4, seed=1, folder=tmp_path)
    KeptProceduralClips(tiny_processor(), 4, "test", folder=tmp_path)
    KeptProceduralClips(tiny_processor(), 5, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2 + 1 + 2 + 2 + 2
    rendered = ProceduralClips(tiny_processor(), 4)
    np.testing.assert_allclose(first[3]["input_features"], rendered[3]["input_features"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_rendering_does_not_move_the_generator_that_draws_the_weights(tmp_path, num_workers):
    before = torch.get_rng_state()
    KeptProceduralClips(tiny_processor(), 4, folder=tmp_path, num_workers=num_workers)
    assert torch.equal(torch.get_rng_state(), before)


def test_kept_clips_of_another_renderer_are_replaced(tmp_path):
    path = KeptProceduralClips(tiny_processor("audio_only"), 4, folder=tmp_path).paths["audio"]
    np.save(path, np.load(path) + 1)
    kept = KeptProceduralClips(tiny_processor("audio_only"), 4, folder=tmp_path)
    rendered = ProceduralClips(tiny_processor("audio_only"), 4)
    np.testing.assert_allclose(kept.features(2), rendered.features(2), rtol=0, atol=1e-5)


def test_clips_of_another_code_have_other_files(tmp_path, monkeypatch):
    path = KeptProceduralClips(tiny_processor("audio_only"), 4, folder=tmp_path).paths["audio"]
    code = tmp_path / "code.py"
    code.write_bytes(Path(sounds.__file__).read_bytes() + b"# another")
    monkeypatch.setattr(sounds, "__file__", str(code))
    assert KeptProceduralClips(tiny_processor("audio_only"), 4, folder=tmp_path).paths["audio"] != path


def test_a_rendering_that_fails_leaves_nothing(tmp_path, monkeypatch):
    features = ProceduralClips.features

    def fail(self, index):
        if index == 3:
            raise OSError("the disk is full")
        return features(self, index)

    monkeypatch.setattr(ProceduralClips, "features", fail)
    with pytest.raises(OSError, match="full"):
        KeptProceduralClips(tiny_processor(), 4, folder=tmp_path)
    assert not list(tmp_path.iterdir())

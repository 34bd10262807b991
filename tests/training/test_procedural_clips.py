"""Procedural clips that are rendered once and kept are those that are rendered each time."""

import os

import numpy as np
import pytest

from evacap.processing.processing_evacap import EVACapProcessor
from evacap.training.procedural_clips import KeptProceduralClips, ProceduralClips
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
            np.testing.assert_array_equal(value, other[name])
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
    np.testing.assert_array_equal(
        first[3]["input_features"], ProceduralClips(tiny_processor(), 4)[3]["input_features"]
    )


def test_kept_clips_of_another_renderer_are_replaced(tmp_path):
    path = KeptProceduralClips(tiny_processor("audio_only"), 4, folder=tmp_path).paths["audio"]
    np.save(path, np.load(path) + 1)
    kept = KeptProceduralClips(tiny_processor("audio_only"), 4, folder=tmp_path)
    np.testing.assert_array_equal(kept.features(2), ProceduralClips(tiny_processor("audio_only"), 4).features(2))


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

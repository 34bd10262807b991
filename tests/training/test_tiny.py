from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from training_runs import run
from transformers import AutoModel

import evacap
from evacap.model_card import fill_model_card
from evacap.training.evaluation.evaluate import evaluate
from evacap.training.procedural.dataset import ProceduralClips
from evacap.training.procedural.kinds import KINDS, SOUND_ALIKES, UNSEEN
from evacap.training.procedural.scenes import make_scene, write_clip
from evacap.training.procedural.scores import score
from evacap.training.tiny import tiny_config, tiny_processor


@pytest.mark.parametrize("fusion_type", ["gated_cross_attention", "concat", "audio_only", "video_only"])
def test_the_tiny_size_fits_its_processor(fusion_type):
    processor = tiny_processor(fusion_type)
    model = evacap.EVACapForConditionalGeneration(tiny_config(processor.tokenizer, fusion_type)).eval()
    assert model.num_parameters() < 3_500_000
    clip = ProceduralClips(processor, 1)[0]
    assert ("input_features" in clip) == (fusion_type != "video_only")
    assert ("pixel_values_videos" in clip) == (fusion_type != "audio_only")
    batch = evacap.EVACapDataCollator(p_mix=0.0)([clip])
    with torch.no_grad():
        assert torch.isfinite(model(**batch).loss)


def test_a_training_clip_is_what_its_file_would_be(tmp_path):
    processor = tiny_processor()
    clips = ProceduralClips(processor, 3, "test")
    for index in range(3):
        scene = make_scene(0, "test", index)
        write_clip(scene, tmp_path / "clip.mp4")
        decoded = processor(media=tmp_path / "clip.mp4", text=scene.captions[0], return_tensors="np")
        assert clips[index]["labels"] == decoded["labels"][0].tolist()
        for name in ("input_features", "pixel_values_videos"):
            rendered = np.asarray(clips[index][name])
            assert rendered.shape == decoded[name][0].shape
            assert np.abs(rendered - decoded[name][0]).mean() < 0.1 * rendered.std()


def test_scores_count_names():
    scenes = [make_scene(0, "test", index) for index in range(200)]
    right, wrong = ("set", "sound-alikes", "off screen", "distinct"), ("twin", "bare", "invented")
    figures = score(scenes, [scene.captions[0] for scene in scenes])
    assert figures == {**dict.fromkeys(right, 1.0), **dict.fromkeys(wrong, 0.0)}
    assert set(score(scenes, ["Silence"] * 200).values()) == {0.0}

    figures = score(scenes, [f"{scene.captions[0]}, then a bell rings" for scene in scenes])
    assert figures["set"] == np.mean(["bell" in scene.names for scene in scenes])
    assert figures["invented"] == pytest.approx(1 - figures["set"])
    assert figures["sound-alikes"] == figures["off screen"] == figures["distinct"] == 1.0


def test_sound_alikes_are_scored_by_the_picture():
    scenes = [make_scene(0, "test", index) for index in range(300)]
    nouns = {name: kind.noun for name, kind in (KINDS | UNSEEN).items()}

    def figures_when(instead):
        called = nouns | {name: nouns[other] for name, other in instead.items()}
        return score(scenes, [" ".join(called[name] for name in scene.names) for scene in scenes])

    twins = {"car": "boat", "rain": "pan", "hammer": "door", "sheep": "goat"}
    figures = figures_when(twins | {second: first for first, second in twins.items()})
    assert figures["sound-alikes"] == figures["bare"] == figures["invented"] == 0.0
    assert figures["twin"] == figures["off screen"] == figures["distinct"] == 1.0

    figures = figures_when({kind: KINDS[kind].sound for kind in SOUND_ALIKES})
    assert figures["sound-alikes"] == figures["twin"] == figures["invented"] == 0.0
    assert figures["bare"] == figures["off screen"] == figures["distinct"] == 1.0

    figures = figures_when({"engine": "boat", "man": "woman"})
    assert figures["off screen"] < 1.0 and figures["distinct"] < 1.0
    assert figures["twin"] == figures["bare"] == 0.0 < figures["invented"] < 1.0


def test_the_training_reaches_the_model_card(tmp_path):
    short = [
        "data.procedural=2",
        "optimization.batch_size=2",
        "validation.every_steps=null",
        "resources.num_threads=null",
    ]
    assert run("tiny", f"output={tmp_path / 'run'}", *short) == 0
    model = tmp_path / "run" / "model"
    card = str(fill_model_card(model, "somebody/tiny"))
    assert "2 procedural clips" in card and "15% of the videos" in card
    assert f"{AutoModel.from_pretrained(model).num_parameters() / 1e6:.1f} M" in card


@pytest.mark.slow
def test_the_bundled_checkpoint_hears_sees_and_looks_away(tmp_path):
    evaluation = evaluate(
        {"tiny": evacap.TINY, "twin": Path(evacap.TINY).with_name("tiny_audio_only")},
        partial(ProceduralClips, num_clips=300, split="test", seed=1),
        tmp_path,
        "300 procedural test clips",
        shares=(1,),
        num_beams=1,
        metrics=(),
        resamples=10,
    )
    matched, swapped = evaluation["checkpoints"]["tiny"]["conditions"]
    twin = evaluation["checkpoints"]["twin"]["conditions"][0]
    own, others, alone = (
        {name: figure["value"] for name, figure in condition["metrics"].items()}
        for condition in (matched, swapped, twin)
    )
    assert own["set"] >= 0.8
    assert own["sound-alikes"] >= 0.8 and alone["sound-alikes"] <= 0.6
    assert others["distinct"] >= alone["distinct"] - 0.03
    # A weak detector: the mean gate of a clip, over all clips.
    assert swapped["gate"]["auc"]["value"] > 0.5

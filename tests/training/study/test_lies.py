"""The oracle beside the harder lies."""

import numpy as np
from transformers import AutoProcessor

import evacap
from evacap.training.metrics.bootstrap import roc_auc
from evacap.training.procedural.dataset import ProceduralClips
from evacap.training.procedural.scenes import make_scene
from evacap.training.study.lies import HalfDubbedClips, _partners, heard, moving, oracle, resting


SCENES = [make_scene(0, "test", index) for index in range(200)]


def test_nothing_contradicts_the_own_picture():
    for scene in SCENES:
        assert oracle(heard(scene), moving(scene), resting(scene)) == (0 if moving(scene) else -0.5)


def test_it_sees_through_the_lies():
    own = np.array([oracle(heard(scene), moving(scene), resting(scene)) for scene in SCENES])
    others = SCENES[1:] + SCENES[:1]
    swapped = np.array([oracle(heard(s), moving(o), resting(o)) for s, o in zip(SCENES, others)])
    moved = np.array([oracle(heard(scene, 2.0), moving(scene), resting(scene)) for scene in SCENES])
    assert roc_auc(own, swapped) > 0.9
    assert roc_auc(own, moved) > 0.9


def test_partners_share_some_sources_but_not_all():
    kinds = [{event.kind for event in scene.events} for scene in SCENES]
    partners = _partners(SCENES)
    assert len(partners) > 50
    for one, other in partners.items():
        assert kinds[one] & kinds[other] and kinds[one] - kinds[other] and kinds[other] - kinds[one]


def test_half_dubbed_clips_have_the_sound_of_one_and_then_the_picture_of_another():
    processor = AutoProcessor.from_pretrained(evacap.TINY)
    clips, dubbed = (kind(processor, 2, "test", 0) for kind in (ProceduralClips, HalfDubbedClips))
    own, other = clips[0]["pixel_values_videos"], clips[1]["pixel_values_videos"]
    half = len(own) // 2
    shown = dubbed[0]["pixel_values_videos"]
    assert (shown[:half] == own[:half]).all() and (shown[half:] == other[half:]).all()
    assert (own[half:] != other[half:]).any()
    assert (dubbed[0]["input_features"] == clips[0]["input_features"]).all() and dubbed[0]["labels"] == clips[0][
        "labels"
    ]
    # The last clip shows the first.
    assert (dubbed[1]["pixel_values_videos"][half:] == own[half:]).all()

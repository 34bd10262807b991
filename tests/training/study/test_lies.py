"""The oracle beside the harder lies."""

import numpy as np

from evacap.training.metrics.bootstrap import roc_auc
from evacap.training.procedural.scenes import make_scene
from evacap.training.study.lies import _partners, heard, moving, oracle, resting


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

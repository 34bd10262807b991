"""Each oracle makes its own kind of error and no other."""

import pytest

from evacap.training.procedural.scenes import make_scene
from evacap.training.study.oracles import ORACLES, caption_of, judge_oracles


def test_each_errs_in_its_way():
    judged = judge_oracles(300, metrics=("bleu", "cider_d"))
    assert judged["skipped"] == [] and judged["oracles"].keys() == ORACLES.keys()
    right, bare, guess, twin = judged["oracles"].values()
    assert all(figures["distinct"] == 1 and figures["invented"] == 0 for figures in judged["oracles"].values())
    assert right["set"] == right["sound-alikes"] == right["off screen"] == 1
    assert (bare["sound-alikes"], bare["bare"], bare["twin"], bare["off screen"]) == (0, 1, 0, 1)
    assert (twin["sound-alikes"], twin["bare"], twin["twin"], twin["off screen"]) == (0, 0, 1, 1)
    assert guess["sound-alikes"] == pytest.approx(0.5, abs=0.1)
    assert (guess["sound-alikes"] + guess["twin"], guess["bare"], guess["off screen"]) == (pytest.approx(1), 0, 0)
    assert right["cider_d"] > max(figures["cider_d"] for figures in (bare, guess, twin))


def test_they_speak_as_the_references_do():
    scenes = [make_scene(0, "test", index) for index in range(100)]
    assert all(caption_of("right", scene) == caption_of("right", scene) for scene in scenes[:5])
    found = [caption_of("right", scene) in scene.captions for scene in scenes]
    assert 0 < sum(found) < 100

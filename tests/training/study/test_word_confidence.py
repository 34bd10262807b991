"""The confidence of words with own, with swapped, and without videos."""

import json
import math

import pytest
import torch
from small_models import save_untrained_model
from transformers import AutoModel

from evacap.modeling_evacap.adaptive_evacap import EVACapAdaptiveAttention
from evacap.training.procedural.scenes import make_scene
from evacap.training.study.word_confidence import describe_words, judge_confidence, main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An untrained captioner whose confidence in the picture follows from what it sees there."""
    path = tmp_path_factory.mktemp("vact")
    torch.manual_seed(0)
    save_untrained_model("vact", path)
    model = AutoModel.from_pretrained(path)
    for module in model.modules():
        if isinstance(module, EVACapAdaptiveAttention):
            module.confidence_weight.data.normal_(std=0.5)
    model.save_pretrained(path)
    return path


def test_own_swapped_and_no_videos(folder):
    figures = judge_confidence(folder, num_clips=4, batch_size=3, num_beams=1)
    words = sum(len(make_scene(0, "test", index).captions[0].replace(",", " ,").split()) for index in range(4))
    for kind in ("captions", "references"):
        none = figures[kind]["none"]["all"]
        assert none["video"] == {"value": 0, "interval": [0, 0]} and none["audio"]["value"] > 0
        for place in ("own", "swapped"):
            assert 0 < figures[kind][place]["all"]["video"]["value"] < 1
    # The references are the same whatever is seen, and the picture changes how far they trust it.
    counts = [figures["references"][place]["all"]["words"] for place in ("own", "swapped", "none")]
    assert counts == [words] * 3
    assert abs(figures["references"]["fall"]["all"]["value"]) > 1e-5


def test_the_figures_of_known_words():
    def clip(*pairs):
        return [{"word": word, "audio": 1.0, "video": video} for word, video in pairs]

    own = [clip(("a", 0.2), ("boat", 0.8)), clip(("an", 0.4), ("engine", 0.6)), clip(("a", 0.1), ("dog", 0.3))]
    swapped = [clip(("a", 0.2), ("car", 0.6)), clip(("an", 0.4), ("engine", 0.6)), []]
    figures = describe_words({"own": own, "swapped": swapped})
    means = {group: figures["own"][group]["video"]["value"] for group in figures["own"]}
    assert means == pytest.approx({"all": 0.4, "picture": 0.8, "sound": 0.45, "other": 0.7 / 3})
    assert [figures["own"][group]["words"] for group in ("all", "picture", "sound", "other")] == [6, 1, 2, 3]
    falls = {group: figures["fall"][group]["value"] for group in figures["fall"]}
    assert falls == pytest.approx({"all": -0.05, "picture": 0.2, "sound": -0.15, "other": 0.7 / 3 - 0.3})
    low, high = figures["fall"]["all"]["interval"]
    assert low <= -0.05 <= high and math.isfinite(low + high)
    # Own 0.5 and 0.5, swapped 0.4 and 0.5; the clip without words is left out.
    assert figures["auc"]["value"] == pytest.approx((1 + 0.5 + 1 + 0.5) / 4)


def test_the_command_prints_json(folder, capsys):
    main([str(folder), "--num-clips", "2"])
    assert set(json.loads(capsys.readouterr().out)) == {"captions", "references"}


def test_other_models_are_refused(tmp_path):
    save_untrained_model("avcap", tmp_path)
    with pytest.raises(ValueError, match="text_fusion='adaptive'"):
        judge_confidence(tmp_path, num_clips=2)

"""Captions under conditions, whole and after interruptions; scores that equal those of the whole sets."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

import evacap
from evacap.modeling_evacap.modeling_evacap import EVACapForConditionalGeneration
from evacap.processing.processing_evacap import EVACapProcessor
from evacap.training.evaluation.captioner import (
    Captioner,
    Condition,
    Pair,
    TestedClip,
    choose_videos,
    list_clips,
    make_batches,
)
from evacap.training.evaluation.evaluate import evaluate, score_set, score_singly
from evacap.training.files import locked
from evacap.training.metrics.bootstrap import draw, interval
from evacap.training.metrics.compute import compute_metrics
from evacap.training.procedural.dataset import ProceduralClips
from evacap.training.procedural.scenes import make_scene
from evacap.training.procedural.scores import score


NUM_CLIPS = 8
AUDIO_ONLY = Path(evacap.TINY).with_name("tiny_audio_only")
CHECKPOINTS = {"looks": evacap.TINY, "listens": AUDIO_ONLY}


@pytest.fixture(autouse=True)
def accelerate_state():
    """Accelerate keeps its settings as long as a process lives."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def procedural(processor: EVACapProcessor) -> ProceduralClips:
    return ProceduralClips(processor, NUM_CLIPS, "test", seed=5)


def run(output: Path, **changes) -> dict:
    options = {"shares": (0.25, 1), "frames": (0, 8), "batch_size": 3, "metrics": ("bleu",), "resamples": 100}
    return evaluate(
        **{"checkpoints": CHECKPOINTS, "make_clips": procedural, "output": output, "dataset": "clips"}
        | options
        | changes
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder)


def conditions_of(evaluation: dict, name: str) -> dict[tuple[float, int | None], dict]:
    found = evaluation["checkpoints"][name]["conditions"]
    return {(condition["shuffle"], condition["frames"]): condition for condition in found}


def clips_with_pictures(pictures: list[bool]) -> list[TestedClip]:
    return [TestedClip(f"clip-{number}", ["a"], {}, has) for number, has in enumerate(pictures)]


@pytest.mark.parametrize("seed", range(5))
def test_chosen_videos_are_deranged_and_nested(seed):
    clips = clips_with_pictures([number % 5 != 2 for number in range(60)])
    moved = {}
    for share, count in ((0, 0), (0.01, 2), (0.05, 3), (0.5, 30), (1, 48)):
        videos = choose_videos(clips, share, seed)
        assert videos == choose_videos(clips, share, seed)
        assert all((video is None) == (not clip.has_picture) for clip, video in zip(clips, videos))
        moved[share] = {clip for clip, video in enumerate(videos) if video not in (None, clip)}
        assert len(moved[share]) == count
        assert {videos[clip] for clip in moved[share]} == moved[share]
    assert moved[0.01] < moved[0.05] < moved[0.5] < moved[1]
    assert videos != choose_videos(clips, 1, seed + 1)


def test_what_cannot_be_shuffled():
    clips = clips_with_pictures([True, False])
    assert choose_videos(clips, 0) == [0, None]
    with pytest.raises(ValueError, match="1 of the 2 clips have a picture"):
        choose_videos(clips, 1)
    with pytest.raises(ValueError, match="a share of 1.5"):
        choose_videos(clips, 1.5)


def test_batches_hold_each_pair_once_and_one_number_of_frames():
    first = [Pair(n, n, None) for n in range(5)]
    second = [Pair(0, 1, None), *first[1:], Pair(7, None, 0), Pair(8, 8, 2)]
    batches = make_batches([first, second], 3)
    assert batches == [first[:3], first[3:], [Pair(0, 1, None)], [Pair(7, None, 0)], [Pair(8, 8, 2)]]


def test_captions_are_those_of_the_model_alone(whole):
    model = EVACapForConditionalGeneration.from_pretrained(evacap.TINY).eval()
    processor = EVACapProcessor.from_pretrained(evacap.TINY)
    clips = procedural(processor)

    def caption(sound: int, video: int | None) -> tuple[str, float]:
        inputs = {"input_features": torch.as_tensor(clips[sound]["input_features"])[None]}
        if video is not None:
            inputs["pixel_values_videos"] = torch.as_tensor(clips[video]["pixel_values_videos"])[None]
        with torch.no_grad():
            gate = model.get_encoder()(**inputs).fusion_gate.mean().item()
            tokens = model.generate(**inputs, num_beams=4)
        return processor.batch_decode(tokens, skip_special_tokens=True)[0], gate

    ids = [make_scene(5, "test", index).id for index in range(NUM_CLIPS)]
    conditions = conditions_of(whole[1], "looks")
    assert list(conditions) == [(0.0, None), (0.25, None), (1.0, None), (0.0, 0), (0.0, 8)]
    assert [condition["swapped"] for condition in conditions.values()] == [0, 2, 8, 0, 0]
    for condition in conditions.values():
        for index, clip in enumerate(condition["clips"]):
            text, gate = caption(index, None if clip["video"] is None else ids.index(clip["video"]))
            assert clip["id"] == ids[index]
            assert clip["caption"] == text
            assert clip["gate"] == pytest.approx(gate, abs=1e-5)
    assert all(clip["gate"] == 0 and clip["video"] is None for clip in conditions[0.0, 0]["clips"])
    texts = [[clip["caption"] for clip in conditions[share, None]["clips"]] for share in (0.0, 1.0)]
    assert texts[0] != texts[1]


def test_what_cannot_differ_is_captioned_once(whole):
    lines = {
        name: [json.loads(line) for line in (whole[0] / name / "captions-0.jsonl").read_text().splitlines()]
        for name in CHECKPOINTS
    }
    # Own videos (also those of 8 frames, which the checkpoint takes), 2 and 8 swapped ones less what is the same by
    # chance, and none.
    pairs = {(line["clip"], line["video"], line["frames"]) for line in lines["looks"]}
    assert len(pairs) == len(lines["looks"]) <= 8 + 2 + 8 + 8
    assert len(lines["listens"]) == NUM_CLIPS
    captions = [[clip["caption"] for clip in c["clips"]] for c in whole[1]["checkpoints"]["listens"]["conditions"]]
    assert len(captions) == 5 and all(texts == captions[0] for texts in captions)


def test_fewer_frames_reach_the_model(tmp_path):
    found = conditions_of(run(tmp_path, checkpoints={"looks": evacap.TINY}, shares=(0,), frames=(2,)), "looks")
    processor = EVACapProcessor.from_pretrained(evacap.TINY)
    processor.video_processor.num_frames = 2
    clips = procedural(processor)
    model = EVACapForConditionalGeneration.from_pretrained(evacap.TINY).eval()
    for index, clip in enumerate(found[0.0, 2]["clips"]):
        inputs = {
            name: torch.as_tensor(clips[index][name])[None] for name in ("input_features", "pixel_values_videos")
        }
        assert inputs["pixel_values_videos"].shape[1] == 2
        with torch.no_grad():
            assert clip["gate"] == pytest.approx(model.get_encoder()(**inputs).fusion_gate.mean().item(), abs=1e-5)


def test_an_interrupted_run_goes_on_to_the_same(whole, tmp_path):
    folder, expected = whole
    shutil.copytree(folder, tmp_path / "run")
    captions = tmp_path / "run" / "looks" / "captions-0.jsonl"
    lines = captions.read_bytes().splitlines(keepends=True)
    # Killed in the middle of a line, in the middle of a batch.
    captions.write_bytes(b"".join(lines[:7]) + lines[7][:40])
    (tmp_path / "run" / "listens" / "captions-0.jsonl").unlink()
    (tmp_path / "run" / "scores.json").unlink(missing_ok=True)
    # From elsewhere: what a checkpoint computes does not depend on its place.
    elsewhere = shutil.copytree(evacap.TINY, tmp_path / "elsewhere")
    found = run(tmp_path / "run", checkpoints={**CHECKPOINTS, "looks": elsewhere})
    found["checkpoints"]["looks"]["checkpoint"] = expected["checkpoints"]["looks"]["checkpoint"]
    assert found == expected
    after = captions.read_bytes().splitlines(keepends=True)
    assert after[:7] == lines[:7]
    # Whole batches are done again, not all of them.
    assert len(lines) <= len(after) <= len(lines) + 2


def test_captions_that_are_there_are_taken(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    captions = tmp_path / "run" / "looks" / "captions-0.jsonl"
    first = json.loads(captions.read_text().splitlines()[0])
    captions.write_text(captions.read_text().replace(json.dumps(first["text"]), '"a changed caption"'))
    found = conditions_of(run(tmp_path / "run"), "looks")
    assert found[0.0, None]["clips"][0]["caption"] == "a changed caption"


def test_one_evaluation_at_a_time_writes_to_a_folder(tmp_path):
    with locked(tmp_path), pytest.raises(BlockingIOError, match=f"is being written by process {os.getpid()} on "):
        run(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_other_settings_do_not_mix(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    with pytest.raises(ValueError, match="looks was begun with other settings: `num_beams` is 4 there and 1 here"):
        run(tmp_path / "run", num_beams=1)
    with pytest.raises(ValueError, match="`data` is 'clips' there and 'others' here"):
        run(tmp_path / "run", dataset="others")
    with pytest.raises(ValueError, match="`checkpoint` is"):
        run(tmp_path / "run", checkpoints={"looks": AUDIO_ONLY})
    captions = tmp_path / "run" / "looks" / "captions-0.jsonl"
    captions.write_text('{"clip": "x"}\n' + captions.read_text())
    with pytest.raises(ValueError, match="captions-0.jsonl: line 1 was not written by this command. Remove the file"):
        run(tmp_path / "run")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"checkpoints": {}}, "there is no checkpoint"),
        ({"shares": (-0.1,)}, "a share of -0.1"),
        ({"frames": (-1,)}, "frames are -1"),
        ({"metrics": ("blue",)}, "metrics must be of"),
        ({"checkpoints": {"x": "no/such"}}, "no/such cannot be loaded"),
    ],
)
def test_wrong_arguments(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **changes)


def test_figures_follow_from_the_clips(whole):
    evaluation = whole[1]
    scenes = [make_scene(5, "test", index) for index in range(NUM_CLIPS)]
    references = [scene.captions for scene in scenes]
    for name in CHECKPOINTS:
        conditions = conditions_of(evaluation, name)
        own = conditions[0.0, None]
        for condition in conditions.values():
            captions = [clip["caption"] for clip in condition["clips"]]
            corpus = compute_metrics(captions, references, ("bleu",))["corpus"]
            values = {metric: figure["value"] for metric, figure in condition["metrics"].items()}
            assert values == pytest.approx(corpus | score(scenes, captions), rel=1e-9)
            for metric, figure in condition["metrics"].items():
                low, high = figure["interval"]
                assert low <= high
                before = own["metrics"][metric]["value"]
                # Of nothing, no share is left.
                assert figure.get("retention") == (pytest.approx(figure["value"] / before) if before else None)
    assert evaluation["references"] == {scene.id: scene.captions for scene in scenes}
    gates = {
        share: np.array([clip["gate"] for clip in conditions_of(evaluation, "looks")[share, None]["clips"]])
        for share in (0.0, 1.0)
    }
    gate = conditions_of(evaluation, "looks")[1.0, None]["gate"]
    assert gate["auc"]["value"] == pytest.approx((gates[0.0][:, None] > gates[1.0]).mean())
    assert gate["same_clips_matched"] == pytest.approx(gates[0.0].mean())
    assert gate["swapped"] == pytest.approx(gates[1.0].mean()) and gate["matched"] is None
    assert conditions_of(evaluation, "listens")[1.0, None]["gate"] is None


def test_tests_are_paired(whole):
    evaluation = whole[1]
    (test,) = [t for t in evaluation["tests"] if (t["shuffle"], t["frames"], t["metric"]) == (1.0, None, "set")]
    hits = []
    for name in CHECKPOINTS:
        clips = conditions_of(evaluation, name)[1.0, None]["clips"]
        scenes = [make_scene(5, "test", index) for index in range(NUM_CLIPS)]
        hits.append([score([scene], [clip["caption"]])["set"] for scene, clip in zip(scenes, clips)])
    differences = draw(NUM_CLIPS, 100) @ (np.array(hits[1]) - hits[0]) / NUM_CLIPS
    assert (test["first"], test["second"]) == ("looks", "listens")
    assert test["difference"] == pytest.approx(np.mean(hits[1]) - np.mean(hits[0]))
    assert test["interval"] == pytest.approx(interval(differences))
    assert 0 < test["p"] <= 1


def test_scores_equal_those_of_whole_sets_and_are_kept(tmp_path):
    metrics = ("bleu", "meteor", "rouge_l", "cider_d")
    references = [["A dog barks", "dog barking, twice"], ["rain falls"], ["an engine hums", "engine"]]
    sets = [["a dog barks", "rain falls", ""], ["a dog barks", "rain is falling", "an engine runs"]]
    single, skipped = score_singly(sets, references, metrics, tmp_path / "scores.json")
    assert json.loads((tmp_path / "scores.json").read_text()) == single
    assert len(single) == 5 and not skipped
    expected = compute_metrics(sets[1], references, metrics)
    per_clip, statistics, missing, tokenizer = score_set(sets[1], references, metrics, single)
    assert (missing, tokenizer) == (expected["skipped"], expected["tokenizer"])
    assert list(per_clip) == [f"bleu_{n}" for n in range(1, 5)] + ["meteor", "rouge_l", "cider_d"]
    for name, value in expected["corpus"].items():
        assert per_clip[name] == pytest.approx(expected["per_clip"][name], abs=1e-12)
        assert statistics[name].value == pytest.approx(value, abs=1e-12)


def test_a_model_that_only_looks_needs_pictures(tmp_path):
    captioner = Captioner("looks", evacap.TINY, tmp_path)
    captioner.processor.modalities = "video"
    clips = clips_with_pictures([True, True])
    assert captioner.pairs(Condition(frames=0), clips) is None
    assert captioner.pairs(Condition(1.0), clips) == [Pair(0, 1, None), Pair(1, 0, None)]
    with pytest.raises(ValueError, match="'clip-1' has no picture"):
        captioner.pairs(Condition(), clips_with_pictures([True, False]))


def test_clips_are_listed_up_to_a_number():
    clips = list_clips(procedural(EVACapProcessor.from_pretrained(evacap.TINY)), 3)
    assert [clip.id for clip in clips] == [make_scene(5, "test", index).id for index in range(3)]
    assert all(clip.has_picture and len(clip.references) == 5 for clip in clips)

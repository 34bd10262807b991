import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training_runs import read_log, run, sum_of_objectives, write_config
from transformers import AutoModel, AutoProcessor

from evacap.cli import main as evacap
from evacap.model_card import fill_model_card
from evacap.training.components import make_clips, make_processor_and_config
from evacap.training.data.manifest import read_manifest
from evacap.training.data.prepare import prepare
from evacap.training.procedural.scenes import make_scene, write_clip, write_dataset
from evacap.training.run_config import load_run_config


WITHOUT_DROPOUT = {
    "model": {"config": {"text_config": dict.fromkeys(["hidden_dropout_prob", "attention_probs_dropout_prob"], 0.0)}}
}
VALIDATED = {"validation": {"every_steps": 3, "procedural": 9, "batch_size": 4}}


def losses(folder) -> list[float]:
    return [line["loss"] for line in read_log(folder) if "loss" in line]


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def test_a_run_lowers_the_loss_and_leaves_a_captioner(tmp_path):
    path = write_config(
        tmp_path / "a.yaml",
        {
            "data": {"procedural": 48},
            "optimization": {"epochs": 4, "learning_rate": 1e-2},
            "validation": {"every_steps": 20, "procedural": 9, "metrics": ["rouge_l"], "best": "rouge_l"},
            "logging": {"every_steps": 4, "trackers": ["tensorboard"]},
            "saving": {"code": True},
            "resources": {"mixed_precision": "bf16", "num_workers": 1},
        },
    )
    assert run(path) == 0
    output = tmp_path / "a"
    log = [line for line in read_log(output) if "loss" in line]
    assert [line["step"] for line in log] == list(range(4, 49, 4))
    assert log[-1]["loss"] < log[0]["loss"] - 0.5
    assert {path.name for path in output.iterdir()} == {
        "best",
        "checkpoints",
        "log.jsonl",
        "model",
        "run.json",
        "trackers",
    }
    validations = [line for line in read_log(output) if "validation/loss" in line]
    assert [line["step"] for line in validations] == [20, 40, 48]
    assert 0 <= validations[-1]["validation/rouge_l"] <= 1
    assert list((output / "trackers").rglob("events.out.*"))

    write_clip(make_scene(0, "test", 0), tmp_path / "clip.mp4")
    model = AutoModel.from_pretrained(output / "model")
    processor = AutoProcessor.from_pretrained(output / "model")
    tokens = model.generate(**processor(media=tmp_path / "clip.mp4", return_tensors="pt"))
    assert processor.batch_decode(tokens, skip_special_tokens=True)[0] and tokens.shape[1] <= 40
    assert "48 procedural clips" in str(fill_model_card(output / "model", "somebody/small"))

    # With autocast the weights, and the gate's scalars among them, are float32: steps of 0.001 would be lost at -4.
    saved = weights(output)
    assert {value.dtype for value in saved.values()} == {torch.float32}
    assert 0 < abs(saved["model.encoder.fusion.gate_weight"].item() + 4) < 0.5


def test_a_stopped_run_goes_on_as_if_nothing_had_been(tmp_path):
    changes = [
        VALIDATED,
        {"resources": {"num_workers": 1}, "optimization": {"epochs": 3}, "logging": {"every_steps": 2}},
    ]
    whole, parts = write_config(tmp_path / "whole.yaml", *changes), write_config(tmp_path / "parts.yaml", *changes)
    assert run(whole) == 0

    for number, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        log, done = (
            tmp_path / "parts" / "log.jsonl",
            len(read_log(tmp_path / "parts")) if (tmp_path / "parts").exists() else 0,
        )

        def stop():
            while not log.exists() or len(log.read_text().splitlines()) < done + 3:
                time.sleep(0.001)
            os.kill(os.getpid(), number)

        thread = threading.Thread(target=stop)
        thread.start()
        assert run(parts) == status
        thread.join()
    assert len(losses(tmp_path / "parts")) < len(losses(tmp_path / "whole"))
    assert run(parts) == 0
    assert (tmp_path / "parts" / "log.jsonl").read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()
    for name in (
        "model/model.safetensors",
        *(f"best/{f.name}/model.safetensors" for f in (tmp_path / "whole/best").iterdir()),
    ):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    # A third time, nothing is left to do.
    assert run(parts) == 0
    assert (tmp_path / "parts" / "log.jsonl").read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()


def test_accumulated_batches_are_one_large_batch(tmp_path):
    terms = {"data": {"p_mix": 0.0}}
    for name, size in (("one", (8, 1)), ("parts", (2, 4))):
        batches = {"optimization": dict(zip(("batch_size", "accumulation_steps"), size)), **terms}
        assert run(write_config(tmp_path / f"{name}.yaml", WITHOUT_DROPOUT, batches)) == 0
    one, parts = tmp_path / "one", tmp_path / "parts"
    assert losses(one) == pytest.approx(losses(parts), rel=1e-5)
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(parts)[name], value, atol=1e-4, rtol=0)


def test_the_last_step_of_an_epoch_may_have_fewer_batches(tmp_path):
    # Five batches an epoch in steps of two: 3 steps.
    path = write_config(tmp_path / "a.yaml", {"data": {"procedural": 20}, "optimization": {"accumulation_steps": 2}})
    assert run(path) == 0
    assert len(losses(tmp_path / "a")) == 6


def test_each_term_of_the_loss_has_its_line(tmp_path):
    config = {"gate_stability_weight": 0.5, "semantic_consistency_weight": 0.25}
    path = write_config(
        tmp_path / "a.yaml",
        {"model": {"config": config}, "data": {"p_mix": 0.9}, "optimization": {"accumulation_steps": 2}},
    )
    assert run(path) == 0
    for line in read_log(tmp_path / "a"):
        parts = line["caption_loss"] + 0.5 * line["gate_stability"] + 0.25 * line["semantic_consistency"]
        assert line["loss"] == pytest.approx(parts, rel=1e-5)
        assert line["gate_stability"] > 0 and line["semantic_consistency"] > 0


def test_the_heads_of_the_objectives_learn_beside_the_captions(tmp_path):
    path = write_config(
        tmp_path / "a.yaml",
        {"model": {"preset": "evacap-caste-losses"}, "optimization": {"accumulation_steps": 2}},
    )
    assert run(path) == 0
    for line in read_log(tmp_path / "a"):
        assert line["loss"] == pytest.approx(sum_of_objectives(line), rel=1e-5)
        assert all(line[name] > 0 for name in ("matching_loss", "heard_words", "caption_contrast", "picture_entropy"))


def test_what_is_frozen_stays_and_a_run_starts_from_a_model(tmp_path):
    assert run(write_config(tmp_path / "first.yaml")) == 0
    start = {
        "model": {
            "start": str(tmp_path / "first" / "model"),
            "freeze": ["model.decoder.*", "lm_head.*"],
            "freeze_except": ["model.decoder.prefix_*"],
            "config": {"label_smoothing": 0.0},
        }
    }
    second = write_config(tmp_path / "second.yaml", start)
    assert run(second) == 0
    before, after = weights(tmp_path / "first"), weights(tmp_path / "second")
    for name, value in before.items():
        frozen = name.startswith(("model.decoder", "lm_head")) and "prefix" not in name
        assert torch.equal(after[name], value) == frozen, name
    # It goes on from a checkpoint, too, whose optimizer has a part of the parameters.
    shutil.rmtree(tmp_path / "second" / "model")
    shutil.rmtree(sorted((tmp_path / "second" / "checkpoints").iterdir())[-1])
    assert run(second) == 0
    assert all(torch.equal(value, after[name]) for name, value in weights(tmp_path / "second").items())
    with pytest.raises(
        ValueError, match=r"gated_cross_attention with gate entropy, but `model.preset` 'avcap' is concat"
    ):
        run(second, "model.preset=avcap", f"output={tmp_path / 'third'}")
    with pytest.raises(ValueError, match="`model.config.label_smooth` is not a field.*`model.config.label_smoothing`"):
        run(second, "model.config.label_smooth=0", f"output={tmp_path / 'third'}")


def test_an_infinite_loss_stops_the_run_before_the_model_changes(tmp_path):
    path = write_config(
        tmp_path / "a.yaml",
        {"optimization": {"learning_rate": 1e30, "max_grad_norm": None}, "saving": {"every_steps": 1}},
    )
    with pytest.raises(
        RuntimeError, match=r"(loss|grad_norm) is (nan|inf) in step (\d+).*step-\d+ is the last checkpoint"
    ):
        run(path)
    checkpoints = sorted((tmp_path / "a" / "checkpoints").iterdir())
    assert len(losses(tmp_path / "a")) == int(checkpoints[-1].name.removeprefix("step-"))
    assert not (tmp_path / "a" / "model").exists()
    assert all(torch.isfinite(value).all() for value in load_file(checkpoints[-1] / "model.safetensors").values())


def test_the_best_models_are_kept_and_a_run_without_progress_ends(tmp_path):
    changes = {"validation": {"keep_best": 2}, "optimization": {"epochs": 4}}
    assert run(write_config(tmp_path / "a.yaml", VALIDATED, changes)) == 0
    scores = {line["step"]: line["validation/loss"] for line in read_log(tmp_path / "a") if "validation/loss" in line}
    best = sorted(scores, key=scores.get)[:2]
    assert {f"step-{step:08d}" for step in best} == {path.name for path in (tmp_path / "a" / "best").iterdir()}

    # With a learning rate of nearly nothing no validation is better than the first.
    changes = {"validation": {"patience": 2}, "optimization": {"epochs": 9, "learning_rate": 1e-30}}
    path = write_config(tmp_path / "b.yaml", VALIDATED, changes)
    assert run(path) == 0
    assert [line["step"] for line in read_log(tmp_path / "b") if "validation/loss" in line] == [3, 6, 9]
    assert run(path) == 0
    assert len(losses(tmp_path / "b")) == 9


def test_a_run_keeps_its_settings(tmp_path):
    path = write_config(tmp_path / "a.yaml")
    assert run(path) == 0
    with pytest.raises(
        ValueError,
        match=r"other settings: `optimization.batch_size` is 4 there and 2 here; `seed` is 0 there and 1 here",
    ):
        run(path, "seed=1", "optimization.batch_size=2")
    assert run(path, "saving.keep=1", "logging.every_steps=5") == 0


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("logging.trackers=[nowhere]", ValueError, "nowhere"),
        ("logging.trackers=[clearml]", ImportError, "asks for clearml: install it"),
        ("validation.best=spider", ValueError, "`validation.best` is 'spider', but it must be one of 'loss'"),
        ("optimization.batch_size=100", ValueError, "There are 24 clips.*lower `optimization.batch_size`"),
        ("model.tokenizer=null", ValueError, "Give `model.start`.*or `model.tokenizer`"),
        ("model.tokenizer=nowhere", FileNotFoundError, "nowhere: there is no BERT tokenizer"),
    ],
)
def test_what_does_not_fit_is_said_at_once(tmp_path, override, error, message):
    with pytest.raises(error, match=message):
        run(write_config(tmp_path / "a.yaml", VALIDATED), override)
    assert not (tmp_path / "a").exists()


def test_a_model_behind_an_enrichment_goes_on_with_it(tmp_path):
    one_step = {"optimization": {"max_steps": 1}}
    plain = {"model": {"preset": "avcap"}}
    start = f"model.start={tmp_path / 'plain' / 'model'}"
    assert run(write_config(tmp_path / "plain.yaml", plain, one_step)) == 0
    enriched = write_config(tmp_path / "enriched.yaml", plain, one_step)
    assert run(enriched, start, "model.config.enrichment=caste") == 0
    start = f"model.start={tmp_path / 'enriched' / 'model'}"
    more = write_config(tmp_path / "more.yaml", plain, one_step)
    with pytest.raises(ValueError, match="concat with enrichment caste.*or give `model.config.enrichment=caste`"):
        run(more, start)
    assert run(more, start, "model.config.enrichment=caste") == 0
    with pytest.raises(ValueError, match="choose the preset that fits, or import"):
        run(write_config(tmp_path / "other.yaml", one_step), start, "model.config.enrichment=caste")


def test_the_command_says_errors_in_a_line(tmp_path, capsys):
    assert evacap(["train", "nowhere"]) == 1
    assert capsys.readouterr().err.startswith("evacap train: nowhere: there is no such file")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Prepared procedural clips, in shards of four."""
    folder = tmp_path_factory.mktemp("prepared")
    config = load_run_config(write_config(folder / "small.yaml"))
    processor, _ = make_processor_and_config(config.model)
    for split, clips in (("train", 12), ("validation", 4)):
        manifest = write_dataset(folder / split, split, clips, seed=0)
        prepare(
            read_manifest(manifest), folder / "prepared", processor, split, num_frames=4, shard_size=4, num_workers=1
        )
    return folder / "prepared"


def from_prepared(folder, **data) -> dict:
    return {
        "data": {
            "procedural": None,
            "prepared": str(folder),
            "augmentation": {"freq_mask": 8, "time_mask": 16},
            **data,
        }
    }


@pytest.mark.parametrize("streamed", [False, True])
def test_prepared_clips_are_gone_through_once_an_epoch(tmp_path, prepared, streamed):
    changes = from_prepared(prepared, streamed=streamed)
    path = write_config(
        tmp_path / "a.yaml", changes, {"validation": {"every_steps": 3}, "optimization": {"epochs": 2}}
    )
    assert run(path) == 0
    log = read_log(tmp_path / "a")
    assert [line["step"] for line in log if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert "12 clips of `prepared` (split `train`)" in (tmp_path / "a" / "model" / "training.json").read_text()
    # The same clips, with other draws of the augmentation.
    clips = make_clips(load_run_config(path).data, make_processor_and_config(load_run_config(path).model)[0], 0)
    clips.set_epoch(0)
    first = next(iter(clips))["input_features"]
    clips.set_epoch(1)
    assert not np.array_equal(next(iter(clips))["input_features"], first)


@pytest.mark.slow
@pytest.mark.parametrize("streamed", [False, True])
def test_a_killed_run_goes_on_as_if_nothing_had_been(tmp_path, prepared, streamed):
    """Dropout, swaps, augmentation and workers on; killed twice, at random moments."""
    changes = [
        from_prepared(prepared, streamed=streamed, p_mix=0.5),
        {
            "optimization": {"epochs": 12, "batch_size": 2},
            "validation": {"every_steps": 25},
            "saving": {"every_steps": 7},
            "resources": {"num_workers": 2},
        },
    ]
    whole, parts = write_config(tmp_path / "whole.yaml", *changes), write_config(tmp_path / "parts.yaml", *changes)
    command = [sys.executable, "-m", "evacap.training.train"]
    assert subprocess.run([*command, whole], timeout=300, capture_output=True).returncode == 0
    rng, log = np.random.default_rng(), tmp_path / "parts" / "log.jsonl"
    for lines in sorted(rng.integers(1, 70, 2)):
        process = subprocess.Popen([*command, parts], stderr=subprocess.DEVNULL)
        while process.poll() is None and (not log.exists() or log.read_text().count("\n") < lines):
            time.sleep(0.01)
        time.sleep(rng.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
    assert subprocess.run([*command, parts], timeout=300, capture_output=True).returncode == 0
    assert len(losses(tmp_path / "parts")) == 72
    for name in ("log.jsonl", "model/model.safetensors"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name

"""The study: what its variants are, what a run leaves, what is not done again, and the tables of result files."""

import copy
import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from training_runs import SMALL
from transformers import AutoModel

from evacap.modeling_evacap.language_model_evacap import captioner_class
from evacap.modeling_evacap.modeling_evacap import EVACapForConditionalGeneration
from evacap.training.alignment import CONTRAST_TEMPERATURE
from evacap.training.components import make_processor_and_config
from evacap.training.metrics.bootstrap import roc_auc
from evacap.training.procedural.dataset import ProceduralClips
from evacap.training.procedural.scores import COLUMNS
from evacap.training.run_config import load_run_config
from evacap.training.study.__main__ import (
    EXTRA,
    VARIANTS,
    Study,
    fingerprint,
    forget_accelerator,
    main,
    make_start,
    run_study,
    towers,
    write_result,
)
from evacap.training.study.mismatch_detectors import BINS, SUBSETS, _fitted, cross, own_above
from evacap.training.study.pretraining import contrast, pretrain
from evacap.training.study.report import (
    ORACLE_RESULT,
    PRETRAINED,
    TABLES,
    VARIANT_TITLES,
    as_markdown,
    read_results,
    write_report,
)


LOSSES = ("mmd", "ot", "attentive-ot", "contrast")
ALIGNED = {
    "model.preset": "audio-only",
    "data.p_mix": 0.0,
    "alignment.teacher": "video-only",
    "alignment.loss": "mmd",
    "alignment.solver": "sinkhorn",
    "alignment.epsilon": 0.05,
    "alignment.iterations": 50,
    "alignment.keep": 0.5,
    "alignment.entropy_weight": 100.0,
    "alignment.scorers_learning_rate": 1e-4,
}
CHANGES = {
    "audio-only": {"model.preset": "audio-only", "data.p_mix": 0.0},
    "avcap": {"model.preset": "avcap", "data.p_mix": 0.0},
    "evacap": {},
    "without-s": {"data.p_mix": 0.0},
    "without-e": {"model.preset": "evacap-learned-gate"},
    "without-se": {"model.preset": "evacap-learned-gate", "data.p_mix": 0.0},
    "without-g": {"model.preset": "evacap-ungated"},
    "sms-50": {"data.p_mix": 0.5},
    "sms-100": {"data.p_mix": 1.0},
    "without-start": {"model.start": False},
    "gate-stability": {"gate_stability_weight": 1},
    "semantic-consistency": {"semantic_consistency_weight": 1},
    "closed-gate": {"gate_weight_init": -8, "gate_bias_init": 4},
    "agreement": {"model.preset": "evacap-agreement", "data.p_mix": 0},
    "agreement-sms-5": {"model.preset": "evacap-agreement"},
    "agreement-sms-50": {"model.preset": "evacap-agreement", "data.p_mix": 0.5},
    "agreement-without-hearing": {"model.preset": "evacap-agreement", "data.p_mix": 0, "hearing_weight": 0},
    "agreement-without-e": {
        "model.preset": "evacap-agreement",
        "data.p_mix": 0,
        "gate_weight_init": 0,
        "gate_bias_init": 0,
        "model.freeze": ["model.encoder.fusion.gate_weight"],
    },
    "agreement-without-loss": {"model.preset": "evacap-agreement", "data.p_mix": 0, "matching_weight": 0},
    "lavcap": {"model.preset": "lavcap", "data.p_mix": 0},
    "lavcap-mean": {"model.preset": "lavcap", "data.p_mix": 0, "ot_context": "mean"},
    "language-model": {
        "text_config": {
            **load_run_config("study/tiny").model.config["text_config"],
            "model_type": "llama",
            "intermediate_size": 320,
        }
    },
    "vact": {"model.preset": "vact", "data.p_mix": 0},
    "caste": {"model.preset": "evacap-caste"},
    "caste-losses": {"model.preset": "evacap-caste-losses"},
    "case": {"model.preset": "evacap-case"},
    "video-only": {"model.preset": "video-only", "data.p_mix": 0.0},
    **{f"dali-{loss}": {**ALIGNED, "alignment.loss": loss.replace("-", "_")} for loss in LOSSES},
    "dali-none": {**ALIGNED, "optimization.max_steps": 0},
    "dali-late-concat": {"model.preset": "late-concat", "data.p_mix": 0, "optimization.max_steps": 0},
    "dali-distilled": {
        "model.preset": "audio-only",
        "model.freeze": ["*"],
        "model.freeze_except": ["model.decoder.prefix_projection.*"],
        "data.p_mix": 0,
        "data.procedural": 3840,
    },
    "pictures": {"model.preset": "video-only", "data.p_mix": 0.0},
    "pictures-prompted": {
        "model.preset": "video-only",
        "text_config": load_run_config("study/tiny").model.config["text_config"] | {"num_prompt_tokens": 16},
        "model.freeze": ["*"],
        "model.freeze_except": ["model.decoder.prompt"],
        "data.p_mix": 0.0,
        "data.procedural": 64,
        "optimization.batch_size": 16,
        "optimization.epochs": 500,
        "optimization.weight_decay": 0,
    },
    "dali-prompted": {**ALIGNED, "alignment.teacher": "pictures-prompted", "alignment.loss": "ot"},
    "dali-pictures-none": {
        **ALIGNED,
        "alignment.teacher": "pictures",
        "alignment.loss": "ot",
        "optimization.max_steps": 0,
    },
    "dali-pictures": {
        "model.preset": "audio-only",
        "text_config": load_run_config("study/tiny").model.config["text_config"] | {"num_prompt_tokens": 0},
        "data.p_mix": 0.0,
        "optimization.max_steps": 0,
    },
}
"""All that a variant's settings have other than EVACap's."""
NETWORKS = {
    "audio-only": ("audio_only", "entropy"),
    "avcap": ("concat", "entropy"),
    "without-e": ("gated_cross_attention", "learned"),
    "without-se": ("gated_cross_attention", "learned"),
    "without-g": ("gated_cross_attention", "none"),
    **{name: ("gated_cross_attention", "agreement") for name in CHANGES if name.startswith("agreement")},
    "caste-losses": ("gated_cross_attention", "agreement"),
    "lavcap": ("optimal_transport", "entropy"),
    "lavcap-mean": ("optimal_transport", "entropy"),
    "vact": ("concat", "entropy"),
    "video-only": ("video_only", "entropy"),
    "pictures": ("video_only", "entropy"),
    "pictures-prompted": ("video_only", "entropy"),
    **{name: ("audio_only", "entropy") for name in CHANGES if name.startswith("dali-")},
    "dali-late-concat": ("late_concat", "entropy"),
}


def settings(name: str, seed: int = 0) -> dict:
    study = Study()
    values = study.settings(study.run_config(name, seed))
    return values | values.pop("model.config")


@pytest.mark.parametrize("name", VARIANTS | EXTRA)
def test_a_variant_is_what_its_name_says_and_nothing_else(name):
    own, evacap = settings(name), settings("evacap")
    assert {key: value for key, value in own.items() if value != evacap.get(key)} == CHANGES[name]
    assert evacap.keys() <= own.keys()
    assert (evacap["model.preset"], evacap["data.p_mix"], evacap["model.start"]) == ("evacap", 0.05, True)
    other_seed = settings(name, seed=7)
    assert {key for key in own if own[key] != other_seed[key]} == {"seed"}


def test_only_the_network_differs():
    built = {name: make_processor_and_config(load_section(name)) for name in VARIANTS | EXTRA}
    networks = {name: (config.fusion_type, config.gate_type) for name, (_, config) in built.items()}
    assert networks == {name: NETWORKS.get(name, ("gated_cross_attention", "entropy")) for name in built}
    processors = [
        (processor.feature_extractor.to_dict(), processor.video_processor.to_dict()) for processor, _ in built.values()
    ]
    assert all(each == processors[0] for each in processors)
    modalities = {name: processor.modalities for name, (processor, _) in built.items()}
    one_stream = {name: kind for name, kind in modalities.items() if kind != "audio_video"}
    aligned = dict.fromkeys((name for name, (kind, _) in NETWORKS.items() if kind == "audio_only"), "audio")
    seen = dict.fromkeys((name for name, (kind, _) in NETWORKS.items() if kind == "video_only"), "video")
    assert one_stream == seen | aligned
    parts = [
        [part.to_dict() for part in (config.audio_config, config.video_config, config.text_config)]
        for name, (_, config) in built.items()
        if name not in ("language-model", "pictures-prompted")
    ]
    assert all(each == parts[0] for each in parts)


def test_the_language_model_is_as_large_as_the_decoder():
    sizes = {}
    for name in ("evacap", "language-model"):
        config = make_processor_and_config(load_section(name))[1]
        with torch.device("meta"):
            sizes[name] = captioner_class(config)(config).num_parameters()
    assert sizes["language-model"] == pytest.approx(sizes["evacap"], rel=0.01)


def load_section(name: str):
    section = Study().run_config(name, 0).model
    section.start = None
    return section


@pytest.mark.parametrize("folder", ["docs/study", "docs/study/systems"])
def test_the_committed_runs_count_as_done(folder):
    study = Study(results=Path(folder), keep_clips=True)
    runs = [path.stem.rsplit("-seed", 1) for path in (study.results / "runs").glob("*-seed*.json")]
    assert len(runs) > 30 and all(study.is_done(name, int(seed)) for name, seed in runs)
    assert len({result.get("start") for result in read_results(folder)} - {None}) == 1


def test_every_variant_has_a_place_in_the_report():
    assert VARIANT_TITLES.keys() == (VARIANTS | EXTRA).keys()
    assert {name for names in TABLES.values() for name in names} == VARIANT_TITLES.keys()


def test_the_large_size_fits_its_clips():
    config = load_run_config("study/large")
    processor, model_config = make_processor_and_config(config.model)
    with torch.device("meta"):
        model = EVACapForConditionalGeneration(model_config)
    assert 3e7 < model.num_parameters() < 6e7
    clip = ProceduralClips(processor, 1)[0]
    video = model_config.video_config
    assert clip["input_features"].shape == (512, 128)
    assert clip["pixel_values_videos"].shape == (video.num_frames, 3, video.image_size, video.image_size)


@pytest.fixture(autouse=True)
def accelerator():
    forget_accelerator()


@pytest.fixture
def small(tmp_path) -> Study:
    return small_study(tmp_path)


def small_study(folder: Path) -> Study:
    """Two steps of a model of 40,000 parameters."""
    values = {
        "base": "study/quick",
        "model": SMALL["model"],
        "data": {"procedural": 64},
        "optimization": {"batch_size": 4, "max_steps": 2, "learning_rate": 1e-2},
        "resources": SMALL["resources"],
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(values))
    return Study(str(path), (), folder / "runs", folder / "results", 12, 1, ("bleu",), "a command")


def test_a_run_leaves_its_result_and_is_not_run_again(small, capsys):
    assert run_study(small, ["evacap"], [0]) == 0
    path = small.result_path("evacap", 0)
    text = path.read_text()
    assert len(text) < 30_000
    assert str(small.output) not in text
    result = json.loads(text)
    assert (result["variant"], result["seed"], result["command"]) == ("evacap", 0, "a command")
    assert result["settings"]["optimization.learning_rate"] == 0.01
    assert {"git_commit", "versions", "command"} <= result["starts"][0].keys()
    assert result["seconds"]["training"] > 0 and result["seconds"]["evaluation"] > 0
    assert [condition["setting"] for condition in result["conditions"]] == [
        "own videos",
        "5 % of the videos swapped",
        "50 % of the videos swapped",
        "100 % of the videos swapped",
        "no video",
    ]
    assert all("clips" not in condition for condition in result["conditions"])
    assert {"bleu_4", "distinct", "sound-alikes"} <= result["conditions"][0]["metrics"].keys()
    assert result["half-dubbed"].keys() == result["conditions"][0]["metrics"].keys()
    assert result["start"] == json.loads((small.results / "runs" / "pretraining.json").read_text())["start"]

    # Two ways to the same areas: over the captions of the evaluation, and here.
    mismatch = result["mismatch"]
    assert mismatch["auc"].keys() == SUBSETS.keys()
    for curve in ("entropy", "gate"):
        area = result["conditions"][3][curve]["auc"]["value"]
        assert mismatch["auc"]["all"][f"{curve}, by clip"] == pytest.approx(area, abs=0.03)
    assert mismatch["gate"]["mean"] == pytest.approx(result["conditions"][0]["gate"]["matched"], abs=1e-4)
    for pair in mismatch["histograms"].values():
        assert [len(counts) for counts in pair.values()] == [BINS, BINS]
    assert sum(mismatch["histograms"]["entropy, by clip"]["own"]) == 12
    assert {"similarity", "entropy", "entropy, head 1", "gate"} <= mismatch["crossed"].keys()
    for found in mismatch["crossed"].values():
        assert found["sound"] + found["picture"] + found["interaction"] == pytest.approx(1, abs=1e-3)

    said = capsys.readouterr().err
    assert "run 1 of 1: evacap, seed 0" in said
    before = path.stat().st_mtime_ns
    assert run_study(small, ["evacap"], [0]) == 0
    assert path.stat().st_mtime_ns == before and "run 1" not in capsys.readouterr().err

    oracles = json.loads((small.results / "runs" / "oracles.json").read_text())
    assert oracles["settings"]["test.clips"] == 12 and oracles["oracles"]["right"]["distinct"] == 1
    assert oracles["oracles"]["right"].keys() == result["conditions"][0]["metrics"].keys()

    # Without the result file it is judged again, from the captions that are there, and not trained again.
    path.unlink()
    assert run_study(small, ["evacap"], [0]) == 0
    again = json.loads(path.read_text())
    assert len(again["starts"]) == 1 and again["conditions"] == result["conditions"]

    changed = Study(small.config, ("optimization.learning_rate=0.1",), small.output, small.results, 12, 1)
    with pytest.raises(ValueError, match="learning_rate` is 0.01 there and 0.1 here"):
        run_study(changed, ["evacap"], [0])
    # What lies in `output` is of other settings as well.
    path.unlink()
    with pytest.raises(ValueError, match="was begun with other settings.*learning_rate"):
        run_study(changed, ["evacap"], [0])


def test_kept_clips_change_nothing(small):
    keeping = dataclasses.replace(small, output=small.output / "kept", results=small.results / "kept", keep_clips=True)
    for study in (small, keeping):
        assert run_study(study, ["without-start"], [5]) == 0
    rendered, kept = (json.loads(study.result_path("without-start", 5).read_text()) for study in (small, keeping))
    assert len(list((keeping.output / "clips").iterdir())) == 2
    # Sums of features differ in their last digits from process to process, and what is learnt from them a little.
    assert kept["loss"] == pytest.approx(rendered["loss"], rel=1e-3)
    same = ("settings", "parameters", "start")
    assert kept.keys() == rendered.keys() and [kept[key] for key in same] == [rendered[key] for key in same]


def test_variants_share_the_towers_and_nothing_that_a_seed_draws(small):
    assert pretrain(small.pretraining_config()) == 0
    pretrained = small.output / "pretraining" / "model"
    started = {}
    for name, seed in (
        ("evacap", 0),
        ("evacap", 1),
        ("avcap", 0),
        ("audio-only", 0),
        ("lavcap", 0),
        ("language-model", 0),
        ("vact", 0),
    ):
        config = small.run_config(name, seed)
        mark = make_start(config, pretrained)
        started[name, seed] = AutoModel.from_pretrained(config.model.start)
    known = towers(EVACapForConditionalGeneration.from_pretrained(pretrained))
    assert mark == fingerprint(known)
    for model in started.values():
        own = towers(model)
        assert own and all(torch.equal(value, known[name]) for name, value in own.items())
    assert {name.split(".")[2] for name in towers(started["audio-only", 0])} == {"audio_tower"}
    assert {name.split(".")[2] for name in towers(started["avcap", 0])} == {"audio_tower", "video_tower"}
    first, second = (started["evacap", seed].get_input_embeddings().weight for seed in (0, 1))
    assert not torch.equal(first, second)


def test_pretraining_trains_the_towers_alone_and_goes_on_where_it_was(small):
    changes = ["optimization.batch_size=16", "optimization.max_steps=4", "saving.every_steps=2"]
    config = load_run_config(small.config, [*changes, "saving.keep=2", f"output={small.output / 'a'}"])
    assert pretrain(config) == 0
    folder = small.output / "a"
    shutil.copytree(folder, small.output / "whole")
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["step-00000002", "step-00000004"]
    shutil.rmtree(folder / "model")
    shutil.rmtree(folder / "checkpoints" / "step-00000004")
    forget_accelerator()
    assert pretrain(config) == 0
    weights, whole = (load_file(path / "model" / "model.safetensors") for path in (folder, small.output / "whole"))
    assert all(torch.equal(value, whole[name]) for name, value in weights.items())
    assert len(json.loads((folder / "run.json").read_text())["starts"]) == 2

    before = load_file(folder / "checkpoints" / "step-00000002" / "model.safetensors")
    both = weights.keys() & before.keys()
    moved = {name for name in both if not torch.equal(weights[name], before[name])}
    assert moved and all("_tower." in name for name in moved)
    assert any("fusion" in name for name in both) and any("decoder" in name for name in both)


def test_the_contrast_is_the_formula():
    rng = torch.Generator().manual_seed(0)
    sounds, pictures = (
        torch.nn.functional.normalize(torch.randn(5, 8, generator=rng, dtype=torch.float64), dim=1) for _ in range(2)
    )
    similarities = (sounds @ pictures.T / CONTRAST_TEMPERATURE).exp()
    rows = -(similarities.diag() / similarities.sum(1)).log().mean()
    columns = -(similarities.diag() / similarities.sum(0)).log().mean()
    assert contrast(sounds, pictures).item() == pytest.approx((rows + columns).item() / 2)
    assert contrast(sounds[:1].repeat(4, 1), pictures[:1].repeat(4, 1)).item() == pytest.approx(math.log(4))


def test_the_fitted_readout_finds_what_is_there_and_nothing_else():
    rng = np.random.default_rng(0)
    own, swapped = rng.normal(size=(2, 400, 6))
    assert 0.4 < roc_auc(*_fitted(own, swapped)) < 0.6
    # Nothing that a mean over the columns would show.
    swapped += np.array([2, -2, 0, 0, 0, 0])
    assert roc_auc(*_fitted(own, swapped)) > 0.95
    assert abs(roc_auc(swapped.mean(1), own.mean(1)) - 0.5) < 0.1


def test_a_figure_that_knows_the_picture_alone_tells_nothing():
    rng = np.random.default_rng(0)
    pictures, videos = rng.normal(size=3000), np.roll(np.arange(3000), 1)
    swapped, bright = pictures[videos], pictures > 0
    assert own_above(pictures, swapped, np.full(3000, True), videos) == pytest.approx(0.5)
    assert own_above(pictures, swapped, bright, videos) == pytest.approx(0.5, abs=0.03)
    # As it would be where the others' pictures are of all kinds.
    assert roc_auc(pictures[bright], swapped[bright]) > 0.7
    tokens = np.stack([pictures, pictures], 1)
    assert own_above(tokens + 9, tokens[videos], bright, videos) == 1.0


def test_only_the_interaction_tells_whether_sound_and_picture_belong_together():
    rng = np.random.default_rng(0)
    sound, picture, noise = rng.normal(size=(60, 1)), rng.normal(size=(1, 60)), rng.normal(size=(60, 60))
    found = cross(2 * sound + picture)
    sounds, pictures = 4 * sound.var(), picture.var()
    assert found["sound"] == pytest.approx(sounds / (sounds + pictures))
    assert found["picture"] == pytest.approx(pictures / (sounds + pictures))
    assert found["interaction"] == pytest.approx(0, abs=1e-12)
    assert 0.45 < found["own"] < 0.55
    found = cross(2 * sound + picture + 0.1 * noise)
    assert found["sound"] + found["picture"] + found["interaction"] == pytest.approx(1)
    assert 0.42 < found["own, by interaction"] < 0.58
    # What the pictures themselves say hides that the own one stands higher.
    found = cross(2 * sound + 10 * picture + np.eye(60))
    assert found["own"] < 0.6 and found["own, by interaction"] == 1
    assert cross(np.zeros((4, 4)))["own"] == 0.5


def made_by_hand(variant: str, seed: int, cider: float, left: float, distinct: float, lost: float) -> dict:
    """A result file: CIDEr and what is left of it at 100 %, distinct sources named and how many fewer at 100 %."""

    def condition(share: float, frames: int | None = None) -> dict:
        return {
            "shuffle": share,
            "frames": frames,
            "metrics": {
                "cider_d": {"value": cider * (1 - share * (1 - left)), "retention": 1 - share * (1 - left)},
                **{name: {"value": distinct - share * lost} for name in COLUMNS},
            },
        }

    entropies = [0] * (BINS - 2) + [3, 1]
    mismatch = {
        "auc": {
            "all": {
                "entropy, by clip": 0.5 + seed / 10,
                "entropy, by token": 0.5,
                "entropy, head 1": 0.3,
                "entropy, head 2": 0.6,
            }
        },
        "paired": 0.25,
        "gate": {"mean": 0.5, "weight": -4.0},
        "crossed": {
            figure: {"sound": 0.25, "picture": 0.5, "interaction": 0.25, "own": 0.5, "own, by interaction": own}
            for figure, own in (("entropy", 0.6), ("entropy, head 1", 0.5), ("entropy, head 2", 0.7 + seed / 10))
        },
        "histograms": {f"entropy, by {unit}": {"own": entropies, "swapped": entropies} for unit in ("clip", "token")},
    }
    return {
        "variant": variant,
        "seed": seed,
        "command": "python -m evacap.training.study",
        "starts": [{"git_commit": "0123456789abcdef+changes", "versions": {"evacap": "0.1.0"}}],
        "machine": {"device": "CPU", "cores": 2},
        "settings": {"test.clips": 500, "test.num_beams": 4},
        "seconds": {"training": 480.0, "evaluation": 60.0},
        "start": "abc",
        "parameters": 2_300_000,
        "skipped": ["spice"],
        "conditions": [*map(condition, (0.0, 0.5, 1.0)), condition(0.0, frames=0)],
        "mismatch": None if variant == "audio-only" else mismatch,
    }


RESULTS = [
    made_by_hand("audio-only", 0, 0.5, 1.0, 0.9, 0.0),
    made_by_hand("avcap", 0, 1.0, 0.5, 0.9, 0.2),
    made_by_hand("avcap", 1, 1.2, 0.5, 0.9, 0.1),
    made_by_hand("evacap", 0, 1.1, 0.8, 0.9, 0.1),
    made_by_hand("evacap", 1, 1.1, 0.4, 0.9, 0.2),
]


def write_all(folder: Path, results: list[dict]) -> None:
    for result in results:
        write_result(folder / "runs" / f"{result['variant']}-seed{result['seed']}.json", copy.deepcopy(result))


def tables(text: str) -> dict[str, list[list[str]]]:
    """The rows of all Markdown tables under each heading."""
    found = {}
    for part in text.split("\n## ")[1:]:
        heading, *lines = part.splitlines()
        found[heading] = [
            [cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")
        ]
    return found


def test_tables_of_known_results(tmp_path):
    write_all(tmp_path, RESULTS[::-1])
    results = read_results(tmp_path)
    assert [(result["variant"], result["seed"]) for result in results] == [
        (result["variant"], result["seed"]) for result in RESULTS
    ]
    found = tables(as_markdown(results))
    first = found["Own videos (layout of the paper's Table 1)"]
    assert first[0][:4] == ["model", "seeds", "params", "CIDEr"]
    assert first[2][:4] == ["audio only", "1", "2.3 M", "0.500"]
    # Mean and deviation of 1.0 and 1.2.
    assert first[3][:4] == ["AVCap", "2", "2.3 M", "1.100<br><sub>± 0.141</sub>"]
    systems = found["Every system under the same swaps"]
    assert systems[0][:4] == ["model", "params", "CIDEr", "CIDEr, swapped"] and len(systems) == 5
    assert systems[3][0] == "AVCap" and systems[3][2] == first[3][3]
    # One row alone compares nothing.
    assert not any("Table 2" in heading or "Table 4" in heading for heading in found)
    third = found["Shuffled test videos (layout of the paper's Table 3)"]
    assert [row[:2] for row in third if row[0] == "100 %"] == [["100 %", "AVCap"], ["100 %", "EVACap (SMS 5 %)"]] * 2
    assert third[-1] == ["no video", "EVACap (SMS 5 %)", "100.0 %<br><sub>± 0.0</sub>"]
    assert third[-3] == ["100 %", "EVACap (SMS 5 %)", "60.0 %<br><sub>± 28.3</sub>"]
    named = found["Sources named"]
    assert ["100 %", "AVCap", *["75.0 %<br><sub>± 7.1</sub>"] * 7] in named
    differences = found["EVACap less the others, seed by seed"]
    assert differences[2][:4] == ["audio only", "+0.600", "-0.200", "+0.100"]
    assert differences[3][:4] == ["AVCap", "+0.100 -0.100", "+0.300 -0.100", "-0.100 +0.100"]
    areas = found["Can they tell that a picture is another's?"]
    assert areas[3][:4] == ["all", "EVACap (SMS 5 %)", "0.550<br><sub>± 0.071</sub>", "0.500<br><sub>± 0.000</sub>"]
    # The head that is furthest from 0.5 stands below it.
    assert areas[3][-1].startswith("0.700")
    assert "Oracle captioners" not in found
    crossed = found["What they depend on"]
    assert crossed[3][:5] == [
        "entropy",
        "EVACap (SMS 5 %)",
        *(f"{x} %<br><sub>± 0.0</sub>" for x in ("25.0", "50.0", "25.0")),
    ]
    assert [cell[:5] for cell in crossed[3][5:]] == ["0.500", "0.600", "0.750"]
    runs = found["The runs"]
    assert runs[2][:6] == ["audio only", "0", "8.0", "1.0", "abc", "0123456789+"]


def test_oracles_stand_beside_the_models(tmp_path):
    figures = {"right": {"cider_d": 4.0, "distinct": 1.0}, "bare": {"cider_d": 2.5, "distinct": 1.0}}
    oracles = {"variant": ORACLE_RESULT, "seed": 0, "settings": {}, "oracles": figures}
    write_result(tmp_path / "runs" / "oracles.json", oracles)
    assert write_report(tmp_path) == []
    write_all(tmp_path, RESULTS)
    found = tables(as_markdown(read_results(tmp_path)))
    rows = found["Oracle captioners"]
    assert rows[2:] == [["right", "4.000<br><sub>100.0 %</sub>"], ["bare", "2.500<br><sub>62.5 %</sub>"]]
    assert len(found["The runs"]) == 2 + len(RESULTS)


def test_runs_that_have_spice_say_what_is_left_of_it(tmp_path):
    write_all(tmp_path, RESULTS)
    assert "SPICE" not in as_markdown(read_results(tmp_path)).split("## The runs")[0].replace("Runs without SPICE", "")
    newer = copy.deepcopy([result for result in RESULTS if result["seed"] == 1])
    for result, left in zip(newer, (0.92, 0.98), strict=True):
        result["skipped"] = []
        for condition in result["conditions"]:
            share = condition["shuffle"] * (1 - left)
            figure = {"value": 0.2 * (1 - share), "retention": 1 - share, "retention_interval": [0.9, 0.99]}
            condition["metrics"]["spice"] = figure
    write_all(tmp_path, newer)
    text = as_markdown(read_results(tmp_path))
    assert "Runs without SPICE were evaluated where these were not available." in text
    found = tables(text)
    shuffled = [
        row for row in found["Shuffled test videos (layout of the paper's Table 3)"] if "<sub>90.0–99.0" in row[-1]
    ]
    assert shuffled == [
        ["AVCap", "1", "0.184", "92.0%<br><sub>90.0–99.0</sub>"],
        ["EVACap (SMS 5 %)", "1", "0.196", "98.0%<br><sub>90.0–99.0</sub>"],
    ]
    head, _, *rows = found["EVACap less the others, seed by seed"]
    (cell,) = [row[head.index("SPICE left at 100 %")] for row in rows if row[0] == "AVCap"]
    assert cell == "– +0.060"


def test_the_report_is_made_of_the_files_alone(tmp_path, capsys):
    assert main(["--report", "--results", str(tmp_path)]) == 1
    assert "holds no result" in capsys.readouterr().err
    write_all(tmp_path, RESULTS)
    assert main(["--report", "--results", str(tmp_path)]) == 0
    files = [Path(line) for line in capsys.readouterr().out.split()]
    plots = ["fooled", "shuffle", "entropy"]
    assert files == [tmp_path / "tables.md", *(tmp_path / f"{name}.png" for name in plots)]
    assert files[0].read_text() == as_markdown(read_results(tmp_path), plots)
    for path in files[1:]:
        with Image.open(path) as image:
            assert min(image.size) > 200
    (tmp_path / "runs" / "evacap-seed1.json").write_text("{")
    with pytest.raises(ValueError, match="evacap-seed1.json is not a result of the study"):
        write_report(tmp_path)


def test_a_result_file_is_short_and_exact_where_it_must_be(tmp_path):
    path = tmp_path / "runs" / "a.json"
    result = {
        "settings": {"data.p_mix": 0.123456789, "model.freeze": ["a  [b]"]},
        "counts": [1, 2, 3],
        "text": ["x\ny", "z"],
        "share": 1.23456789e-7,
        "nested": [{"a": [0.1234567]}],
    }
    write_result(path, result)
    expected = {**result, "share": 1.2346e-7, "nested": [{"a": [0.12346]}]}
    assert json.loads(path.read_text()) == expected
    assert ' "counts": [1, 2, 3],\n' in path.read_text()


@pytest.mark.slow
def test_all_of_the_study_in_minutes(tmp_path, capsys):
    """Longer than its name says only where the machine is busy."""
    arguments = ["--quick", "--output", str(tmp_path / "runs"), "--results", str(tmp_path / "study")]
    assert main(arguments) == 0
    oracles, *results = read_results(tmp_path / "study")
    assert oracles["variant"] == ORACLE_RESULT and oracles["settings"]["test.clips"] == 20
    assert [result["variant"] for result in results] == [PRETRAINED, *VARIANTS]
    assert {result["start"] for result in results} == {results[0]["start"], None}
    found = tables((tmp_path / "study" / "tables.md").read_text())
    for heading, names in TABLES.items():
        rows = [VARIANT_TITLES[name] for name in names]
        assert [row[0] for row in found.get(heading, [])[2:]] == (rows if set(names) <= VARIANTS.keys() else [])
    looking = {result["variant"] for result in results if result.get("mismatch")}
    assert looking == VARIANTS.keys() - {"audio-only"}
    assert {result["settings"]["data.procedural"] for result in results} == {320}
    capsys.readouterr()
    assert main(arguments) == 0
    assert "run 1" not in capsys.readouterr().err

"""Evaluation of captioners on test clips with matched and with swapped videos."""

import hashlib
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from tqdm.auto import tqdm
from transformers.utils.logging import disable_progress_bar

from ..files import locked, write_json
from ..metrics.bootstrap import (
    CONFIDENCE,
    RESAMPLES,
    Statistic,
    bleu,
    draw,
    interval,
    mean,
    meteor,
    p_value,
    ratio,
    roc_auc,
)
from ..metrics.compute import METRIC_TITLES, METRICS, MODEL_METRICS, combine, compute_metrics
from ..metrics.java import find_java
from ..metrics.ptb_tokenizer import tokenize, tokenize_without_java
from ..procedural.kinds import KINDS
from ..procedural.scores import count_names
from .captioner import Caption, Captioner, Condition, MakeClips, Pair, TestedClip, list_clips, make_batches


SHARES = (0.0, 0.05, 0.5, 1.0)
"""The shares of shuffled test videos of the paper's Table 3."""
SCORED_AT_ONCE = 2000
"""Slow scores are stored after so many captions."""


@dataclass(frozen=True)
class Judged:
    """The captions of a checkpoint under a condition, with their scores.

    Args:
        pairs (`list[Pair]`): The pair of each clip.
        captions (`list[Caption]`): The caption of each pair.
        scores (`dict[str, list[float]]`): The scores of the clips, by name of the metric.
        statistics (`dict[str, Statistic]`): The figures of the whole set, by name of the metric or of the column of
            `scores.COLUMNS`.
    """

    pairs: list[Pair]
    captions: list[Caption]
    scores: dict[str, list[float]]
    statistics: dict[str, Statistic]


def evaluate(
    checkpoints: Mapping[str, str | os.PathLike],
    make_clips: MakeClips,
    output: str | os.PathLike,
    dataset: str,
    shares: Sequence[float] = SHARES,
    frames: Sequence[int] = (),
    num_beams: int = 4,
    max_clips: int | None = None,
    batch_size: int = 16,
    num_workers: int = 0,
    metrics: Sequence[str] = METRICS,
    seed: int = 0,
    resamples: int = RESAMPLES,
    dataset_id: str | None = None,
    **models: str | os.PathLike | None,
) -> dict[str, Any] | None:
    """Captions test clips with some checkpoints under some conditions, and scores the captions.

    The call may be stopped at any moment; the same call goes on. Under `accelerate launch` the processes share the
    clips and produce the captions that one process produces. Pairs that a model cannot tell apart are captioned once:
    a clip that keeps its video at another share, and any video for a model without a video tower.

    Intervals come from a percentile bootstrap of the corpus scores over the clips. BLEU and METEOR are computed from
    the counts of each resample. The others are means over its clips; CIDEr-D keeps the document frequencies of the
    whole set. (ours)

    Args:
        checkpoints (`Mapping[str, str]`): Model folders, or names on the Hub, by their names in the tables.
        make_clips (`MakeClips`): Makes the clips for a processor, such as
            `functools.partial(PreparedClips, folder, "test")`.
        output (`str` or `os.PathLike`): Folder of the captions and scores; it is made if it is missing.
        dataset (`str`): Name of the clips.
        shares (`Sequence[float]`): Shares of shuffled videos, see [`choose_videos`]; 0 is always added.
        frames (`Sequence[int]`): Further numbers of frames to evaluate, with matched videos; 0 is no video.
        num_beams (`int`): Number of beams.
        max_clips (`int`, *optional*): Takes only so many clips, the first ones.
        batch_size (`int`): Clips of a batch, in each process.
        num_workers (`int`): Reading processes for each process.
        metrics (`Sequence[str]`): See [`compute_metrics`].
        seed (`int`): Seed of the shuffling and of the bootstrap.
        resamples (`int`): Resamples of the bootstrap.
        dataset_id (`str`, *optional*): Name of the clips on the Hub, for model cards; `dataset` by default.
        **models (`str` or `os.PathLike`): `sentence_encoder` and `fluency_detector`, see [`compute_metrics`].

    Returns:
        The content of `evaluation.json`, see [`report.write_report`]; `None` in all processes but the main one.

    Raises:
        ValueError: If an argument is wrong, if the clips do not fit a checkpoint, or if `output` holds captions of other
            settings.
        OSError: If a file cannot be read or written; a `BlockingIOError` if another process evaluates into `output`.
    """
    _check(checkpoints, shares, frames, metrics)
    disable_progress_bar()
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        # A slow process may be far behind the others.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))],
    )
    output = Path(output)
    conditions = [Condition(share) for share in sorted({0.0, *shares})]
    conditions += [Condition(frames=count) for count in sorted(set(frames))]
    captioners = [Captioner(name, folder, output) for name, folder in checkpoints.items()]
    clips = list_clips(make_clips(captioners[0].processor), max_clips)
    without = next((clip.id for clip in clips if not clip.references), None)
    if without is not None:
        raise ValueError(f"clip {without!r} has no caption to compare with: prepare the clips without --no-captions")
    plans = [
        {condition: captioner.pairs(condition, clips, seed) for condition in conditions} for captioner in captioners
    ]
    plans = [{condition: pairs for condition, pairs in plan.items() if pairs is not None} for plan in plans]
    batches = [make_batches(plan.values(), batch_size) for plan in plans]
    said = {}
    total = sum(map(len, itertools.chain.from_iterable(batches))) // accelerator.num_processes
    output.mkdir(parents=True, exist_ok=True)
    with (
        locked(output) if accelerator.is_main_process else nullcontext(),
        tqdm(total=total, unit="clip", smoothing=0, disable=not accelerator.is_local_main_process) as progress,
    ):
        for captioner, part in zip(captioners, batches):
            progress.set_description(captioner.name)
            said[captioner.name] = captioner.caption(
                part, clips, make_clips, accelerator, dataset, num_beams, num_workers, progress
            )
    # Scoring takes one process.
    accelerator.end_training()
    if not accelerator.is_main_process:
        return None
    said = {
        captioner.name: {
            condition: (pairs, [said[captioner.name][pair] for pair in pairs]) for condition, pairs in plan.items()
        }
        for captioner, plan in zip(captioners, plans)
    }
    described = {
        captioner.name: {
            "checkpoint": captioner.folder,
            "parameters": captioner.parameters,
            "fusion_type": captioner.config.fusion_type,
            "gate_type": (
                captioner.config.gate_type if captioner.config.fusion_type == "gated_cross_attention" else None
            ),
            "looks": captioner.processor.modalities != "audio",
        }
        for captioner in captioners
    }
    settings = {"seed": seed, "num_beams": num_beams, "precision": accelerator.mixed_precision, "resamples": resamples}
    return judge(said, clips, described, settings, metrics, output, dataset, dataset_id or dataset, **models)


def _check(
    checkpoints: Mapping[str, Any], shares: Sequence[float], frames: Sequence[int], metrics: Sequence[str]
) -> None:
    if not checkpoints:
        raise ValueError("there is no checkpoint to evaluate; give at least one")
    for share in shares:
        if not 0 <= share <= 1:
            raise ValueError(f"a share of {share:g} of the videos cannot be shuffled; choose shares from 0 to 1")
    if any(count < 0 for count in frames):
        raise ValueError(f"frames are {min(frames)}; choose 0, for no video, or more")
    if not set(metrics) <= {*METRICS, *MODEL_METRICS}:
        raise ValueError(f"metrics must be of {', '.join((*METRICS, *MODEL_METRICS))}, found {', '.join(metrics)}")


Said = Mapping[str, Mapping[Condition, tuple[list[Pair], list[Caption]]]]
"""The captions of captioners, by name and condition, with a pair for each clip."""


def judge(
    said: Said,
    clips: Sequence[TestedClip],
    described: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, Any],
    metrics: Sequence[str],
    output: Path,
    dataset: str,
    dataset_id: str,
    **models: str | os.PathLike | None,
) -> dict[str, Any]:
    """Scores captions, wherever they come from.

    Args:
        said (`Said`): The captions.
        clips (`Sequence[TestedClip]`): All clips.
        described (`Mapping`): What the result says of each captioner besides its scores, by name.
        settings (`Mapping`): What the result says of the evaluation; `seed` and `resamples` are of the bootstrap.
        metrics (`Sequence[str]`): See [`compute_metrics`].
        output (`Path`): Folder that keeps the slow scores.
        dataset (`str`): Name of the clips.
        dataset_id (`str`): Name of the clips on the Hub, for model cards.
        **models (`str` or `os.PathLike`): `sentence_encoder` and `fluency_detector`, see [`compute_metrics`].

    Returns:
        The content of `evaluation.json`, see [`report.write_report`].
    """
    judged, skipped, tokenizer = _score(said, clips, metrics, output / "scores.json", models)
    draws = draw(len(clips), settings["resamples"], settings["seed"])
    settings = {**settings, "confidence": CONFIDENCE, "tokenizer": tokenizer}
    evaluation = _summarise(described, judged, clips, draws, settings, dataset, dataset_id)
    return evaluation | {"skipped": skipped}


def _score(
    said: Said,
    clips: Sequence[TestedClip],
    metrics: Sequence[str],
    kept: Path,
    models: Mapping[str, str | os.PathLike | None],
) -> tuple[dict[str, dict[Condition, Judged]], dict[str, str], str | None]:
    """The scored captions, the reasons for missing metrics, and the name of the tokeniser."""
    references = [clip.references for clip in clips]
    sources = _sounding_sources(clips)
    places = [(name, condition) for name, conditions in said.items() for condition in conditions]
    sets = [[caption.text for caption in said[name][condition][1]] for name, condition in places]
    single, skipped = score_singly(sets, references, metrics, kept)
    judged: dict[str, dict[Condition, Judged]] = {}
    for (name, condition), texts in zip(tqdm(places, desc="sets of captions", unit="set"), sets):
        scores, statistics, missing, tokenizer = score_set(texts, references, metrics, single, **models)
        if sources is not None:
            counts = count_names(sources, texts).items()
            statistics |= {column: ratio(*pair.T) for column, pair in counts if pair[:, 1].any()}
        judged.setdefault(name, {})[condition] = Judged(*said[name][condition], scores, statistics)
        skipped |= {metric: reason for metric, reason in missing.items() if metric in metrics}
    return judged, skipped, tokenizer


def score_singly(
    sets: Sequence[Sequence[str]], references: Sequence[Sequence[str]], metrics: Sequence[str], path: Path
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Computes METEOR and SPICE, which are slow and do not depend on the other clips, once for each distinct caption.

    The scores are kept in a file.

    Args:
        sets (`Sequence[Sequence[str]]`): Captions of the same clips under several conditions.
        references (`Sequence[Sequence[str]]`): The references of the clips.
        metrics (`Sequence[str]`): The wanted metrics of [`compute_metrics`].
        path (`Path`): The file.

    Returns:
        `tuple`: `{key: {"meteor": score, "meteor_counts": counts, "spice": score}}` with the keys of `score_key`, and
        the reasons for missing metrics.
    """
    known: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    pairs = {score_key(text, clip): (text, clip) for texts in sets for text, clip in zip(texts, references)}
    wanted = {"meteor": ("meteor",), "spice": ("spice", "spider", "spider_fl")}
    skipped = {}
    for metric in [metric for metric, users in wanted.items() if set(users) & set(metrics)]:
        left = [key for key in pairs if metric not in known.get(key, {})]
        with tqdm(total=len(left), desc=metric, unit="caption", disable=not left) as progress:
            for first in range(0, len(left), SCORED_AT_ONCE):
                part = left[first : first + SCORED_AT_ONCE]
                scores = compute_metrics(*zip(*(pairs[key] for key in part)), (metric,))
                if metric in scores["skipped"]:
                    skipped[metric] = scores["skipped"][metric]
                    break
                for place, key in enumerate(part):
                    entry = known.setdefault(key, {})
                    entry[metric] = scores["per_clip"][metric][place]
                    if metric in scores["counts"]:
                        entry[f"{metric}_counts"] = scores["counts"][metric][place]
                write_json(path, known, indent=None)
                progress.update(len(part))
    if "spice" in skipped:
        skipped |= dict.fromkeys(("spider", "spider_fl"), f"it needs SPICE: {skipped['spice']}")
    return known, {metric: reason for metric, reason in skipped.items() if metric in metrics}


def score_key(caption: str, references: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps([caption, list(references)]).encode()).hexdigest()[:24]


def score_set(
    captions: Sequence[str],
    references: Sequence[Sequence[str]],
    metrics: Sequence[str],
    single: Mapping[str, Mapping[str, Any]],
    **models: str | os.PathLike | None,
) -> tuple[dict[str, list[float]], dict[str, Statistic], dict[str, str], str | None]:
    """The scores of a whole set, equal to those of [`compute_metrics`].

    Args:
        captions (`Sequence[str]`): See [`compute_metrics`].
        references (`Sequence[Sequence[str]]`): See [`compute_metrics`].
        metrics (`Sequence[str]`): See [`compute_metrics`].
        single (`Mapping`): The result of `score_singly` for these captions.
        **models (`str` or `os.PathLike`): `sentence_encoder` and `fluency_detector`, see [`compute_metrics`].

    Returns:
        `tuple`: The scores of the clips by name, the statistics of the set, the reasons for missing metrics, and the
        name of the tokeniser.
    """
    needed = {"spider": ("cider_d",), "spider_fl": ("cider_d", "fluency_error")}
    parts = {*metrics, *(part for metric in metrics for part in needed.get(metric, ()))}
    quick = [metric for metric in ("bleu", "rouge_l", "cider_d", "fense", "fluency_error") if metric in parts]
    # Needed without quick metrics too: it tells the tokeniser.
    scores = compute_metrics(captions, references, quick, **models)
    clips = scores["per_clip"]
    entries = [single.get(score_key(text, clip), {}) for text, clip in zip(captions, references)]
    clips |= {
        metric: [entry[metric] for entry in entries]
        for metric in ("meteor", "spice")
        if all(metric in entry for entry in entries)
    }
    clips |= combine(clips)
    skipped = scores["skipped"]
    if "fluency_error" in skipped:
        skipped = skipped | {"spider_fl": skipped["fluency_error"]}
    wanted = [name for name in METRIC_TITLES if ("bleu" if name.startswith("bleu") else name) in metrics]
    clips = {name: clips[name] for name in wanted if name in clips}
    statistics = {name: mean(values) for name, values in clips.items()}
    if "bleu_1" in clips:
        statistics |= bleu(*_tokenize(captions, references, scores["tokenizer"]))
    if "meteor" in clips:
        statistics["meteor"] = meteor([entry["meteor_counts"] for entry in entries])
    return clips, statistics, skipped, scores["tokenizer"]


def _tokenize(
    captions: Sequence[str], references: Sequence[Sequence[str]], tokenizer: str
) -> tuple[list[str], list[list[str]]]:
    texts = list(dict.fromkeys(itertools.chain(captions, *references)))
    tokens = tokenize(texts, find_java()) if tokenizer == "ptb" else tokenize_without_java(texts)
    known = dict(zip(texts, tokens, strict=True))
    return [known[caption] for caption in captions], [[known[text] for text in clip] for clip in references]


def _sounding_sources(clips: Sequence[TestedClip]) -> list[list[tuple[str, bool]]] | None:
    """The sounding sources of procedural clips; `None` for other clips."""
    try:
        sources = [[(event["kind"], event["on_screen"]) for event in clip.extra["events"]] for clip in clips]
    except (KeyError, TypeError):
        return None
    return sources if all(kind in KINDS for clip in sources for kind, _ in clip) else None


def _summarise(
    described: Mapping[str, Mapping[str, Any]],
    judged: Mapping[str, Mapping[Condition, Judged]],
    clips: Sequence[TestedClip],
    draws: np.ndarray,
    settings: dict[str, Any],
    dataset: str,
    dataset_id: str,
) -> dict[str, Any]:
    resampled = {
        name: {
            condition: {metric: statistic.resampled(draws) for metric, statistic in entry.statistics.items()}
            for condition, entry in conditions.items()
        }
        for name, conditions in judged.items()
    }
    checkpoints = {}
    own = Condition()
    for name, description in described.items():
        checkpoints[name] = {
            **description,
            "conditions": [
                {
                    "shuffle": condition.shuffle,
                    "frames": condition.frames,
                    "setting": str(condition),
                    "swapped": sum(pair.video not in (None, pair.clip) for pair in entry.pairs),
                    "metrics": _figures(entry, judged[name][own], resampled[name][condition], resampled[name][own]),
                    "gate": _gate_figures("gate", entry, judged[name][own], draws),
                    "entropy": _gate_figures("entropy", entry, judged[name][own], draws),
                    "clips": _clip_entries(entry, clips),
                }
                for condition, entry in judged[name].items()
            ],
        }
    cards = {name: card(entry, dataset, dataset_id) for name, entry in checkpoints.items()}
    return {
        **next(iter(cards.values())),
        "clips": len(clips),
        "with_picture": sum(clip.has_picture for clip in clips),
        "settings": settings,
        "checkpoints": checkpoints,
        "tests": _tests(judged, resampled),
        "references": {clip.id: clip.references for clip in clips},
    }


def _figures(
    entry: Judged, own: Judged, resampled: Mapping[str, np.ndarray], own_resampled: Mapping[str, np.ndarray]
) -> dict[str, dict[str, Any]]:
    """The metrics with their intervals, and their ratios to the values with matched videos."""
    figures = {}
    for name, statistic in entry.statistics.items():
        figures[name] = {"value": statistic.value, "interval": interval(resampled[name])}
        own_value = own.statistics[name].value
        if own_value:
            with np.errstate(divide="ignore", invalid="ignore"):
                retained = interval(resampled[name] / own_resampled[name])
            figures[name] |= {"retention": figures[name]["value"] / own_value, "retention_interval": retained}
    return figures


def _gate_figures(curve: str, entry: Judged, own: Judged, draws: np.ndarray) -> dict[str, Any] | None:
    """Means of gate or entropy with matched and swapped videos, and how well it separates the two."""
    swapped = np.array([pair.video not in (None, pair.clip) for pair in entry.pairs])
    matched = np.array([pair.video is not None and pair.video == pair.clip for pair in entry.pairs])
    values = np.array([getattr(caption, curve) for caption in entry.captions], dtype=float)
    if np.isnan(values).all():
        return None
    figures = {
        "matched": float(values[matched].mean()) if matched.any() else None,
        "swapped": float(values[swapped].mean()) if swapped.any() else None,
    }
    if swapped.any():
        before = np.array([getattr(caption, curve) for caption in own.captions])[swapped]
        after = values[swapped]
        # A wrong picture should close the gate and raise the entropy.
        high, low = (before, after) if curve == "gate" else (after, before)
        areas = roc_auc(high, low, draws[:, swapped])
        figures |= {
            "same_clips_matched": float(before.mean()),
            "auc": {"value": roc_auc(high, low), "interval": interval(areas)},
        }
    return figures


def _clip_entries(entry: Judged, clips: Sequence[TestedClip]) -> list[dict[str, Any]]:
    entries = []
    for place, (clip, pair, caption) in enumerate(zip(clips, entry.pairs, entry.captions, strict=True)):
        entries.append(
            {
                "id": clip.id,
                "video": None if pair.video is None else clips[pair.video].id,
                "caption": caption.text,
                "gate": caption.gate,
                "entropy": caption.entropy,
                "gate_over_time": caption.gate_over_time,
                "entropy_over_time": caption.entropy_over_time,
                "scores": {name: scores[place] for name, scores in entry.scores.items()},
            }
        )
    return entries


def _tests(
    judged: Mapping[str, Mapping[Condition, Judged]],
    resampled: Mapping[str, Mapping[Condition, Mapping[str, np.ndarray]]],
) -> list[dict[str, Any]]:
    """Paired bootstrap tests of every two checkpoints, under every condition of both, for every metric."""
    tests = []
    for first, second in itertools.combinations(judged, 2):
        for condition in judged[first]:
            if condition not in judged[second]:
                continue
            one, other = judged[first][condition].statistics, judged[second][condition].statistics
            for metric in one:
                if metric not in other:
                    continue
                differences = resampled[second][condition][metric] - resampled[first][condition][metric]
                tests.append(
                    {
                        "first": first,
                        "second": second,
                        "shuffle": condition.shuffle,
                        "frames": condition.frames,
                        "setting": str(condition),
                        "metric": metric,
                        "difference": other[metric].value - one[metric].value,
                        "interval": interval(differences),
                        "p": p_value(differences),
                    }
                )
    return tests


def card(checkpoint: Mapping[str, Any], dataset: str, dataset_id: str) -> dict[str, Any]:
    """The content of the `evaluation.json` in a model folder, from which its model card takes the results.

    Args:
        checkpoint (`Mapping`): One of the `checkpoints` of an evaluation.
        dataset (`str`): Name of the clips.
        dataset_id (`str`): Name of the clips on the Hub.
    """
    results = [
        {
            "setting": condition["setting"],
            "metrics": {
                METRIC_TITLES.get(name, name): figure["value"] for name, figure in condition["metrics"].items()
            },
        }
        for condition in checkpoint["conditions"]
    ]
    return {"dataset": dataset, "dataset_id": dataset_id, "results": results}

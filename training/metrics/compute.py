"""Caption metrics: those of the MS-COCO toolkit, with equal results, and those that need models from the user."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .java import find_java
from .meteor import meteor
from .ptb_tokenizer import tokenize, tokenize_without_java
from .spice import spice


METRICS = ("bleu", "meteor", "rouge_l", "cider_d", "spice", "spider")
METRIC_TITLES = {
    **{f"bleu_{order}": f"B{order}" for order in range(1, 5)},
    "meteor": "METEOR",
    "rouge_l": "ROUGE-L",
    "cider_d": "CIDEr",
    "spice": "SPICE",
    "spider": "SPIDEr",
    "spider_fl": "SPIDEr-FL",
    "fense": "FENSE",
    "fluency_error": "fluency errors",
}
"""The names of the metrics in the paper, in its order, and of those that need a model."""

# Metrics that need models from the user: a sentence encoder, an error detector, or both.
MODEL_METRICS = {
    "fense": ("sentence_encoder", "fluency_detector"),
    "fluency_error": ("fluency_detector",),
    "spider_fl": ("fluency_detector",),
}

# The share that FENSE subtracts for a caption with an error.
PENALTY = 0.9

# The path for `evaluate.load`.
EVALUATE_MODULE = str(Path(__file__).with_name("hub_module") / "caption_metrics.py")


def compute_metrics(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    metrics: Sequence[str] = METRICS,
    sentence_encoder: str | os.PathLike | None = None,
    fluency_detector: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """Scores captions with the metrics of the MS-COCO toolkit (`pycocoevalcap`), and optionally FENSE and SPIDEr-FL.

    All captions are tokenised once, by the Penn Treebank tokeniser; models read the original text. Metrics that cannot
    be computed on this machine are skipped, with the reason. Nothing is downloaded, and only temporary files and the
    parses of SPICE are written.

    BLEU and METEOR of a corpus come from counts over all clips. ROUGE-L, CIDEr-D, SPICE and SPIDEr are means over the
    clips. CIDEr-D weights words by how few clips have them in their references, so the score of a clip depends on the
    others, and a single clip scores 0. An empty caption scores 0, except for ROUGE-L with an empty reference, which is
    1.

    Args:
        predictions (`Sequence[str]`): One caption for each clip.
        references (`Sequence[Sequence[str]]`): One or more captions for each clip; their number may differ.
        metrics (`Sequence[str]`, *optional*, defaults to the toolkit's): Of `"bleu"` (1 to 4), `"meteor"`,
            `"rouge_l"`, `"cider_d"`, `"spice"` and `"spider"`, the mean of CIDEr-D and SPICE; and of `"fense"`,
            `"fluency_error"`, the share of captions with an error, and `"spider_fl"`, SPIDEr with FENSE's penalty.
        sentence_encoder (`str` or `os.PathLike`, *optional*): The folder of FENSE's, see
            [`~fense.sentence_similarities`].
        fluency_detector (`str` or `os.PathLike`, *optional*): The folder of FENSE's and SPIDEr-FL's, see
            [`~fense.fluency_errors`].

    Returns:
        `dict[str, Any]`:
        - `"corpus"`: `{name: float}` with the names above and `bleu_1` to `bleu_4`; from 0 to 1, but CIDEr-D from 0 to
          10, SPIDEr from 0 to 5.5 and FENSE from -1.
        - `"per_clip"`: `{name: list[float]}`, in the order of `predictions`.
        - `"counts"`: of `"meteor"` the 23 counts of each clip whose sums make the corpus score, for resampling.
        - `"skipped"`: `{name: reason}` of the `metrics` that are missing above: the extra `metrics` is not installed,
          there is no Java, a Java program failed, a model is missing. The reason says what to do.
        - `"tokenizer"`: `"ptb"`, or without Java `"built-in"`, which made the same tokens of every AudioCaps caption
          but may differ on others.

    Raises:
        ValueError: If there is no clip, `predictions` and `references` do not fit, a clip has no reference or a metric
            is unknown.
    """
    _check(predictions, references, metrics)
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider_scorer import CiderScorer
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError as error:
        reason = f"pycocoevalcap cannot be imported ({error}): pip install 'evacap[metrics]'"
        skipped = dict.fromkeys(metrics, reason)
        return {"corpus": {}, "per_clip": {}, "counts": {}, "skipped": skipped, "tokenizer": None}

    raw = predictions, references
    captions = [*predictions, *(reference for clip in references for reference in clip)]
    try:
        java = find_java()
        tokens, no_java = tokenize(captions, java), None
    except (RuntimeError, OSError) as error:
        tokens, no_java = tokenize_without_java(captions), str(error)
    remaining = iter(tokens)
    predictions = [next(remaining) for _ in predictions]
    references = [[next(remaining) for _ in clip] for clip in references]
    # The toolkit's form: lists of captions by clip.
    results, truths = {index: [text] for index, text in enumerate(predictions)}, dict(enumerate(references))

    scores, counts, skipped = {}, {}, {}
    needs_spider = not {"spider", "spider_fl"}.isdisjoint(metrics)
    if "bleu" in metrics:
        for order, corpus_and_clips in enumerate(zip(*Bleu(4).compute_score(truths, results, verbose=0)), start=1):
            scores[f"bleu_{order}"] = corpus_and_clips
    if "meteor" in metrics:
        try:
            if no_java:
                raise RuntimeError(no_java)
            *scores["meteor"], counts["meteor"] = meteor(predictions, references, java)
        except (RuntimeError, OSError) as error:
            skipped["meteor"] = str(error)
    if "rouge_l" in metrics:
        scores["rouge_l"] = Rouge().compute_score(truths, results)
    if "cider_d" in metrics or needs_spider:
        scorer = CiderScorer()
        for prediction, clip in zip(predictions, references):
            scorer += (prediction, clip)
        # The scorer's own `compute_score` trips where no reference has a word.
        scorer.compute_doc_freq()
        scores["cider_d"] = _mean(clips := scorer.compute_cider()), clips
    if "spice" in metrics or needs_spider:
        try:
            if no_java:
                raise RuntimeError(no_java)
            scores["spice"] = spice(predictions, references, java)
        except (RuntimeError, OSError) as error:
            skipped["spice"], skipped["spider"] = str(error), f"it needs SPICE: {error}"
    if not MODEL_METRICS.keys().isdisjoint(metrics):
        found, missing = _judge_by_models(*raw, metrics, sentence_encoder, fluency_detector)
        scores |= {name: (_mean(clips), clips) for name, clips in found.items()}
        skipped |= missing
    made = combine({name: clips for name, (_, clips) in scores.items()})
    scores |= {name: (_mean(clips), clips) for name, clips in made.items()}
    if "spider" in skipped:
        skipped["spider_fl"] = skipped["spider"]

    wanted = {*metrics, *(f"bleu_{order}" for order in range(1, 5) if "bleu" in metrics)}
    scores = {name: score for name, score in scores.items() if name in wanted}
    return {
        "corpus": {name: float(corpus) for name, (corpus, _) in scores.items()},
        "per_clip": {name: [float(score) for score in clips] for name, (_, clips) in scores.items()},
        "counts": counts,
        "skipped": {name: reason for name, reason in skipped.items() if name in wanted},
        "tokenizer": "built-in" if no_java else "ptb",
    }


def combine(per_clip: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """What follows from other scores of the clips, as far as those are there: SPIDEr and SPIDEr-FL."""
    made = {}
    if "cider_d" in per_clip and "spice" in per_clip:
        made["spider"] = [sum(pair) / 2 for pair in zip(per_clip["cider_d"], per_clip["spice"], strict=True)]
        if "fluency_error" in per_clip:
            made["spider_fl"] = penalise(made["spider"], per_clip["fluency_error"])
    return made


def penalise(scores: Sequence[float], errors: Sequence[float]) -> list[float]:
    """A tenth of the scores of captions that have an error (1, else 0): FENSE's penalty."""
    return [score * (1 - PENALTY * error) for score, error in zip(scores, errors, strict=True)]


def _judge_by_models(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    metrics: Sequence[str],
    sentence_encoder: str | os.PathLike | None,
    fluency_detector: str | os.PathLike | None,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """The scores of the clips that need a model, and the reasons for missing ones."""
    folders = {"sentence_encoder": sentence_encoder, "fluency_detector": fluency_detector}
    skipped = {}
    for name in MODEL_METRICS.keys() & set(metrics):
        missing = [model for model in MODEL_METRICS[name] if folders[model] is None]
        if missing:
            skipped[name] = f"it needs a model: give its folder as {' and '.join(missing)}"
    wanted = MODEL_METRICS.keys() & set(metrics) - skipped.keys()
    if not wanted:
        return {}, skipped
    # PyTorch and Transformers take seconds to import, which the other metrics do without.
    from .fense import fluency_errors, sentence_similarities

    try:
        scores = {"fluency_error": fluency_errors(predictions, fluency_detector)}
        if "fense" in wanted:
            similarities = sentence_similarities(predictions, references, sentence_encoder)
            scores["fense"] = penalise(similarities, scores["fluency_error"])
    except RuntimeError as error:
        return {}, skipped | dict.fromkeys(wanted, str(error))
    return scores, skipped


def _mean(scores: Sequence[float]) -> float:
    return sum(scores) / len(scores)


def _check(predictions: Sequence[str], references: Sequence[Sequence[str]], metrics: Sequence[str]) -> None:
    if isinstance(metrics, str) or not set(metrics) <= {*METRICS, *MODEL_METRICS}:
        raise ValueError(f"metrics must be a list of {', '.join((*METRICS, *MODEL_METRICS))}, found {metrics!r}")
    if len(predictions) != len(references) or not len(predictions):
        raise ValueError(
            f"predictions and references must hold one entry a clip, found {len(predictions)} and {len(references)}"
        )
    for index, (prediction, clip) in enumerate(zip(predictions, references)):
        if not isinstance(prediction, str):
            raise ValueError(f"predictions[{index}] must be one caption, found {prediction!r}")
        if isinstance(clip, str) or not clip or not all(isinstance(reference, str) for reference in clip):
            raise ValueError(f"references[{index}] must be a list of one or more captions, found {clip!r}")

"""The caption metrics of EVACap as a module of `evaluate`; `evacap` must be installed, for this file alone is copied."""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from evacap.training.metrics.compute import METRICS, MODEL_METRICS, compute_metrics


class CaptionMetrics(evaluate.Metric):
    """BLEU-1 to 4, METEOR, ROUGE-L, CIDEr-D, SPICE and SPIDEr, as `evacap.training.metrics.compute.compute_metrics` has them."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=compute_metrics.__doc__,
            citation="",
            inputs_description="predictions: one caption a clip; references: a list of captions a clip; metrics: "
            f"which to compute, by default {', '.join(METRICS)}; sentence_encoder, fluency_detector: the folders that "
            f"{', '.join(MODEL_METRICS)} need",
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Sequence(datasets.Value("string")),
                }
            ),
        )

    def _compute(
        self,
        predictions: Sequence[str],
        references: Sequence[Sequence[str]],
        metrics: Sequence[str] = METRICS,
        sentence_encoder: str | None = None,
        fluency_detector: str | None = None,
    ) -> dict[str, Any]:
        """The corpus scores by name, and `per_clip`, `skipped` and `tokenizer` beside them."""
        scores = compute_metrics(predictions, references, metrics, sentence_encoder, fluency_detector)
        return {**scores.pop("corpus"), **scores}

"""Model cards: the template `model_card.md`, filled from the files of a model folder."""

import itertools
import json
import os
import re
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.utils import validate_repo_id
from jinja2 import StrictUndefined, Template

from .modeling_evacap.configuration_evacap import EVACapConfig
from .modeling_evacap.language_model_evacap import captioner_class
from .modeling_evacap.presets import PRESETS
from .processing.captioning_evacap import reads_captions
from .processing.model_processor import load_processor, loading
from .processing.processing_evacap import EVACapProcessor
from .training.evaluation.tables import markdown_table


TRAINING_FILE = "training.json"
EVALUATION_FILE = "evaluation.json"
PIPELINE_TAG = "video-text-to-text"
"""The closest task of the Hub: a clip goes in, text comes out."""
_REQUIRED = {"license": str, "library_name": str, "pipeline_tag": str, "tags": list, "metrics": list}
_STREAMS = {
    "audio_only": "It listens and does not look at the picture.",
    "video_only": "It looks at the picture and does not listen.",
    "concat": "It listens and looks: the decoder reads the tokens of both streams.",
    "late_concat": "It listens and looks: the decoder reads the tokens of both streams.",
    "optimal_transport": "It listens and looks: the decoder reads the tokens of both streams, aligned by optimal transport.",
    "gated_cross_attention": "It listens, and looks where the picture fits.",
}
_ADAPTIVE = "It listens and looks, and weighs sound and picture for each word."


def fill_model_card(folder: str | os.PathLike, repo_id: str) -> ModelCard:
    """Fills the template for a model folder.

    Two optional files of the folder have what the configuration does not: `training.json`,
    `{"data": a sentence in Markdown, "datasets": [names on the Hub]}`, and `evaluation.json`,
    `{"dataset": its name, "dataset_id": its name on the Hub, "results": [{"setting": the condition,
    "metrics": {name: value}}]}`. The first result also goes to the metadata of the card. Their text is escaped: it cannot
    become a block of code, a table or metadata.

    Args:
        folder (`str` or `os.PathLike`): A model folder with its processor.
        repo_id (`str`): `ORG/NAME` on the Hub, for the example code.

    Returns:
        The card; `str(card)` is the text of a `README.md`.

    Raises:
        ValueError: If one of the two files does not have this form, or if `repo_id` is not a name.
    """
    folder = Path(folder)
    validate_repo_id(repo_id)
    with loading(folder):
        config = EVACapConfig.from_pretrained(folder)
    processor = load_processor(folder)
    name = repo_id.split("/")[-1]
    training = _read(folder / TRAINING_FILE, lambda file: (_text(file["data"]), _names(file["datasets"])))
    results = _read(folder / EVALUATION_FILE, lambda file: (_results_table(file), _eval_results(file)))
    values = _describe(config, processor) | {
        "repo_id": repo_id,
        "name": name,
        "training_data": training[0] if training else "Not stated.",
    }
    values = {name: _inline(value) if isinstance(value, str) else value for name, value in values.items()}
    # Its cells are escaped, its rows are its own.
    values["results"] = results[0] if results else ""
    card = ModelCard(_template().render(values))
    card.data.datasets = (training and training[1]) or None
    if results:
        card.data.model_name, card.data.eval_results = name, results[1]
    return card


def check_metadata(card: ModelCard, source: str) -> None:
    """Checks the metadata of a card for the Hub.

    Args:
        card (`ModelCard`): The card.
        source (`str`): Where it was read, for the message.

    Raises:
        ValueError: If a field is missing or wrong.
    """
    data = card.data.to_dict()
    for name, kind in _REQUIRED.items():
        if not isinstance(data.get(name), kind) or not data[name]:
            expected = "a list of words" if kind is list else "a word"
            raise ValueError(f"{source}: `{name}` is {data.get(name)!r} in its metadata, but it must be {expected}.")
    if data["library_name"] != "transformers":
        raise ValueError(f"{source}: `library_name` is {data['library_name']!r}, but it must be 'transformers'.")


def python_examples(text: str) -> str:
    """The Python code blocks of a card, joined."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE))


def example_code(repo_id: str, with_captions: bool = False) -> str:
    """The examples of the template for a repository, also for a model that reads captions of the streams.

    The text of a model folder has no part in them.
    """
    validate_repo_id(repo_id)
    return _template(python_examples).render(repo_id=repo_id, reads_captions=with_captions)


def _template(part: Callable[[str], str] = str) -> Template:
    """The template, or the part of it that `part` takes."""
    text = files(__package__).joinpath("model_card.md").read_text(encoding="utf-8")
    return Template(part(text), undefined=StrictUndefined, keep_trailing_newline=True)


def _inline(text: str) -> str:
    """Text as one paragraph of Markdown, with inline code at most: nothing in it can begin a block."""
    text = re.sub(r"\s+", " ", text).strip()
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    text = re.sub(r"`{3,}|~{3,}", lambda run: "".join(f"\\{character}" for character in run[0]), text)
    # A heading, a quotation, a list, a rule, a table.
    return re.sub(r"^(?:[#>+=|*-]|\d+[.)](?= ))", lambda start: f"{start[0][:-1]}\\{start[0][-1]}", text)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def _names(values: Any) -> list[str]:
    """Checks the names of datasets on the Hub."""
    if not isinstance(values, list):
        raise TypeError(f"{values!r} is not a list of names")
    for value in values:
        validate_repo_id(_text(value))
    return values


def _read(path: Path, extract: Callable[[Any], Any]) -> Any:
    """The result of `extract` on the content of a JSON file, or `None` if there is no such file."""
    if not path.exists():
        return None
    try:
        return extract(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: not of the form that `fill_model_card` describes ({type(error).__name__}: {error})."
        ) from error


def _describe(config: EVACapConfig, processor: EVACapProcessor) -> dict[str, Any]:
    with torch.device("meta"):
        parameters = captioner_class(config)(config).num_parameters()
    extractor, video = processor.feature_extractor, processor.video_processor
    fusion_type = config.fusion_type
    sampling = "uniformly over the clip" if video.frame_sampling == "uniform" else "from its middle"
    return {
        "variant": _variant(config),
        "decoder": "EVACap's own"
        if config.is_encoder_decoder
        else f"a language model, `{config.text_config.model_type}`",
        "streams": _ADAPTIVE if config.text_fusion == "adaptive" else _STREAMS[fusion_type],
        "parameters": f"{parameters / 1e6:.1f} M",
        "sound": (
            "not used"
            if fusion_type == "video_only"
            else f"{extractor.sampling_rate / 1000:g} kHz, {extractor.feature_size} mel bins, "
            f"{extractor.window_type} window, {processor.window_seconds:.2f} s"
        ),
        "picture": (
            "not used"
            if fusion_type == "audio_only"
            else f"{video.num_frames} frames {sampling}, {config.video_config.image_size} pixels"
        ),
        "window": f"{processor.window_seconds:.2f}",
        "caption_length": processor.max_text_length,
        "vocabulary_size": f"{config.text_config.get_text_config(decoder=True).vocab_size:,}",
        "gated": fusion_type == "gated_cross_attention" and config.gate_type != "none",
        "looks": fusion_type != "audio_only",
        "reads_captions": reads_captions(config),
    }


def _variant(config: EVACapConfig) -> str:
    enrichments = (config.enrichment, None)
    for enrichment, (name, preset) in itertools.product(enrichments, PRESETS.items()):
        row = preset.config()
        gate_counts = config.fusion_type == "gated_cross_attention"
        is_row = (row.fusion_type, row.text_fusion) == (config.fusion_type, config.text_fusion)
        if is_row and row.enrichment == enrichment and (not gate_counts or row.gate_type == config.gate_type):
            added = f", with `enrichment={config.enrichment!r}`" if enrichment != config.enrichment else ""
            return f"`{name}`: {preset.description}{added}"
    raise AssertionError(f"no preset has fusion_type={config.fusion_type!r} and gate_type={config.gate_type!r}")


def _results_table(evaluation: dict[str, Any]) -> str:
    names = list(dict.fromkeys(name for result in evaluation["results"] for name in result["metrics"]))
    rows = [
        [_cell(result["setting"]), *(_figure(result["metrics"].get(name)) for name in names)]
        for result in evaluation["results"]
    ]
    return "\n".join(markdown_table([_cell(evaluation["dataset"]), *map(_cell, names)], rows))


def _cell(text: Any) -> str:
    return _inline(_text(text))


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _eval_results(evaluation: dict[str, Any]) -> list[EvalResult]:
    first = evaluation["results"][0]
    return [
        EvalResult(
            task_type=PIPELINE_TAG,
            dataset_type=_names([evaluation["dataset_id"]])[0],
            dataset_name=_inline(evaluation["dataset"]),
            metric_type=_inline(name),
            metric_value=value,
        )
        for name, value in first["metrics"].items()
    ]

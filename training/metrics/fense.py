"""The parts of FENSE: the similarity of sentences and the detection of errors, by models in folders of the user.

FENSE (Zhou et al., "Can audio captions be evaluated with image caption metrics?", ICASSP 2022) is the similarity, reduced
by nine tenths for a caption with an error. The same penalty turns SPIDEr into SPIDEr-FL (DCASE 2023).
"""

import json
import os
import pickle
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


# The value of the paper and its code.
THRESHOLD = 0.9
MAX_DETECTOR_TOKENS = 64
BATCH_SIZE = 32


def sentence_similarities(
    predictions: Sequence[str], references: Sequence[Sequence[str]], folder: str | os.PathLike
) -> list[float]:
    """The cosine between the embeddings of each caption and of its references, mean over the references.

    Args:
        predictions (`Sequence[str]`): One original caption for each clip.
        references (`Sequence[Sequence[str]]`): One or more original captions for each clip.
        folder (`str` or `os.PathLike`): A sentence encoder of `sentence-transformers` that takes the mean over its
            tokens, such as the paper's `paraphrase-TinyBERT-L6-v2`. It is loaded by Transformers alone.

    Raises:
        RuntimeError: If the folder does not have such an encoder.
    """
    texts = list(dict.fromkeys([*predictions, *(text for clip in references for text in clip)]))
    embeddings = dict(zip(texts, _embed(texts, Path(folder)), strict=True))
    return [
        torch.stack([embeddings[prediction] @ embeddings[reference] for reference in clip]).mean().item()
        for prediction, clip in zip(predictions, references, strict=True)
    ]


def fluency_errors(captions: Sequence[str], folder: str | os.PathLike) -> list[float]:
    """Detects captions with an error, such as an unfinished end, a repetition or a missing word.

    Args:
        captions (`Sequence[str]`): The original captions; the detector reads them in lower case without punctuation.
        folder (`str` or `os.PathLike`): Configuration and tokenizer of the base model of FENSE's detector
            (`bert-base-uncased`), and the file of the detector, such as `echecker_clotho_audiocaps_base.ckpt`.

    Returns:
        For each caption 1 if the probability of an error is above 0.9, otherwise 0.

    Raises:
        RuntimeError: If the folder does not have these files.
    """
    folder = Path(folder)
    tokenizer, model, classifier = _load_detector(folder)
    texts = [re.sub(r"[^\w\s]", "", caption).lower() for caption in captions]
    probabilities = []
    for first in range(0, len(texts), BATCH_SIZE):
        hidden, _ = _encode(model, tokenizer, texts[first : first + BATCH_SIZE], MAX_DETECTOR_TOKENS)
        logits = hidden[:, 0] @ classifier["weight"].T + classifier["bias"]
        # The last class is an error of any kind.
        probabilities += logits[:, -1].sigmoid().tolist()
    return [float(probability > THRESHOLD) for probability in probabilities]


def _embed(texts: Sequence[str], folder: Path) -> torch.Tensor:
    """Embeddings of length 1: (texts, width)."""
    modules = _read_json(folder, "modules.json", [])
    pooling = _read_json(folder, "1_Pooling/config.json", {})
    others = {module["type"].split(".")[-1] for module in modules} - {"Transformer", "Pooling", "Normalize"}
    modes = {name for name, on in pooling.items() if name.startswith("pooling_mode_") and on}
    if others or modes - {"pooling_mode_mean_tokens"}:
        raise RuntimeError(
            f"{folder} is a sentence encoder with {', '.join(sorted(others | modes))}, expected the mean over tokens alone"
        )
    tokenizer, model = _load(folder, AutoModel.from_pretrained)
    longest = _read_json(folder, "sentence_bert_config.json", {}).get("max_seq_length")
    longest = longest or min(tokenizer.model_max_length, model.config.max_position_embeddings)
    embeddings = []
    for first in range(0, len(texts), BATCH_SIZE):
        part = [text.strip() for text in texts[first : first + BATCH_SIZE]]
        hidden, mask = _encode(model, tokenizer, part, longest)
        means = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        embeddings.append(torch.nn.functional.normalize(means).cpu())
    return torch.cat(embeddings)


def _load_detector(folder: Path) -> tuple[PreTrainedTokenizerBase, PreTrainedModel, dict[str, torch.Tensor]]:
    files = sorted(folder.glob("*.ckpt"))
    if len(files) != 1:
        raise RuntimeError(f"{folder} holds {len(files)} files *.ckpt, expected one: FENSE's detector of errors")
    tokenizer, model = _load(folder, _from_config)
    try:
        # Without running code that it may hold.
        weights = dict(torch.load(files[0], map_location="cpu", weights_only=True)["state_dict"])
        classifier = {name: weights.pop(f"clf.{name}").to(model.device) for name in ("weight", "bias")}
        # A buffer that older versions of Transformers saved.
        weights.pop("encoder.embeddings.position_ids", None)
        model.load_state_dict({name.removeprefix("encoder."): value for name, value in weights.items()})
    except (OSError, KeyError, TypeError, AttributeError, RuntimeError, pickle.UnpicklingError) as error:
        raise RuntimeError(
            f"{files[0]} is not a detector of FENSE, or does not fit the model beside it: {error}"
        ) from error
    return tokenizer, model, classifier


def _load(folder: Path, make: Callable[..., PreTrainedModel]) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    try:
        if not folder.is_dir():
            raise OSError("there is no such folder")
        # `None`, the default, would ask at the terminal whether to run code of the folder.
        options = {"local_files_only": True, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model = make(folder, **options)
    except (OSError, ValueError) as error:
        raise RuntimeError(f"{folder} cannot be loaded as a model and tokenizer of Transformers: {error}") from error
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return tokenizer, model.to(device).eval()


def _from_config(folder: Path, **options) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(folder, **options)
    return AutoModel.from_config(config, trust_remote_code=options["trust_remote_code"])


@torch.no_grad()
def _encode(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], longest: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The last hidden states (texts, tokens, width) and the mask of the tokens that are there (texts, tokens)."""
    inputs = tokenizer(list(texts), truncation=True, padding=True, max_length=longest, return_tensors="pt")
    inputs = inputs.to(model.device)
    return model(**inputs).last_hidden_state, inputs["attention_mask"]


def _read_json(folder: Path, name: str, default):
    path = folder / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else default

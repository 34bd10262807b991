"""FENSE and SPIDEr-FL by small random models, against their formulas, a caption at a time."""

import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizer

from evacap.training.metrics import compute
from evacap.training.metrics.compute import compute_metrics
from evacap.training.metrics.fense import fluency_errors, sentence_similarities


WORDS = "a dog barks loudly while rain falls on the roof and car passes by woman speaks ! , .".split()
PREDICTIONS = ["A dog barks!", "Rain falls on the roof, and a car passes by.", "A woman speaks and", "  A car  "]
REFERENCES = [
    ["A dog barks loudly", "The dog barks"],
    ["Rain falls", "A car passes by while rain falls on the roof", "Rain falls on a car"],
    ["A woman speaks"],
    ["A car", "A car passes by", "Rain"],
]


def save_bert(folder: Path, seed: int) -> BertModel:
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertModel(BertConfig(vocab_size=len(WORDS) + 5, initializer_range=0.5, **sizes)).eval()
    model.save_pretrained(folder)
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return model


def hidden_states(model: BertModel, folder: Path, text: str) -> torch.Tensor:
    """Of a caption without padding: (tokens, width)."""
    ids = BertTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
    with torch.no_grad():
        return model(input_ids=ids).last_hidden_state[0]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> tuple[Path, BertModel]:
    folder = tmp_path_factory.mktemp("models") / "encoder"
    model = save_bert(folder, seed=0)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    kinds = ["Transformer", "Pooling"]
    (folder / "modules.json").write_text(json.dumps([{"type": f"sentence_transformers.models.{k}"} for k in kinds]))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 128}')
    return folder, model


@pytest.fixture(scope="module")
def detector(tmp_path_factory) -> tuple[Path, BertModel, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("models") / "detector"
    model = save_bert(folder, seed=1)
    # The folder's own weights are those before the detector was trained.
    (folder / "model.safetensors").unlink()
    classifier = {"weight": 0.3 * torch.randn(6, 32), "bias": torch.zeros(6)}
    # So that two of the captions have an error, at either side of the threshold.
    logits = torch.tensor([logit_of(model, folder, classifier, text) for text in PREDICTIONS])
    classifier["bias"][-1] = torch.tensor(9.0).log() - logits.sort().values[1:3].mean()
    weights = {f"encoder.{name}": value for name, value in model.state_dict().items()}
    weights |= {f"clf.{name}": value for name, value in classifier.items()}
    weights["encoder.embeddings.position_ids"] = torch.arange(512)[None]
    checkpoint = {"model_type": "bert-base-uncased", "num_classes": 6, "state_dict": weights}
    torch.save(checkpoint, folder / "echecker_clotho_audiocaps_base.ckpt")
    return folder, model, classifier


def logit_of(model: BertModel, folder: Path, classifier: dict[str, torch.Tensor], caption: str) -> float:
    plain = caption.lower().replace("!", "").replace(",", "").replace(".", "")
    return (hidden_states(model, folder, plain)[0] @ classifier["weight"][-1] + classifier["bias"][-1]).item()


def expected_errors(detector) -> list[float]:
    folder, model, classifier = detector
    return [float(torch.tensor(logit_of(model, folder, classifier, t)).sigmoid() > 0.9) for t in PREDICTIONS]


def expected_similarities(encoder) -> list[float]:
    folder, model = encoder

    def embed(text: str) -> torch.Tensor:
        return hidden_states(model, folder, text).mean(0)

    return [
        sum(torch.cosine_similarity(embed(text), embed(reference), dim=0).item() for reference in clip) / len(clip)
        for text, clip in zip(PREDICTIONS, REFERENCES)
    ]


def test_the_parts(encoder, detector):
    similarities = expected_similarities(encoder)
    assert sentence_similarities(PREDICTIONS, REFERENCES, encoder[0]) == pytest.approx(similarities, abs=1e-5)
    assert max(similarities) - min(similarities) > 0.05
    errors = fluency_errors(PREDICTIONS, detector[0])
    assert errors == expected_errors(detector) and sum(errors) == 2
    # Both batch their texts.
    assert fluency_errors(PREDICTIONS * 20, detector[0]) == errors * 20


def test_fense_and_spider_fl(encoder, detector, monkeypatch):
    scores = iter([[0.2, 0.4, 0.6, 0.8]])
    monkeypatch.setattr(compute, "spice", lambda predictions, *_: (0.5, next(scores)))
    found = compute_metrics(
        PREDICTIONS, REFERENCES, ("fense", "fluency_error", "spider", "spider_fl"), encoder[0], detector[0]
    )
    errors = expected_errors(detector)
    clips = found["per_clip"]
    assert found["skipped"] == {} and clips["fluency_error"] == errors
    assert clips["fense"] == pytest.approx(
        [score * (0.1 if error else 1) for score, error in zip(expected_similarities(encoder), errors)], abs=1e-5
    )
    assert clips["spider_fl"] == pytest.approx(
        [score * (0.1 if error else 1) for score, error in zip(clips["spider"], errors)]
    )
    assert found["corpus"]["fense"] == pytest.approx(sum(clips["fense"]) / 4)
    assert found["corpus"]["fluency_error"] == 0.5


def test_what_is_missing_is_said(encoder, detector, tmp_path):
    scores = compute_metrics(PREDICTIONS, REFERENCES, ("rouge_l", "fense", "fluency_error"), None, detector[0])
    assert set(scores["corpus"]) == {"rouge_l", "fluency_error"}
    assert "give its folder as sentence_encoder" in scores["skipped"]["fense"]
    for wrong, message in (
        (tmp_path / "nowhere", "0 files \\*.ckpt"),
        (encoder[0], "holds 0 files"),
    ):
        with pytest.raises(RuntimeError, match=message):
            fluency_errors(PREDICTIONS, wrong)
    with pytest.raises(RuntimeError, match="nowhere cannot be loaded"):
        sentence_similarities(PREDICTIONS, REFERENCES, tmp_path / "nowhere")
    skipped = compute_metrics(PREDICTIONS, REFERENCES, ("fluency_error",), None, tmp_path)["skipped"]
    assert "expected one: FENSE's detector" in skipped["fluency_error"]


def test_another_pooling_and_another_file_are_refused(encoder, tmp_path):
    save_bert(tmp_path / "other", seed=2)
    (tmp_path / "other" / "1_Pooling").mkdir()
    (tmp_path / "other" / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    with pytest.raises(RuntimeError, match="pooling_mode_cls_token, expected the mean"):
        sentence_similarities(PREDICTIONS, REFERENCES, tmp_path / "other")
    torch.save({"state_dict": {"clf.weight": torch.zeros(6, 32)}}, tmp_path / "other" / "x.ckpt")
    with pytest.raises(RuntimeError, match="x.ckpt is not a detector of FENSE, or does not fit"):
        fluency_errors(PREDICTIONS, tmp_path / "other")


def test_a_folder_cannot_ask_to_run_its_code(encoder, tmp_path, monkeypatch):
    asked, trace = [], tmp_path / "trace"
    monkeypatch.setattr("builtins.input", lambda *text: asked.append(text) or "y")
    auto = dict.fromkeys(("AutoConfig", "AutoModel", "AutoTokenizer"), "evil.Evil")
    for name in ("config.json", "tokenizer_config.json"):
        folder = Path(shutil.copytree(encoder[0], tmp_path / name.removesuffix(".json")))
        content = {"model_type": "evil", "tokenizer_class": "Evil", "auto_map": auto}
        (folder / name).write_text(json.dumps(content))
        (folder / "evil.py").write_text(f"open({str(trace)!r}, 'w')")
        with suppress(RuntimeError, ValueError):
            sentence_similarities(["a dog"], [["a dog"]], folder)
    assert not asked and not trace.exists()

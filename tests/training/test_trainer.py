"""The plain trainers of Transformers, without a subclass."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from hub_server import hub_server
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoProcessor,
    EvalPrediction,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    pipeline,
)

import evacap
from evacap.training.metrics.compute import EVALUATE_MODULE
from evacap.training.procedural.dataset import ProceduralClips
from evacap.training.procedural.scenes import make_scene, write_clip
from evacap.training.tiny import tiny_config, tiny_processor


@pytest.fixture(scope="module")
def clips() -> list[dict]:
    clips = ProceduralClips(tiny_processor(), 6, "validation")
    return [clips[index] for index in range(6)]


def make_model(**fields) -> evacap.EVACapForConditionalGeneration:
    torch.manual_seed(0)
    return evacap.EVACapForConditionalGeneration(tiny_config(tiny_processor().tokenizer, **fields))


# What every run of these tests has in common.
PLAIN = {"remove_unused_columns": False, "report_to": "none", "save_strategy": "no", "use_cpu": True}


def test_generated_captions_reach_the_metrics(clips, tmp_path):
    """The bundled checkpoint's captions score well, those of fresh weights do not."""
    processor = AutoProcessor.from_pretrained(evacap.TINY)
    metrics = evaluate.load(EVALUATE_MODULE)

    def read(ids: np.ndarray) -> list[str]:
        return processor.batch_decode(
            np.where(ids < 0, processor.tokenizer.pad_token_id, ids), skip_special_tokens=True
        )

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        references = [[caption] for caption in read(prediction.label_ids)]
        scores = metrics.compute(
            predictions=read(prediction.predictions), references=references, metrics=["bleu", "cider_d"]
        )
        return {name: score for name, score in scores.items() if isinstance(score, float)}

    def evaluate_model(model) -> dict[str, float]:
        trainer = Seq2SeqTrainer(
            model,
            Seq2SeqTrainingArguments(
                str(tmp_path),
                per_device_eval_batch_size=4,
                predict_with_generate=True,
                generation_num_beams=2,
                **PLAIN,
            ),
            data_collator=evacap.EVACapDataCollator(p_mix=0.0),
            eval_dataset=clips,
            processing_class=processor,
            compute_metrics=compute_metrics,
        )
        return trainer.evaluate()

    bundled, fresh = evaluate_model(AutoModel.from_pretrained(evacap.TINY)), evaluate_model(make_model())
    assert 0 < bundled["eval_loss"] < fresh["eval_loss"]
    assert bundled["eval_bleu_1"] > 0.5 > fresh["eval_bleu_1"]
    assert bundled["eval_cider_d"] > fresh["eval_cider_d"]


def test_predictions_with_labels_hold_logits_alone(clips, tmp_path):
    """The cache and other fields of the output are not predictions: `Trainer` could not gather them."""
    trainer = Trainer(
        make_model(gate_stability_weight=1.0),
        TrainingArguments(str(tmp_path), per_device_eval_batch_size=4, **PLAIN),
        data_collator=evacap.EVACapDataCollator(p_mix=0.0),
    )
    prediction = trainer.predict(clips)
    assert isinstance(prediction.predictions, np.ndarray)
    assert prediction.predictions.shape == (*prediction.label_ids.shape, trainer.model.config.text_config.vocab_size)
    assert prediction.metrics["test_loss"] > 0


def make_plain_trainer(clips, folder, collator_options=(), loss=None, **arguments) -> Trainer:
    model = make_model().eval()
    return Trainer(
        model,
        TrainingArguments(str(folder), per_device_eval_batch_size=6, max_steps=1, **PLAIN, **arguments),
        data_collator=evacap.EVACapDataCollator(p_mix=0.0, **({"model": model} if collator_options else {})),
        train_dataset=clips,
        eval_dataset=clips,
        compute_loss_func=loss,
    )


def plain_loss(outputs, labels, num_items_in_batch=None):
    assert outputs.logits.shape[:2] == labels.shape and outputs.loss is None
    return torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("options", [{"label_smoothing_factor": 0.1}, {"loss": plain_loss}])
def test_a_loss_outside_of_the_model(clips, tmp_path, options):
    """`Trainer` keeps the labels; the decoder's input comes from the collator, if that knows the model."""
    trainer = make_plain_trainer(clips, tmp_path, collator_options=True, **options)
    batch = trainer.data_collator(clips)
    labels = batch["labels"]
    with torch.no_grad():
        logits = trainer.model(**batch).logits
    losses = -logits.log_softmax(-1)
    chosen = losses.gather(2, labels.clamp(min=0)[..., None])[..., 0]
    smoothing = options.get("label_smoothing_factor", 0.0)
    expected = ((1 - smoothing) * chosen + smoothing * losses.mean(-1))[labels != -100].mean().item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert trainer.train().training_loss > 0

    blind = make_plain_trainer(clips, tmp_path, **options)
    for run in (blind.train, blind.evaluate):
        with pytest.raises(ValueError, match=r"keeps the labels to itself.*EVACapDataCollator\(model=model\)"):
            run()


def test_the_decoders_input_is_not_taken_for_a_caption_so_far(clips, tmp_path):
    """Where captions are generated, too, they do not begin with the words that are to be found."""
    model = AutoModel.from_pretrained(evacap.TINY)
    captions = []
    for known in (None, model):
        arguments = Seq2SeqTrainingArguments(
            str(tmp_path), per_device_eval_batch_size=6, predict_with_generate=True, **PLAIN
        )
        collator = evacap.EVACapDataCollator(p_mix=0.0, model=known)
        captions.append(Seq2SeqTrainer(model, arguments, collator).predict(clips).predictions)
    assert np.array_equal(*captions)


def test_accumulated_batches_have_the_loss_of_one(clips, tmp_path):
    weights = []
    for batch_size, accumulation in ((6, 1), (2, 3)):
        model = make_model(gate_stability_weight=1.0)
        model.config.text_config.attention_probs_dropout_prob = 0.0
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trainer = Trainer(
            model,
            TrainingArguments(
                str(tmp_path),
                per_device_train_batch_size=batch_size,
                gradient_accumulation_steps=accumulation,
                max_steps=1,
                learning_rate=1e-2,
                optim="sgd",
                max_grad_norm=0.0,
                lr_scheduler_type="constant",
                **PLAIN,
            ),
            data_collator=evacap.EVACapDataCollator(p_mix=0.0),
            train_dataset=clips,
        )
        before = {name: value.clone() for name, value in model.named_parameters()}
        trainer.train()
        weights.append({name: value - before[name] for name, value in model.named_parameters()})
    total = torch.cat([change.flatten() for change in weights[0].values()])
    other = torch.cat([change.flatten() for change in weights[1].values()])
    assert total.norm() > 0
    # The caption loss is the same; the gate's is a mean of means, weighted by words instead of clips.
    assert (total - other).norm() < 0.02 * total.norm()


class StopAt(TrainerCallback):
    """Saves and ends a training at a step, as a limit of time would."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_resumed_training_ends_with_the_same_weights(clips, tmp_path, num_workers):
    def make_trainer(name: str, *callbacks) -> Trainer:
        model = make_model(gate_stability_weight=0.1, semantic_consistency_weight=0.1)
        arguments = TrainingArguments(
            str(tmp_path / name),
            per_device_train_batch_size=2,
            max_steps=7,
            learning_rate=1e-3,
            logging_steps=1,
            dataloader_num_workers=num_workers,
            **PLAIN,
        )
        collator = evacap.EVACapDataCollator(p_mix=0.5, keep_matched=True)
        return Trainer(model, arguments, collator, clips, processing_class=tiny_processor(), callbacks=[*callbacks])

    def losses(trainer: Trainer) -> list[float]:
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    whole = make_trainer("whole")
    whole.train()
    make_trainer("parts", StopAt(4)).train()  # within the second epoch
    resumed = make_trainer("parts")
    resumed.train(resume_from_checkpoint=True)
    assert len(losses(whole)) == 7 and losses(resumed) == losses(whole)
    expected = dict(whole.model.named_parameters())
    assert all(torch.equal(value, expected[name]) for name, value in resumed.model.named_parameters())

    checkpoint = tmp_path / "parts" / "checkpoint-4"
    assert type(AutoProcessor.from_pretrained(checkpoint)) is evacap.EVACapProcessor
    assert type(AutoModel.from_pretrained(checkpoint)) is evacap.EVACapForConditionalGeneration


REPO_ID = "somebody/toy"
TRAIN_AND_PUSH = f"""
    import sys
    import torch
    from transformers import AutoModel, AutoProcessor, Seq2SeqTrainer, Seq2SeqTrainingArguments
    import evacap

    processor = AutoProcessor.from_pretrained(evacap.TINY)
    inputs = processor(media=sys.argv[1], text="a dog barks", return_tensors="pt")
    clip = {{name: value[0] for name, value in inputs.items()}}
    arguments = Seq2SeqTrainingArguments(
        "trained",
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        report_to="none",
        use_cpu=True,
        remove_unused_columns=False,
        predict_with_generate=True,
        push_to_hub=True,
        hub_model_id="{REPO_ID}",
    )
    trainer = Seq2SeqTrainer(
        AutoModel.from_pretrained(evacap.TINY),
        arguments,
        evacap.EVACapDataCollator(),
        train_dataset=[clip] * 4,
        eval_dataset=[clip],
        processing_class=processor,
    )
    trainer.train()
    trainer.push_to_hub()
"""


@pytest.mark.slow
def test_a_trained_model_is_pushed_whole_and_without_a_warning(tmp_path):
    """The real client talks to a server of the test, in a process of its own, as it reads its address on import."""
    clip = tmp_path / "clip.mp4"
    write_clip(make_scene(0, "test", 0), clip)
    known = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    with hub_server() as (files, hub):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(TRAIN_AND_PUSH), str(clip)],
            env=known | hub | {"HF_HOME": str(tmp_path)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr.lower(), done.stderr

    assert not [name for name in files if "/" in name], "a Hub repository of a model is flat"
    assert files["README.md"].startswith(b"---")
    pushed = tmp_path / "pushed"
    pushed.mkdir()
    for name, content in files.items():
        (pushed / name).write_bytes(content)
    before = load_file(Path(evacap.TINY) / "model.safetensors")
    pushed_weights, trained = (load_file(tmp_path / name / "model.safetensors") for name in ("pushed", "trained"))
    assert all(torch.equal(pushed_weights[name], value) for name, value in trained.items())
    assert any(not torch.equal(before[name], value) for name, value in trained.items())
    assert {"modeling_evacap.py", "pipeline_evacap.py", "processing_evacap.py"} <= files.keys()
    assert pipeline(evacap.TASK, model=str(pushed))(str(clip))["text"]

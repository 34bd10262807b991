"""The plain trainers of Transformers, without a subclass."""

import numpy as np
import pytest
import torch
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

import evacap
from evacap.training.tiny import ProceduralClips, tiny_config, tiny_processor


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
    processor = tiny_processor()
    seen = {}

    def compute_metrics(prediction) -> dict[str, float]:
        seen["predictions"], seen["labels"] = prediction
        references = processor.batch_decode(np.where(seen["labels"] < 0, 0, seen["labels"]), skip_special_tokens=True)
        return {"words": float(np.mean([len(reference.split()) for reference in references]))}

    trainer = Seq2SeqTrainer(
        make_model(),
        Seq2SeqTrainingArguments(
            str(tmp_path),
            per_device_eval_batch_size=3,
            max_steps=2,
            predict_with_generate=True,
            generation_num_beams=2,
            **PLAIN,
        ),
        data_collator=evacap.EVACapDataCollator(p_mix=0.5),
        train_dataset=clips,
        eval_dataset=clips,
        processing_class=processor,
        compute_metrics=compute_metrics,
    )
    trainer.train()
    figures = trainer.evaluate()
    assert figures["eval_loss"] > 0 and figures["eval_words"] > 2
    assert seen["predictions"].shape[0] == seen["labels"].shape[0] == 6


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

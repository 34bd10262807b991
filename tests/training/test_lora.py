"""Adapters of `peft`: trained with Trainer, saved, loaded on the base model, merged into it."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel, AutoProcessor, Seq2SeqTrainer, Seq2SeqTrainingArguments

import evacap
from evacap.training.procedural.dataset import ProceduralClips


# Queries and values of both towers, of the joint block and of the decoder.
SELF_ATTENTION = r".*(audio_tower|video_tower|joint|decoder)\.layers\.\d+\.self_attn\.(q_proj|v_proj)"


@pytest.fixture(scope="module")
def processor() -> evacap.EVACapProcessor:
    return AutoProcessor.from_pretrained(evacap.TINY)


@pytest.fixture(scope="module")
def clips(processor) -> list[dict]:
    clips = ProceduralClips(processor, 6, "validation")
    return [clips[index] for index in range(6)]


def load_base(**fields) -> evacap.EVACapForConditionalGeneration:
    return AutoModel.from_pretrained(evacap.TINY, **fields)


def add_adapter(**fields) -> PeftModel:
    torch.manual_seed(0)  # an adapter is born at random
    return get_peft_model(
        load_base(**fields),
        # No `task_type`: that of sequence-to-sequence models passes on `input_ids`, which this one has not.
        LoraConfig(r=4, lora_alpha=8, target_modules=SELF_ATTENTION, modules_to_save=["fusion"]),
    )


def make_trainer(model: PeftModel, processor, clips, folder, **arguments) -> Seq2SeqTrainer:
    return Seq2SeqTrainer(
        model,
        Seq2SeqTrainingArguments(
            str(folder),
            per_device_train_batch_size=3,
            max_steps=4,
            learning_rate=3e-3,
            remove_unused_columns=False,
            predict_with_generate=True,
            report_to="none",
            use_cpu=True,
            **arguments,
        ),
        evacap.EVACapDataCollator(p_mix=0.5, keep_matched=True),
        train_dataset=clips,
        eval_dataset=clips,
        processing_class=processor,
    )


@pytest.fixture(scope="module")
def trained(processor, clips, tmp_path_factory) -> tuple[Seq2SeqTrainer, str]:
    folder = tmp_path_factory.mktemp("lora")
    model = add_adapter(semantic_consistency_weight=0.1, gate_stability_weight=0.1)
    trainer = make_trainer(model, processor, clips, folder / "run", save_strategy="no")
    trainer.train()
    trainer.save_model(folder / "adapter")
    model.eval()
    return trainer, str(folder / "adapter")


@torch.no_grad()
def logits(model, clips) -> torch.Tensor:
    return model(**evacap.EVACapDataCollator(p_mix=0)(clips)).logits


def test_the_pattern_reaches_both_towers_and_the_decoder():
    config = load_base().config
    model = add_adapter()
    adapted = {name.rpartition(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}
    for part, layers in (
        ("audio_tower", config.audio_config.num_hidden_layers),
        ("video_tower", config.video_config.num_hidden_layers),
        ("joint", config.num_joint_layers),
        ("decoder", config.text_config.num_hidden_layers),
    ):
        assert sum(f".{part}." in name for name in adapted) == 2 * layers
    trainable = sum(value.numel() for value in model.parameters() if value.requires_grad)
    assert trainable < 0.05 * load_base().num_parameters()


def test_adapter_and_fusion_are_trained_and_nothing_else(trained):
    trainer, _ = trained
    before, after = add_adapter().state_dict(), trainer.model.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert {name for name in changed if "lora_" not in name and "modules_to_save" not in name} == set()
    # `modules_to_save` takes modules: the gate's two scalars are trained with the fusion that they belong to.
    for scalar in ("gate_weight", "gate_bias"):
        assert any(name.endswith(f"fusion.modules_to_save.default.{scalar}") for name in changed)
    for part in ("audio_tower", "video_tower", "joint", "decoder"):
        assert any(f".{part}." in name and "lora_B" in name for name in changed)


def test_the_adapter_captions_and_is_evaluated(trained, clips):
    trainer, _ = trained
    figures = trainer.evaluate()
    assert figures["eval_loss"] > 0
    predictions = trainer.predict(clips).predictions
    batch = evacap.EVACapDataCollator(p_mix=0)(clips)
    generated = trainer.model.generate(
        input_features=batch["input_features"], pixel_values_videos=batch["pixel_values_videos"], num_beams=2
    )
    assert len(predictions) == len(generated) == len(clips)


def test_the_adapter_comes_back_on_the_base_model(trained, clips):
    trainer, folder = trained
    loaded = PeftModel.from_pretrained(load_base(), folder).eval()
    assert torch.equal(logits(loaded, clips), logits(trainer.model, clips))
    assert not torch.allclose(logits(loaded, clips), logits(load_base().eval(), clips), atol=1e-2)


def test_the_merged_model_is_the_adapter_and_a_plain_checkpoint(trained, processor, clips, tmp_path):
    _, folder = trained
    adapter = PeftModel.from_pretrained(load_base(), folder).eval()
    expected = logits(adapter, clips)
    merged = adapter.merge_and_unload()
    assert type(merged) is evacap.EVACapForConditionalGeneration
    torch.testing.assert_close(logits(merged, clips), expected, atol=1e-5, rtol=1e-5)

    merged.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert again.state_dict().keys() == load_base().state_dict().keys()
    torch.testing.assert_close(logits(again, clips), expected, atol=1e-5, rtol=1e-5)


def test_an_adapter_is_resumed(trained, processor, clips, tmp_path):
    whole, _ = trained
    fields = {"semantic_consistency_weight": 0.1, "gate_stability_weight": 0.1}
    make_trainer(add_adapter(**fields), processor, clips, tmp_path, save_steps=2).train()
    resumed = make_trainer(add_adapter(**fields), processor, clips, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    expected = dict(whole.model.named_parameters())
    assert all(torch.equal(value, expected[name]) for name, value in resumed.model.named_parameters())

"""A whole training step of LAVCap: towers, fusion, projector, language model, adapters, prompts, and every gradient."""

import re

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file

from evacap.modeling_evacap.configuration_evacap import EVACapConfig
from evacap.modeling_evacap.language_model_evacap import EVACapForCausalLM
from evacap.modeling_evacap.tower_weights import ced_state


CLIP, PAD = 41, 40
AUDIO = "audio_encoder.base_model.model."
LANGUAGE = "llama_decoder.base_model.model."
TOLERANCE = 1e-5


def our_name(name: str) -> str | None:
    """The name of a tensor of the reference in our model, adapters included; `None` for what it has no use for."""
    if name == "logit_scale":
        return "encoder.fusion.logit_scale"
    if name.startswith("speech_llama_proj."):
        return name.replace("speech_llama_proj", "multi_modal_projector")
    if name.startswith(LANGUAGE):
        return None if name.endswith("inv_freq") else f"language_model.{name.removeprefix(LANGUAGE)}"
    match = re.fullmatch(
        r"blocks\.(\d+)\.attn\.([qv]_proj)\.(lora_[AB]\.default\.weight|base_layer\.\w+)", name[len(AUDIO) :]
    )
    return match and f"encoder.audio_tower.layers.{match[1]}.self_attn.{match[2]}.{match[3]}"


def make_model(weights: dict[str, torch.Tensor], dtype: torch.dtype) -> EVACapForCausalLM:
    config = EVACapConfig(
        audio_config={"model_type": "ced", "embed_dim": 24, "depth": 2, "num_heads": 4, "target_length": 128},
        video_config={
            "model_type": "clip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 16,
            "projection_dim": 24,
        },
        text_config={
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 41,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        fusion_type="optimal_transport",
        audio_pooling="frequency",
        num_joint_layers=0,
        label_smoothing=0.0,
        prompt_ids=[1, 3, 4, CLIP, 5],
        clip_token_id=CLIP,
    )
    model = EVACapForCausalLM(config).to(dtype).eval()
    lora = LoraConfig(r=2, lora_alpha=8, target_modules=r".*(audio_tower|language_model)\..*\.(q_proj|v_proj)")
    model = inject_adapter_in_model(lora, model).to(dtype)
    tower = {
        name.removeprefix(AUDIO).replace(".base_layer", ""): value
        for name, value in weights.items()
        if name.startswith(AUDIO) and "lora" not in name
    }
    state = {f"encoder.audio_tower.{name}": value for name, value in ced_state(tower, 8)[0].items()}
    state = {
        re.sub(r"\.([qv]_proj)\.(weight|bias)$", r".\1.base_layer.\2", name): value for name, value in state.items()
    }
    state |= {our_name(name): value for name, value in weights.items() if our_name(name)}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all("video_tower" in name for name in missing)
    return model


@pytest.mark.parametrize("dtype", ["f64", "f32"])
def test_a_training_step_is_the_references(shared, dtype):
    known = load_file(shared("peers/lavcap/forward_small.safetensors"))
    known = {name.removeprefix(f"{dtype}/"): value for name, value in known.items() if name.startswith(f"{dtype}/")}
    weights = {name.removeprefix("weights/"): value for name, value in known.items() if name.startswith("weights/")}
    model = make_model(weights, known["logits"].dtype)

    # The reference's rows: begin, 2 words, 13 tokens of the clip, the instruction, the caption, padding. A shorter
    # instruction is padded behind, so that the first word of its caption is predicted from padding.
    counted = known["labels"] != -100
    start = int(counted.int().argmax(1)[0])
    ids = torch.cdist(known["inputs_embeds"], model.get_input_embeddings().weight).argmin(-1)
    prompts = torch.cat([ids[:, :3], torch.full((3, 1), CLIP), ids[:, 16:start]], dim=1)
    masks = torch.cat([torch.ones(3, 4).long(), known["attention_mask"][:, 16:start]], dim=1)
    labels = known["labels"][:, start:]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(
            "lora_" in name or name.startswith("multi_modal_projector") or name.endswith("logit_scale")
        )
    output = model(
        known["features"],
        video_features=known["video"],
        input_ids=prompts,
        attention_mask=masks,
        position_ids=torch.arange(known["labels"].shape[1] - 1).expand(3, -1),
        labels=labels,
    )

    def assert_equal(found, expected):
        assert (found.detach() - expected).abs().max() <= TOLERANCE * max(1.0, expected.abs().max())

    assert_equal(output.logits[labels != -100], known["logits"][:, start - 1 : -1][labels != -100])
    assert_equal(output.caption_loss, known["caption_loss"])
    assert_equal(output.transport_loss, known["ot_loss"])
    assert_equal(output.loss, known["loss"])
    output.loss.backward()
    gradients = dict(model.named_parameters())
    expected = {name.removeprefix("grad/"): value for name, value in known.items() if name.startswith("grad/")}
    assert len(expected) == 2 * 2 * 2 * 2 + 3
    for name, gradient in expected.items():
        assert_equal(gradients[our_name(name)].grad, gradient)

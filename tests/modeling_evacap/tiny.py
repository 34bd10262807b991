"""The tiny configuration that the model tests build on."""

import torch

from evacap.modeling_evacap.configuration_evacap import EVACapConfig


BATCH_SIZE, FRAMES, MEL_BINS, VIDEO_FRAMES, IMAGE_SIZE, VOCABULARY = 3, 64, 32, 4, 32, 99

ADAPTIVE = {"fusion_type": "concat", "num_joint_layers": 0, "text_fusion": "adaptive"}


def tiny_config(attention: str = "full", **kwargs) -> EVACapConfig:
    if kwargs.get("fusion_type") == "adaptive":
        kwargs |= ADAPTIVE
    tower = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return EVACapConfig(
        audio_config={**tower, "num_mel_bins": MEL_BINS, "max_frames": FRAMES},
        video_config={**tower, "image_size": IMAGE_SIZE, "num_frames": VIDEO_FRAMES, "attention": attention},
        text_config={
            **tower,
            "num_hidden_layers": 3,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        decoder_start_token_id=1,
        initializer_range=0.2,
        **kwargs,
    )


def tiny_inputs(video_frames: int = VIDEO_FRAMES, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_features": torch.randn(BATCH_SIZE, FRAMES, MEL_BINS, generator=generator),
        "pixel_values_videos": torch.randn(BATCH_SIZE, video_frames, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator),
    }


def tiny_labels(seed: int = 0) -> torch.Tensor:
    labels = torch.randint(3, VOCABULARY, (BATCH_SIZE, 7), generator=torch.Generator().manual_seed(seed))
    labels[:, -1] = 2
    labels[0, 4], labels[0, 5:] = 2, -100
    return labels


LANGUAGE_MODELS = {
    "llama": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True},
    "gemma3_text": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "tie_word_embeddings": True,
    },
    "smollm3": {"num_key_value_heads": 2},
    "gpt2": {"n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
"""Language models of the architectures that Transformers users have most, with what is special about them."""


def tiny_language_config(model_type: str = "llama", **kwargs) -> EVACapConfig:
    """The tiny configuration with LAVCap's fusion and a language model, whose prompt has words on both sides of the clip."""
    config = tiny_config(fusion_type="optimal_transport", audio_pooling="frequency", video_pooling="frame").to_dict()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "architectures"):
        config.pop(name)
    text = {
        "model_type": model_type,
        "hidden_size": 40,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": VOCABULARY,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **LANGUAGE_MODELS[model_type],
    }
    if model_type == "gpt2":
        names = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
        text = {names.get(name, name): value for name, value in text.items()}
    prompt = [1, 5, 6, VOCABULARY, 7, 8]
    return EVACapConfig.from_dict({**config, "text_config": text, "prompt_ids": prompt, **kwargs})

"""The tiny configuration that the model tests build on."""

import torch

from evacap.modeling_evacap.configuration_evacap import EVACapConfig


BATCH_SIZE, FRAMES, MEL_BINS, VIDEO_FRAMES, IMAGE_SIZE, VOCABULARY = 3, 64, 32, 4, 32, 99


def tiny_config(attention: str = "full", **kwargs) -> EVACapConfig:
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

"""A captioner from the encoder of another one and a pretrained language model."""

import os
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from .configuration_evacap import EVACapConfig
from .language_model_evacap import EVACapForCausalLM
from .modeling_evacap import EVACapEncoder


# Fields of a configuration that belong to the decoder it had before.
OF_THE_DECODER = (
    "text_config",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "decoder_start_token_id",
    "prompt_ids",
    "clip_token_id",
    "architectures",
    "auto_map",
    "is_encoder_decoder",
    "tie_word_embeddings",
    "dtype",
    "model_type",
    "transformers_version",
)


def with_language_model(
    encoder: EVACapEncoder, language_model: str | os.PathLike, prompt_ids: list[int], clip_token_id: int, **fields: Any
) -> EVACapForCausalLM:
    """Puts a pretrained language model behind an encoder, with a new projector between them.

    Args:
        encoder ([`EVACapEncoder`]): The encoder, such as that of `model_from_weights`; it becomes a part of the result.
        language_model (`str` or `os.PathLike`): A model that `AutoModelForCausalLM` loads without code of its own.
        prompt_ids (`list[int]`), clip_token_id (`int`): See [`EVACapConfig`]; `processor.prompt_ids()` makes them.
        fields: Further fields of [`EVACapConfig`].

    Returns:
        [`EVACapForCausalLM`], in evaluation mode, the language model in the precision of its weights.

    Raises:
        OSError, ValueError: If the language model cannot be loaded.
    """
    decoder = AutoModelForCausalLM.from_pretrained(language_model, dtype="auto", trust_remote_code=False)
    kept = {name: value for name, value in encoder.config.to_dict().items() if name not in OF_THE_DECODER}
    config = EVACapConfig(
        **{**kept, **fields, "text_config": decoder.config, "prompt_ids": prompt_ids, "clip_token_id": clip_token_id}
    )
    # A chat model ends its turn by more tokens than its configuration says.
    config.eos_token_id = decoder.generation_config.eos_token_id or config.eos_token_id
    with torch.device("meta"):
        model = EVACapForCausalLM(config)
    model.encoder, model.language_model = encoder, decoder
    model.multi_modal_projector = nn.Linear(*reversed(model.multi_modal_projector.weight.shape))
    return model.eval()

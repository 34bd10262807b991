"""A captioner from pretrained parts: an encoder or its towers, and a language model."""

import os
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from .configuration_evacap import EVACapConfig
from .import_weights import ImportReport, model_from_weights
from .language_model_evacap import EVACapForCausalLM
from .modeling_evacap import EVACapEncoder
from .presets import get_preset
from .tower_weights import load_ced, load_clip


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
    for part in model.children():
        # Heads that only training needs.
        if any(parameter.is_meta for parameter in part.parameters()):
            part.to_empty(device="cpu").apply(model._init_weights)
    return model.eval()


def encoder_from_weights(
    ced: str | os.PathLike | None = None,
    clip: str | os.PathLike | None = None,
    preset: str | None = None,
    num_frames: int | None = None,
    **sources: Any,
) -> tuple[EVACapEncoder, ImportReport]:
    """The encoder of a captioner with a language model.

    Args:
        ced (`str` or `os.PathLike`, *optional*), clip (`str` or `os.PathLike`, *optional*): See [`load_ced`] and
            [`load_clip`]; both, instead of `sources`.
        preset (`str`, *optional*, defaults to `"lavcap"`): A key of [`PRESETS`].
        num_frames (`int`, *optional*): Frames of a clip.
        sources: `avcap` or `cav_mae`, and other arguments of [`model_from_weights`].

    Returns:
        The encoder, and an [`ImportReport`] on it.

    Raises:
        ValueError: If the sources do not go together.
    """
    preset = preset or "lavcap"
    others = [name for name in ("avcap", "cav_mae") if sources.get(name) is not None]
    if sources.get("git") is not None or (ced is None) != (clip is None) or (ced is None) != bool(others):
        raise ValueError(
            "A captioner with a language model takes its encoder from `ced` and `clip`, or from `cav_mae` or `avcap`, and "
            "no `git`."
        )
    if ced is None:
        model, report = model_from_weights(preset=preset, num_frames=num_frames, **sources)
        for kind in ("loaded", "reshaped", "new"):
            names = getattr(report, kind)
            setattr(report, kind, [name.removeprefix("model.") for name in names if name.startswith("model.encoder.")])
        return model.get_encoder(), report
    audio, video = load_ced(ced), load_clip(clip, **({} if num_frames is None else {"num_frames": num_frames}))
    # One token a frame needs no pooling.
    config = get_preset(preset).config(audio_config=audio.config, video_config=video.config, video_pooling=None)
    encoder = EVACapEncoder(config)
    encoder.audio_tower, encoder.video_tower = audio, video
    report = ImportReport()
    for name, _ in encoder.named_parameters():
        (report.loaded if "_tower." in name else report.new).append(f"encoder.{name}")
    return encoder, report

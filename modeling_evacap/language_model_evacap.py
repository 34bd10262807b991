# Copyright 2026 The EVACap authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""EVACap with a causal language model of Transformers as its decoder (after LAVCap).

The encoder is the same as in `modeling_evacap.py`. A linear projector brings its tokens to the width of the language model,
which reads them in the middle of a prompt:

    prompt before · fused tokens · prompt after · caption
"""

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .configuration_evacap import EVACapConfig
from .contrast_evacap import EVACapContrastHead
from .modeling_evacap import (
    CACHE_FIELD,
    MAX_CAPTION_LENGTH,
    EVACapCaptioner,
    EVACapEncoder,
    EVACapEncoderOutput,
    EVACapForConditionalGeneration,
    EVACapSeq2SeqLMOutput,
    EVACapSeq2SeqModelOutput,
    encoder_fields,
    main_input_name,
    missing_stream,
    refuse_unknown,
)


STREAMS = (
    "input_features",
    "pixel_values_videos",
    "input_features_mask",
    "pixel_values_videos_mask",
    "video_features",
    "audio_caption_ids",
    "video_caption_ids",
)
# What a `quantization_config` leaves as it is: all but the language model, and of that the output layer, as usual.
NOT_QUANTIZED = ("encoder", "multi_modal_projector", "hearing_head", "contrast_head", "language_model.lm_head")
# What batches of a training hold besides, and `generate` has no use for.
ONLY_FOR_TRAINING = (
    "labels",
    "shuffled",
    "video_index",
    "matched_pixel_values_videos",
    "matched_pixel_values_videos_mask",
)


class EVACapForCausalLM(EVACapCaptioner, GenerationMixin):
    """The captioner with a language model: the encoder, a projector, and any model that `AutoModelForCausalLM` loads.

    It has the arguments and results of [`EVACapForConditionalGeneration`]: `labels` and captions hold the caption alone,
    without the prompt. `AutoModel` loads this class where `text_config` is the configuration of a language model.

    Example:
    ```python
    >>> from transformers import AutoModel, AutoProcessor
    >>> import evacap

    >>> processor, model = AutoProcessor.from_pretrained("lavcap"), AutoModel.from_pretrained("lavcap")
    >>> inputs = processor(media="clip.mp4", return_tensors="pt")
    >>> processor.batch_decode(model.generate(**inputs, num_beams=4), skip_special_tokens=True)
    ```
    """

    base_model_prefix = "model"
    _can_compile_fullgraph = False

    def __init__(self, config: EVACapConfig):
        if config.is_encoder_decoder:
            raise ValueError(
                "`text_config` is that of EVACap's own decoder, which is the one of EVACapForConditionalGeneration. "
                "`AutoModel` chooses the right class."
            )
        super().__init__(config)
        self.main_input_name = main_input_name(config)
        self.encoder = EVACapEncoder(config)
        text = config.text_config.get_text_config(decoder=True)
        self.multi_modal_projector = nn.Linear(config.encoder_config.hidden_size, text.hidden_size)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        if config.hearing_weight > 0:
            self.hearing_head = nn.Linear(2 * config.audio_config.hidden_size, text.hidden_size)
        if config.caption_contrast_weight > 0:
            self.contrast_head = EVACapContrastHead(config)
        # A checkpoint's generation_config.json takes precedence.
        self.generation_config.max_new_tokens = MAX_CAPTION_LENGTH
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, quantization_config: Any = None, **kwargs: Any) -> "EVACapForCausalLM":
        """As in every [`PreTrainedModel`]; a `quantization_config` that names no exceptions is for the language model alone.

        Encoder and projector are small, and LAVCap's are trained.
        """
        if quantization_config is not None:
            kwargs["quantization_config"] = quantization_config = copy.deepcopy(quantization_config)
            for name in ("modules_to_not_convert", "llm_int8_skip_modules"):
                if getattr(quantization_config, name, "") is None:
                    setattr(quantization_config, name, list(NOT_QUANTIZED))
        return super().from_pretrained(*args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """The encoder, or with `modality="audio"` or `"video"` one of its towers."""
        return self.encoder if modality is None else getattr(self.encoder, f"{modality}_tower")

    def get_decoder(self) -> PreTrainedModel:
        return self.language_model

    def embed_prompt(
        self,
        encoder_outputs: EVACapEncoderOutput,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        padding_to_left: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        r"""The embeddings of the prompt, with the tokens of the clip in the place of `clip_token_id`.

        Args:
            encoder_outputs ([`EVACapEncoderOutput`]): The encoded clips.
            input_ids (`torch.LongTensor` of shape `(batch_size, length)`, *optional*): Prompts, with `clip_token_id` once in
                each row; `prompt_ids` of the configuration by default.
            attention_mask (`torch.Tensor` of shape `(batch_size, length)`, *optional*): The tokens of the prompts that
                exist; all by default.
            padding_to_left (`bool`, *optional*, defaults to `True`): Whether what is missing of prompt or clip goes to the
                left, so that nothing is missing within a row.

        Returns:
            The embeddings (batch_size, length - 1 + T, hidden_size) and their mask (batch_size, length - 1 + T), long.

        Raises:
            ValueError: If a prompt does not have `clip_token_id` exactly once, or if there is another number of prompts than
                of clips.
        """
        clip = encoder_outputs.last_hidden_state
        batch_size, num_tokens = clip.shape[:2]
        embed_tokens = self.get_input_embeddings()
        device = embed_tokens.weight.device
        if input_ids is None:
            input_ids = torch.tensor([self.config.prompt_ids], device=device).expand(batch_size, -1)
        input_ids = input_ids.to(device)
        is_clip = input_ids == self.config.clip_token_id
        if len(input_ids) != batch_size or not (is_clip.sum(1) == 1).all():
            raise ValueError(
                f"`input_ids` has the shape {tuple(input_ids.shape)}, with `clip_token_id` ({self.config.clip_token_id}) "
                f"{is_clip.sum(1).tolist()} times in its rows, but there must be one prompt for each of the {batch_size} "
                "clips, with that id in it once. `processor(prompt=…)` makes such prompts."
            )
        text = embed_tokens(input_ids.masked_fill(is_clip, 0))
        text_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids)
        clip = self.multi_modal_projector(clip.to(self.multi_modal_projector.weight.dtype)).to(text)
        clip_mask = getattr(encoder_outputs, "attention_mask", None)
        clip_mask = text_mask.new_ones(batch_size, num_tokens) if clip_mask is None else clip_mask.to(text_mask)
        # Each row has the clip in a place of its own: column c comes from the text left of it, the clip, or the text behind.
        columns = torch.arange(input_ids.shape[1] - 1 + num_tokens, device=device)
        place = columns - is_clip.int().argmax(1, keepdim=True)
        from_clip = (place >= 0) & (place < num_tokens)
        text_index = torch.where(place < 0, columns, columns - num_tokens + 1).clamp(min=0, max=input_ids.shape[1] - 1)
        clip_index = place.clamp(0, num_tokens - 1)
        rows = torch.arange(batch_size, device=device)[:, None]
        embeds = torch.where(from_clip[..., None], clip[rows, clip_index], text[rows, text_index])
        mask = torch.where(from_clip, clip_mask[rows, clip_index], text_mask[rows, text_index])
        if not padding_to_left:
            return embeds, mask
        # Within a row it would shift the window of sliding attention.
        order = mask.argsort(dim=1, stable=True)
        return embeds[rows, order], mask[rows, order]

    @can_return_tuple
    def forward(
        self,
        input_features: torch.FloatTensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        pixel_values_videos_mask: torch.Tensor | None = None,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        encoder_outputs: EVACapEncoderOutput | tuple | None = None,
        labels: torch.LongTensor | None = None,
        shuffled: torch.Tensor | None = None,
        video_index: torch.Tensor | None = None,
        matched_pixel_values_videos: torch.FloatTensor | None = None,
        matched_pixel_values_videos_mask: torch.Tensor | None = None,
        video_features: torch.FloatTensor | None = None,
        audio_caption_ids: torch.LongTensor | None = None,
        video_caption_ids: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> EVACapSeq2SeqLMOutput:
        r"""Predicts the caption, and computes the loss if `labels` are given.

        Args:
            input_features (`torch.FloatTensor` of shape `(batch_size, frames, num_mel_bins)`): The sound.
            pixel_values_videos (`torch.FloatTensor` of shape `(batch_size, frames, channels, height, width)`,
                *optional*): The picture.
            input_features_mask (`torch.Tensor` of shape `(batch_size, frames)`, *optional*): Frames that exist.
            pixel_values_videos_mask (`torch.Tensor` of shape `(batch_size, frames)`, *optional*): Frames that exist; a row
                of zeros is a clip without a picture.
            input_ids (`torch.LongTensor` of shape `(batch_size, length)`, *optional*), attention_mask (`torch.Tensor` of
                shape `(batch_size, length)`, *optional*): See [`~EVACapForCausalLM.embed_prompt`].
            position_ids (`torch.LongTensor` of shape `(batch_size, total_length)`, *optional*): Positions of the prompt with
                the tokens of the clip, and of the caption without its last token; by default they count what exists. With
                them padding within a row stays in its place, where LAVCap's training has it.
            encoder_outputs ([`EVACapEncoderOutput`] or `tuple`, *optional*): The output of the encoder, if it was run
                before.
            labels (`torch.LongTensor` of shape `(batch_size, caption_length)`, *optional*): The caption with its end token,
                padded with -100. The loss is [`label_smoothed_kl`], of the caption alone.
            shuffled, video_index, matched_pixel_values_videos, matched_pixel_values_videos_mask, video_features: See
                [`EVACapForConditionalGeneration`].
            audio_caption_ids, video_caption_ids (`torch.LongTensor` of shape `(batch_size, length)`, *optional*): Ignored;
                clips that are prepared for a model with `enrichment="case"` have them.

        Returns:
            [`EVACapSeq2SeqLMOutput`], whose `logits` (batch_size, caption_length, vocab_size) belong to `labels`. Without
            `labels` there is one, that of the first token of the caption.
        """
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        refuse_unknown(self, kwargs)
        pairs, swapped = (
            {
                "pixel_values_videos": pixel_values_videos,
                "pixel_values_videos_mask": pixel_values_videos_mask,
            },
            None,
        )
        if labels is not None:
            pairs, swapped = self._pair(
                **pairs,
                matched_videos=(matched_pixel_values_videos, matched_pixel_values_videos_mask),
                shuffled=shuffled,
                video_index=video_index,
                is_encoded=encoder_outputs is not None,
            )
        captions = labels
        if swapped is not None:
            rows = pairs["audio_index"]
            captions, input_ids, attention_mask, position_ids = (
                None if given is None else given[rows] for given in (labels, input_ids, attention_mask, position_ids)
            )
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_features,
                input_features_mask=input_features_mask,
                video_features=video_features,
                **pairs,
                output_attentions=output_attentions,
                output_hidden_states=output_hidden_states,
                return_dict=True,
            )
        elif isinstance(encoder_outputs, tuple):
            encoder_outputs = EVACapEncoderOutput(last_hidden_state=encoder_outputs[0])

        embeds, mask = self.embed_prompt(encoder_outputs, input_ids, attention_mask, position_ids is None)
        num_logits = 1
        if captions is not None:
            captions, num_logits = captions.to(embeds.device), captions.shape[1]
            # The last token predicts nothing.
            words = self.get_input_embeddings()(captions[:, :-1].clamp(min=0))
            embeds = torch.cat([embeds, words.to(embeds.dtype)], dim=1)
            mask = torch.cat([mask, (captions[:, :-1] != -100).to(mask.dtype)], dim=1)
        outputs = self.language_model(
            inputs_embeds=embeds,
            attention_mask=mask,
            **self._known(
                position_ids=count_positions(mask) if position_ids is None else position_ids,
                logits_to_keep=num_logits,
            ),
            use_cache=bool(use_cache),
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        # Few models do not know `logits_to_keep`.
        logits = outputs.logits[:, -num_logits:]
        loss, terms = None, {}
        if labels is not None:
            fields = EVACapSeq2SeqModelOutput(**encoder_fields(encoder_outputs))
            logits, matched_logits = logits.split([len(labels), len(logits) - len(labels)])
            loss, terms = self._compute_loss(
                logits, matched_logits, labels, fields, swapped, shuffled, num_items_in_batch
            )
        return EVACapSeq2SeqLMOutput(
            loss=loss,
            logits=logits,
            **{CACHE_FIELD: outputs.get(CACHE_FIELD)},
            decoder_hidden_states=outputs.get("hidden_states"),
            decoder_attentions=outputs.get("attentions"),
            cross_attentions=encoder_outputs.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
            **terms,
        )

    def _known(self, **arguments: Any) -> dict[str, Any]:
        """Those of `arguments` that the language model knows."""
        model = self.language_model
        # An adapter of `peft` passes everything on.
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        parameters = inspect.signature(model.forward).parameters
        return {name: value for name, value in arguments.items() if name in parameters}

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_outputs: EVACapEncoderOutput | None = None,
        max_length: int | None = None,
        assistant_model: "EVACapForCausalLM | None" = None,
        **kwargs: Any,
    ) -> Any:
        r"""Generates captions by the language model's own `generate`: beams, sampling, streaming, any cache.

        The clips are encoded once. With several beams or sequences for a clip, the language model also reads its prompt
        once, and then repeats its keys and values; other caches than the dynamic one read it once for each.

        Args:
            inputs (`torch.Tensor`, *optional*): The main stream, `input_features` or `pixel_values_videos`.
            generation_config ([`GenerationConfig`], *optional*): By default the one of the checkpoint.
            input_ids, attention_mask: See [`~EVACapForCausalLM.embed_prompt`].
            encoder_outputs ([`EVACapEncoderOutput`], *optional*): The output of the encoder, if it was run before.
            max_length (`int`, *optional*): Length of a caption in tokens, as `max_new_tokens`.
            assistant_model ([`EVACapForCausalLM`], *optional*): A smaller one with the same vocabulary and prompt, for
                assisted decoding. It encodes the clips itself, from the same streams.
            kwargs: The streams, as in `forward`, and arguments of the language model's `generate`.

        Returns:
            The captions (batch_size * num_return_sequences, length), without the prompt, or a `ModelOutput` with them as
            `sequences` if `return_dict_in_generate` is set.

        Raises:
            ValueError: If the main stream is missing, if a prompt lacks the clip, or if the assistant does not fit.
        """
        streams = {name: kwargs.pop(name) for name in STREAMS if name in kwargs}
        for name in ONLY_FOR_TRAINING:
            kwargs.pop(name, None)
        if inputs is not None:
            streams[self.main_input_name] = inputs
        if max_length is not None and kwargs.get("max_new_tokens") is None:
            kwargs["max_new_tokens"] = max_length
        if encoder_outputs is None:
            if streams.get(self.main_input_name) is None:
                raise ValueError(missing_stream(self.config))
            encoder_outputs = self.encoder(**streams, return_dict=True)
        embeds, mask = self.embed_prompt(encoder_outputs, input_ids, attention_mask)
        config = copy.deepcopy(self.generation_config if generation_config is None else generation_config)
        # What is left are arguments of the model and of the loop.
        kwargs = config.update(**kwargs) | {"attention_mask": mask}
        if config.pad_token_id is None:
            end = config.eos_token_id
            config.pad_token_id = end[0] if isinstance(end, Sequence) else end
        copies = max(config.num_beams or 1, config.num_return_sequences or 1)
        given = any(kwargs.get(name) is not None for name in ("cache", "past_key_values"))
        if assistant_model is not None or config.prompt_lookup_num_tokens:
            return self._generate_assisted(embeds, input_ids, attention_mask, assistant_model, streams, config, kwargs)
        if copies > 1 and not (config.cache_implementation or given):
            kwargs |= self.read_prompt(embeds, mask, copies)
        return self.language_model.generate(inputs_embeds=embeds, generation_config=config, **kwargs)

    def read_prompt(self, embeds: torch.Tensor, mask: torch.Tensor, copies: int) -> dict[str, Any]:
        """The dynamic cache, as an argument of `generate`, after all of the prompt but its last token.

        Args:
            embeds (`torch.Tensor` of shape `(batch_size, length, hidden_size)`), mask (`torch.Tensor` of shape `(batch_size,
                length)`): The result of [`~EVACapForCausalLM.embed_prompt`].
            copies (`int`): Beams or sequences for each clip, which get a row each.

        Returns:
            `dict`: Empty for a language model with a cache of its own kind.
        """
        outputs = self.language_model(
            inputs_embeds=embeds[:, :-1],
            attention_mask=mask[:, :-1],
            **self._known(position_ids=count_positions(mask[:, :-1]), logits_to_keep=1),
            use_cache=True,
            return_dict=True,
        )
        cache = outputs.get(CACHE_FIELD)
        if not isinstance(cache, DynamicCache):
            return {}
        cache.batch_repeat_interleave(copies)
        return {CACHE_FIELD: cache}

    def _generate_assisted(
        self,
        embeds: torch.Tensor,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        assistant: "EVACapForCausalLM | None",
        streams: dict[str, Any],
        config: GenerationConfig,
        kwargs: dict[str, Any],
    ) -> Any:
        """Assisted decoding, which takes token ids alone: the embeddings of the prompt are put in their place."""
        length = embeds.shape[1]
        ids = torch.full(embeds.shape[:2], config.pad_token_id, device=embeds.device)
        with ExitStack() as stack:
            stack.enter_context(_prompt_in_place(self.language_model, embeds))
            if assistant is not None:
                if not isinstance(assistant, EVACapForCausalLM):
                    raise ValueError(
                        f"`assistant_model` is a {type(assistant).__name__}, but it must be an EVACapForCausalLM, so that it "
                        "has heard the clip."
                    )
                theirs, _ = assistant.embed_prompt(
                    assistant.encoder(**streams, return_dict=True), input_ids, attention_mask
                )
                if theirs.shape[1] != length:
                    raise ValueError(
                        f"`assistant_model` reads {theirs.shape[1]} tokens of clip and prompt, but this model {length}: they "
                        "must agree."
                    )
                stack.enter_context(_prompt_in_place(assistant.language_model, theirs))
                kwargs["assistant_model"] = assistant.language_model
            output = self.language_model.generate(ids, generation_config=config, **kwargs)
        if isinstance(output, torch.Tensor):
            return output[:, length:]
        output.sequences = output.sequences[:, length:]
        return output


def captioner_class(config: EVACapConfig) -> type[EVACapCaptioner]:
    """The class of the captioner with this configuration, which depends on its decoder."""
    return EVACapForConditionalGeneration if config.is_encoder_decoder else EVACapForCausalLM


def count_positions(mask: torch.Tensor) -> torch.Tensor:
    """The positions (batch_size, length) of the tokens that exist, counted from 0."""
    return (mask.cumsum(1) - 1).clamp(min=0)


@contextmanager
def _prompt_in_place(language_model: PreTrainedModel, embeds: torch.Tensor) -> Iterator[None]:
    """Gives the first tokens of a whole sequence the embeddings (batch_size, length, hidden_size) instead of their own."""

    def replace(module: nn.Module, arguments: tuple, output: torch.Tensor) -> torch.Tensor:
        # With the prompt in its cache the model gets the tokens behind it alone.
        if output.shape[1] < embeds.shape[1]:
            return output
        return torch.cat([embeds.to(output), output[:, embeds.shape[1] :]], dim=1)

    handle = language_model.get_input_embeddings().register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


__all__ = ["EVACapForCausalLM"]

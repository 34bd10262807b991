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
"""EVACap model configuration."""

from collections.abc import Iterable
from typing import Any

from transformers import CLIPVisionConfig, PreTrainedConfig

from .versions_evacap import warn_if_untested


# Every way to load a saved folder imports this module.
warn_if_untested()

FUSION_TYPES = ("gated_cross_attention", "concat", "late_concat", "optimal_transport", "audio_only", "video_only")
GATE_TYPES = ("entropy", "agreement", "learned", "none")
VIDEO_ATTENTION_TYPES = ("full", "frame")
AUDIO_POOLINGS = (None, "frequency")
VIDEO_POOLINGS = (None, "frame")
TRANSPORT_CONTEXTS = ("mass", "mean")
TEXT_FUSIONS = ("prefix", "adaptive")
LOSS_WEIGHTS = {
    "gate_stability": "gate_stability_weight",
    "matching_loss": "matching_weight",
    "heard_words": "hearing_weight",
    "caption_contrast": "caption_contrast_weight",
    "picture_entropy": "entropy_weight",
    "transport_loss": "ot_loss_weight",
    "semantic_consistency": "semantic_consistency_weight",
}
"""The terms of the loss beside the caption loss, by their names in the output of a captioner, with the fields of their weights."""
ENRICHMENTS = (None, "caste", "case")

# The classes of captioners, by their decoder: the one of GIT, or a language model.
SEQ2SEQ_CLASS, CAUSAL_CLASS = "EVACapForConditionalGeneration", "EVACapForCausalLM"

# The Auto class, besides `AutoModel`, and the pipeline of a saved folder with code. Not `AutoModelForMultimodalLM`, with
# which `pipeline("any-to-any")` would load the model and fail at every call.
GENERATION_AUTO_CLASSES = ("AutoModelForSeq2SeqLM",)
CUSTOM_PIPELINES = {
    "audio-visual-captioning": {
        "impl": "pipeline_evacap.AudioVisualCaptioningPipeline",
        "pt": ["AutoModel"],
        "type": "multimodal",
    }
}


def _require(condition: bool, field: str, value: Any, expected: str) -> None:
    if not condition:
        raise ValueError(f"`{field}` is {value!r}, but it must be {expected}.")


def _require_choice(field: str, value: Any, choices: Iterable[str]) -> None:
    _require(value in choices, field, value, "one of " + ", ".join(repr(choice) for choice in choices))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or isinstance(value, float)


class _TransformerConfig(PreTrainedConfig):
    """The common base of the configurations of towers and decoder: checks of the sizes of a Transformer stack."""

    def validate_sizes(self, *fields: str) -> None:
        """Raises a `ValueError` if one of `fields` is not a positive whole number."""
        name = self.base_config_key
        for field in fields:
            value = getattr(self, field)
            _require(_is_whole(value) and value > 0, f"{name}.{field}", value, "a whole number above 0")
        _require(
            self.hidden_size % self.num_attention_heads == 0,
            f"{name}.num_attention_heads",
            self.num_attention_heads,
            f"a divisor of `{name}.hidden_size` ({self.hidden_size})",
        )

    def validate_multiple(self, field: str, divisor: str) -> None:
        """Raises a `ValueError` if `field` is not a multiple of the field `divisor`."""
        name, value = self.base_config_key, getattr(self, field)
        expected = f"a multiple of `{name}.{divisor}` ({getattr(self, divisor)})"
        _require(value % getattr(self, divisor) == 0, f"{name}.{field}", value, expected)


_TOWER_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size")


class _TowerConfig(_TransformerConfig):
    """The common fields of the two towers, with CAV-MAE's values."""

    hidden_size: int = 768
    num_hidden_layers: int = 11
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    attention_dropout: float = 0.0
    layer_norm_eps: float = 1e-5
    qkv_bias: bool = True
    patch_size: int = 16
    initializer_range: float = 0.02


class EVACapAudioConfig(_TowerConfig):
    r"""Configuration of the audio tower: a pre-norm ViT over a log-mel filterbank (AVCap, after CAV-MAE).

    Args:
        hidden_size (`int`, defaults to 768): Width of the tower.
        num_hidden_layers (`int`, defaults to 11): Blocks of the tower, without the joint block.
        num_attention_heads (`int`, defaults to 12): Heads of each attention.
        intermediate_size (`int`, defaults to 3072): Width of the MLP.
        hidden_act (`str`, defaults to `"gelu"`): Activation of the MLP.
        attention_dropout (`float`, defaults to 0.0): Dropout of the attention probabilities.
        layer_norm_eps (`float`, defaults to 1e-5): Epsilon of the layer norms.
        qkv_bias (`bool`, defaults to `True`): Whether queries, keys and values have a bias.
        num_mel_bins (`int`, defaults to 128): Mel bins of the filterbank; a multiple of `patch_size`.
        max_frames (`int`, defaults to 1024): Filterbank frames that the position table covers; a multiple of
            `patch_size`. Other lengths interpolate the table along time.
        patch_size (`int`, defaults to 16): Side of a square patch, in mel bins and in frames.
        initializer_range (`float`, defaults to 0.02): Standard deviation of new weights.

    Raises:
        ValueError: If a field has an illegal value; the message has the field, its value and what is legal.
    """

    model_type = "evacap_audio"
    base_config_key = "audio_config"

    num_mel_bins: int = 128
    max_frames: int = 1024

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.validate_sizes(*_TOWER_SIZES, "num_mel_bins", "max_frames")
        self.validate_multiple("num_mel_bins", "patch_size")
        self.validate_multiple("max_frames", "patch_size")


class EVACapVideoConfig(_TowerConfig):
    r"""Configuration of the video tower: a pre-norm ViT over tubelets (AVCap, after CAV-MAE).

    Args:
        hidden_size (`int`, defaults to 768): Width of the tower.
        num_hidden_layers (`int`, defaults to 11): Blocks of the tower, without the joint block.
        num_attention_heads (`int`, defaults to 12): Heads of each attention.
        intermediate_size (`int`, defaults to 3072): Width of the MLP.
        hidden_act (`str`, defaults to `"gelu"`): Activation of the MLP.
        attention_dropout (`float`, defaults to 0.0): Dropout of the attention probabilities.
        layer_norm_eps (`float`, defaults to 1e-5): Epsilon of the layer norms.
        qkv_bias (`bool`, defaults to `True`): Whether queries, keys and values have a bias.
        image_size (`int`, defaults to 224): Height and width of a frame in pixels; a multiple of `patch_size`.
        num_channels (`int`, defaults to 3): Colour channels.
        num_frames (`int`, defaults to 18): Frames that the position table covers; a multiple of `tubelet_size`. Other
            lengths interpolate the table along time.
        tubelet_size (`int`, *optional*): Frames of a tubelet; 2 by default, 1 where `num_frames` is 1.
        patch_size (`int`, defaults to 16): Side of a square patch in pixels.
        attention (`str`, defaults to `"full"`): `"full"`: all tokens of a clip see each other (AVCap). `"frame"`: only
            the tokens of one tubelet do, so the cost grows linearly with the number of frames (ours).
        initializer_range (`float`, defaults to 0.02): Standard deviation of new weights.

    Raises:
        ValueError: If a field has an illegal value; the message has the field, its value and what is legal.
    """

    model_type = "evacap_video"
    base_config_key = "video_config"

    image_size: int = 224
    num_channels: int = 3
    num_frames: int = 18
    tubelet_size: int | None = None
    attention: str = "full"

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.tubelet_size is None:
            self.tubelet_size = 1 if self.num_frames == 1 else 2
        self.validate_sizes(*_TOWER_SIZES, "image_size", "num_channels", "num_frames", "tubelet_size")
        self.validate_multiple("image_size", "patch_size")
        self.validate_multiple("num_frames", "tubelet_size")
        _require_choice("video_config.attention", self.attention, VIDEO_ATTENTION_TYPES)


class EVACapCEDConfig(_TowerConfig):
    r"""Configuration of CED as audio tower (Dinkel et al., 2023), with the names of its port to Transformers.

    Args:
        embed_dim (`int`, defaults to 768): Width of the tower; also `hidden_size`.
        depth (`int`, defaults to 12): Blocks; also `num_hidden_layers`.
        num_heads (`int`, defaults to 12): Heads of each attention; also `num_attention_heads`.
        mlp_ratio (`float`, defaults to 4.0): Width of the MLP, relative to `embed_dim`.
        n_mels (`int`, defaults to 64): Mel bins of the filterbank; also `num_mel_bins`.
        target_length (`int`, defaults to 1012): Filterbank frames that the position table covers; also `max_frames`.
            Shorter sounds use the beginning of the table.
        patch_size (`int`, defaults to 16): Side of a square patch, in mel bins and in frames.
        qkv_bias (`bool`, defaults to `True`): Whether queries, keys and values have a bias.
        attn_drop_rate (`float`, defaults to 0.0): Dropout of the attention probabilities; also `attention_dropout`.
        layer_norm_eps (`float`, defaults to 1e-6): Epsilon of the layer norms.
        initializer_range (`float`, defaults to 0.02): Standard deviation of new weights.
        hidden_act (`str`, defaults to `"gelu"`): Activation of the MLP.

    Raises:
        ValueError: If a field has an illegal value; the message has the field, its value and what is legal.
    """

    model_type = "ced"
    base_config_key = "audio_config"
    attribute_map = {
        "embed_dim": "hidden_size",
        "depth": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "n_mels": "num_mel_bins",
        "target_length": "max_frames",
        "attn_drop_rate": "attention_dropout",
    }

    num_hidden_layers: int = 12
    intermediate_size: int | None = None
    mlp_ratio: float = 4.0
    num_mel_bins: int = 64
    max_frames: int = 1012
    layer_norm_eps: float = 1e-6

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.intermediate_size is None:
            self.intermediate_size = int(self.mlp_ratio * self.hidden_size)
        self.validate_sizes(*_TOWER_SIZES, "num_mel_bins", "max_frames")
        self.validate_multiple("num_mel_bins", "patch_size")


class EVACapCLIPConfig(CLIPVisionConfig):
    r"""Configuration of a CLIP vision model as video tower, which gives one projected vector for each frame (LAVCap).

    Args:
        num_frames (`int`, defaults to 20): Frames of a clip; other numbers are as good.
        kwargs: The fields of [`CLIPVisionConfig`], of which `projection_dim` is the width of the tokens.

    Raises:
        ValueError: If a field has an illegal value; the message has the field, its value and what is legal.
    """

    base_config_key = "video_config"

    num_frames: int = 20
    tubelet_size: int = 1

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        for field in ("num_frames", "projection_dim"):
            value = getattr(self, field)
            _require(_is_whole(value) and value > 0, f"video_config.{field}", value, "a whole number above 0")
        _require(
            self.tubelet_size == 1, "video_config.tubelet_size", self.tubelet_size, "1, as CLIP sees single frames"
        )


class EVACapTextConfig(_TransformerConfig):
    r"""Configuration of the decoder: a GIT-style prefix language model of post-norm BERT layers (AVCap, after GIT).

    Args:
        vocab_size (`int`, defaults to 30522): Entries of the vocabulary (BERT uncased WordPiece).
        hidden_size (`int`, defaults to 768): Width of the decoder.
        num_hidden_layers (`int`, defaults to 6): Layers.
        num_attention_heads (`int`, defaults to 12): Heads of each attention.
        intermediate_size (`int`, defaults to 3072): Width of the MLP.
        hidden_act (`str`, defaults to `"gelu"`): Activation of the MLP.
        hidden_dropout_prob (`float`, defaults to 0.1): Dropout of embeddings, attention outputs and MLP outputs.
        attention_probs_dropout_prob (`float`, defaults to 0.1): Dropout of the attention probabilities.
        max_position_embeddings (`int`, defaults to 1024): Text positions; the prefix has none.
        layer_norm_eps (`float`, defaults to 1e-12): Epsilon of the layers' layer norms.
        embedding_layer_norm_eps (`float`, defaults to 1e-8): Epsilon of the word embeddings' layer norm.
        prefix_layer_norm_eps (`float`, defaults to 1e-5): Epsilon of the prefix projection's layer norm.
        initializer_range (`float`, defaults to 0.02): Standard deviation of new weights.
        pad_token_id (`int`, defaults to 0): `[PAD]`.
        bos_token_id (`int`, defaults to 101): `[CLS]`, which starts a caption.
        eos_token_id (`int`, defaults to 102): `[SEP]`, which ends a caption.
        num_prompt_tokens (`int`, defaults to 0): Learned vectors that the text reads behind the tokens of the clip, with
            `text_fusion="prefix"` (prefix tuning, as in DALI).
        use_cache (`bool`, defaults to `True`): Whether decoding keeps keys and values.

    Raises:
        ValueError: If a field has an illegal value; the message has the field, its value and what is legal.
    """

    model_type = "evacap_text"
    base_config_key = "text_config"

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 1024
    layer_norm_eps: float = 1e-12
    embedding_layer_norm_eps: float = 1e-8
    prefix_layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    pad_token_id: int | None = 0
    bos_token_id: int | None = 101
    eos_token_id: int | list[int] | None = 102
    num_prompt_tokens: int = 0
    use_cache: bool = True

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.validate_sizes(
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
        )
        number = self.num_prompt_tokens
        _require(
            _is_whole(number) and number >= 0, "text_config.num_prompt_tokens", number, "a whole number from 0 up"
        )


# Towers of other projects, besides those of AVCap.
OTHER_TOWERS = {"audio_config": (EVACapCEDConfig,), "video_config": (EVACapCLIPConfig,)}


def _sub_config(key: str, value: Any, config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """The configuration of a part, from a dict, from `None`, or as it is."""
    if value is None:
        return config_class()
    classes = {known.model_type: known for known in (config_class, *OTHER_TOWERS.get(key, ()))}
    if not isinstance(value, dict):
        is_one = isinstance(value, PreTrainedConfig)
        known = is_one and (value.model_type in classes or key == "text_config" and _is_causal(value))
        _require(known, key, value, f"a dict or an {config_class.__name__}")
        return value
    model_type = value.get("model_type", config_class.model_type)
    if model_type in classes:
        return classes[model_type](**value)
    expected = " or ".join(map(repr, classes))
    if key == "text_config":
        # Imported here because it takes time, and most models have no language model.
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            return CONFIG_MAPPING[model_type](**value)
        expected += ", or that of a model that AutoModelForCausalLM loads, such as 'llama'"
    return _require(False, f"{key}.model_type", model_type, expected)


def _is_causal(config: PreTrainedConfig) -> bool:
    """Whether a configuration belongs to a language model, and not to a part of EVACap."""
    return not isinstance(config, (_TowerConfig, CLIPVisionConfig))


class EVACapConfig(PreTrainedConfig):
    r"""Configuration of [`EVACapForConditionalGeneration`] and [`EVACapForCausalLM`]. The defaults are the paper's EVACap.

    Args:
        audio_config (`dict`, [`EVACapAudioConfig`] or [`EVACapCEDConfig`], *optional*): The audio tower;
            `{"model_type": "ced"}` is CED.
        video_config (`dict`, [`EVACapVideoConfig`] or [`EVACapCLIPConfig`], *optional*): The video tower;
            `{"model_type": "clip_vision_model"}` is a CLIP.
        text_config (`dict` or [`PreTrainedConfig`], *optional*): The decoder: an [`EVACapTextConfig`], or the
            configuration of any model that `AutoModelForCausalLM` loads, such as `{"model_type": "llama", …}`. The model
            is then an [`EVACapForCausalLM`].
        fusion_type (`str`, defaults to `"gated_cross_attention"`): `"gated_cross_attention"` (EVACap), `"concat"`
            (AVCap: the joint block and the decoder see audio and video tokens), `"late_concat"` (DALI: each stream has
            joint blocks of its own, and the decoder sees the tokens of both, video first), `"optimal_transport"`
            (LAVCap: joint block and decoder see the tokens of both, aligned by optimal transport), `"audio_only"` or
            `"video_only"`.
        gate_type (`str`, defaults to `"entropy"`): The gate of `"gated_cross_attention"`: `"entropy"` (paper,
            equations 2 and 3), `"agreement"` (the entropy's where a matching head says that the picture belongs to the
            sound, else exactly 0: ours), `"learned"` (a linear gate on audio and context: the paper's "w/o E") or
            `"none"` (the context replaces the audio: the paper's "w/o G").
        num_joint_layers (`int`, defaults to 1): Blocks after the fusion (AVCap: 12 - 11). With `"optimal_transport"`, 0
            also leaves out the norm behind them (LAVCap).
        audio_pooling (`str`, *optional*): `"frequency"` averages the audio tokens of each time step over its mel rows
            before the fusion (LAVCap). By default all tokens are kept.
        video_pooling (`str`, *optional*): `"frame"` averages the video tokens of each tubelet before the fusion. By
            default all tokens are kept.
        enrichment (`str`, *optional*): Enriches the tokens of both streams before the fusion (CAE-AV): `"caste"` by their
            agreement ([`EVACapCASTEBlock`]), `"case"` by a caption of each, which the model then takes beside sound and
            picture ([`EVACapCASEBlock`]). Both are initially without effect. By default the tokens stay as they are.
        enrichment_hidden_size (`int`, defaults to 128): Width in which `"caste"` compares the streams (CAE-AV), and to which
            `"case"` narrows the words of the captions (there 48).
        ot_epsilon (`float`, defaults to 0.1): Entropic regularisation of `"optimal_transport"` (LAVCap).
        ot_iterations (`int`, defaults to 50): Rounds of Sinkhorn's algorithm (LAVCap).
        ot_attention (`bool`, defaults to `True`): Whether tokens take over what the transport plan assigns to them
            (LAVCap's OT-Att). Without it the plan serves the loss alone.
        ot_context (`str`, defaults to `"mass"`): `"mass"`: by the mass of the plan, so that a token changes by at most
            one part in the number of tokens of its stream (as published). `"mean"`: by a mean over the other stream
            (ours).
        ot_loss_weight (`float`, defaults to 1.0): Weight of [`transport_loss`] (LAVCap). 0 costs nothing.
        ot_use_log (`bool`, defaults to `True`): Whether that loss reads the logarithm of the plan (as published) or the
            plan.
        text_fusion (`str`, defaults to `"prefix"`): How the decoder reads the encoded clip. `"prefix"`: as a prefix of the
            caption (GIT, AVCap). `"adaptive"`: sound and picture as two memories, each weighed for each text token by a
            confidence that comes from the text ([`EVACapAdaptiveAttention`]: ours, after the idea of V-ACT); it needs
            `fusion_type="concat"` and no joint blocks, which would mix the two.
        gate_weight_init (`float`, defaults to -4.0): Initial weight w_g of the entropy gate (ours: negative, because
            high entropy should close the gate).
        gate_bias_init (`float`, defaults to 4.0): Initial bias b_g of the entropy gate (ours: the gate is half open for
            uniform attention and nearly open for sharp attention).
        label_smoothing (`float`, defaults to 0.1): Probability spread over the other classes (AVCap).
        gate_stability_weight (`float`, defaults to 0.0): Weight of the mean squared difference between the gates of
            neighbouring audio time steps (the paper names the term, the formula is ours). 0 costs nothing.
        semantic_consistency_weight (`float`, defaults to 0.0): Weight of KL(p(y|a,v) ‖ p(y|a,v̂)) over the samples
            whose video was swapped (the paper names the term, the formula is ours). 0 costs nothing.
        matching_weight (`float`, defaults to 0.0): Weight of [`match_in_batch`], by which the head of
            `gate_type="agreement"` learns to tell own pictures from those of the batch (ours). With 0 nobody tells it:
            its probability is then a factor of the gate, and learned from the captions alone.
        matching_hidden_size (`int`, defaults to 128): Width of that head.
        hearing_weight (`float`, defaults to 0.0): Weight of [`heard_words`], by which the audio tower learns to tell the
            words of the caption without the picture (ours). 0 costs nothing.
        caption_contrast_weight (`float`, defaults to 0.0): Weight of [`caption_contrast`], by which the sound and the
            picture of a clip are told from those of the other clips of a batch by its caption (CAE-AV names the term, the
            formula is ours). 0 costs nothing.
        entropy_weight (`float`, defaults to 0.0): Weight of [`picture_entropy`], by which the fusion's attention to own
            pictures becomes sharp, and to swapped ones uniform (CAE-AV names the term, the formula is ours). 0 costs
            nothing.
        agreement_temperature (`float`, defaults to 1.0): Divides the head's logits before they become probabilities;
            fitted on validation clips, it makes them frequencies.
        agreement_threshold (`float`, defaults to 0.5): The probability below which the gate of an audio time step is 0.
        pad_token_id (`int`, *optional*), bos_token_id (`int`, *optional*), eos_token_id (`int`, *optional*):
            `text_config`'s by default.
        decoder_start_token_id (`int`, *optional*): The token before a caption; `bos_token_id` by default.
        prompt_ids (`list[int]`, *optional*): With a language model: the token ids of its prompt, among them
            `clip_token_id` once, in whose place it reads the fused tokens. By default it reads `bos_token_id`, if there
            is one, and the fused tokens.
        clip_token_id (`int`, *optional*): With a language model: the id that stands for the clip in a prompt, by
            default the first one after the vocabulary.
        initializer_range (`float`, defaults to 0.02): Standard deviation of new weights outside the three parts.

    Raises:
        ValueError: If a field has an illegal value; the message has the field, its value and what is legal.

    Example:
    ```python
    >>> from evacap import EVACapConfig, EVACapForConditionalGeneration

    >>> config = EVACapConfig(video_config={"num_frames": 8}, gate_type="learned")
    >>> model = EVACapForConditionalGeneration(config)
    ```
    """

    model_type = "evacap"
    sub_configs = {
        "audio_config": EVACapAudioConfig,
        "video_config": EVACapVideoConfig,
        "text_config": EVACapTextConfig,
    }
    keys_to_ignore_at_inference = [
        "cache",
        "past_key_values",
        "encoder_last_hidden_state",
        "caption_loss",
        *LOSS_WEIGHTS,
        "confidence",
    ]

    audio_config: dict | PreTrainedConfig | None = None
    video_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    fusion_type: str = "gated_cross_attention"
    gate_type: str = "entropy"
    num_joint_layers: int = 1
    audio_pooling: str | None = None
    video_pooling: str | None = None
    enrichment: str | None = None
    enrichment_hidden_size: int = 128
    ot_epsilon: float = 0.1
    ot_iterations: int = 50
    ot_attention: bool = True
    ot_context: str = "mass"
    ot_loss_weight: float = 1.0
    ot_use_log: bool = True
    text_fusion: str = "prefix"
    gate_weight_init: float = -4.0
    gate_bias_init: float = 4.0
    label_smoothing: float = 0.1
    gate_stability_weight: float = 0.0
    semantic_consistency_weight: float = 0.0
    matching_weight: float = 0.0
    matching_hidden_size: int = 128
    hearing_weight: float = 0.0
    caption_contrast_weight: float = 0.0
    entropy_weight: float = 0.0
    agreement_temperature: float = 1.0
    agreement_threshold: float = 0.5
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    decoder_start_token_id: int | None = None
    prompt_ids: list[int] | None = None
    clip_token_id: int | None = None
    initializer_range: float = 0.02
    is_encoder_decoder: bool = True
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        if not type(self).__module__.startswith("transformers_modules"):
            # The installed package has registered its own pipeline, without `trust_remote_code`.
            kwargs.pop("custom_pipelines", None)
        for key, config_class in self.sub_configs.items():
            setattr(self, key, _sub_config(key, getattr(self, key), config_class))
        for field in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if getattr(self, field) is None:
                setattr(self, field, getattr(self.text_config, field, None))
        self.is_encoder_decoder = self.text_config.model_type == EVACapTextConfig.model_type
        if self.is_encoder_decoder:
            if self.decoder_start_token_id is None:
                self.decoder_start_token_id = self.bos_token_id
        else:
            self.decoder_start_token_id = None
            self.tie_word_embeddings = bool(self.text_config.tie_word_embeddings)
            self._complete_prompt()
        super().__post_init__(**kwargs)
        if set(self.architectures or ()) <= {SEQ2SEQ_CLASS, CAUSAL_CLASS}:
            # By which `AutoModel` chooses. The decoder may have changed since.
            self.architectures = [SEQ2SEQ_CLASS if self.is_encoder_decoder else CAUSAL_CLASS]
        self._validate()

    def _complete_prompt(self) -> None:
        if self.clip_token_id is None:
            self.clip_token_id = self.text_config.get_text_config(decoder=True).vocab_size
        if self.prompt_ids is None:
            start = [] if self.bos_token_id is None else [self.bos_token_id]
            self.prompt_ids = [*start, self.clip_token_id]
        _require(
            list(self.prompt_ids).count(self.clip_token_id) == 1,
            "prompt_ids",
            self.prompt_ids,
            f"a list of token ids with `clip_token_id` ({self.clip_token_id}) in it once",
        )

    def _validate(self) -> None:
        _require_choice("fusion_type", self.fusion_type, FUSION_TYPES)
        _require_choice("gate_type", self.gate_type, GATE_TYPES)
        layers = self.num_joint_layers
        _require(_is_whole(layers) and layers >= 0, "num_joint_layers", layers, "a whole number from 0 up")
        if self.has_clip_tower:
            _require(
                self.fusion_type not in ("video_only", "late_concat"),
                "video_config.model_type",
                self.video_config.model_type,
                f"{EVACapVideoConfig.model_type!r} with `fusion_type={self.fusion_type!r}`",
            )
        _require_choice("audio_pooling", self.audio_pooling, AUDIO_POOLINGS)
        _require_choice("video_pooling", self.video_pooling, VIDEO_POOLINGS)
        _require_choice("enrichment", self.enrichment, ENRICHMENTS)
        width = self.enrichment_hidden_size
        _require(_is_whole(width) and width > 1, "enrichment_hidden_size", width, "a whole number above 1")
        if self.fusion_type in ("audio_only", "video_only"):
            _require(
                self.enrichment is None,
                "enrichment",
                self.enrichment,
                f"None with `fusion_type={self.fusion_type!r}`, which has one stream",
            )
        if self.enrichment == "case":
            _require(
                self.is_encoder_decoder,
                "enrichment",
                self.enrichment,
                "'caste' or None with a language model, as 'case' reads the words of EVACap's own decoder",
            )
            _require(
                self.semantic_consistency_weight == 0,
                "semantic_consistency_weight",
                self.semantic_consistency_weight,
                "0 with `enrichment='case'`, which would need captions of the own videos of swapped clips",
            )
        if self.fusion_type != "gated_cross_attention":
            _require(
                self.entropy_weight == 0,
                "entropy_weight",
                self.entropy_weight,
                "0 without `fusion_type='gated_cross_attention'`, whose attention it is about",
            )
        _require_choice("ot_context", self.ot_context, TRANSPORT_CONTEXTS)
        number = getattr(self.text_config, "num_prompt_tokens", 0)
        _require(
            number == 0 or (self.text_fusion == "prefix" and self.is_encoder_decoder),
            "text_config.num_prompt_tokens",
            number,
            "0 without `text_fusion='prefix'`, and with a language model",
        )
        _require_choice("text_fusion", self.text_fusion, TEXT_FUSIONS)
        _require(
            self.text_fusion == "prefix"
            or (self.is_encoder_decoder and self.fusion_type == "concat" and self.num_joint_layers == 0),
            "text_fusion",
            self.text_fusion,
            "'prefix' without `fusion_type='concat'`, `num_joint_layers=0` and EVACap's own decoder, which keep sound and "
            "picture apart",
        )
        for field in ("ot_attention", "ot_use_log"):
            _require(isinstance(getattr(self, field), bool), field, getattr(self, field), "True or False")
        epsilon, iterations = self.ot_epsilon, self.ot_iterations
        _require(_is_number(epsilon) and epsilon > 0, "ot_epsilon", epsilon, "a number above 0")
        _require(_is_whole(iterations) and iterations > 0, "ot_iterations", iterations, "a whole number above 0")
        for field in ("gate_weight_init", "gate_bias_init", "label_smoothing"):
            _require(_is_number(getattr(self, field)), field, getattr(self, field), "a number")
        _require(0 <= self.label_smoothing < 1, "label_smoothing", self.label_smoothing, "at least 0 and below 1")
        for field in LOSS_WEIGHTS.values():
            value = getattr(self, field)
            _require(_is_number(value) and value >= 0, field, value, "a number from 0 up")
        width, temperature, threshold = (
            self.matching_hidden_size,
            self.agreement_temperature,
            self.agreement_threshold,
        )
        _require(_is_whole(width) and width > 0, "matching_hidden_size", width, "a whole number above 0")
        _require(_is_number(temperature) and temperature > 0, "agreement_temperature", temperature, "a number above 0")
        _require(
            _is_number(threshold) and 0 < threshold < 1, "agreement_threshold", threshold, "a number between 0 and 1"
        )
        for field in ("prompt_ids", "clip_token_id"):
            value = getattr(self, field)
            _require(
                value is None or not self.is_encoder_decoder, field, value, "None without a language model as decoder"
            )
        if not self.has_matching_head:
            _require(
                self.matching_weight == 0,
                "matching_weight",
                self.matching_weight,
                "0 without `gate_type='agreement'`, whose head it trains",
            )
        if self.fusion_type == "video_only":
            _require(
                self.hearing_weight == 0, "hearing_weight", self.hearing_weight, "0 with `fusion_type='video_only'`"
            )
        if self.fusion_type in ("audio_only", "video_only"):
            _require(
                self.semantic_consistency_weight == 0,
                "semantic_consistency_weight",
                self.semantic_consistency_weight,
                f"0 with `fusion_type={self.fusion_type!r}`, which has no picture to swap beside a sound",
            )
        for field, missing in (("audio_pooling", "video_only"), ("video_pooling", "audio_only")):
            value = getattr(self, field)
            _require(
                value is None or self.fusion_type != missing, field, value, f"None with `fusion_type={missing!r}`"
            )
        if self.fusion_type in ("concat", "late_concat", "optimal_transport"):
            _require(
                self.video_width == self.audio_config.hidden_size,
                "video_config.projection_dim" if self.has_clip_tower else "video_config.hidden_size",
                self.video_width,
                f"`audio_config.hidden_size` ({self.audio_config.hidden_size}) with `fusion_type={self.fusion_type!r}`",
            )

    def to_dict(self) -> dict[str, Any]:
        """The configuration as a dict; saved with the code of the model, it also has the classes that load it."""
        output = super().to_dict()
        model = output.get("auto_map", {}).get("AutoModel")
        if model is not None:
            if self.is_encoder_decoder:
                output["auto_map"].update(dict.fromkeys(GENERATION_AUTO_CLASSES, model))
            output["custom_pipelines"] = CUSTOM_PIPELINES
        return output

    @property
    def has_matching_head(self) -> bool:
        """Whether the fusion says how far the picture belongs to the sound."""
        return self.fusion_type == "gated_cross_attention" and self.gate_type == "agreement"

    @property
    def has_joint_encoder(self) -> bool:
        """Whether there are joint blocks, or at least their norm, after the fusion."""
        return self.fusion_type != "optimal_transport" or self.num_joint_layers > 0

    @property
    def loss_terms(self) -> list[str]:
        """The terms of the loss beside the caption loss, by their names in the output of a captioner."""
        absent = set() if self.fusion_type == "optimal_transport" else {"transport_loss"}
        return [name for name, field in LOSS_WEIGHTS.items() if getattr(self, field) > 0 and name not in absent]

    @property
    def audio_rows(self) -> int:
        """Audio tokens of a time step, after pooling."""
        audio = self.audio_config
        return 1 if self.audio_pooling == "frequency" else audio.num_mel_bins // audio.patch_size

    @property
    def tokens_per_picture(self) -> int:
        """Video tokens of a tubelet, after pooling."""
        video = self.video_config
        is_one = self.has_clip_tower or self.video_pooling == "frame"
        return 1 if is_one else (video.image_size // video.patch_size) ** 2

    @property
    def has_clip_tower(self) -> bool:
        """Whether the video tower is a CLIP, with one token a frame."""
        return isinstance(self.video_config, CLIPVisionConfig)

    @property
    def video_width(self) -> int:
        """Width of the video tokens."""
        return self.video_config.projection_dim if self.has_clip_tower else self.video_config.hidden_size

    @property
    def encoder_config(self) -> PreTrainedConfig:
        """The configuration of the tower with the width of the fused sequence: audio, or video for `"video_only"`."""
        return self.video_config if self.fusion_type == "video_only" else self.audio_config


__all__ = [
    "EVACapAudioConfig",
    "EVACapCEDConfig",
    "EVACapCLIPConfig",
    "EVACapConfig",
    "EVACapTextConfig",
    "EVACapVideoConfig",
]

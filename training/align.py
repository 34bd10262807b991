"""Teaches a captioner of sounds without captions of sounds: `alignment` of a configuration (DALI).

A trained `video_only` captioner, which is frozen, sees the picture of a clip. An audio encoder learns to give tokens with the
same distribution for its sound, clip by clip. With the decoder of the teacher it is then an `audio_only` captioner like any
other. No caption is read. See [`alignment`] for the paper and its losses.
"""

import dataclasses
import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from transformers.utils.generic import maybe_autocast

from ..modeling_evacap.configuration_evacap import EVACapConfig
from ..modeling_evacap.language_model_evacap import captioner_class
from ..modeling_evacap.modeling_evacap import EVACapCaptioner
from ..processing.model_processor import load_processor, loading
from ..processing.processing_evacap import EVACapProcessor
from .alignment import TokenScorers, alignment_loss, entropy, uniform_weights
from .checkpoints import Models
from .components import make_model
from .optimization import freeze
from .run_config import AlignmentSection, RunConfig
from .train import StopSignals, TrainingRun


PARTS = 20
"""Parts of a run, for the weight of the entropy: the published run has so many epochs."""
SAME_SIZES = ("hidden_size", "num_attention_heads", "intermediate_size", "hidden_act", "qkv_bias", "layer_norm_eps")
"""What the joint block of the teacher, which the student takes over, has from the configuration of its tower."""
ONLY_IN_TRAINING = {"caption_contrast_weight": 0.0}
"""Fields of a teacher's configuration that mean nothing without captions."""


def late_concat(picture: EVACapCaptioner, sound: EVACapCaptioner) -> EVACapCaptioner:
    """Joins two captioners into one whose decoder reads the tokens of both streams (DALI).

    Args:
        picture ([`EVACapCaptioner`]): A `video_only` captioner, whose decoder the result has.
        sound ([`EVACapCaptioner`]): An `audio_only` captioner that is aligned with it.

    Returns:
        A captioner with `fusion_type="late_concat"` and copies of the weights, on the CPU, in evaluation mode.

    Raises:
        ValueError: If one of the two is of another `fusion_type`, or if they do not fit.
    """
    for name, model, needed in (("picture", picture, "video_only"), ("sound", sound, "audio_only")):
        found = model.config.fusion_type
        if found != needed:
            raise ValueError(f"`{name}` has `fusion_type={found!r}`, but it must be {needed!r}.")
    layers = [model.config.num_joint_layers for model in (picture, sound)]
    if layers[0] != layers[1]:
        raise ValueError(
            f"`picture` has {layers[0]} joint layers and `sound` has {layers[1]}, but they must have the same."
        )
    fields = {"fusion_type": "late_concat", "audio_pooling": sound.config.audio_pooling, **ONLY_IN_TRAINING}
    fields["audio_config"] = sound.config.audio_config.to_dict()
    joined = captioner_class(picture.config)(EVACapConfig.from_dict(picture.config.to_dict() | fields))
    weights = {
        name.replace("encoder.joint.", "encoder.video_joint."): value
        for name, value in decoding_weights(picture).items()
    }
    weights |= {name: value for name, value in sound.state_dict().items() if ".encoder." in f".{name}"}
    joined.load_state_dict(weights)
    return joined.eval()


def decoding_weights(model: EVACapCaptioner) -> dict[str, torch.Tensor]:
    """The weights of a captioner without those that only its training on captions needs."""
    return {name: value for name, value in model.state_dict().items() if not name.startswith("contrast_head.")}


class AlignedStudent(nn.Module):
    """A student and what is trained beside it, with the loss as output.

    Args:
        student ([`EVACapCaptioner`]): The `audio_only` captioner.
        section ([`AlignmentSection`]): The loss and its options.
    """

    def __init__(self, student: EVACapCaptioner, section: AlignmentSection):
        super().__init__()
        self.section = section
        self.student = student
        width = student.config.encoder_config.hidden_size
        self.scorers = TokenScorers(width) if section.loss == "attentive_ot" else None

    def forward(
        self,
        picture: torch.Tensor,
        picture_mask: torch.Tensor | None,
        input_features: torch.Tensor,
        input_features_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compares the tokens of sounds with those of their pictures.

        Args:
            picture (`torch.Tensor` of shape `(batch_size, T_v, hidden_size)`), picture_mask (`torch.BoolTensor` of shape
                `(batch_size, T_v)`, *optional*): The tokens of the teacher's encoder, and those that exist.
            input_features, input_features_mask: See [`EVACapEncoder`].

        Returns:
            The loss, and with learned weights of the tokens their entropy, whose gradient the encoder does not get.
        """
        encoder = self.student.get_encoder()
        sound = encoder(input_features=input_features, input_features_mask=input_features_mask)
        heard, heard_mask = self._drawn(sound.last_hidden_state, sound.attention_mask)
        seen, seen_mask = self._drawn(picture, picture_mask)
        section = self.section
        options = {"solver": section.solver, "epsilon": section.epsilon, "iterations": section.iterations}
        loss = alignment_loss(section.loss, heard, seen, heard_mask, seen_mask, self.scorers, section.keep, **options)
        if self.scorers is None:
            return loss, None
        with maybe_autocast(heard.device.type, enabled=False):
            tokens = heard.detach().float(), seen.float()
            weights = [uniform_weights(*side) for side in zip(tokens, (heard_mask, seen_mask))]
            return loss, entropy(*self.scorers(*tokens, *weights))

    def _drawn(self, tokens: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A random subset of the tokens, the same places in all clips."""
        if self.section.tokens is None or self.section.tokens >= tokens.shape[1]:
            return tokens, mask
        places = torch.randperm(tokens.shape[1], device=tokens.device)[: self.section.tokens]
        return tokens[:, places], None if mask is None else mask[:, places]


class AlignmentRun(TrainingRun):
    """A run that aligns an audio encoder with a teacher, by the `alignment` of its configuration.

    Args:
        config ([`RunConfig`]): The configuration, with the preset `audio-only`; `model.start` has the audio encoder to begin
            with. Everything else of the student is the teacher's.

    Raises:
        ValueError: If the configuration is for another kind of training, or if teacher and student do not fit.
    """

    def __init__(self, config: RunConfig):
        _check(config)
        super().__init__(config)
        self.teacher = self.teacher.to(self.accelerator.device).eval().requires_grad_(False)

    def make_processor_and_config(self) -> tuple[EVACapProcessor, EVACapConfig]:
        """The student's processor and configuration: the teacher's, but for the sound."""
        processor, config = super().make_processor_and_config()
        name = self.config.alignment.teacher
        with loading(name):
            teacher_config = EVACapConfig.from_pretrained(name)
            options = {"attn_implementation": self.config.model.attn_implementation, "dtype": torch.float32}
            self.teacher = captioner_class(teacher_config).from_pretrained(name, **options)
        known = load_processor(name)
        self.start_config = config
        if teacher_config.fusion_type != "video_only":
            raise ValueError(
                f"`alignment.teacher` {name} has `fusion_type={teacher_config.fusion_type!r}`, but the teacher must be a "
                "captioner of pictures alone: train one with `model.preset=video-only`."
            )
        for field in SAME_SIZES:
            own, other = (getattr(part, field) for part in (config.audio_config, teacher_config.video_config))
            if own != other:
                raise ValueError(
                    f"`audio_config.{field}` of the student is {own!r}, but `video_config.{field}` of the teacher {name} is "
                    f"{other!r}: they must be equal, as the student takes over the teacher's joint block and decoder."
                )
        own = {"audio_config": config.audio_config.to_dict(), "audio_pooling": config.audio_pooling}
        fields = {"fusion_type": "audio_only", "video_pooling": None, **own, **ONLY_IN_TRAINING}
        student_config = EVACapConfig.from_dict(teacher_config.to_dict() | fields)
        _check_fields(self.config.model.config, student_config.to_dict(), name)
        self.reader = EVACapProcessor(
            processor.feature_extractor, known.video_processor, known.tokenizer, max_text_length=known.max_text_length
        )
        processor = EVACapProcessor(
            processor.feature_extractor,
            known.video_processor,
            known.tokenizer,
            modalities="audio",
            max_text_length=known.max_text_length,
        )
        return processor, student_config

    def reading_processor(self, processor: EVACapProcessor) -> EVACapProcessor:
        """The processor that reads both streams of the clips."""
        return self.reader

    def make_model(self) -> AlignedStudent:
        """The student: the audio tower of the start, and joint block and decoder of the teacher, which stays as it is."""
        if self.accelerator.is_fsdp2:
            raise ValueError("`alignment` works with one process or several whole copies (DDP), but not with FSDP.")
        section = self.config.model
        tower = make_model(section, self.start_config).get_encoder().audio_tower
        student = make_model(dataclasses.replace(section, start=None), self.model_config)
        student.get_encoder().audio_tower.load_state_dict(tower.state_dict())
        weights = {name: value for name, value in student.state_dict().items() if ".audio_tower." in f".{name}"}
        weights |= {k: value for k, value in decoding_weights(self.teacher).items() if ".video_tower." not in f".{k}"}
        student.load_state_dict(weights)
        freeze(student, [name for name, _ in student.named_parameters() if ".encoder." not in f".{name}"])
        freeze(student, section.freeze, section.freeze_except)
        return AlignedStudent(student, self.config.alignment)

    def make_optimizer(self, model: AlignedStudent) -> torch.optim.Optimizer:
        """AdamW, with a group for the scorers, without schedule, as in DALI, and without weight decay (ours; there 5e-7)."""
        optimizer = super().make_optimizer(model.student)
        if model.scorers is not None:
            rate = self.config.alignment.scorers_learning_rate
            group = {"params": list(model.scorers.parameters()), "lr": rate, "weight_decay": 0.0, "is_constant": True}
            optimizer.add_param_group(group)
        return optimizer

    @property
    def captioner(self) -> EVACapCaptioner:
        """The model that is saved."""
        return self.accelerator.unwrap_model(self.model).student

    def end(self) -> None:
        """See [`TrainingRun.end`]. The folder `late_concat` gets the student and its teacher, joined."""
        # Before anything that a full disk could refuse.
        self.checkpoints.save(self.state.step)
        joined = late_concat(self.teacher, self.captioner)
        models = Models(self.folder, self.accelerator, joined, self.reader, self.models.training, self.models.code)
        models.final_folder = self.folder / "late_concat"
        models.save_final()
        super().end()

    def step(self, batches: list[dict[str, torch.Tensor]], stop: StopSignals) -> tuple[dict[str, float], bool]:
        """See [`TrainingRun.step`]. The encoder gets the gradient of the loss, the scorers that of loss - λ entropy.

        The group of the scorers learns as by an optimizer of its own, because AdamW treats each parameter alone and leaves what
        has no gradient as it is. Gradients are clipped for the student alone.
        """
        accelerator, model = self.accelerator, self.model
        entropy_weight = self.entropy_weight()
        totals = torch.zeros(3, device=accelerator.device)
        totals[2] = bool(stop.number)
        for number, batch in enumerate(batches, start=1):
            with nullcontext() if number == len(batches) else accelerator.no_sync(model):
                with accelerator.autocast():
                    with torch.no_grad():
                        streams = ("pixel_values_videos", "pixel_values_videos_mask")
                        picture = self.teacher.get_encoder()(**{key: batch[key] for key in streams if key in batch})
                    tokens = picture.last_hidden_state, picture.attention_mask
                    loss, spread = model(*tokens, batch["input_features"], batch.get("input_features_mask"))
                objective = loss if spread is None else loss - (entropy_weight or 0.0) * spread
                accelerator.backward(objective / len(batches))
            totals[0] += loss.detach() / len(batches)
            totals[1] += 0.0 if spread is None else spread.detach() / len(batches)
        parts = accelerator.unwrap_model(model)
        norm = accelerator.clip_grad_norm_(
            parts.student.parameters(), self.config.optimization.max_grad_norm or math.inf
        )
        if entropy_weight is None and parts.scorers is not None:
            for parameter in parts.scorers.parameters():
                parameter.grad = None
        loss, spread, stopping = accelerator.reduce(totals).tolist()
        figures = {"loss": loss / accelerator.num_processes, "grad_norm": norm.item()}
        if parts.scorers is not None:
            figures["entropy"] = spread / accelerator.num_processes
        self.advance(figures)
        return figures, stopping > 0

    def entropy_weight(self) -> float | None:
        """The weight λ of the entropy: 5, 4, 3, 2 times its last value in the second to fifth of `PARTS` parts of the run.

        In the first part the scorers do not learn. The published schedule counts epochs, of 20 (DALI).
        """
        part = PARTS * self.state.step // max(self.total_steps, 1)
        return None if part == 0 else self.config.alignment.entropy_weight * max(1, 6 - part)


def _check(config: RunConfig) -> None:
    """Checks that the sections agree."""
    wrong = {
        "model.preset": (config.model.preset, "audio-only"),
        "model.lora": (config.model.lora, None),
        "data.p_mix": (config.data.p_mix, 0),
        "validation.every_steps": (config.validation.every_steps, None),
    }
    for key, (value, needed) in wrong.items():
        if value != needed:
            raise ValueError(
                f"`{key}` is {value!r}, but with `alignment` it must be {needed!r}: an audio-only student learns from the "
                "pictures of its own clips, and no caption is read."
            )


def _check_fields(
    given: Mapping[str, Any], student: Mapping[str, Any], teacher: str, key: str = "model.config"
) -> None:
    """Checks that the configuration asks for nothing that the student, which has the fields of its teacher, has not."""
    for name, value in given.items():
        if isinstance(value, Mapping):
            _check_fields(value, student[name] or {}, teacher, f"{key}.{name}")
        elif student.get(name) != value:
            raise ValueError(
                f"`{key}.{name}` is {value!r}, but it is {student.get(name)!r} in the teacher {teacher}, and the student has "
                "all but its `audio_config` and `audio_pooling` from there: leave it out."
            )

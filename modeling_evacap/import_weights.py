"""Import of the published weights of AVCap, CAV-MAE and GIT into an EVACap model."""

import fnmatch
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import GitForCausalLM
from transformers.utils import logging

from .checkpoint_reader import read_checkpoint
from .configuration_evacap import EVACapConfig, EVACapVideoConfig
from .modeling_evacap import EVACapForConditionalGeneration
from .presets import get_preset
from .weight_names import QKV, NameTable, git_names_to_avcap


VIDEO_EMBEDDINGS = ("inflate", "fresh")
_STANDARD_WIDTH, _STANDARD_HEADS = 768, 12
_STANDARD_IMAGE_SIZE = 224
_STANDARD_MEL_BINS = 128


@dataclass
class ImportReport:
    """Where every tensor of the files went, and where every parameter comes from. Its string is a table by module.

    Args:
        loaded (`list[str]`): Parameters that got a tensor of the same shape.
        reshaped (`list[str]`): Parameters that got a part of a tensor, or a tensor of another shape.
        new (`list[str]`): Parameters that are in no file and were initialised at random.
        unused (`list[str]`): Tensors of the files that the model does not need, by AVCap's names.
        notes (`list[str]`): Values that were assumed because no file has them.
        parameters (`int`): Number of parameters of the model.
    """

    loaded: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    parameters: int = 0

    def __str__(self) -> str:
        kinds = ("loaded", "reshaped", "new", "unused")
        counts = {kind: Counter(module_of(name) for name in getattr(self, kind)) for kind in kinds}
        modules = dict.fromkeys(module for kind in kinds for module in counts[kind])
        rows = [
            (module, *(str(counts[kind][module] or "-") for kind in kinds))
            for module in sorted(modules, key=lambda module: (module.startswith("file: "), module))
        ]
        rows.append(("total", *(str(counts[kind].total()) for kind in kinds)))
        width = max(len(row[0]) for row in rows)
        lines = [
            f"{row[0]:<{width}}" + "".join(f"{cell:>10}" for cell in row[1:]) for row in [("tensors", *kinds), *rows]
        ]
        return "\n".join([*lines, f"{self.parameters:,} parameters", *(f"note: {note}" for note in self.notes)])


def module_of(name: str) -> str:
    """The row of the table: `encoder.audio_tower`, `decoder.layers`; for a tensor of the file `file: blocks_u`."""
    parts = name.split(".")
    if parts[0] == "model":
        return ".".join(parts[1:3])
    if parts[0] in ("lm_head", "multi_modal_projector", "language_model"):
        return parts[0]
    if parts[0] == "encoder":
        return ".".join(parts[:2])
    return "file: " + (".".join(parts[:2]) if parts[0] in ("av_encoder", "textual") else parts[0])


def model_from_weights(
    *,
    avcap: str | os.PathLike | None = None,
    cav_mae: str | os.PathLike | None = None,
    git: str | os.PathLike | None = None,
    preset: str | None = None,
    num_attention_heads: int | None = None,
    num_mel_bins: int | None = None,
    image_size: int | None = None,
    num_frames: int | None = None,
    video_embedding: str = "inflate",
    allow_missing: Sequence[str] = (),
) -> tuple[EVACapForConditionalGeneration, ImportReport]:
    r"""Builds a captioner from published weights, with the sizes of their tensors.

    Args:
        avcap (`str` or `os.PathLike`, *optional*): A captioner of AVCap, instead of `cav_mae` and `git`.
        cav_mae (`str` or `os.PathLike`, *optional*): A pretrained or fine-tuned CAV-MAE, for the encoder.
        git (`str` or `os.PathLike`, *optional*): A GIT, for the decoder: a folder or Hub name for Transformers, or
            GIT's original `model.pt`. Its projection of CLIP's tokens is not used; the prefix projection is new
            (AVCap).
        preset (`str`, *optional*): A key of [`PRESETS`]; `"avcap"` with `avcap`, `"evacap"` without by default.
        num_attention_heads (`int`, *optional*): Heads of towers and decoder, which the tensors do not show; 12 by
            default if the width is 768.
        num_mel_bins (`int`, *optional*): Mel bins of the filterbank; 128 by default.
        image_size (`int`, *optional*): Height and width of a frame, if the video position table does not determine it.
            224 by default, if the table fits 224 pixels.
        num_frames (`int`, *optional*): Frames of a clip, for weights that were trained on single pictures or on none.
            18 by default, but 1 for an `avcap` of single pictures that stays AVCap.
        video_embedding (`str`, defaults to `"inflate"`): How the embedding of single pictures becomes one of clips.
            `"inflate"` repeats the patch weights over the tubelet, divided by its length, so that a still gives the
            same tokens, and repeats the position table over time (ours). `"fresh"` initialises both at random (AVCap).
        allow_missing (`Sequence[str]`): Shell patterns of parameters that the files may lack, and of unknown tensors
            that are ignored.

    Returns:
        The model in float32, in evaluation mode, and the [`ImportReport`].

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If a file is of another kind, if a size cannot be determined, or if names or shapes do not fit.

    Example:
    ```python
    >>> from evacap.modeling_evacap.import_weights import model_from_weights

    >>> model, report = model_from_weights(cav_mae="cav-mae-scale++.pth", git="microsoft/git-base")
    >>> print(report)
    >>> model.save_pretrained("evacap-start")
    ```
    """
    if (avcap is None) == (cav_mae is None and git is None):
        raise ValueError("Give either `avcap`, or `cav_mae`, `git` or both.")
    if video_embedding not in VIDEO_EMBEDDINGS:
        raise ValueError(f"`video_embedding` is {video_embedding!r}, but it must be 'inflate' or 'fresh'.")
    row = get_preset(preset or ("evacap" if avcap is None else "avcap"))
    stays_avcap = avcap is not None and row.config().fusion_type != "gated_cross_attention"
    report = ImportReport()

    tensors, text_fields = {}, {}
    if avcap is not None:
        tensors = _read(avcap, "AVCap captioner", ("av_encoder.", "textual."))
    if cav_mae is not None:
        encoder = _read(cav_mae, "audio-visual CAV-MAE", ("patch_embed_a.", "blocks_a."))
        tensors |= {f"av_encoder.{name}": tensor for name, tensor in encoder.items()}
    if git is not None:
        git_tensors, text_fields = _read_git(git)
        tensors |= git_tensors
    sizes = _Sizes(tensors, num_attention_heads, report.notes)
    config = row.config(
        audio_config=sizes.audio(num_mel_bins),
        video_config=sizes.video(image_size, num_frames, keep_pictures=stays_avcap),
        text_config=sizes.text(text_fields),
        **({} if row.config().text_fusion == "adaptive" else sizes.joint()),
    )
    _untie_if_needed(config, tensors, report.notes)

    expected_new = [
        r"model\.encoder\.(fusion|enrichment|matching_head)\..+",
        r"(hearing|contrast)_head\..+",
        r"model\.decoder\.layers\.\d+\.encoder_attn\.confidence_.+",
    ]
    if cav_mae is None and avcap is None:
        expected_new.append(r"model\.encoder\..+")
    if avcap is None:
        expected_new.append(r"model\.decoder\.prefix_.+" if git is not None else r"(model\.decoder|lm_head)\..+")
    is_picture = _is_picture(tensors)
    if video_embedding == "fresh" and is_picture and config.video_config.num_frames > 1:
        for name in ("patch_embed_v.proj.weight", "patch_embed_v.proj.bias", "pos_embed_v"):
            if tensors.pop(f"av_encoder.{name}", None) is not None:
                report.unused.append(f"av_encoder.{name}")
        expected_new.append(r"model\.encoder\.video_tower\.embeddings\.(patch|position)_embeddings.*")
    state = _convert(tensors, config, is_picture, report, expected_new, allow_missing)
    model = _build(config, state)
    report.parameters = model.num_parameters()
    return model, report


def _build(config: EVACapConfig, state: dict[str, torch.Tensor]) -> EVACapForConditionalGeneration:
    """The model with the tensors of `state` (not copies); Transformers initialises what `state` lacks."""
    # Its own report of new parameters would come before ours and say less.
    with errors_alone():
        return EVACapForConditionalGeneration.from_pretrained(
            None, config=config, state_dict=state, dtype=torch.float32
        )


@contextmanager
def errors_alone() -> Iterator[None]:
    """Keeps the warnings of Transformers to itself."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _read(path: str | os.PathLike, kind: str, prefixes: Sequence[str]) -> dict[str, torch.Tensor]:
    tensors = read_checkpoint(path)
    if not all(any(name.startswith(prefix) for name in tensors) for prefix in prefixes):
        found = ", ".join(sorted({name.split(".")[0] for name in tensors})[:8])
        raise ValueError(
            f"{path}: not the weights of an {kind}: names that begin with {' and '.join(prefixes)} were expected, but "
            f"they begin with {found}."
        )
    return tensors


def _read_git(source: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors by AVCap's names, and the fields of the decoder's configuration that tensors do not show."""
    if Path(source).is_file():
        tensors = git_names_to_avcap(read_checkpoint(source))
        if not any(name.startswith("textual.transformer.") for name in tensors):
            found = ", ".join(sorted({name.split(".")[0] for name in tensors})[:8])
            raise ValueError(f"{source}: not a GIT: its names begin with {found}, but textual. or git. was expected.")
        return tensors, {}
    try:
        model, loading = GitForCausalLM.from_pretrained(source, output_loading_info=True)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"{source}: neither a file nor a folder nor a model of the Hub that can be loaded now ({reason}). Give the "
            "path of a downloaded GIT, or go online."
        ) from error
    missing = [name for name in loading["missing_keys"] if not name.startswith("git.image_encoder.")]
    if missing:
        raise ValueError(f"{source}: not a whole GIT: it lacks {_list(missing)}.")
    shared = ("hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob", "num_attention_heads")
    tokens = ("pad_token_id", "bos_token_id", "eos_token_id")
    fields = {name: getattr(model.config, name) for name in (*shared, *tokens, "layer_norm_eps")}
    # GIT in Transformers has one epsilon for all layer norms. The original has 1e-8 for that of the embeddings.
    fields["embedding_layer_norm_eps"] = model.config.layer_norm_eps
    return git_names_to_avcap(model.state_dict()), fields


class _Sizes:
    """The fields of a configuration, read from the shapes of AVCap's tensors."""

    def __init__(self, tensors: dict[str, torch.Tensor], num_attention_heads: int | None, notes: list[str]):
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self.num_attention_heads = num_attention_heads
        self.notes = notes

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def _count(self, stack: str) -> int:
        return len({match[1] for name in self.shapes if (match := re.match(rf"{re.escape(stack)}\.(\d+)\.", name))})

    def _heads(self, width: int) -> dict[str, int]:
        if self.num_attention_heads is None:
            if width != _STANDARD_WIDTH:
                raise ValueError(
                    f"The tensors are {width} wide and do not show the number of attention heads: give "
                    "`num_attention_heads` (--num-attention-heads), as the model was trained."
                )
            self._note(f"{_STANDARD_HEADS} attention heads, the usual number for a width of {width}")
        return {"num_attention_heads": self.num_attention_heads or _STANDARD_HEADS}

    def _tower(self, letter: str) -> dict[str, int]:
        width, patch_size = (self.shapes[f"av_encoder.patch_embed_{letter}.proj.weight"][dim] for dim in (0, -1))
        fields = {"hidden_size": width, "patch_size": patch_size, **self._heads(width)}
        fields["num_hidden_layers"] = self._count(f"av_encoder.blocks_{letter}")
        mlp = self.shapes.get(f"av_encoder.blocks_{letter}.0.mlp.fc1.weight")
        if mlp is not None:
            fields["intermediate_size"] = mlp[0]
            fields["qkv_bias"] = f"av_encoder.blocks_{letter}.0.attn.qkv.bias" in self.shapes
        return fields

    def audio(self, num_mel_bins: int | None) -> dict[str, Any] | None:
        table = self.shapes.get("av_encoder.pos_embed_a")
        if table is None:
            return None if num_mel_bins is None else {"num_mel_bins": num_mel_bins}
        fields = self._tower("a")
        if num_mel_bins is None:
            num_mel_bins = _STANDARD_MEL_BINS
            frames = table[1] * fields["patch_size"] ** 2 // num_mel_bins
            self._note(f"{num_mel_bins} mel bins, the usual number: then {table[1]} positions are {frames} frames")
        rows, rest = divmod(num_mel_bins, fields["patch_size"])
        if rest or table[1] % max(rows, 1):
            raise ValueError(
                f"`num_mel_bins` is {num_mel_bins}, but the audio position table has {table[1]} places for patches of "
                f"{fields['patch_size']}: give the mel bins (--num-mel-bins) that the model was trained with."
            )
        return {**fields, "num_mel_bins": num_mel_bins, "max_frames": table[1] // rows * fields["patch_size"]}

    def video(self, image_size: int | None, num_frames: int | None, keep_pictures: bool) -> dict[str, Any] | None:
        table = self.shapes.get("av_encoder.pos_embed_v")
        if table is None:
            given = {"image_size": image_size, "num_frames": num_frames}
            return {name: value for name, value in given.items() if value is not None} or None
        fields = self._tower("v")
        kernel = self.shapes["av_encoder.patch_embed_v.proj.weight"]
        fields["num_channels"] = kernel[1]
        patches, patch_size = table[1], fields["patch_size"]
        if len(kernel) == 4:
            side = math.isqrt(patches) * patch_size
            if side**2 != patches * patch_size**2 or image_size not in (None, side):
                raise ValueError(
                    f"`image_size` is {image_size}, but the video position table has {patches} places, for a square "
                    f"picture of {side} pixels or none."
                )
            if num_frames is None and keep_pictures:
                num_frames = 1
            return {**fields, "image_size": side} | ({} if num_frames is None else {"num_frames": num_frames})

        tubelet_size = kernel[2]
        if image_size is None:
            if patches % (_STANDARD_IMAGE_SIZE // patch_size) ** 2:
                raise ValueError(
                    f"The video position table has {patches} places, which tell neither the number of frames nor "
                    "their size: give `image_size` (--image-size) in pixels, as the model was trained."
                )
            image_size = _STANDARD_IMAGE_SIZE
            self._note(f"frames of {image_size} pixels, the usual size")
        steps, rest = divmod(patches, (image_size // patch_size) ** 2)
        if rest or image_size % patch_size or not steps:
            raise ValueError(
                f"`image_size` is {image_size}, but the video position table has {patches} places, not a multiple of "
                f"those of one frame in patches of {patch_size}."
            )
        if num_frames not in (None, steps * tubelet_size):
            raise ValueError(
                f"`num_frames` is {num_frames}, but the weights are for {steps * tubelet_size} frames. Leave it out: "
                "the model takes other numbers of frames as it is."
            )
        return {**fields, "image_size": image_size, "num_frames": steps * tubelet_size, "tubelet_size": tubelet_size}

    def text(self, known: dict[str, Any]) -> dict[str, Any] | None:
        words = self.shapes.get("textual.embedding.words.weight")
        if words is None:
            return None
        stack = "textual.transformer.encoder.layer"
        fields = {"vocab_size": words[0], "hidden_size": words[1], "num_hidden_layers": self._count(stack)}
        for field_name, name in (
            ("max_position_embeddings", "textual.embedding.positions.weight"),
            ("intermediate_size", f"{stack}.0.intermediate.dense.weight"),
        ):
            if name in self.shapes:
                fields[field_name] = self.shapes[name][0]
        return {**fields, **(known or self._heads(words[1]))}

    def joint(self) -> dict[str, int]:
        depth = self._count("av_encoder.blocks_u")
        return {"num_joint_layers": depth} if "av_encoder.norm.weight" in self.shapes else {}


def _untie_if_needed(config: EVACapConfig, tensors: dict[str, torch.Tensor], notes: list[str]) -> None:
    """Unties the output layer from the word embeddings if the file has different weights for it.

    AVCap and GIT tie them, but a GIT that was fine-tuned in Transformers may not.
    """
    words, output = tensors.get("textual.embedding.words.weight"), tensors.get("textual.output.weight")
    if words is None or output is None or _fault(words) or _fault(output):
        return
    if not torch.equal(words, output):
        config.tie_word_embeddings = False
        notes.append("the output layer has weights of its own: it is not tied to the word embeddings")


def _convert(
    tensors: dict[str, torch.Tensor],
    config: EVACapConfig,
    is_picture: bool,
    report: ImportReport,
    expected_new: list[str],
    allow_missing: Sequence[str],
) -> dict[str, torch.Tensor]:
    """Converts `tensors` to a state dict of the model and fills the report; raises if they do not fit."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in EVACapForConditionalGeneration(config).state_dict().items()}
    names = NameTable(config.fusion_type, config.text_fusion)
    state, unknown, misfits, unusable = {}, [], [], []
    for name, tensor in tensors.items():
        target = names.target(name)
        if target is None or (QKV.fullmatch(target) is None and target not in shapes):
            known = names.is_known_unused(name) or any(fnmatch.fnmatchcase(name, pattern) for pattern in allow_missing)
            (report.unused if known else unknown).append(name)
            continue
        fault = _fault(tensor)
        if fault is not None:
            unusable.append(f"{name} ({fault})")
            continue
        for part_name, part in _parts(target, tensor.float()):
            part = _fit(part_name, part, config.video_config, is_picture)
            shape = shapes.get(part_name, ())
            if part.shape != shape:
                misfits.append(f"{name} {tuple(tensor.shape)} for {part_name} {tuple(shape)}")
                continue
            (report.loaded if part.shape == tensor.shape else report.reshaped).append(part_name)
            state[part_name] = part
            twin = names.twin(part_name)
            if twin is not None:
                report.loaded.append(twin)
                state[twin] = part.clone()

    if unusable:
        raise ValueError(
            f"The files hold tensors that are not weights: {_list(unusable)}. Save the model again from where it was "
            "trained, or download it again."
        )
    if config.tie_word_embeddings:
        # Other names of the word embeddings, which Transformers ties.
        for name in ("lm_head.weight", "model.encoder.enrichment.embed_tokens.weight"):
            state.pop(name, None)
            shapes.pop(name, None)
    missing = []
    for name in shapes:
        if name in state:
            continue
        expected = any(re.fullmatch(pattern, name) for pattern in expected_new)
        allowed = expected or any(fnmatch.fnmatchcase(name, pattern) for pattern in allow_missing)
        (report.new if allowed else missing).append(name)
    _raise_mismatch(unknown, missing, misfits)
    return state


def _fault(tensor: torch.Tensor) -> str | None:
    """Why a tensor cannot be a parameter."""
    if tensor.is_meta:
        return "on the meta device, without values"
    if tensor.layout != torch.strided:
        return f"of layout {tensor.layout}"
    if not tensor.is_floating_point():
        return f"of type {tensor.dtype}"
    # One pass, and a sum of large finite values may overflow: only then a second one.
    if not tensor.float().sum().isfinite() and not tensor.float().isfinite().all():
        return "with values that are not finite"
    return None


def _raise_mismatch(unknown: list[str], missing: list[str], misfits: list[str]) -> None:
    problems = []
    if misfits:
        problems.append(f"shapes do not fit: {_list(misfits)}")
    if missing:
        problems.append(f"the files lack weights for {_list(missing)}")
    if unknown:
        problems.append(f"the files hold unknown tensors {_list(unknown)}")
    if problems:
        raise ValueError(
            "The weights do not fit the model: " + "; ".join(problems) + ". If that is meant, name them by a pattern "
            "in `allow_missing` (--allow-missing)."
        )


def _list(names: Sequence[str], limit: int = 20) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _parts(target: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """The tensors for `target`; a joint projection is split into queries, keys and values."""
    match = QKV.fullmatch(target)
    if match is None:
        return [(target, tensor)]
    return [(f"{match[1]}.{part}_proj.{match[2]}", rows) for part, rows in zip("qkv", tensor.chunk(3), strict=True)]


def _fit(name: str, tensor: torch.Tensor, config: EVACapVideoConfig, is_picture: bool) -> torch.Tensor:
    """`tensor` in the shape of the parameter `name`; `is_picture` means an embedding of single pictures."""
    if name.endswith(".modality_embedding"):
        return tensor.flatten()
    if name.endswith(".position_embeddings"):
        tensor = tensor.flatten(0, -2)
        if is_picture and ".video_tower." in name:
            tensor = tensor.repeat(config.num_frames // config.tubelet_size, 1)
    elif is_picture and name.endswith(".video_tower.embeddings.patch_embeddings.weight"):
        tensor = inflate_patch_embedding(tensor, config.tubelet_size)
    return tensor


def _is_picture(tensors: dict[str, torch.Tensor]) -> bool:
    kernel = tensors.get("av_encoder.patch_embed_v.proj.weight")
    return kernel is not None and kernel.ndim == 4


def inflate_patch_embedding(weight: torch.Tensor, tubelet_size: int) -> torch.Tensor:
    """The kernel of a tubelet embedding that gives a still the tokens of a picture embedding (inflation, after I3D).

    Args:
        weight (`torch.Tensor` of shape `(hidden_size, channels, height, width)`): Kernel of the picture embedding.
        tubelet_size (`int`): Frames of a tubelet.

    Returns:
        `torch.Tensor` of shape `(hidden_size, channels, tubelet_size, height, width)`.
    """
    return weight[:, :, None].expand(-1, -1, tubelet_size, -1, -1) / tubelet_size

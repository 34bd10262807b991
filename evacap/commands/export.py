"""`evacap export`: a model folder as graphs that run without this package."""

import argparse
import os
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from transformers import AutoModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from ..modeling_evacap.modeling_evacap import CACHE_FIELD, EVACapForConditionalGeneration
from ..processing.captioning_evacap import reads_captions
from ..processing.model_processor import load_processor, loading
from ..training.files import whole_folder, write_json


FORMATS = {"onnx": ".onnx", "torch": ".pt2"}
OUTPUTS = {
    "prefill": ("logits", "keys", "values", "prefix_keys", "prefix_values", "prefix_mask"),
    "step": ("logits", "new_keys", "new_values"),
}
TOLERANCE = 1e-4
"""The greatest difference of the logits from the model's, in the check of an export."""


class Prefill(nn.Module):
    """The first word of clips.

    From their start tokens (batch_size, 1) and features to the logits (batch_size, vocab_size), and to the keys and
    values of all layers (layers, batch_size, num_heads, length, head_dim): of the text so far, and of the encoded clips
    with their mask (batch_size, T), which with `text_fusion="adaptive"` is 1 for the sound and 2 for the picture.
    """

    def __init__(self, model: EVACapForConditionalGeneration):
        super().__init__()
        self.model = model

    def forward(
        self,
        decoder_input_ids: torch.Tensor,
        input_features: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        pixel_values_videos_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        encoded = self.model.get_encoder()(
            input_features, pixel_values_videos, pixel_values_videos_mask=pixel_values_videos_mask
        )
        output = self.model(encoder_outputs=encoded, decoder_input_ids=decoder_input_ids, use_cache=True)
        cache, mask = output[CACHE_FIELD], encoded.attention_mask
        if mask is None:
            mask = torch.ones_like(encoded.last_hidden_state[..., 0], dtype=torch.bool)
        if self.model.config.text_fusion == "adaptive":
            mask = mask.long() * (1 + encoded.video_token_mask)
        text, prefix = _stack(cache.self_attention_cache), _stack(cache.cross_attention_cache)
        return output.logits[:, -1], *text, *prefix, mask


class Step(nn.Module):
    """From the last words (batch_size, 1) and what [`Prefill`] returned to the logits and the text's keys and values."""

    def __init__(self, model: EVACapForConditionalGeneration):
        super().__init__()
        self.decoder, self.lm_head = model.model.decoder, model.lm_head
        self.is_adaptive = model.config.text_fusion == "adaptive"

    def forward(
        self,
        decoder_input_ids: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        prefix_keys: torch.Tensor,
        prefix_values: torch.Tensor,
        prefix_mask: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        caches = []
        for states in (zip(keys, values), zip(prefix_keys, prefix_values)):
            caches.append(DynamicCache())
            for index, (key, value) in enumerate(states):
                caches[-1].update(key, value, index)
        cache = EncoderDecoderCache(*caches)
        decoded = self.decoder(
            input_ids=decoder_input_ids,
            cache=cache,
            encoder_attention_mask=prefix_mask,
            encoder_video_mask=prefix_mask > 1 if self.is_adaptive else None,
            use_cache=True,
        )
        return self.lm_head(decoded.last_hidden_state)[:, -1], *_stack(cache.self_attention_cache)


def _stack(cache: DynamicCache) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.stack([layer.keys for layer in cache.layers]), torch.stack([layer.values for layer in cache.layers])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="FOLDER", help="a model folder, or a model of the Hub")
    parser.add_argument("--to", required=True, choices=FORMATS, dest="form", help="ONNX, or a program of torch.export")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="the folder to write")


def run(arguments: argparse.Namespace) -> None:
    differences = export(arguments.model, arguments.form, arguments.output)
    found = ", ".join(f"{name} {difference:.1e}" for name, difference in differences.items())
    print(f"wrote {arguments.output}; greatest difference of the logits: {found}")


@torch.no_grad()
def export(model: str | os.PathLike, form: str, output: str | os.PathLike) -> dict[str, float]:
    """Writes the graphs of a captioner, in float32, with its processor and tokenizer beside them.

    `prefill` encodes clips and gives the first word, `step` each further one; see [`Prefill`] and [`Step`]. Batch size,
    frames and lengths are free; the sound has the length that the feature extractor pads to. Both are run with other
    sizes than those that they were made from, and compared with the model. (ours)

    Args:
        model (`str` or `os.PathLike`): A model folder or a model of the Hub.
        form (`str`): `"onnx"`, for ONNX Runtime, or `"torch"`, for `torch.export.load`.
        output (`str` or `os.PathLike`): The folder, which must not exist. It appears when it is complete.

    Returns:
        `dict[str, float]`: the greatest difference of each graph's logits from the model's.

    Raises:
        FileExistsError: If `output` exists.
        ImportError: If ONNX is not installed.
        ValueError: If the model cannot be loaded.
        RuntimeError: If a graph computes something else than the model.
    """
    output = Path(output)
    if output.exists():
        raise FileExistsError(f"{output}: it exists already. Give a new folder, or remove it first.")
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if form == "onnx" and missing:
        raise ImportError(f"{', '.join(missing)} is not installed: pip install 'evacap[onnx]'")
    processor = load_processor(model)
    with loading(model):
        captioner = AutoModel.from_pretrained(model, dtype=torch.float32, trust_remote_code=False).eval()
    if not captioner.config.is_encoder_decoder:
        raise ValueError(
            f"{model}: its decoder is a language model ({captioner.config.text_config.model_type}), which is not exported here. "
            "`optimum` exports language models."
        )
    if reads_captions(captioner.config):
        raise ValueError(f"{model}: reads captions (enrichment='case'), which the graphs have no input for.")

    with whole_folder(output) as partial:
        differences = write_graphs(captioner, form, partial)
        captioner.config.save_pretrained(partial)
        captioner.generation_config.save_pretrained(partial)
        processor.save_pretrained(partial)
        write_json(
            partial / "export.json", {"format": form, "inputs": processor.model_input_names, "outputs": OUTPUTS}
        )
    return differences


@torch.no_grad()
def write_graphs(model: EVACapForConditionalGeneration, form: str, folder: Path) -> dict[str, float]:
    """Writes the two graphs of [`export`], and checks them; its arguments and what it returns are those of `export`.

    Args:
        model ([`EVACapForConditionalGeneration`]): A model in float32, in evaluation mode.
        form (`str`): `"onnx"` or `"torch"`.
        folder (`Path`): A folder that exists.
    """
    differences = {}
    samples, others = (_prefill_inputs(model, *sizes) for sizes in ((3, 4), (2, 2)))
    for name, module in (("prefill", Prefill(model)), ("step", Step(model))):
        program = torch.export.export(module, (), samples, dynamic_shapes=_dynamic_shapes(name, samples), strict=False)
        path = folder / f"{name}{FORMATS[form]}"
        _save(program, form, path, list(samples), OUTPUTS[name])
        expected = module(**others)
        differences[name] = (_run(form, path, others) - expected[0]).abs().max().item()
        if not differences[name] <= TOLERANCE:
            raise RuntimeError(
                f"The logits of {path.name} differ by {differences[name]:.1e} from the model's, {TOLERANCE:.0e} at "
                "most is expected: nothing was written."
            )
        if name == "prefill":
            samples, others = (_step_inputs(module(**inputs)) for inputs in (samples, others))
    return differences


def _prefill_inputs(model: EVACapForConditionalGeneration, batch: int, steps: int) -> dict[str, torch.Tensor]:
    """Noise of `steps` tubelets, of which the first clip lacks the last one."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    ids = torch.full((batch, 1), config.decoder_start_token_id)
    inputs = {"decoder_input_ids": ids}
    if config.fusion_type != "video_only":
        audio = config.audio_config
        inputs["input_features"] = torch.randn(batch, audio.max_frames, audio.num_mel_bins, generator=generator)
    if config.fusion_type != "audio_only":
        video = config.video_config
        frames = steps * video.tubelet_size
        shape = (batch, frames, video.num_channels, video.image_size, video.image_size)
        inputs["pixel_values_videos"] = torch.randn(shape, generator=generator)
        mask = torch.ones(batch, frames, dtype=torch.bool)
        mask[0, -video.tubelet_size :] = False
        inputs["pixel_values_videos_mask"] = mask
    return inputs


def _step_inputs(prefilled: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """The next word and the state after it; the text stands there twice, as a length of one would be fixed."""
    logits, keys, values, *prefix = prefilled
    states = (torch.cat([keys, keys], 3), torch.cat([values, values], 3), *prefix)
    return {"decoder_input_ids": logits.argmax(-1, keepdim=True), **dict(zip(OUTPUTS["prefill"][1:], states))}


def _dynamic_shapes(name: str, inputs: dict[str, torch.Tensor]) -> dict[str, dict]:
    shapes: dict[str, dict] = {}
    for field, tensor in inputs.items():
        if tensor.ndim == 5 and name == "step":
            shapes[field] = {1: Dim.DYNAMIC, 3: Dim.DYNAMIC}
        else:
            shapes[field] = {0: Dim.DYNAMIC}
            if field.startswith(("pixel", "prefix")):
                shapes[field][1] = Dim.DYNAMIC
    return shapes


def _save(program: ExportedProgram, form: str, path: Path, inputs: list[str], outputs: tuple[str, ...]) -> None:
    if form == "torch":
        torch.export.save(program, path)
        return
    onnx = torch.onnx.export(
        program, (), input_names=inputs, output_names=list(outputs), dynamo=True, external_data=True, verbose=False
    )
    onnx.save(path, external_data=True)


def _run(form: str, path: Path, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The first output of a saved graph."""
    if form == "torch":
        return torch.export.load(path).module()(**inputs)[0]
    from onnxruntime import InferenceSession

    session = InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0])

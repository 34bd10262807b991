"""Quantised weights: seconds, memory and size at full size, and whether captions stay the same.

Each way is saved and loaded again before it is measured. The captions are those of the bundled checkpoint.
"""

import functools
import gc
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
from transformers import AutoModel, AutoProcessor, BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

import evacap
from benchmarks.measure import Results, argument_parser, markdown, peak_memory, spread, timed
from benchmarks.models import SIZES, make_config, make_inputs, make_model
from evacap.training.data.collator import EVACapDataCollator
from evacap.training.files import write_text
from evacap.training.procedural.dataset import ProceduralClips


SETTINGS = ("size", "batch", "frames", "beams", "way")
REFERENCE = "float32"
WAYS = {
    REFERENCE: {},
    "bfloat16": {"dtype": torch.bfloat16},
    "torchao int8, weights": {"quantization_config": functools.partial(TorchAoConfig, Int8WeightOnlyConfig())},
    "torchao int8, weights and activations": {
        "quantization_config": functools.partial(TorchAoConfig, Int8DynamicActivationInt8WeightConfig())
    },
    "bitsandbytes, 8 bits": {"quantization_config": functools.partial(BitsAndBytesConfig, load_in_8bit=True)},
    "bitsandbytes, 4 bits": {
        "quantization_config": functools.partial(
            BitsAndBytesConfig,
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            # Its kernels for 4 bits take no layer with one output, as the head of the agreement gate has.
            llm_int8_skip_modules=["model.encoder.matching_head", "lm_head"],
        )
    },
}
"""Arguments of `from_pretrained`, by way; a configuration is made for each call."""


def load(folder: str | os.PathLike, way: str = REFERENCE, device: str = "cpu") -> PreTrainedModel:
    """A model of a folder, with its weights quantised by `way`, or as they were saved."""
    options = {name: value() if callable(value) else value for name, value in WAYS[way].items()}
    return AutoModel.from_pretrained(folder, device_map=device, **options).eval()


def quantise(source: str | os.PathLike, way: str, target: str, device: str) -> int:
    """Saves `source` quantised in the folder `target`; returns the bytes of its weights."""
    load(source, way, device).save_pretrained(target)
    return sum(path.stat().st_size for path in Path(target).glob("*.safetensors"))


def caption_call(folder: str, arguments: dict[str, Any], model: PreTrainedModel | None = None):
    """A call that captions random clips, with the model of `folder` loaded within it unless `model` is given."""

    @torch.no_grad()
    def call() -> None:
        captioner = load(folder, device=arguments["device"]) if model is None else model
        config = captioner.config
        inputs = make_inputs(config, arguments["batch"], arguments["frames"], arguments["device"])
        tokens = arguments["new_tokens"]
        captioner.generate(
            **{name: value.to(captioner.dtype) for name, value in inputs.items()},
            num_beams=arguments["beams"],
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
        )

    return call


def measure(options: dict[str, Any], results: Results) -> None:
    """Measures all ways in turn, in one process."""
    transformers.logging.set_verbosity_error()
    device = options["device"]
    with tempfile.TemporaryDirectory() as folder:
        config = make_config("evacap", options["frames"], options["size"])
        make_model(config).save_pretrained(f"{folder}/source")
        sizes = {}
        for way in WAYS:
            sizes[way] = quantise(f"{folder}/source", way, f"{folder}/{way}", device)
            gc.collect()
        peaks = {way: peak_memory(caption_call, f"{folder}/{way}", options, device=device) for way in WAYS}
        models = {way: load(f"{folder}/{way}", device=device) for way in WAYS}
        calls = {way: caption_call("", options, model) for way, model in models.items()}
        times = timed(calls, device, repeats=options["repeats"], budget=options["budget"])
    equal = captions(options["clips"], device) if options["clips"] else {}
    for way in WAYS:
        results.add(
            {
                **{name: options[name] for name in SETTINGS if name != "way"},
                "way": way,
                "seconds": times[way],
                "weight_bytes": sizes[way],
                "peak_bytes": peaks[way],
                "equal_captions": equal.get(way),
                "clips": options["clips"],
            }
        )


@torch.no_grad()
def captions(num_clips: int, device: str, batch_size: int = 50) -> dict[str, int]:
    """The number of test clips of which the bundled checkpoint, quantised, says the same, by way."""
    processor = AutoProcessor.from_pretrained(evacap.TINY)
    clips, collator = ProceduralClips(processor, num_clips, "test", seed=2), EVACapDataCollator(p_mix=0.0)
    said: dict[str, list[str]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        models = {}
        for way in WAYS:
            quantise(evacap.TINY, way, f"{folder}/{way}", device)
            models[way] = load(f"{folder}/{way}", device=device)
        for first in range(0, num_clips, batch_size):
            batch = collator([clips[index] for index in range(first, min(first + batch_size, num_clips))])
            streams = {name: batch[name].to(device) for name in ("input_features", "pixel_values_videos")}
            for way, model in models.items():
                ids = model.generate(**{name: stream.to(model.dtype) for name, stream in streams.items()})
                said[way] += processor.batch_decode(ids, skip_special_tokens=True)
    return {way: sum(one == other for one, other in zip(said[REFERENCE], said[way])) for way in WAYS}


def table(results: Results) -> str:
    """The measurements in Markdown."""
    rows = []
    for row in results.rows:
        reference = results.find(**{name: row[name] for name in SETTINGS if name != "way"}, way=REFERENCE)
        time = row["seconds"]
        rows.append(
            [
                row["way"],
                row["batch"],
                spread(time),
                f"{reference['seconds']['median'] / time['median']:.2f}",
                f"{row['weight_bytes'] / 1e6:.0f}",
                "–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}",
                "–" if row["equal_captions"] is None else f"{row['equal_captions']} of {row['clips']}",
            ]
        )
    header = ["weights", "batch", "seconds (least–greatest, runs)", "times faster", "on disk, MB"]
    return markdown([*header, "loading and captioning, peak MB", "equal captions"], rows) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser("quantization", __doc__)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--frames", type=int, default=18)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=20)
    parser.add_argument("--clips", type=int, default=300, help="clips to compare captions of (default: %(default)s)")
    arguments = parser.parse_args(argv)
    results = Results(arguments.output, SETTINGS, arguments.device)
    for number, batch in enumerate(arguments.batch):
        # The captions do not depend on the batch.
        options = {**vars(arguments), "batch": batch, "clips": 0 if number else arguments.clips}
        if any(results.find(**{name: options[name] for name in SETTINGS[:-1]}, way=way) is None for way in WAYS):
            measure(options, results)
    report = table(results)
    write_text(arguments.output.with_suffix(".md"), report)
    print(report)


if __name__ == "__main__":
    main()

"""Captions clips with ONNX Runtime, without PyTorch, from what `evacap export --to onnx` wrote.

The features are those of the processor in an .npz file:

    np.savez("clips.npz", **processor(media=["clip.mp4"], return_tensors="np"))

python examples/onnx_caption.py exported clips.npz
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


def caption(folder: str, features: dict[str, np.ndarray]) -> list[str]:
    """Greedy captions of a batch."""
    folder = Path(folder)
    prefill, step = (onnxruntime.InferenceSession(folder / f"{name}.onnx") for name in ("prefill", "step"))
    settings = json.loads((folder / "generation_config.json").read_text())
    end, longest = settings["eos_token_id"], settings.get("max_length") or 40
    inputs = {name.name: features[name.name] for name in prefill.get_inputs() if name.name in features}
    if "pixel_values_videos" in inputs and "pixel_values_videos_mask" not in inputs:
        inputs["pixel_values_videos_mask"] = np.ones(inputs["pixel_values_videos"].shape[:2])
    if "pixel_values_videos_mask" in inputs:
        inputs["pixel_values_videos_mask"] = inputs["pixel_values_videos_mask"].astype(bool)
    rows = len(next(iter(inputs.values())))
    text = np.full((rows, 1), settings["decoder_start_token_id"])
    logits, keys, values, *prefix = prefill.run(None, {**inputs, "decoder_input_ids": text})
    names = ("prefix_keys", "prefix_values", "prefix_mask")
    while True:
        text = np.concatenate([text, logits.argmax(-1)[:, None]], axis=1)
        if text.shape[1] == longest or (text == end).any(1).all():
            break
        states = {"keys": keys, "values": values, **dict(zip(names, prefix))}
        logits, keys, values = step.run(None, {"decoder_input_ids": text[:, -1:], **states})
    ends = [row.index(end) if end in row else len(row) for row in text.tolist()]
    return Tokenizer.from_file(str(folder / "tokenizer.json")).decode_batch(
        [row[1:stop] for row, stop in zip(text.tolist(), ends)]
    )


if __name__ == "__main__":
    print("\n".join(caption(sys.argv[1], dict(np.load(sys.argv[2])))))

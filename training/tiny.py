"""Trains the tiny EVACap on procedural clips: the checkpoint that comes with the package, and its baselines.

python -m evacap.training.tiny --output tiny
python -m evacap.training.tiny --output tiny_audio_only --preset audio-only
"""

import argparse
import json
import os
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import BertTokenizer, Trainer, TrainingArguments, set_seed
from transformers.video_utils import VideoMetadata

from ..modeling_evacap.configuration_evacap import EVACapConfig
from ..modeling_evacap.modeling_evacap import EVACapForConditionalGeneration
from ..modeling_evacap.presets import PAPER_PROCESSING, PRESETS, get_preset
from ..processing.model_processor import make_processor
from ..processing.processing_evacap import EVACapProcessor
from .clip_captions import build_tokenizer
from .clip_kinds import KINDS
from .clip_sounds import SAMPLING_RATE
from .clips import make_scene, render_frames, render_waveform
from .collator import EVACapDataCollator
from .files import write_text


NUM_MEL_BINS, NUM_AUDIO_FRAMES, FRAME_SHIFT_MS = 64, 256, 20
NUM_VIDEO_FRAMES, IMAGE_SIZE, CLIP_FPS = 8, 64, 10
TRAINING_DATA = (
    "{num_clips:,} procedural clips of 5 s, each seen once: synthesised sounds of {num_kinds} kinds and drawn pictures of their "
    "sources (`python -m evacap.training.tiny`, seed {seed}); {p_mix:.0%} of the videos were those of other clips. "
    "For trying and testing: it knows these kinds and nothing of real recordings."
)


def tiny_processor(fusion_type: str = "gated_cross_attention") -> EVACapProcessor:
    """The processor of the tiny size: 64 mel bins, 256 frames of 20 ms (5.12 s), 8 pictures of 64 × 64."""
    tokenizer = build_tokenizer()
    processing = {**PAPER_PROCESSING, "frame_shift_ms": FRAME_SHIFT_MS}
    return make_processor(tiny_config(tokenizer, fusion_type), processing, tokenizer)


def tiny_config(tokenizer: BertTokenizer, fusion_type: str = "gated_cross_attention", **fields) -> EVACapConfig:
    """The tiny size: about 2.3 million parameters.

    Args:
        tokenizer (`BertTokenizer`): Gives the vocabulary and its special tokens.
        fusion_type (`str`): See [`EVACapConfig`].
        fields: Other fields of [`EVACapConfig`].
    """
    # The usual 0.02 is made for a width of 768. At this width it lets so little of the sound through to the text that
    # the decoder ignores it for the first ten thousand clips; 0.08 is about the inverse root of the width.
    size = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 512, "initializer_range": 0.08}
    return EVACapConfig(
        audio_config=size | {"num_hidden_layers": 4, "num_mel_bins": NUM_MEL_BINS, "max_frames": NUM_AUDIO_FRAMES},
        video_config=size | {"num_hidden_layers": 3, "num_frames": NUM_VIDEO_FRAMES, "image_size": IMAGE_SIZE},
        text_config=size
        | {
            "num_hidden_layers": 2,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": tokenizer.model_max_length,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.cls_token_id,
            "eos_token_id": tokenizer.sep_token_id,
        },
        fusion_type=fusion_type,
        **fields,
    )


class ProceduralClips(Dataset):
    """Procedural clips as the data collator takes them, rendered when they are asked for.

    Args:
        processor ([`EVACapProcessor`]): Makes the features; a stream that it does not take is not rendered.
        num_clips (`int`): How many.
        split (`str`), seed (`int`): See [`~clips.make_scene`].
    """

    def __init__(self, processor: EVACapProcessor, num_clips: int, split: str = "train", seed: int = 0):
        self.processor = processor
        self.num_clips = num_clips
        self.split = split
        self.seed = seed

    def __len__(self) -> int:
        return self.num_clips

    def __getitem__(self, index: int) -> dict:
        scene = make_scene(self.seed, self.split, index)
        streams = {}
        if self.processor.modalities != "video":
            streams |= {"audio": render_waveform(scene), "sampling_rate": SAMPLING_RATE}
        if self.processor.modalities != "audio":
            # Only the frames that would be taken from the clip's file.
            metadata = VideoMetadata(total_num_frames=round(scene.duration * CLIP_FPS), fps=CLIP_FPS)
            timestamps = self.processor.video_processor.sample_frames(metadata) / CLIP_FPS
            size = self.processor.video_processor.crop_size["height"]
            streams |= {"videos": render_frames(scene, timestamps, size), "do_sample_frames": False}
        inputs = self.processor(**streams, text=scene.captions[0])
        return {name: values[0] for name, values in inputs.items()}


def train(
    output: str | os.PathLike,
    fusion_type: str = "gated_cross_attention",
    num_clips: int = 64_000,
    p_mix: float = 0.15,
    learning_rate: float = 1e-3,
    batch_size: int = 32,
    seed: int = 0,
    num_workers: int | None = None,
    **config_fields,
) -> EVACapForConditionalGeneration:
    """Trains a tiny captioner from nothing and saves it with its processor.

    Args:
        output (`str` or `os.PathLike`): A new folder; `training.json` in it says for the model card what it learned.
        fusion_type (`str`): See [`EVACapConfig`].
        num_clips (`int`): Clips to learn from, each seen once.
        p_mix (`float`): Probability of a swapped video; see [`EVACapDataCollator`].
        learning_rate (`float`): Its peak; it rises over a twentieth of the training and falls along a cosine.
        batch_size (`int`): Clips a step.
        seed (`int`): Of the clips, the weights at birth and the swaps.
        num_workers (`int`, *optional*): Processes that render clips; by default half the processor's cores.
        config_fields: Other fields of [`EVACapConfig`].

    Raises:
        FileExistsError: If `output` is there already.
    """
    output = Path(output)
    if output.exists():
        raise FileExistsError(f"{output} exists already: choose a new folder, or remove it first")
    set_seed(seed)
    cores = os.cpu_count() or 1
    num_workers = max(1, cores // 2) if num_workers is None else num_workers
    torch.set_num_threads(max(1, cores - num_workers))
    processor = tiny_processor(fusion_type)
    config = tiny_config(processor.tokenizer, fusion_type, **config_fields)
    # On a processor, PyTorch's fused attention is slower at this size, above all backwards.
    model = EVACapForConditionalGeneration._from_config(config, attn_implementation="eager")
    partial = output.with_name(f".{output.name}.partial")
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(partial),
            per_device_train_batch_size=batch_size,
            num_train_epochs=1,
            learning_rate=learning_rate,
            warmup_steps=0.05,
            lr_scheduler_type="cosine",
            adam_beta2=0.98,
            weight_decay=0.01,
            use_cpu=not torch.cuda.is_available(),
            bf16=True,
            seed=seed,
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            dataloader_num_workers=num_workers,
            dataloader_prefetch_factor=8 if num_workers else None,
        ),
        data_collator=EVACapDataCollator(p_mix, seed, keep_matched=config.semantic_consistency_weight > 0),
        train_dataset=ProceduralClips(processor, num_clips, "train", seed),
    )
    trainer.train()
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    data = TRAINING_DATA.format(num_kinds=len(KINDS), num_clips=num_clips, p_mix=p_mix, seed=seed)
    (partial / "training.json").write_text(json.dumps({"data": data, "datasets": []}, indent=2) + "\n")
    partial.replace(output)
    return model


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m evacap.training.tiny", description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, help="a new folder for the model and its processor")
    parser.add_argument("--preset", choices=PRESETS, default="evacap", help="the variant (default: %(default)s)")
    parser.add_argument("--num-clips", type=int, default=64_000, help="clips to learn from (default: %(default)s)")
    parser.add_argument("--p-mix", type=float, default=0.15, help="share of swapped videos (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="its peak (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="clips a step (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of clips, weights and swaps (default: %(default)s)")
    parser.add_argument("--num-workers", type=int, help="processes that render clips (default: half the cores)")
    parser.add_argument(
        "--without-code",
        action="store_true",
        help="leave out the code that makes the folder load without this package",
    )
    options = vars(parser.parse_args(arguments))
    without_code, preset = options.pop("without_code"), get_preset(options.pop("preset"))
    train(**options, **preset.fusion)
    if without_code:
        strip_code(options["output"])


def strip_code(folder: str | os.PathLike) -> None:
    """Takes the code, and the mention of it, out of a saved folder: the package's own checkpoints need none."""

    def without_mention(content):
        if not isinstance(content, dict):
            return content
        return {k: without_mention(v) for k, v in content.items() if k not in ("auto_map", "custom_pipelines")}

    for file in Path(folder).glob("*config.json"):
        content = without_mention(json.loads(file.read_text(encoding="utf-8")))
        write_text(file, json.dumps(content, indent=2) + "\n")
    for file in Path(folder).glob("*_evacap.py"):
        file.unlink()


if __name__ == "__main__":
    main()

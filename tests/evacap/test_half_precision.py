"""The bundled checkpoint in bfloat16."""

import pytest
import torch
from transformers import AutoModel, AutoProcessor, pipeline

import evacap
from evacap.training.data.collator import EVACapDataCollator
from evacap.training.procedural.dataset import ProceduralClips


def test_the_pipeline_takes_the_precision_that_is_asked_for():
    for dtype, expected in (("auto", torch.float32), ("bfloat16", torch.bfloat16), (torch.bfloat16, torch.bfloat16)):
        assert pipeline(evacap.TASK, model=evacap.TINY, dtype=dtype).model.dtype == expected


@pytest.mark.parametrize(
    "options", [{"dtype": "bfloat16"}, {"dtype": torch.float16}, {"attn_implementation": "eager"}]
)
def test_a_pipeline_is_saved_whole(options, tmp_path):
    """What the model was loaded with is the model's alone."""
    model_kwargs = {name: value for name, value in options.items() if name != "dtype"}
    dtype = {name: value for name, value in options.items() if name == "dtype"}
    captioner = pipeline(evacap.TASK, model=evacap.TINY, **dtype, model_kwargs=model_kwargs)
    captioner.save_pretrained(tmp_path / "saved")
    saved = (tmp_path / "saved" / "tokenizer_config.json").read_text()
    AutoProcessor.from_pretrained(evacap.TINY).save_pretrained(tmp_path / "plain")
    assert saved == (tmp_path / "plain" / "tokenizer_config.json").read_text()
    again = pipeline(evacap.TASK, model=str(tmp_path / "saved"))
    assert again.model.dtype == captioner.model.dtype


@pytest.mark.slow
def test_greedy_captions_are_those_of_float32():
    processor = AutoProcessor.from_pretrained(evacap.TINY)
    models = [AutoModel.from_pretrained(evacap.TINY, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    clips, collator, equal = ProceduralClips(processor, 300, "test", seed=2), EVACapDataCollator(p_mix=0.0), []
    for first in range(0, len(clips), 50):
        batch = collator([clips[index] for index in range(first, first + 50)])
        streams = {name: batch[name] for name in ("input_features", "pixel_values_videos")}
        captions = [
            processor.batch_decode(
                model.generate(**{name: stream.to(model.dtype) for name, stream in streams.items()}),
                skip_special_tokens=True,
            )
            for model in models
        ]
        equal += [one == other for one, other in zip(*captions, strict=True)]
    assert len(equal) == 300
    assert sum(equal) >= 0.95 * len(equal)

"""The study's clips with a caption of each stream, for CASE."""

import json

import torch
from accelerate import Accelerator
from training_runs import forget_accelerator, run, write_config

from evacap.processing.processing_evacap import EVACapProcessor
from evacap.training.evaluation.captioner import list_clips
from evacap.training.procedural.dataset import ProceduralClips
from evacap.training.run_config import load_run_config
from evacap.training.study.mismatch_detectors import detect_mismatch
from evacap.training.study.stream_captions import StreamCaptionedRun, with_stream_captions
from evacap.training.train import train


def test_a_run_reads_what_captioners_of_one_stream_say_of_its_clips(tmp_path):
    step = {"optimization": {"max_steps": 1}, "data": {"p_mix": 0, "procedural": 8}}
    for stream in ("audio", "video"):
        config = write_config(tmp_path / f"{stream}-only-seed1.yaml", {"model": {"preset": f"{stream}-only"}}, step)
        assert run(config) == 0
    config = load_run_config(write_config(tmp_path / "case-seed0.yaml", {"model": {"preset": "evacap-case"}}, step))
    forget_accelerator()
    clips = StreamCaptionedRun(config).clips
    for stream in ("audio", "video"):
        file = tmp_path / "case-seed0" / "captions" / "train" / stream / "captions-0.jsonl"
        written = {line["clip"]: line["text"] for line in map(json.loads, file.read_text().splitlines())}
        assert len(written) == 8
        for index in range(8):
            ids = torch.as_tensor(clips[index][f"{stream}_caption_ids"])
            expected = clips.processor(text=written[f"train-0-{index:06d}"])["labels"][0]
            assert torch.equal(ids, torch.as_tensor(expected))
    forget_accelerator()
    assert train(config, StreamCaptionedRun) == 0

    def make_clips(processor: EVACapProcessor) -> ProceduralClips:
        return ProceduralClips(processor, 4, "test")

    forget_accelerator()
    captioned = with_stream_captions(make_clips, tmp_path, 0, tmp_path / "test", Accelerator(cpu=True))
    forget_accelerator()
    model = tmp_path / "case-seed0" / "model"
    tested = captioned(EVACapProcessor.from_pretrained(model))
    assert len(list_clips(tested)) == 4 and {"audio_caption_ids", "video_caption_ids"} <= tested[0].keys()
    assert detect_mismatch(model, captioned)["gate"] is not None

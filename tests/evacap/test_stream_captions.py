"""A model that reads captions of single streams (`enrichment="case"`), from captions of files to those of the model."""

import json
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

import evacap
from evacap.cli import main
from evacap.training.data.collator import EVACapDataCollator
from evacap.training.data.prepared_clips import PreparedClips
from evacap.training.evaluation.captioner import Pair, PairReader
from evacap.training.optimization import freeze


sys.path.insert(0, str(Path(__file__).parents[1] / "processing"))

from media_files import write_clip  # noqa: E402
from test_pipeline_evacap import WINDOW, WORDS_ONLY, make_model, make_processor  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Clips, models of both streams and of each alone, and the captions of the latter."""
    folder = tmp_path_factory.mktemp("case")
    (folder / "clips").mkdir()
    for name, seconds in (("a", 2), ("b", 2), ("long", 2 * WINDOW)):
        noise = np.random.default_rng(ord(name[0])).normal(0, 0.1, (1, round(16000 * seconds))).astype("f4")
        write_clip(folder / "clips" / f"{name}.mp4", seconds=seconds, sound=noise, rate=16000)
    write_clip(folder / "clips" / "sound.wav", seconds=2, video=None, audio="pcm_s16le")
    for name, modalities, fields in (
        ("audio", "audio", {"fusion_type": "audio_only"}),
        ("video", "video", {"fusion_type": "video_only"}),
        ("case", "audio_video", {"enrichment": "case"}),
    ):
        model = make_model(**fields)
        if name == "case":
            for stream in (model.get_encoder().enrichment.block.audio, model.get_encoder().enrichment.block.video):
                stream.scale.data.fill_(1.0)
        model.generation_config.update(suppress_tokens=WORDS_ONLY["suppress_tokens"], no_repeat_ngram_size=1)
        model.save_pretrained(folder / name)
        make_processor(modalities).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def captions(folder) -> list[str]:
    """The options with the captions of single streams."""
    options = []
    for stream, status in (("audio", 0), ("video", 1)):
        output = folder / f"{stream}.jsonl"
        arguments = ["--model", str(folder / stream), "--output", str(output), "--quiet", "--workers", "0"]
        # The sound alone has no picture.
        assert main(["caption", str(folder / "clips"), *arguments]) == status
        options += [f"--{stream}-captions", str(output)]
    return options


def read(path: Path) -> dict[str, dict]:
    return {Path(line["file"]).stem: line for line in map(json.loads, path.read_text().splitlines())}


def test_files_are_captioned_with_the_captions_of_single_streams(folder, captions):
    output = folder / "case.jsonl"
    arguments = ["--model", str(folder / "case"), "--output", str(output), "--quiet", "--workers", "0", "--beams", "1"]
    assert main(["caption", str(folder / "clips"), *arguments, *captions]) == 0
    results, spoken = read(output), {stream: read(folder / f"{stream}.jsonl") for stream in ("audio", "video")}
    assert "error" in spoken["video"]["sound"] and len(results["long"]["chunks"]) == 2
    captioner = evacap.AudioVisualCaptioningPipeline(
        evacap.EVACapForConditionalGeneration.from_pretrained(folder / "case"), make_processor(), device="cpu"
    )
    for name, result in results.items():
        inputs = {"media": str(folder / "clips" / Path(result["file"]).name)}
        for stream in spoken:
            said = spoken[stream][name]
            if "text" in said:
                inputs[f"{stream}_caption"] = said.get("chunks", said["text"])
        assert captioner(inputs, num_beams=1)["text"] == result["text"]
    # Each of the captions counts.
    inputs = {"media": str(folder / "clips" / "a.mp4"), "audio_caption": "dog dog", "video_caption": "rain"}
    encoded = [
        captioner.model.get_encoder()(**next(captioner.preprocess({**inputs, **other}))["inputs"]).last_hidden_state
        for other in ({}, {"audio_caption": "rain"}, {"video_caption": "dog"})
    ]
    assert all(not torch.allclose(encoded[0], other, atol=1e-3) for other in encoded[1:])


def test_one_clip_without_captions_loses_no_other(folder, captions):
    model = evacap.EVACapForConditionalGeneration.from_pretrained(folder / "case")
    captioner = evacap.AudioVisualCaptioningPipeline(model, make_processor(), device="cpu")
    clip, long = (str(folder / "clips" / name) for name in ("a.mp4", "long.mp4"))
    both = {"audio_caption": "dog", "video_caption": "rain"}
    first = [{"timestamp": [0.0, WINDOW], "text": "dog"}]
    inputs = [
        {"media": clip, **both},
        clip,
        {"media": clip, "audio_caption": "dog"},
        {"media": long, **both, "audio_caption": first},
        {"media": long, **both, "audio_caption": [5]},
        {"media": long, **both},
        str(folder / "clips" / "sound.wav"),
    ]
    results = captioner(inputs, batch_size=4, on_error="skip")
    assert ["error" in result for result in results] == [False, True, True, True, True, False, False]
    assert "no `audio_caption` and no `video_caption`" in results[1]["error"]
    assert "has no `video_caption`" in results[2]["error"]
    assert "from 2.56 to 5.12 s has no `audio_caption`" in results[3]["error"]
    assert "must be a sentence" in results[4]["error"]


def test_options_and_model_belong_together(folder, captions, capsys):
    clip = str(folder / "clips" / "a.mp4")
    for arguments, message in (
        (["caption", clip, "--model", str(folder / "case")], "--audio-captions and --video-captions"),
        (["caption", clip, "--model", str(folder / "audio"), *captions], "reads no captions"),
        (["caption", clip, "--model", str(folder / "case"), *captions[:2]], "give both"),
        (["caption", clip, "--model", str(folder / "case"), captions[0], "none.jsonl"], "no such file"),
        (["caption", clip, "--model", str(folder / "case"), captions[0], clip, *captions[2:]], "line 1"),
        (["check", clip, "--model", str(folder / "case")], "only `evacap caption`"),
        (["export", str(folder / "case"), "--to", "torch", "--output", str(folder / "graphs")], "no input"),
    ):
        assert main(arguments) != 0
        assert message in capsys.readouterr().err


def test_prepared_clips_have_them_and_swapped_videos_bring_theirs(folder, captions, capsys, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    manifest = folder / "manifest.jsonl"
    names = ("a", "b", "sound")
    suffixes = {"sound": "wav"}
    rows = [{"id": n, "media": f"clips/{n}.{suffixes.get(n, 'mp4')}", "caption": "rain"} for n in names]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepared = folder / "prepared"
    arguments = ["--manifest", str(manifest), "--model", str(folder / "case"), "--output", str(prepared)]
    assert main(["prepare", *arguments, "--split", "train", "--workers", "1", *captions]) == 0
    assert "1 of 3 clips have no `video_caption`, such as sound" in capsys.readouterr().out
    processor = make_processor()
    clips = PreparedClips(prepared, "train", processor)
    spoken = {stream: read(folder / f"{stream}.jsonl") for stream in ("audio", "video")}
    expected = {
        name: {s: processor(text=spoken[s][name]["text"])["labels"][0] for s in spoken if "text" in spoken[s][name]}
        for name in names
    }
    assert [clips[i]["audio_caption_ids"] for i in range(3)] == [expected[name]["audio"] for name in names]
    batch = EVACapDataCollator(p_mix=1.0, fixed_points=False)([clips[0], clips[1]])
    assert batch["video_index"].tolist() == [1, 0]
    for row, other in ((0, "b"), (1, "a")):
        ids = batch["video_caption_ids"][row]
        assert ids[ids != -100].tolist() == expected[other]["video"]
        ids = batch["audio_caption_ids"][row]
        assert ids[ids != -100].tolist() == expected[names[row]]["audio"]
    pair = PairReader(processor, lambda view: PreparedClips(prepared, "train", view))(Pair(0, 1, None))
    assert (pair["audio_caption_ids"], pair["video_caption_ids"]) == (expected["a"]["audio"], expected["b"]["video"])
    model = evacap.EVACapForConditionalGeneration.from_pretrained(folder / "case").train()
    batch = EVACapDataCollator(p_mix=0.0)([clips[i] for i in range(3)])
    assert (batch["video_caption_ids"][2] == -100).all()
    model(**batch).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    freeze(model, ["model.decoder.*", "lm_head.*"])
    assert not model.get_input_embeddings().weight.requires_grad
    lacking = {name: value for name, value in batch.items() if name != "video_caption_ids"}
    with pytest.raises(ValueError, match="`video_caption_ids` is missing.* `video_captions`"):
        model(**lacking)

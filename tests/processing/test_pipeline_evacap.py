import copy
import itertools
import json
import logging
import multiprocessing
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import av
import datasets
import numpy as np
import pytest
import torch
from media_files import write_clip
from PIL import Image
from test_processing_evacap import RATE, WORDS, frames, make_processor, noise, run_in_a_process
from transformers import pipeline
from transformers.pipelines.pt_utils import KeyDataset

from evacap import EVACapConfig, EVACapForConditionalGeneration
from evacap.processing.media_evacap import MediaError, load_media
from evacap.processing.pipeline_evacap import AudioVisualCaptioningPipeline, read_windows


WINDOW = 2.56
# Words instead of special tokens, whatever the random weights say.
WORDS_ONLY = {"suppress_tokens": [0, 1, 2, 3, 4, 5], "max_new_tokens": 6, "no_repeat_ngram_size": 1}


ADAPTIVE = {"fusion_type": "concat", "num_joint_layers": 0, "text_fusion": "adaptive"}


def make_model(fusion_type: str = "gated_cross_attention", **fields) -> EVACapForConditionalGeneration:
    torch.manual_seed(0)
    tower = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    text = {"vocab_size": len(WORDS), "max_position_embeddings": 64, "bos_token_id": 2, "eos_token_id": 3}
    config = EVACapConfig(
        audio_config={**tower, "num_mel_bins": 32, "max_frames": 128},
        video_config={**tower, "image_size": 32, "num_frames": 4},
        text_config={**tower, **text},
        fusion_type=fusion_type,
        decoder_start_token_id=2,
        **fields,
    )
    model = EVACapForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        # Large weights, so that different clips get different captions.
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def make_pipeline(modalities: str = "audio_video", **kwargs) -> AudioVisualCaptioningPipeline:
    fusion_type = {"audio": "audio_only", "video": "video_only"}.get(modalities, "gated_cross_attention")
    return AudioVisualCaptioningPipeline(
        make_model(fusion_type), make_processor(modalities), device="cpu", **WORDS_ONLY, **kwargs
    )


@pytest.fixture(scope="module")
def captioner() -> AudioVisualCaptioningPipeline:
    return make_pipeline()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("files")
    hiss = {"sound": noise(2, seed=5)[None], "rate": RATE}
    Image.fromarray(frames(1)[0]).save(folder / "still.png")
    (folder / "bad.mp4").write_bytes(b"no video at all" * 50)
    return {
        "clip": str(write_clip(folder / "clip.mp4", seconds=2)),
        "hiss": str(write_clip(folder / "hiss.mp4", seconds=2, **hiss)),
        "long": str(write_clip(folder / "long.mp4", seconds=6)),
        "sound": str(write_clip(folder / "sound.wav", seconds=2, video=None, audio="pcm_s16le")),
        "silent": str(write_clip(folder / "silent.mp4", seconds=2, audio=None)),
        "still": str(folder / "still.png"),
        "bad": str(folder / "bad.mp4"),
    }


def expected_text(captioner: AudioVisualCaptioningPipeline, **inputs) -> str:
    batch = captioner.processor(**inputs, return_tensors="pt")
    tokens = captioner.model.generate(**batch, max_length=None, **WORDS_ONLY)
    return captioner.processor.batch_decode(tokens, skip_special_tokens=True)[0]


def assert_close(results, expected):
    """Equal results, curves up to float rounding."""
    assert len(results) == len(expected)
    for result, other in zip(results, expected):
        assert result.keys() == other.keys()
        for name, value in result.items():
            assert value == (pytest.approx(other[name], abs=1e-5) if name in ("gate", "entropy") else other[name])


def test_one_clip(captioner, files):
    result = captioner(files["clip"])
    assert result == {"text": expected_text(captioner, media=files["clip"])}
    assert result["text"] and captioner(files["hiss"]) != result, "the caption depends on the clip"
    timed = captioner(files["clip"], return_timestamps=True)
    assert timed == {**result, "chunks": [{"timestamp": (0.0, 2.0), "text": result["text"]}]}


def test_kinds_of_input(captioner, files):
    clip = files["clip"]
    expected = captioner(clip)
    content = Path(clip).read_bytes()
    window = load_media(clip, num_frames=4, duration=WINDOW)
    sound = {"array": window.waveform, "sampling_rate": RATE}
    with open(clip, "rb") as file:
        for same in (
            Path(clip),
            content,
            memoryview(content),
            file,
            {"media": clip},
            {"bytes": content, "path": None},
        ):
            assert captioner(same) == expected
    for audio, video in itertools.product((clip, sound, window.waveform, {"path": clip}), (clip, window.frames)):
        assert captioner({"audio": audio, "video": video, "id": 7}) == expected
    pictures = [Image.fromarray(frame) for frame in window.frames]
    assert captioner({"audio": clip, "video": pictures}) == expected
    for name in ("video", "videos"):
        assert captioner({name: clip}) == expected, "a file alone is heard as well"
        assert captioner({"audio": clip, name: window.frames}) == captioner({"audio": clip, name: [*window.frames]})
    sound_alone = {"text": expected_text(captioner, media=files["sound"])}
    assert captioner(files["sound"]) == captioner({"audio": files["sound"], "video": None}) == sound_alone
    assert captioner({"array": window.waveform, "sampling_rate": RATE}) == captioner({"audio": clip})
    with_still = {"text": expected_text(captioner, audio=files["sound"], images=files["still"])}
    still = Image.open(files["still"])
    for key in ("image", "images", "video", "videos"):
        for picture in (files["still"], still, np.asarray(still), [files["still"]]):
            assert captioner({"audio": files["sound"], key: picture}) == with_still
    for name in ("image", "video"):
        with pytest.raises(ValueError, match=f"Pass either `{name}` or `{name}s`"):
            captioner({"audio": clip, name: still, f"{name}s": still})


def test_long_file_is_captioned_whole(captioner, files):
    result = captioner(files["long"])
    assert [chunk["timestamp"] for chunk in result["chunks"]] == [
        (0.0, WINDOW),
        (WINDOW, 2 * WINDOW),
        (2 * WINDOW, 6.0),
    ]
    for chunk in result["chunks"]:
        start = chunk["timestamp"][0]
        assert chunk["text"] == expected_text(captioner, media=files["long"], start=start, duration=WINDOW)
    assert result["text"] == ". ".join(chunk["text"] for chunk in result["chunks"])
    assert captioner(files["long"], return_timestamps=False) == {"text": result["text"]}
    shorter = captioner(files["long"], chunk_length_s=2.0, batch_size=2)["chunks"]
    assert [chunk["timestamp"] for chunk in shorter] == [(0.0, 2.0), (2.0, 4.0), (4.0, 6.0)]


@pytest.mark.parametrize("suffix", ["mp4", "ts", "wav"])
def test_windows_that_overlap(captioner, tmp_path, suffix):
    """Each is what the processor makes of the same part of the file, whether the container can be jumped in or not.

    At another rate, where the resampler begins shifts the sound by less than a sample.
    """
    options = {"video": None, "audio": "pcm_s16le"} if suffix == "wav" else {}
    path = str(write_clip(tmp_path / f"long.{suffix}", seconds=6, rate=RATE, **options))
    windows = list(read_windows(path, captioner.processor, 2.0, stride=(0.5, 0.75), start=0.25))
    spans = [window["span"] for window in windows]
    assert [start for start, _ in spans] == [0.25, 1.0, 1.75, 2.5, 3.25, 4.0] and [
        window["is_last"] for window in windows
    ]
    for window in windows:
        start, end = window["span"]
        alone = captioner.processor(media=path, start=start, duration=end - start, return_tensors="pt")
        assert alone.keys() == window["inputs"].keys()
        for name, value in alone.items():
            torch.testing.assert_close(window["inputs"][name], value, msg=f"{name} from {start} s on")
    borders = [window["timestamp"] for window in windows]
    assert borders[0] == (0.25, 1.5) and borders[1] == (1.5, 2.25) and borders[-1] == (4.5, spans[-1][1])
    assert [end for _, end in borders[:-1]] == [start for start, _ in borders[1:]]


def test_windows_that_overlap_from_a_decoded_sound(captioner, files):
    sound = noise(5.0)
    windows = list(
        read_windows(
            {"audio": {"array": sound, "sampling_rate": RATE}, "video": frames(50)},
            captioner.processor,
            2.0,
            stride=(0.5, 0.5),
            end=4.0,
        )
    )
    assert [window["span"] for window in windows] == [(0, 2), (1, 3), (2, 4)]
    alone = captioner.processor(audio=sound[RATE : 3 * RATE], videos=frames(50)[10:30], return_tensors="pt")
    for name, value in alone.items():
        torch.testing.assert_close(windows[1]["inputs"][name], value)


def test_events_and_the_gate_of_windows_that_overlap(captioner, files):
    strided = {"chunk_length_s": 2.0, "stride_length_s": 0.5}
    result = captioner(files["long"], **strided, return_gate=True, merge_chunks=False, batch_size=3)
    assert [chunk["timestamp"] for chunk in result["chunks"]] == [
        (0, 1.5),
        (1.5, 2.5),
        (2.5, 3.5),
        (3.5, 4.5),
        (4.5, 6),
    ]
    steps = np.diff(result["times"])
    assert len(result["gate"]) == len(result["times"]) and (steps > 0).all() and steps.max() < 0.48
    assert result["times"][0] == 0.16 and result["times"][-1] > 5.8
    # Said by another model, where neighbours are the same.
    windows = [
        {"texts": [text], "timestamp": (time, time + 1), "span": (time, time + 1), "is_silent": text == "c"}
        for time, text in enumerate("aabcca")
    ]
    merged = captioner.postprocess(windows, merge_chunks=True)
    assert merged["chunks"] == [
        {"timestamp": (0, 2), "text": "a"},
        {"timestamp": (2, 3), "text": "b"},
        {"timestamp": (3, 5), "text": "c", "silent": True},
        {"timestamp": (5, 6), "text": "a"},
    ]
    assert merged["text"] == "a. b. c. a" and captioner.postprocess(windows)["text"] == "a. a. b. c. c. a"


def test_a_part_of_a_file(captioner, files):
    part = captioner(files["long"], start=1.0, end=2.5, return_timestamps=True)
    assert part["chunks"][0]["timestamp"] == (1.0, 2.5)
    assert part["text"] == expected_text(captioner, media=files["long"], start=1.0, duration=1.5)
    rest = captioner(files["long"], start=2.5)["chunks"]
    assert [chunk["timestamp"] for chunk in rest] == [(2.5, 2.5 + WINDOW), (2.5 + WINDOW, 6.0)]
    with pytest.raises(MediaError, match="choose an earlier start"):
        captioner(files["long"], start=7.0)
    for wrong in ({"start": -1}, {"end": 0}, {"start": 2, "end": 2}, {"start": "1"}, {"end": float("nan")}):
        with pytest.raises(ValueError, match="0 <= `start` < `end`"):
            captioner(files["long"], **wrong)
    for wrong in (2.0, (0.5, -0.5), (0.5,), "1", float("nan")):
        with pytest.raises(ValueError, match="`stride_length_s` must be seconds"):
            captioner(files["long"], chunk_length_s=2.0, stride_length_s=wrong)


@pytest.mark.parametrize("stride", [0.0, 0.5])
def test_a_damaged_file_gives_one_warning(captioner, tmp_path, caplog, stride):
    whole = write_clip(tmp_path / "whole.mp4", seconds=6, options={"movflags": "faststart"}).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    caplog.set_level(logging.WARNING)
    assert captioner(str(tmp_path / "cut.mp4"), chunk_length_s=2.0, stride_length_s=stride)["text"]
    (warning,) = [record.getMessage() for record in caplog.records if "cut.mp4" in record.getMessage()]
    assert "the file breaks off" in warning


def test_streams_of_other_lengths_than_the_sound(captioner, files):
    sound = {"array": noise(2 * WINDOW + 0.4), "sampling_rate": RATE}
    chunks = captioner({"audio": sound, "video": files["clip"]})["chunks"]
    assert [chunk["timestamp"] for chunk in chunks] == [(0.0, WINDOW), (WINDOW, 2 * WINDOW)], "0.4 s are left out"
    without_picture = captioner({"audio": {**sound, "array": sound["array"][int(WINDOW * RATE) :]}})
    assert chunks[1]["text"] == without_picture["text"]

    video = frames(64)
    parts = [
        window["inputs"] for window in read_windows({"audio": sound, "video": video}, captioner.processor, WINDOW)
    ]
    assert len(parts) == 2
    last = captioner.processor(videos=video[29:60], return_tensors="pt")
    torch.testing.assert_close(parts[1].pixel_values_videos, last.pixel_values_videos)
    still = Image.open(files["still"])
    first, second = read_windows({"audio": sound, "image": still}, captioner.processor, WINDOW)
    torch.testing.assert_close(first["inputs"].pixel_values_videos, second["inputs"].pixel_values_videos)


def test_batches_and_workers_change_nothing(captioner, files):
    inputs = [files[name] for name in ("clip", "sound", "long", "hiss", "clip")]
    alone = [captioner(item, return_gate=True) for item in inputs]
    for batch_size, num_workers in ((1, 1), (2, 0), (3, 2), (8, 2)):
        assert_close(captioner(inputs, batch_size=batch_size, num_workers=num_workers, return_gate=True), alone)
    assert captioner(tuple(inputs[:2])) == captioner(inputs[:2])
    assert captioner([]) == []


def test_generators_and_datasets(captioner, files):
    names = ["clip", "sound", "hiss"]
    expected = captioner([files[name] for name in names])
    asked = []

    def generate():
        for name in names:
            asked.append(name)
            yield files[name]

    results = iter(captioner(generate()))
    assert next(results) == expected[0] and asked == ["clip"], "a generator is read as it is needed"
    assert [expected[0], *results] == expected
    assert list(captioner(generate(), batch_size=2, num_workers=2)) == expected
    assert list(captioner(iter([files["clip"]]))) == expected[:1]

    rows = datasets.Dataset.from_dict({"media": [files[name] for name in names], "id": [3, 4, 5]})
    for collection in (rows, KeyDataset(rows, "media"), rows["media"]):
        results = captioner(collection, batch_size=2, num_workers=1)
        assert len(results) == 3 and list(results) == expected
    assert list(captioner(rows.to_iterable_dataset())) == expected


def test_media_columns_of_datasets(captioner, files):
    clip = files["clip"]
    rows = datasets.Dataset.from_dict({"audio": [clip], "video": [clip]})
    rows = rows.cast_column("audio", datasets.Audio()).cast_column("video", datasets.Video())
    expected = [captioner(clip)]
    for collection in (
        rows,
        rows.to_iterable_dataset(),
        rows.remove_columns("audio"),
        KeyDataset(rows, "video"),
        rows["audio"],
        rows.cast_column("audio", datasets.Audio(decode=False)),
    ):
        assert list(captioner(collection)) == expected
    assert list(captioner(rows.remove_columns("video"))) == [captioner({"audio": clip})]
    assert rows.features["audio"].decode, "the caller's dataset stays as it was"


def test_iterable_dataset_that_has_a_length(captioner, files):
    class Rows(torch.utils.data.IterableDataset):
        def __len__(self):
            return 2

        def __iter__(self):
            return iter([files["clip"], files["hiss"]])

    for num_workers in (0, 1):
        assert list(captioner(Rows(), num_workers=num_workers)) == captioner([files["clip"], files["hiss"]])


@pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 0), (4, 0), (2, 2), (4, 1)])
def test_a_bad_clip_loses_no_other(captioner, files, batch_size, num_workers):
    missing = str(Path(files["clip"]).with_name("missing.mp4"))
    frames_alone = {"video": frames(4)}
    inputs = [files["clip"], files["bad"], files["silent"], files["long"], missing, frames_alone, 3.5]
    results = captioner([*inputs, files["hiss"]], on_error="skip", batch_size=batch_size, num_workers=num_workers)
    good = (0, 3, 7)
    assert [results[i] for i in good] == captioner([files["clip"], files["long"], files["hiss"]])
    errors = {i: result["error"] for i, result in enumerate(results) if i not in good}
    assert all("\n" not in error for error in errors.values())
    numbered = r"inputs\[5\]: The input has no sound", r"inputs\[6\]: An input must be .*, got float"
    for i, part in zip(errors, (".*bad.mp4: ", ".*silent.mp4: has no sound", ".*missing.mp4: ", *numbered)):
        assert re.match(part, errors[i]) and ("inputs" in errors[i]) == (i > 4)
    assert captioner([files["bad"]], on_error="skip", num_workers=num_workers)[0].keys() == {"error"}
    with pytest.raises(MediaError, match="bad.mp4") as error:
        captioner(inputs, batch_size=batch_size, num_workers=num_workers)
    assert "\n" not in str(error.value)


def test_errors_without_a_file_name_the_input(captioner, files):
    sound, broken = noise(1), np.full(RATE, np.nan)
    for bad in (broken, sound[:0], {"array": sound, "sampling_rate": 8000}, {"bytes": None, "path": None}):
        inputs = [{"audio": sound}, {"audio": bad}]
        with pytest.raises(ValueError, match=r"^inputs\[1\]: [`{]") as error:
            captioner(inputs)
        assert captioner(inputs, on_error="skip")[1] == {"error": str(error.value)}
        with pytest.raises(ValueError, match=r"^inputs\[1\]: [`{]"):
            list(captioner(item for item in inputs))
        with pytest.raises(ValueError, match="^[`{]"):
            captioner(inputs[1])
    with pytest.raises(MediaError, match=r"^inputs\[1\]: <3 bytes>: "):
        captioner([files["clip"], b"abc"])


def test_a_dataset_that_cannot_give_a_row(captioner, files):
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            if index == 1:
                raise KeyError("row 1 is lost")
            return files["clip"]

    first, second, third = captioner(Rows(), on_error="skip")
    assert "row 1 is lost" in second["error"] and first == third == captioner(files["clip"])


def test_generation_arguments(captioner, files):
    several = captioner(files["clip"], num_beams=3, num_return_sequences=3)
    assert len(several) == 3 and len({result["text"] for result in several}) == 3
    nested = captioner(files["clip"], generate_kwargs={"num_beams": 3, "num_return_sequences": 3})
    assert nested == several
    batch = captioner([files["clip"], files["long"]], num_beams=3, num_return_sequences=2, batch_size=2)
    assert batch[0] == several[:2]
    assert [len(result["chunks"]) for result in batch[1]] == [3, 3]
    assert len(captioner(files["clip"], max_new_tokens=2)["text"].split()) <= 2
    assert captioner(files["clip"], return_dict_in_generate=True) == captioner(files["clip"])
    with pytest.raises(ValueError, match="no_such_argument"):
        captioner(files["clip"], no_such_argument=1)


def test_gate(captioner, files):
    result = captioner(files["clip"], return_gate=True)
    # 2 s in steps of 16 frames of 20 ms; the eighth step would begin past the end.
    assert result["times"] == pytest.approx([0.16 + 0.32 * i for i in range(7)])
    encoded = captioner.model.get_encoder()(**captioner.processor(media=files["clip"], return_tensors="pt"))
    for name, value in (("gate", encoded.fusion_gate), ("entropy", encoded.attention_entropy)):
        by_row = value.detach().reshape(2, 8)
        assert by_row.std(dim=0).max() > 0, "the mel rows differ"
        assert result[name] == pytest.approx(by_row.mean(dim=0)[:7].tolist(), abs=1e-5)
    assert captioner(files["sound"], return_gate=True)["gate"] == [0.0] * 7, "no picture: the gate is shut"
    long = captioner(files["long"], return_gate=True)
    assert len(long["times"]) == 8 + 8 + 3 and long["times"] == sorted(long["times"]) and long["times"][-1] < 6
    with pytest.raises(ValueError, match="fusion_type='audio_only' has no gate"):
        # Before anything is read.
        make_pipeline("audio")("missing.mp4", return_gate=True)


def test_the_confidence_of_words(files):
    # Pieces of words are not suppressed here.
    options = {**WORDS_ONLY, "suppress_tokens": [0, 1, 2, 3, 4], "begin_suppress_tokens": [5]}
    captioner = AudioVisualCaptioningPipeline(make_model(**ADAPTIVE), make_processor(), device="cpu", **options)
    model, processor = captioner.model, captioner.processor
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            layer.encoder_attn.confidence_weight.normal_(std=0.5)
        model.lm_head.bias[5] = 3.0
    result = captioner(files["clip"], return_confidence=True)
    inputs = processor(media=files["clip"], return_tensors="pt")
    tokens = model.generate(**inputs, **options)
    expected = model(**inputs, decoder_input_ids=tokens).confidence[0]
    pieces = processor.tokenizer.convert_ids_to_tokens(tokens[0, 1:])
    assert any(piece.startswith("##") for piece in pieces)
    words: list[list[int]] = []
    for place, piece in enumerate(pieces):
        words = [*words[:-1], [*words[-1], place]] if piece.startswith("##") else [*words, [place]]
    assert [word["word"] for word in result["words"]] == result["text"].split()
    for word, places in zip(result["words"], words, strict=True):
        assert word["timestamp"] == (0.0, pytest.approx(2, abs=0.1))
        assert [word["audio"], word["video"]] == pytest.approx(expected[places].mean(0).tolist(), abs=1e-5)
    assert all(word["video"] == 0 for word in captioner(files["sound"], return_confidence=True)["words"])
    long, several = captioner(
        [files["long"], files["clip"]], return_confidence=True, batch_size=4, num_beams=2, num_return_sequences=2
    )
    for found in long:
        for chunk in found["chunks"]:
            said = [word["word"] for word in found["words"] if word["timestamp"] == chunk["timestamp"]]
            assert " ".join(said) == chunk["text"]
    assert [[word["word"] for word in found["words"]] for found in several] == [
        found["text"].split() for found in several
    ]


def test_the_transport_plan(files):
    for pooling in ({}, {"audio_pooling": "frequency", "video_pooling": "frame"}):
        model = make_model("optimal_transport", **pooling)
        captioner = AudioVisualCaptioningPipeline(model, make_processor(), device="cpu", **WORDS_ONLY)
        windows = captioner(files["long"], return_transport=True)["transport"]
        assert [np.shape(window["map"]) for window in windows] == [(8, 2), (8, 2), (3, 2)]
        assert np.sum(windows[0]["map"]) == pytest.approx(1, abs=1e-4)
        assert np.shape(captioner(files["sound"], return_transport=True)["transport"][0]["map"]) == (7, 0)
    first = captioner.processor(media=files["clip"], return_tensors="pt")
    expected = captioner.model.get_encoder()(**first).transport_map[0, :7]
    found = captioner(files["clip"], return_transport=True)["transport"][0]["map"]
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("option", "message"),
    [("return_confidence", "text_fusion='adaptive'"), ("return_transport", "fusion_type='optimal_transport'")],
)
def test_what_a_model_does_not_have_is_refused_before_anything_is_read(captioner, option, message):
    with pytest.raises(ValueError, match=message):
        captioner("missing.mp4", **{option: True})


def test_encodes_each_window_once(captioner, files):
    calls = []
    hook = captioner.model.get_encoder().register_forward_hook(lambda *_: calls.append(1))
    captioner([files["clip"], files["long"]], return_gate=True, batch_size=4)
    hook.remove()
    assert len(calls) == 1


def test_single_modalities(files):
    audio, video = make_pipeline("audio"), make_pipeline("video")
    assert audio([files["clip"], files["sound"]], batch_size=2)[0] == audio({"audio": files["clip"], "video": 3})
    assert video(files["silent"]) == video({"video": files["silent"], "audio": None})
    assert video([files["sound"], files["clip"]], on_error="skip")[0]["error"].endswith("choose a file that has one.")
    with pytest.raises(ValueError, match="no picture"):
        video({"audio": files["sound"]})


def test_bfloat16(files):
    captioner = AudioVisualCaptioningPipeline(make_model().to(torch.bfloat16), make_processor(), device="cpu")
    result = captioner([files["clip"], files["sound"]], batch_size=2, return_gate=True, **WORDS_ONLY)
    assert all(isinstance(value, float) for value in result[0]["gate"]) and result[1]["gate"] == [0.0] * 7


def test_bad_arguments(captioner, files):
    with pytest.raises(ValueError, match="`on_error` must be one of 'raise', 'skip', got 'ignore'"):
        captioner(files["clip"], on_error="ignore")
    for length in (0.1, 3.0):
        with pytest.raises(ValueError, match="`chunk_length_s` must be between 0.5 and 2.56 s"):
            captioner(files["clip"], chunk_length_s=length)
    with pytest.raises(ValueError, match="`chunk_length_s` must be between 0.5 and 2.56 s, .* got '2'"):
        captioner(files["clip"], chunk_length_s="2")
    for wrong in ({"clip": files["clip"]}, {}, {3: 3, "clip": 3}, noise(1), 3):
        with pytest.raises(ValueError, match="An input must be a file"):
            captioner(wrong)
    for audio, message in (
        ({"array": None, "sampling_rate": RATE}, "`audio` must be an array.*, got NoneType"),
        ({"array": noise(1), "sampling_rate": None}, "`audio` has a sampling rate of None Hz"),
        ({"array": [0, 12000], "sampling_rate": RATE}, r"`audio` must be .*floats in \[-1, 1\].*, got int"),
        ({"raw": noise(1)}, "`audio` must be .* got the keys"),
        ([files["clip"]], "`audio` is not a list of numbers"),
        (noise(0), "`audio` is empty"),
        (noise(6).reshape(-1, 2), "`audio` has shape .* samples must come last"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            captioner({"audio": audio})
        assert "\n" not in str(error.value)
    for video in (3, {"array": 3}, np.zeros(())):
        with pytest.raises(ValueError, match=r"`videos\[0\]` must be"):
            captioner({"audio": noise(6), "video": video})
    with pytest.raises(ValueError, match="`processor` is missing"):
        AudioVisualCaptioningPipeline(make_model())


IN_A_PROCESS_WITHOUT_THE_PACKAGE = """
    import json, sys
    sys.modules["evacap"] = None
    from transformers import pipeline
    folder, clip, arguments = sys.argv[1:]
    captioner = pipeline("audio-visual-captioning", folder, trust_remote_code=True, device="cpu")
    assert type(captioner).__name__ == "AudioVisualCaptioningPipeline"
    result = captioner([clip], batch_size=2, num_workers=1, **json.loads(arguments))
    print(json.dumps(result))
    captioner.save_pretrained(folder + "_again")
    assert pipeline(model=folder + "_again", trust_remote_code=True, device="cpu").processor.modalities == "audio_video"
"""


@pytest.mark.parametrize(("fields", "asked"), [({}, "return_gate"), (ADAPTIVE, "return_confidence")])
def test_saved_folder_loads_with_and_without_the_package(fields, asked, files, tmp_path):
    options = {**WORDS_ONLY, asked: True}
    captioner = AudioVisualCaptioningPipeline(make_model(**fields), make_processor(), device="cpu", **options)
    folder = tmp_path / "saved"
    captioner.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["custom_pipelines"]["audio-visual-captioning"]["impl"] == (
        "pipeline_evacap.AudioVisualCaptioningPipeline"
    )
    root = Path(__file__).parents[2]
    code = [*root.glob("modeling_evacap/*_evacap.py"), *root.glob("processing/*_evacap.py")]
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "processor_config.json"),
        *("tokenizer.json", "tokenizer_config.json", "known_answer.json"),
        # The code of the other model class stays out.
        *(path.name for path in code if path.name != "language_model_evacap.py"),
    }
    assert captioner.tokenizer is captioner.processor.tokenizer
    expected = json.loads(json.dumps(captioner([files["clip"]])))
    for placed in ({}, {"dtype": torch.float32}, {"device_map": "auto"}):
        loaded = pipeline("audio-visual-captioning", str(folder), trust_remote_code=True, **placed)
        assert json.loads(json.dumps(loaded([files["clip"]], **options))) == expected
    arguments = (str(folder), files["clip"], json.dumps(options))
    printed = run_in_a_process(IN_A_PROCESS_WITHOUT_THE_PACKAGE, *arguments, cache=tmp_path)
    assert json.loads(printed) == expected


PEAK_MEMORY = """
    import sys
    import evacap
    sys.path[:0] = sys.argv[2:]
    from test_pipeline_evacap import make_pipeline
    print(len(make_pipeline()(sys.argv[1], batch_size=2)["chunks"]))
    print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")
def test_memory_does_not_grow_with_the_length(tmp_path):
    peaks = []
    for seconds, windows in ((10, 4), (600, 235)):
        path = write_clip(tmp_path / f"{seconds}.mp4", seconds=seconds, fps=5, rate=RATE)
        folders = Path(__file__).parent, Path(__file__).parents[1]
        printed = run_in_a_process(PEAK_MEMORY, str(path), *map(str, folders), cache=tmp_path)
        count, kibibytes = map(int, printed.split())
        assert count == windows
        peaks.append(kibibytes / 1024)
    assert peaks[1] - peaks[0] < 12, f"{peaks} MiB"


def test_a_still_stays_beside_a_sound_of_several_windows(captioner, files, tmp_path):
    sound = str(write_clip(tmp_path / "long.m4a", seconds=6, video=None))
    for picture in (files["still"], Image.open(files["still"])):
        parts = list(read_windows({"audio": sound, "image": picture}, captioner.processor, WINDOW))
        assert [part["timestamp"] for part in parts] == [(0.0, WINDOW), (WINDOW, 2 * WINDOW), (2 * WINDOW, 6.0)]
        for part in parts:
            assert torch.equal(part["inputs"].pixel_values_videos, parts[0]["inputs"].pixel_values_videos)
    assert len(captioner({"audio": sound, "image": files["still"]})["chunks"]) == 3


def test_frames_beside_a_sound_file_of_several_windows(captioner, files):
    video = frames(64)
    parts = list(read_windows({"audio": files["long"], "video": video}, captioner.processor, WINDOW))
    assert len(parts) == 3
    last = captioner.processor(videos=video[int(2 * WINDOW / 6 * 64) :], return_tensors="pt").pixel_values_videos
    torch.testing.assert_close(parts[2]["inputs"].pixel_values_videos, last)


@pytest.mark.parametrize("name", ["clip", "long"])
def test_a_file_is_opened_once_and_its_frames_are_stacked_once(captioner, files, name, monkeypatch):
    opened, stacked = [], []
    real_open, real_stack = av.open, np.stack
    monkeypatch.setattr(av, "open", lambda *args, **options: opened.append(args) or real_open(*args, **options))
    monkeypatch.setattr(np, "stack", lambda arrays, **options: stacked.append(1) or real_stack(arrays, **options))
    windows = list(read_windows(files[name], captioner.processor, WINDOW))
    assert len(opened) == 1 and len(stacked) == len(windows)


def test_silence_is_told(captioner, tmp_path, caplog):
    sound = np.zeros((1, 6 * RATE), np.float32)
    sound[:, : 2 * RATE] = noise(2)
    half = str(write_clip(tmp_path / "half.wav", video=None, audio="pcm_s16le", rate=RATE, sound=sound))
    whole = str(write_clip(tmp_path / "whole.wav", video=None, audio="pcm_s16le", rate=RATE, sound=0 * sound))
    caplog.set_level(logging.WARNING)
    result = captioner(half)
    assert "silent" not in result
    assert [chunk.get("silent", False) for chunk in result["chunks"]] == [False, True, True]
    assert captioner(whole)["silent"] is True
    assert captioner({"audio": {"array": 0 * sound[0, :RATE], "sampling_rate": RATE}})["silent"] is True
    messages = [record.getMessage() for record in caplog.records if "silent" in record.getMessage()]
    assert len(messages) == 3, "once an input"
    assert messages[0].startswith(f"{half} is silent from 2.56 to 5.12 s")


def test_audio_track(captioner, tmp_path):
    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as container:
        voices = [container.add_stream("flac", rate=RATE, layout="mono") for _ in range(2)]
        for seed, voice in enumerate(voices):
            frame = av.AudioFrame.from_ndarray(noise(2, seed=seed)[None], format="flt", layout="mono")
            frame.sample_rate, frame.pts = RATE, 0
            for packet in [*voice.encode(frame), *voice.encode(None)]:
                container.mux(packet)
    first, second = (
        next(read_windows(str(path), captioner.processor, WINDOW, track))["inputs"].input_features for track in (0, 1)
    )
    assert not torch.equal(first, second)
    assert captioner(str(path), audio_track=0) == captioner(str(path))
    with pytest.raises(MediaError, match="no number 5"):
        captioner(str(path), audio_track=5)


def test_an_assistant_and_guidance(captioner, files):
    assistant = make_model()
    for return_gate in (False, True):
        expected = captioner(files["clip"], return_gate=return_gate)
        assisted = captioner(files["clip"], assistant_model=assistant, return_gate=return_gate)
        assert assisted["text"] == expected["text"]
    with pytest.raises(ValueError, match="`guidance_scale` is 1.5: classifier-free guidance"):
        captioner(files["clip"], guidance_scale=1.5)


def test_a_generation_config_gives_no_warning(captioner, files, caplog):
    caplog.set_level(logging.WARNING)
    configuration = copy.deepcopy(captioner.model.generation_config)
    configuration.max_new_tokens = 6
    plain = AudioVisualCaptioningPipeline(captioner.model, captioner.processor, device="cpu")
    assert len(plain(files["long"], generation_config=configuration)["chunks"]) == 3
    assert [record.getMessage() for record in caplog.records if "max_length" in record.getMessage()] == []


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_generators_where_processes_are_no_copies(captioner, files, monkeypatch, method):
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none=False: method)
    names = ["clip", "sound"]
    results = list(captioner((files[name] for name in names), num_workers=2))
    assert results == [captioner(files[name]) for name in names]


@pytest.mark.slow
def test_workers_that_are_no_copies(files, tmp_path):
    code = """
        import multiprocessing, sys
        sys.path[:0] = sys.argv[2:]
        import evacap
        from test_pipeline_evacap import make_pipeline
        if __name__ == "__main__":
            multiprocessing.set_start_method("spawn")
            captioner = make_pipeline()
            assert captioner([sys.argv[1]] * 2, num_workers=2) == [captioner(sys.argv[1])] * 2
            assert list(captioner((name for name in sys.argv[1:2]), num_workers=2)) == [captioner(sys.argv[1])]
    """
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(code))
    folders = Path(__file__).parent, Path(__file__).parents[1]
    subprocess.run([sys.executable, script, files["clip"], *map(str, folders)], check=True, timeout=500)


WORKER_OVER_ITS_BUDGET = """
    import sys, time
    import torch
    import evacap
    from evacap.processing import media_evacap
    media_evacap.guard_process(memory=200 * 2**20)
    if sys.argv[1] == "memory":
        try:
            bytearray(400 * 2**20)
        except MemoryError:
            print("refused")
        bytearray(50 * 2**20)
    else:
        media_evacap.SECONDS_A_WINDOW = 0.5
        media_evacap._Budget("clip.mp4")
        while True:
            pass
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the memory of a process is read from /proc")
def test_a_process_that_reads_has_a_budget(tmp_path):
    assert run_in_a_process(WORKER_OVER_ITS_BUDGET, "memory", cache=tmp_path) == "refused\n"
    command = [sys.executable, "-c", textwrap.dedent(WORKER_OVER_ITS_BUDGET), "time"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 70
    assert "clip.mp4: reading it takes more than 1 s; its process is ended" in result.stderr

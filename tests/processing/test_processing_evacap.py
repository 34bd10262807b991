import json
import logging
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.errors import OfflineModeIsEnabled
from media_files import write_clip
from PIL import Image
from transformers import BertTokenizer

from evacap.processing.feature_extraction_evacap import EVACapFeatureExtractor
from evacap.processing.media_evacap import MediaError, load_media
from evacap.processing.processing_evacap import EVACapProcessor
from evacap.processing.video_processing_evacap import EVACapVideoProcessor


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "##s", "a", "dog", "bark", "while", "man", "speak", "rain"]
WORDS += ["bird", "sing", "car", "pass", "by", "water", "run", "and", "then", "engine", "idle", "bell", "ring", "wind"]
PAD, CLS, SEP = 0, 2, 3
RATE = 16000


def make_processor(modalities: str = "audio_video", **video_kwargs) -> EVACapProcessor:
    return EVACapProcessor(
        EVACapFeatureExtractor(feature_size=32, max_frames=128, frame_shift_ms=20),
        EVACapVideoProcessor(**{"num_frames": 4, "size": {"shortest_edge": 32}, "crop_size": 32, **video_kwargs}),
        BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)}),
        modalities=modalities,
    )


@pytest.fixture
def processor() -> EVACapProcessor:
    return make_processor()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """Files of 2 s and 6 s; the window of `make_processor` is 2.56 s."""
    folder = tmp_path_factory.mktemp("files")
    Image.fromarray(np.full((40, 60, 3), 90, np.uint8)).save(folder / "still.png")
    return {
        "clip": str(write_clip(folder / "clip.mp4", seconds=2)),
        "long": str(write_clip(folder / "long.mp4", seconds=6)),
        "sound": str(write_clip(folder / "sound.wav", seconds=2, video=None, audio="pcm_s16le")),
        "silent": str(write_clip(folder / "silent.mp4", seconds=2, audio=None)),
        "still": str(folder / "still.png"),
    }


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, int(seconds * RATE)).astype(np.float32)


def frames(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 40, 60, 3), dtype=np.uint8)


def assert_same(batch, expected):
    assert list(batch) == list(expected)
    for name in batch:
        torch.testing.assert_close(batch[name], expected[name])


def test_media_gives_what_its_streams_give(processor, files):
    batch = processor(media=files["clip"], return_tensors="pt")
    assert batch.input_features.shape == (1, 128, 32)
    assert batch.pixel_values_videos.shape == (1, 4, 3, 32, 32)
    clip = load_media(files["clip"], num_frames=4)
    expected = processor(audio=clip.waveform, sampling_rate=RATE, videos=clip.frames, return_tensors="pt")
    assert_same(batch, expected)
    assert_same(processor(audio=files["clip"], videos=files["clip"], return_tensors="pt"), batch)


def test_kinds_of_source(processor, files):
    expected = processor(files["clip"], return_tensors="pt")
    content = Path(files["clip"]).read_bytes()
    for same in (
        Path(files["clip"]),
        content,
        memoryview(content),
        {"bytes": content, "path": None},
        {"path": files["clip"], "bytes": None},
    ):
        assert_same(processor(media=same, return_tensors="pt"), expected)
        assert_same(processor(audio=same, videos=[same], return_tensors="pt"), expected)
    with open(files["clip"], "rb") as file:
        assert_same(processor(media=[file], return_tensors="pt"), expected)


def test_batches(processor, files):
    sources = [files["clip"], files["long"]]
    batch = processor(media=sources, duration=2.0, return_tensors="pt")
    for index, source in enumerate(sources):
        alone = processor(media=source, duration=2.0, return_tensors="pt")
        assert_same({name: value[index : index + 1] for name, value in batch.items()}, alone)
    lists = processor(media=sources, duration=2.0)
    assert isinstance(lists["input_features"], list) and lists["pixel_values_videos"][0].shape == (4, 3, 32, 32)
    arrays = processor(media=sources, duration=2.0, text=["a dog", "a man speaks"], return_tensors="np")
    np.testing.assert_array_equal(arrays["input_features"], batch.input_features.numpy())
    assert arrays["labels"].shape == (2, 5)


def test_clips_without_a_picture(processor, files):
    batch = processor(media=[files["sound"], files["clip"], files["sound"]], return_tensors="pt")
    assert batch.pixel_values_videos_mask.tolist() == [[0] * 4, [1] * 4, [0] * 4]
    assert batch.pixel_values_videos[0].abs().max() == 0
    alone = processor(media=files["clip"], return_tensors="pt")
    torch.testing.assert_close(batch.pixel_values_videos[1:2], alone.pixel_values_videos)
    assert list(processor(media=files["sound"], return_tensors="pt")) == ["input_features"]
    separately = processor(
        audio=[noise(1), noise(1)], videos=[None, frames(8)], sampling_rate=RATE, return_tensors="pt"
    )
    assert separately.pixel_values_videos_mask.tolist() == [[0] * 4, [1] * 4]


def test_ragged_frames(files):
    processor = make_processor(fps=2.0)
    batch = processor(media=[files["clip"], files["long"]], duration=2.5, return_tensors="pt")
    assert batch.pixel_values_videos_mask.sum(-1).tolist() == [4, 6]
    assert "pixel_values_videos_mask" not in processor(media=files["long"], duration=2.5, return_tensors="pt")


def test_stills_are_repeated(processor, files):
    still = Image.open(files["still"])
    batch = processor(audio=files["sound"], images=still, return_tensors="pt")
    assert batch.pixel_values_videos.shape == (1, 4, 3, 32, 32)
    assert torch.equal(batch.pixel_values_videos, batch.pixel_values_videos[:, :1].expand(-1, 4, -1, -1, -1))
    array = np.asarray(still)
    for same in ({"images": files["still"]}, {"images": [array]}, {"videos": array}, {"videos": files["still"]}):
        assert_same(processor(audio=files["sound"], **same, return_tensors="pt"), batch)
        others = make_processor(fps=2.0)(audio=files["sound"], **same, return_tensors="pt")
        torch.testing.assert_close(others.pixel_values_videos, batch.pixel_values_videos)
    two = processor(audio=[files["sound"]] * 2, images=[still, files["still"]], return_tensors="pt")
    torch.testing.assert_close(two.pixel_values_videos, batch.pixel_values_videos.repeat(2, 1, 1, 1, 1))


def test_windows(processor, files):
    assert processor.window_seconds == pytest.approx(2.56)
    second = processor(media=files["long"], start=2.0, duration=2.0, return_tensors="pt")
    clip = load_media(files["long"], start=2.0, duration=2.0, num_frames=4)
    assert_same(second, processor(audio=clip.waveform, videos=clip.frames, sampling_rate=RATE, return_tensors="pt"))
    sound = noise(6)
    window = processor(audio=sound, sampling_rate=RATE, start=2.0, duration=1.5, return_tensors="pt")
    expected = processor(audio=sound[2 * RATE : int(3.5 * RATE)], sampling_rate=RATE, return_tensors="pt")
    assert_same(window, expected)
    for duration in (0, 3.0):
        with pytest.raises(ValueError, match="`duration` must be above 0 and at most 2.56 s"):
            processor(media=files["long"], duration=duration)
    with pytest.raises(ValueError, match="`start` is 7.0 s but `audio.0.` has 6.00 s"):
        processor(audio=sound, sampling_rate=RATE, start=7.0)


def test_longer_clips_are_announced_once(files, caplog):
    caplog.set_level(logging.WARNING)
    processor = make_processor()
    processor(media=files["clip"])
    processor(media=files["long"], duration=2.56)
    assert not caplog.records
    processor(media=[files["long"], files["long"]])
    processor(audio=noise(6), sampling_rate=RATE)
    assert [record.getMessage().split(": ")[0] for record in caplog.records] == [f"{files['long']} lasts 6.00 s"]
    make_processor()(audio=[noise(1), noise(4)], sampling_rate=RATE)
    assert caplog.records[-1].getMessage().startswith("audio[1] lasts 4.00 s: only the first 2.56 s are used")


def test_modalities(files):
    audio, video = make_processor("audio"), make_processor("video")
    assert list(audio(media=files["clip"], return_tensors="pt")) == ["input_features"]
    assert list(audio(audio=noise(1), videos=frames(4), sampling_rate=RATE)) == ["input_features"]
    assert list(video(media=files["silent"], return_tensors="pt")) == ["pixel_values_videos"]
    assert list(video(audio=noise(1), videos=frames(4), sampling_rate=RATE)) == ["pixel_values_videos"]
    assert audio.model_input_names == ["input_features"]
    assert video.model_input_names == ["pixel_values_videos", "pixel_values_videos_mask"]
    with pytest.raises(ValueError, match="sound.wav: has no picture"):
        video(media=files["sound"])
    with pytest.raises(ValueError, match="silent.mp4: has no sound.*fusion_type='video_only'"):
        audio(media=files["silent"])
    with pytest.raises(ValueError, match="silent.mp4: has no sound.*fusion_type='video_only'"):
        make_processor()(media=[files["clip"], files["silent"]])
    with pytest.raises(ValueError, match="`modalities` must be one of"):
        make_processor("image")


def test_labels(processor):
    labels = processor(text=["a dog barks", "a man"], return_tensors="pt")
    assert list(labels) == ["labels"]
    a, dog, bark, s, man = (WORDS.index(word) for word in ("a", "dog", "bark", "##s", "man"))
    assert labels["labels"].tolist() == [[a, dog, bark, s, SEP], [a, man, SEP, -100, -100]]
    assert processor(text="a dog", return_tensors="pt")["labels"].tolist() == [[a, dog, SEP]]
    assert processor(text=["a dog", "a"])["labels"] == [[a, dog, SEP], [a, SEP]]
    long = processor(text=" ".join(["dog"] * 100), return_tensors="pt")["labels"]
    assert long.shape == (1, 39) and long[0, -1] == SEP, "40 tokens with the [CLS] that labels lack"
    fixed = processor(text="a dog", text_kwargs={"padding": "max_length", "max_length": 8}, return_tensors="pt")
    assert fixed["labels"].tolist() == [[a, dog, SEP, -100, -100, -100, -100, -100]]


def test_decode(processor):
    ids = processor(text=["a dog barks"], return_tensors="pt")["labels"]
    assert processor.batch_decode(ids, skip_special_tokens=True) == ["a dog barks"]
    assert processor.decode(ids[0]) == "a dog barks [SEP]"


def test_options_reach_the_parts(processor, files):
    batch = processor(
        media=files["clip"], num_frames=6, do_normalize=False, return_attention_mask=True, return_tensors="pt"
    )
    assert batch.pixel_values_videos.shape[1] == 6 and batch.pixel_values_videos.min() >= 0
    assert batch.input_features_mask.sum() == 1 + (2 * RATE - 400) // 320
    nested = processor(media=files["clip"], videos_kwargs={"num_frames": 2}, return_tensors="pt")
    assert nested.pixel_values_videos.shape[1] == 2


def test_sampling_rate(processor, caplog):
    with pytest.raises(ValueError, match="`audio.0.` has a sampling rate of 44100 Hz"):
        processor(audio=noise(1), sampling_rate=44100)
    good, bad = {"array": noise(1), "sampling_rate": RATE}, {"array": noise(1), "sampling_rate": 8000}
    with pytest.raises(ValueError, match="`audio.1.` has a sampling rate of 8000 Hz"):
        processor(audio=[good, bad])
    caplog.set_level(logging.WARNING)
    assert_same(
        processor(audio=good, return_tensors="pt"), processor(audio=noise(1), sampling_rate=RATE, return_tensors="pt")
    )
    assert not caplog.records
    processor(audio=noise(1))
    processor(audio=noise(1))
    assert [record.getMessage()[:43] for record in caplog.records] == ["It is strongly recommended to pass the `sam"]


def test_kinds_of_frames(processor, tmp_path):
    video = frames(6)
    paths = [str(tmp_path / f"{index}.png") for index in range(6)]
    for path, frame in zip(paths, video):
        Image.fromarray(frame).save(path)
    sound = {"audio": [noise(1)], "sampling_rate": RATE, "return_tensors": "pt"}
    expected = processor(videos=[video], **sound)
    for same in ([list(video)], video.tolist(), [video.tolist()], [paths], [torch.from_numpy(video)], video[None]):
        batch = processor(videos=same, **sound)
        assert_same(batch, expected)
    two = {**sound, "audio": [noise(1)] * 2}
    for bad, message in (
        (video[None], r"`videos\[1\]` must be .* got shape \(1, 6, 40, 60, 3\)"),
        (video / 255, r"`videos\[1\]` holds floats up to"),
        ({"array": 1}, r"`videos\[1\]` must be .* got dict"),
    ):
        with pytest.raises(ValueError, match=message):
            processor(videos=[video, bad], **two)
    with pytest.raises(ValueError, match=r"`images\[1\]` holds floats up to"):
        processor(images=[video[0], video[0] / 255], **two)
    with pytest.raises(ValueError, match=r"one size, got `videos\[0\]`"):
        processor(videos=[video, video[:, :, :50]], do_center_crop=False, **two)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"media": {}}, r"`media\[0\]` must be a file .* got dict"),
        ({"media": ["", None]}, r"`media\[1\]` must be a file .* got NoneType"),
        ({"media": noise(1)}, r"`media\[0\]` must be a file .* got ndarray"),
        ({"media": {"bytes": None, "path": None}}, "names no file; give one of `bytes` and `path`"),
        ({"media": {"bytes": None}}, "names no file; give one of `bytes` and `path`"),
        ({"audio": {"array": None, "sampling_rate": RATE}}, r"`audio\[0\]` must be an array.*, got NoneType"),
        ({"audio": {"array": noise(1), "sampling_rate": None}}, r"`audio\[0\]` has a sampling rate of None Hz"),
        ({"audio": noise(1)[:0], "start": 0.5}, r"`audio\[0\]` is empty"),
        ({"audio": [noise(2).reshape(-1, 2)], "start": 0.5}, r"`audio\[0\]` has shape .* samples must come last"),
        ({"audio": [noise(1), noise(1) * np.nan]}, r"`audio\[1\]` holds NaN or infinite"),
        ({"audio": [["a", "b"]], "start": 0.5}, r"`audio\[0\]` is not a list of numbers"),
        ({"audio": [[0, 12000]]}, r"`audio\[0\]` must be .* floats in \[-1, 1\] .*, got int"),
        ({"audio": np.float32(1)}, "`audio` must be an array, a tensor or a list"),
        ({"audio": []}, "`audio` is empty"),
        ({"text": 3}, r"`text\[0\]` must be a string, got int"),
        ({"text": ["a dog", ["a", "dog"]]}, r"`text\[1\]` must be a string, got list"),
        ({"text": "a dog", "max_length": 1}, "`max_length` must leave room .*, got 1"),
    ],
)
def test_malformed_inputs(processor, inputs, message):
    with pytest.raises(ValueError, match=message) as error:
        processor(**inputs, **({"sampling_rate": RATE} if "audio" in inputs else {}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["video", "image"])
def test_singular_names_are_errors(processor, files, name):
    with pytest.raises(TypeError, match=f"`{name}` is not an argument: pass `{name}s`"):
        processor(audio=files["sound"], **{name: files["still"]})


def test_decoders_of_datasets(processor, files):
    decoders = pytest.importorskip("torchcodec.decoders", exc_type=(ImportError, OSError, RuntimeError))
    try:
        decoder = decoders.AudioDecoder(files["sound"], sample_rate=RATE)
    except RuntimeError as error:
        pytest.skip(f"torchcodec does not work here: {str(error).splitlines()[0]}")
    samples = decoder.get_all_samples().data.numpy()
    expected = processor(audio=[samples], sampling_rate=RATE, return_tensors="pt")
    assert_same(processor(audio=decoder, return_tensors="pt"), expected)
    assert_same(processor(audio=[decoder], return_tensors="pt"), expected)


def test_bad_calls(processor, files, tmp_path):
    with pytest.raises(ValueError, match="Nothing|at least one of them"):
        processor()
    with pytest.raises(ValueError, match="either `media`, or `audio`"):
        processor(media=files["clip"], audio=noise(1))
    with pytest.raises(ValueError, match="either `videos` or `images`"):
        processor(audio=noise(1), videos=frames(2), images=frames(1)[0], sampling_rate=RATE)
    with pytest.raises(ValueError, match="got 2, 1 and 0"):
        processor(audio=[noise(1), noise(1)], videos=[frames(4)], sampling_rate=RATE)
    with pytest.raises(ValueError, match="got 1, 1 and 2"):
        processor(media=files["clip"], text=["a", "a"])
    with pytest.raises(ValueError, match="`audio.1.` is None"):
        processor(audio=[noise(1), None], sampling_rate=RATE)
    with pytest.raises(ValueError, match=r"`audio\[0\]` must be .* got the keys \['samples'\]"):
        processor(audio={"samples": noise(1)})
    with pytest.raises(MediaError, match="missing.mp4"):
        processor(media=[files["clip"], str(tmp_path / "missing.mp4")])


IN_A_PROCESS_WITHOUT_THE_PACKAGE = """
    import sys
    sys.modules["evacap"] = None
    from transformers import AutoFeatureExtractor, AutoProcessor, AutoTokenizer, AutoVideoProcessor, logging
    folder, clip = sys.argv[1:]
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    assert type(processor).__name__ == "EVACapProcessor" and processor.modalities == "audio_video", processor
    parts = (
        AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=True),
        AutoVideoProcessor.from_pretrained(folder, trust_remote_code=True),
        AutoTokenizer.from_pretrained(folder, trust_remote_code=True),
    )
    assert [type(part).__name__ for part in parts[:2]] == ["EVACapFeatureExtractor", "EVACapVideoProcessor"]
    assert parts[0].to_dict() == processor.feature_extractor.to_dict()
    assert parts[1].to_dict() == processor.video_processor.to_dict()
    assert parts[2].get_vocab() == processor.tokenizer.get_vocab()
    batch = processor(media=clip, text="a dog barks", return_tensors="pt")
    processor.save_pretrained(folder + "_again")
    logging.set_verbosity_error()
    assert not sys.modules[type(processor).__module__].logger.isEnabledFor(logging.WARNING)
    print(*(f"{name} {value.double().abs().sum().item():.4f}" for name, value in batch.items()), sep="\\n")
"""


def run_in_a_process(code: str, *arguments: str, cache: Path) -> str:
    environment = {**os.environ, "HF_MODULES_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    result = subprocess.run(command, env=environment, cwd=cache, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_saved_folder_loads_with_and_without_the_package(files, tmp_path):
    processor = make_processor(num_frames=6)
    folder = tmp_path / "saved"
    processor.save_pretrained(folder)
    saved = json.loads((folder / "processor_config.json").read_text())
    assert saved["modalities"] == "audio_video" and saved["max_text_length"] == 40
    code = Path(sys.modules[EVACapProcessor.__module__].__file__).parent
    assert {path.name for path in folder.glob("*.py")} == {path.name for path in code.glob("*_evacap.py")}
    loaded = EVACapProcessor.from_pretrained(folder)
    assert loaded.feature_extractor.to_dict() == processor.feature_extractor.to_dict()
    assert loaded.video_processor.to_dict() == processor.video_processor.to_dict()
    batch = loaded(media=files["clip"], text="a dog barks", return_tensors="pt")
    assert_same(batch, processor(media=files["clip"], text="a dog barks", return_tensors="pt"))
    printed = run_in_a_process(IN_A_PROCESS_WITHOUT_THE_PACKAGE, str(folder), files["clip"], cache=tmp_path)
    assert printed.split("\n")[:-1] == [
        f"{name} {value.double().abs().sum().item():.4f}" for name, value in batch.items()
    ]
    code, code_again = (
        {path.name: path.read_text() for path in place.glob("*.py")} for place in (folder, tmp_path / "saved_again")
    )
    assert code_again == code


def test_pushes_a_folder_given_as_a_path(processor, tmp_path):
    # No hub can be reached: all that is asked is that the name of the folder is understood.
    with pytest.raises(OfflineModeIsEnabled):
        processor.save_pretrained(tmp_path / "saved", push_to_hub=True)


@pytest.mark.parametrize("group", ["common_kwargs", "audio_kwargs", "videos_kwargs", "text_kwargs"])
def test_return_tensors_in_any_group(processor, files, group):
    expected = processor(media=files["clip"], text="a dog", return_tensors="pt")
    assert_same(processor(media=files["clip"], text="a dog", **{group: {"return_tensors": "pt"}}), expected)
    assert isinstance(processor(text=["a dog"], **{group: {"return_tensors": "np"}})["labels"], np.ndarray)


def test_what_the_tokenizer_was_saved_with():
    processor = make_processor()
    tokenizer = BertTokenizer(
        vocab={word: index for index, word in enumerate(WORDS)}, padding="max_length", max_length=6
    )
    processor = EVACapProcessor(processor.feature_extractor, processor.video_processor, tokenizer)
    labels = processor(text=["a dog", "a dog barks while a man speaks"], return_tensors="pt")["labels"]
    assert labels.shape == (2, 6) and labels[1].tolist()[4:] == [SEP, -100], "[CLS] counts, which labels lack"
    assert processor(text=["a dog"], padding=False, return_tensors="pt")["labels"].shape == (1, 3)


def test_stills_have_no_clock(processor, files):
    long = str(Path(files["long"]))
    still = processor(images=files["still"], audio=files["sound"], return_tensors="pt").pixel_values_videos
    for name in ("images", "videos"):
        later = processor(audio=long, **{name: files["still"]}, start=3.0, duration=2.0, return_tensors="pt")
        torch.testing.assert_close(later.pixel_values_videos, still)


def test_media_that_has_been_read(processor, files):
    with processor.open(files["long"]) as reader:
        first, second = reader.read(2.0), reader.read(2.0)
    for clip, start in ((first, 0.0), (second, 2.0)):
        expected = processor(media=files["long"], start=start, duration=2.0, return_tensors="pt")
        batch = processor(media=clip, return_tensors="pt")
        torch.testing.assert_close(batch.pixel_values_videos, expected.pixel_values_videos)
        torch.testing.assert_close(batch.input_features, expected.input_features, atol=0.2, rtol=0)
        assert_same(processor(audio=[clip], videos=[clip], return_tensors="pt"), batch)


def test_silence_is_told(processor, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    path = write_clip(
        tmp_path / "silence.wav", seconds=1, video=None, audio="pcm_s16le", sound=np.zeros((1, 44100), "f4")
    )
    processor(media=path)
    processor(audio=[noise(1), 0 * noise(1)], sampling_rate=RATE)
    names = [record.getMessage().split(" is silent")[0] for record in caplog.records]
    assert names == [str(path), "audio[1]"]


def test_masks_are_bool(processor, files):
    batch = processor(media=[files["sound"], files["clip"]], return_tensors="pt")
    assert batch.pixel_values_videos_mask.dtype == torch.bool

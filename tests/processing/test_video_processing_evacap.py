import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from transformers.video_utils import VideoMetadata

from evacap.processing.media_evacap import load_media
from evacap.processing.video_processing_evacap import EVACapVideoProcessor


def counting_frames(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Frame `i` is filled with the value `i`: what was sampled can be read from the pixels."""
    return np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, height, width, 3)).copy()


def sampled(processor: EVACapVideoProcessor, video, **kwargs) -> list[int]:
    pixels = processor(video, do_normalize=False, return_tensors="pt", **kwargs).pixel_values_videos[0]
    return (pixels.mean(dim=(1, 2, 3)) * 255).round().int().tolist()


@pytest.fixture(scope="module")
def small() -> EVACapVideoProcessor:
    return EVACapVideoProcessor(num_frames=6, size={"shortest_edge": 32}, crop_size=32)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    """2 s at 10 frames per second."""
    path = str(tmp_path_factory.mktemp("clip") / "clip.mp4")
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=10, width=64, height=48, pix_fmt="yuv420p")
        for index, frame in enumerate(counting_frames(20) * 10):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = index, Fraction(1, 10)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def test_default_shape_and_pixels():
    frames = np.random.default_rng(0).integers(0, 256, (40, 224, 300, 3), dtype=np.uint8)
    batch = EVACapVideoProcessor()(frames, return_tensors="pt")
    assert list(batch) == ["pixel_values_videos"]
    assert batch.pixel_values_videos.shape == (1, 18, 3, 224, 224)
    # The shorter side is 224 already: the pixels are those of the centre crop, normalised.
    expected = torch.from_numpy(frames[[1, 3, 5]])[:, :, 38:262].permute(0, 3, 1, 2) / 255
    expected = (expected - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[
        :, None, None
    ]
    torch.testing.assert_close(batch.pixel_values_videos[0, :3], expected, atol=1e-5, rtol=0)


def test_resize_is_bicubic_of_the_shorter_side():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))
    processor = EVACapVideoProcessor(num_frames=1, size={"shortest_edge": 32}, crop_size=32)
    ours = processor(picture, do_normalize=False, return_tensors="np")["pixel_values_videos"][0, 0] * 255
    pillow = np.asarray(picture.resize((48, 32), Image.Resampling.BICUBIC))[:, 8:40].transpose(2, 0, 1)
    np.testing.assert_allclose(ours, pillow, atol=1.5)


def test_uniform_takes_the_centres_of_equal_parts(small):
    assert sampled(small, counting_frames(60)) == [5, 15, 25, 35, 45, 55]
    assert sampled(small, counting_frames(6)) == [0, 1, 2, 3, 4, 5]
    assert sampled(small, counting_frames(3)) == [0, 0, 1, 1, 2, 2]
    assert sampled(small, counting_frames(1)) == [0] * 6
    assert sampled(small, counting_frames(60), num_frames=2) == [15, 45]


def test_middle_run(small):
    metadata = VideoMetadata(total_num_frames=60, fps=10)
    consecutive = sampled(small, counting_frames(60), frame_sampling="middle", fps=10, video_metadata=[metadata])
    assert consecutive == [27, 28, 29, 30, 31, 32]
    every_other = sampled(small, counting_frames(60), frame_sampling="middle", fps=5, video_metadata=[metadata])
    assert every_other == [25, 27, 29, 31, 33, 35]
    assert metadata.frames_indices is None, "the caller's metadata stay as they were"


def test_middle_needs_a_rate(small, clip):
    with pytest.raises(ValueError, match="`frame_sampling='middle'` needs `fps`"):
        EVACapVideoProcessor(frame_sampling="middle")
    for video in (counting_frames(60), clip):
        with pytest.raises(ValueError, match="`frame_sampling='middle'` needs `fps`"):
            small(video, frame_sampling="middle")


def test_frames_per_second(small):
    metadata = {"total_num_frames": 60, "fps": 10}
    assert sampled(small, counting_frames(60), fps=1, video_metadata=metadata) == [5, 15, 25, 35, 45, 55]
    assert small(counting_frames(60), fps=2, video_metadata=metadata).pixel_values_videos[0].shape[0] == 12
    with pytest.raises(ValueError, match="`fps=2` needs `video_metadata`"):
        small(counting_frames(60), fps=2)


def test_odd_counts_fill_the_tubelet():
    processor = EVACapVideoProcessor(num_frames=5, size={"shortest_edge": 32}, crop_size=32)
    assert sampled(processor, counting_frames(5)) == [0, 1, 2, 3, 4, 4]
    assert sampled(processor, counting_frames(3), do_sample_frames=False) == [0, 1, 2, 2]
    single = EVACapVideoProcessor(num_frames=1, size={"shortest_edge": 32}, crop_size=32)
    assert single.tubelet_size == 1
    assert sampled(single, counting_frames(9)) == [4]


def test_input_kinds_give_the_same(small):
    frames = np.random.default_rng(0).integers(0, 256, (9, 48, 64, 3), dtype=np.uint8)
    expected = small(frames, return_tensors="pt").pixel_values_videos
    pictures = [Image.fromarray(frame) for frame in frames]
    channels_first = torch.from_numpy(frames).permute(0, 3, 1, 2)
    for same in (pictures, channels_first, list(frames), [frames], frames[None], [pictures], tuple(pictures)):
        assert torch.equal(small(same, return_tensors="pt").pixel_values_videos, expected)
    for same in (frames.astype(np.int64), frames.astype(np.uint16), frames.tolist(), [frames.tolist()]):
        assert torch.equal(small(same, return_tensors="pt").pixel_values_videos, expected)
    # A bicubic resize of floats overshoots where one of bytes is cut.
    floats = small(frames.astype(np.float32), return_tensors="pt").pixel_values_videos
    torch.testing.assert_close(floats, expected, atol=0.3, rtol=0)
    mixed = small([frames, pictures, channels_first], return_tensors="pt").pixel_values_videos
    assert torch.equal(mixed, expected.repeat(3, 1, 1, 1, 1))
    grey = [picture.convert("L") for picture in pictures]
    assert small(grey, return_tensors="pt").pixel_values_videos.shape == expected.shape
    assert small(frames[..., :1], return_tensors="pt").pixel_values_videos.shape == expected.shape
    still = small(pictures[0], return_tensors="pt").pixel_values_videos
    assert torch.equal(still, small(frames[:1], return_tensors="pt").pixel_values_videos)


def test_files(small, clip, tmp_path):
    expected = small(load_media(clip, num_frames=6).frames, return_tensors="pt").pixel_values_videos
    content = Path(clip).read_bytes()
    for source in (clip, Path(clip), content, memoryview(content), {"bytes": content, "path": None}):
        assert torch.equal(small(source, return_tensors="pt").pixel_values_videos, expected)
    with open(clip, "rb") as file:
        assert torch.equal(small([file, clip], return_tensors="pt").pixel_values_videos[1:], expected)
    metadata = [{"total_num_frames": 6, "fps": 2}] * 2
    by_rate = small([clip, counting_frames(6)], fps=2, return_tensors="pt", video_metadata=metadata)
    assert by_rate.pixel_values_videos.shape[:2] == (2, 6)
    assert by_rate.pixel_values_videos_mask.tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]
    with pytest.raises(ValueError, match="`do_sample_frames=False` needs decoded frames"):
        small(clip, do_sample_frames=False)
    with pytest.raises(ValueError, match="missing.mp4"):
        small(str(tmp_path / "missing.mp4"))


def test_a_list_of_picture_files_is_one_video(small, clip, tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (6, 48, 64, 3), dtype=np.uint8)
    paths = [tmp_path / f"{index}.png" for index in range(6)]
    for path, frame in zip(paths, frames):
        Image.fromarray(frame).save(path)
    expected = small([frames, frames[:2]], return_tensors="pt").pixel_values_videos
    batch = small([paths, [path.read_bytes() for path in paths[:2]]], return_tensors="pt").pixel_values_videos
    assert torch.equal(batch, expected)
    with pytest.raises(ValueError, match=r"clip.mp4: is not a picture, but `videos\[0\]` is a list of files"):
        small([[paths[0], clip]])


def test_floats_up_to_one_need_do_rescale_false(small):
    frames = counting_frames(6) * 20
    for floats in (frames / 255, torch.from_numpy(frames / 255).permute(0, 3, 1, 2), (frames[1] / 255).tolist()):
        with pytest.raises(ValueError, match=r"`videos\[1\]` holds floats up to .* do_rescale=False"):
            small([frames, floats])
    whole = small(frames, return_tensors="pt").pixel_values_videos
    scaled = small(frames / 255, do_rescale=False, return_tensors="pt").pixel_values_videos
    torch.testing.assert_close(scaled.float(), whole, atol=1e-2, rtol=0)
    assert small(np.zeros((2, 48, 64, 3)), do_normalize=False)["pixel_values_videos"][0].max() == 0, "black is black"


def test_a_batch_of_several_sizes(small):
    videos = [counting_frames(6), counting_frames(6, width=80)]
    with pytest.raises(ValueError, match=r"one size, got `videos\[0\]` \(3, 32, 42\), `videos\[1\]` \(3, 32, 53\)"):
        small(videos, do_center_crop=False, return_tensors="pt")


def test_ragged_batch_is_padded_with_a_mask(small):
    videos = [counting_frames(4), counting_frames(7), counting_frames(2)]
    batch = small(videos, do_sample_frames=False, return_tensors="pt")
    assert batch.pixel_values_videos.shape[:2] == (3, 8)
    assert batch.pixel_values_videos_mask.sum(-1).tolist() == [4, 8, 2]
    assert batch.pixel_values_videos[0, 4:].abs().max() == 0
    alone = small(videos[0], do_sample_frames=False, return_tensors="pt")
    assert list(alone) == ["pixel_values_videos"]
    assert torch.equal(batch.pixel_values_videos[0, :4], alone.pixel_values_videos[0])
    unpadded = small(videos, do_sample_frames=False)["pixel_values_videos"]
    assert [len(video) for video in unpadded] == [4, 8, 2]
    in_numpy = small(videos, do_sample_frames=False, return_tensors="np")
    assert isinstance(in_numpy["pixel_values_videos_mask"], np.ndarray)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        ([], "`videos` is empty"),
        ([counting_frames(3), []], r"`videos\[1\]` has no frames"),
        (np.zeros((0, 8, 8, 3), np.uint8), r"`videos\[0\]` must be .* got shape \(0, 8, 8, 3\)"),
        (np.zeros((8, 8), np.uint8), r"`videos\[0\]` must be .* got shape \(8, 8\)"),
        (np.zeros((4, 8, 8, 5), np.uint8), r"`videos\[0\]` has shape \(4, 8, 8, 5\)"),
        (
            [np.zeros((2, 8, 8, 3), np.uint8), np.zeros((2, 8, 8, 3), bool)],
            r"`videos\[1\]` must hold numbers, got bool",
        ),
        ([[Image.new("RGB", (8, 8)), Image.new("RGB", (9, 8))]], r"The frames of `videos\[0\]` must be .* same size"),
        (np.full((2, 8, 8, 3), 300, np.uint16), r"`videos\[0\]` holds integers from 300 to 300, expected 0 to 255"),
        (17, r"`videos\[0\]` must be a path, an array, a tensor or a list of frames, got int"),
    ],
)
def test_bad_input(small, video, message):
    with pytest.raises(ValueError, match=message) as error:
        small(video, return_tensors="pt")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("argument", "value"), [("frame_sampling", "random"), ("num_frames", -2), ("fps", -1.0)])
def test_bad_configuration(small, argument, value):
    with pytest.raises(ValueError, match=f"`{argument}`"):
        EVACapVideoProcessor(**{argument: value})
    with pytest.raises(ValueError, match=argument):
        small(counting_frames(9), **{argument: value})


def test_round_trip(tmp_path):
    processor = EVACapVideoProcessor(
        num_frames=6, fps=2.5, frame_sampling="middle", size={"shortest_edge": 64}, crop_size=64, image_mean=[0.4] * 3
    )
    processor.save_pretrained(tmp_path)
    loaded = EVACapVideoProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    saved = json.loads((tmp_path / "video_preprocessor_config.json").read_text())
    assert saved["frame_sampling"] == "middle" and saved["tubelet_size"] == 2 and saved["resample"] == 3

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from evacap.training.collator import EVACapDataCollator


def make_features(count, frames=4, seed=0):
    """Clips whose sound, picture and labels all carry the clip's number."""
    lengths = np.random.default_rng(seed).integers(2, 9, count)
    return [
        {
            "input_features": np.full((6, 3), number, np.float32),
            "pixel_values_videos": np.full((frames, 3, 2, 2), number, np.float32),
            "labels": [seed, number, *range(length)],
        }
        for number, length in enumerate(lengths)
    ]


def test_without_swaps_every_clip_keeps_its_video():
    features = make_features(5)
    batch = EVACapDataCollator(p_mix=0.0)(features)
    assert batch["input_features"].shape == (5, 6, 3)
    assert batch["pixel_values_videos"].shape == (5, 4, 3, 2, 2)
    assert torch.equal(batch["pixel_values_videos"][:, 0, 0, 0, 0], torch.arange(5.0))
    assert batch["shuffled"].dtype == torch.bool and not batch["shuffled"].any()
    assert batch["video_index"].dtype == torch.long and batch["video_index"].tolist() == [0, 1, 2, 3, 4]
    assert "pixel_values_videos_mask" not in batch
    for row, clip in zip(batch["labels"], features, strict=True):
        assert row[: len(clip["labels"])].tolist() == clip["labels"]
        assert (row[len(clip["labels"]) :] == -100).all()


def test_a_swapped_clip_carries_the_video_that_video_index_names():
    batch = EVACapDataCollator(p_mix=0.5, seed=3)(make_features(64))
    assert 0 < batch["shuffled"].sum() < 64
    assert torch.equal(batch["pixel_values_videos"][:, 0, 0, 0, 0], batch["video_index"].float())
    assert torch.equal(batch["input_features"][:, 0, 0], torch.arange(64.0))
    assert torch.equal(batch["shuffled"], batch["video_index"] != torch.arange(64))


def test_with_probability_one_the_videos_are_a_permutation():
    video_index = EVACapDataCollator(p_mix=1.0)(make_features(50))["video_index"]
    assert sorted(video_index.tolist()) == list(range(50))
    assert video_index.tolist() != list(range(50))


@pytest.mark.parametrize("p_mix", [0.05, 0.3])
def test_swaps_have_the_asked_probability_and_uniform_origins(p_mix):
    size, batches = 16, 1000
    collator = EVACapDataCollator(p_mix=p_mix)
    origins = torch.stack([collator(make_features(size, 2, seed))["video_index"] for seed in range(batches)])
    swapped = origins != torch.arange(size)
    # A uniform permutation leaves a sample where it was once in `size` times.
    expected = p_mix * (1 - 1 / size)
    tolerance = 4 * (expected * (1 - expected) / (size * batches)) ** 0.5
    assert abs(swapped.double().mean().item() - expected) < tolerance
    shifts = torch.bincount(((origins - torch.arange(size)) % size)[swapped], minlength=size)[1:].double()
    assert ((shifts - shifts.mean()).abs() < 5 * shifts.mean().sqrt()).all()


def test_the_seed_decides_and_only_the_seed():
    features = make_features(64)
    draw = lambda seed: EVACapDataCollator(p_mix=0.5, seed=seed)(features)["video_index"].tolist()  # noqa: E731
    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_other_batches_get_other_swaps():
    collator = EVACapDataCollator(p_mix=0.5)
    first, second = collator(make_features(64, seed=1)), collator(make_features(64, seed=2))
    assert first["video_index"].tolist() != second["video_index"].tolist()


class Augmented(torch.utils.data.Dataset):
    """Clips whose sound is changed at random, differently in every worker."""

    def __init__(self, features):
        self.features = features

    def __len__(self):
        return len(self.features)

    def __getitem__(self, index):
        clip = self.features[index]
        return clip | {"input_features": torch.as_tensor(clip["input_features"]) + torch.rand(6, 3)}


def test_the_number_of_workers_does_not_change_the_swaps():
    def draw(num_workers):
        loader = DataLoader(
            Augmented(make_features(96)),
            batch_size=16,
            num_workers=num_workers,
            collate_fn=EVACapDataCollator(p_mix=0.5),
            shuffle=True,
            generator=torch.Generator().manual_seed(0),
        )
        return [(batch["labels"][:, 1].tolist(), batch["video_index"].tolist()) for batch in loader]

    alone = draw(0)
    assert alone == draw(1) == draw(2)
    assert len({tuple(video_index) for _, video_index in alone}) == 6


def test_missing_videos_and_frames_are_masked_and_travel_with_the_swap():
    features = make_features(6)
    features[1]["pixel_values_videos"] = None
    del features[2]["pixel_values_videos"]
    features[3]["pixel_values_videos"] = features[3]["pixel_values_videos"][:2]
    features[4]["pixel_values_videos_mask"] = [1, 1, 1, 0]
    own = torch.tensor([4, 0, 0, 2, 3, 4])

    batch = EVACapDataCollator(p_mix=0.0)(features)
    assert batch["pixel_values_videos_mask"].sum(1).tolist() == own.tolist()
    assert not batch["pixel_values_videos"][[1, 2]].any() and not batch["pixel_values_videos"][3, 2:].any()

    swapped = EVACapDataCollator(p_mix=1.0)(features)
    assert swapped["shuffled"].any()
    assert torch.equal(swapped["pixel_values_videos_mask"].sum(1), own[swapped["video_index"]])


def test_the_own_videos_of_swapped_clips_come_along_on_request():
    features = make_features(16)
    batch = EVACapDataCollator(p_mix=0.5, keep_matched=True)(features)
    own = torch.arange(16.0)[batch["shuffled"]]
    assert len(own) > 0 and torch.equal(batch["matched_pixel_values_videos"][:, 0, 0, 0, 0], own)
    assert "matched_pixel_values_videos_mask" not in batch

    features[0]["pixel_values_videos"] = None
    batch = EVACapDataCollator(p_mix=1.0, keep_matched=True)(features)
    frames = torch.tensor([0] + [4] * 15)[batch["shuffled"]]
    assert torch.equal(batch["matched_pixel_values_videos_mask"].sum(1), frames)

    assert "matched_pixel_values_videos" not in EVACapDataCollator(p_mix=0.0, keep_matched=True)(features)
    assert "matched_pixel_values_videos" not in EVACapDataCollator(p_mix=1.0)(features)


def test_sound_alone():
    features = make_features(3)
    for clip in features:
        clip["pixel_values_videos"] = None
    assert set(EVACapDataCollator()(features)) == {"input_features", "labels"}


def test_picture_alone():
    features = [{name: clip[name] for name in ("pixel_values_videos", "labels")} for clip in make_features(3)]
    assert "input_features" not in EVACapDataCollator()(features)


@pytest.mark.parametrize("p_mix", [-0.1, 1.5])
def test_a_wrong_probability_is_named(p_mix):
    with pytest.raises(ValueError, match=f"p_mix={p_mix}.*0 to 1"):
        EVACapDataCollator(p_mix=p_mix)


def test_clips_that_do_not_fit_together_are_named():
    features = make_features(2)
    features[1]["input_features"] = np.zeros((7, 3), np.float32)
    with pytest.raises(ValueError, match=r"input_features.*\(6, 3\).*\(7, 3\)"):
        EVACapDataCollator()(features)
    features = make_features(2)
    features[1]["pixel_values_videos"] = np.zeros((4, 3, 2, 5), np.float32)
    with pytest.raises(ValueError, match=r"pixel_values_videos.*\(3, 2, 2\).*\(3, 2, 5\)"):
        EVACapDataCollator()(features)

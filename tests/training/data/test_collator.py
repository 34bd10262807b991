import itertools
import math
import multiprocessing
from collections import Counter

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from evacap.training.data.collator import EVACapDataCollator


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


def draw(number: int, size: int, **options) -> torch.Tensor:
    """Where the videos of the batch with this number come from: tiny clips, as only that matters."""
    clip = {"pixel_values_videos": np.zeros((1, 1, 1, 1), np.float32), "labels": [number, 3]}
    return EVACapDataCollator(**options)([clip] * size)["video_index"]


def assert_frequencies(outcomes: list, expected: dict) -> None:
    """Pearson's chi-square test of `outcomes` against their probabilities.

    Its statistic has a mean of its degrees of freedom and a variance of twice as much; five deviations above are
    less likely than one in a thousand, and with a fixed seed nothing here is left to chance.
    """
    counts = Counter(outcomes)
    assert set(counts) <= set(expected), f"impossible: {set(counts) - set(expected)}"
    assert sum(expected.values()) == pytest.approx(1)
    statistic = sum((counts[key] - (e := len(outcomes) * p)) ** 2 / e for key, p in expected.items())
    freedom = len(expected) - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom), (statistic, freedom)


def test_the_permutations_are_uniform():
    drawn = [tuple(draw(number, 4, p_mix=1.0).tolist()) for number in range(4000)]
    assert_frequencies(drawn, dict.fromkeys(itertools.permutations(range(4)), 1 / 24))


def test_without_fixed_points_the_permutations_are_uniform_derangements():
    derangements = [p for p in itertools.permutations(range(4)) if all(i != j for i, j in enumerate(p))]
    drawn = [tuple(draw(number, 4, p_mix=1.0, fixed_points=False).tolist()) for number in range(3000)]
    assert_frequencies(drawn, dict.fromkeys(derangements, 1 / 9))


@pytest.mark.parametrize("fixed_points", [True, False])
def test_every_other_clip_is_equally_likely_as_the_source(fixed_points):
    size, p_mix, batches = 5, 0.3, 3000
    pairs = [
        (place, source)
        for number in range(batches)
        for place, source in enumerate(draw(number, size, p_mix=p_mix, fixed_points=fixed_points).tolist())
    ]
    moved = p_mix * (1 - 1 / size) if fixed_points else p_mix
    for place in range(size):
        sources = [source for target, source in pairs if target == place]
        assert_frequencies(
            sources, {source: 1 - moved if source == place else moved / (size - 1) for source in range(size)}
        )


def test_the_throws_of_the_clips_are_independent():
    """Without fixed points a clip is swapped exactly where its throw says so: all patterns of four throws."""
    p_mix = 0.3
    patterns = [
        tuple((draw(number, 4, p_mix=p_mix, fixed_points=False) != torch.arange(4)).tolist()) for number in range(4000)
    ]
    expected = {
        throws: math.prod(p_mix if throw else 1 - p_mix for throw in throws)
        for throws in itertools.product([False, True], repeat=4)
    }
    assert_frequencies(patterns, expected)


def test_the_throws_do_not_depend_on_the_permutation():
    """Of the clips that the permutation moves, those that are swapped come from every other place alike."""
    drawn = [tuple(draw(number, 3, p_mix=0.5, fixed_points=False).tolist()) for number in range(3000)]
    # Two permutations move all three clips; each clip takes its source from the one that was drawn, or stays.
    expected = Counter()
    for permuted in ((1, 2, 0), (2, 0, 1)):
        for throws in itertools.product([False, True], repeat=3):
            expected[tuple(permuted[i] if throw else i for i, throw in enumerate(throws))] += 1 / 16
    assert_frequencies(drawn, expected)


@pytest.mark.parametrize("fixed_points", [True, False])
def test_a_whole_batch_is_swapped_or_none_of_it(fixed_points):
    p_mix = 0.3
    drawn = [
        tuple(draw(number, 3, p_mix=p_mix, fixed_points=fixed_points, whole_batch=True).tolist())
        for number in range(3000)
    ]
    own = (0, 1, 2)
    permutations = list(itertools.permutations(own)) if fixed_points else [(1, 2, 0), (2, 0, 1)]
    expected = Counter({own: 1 - p_mix}) + Counter(dict.fromkeys(permutations, p_mix / len(permutations)))
    assert_frequencies(drawn, expected)


@pytest.mark.parametrize("fixed_points", [True, False])
@pytest.mark.parametrize("whole_batch", [True, False])
def test_a_batch_of_one_keeps_its_video(fixed_points, whole_batch):
    options = {"p_mix": 1.0, "fixed_points": fixed_points, "whole_batch": whole_batch, "keep_matched": True}
    assert all(draw(number, 1, **options).tolist() == [0] for number in range(20))
    assert "matched_pixel_values_videos" not in EVACapDataCollator(**options)(make_features(1))


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


def swaps_of(loader) -> list[tuple[list[int], list[int]]]:
    return [(batch["labels"][:, 1].tolist(), batch["video_index"].tolist()) for batch in loader]


def make_loader(**options) -> DataLoader:
    return DataLoader(
        Augmented(make_features(96)),
        batch_size=8,
        collate_fn=EVACapDataCollator(p_mix=0.5),
        shuffle=True,
        generator=torch.Generator().manual_seed(0),
        **options,
    )


def test_whichever_process_makes_a_batch_its_swaps_are_the_same():
    alone = swaps_of(make_loader())
    shares = [
        swaps_of(prepare_data_loader(make_loader(), num_processes=2, process_index=process, put_on_device=False))
        for process in range(2)
    ]
    assert shares[0] == alone[0::2] and shares[1] == alone[1::2]


def test_after_a_resume_the_swaps_go_on():
    assert swaps_of(skip_first_batches(make_loader(num_workers=1), 5)) == swaps_of(make_loader())[5:]


def test_a_process_of_its_own_draws_the_same_swaps():
    """Started anew, so that nothing is inherited: neither a generator's state nor the salt of Python's hashes."""
    seeds = range(20)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        other = pool.map(swaps_at_seed, seeds)
    assert other == [swaps_at_seed(seed) for seed in seeds]


def swaps_at_seed(seed: int) -> list[int]:
    return EVACapDataCollator(p_mix=0.5, seed=seed)(make_features(16))["video_index"].tolist()


def test_the_captions_decide_however_they_are_stored():
    features = make_features(16)
    expected = EVACapDataCollator(p_mix=0.5)(features)["video_index"].tolist()
    for store in (np.int32, np.int64, lambda ids: torch.tensor(ids), lambda ids: [*ids, -100, -100]):
        if isinstance(store, type):
            stored = [clip | {"labels": np.array(clip["labels"], store)} for clip in features]
        else:
            stored = [clip | {"labels": store(clip["labels"])} for clip in features]
        assert EVACapDataCollator(p_mix=0.5)(stored)["video_index"].tolist() == expected
    another = [features[0] | {"labels": [*features[0]["labels"], 7]}, *features[1:]]
    assert EVACapDataCollator(p_mix=0.5)(another)["video_index"].tolist() != expected
    assert EVACapDataCollator(p_mix=0.5)(features[::-1])["video_index"].tolist() != expected


def test_the_same_captions_in_the_same_order_have_the_same_swaps():
    """What follows from "captions alone": other sounds and pictures under the same captions change nothing."""
    features = make_features(16)
    others = [clip | {"input_features": clip["input_features"] + 1} for clip in features]
    first, second = (EVACapDataCollator(p_mix=0.5)(clips)["video_index"].tolist() for clips in (features, others))
    assert first == second


def test_without_captions_the_sound_decides():
    def swaps(shift: float, *names: str) -> list[int]:
        clips = [{name: clip[name] + shift for name in names} for clip in make_features(16)]
        return EVACapDataCollator(p_mix=0.5)(clips)["video_index"].tolist()

    for names in (("input_features", "pixel_values_videos"), ("pixel_values_videos",)):
        assert swaps(0, *names) == swaps(0, *names)
        assert swaps(0, *names) != swaps(1, *names)


class NewBytes(TorchDispatchMode):
    """Counts the bytes of all new floating-point tensors; those that it has seen stay alive, and so their addresses."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor) and output.is_floating_point():
            self.storages[output.untyped_storage().data_ptr()] = output.untyped_storage()
        return output


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("p_mix", [0.0, 1.0])
def test_every_video_is_copied_once(p_mix, missing):
    videos = torch.rand(8, 4, 3, 32, 32)
    features = [{"pixel_values_videos": video, "labels": [number]} for number, video in enumerate(videos)]
    if missing:
        features[0]["pixel_values_videos"] = None
        features[1]["pixel_values_videos"] = videos[1, :2]
    with NewBytes() as counted:
        batch = EVACapDataCollator(p_mix=p_mix)(features)
    new = {address: storage.nbytes() for address, storage in counted.storages.items()}
    for video in videos:
        new.pop(video.untyped_storage().data_ptr(), None)
    # Beside the batch itself: what fills up the two clips that are not whole.
    size = batch["pixel_values_videos"].nbytes
    assert size <= sum(new.values()) <= size * (1 + 2 / 8 * missing)


@pytest.mark.parametrize("p_mix", [0.0, 1.0])
def test_with_a_video_shape_a_batch_without_pictures_carries_zeros(p_mix):
    features = make_features(6)
    for clip in features:
        clip["pixel_values_videos"] = None
    collator = EVACapDataCollator(p_mix=p_mix, video_shape=(4, 3, 2, 2), keep_matched=True)
    batch = collator(features)
    assert batch["pixel_values_videos"].shape == (6, 4, 3, 2, 2)
    assert batch["pixel_values_videos"].dtype == torch.float32 and not batch["pixel_values_videos"].any()
    assert batch["pixel_values_videos_mask"].dtype == torch.bool
    assert batch["pixel_values_videos_mask"].shape == (6, 4) and not batch["pixel_values_videos_mask"].any()
    assert batch["shuffled"].any() == (p_mix == 1.0)
    assert torch.equal(batch["shuffled"], batch["video_index"] != torch.arange(6))
    assert ("matched_pixel_values_videos_mask" in batch) == (p_mix == 1.0)


def test_a_video_shape_changes_no_batch_that_has_pictures():
    features = make_features(6)
    features[1]["pixel_values_videos"] = None
    plain, shaped = (EVACapDataCollator(0.5, video_shape=shape)(features) for shape in (None, (18, 3, 2, 2)))
    assert plain.keys() == shaped.keys()
    assert all(torch.equal(plain[name], shaped[name]) for name in plain)
    with pytest.raises(ValueError, match=r"frames of \(3, 2, 2\).*video_shape=\(4, 3, 9, 9\)"):
        EVACapDataCollator(video_shape=(4, 3, 9, 9))(features)


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
    with pytest.raises(ValueError, match=r"one size.*\(3, 2, 2\).*\(3, 2, 5\)"):
        EVACapDataCollator()(features)


@pytest.mark.parametrize("options", [{"seed": -1}, {"video_shape": (4, 3, 2)}, {"video_shape": (0, 3, 2, 2)}])
def test_a_wrong_option_is_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        EVACapDataCollator(**options)


@pytest.mark.parametrize("name", ["input_features", "labels"])
@pytest.mark.parametrize("place", [0, 2])
def test_what_one_clip_lacks_is_named(name, place):
    features = make_features(3)
    del features[place][name]
    with pytest.raises(ValueError, match=f"{name} is missing in 1 of 3 clips of a batch, first in clip {place}"):
        EVACapDataCollator()(features)


def test_a_mask_of_another_length_is_named():
    features = make_features(2)
    features[1]["pixel_values_videos_mask"] = [1, 1]
    with pytest.raises(ValueError, match=r"mask of clip 1 has shape \(2,\), but the clip has 4 frames"):
        EVACapDataCollator()(features)

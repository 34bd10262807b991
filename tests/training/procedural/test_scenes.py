import itertools
import json
import subprocess
import sys

import av
import numpy as np
import pytest

from evacap.training.procedural.captions import build_tokenizer, closed_vocabulary, names_in_caption
from evacap.training.procedural.kinds import KINDS, SOUND_ALIKES, UNSEEN
from evacap.training.procedural.pictures import Actor, Place, draw
from evacap.training.procedural.scenes import (
    SPLITS,
    make_scene,
    render,
    render_frames,
    render_waveform,
    write_clip,
    write_dataset,
)
from evacap.training.procedural.sounds import SOUNDS, synthesize


def scenes(count, split="train", seed=0):
    return [make_scene(seed, split, index) for index in range(count)]


def same_clip(first, second):
    return np.array_equal(first.waveform, second.waveform) and np.array_equal(first.frames, second.frames)


def test_there_are_sixteen_kinds_of_five_families_and_four_sound_alike_pairs():
    assert len(KINDS) >= 16
    assert {kind.family for kind in KINDS.values()} == {
        "tonal",
        "noisy",
        "impulsive",
        "speech-like",
        "engine-like",
    }
    alike = [
        (first, second)
        for first, second in itertools.combinations(KINDS, 2)
        if KINDS[first].sound == KINDS[second].sound
    ]
    assert len(alike) == 4 and SOUND_ALIKES == {name for pair in alike for name in pair}
    assert all(KINDS[first].look != KINDS[second].look for first, second in alike)
    looks = [kind.look for kind in KINDS.values()]
    assert len(looks) - len(set(looks)) >= 2


def test_the_same_seed_gives_the_same_clip():
    for index in range(5):
        assert same_clip(render(make_scene(7, "test", index)), render(make_scene(7, "test", index)))
        assert make_scene(7, "test", index).captions == make_scene(7, "test", index).captions


def test_seeds_splits_and_indices_give_other_clips():
    clip = render(make_scene(0, "train", 0))
    for other in (make_scene(1, "train", 0), make_scene(0, "test", 0), make_scene(0, "train", 1)):
        assert not same_clip(clip, render(other))


def test_no_two_splits_share_a_scene():
    content = [{(scene.events, scene.noise) for scene in scenes(1000, split)} for split in SPLITS]
    assert len(set.union(*content)) == 3000


def test_rendered_clip():
    for scene in scenes(20):
        clip = render(scene, fps=8, size=48)
        assert clip.waveform.shape == (80_000,) and clip.waveform.dtype == np.float32
        assert 0.01 < np.abs(clip.waveform).max() <= 1
        assert clip.frames.shape == (40, 48, 48, 3) and clip.frames.dtype == np.uint8
        assert np.allclose(np.diff(clip.timestamps), 1 / 8)
    assert render_waveform(make_scene(0, "train", 0, duration=8.5)).shape == (136_000,)


def test_every_event_lies_inside_its_clip_and_is_heard():
    for scene in scenes(200):
        assert list(scene.events) == sorted(scene.events, key=lambda event: event.onset)
        for event in scene.events:
            assert 0 <= event.onset < event.offset <= scene.duration and event.duration > 0.8
    quiet_lead = 0.0
    for scene in scenes(20):
        waveform = render_waveform(scene)
        for event in scene.events:
            heard = waveform[round(event.onset * 16_000) : round(event.offset * 16_000)]
            lead = waveform[: round(scene.events[0].onset * 16_000)]
            quiet_lead += np.sqrt(np.mean(heard**2)) > 2 * np.sqrt(np.mean(lead**2))
    assert quiet_lead == sum(len(scene.events) for scene in scenes(20))


def test_the_design_appears_in_the_scenes():
    sample = scenes(1000)
    events = [event for scene in sample for event in scene.events]
    assert {event.kind for event in events} == set(KINDS)
    assert 0.1 < np.mean([event.place is None for event in events]) < 0.3
    assert {len(scene.silent_objects) for scene in sample} == {0, 1, 2}
    assert {tuple(len(group) for group in scene.groups) for scene in sample} == {
        (1,),
        (2,),
        (1, 1),
        (2, 1),
        (1, 2),
        (1, 1, 1),
    }
    for scene in sample:
        sounds = [KINDS[event.kind].sound for event in scene.events]
        assert len(set(sounds)) == len(sounds)
        assert not {KINDS[silent.kind].sound for silent in scene.silent_objects} & set(sounds)


def test_only_what_is_on_screen_is_drawn_and_only_what_sounds_moves():
    for scene in scenes(100):
        frames = render_frames(scene, np.arange(0, 5, 0.05), 32).astype(int)
        places = [event.place for event in scene.events if event.place]
        drawn = np.ptp(frames[0], axis=1).max() > 40
        assert drawn == bool(places or scene.silent_objects)
        moving = np.ptp(frames, axis=0).max() > 40
        assert moving == bool(places)


def spectrum(kind, seed=0):
    """Mean power in 40 bands, in decibels, at the usual pitch and rhythm."""
    samples = synthesize(KINDS[kind].sound, np.random.default_rng(seed), 3.0, 1.0, 1.0)
    power = np.abs(np.fft.rfft(samples)) ** 2
    edges = np.geomspace(60, 8000, 41) * 3
    return np.array([10 * np.log10(power[int(a) : int(b)].mean() + 1e-3) for a, b in itertools.pairwise(edges)])


def test_sound_alikes_sound_the_same_and_all_others_differ():
    spectra = {kind: spectrum(kind) for kind in KINDS}
    for first, second in itertools.combinations(KINDS, 2):
        distance = np.abs(spectra[first] - spectra[second]).mean()
        if KINDS[first].sound == KINDS[second].sound:
            assert distance == 0
        else:
            repeat = np.abs(spectra[first] - spectrum(first, seed=1)).mean()
            assert distance > 3 and distance > 1.5 * repeat, (first, second, distance, repeat)


@pytest.mark.parametrize("sound", SOUNDS)
def test_every_sound_is_finite_and_at_its_level(sound):
    for seed, (seconds, pitch, rhythm) in enumerate([(0.3, 0.8, 0.7), (1.0, 1.2, 1.4), (9.5, 1.0, 1.0)]):
        samples = synthesize(sound, np.random.default_rng(seed), seconds, pitch, rhythm)
        assert samples.dtype == np.float32 and len(samples) == round(seconds * 16_000)
        assert np.isfinite(samples).all() and np.abs(samples).max() < 0.81
        assert 0.005 < np.sqrt(np.mean(samples**2)) < 0.101


def test_sound_alikes_have_clearly_different_colours():
    def colour(kind):
        actor = Actor(KINDS[kind].look, Place(0.5, 0.5, 0.35))
        frame = draw((actor,), np.zeros(1), 64, np.random.default_rng(0))[0].astype(float)
        return frame[16:48, 16:48].mean(axis=(0, 1))

    for first, second in itertools.combinations(sorted(SOUND_ALIKES), 2):
        if KINDS[first].sound == KINDS[second].sound:
            assert np.abs(colour(first) - colour(second)).max() > 50


def test_captions_name_what_is_heard_and_nothing_else():
    for split, count in (("train", 1), ("validation", 5), ("test", 5)):
        for scene in scenes(300, split):
            assert len(scene.captions) == len(set(scene.captions)) == count
            for caption in scene.captions:
                assert names_in_caption(caption) == scene.names, caption


def test_an_unseen_sound_alike_gets_the_word_of_its_pair():
    unseen = 0
    for scene in scenes(300):
        for event in scene.events:
            if event.kind in SOUND_ALIKES and event.place is None:
                assert event.name in UNSEEN and event.kind not in scene.names
                unseen += 1
            else:
                assert event.name == event.kind
    assert unseen > 20


def test_captions_tell_order_and_overlap():
    for scene in scenes(300, "test"):
        nouns = [[KINDS.get(event.name, UNSEEN.get(event.name)).noun for event in group] for group in scene.groups]
        for caption in scene.captions:
            positions = [caption.lower().split().index(noun) for group in nouns for noun in group]
            assert positions == sorted(positions)
            assert ("then" in caption or "followed by" in caption) == (len(nouns) > 1)
            together = {" while ", " as ", " with ", " and "} & {f" {word} " for word in caption.split()}
            if any(len(group) > 1 for group in nouns):
                assert together
            else:
                assert together <= {" and "} and caption.count(" and ") == caption.count(" and then ")


def test_names_in_free_text():
    assert names_in_caption("A woman talks while RAIN falls, then an engine runs") == {"woman", "rain", "engine"}
    assert names_in_caption("A carpet and a human") == frozenset()


def test_tokenizer(tmp_path):
    tokenizer = build_tokenizer()
    assert tokenizer.pad_token_id == 0 and len(tokenizer) < 256
    caption = "A car idles while a dog barks, then an animal bleats"
    ids = tokenizer(caption)["input_ids"]
    assert ids[0] == tokenizer.cls_token_id and ids[-1] == tokenizer.sep_token_id
    assert len(ids) == 2 + len(caption.replace(",", " ,").split())
    assert tokenizer.decode(ids, skip_special_tokens=True) == caption.lower()
    assert tokenizer.unk_token_id not in tokenizer("Zebras, 42 of them")["input_ids"]
    for scene in scenes(300):
        tokens = tokenizer.tokenize(scene.captions[0])
        assert not any(token.startswith("##") for token in tokens) and set(tokens) <= set(closed_vocabulary())

    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(caption)["input_ids"] == ids and loaded.pad_token_id == 0


def decode(path):
    with av.open(path) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert (video.codec_context.name, audio.codec_context.name) == ("h264", "aac")
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video)])
    with av.open(path) as container:
        samples = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    return frames, samples


def test_written_clip_holds_the_rendered_one(tmp_path):
    for scene in scenes(3):
        write_clip(scene, tmp_path / "new folder" / "clip.mp4", fps=10, size=96)
        frames, samples = decode(tmp_path / "new folder" / "clip.mp4")
        clip = render(scene, fps=10, size=96)
        assert frames.shape == clip.frames.shape
        assert np.abs(frames.astype(int) - clip.frames).mean() < 5
        # Shift of the coder's delay, at most one block, and agreement at the best one.
        length = 60_000
        agreement = [np.corrcoef(samples[shift : shift + length], clip.waveform[:length])[0, 1] for shift in (0, 1024)]
        assert max(agreement) > 0.9
        assert abs(len(samples) - len(clip.waveform)) <= 3072
    assert [path.name for path in (tmp_path / "new folder").iterdir()] == ["clip.mp4"]


def test_the_same_scene_gives_the_same_file(tmp_path):
    scene = make_scene(0, "test", 3)
    write_clip(scene, tmp_path / "a.mp4")
    write_clip(scene, tmp_path / "b.mp4")
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_dataset_folder_is_written_and_completed(tmp_path):
    manifest = write_dataset(tmp_path, "test", 3, seed=5, size=64)
    entries = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert [entry["id"] for entry in entries] == [make_scene(5, "test", index).id for index in range(3)]
    assert all(len(entry["captions"]) == 5 and names_in_caption(entry["captions"][0]) for entry in entries)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(files) == {"manifest.jsonl", *(entry["media"] for entry in entries)}

    kept = tmp_path / entries[0]["media"]
    changed = kept.stat().st_mtime_ns
    (tmp_path / entries[1]["media"]).unlink()
    write_dataset(tmp_path, "test", 3, seed=5, size=64)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    assert kept.stat().st_mtime_ns == changed


def test_command_line(tmp_path):
    command = [
        sys.executable,
        "-m",
        "evacap.training.procedural.scenes",
        "--split",
        "train",
        "--clips",
        "2",
        "--seed",
        "1",
    ]
    done = subprocess.run([*command, "--output", str(tmp_path / "out")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "2/2" in done.stderr
    assert len((tmp_path / "out" / "manifest.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, "dev", 0), "split='dev'.*train, validation, test"),
        ((-1, "train", 0), "seed=-1"),
        ((0, "train", -2), "index=-2"),
        ((0, "train", 0, 4.0), r"duration=4.0 s.*5 to 10"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_scene(*arguments)


def test_odd_sizes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="size=65.*66"):
        write_clip(make_scene(0, "train", 0), tmp_path / "clip.mp4", size=65)

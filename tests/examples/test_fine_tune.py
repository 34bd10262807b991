"""The example as its reader runs it."""

import csv
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModel, AutoProcessor, pipeline

import evacap
from evacap.training.procedural.scenes import make_scene, write_clip


SCRIPT = Path(__file__).parents[2] / "examples" / "fine_tune.py"
NEW_WORDS = ["slams", "zebra"]


@pytest.fixture
def manifest(tmp_path) -> Path:
    """Three clips, whose captions hold two words that the bundled checkpoint has never seen."""
    rows = []
    for index in range(3):
        scene = make_scene(0, "train", index)
        write_clip(scene, tmp_path / f"{index}.mp4", size=64)
        rows.append({"id": index, "media": f"{index}.mp4", "caption": f"{scene.captions[0]}, and a zebra slams."})
    return write_manifest(tmp_path / "manifest.csv", rows)


def write_manifest(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("fine_tune", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_learns_from_a_folder_of_clips(manifest):
    done = subprocess.run(
        [
            *(sys.executable, str(SCRIPT), str(manifest), "--validation", str(manifest), "--output_dir", "mine"),
            *("--num_train_epochs", "24", "--learning_rate", "2e-3", "--use_cpu", "--save_strategy", "no"),
        ],
        cwd=manifest.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr.lower(), done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("2 words are new to the model") and lines[0].endswith("slams, zebra")
    # The last lines are the captions, which have picked up what they were taught, in words and not in letters.
    assert all("zebra slams" in line for line in lines[-3:]), lines

    folder = manifest.parent / "mine"
    assert set(NEW_WORDS) <= AutoProcessor.from_pretrained(folder).tokenizer.get_vocab().keys()
    captioner = pipeline(evacap.TASK, model=str(folder))
    assert "zebra slams" in captioner(str(manifest.with_name("0.mp4")))["text"]


def test_new_words_become_tokens_and_known_words_stay_as_they_are(example):
    tokenizer = AutoProcessor.from_pretrained(evacap.TINY).tokenizer
    model = AutoModel.from_pretrained(evacap.TINY)
    before = len(tokenizer)
    example.add_new_words(model, tokenizer, ["A dog barks, a bird sings."])
    assert len(tokenizer) == before

    example.add_new_words(model, tokenizer, ["A Zebra slams a door!", "日本 sings"])
    ids = tokenizer("a Zebra slams. a dog barks", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["a", "zebra", "slams", ".", "a", "dog", "barks"]
    assert tokenizer.decode(ids) == "a zebra slams. a dog barks"
    assert tokenizer.tokenize("zebras slamsing")[0] == "z", "a new word is not a piece of another"
    for size in (model.config.text_config.vocab_size, len(model.lm_head.weight), len(model.lm_head.bias)):
        assert size == len(tokenizer)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_words_that_a_vocabulary_has_in_pieces_are_left_to_it(example):
    """As BERT's has most words: their pieces mean something, their letters do not."""
    tokenizer = AutoProcessor.from_pretrained(evacap.TINY).tokenizer
    before = len(tokenizer)
    example.add_new_words(AutoModel.from_pretrained(evacap.TINY), tokenizer, ["dogs", "engines"])
    assert len(tokenizer) == before, tokenizer.tokenize("dogs engines")


def test_a_missing_manifest_or_clip_is_named(example, manifest):
    processor = AutoProcessor.from_pretrained(evacap.TINY)
    with pytest.raises(FileNotFoundError, match="nowhere.csv"):
        example.Clips(manifest.with_name("nowhere.csv"), processor)
    manifest.with_name("1.mp4").unlink()
    with pytest.raises(FileNotFoundError, match=r"manifest\.csv: 1 has no `media` file .*1\.mp4"):
        example.Clips(manifest, processor)


def test_a_clip_may_be_a_part_of_a_file_and_have_several_captions(example, manifest):
    rows = [
        {"id": "part", "media": "0.mp4", "caption": caption, "start": 1, "duration": 2}
        for caption in ("a dog", "a bird")
    ]
    processor = AutoProcessor.from_pretrained(evacap.TINY)
    clips = example.Clips(write_manifest(manifest.with_name("parts.csv"), rows), processor)
    whole = processor(media=str(manifest.with_name("0.mp4")), return_tensors="pt")["input_features"][0]
    assert len(clips) == 2
    assert processor.tokenizer.decode(clips[1]["labels"], skip_special_tokens=True) == "a bird"
    assert clips[0]["input_features"].shape == whole.shape
    assert not clips[0]["input_features"].equal(whole)


def test_it_is_short():
    assert len(SCRIPT.read_text(encoding="utf-8").splitlines()) < 60

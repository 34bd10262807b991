import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from source_checkpoints import HEADS, IMAGE_SIZE, avcap_state, save, save_tokenizer

from evacap.cli import main
from evacap.commands.import_weights import import_weights
from evacap.commands.publish import caption_alone, check_files
from evacap.model_card import PIPELINE_TAG, check_metadata, fill_model_card, python_examples


ROOT = Path(__file__).resolve().parents[2]
REPO_ID = "somebody/evacap-toy"


def make_folder(directory: Path, preset: str) -> Path:
    import_weights(
        directory / preset,
        avcap=save(avcap_state(), directory / "avcap.safetensors"),
        preset=preset,
        tokenizer=save_tokenizer(directory / f"tokenizer-{preset}"),
        num_attention_heads=HEADS,
        image_size=IMAGE_SIZE,
    )
    return directory / preset


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("publish"), "evacap")


@pytest.fixture
def folder(saved, tmp_path):
    """A model folder of one's own."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def publish_alone(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess:
    """`evacap publish` by a user without a token."""
    known = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    home = {"HF_HOME": str(folder.parent / "home")}
    return subprocess.run(
        [sys.executable, "-m", "evacap", "publish", str(folder), "--repo-id", REPO_ID, *options],
        capture_output=True,
        text=True,
        cwd=folder.parent,
        env=known | home | environment,
        timeout=600,
    )


def test_template_has_valid_metadata():
    card = ModelCard.load(ROOT / "model_card.md")
    check_metadata(card, "model_card.md")
    assert card.data.pipeline_tag == PIPELINE_TAG
    assert card.data.license == "apache-2.0"
    assert card.data.datasets == ["OpenSound/AudioCaps"]
    assert "audio-captioning" in card.data.tags


def test_installed_template_is_the_one_at_the_root():
    assert (ROOT / "evacap" / "model_card.md").read_bytes() == (ROOT / "model_card.md").read_bytes()


def test_dry_run_checks_and_shows_everything_and_writes_nothing(folder, capsys):
    (folder / "optimizer.pt").write_bytes(b"a state")
    (folder / "trainer_state.json").write_text("{}")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert main(["publish", str(folder), "--repo-id", REPO_ID, "--dry-run", "--private"]) == 0
    lines = capsys.readouterr().out.splitlines()
    captions = lines[1 + lines.index("loads without this package and captions a generated clip:") :][:2]
    assert all("word" in caption for caption in captions), "one caption a code block, from the toy vocabulary"
    assert f"to https://huggingface.co/{REPO_ID} (private where new):" in lines
    shown = {line.split()[0]: line.split()[1] for line in lines if line.endswith(" bytes")}
    assert shown["model.safetensors"] == f"{(folder / 'model.safetensors').stat().st_size:,}"
    assert {"README.md", "config.json", "modeling_evacap.py", "pipeline_evacap.py", "tokenizer.json"} <= shown.keys()
    assert "not uploaded: optimizer.pt, trainer_state.json" in lines
    assert "# evacap-toy" in lines
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_without_a_token_one_line_says_how_to_log_in(folder):
    done = publish_alone(folder)
    assert done.returncode == 1
    assert done.stderr == (
        "evacap publish: there is no token of the Hub. Log in with `hf auth login`, then publish again.\n"
    )
    assert not (folder / "README.md").exists()


@pytest.mark.slow
def test_an_upload_that_fails_is_one_line(folder):
    """Port 9 of this machine: nobody listens there."""
    done = publish_alone(folder, HF_TOKEN="hf_none", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 1
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith(f"evacap publish: {REPO_ID}: the Hub cannot be reached or refuses: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("repo_id", ["toy", "some/body/toy", "some body/toy"])
def test_a_bad_repository_name(folder, repo_id, capsys):
    assert main(["publish", str(folder), "--repo-id", repo_id, "--dry-run"]) == 1
    assert repo_id in capsys.readouterr().err


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", "it has no config.json"),
        ("model.safetensors", "it has no weights"),
        ("processor_config.json", "it has no processor_config.json"),
        ("modeling_evacap.py", r"it lacks its code \(modeling_evacap\.py\)"),
        ("pipeline_evacap.py", r"it lacks its code \(pipeline_evacap\.py\).*save_pretrained"),
    ],
)
def test_a_missing_file_is_named(folder, missing, message):
    check_files(folder)
    (folder / missing).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        check_files(folder)


def test_another_kind_of_model_is_refused(folder):
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="its model type is 'bert', but 'evacap' was expected"):
        check_files(folder)


def test_the_code_of_the_folder_is_what_counts(folder):
    """The installed package would caption; the folder's own model does not."""
    code = (folder / "modeling_evacap.py").read_text(encoding="utf-8")
    (folder / "modeling_evacap.py").write_text(f"{code}\nraise RuntimeError('broken copy')\n", encoding="utf-8")
    with pytest.raises(ValueError, match="the code on its card fails: RuntimeError: broken copy"):
        caption_alone(folder, REPO_ID, fill_model_card(folder, REPO_ID))


@pytest.mark.parametrize("code", ["", "x = 1"])
def test_code_that_captions_nothing_is_an_error(folder, code):
    card = ModelCard(f"---\nlicense: mit\n---\n```python\n{code}\n```\n")
    with pytest.raises(ValueError, match="prints no caption"):
        caption_alone(folder, REPO_ID, card)


def test_card_tells_what_the_folder_is(saved):
    card = fill_model_card(saved, REPO_ID)
    check_metadata(card, "card")
    assert "`evacap`: EVACap: entropy-gated cross-attention" in card.text
    assert "hamming window, 0.32 s" in card.text
    assert "4 frames uniformly over the clip, 32 pixels" in card.text
    assert "Imported from AVCap (`avcap.safetensors`), with fresh weights in `encoder.fusion`." in card.text
    assert "None are stored with this model." in card.text
    assert "{{" not in card.text and "{%" not in card.text
    assert card.data.datasets is None
    assert python_examples(card).count(REPO_ID) == 3


@pytest.mark.parametrize("preset", ["audio-only", "avcap", "evacap-ungated", "evacap-learned-gate", "video-only"])
def test_card_of_each_variant(tmp_path, preset):
    card = fill_model_card(make_folder(tmp_path, preset), REPO_ID)
    assert f"| Variant | `{preset}`: " in card.text
    assert ("| Sound | not used |" in card.text) == (preset == "video-only")
    assert ("| Picture | not used |" in card.text) == (preset == "audio-only")
    assert ("The gate weighs" in card.text) == (preset == "evacap-learned-gate")


def test_card_takes_training_data_and_results(folder):
    (folder / "training.json").write_text(json.dumps({"data": "Clips of dogs.", "datasets": ["somebody/dogs"]}))
    results = [
        {"setting": "matched", "metrics": {"CIDEr": 0.649, "SPICE": 0.17}},
        {"setting": "all videos swapped", "metrics": {"CIDEr": 0.6}},
    ]
    evaluation = {"dataset": "Dogs, test", "dataset_id": "somebody/dogs", "results": results}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    card = fill_model_card(folder, REPO_ID)
    assert "Clips of dogs." in card.text
    assert "| Dogs, test | CIDEr | SPICE |\n| --- | --- | --- |\n| matched | 0.649 | 0.170 |" in card.text
    assert "| all videos swapped | 0.600 | – |" in card.text
    again = ModelCard(str(card))
    assert again.data.datasets == ["somebody/dogs"]
    assert [(result.metric_type, result.metric_value) for result in again.data.eval_results] == [
        ("CIDEr", 0.649),
        ("SPICE", 0.17),
    ]


@pytest.mark.parametrize("name", ["training.json", "evaluation.json"])
@pytest.mark.parametrize("content", ["not json", "[]", '{"data": 1}', '{"results": []}'])
def test_a_file_of_another_form_is_named(folder, name, content):
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name}: not of the form"):
        fill_model_card(folder, REPO_ID)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("license: mit", "`library_name` is None"),
        (
            "license: mit\nlibrary_name: timm\npipeline_tag: x\ntags: [a]\nmetrics: [b]",
            "'timm', but it must be 'trans",
        ),
        ("license: mit\nlibrary_name: transformers\npipeline_tag: x\ntags: [a]", "`metrics` is None in its metadata"),
    ],
)
def test_a_card_of_ones_own_is_kept_but_checked(folder, metadata, message, capsys):
    text = f"---\n{metadata}\n---\n# Mine\n"
    (folder / "README.md").write_text(text)
    assert main(["publish", str(folder), "--repo-id", REPO_ID, "--dry-run"]) == 1
    assert message in capsys.readouterr().err
    assert (folder / "README.md").read_text() == text

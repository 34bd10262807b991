import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import hub_server
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects
from source_checkpoints import HEADS, IMAGE_SIZE, avcap_state, save, save_tokenizer
from transformers import AutoModel, AutoProcessor

import evacap
from evacap.cli import main
from evacap.commands.import_weights import import_weights
from evacap.commands.publish import caption_alone, check_files, uploaded_files
from evacap.model_card import PIPELINE_TAG, check_metadata, example_code, fill_model_card, python_examples
from evacap.space import caption_by_space, space_files


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
    assert any(line.startswith("known answer: none yet, made here: ") for line in lines)
    assert f"to https://huggingface.co/{REPO_ID} (private where new):" in lines
    shown = {line.split()[0]: line.split()[1] for line in lines if line.endswith(" bytes")}
    assert shown["model.safetensors"] == f"{(folder / 'model.safetensors').stat().st_size:,}"
    assert {"README.md", "config.json", "modeling_evacap.py", "pipeline_evacap.py", "tokenizer.json"} <= shown.keys()
    assert "not uploaded: optimizer.pt, trainer_state.json" in lines
    assert "# evacap-toy" in lines
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_that_does_not_reproduce_its_known_answer_stays_here(folder, capsys):
    assert main(["check-install", str(folder), "--write"]) == 0
    assert main(["publish", str(folder), "--repo-id", REPO_ID, "--dry-run"]) == 0
    assert "known answer: reproduced" in capsys.readouterr().out
    model = evacap.EVACapForConditionalGeneration.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.bias += torch.linspace(0, 0.05, len(model.lm_head.bias))
    model.save_pretrained(folder)
    assert main(["publish", str(folder), "--repo-id", REPO_ID, "--dry-run"]) == 1
    assert "does not reproduce its known answer" in capsys.readouterr().err


def test_without_a_token_one_line_says_how_to_log_in(folder, own_lines):
    done = publish_alone(folder)
    assert done.returncode == 1
    assert own_lines(done.stderr) == (
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
        caption_alone(folder, REPO_ID)


HOSTILE = [
    "```python\nopen('trace', 'w')\n```",
    "Text.\n\n```python\nopen('trace', 'w')\n```\n",
    "Text.\r```python\ropen('trace', 'w')\r```\r",
    "Text.\u2028```python\u2028open('trace', 'w')\u2028```",
    "```python open('trace', 'w')",
    "~~~python\nopen('trace', 'w')\n~~~",
    "````\n```python\nopen('trace', 'w')\n```\n````",
    "\n---\nlicense: other\n---\n",
    "---",
    "# Heading",
    "1. item",
    "| a | b |\n|---|---|",
    "<script>alert(1)</script><!--",
    "{{ repo_id }}{% raw %}",
    "]: http://example.org 'x'",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_the_files_say_is_text_and_nothing_else(folder, text):
    plain = fill_model_card(folder, REPO_ID)
    evaluation = {
        "dataset": text,
        "dataset_id": "somebody/dogs",
        "results": [{"setting": text, "metrics": {text: 0.5, "CIDEr": 0.6}}],
    }
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    (folder / "training.json").write_text(json.dumps({"data": text, "datasets": []}))
    card = fill_model_card(folder, REPO_ID)
    assert python_examples(str(card)) == example_code(REPO_ID)
    # The card as others read it: the same blocks of code, headings and metadata.
    again = ModelCard(str(card))
    metadata = again.data.to_dict()
    assert metadata.pop("model-index")[0]["results"][0]["dataset"]["type"] == "somebody/dogs"
    assert metadata == plain.data.to_dict()
    for lines in (r"^ {0,3}[`~]{3}.*$", r"^#.*$", r"^<.*$", r"^-{3}.*$"):
        assert re.findall(lines, again.text, re.MULTILINE) == re.findall(lines, plain.text, re.MULTILINE)
    rows = [line for line in again.text.splitlines() if line.startswith("|")]
    assert len(rows) == len([line for line in plain.text.splitlines() if line.startswith("|")]) + 3


@pytest.mark.parametrize("name", ["a\nb: c", "- x", "a/b/c", "../a", 3, None])
def test_names_of_datasets_are_names(folder, name):
    (folder / "training.json").write_text(json.dumps({"data": "x", "datasets": [name]}))
    with pytest.raises(ValueError, match="training.json: not of the form"):
        fill_model_card(folder, REPO_ID)


def test_no_code_but_the_templates_is_run_and_it_finds_no_secret(folder, tmp_path, monkeypatch, capsys):
    """A card of the folder's own with code in it, and a model that tells what it finds in its environment."""
    trace, found = tmp_path / "trace", tmp_path / "found"
    own = f"{fill_model_card(folder, REPO_ID)}\n```python\nopen({str(trace)!r}, 'w')\n```\n"
    (folder / "README.md").write_text(own)
    code = (folder / "modeling_evacap.py").read_text(encoding="utf-8")
    tell = f"import os\nopen({str(found)!r}, 'w').write(repr(dict(os.environ)) + os.path.expanduser('~'))\n"
    (folder / "modeling_evacap.py").write_text(f"{code}\n{tell}", encoding="utf-8")
    secrets = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "http_proxy", "MY_PASS")
    for name in secrets:
        monkeypatch.setenv(name, "very-secret")
    assert main(["publish", str(folder), "--repo-id", REPO_ID, "--dry-run"]) == 0
    assert not trace.exists() and (folder / "README.md").read_text() == own
    seen = found.read_text()
    assert "very-secret" not in seen and "PATH" in seen
    assert not seen.endswith(os.path.expanduser("~")), "the token lies in the home folder"


def add_what_is_not_of_a_model(folder: Path) -> None:
    """Hidden files, other files of known kinds, names that are patterns, folders, and links to elsewhere."""
    secret = folder.parent / "secret"
    secret.write_text("very secret")
    for name in (
        ".env",
        ".token.json",
        "notes.txt",
        "keys.json",
        "train.py",
        "*",
        "*.txt",
        "[a-z]*.json",
        "optimizer.pt",
    ):
        (folder / name).write_text("very secret")
    (folder / "below").mkdir()
    for name in ("vocab.txt", "config.json", "a.txt"):
        (folder / "below" / name).write_text("very secret")
    (folder / "data.safetensors").write_text("very secret")
    (folder / "linked.json").symlink_to(secret)
    (folder / "linked").symlink_to(folder.parent)


def test_known_names_alone_are_uploaded(folder):
    before = uploaded_files(folder)
    assert {"config.json", "model.safetensors", "modeling_evacap.py", "tokenizer.json"} <= set(before)
    add_what_is_not_of_a_model(folder)
    assert uploaded_files(folder) == before
    # As patterns of the client's, too, these names would take nothing else along.
    everything = [str(path.relative_to(folder)) for path in folder.rglob("*")]
    assert sorted(filter_repo_objects(everything, allow_patterns=before)) == before
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"x")
    assert uploaded_files(folder) == sorted([*before, "model-00001-of-00002.safetensors"])


@pytest.mark.slow
def test_a_space_captions_before_it_is_uploaded(folder, capsys):
    assert main(["publish", str(folder), "--repo-id", REPO_ID, "--space", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^Space: its page captions a generated clip: .+", out, re.MULTILINE)
    assert f"to https://huggingface.co/spaces/{REPO_ID}: " in out
    assert "README.md, app.py, requirements.txt, and the code of this package" in out


def test_a_space_has_what_it_needs_and_no_more(tmp_path, folder, monkeypatch):
    found = space_files(REPO_ID)
    assert {"README.md", "app.py", "requirements.txt", "evacap/app.py", "evacap/training/files.py"} <= found.keys()
    assert not any("tiny/" in name or "__pycache__" in name or "tests" in name for name in found)
    card = yaml.safe_load(found["README.md"].decode().split("---")[1])
    assert card["sdk"] == "gradio" and card["models"] == [REPO_ID] and (card["app_file"] in found)
    needed = found["requirements.txt"].decode().splitlines()
    assert any(line.startswith("gradio>=") for line in needed) and any(line.startswith("torch>=") for line in needed)
    assert not any(line.startswith(("pytest", "ray")) for line in needed)
    # The code of the Space is what runs, and not the installed package.
    found["evacap/__init__.py"] += b"\nraise RuntimeError('here')\n"
    with pytest.raises(ValueError, match="does not start: RuntimeError: here"):
        caption_by_space(found, folder, REPO_ID, os.environ)


@pytest.mark.slow
def test_model_and_space_are_sent(folder):
    with hub_server() as (files, hub):
        done = publish_alone(folder, "--space", **hub)
    assert done.returncode == 0, done.stderr
    assert {"config.json", "spaces/app.py", "spaces/README.md", "spaces/evacap/app.py"} <= files.keys()
    assert files["spaces/app.py"] == space_files(REPO_ID)["app.py"]


@pytest.mark.parametrize("name", ["vocab.txt", "config.json", "README.md", "model.safetensors", "LICENSE"])
def test_a_link_is_refused(folder, name, capsys):
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("/etc/hostname")
    assert main(["publish", str(folder), "--repo-id", REPO_ID, "--dry-run"]) == 1
    assert f"{name}: a link, which is not followed" in capsys.readouterr().err


@pytest.mark.slow
def test_what_is_listed_is_what_is_sent(folder):
    """The real client, to a server of the test."""
    add_what_is_not_of_a_model(folder)
    with hub_server() as (files, hub):
        done = publish_alone(folder, **hub)
    assert done.returncode == 0, done.stderr
    listed = {line.split()[0]: line.split()[1] for line in done.stdout.splitlines() if line.endswith(" bytes")}
    assert {name: f"{len(content):,}" for name, content in files.items()} == listed
    assert {"README.md", "config.json", "model.safetensors", "pipeline_evacap.py"} <= files.keys()
    assert not any(b"very secret" in content for content in files.values())


@pytest.mark.parametrize(
    "content", ["[]", "3", "{", '{"auto_map": 3}', '{"model_type": "evacap", "auto_map": {"AutoModel": 1}}']
)
def test_a_configuration_of_another_shape_is_named(folder, content, capsys):
    (folder / "config.json").write_text(content)
    assert main(["publish", str(folder), "--repo-id", REPO_ID, "--dry-run"]) == 1
    assert "config.json: not a configuration that `save_pretrained` wrote" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["---\na: [\n---\n", "---\n- a\n---\n", "---\n\x00\n---\n"])
def test_a_card_with_bad_metadata_is_named(folder, text, capsys):
    (folder / "README.md").write_text(text)
    assert main(["publish", str(folder), "--repo-id", REPO_ID, "--dry-run"]) == 1
    assert "README.md: its metadata cannot be read" in capsys.readouterr().err


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
    assert python_examples(card.text).count(REPO_ID) == 3


@pytest.mark.parametrize(
    "preset",
    [
        "audio-only",
        "avcap",
        "evacap-case",
        "evacap-caste",
        "evacap-ungated",
        "evacap-learned-gate",
        "late-concat",
        "vact",
        "video-only",
    ],
)
def test_card_of_each_variant(tmp_path, preset):
    card = fill_model_card(make_folder(tmp_path, preset), REPO_ID)
    assert f"| Variant | `{preset}`: " in card.text
    assert ("| Sound | not used |" in card.text) == (preset == "video-only")
    assert ("| Picture | not used |" in card.text) == (preset == "audio-only")
    assert ("The gate weighs" in card.text) == (preset in ("evacap-case", "evacap-caste", "evacap-learned-gate"))
    assert card.text.count("a dog on a lawn") == (2 if preset == "evacap-case" else 0)
    python_examples(card.text)


def test_card_of_an_enriched_variant_without_a_preset(saved, tmp_path):
    folder = tmp_path / "enriched"
    AutoModel.from_pretrained(saved, enrichment="caste", gate_type="none").save_pretrained(folder)
    AutoProcessor.from_pretrained(saved).save_pretrained(folder)
    text = fill_model_card(folder, REPO_ID).text
    assert "`evacap-ungated`: cross-attention without a gate (the paper's w/o G), with `enrichment='caste'`" in text


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

"""What the README and the guides show is what runs."""

import importlib
import re
import shlex
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from language_models import save_ced, save_clip, save_language_model
from small_clips import write_sound

import evacap
from evacap import cli
from evacap.training.procedural.scenes import make_scene, write_clip


README = Path(__file__).parents[2] / "README.md"
GUIDES = [README, *sorted(README.parent.glob("docs/*.md"))]
RUN_AS_A_WHOLE = ("captions", "datasets")
"""Guides whose commands run, too."""
BLOCKS = [
    pytest.param(block, id=f"{guide.stem}-{number}")
    for guide in GUIDES
    if guide.stem not in RUN_AS_A_WHOLE
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", guide.read_text(encoding="utf-8"), re.DOTALL))
    # test_ray.py runs it.
    if "import ray" not in block
]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    write_clip(make_scene(0, "test", 0), tmp_path / "sample.mp4")
    write_clip(make_scene(0, "test", 1), tmp_path / "other.mp4")
    write_clip(make_scene(0, "test", 2, duration=10.0), tmp_path / "long.mp4")
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def prepared(folder):
    """What the guide to training has prepared before."""
    (folder / "mine.jsonl").write_text('{"id": "a", "media": "sample.mp4", "caption": "A dog barks"}\n')
    assert cli.main(["prepare", "--manifest", "mine.jsonl", "--model", evacap.TINY, "--output", "prepared"]) == 0


@pytest.fixture
def parts(folder):
    """What the guide to language models has downloaded before, at a tiny size."""
    save_ced(folder / "ced-base")
    save_clip(folder / "clip")
    save_language_model(folder / "smollm2", chat=True)


@pytest.mark.parametrize("block", BLOCKS)
def test_python_examples_run(folder, block, request, capsys):
    if '"prepared"' in block:
        request.getfixturevalue("prepared")
    if '"smollm2"' in block:
        request.getfixturevalue("parts")
    if "http://127.0.0.1:7860" in block:
        block = block.replace("http://127.0.0.1:7860", request.getfixturevalue("demo"))
    torch.manual_seed(0)
    exec(compile(block, "example", "exec"), {})


@pytest.fixture
def data_sets(folder):
    """What the guide to data sets has downloaded before, with the real columns and the usual names of files."""
    files = {
        "audiocaps/train.csv": "audiocap_id,youtube_id,start_time,caption\n91139,r1nicOVtvkQ,130,A woman talks\n",
        "audiocaps/val.csv": "audiocap_id,youtube_id,start_time,caption\n97151,vfY_TJq7n_U,130,Rustling occurs\n"
        "97155,vfY_TJq7n_U,130,Wind blows\n",
        "clotho/clotho_captions_development.csv": "file_name,caption_1,caption_2,caption_3,caption_4,caption_5\n"
        "Distorted AM Radio noise.wav,A muddled noise,A radio,Static plays,A radio tunes,Noise is heard\n",
        "clotho/clotho_captions_evaluation.csv": "file_name,caption_1,caption_2,caption_3,caption_4,caption_5\n"
        "Santa Motor.wav,A machine,A motor,It whines,A saw,A drill\n",
        "vggsound/vggsound.csv": "---g-f_I2yQ,1,people marching,test\n--0PQM4-hqg,30,waterfall burbling,train\n",
        "mine/metadata.csv": "file_name,caption\nclip.mp4,a dog barks\n",
        "mine/list.csv": "id,media,caption,start,duration\na,clip.mp4,a dog barks,0,2.5\nb,clip.mp4,a dog barks,2.5,2.5\n",
    }
    for name, content in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(content)
    clips = ("audiocaps/clips/r1nicOVtvkQ_130", "audiocaps/clips/vfY_TJq7n_U", "mine/clip")
    for name in (*clips, "vggsound/video/---g-f_I2yQ_000001", "vggsound/video/--0PQM4-hqg_000030"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy("sample.mp4", f"{name}.mp4")
    write_sound(Path("clotho/development/Distorted AM Radio noise.wav"), 0, seconds=15.0)
    write_sound(Path("clotho/evaluation/Santa Motor.wav"), 1, seconds=15.0)
    Path("shards").mkdir()
    Path("caption.txt").write_text("a dog barks\n")
    for number in range(2):
        with tarfile.open(f"shards/train-00{number}.tar", "w") as shard:
            shard.add("sample.mp4", f"{number}.mp4")
            shard.add("caption.txt", f"{number}.txt")


@pytest.mark.parametrize("name", RUN_AS_A_WHOLE)
def test_the_examples_and_commands_of_a_guide_run_in_their_order(folder, name, request, capsys):
    if name == "datasets":
        request.getfixturevalue("data_sets")
    shutil.copy("sample.mp4", "clip.mp4")
    shutil.copytree(".", "clips")
    Path("clips/broken.mp4").unlink()
    text = (README.parent / "docs" / f"{name}.md").read_text(encoding="utf-8")
    commands = 0
    for language, block in re.findall(r"```(python|bash)\n(.*?)```", text, re.DOTALL):
        if language == "python":
            exec(compile(block, "example", "exec"), {})
            continue
        for line in block.replace("\\\n", " ").splitlines():
            program, *words = shlex.split(line, comments=True)
            assert program == "evacap", line
            assert cli.main(words) == 0, line
            commands += 1
    assert commands > 5
    if name == "datasets":
        splits = {
            path.parent.parent.name + "/" + path.name.split("-")[0] for path in Path("prepared").rglob("*.parquet")
        }
        assert splits == {
            *("audiocaps/train", "audiocaps/validation", "clotho/train", "clotho/test", "vggsound/train"),
            *("vggsound/test", "mine/train", "mine/list", "shards/train"),
        }
        printed = capsys.readouterr().out
        assert printed.count("1 of 1 clips") == 7 and printed.count("2 of 2 clips") == 2


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_links_lead_somewhere(guide):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", guide.read_text(encoding="utf-8"))
    for link in links:
        assert (guide.parent / link).exists(), link


def test_there_is_an_example_for_each_way_in():
    for way in ("pipeline(", "AutoProcessor", "Trainer("):
        assert any(way in block.values[0] for block in BLOCKS)


def test_make_targets_of_the_readme_exist():
    targets = re.findall(r"`?make ([a-z-]+)", README.read_text(encoding="utf-8"))
    makefile = README.with_name("Makefile").read_text(encoding="utf-8")
    assert {"caption", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_one_page_leads_to_all_others():
    index = README.parent / "docs" / "README.md"
    links = {
        (index.parent / link).resolve() for link in re.findall(r"\]\(([^)#]+)", index.read_text(encoding="utf-8"))
    }
    pages = {*README.parent.glob("*.md"), *index.parent.rglob("*.md"), README.parent / "benchmarks" / "README.md"}
    # The template of the cards is no page.
    assert pages - links == {index, README.with_name("model_card.md")}


COMMANDS = [
    pytest.param(line, id=f"{guide.stem}-{line[7:47]}")
    for guide in GUIDES
    for block in re.findall(r"```bash\n(.*?)```", guide.read_text(encoding="utf-8"), re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("evacap ")
]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_have_the_options_that_are_shown(line, monkeypatch):
    argv = [word for word in shlex.split(line, comments=True)[1:] if not word.startswith("[")]
    ran = []
    module = importlib.import_module(f"evacap.commands.{argv[0].replace('-', '_')}")
    monkeypatch.setattr(module, "run", ran.append)
    assert cli.main(argv) == 0 and len(ran) == 1

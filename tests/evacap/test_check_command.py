"""`evacap check`, and the agreement that the pipeline returns."""

import json
import wave

import pytest
import torch
from agreement_model import save_agreement_model
from PIL import Image
from transformers import pipeline

import evacap
from evacap.cli import main
from evacap.training.evaluation.calibration import agreement_logits, calibrate, fit_temperature
from evacap.training.procedural.dataset import ProceduralClips
from evacap.training.procedural.scenes import make_scene, write_clip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("agreement")
    save_agreement_model(path)
    return path


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    path = tmp_path_factory.mktemp("clips")
    for index in (0, 1):
        write_clip(make_scene(0, "test", index), path / f"{index}.mp4")
    (path / "broken.mp4").write_bytes(b"no media")
    return path


def test_a_line_for_a_file(folder, clips, capsys):
    file = str(clips / "0.mp4")
    assert main(["check", file, "--model", str(folder)]) == 0
    assert capsys.readouterr().out == f"{file}: 0.00–5.00 s: belongs (0.88)\n"
    assert main(["check", file, "--model", str(folder), "--threshold", "0.9"]) == 0
    assert capsys.readouterr().out == f"{file}: 0.00–5.00 s: does not belong (0.88)\n"


def test_json_lines_for_a_folder(folder, clips, capsys):
    assert main(["check", str(clips), "--model", str(folder)]) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["file"] for line in lines] == [str(clips / name) for name in ("0.mp4", "1.mp4", "broken.mp4")]
    assert "error" in lines[2]
    (window,) = lines[0]["agreement"]
    assert window == {"timestamp": [0.0, 5.0], "probability": pytest.approx(0.8808, abs=1e-4), "verdict": "belongs"}
    assert len(lines[0]["times"]) == len(lines[0]["agreement_by_step"]) == len(lines[0]["gate"]) == 16
    assert lines[0]["agreement_by_step"] == pytest.approx([0.8808] * 16, abs=1e-4)


def test_sound_alone_shows_nothing(folder, capsys, tmp_path):
    with wave.open(str(tmp_path / "sound.wav"), "wb") as file:
        file.setparams((1, 2, 16000, 32000, "NONE", ""))
        file.writeframes((torch.randn(32000) * 3000).short().numpy().tobytes())
    assert main(["check", str(tmp_path / "sound.wav"), "--model", str(folder)]) == 0
    assert "0.00–2.00 s: nothing to see\n" in capsys.readouterr().out


def test_a_picture_over_time(folder, clips, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "new" / "plot.png"
    assert main(["check", str(clips / "0.mp4"), "--model", str(folder), "--plot", str(path)]) == 0
    assert Image.open(path).size[0] > 1000


def test_what_is_refused(folder, clips, capsys):
    file = str(clips / "0.mp4")
    assert main(["check", file, str(clips / "1.mp4"), "--model", str(folder), "--plot", "x.png"]) == 1
    assert "--plot draws one file" in capsys.readouterr().err
    assert main(["check", file, "--model", evacap.TINY + "_audio_only"]) == 1
    assert "gate_type='agreement'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["check", file, "--threshold", "2"])


def test_the_pipeline_returns_it_beside_the_caption(folder, clips):
    captioner = pipeline(evacap.TASK, model=str(folder))
    result = captioner(str(clips / "0.mp4"), return_agreement=True, chunk_length_s=2.5)
    assert [window["timestamp"] for window in result["agreement"]] == [(0, 2.5), (2.5, 5.0)]
    assert result["text"] and "gate" not in result
    assert len(result["agreement_by_step"]) == len(result["times"]) == 16
    alone = captioner({"audio": str(clips / "0.mp4")}, return_agreement=True, return_gate=True)
    assert alone["agreement"][0]["probability"] is None and set(alone["agreement_by_step"]) == {None}
    assert set(alone["gate"]) == {0}
    # JSON has no NaN.
    assert "NaN" not in json.dumps(alone)
    assert captioner(str(clips / "0.mp4")).keys() == {"text"}


def test_the_temperature_makes_frequencies_of_the_logits():
    generator = torch.Generator().manual_seed(0)
    true = 2 * torch.randn(40_000, generator=generator)
    is_own = torch.rand(len(true), generator=generator) < torch.sigmoid(true)
    assert fit_temperature(3 * true[is_own], 3 * true[~is_own]) == pytest.approx(3, rel=0.05)


def test_calibration_is_written_into_the_folder(folder, tmp_path):
    model = evacap.EVACapForConditionalGeneration.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    processor = evacap.EVACapProcessor.from_pretrained(folder)
    processor.save_pretrained(tmp_path)
    before = json.loads((tmp_path / "config.json").read_text())

    def make_clips(processor):
        return ProceduralClips(processor, 8, "validation")

    own, others = agreement_logits(tmp_path, make_clips)
    assert own.tolist() == others.tolist() == pytest.approx([2.0] * 8, abs=1e-5)
    temperature = calibrate(tmp_path, make_clips)
    # Nothing tells own pictures from others here: each is as likely as not.
    assert temperature > 100
    after = json.loads((tmp_path / "config.json").read_text())
    assert after.pop("agreement_temperature") == temperature
    assert before.pop("agreement_temperature") == 1.0 and after == before
    with pytest.raises(ValueError, match="'agreement'"):
        model.config.gate_type, model.config.matching_weight = "entropy", 0.0
        model.config.save_pretrained(tmp_path)
        agreement_logits(tmp_path, make_clips)

"""A folder that `save_pretrained` wrote, with the package and where it cannot be imported."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    pipeline,
)

import evacap


sys.path.insert(0, str(Path(__file__).parents[1] / "processing"))

from media_files import write_clip  # noqa: E402
from test_pipeline_evacap import make_model, make_processor  # noqa: E402
from test_processing_evacap import run_in_a_process  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "saved"
    model = make_model(enrichment="case")
    block = model.get_encoder().enrichment.block
    for stream in (block.audio, block.video):
        stream.scale.data.fill_(0.5)
    model.save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    return str(write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", seconds=2))


CAPTIONS = {"audio_caption": "dog", "video_caption": "rain"}


def test_the_folder_names_its_classes_and_its_task(folder):
    config = json.loads((folder / "config.json").read_text())
    model = "modeling_evacap.EVACapForConditionalGeneration"
    assert config["auto_map"] == {
        "AutoConfig": "configuration_evacap.EVACapConfig",
        "AutoModel": model,
        "AutoModelForSeq2SeqLM": model,
    }
    pipelines = config["custom_pipelines"]
    assert pipelines[evacap.TASK]["impl"] == "pipeline_evacap.AudioVisualCaptioningPipeline"
    assert {path.name for path in folder.glob("*.py")} == {
        path.name
        for name in ("modeling_evacap", "processing")
        for path in (Path(evacap.__file__).parents[1] / name).glob("*_evacap.py")
        # The other class of captioners, of which `test_prompts.py` has a folder.
        if path.name != "language_model_evacap.py"
    }


def test_with_the_package_no_remote_code_is_needed(folder, clip):
    assert type(AutoConfig.from_pretrained(folder)) is evacap.EVACapConfig
    for auto_class in (AutoModel, AutoModelForSeq2SeqLM):
        assert type(auto_class.from_pretrained(folder)) is evacap.EVACapForConditionalGeneration
    assert type(AutoProcessor.from_pretrained(folder)) is evacap.EVACapProcessor
    captioner = pipeline(evacap.TASK, model=str(folder))
    assert type(captioner) is evacap.AudioVisualCaptioningPipeline
    assert set(captioner({"media": clip, **CAPTIONS}, return_gate=True)) == {"text", "times", "gate", "entropy"}


WITHOUT_THE_PACKAGE = """
    import json, sys
    sys.modules["evacap"] = None
    import torch
    from transformers import AutoModel, AutoModelForSeq2SeqLM, AutoProcessor, pipeline
    folder, clip = sys.argv[1:]
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules")
    AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True)
    captions = {"audio_caption": "dog", "video_caption": "rain"}
    inputs = processor(media=clip, audio_captions="dog", video_captions="rain", return_tensors="pt")
    ids = model.generate(**inputs, num_beams=2)
    clip = {"media": clip, **captions}
    text = pipeline("audio-visual-captioning", folder, trust_remote_code=True)(clip, num_beams=2)["text"]
    model.save_pretrained(folder + "_again")
    processor.save_pretrained(folder + "_again")
    again = pipeline("audio-visual-captioning", folder + "_again", trust_remote_code=True)(clip, num_beams=2)["text"]
    assert again == text
    print(json.dumps([ids.tolist(), text]))
"""


def test_without_the_package_the_folder_brings_its_own_code(folder, clip, tmp_path):
    printed = json.loads(run_in_a_process(WITHOUT_THE_PACKAGE, str(folder), clip, cache=tmp_path))
    processor, model = AutoProcessor.from_pretrained(folder), AutoModel.from_pretrained(folder)
    inputs = processor(media=clip, audio_captions="dog", video_captions="rain", return_tensors="pt")
    ids = model.generate(**inputs, num_beams=2)
    assert torch.equal(torch.tensor(printed[0]), ids)
    assert printed[1] == pipeline(evacap.TASK, model=str(folder))({"media": clip, **CAPTIONS}, num_beams=2)["text"]
    assert (tmp_path / "transformers_modules").is_dir()


def test_public_names_exist():
    for name in evacap.__all__:
        assert getattr(evacap, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        evacap.nothing  # noqa: B018

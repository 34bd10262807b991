"""Prompts of a language model, and captions through processor, pipeline and a saved folder."""

import json
import sys
from pathlib import Path

import pytest
import torch
from media_files import write_clip
from test_processing_evacap import run_in_a_process
from transformers import AutoModel, AutoProcessor, pipeline

import evacap
from evacap.modeling_evacap.language_model_weights import with_language_model
from evacap.processing.model_processor import (
    LAVCAP_PROMPT,
    default_template,
    load_language_tokenizer,
    make_processor,
)
from evacap.processing.processing_evacap import CLIP_TOKEN, EVACapProcessor


sys.path.insert(0, str(Path(__file__).parents[1]))

from language_models import save_language_model  # noqa: E402


def make_captioner(folder: Path, **options) -> tuple[evacap.EVACapForCausalLM, EVACapProcessor]:
    """A captioner with a tiny language model, and its processor."""
    name = save_language_model(folder, **options)
    tokenizer = load_language_tokenizer(name)
    torch.manual_seed(0)
    start = AutoModel.from_pretrained(evacap.TINY)
    processor = make_processor(
        start.config, {"frame_shift_ms": 20}, tokenizer, prompt_template=default_template(tokenizer)
    )
    clip = tokenizer.convert_tokens_to_ids(CLIP_TOKEN)
    model = with_language_model(start.get_encoder(), name, processor.prompt_ids(), clip)
    torch.nn.init.normal_(model.multi_modal_projector.weight)
    return model, processor


@pytest.fixture(scope="module")
def captioner(tmp_path_factory):
    return make_captioner(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    return str(write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", seconds=2))


def test_the_parts_of_a_prompt_are_tokenised_on_their_own(captioner):
    model, processor = captioner
    tokenizer = processor.tokenizer
    ids = processor.prompt_ids("What is it?")
    place = ids.index(model.config.clip_token_id)
    assert tokenizer.decode(ids[:place]) == "USER: <Speech>"
    assert tokenizer.decode(ids[place + 1 :]) == "</Speech> What is it?\nASSISTANT:"
    assert processor.prompt_ids() == model.config.prompt_ids
    assert processor.prompt_template == LAVCAP_PROMPT


def test_a_chat_model_gets_its_chat_template(tmp_path):
    model, processor = make_captioner(tmp_path, chat=True)
    ids, tokenizer = processor.prompt_ids(), processor.tokenizer
    place = ids.index(model.config.clip_token_id)
    # The start token is the template's.
    assert tokenizer.decode(ids[:place]) == "<s>user: "
    assert tokenizer.decode(ids[place + 1 :]) == "\nPlease describe the audio.\nassistant:"


def test_prompts_and_captions_become_inputs(captioner, clip):
    model, processor = captioner
    inputs = processor(media=[clip, clip], prompt=["Hm?", "What is it?"], text=["a dog", "a"], return_tensors="pt")
    assert (inputs["input_ids"] == model.config.clip_token_id).sum(1).tolist() == [1, 1]
    assert inputs["attention_mask"][:, -1].tolist() == [1, 1] and not inputs["attention_mask"][0, 0]
    ends = [row[row != -100][-1].item() for row in inputs["labels"]]
    assert ends == [processor.tokenizer.eos_token_id] * 2
    assert model(**inputs).loss.isfinite()
    one = processor(media=clip, return_tensors="pt")
    assert "input_ids" not in one
    torch.testing.assert_close(
        model(**one).logits, model(**processor(media=clip, prompt=processor.prompt, return_tensors="pt")).logits
    )


def test_wrong_prompts_say_what_to_do(captioner):
    _, processor = captioner
    with pytest.raises(ValueError, match="`prompt_template` must have"):
        EVACapProcessor(
            processor.feature_extractor, processor.video_processor, processor.tokenizer, prompt_template="Describe"
        )
    with pytest.raises(ValueError, match="`prompt` has 1 instructions for 2 clips"):
        processor(text=["a", "b"], prompt=["What?"])
    with pytest.raises(ValueError, match="makes no prompts"):
        AutoProcessor.from_pretrained(evacap.TINY).prompt_ids()


WITHOUT_THE_PACKAGE = """
    import json, sys
    sys.modules["evacap"] = None
    from transformers import AutoModel, AutoProcessor, pipeline
    folder, clip = sys.argv[1:]
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules") and type(model).__name__ == "EVACapForCausalLM"
    ids = model.generate(**processor(media=clip, return_tensors="pt"), num_beams=2, max_new_tokens=5)
    captioner = pipeline("audio-visual-captioning", folder, trust_remote_code=True)
    print(json.dumps([ids.tolist(), captioner(clip, num_beams=2, max_new_tokens=5)["text"]]))
"""


def test_a_saved_folder_captions_with_and_without_the_package(captioner, clip, tmp_path):
    model, processor = captioner
    folder = tmp_path / "saved"
    pipeline(evacap.TASK, model=model, processor=processor).save_pretrained(str(folder))
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_evacap.EVACapConfig",
        "AutoModel": "language_model_evacap.EVACapForCausalLM",
    }
    assert (folder / "known_answer.json").is_file()
    loaded = AutoModel.from_pretrained(folder)
    assert type(loaded) is evacap.EVACapForCausalLM
    again = AutoProcessor.from_pretrained(folder)
    assert again.prompt_ids() == processor.prompt_ids()
    inputs = again(media=clip, return_tensors="pt")
    expected = model.generate(**inputs, num_beams=2, max_new_tokens=5)
    assert torch.equal(loaded.generate(**inputs, num_beams=2, max_new_tokens=5), expected)
    text = pipeline(evacap.TASK, model=str(folder))(clip, num_beams=2, max_new_tokens=5)["text"]
    assert text == processor.batch_decode(expected, skip_special_tokens=True)[0].strip()
    printed = json.loads(run_in_a_process(WITHOUT_THE_PACKAGE, str(folder), clip, cache=tmp_path))
    assert printed == [expected.tolist(), text]
    from evacap.cli import main

    assert main(["check-install", str(folder)]) == 0

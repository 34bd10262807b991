"""A captioner of what is seen, and the few pairs that prompt it to speak of sounds."""

import torch
from safetensors.torch import load_file
from training_runs import forget_accelerator, write_config

from evacap.training.procedural.captions import names_in_caption
from evacap.training.procedural.scenes import make_scene
from evacap.training.run_config import load_run_config
from evacap.training.study.picture_captions import PAIRS, PictureCaptionedRun, PromptingRun, picture_caption
from evacap.training.train import train


def test_a_picture_caption_names_what_is_seen_and_nothing_else():
    texts = set()
    for index in range(200):
        scene = make_scene(0, "train", index)
        seen = {event.kind for event in scene.events if event.place is not None}
        seen |= {silent.kind for silent in scene.silent_objects}
        text = picture_caption(scene)
        assert names_in_caption(text) == seen
        texts.add(text)
    assert "Nothing" in texts and len(texts) > 100


def test_only_the_prompt_learns_from_the_pairs(tmp_path):
    changes = {"model": {"preset": "video-only"}, "data": {"p_mix": 0}, "optimization": {"max_steps": 2}}
    config = load_run_config(write_config(tmp_path / "pictures.yaml", changes))
    forget_accelerator()
    clips = PictureCaptionedRun(config).clips
    for index in range(3):
        expected = clips.processor(text=picture_caption(make_scene(clips.seed, "train", index)))["labels"][0]
        assert torch.equal(torch.as_tensor(clips[index]["labels"]), torch.as_tensor(expected))
    forget_accelerator()
    assert train(config, PictureCaptionedRun) == 0

    changes["model"] |= {
        "start": str(tmp_path / "pictures" / "model"),
        "config": {"text_config": {"num_prompt_tokens": 4}},
        "freeze": ["*"],
        "freeze_except": ["model.decoder.prompt"],
    }
    changes["data"] |= {"procedural": 64}
    config = load_run_config(write_config(tmp_path / "prompted.yaml", changes))
    forget_accelerator()
    chosen = PromptingRun(config).clips
    assert len(chosen) == PAIRS and chosen.indices[0] < chosen.indices[-1] < 64
    for index in chosen.indices:
        assert all(event.place is not None for event in make_scene(chosen.dataset.seed, "train", index).events)
    forget_accelerator()
    assert train(config, PromptingRun) == 0
    before, after = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("pictures", "prompted"))
    assert after.keys() - before.keys() == {"model.decoder.prompt"}
    assert all(torch.equal(value, after[name]) for name, value in before.items())

"""The alignment of an audio encoder with a captioner of pictures: DALI's known answers, its masks, and a run."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from training_runs import read_log, run, write_config
from transformers import AutoModel

from evacap.modeling_evacap.configuration_evacap import EVACapConfig
from evacap.modeling_evacap.modeling_evacap import EVACapForConditionalGeneration
from evacap.processing.processing_evacap import EVACapProcessor
from evacap.training.align import AlignedStudent, late_concat
from evacap.training.alignment import (
    TokenScorers,
    alignment_loss,
    entropy,
    mean_discrepancy,
    most_agreeing,
    transport_cost,
    uniform_weights,
)
from evacap.training.checkpoints import load_states
from evacap.training.components import make_processor_and_config
from evacap.training.data.manifest import read_manifest
from evacap.training.data.prepare import prepare
from evacap.training.procedural.scenes import write_dataset
from evacap.training.run_config import AlignmentSection, load_run_config


FOLDER = "peers/eye_for_an_ear"
# The names of the published scorers: `image_scorer` makes the weights of the sound.
PUBLISHED = {
    **{f"sound_maps.{place}": f"a_{letter}" for place, letter in enumerate("qkv")},
    **{f"picture_maps.{place}": f"i_{letter}" for place, letter in enumerate("qkv")},
    "sound_attention": "image_scorer",
    "picture_attention": "audio_scorer",
}


def published(name: str) -> str:
    own = next(own for own in PUBLISHED if name.startswith(own))
    return PUBLISHED[own] + name.removeprefix(own)


def assert_close(found: torch.Tensor, expected: torch.Tensor, limit: float = 1e-6) -> None:
    assert (found.detach().double() - expected.double()).abs().max().item() <= limit


def make_sets(clips: int = 3, sound: int = 6, picture: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(clips, tokens, 8, generator=generator) for tokens in (sound, picture))


@pytest.mark.parametrize("dtype", ["f64", "f32"])
def test_the_mean_discrepancy_is_the_published_one(shared, dtype):
    known = load_file(shared(f"{FOLDER}/dali_mmd.safetensors"))
    sound, picture = known[f"{dtype}.audio"].requires_grad_(), known[f"{dtype}.image"]
    weights = uniform_weights(sound, None), uniform_weights(picture, None)
    losses = mean_discrepancy(sound, picture, *weights)
    losses.mean().backward()
    assert_close(losses, known[f"{dtype}.mmd"])
    assert_close(sound.grad, known[f"{dtype}.grad_audio"])
    given = mean_discrepancy(sound, picture, *weights, bandwidth=torch.full_like(losses, 4.0))
    assert_close(given, known[f"{dtype}.fixed_bandwidth_4.mmd"])
    assert_close(mean_discrepancy(picture, picture, weights[1], weights[1]), torch.zeros(3))


@pytest.mark.parametrize("case", ["uniform", "weighted"])
def test_exact_transport_is_the_published_one(shared, case):
    pytest.importorskip("ot")
    known = load_file(shared(f"{FOLDER}/dali_ot.safetensors"))
    sound, picture = known["audio"].requires_grad_(), known["image"]
    if case == "uniform":
        weights = [uniform_weights(tokens.detach(), None) for tokens in (sound, picture)]
    else:
        weights = [known["audio_weights"], known["image_weights"]]
    weights = [side.requires_grad_() for side in weights]
    costs = transport_cost(sound, picture, *weights, solver="exact")
    costs.mean().backward()
    assert_close(costs, known[f"{case}.transport"])
    assert_close(sound.grad, known[f"{case}.grad_audio"])
    if case == "weighted":
        for side, name in zip(weights, ("audio", "image")):
            assert_close(side.grad, known[f"weighted.grad_{name}_weights"])
    entropic = transport_cost(sound, picture, *weights, epsilon=0.003, iterations=3000)
    assert_close(entropic, costs, 0.01 * costs.mean().item())


def test_attentive_transport_is_the_published_one(shared):
    pytest.importorskip("ot")
    known = load_file(shared(f"{FOLDER}/dali_512_576.safetensors"))
    scorers = TokenScorers(16, num_heads=4).double()
    scorers.load_state_dict({name: known[f"scorer.{published(name)}"] for name in scorers.state_dict()})
    sound, picture = known["audio"].double().requires_grad_(), known["image"].double()
    weights = scorers(sound, picture, *(uniform_weights(tokens, None) for tokens in (sound, picture)))
    for found, name in zip(weights, ("audio", "image")):
        assert_close(found, known[f"attentive.{name}_weights"])
        assert_close(found.sum(1), torch.ones(2))
        assert found.min() >= 0.5 / found.shape[1]
    losses = {
        "loss": alignment_loss("attentive_ot", sound, picture, scorers=scorers, solver="exact"),
        "entropy": entropy(*weights),
    }
    assert_close(losses["loss"], known["attentive.transport"].mean())
    assert_close(losses["entropy"], known["attentive.entropy"])
    for name, value in losses.items():
        scorers.zero_grad()
        value.backward(retain_graph=True, inputs=[sound, *scorers.parameters()])
        for place, parameter in scorers.named_parameters():
            assert_close(parameter.grad, known[f"attentive.grad_of_{name}.{published(place)}"])
        if name == "loss":
            assert_close(sound.grad, known["attentive.grad_audio"])
    assert_close(alignment_loss("ot", sound, picture, solver="exact"), known["uniform.transport"].mean())
    assert_close(alignment_loss("mmd", sound, picture), known["mmd.loss"][0])


@pytest.mark.parametrize("loss", ["mmd", "ot", "attentive_ot", "contrast"])
def test_order_padding_and_half_precision(loss):
    sound, picture = make_sets()
    scorers = TokenScorers(8)
    value = alignment_loss(loss, sound, picture, scorers=scorers)
    order = torch.randperm(6)
    assert_close(alignment_loss(loss, sound[:, order], picture.flip(1), scorers=scorers), value, 1e-4)
    # Padding has no weight, and a clip without a picture does not count, whatever its tokens are.
    padded = [
        torch.cat([torch.cat([tokens, tokens[:1]]), torch.full((4, 2, 8), 99.0)], 1) for tokens in (sound, picture)
    ]
    masks = [torch.ones(tokens.shape[:2], dtype=torch.bool) for tokens in padded]
    for mask in masks:
        mask[:, -2:] = False
    masks[1][3] = False
    padded[0].requires_grad_()
    found = alignment_loss(loss, *padded, *masks, scorers=scorers)
    assert_close(found, value, 1e-4)
    found.backward()
    assert padded[0].grad.isfinite().all() and not padded[0].grad[3].any() and not padded[0].grad[:, -2:].any()
    # The squares of such numbers overflow in float16.
    large = alignment_loss(loss, (300 * sound).half(), (300 * picture).half(), scorers=scorers)
    assert large.dtype == torch.float32 and large.isfinite()
    if loss == "ot":
        assert_close(large / value, torch.tensor(9e4), 90)


def test_equal_tokens_have_no_distance():
    same = torch.ones(2, 5, 8, requires_grad=True)
    for loss in ("mmd", "ot"):
        value = alignment_loss(loss, same, same.detach())
        value.backward()
        assert value == 0 and same.grad.isfinite().all()


def test_the_clips_that_agree_most_are_kept():
    pictures = torch.eye(4).repeat(2, 1)
    sounds = torch.cat([pictures[:4], pictures[4:].flip(0)]) + 5
    counted = torch.ones(8, dtype=torch.bool)
    assert most_agreeing(sounds, pictures, counted, 0.5).tolist() == [True] * 4 + [False] * 4
    counted[0] = False
    assert most_agreeing(sounds, pictures, counted, 0.4).sum() == 3
    many = torch.randn(25, 4)
    assert most_agreeing(many, many + torch.randn(25, 4), torch.ones(25, dtype=torch.bool), 0.6).sum() == 15


def test_the_encoder_gets_no_gradient_of_the_entropy(teacher):
    config = EVACapConfig.from_pretrained(teacher).to_dict() | {"fusion_type": "audio_only"}
    student = EVACapForConditionalGeneration(EVACapConfig.from_dict(config))
    aligned = AlignedStudent(student, AlignmentSection("", loss="attentive_ot"))
    loss, spread = aligned(torch.randn(2, 4, 16), None, torch.randn(2, 64, 32))
    spread.backward(retain_graph=True)
    assert all(parameter.grad is None for parameter in student.parameters())
    of_entropy = [parameter.grad.clone() for parameter in aligned.scorers.parameters()]
    assert any(gradient.any() for gradient in of_entropy)
    loss.backward()
    assert student.get_encoder().joint.layernorm.weight.grad.any()
    assert any((p.grad != before).any() for p, before in zip(aligned.scorers.parameters(), of_entropy))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    changes = {"model": {"preset": "video-only"}, "data": {"p_mix": 0}, "optimization": {"epochs": 1}}
    assert run(write_config(folder / "teacher.yaml", changes)) == 0
    return folder / "teacher" / "model"


def changes(teacher, loss: str, **alignment) -> dict:
    return {
        "model": {"preset": "audio-only"},
        "data": {"p_mix": 0},
        "alignment": {"teacher": str(teacher), "loss": loss, **alignment},
    }


def test_a_student_is_an_audio_only_captioner_with_the_decoder_of_its_teacher(tmp_path, teacher):
    before = (teacher / "model.safetensors").read_bytes()
    options = {"tokens": 12, "keep": 1.0}
    assert run(write_config(tmp_path / "whole.yaml", changes(teacher, "attentive_ot", **options))) == 0
    # From a checkpoint a run goes on to the same model: the scorers are in it.
    parts = write_config(tmp_path / "parts.yaml", changes(teacher, "attentive_ot", **options))
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "model")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step-00000012")
    assert run(parts) == 0
    files = [tmp_path / name / "model" / "model.safetensors" for name in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert (teacher / "model.safetensors").read_bytes() == before
    log = read_log(tmp_path / "whole")
    assert len(log) == 12 and log[-1]["loss"] < log[0]["loss"] and log[-1]["entropy"] > 0
    model = AutoModel.from_pretrained(tmp_path / "whole" / "model", trust_remote_code=False)
    assert model.config.fusion_type == "audio_only"
    known = load_file(teacher / "model.safetensors")
    weights = model.state_dict()
    assert not any("scorers" in name or "video_tower" in name for name in weights)
    same = [name for name in known if ".decoder." in name]
    assert same and all(torch.equal(weights[name], known[name]) for name in same)
    start = tmp_path / "start.yaml"
    assert run(write_config(start, changes(teacher, "mmd"), {"optimization": {"max_steps": 0}})) == 0
    first = load_file(tmp_path / "start" / "model" / "model.safetensors")
    moved = {name.split(".")[2] for name, value in first.items() if not torch.equal(weights[name], value)}
    assert moved == {"audio_tower", "joint"}
    assert "captions were not read" in (tmp_path / "whole" / "model" / "training.json").read_text()
    processor = EVACapProcessor.from_pretrained(tmp_path / "whole" / "model")
    assert processor.modalities == "audio"
    ids = model.generate(input_features=torch.randn(1, 64, 32), max_new_tokens=5)
    assert isinstance(processor.batch_decode(ids)[0], str)


def test_teacher_and_student_are_joined_in_one_captioner_of_both_streams(tmp_path, teacher):
    config = write_config(tmp_path / "run.yaml", changes(teacher, "mmd"), {"optimization": {"max_steps": 2}})
    assert run(config, "saving.code=true") == 0
    # With its own code, as from the Hub, and with the package.
    for trusted in (True, False):
        joined = AutoModel.from_pretrained(tmp_path / "run" / "late_concat", trust_remote_code=trusted).eval()
        picture, sound = (AutoModel.from_pretrained(path).eval() for path in (teacher, tmp_path / "run" / "model"))
        inputs = {"input_features": torch.randn(2, 64, 32), "pixel_values_videos": torch.randn(2, 2, 3, 32, 32)}
        streams = [
            model.get_encoder()(**{name: inputs[name]}).last_hidden_state
            for model, name in ((picture, "pixel_values_videos"), (sound, "input_features"))
        ]
        assert_close(joined.get_encoder()(**inputs).last_hidden_state, torch.cat(streams, 1))
        assert_close(joined.get_encoder()(input_features=inputs["input_features"]).last_hidden_state, streams[1])
        labels = torch.tensor([[5, 6, 2]] * 2)
        # Without a picture it is the student.
        mask = torch.zeros(2, 2)
        alone = sound(input_features=inputs["input_features"], labels=labels).logits
        assert_close(joined(**inputs, pixel_values_videos_mask=mask, labels=labels).logits, alone, 1e-5)
    processor = EVACapProcessor.from_pretrained(tmp_path / "run" / "late_concat")
    assert processor.modalities == "audio_video"
    assert isinstance(processor.batch_decode(joined.generate(**inputs, num_beams=2, max_new_tokens=5))[0], str)
    with pytest.raises(ValueError, match="`sound` has `fusion_type='video_only'`"):
        late_concat(picture, picture)
    sound.config.num_joint_layers = 2
    with pytest.raises(ValueError, match="`picture` has 1 joint layers and `sound` has 2"):
        late_concat(picture, sound)


def test_a_run_goes_on_from_before_the_scorers_learn(tmp_path, teacher):
    """In the first of 20 parts they have no gradient, so there is nothing of theirs in the optimizer."""
    options = {
        "optimization": {"epochs": 20, "max_steps": 41},
        "saving": {"every_steps": 1, "keep": 41},
        "alignment": {"scorers_learning_rate": 3e-4},
    }
    for name in ("whole", "parts"):
        config = write_config(tmp_path / f"{name}.yaml", changes(teacher, "attentive_ot", tokens=12), options)
        if name == "parts":
            shutil.copytree(tmp_path / "whole", tmp_path / "parts")
            shutil.rmtree(tmp_path / "parts" / "model")
            for later in sorted((tmp_path / "parts" / "checkpoints").iterdir())[1:]:
                shutil.rmtree(later)
        assert run(config) == 0
    last = "checkpoints/step-00000041/model.safetensors"
    assert (tmp_path / "whole" / last).read_bytes() == (tmp_path / "parts" / last).read_bytes()
    *groups, scorers = load_states((tmp_path / "whole" / last).with_name("optimizer.safetensors"))["param_groups"]
    assert (scorers["lr"], scorers["weight_decay"], len(scorers["params"])) == (3e-4, 0.0, 20)
    assert len(groups) == 2 and all(group["lr"] < 3e-4 for group in groups)


def test_clips_without_captions_are_enough(tmp_path, teacher):
    processor, _ = make_processor_and_config(load_run_config(write_config(tmp_path / "small.yaml")).model)
    clips = read_manifest(write_dataset(tmp_path / "clips", "train", 4, seed=0), captions=False)
    prepare(clips, tmp_path / "prepared", processor, "train", fps=2, num_workers=1)
    data = {"data": {"procedural": None, "prepared": str(tmp_path / "prepared")}}
    assert run(write_config(tmp_path / "run.yaml", changes(teacher, "ot"), data)) == 0
    with pytest.raises(ValueError, match="have no captions to learn from"):
        run(write_config(tmp_path / "plain.yaml", data))


LLAMA = {"text_config": {"model_type": "llama"}}


@pytest.mark.parametrize("fields", [{"caption_contrast_weight": 0.1}, LLAMA], ids=["contrast", "llama"])
def test_teachers_of_other_kinds(tmp_path, fields):
    pictures = {"model": {"preset": "video-only", "config": fields}, "data": {"p_mix": 0}}
    step = {"optimization": {"max_steps": 1}}
    assert run(write_config(tmp_path / "teacher.yaml", pictures, step)) == 0
    pooled = {"model": {"config": {"audio_pooling": "frequency"}}}
    student = write_config(tmp_path / "run.yaml", changes(tmp_path / "teacher" / "model", "ot"), step, pooled)
    assert run(student) == 0
    paths = tmp_path / "teacher" / "model", tmp_path / "run" / "model", tmp_path / "run" / "late_concat"
    picture, sound, joined = (AutoModel.from_pretrained(path).eval() for path in paths)
    assert sound.config.audio_pooling == joined.config.audio_pooling == "frequency"
    decoders = [
        {name: value for name, value in model.state_dict().items() if ".encoder." not in f".{name}"}
        for model in (picture, sound, joined)
    ]
    assert all(
        torch.equal(value, one[name]) for one in decoders[1:] for name, value in one.items() if name in decoders[0]
    )
    assert not any("contrast" in name for one in decoders[1:] for name in one)
    inputs = {"input_features": torch.randn(1, 64, 32), "pixel_values_videos": torch.randn(1, 2, 3, 32, 32)}
    tokens = [
        picture.get_encoder()(pixel_values_videos=inputs["pixel_values_videos"]).last_hidden_state,
        sound.get_encoder()(input_features=inputs["input_features"]).last_hidden_state,
    ]
    assert_close(joined.get_encoder()(**inputs).last_hidden_state, torch.cat(tokens, 1))


def test_prefix_tuning_of_a_teacher_changes_nothing_else(tmp_path, teacher):
    prompted = {
        "model": {
            "preset": "video-only",
            "start": str(teacher),
            "config": {"text_config": {"num_prompt_tokens": 3}},
            "freeze": ["*"],
            "freeze_except": ["model.decoder.prompt"],
        },
        "data": {"p_mix": 0, "procedural": 16},
        "optimization": {"epochs": 1, "batch_size": 16},
    }
    assert run(write_config(tmp_path / "prompted.yaml", prompted)) == 0
    known, tuned = (load_file(folder / "model.safetensors") for folder in (teacher, tmp_path / "prompted" / "model"))
    assert tuned.pop("model.decoder.prompt").shape == (3, 16)
    assert known.keys() == tuned.keys() and all(torch.equal(value, tuned[name]) for name, value in known.items())
    # A student has the vectors of its teacher.
    student = changes(tmp_path / "prompted" / "model", "contrast")
    assert run(write_config(tmp_path / "student.yaml", student, {"optimization": {"max_steps": 1}})) == 0
    assert "model.decoder.prompt" in load_file(tmp_path / "student" / "model" / "model.safetensors")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"data": {"p_mix": 0.1}}, "data.p_mix"),
        ({"model": {"preset": "evacap"}}, "model.preset"),
        ({"validation": {"every_steps": 4, "procedural": 4}}, "validation.every_steps"),
        ({"model": {"config": {"audio_config": {"hidden_size": 32}}}}, "audio_config.hidden_size"),
        ({"alignment": {"keep": 0.0}}, "alignment.keep"),
        ({"model": {"config": {"label_smoothing": 0.3}}}, "model.config.label_smoothing` is 0.3, but it is 0.1"),
        (
            {"model": {"config": {"text_config": {"num_prompt_tokens": 4}}}},
            "model.config.text_config.num_prompt_tokens",
        ),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, teacher, change, message):
    config = write_config(tmp_path / "run.yaml", changes(teacher, "mmd"), change)
    with pytest.raises(ValueError, match=message):
        run(config)


@pytest.mark.parametrize(("loss", "goes_on"), [("ot", True), ("attentive_ot", False)])
def test_a_run_from_before_the_scorers_had_a_rate_of_their_own_goes_on_if_it_has_none(
    tmp_path, teacher, loss, goes_on
):
    config = write_config(tmp_path / "run.yaml", changes(teacher, loss, tokens=12), {"optimization": {"max_steps": 1}})
    assert run(config) == 0
    path = tmp_path / "run" / "run.json"
    content = json.loads(path.read_text())
    del content["config"]["alignment"]["scorers_learning_rate"]
    path.write_text(json.dumps(content))
    if goes_on:
        assert run(config) == 0
    else:
        with pytest.raises(ValueError, match="`alignment.scorers_learning_rate` is None there and 0.0001 here"):
            run(config)

"""Optimal transport between sound and picture: LAVCap's known answers, masks, and its place in the encoder."""

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_config, tiny_inputs, tiny_labels

from evacap.modeling_evacap.configuration_evacap import EVACapConfig
from evacap.modeling_evacap.modeling_evacap import EVACapEncoder, EVACapForConditionalGeneration
from evacap.modeling_evacap.transport_evacap import EVACapOptimalTransport, sinkhorn, transport_loss, unit_length


FOLDER = "peers/lavcap"
SINKHORN = "no_iteration one_column one_iteration one_row paper_shape square three_iterations wide_range".split()
LOSSES = (
    "default_f64 default_f32 exp_q_f64 scale_above_clamp_f64 scale_below_clamp_f64 weight_0.1_f64 "
    "epsilon_0.05_five_iterations_f64 one_video_token_f64 more_video_than_audio_f64 one_clip_f32"
).split()


@pytest.fixture(scope="module")
def known(shared):
    files = {}

    def read(file: str, case: str = "") -> dict[str, torch.Tensor]:
        if file not in files:
            files[file] = load_file(shared(f"{FOLDER}/{file}.safetensors"))
        start = f"{case}/" if case else ""
        return {name.removeprefix(start): value for name, value in files[file].items() if name.startswith(start)}

    return read


def assert_equal(found: torch.Tensor, expected: torch.Tensor, share: float | None = None) -> None:
    """1e-9 in float64 and 1e-6 in float32, of the largest entry where that is above 1."""
    share = share or (1e-9 if expected.dtype == torch.float64 else 1e-6)
    limit = share * max(1.0, expected.abs().max().item())
    assert (found.detach() - expected).abs().max().item() <= limit


def make_fusion(known: dict[str, torch.Tensor] | None = None, **fields) -> EVACapOptimalTransport:
    config = tiny_config(fusion_type="optimal_transport", **fields)
    fusion = EVACapOptimalTransport(config)
    dtype = torch.float32 if known is None else known["audio"].dtype
    scale = (
        2.6592600345611572 if known is None else known.get("logit_scale_before", known.get("weights/logit_scale", 0))
    )
    if config.ot_loss_weight > 0:
        fusion.logit_scale.data.fill_(float(scale))
    return fusion.to(dtype)


@pytest.mark.parametrize("case", [f"{name}_{dtype}" for name in SINKHORN for dtype in ("f32", "f64")])
def test_sinkhorn_is_the_references(known, case):
    case = known("sinkhorn", case)
    found = sinkhorn(case["scores"][None], int(case["iterations"]))[0]
    assert_equal(found, case["log_assignment"])


@pytest.mark.parametrize("case", LOSSES)
def test_the_loss_and_its_gradients_are_the_references(known, case):
    case = known("ot_loss", case)
    fusion = make_fusion(
        case,
        ot_epsilon=float(case["epsilon"]),
        ot_iterations=int(case["iterations"]),
        ot_use_log=not bool(case["use_exp_q"]),
    )
    audio, video = (case[name].clone().requires_grad_() for name in ("audio", "video"))
    output = fusion(audio, video)
    loss = float(case["weight"]) * output.loss
    loss.backward()
    assert_equal(fusion.logit_scale, case["logit_scale_after"])
    assert_equal(loss, case["loss"])
    assert_equal(output.transport_map, case["log_assignment"].exp().mT)
    for found, name in ((audio, "audio"), (video, "video"), (fusion.logit_scale, "logit_scale")):
        assert_equal(found.grad, case[f"grad_{name}"])


@pytest.mark.parametrize(
    ("case", "fields"),
    [
        ("ot_tempcat_QAV_add_f64", {}),
        ("ot_tempcat_QAV_add_f32", {}),
        ("ot_tempcat_QAV_add_frequency_mean_f64", {}),
        ("ot_tempcat_f64", {"ot_attention": False}),
    ],
)
@pytest.mark.parametrize("with_loss", [False, True])
def test_the_fusion_and_its_gradients_are_the_references(known, case, fields, with_loss):
    case = known("ot_fusion", case)
    fusion = make_fusion(case, **fields)
    audio, video = (case[name].clone().requires_grad_() for name in ("audio", "video"))
    tokens = audio.unflatten(1, (4, -1)).mean(1) if audio.shape[1] == 24 else audio
    output = fusion(tokens, video)
    assert_equal(output.fused, case["fused"])
    # The reference's scale started as a float32.
    assert_equal(output.loss, case["loss"])
    ((output.fused * case["cotangent"]).sum() + with_loss * output.loss).backward()
    name = "of_fused_plus_loss" if with_loss else "of_fused"
    assert_equal(audio.grad, case[f"grad_audio_{name}"])
    assert_equal(video.grad, case[f"grad_video_{name}"])


def test_the_papers_size(known):
    case = known("paper_size")
    audio, video = case["audio"].clone().requires_grad_(), case["video"].clone().requires_grad_()
    rows = audio.unflatten(1, (4, -1))
    rows.retain_grad()
    fusion = make_fusion()
    output = fusion(rows.mean(1), video)
    output.loss.backward()
    assert_equal(output.fused, case["fused"])
    assert_equal(output.transport_map, case["log_assignment"].exp().mT)
    assert_equal(output.loss, case["loss"])
    assert_equal(video.grad, case["grad_video_of_loss"])
    assert_equal(fusion.logit_scale.grad, case["grad_logit_scale"])
    assert_equal(rows.grad.sum(1), case["grad_audio_of_loss_frequency_sum"])


def random_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("context", ["mass", "mean"])
def test_padded_clips_equal_what_they_give_alone(context):
    audio, video = random_tokens(3, 6, 8), random_tokens(3, 5, 8, seed=1)
    audio_mask, video_mask = torch.ones(3, 6, dtype=torch.bool), torch.ones(3, 5, dtype=torch.bool)
    audio_mask[0, 4:], video_mask[0, 2:], video_mask[2] = False, False, False
    fusion = make_fusion(ot_context=context).double()
    both = fusion(audio.requires_grad_(), video, audio_mask, video_mask)
    both.loss.backward()
    assert audio.grad.isfinite().all()
    short = fusion(audio[:1, :4], video[:1, :2])
    whole = fusion(audio[1:2], video[1:2])
    torch.testing.assert_close(both.fused[0][both.mask[0]], short.fused[0])
    torch.testing.assert_close(both.fused[1], whole.fused[0])
    torch.testing.assert_close(both.transport_map[0, :4, :2], short.transport_map[0])
    assert both.transport_map[0].sum() == pytest.approx(1)
    # The clip without a picture has its sound, and does not count in the loss.
    torch.testing.assert_close(both.fused[2][both.mask[2]], unit_length(audio[2]))
    torch.testing.assert_close(both.loss, (short.loss + whole.loss) / 2)
    assert not both.transport_map[2].any()


def test_a_token_changes_by_one_in_their_number_or_by_a_mean():
    audio, video = random_tokens(1, 64, 8), random_tokens(1, 20, 8, seed=1)
    published, ours = (make_fusion(ot_context=name).double()(audio, video).fused for name in ("mass", "mean"))
    sound, picture = unit_length(audio), unit_length(video)
    change = (published - torch.cat([sound, picture], 1)).norm(dim=-1)
    assert change[:, :64].max() <= 1 / 64 + 1e-9
    assert change[:, 64:].max() <= 1 / 20 + 1e-3
    torch.testing.assert_close(ours[:, :64] - sound, 64 * (published[:, :64] - sound))
    torch.testing.assert_close(ours[:, 64:] - picture, 20 * (published[:, 64:] - picture))


def test_a_picture_of_zeros_is_finite():
    audio, video = random_tokens(2, 6, 8).requires_grad_(), torch.zeros(2, 3, 8, dtype=torch.float64)
    output = make_fusion().double()(audio, video)
    (output.fused.sum() + output.loss).backward()
    assert output.fused.isfinite().all() and audio.grad.isfinite().all()


def test_half_precision_computes_in_float32():
    audio, video = random_tokens(1, 6, 8).bfloat16(), random_tokens(1, 3, 8, seed=1).bfloat16()
    fusion = make_fusion()
    with torch.autocast("cpu", torch.bfloat16):
        output = fusion(audio, video)
    assert output.fused.dtype == torch.bfloat16
    assert output.transport_map.dtype == output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, fusion(audio.float(), video.float()).loss)


POOLED = {"audio_pooling": "frequency", "video_pooling": "frame"}


@pytest.mark.parametrize("fusion_type", ["optimal_transport", "gated_cross_attention", "concat"])
def test_pooling_averages_mel_rows_and_pictures(fusion_type):
    torch.manual_seed(0)
    encoder = EVACapEncoder(tiny_config(fusion_type=fusion_type, num_joint_layers=0, **POOLED)).eval()
    inputs = tiny_inputs()
    with torch.no_grad():
        output = encoder(**inputs)
        sound = encoder.audio_tower(inputs["input_features"]).last_hidden_state
        picture = encoder.video_tower(inputs["pixel_values_videos"]).last_hidden_state
    sound, picture = sound.unflatten(1, (2, 4)).mean(1), picture.unflatten(1, (2, 4)).mean(2)
    length = 4 if fusion_type == "gated_cross_attention" else 6
    assert output.last_hidden_state.shape == (3, length, 32)
    if fusion_type == "optimal_transport":
        expected = encoder.fusion(sound, picture).fused
        torch.testing.assert_close(output.last_hidden_state, expected)
        assert output.transport_map.shape == (3, 4, 2)
    if fusion_type == "concat":
        torch.testing.assert_close(output.last_hidden_state, encoder.joint.layernorm(torch.cat([sound, picture], 1)))


@pytest.mark.parametrize("pooling", [{}, POOLED], ids=["tokens", "pooled"])
@pytest.mark.parametrize("fields", [{"fusion_type": "optimal_transport"}, {"gate_type": "agreement"}])
def test_rows_of_a_mixed_batch_equal_what_they_give_alone(pooling, fields):
    torch.manual_seed(0)
    encoder = EVACapEncoder(tiny_config(**fields, **pooling)).eval()
    inputs = tiny_inputs()
    frames, mask = torch.ones(3, 64, dtype=torch.bool), torch.ones(3, 4, dtype=torch.bool)
    frames[1, 32:], mask[1, 2:], mask[2] = False, False, False
    with torch.no_grad():
        mixed = encoder(**inputs, input_features_mask=frames, pixel_values_videos_mask=mask)
        alone = encoder(inputs["input_features"][1:2, :32], inputs["pixel_values_videos"][1:2, :2])
        unseen = encoder(inputs["input_features"][2:])
    for row, expected in ((1, alone), (2, unseen)):
        found = mixed.last_hidden_state[row][mixed.attention_mask[row]]
        torch.testing.assert_close(found, expected.last_hidden_state[0], atol=1e-5, rtol=1e-5)


def test_training_adds_the_loss_by_its_weight():
    def run(weight: float):
        torch.manual_seed(0)
        config = tiny_config(fusion_type="optimal_transport", ot_loss_weight=weight, num_joint_layers=0, **POOLED)
        model = EVACapForConditionalGeneration(config).eval()
        return model, model(**tiny_inputs(), labels=tiny_labels())

    plain_model, plain = run(0)
    assert not any("logit_scale" in name for name, _ in plain_model.named_parameters())
    assert plain.transport_loss is None
    model, output = run(0.5)
    torch.testing.assert_close(output.loss, output.caption_loss + 0.5 * output.transport_loss)
    output.loss.backward()
    assert model.model.encoder.fusion.logit_scale.grad.abs() > 0
    assert not any("joint" in name for name, _ in model.named_parameters())


def test_captions_are_generated_with_and_without_a_picture():
    torch.manual_seed(0)
    model = EVACapForConditionalGeneration(tiny_config(fusion_type="optimal_transport", **POOLED)).eval()
    inputs = tiny_inputs()
    assert len(model.generate(**inputs, num_beams=2)) == 3
    assert len(model.generate(input_features=inputs["input_features"])) == 3


@pytest.mark.parametrize(
    ("kwargs", "field", "legal"),
    [
        ({"ot_context": "sum"}, "ot_context", "'mass', 'mean'"),
        ({"ot_epsilon": 0}, "ot_epsilon", "above 0"),
        ({"ot_iterations": 0}, "ot_iterations", "above 0"),
        ({"ot_loss_weight": -1.0}, "ot_loss_weight", "from 0 up"),
        ({"ot_attention": "yes"}, "ot_attention", "True or False"),
        ({"audio_pooling": "time"}, "audio_pooling", "'frequency'"),
        ({"video_pooling": "clip"}, "video_pooling", "'frame'"),
        ({"fusion_type": "video_only", "audio_pooling": "frequency"}, "audio_pooling", "video_only"),
        (
            {"fusion_type": "optimal_transport", "video_config": {"hidden_size": 384}},
            "video_config.hidden_size",
            "768",
        ),
    ],
)
def test_illegal_values_name_the_field_and_what_is_legal(kwargs, field, legal):
    with pytest.raises(ValueError, match=f"`{field}`") as error:
        EVACapConfig(**kwargs)
    assert legal in str(error.value)


def test_the_loss_of_the_plan_differs_from_that_of_its_logarithm():
    similarity = torch.matmul(unit_length(random_tokens(1, 4, 8)), unit_length(random_tokens(1, 6, 8, seed=1)).mT)
    plan = sinkhorn(similarity / 0.1, 50)
    scale = torch.tensor(2.0)
    assert transport_loss(similarity, plan, scale) != transport_loss(similarity, plan, scale, use_log=False)

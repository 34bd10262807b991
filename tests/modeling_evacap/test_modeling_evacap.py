import copy
import inspect
import logging

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
import transformers
from tiny import BATCH_SIZE, FRAMES, VIDEO_FRAMES, VOCABULARY, tiny_config, tiny_inputs, tiny_labels
from transformers import TextStreamer
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.generation import GenerationMixin

from evacap.modeling_evacap import attention_evacap, modeling_evacap, versions_evacap
from evacap.modeling_evacap.attention_evacap import QUERIES_AT_ONCE, blockwise_attention_forward, score_blocks
from evacap.modeling_evacap.configuration_evacap import EVACapConfig
from evacap.modeling_evacap.fusion_evacap import attention_and_entropy, fused_attention_and_entropy
from evacap.modeling_evacap.loss_evacap import label_smoothed_kl
from evacap.modeling_evacap.modeling_evacap import (
    CACHE_FIELD,
    MAX_CAPTION_LENGTH,
    EVACapDecoderLayer,
    EVACapEncoderLayer,
    EVACapEncoderOutput,
    EVACapForConditionalGeneration,
    EVACapModel,
    EVACapPatchProjection2d,
    EVACapPatchProjection3d,
    interpolate_in_time,
    sincos_position_table,
)
from evacap.modeling_evacap.versions_evacap import TESTED_TRANSFORMERS, UNTESTED_TRANSFORMERS
from evacap.training.components import enable_checkpointing


FUSION_TYPES = ["gated_cross_attention", "concat", "late_concat", "optimal_transport", "audio_only", "video_only"]
# With a decoder of another kind.
VARIANTS = [*FUSION_TYPES, "adaptive"]
TOLERANCE = {"atol": 1e-5, "rtol": 0}
AUDIO_TOKENS = 8  # 2 mel rows x 4 time steps
VIDEO_TOKENS = 8  # 2 tubelets x 4 patches


def build(seed: int = 0, model_class=EVACapForConditionalGeneration, **kwargs):
    torch.manual_seed(seed)
    model = model_class(tiny_config(**kwargs)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Weights far from their birth values, so that no path is close to the identity.
            if parameter.ndim > 1 and "position" not in name:
                parameter.normal_(std=0.2)
            elif "bias" in name:
                parameter.normal_(std=0.1)
    return model


def streams(fusion_type: str, inputs: dict) -> dict:
    """The streams that a variant reads."""
    unread = {"audio_only": "pixel_values_videos", "video_only": "input_features"}.get(fusion_type, "")
    return {name: value for name, value in inputs.items() if not name.startswith(unread or "-")}


@pytest.mark.parametrize(
    ("fusion_type", "low", "high"),
    [("audio_only", 153.0, 153.1), ("concat", 233.5, 233.7), ("gated_cross_attention", 235.2, 235.5)],
)
def test_parameter_counts_are_the_papers(fusion_type, low, high):
    with torch.device("meta"):
        model = EVACapForConditionalGeneration(EVACapConfig(fusion_type=fusion_type))
    assert low <= model.num_parameters() / 1e6 <= high


@pytest.mark.parametrize("attention", ["full", "frame"])
@pytest.mark.parametrize("fusion_type", FUSION_TYPES)
def test_encoder_output_shapes(fusion_type, attention):
    model = build(fusion_type=fusion_type, attention=attention, attn_implementation="eager")
    output = model.get_encoder()(**tiny_inputs(), output_hidden_states=True, output_attentions=True)
    both = dict.fromkeys(("concat", "late_concat", "optimal_transport"), AUDIO_TOKENS + VIDEO_TOKENS)
    length = {**both, "video_only": VIDEO_TOKENS}.get(fusion_type, AUDIO_TOKENS)
    assert output.last_hidden_state.shape == (BATCH_SIZE, length, 32)
    assert len(output.hidden_states) == 2 + 1 + 1
    assert len(output.attentions) == 2 + 1
    if fusion_type == "late_concat":
        assert len(output.video_hidden_states) == 2 + 1 + 1 and len(output.video_attentions) == 2 + 1
    gated = fusion_type == "gated_cross_attention"
    assert (output.fusion_gate is not None) == gated
    if gated:
        assert output.fusion_gate.shape == output.attention_entropy.shape == (BATCH_SIZE, AUDIO_TOKENS)
        assert output.cross_attentions.shape == (BATCH_SIZE, 4, AUDIO_TOKENS, VIDEO_TOKENS)
        assert len(output.video_hidden_states) == 3


@pytest.mark.parametrize("model_class", [EVACapModel, EVACapForConditionalGeneration])
def test_outputs_as_tuple_and_dict(model_class):
    model = build(model_class=model_class, attn_implementation="eager")
    inputs = {**tiny_inputs(), "decoder_input_ids": torch.tensor([[1, 5, 6]] * BATCH_SIZE)}
    output = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert len(output.decoder_hidden_states) == 3 + 1
    assert [weights.shape for weights in output.decoder_attentions] == [(BATCH_SIZE, 4, 3, 3)] * 3
    assert [weights.shape for weights in output.cross_attentions] == [(BATCH_SIZE, 4, 3, AUDIO_TOKENS)] * 3
    both = torch.cat([output.decoder_attentions[0], output.cross_attentions[0]], -1)
    torch.testing.assert_close(both.sum(-1), torch.ones(BATCH_SIZE, 4, 3), **TOLERANCE)
    as_tuple = model(**inputs, output_hidden_states=True, output_attentions=True, return_dict=False)
    assert isinstance(as_tuple, tuple)
    torch.testing.assert_close(as_tuple[0], output[0])


def plain_fusion(model, audio, video):
    """Equations 1 to 3 of the paper as they are written."""
    fusion, heads = model.model.encoder.fusion, 4
    query, key, value = (
        projection(states).view(*states.shape[:2], heads, -1).transpose(1, 2)
        for projection, states in ((fusion.q_proj, audio), (fusion.k_proj, video), (fusion.v_proj, video))
    )
    weights = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).softmax(-1)
    context = (weights @ value).transpose(1, 2).reshape(audio.shape)
    entropy = -(weights * weights.log()).sum(-1).mean(1) / torch.tensor(float(video.shape[1])).log()
    gate = torch.sigmoid(fusion.gate_weight * entropy + fusion.gate_bias)
    return (1 - gate[..., None]) * audio + gate[..., None] * context, gate, entropy


def test_entropy_gate_is_the_papers_equations():
    model = build()
    audio, video = torch.randn(2, 8, 32), torch.randn(2, 6, 32)
    fused, gate, entropy, _ = model.model.encoder.fusion(audio, video)
    expected = plain_fusion(model, audio, video)
    for mine, wanted in zip((fused, gate, entropy), expected, strict=True):
        torch.testing.assert_close(mine, wanted, **TOLERANCE)


def test_entropy_is_one_for_uniform_attention_and_zero_for_sharp():
    fusion = build().model.encoder.fusion
    video = torch.randn(1, 6, 32)
    with torch.no_grad():
        fusion.q_proj.weight.zero_(), fusion.q_proj.bias.zero_()
        assert fusion(torch.randn(1, 8, 32), video)[2].min() > 1 - 1e-6
        fusion.q_proj.bias.fill_(1e3)
        assert fusion(torch.randn(1, 8, 32), video)[2].max() < 1e-6


def test_one_visible_video_token_has_no_entropy():
    _, gate, entropy, _ = build().model.encoder.fusion(torch.randn(2, 8, 32), torch.randn(2, 1, 32))
    assert torch.equal(entropy, torch.zeros(2, 8))
    assert gate.min() > 0


# The blocks' sizes: all of it, four of the six rows at once, seven queries of one row at once.
@pytest.mark.parametrize("size", [2**21, 4 * 29 * 9 * 8, 7 * 9 * 8])
@pytest.mark.parametrize("masked", [False, True])
def test_the_entropy_needs_no_probabilities(masked, size, monkeypatch):
    monkeypatch.setitem(attention_evacap.SCORE_BYTES_AT_ONCE, "cpu", size)
    shapes = [(2, 3, 29, 8), (2, 3, 9, 8), (2, 3, 9, 8)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    mask = torch.arange(9) < torch.tensor([[9], [4]]) if masked else None
    results, gradients = [], []
    for attend in (attention_and_entropy, fused_attention_and_entropy):
        context, entropy, weights = attend(*inputs, mask, 8**-0.5)
        results.append((context, entropy))
        loss = (context * torch.linspace(-1, 1, 8, dtype=torch.float64)).sum() + entropy.square().sum()
        gradients.append(torch.autograd.grad(loss, inputs))
    with torch.no_grad():
        results.append(fused_attention_and_entropy(*inputs, mask, 8**-0.5)[:2])
    assert weights is None
    torch.testing.assert_close(results[2], results[0], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(results[1], results[0], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_the_gradient_of_the_entropy_is_that_of_its_value(masked):
    query, key, value = (torch.randn(2, 2, n, 4, dtype=torch.float64, requires_grad=True) for n in (3, 5, 5))
    mask = torch.arange(5) < torch.tensor([[5], [2]]) if masked else None
    assert torch.autograd.gradcheck(
        lambda *inputs: fused_attention_and_entropy(*inputs, mask, 0.5)[:2], (query, key, value)
    )


def scores_of(attend, query, key, scaling):
    """The scores as `attend` computes them, with the same products in the same order."""
    if attend is attention_and_entropy:
        return torch.matmul(query * scaling, key.transpose(2, 3))
    ((_, scores),) = score_blocks(query * scaling, key, None)
    return scores.view(*query.shape[:3], -1)


@pytest.mark.parametrize("attend", [attention_and_entropy, fused_attention_and_entropy])
@pytest.mark.parametrize("offset", [0.0, 3e3])
@pytest.mark.parametrize("sharpness", [1.0, 30.0])
def test_large_scores_leave_the_gradient_of_the_entropy_as_it_is(attend, offset, sharpness):
    rng = torch.Generator().manual_seed(0)
    query, key = (sharpness * torch.randn(2, 2, n, 16, generator=rng, dtype=torch.float64).float() for n in (12, 9))
    # All queries and all keys have something in common: it makes the scores large, and does not change the softmax.
    query[..., 0], key[..., 0] = offset, offset
    inputs = [query.requires_grad_(), key.requires_grad_()]
    entropy = attend(*inputs, key, None, 0.25)[1]
    found = entropy, *torch.autograd.grad(entropy.sum(), inputs)

    # How a product rounds scores of 2e6 depends on the processor. From those scores on, all must be exact.
    scores = scores_of(attend, query, key, 0.25).detach().double().requires_grad_()
    exact_entropy = -(scores.softmax(-1) * scores.log_softmax(-1)).sum(-1)
    (of_scores,) = torch.autograd.grad(exact_entropy.sum(), scores)
    assert of_scores.norm() > 1e-3
    exact = exact_entropy, 0.25 * of_scores @ key.double(), 0.25 * of_scores.transpose(2, 3) @ query.double()
    for value, expected, tolerance in zip(found, exact, (1e-5, 2e-3, 2e-3), strict=True):
        assert (value - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sharpness", [0.3, 4.0])
def test_the_entropy_keeps_its_digits_under_autocast(dtype, sharpness):
    rng = torch.Generator().manual_seed(0)
    inputs = [(sharpness * torch.randn(2, 4, n, 16, generator=rng)).to(dtype).requires_grad_() for n in (50, 196, 196)]
    mask = torch.arange(196) < torch.tensor([[196], [100]])
    results = []
    for attend in (attention_and_entropy, fused_attention_and_entropy):
        with torch.autocast("cpu", dtype):
            entropy = attend(*inputs, mask, 0.25)[1]
            results.append((entropy, torch.autograd.grad(entropy.sum(), inputs[:2])))
    (expected, gradients), (found, fused_gradients) = results
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for one, other in zip(gradients, fused_gradients, strict=True):
        assert (one.float() - other.float()).norm() < 0.05 * one.float().norm()


def test_the_fusion_holds_no_probabilities_unless_asked():
    fusion = build(gate_weight_init=-1.0).model.encoder.fusion
    audio, video = torch.randn(2, 8, 32, requires_grad=True), torch.randn(2, 6, 32)
    plain, fused = fusion(audio, video, output_attentions=True), fusion(audio, video)
    assert plain[3].shape == (2, 4, 8, 6) and fused[3] is None
    for expected, found in zip(plain[:3], fused[:3], strict=True):
        torch.testing.assert_close(found, expected, **TOLERANCE)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.shape) or tensor, lambda t: t):
        fusion(audio, video)
    assert saved and (2, 4, 8, 6) not in saved


def test_gate_types():
    audio, video = torch.randn(2, 8, 32), torch.randn(2, 6, 32)
    fused, gate, entropy, weights = build(gate_type="none").model.encoder.fusion(audio, video, output_attentions=True)
    assert torch.equal(gate, torch.ones(2, 8))
    value = build(gate_type="none").model.encoder.fusion.v_proj(video).view(2, 6, 4, 8).transpose(1, 2)
    torch.testing.assert_close(fused, (weights @ value).transpose(1, 2).reshape(2, 8, 32), **TOLERANCE)
    fusion = build(gate_type="learned").model.encoder.fusion
    fused, gate, _, weights = fusion(audio, video, output_attentions=True)
    context = (weights @ fusion.v_proj(video).view(2, 6, 4, 8).transpose(1, 2)).transpose(1, 2).reshape(2, 8, 32)
    torch.testing.assert_close(gate, fusion.gate(torch.cat([audio, context], -1)).sigmoid()[..., 0], **TOLERANCE)


def test_entropy_gate_gradients_stay_finite_with_masks_and_sharp_attention():
    fusion = build().model.encoder.fusion
    audio = (torch.randn(3, 8, 32) * 100).requires_grad_()
    video = (torch.randn(3, 6, 32) * 100).requires_grad_()
    mask = torch.tensor([[True] * 6, [True] + [False] * 5, [False] * 6])
    fused, gate, entropy, _ = fusion(audio, video, mask)
    # As large as a loss scaled for half precision makes it.
    ((fused.sum() + gate.sum() + entropy.sum()) * 2.0**24).backward()
    for tensor in (audio, video, fusion.gate_weight, fusion.gate_bias, fusion.q_proj.weight):
        assert tensor.grad.isfinite().all()


@pytest.mark.parametrize(
    "fusion_type", ["gated_cross_attention", "concat", "late_concat", "optimal_transport", "adaptive"]
)
@pytest.mark.parametrize("attention", ["full", "frame"])
def test_rows_of_a_mixed_batch_equal_what_they_give_alone(fusion_type, attention):
    model = build(fusion_type=fusion_type, attention=attention)
    inputs = tiny_inputs()
    ids = torch.tensor([[1, 5, 6]] * BATCH_SIZE)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    batch = model(**inputs, pixel_values_videos_mask=mask, decoder_input_ids=ids).logits
    for row, frames in enumerate((4, 2, 0)):
        audio = inputs["input_features"][row : row + 1]
        video = inputs["pixel_values_videos"][row : row + 1, :frames] if frames else None
        alone = model(input_features=audio, pixel_values_videos=video, decoder_input_ids=ids[:1]).logits
        torch.testing.assert_close(batch[row : row + 1], alone, **TOLERANCE)


@pytest.mark.parametrize("fusion_type", VARIANTS)
def test_what_a_masked_frame_holds_changes_nothing(fusion_type):
    model = build(fusion_type=fusion_type)
    inputs = {**tiny_inputs(), "decoder_input_ids": torch.tensor([[1, 5, 6]] * BATCH_SIZE)}
    inputs["pixel_values_videos_mask"] = torch.tensor([[1, 1, 0, 0]] * BATCH_SIZE)
    inputs["input_features_mask"] = (torch.arange(FRAMES) < 32).expand(BATCH_SIZE, -1)
    expected = model(**inputs).logits
    inputs["pixel_values_videos"][:, 2:] = float("nan")
    inputs["input_features"][:, 32:] = float("inf")
    torch.testing.assert_close(model(**inputs).logits, expected, atol=0, rtol=0)


@pytest.mark.parametrize("fusion_type", ["gated_cross_attention", "concat", "audio_only", "adaptive"])
def test_padded_audio_equals_what_it_gives_alone(fusion_type):
    model = build(fusion_type=fusion_type)
    inputs = streams(fusion_type, tiny_inputs())
    ids = torch.tensor([[1, 5, 6]] * BATCH_SIZE)
    mask = (torch.arange(FRAMES) < 32).expand(BATCH_SIZE, -1)
    padded = model(**inputs, input_features_mask=mask, decoder_input_ids=ids).logits
    inputs["input_features"] = inputs["input_features"][:, :32]
    torch.testing.assert_close(padded, model(**inputs, decoder_input_ids=ids).logits, **TOLERANCE)


def test_without_video_the_gate_is_exactly_zero():
    model = build()
    inputs = tiny_inputs()
    audio_alone = model.get_encoder()(input_features=inputs["input_features"])
    masked = model.get_encoder()(**inputs, pixel_values_videos_mask=torch.zeros(BATCH_SIZE, VIDEO_FRAMES))
    for output in (audio_alone, masked):
        assert torch.equal(output.fusion_gate, torch.zeros(BATCH_SIZE, AUDIO_TOKENS))
        assert torch.equal(output.attention_entropy, torch.zeros(BATCH_SIZE, AUDIO_TOKENS))
    torch.testing.assert_close(masked.last_hidden_state, audio_alone.last_hidden_state, atol=0, rtol=0)


def test_frame_attention_keeps_tubelets_apart():
    inputs = tiny_inputs()
    changed = {**inputs, "pixel_values_videos": inputs["pixel_values_videos"].clone()}
    changed["pixel_values_videos"][:, 2:] += 1
    for attention, apart in (("frame", True), ("full", False)):
        tower = build(attention=attention).model.encoder.video_tower
        first = tower(inputs["pixel_values_videos"]).last_hidden_state[:, :4]
        second = tower(changed["pixel_values_videos"]).last_hidden_state[:, :4]
        assert torch.allclose(first, second, atol=1e-6) == apart


@pytest.mark.parametrize(
    ("fusion_type", "change", "message"),
    [
        ("gated_cross_attention", {"input_features": None}, "fusion_type='video_only'"),
        ("video_only", {"pixel_values_videos": None}, "`pixel_values_videos` is missing"),
        ("concat", {"input_features": torch.zeros(3, 64, 31)}, "(3, 64, 31)"),
        ("concat", {"input_features": torch.zeros(3, 60, 32)}, "60 frames"),
        ("concat", {"pixel_values_videos": torch.zeros(3, 3, 3, 32, 32)}, "3 frames"),
        ("concat", {"pixel_values_videos": torch.zeros(3, 4, 3, 32, 48)}, "(3, 4, 3, 32, 48)"),
        ("concat", {"pixel_values_videos_mask": torch.ones(3, 5)}, "`pixel_values_videos_mask` has shape (3, 5)"),
        ("concat", {"input_features_mask": torch.ones(3, 5)}, "`input_features_mask` has shape (3, 5)"),
    ],
)
def test_wrong_inputs_say_what_to_do(fusion_type, change, message):
    with pytest.raises(ValueError) as error:
        build(fusion_type=fusion_type)(**{**tiny_inputs(), **change}, labels=tiny_labels())
    assert message in str(error.value)


@pytest.mark.parametrize("frames", [2, 8])
def test_other_frame_counts_interpolate_the_table(frames):
    output = build()(**tiny_inputs(video_frames=frames), labels=tiny_labels())
    assert output.loss.isfinite()


def test_interpolation_in_time():
    table = torch.arange(4.0)[:, None, None]
    assert interpolate_in_time(table, 4)[0, :, 0, 0].tolist() == [0, 1, 2, 3]
    expected = F.interpolate(torch.arange(4.0)[None, None], size=6, mode="linear", align_corners=False)[0, 0]
    torch.testing.assert_close(interpolate_in_time(table, 6)[0, :, 0, 0], expected)
    mask = torch.tensor([[True, True, False, False], [False, True, True, True]])
    masked = interpolate_in_time(table, 4, mask)[..., 0, 0]
    torch.testing.assert_close(masked[0, :2], interpolate_in_time(table, 2)[0, :, 0, 0])
    torch.testing.assert_close(masked[1, 1:], interpolate_in_time(table, 3)[0, :, 0, 0])


def test_position_tables_tell_all_places_apart():
    table = sincos_position_table(3, 5, 16)
    assert table.shape == (15, 16)
    assert torch.pdist(table).min() > 0.1


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_loss_is_the_divergence_to_the_smoothed_target(epsilon):
    logits, labels = torch.randn(BATCH_SIZE, 7, VOCABULARY), tiny_labels()
    target = torch.full((BATCH_SIZE, 7, VOCABULARY), epsilon / (VOCABULARY - 1))
    target.scatter_(-1, labels.clamp(min=0)[..., None], 1 - epsilon)
    counted = labels != -100
    expected = F.kl_div(logits.log_softmax(-1)[counted], target[counted], reduction="batchmean")
    torch.testing.assert_close(label_smoothed_kl(logits, labels, epsilon), expected)
    half = label_smoothed_kl(logits, labels, epsilon, num_items_in_batch=2 * counted.sum())
    torch.testing.assert_close(half, expected / 2)


def test_labels_are_shifted_into_decoder_inputs():
    model, labels = build(), tiny_labels()
    ids = torch.cat([torch.full((BATCH_SIZE, 1), 1), labels[:, :-1].clamp(min=0)], dim=1)
    expected = model(**tiny_inputs(), decoder_input_ids=ids).logits
    torch.testing.assert_close(model(**tiny_inputs(), labels=labels).logits, expected, **TOLERANCE)


def test_gate_stability_adds_its_weighted_mean():
    plain, weighted = build(), build(gate_stability_weight=3.0)
    gate = plain.get_encoder()(**tiny_inputs()).fusion_gate.view(BATCH_SIZE, 2, 4).mean(1)
    expected = plain(**tiny_inputs(), labels=tiny_labels()).loss + 3.0 * (gate[:, 1:] - gate[:, :-1]).pow(2).mean()
    outputs = weighted(**tiny_inputs(), labels=tiny_labels())
    torch.testing.assert_close(outputs.loss, expected)
    torch.testing.assert_close(outputs.caption_loss + 3.0 * outputs.gate_stability, expected)


def build_for_training(**kwargs):
    model = build(**kwargs).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.config.text_config.attention_probs_dropout_prob = 0.0
    return model


def swapped_batch() -> dict:
    own = tiny_inputs()
    return {
        **own,
        "pixel_values_videos": own["pixel_values_videos"][[1, 0, 2]],
        "labels": tiny_labels(),
        "shuffled": torch.tensor([True, True, False]),
        "video_index": torch.tensor([1, 0, 2]),
        "matched_pixel_values_videos": own["pixel_values_videos"][:2],
    }


def test_semantic_consistency_is_the_divergence_of_the_swapped_samples():
    plain, weighted = build_for_training(), build_for_training(semantic_consistency_weight=2.0)
    batch, labels = swapped_batch(), tiny_labels()
    runs = []
    weighted.model.encoder.video_tower.register_forward_hook(lambda *call: runs.append(len(call[1][0])))
    output = weighted(**batch)
    matched = plain(**tiny_inputs(), labels=labels).logits.log_softmax(-1)
    other = plain(**batch)
    divergence = (matched.exp() * (matched - other.logits.log_softmax(-1))).sum(-1)[:2]
    expected = other.loss + 2.0 * divergence[labels[:2] != -100].mean()
    torch.testing.assert_close(output.loss, expected)
    assert output.logits.shape[0] == BATCH_SIZE
    assert runs == [BATCH_SIZE]
    torch.testing.assert_close(output.caption_loss, other.loss.detach())
    torch.testing.assert_close(output.semantic_consistency, divergence[labels[:2] != -100].mean().detach())
    assert other.caption_loss is None and other.semantic_consistency is None
    torch.testing.assert_close(weighted.eval()(**batch).loss, other.loss)


def test_semantic_consistency_with_every_kind_of_decoder_input():
    model, batch = build_for_training(semantic_consistency_weight=2.0), swapped_batch()
    expected = model(**batch).loss
    ids = F.pad(batch["labels"][:, :-1], (1, 0), value=1).clamp(min=0)
    embeddings = model.get_input_embeddings()(ids)
    mask = torch.ones_like(ids)
    torch.testing.assert_close(model(**batch, decoder_inputs_embeds=embeddings).loss, expected)
    torch.testing.assert_close(model(**batch, decoder_input_ids=ids, decoder_attention_mask=mask).loss, expected)
    with pytest.raises(ValueError, match="marks 2 samples"):
        model(**{**batch, "matched_pixel_values_videos": tiny_inputs()["pixel_values_videos"]})
    for name in ("shuffled", "video_index"):
        with pytest.raises(ValueError, match="needs `shuffled`, `video_index`"):
            model(**{**batch, name: None})
    without_words = {**batch, "labels": batch["labels"].masked_fill(batch["shuffled"][:, None], -100)}
    assert model(**without_words).loss.isfinite()


def test_gate_stability_does_not_see_padding():
    model = build(gate_stability_weight=100.0)
    inputs, labels = tiny_inputs(), tiny_labels()
    mask = (torch.arange(FRAMES) < 32).expand(BATCH_SIZE, -1)
    padded = model(**inputs, input_features_mask=mask, labels=labels).loss
    inputs["input_features"] = inputs["input_features"][:, :32]
    torch.testing.assert_close(padded, model(**inputs, labels=labels).loss)
    inputs["input_features"] = inputs["input_features"][:, :16]
    assert model(**inputs, labels=labels).loss.isfinite()


@pytest.mark.parametrize("fusion_type", VARIANTS)
def test_cached_logits_equal_uncached(fusion_type):
    model = build(fusion_type=fusion_type)
    inputs = streams(fusion_type, tiny_inputs())
    ids = torch.randint(3, VOCABULARY, (BATCH_SIZE, 6))
    uncached = model(**inputs, decoder_input_ids=ids, use_cache=False)
    assert uncached.get(CACHE_FIELD) is None
    cache, steps = None, []
    encoder_outputs = model.get_encoder()(**inputs)
    for step in range(6):
        output = model(
            encoder_outputs=encoder_outputs,
            decoder_input_ids=ids[:, step : step + 1],
            cache=cache,
            use_cache=True,
        )
        cache = output[CACHE_FIELD]
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), uncached.logits, **TOLERANCE)


def test_padded_text_changes_nothing():
    model = build()
    ids = torch.tensor([[1, 5, 6]] * BATCH_SIZE)
    expected = model(**tiny_inputs(), decoder_input_ids=ids).logits
    padded = F.pad(ids, (2, 0))
    output = model(
        **tiny_inputs(),
        decoder_input_ids=padded,
        decoder_attention_mask=F.pad(torch.ones_like(ids), (2, 0)),
        decoder_position_ids=torch.tensor([[0, 0, 0, 1, 2]] * BATCH_SIZE),
    )
    torch.testing.assert_close(output.logits[:, 2:], expected, **TOLERANCE)


GENERATION = [
    {},
    {"num_beams": 3},
    {"num_beams": 4, "num_return_sequences": 3},
    {"do_sample": True, "num_return_sequences": 2},
    {"num_beams": 2, "do_sample": True},
    {"repetition_penalty": 1.5},
    {"cache_implementation": "static"},
    {"cache_implementation": "static", "num_beams": 3},
]


@pytest.mark.parametrize("kwargs", GENERATION, ids=str)
@pytest.mark.parametrize("fusion_type", ["gated_cross_attention", "concat", "adaptive"])
def test_generation_with_and_without_cache(fusion_type, kwargs):
    model = build(fusion_type=fusion_type)
    model.generation_config.eos_token_id = None
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    inputs = {**tiny_inputs(), "pixel_values_videos_mask": mask, "max_new_tokens": 8}
    torch.manual_seed(1)
    cached = model.generate(**inputs, **kwargs)
    torch.manual_seed(1)
    uncached = model.generate(
        **inputs, use_cache=False, **{k: v for k, v in kwargs.items() if k != "cache_implementation"}
    )
    assert cached.shape == (BATCH_SIZE * kwargs.get("num_return_sequences", 1), 9)
    assert cached.unique().numel() > 2
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize("num_beams", [1, 4])
def test_the_prefix_is_computed_once_a_clip_and_layer(num_beams):
    model = build()
    model.generation_config.eos_token_id = None
    prefixes = []
    for layer in model.modules():
        if isinstance(layer, EVACapDecoderLayer):
            layer.register_forward_pre_hook(lambda _, args: prefixes.append(args[1]))
    model.generate(**tiny_inputs(), num_beams=num_beams, max_new_tokens=8)
    computed = [prefix.shape for prefix in prefixes if prefix is not None]
    assert computed == [(BATCH_SIZE, AUDIO_TOKENS, 32)] * 3
    assert len(prefixes) == 3 * 8


def test_a_static_cache_stays_in_its_place_during_beam_search():
    """CUDA graphs read the cache where they were recorded."""
    model, places = build(), set()
    expected = model.generate(**tiny_inputs(), num_beams=4, max_new_tokens=8)

    def note(module, args, kwargs):
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        places.update(layer.keys.data_ptr() for layer in cache.self_attention_cache.layers if layer.is_initialized)

    model.model.decoder.register_forward_pre_hook(note, with_kwargs=True)
    found = model.generate(**tiny_inputs(), num_beams=4, max_new_tokens=8, cache_implementation="static")
    assert torch.equal(found, expected)
    assert len(places) == model.config.text_config.num_hidden_layers


def test_encoder_outputs_can_be_handed_to_generate():
    model = build()
    encoder_outputs = model.get_encoder()(**tiny_inputs())
    runs = []
    model.get_encoder().register_forward_hook(lambda *_: runs.append(1))
    given = model.generate(encoder_outputs=encoder_outputs, num_beams=2, max_new_tokens=5)
    assert not runs
    assert torch.equal(given, model.generate(**tiny_inputs(), num_beams=2, max_new_tokens=5))
    as_tuple = model(encoder_outputs=(encoder_outputs.last_hidden_state,), labels=tiny_labels()).loss
    assert torch.equal(as_tuple, model(encoder_outputs=encoder_outputs, labels=tiny_labels()).loss)


@pytest.mark.parametrize(
    ("fusion_type", "given", "message"),
    [
        ("gated_cross_attention", "pixel_values_videos", "`input_features` is missing.*fusion_type='video_only'"),
        ("video_only", "input_features", "`pixel_values_videos` is missing"),
        ("concat", None, "`input_features` is missing"),
    ],
)
def test_generating_without_the_main_stream_says_so(fusion_type, given, message):
    inputs = {name: value for name, value in tiny_inputs().items() if name == given}
    with pytest.raises(ValueError, match=message):
        build(fusion_type=fusion_type).generate(**inputs)


def test_longer_texts_than_positions_say_so():
    model = build()
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="65 tokens.*max_position_embeddings` is 64"):
        model.generate(**tiny_inputs(), max_length=80)


def test_streaming(capsys):
    class Words:
        def decode(self, ids, **kwargs):
            return " ".join(f"w{int(i)}" for i in ids) + " "

    model = build()
    model.generation_config.eos_token_id = None
    inputs = {name: value[:1] for name, value in tiny_inputs().items()}
    ids = model.generate(**inputs, max_new_tokens=5, streamer=TextStreamer(Words()))
    assert capsys.readouterr().out.split() == [f"w{i}" for i in ids[0].tolist()]


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_user_made_cache_works_by_both_names(name):
    model = build()
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    first = model(**tiny_inputs(), decoder_input_ids=torch.full((BATCH_SIZE, 2), 5), **{name: cache})
    assert first.logits.isfinite().all()
    assert cache.get_seq_length() == 2
    assert cache.cross_attention_cache.get_seq_length() == AUDIO_TOKENS


@pytest.mark.parametrize("part", ["captioner", "model", "decoder", "audio tower", "video tower", "encoder"])
def test_arguments_that_nobody_reads_are_refused_by_name(part):
    captioner = build()
    model, inputs = captioner.model, tiny_inputs()
    ids = torch.full((BATCH_SIZE, 2), 5)
    calls = {
        "captioner": (captioner, {**inputs, "decoder_input_ids": ids}),
        "model": (model, {**inputs, "decoder_input_ids": ids}),
        "decoder": (model.decoder, {"input_ids": ids, "encoder_hidden_states": torch.randn(BATCH_SIZE, 8, 32)}),
        "audio tower": (model.encoder.audio_tower, {"input_features": inputs["input_features"]}),
        "video tower": (model.encoder.video_tower, {"pixel_values_videos": inputs["pixel_values_videos"]}),
        "encoder": (model.encoder, inputs),
    }
    module, arguments = calls[part]
    module(**arguments)
    with pytest.raises(TypeError, match="next_name"):
        module(**arguments, next_name=object())


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_generation_goes_on_from_a_cache(name):
    if name == "cache" and CACHE_FIELD != "cache":
        pytest.skip("this Transformers calls it past_key_values")
    model, inputs = build(), tiny_inputs()
    model.generation_config.eos_token_id = None
    whole = model.generate(**inputs, max_new_tokens=6)
    first = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True)
    encoder_outputs = model.get_encoder()(**inputs)
    rest = model.generate(
        encoder_outputs=encoder_outputs,
        decoder_input_ids=first.sequences,
        # By the mask of all tokens Transformers sees which of them the cache has already.
        decoder_attention_mask=torch.ones_like(first.sequences),
        max_new_tokens=3,
        **{name: first[CACHE_FIELD]},
    )
    assert torch.equal(rest, whole)


def renamed(prepare, value):
    """`prepare_inputs_for_generation` of a Transformers that calls the cache by another name, or keeps it back."""

    def prepare_inputs_for_generation(self, *args, **kwargs):
        inputs = prepare(self, *args, **kwargs)
        cache = inputs.pop("cache", None) or inputs.pop("past_key_values", None)
        return inputs | ({"key_value_store": cache} if value == "renamed" else {})

    return prepare_inputs_for_generation


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize(
    "change, error, words",
    [("renamed", TypeError, "key_value_store"), ("kept back", RuntimeError, "an empty cache")],
)
def test_a_transformers_that_moves_the_cache_is_an_error(change, error, words, num_beams, monkeypatch):
    model, inputs = build(), tiny_inputs()
    model.generation_config.eos_token_id = None
    model.generate(**inputs, num_beams=num_beams, max_new_tokens=3)
    prepare = GenerationMixin.prepare_inputs_for_generation
    monkeypatch.setattr(GenerationMixin, "prepare_inputs_for_generation", renamed(prepare, change))
    with pytest.raises(error, match=words) as raised:
        model.generate(**inputs, num_beams=num_beams, max_new_tokens=3)
    assert transformers.__version__ in str(raised.value) and TESTED_TRANSFORMERS in str(raised.value)


def test_the_cache_may_be_switched_off():
    model, inputs = build(), tiny_inputs()
    expected = model.generate(**inputs, max_new_tokens=5)
    assert torch.equal(model.generate(**inputs, max_new_tokens=5, use_cache=False), expected)


@pytest.mark.parametrize(
    "installed, warns", [("5.17.0", 0), (TESTED_TRANSFORMERS, 0), ("5.24.9", 0), ("5.99.0.dev0", 1), ("6.0", 1)]
)
def test_a_newer_transformers_is_warned_of_once(installed, warns, monkeypatch, caplog):
    monkeypatch.setattr(versions_evacap, "version", lambda package: installed)
    monkeypatch.setattr(versions_evacap.logger, "has_warned", False, raising=False)
    for _ in range(2):
        versions_evacap.warn_if_untested()
    assert len(caplog.records) == warns
    assert all(f"pip install 'transformers<{UNTESTED_TRANSFORMERS}'" in record.message for record in caplog.records)


def test_a_length_of_the_callers_replaces_the_models_without_a_warning(caplog):
    model, inputs = build(), tiny_inputs()
    model.generation_config.eos_token_id = None
    with caplog.at_level(logging.WARNING):
        transformers.logging.get_logger("transformers").addHandler(caplog.handler)
        for arguments, length in ({"max_new_tokens": 5}, 6), ({"max_length": 7}, 7), ({}, MAX_CAPTION_LENGTH):
            assert model.generate(**inputs, **arguments).shape == (BATCH_SIZE, length)
        transformers.logging.get_logger("transformers").removeHandler(caplog.handler)
    assert not [record.message for record in caplog.records if "max_length" in record.message]


@pytest.mark.parametrize("attention", ["full", "frame"])
@pytest.mark.parametrize("fusion_type", FUSION_TYPES)
def test_sdpa_and_eager_agree(fusion_type, attention):
    model = build(fusion_type=fusion_type, attention=attention)
    inputs = {**tiny_inputs(), "labels": tiny_labels()}
    inputs["pixel_values_videos_mask"] = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]])
    outputs = []
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        assert model.model.encoder.joint.config._attn_implementation == implementation
        outputs.append(model(**inputs).logits)
    torch.testing.assert_close(*outputs, **TOLERANCE)


def test_kernels_that_cannot_share_a_prefix_are_refused_and_the_towers_take_them():
    model = build()
    with pytest.raises(ValueError, match="does not support .*flex"):
        model.set_attn_implementation("flex_attention")
    model.set_attn_implementation({"audio_config": "flex_attention"})
    assert model.model.encoder.audio_tower.config._attn_implementation == "flex_attention"
    assert model.model.decoder.config._attn_implementation == "sdpa"


@torch.no_grad()
@pytest.mark.parametrize("model_class", [EVACapModel, EVACapForConditionalGeneration])
def test_features_of_each_stream(model_class):
    model, inputs = build(model_class=model_class), tiny_inputs()
    encoder = model.get_encoder()
    audio = model.get_audio_features(inputs["input_features"], output_hidden_states=True)
    expected = encoder.audio_tower(inputs["input_features"]).last_hidden_state
    assert torch.equal(audio.last_hidden_state, expected) and torch.equal(audio.hidden_states[-1], expected)
    video = model.get_video_features(inputs["pixel_values_videos"], return_dict=False)[0]
    assert torch.equal(video, encoder.video_tower(inputs["pixel_values_videos"]).last_hidden_state)


def test_there_are_no_features_of_a_stream_without_a_tower():
    with pytest.raises(ValueError, match="no video tower"):
        build(fusion_type="audio_only").get_video_features(tiny_inputs()["pixel_values_videos"])
    with pytest.raises(ValueError, match="no audio tower"):
        build(fusion_type="video_only").get_audio_features(tiny_inputs()["input_features"])


@pytest.mark.parametrize("model_class", [EVACapModel, EVACapForConditionalGeneration])
def test_every_argument_of_the_forward_pass_is_documented(model_class):
    parameters = inspect.signature(model_class.forward).parameters.keys() - {"self", "kwargs"}
    undocumented = [name for name in parameters if f"    {name} (" not in model_class.forward.__doc__]
    assert not undocumented


@torch.no_grad()
@pytest.mark.parametrize("size", [2**26, 2**21, 2**12])
@pytest.mark.parametrize("masked", [False, True])
def test_blockwise_attention_is_the_attention(masked, size, monkeypatch):
    monkeypatch.setitem(attention_evacap.SCORE_BYTES_AT_ONCE, "cpu", size)
    module, num_queries = torch.nn.Module(), 2 * QUERIES_AT_ONCE + 5
    query, key, value = (torch.randn(2, 3, num_queries, 8) for _ in range(3))
    mask = torch.arange(num_queries) < torch.tensor([num_queries, 4])[:, None, None, None] if masked else None
    output, _ = blockwise_attention_forward(module, query, key, value, mask, scaling=0.3)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(output, expected.transpose(1, 2), **TOLERANCE)


def test_an_mlp_in_pieces_is_the_mlp(monkeypatch):
    monkeypatch.setattr(modeling_evacap, "ROWS_AT_ONCE", 3)
    mlp = build().model.encoder.video_tower.layers[0].mlp
    hidden_states, pieces = torch.randn(2, 5, 32), []
    mlp.fc1.register_forward_hook(lambda module, inputs, output: pieces.append(len(inputs[0])))
    whole = mlp(hidden_states)
    with torch.no_grad():
        torch.testing.assert_close(mlp(hidden_states), whole, **TOLERANCE)
    assert pieces == [2, 3, 3, 3, 1]


@pytest.mark.parametrize(
    ("projection", "convolve", "kernel", "size"),
    [
        (EVACapPatchProjection2d, F.conv2d, (16, 16), (1, 64, 32)),
        (EVACapPatchProjection3d, F.conv3d, (2, 16, 16), (3, 4, 32, 48)),
    ],
)
def test_a_patch_projection_is_the_convolution_with_the_channels_together(projection, convolve, kernel, size):
    patches, inputs = projection(size[0], 8, kernel, stride=kernel).double(), torch.randn(2, *size).double()
    output = patches(inputs)
    torch.testing.assert_close(output, convolve(inputs, patches.weight, patches.bias, stride=kernel))
    assert output.movedim(1, -1).is_contiguous()


@torch.no_grad()
def test_half_precision_on_a_cpu_takes_the_blockwise_attention(monkeypatch):
    calls = []

    def count(*args, **kwargs):
        calls.append(args[1].dtype)
        return blockwise_attention_forward(*args, **kwargs)

    monkeypatch.setattr(modeling_evacap, "blockwise_attention_forward", count)
    inputs = {**tiny_inputs(), "labels": tiny_labels()}
    inputs["pixel_values_videos_mask"] = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]])
    model = build()
    expected = model(**inputs).logits
    assert calls == []
    model.bfloat16()
    inputs = {name: x.bfloat16() if x.is_floating_point() else x for name, x in inputs.items()}
    logits = model(**inputs).logits.float()
    layers = [layer for layer in model.model.encoder.modules() if isinstance(layer, EVACapEncoderLayer)]
    assert calls == [torch.bfloat16] * len(layers)
    assert (logits - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("fusion_type", VARIANTS)
def test_gradient_checkpointing_gives_the_same_gradients(fusion_type, use_reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = build_for_training(fusion_type=fusion_type)
        if checkpointing:
            enable_checkpointing(model, use_reentrant)
            model.enable_input_require_grads()
        model(**tiny_inputs(), labels=tiny_labels(), use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_save_and_load_round_trip(tmp_path, caplog):
    model = build()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    with caplog.at_level(logging.WARNING):
        loaded, info = EVACapForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not caplog.records
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    for name, value in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, atol=0, rtol=0)


def test_every_weight_is_born_by_init_weights():
    model = EVACapForConditionalGeneration.from_pretrained(None, config=tiny_config(), state_dict={})
    for name, value in model.state_dict().items():
        assert value.device.type == "cpu" and value.isfinite().all(), name
    fusion = model.model.encoder.fusion
    assert (fusion.gate_weight.item(), fusion.gate_bias.item()) == (-4.0, 4.0)
    expected = sincos_position_table(2, 4, 32)
    torch.testing.assert_close(model.model.encoder.audio_tower.embeddings.position_embeddings.data, expected)


@pytest.mark.parametrize("fusion_type", VARIANTS)
def test_device_map_and_half_precision(tmp_path, fusion_type):
    build(fusion_type=fusion_type).save_pretrained(tmp_path)
    model = EVACapForConditionalGeneration.from_pretrained(tmp_path, device_map="auto", dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    inputs = streams(fusion_type, tiny_inputs())
    output = model(**inputs, labels=tiny_labels())
    assert output.logits.dtype == torch.bfloat16
    reference = build(fusion_type=fusion_type)(**inputs, labels=tiny_labels())
    torch.testing.assert_close(output.loss.float(), reference.loss, atol=0.1, rtol=0.1)
    assert model.generate(**inputs, num_beams=2, max_new_tokens=4).shape == (BATCH_SIZE, 5)


def test_resizing_token_embeddings_keeps_the_tie():
    model = build()
    model.resize_token_embeddings(VOCABULARY + 5)
    assert model.config.text_config.vocab_size == VOCABULARY + 5
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.lm_head.bias.shape == (VOCABULARY + 5,)
    assert model(**tiny_inputs(), labels=tiny_labels()).logits.shape[-1] == VOCABULARY + 5


@pytest.mark.slow
@pytest.mark.parametrize("fusion_type", VARIANTS)
def test_compiled_forward_agrees(fusion_type):
    model = build(fusion_type=fusion_type)
    inputs = {**streams(fusion_type, tiny_inputs()), "labels": tiny_labels(), "use_cache": False}
    expected = model(**inputs)
    compiled = torch.compile(model.forward, fullgraph=True)
    torch.testing.assert_close(compiled(**inputs).logits, expected.logits, **TOLERANCE)


def test_the_graph_of_a_compiled_forward_does_not_break():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(build().forward, backend=counter)
    for seed in range(2):
        compiled(**tiny_inputs(seed=seed), labels=tiny_labels(seed=seed), use_cache=False)
    assert counter.frame_count == 1


@pytest.mark.parametrize("fusion_type", VARIANTS)
def test_one_batch_can_be_learned_by_heart(fusion_type):
    model = EVACapForConditionalGeneration(tiny_config(fusion_type=fusion_type, label_smoothing=0.0)).train()
    inputs, labels = streams(fusion_type, tiny_inputs()), tiny_labels()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    torch.manual_seed(0)
    for _ in range(150):
        loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5
    captions = model.eval().generate(**inputs, max_new_tokens=7)
    assert torch.equal(captions[:, 1:][labels != -100], labels[labels != -100])


def test_copies_and_determinism():
    model = build()
    twin = copy.deepcopy(model)
    for _ in range(2):
        assert torch.equal(
            twin(**tiny_inputs(), labels=tiny_labels()).loss, model(**tiny_inputs(), labels=tiny_labels()).loss
        )


def test_output_class_is_a_model_output():
    output = EVACapEncoderOutput(last_hidden_state=torch.zeros(1))
    assert list(output.keys()) == ["last_hidden_state"]


def test_captions_are_at_most_forty_tokens_by_default():
    model = build()
    model.generation_config.eos_token_id = None
    assert model.generate(**tiny_inputs()).shape == (BATCH_SIZE, 40)

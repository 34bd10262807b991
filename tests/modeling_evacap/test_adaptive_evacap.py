"""The decoder that weighs sound and picture for each word."""

import pytest
import torch
import torch.nn.functional as F
from tiny import ADAPTIVE, BATCH_SIZE, tiny_config, tiny_inputs, tiny_labels

from evacap.modeling_evacap.adaptive_evacap import EVACapAdaptiveAttention
from evacap.modeling_evacap.configuration_evacap import EVACapConfig, EVACapTextConfig
from evacap.modeling_evacap.modeling_evacap import EVACapAdaptiveDecoderLayer, EVACapForConditionalGeneration


# The second clip has no picture, the third one half of it.
MASK = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]])
IDS = torch.tensor([[1, 5, 6, 7]] * BATCH_SIZE)


def build(**kwargs) -> EVACapForConditionalGeneration:
    torch.manual_seed(0)
    model = EVACapForConditionalGeneration(tiny_config(**ADAPTIVE, **kwargs)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "confidence" in name or name.endswith("block.scale"):
                parameter.normal_(std=0.5)
    return model


def plain_layer(layer, text, sound, picture):
    """The formula of the module's docstring for one clip and head by head: text (length, d), memories (n, d) or `None`."""

    def attend(module, queries, states, causal=False):
        heads, context = len(module.q_proj.weight) // module.head_dim, []
        query, key, value = module.q_proj(queries), module.k_proj(states), module.v_proj(states)
        for part in range(heads):
            place = slice(part * module.head_dim, (part + 1) * module.head_dim)
            scores = query[:, place] @ key[:, place].T / module.head_dim**0.5
            if causal:
                scores = scores + torch.full_like(scores, float("-inf")).triu(1)
            context.append(scores.softmax(-1) @ value[:, place])
        return torch.cat(context, -1)

    own = layer.self_attn
    text = layer.self_attn_layer_norm(text + own.o_proj(attend(own, text, text, causal=True)))
    module, mixed, confidence = layer.encoder_attn, 0, []
    for index, memory in enumerate((sound, picture)):
        if memory is None:
            confidence.append(torch.zeros(len(text)))
            continue
        context = attend(module, text, memory)
        states = torch.cat([text, context], -1)
        confidence.append(torch.sigmoid(states @ module.confidence_weight[index] + module.confidence_bias[index]))
        mixed = mixed + confidence[-1][:, None] * context
    text = layer.encoder_attn_layer_norm(text + module.o_proj(mixed))
    output = layer.final_layer_norm(text + layer.fc2(F.gelu(layer.fc1(text))))
    return output, torch.stack(confidence, -1)


def test_a_layer_is_the_formula():
    torch.manual_seed(0)
    config = EVACapTextConfig(hidden_size=24, num_attention_heads=3, num_hidden_layers=1, intermediate_size=40)
    layer = EVACapAdaptiveDecoderLayer(config, 0).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    text, memory = torch.randn(3, 5, 24), torch.randn(3, 7, 24)
    is_video = (torch.arange(7) >= 4).expand(3, -1)
    exists = torch.ones(3, 7, dtype=torch.bool)
    exists[1, 4:], exists[2, 6:] = False, False
    causal = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    output, _, confidence = layer(text, memory, causal, exists, is_video)
    for row, pictures in enumerate((memory[0, 4:], None, memory[2, 4:6])):
        expected, weights = plain_layer(layer, text[row], memory[row, :4], pictures)
        torch.testing.assert_close(output[row], expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(confidence[row], weights, atol=1e-6, rtol=0)


@pytest.mark.parametrize("enrichment", [None, "caste"])
def test_confidence_is_that_of_each_token_and_exactly_zero_without_a_picture(enrichment):
    model, inputs = build(enrichment=enrichment), tiny_inputs()
    batch = model(**inputs, pixel_values_videos_mask=MASK, decoder_input_ids=IDS)
    assert batch.confidence.shape == (BATCH_SIZE, 4, 2)
    assert torch.equal(batch.confidence[1, :, 1], torch.zeros(4))
    assert (batch.confidence[[0, 2]] > 0).all() and (batch.confidence < 1).all()
    assert batch.confidence.std(1)[0].min() > 1e-4
    alone = model(inputs["input_features"], decoder_input_ids=IDS)
    assert torch.equal(alone.confidence[..., 1], torch.zeros(BATCH_SIZE, 4))
    torch.testing.assert_close(batch.logits[1], alone.logits[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(batch.confidence[1], alone.confidence[1], atol=1e-6, rtol=0)


def test_a_new_model_trusts_the_sound_and_half_of_the_picture():
    model = EVACapForConditionalGeneration.from_pretrained(None, config=tiny_config(**ADAPTIVE), state_dict={})
    confidence = model(**tiny_inputs(), labels=tiny_labels()).confidence
    expected = torch.tensor([4.0, 0.0]).sigmoid().expand_as(confidence)
    torch.testing.assert_close(confidence, expected)


def test_without_confidence_in_the_picture_what_it_shows_does_not_matter():
    model, inputs = build(), tiny_inputs()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, EVACapAdaptiveAttention):
                module.confidence_weight[1].zero_()
                module.confidence_bias[1].fill_(-200.0)
    expected = model(**inputs, decoder_input_ids=IDS).logits
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].flip(0)
    assert torch.equal(model(**inputs, decoder_input_ids=IDS).logits, expected)


def test_attentions_sum_to_one_over_each_memory():
    model = build(attn_implementation="eager")
    inputs = {**tiny_inputs(), "pixel_values_videos_mask": MASK, "decoder_input_ids": IDS}
    output = model(**inputs, output_attentions=True, output_hidden_states=True)
    assert len(output.decoder_hidden_states) == 4
    assert torch.equal(output.encoder_hidden_states[-1], output.encoder_last_hidden_state)
    assert [weights.shape for weights in output.decoder_attentions] == [(BATCH_SIZE, 4, 4, 4)] * 3
    for weights in output.cross_attentions:
        assert weights.shape == (BATCH_SIZE, 4, 4, 16)
        torch.testing.assert_close(weights[..., :8].sum(-1), torch.ones(BATCH_SIZE, 4, 4))
        pictures = torch.tensor([1.0, 0.0, 1.0])[:, None, None].expand(-1, 4, 4)
        torch.testing.assert_close(weights[..., 8:].sum(-1), pictures)
        assert torch.equal(weights[2, ..., 12:], torch.zeros(4, 4, 4))
        weights.retain_grad()
    output.logits.sum().backward()
    assert all(weights.grad.abs().sum() > 0 for weights in output.cross_attentions)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_confidence_in_float32(dtype):
    model = build()
    inputs = {**tiny_inputs(), "pixel_values_videos_mask": MASK, "labels": tiny_labels()}
    expected = model(**inputs)
    with torch.autocast("cpu", dtype):
        mixed = model(**inputs)
    half = model.to(dtype)(**inputs)
    for output in (mixed, half):
        assert output.confidence.dtype == torch.float32
        torch.testing.assert_close(output.confidence, expected.confidence, atol=0.05, rtol=0)
        assert torch.equal(output.confidence[1, :, 1], torch.zeros(7))
    half.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_tokens_without_their_streams_are_refused():
    model, inputs = build(), tiny_inputs()
    encoded = model.get_encoder()(**inputs)
    model(encoder_outputs=encoded, decoder_input_ids=IDS)
    with pytest.raises(ValueError, match="`encoder_outputs` is a tuple"):
        model(encoder_outputs=(encoded.last_hidden_state,), decoder_input_ids=IDS)


def test_saving_keeps_every_weight(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    loaded, info = EVACapForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    arguments = {**tiny_inputs(), "decoder_input_ids": IDS}
    assert torch.equal(loaded(**arguments).logits, model(**arguments).logits)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"text_fusion": "adaptive"},
        {"text_fusion": "adaptive", "fusion_type": "concat"},
        {"text_fusion": "adaptive", "fusion_type": "optimal_transport", "num_joint_layers": 0},
        {**ADAPTIVE, "text_config": {"model_type": "llama"}},
        {"text_fusion": "both"},
    ],
)
def test_the_memories_must_be_apart(kwargs):
    with pytest.raises(ValueError, match="`text_fusion`"):
        EVACapConfig(**kwargs)

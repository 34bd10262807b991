"""A language model as decoder: its inputs, its loss, and its own `generate`."""

import pytest
import torch
import torch.nn.functional as F
from tiny import BATCH_SIZE, LANGUAGE_MODELS, VOCABULARY, tiny_config, tiny_inputs, tiny_labels, tiny_language_config
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig
from transformers.generation import TextStreamer

from evacap.modeling_evacap.configuration_evacap import EVACapConfig
from evacap.modeling_evacap.language_model_evacap import EVACapForCausalLM
from evacap.modeling_evacap.modeling_evacap import CACHE_FIELD, EVACapForConditionalGeneration
from evacap.training.components import enable_checkpointing


# 4 audio and 2 video tokens in the place of one token of the prompt.
PROMPT_LENGTH = 5 + 6


def build(model_type: str = "llama", seed: int = 0, **kwargs) -> EVACapForCausalLM:
    torch.manual_seed(seed)
    model = EVACapForCausalLM(tiny_language_config(model_type, **kwargs)).eval()
    # So that clips differ.
    torch.nn.init.normal_(model.multi_modal_projector.weight)
    return model


def rows(inputs: dict[str, torch.Tensor], *index: int) -> dict[str, torch.Tensor]:
    return {name: value[list(index)] for name, value in inputs.items()}


@pytest.mark.parametrize("model_type", LANGUAGE_MODELS)
def test_the_loss_is_that_of_the_caption_behind_the_prompt(model_type):
    model, inputs, labels = build(model_type, label_smoothing=0.0, ot_loss_weight=0.5), tiny_inputs(), tiny_labels()
    output = model(**inputs, labels=labels)
    encoder_outputs = model.get_encoder()(**inputs)
    clip = model.multi_modal_projector(encoder_outputs.last_hidden_state)
    embed = model.get_input_embeddings()
    for row in range(BATCH_SIZE):
        # Clip by clip, without padding.
        caption = labels[row][labels[row] != -100]
        before, after = torch.tensor([1, 5, 6]), torch.cat([torch.tensor([7, 8]), caption])
        embeds = torch.cat([embed(before), clip[row], embed(after)])[None]
        logits = model.language_model(inputs_embeds=embeds).logits[0, PROMPT_LENGTH - 1 : -1]
        torch.testing.assert_close(output.logits[row, : len(caption)], logits, atol=1e-5, rtol=1e-4)
    expected = F.cross_entropy(output.logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    torch.testing.assert_close(output.caption_loss, expected)
    torch.testing.assert_close(output.loss, expected + 0.5 * output.transport_loss)
    output.loss.backward()
    for name in ("encoder.audio_tower", "multi_modal_projector", "language_model"):
        gradients = [value.grad for key, value in model.named_parameters() if key.startswith(name)]
        assert any(gradient is not None and gradient.any() for gradient in gradients)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 2, "cache_implementation": "static"},
    ],
    ids=str,
)
@pytest.mark.parametrize("model_type", LANGUAGE_MODELS)
def test_captions_are_those_of_the_language_model(model_type, kwargs):
    model, inputs = build(model_type), tiny_inputs()
    embeds, mask = model.embed_prompt(model.get_encoder()(**inputs))
    assert embeds.shape == (BATCH_SIZE, PROMPT_LENGTH, 40)
    options = {"max_new_tokens": 6, "pad_token_id": 0, **kwargs}
    expected = model.language_model.generate(inputs_embeds=embeds, attention_mask=mask, do_sample=False, **options)
    assert torch.equal(model.generate(**inputs, **options), expected)
    assert not torch.equal(embeds[0], embeds[1])


def test_clip_and_prompt_are_read_once_whatever_the_beams():
    model, inputs = build(), tiny_inputs()
    read = []
    model.encoder.register_forward_hook(lambda *_: read.append("clip"))
    model.language_model.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(
            next(
                tuple(kwargs[name].shape[:2])
                for name in ("inputs_embeds", "input_ids")
                if kwargs.get(name) is not None
            )
        ),
        with_kwargs=True,
    )
    model.generate(**inputs, num_beams=4, max_new_tokens=3)
    assert read[:3] == ["clip", (BATCH_SIZE, PROMPT_LENGTH - 1), (4 * BATCH_SIZE, 1)]
    assert read.count("clip") == 1


@pytest.mark.parametrize("model_type", LANGUAGE_MODELS)
def test_assisted_decoding_gives_the_same_caption(model_type):
    if model_type == "gemma3_text" and CACHE_FIELD != "cache":
        pytest.skip("before 5.24 Transformers cannot take tokens back from a sliding window that is full")
    model, inputs = build(model_type), rows(tiny_inputs(), 0)
    assistant = build("gpt2" if model_type == "llama" else "llama", seed=1)
    expected = model.generate(**inputs, max_new_tokens=8)
    assert torch.equal(model.generate(**inputs, max_new_tokens=8, assistant_model=assistant), expected)
    assert torch.equal(model.generate(**inputs, max_new_tokens=8, assistant_model=build(model_type)), expected)
    assert torch.equal(model.generate(**inputs, max_new_tokens=8, prompt_lookup_num_tokens=2), expected)


def test_an_assistant_that_has_not_heard_the_clip_is_refused():
    model, inputs = build(), rows(tiny_inputs(), 0)
    with pytest.raises(ValueError, match="`assistant_model` is a LlamaForCausalLM"):
        model.generate(**inputs, assistant_model=model.language_model)
    with pytest.raises(ValueError, match="reads 6 tokens"):
        model.generate(**inputs, assistant_model=build(prompt_ids=[VOCABULARY]), max_new_tokens=2)


class Words:
    """A tokenizer for the streamer."""

    def decode(self, ids, **kwargs) -> str:
        return "".join(f"<{int(token)}> " for token in ids)


def test_streaming(capsys):
    model, inputs = build(), rows(tiny_inputs(), 0)
    ids = model.generate(**inputs, max_new_tokens=4, streamer=TextStreamer(Words()))
    assert capsys.readouterr().out.split() == [f"<{token}>" for token in ids[0].tolist()]


def test_the_length_counts_the_caption_alone():
    model, inputs = build(), tiny_inputs()
    model.generation_config.eos_token_id = None
    assert model.generate(**inputs).shape[1] == 40
    assert model.generate(**inputs, max_length=5).shape[1] == 5
    output = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True, output_scores=True)
    assert output.sequences.shape == (BATCH_SIZE, 3) and len(output.scores) == 3


@pytest.mark.parametrize("model_type", LANGUAGE_MODELS)
def test_rows_of_a_mixed_batch_equal_what_they_give_alone(model_type):
    model, inputs, labels = build(model_type), tiny_inputs(), tiny_labels()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    prompts = torch.tensor([[1, 5, 6, VOCABULARY, 7], [0, 0, 1, VOCABULARY, 9], [VOCABULARY, 7, 8, 9, 0]])
    batch = model(
        **inputs,
        pixel_values_videos_mask=mask,
        input_ids=prompts,
        attention_mask=(prompts != 0).long(),
        labels=labels,
    ).logits
    for row, frames in enumerate((4, 2, 0)):
        prompt = prompts[row : row + 1, prompts[row] != 0]
        video = inputs["pixel_values_videos"][row : row + 1, :frames] if frames else None
        audio = inputs["input_features"][row : row + 1]
        own = labels[row : row + 1, labels[row] != -100]
        alone = model(audio, video, input_ids=prompt, labels=own).logits
        torch.testing.assert_close(batch[row, : own.shape[1]], alone[0], atol=1e-5, rtol=1e-4)
        found = model.generate(
            **inputs,
            pixel_values_videos_mask=mask,
            input_ids=prompts,
            attention_mask=(prompts != 0).long(),
            max_new_tokens=4,
        )[row]
        expected = model.generate(audio, pixel_values_videos=video, input_ids=prompt, max_new_tokens=4)[0]
        assert torch.equal(found[: len(expected)], expected)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"input_ids": torch.tensor([[1, 5]] * 3)}, r"\[0, 0, 0\] times"),
        ({"input_ids": torch.tensor([[1, VOCABULARY]] * 2)}, "one prompt for each of the 3 clips"),
        ({"input_features": None}, "`input_features` is missing"),
    ],
)
def test_wrong_prompts_say_what_to_do(kwargs, message):
    with pytest.raises(ValueError, match=message):
        build().generate(**{**tiny_inputs(), **kwargs})


def test_arguments_that_nobody_reads_are_refused_by_name():
    with pytest.raises(TypeError, match="pixel_values"):
        build()(**tiny_inputs(), pixel_values=torch.zeros(1))


@pytest.mark.parametrize("model_type", LANGUAGE_MODELS)
def test_save_and_load_round_trip(model_type, tmp_path):
    model, inputs = build(model_type), tiny_inputs()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is EVACapForCausalLM
    assert loaded.generation_config.max_new_tokens == 40
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    embeddings = loaded.get_input_embeddings().weight, loaded.get_output_embeddings().weight
    assert (embeddings[0] is embeddings[1]) == (model_type != "llama")
    assert torch.equal(loaded.generate(**inputs, max_new_tokens=4), model.generate(**inputs, max_new_tokens=4))
    placed = AutoModel.from_pretrained(tmp_path, device_map="auto", dtype=torch.bfloat16)
    assert placed.language_model.dtype == torch.bfloat16
    assert placed.generate(**inputs, max_new_tokens=4, num_beams=2).shape[0] == BATCH_SIZE


def test_quantisation_is_for_the_language_model_alone(tmp_path):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not among the dependencies")
    model = build()
    model.save_pretrained(tmp_path)
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    loaded = AutoModel.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)
    changed = {name for name, value in loaded.named_parameters() if type(value) is not torch.nn.Parameter}
    linear = {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    assert changed == {name for name in linear if name.startswith("language_model.model.")}
    assert loaded.generate(**tiny_inputs(), max_new_tokens=4).shape[0] == BATCH_SIZE


@torch.no_grad()
@pytest.mark.parametrize(
    ("options", "layer", "tolerance"),
    [({"load_in_8bit": True}, "Linear8bitLt", 0.1), ({"load_in_4bit": True}, "Linear4bit", 0.6)],
)
def test_bitsandbytes_for_the_language_model_alone(tmp_path, options, layer, tolerance):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not among the dependencies")
    wide = tiny_language_config()
    # Its kernels for processors take weights in blocks.
    wide.text_config.update({"hidden_size": 64, "intermediate_size": 64, "head_dim": 16})
    torch.manual_seed(0)
    model = EVACapForCausalLM(wide).eval()
    model.save_pretrained(tmp_path / "plain")
    config = BitsAndBytesConfig(**options)
    loaded = AutoModel.from_pretrained(tmp_path / "plain", quantization_config=config, dtype=torch.float32)
    changed = {name for name, part in loaded.named_modules() if type(part).__name__ == layer}
    linear = {name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    assert changed == {name for name in linear if name.startswith("language_model.model.")}
    inputs = {**tiny_inputs(), "labels": tiny_labels()}
    expected, found = model(**inputs).logits, loaded(**inputs).logits
    # The weights are random, and so few that they do not average out.
    assert 0 < (found - expected).norm() < tolerance * expected.norm()
    assert loaded.generate(**tiny_inputs(), max_new_tokens=4, num_beams=2).shape[0] == BATCH_SIZE
    loaded.save_pretrained(tmp_path / "quantised")
    again = AutoModel.from_pretrained(tmp_path / "quantised", dtype=torch.float32)
    torch.testing.assert_close(again(**inputs).logits, loaded(**inputs).logits)


def test_auto_model_chooses_by_the_decoder():
    assert type(AutoModel.from_config(tiny_language_config())) is EVACapForCausalLM


def test_a_class_refuses_the_decoder_of_the_other():
    with pytest.raises(ValueError, match="decoder of EVACapForCausalLM"):
        EVACapForConditionalGeneration(tiny_language_config())
    with pytest.raises(ValueError, match="EVACap's own decoder"):
        EVACapForCausalLM(tiny_config())


def test_attention_implementations_reach_the_language_model():
    config = tiny_language_config()
    model = EVACapForCausalLM._from_config(
        config, attn_implementation={"text_config": "eager", "audio_config": "sdpa"}
    )
    assert model.language_model.config._attn_implementation == "eager"
    assert model.encoder.audio_tower.config._attn_implementation == "sdpa"
    output = model(**tiny_inputs(), labels=tiny_labels(), output_hidden_states=True)
    assert len(output.decoder_hidden_states) == 3
    model.set_attn_implementation("sdpa")
    assert model.language_model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_gradient_checkpointing_gives_the_same_gradients(model_type):
    gradients = []
    for checkpointing in (False, True):
        model = build(model_type).train()
        if checkpointing:
            enable_checkpointing(model)
            assert any(getattr(module, "gradient_checkpointing", False) for module in model.language_model.modules())
        model(**tiny_inputs(), labels=tiny_labels()).loss.backward()
        gradients.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)


def test_every_fusion_and_its_regularisers_train_with_a_language_model():
    from evacap.training.data.collator import EVACapDataCollator

    inputs, labels = tiny_inputs(), tiny_labels()
    clips = [
        {**{name: value[row] for name, value in inputs.items()}, "labels": labels[row]} for row in range(BATCH_SIZE)
    ]
    batch = EVACapDataCollator(p_mix=1.0, keep_matched=True, fixed_points=False)(clips)
    names = ("gate_stability", "semantic_consistency", "matching", "hearing", "caption_contrast", "entropy")
    weights = {f"{name}_weight": 1.0 for name in names}
    model = build(fusion_type="gated_cross_attention", gate_type="agreement", enrichment="caste", **weights).train()
    output = model(**batch)
    assert output.logits.shape == (BATCH_SIZE, 7, VOCABULARY)
    terms = (
        "gate_stability",
        "semantic_consistency",
        "heard_words",
        "matching_loss",
        "caption_contrast",
        "picture_entropy",
    )
    assert all(output[name].isfinite() for name in terms)
    torch.testing.assert_close(output.loss, output.caption_loss + sum(output[name] for name in terms))
    for fusion_type in ("concat", "audio_only"):
        pooling = {} if fusion_type == "concat" else {"video_pooling": None}
        assert build(fusion_type=fusion_type, **pooling)(**inputs, labels=labels).loss.isfinite()


@pytest.mark.parametrize(
    ("kwargs", "field", "legal"),
    [
        ({"text_config": {"model_type": "vit"}}, "text_config.model_type", "AutoModelForCausalLM"),
        ({"text_config": {"model_type": "llama"}, "prompt_ids": [1, 2]}, "prompt_ids", "in it once"),
        ({"prompt_ids": [1, 2]}, "prompt_ids", "None without a language model"),
        ({"audio_config": {"model_type": "llama"}}, "audio_config.model_type", "'evacap_audio'"),
    ],
)
def test_illegal_values_name_the_field_and_what_is_legal(kwargs, field, legal):
    with pytest.raises(ValueError, match=f"`{field}`") as error:
        EVACapConfig(**kwargs)
    assert legal in str(error.value)


def test_a_language_model_gives_its_weights():
    torch.manual_seed(0)
    config = tiny_language_config("qwen3")
    language_model = AutoModelForCausalLM.from_config(config.text_config)
    model = EVACapForCausalLM(config)
    assert model.language_model.state_dict().keys() == language_model.state_dict().keys()

"""CASTE and CASE, which enrich the streams before their fusion, and the objectives beside them."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny import (
    ADAPTIVE,
    BATCH_SIZE,
    FRAMES,
    VOCABULARY,
    tiny_config,
    tiny_inputs,
    tiny_labels,
    tiny_language_config,
)

from evacap.modeling_evacap.enrichment_evacap import EVACapCASEBlock, EVACapCASTEBlock
from evacap.modeling_evacap.loss_evacap import caption_contrast, picture_entropy
from evacap.modeling_evacap.modeling_evacap import EVACapForConditionalGeneration
from evacap.training.components import enable_checkpointing


TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
EXACT = {"atol": 1e-12, "rtol": 1e-12}
NAMES = {
    "scale": "gamma",
    "own_proj": "gate.v_proj",
    "other_proj": "gate.a_proj",
    "gate_fc": "gate.mlp.0",
    "gate_out": "gate.mlp.2",
    "score_proj": "spatial.attn.fc_i",
    "k_proj": "spatial.attn.fc_k",
    "v_proj": "spatial.attn.fc_v",
    "out_proj": "spatial.attn.fc_o",
    "spatial_norm": "spatial.norm",
    "spatial_scale": "spatial.gamma",
    "depthwise": "temporal.dw",
    "pointwise": "temporal.pw",
    "temporal_norm": "temporal.norm",
    "temporal_scale": "temporal.gamma",
}
"""The published names of the parameters."""


@pytest.mark.parametrize(("own", "other"), [("video", "audio"), ("audio", "video")])
def test_the_block_gives_the_known_answers(shared, own, other):
    known = load_file(shared("peers/cae_av/cae_caste.safetensors"))
    answers = {key.removeprefix(f"{own}_branch."): known[key] for key in known if key.startswith(f"{own}_branch.")}
    # There the 5 frames of a clip stand together, with their tokens behind them.
    tokens = known[own].unflatten(0, (2, 5)).requires_grad_()
    others = known[other].unflatten(0, (2, 5)).requires_grad_()
    block = EVACapCASTEBlock(tokens.shape[-1], others.shape[-1], 16).double()
    published = {}
    for name, parameter in block.named_parameters():
        module, _, kind = name.partition(".")
        published[name] = ".".join([NAMES[module], kind]).rstrip(".")
        parameter.data.copy_(answers[f"parameter.{published[name]}"].view(parameter.shape))
    frames = torch.eye(5, dtype=torch.bool).expand(2, -1, -1)
    enriched = block(tokens.transpose(1, 2), frames, others.mean(2)).transpose(1, 2)
    residual = (enriched - tokens).flatten(0, 1)
    torch.testing.assert_close(residual, answers["residual"], **EXACT)
    loss = (residual * known[f"probe_{own}"]).sum()
    loss.backward()
    torch.testing.assert_close(loss[None], answers["loss"], **EXACT)
    torch.testing.assert_close(tokens.grad.flatten(0, 1), answers["grad_own"], **EXACT)
    torch.testing.assert_close(others.grad.flatten(0, 1), answers["grad_other"], **EXACT)
    for name, parameter in block.named_parameters():
        torch.testing.assert_close(parameter.grad, answers[f"grad.{published[name]}"].view(parameter.shape), **EXACT)


CASE_NAMES = {
    "caption_down": "{stream}_adapter.down_proj",
    "caption_up": "{stream}_adapter.up_proj",
    "caption_self_attn": "case.sa_{s}cap",
    "self_attn": "case.sa_{s}",
    "caption_attn": "case.ca_{s}_qcap",
    "cross_attn": {"video": "case.ca_vqa", "audio": "case.ca_aqv"},
    "other_proj": "case.linear_{s}_from_{o}",
    "feed_forward": "case.ffn_{s}",
    "caption_feed_forward": "case.ffn_{s}cap",
    "depthwise": "case.tmp_{s}.dw",
    "pointwise": "case.tmp_{s}.pw",
    "temporal_norm": "case.tmp_{s}.norm",
    "norm": "case.norm_{s}",
    "temperature": "case.topk.tau",
    "q_proj": "attention.linear_q",
    "k_proj": "attention.linear_k",
    "v_proj": "attention.linear_v",
    "o_proj": "attention.linear_merge",
    "fc1": "ffn.dense1",
    "fc2": "ffn.dense2",
}
"""The published names of the parameters of CASE, with the first letters of a stream and of the other one."""


def published_case_name(name: str) -> str:
    if name.startswith("caption_attn."):
        return (
            name.replace("caption_attn", "mapper")
            .replace("norm", "norm1")
            .replace("_proj", "")
            .replace("mapper.", "mapper.mhatt.linear_")
            .replace("mhatt.linear_norm1", "norm1")
            .replace("linear_o", "linear_merge")
        )
    stream, module, *rest = name.split(".")
    letters = {"stream": stream, "s": stream[0], "o": "av"[stream == "audio"]}
    found = CASE_NAMES[module]
    found = (found if isinstance(found, str) else found[stream]).format(**letters)
    return ".".join(
        [found, *(CASE_NAMES[part] if part.endswith("proj") or part.startswith("fc") else part for part in rest)]
    )


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_case_gives_the_known_answers(shared, monkeypatch, training, dtype):
    known = load_file(shared("peers/cae_av/cae_case.safetensors"))
    known = {name: tensor.to(dtype) for name, tensor in known.items()}
    tolerance = EXACT if dtype == torch.float64 else {"atol": 1e-6, "rtol": 1e-5}
    block = EVACapCASEBlock(8, 16, 24, 6).to(dtype).train(training)
    for name, parameter in block.named_parameters():
        # The published module changes the tokens at once.
        value = torch.ones(1) if name.endswith(".scale") else known[f"parameter.{published_case_name(name)}"]
        parameter.data.copy_(value.view(parameter.shape))
    for module in block.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    noise = {known[f"{name}"].shape[1] * 5: known[f"train.gumbel_{name}"] for name in ("audio", "video")}

    def gumbel_softmax(scores, temperature, dim):
        # The noise of a token, which stands in the row of its frame.
        rows = noise[scores.shape[-1]].unflatten(0, (2, 5)).mT.flatten(1)[:, None]
        return ((scores + rows) / temperature).softmax(dim)

    cosine_similarity = F.cosine_similarity
    monkeypatch.setattr(F, "gumbel_softmax", gumbel_softmax)
    # The published agreement has no gradient.
    monkeypatch.setattr(F, "cosine_similarity", lambda *streams, dim: cosine_similarity(*streams, dim=dim).detach())
    # There the 5 frames of a clip stand together, with their tokens behind them.
    streams = {name: known[name].unflatten(0, (2, 5)).requires_grad_() for name in ("audio", "video")}
    frames, words = torch.eye(5, dtype=torch.bool).expand(2, -1, -1), torch.ones(2, 1, 3, dtype=torch.bool)
    enriched = block(
        *(stream.transpose(1, 2) for stream in streams.values()),
        frames,
        frames,
        frames,
        known["audio_caption"],
        known["video_caption"],
        words,
        words,
    )
    case, loss = "train" if training else "eval", 0
    for name, tokens in zip(streams, enriched, strict=True):
        tokens = tokens.transpose(1, 2).flatten(0, 1)
        torch.testing.assert_close(tokens, known[f"{case}.{name}"], **tolerance)
        loss = loss + (tokens * known[f"probe_{name}"]).sum()
    loss.backward()
    torch.testing.assert_close(loss[None], known[f"{case}.loss"], **tolerance)
    for name, stream in streams.items():
        torch.testing.assert_close(stream.grad.flatten(0, 1), known[f"{case}.grad_{name}"], **tolerance)


def test_the_objectives_give_the_known_answers(shared):
    known = load_file(shared("peers/cae_av/cae_losses_ours.safetensors"))
    heads = {name: known[name].requires_grad_() for name in ("Pv", "Pa", "Pvcap", "Pacap", "tau")}
    clips = {name: heads[name].unflatten(0, (4, 5)).mean(1) for name in heads if name != "tau"}
    pairs = (("Pv", "Pvcap"), ("Pa", "Pacap"))
    loss = sum(caption_contrast(clips[stream], clips[caption], heads["tau"]) for stream, caption in pairs) / 2
    loss.backward()
    torch.testing.assert_close(loss[None], known["caption_infonce"], **EXACT)
    for name, head in heads.items():
        torch.testing.assert_close(head.grad, known[f"caption_infonce.grad_{name}"], **EXACT)
    weights = known["prob"].requires_grad_()
    entropy = torch.special.entr(weights).sum(-1) / torch.tensor(6.0).double().log()
    # The mean over frames is one over the tokens of clips.
    loss = picture_entropy(entropy.unflatten(0, (4, 5)))
    loss.backward()
    torch.testing.assert_close(loss[None], known["selection_entropy"], **EXACT)
    torch.testing.assert_close(weights.grad, known["selection_entropy.grad_prob"], **EXACT)


ENRICHMENTS = ("caste", "case")


def activate(model: EVACapForConditionalGeneration, scale: float = 0.7) -> None:
    """Gives the enrichment an effect, and CASE a choice of tokens that is not one of rounding errors."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.model.encoder.enrichment.named_parameters():
            if name.endswith(("audio_block.scale", "video_block.scale", "audio.scale", "video.scale")):
                parameter.fill_(scale)
            if name.endswith(("audio.temporal_norm.weight", "video.temporal_norm.weight")):
                parameter.copy_(torch.rand(parameter.shape, generator=generator) * 2)


def build(enrichment: str = "caste", **kwargs) -> EVACapForConditionalGeneration:
    """A model with an enrichment that has an effect."""
    torch.manual_seed(0)
    config = tiny_config(enrichment=enrichment, enrichment_hidden_size=16, **kwargs)
    model = EVACapForConditionalGeneration(config).eval()
    activate(model)
    return model


def encode(model: EVACapForConditionalGeneration, **inputs) -> torch.Tensor:
    return model.model.encoder(**inputs).last_hidden_state


def with_captions() -> dict[str, torch.Tensor]:
    """Inputs with captions of both streams, which only CASE reads."""
    return tiny_inputs() | {"audio_caption_ids": tiny_labels(1), "video_caption_ids": tiny_labels(2)[:, :6]}


FUSIONS = [
    {},
    {"gate_type": "agreement"},
    {"fusion_type": "concat", "audio_pooling": "frequency"},
    {"fusion_type": "late_concat"},
    {"fusion_type": "optimal_transport", "video_pooling": "frame"},
    ADAPTIVE,
]


@pytest.mark.parametrize("enrichment", ENRICHMENTS)
@pytest.mark.parametrize("fields", FUSIONS)
def test_a_checkpoint_starts_as_it_was(tmp_path, fields, enrichment):
    torch.manual_seed(0)
    before = EVACapForConditionalGeneration(tiny_config(**fields)).eval()
    before.save_pretrained(tmp_path)
    model, report = EVACapForConditionalGeneration.from_pretrained(
        tmp_path, enrichment=enrichment, output_loading_info=True
    )
    assert report["missing_keys"] and all(".enrichment." in name for name in report["missing_keys"])
    assert torch.equal(encode(model, **with_captions()), encode(before, **tiny_inputs()))
    # What is learned is saved, and has an effect.
    activate(model, 0.5)
    enriched = encode(model, **with_captions())
    model.save_pretrained(tmp_path / "again")
    again = EVACapForConditionalGeneration.from_pretrained(tmp_path / "again")
    assert torch.equal(encode(again, **with_captions()), enriched)
    assert not torch.allclose(enriched, encode(before, **tiny_inputs()), atol=1e-3)


# The matching head takes padding for time.
@pytest.mark.parametrize("enrichment", ENRICHMENTS)
@pytest.mark.parametrize("fields", [fields for fields in FUSIONS if "gate_type" not in fields])
def test_a_padded_clip_is_enriched_as_alone(fields, enrichment):
    model, inputs = build(enrichment, **fields), with_captions()
    # The caption of the first sound is padded; the second clip, without a picture, has no caption of it.
    inputs["video_caption_ids"][1] = -100
    first = {name: ids[:1] for name, ids in inputs.items() if name.endswith("ids")}
    first["audio_caption_ids"] = first["audio_caption_ids"][:, :5]
    sounds = torch.ones(BATCH_SIZE, FRAMES, dtype=torch.bool)
    # Of four steps and two pictures the first clip has three steps and one picture, the second one no picture.
    sounds[0, 48:] = False
    pictures = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    batch = model.model.encoder(**inputs, input_features_mask=sounds, pixel_values_videos_mask=pictures)
    alone = [
        encode(
            model,
            input_features=inputs["input_features"][:1, :48],
            pixel_values_videos=inputs["pixel_values_videos"][:1, :2],
            **first,
        ),
        encode(model, input_features=inputs["input_features"][1:2]),
        encode(model, **{name: stream[2:] for name, stream in inputs.items()}),
    ]
    mask = batch.attention_mask
    for row, expected in enumerate(alone):
        tokens = batch.last_hidden_state[row] if mask is None else batch.last_hidden_state[row][mask[row]]
        torch.testing.assert_close(tokens, expected[0], **TOLERANCE)


def test_streams_of_other_lengths_meet_in_time():
    """A picture hears the steps that sound while it is shown, and several pictures share one step of a short sound."""
    enrichment = build().model.encoder.enrichment
    for steps, pictures, meets in (
        (4, 2, [[0], [0], [1], [1]]),
        (3, 2, [[0], [0], [1]]),
        (2, 4, [[0, 1], [2, 3]]),
    ):
        # Rows by steps, and pictures by tokens.
        sound, picture = torch.randn(1, 2 * steps, 32), torch.randn(1, pictures * 4, 32)
        _, before = enrichment(sound, picture)
        for step, expected in enumerate(meets):
            changed = sound.clone()
            changed[0, [step, step + steps]] += 0.5
            moved = (enrichment(changed, picture)[1] - before).abs().amax((0, 2)).view(pictures, -1).amax(1)
            assert (moved > 1e-6).nonzero().flatten().tolist() == expected
        before, _ = enrichment(sound, picture)
        for number in range(pictures):
            changed = picture.clone()
            changed[0, 4 * number : 4 * number + 4] += 0.5
            moved = (enrichment(sound, changed)[0] - before).abs().amax((0, 2)).view(2, steps).amax(0)
            expected = [step for step in range(steps) if step * pictures // steps == number]
            # Only the strongest token of a picture's time changes.
            assert bool((moved > 1e-6).any()) == bool(expected)
            assert set((moved > 1e-6).nonzero().flatten().tolist()) <= set(expected)


@pytest.mark.parametrize("enrichment", ENRICHMENTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, enrichment):
    model, inputs = build(enrichment), with_captions()
    expected = encode(model, **inputs)
    with torch.autocast("cpu", dtype):
        torch.testing.assert_close(encode(model, **inputs).float(), expected, atol=0.15, rtol=0.1)
    model = model.to(dtype)
    inputs = {name: given if name.endswith("ids") else given.to(dtype) for name, given in inputs.items()}
    tokens = encode(model, **inputs)
    assert tokens.dtype == dtype
    torch.testing.assert_close(tokens.float(), expected, atol=0.25, rtol=0.1)
    assert model.generate(**inputs, num_beams=2, max_length=8).shape[0] == BATCH_SIZE


OBJECTIVES = {"gate_type": "agreement", "matching_weight": 1.0, "caption_contrast_weight": 0.5, "entropy_weight": 0.25}


def collated(swapped: tuple[int, ...] = ()) -> dict[str, torch.Tensor]:
    rows = torch.arange(BATCH_SIZE)
    shuffled = torch.isin(rows, torch.tensor(swapped, dtype=torch.long))
    video_index = torch.where(shuffled, rows.roll(1), rows)
    batch = with_captions() | {"labels": tiny_labels(), "shuffled": shuffled, "video_index": video_index}
    return batch | {name: batch[name][video_index] for name in ("pixel_values_videos", "video_caption_ids")}


@pytest.mark.parametrize("enrichment", ENRICHMENTS)
def test_the_objectives_are_terms_of_the_loss_by_name(enrichment):
    model = build(enrichment, **OBJECTIVES).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    losses = {}
    for checkpointing in (False, True):
        if checkpointing:
            enable_checkpointing(model)
        model.zero_grad()
        torch.manual_seed(0)
        outputs = model(**collated((1,)), use_cache=False)
        outputs.loss.backward()
        losses[checkpointing] = outputs.loss, {name: p.grad.clone() for name, p in model.named_parameters()}
    parts = (
        outputs.caption_loss + outputs.matching_loss + 0.5 * outputs.caption_contrast + 0.25 * outputs.picture_entropy
    )
    torch.testing.assert_close(outputs.loss, parts)
    torch.testing.assert_close(losses[True], losses[False])
    # A number that is added to all scores of an attention changes nothing, and the share of a single token is 1.
    still = {
        name for name, gradient in losses[False][1].items() if "enrichment" in name and gradient.abs().sum() < 1e-5
    }
    assert still and all(name.endswith(("score_proj.bias", "k_proj.bias", "temperature")) for name in still), still
    outputs = model.eval()(**collated((1,)))
    assert outputs.caption_contrast is None and outputs.picture_entropy is None


def test_swapped_and_missing_pictures_in_the_objectives():
    model = build(**OBJECTIVES | {"gate_type": "entropy", "matching_weight": 0.0}).train()
    head, words = model.contrast_head, model.lm_head.weight.detach()
    inputs = tiny_inputs()
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"][[0, 0, 2]]
    encoded = model.model.encoder(**inputs)
    summaries, labels = (encoded.audio_summary, encoded.video_summary), tiny_labels()
    captions = head.caption_proj(torch.stack([words[row[row != -100]].mean(0) for row in labels]))
    sound = caption_contrast(head.audio_proj(summaries[0]), captions, head.temperature)
    kept = torch.tensor([0, 2])
    picture = caption_contrast(head.video_proj(summaries[1][kept]), captions[kept], head.temperature)
    swapped = torch.tensor([False, True, False])
    torch.testing.assert_close(head(*summaries, labels, words, swapped), (sound + picture) / 2)
    # The same clip without a picture.
    mask = torch.ones(BATCH_SIZE, 4, dtype=torch.bool)
    mask[1] = False
    without = model.model.encoder(**tiny_inputs(), pixel_values_videos_mask=mask)
    assert without.video_summary.isnan().all(1).tolist() == [False, True, False]
    # A clip all of whose sound is masked does not spoil the loss of the batch.
    heard = torch.ones(tiny_inputs()["input_features"].shape[:2], dtype=torch.bool)
    heard[1] = False
    assert model(**tiny_inputs(), labels=labels, input_features_mask=heard, use_cache=False).loss.isfinite()
    loss = head(without.audio_summary, without.video_summary, labels, words)
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
    torch.testing.assert_close(loss, (sound + picture) / 2, atol=1e-4, rtol=1e-4)
    entropy = encoded.attention_entropy.mean(1)
    expected = entropy[kept].mean() + 1 - entropy[1]
    torch.testing.assert_close(picture_entropy(encoded.attention_entropy, swapped), expected)
    # A clip without a picture counts neither as one nor as the other.
    nothing = without.attention_entropy
    torch.testing.assert_close(picture_entropy(nothing), nothing.mean(1)[kept].mean())
    torch.testing.assert_close(picture_entropy(nothing, swapped), nothing.mean(1)[kept].mean())


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"enrichment": "casting"}, "enrichment"),
        ({"enrichment": "caste", "fusion_type": "audio_only"}, "enrichment"),
        ({"enrichment_hidden_size": 1}, "enrichment_hidden_size"),
        ({"enrichment": "case", "semantic_consistency_weight": 1.0}, "semantic_consistency_weight"),
        ({"entropy_weight": 1.0, "fusion_type": "concat"}, "entropy_weight"),
        ({"caption_contrast_weight": -1.0}, "caption_contrast_weight"),
    ],
)
def test_it_is_refused_where_it_has_no_place(fields, field):
    with pytest.raises(ValueError, match=f"`{field}`"):
        tiny_config(**fields)


def test_case_reads_both_captions_with_the_words_of_the_decoder():
    model, inputs = build("case"), with_captions()
    embed_tokens = model.model.encoder.enrichment.embed_tokens
    assert embed_tokens.weight is model.get_input_embeddings().weight
    encoded = encode(model, **inputs)
    for name in ("audio_caption_ids", "video_caption_ids"):
        other = inputs | {name: inputs[name].roll(1, 0)}
        assert not torch.allclose(encode(model, **other), encoded, atol=1e-3)
    # Longer padding changes nothing, and a pair has the captions of its sound and its picture.
    padded = inputs | {"video_caption_ids": F.pad(inputs["video_caption_ids"], (0, 3), value=-100)}
    torch.testing.assert_close(encode(model, **padded), encoded, **TOLERANCE)
    pairs = {"audio_index": torch.tensor([2, 0]), "video_index": torch.tensor([2, 0])}
    torch.testing.assert_close(encode(model, **inputs, **pairs), encoded[[2, 0]], **TOLERANCE)
    # New words are known to both.
    model.resize_token_embeddings(VOCABULARY + 2)
    assert model.model.encoder.enrichment.embed_tokens.weight is model.get_input_embeddings().weight
    inputs["audio_caption_ids"][0, 0] = VOCABULARY + 1
    tokens = model.generate(**inputs, num_beams=2, max_length=8)
    assert tokens.shape[0] == BATCH_SIZE


def test_case_says_what_is_missing():
    model, inputs = build("case"), with_captions()
    sounds = {"input_features": inputs["input_features"]}
    assert encode(model, **sounds).isfinite().all()
    for name in ("audio_caption_ids", "video_caption_ids"):
        with pytest.raises(ValueError, match=f"`{name}` is missing"):
            encode(model, **{key: value for key, value in inputs.items() if key != name})
    with pytest.raises(ValueError, match=r"`audio_caption_ids` has shape \(1, 7\)"):
        encode(model, **inputs | {"audio_caption_ids": inputs["audio_caption_ids"][:1]})
    with pytest.raises(ValueError, match="`enrichment`"):
        tiny_language_config(enrichment="case")

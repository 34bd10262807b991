"""The matching head, its loss, and the gate that it shuts."""

import pytest
import torch
import torch.nn.functional as F
from tiny import BATCH_SIZE, tiny_config, tiny_inputs, tiny_labels

from evacap.modeling_evacap.loss_evacap import heard_words, matching_loss
from evacap.modeling_evacap.matching_evacap import match_in_batch, picture_of_step
from evacap.modeling_evacap.modeling_evacap import EVACapForConditionalGeneration


TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
AGREEMENT = {"gate_type": "agreement", "matching_weight": 1.0, "matching_hidden_size": 16}


def build(**kwargs) -> EVACapForConditionalGeneration:
    torch.manual_seed(0)
    model = EVACapForConditionalGeneration(tiny_config(**AGREEMENT | kwargs)).eval()
    with torch.no_grad():
        for parameter in model.model.encoder.matching_head.parameters():
            parameter.normal_(std=0.5)
    return model


def set_logit(model: EVACapForConditionalGeneration, logit: float) -> None:
    """Makes the head say the same of every time step of every pair."""
    head = model.model.encoder.matching_head
    with torch.no_grad():
        for layer in (head.clip_out, head.step_out):
            layer.weight.zero_()
            layer.bias.fill_(logit)


def collated(**changes) -> dict[str, torch.Tensor]:
    rows = torch.arange(BATCH_SIZE)
    return tiny_inputs() | {"labels": tiny_labels(), "shuffled": rows < 0, "video_index": rows} | changes


def test_the_head_is_its_formula():
    head = build().model.encoder.matching_head.double()
    audio, video = torch.randn(2, 8, 32).double(), torch.randn(2, 8, 32).double()
    clip, step = head(audio, video)
    for row in range(2):
        heard, seen = head.audio_proj(audio[row]), head.video_proj(video[row])
        scores = head.q_proj(audio[row]) @ head.k_proj(video[row]).T / 16**0.5
        picture, sound = scores.softmax(1) @ seen, scores.T.softmax(1) @ heard
        h = F.gelu(head.audio_compare(torch.cat([heard, picture, heard * picture], 1)))
        k = F.gelu(head.video_compare(torch.cat([seen, sound, seen * sound], 1)))
        pooled = torch.cat([h.mean(0), h.amax(0), k.mean(0), k.amax(0)])
        z = head.clip_out(F.gelu(head.clip_fc(pooled)))
        torch.testing.assert_close(clip[row : row + 1], z, **TOLERANCE)
        for t in range(4):
            # Two mel rows of four time steps; two pictures of four tokens, each seen for two steps.
            of_sound, of_picture = h[[t, t + 4]], k[:4] if t < 2 else k[4:]
            pooled = torch.cat([of_sound.mean(0), of_sound.amax(0), of_picture.mean(0), of_picture.amax(0)])
            z_t = head.step_out(F.gelu(head.step_fc(pooled)))[0]
            torch.testing.assert_close(step[row, t], z_t, **TOLERANCE)


def test_what_does_not_exist_is_not_compared():
    head = build().model.encoder.matching_head
    audio, video = torch.randn(2, 8, 32), torch.randn(2, 8, 32)
    audio_mask, video_mask = torch.ones(2, 8, dtype=torch.bool), torch.ones(2, 8, dtype=torch.bool)
    audio_mask[0, [3, 7]], video_mask[0, 4:] = False, False
    clip, step = head(audio, video, audio_mask, video_mask)
    changed, other = audio.clone(), video.clone()
    changed[0, [3, 7]], other[0, 4:] = 99.0, -99.0
    again, steps = head(changed, other, audio_mask, video_mask)
    torch.testing.assert_close(again, clip, **TOLERANCE)
    torch.testing.assert_close(steps[0, :2], step[0, :2], **TOLERANCE)
    torch.testing.assert_close(head(audio[1:], video[1:])[0], clip[1:], **TOLERANCE)
    none = head(audio, video, None, torch.zeros(2, 8, dtype=torch.bool))
    assert all(logits.isfinite().all() for logits in none)


def test_pictures_are_seen_in_their_time():
    assert picture_of_step(8, 3).tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert picture_of_step(4, 4).tolist() == [0, 1, 2, 3]


def test_own_and_others_weigh_the_same_in_the_loss():
    logits, own = torch.tensor([2.0, -1.0, 0.5, 3.0]), torch.tensor([True, False, False, False])
    counted = torch.tensor([True, True, True, False])
    expected = (F.softplus(torch.tensor(-2.0)) + F.softplus(torch.tensor([-1.0, 0.5])).mean()) / 2
    torch.testing.assert_close(matching_loss(logits, own, counted), expected)
    # Own pictures alone would teach the head to say always yes.
    logits.requires_grad_()
    loss = matching_loss(logits, own, own)
    loss.backward()
    assert loss == 0 and (logits.grad == 0).all()


def test_labels_follow_the_collator():
    """A swapped picture is another's, and one's own where the next sample holds it."""
    said = []

    class Head:
        tokens_per_picture = 4

        def __call__(self, audio, video, audio_mask, video_mask):
            # Each stream holds the number of its sample.
            same = video[:, :, 0] == audio[:, :1, 0]
            said.append(same)
            logits = torch.where(same, 20.0, -20.0)
            return logits[:, 0], logits[:, [0, 0, 4, 4]]

    numbers = torch.arange(5.0)[:, None, None].expand(-1, 8, 1)
    picture_index = torch.tensor([1, 0, 2, 4, 3])
    head, mask = Head(), torch.ones(5, 8, dtype=torch.bool)
    video = numbers[picture_index]
    clip, step = head(numbers, video, None, mask)
    loss = match_in_batch(head, numbers, video, None, mask, clip, step, torch.arange(5), picture_index)
    # A head that knows it all has learned all.
    assert loss < 1e-6
    assert said[0].any(1).sum() == 1 and said[1].any(1).sum() == 2
    # One that says the reverse is wrong everywhere.
    head.__class__ = type("Liar", (Head,), {"__call__": lambda self, *a: tuple(-x for x in Head.__call__(self, *a))})
    loss = match_in_batch(head, numbers, video, None, mask, -clip, -step, torch.arange(5), picture_index)
    assert loss > 19


def test_a_shut_gate_is_no_picture():
    model, inputs = build(), tiny_inputs()
    for logit, is_open in ((5.0, True), (-5.0, False)):
        set_logit(model, logit)
        outputs = model.model.encoder(**inputs)
        torch.testing.assert_close(outputs.agreement, torch.sigmoid(torch.full((BATCH_SIZE,), logit)))
        assert outputs.agreement_by_step.shape == (BATCH_SIZE, 4)
        alone = model.model.encoder(inputs["input_features"])
        assert torch.equal(outputs.last_hidden_state, alone.last_hidden_state) != is_open
        assert (outputs.fusion_gate > 0).all() == is_open
    assert alone.agreement.isnan().all() and alone.agreement_by_step.isnan().all()


def test_the_threshold_and_the_temperature():
    for fields, is_open in (
        ({"agreement_threshold": 0.7}, False),
        ({"agreement_threshold": 0.6}, True),
        # sigmoid(0.75 / 2) = 0.593
        ({"agreement_threshold": 0.6, "agreement_temperature": 2.0}, False),
    ):
        model = build(**fields)
        set_logit(model, 0.75)  # sigmoid: 0.679
        assert (model.model.encoder(**tiny_inputs()).fusion_gate > 0).all() == is_open
    # Without its own loss the head is a factor, which no temperature changes.
    soft = build(matching_weight=0.0, agreement_temperature=2.0)
    set_logit(soft, 50.0)
    whole = soft.model.encoder(**tiny_inputs()).fusion_gate
    set_logit(soft, 0.75)
    torch.testing.assert_close(soft.model.encoder(**tiny_inputs()).fusion_gate, 0.6792 * whole, atol=1e-4, rtol=0)


def test_a_black_screen_shows_nothing():
    model, inputs = build(), tiny_inputs()
    set_logit(model, 5.0)
    inputs["pixel_values_videos"][0] = -2.1
    inputs["pixel_values_videos"][1, 2:] = 1.0
    outputs = model.model.encoder(**inputs)
    assert outputs.agreement_by_step.isnan().tolist() == [[True] * 4, [False, False, True, True], [False] * 4]
    assert outputs.agreement.isnan().tolist() == [True, False, False]
    assert (outputs.fusion_gate[0] == 0).all() and (outputs.fusion_gate[1] > 0).all()
    alone = model.model.encoder(inputs["input_features"])
    torch.testing.assert_close(outputs.last_hidden_state[0], alone.last_hidden_state[0], **TOLERANCE)


def test_the_loss_comes_by_name_and_only_in_training():
    model = build().train()
    torch.manual_seed(0)
    outputs = model(**collated())
    torch.testing.assert_close(outputs.loss, outputs.caption_loss + outputs.matching_loss)
    outputs.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.eval()(**collated()).matching_loss is None
    assert build(matching_weight=0.0).train()(**collated()).matching_loss is None


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_captions_do_not_bend_a_head_that_learns_from_pictures(weight):
    model = build(matching_weight=weight).train()
    set_logit(model, 0.5)
    fused = model.model.encoder(**tiny_inputs()).last_hidden_state.square().sum()
    gradient = torch.autograd.grad(fused, model.model.encoder.matching_head.clip_out.weight, allow_unused=True)[0]
    assert gradient is None if weight else gradient.abs().sum() > 0


def test_in_training_the_head_shuts_nothing():
    model = build().train()
    set_logit(model, -9.0)
    gate = model.model.encoder(**tiny_inputs(), picture_index=torch.tensor([0, 2, 2])).fusion_gate
    assert (gate > 0).all()
    assert (model.model.encoder(**tiny_inputs()).fusion_gate == 0).all()


def test_what_the_sound_alone_tells_of_the_words():
    logits, labels = torch.randn(2, 9), torch.tensor([[3, 5, 2], [4, 2, -100]])
    log_probabilities = logits.log_softmax(1)
    words = [log_probabilities[0, [3, 5, 2]], log_probabilities[1, [4, 2]]]
    torch.testing.assert_close(heard_words(logits, labels), -torch.cat(words).mean())
    model = build(hearing_weight=2.0).train()
    batch = collated()
    outputs = model(**batch)
    torch.testing.assert_close(outputs.loss, outputs.caption_loss + outputs.matching_loss + 2 * outputs.heard_words)
    # It reads the sound, and leaves the picture and the words' vectors alone.
    outputs.loss.backward()
    assert model.hearing_head.weight.grad.abs().sum() > 0
    towers = model.model.encoder
    parameters = (
        towers.video_tower.layers[0].mlp.fc1.weight,
        model.lm_head.weight,
        towers.audio_tower.layers[0].mlp.fc1.weight,
    )
    outputs = model(**batch)
    loss = model.config.hearing_weight * outputs.heard_words
    assert not loss.requires_grad  # for the logs
    summary = towers(**tiny_inputs()).audio_summary
    loss = heard_words(F.linear(model.hearing_head(summary), model.lm_head.weight.detach()), batch["labels"])
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    assert gradients[0] is None and gradients[1] is None and gradients[2].abs().sum() > 0
    assert model.eval()(**batch).heard_words is None


def test_it_is_refused_where_it_has_no_place():
    for fields, field in (
        ({"gate_type": "entropy"}, "matching_weight"),
        ({"fusion_type": "concat"}, "matching_weight"),
        ({"agreement_threshold": 1.5}, "agreement_threshold"),
        ({"agreement_temperature": 0.0}, "agreement_temperature"),
        ({"hearing_weight": 1.0, "fusion_type": "video_only", "matching_weight": 0.0}, "hearing_weight"),
    ):
        with pytest.raises(ValueError, match=f"`{field}`"):
            tiny_config(**AGREEMENT | fields)


def test_saved_and_loaded(tmp_path):
    model = build(hearing_weight=1.0, agreement_temperature=1.5)
    model.save_pretrained(tmp_path)
    loaded = EVACapForConditionalGeneration.from_pretrained(tmp_path)
    inputs = tiny_inputs()
    torch.testing.assert_close(
        loaded.model.encoder(**inputs).agreement_by_step, model.model.encoder(**inputs).agreement_by_step
    )

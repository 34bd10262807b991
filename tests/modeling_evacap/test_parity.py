"""The imported models against what AVCap, CAV-MAE and the GIT of Transformers compute from the same weights."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import GitConfig, GitForCausalLM
from transformers.modeling_outputs import BaseModelOutput

from evacap.modeling_evacap.import_weights import inflate_patch_embedding, model_from_weights
from evacap.modeling_evacap.modeling_evacap import CACHE_FIELD


TOLERANCE = 1e-5
# AVCap's logits, computed in float32, are up to 1.7e-5 from those of float64.
AVCAP_LOGITS_TOLERANCE = 2.5e-5
AVCAP_PRESETS = {
    "av_4_frames": "avcap",
    "av_1_frame": "avcap",
    "audio_only": "audio-only",
    "video_only": "video-only",
}
CLS, SEP = 101, 102
MAX_LENGTH = 16


def assert_close(actual: torch.Tensor, expected: torch.Tensor, record_property, tolerance: float = TOLERANCE) -> None:
    difference = (actual - expected).abs().max().item()
    record_property("largest_difference", difference)
    print(f"largest difference {difference:.1e}")
    assert actual.shape == expected.shape
    assert difference <= tolerance


@pytest.fixture(scope="module", params=AVCAP_PRESETS)
def avcap(request, shared):
    """A small AVCap captioner, its inputs under our names, and what AVCap computed from them."""
    model, _ = model_from_weights(
        avcap=shared(f"parity/{request.param}.checkpoint.safetensors"),
        preset=AVCAP_PRESETS[request.param],
        num_attention_heads=4,
        image_size=64,
    )
    # AVCap's own attention is this one; the fused kernels add half of the tolerance in rounding.
    model.set_attn_implementation("eager")
    known = load_file(shared(f"parity/{request.param}.io.safetensors"))
    visual = known["visual"]
    frames = visual[:, None] if visual.ndim == 4 else visual.transpose(1, 2)
    inputs = {"input_features": known["audio"], "pixel_values_videos": frames}
    fusion_type = model.config.fusion_type
    if fusion_type == "audio_only":
        del inputs["pixel_values_videos"]
    elif fusion_type == "video_only":
        del inputs["input_features"]
    return model, inputs, known


@torch.no_grad()
def test_avcap_encoder_features(avcap, record_property):
    model, inputs, known = avcap
    features = model.get_encoder()(**inputs).last_hidden_state
    assert_close(features, known["encoder_features"], record_property)


@torch.no_grad()
def test_avcap_logits(avcap, record_property):
    model, inputs, known = avcap
    logits = model(**inputs, decoder_input_ids=known["caption_tokens"]).logits
    assert_close(logits, known["logits"], record_property, AVCAP_LOGITS_TOLERANCE)


@torch.no_grad()
def test_avcap_loss(avcap, record_property):
    model, inputs, known = avcap
    assert model.config.label_smoothing == 0.1
    labels = known["caption_tokens"].masked_fill(known["need_predict"] == 0, -100)
    loss = model(**inputs, decoder_input_ids=known["caption_tokens"][:, :-1], labels=labels[:, 1:]).loss
    assert_close(loss[None], known["loss"], record_property)


def until_sep(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(SEP)] if SEP in tokens else tokens


@torch.no_grad()
def test_avcap_greedy_tokens(avcap):
    """The greedy tokens are equal, up to the token before a forced `[SEP]`.

    AVCap's single beam may continue after a `[SEP]` with the second-best token while the longer caption could still win;
    in none of these cases it could. At the length limit it always closes a caption with `[SEP]`.
    """
    model, inputs, known = avcap
    tokens = model.generate(**inputs, max_length=MAX_LENGTH - 1, do_sample=False, num_beams=1)
    assert [until_sep(row) for row in tokens.tolist()] == [until_sep(row) for row in known["greedy"].tolist()]


@torch.no_grad()
def avcap_greedy(model, inputs: dict, max_length: int) -> list[list[int]]:
    """AVCap's decoding rule with one beam, on the model's logits."""
    encoder_outputs = model.get_encoder()(**inputs)
    captions = []
    for row in encoder_outputs.last_hidden_state:
        tokens, score, best_score, best, cache = [CLS], 0.0, None, None, None
        while len(tokens) < max_length:
            outputs = model(
                encoder_outputs=BaseModelOutput(row[None]),
                decoder_input_ids=torch.tensor([tokens[-1:]]),
                cache=cache,
                use_cache=True,
            )
            cache = outputs[CACHE_FIELD]
            scores, candidates = (score + outputs.logits[0, -1].log_softmax(-1)).topk(2)
            if best is not None and best_score >= scores[0] / ((5 + max_length - 1) / 6) ** 0.6:
                break
            following = None
            for candidate_score, candidate in zip(scores.tolist(), candidates.tolist(), strict=True):
                if candidate == SEP or len(tokens) + 1 == max_length:
                    normalised = candidate_score / ((5 + len(tokens)) / 6) ** 0.6
                    if best is None or normalised > best_score:
                        best_score, best = normalised, tokens
                else:
                    following = (candidate_score, candidate)
                    break
            if following is None:
                break
            score, tokens = following[0], [*tokens, following[1]]
        captions.append(best + [SEP] * (max_length - len(best)))
    return captions


def test_avcap_tokens_under_its_own_rule(avcap):
    model, inputs, known = avcap
    assert avcap_greedy(model, inputs, MAX_LENGTH) == known["greedy"].tolist()


@torch.no_grad()
@pytest.mark.parametrize(
    ("preset", "stream", "name"),
    [("audio-only", "audio", "input_features"), ("video-only", "visual", "pixel_values_videos")],
)
def test_cav_mae_features(shared, preset, stream, name, record_property):
    model, _ = model_from_weights(
        cav_mae=shared("parity/cav_mae_pretrained.pth"), preset=preset, num_attention_heads=4, num_frames=1
    )
    known = load_file(shared("parity/cav_mae_pretrained.io.safetensors"))
    inputs = known[stream] if stream == "audio" else known[stream][:, None]
    features = model.get_encoder()(**{name: inputs}).last_hidden_state
    assert_close(features, known[f"{stream}_features"], record_property)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inflated_embedding_answers_a_still_as_the_picture_embedding(shared, dtype, record_property):
    known = load_file(shared("parity/cav_mae_pretrained.io.safetensors"))
    path = shared("parity/cav_mae_pretrained.pth")
    picture, _ = model_from_weights(cav_mae=path, preset="video-only", num_attention_heads=4, num_frames=1)
    video, _ = model_from_weights(cav_mae=path, preset="video-only", num_attention_heads=4, num_frames=6)
    assert video.config.video_config.tubelet_size == 2
    still = known["visual"][:, None].to(dtype)
    expected = picture.model.encoder.video_tower.embeddings.to(dtype)(still)[0]
    tokens = video.model.encoder.video_tower.embeddings.to(dtype)(still.expand(-1, 6, -1, -1, -1))[0]
    # These random weights answer with values around 10, and float32 rounds sums of that size to about 1e-5.
    scale = expected.abs().max() if dtype == torch.float32 else 1
    for tubelet in tokens.chunk(3, dim=1):
        assert_close(tubelet / scale, expected / scale, record_property)


def test_inflation_keeps_the_sum_over_time():
    weight = torch.randn(8, 3, 4, 4)
    for tubelet_size in (1, 2, 4):
        inflated = inflate_patch_embedding(weight, tubelet_size)
        assert inflated.shape == (8, 3, tubelet_size, 4, 4)
        torch.testing.assert_close(inflated.sum(2), weight)


@torch.no_grad()
@pytest.mark.parametrize("original_names", [False, True])
def test_git_logits(tmp_path, original_names, record_property):
    """Both decoders read the same prefix: the vision tokens of GIT in Transformers, and their projection."""
    torch.manual_seed(0)
    config = GitConfig(
        vocab_size=128,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=32,
        vision_config={
            "hidden_size": 40,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
        },
    )
    git = GitForCausalLM(config).eval()
    for parameter in git.parameters():
        # Fresh biases and layer norms are 0 and 1: no test of where they go.
        parameter.add_(torch.randn_like(parameter) * 0.1)
    source = tmp_path / "git"
    if original_names:
        source = tmp_path / "model.pt"
        torch.save({"model": {f"module.{name}": tensor for name, tensor in to_original_names(git).items()}}, source)
    else:
        git.save_pretrained(source)
    model, report = model_from_weights(
        git=source, preset="video-only", num_attention_heads=4, image_size=32, num_frames=2
    )
    assert "lm_head.weight" in report.loaded, "GIT's random output layer is not its word embeddings"

    projection = git.git.visual_projection.visual_projection
    model.model.decoder.prefix_projection = projection[0]
    model.model.decoder.prefix_layer_norm = projection[1]
    pixels, tokens = torch.randn(2, 3, 32, 32), torch.randint(0, 128, (2, 9))
    vision_tokens = git.git.image_encoder(pixels).last_hidden_state
    expected = git(input_ids=tokens, pixel_values=pixels).logits[:, -tokens.shape[1] :]
    logits = model(encoder_outputs=BaseModelOutput(vision_tokens), decoder_input_ids=tokens).logits
    assert_close(logits, expected, record_property)


def to_original_names(git: GitForCausalLM) -> dict[str, torch.Tensor]:
    """The state dict of a GIT as its authors' `model.pt` names it."""
    renames = {
        "git.embeddings.word_embeddings.": "textual.embedding.words.",
        "git.embeddings.position_embeddings.": "textual.embedding.positions.",
        "git.embeddings.LayerNorm.": "textual.embedding.layer_norm.",
        "git.encoder.layer.": "textual.transformer.encoder.layer.",
        "git.visual_projection.visual_projection.": "textual.visual_projection.",
        "git.image_encoder.": "image_encoder.",
        "output.": "textual.output.",
    }
    state = {}
    for name, tensor in git.state_dict().items():
        prefix = next(prefix for prefix in renames if name.startswith(prefix))
        state[renames[prefix] + name.removeprefix(prefix)] = tensor
    return state

import math
import os
import pickle
import re

import pytest
import torch
from source_checkpoints import HEADS, IMAGE_SIZE, VOCABULARY, WIDTH, avcap_state, cav_mae_state, save
from transformers import GitConfig, GitForCausalLM

from evacap.modeling_evacap.import_weights import model_from_weights


def from_avcap(path, preset=None, **options):
    return model_from_weights(
        avcap=path, preset=preset, **{"num_attention_heads": HEADS, "image_size": IMAGE_SIZE, **options}
    )


def from_cav_mae(path, preset="evacap", **options):
    return model_from_weights(cav_mae=path, preset=preset, **{"num_attention_heads": HEADS, **options})


@pytest.fixture
def avcap_file(tmp_path):
    return save(avcap_state(), tmp_path / "avcap.safetensors")


@pytest.fixture
def cav_mae_file(tmp_path):
    return save(cav_mae_state(), tmp_path / "cav_mae.pth")


@pytest.fixture
def git_folder(tmp_path):
    torch.manual_seed(0)
    config = GitConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=40,
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 16,
        },
        tie_word_embeddings=True,
    )
    GitForCausalLM(config).save_pretrained(tmp_path / "git")
    return tmp_path / "git"


def test_avcap_sizes_are_read_from_the_tensors(avcap_file):
    model, report = from_avcap(avcap_file)
    config = model.config
    assert config.fusion_type == "concat"
    assert config.num_joint_layers == 1
    audio, video, text = config.audio_config, config.video_config, config.text_config
    assert (audio.hidden_size, audio.num_hidden_layers, audio.intermediate_size, audio.patch_size) == (32, 2, 128, 16)
    assert (audio.num_mel_bins, audio.max_frames) == (128, 32)
    assert (video.num_frames, video.tubelet_size, video.image_size) == (4, 2, 32)
    assert (text.vocab_size, text.num_hidden_layers, text.max_position_embeddings) == (VOCABULARY, 2, 48)
    assert {part.num_attention_heads for part in (audio, video, text)} == {HEADS}
    assert report.new == []
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    assert not model.training


def test_every_tensor_is_accounted_for(avcap_file):
    model, report = from_avcap(avcap_file)
    assert sorted(report.loaded + report.reshaped + report.new) == sorted(model.state_dict())
    assert len(set(report.loaded + report.reshaped)) == len(report.loaded + report.reshaped)
    # A joint projection of the file fills three parameters.
    split = sum("_proj" in name and "o_proj" not in name and "encoder" in name for name in report.reshaped) * 2 // 3
    assert len(report.loaded + report.reshaped) - split + len(report.unused) == len(avcap_state())


def test_report_is_a_table_by_module(avcap_file):
    rows = str(from_avcap(avcap_file)[1]).splitlines()
    assert rows[0].split() == ["tensors", "loaded", "reshaped", "new", "unused"]
    cells = {re.split(r"\s{2,}", row)[0]: row.split()[-4:] for row in rows[1:] if "note" not in row}
    # 12 weights of 2 blocks stay as they are, 4 of queries, keys and values become 12; 2 + 2 embeddings.
    assert cells["encoder.audio_tower"] == ["22", "14", "-", "-"]
    assert cells["file: av_encoder.mlp_head"] == ["-", "-", "-", "4"]
    assert any(row.startswith("note: 128 mel bins") for row in rows)


def test_avcap_as_evacap_has_a_fresh_fusion(avcap_file):
    reference, _ = from_avcap(avcap_file)
    model, report = from_avcap(avcap_file, "evacap")
    assert model.config.fusion_type == "gated_cross_attention"
    assert report.new
    assert all(name.startswith("model.encoder.fusion.") for name in report.new)
    assert model.model.encoder.fusion.gate_weight.item() == model.config.gate_weight_init
    state = model.state_dict()
    for name, tensor in reference.state_dict().items():
        assert torch.equal(state[name], tensor), name


def test_both_attentions_of_an_adaptive_decoder_begin_as_the_one_of_the_file(avcap_file, cav_mae_file, git_folder):
    plain, _ = from_avcap(avcap_file)
    model, report = from_avcap(avcap_file, "vact")
    assert sorted(report.new) == [
        f"model.decoder.layers.{layer}.encoder_attn.confidence_{kind}"
        for layer in (0, 1)
        for kind in ("bias", "weight")
    ]
    assert sorted(report.loaded + report.reshaped + report.new) == sorted(model.state_dict())
    assert any("blocks_u" in name for name in report.unused) and model.config.num_joint_layers == 0
    for layer, old in zip(model.model.decoder.layers, plain.model.decoder.layers, strict=True):
        for attention in (layer.self_attn, layer.encoder_attn):
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                assert torch.equal(getattr(attention, name).weight, getattr(old.self_attn, name).weight)
        for norm in (layer.self_attn_layer_norm, layer.encoder_attn_layer_norm):
            assert torch.equal(norm.weight, old.self_attn_layer_norm.weight)
        assert torch.equal(layer.encoder_attn.confidence_bias, torch.tensor([4.0, 0.0]))
    model, report = from_cav_mae(cav_mae_file, "vact", git=git_folder)
    assert {name.split(".")[2] for name in report.new} == {"layers", "prefix_projection", "prefix_layer_norm"}


def test_avcap_as_evacap_with_the_agreement_gate_has_fresh_heads(avcap_file):
    model, report = from_avcap(avcap_file, "evacap-agreement")
    parts = {"model.encoder.fusion.", "model.encoder.matching_head.", "hearing_head."}
    assert {next(part for part in parts if name.startswith(part)) for name in report.new} == parts
    assert "encoder.matching_head" in str(report) and "hearing_head" in str(report)


def test_avcap_as_evacap_behind_caste_has_fresh_enrichment(avcap_file):
    model, report = from_avcap(avcap_file, "evacap-caste-losses")
    parts = {f"model.encoder.{name}." for name in ("fusion", "enrichment", "matching_head")}
    parts |= {"hearing_head.", "contrast_head."}
    assert {next(part for part in parts if name.startswith(part)) for name in report.new} == parts
    assert all(block.scale.item() == 0 for block in model.model.encoder.enrichment.children())
    assert model.contrast_head.temperature.item() == pytest.approx(0.2)
    model, report = from_avcap(avcap_file, "evacap-case")
    enrichment = model.model.encoder.enrichment
    assert enrichment.embed_tokens.weight is model.get_input_embeddings().weight
    assert any(".enrichment." in name for name in report.new) and not any(
        "embed_tokens" in name for name in report.new
    )
    assert enrichment.block.audio.scale.item() == enrichment.block.video.scale.item() == 0


@pytest.mark.parametrize(("preset", "pair"), [("avcap", ""), ("audio-only", "_a"), ("video-only", "_v")])
def test_joint_blocks_take_the_norms_of_what_they_see(avcap_file, preset, pair):
    model, _ = from_avcap(avcap_file, preset)
    state = avcap_state()
    joint = model.model.encoder.joint
    assert torch.equal(joint.layers[0].layernorm_before.weight, state[f"av_encoder.blocks_u.0.norm1{pair}.weight"])
    assert torch.equal(joint.layers[0].layernorm_after.bias, state[f"av_encoder.blocks_u.0.norm2{pair}.bias"])
    assert torch.equal(joint.layernorm.weight, state[f"av_encoder.norm{pair}.weight"])


def test_avcap_as_late_concat_has_its_joint_blocks_twice_each_with_the_norms_of_its_stream(avcap_file):
    model, report = from_avcap(avcap_file, "late-concat")
    assert not report.new
    for stream, joint in (("audio-only", "joint"), ("video-only", "video_joint")):
        expected = from_avcap(avcap_file, stream)[0].model.encoder.joint.state_dict()
        found = getattr(model.model.encoder, joint).state_dict()
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_file_types_and_prefixes_make_no_difference(tmp_path, avcap_file, suffix, prefix):
    state = {prefix + name: tensor for name, tensor in avcap_state().items()}
    model, _ = from_avcap(save(state, tmp_path / f"other{suffix}"))
    assert_same_weights(model, from_avcap(avcap_file)[0])


@pytest.mark.parametrize("key", ["model", "state_dict", "captioner"])
@pytest.mark.parametrize("zipped", [True, False])
def test_state_dict_of_a_training_run(tmp_path, avcap_file, key, zipped):
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    run = {"epoch": 3, key: avcap_state(), "optimizer": optimizer.state_dict(), "args": {"lr": 1e-4}}
    torch.save(run, tmp_path / "run.pth", _use_new_zipfile_serialization=zipped)
    assert_same_weights(from_avcap(tmp_path / "run.pth")[0], from_avcap(avcap_file)[0])


def test_half_precision_weights_become_float32(tmp_path):
    state = {name: tensor.half() for name, tensor in avcap_state().items()}
    model, _ = from_avcap(save(state, tmp_path / "half.pth"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def assert_same_weights(model, other) -> None:
    state = other.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


class _Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, zipped):
    path, trace = tmp_path / "bad.pth", tmp_path / "code_ran"
    torch.save({"model": avcap_state(), "args": _Malicious(trace)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"bad\.pth: refused, as it holds pickled Python objects \(\S*mkdir"):
        from_avcap(path)
    assert not trace.exists()


def test_a_plain_pickle_is_refused(tmp_path):
    path, trace = tmp_path / "bad.pt", tmp_path / "code_ran"
    path.write_bytes(pickle.dumps(_Malicious(trace)))
    with pytest.raises(ValueError, match=r"bad\.pt: "):
        from_avcap(path)
    assert not trace.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("length", [0, 3, 5000])
def test_a_cut_off_file_is_named(tmp_path, suffix, length):
    path = save(avcap_state(), tmp_path / f"cut{suffix}")
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=rf"cut\{suffix}: .*Is the download complete"):
        from_avcap(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth: there is no such file"):
        from_avcap(tmp_path / "nowhere.pth")


def test_a_file_without_a_state_dict_tells_what_it_holds(tmp_path):
    torch.save({"epoch": 3, "args": {}}, tmp_path / "run.pth")
    with pytest.raises(ValueError, match=r"run\.pth: it holds 'epoch', 'args', but a dict of tensors was expected"):
        from_avcap(tmp_path / "run.pth")


def test_the_wrong_kind_of_file_is_named(cav_mae_file, avcap_file):
    with pytest.raises(ValueError, match=r"cav_mae\.pth: not the weights of an AVCap captioner: .*av_encoder"):
        from_avcap(cav_mae_file)
    with pytest.raises(ValueError, match=r"avcap\.safetensors: not the weights of an audio-visual CAV-MAE"):
        from_cav_mae(avcap_file)
    with pytest.raises(ValueError, match=r"cav_mae\.pth: not a GIT"):
        model_from_weights(git=cav_mae_file)


@pytest.mark.parametrize("name", ["av_encoder.norm.weight", "textual.embedding.words.weight"])
@pytest.mark.parametrize(
    "change, fault",
    [
        (lambda value: value.to("meta"), "on the meta device"),
        (lambda value: value.to(torch.complex64), "of type torch.complex64"),
        (lambda value: value > 0, "of type torch.bool"),
        (lambda value: value.to(torch.int32), "of type torch.int32"),
        (lambda value: value.to_sparse(), "of layout torch.sparse_coo"),
        (lambda value: value.index_fill(0, torch.tensor([0]), math.nan), "with values that are not finite"),
        (lambda value: value.half().index_fill(0, torch.tensor([0]), -math.inf), "with values that are not finite"),
    ],
)
def test_tensors_that_are_no_weights_are_refused(tmp_path, name, change, fault):
    state = avcap_state()
    path = save({**state, name: change(state[name])}, tmp_path / "avcap.pth")
    with pytest.raises(ValueError, match=rf"not weights: .*{re.escape(name)} \({fault}"):
        from_avcap(path)


def test_large_weights_are_weights(tmp_path):
    state = avcap_state()
    state["av_encoder.norm.weight"] = torch.full_like(state["av_encoder.norm.weight"], 3e38)
    from_avcap(save(state, tmp_path / "avcap.pth"))


@pytest.mark.parametrize("content", [{0: torch.zeros(1)}, {"model": {0: torch.zeros(1)}}, {("a", 1): torch.zeros(1)}])
def test_names_that_are_not_text_are_an_error(tmp_path, content):
    torch.save(content, tmp_path / "keys.pth")
    with pytest.raises(ValueError, match="keys.pth: it holds .* but a dict of tensors was expected"):
        from_avcap(tmp_path / "keys.pth")


def test_an_unknown_tensor_is_an_error_until_allowed(tmp_path):
    path = save(avcap_state() | {"av_encoder.adapter.weight": torch.zeros(3)}, tmp_path / "more.pth")
    with pytest.raises(ValueError, match=r"unknown tensors av_encoder\.adapter\.weight.*--allow-missing"):
        from_avcap(path)
    _, report = from_avcap(path, allow_missing=["av_encoder.adapter.*"])
    assert "av_encoder.adapter.weight" in report.unused


def test_a_missing_tensor_is_an_error_until_allowed(tmp_path):
    state = avcap_state()
    del state["av_encoder.blocks_a.1.mlp.fc1.bias"]
    path = save(state, tmp_path / "less.pth")
    name = "model.encoder.audio_tower.layers.1.mlp.fc1.bias"
    with pytest.raises(ValueError, match=rf"lack weights for {re.escape(name)}"):
        from_avcap(path)
    model, report = from_avcap(path, allow_missing=["*.fc1.bias"])
    assert report.new == [name]
    assert model.get_parameter(name).abs().max() == 0


def test_a_wrong_shape_is_an_error(tmp_path):
    state = avcap_state() | {"av_encoder.blocks_v.1.mlp.fc2.weight": torch.zeros(WIDTH, 7)}
    with pytest.raises(ValueError, match=r"shapes do not fit: av_encoder\.blocks_v\.1\.mlp\.fc2\.weight \(32, 7\)"):
        from_avcap(save(state, tmp_path / "odd.pth"))


def test_sizes_that_no_tensor_shows_are_asked_for(avcap_file):
    with pytest.raises(ValueError, match="--num-attention-heads"):
        from_avcap(avcap_file, num_attention_heads=None)
    with pytest.raises(ValueError, match=r"8 places, .*--image-size"):
        from_avcap(avcap_file, image_size=None)
    with pytest.raises(ValueError, match="`image_size` is 48"):
        from_avcap(avcap_file, image_size=48)
    with pytest.raises(ValueError, match=r"`num_mel_bins` is 80, .*--num-mel-bins"):
        from_avcap(avcap_file, num_mel_bins=80)
    with pytest.raises(ValueError, match="`num_frames` is 6, but the weights are for 4 frames"):
        from_avcap(avcap_file, num_frames=6)


def test_asked_sizes_are_used(avcap_file):
    model, report = from_avcap(avcap_file, num_mel_bins=64, image_size=16)
    assert (model.config.audio_config.max_frames, model.config.video_config.num_frames) == (64, 16)
    assert report.notes == []


def test_sources_are_either_or(avcap_file, cav_mae_file):
    with pytest.raises(ValueError, match="either `avcap`, or `cav_mae`, `git` or both"):
        model_from_weights()
    with pytest.raises(ValueError, match="either `avcap`, or `cav_mae`, `git` or both"):
        model_from_weights(avcap=avcap_file, cav_mae=cav_mae_file)
    with pytest.raises(ValueError, match="'shrink'.*'inflate' or 'fresh'"):
        from_cav_mae(cav_mae_file, video_embedding="shrink")


def test_output_weights_of_their_own_stay_untied(tmp_path):
    state = avcap_state()
    state["textual.output.weight"] = torch.randn(VOCABULARY, WIDTH)
    model, report = from_avcap(save(state, tmp_path / "untied.pth"))
    assert torch.equal(model.lm_head.weight, state["textual.output.weight"])
    assert torch.equal(model.model.decoder.embed_tokens.weight, state["textual.embedding.words.weight"])
    assert any("not tied" in note for note in report.notes)
    model.save_pretrained(tmp_path / "model")
    again = type(model).from_pretrained(tmp_path / "model")
    assert torch.equal(again.lm_head.weight, state["textual.output.weight"])


@pytest.mark.parametrize(("depth", "joint_depth"), [(1, 2), (2, 0), (3, 1)])
@pytest.mark.parametrize("pretraining", [True, False])
def test_cav_mae_of_any_depth_and_stage(tmp_path, depth, joint_depth, pretraining):
    state = cav_mae_state(depth=depth, joint_depth=joint_depth, pretraining=pretraining)
    prefixed = {f"module.{name}": tensor for name, tensor in state.items()}
    model, report = from_cav_mae(save(prefixed, tmp_path / "cav_mae.pth"))
    assert model.config.audio_config.num_hidden_layers == depth
    assert model.config.num_joint_layers == joint_depth
    rows = torch.cat(
        [getattr(model.model.encoder.video_tower.layers[-1].self_attn, f"{part}_proj").weight for part in "qkv"]
    )
    assert torch.equal(rows, state[f"blocks_v.{depth - 1}.attn.qkv.weight"])
    assert {name.split(".")[1] for name in report.new} == {"encoder", "decoder", "bias"}
    assert all("fusion" in name for name in report.new if "encoder" in name)


def test_cav_mae_pictures_are_inflated_to_clips(cav_mae_file):
    state = cav_mae_state()
    model, report = from_cav_mae(cav_mae_file, num_frames=6)
    embeddings = model.model.encoder.video_tower.embeddings
    assert model.config.video_config.image_size == 32
    kernel = state["patch_embed_v.proj.weight"]
    torch.testing.assert_close(embeddings.patch_embeddings.weight, torch.stack([kernel, kernel], dim=2) / 2)
    assert torch.equal(embeddings.position_embeddings, state["pos_embed_v"][0].repeat(3, 1))
    assert "model.encoder.video_tower.embeddings.patch_embeddings.weight" in report.reshaped
    assert from_cav_mae(cav_mae_file)[0].config.video_config.num_frames == 18


def test_fresh_video_embedding_is_avcaps_way(cav_mae_file):
    model, report = from_cav_mae(cav_mae_file, num_frames=6, video_embedding="fresh")
    embeddings = "model.encoder.video_tower.embeddings"
    fresh = {name for name in report.new if name.startswith(embeddings)}
    assert fresh == {
        f"{embeddings}.{name}" for name in ("patch_embeddings.weight", "patch_embeddings.bias", "position_embeddings")
    }
    assert torch.equal(
        model.model.encoder.video_tower.embeddings.modality_embedding, cav_mae_state()["modality_v"].flatten()
    )
    assert "av_encoder.pos_embed_v" in report.unused


def test_avcap_of_single_pictures(tmp_path):
    path = save(avcap_state(tubelet_size=None, video_positions=4), tmp_path / "picture.pth")
    options = {"image_size": None}
    for preset in ("avcap", "video-only"):
        model, _ = from_avcap(path, preset, video_embedding="fresh", **options)
        assert model.config.video_config.num_frames == 1
        tensor = model.model.encoder.video_tower.embeddings.position_embeddings
        assert torch.equal(tensor, avcap_state(tubelet_size=None, video_positions=4)["av_encoder.pos_embed_v"][0])
    model, _ = from_avcap(path, "evacap", num_frames=4, **options)
    assert (model.config.video_config.num_frames, model.config.video_config.tubelet_size) == (4, 2)


def test_cav_mae_and_git_make_a_model_to_train(cav_mae_file, git_folder):
    model, report = model_from_weights(cav_mae=cav_mae_file, git=git_folder, num_attention_heads=HEADS, num_frames=4)
    assert model.config.fusion_type == "gated_cross_attention"
    assert model.config.text_config.num_attention_heads == 2
    assert model.config.text_config.max_position_embeddings == 40
    assert {name.split(".")[-2] for name in report.new if "decoder" in name} == {
        "prefix_projection",
        "prefix_layer_norm",
    }
    assert any(name.startswith("image_encoder.") for name in report.unused)
    frames = torch.randn(2, 4, 3, 32, 32)
    labels = torch.tensor([[103, 102], [104, 102]])
    loss = model.train()(torch.randn(2, 32, 128), frames, labels=labels).loss
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_git_alone(git_folder):
    model, report = model_from_weights(git=git_folder, preset="audio-only")
    assert model.config.text_config.hidden_size == WIDTH
    assert model.config.audio_config.hidden_size == 768
    assert all(".encoder." in name or "prefix" in name for name in report.new)


def test_git_that_cannot_be_had(tmp_path):
    with pytest.raises(FileNotFoundError, match="nobody/no-git: neither a file nor a folder"):
        model_from_weights(git="nobody/no-git")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty: neither a file nor"):
        model_from_weights(git=tmp_path / "empty")

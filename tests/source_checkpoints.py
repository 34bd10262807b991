"""Random checkpoints under the names of AVCap and CAV-MAE, of any size."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import BertTokenizer


WIDTH, HEADS, VOCABULARY, IMAGE_SIZE = 32, 4, 110, 32


def _layer_norms(state: dict, width: int, *names: str) -> None:
    for name in names:
        state[f"{name}.weight"] = 1 + 0.1 * torch.randn(width)
        state[f"{name}.bias"] = 0.1 * torch.randn(width)


def _linear(state: dict, name: str, inputs: int, outputs: int) -> None:
    state[f"{name}.weight"] = 0.02 * torch.randn(outputs, inputs)
    state[f"{name}.bias"] = 0.02 * torch.randn(outputs)


def _blocks(state: dict, stack: str, depth: int, width: int) -> None:
    for index in range(depth):
        block = f"{stack}.{index}"
        _layer_norms(state, width, *(f"{block}.norm{place}{kind}" for place in (1, 2) for kind in ("", "_a", "_v")))
        _linear(state, f"{block}.attn.qkv", width, 3 * width)
        _linear(state, f"{block}.attn.proj", width, width)
        _linear(state, f"{block}.mlp.fc1", width, 4 * width)
        _linear(state, f"{block}.mlp.fc2", 4 * width, width)


def cav_mae_state(
    width: int = WIDTH,
    depth: int = 2,
    joint_depth: int = 1,
    audio_positions: int = 16,
    video_positions: int = 4,
    tubelet_size: int | None = None,
    pretraining: bool = True,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """A CAV-MAE: with `tubelet_size` for clips, as AVCap changes it, and else for single pictures."""
    torch.manual_seed(seed)
    state = {}
    for letter, positions, channels in (("a", audio_positions, 1), ("v", video_positions, 3)):
        tubelet = () if letter == "a" or tubelet_size is None else (tubelet_size,)
        state[f"modality_{letter}"] = torch.randn(1, 1, width)
        state[f"pos_embed_{letter}"] = torch.randn(1, positions, width)
        state[f"patch_embed_{letter}.proj.weight"] = 0.02 * torch.randn(width, channels, *tubelet, 16, 16)
        state[f"patch_embed_{letter}.proj.bias"] = torch.randn(width)
        _blocks(state, f"blocks_{letter}", depth, width)
    _blocks(state, "blocks_u", joint_depth, width)
    _layer_norms(state, width, "norm", "norm_a", "norm_v")
    if pretraining:
        state |= {"mask_token": torch.randn(1, 1, 16), "decoder_pos_embed_a": torch.randn(1, audio_positions, 16)}
        _blocks(state, "decoder_blocks", 1, 16)
        _linear(state, "decoder_pred_a", 16, 256)
    else:
        _layer_norms(state, width, "mlp_head.0")
        _linear(state, "mlp_head.1", width, 527)
    return state


def avcap_state(
    width: int = WIDTH,
    decoder_depth: int = 2,
    vocabulary: int = VOCABULARY,
    text_positions: int = 48,
    video_positions: int = 8,
    tubelet_size: int | None = 2,
    **encoder,
) -> dict[str, torch.Tensor]:
    """A captioner of AVCap. By default it is for 4 frames of 32 pixels and 32 filterbank frames."""
    encoder_state = cav_mae_state(
        width, video_positions=video_positions, tubelet_size=tubelet_size, pretraining=False, **encoder
    )
    state = {f"av_encoder.{name}": tensor for name, tensor in encoder_state.items()}
    _linear(state, "textual.av_projection.0", width, width)
    _layer_norms(state, width, "textual.av_projection.1", "textual.embedding.layer_norm")
    state["textual.embedding.words.weight"] = torch.randn(vocabulary, width)
    state["textual.embedding.positions.weight"] = torch.randn(text_positions, width)
    for index in range(decoder_depth):
        layer = f"textual.transformer.encoder.layer.{index}"
        for part in ("query", "key", "value"):
            _linear(state, f"{layer}.attention.self.{part}", width, width)
        _linear(state, f"{layer}.attention.output.dense", width, width)
        _linear(state, f"{layer}.intermediate.dense", width, 4 * width)
        _linear(state, f"{layer}.output.dense", 4 * width, width)
        _layer_norms(state, width, f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm")
    state["textual.output.weight"] = state["textual.embedding.words.weight"]
    state["textual.output.bias"] = torch.randn(vocabulary)
    return state


def save(state: dict[str, torch.Tensor], path: Path) -> Path:
    """Writes `state` to `path`, by its suffix as safetensors or by `torch.save`."""
    if path.suffix == ".safetensors":
        save_file({name: tensor.clone() for name, tensor in state.items()}, path)
    else:
        torch.save(state, path)
    return path


def save_tokenizer(folder: Path, vocabulary: int = VOCABULARY) -> Path:
    """Writes a BERT tokenizer with the special tokens where BERT uncased has them."""
    special = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]"}
    folder.mkdir()
    words = [special.get(index, f"word{index}") for index in range(vocabulary)]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    BertTokenizer.from_pretrained(folder).save_pretrained(folder)
    return folder

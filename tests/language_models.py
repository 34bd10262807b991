"""A tiny language model with its tokenizer, and tiny towers, as folders that Transformers loads."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoConfig, AutoModelForCausalLM, CLIPConfig, CLIPModel, PreTrainedTokenizerFast


CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def save_language_model(folder: Path, model_type: str = "llama", chat: bool = False, seed: int = 0) -> Path:
    """Saves a random language model of 32 dimensions over the 256 bytes of a text."""
    alphabet = {letter: index for index, letter in enumerate(sorted(ByteLevel.alphabet()))}
    words = Tokenizer(BPE(vocab=alphabet, merges=[]))
    words.pre_tokenizer, words.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        model_type,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def save_ced(folder: Path, width: int = 24, depth: int = 2, seed: int = 0) -> Path:
    """Saves a random CED with the files and names of its port to Transformers."""
    torch.manual_seed(seed)
    state = {
        "patch_embed.proj.weight": torch.randn(width, 1, 16, 16) / 16,
        "patch_embed.proj.bias": torch.randn(width),
        "time_pos_embed": torch.randn(1, width, 1, 63),
        "freq_pos_embed": torch.randn(1, width, 4, 1),
        "init_bn.weight": torch.ones(64),
        "init_bn.bias": torch.zeros(64),
        "init_bn.running_mean": torch.zeros(64),
        "init_bn.running_var": torch.ones(64),
        "init_bn.num_batches_tracked": torch.tensor(0),
    }

    def linear(name: str, inputs: int, outputs: int) -> None:
        state[f"{name}.weight"] = torch.randn(outputs, inputs) / inputs**0.5
        state[f"{name}.bias"] = torch.randn(outputs)

    def norm(name: str) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = torch.ones(width), torch.zeros(width)

    for index in range(depth):
        block = f"blocks.{index}"
        norm(f"{block}.norm1")
        norm(f"{block}.norm2")
        linear(f"{block}.attn.qkv", width, 3 * width)
        linear(f"{block}.attn.proj", width, width)
        linear(f"{block}.mlp.fc1", width, 4 * width)
        linear(f"{block}.mlp.fc2", 4 * width, width)
    norm("norm")
    state = {f"encoder.{name}": value for name, value in state.items()}
    state |= {"outputlayer.1.weight": torch.zeros(3, width), "outputlayer.1.bias": torch.zeros(3)}
    config = {"model_type": "ced", "name": "ced-tiny", "embed_dim": width, "depth": depth, "num_heads": 4}
    config |= {"mlp_ratio": 4.0, "n_mels": 64, "target_length": 1012, "outputdim": 3, "pooling": "mean", "f_max": 8000}
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_clip(folder: Path, projection_dim: int = 24, seed: int = 0) -> Path:
    """Saves a random CLIP for pictures of 32 pixels, text and pictures as its checkpoints have them."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        vision_config={**sizes, "image_size": 32, "patch_size": 16, "projection_dim": projection_dim},
        text_config={**sizes, "vocab_size": 20, "max_position_embeddings": 8},
        projection_dim=projection_dim,
    )
    CLIPModel(config).save_pretrained(folder)
    return folder

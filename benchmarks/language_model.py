"""Operations and memory of a training step of LAVCap's recipe with a language model of a billion parameters.

CED-Base, CLIP ViT-L/14 and a Llama of the shapes of Llama 3.2 1B, with adapters, projector and scale of the loss trained.
Nothing is measured: PyTorch counts the operations, and the bytes that are kept for the backward pass, on its meta device,
which computes shapes alone. Frames go through CLIP, or come as vectors that were made before.
"""

import argparse
import itertools

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import markdown
from evacap.modeling_evacap.configuration_evacap import EVACapConfig
from evacap.modeling_evacap.language_model_evacap import EVACapForCausalLM
from evacap.training.adapters import add_adapters
from evacap.training.components import enable_checkpointing
from evacap.training.run_config import LoraSection


FRAMES, PROMPT, CAPTION = 20, (9, 11), 20
"""Frames of a clip, tokens of the prompt before and after it, and tokens of the caption."""
TRAINED = ("lora_", "multi_modal_projector", "encoder.fusion")
CLIP = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
LLAMA = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}


def make_model(checkpointing: bool) -> EVACapForCausalLM:
    """The model on the meta device in bfloat16, with its adapters."""
    config = EVACapConfig(
        audio_config={"model_type": "ced", "target_length": 1024},
        video_config={"model_type": "clip_vision_model", **CLIP, "patch_size": 14, "projection_dim": 768},
        text_config={"model_type": "llama", **LLAMA, "bos_token_id": 1, "eos_token_id": 2},
        fusion_type="optimal_transport",
        audio_pooling="frequency",
        num_joint_layers=0,
    )
    with torch.device("meta"):
        model = EVACapForCausalLM(config).to(torch.bfloat16)
        add_adapters(model, LoraSection())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in TRAINED))
    if checkpointing:
        enable_checkpointing(model)
    return model.train()


def count_step(model: EVACapForCausalLM, batch: int, with_clip: bool) -> tuple[float, float, int]:
    """Operations of the forward pass and of the step, and bytes that are kept between both passes, without weights."""
    known = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    held: list[torch.Tensor] = []

    def hold(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            known.add(storage._cdata)
            held.append(tensor)
        return tensor

    config, dtype = model.config, torch.bfloat16
    with torch.device("meta"), FlopCounterMode(display=False) as counter, saved_tensors_hooks(hold, lambda x: x):
        vectors = torch.empty(batch, FRAMES, config.video_width, dtype=dtype)
        if with_clip:
            side = config.video_config.image_size
            # It is frozen, so it keeps nothing.
            with torch.no_grad():
                vectors = model.encoder.see(torch.empty(batch, FRAMES, 3, side, side)).last_hidden_state
        sound = torch.empty(batch, config.audio_config.max_frames, config.audio_config.num_mel_bins)
        encoded = model.encoder(sound, video_features=vectors)
        clip = model.multi_modal_projector(encoded.last_hidden_state)
        text = model.get_input_embeddings()(torch.zeros(batch, sum(PROMPT) + CAPTION, dtype=torch.long))
        embeds = torch.cat([text[:, : PROMPT[0]], clip, text[:, PROMPT[0] :]], dim=1)
        # Made here, because Transformers looks into the values of others.
        mask = torch.ones(batch, 1, embeds.shape[1], embeds.shape[1], dtype=torch.bool)
        output = model.language_model(
            inputs_embeds=embeds, attention_mask=mask, use_cache=False, logits_to_keep=CAPTION + 1
        )
        loss = output.logits.float().log_softmax(-1).sum() + encoded.transport_loss.sum()
        forward = counter.get_total_flops()
        loss.backward()
        return forward, counter.get_total_flops(), sum(tensor.untyped_storage().nbytes() for tensor in held)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.language_model", description=__doc__)
    parser.add_argument("--batch", type=int, default=4, help="clips of a step (default: %(default)s)")
    batch = parser.parse_args(arguments).batch
    rows = []
    for with_clip, checkpointing in itertools.product((True, False), (False, True)):
        model = make_model(checkpointing)
        forward, step, kept = count_step(model, batch, with_clip)
        frames = "through CLIP" if with_clip else "vectors"
        counted = (f"{forward / 1e12:.2f}", f"{step / 1e12:.2f}", f"{kept / 2**30:.2f}")
        rows.append([frames, "yes" if checkpointing else "no", *counted])
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    print(f"{model.num_parameters() / 1e6:,.1f} M parameters, {trained / 1e6:.2f} M trained; {batch} clips a step\n")
    header = ["frames", "checkpointing", "forward, TFLOP", "step, TFLOP", "kept for the backward pass, GiB"]
    print(markdown(header, rows))


if __name__ == "__main__":
    main()

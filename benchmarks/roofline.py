"""The matrix products of a captioner, counted from the shapes: its floating-point operations and its lower time bound.

Only the products that every implementation has to compute are counted: no norms, activations or softmax, and each
prefix token once for each layer. The patch embeddings are products too, because their kernels do not overlap.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.measure import DTYPES, bandwidth, product_seconds
from evacap.modeling_evacap.configuration_evacap import EVACapConfig, EVACapTextConfig, EVACapVideoConfig


@dataclass(frozen=True)
class Product:
    """`batch` products of matrices (m × k) · (k × n)."""

    batch: int
    m: int
    k: int
    n: int

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.m * self.k * self.n


def linear(rows: int, inputs: int, outputs: int) -> Product:
    """A linear layer over `rows` vectors."""
    return Product(1, rows, inputs, outputs)


def attention(batch: int, heads: int, queries: int, keys: int, width: int) -> list[Product]:
    """The scores and the contexts of `heads` heads that share `width` channels."""
    size = width // heads
    return [Product(batch * heads, queries, size, keys), Product(batch * heads, queries, keys, size)]


def _mlp(rows: int, width: int, intermediate: int) -> list[Product]:
    return [linear(rows, width, intermediate), linear(rows, intermediate, width)]


def _vit_layer(batch: int, tokens: int, config) -> list[Product]:
    width, rows = config.hidden_size, batch * tokens
    return (
        [linear(rows, width, width)] * 4
        + attention(batch, config.num_attention_heads, tokens, tokens, width)
        + _mlp(rows, width, config.intermediate_size)
    )


def audio_tokens(config: EVACapConfig) -> int:
    """The audio tokens of a clip of the position table's length; 0 without an audio tower."""
    audio = config.audio_config
    if config.fusion_type == "video_only":
        return 0
    return (audio.num_mel_bins // audio.patch_size) * (audio.max_frames // audio.patch_size)


def video_tokens(config: EVACapConfig, frames: int) -> int:
    """The video tokens of a clip of `frames` frames; 0 without a video tower."""
    video = config.video_config
    if config.fusion_type == "audio_only":
        return 0
    return frames // video.tubelet_size * (video.image_size // video.patch_size) ** 2


def prefix_tokens(config: EVACapConfig, frames: int) -> int:
    """The tokens that the decoder reads."""
    if config.fusion_type == "gated_cross_attention":
        return audio_tokens(config)
    return audio_tokens(config) + video_tokens(config, frames)


def video_tower(config: EVACapVideoConfig, batch: int, frames: int) -> list[Product]:
    """The products of the video tower."""
    per_step, steps = (config.image_size // config.patch_size) ** 2, frames // config.tubelet_size
    inputs = config.num_channels * config.tubelet_size * config.patch_size**2
    sequences, tokens = (batch * steps, per_step) if config.attention == "frame" else (batch, steps * per_step)
    layer = _vit_layer(sequences, tokens, config)
    return [linear(batch * steps * per_step, inputs, config.hidden_size)] + layer * config.num_hidden_layers


def encoder(config: EVACapConfig, batch: int, frames: int) -> list[Product]:
    """The products of the towers, the fusion and the joint blocks, for `batch` clips of `frames` frames."""
    audio, video = config.audio_config, config.video_config
    heard, seen = audio_tokens(config), video_tokens(config, frames)
    products = []
    if heard:
        products.append(linear(batch * heard, audio.patch_size**2, audio.hidden_size))
        products += _vit_layer(batch, heard, audio) * audio.num_hidden_layers
    if seen:
        products += video_tower(video, batch, frames)
    if seen and config.fusion_type == "gated_cross_attention":
        products.append(linear(batch * heard, audio.hidden_size, audio.hidden_size))
        products += [linear(batch * seen, video.hidden_size, audio.hidden_size)] * 2
        products += attention(batch, audio.num_attention_heads, heard, seen, audio.hidden_size)
    joined = [heard, seen] if config.fusion_type == "late_concat" else [prefix_tokens(config, frames)]
    for tokens in filter(None, joined):
        products += _vit_layer(batch, tokens, config.encoder_config) * config.num_joint_layers
    return products


def _text(config: EVACapTextConfig, clips: int, beams: int, prefix: int, past: int) -> list[Product]:
    """One text token of each beam through a layer, after `past` cached ones."""
    rows, width, heads = clips * beams, config.hidden_size, config.num_attention_heads
    return (
        [linear(rows, width, width)] * 4
        + attention(clips, heads, beams, prefix, width)
        + attention(rows, heads, 1, past + 1, width)
        + _mlp(rows, width, config.intermediate_size)
    )


def step(config: EVACapConfig, clips: int, beams: int, prefix: int, past: int) -> list[Product]:
    """The products of a decoding step: one token of each beam, with all before it cached."""
    text = config.text_config
    head = linear(clips * beams, text.hidden_size, text.vocab_size)
    return _text(text, clips, beams, prefix, past) * text.num_hidden_layers + [head]


def prefill(config: EVACapConfig, clips: int, beams: int, prefix: int) -> list[Product]:
    """The products of the first pass: the prefix (of its last layer only keys and values) and each beam's start token."""
    text, rows = config.text_config, clips * prefix
    width = text.hidden_size
    keys_and_values = [linear(rows, width, width)] * 2
    rest = (
        [linear(rows, width, width)] * 2
        + attention(clips, text.num_attention_heads, prefix, prefix, width)
        + _mlp(rows, width, text.intermediate_size)
    )
    projection = linear(rows, config.encoder_config.hidden_size, width)
    layers = keys_and_values * text.num_hidden_layers + rest * (text.num_hidden_layers - 1)
    return [projection] + layers + step(config, clips, beams, prefix, past=0)


def decoding(config: EVACapConfig, clips: int, beams: int, prefix: int, new_tokens: int) -> list[Product]:
    """The products of all steps after the first pass, which generates the first of `new_tokens` tokens."""
    return [product for past in range(1, new_tokens) for product in step(config, clips, beams, prefix, past)]


def flops(products: Iterable[Product]) -> int:
    """The floating-point operations of `products`, a multiplication and an addition counting as two."""
    return sum(product.flops for product in products)


def step_weight_bytes(config: EVACapConfig, dtype: str) -> int:
    """The bytes of the weights that a decoding step reads: the decoder's layers and the output layer."""
    text = config.text_config
    width, inner = text.hidden_size, text.intermediate_size
    layer = 4 * (width * width + width) + 2 * width * inner + inner + width + 4 * width
    head = text.vocab_size * (width + 1)
    return (layer * text.num_hidden_layers + head) * DTYPES[dtype].itemsize


def floor(
    config: EVACapConfig, batch: int, frames: int, beams: int, new_tokens: int, dtype: str, device: str
) -> dict[str, float]:
    """The lower time bound in seconds, from plain matrix products.

    For encoder and prefill it is the time of a plain product of each shape. For decoding it is the time of its
    operations at the best rate among those products, plus, for each step, the time to read the weights at the memory
    bandwidth. (A plain product of few rows is limited by that bandwidth itself, so its own time would count it twice.)
    """
    prefix = prefix_tokens(config, frames)
    parts = {"encoder": encoder(config, batch, frames), "prefill": prefill(config, batch, beams, prefix)}
    times, best_rate = {}, 0.0
    for part, products in parts.items():
        times[part] = 0.0
        for product in set(products):
            took = product_seconds(product.batch, product.m, product.k, product.n, dtype, device)
            times[part] += took * products.count(product)
            best_rate = max(best_rate, product.flops / took)
    steps = decoding(config, batch, beams, prefix, new_tokens)
    reading = (new_tokens - 1) * step_weight_bytes(config, dtype) / bandwidth(device)
    times["decoding"] = flops(steps) / best_rate + reading
    return {**times, "total": sum(times.values())}


def training_step(config: EVACapConfig, batch: int, frames: int, length: int) -> int:
    """The operations of a forward pass and a backward pass (twice as many), for captions of `length` tokens."""
    text, prefix = config.text_config, prefix_tokens(config, frames)
    forward = flops(encoder(config, batch, frames)) + flops(prefill(config, batch, 1, prefix))
    # `prefill` counts the first token of each caption; the others pass the same layers.
    rows, width = batch * (length - 1), text.hidden_size
    others = [linear(rows, width, width)] * 4 + _mlp(rows, width, text.intermediate_size)
    others += attention(batch, text.num_attention_heads, length - 1, prefix, width)
    forward += flops(others) * text.num_hidden_layers + flops([linear(rows, width, text.vocab_size)])
    own = flops(attention(batch, text.num_attention_heads, length, length, width))
    own -= flops(attention(batch, text.num_attention_heads, 1, 1, width))
    return 3 * (forward + own * text.num_hidden_layers)

"""The mapping from the tensor names of AVCap, CAV-MAE and GIT checkpoints to those of EVACap.

Everything is mapped through the names of AVCap: those of CAV-MAE with the prefix `av_encoder.`, and those of GIT with
the prefix `textual.`. The names of GIT in Transformers are translated to them.
"""

import re


QKV = re.compile(r"(.*\.self_attn)\.qkv\.(\w+)")

_TRANSFORMERS_GIT = (
    (r"git\.embeddings\.word_embeddings\.weight", "textual.embedding.words.weight"),
    (r"git\.embeddings\.position_embeddings\.weight", "textual.embedding.positions.weight"),
    (r"git\.embeddings\.LayerNorm\.(\w+)", r"textual.embedding.layer_norm.\1"),
    (r"git\.encoder\.(layer\..+)", r"textual.transformer.encoder.\1"),
    (r"git\.visual_projection\.(visual_projection\..+)", r"textual.\1"),
    (r"git\.(image_encoder\..+)", r"\1"),
    (r"git\.img_tempor?e?al_embedding\.(.+)", r"img_temperal_embedding.\1"),
    (r"output\.(\w+)", r"textual.output.\1"),
    (r"git\.embeddings\.(position_ids)", r"\1"),
)

_BLOCK = (
    (r"norm1{pair}\.(\w+)", "layernorm_before"),
    (r"attn\.qkv\.(\w+)", "self_attn.qkv"),
    (r"attn\.proj\.(\w+)", "self_attn.o_proj"),
    (r"norm2{pair}\.(\w+)", "layernorm_after"),
    (r"mlp\.fc1\.(\w+)", "mlp.fc1"),
    (r"mlp\.fc2\.(\w+)", "mlp.fc2"),
)

_DECODER = (
    (r"av_projection\.0\.(\w+)", r"model.decoder.prefix_projection.\1"),
    (r"av_projection\.1\.(\w+)", r"model.decoder.prefix_layer_norm.\1"),
    (r"embedding\.words\.weight", "model.decoder.embed_tokens.weight"),
    (r"embedding\.positions\.weight", "model.decoder.embed_positions.weight"),
    (r"embedding\.layer_norm\.(\w+)", r"model.decoder.layernorm_embedding.\1"),
    (r"output\.(\w+)", r"lm_head.\1"),
)

_DECODER_LAYER = (
    (r"attention\.self\.query\.(\w+)", "self_attn.q_proj"),
    (r"attention\.self\.key\.(\w+)", "self_attn.k_proj"),
    (r"attention\.self\.value\.(\w+)", "self_attn.v_proj"),
    (r"attention\.output\.dense\.(\w+)", "self_attn.o_proj"),
    (r"attention\.output\.LayerNorm\.(\w+)", "self_attn_layer_norm"),
    (r"intermediate\.dense\.(\w+)", "fc1"),
    (r"output\.dense\.(\w+)", "fc2"),
    (r"output\.LayerNorm\.(\w+)", "final_layer_norm"),
)

# Tensors in these checkpoints that a captioner does not use, and what they are.
_UNUSED = (
    r"av_encoder\.mlp_head\..+",  # the classification head of a fine-tuned CAV-MAE
    r"av_encoder\.(mask_token|decoder_.+)",  # the reconstruction decoder of a pretrained CAV-MAE
    r"av_encoder\.blocks_[avu]\.\d+\.norm[12](_[av])?\.\w+",  # the layer norms of a modality that a block never sees
    r"av_encoder\.norm(_[av])?\.\w+",
    r"image_encoder\..+",  # GIT's picture encoder, and the projection of its tokens
    r"textual\.visual_projection\..+",
    r"img_temperal_embedding\..+",  # GIT's frame embeddings
    r"position_ids",
)
_UNUSED_STREAM = r"av_encoder\.(blocks_{0}\..+|patch_embed_{0}\..+|pos_embed_{0}|modality_{0})"


def _rename(name: str, rules: list[tuple[str, str]]) -> str | None:
    for pattern, replacement in rules:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(replacement)
    return None


class NameTable:
    """Maps the tensors of a checkpoint with AVCap's names to the parameters of EVACap.

    The blocks of both towers use the layer norms without a suffix (CAV-MAE, AVCap). The joint blocks have three pairs:
    `_a` for `"audio_only"`, `_v` for `"video_only"`, and the pair without a suffix for a sequence of both modalities,
    such as EVACap's fused sequence (ours). With `"late_concat"` the joint blocks of each stream begin as those of the
    checkpoint, with the norms of the stream (ours). A decoder with `text_fusion="adaptive"` reads both streams apart, so it has no
    use for joint blocks, and its two attentions begin as the one of the checkpoint (ours).

    Args:
        fusion_type (`str`), text_fusion (`str`, *optional*, defaults to `"prefix"`): Of the [`EVACapConfig`] to fill.
    """

    def __init__(self, fusion_type: str, text_fusion: str = "prefix"):
        self.is_adaptive = text_fusion == "adaptive"
        self.is_late = fusion_type == "late_concat"
        joints = [("joint", {"audio_only": "_a", "late_concat": "_a", "video_only": "_v"}.get(fusion_type, ""))]
        joints += [("video_joint", "_v")] if self.is_late else []
        streams = {"video_only": "v", "audio_only": "a"}.get(fusion_type, "av")
        self.rules = [
            (rf"av_encoder\.norm{pair}\.(\w+)", rf"model.encoder.{joint}.layernorm.\1") for joint, pair in joints
        ]
        stacks = [] if self.is_adaptive else [("u", *joint) for joint in joints]
        for stream, tower in (("a", "audio_tower"), ("v", "video_tower")):
            if stream not in streams:
                continue
            stacks.append((stream, tower, ""))
            embeddings = f"model.encoder.{tower}.embeddings"
            self.rules += [
                (rf"av_encoder\.patch_embed_{stream}\.proj\.(\w+)", rf"{embeddings}.patch_embeddings.\1"),
                (rf"av_encoder\.pos_embed_{stream}", f"{embeddings}.position_embeddings"),
                (rf"av_encoder\.modality_{stream}", f"{embeddings}.modality_embedding"),
            ]
        for letter, stack, norms in stacks:
            self.rules += [
                (
                    rf"av_encoder\.blocks_{letter}\.(\d+)\." + source.format(pair=norms),
                    rf"model.encoder.{stack}.layers.\1.{target}.\2",
                )
                for source, target in _BLOCK
            ]
        self.rules += [(r"textual\." + source, target) for source, target in _DECODER]
        self.rules += [
            (r"textual\.transformer\.encoder\.layer\.(\d+)\." + source, rf"model.decoder.layers.\1.{target}.\2")
            for source, target in _DECODER_LAYER
        ]
        self.unused = [*_UNUSED, *(_UNUSED_STREAM.format(stream) for stream in "av" if stream not in streams)]
        if self.is_adaptive:
            self.unused.append(r"av_encoder\.blocks_u\..+")

    def target(self, name: str) -> str | None:
        """The parameter for the tensor `name` (`….self_attn.qkv.…` stands for three), or `None`."""
        return _rename(name, self.rules)

    def twin(self, parameter: str) -> str | None:
        """The second parameter that begins with the tensor of `parameter`, or `None`."""
        if self.is_late:
            match = re.fullmatch(r"(model\.encoder\.)(joint\.layers\.\d+\.(?:self_attn|mlp)\..*)", parameter)
            return match and f"{match[1]}video_{match[2]}"
        match = re.fullmatch(r"(model\.decoder\.layers\.\d+\.)self(_attn.*)", parameter)
        return f"{match[1]}encoder{match[2]}" if match and self.is_adaptive else None

    def is_known_unused(self, name: str) -> bool:
        """Whether `name` is a known tensor of these checkpoints that a captioner does not use."""
        return any(re.fullmatch(pattern, name) for pattern in self.unused)


def git_names_to_avcap(state: dict) -> dict:
    """A GIT state dict from Transformers with AVCap's names; unknown names stay unchanged."""
    return {_rename(name, _TRANSFORMERS_GIT) or name: tensor for name, tensor in state.items()}

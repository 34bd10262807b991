"""`evacap import-weights`: published weights to a model folder with its processor."""

import argparse
import os
from pathlib import Path
from typing import Any

from transformers import BertTokenizer, set_seed

from ..model_card import TRAINING_FILE
from ..modeling_evacap.configuration_evacap import EVACapConfig
from ..modeling_evacap.import_weights import VIDEO_EMBEDDINGS, ImportReport, model_from_weights, module_of
from ..modeling_evacap.language_model_evacap import EVACapForCausalLM
from ..modeling_evacap.language_model_weights import encoder_from_weights, with_language_model
from ..modeling_evacap.presets import PRESETS
from ..processing.model_processor import default_template, load_language_tokenizer, load_tokenizer, make_processor
from ..processing.processing_evacap import CLIP_TOKEN, EVACapProcessor
from ..training.files import whole_folder, write_json
from ..training.terminal import printable


BERT_TOKENIZER = "google-bert/bert-base-uncased"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sources = parser.add_argument_group("weights", "either AVCap's, or CAV-MAE's, GIT's or both; or CED's and CLIP's")
    sources.add_argument("--avcap", metavar="FILE", help="a captioner of AVCap (.pth, .pt or .safetensors)")
    sources.add_argument("--cav-mae", metavar="FILE", help="a pretrained or fine-tuned CAV-MAE, for the encoder")
    sources.add_argument(
        "--git", metavar="NAME_OR_FOLDER", help="a GIT for Transformers, or GIT's original model.pt, for the decoder"
    )
    sources.add_argument(
        "--language-model",
        metavar="NAME_OR_FOLDER",
        help="any causal language model for Transformers as the decoder, behind CED and CLIP, CAV-MAE or AVCap",
    )
    sources.add_argument("--ced", metavar="FOLDER", help="a downloaded CED for Transformers, for the audio tower")
    sources.add_argument("--clip", metavar="NAME_OR_FOLDER", help="a CLIP for Transformers, for the video tower")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="the model folder to write")
    parser.add_argument(
        "--as",
        dest="preset",
        choices=PRESETS,
        help="the variant to make (default: lavcap with --language-model, avcap with --avcap, otherwise evacap)",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="NAME_OR_FOLDER",
        help="a BERT tokenizer, or a folder with its vocab.txt (default: "
        f"{BERT_TOKENIZER}); with --language-model its own",
    )
    parser.add_argument(
        "--prompt-template",
        metavar="TEXT",
        help="what a language model reads, with {clip} and {prompt}, or 'chat' (default: its chat template, or LAVCap's)",
    )
    parser.add_argument("--prompt", metavar="TEXT", help="the instruction (default: Please describe the audio.)")
    sizes = parser.add_argument_group("sizes", "sizes that the tensors may not show")
    sizes.add_argument(
        "--num-attention-heads",
        type=int,
        metavar="N",
        help="heads of towers and decoder (default: 12 for a width of 768)",
    )
    sizes.add_argument("--num-mel-bins", type=int, metavar="N", help="mel bins of the filterbank (default: 128)")
    sizes.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="height and width of a frame (default: 224 if the weights fit)",
    )
    sizes.add_argument(
        "--num-frames",
        type=int,
        metavar="N",
        help="frames of a clip, for weights trained on single pictures (default: 18)",
    )
    parser.add_argument(
        "--video-embedding",
        choices=VIDEO_EMBEDDINGS,
        default="inflate",
        help="embedding of clips from one of single pictures: inflate, so that a still gives the same tokens, or fresh, "
        "as in AVCap (default: %(default)s)",
    )
    parser.add_argument(
        "--allow-missing",
        action="append",
        default=[],
        metavar="PATTERN",
        help="shell pattern of parameters that the files may lack, and of unknown tensors to ignore; repeatable",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of new weights (default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    options = {name: value for name, value in vars(arguments).items() if name != "command"}
    report = import_weights(**options)
    # Names of tensors are those of the file.
    print("\n".join(map(printable, str(report).split("\n"))))
    print(printable(f"wrote {arguments.output}"))
    if report.new:
        print("Some weights are fresh: train before you caption.")
    else:
        print(f"Caption with it: evacap caption --model {arguments.output} CLIP")


def import_weights(
    output: str | os.PathLike,
    *,
    tokenizer: str | os.PathLike | None = None,
    seed: int = 0,
    language_model: str | os.PathLike | None = None,
    prompt_template: str | None = None,
    prompt: str | None = None,
    **sources: Any,
) -> ImportReport:
    """Writes a model folder from published weights, with the processor of its variant.

    Args:
        output (`str` or `os.PathLike`): The folder, which must not exist. It appears when it is complete.
        tokenizer (`str` or `os.PathLike`, *optional*): A BERT tokenizer on the Hub, or a folder with at least `vocab.txt`;
            with a language model another tokenizer of it.
        seed (`int`, defaults to 0): Seed of the weights that are initialised at random.
        language_model (`str` or `os.PathLike`, *optional*): A causal language model as decoder, see
            [`with_language_model`].
        prompt_template (`str`, *optional*), prompt (`str`, *optional*): See [`EVACapProcessor`]; by default the chat template
            of its tokenizer, or LAVCap's prompt.
        sources: `avcap`, `cav_mae`, `git`, `preset` and the other arguments of [`model_from_weights`]; with a language model
            those of [`encoder_from_weights`].

    Returns:
        An [`ImportReport`] on every tensor.

    Raises:
        FileNotFoundError: If a file or the tokenizer does not exist.
        FileExistsError: If `output` exists.
        ValueError: If the weights do not fit, see [`model_from_weights`], or if the tokenizer is not the decoder's.
    """
    output = Path(output)
    if output.exists():
        raise FileExistsError(f"{output}: it exists already. Give a new folder, or remove it first.")
    set_seed(seed)
    if language_model is not None:
        prompts = {"prompt_template": prompt_template, "prompt": prompt}
        model, processor, report = _with_language_model(language_model, tokenizer, prompts, sources)
    else:
        used = {"ced": sources.pop("ced", None), "clip": sources.pop("clip", None)}
        used |= {"prompt_template": prompt_template, "prompt": prompt}
        if any(value is not None for value in used.values()):
            names = ", ".join(f"`{name}`" for name, value in used.items() if value is not None)
            raise ValueError(f"{names}: only with a `language_model` as decoder.")
        tokenizer = BERT_TOKENIZER if tokenizer is None else tokenizer
        text = load_tokenizer(tokenizer)
        set_seed(seed)
        model, report = model_from_weights(**sources)
        preset = sources.get("preset") or ("evacap" if sources.get("avcap") is None else "avcap")
        _check_tokenizer(text, tokenizer, model.config)
        processor = make_processor(model.config, PRESETS[preset].processing, text)

    with whole_folder(output) as partial:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        write_json(
            partial / TRAINING_FILE,
            {"data": _origin(report, sources | {"language_model": language_model}), "datasets": []},
        )
    return report


def _with_language_model(
    name: str | os.PathLike,
    tokenizer: str | os.PathLike | None,
    prompts: dict[str, str | None],
    sources: dict[str, Any],
) -> tuple[EVACapForCausalLM, EVACapProcessor, ImportReport]:
    """The captioner with a language model, its processor, and the report."""
    encoder, report = encoder_from_weights(**sources)
    text = load_language_tokenizer(name if tokenizer is None else tokenizer)
    prompts = {"prompt_template": default_template(text)} | {key: value for key, value in prompts.items() if value}
    preset = PRESETS[sources.get("preset") or "lavcap"]
    processor = make_processor(encoder.config, preset.processing, text, **prompts)
    clip = text.convert_tokens_to_ids(CLIP_TOKEN)
    # Its loss is the cross-entropy of the caption (LAVCap).
    model = with_language_model(encoder, name, processor.prompt_ids(), clip, label_smoothing=0.0)
    report.loaded += [key for key, _ in model.named_parameters() if key.startswith("language_model.")]
    report.new += [key for key, _ in model.named_parameters() if key.startswith("multi_modal_projector.")]
    report.parameters = model.num_parameters()
    return model, processor, report


def _check_tokenizer(tokenizer: BertTokenizer, name: str | os.PathLike, config: EVACapConfig) -> None:
    text = config.text_config
    expected = {"[PAD]": text.pad_token_id, "[CLS]": text.bos_token_id, "[SEP]": text.eos_token_id}
    found = {token: tokenizer.convert_tokens_to_ids(token) for token in expected}
    if found != expected or len(tokenizer) > text.vocab_size:
        raise ValueError(
            f"{name}: not this decoder's tokenizer: it has {len(tokenizer)} entries with {found}, but "
            f"{text.vocab_size} with {expected} were expected."
        )


def _origin(report: ImportReport, sources: dict[str, Any]) -> str:
    """The sentence of the model card on the origin of the weights."""
    titles = {
        "avcap": "AVCap",
        "cav_mae": "CAV-MAE",
        "git": "GIT",
        "ced": "CED",
        "clip": "CLIP",
        "language_model": "language model",
    }
    given = [
        f"{title} (`{Path(sources[name]).name}`)" for name, title in titles.items() if sources.get(name) is not None
    ]
    fresh = sorted({module_of(name) for name in report.new})
    rest = f", with fresh weights in {', '.join(f'`{module}`' for module in fresh)}" if fresh else ""
    return f"Imported from {' and '.join(given)}{rest}. Not trained any further here."

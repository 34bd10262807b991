"""`evacap import-weights`: published weights to a model folder with its processor."""

import argparse
import os
from pathlib import Path
from typing import Any

from transformers import BertTokenizer, set_seed

from ..model_card import TRAINING_FILE
from ..modeling_evacap.configuration_evacap import EVACapConfig
from ..modeling_evacap.import_weights import VIDEO_EMBEDDINGS, ImportReport, model_from_weights, module_of
from ..modeling_evacap.presets import PRESETS
from ..processing.model_processor import load_tokenizer, make_processor
from ..training.files import whole_folder, write_json
from ..training.terminal import printable


BERT_TOKENIZER = "google-bert/bert-base-uncased"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sources = parser.add_argument_group("weights", "either AVCap's, or CAV-MAE's, GIT's or both")
    sources.add_argument("--avcap", metavar="FILE", help="a captioner of AVCap (.pth, .pt or .safetensors)")
    sources.add_argument("--cav-mae", metavar="FILE", help="a pretrained or fine-tuned CAV-MAE, for the encoder")
    sources.add_argument(
        "--git", metavar="NAME_OR_FOLDER", help="a GIT for Transformers, or GIT's original model.pt, for the decoder"
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="the model folder to write")
    parser.add_argument(
        "--as",
        dest="preset",
        choices=PRESETS,
        help="the variant to make (default: avcap with --avcap, otherwise evacap)",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="NAME_OR_FOLDER",
        default=BERT_TOKENIZER,
        help="a BERT tokenizer, or a folder with its vocab.txt (default: %(default)s)",
    )
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
    output: str | os.PathLike, *, tokenizer: str | os.PathLike = BERT_TOKENIZER, seed: int = 0, **sources: Any
) -> ImportReport:
    """Writes a model folder from published weights, with the processor of its variant.

    Args:
        output (`str` or `os.PathLike`): The folder, which must not exist. It appears when it is complete.
        tokenizer (`str` or `os.PathLike`): A BERT tokenizer on the Hub, or a folder with at least `vocab.txt`.
        seed (`int`, defaults to 0): Seed of the weights that are initialised at random.
        sources: `avcap`, `cav_mae`, `git`, `preset` and the other arguments of [`model_from_weights`].

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
    text = load_tokenizer(tokenizer)
    set_seed(seed)
    model, report = model_from_weights(**sources)
    preset = sources.get("preset") or ("evacap" if sources.get("avcap") is None else "avcap")
    _check_tokenizer(text, tokenizer, model.config)
    processor = make_processor(model.config, PRESETS[preset].processing, text)

    with whole_folder(output) as partial:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        write_json(partial / TRAINING_FILE, {"data": _origin(report, sources), "datasets": []})
    return report


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
    titles = {"avcap": "AVCap", "cav_mae": "CAV-MAE", "git": "GIT"}
    given = [
        f"{title} (`{Path(sources[name]).name}`)" for name, title in titles.items() if sources.get(name) is not None
    ]
    fresh = sorted({module_of(name) for name in report.new})
    rest = f", with fresh weights in {', '.join(f'`{module}`' for module in fresh)}" if fresh else ""
    return f"Imported from {' and '.join(given)}{rest}. Not trained any further here."

"""The processor of a model, and its tokenizer."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import AddedToken, AutoTokenizer, BertTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from .feature_extraction_evacap import EVACapFeatureExtractor
from .processing_evacap import CHAT, CLIP_TOKEN, EVACapProcessor
from .video_processing_evacap import EVACapVideoProcessor


LAVCAP_PROMPT = "USER: <Speech>{clip}</Speech> {prompt}\nASSISTANT:"
"""The prompt of LAVCap around Llama 2."""

CLIP_NORMALISATION = {"image_mean": OPENAI_CLIP_MEAN, "image_std": OPENAI_CLIP_STD}

FUSION_MODALITIES = {"audio_only": "audio", "video_only": "video"}
"""The stream that a processor takes, by `fusion_type`; the others take both."""


def make_processor(
    config: PreTrainedConfig, processing: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, **prompt: str
) -> EVACapProcessor:
    """The processor of a model.

    Args:
        config ([`EVACapConfig`]): The configuration of the model, for its sizes.
        processing (`Mapping`): Options of the feature extractor, such as `window_type`, `channels` and
            `frame_shift_ms`, and `frame_sampling` and `fps` of the video processor, such as a preset's `processing`.
        tokenizer ([`PreTrainedTokenizerBase`]): The tokenizer of its decoder.
        prompt: `prompt_template` and `prompt`, for a language model.
    """
    audio, video = config.audio_config, config.video_config
    sampling = {name: processing[name] for name in ("frame_sampling", "fps") if name in processing}
    return EVACapProcessor(
        EVACapFeatureExtractor(
            feature_size=audio.num_mel_bins,
            max_frames=audio.max_frames,
            **{name: value for name, value in processing.items() if name not in sampling},
        ),
        EVACapVideoProcessor(
            num_frames=video.num_frames,
            tubelet_size=video.tubelet_size,
            size={"shortest_edge": video.image_size},
            crop_size={"height": video.image_size, "width": video.image_size},
            **(CLIP_NORMALISATION if video.model_type == "clip_vision_model" else {}),
            **sampling,
        ),
        tokenizer,
        modalities=FUSION_MODALITIES.get(config.fusion_type, "audio_video"),
        **prompt,
    )


def load_language_tokenizer(name: str | os.PathLike) -> PreTrainedTokenizerBase:
    """The tokenizer of a language model, with `CLIP_TOKEN` as one more special token, and a token to pad with.

    Raises:
        ValueError: If it cannot be loaded.
    """
    with loading(name):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    tokenizer.add_tokens([AddedToken(CLIP_TOKEN, special=True)], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def default_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template where the tokenizer has one, and else LAVCap's prompt."""
    return CHAT if tokenizer.chat_template else LAVCAP_PROMPT


_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


@contextmanager
def loading(name: str | os.PathLike) -> Iterator[None]:
    """Turns every error within it into a `ValueError` that the model `name` cannot be loaded.

    For a damaged file, the libraries raise errors without a common type.

    Raises:
        FileNotFoundError: If `name` is neither a folder nor a possible name on the Hub. Nothing is tried then.
        ValueError: If the model cannot be loaded.
    """
    is_folder = os.path.isdir(name)
    if os.path.exists(name) and not is_folder:
        raise ValueError(f"{name} is a file. Give the model folder, with config.json and the weights.")
    if not is_folder and not _HUB_NAME.fullmatch(os.fspath(name)):
        raise FileNotFoundError(f"{name}: there is no such model folder; check the path")
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except (ValueError, OSError) as error:
        where = "" if is_folder else " (there is no such folder here, so it is a name on the Hub)"
        raise ValueError(f"{name} cannot be loaded{where}: {error}") from error
    except Exception as error:
        raise ValueError(
            f"{name} cannot be loaded ({type(error).__name__}: {error}): a file of it is damaged, or not what "
            "`save_pretrained` writes. Save the model again, or download it again."
        ) from error


def load_processor(name: str | os.PathLike) -> EVACapProcessor:
    """The processor of a model folder or of a model of the Hub, without running code of theirs or asking to do so.

    Raises:
        ValueError: If it cannot be loaded.
    """
    with loading(name):
        return EVACapProcessor.from_pretrained(name, trust_remote_code=False)


def load_tokenizer(name: str | os.PathLike) -> BertTokenizer:
    """A BERT tokenizer of the Hub, or of a folder that holds at least `vocab.txt`.

    Raises:
        FileNotFoundError: If there is none.
    """
    try:
        tokenizer = BertTokenizer.from_pretrained(name)
        # Where there is no vocabulary, Transformers makes one of the special tokens alone.
        if len(tokenizer) > len(tokenizer.all_special_ids):
            return tokenizer
    except (OSError, ValueError):
        pass
    raise FileNotFoundError(
        f"{name}: there is no BERT tokenizer that can be loaded now. Go online, or give a folder that holds the vocab.txt of "
        "bert-base-uncased."
    )

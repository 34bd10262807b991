"""How far a decoder with `text_fusion="adaptive"` trusts the picture, for words that the picture or the sound tells (ours).

python -m evacap.training.study.word_confidence MODEL
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ...processing.captioning_evacap import caption_batch, require_confidence, words_with_confidence
from ..data.collator import EVACapDataCollator
from ..evaluation.captioner import choose_videos, list_clips
from ..metrics.bootstrap import Statistic, draw, interval, ratio, roc_auc
from ..procedural.captions import names_in_caption
from ..procedural.dataset import ProceduralClips
from ..procedural.kinds import SOUND_ALIKES
from .judge import load_captioner, print_judgement


WORDS: dict[str, Callable[[str], bool]] = {
    "all": lambda word: True,
    "picture": lambda word: bool(names_in_caption(word) & SOUND_ALIKES),
    "sound": lambda word: bool(names_in_caption(word) - SOUND_ALIKES),
    "other": lambda word: not names_in_caption(word),
}
"""Groups of words: all; the names of sound-alikes, which only the picture tells; the names that the sound tells, among them
the words for both of a pair; words that name nothing."""
Words = Sequence[Sequence[Mapping[str, Any]]]
"""The words of each clip, as in [`CaptionedBatch`]."""


@torch.no_grad()
def judge_confidence(
    checkpoint: str | os.PathLike,
    num_clips: int = 500,
    seed: int = 0,
    batch_size: int = 50,
    num_beams: int = 4,
    num_workers: int = 0,
) -> dict[str, Any]:
    """Measures the confidence in the picture with own videos, with those of other clips, and without any.

    Args:
        checkpoint (`str` or `os.PathLike`): A captioner with `text_fusion="adaptive"`.
        num_clips (`int`), seed (`int`): Of the procedural test clips, and of the choice of the swapped videos, which are those
            of [`evaluate`] at a share of 100 %.
        batch_size (`int`), num_beams (`int`), num_workers (`int`): Clips of a batch, beams, and processes that make the clips.

    Returns:
        What [`describe_words`] tells of the `captions` of the model, whose words depend on the picture; and of the first
        `references`, whose words stay the same.

    Raises:
        ValueError: If the captioner has no confidence.
    """
    model, processor = load_captioner(checkpoint, require_confidence)
    device = model.device
    clips = ProceduralClips(processor, num_clips, "test", seed)
    loader = DataLoader(clips, batch_size, collate_fn=EVACapDataCollator(p_mix=0.0), num_workers=num_workers)
    batches = list(tqdm(loader, desc="clips", unit="batch"))
    pictures = torch.cat([batch["pixel_values_videos"] for batch in batches])
    others = torch.tensor(choose_videos(list_clips(clips), 1.0, seed))
    shown = {"own": pictures, "swapped": pictures[others], "none": None}
    words: dict[str, dict[str, list]] = {kind: {place: [] for place in shown} for kind in ("captions", "references")}
    for place, videos in shown.items():
        for number, batch in enumerate(tqdm(batches, desc=f"videos: {place}", unit="batch")):
            inputs = {"input_features": batch["input_features"].to(device)}
            if videos is not None:
                inputs["pixel_values_videos"] = videos[number * batch_size :][:batch_size].to(device)
            captioned = caption_batch(model, processor, inputs, return_confidence=True, num_beams=num_beams)
            words["captions"][place] += [sequences[0] for sequences in captioned.words]
            labels = batch["labels"].to(device)
            confidence = model(**inputs, labels=labels).confidence
            ids = labels.masked_fill(labels == -100, processor.tokenizer.pad_token_id)
            pairs = zip(ids.tolist(), confidence.tolist(), strict=True)
            words["references"][place] += [words_with_confidence(processor.tokenizer, *pair) for pair in pairs]
    return {kind: describe_words(clips_by_place) for kind, clips_by_place in words.items()}


def describe_words(words: Mapping[str, Words]) -> dict[str, Any]:
    """The mean confidence by group of words, and whether that in the picture tells own videos from others'.

    Args:
        words (`Mapping[str, Words]`): The words of the clips with their `own` videos, with `swapped` ones, and in any other
            setting.

    Returns:
        * for each setting and each group of `WORDS` the number of `words`, and the mean confidence in `video` and `audio`;
        * `fall`: for each group, how far that in the video falls from own to swapped videos;
        * `auc`: the area under the ROC curve of a caption's mean confidence in the video, own against swapped.

        A figure is a `value` with the `interval` of 95 % over the clips.
    """
    draws = draw(len(words["own"]))
    figures: dict[str, Any] = {place: {} for place in words} | {"fall": {}}
    for group, belongs in WORDS.items():
        chosen = {
            place: [[word for word in clip if belongs(word["word"])] for clip in clips]
            for place, clips in words.items()
        }
        means = {
            (place, stream): _mean(clips, stream) for place, clips in chosen.items() for stream in ("video", "audio")
        }
        for place, clips in chosen.items():
            figures[place][group] = {"words": sum(map(len, clips))}
            for stream in ("video", "audio"):
                mean = means[place, stream]
                figures[place][group][stream] = {"value": mean.value, "interval": interval(mean.resampled(draws))}
        own, swapped = means["own", "video"], means["swapped", "video"]
        falls = own.resampled(draws) - swapped.resampled(draws)
        figures["fall"][group] = {"value": own.value - swapped.value, "interval": interval(falls)}
    # Of the clips whose captions have words in both settings.
    both = [n for n, pair in enumerate(zip(words["own"], words["swapped"])) if all(pair)]
    own, swapped = (
        np.array([np.mean([word["video"] for word in words[place][n]]) for n in both]) for place in ("own", "swapped")
    )
    areas = roc_auc(own, swapped, draws[:, both])
    figures["auc"] = {"value": roc_auc(own, swapped), "interval": interval(areas)}
    return figures


def _mean(clips: Words, stream: str) -> Statistic:
    return ratio([sum(word[stream] for word in clip) for clip in clips], [len(clip) for clip in clips])


def main(arguments: list[str] | None = None) -> None:
    description = "Measures how far the words of a captioner trust the picture: its own, another clip's, or none."
    print_judgement(judge_confidence, "word_confidence", description, "text_fusion='adaptive'", arguments)


if __name__ == "__main__":
    main()

"""The report of an evaluation: JSON, Markdown tables, plots, and what the model cards need."""

import os
from pathlib import Path

from ..files import write_json, write_text
from .captioner import MakeClips
from .evaluate import card
from .plots import has_matplotlib, make_plots, make_sample_plots, save_figure
from .tables import Evaluation, as_markdown


PLOT_SUFFIXES = (".png", ".pdf")


def write_report(
    evaluation: Evaluation, output: str | os.PathLike, make_clips: MakeClips | None = None, samples: int = 3
) -> list[Path]:
    """Writes `evaluation.json` with everything, `evaluation.md`, the plots as PNG and PDF, and the model cards' results.

    The results of each checkpoint go to `cards/NAME/evaluation.json`; its model card reads that file from the model
    folder.

    Args:
        evaluation (`Mapping`): The result of [`evaluate`].
        output (`str` or `os.PathLike`): The folder.
        make_clips (`MakeClips`, *optional*): Makes the evaluated clips, for the plots of sample clips.
        samples (`int`, *optional*, defaults to 3): Number of sample clips: the first ones with a swapped video.

    Returns:
        `list[Path]`: The files. Without Matplotlib there are no plots.
    """
    output = Path(output)
    files = [output / "evaluation.json", output / "evaluation.md"]
    write_json(files[0], evaluation, indent=1)
    for name, entry in evaluation["checkpoints"].items():
        path = output / "cards" / name.replace("/", "-") / "evaluation.json"
        write_json(path, card(entry, evaluation["dataset"], evaluation["dataset_id"]))
        files.append(path)
    figures = {}
    if has_matplotlib():
        figures = make_plots(evaluation)
        if make_clips is not None:
            figures |= make_sample_plots(evaluation, make_clips, samples)
    for name, figure in figures.items():
        for suffix in PLOT_SUFFIXES:
            files.append(save_figure(figure, output / f"{name}{suffix}", dpi=200))
    write_text(files[1], as_markdown(evaluation, list(figures)))
    return files

"""Plots of an evaluation (curves, histograms of the gate, sample clips) and of a clip over time. They need Matplotlib."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoModel

from ...modeling_evacap.configuration_evacap import EVACapConfig
from ...processing.captioning_evacap import has_transport, time_map
from ...processing.model_processor import load_processor, loading
from ...processing.processing_evacap import EVACapProcessor
from ...processing.video_processing_evacap import EVACapVideoProcessor
from ..files import whole_file
from ..metrics.compute import METRIC_TITLES
from ..procedural.scores import COLUMNS
from .captioner import MakeClips, Pair, PairReader, list_clips
from .tables import Evaluation, Row, as_percent, format_range, list_metrics, list_rows, metric_title


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
"""The colours of Okabe and Ito, which colour-blind readers can tell apart, darkest first."""
MARKERS = "osD^vP*X"


def has_matplotlib() -> bool:
    return find_spec("matplotlib") is not None


def save_figure(figure: "Figure", path: Path, dpi: int) -> Path:
    """Writes `figure` to `path`, in the format of its suffix. The file is complete or absent."""
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=dpi, format=path.suffix[1:])
    return path


def make_plots(evaluation: Evaluation) -> dict[str, "Figure"]:
    """The plots of an evaluation by the name of their file; plots without content are left out."""
    rows = list_rows(evaluation)
    plots = {}
    for name, field, label in (
        ("shuffle", "shuffle", "videos shuffled"),
        ("frames", "frames", "frames of the own video"),
    ):
        chosen = [row for row in rows if (row[1]["frames"] is not None) == (field == "frames")]
        places = sorted({condition[field] for _, condition in chosen})
        if len(places) < 2:
            continue
        ticks = [as_percent(place) if field == "shuffle" else str(place) for place in places]
        for suffix, names in (("", list(METRIC_TITLES)), ("_naming", list(COLUMNS))):
            present = [metric for metric in list_metrics(evaluation) if metric in names]
            if present:
                plots[f"{name}{suffix or '_metrics'}"] = _curves(chosen, field, present, label, ticks, places)
    histograms = _histograms(evaluation)
    return plots | ({"gate_histograms": histograms} if histograms else {})


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of this size in inches, which needs no display."""
    from matplotlib.figure import Figure

    return Figure((width, height), layout="constrained")


def clean_axes(axes: "Axes") -> None:
    """Removes the frame above and to the right, and makes the tick labels small."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def plot_over_time(
    windows: Iterable[Mapping[str, Any]],
    result: Mapping[str, Any],
    processor: EVACapProcessor,
    title: str,
    threshold: float | None = None,
    width: float = 11.0,
) -> "Figure":
    """A picture of a clip over time: its frames, its filterbank, and the curves of a result.

    Args:
        windows (`Iterable[Mapping]`): The windows of the clip in their order, see [`read_windows`].
        result (`Mapping`): The result of the pipeline, or what [`AudioVisualCaptioningPipeline.over_time`] returns.
            Of `agreement_by_step`, `gate` and `entropy` those that it has are drawn, entropy where there is no
            agreement; and the map of `transport`.
        processor ([`EVACapProcessor`]): The processor that made the windows.
        title (`str`): What stands above.
        threshold (`float`, *optional*): The agreement below which a picture does not belong, drawn as a line.
        width (`float`): Inches.
    """
    extractor, video = processor.feature_extractor, processor.video_processor
    pictures, banks, times, end = [], [], [], 0.0
    for window in windows:
        start, end = window["timestamp"]
        frames = round((end - start) * extractor.sampling_rate / extractor.hop_length)
        if "input_features" in window["inputs"]:
            banks.append(np.asarray(window["inputs"]["input_features"])[0, :frames])
        if "pixel_values_videos" in window["inputs"]:
            seen = _as_seen(np.asarray(window["inputs"]["pixel_values_videos"])[0], video)
            pictures += list(seen)
            times += [start + number / len(seen) * (end - start) for number in range(len(seen))]
    names = [name for name in ("agreement_by_step", "gate", "entropy") if name in result]
    if "agreement_by_step" in names:
        names = names[:2]
    maps = [part for part in result.get("transport", []) if np.size(part["map"])]
    heights = [1.2] * bool(pictures) + [1.0] * bool(banks) + [1.3] * bool(names) + [1.0] * bool(maps)
    figure = new_figure(width, 0.6 + 1.4 * sum(heights))
    panels = list(figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0])
    panels[0].set_title(title, fontsize=9, parse_math=False)
    axes = iter(panels)
    if pictures:
        strip, shown = next(axes), -(-len(pictures) // 10)
        share = end / len(pictures[::shown])
        for picture, time in zip(pictures[::shown], times[::shown]):
            strip.imshow(picture, extent=(time, time + 0.95 * share, 0, 1), aspect="auto")
        strip.set_yticks([])
    if banks:
        bank = next(axes)
        bank.imshow(np.concatenate(banks).T, origin="lower", extent=(0, end, 0, 1), aspect="auto", cmap="magma")
        bank.set_yticks([])
        bank.set_ylabel("mel", fontsize=8)
    if names:
        curves = next(axes)
        for name, color in zip(names, COLORS):
            values = np.array([np.nan if value is None else value for value in result[name]], dtype=float)
            curves.plot(result["times"], values, color=color, label=name.removesuffix("_by_step"))
        if threshold is not None and "agreement_by_step" in names:
            curves.axhline(threshold, color="0.6", linewidth=0.8, linestyle="--", label="threshold")
        curves.set_ylim(-0.02, 1.02)
        curves.legend(fontsize=8, frameon=False, ncols=3, loc="upper right")
    if maps:
        transport = next(axes)
        for part in maps:
            _draw_map(transport, part["map"], *part["timestamp"])
    panels[-1].set_xlim(0, end)
    panels[-1].set_xlabel("seconds", fontsize=8)
    for panel in panels:
        clean_axes(panel)
        panel.tick_params(labelsize=7)
    return figure


def _draw_map(axes: "Axes", plan: Any, start: float, end: float) -> None:
    """Draws the transport plan of time steps and pictures: time from left to right, the first picture below."""
    plan = np.asarray(plan).T
    axes.imshow(plan, origin="lower", extent=(start, end, 0, len(plan)), aspect="auto", cmap="viridis", vmin=0)
    axes.set_ylabel("picture", fontsize=8)


def _curves(
    rows: Sequence[Row], field: str, metrics: Sequence[str], label: str, ticks: Sequence[str], places: Sequence[float]
) -> "Figure":
    names = list(dict.fromkeys(name for name, _ in rows))
    columns = 4 if len(metrics) in (4, 7, 8) else min(3, len(metrics))
    lines = -(-len(metrics) // columns)
    figure = new_figure(2.6 * columns + 0.2, 2.0 * lines + 0.25 * -(-len(names) // 4) + 0.2)
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True).ravel()
    for axes, metric in zip(panels, metrics):
        for number, name in enumerate(names):
            points = [
                (places.index(condition[field]), condition["metrics"][metric])
                for owner, condition in rows
                if owner == name and metric in condition["metrics"]
            ]
            # Side by side, so that the intervals do not hide each other.
            shift = (number - (len(names) - 1) / 2) * min(0.12, 0.6 / len(names))
            values = np.array([point["value"] for _, point in points])
            bounds = np.array([point["interval"] or [value] * 2 for (_, point), value in zip(points, values)])
            axes.errorbar(
                [place + shift for place, _ in points],
                values,
                np.abs(bounds.T - values),
                color=COLORS[number % len(COLORS)],
                marker=MARKERS[number % len(MARKERS)],
                markersize=4,
                linewidth=1.2,
                elinewidth=0.9,
                capsize=2,
                label=name,
            )
        axes.set_title(metric_title(metric), fontsize=9)
        axes.set_xticks(range(len(ticks)), ticks)
        axes.tick_params(labelbottom=True)
        axes.grid(axis="y", color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
        clean_axes(axes)
    for axes in panels[len(metrics) :]:
        axes.set_axis_off()
    figure.supxlabel(label, fontsize=9)
    if len(names) > 1:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(names)), fontsize=8, frameon=False)
    return figure


def _histograms(evaluation: Evaluation) -> "Figure | None":
    """Gate and entropy of the clips with matched and swapped videos, at the largest share of shuffled videos."""
    chosen = []
    for name, entry in evaluation["checkpoints"].items():
        conditions = [condition for condition in entry["conditions"] if condition["frames"] is None]
        last = max(conditions, key=lambda condition: condition["shuffle"])
        if last["gate"] and last["gate"]["swapped"] is not None:
            chosen.append((name, conditions[0], last))
    if not chosen:
        return None
    figure = new_figure(2.9 * len(chosen) + 0.3, 4.2)
    panels = figure.subplots(2, len(chosen), squeeze=False, sharey="row")
    for line, curve in enumerate(("gate", "entropy")):
        for axes, (name, own, last) in zip(panels[line], chosen):
            swapped = [clip["video"] not in (None, clip["id"]) for clip in last["clips"]]
            before, after = (
                [clip[curve] for clip, is_swapped in zip(condition["clips"], swapped) if is_swapped]
                for condition in (own, last)
            )
            low, high = min(before + after), max(before + after)
            margin = max(0.02 * (high - low), 1e-3)
            bins = np.linspace(low - margin, high + margin, 25)
            for values, title, color in ((before, "own video", COLORS[0]), (after, "another's video", COLORS[1])):
                axes.hist(
                    values,
                    bins,
                    histtype="stepfilled",
                    facecolor=(color, 0.35),
                    edgecolor=color,
                    linewidth=1.2,
                    label=title,
                )
            area = last[curve]["auc"]
            bounds = "" if area["interval"] is None else f" ({format_range(area['interval'], 2)})"
            heading = f"{name}\n" if line == 0 else ""
            axes.set_title(f"{heading}AUC {area['value']:.2f}{bounds}", fontsize=9)
            axes.set_xlabel(f"mean {'gate' if curve == 'gate' else 'attention entropy'} of a clip", fontsize=9)
            clean_axes(axes)
        panels[line][0].set_ylabel("clips", fontsize=9)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def make_sample_plots(evaluation: Evaluation, make_clips: MakeClips, samples: int = 3) -> dict[str, "Figure"]:
    """Plots of the first clips with a swapped video, by the name of their file.

    A plot shows both videos, the filterbank, and gate and entropy over time of every checkpoint with a gate, or the
    transport plans of every checkpoint with optimal transport. Without such checkpoints there are none.

    Args:
        evaluation (`Mapping`): The result of [`evaluate`].
        make_clips (`MakeClips`): Makes the evaluated clips.
        samples (`int`): Number of clips.
    """
    gated = {
        name: entry for name, entry in evaluation["checkpoints"].items() if entry["conditions"][0]["gate"] is not None
    }
    figures = {}
    if gated:
        first = next(iter(gated.values()))
        last, swapped = _swapped(first)
        processor = load_processor(first["checkpoint"])
        read = PairReader(processor, make_clips)
        ids = [clip.id for clip in list_clips(make_clips(processor), evaluation["clips"])]
        for number, place in enumerate(swapped[:samples], start=1):
            figures[f"sample_{number}"] = _sample(evaluation, gated, last["shuffle"], place, ids, read, processor)
    plans = {}
    for name, entry in evaluation["checkpoints"].items():
        with loading(entry["checkpoint"]):
            config = EVACapConfig.from_pretrained(entry["checkpoint"])
        if has_transport(config):
            plans[name] = _read_plans(entry, make_clips, evaluation["clips"], samples)
    for number, sample in enumerate(zip(*plans.values()), start=1):
        figures[f"transport_{number}"] = _transport_sample(dict(zip(plans, sample)))
    return figures


def _swapped(entry: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[int]]:
    """The condition of a checkpoint with most swapped videos, and the numbers of the clips that have one."""
    last = max((c for c in entry["conditions"] if c["frames"] is None), key=lambda condition: condition["shuffle"])
    return last, [place for place, clip in enumerate(last["clips"]) if clip["video"] not in (None, clip["id"])]


@dataclass(frozen=True)
class _Plans:
    """The transport plans (steps, pictures) of a sound with its own and with another video, and the names of both clips."""

    clip: str
    video: str
    seconds: float
    own: np.ndarray
    other: np.ndarray


@torch.no_grad()
def _read_plans(entry: Mapping[str, Any], make_clips: MakeClips, num_clips: int, samples: int) -> list[_Plans]:
    """Runs the encoder of a checkpoint with optimal transport on its first clips with a swapped video."""
    last, swapped = _swapped(entry)
    processor = load_processor(entry["checkpoint"])
    read = PairReader(processor, make_clips)
    ids = [clip.id for clip in list_clips(make_clips(processor), num_clips)]
    with loading(entry["checkpoint"]):
        model = AutoModel.from_pretrained(entry["checkpoint"], trust_remote_code=False).eval()
    plans = []
    for place in swapped[:samples]:
        video = last["clips"][place]["video"]
        features = [read(Pair(place, number, None)) for number in (place, ids.index(video))]
        batches = [{name: torch.as_tensor(value)[None] for name, value in pair.items()} for pair in features]
        encoded = [model.get_encoder()(**batch) for batch in batches]
        maps = [time_map(model.config, output.transport_map)[0].float().numpy() for output in encoded]
        plans.append(_Plans(ids[place], video, processor.window_seconds, *maps))
    return plans


def _transport_sample(plans: Mapping[str, _Plans]) -> "Figure":
    figure = new_figure(7.0, 0.4 + 1.9 * len(plans))
    panels = figure.subplots(len(plans), 2, squeeze=False, sharex=True)
    for row, (name, plan) in zip(panels, plans.items()):
        for axes, values, title in zip(
            row, (plan.own, plan.other), ("own video", f"another's video ({plan.video})"), strict=True
        ):
            _draw_map(axes, values, 0.0, plan.seconds)
            axes.set_title(f"{name}, {plan.clip}: {title}", fontsize=8)
            axes.tick_params(labelsize=7)
    for axes in panels[-1]:
        axes.set_xlabel("time of the sound (s)", fontsize=8)
    return figure


def _sample(
    evaluation: Evaluation,
    gated: Mapping[str, Any],
    shuffle: float,
    place: int,
    ids: Sequence[str],
    read: PairReader,
    processor: EVACapProcessor,
) -> "Figure":
    said = {}
    for name, entry in gated.items():
        by_share = {c["shuffle"]: c["clips"][place] for c in entry["conditions"] if c["frames"] is None}
        said[name] = (by_share[0.0], by_share[shuffle])
    own, other = next(iter(said.values()))
    video = ids.index(other["video"])
    features = read(Pair(place, place, None)), read(Pair(place, video, None))
    extractor = processor.feature_extractor
    filterbank = np.asarray(features[0]["input_features"]).T
    seconds = filterbank.shape[1] * extractor.hop_length / extractor.sampling_rate
    captions = [f"Reference: {evaluation['references'][own['id']][0]}"]
    for name, pair in said.items():
        captions += [f"{name}, own video: {pair[0]['caption']}", f"{name}, another's video: {pair[1]['caption']}"]
    captions = [line for text in captions for line in textwrap.wrap(text, 105, subsequent_indent="    ")]

    strips = [_strip(np.asarray(feature["pixel_values_videos"]), processor) for feature in features]
    width = 7.0
    strip_height = 0.95 * width * strips[0].shape[0] / strips[0].shape[1]
    heights = [strip_height, strip_height, 1.3, 1.2, 1.2, 0.17 * len(captions)]
    figure = new_figure(width, sum(heights) + 1.5)
    panels = figure.subplots(len(heights), 1, height_ratios=heights)
    titles = ("own video", f"another's video ({other['video']})")
    for axes, strip, title in zip(panels, strips, titles):
        axes.imshow(strip, aspect="equal", interpolation="nearest")
        axes.set_anchor("W")
        axes.set_title(title, fontsize=8, loc="left", pad=2)
        axes.set_axis_off()
    axes = panels[2]
    axes.imshow(
        filterbank,
        aspect="auto",
        origin="lower",
        cmap="magma",
        extent=(0, seconds, 0, len(filterbank)),
        rasterized=True,
    )
    axes.set_ylabel("mel bin", fontsize=8)
    axes.set_title(f"{own['id']}: filterbank", fontsize=8, loc="left", pad=2)
    axes.tick_params(labelsize=7, labelbottom=False)
    for axes, curve in zip(panels[3:5], ("gate", "entropy")):
        for number, (name, pair) in enumerate(said.items()):
            for clip, style, title in zip(pair, ("-", "--"), ("own video", "another's video")):
                values = clip[f"{curve}_over_time"]
                times = (np.arange(len(values)) + 0.5) * seconds / len(values)
                label = title if len(said) == 1 else f"{name}, {title}"
                color = COLORS[number % len(COLORS)] if len(said) > 1 else COLORS["-" != style]
                axes.plot(times, values, style, color=color, linewidth=1.3, marker=".", markersize=4, label=label)
        axes.set_xlim(0, seconds)
        axes.set_ylabel(curve, fontsize=8)
        axes.grid(color="0.92", linewidth=0.6)
        clean_axes(axes)
        axes.tick_params(labelsize=7)
    panels[3].tick_params(labelbottom=False)
    panels[4].set_xlabel("time (s)", fontsize=8)
    panels[4].legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.38), ncols=2, fontsize=7, frameon=False, borderaxespad=0
    )
    panels[5].set_axis_off()
    panels[5].text(0, 0, "\n".join(captions), fontsize=8, va="bottom", linespacing=1.4, transform=panels[5].transAxes)
    return figure


def _strip(pixels: np.ndarray, processor: EVACapProcessor) -> np.ndarray:
    """The frames (F, 3, H, W) side by side, as they looked before they were normalised: (H, width, 3), 0 to 1."""
    frames = _as_seen(pixels, processor.video_processor)
    # More than a row of nine is too small to see.
    frames = frames[np.linspace(0, len(frames) - 1, min(len(frames), 9)).round().astype(int)]
    gap = np.ones((frames.shape[1], max(1, frames.shape[2] // 24), 3))
    parts = [part for frame in frames for part in (frame, gap)][:-1]
    return np.concatenate(parts, 1)


def _as_seen(pixels: np.ndarray, video: EVACapVideoProcessor) -> np.ndarray:
    """Frames (F, 3, H, W) as they looked before they were normalised: (F, H, W, 3), 0 to 1."""
    return (pixels.transpose(0, 2, 3, 1) * np.array(video.image_std) + np.array(video.image_mean)).clip(0, 1)

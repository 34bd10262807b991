"""Tables of an evaluation: for a terminal, and in Markdown in the layout of the paper's tables."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..metrics.compute import METRIC_TITLES
from ..procedural.scores import COLUMNS


Evaluation = Mapping[str, Any]
"""The result of [`evaluate`]."""
Row = tuple[str, dict[str, Any]]
"""The name of a checkpoint and one of its conditions."""


def as_text(evaluation: Evaluation) -> str:
    """The tables for a terminal: below each figure stands its interval."""
    rows = _distinct_rows(evaluation)
    names = list_metrics(evaluation)
    blocks = [[name for name in names if name in METRIC_TITLES], [name for name in names if name not in METRIC_TITLES]]
    parts = []
    for block in filter(None, blocks):
        lines = [["", "", *map(metric_title, block)]]
        for name, condition in rows:
            figures = [condition["metrics"].get(metric, {}) for metric in block]
            setting = "" if _from_files(evaluation) else _setting(condition)
            lines.append([name, setting, *(_number(figure.get("value")) for figure in figures)])
            lines.append(["", "", *(format_range(figure.get("interval")) for figure in figures)])
        parts += [_align(lines), ""]
    gated = [row for row in rows if row[1]["gate"] and row[1]["gate"]["swapped"] is not None]
    if gated:
        lines = [["", "", "gate: own", "swapped", "AUC", "", "entropy: own", "swapped", "AUC", ""]]
        for name, condition in gated:
            cells = [name, _setting(condition)]
            for figures in (condition["gate"], condition["entropy"]):
                area = figures["auc"]
                cells += [_number(figures["same_clips_matched"]), _number(figures["swapped"])]
                cells += [_number(area["value"], 2), format_range(area["interval"], 2)]
            lines.append(cells)
        parts += [_align(lines), ""]
    return "\n".join([*parts, _interval_note(evaluation), *_skipped(evaluation)])


def _align(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place < 2 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    )


def as_markdown(evaluation: Evaluation, plots: Sequence[str] = ()) -> str:
    """The tables in the layout of the paper's tables, and links to the plots with these names."""
    metrics, rows = [name for name in list_metrics(evaluation) if name in METRIC_TITLES], list_rows(evaluation)
    naming = [name for name in list_metrics(evaluation) if name not in METRIC_TITLES]
    own = [row for row in rows if row[1]["shuffle"] == 0 and row[1]["frames"] is None]
    shuffles = sorted((row for row in rows if row[1]["frames"] is None), key=lambda row: row[1]["shuffle"])
    distinct = _distinct_rows(evaluation)
    shuffled = [row for row in shuffles if row[1]["shuffle"] > 0 and row in distinct]
    frames = [row for row in distinct if row[1]["frames"] is not None]
    frames.sort(key=lambda row: row[1]["frames"])
    settings = evaluation["settings"]
    parts = [f"# {evaluation['dataset']}", ""]
    facts = f"{evaluation['clips']:,} clips"
    if not _from_files(evaluation):
        facts += f", {evaluation['with_picture']:,} with a picture; {settings['num_beams']} beams"
    parts += [
        f"{facts}; seed {settings['seed']}. {_interval_note(evaluation)}",
        *(f"\n{line}" for line in _skipped(evaluation)),
    ]
    if metrics:
        heading = "Captions" if _from_files(evaluation) else "Own videos"
        parts += ["", f"## {heading} (layout of the paper's Table 1)", ""]
        parts += markdown_table(
            ["model", "params", *map(metric_title, metrics)],
            [[name, _parameters(evaluation, name), *_cells(condition, metrics)] for name, condition in own],
        )
    if metrics and shuffled:
        parts += ["", "## Shuffled test videos (layout of the paper's Table 3)", ""]
        parts += markdown_table(
            ["videos shuffled", "model", *map(metric_title, metrics)],
            [[as_percent(condition["shuffle"]), name, *_cells(condition, metrics)] for name, condition in shuffles],
        )
        parts += ["", "What is left of the value at 0 %:", ""]
        parts += markdown_table(
            ["videos shuffled", "model", *map(metric_title, metrics)],
            [[as_percent(condition["shuffle"]), name, *_retained(condition, metrics)] for name, condition in shuffled],
        )
    if metrics and frames:
        parts += ["", "## Fewer frames, own videos", ""]
        parts += markdown_table(
            ["frames", "model", *map(metric_title, metrics)],
            [[str(condition["frames"]), name, *_cells(condition, metrics)] for name, condition in frames],
        )
    if naming:
        parts += ["", "## Sources named", ""]
        parts += markdown_table(
            ["videos", "model", *naming],
            [[_setting(c), name, *_cells(c, naming, percent=True)] for name, c in distinct],
        )
        parts += ["", *(f"* {column}: {COLUMNS[column]}" for column in naming)]
    gated = [row for row in shuffled if row[1]["gate"]]
    if gated:
        parts += ["", "## Gate and entropy", ""]
        parts += markdown_table(
            ["videos shuffled", "model", "clips", "gate: own", "swapped", "AUC", "entropy: own", "swapped", "AUC"],
            [_gate_cells(name, condition) for name, condition in gated],
        )
        parts += [
            "",
            "Means over the swapped clips, with their own videos (at 0 %) and with the others'. AUC: the area under the "
            "ROC curve, the chance that the gate is higher, or the entropy lower, with an own video than with another's. "
            "0.5 tells nothing.",
        ]
    if evaluation["tests"]:
        parts += ["", *_test_tables(evaluation, metrics, naming)]
    if plots:
        parts += ["", "## Plots", "", *(f"![{name}]({name}.png)\n" for name in plots)]
    return "\n".join(parts).rstrip() + "\n"


def _test_tables(evaluation: Evaluation, metrics: Sequence[str], naming: Sequence[str]) -> list[str]:
    first = next(iter(evaluation["checkpoints"]))
    tests = [test for test in evaluation["tests"] if test["first"] == first]
    found: dict[tuple[str, str], dict[str, str]] = {}
    for test in tests:
        p = "" if test["p"] is None else f"<br><sub>p {_p(test['p'])}</sub>"
        cells = found.setdefault(("–" if _from_files(evaluation) else _setting(test), test["second"]), {})
        cells[test["metric"]] = f"{test['difference']:+.3f}{p}"
    names = [*metrics, *naming]
    return [
        f"## Differences from {first}",
        "",
        *markdown_table(
            ["videos", "model", *map(metric_title, names)],
            [
                [setting, name, *(cells.get(metric, "–") for metric in names)]
                for (setting, name), cells in found.items()
            ],
        ),
        "",
        "p: two-sided paired bootstrap test over the clips, the same resamples for both, not corrected for the number of "
        "tests. It says nothing of other training seeds. `evaluation.json` has every pair of checkpoints.",
    ]


def _from_files(evaluation: Evaluation) -> bool:
    """Whether the captions were there already, and nothing is known of videos."""
    return evaluation["settings"]["num_beams"] is None


def list_rows(evaluation: Evaluation) -> list[Row]:
    return [
        (name, condition) for name, entry in evaluation["checkpoints"].items() for condition in entry["conditions"]
    ]


def _distinct_rows(evaluation: Evaluation) -> list[Row]:
    """The rows without those that must equal another row, such as all swapped ones of a model without a video tower."""
    checkpoints = evaluation["checkpoints"]
    rows = list_rows(evaluation)
    return [(name, c) for name, c in rows if checkpoints[name]["looks"] or (c["shuffle"] == 0 and c["frames"] is None)]


def list_metrics(evaluation: Evaluation) -> list[str]:
    return list(
        dict.fromkeys(metric for _, condition in list_rows(evaluation) for metric in _ordered(condition["metrics"]))
    )


def _ordered(figures: Mapping[str, Any]) -> list[str]:
    return [name for name in METRIC_TITLES if name in figures] + [
        name for name in figures if name not in METRIC_TITLES
    ]


def metric_title(name: str) -> str:
    return METRIC_TITLES.get(name, name)


def as_percent(share: float) -> str:
    """`5 %` for 0.05."""
    return f"{100 * share:g} %"


def _setting(condition: Mapping[str, Any]) -> str:
    if condition["frames"] is not None:
        return f"{condition['frames']} frame{'s' * (condition['frames'] != 1)}"
    return f"{as_percent(condition['shuffle'])} swapped"


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def format_range(bounds: Sequence[float] | None, digits: int = 3) -> str:
    # Most figures are below 1: without the leading zeros two bounds fit under one figure.
    return "" if bounds is None else "–".join(f"{bound:.{digits}f}".removeprefix("0") for bound in bounds)


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _cells(condition: Mapping[str, Any], names: Iterable[str], percent: bool = False) -> list[str]:
    cells = []
    for name in names:
        figure = condition["metrics"].get(name)
        if figure is None:
            cells.append("–")
        elif percent:
            low, high = figure["interval"] or (figure["value"],) * 2
            cells.append(f"{figure['value']:.1%}<br><sub>{100 * low:.1f}–{100 * high:.1f}</sub>")
        else:
            cells.append(f"{figure['value']:.3f}<br><sub>{format_range(figure['interval'])}</sub>")
    return cells


def _retained(condition: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    cells = []
    for name in names:
        figure = condition["metrics"].get(name, {})
        if figure.get("retention") is None:
            cells.append("–")
            continue
        bounds = figure["retention_interval"]
        below = "" if bounds is None else f"<br><sub>{100 * bounds[0]:.1f}–{100 * bounds[1]:.1f}</sub>"
        cells.append(f"{figure['retention']:.1%}{below}")
    return cells


def _gate_cells(name: str, condition: Mapping[str, Any]) -> list[str]:
    cells = [as_percent(condition["shuffle"]), name, str(condition["swapped"])]
    for curve in ("gate", "entropy"):
        figures = condition[curve]
        area = figures["auc"]
        cells += [_number(figures["same_clips_matched"]), _number(figures["swapped"])]
        cells.append(f"{_number(area['value'], 2)}<br><sub>{format_range(area['interval'], 2)}</sub>")
    return cells


def _parameters(evaluation: Evaluation, name: str) -> str:
    parameters = evaluation["checkpoints"][name]["parameters"]
    if parameters is None:
        return "–"
    millions = parameters / 1e6
    return f"{millions:.0f} M" if millions >= 100 else f"{millions:.1f} M"


def _interval_note(evaluation: Evaluation) -> str:
    settings = evaluation["settings"]
    return f"{settings['confidence']:.0%} bootstrap intervals over the clips ({settings['resamples']:,} resamples)."


def _skipped(evaluation: Evaluation) -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for metric, reason in evaluation["skipped"].items():
        by_reason.setdefault(reason, []).append(metric)
    return [f"without {', '.join(names)}: {reason}" for reason, names in by_reason.items()]


def markdown_table(head: Sequence[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    """The lines of a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines]

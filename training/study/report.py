"""Tables and plots of the study, in the layout of the paper's tables, from its result files alone."""

import json
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..evaluation.plots import COLORS, MARKERS, clean_axes, has_matplotlib, new_figure, save_figure
from ..evaluation.tables import as_percent, markdown_table
from ..files import write_text
from ..metrics.compute import METRIC_TITLES
from ..procedural.scores import COLUMNS
from .mismatch_detectors import BINS, CROSSED, FITTED, SUBSETS
from .oracles import ORACLES


if TYPE_CHECKING:
    from matplotlib.figure import Figure


Result = Mapping[str, Any]
"""The content of a result file."""

PRETRAINED, ORACLE_RESULT = "pretraining", "oracles"
"""The names of the results that do not come from a run: the shared start, and the oracle captioners."""
REPORT = "tables.md"

VARIANT_TITLES = {
    "audio-only": "audio only",
    "avcap": "AVCap",
    "evacap": "EVACap (SMS 5 %)",
    "without-s": "EVACap w/o S (SMS 0 %)",
    "without-e": "EVACap w/o E",
    "without-se": "EVACap w/o S&E",
    "without-g": "EVACap w/o G",
    "sms-50": "EVACap, SMS 50 %",
    "sms-100": "EVACap, SMS 100 %",
    "without-start": "EVACap without the shared start",
    "gate-stability": "EVACap with gate stability",
    "semantic-consistency": "EVACap with semantic consistency",
    "closed-gate": "EVACap born with a closed gate",
    "agreement": "agreement gate",
    "agreement-sms-5": "agreement gate, SMS 5 %",
    "agreement-sms-50": "agreement gate, SMS 50 %",
    "agreement-without-hearing": "agreement gate w/o the hearing loss",
    "agreement-without-e": "agreement gate w/o E",
    "agreement-without-loss": "agreement gate w/o the matching loss",
    "lavcap": "LAVCap's fusion and loss",
    "lavcap-mean": "LAVCap's fusion with mean contexts",
    "language-model": "EVACap with a Llama as decoder",
    "vact": "sound and picture weighed for each word",
    "caste": "EVACap with CASTE",
    "caste-losses": "agreement gate with CASTE and the objectives",
    "case": "EVACap with CASE",
    "video-only": "video only",
    "dali-mmd": "sound aligned with video only, MMD",
    "dali-ot": "sound aligned with video only, OT",
    "dali-attentive-ot": "sound aligned with video only, attentive OT",
    "dali-contrast": "sound aligned with video only, contrast",
    "dali-none": "sound with video only's decoder, not aligned",
    "dali-late-concat": "video only and the aligned sound (OT), read together",
    "dali-distilled": "the aligned sound (OT), taught by these captions",
    "pictures": "video only, taught what is seen",
    "pictures-prompted": "video only, taught what is seen, prompted",
    "dali-prompted": "sound aligned with what is seen (OT), prompted",
    "dali-pictures": "sound aligned with what is seen (OT)",
    "dali-pictures-none": "sound with the decoder of what is seen, not aligned",
}
"""The variants, in the order of the rows."""
TABLES = {
    "Own videos (layout of the paper's Table 1)": ("audio-only", "avcap", "evacap", "without-s"),
    "Share of shuffled videos in training (Table 2)": ("without-s", "evacap", "sms-50", "sms-100"),
    "Ablations (Table 4)": ("evacap", "without-s", "without-e", "without-se", "without-g"),
    "With and without the shared start": ("evacap", "without-start"),
    "The agreement gate": (
        "evacap",
        "agreement",
        "agreement-sms-5",
        "agreement-sms-50",
        "agreement-without-hearing",
        "agreement-without-e",
        "agreement-without-loss",
    ),
    "Optimal transport, and a language model as decoder": ("evacap", "lavcap", "lavcap-mean", "language-model"),
    "A decoder that weighs sound and picture for each word": ("avcap", "evacap", "vact"),
    "Enrichment by agreement (CAE-AV)": ("evacap", "caste", "agreement-sms-5", "caste-losses", "case"),
    "A captioner of sounds that heard none with its caption (DALI)": (
        "audio-only",
        "video-only",
        "dali-mmd",
        "dali-ot",
        "dali-attentive-ot",
        "dali-contrast",
        "dali-none",
        "dali-late-concat",
        "dali-distilled",
    ),
    "The same, by a decoder that has read what is seen": (
        "audio-only",
        "dali-ot",
        "pictures",
        "pictures-prompted",
        "dali-prompted",
        "dali-pictures",
        "dali-pictures-none",
    ),
    "Further variants": ("evacap", "gate-stability", "semantic-consistency", "closed-gate"),
}
SHUFFLED = (
    "audio-only",
    "avcap",
    "evacap",
    "without-s",
    "without-e",
    "without-se",
    "without-g",
    "agreement",
    "lavcap",
    "lavcap-mean",
    "vact",
)
SYSTEMS = ("audio-only", "avcap", "evacap", "agreement", "lavcap", "caste", "caste-losses", "case", "vact", "dali-ot")
"""One row for each system of the sources."""
OWN, SWAPPED, NO_VIDEO = 0.0, 1.0, None
SYSTEM_COLUMNS = (
    ("cider_d", OWN),
    ("cider_d", SWAPPED),
    ("spice", OWN),
    ("spice", SWAPPED),
    ("sound-alikes", OWN),
    ("off screen", OWN),
    ("twin", SWAPPED),
    ("bare", SWAPPED),
    ("distinct", OWN),
    ("distinct", SWAPPED),
    ("distinct", NO_VIDEO),
    ("invented", OWN),
    ("invented", SWAPPED),
)
RIGHT = ("set", "sound-alikes", "off screen", "distinct")
"""The columns that should be high. The other ones count errors."""


def read_results(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """The result files in `folder/runs`, by variant and seed.

    Raises:
        ValueError: If a file is not a result of the study.
    """
    results = []
    for path in Path(folder, "runs").glob("*.json"):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            if result["variant"] not in (*VARIANT_TITLES, PRETRAINED, ORACLE_RESULT):
                raise ValueError(f"it is of {result['variant']!r}")
            result["seed"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is not a result of the study ({error!r}): remove it and run the study again."
            ) from error
        results.append(result)
    order = list(VARIANT_TITLES)
    return sorted(
        results, key=lambda result: (order.index(result["variant"]) if is_run(result) else -1, result["seed"])
    )


def is_run(result: Result) -> bool:
    """Whether the result comes from a run of a variant."""
    return result["variant"] in VARIANT_TITLES


def write_report(folder: str | os.PathLike) -> list[Path]:
    """Writes the tables and, where Matplotlib is installed, the plots beside the result files.

    Args:
        folder (`str` or `os.PathLike`): Folder of the report; the result files are in its subfolder `runs`.

    Returns:
        The written files; none if there is no result.

    Raises:
        ValueError: If a file is not a result of the study.
        OSError: If a file cannot be written.
    """
    folder, results = Path(folder), read_results(folder)
    if not any(map(is_run, results)):
        return []
    plots = make_plots(results) if has_matplotlib() else {}
    files = [save_figure(figure, folder / f"{name}.png", dpi=150) for name, figure in plots.items()]
    write_text(folder / REPORT, as_markdown(results, list(plots)))
    return [folder / REPORT, *files]


def as_markdown(results: Sequence[Result], plots: Sequence[str] = ()) -> str:
    """All tables, and links to the plots with these names."""
    runs = _by_variant(results)
    metrics = [name for name in METRIC_TITLES if any(name in _metrics(group[0], 0.0) for group in runs.values())]
    some = next(iter(runs.values()))[0]
    parts = [
        "# The study of mismatch: tables",
        "",
        "Made from the files in `runs/` by `python -m evacap.training.study --report`. "
        f"{some['settings']['test.clips']:,} test clips, {some['settings']['test.num_beams']} beams, the same clips and "
        "the same swaps for all. Mean over the training seeds, and ± their standard deviation; a figure without ± is of "
        "one seed. What the choice of the test clips adds to it, as a bootstrap interval, is in the result files.",
    ]
    skipped = {metric for group in runs.values() for result in group for metric in result["skipped"]}
    if skipped:
        missing = ", ".join(title for metric, title in METRIC_TITLES.items() if metric in skipped)
        parts += ["", f"Runs without {missing} were evaluated where these were not available."]
    parts += _systems(runs)
    for heading, names in TABLES.items():
        present = [name for name in names if name in runs]
        if len(present) > 1:
            head = ["model", "seeds", "params", *(METRIC_TITLES[name] for name in metrics), *RIGHT]
            rows = [
                [
                    VARIANT_TITLES[name],
                    str(len(runs[name])),
                    f"{runs[name][0]['parameters'] / 1e6:.1f} M",
                    *(_cell(_values(runs[name], 0.0, metric)) for metric in metrics),
                    *(_cell(_values(runs[name], 0.0, column), percent=True) for column in RIGHT),
                ]
                for name in present
            ]
            parts += ["", f"## {heading}", "", *markdown_table(head, rows)]
    parts += ["", *(f"* {column}: {COLUMNS[column]}" for column in COLUMNS)]
    parts += _shuffled(runs, metrics)
    parts += _half_dubbed(runs, metrics)
    parts += _differences(runs)
    parts += _oracles(results)
    parts += _detectors(runs)
    parts += _crossed(runs)
    parts += _gates(runs)
    parts += _provenance(results)
    if plots:
        parts += ["", "## Plots", "", *(f"![{name}]({name}.png)\n" for name in plots)]
    return "\n".join(parts).rstrip() + "\n"


def _systems(runs: Mapping[str, list[Result]]) -> list[str]:
    """The systems of the sources, with own and with swapped videos, in one table."""
    runs = _chosen(runs, SYSTEMS)
    if len(runs) < 2:
        return []
    columns = [one for one in SYSTEM_COLUMNS if any(_values(group, one[1], one[0]) for group in runs.values())]
    settings = {OWN: "", SWAPPED: ", swapped", NO_VIDEO: ", no video"}
    head = ["model", "params", *(METRIC_TITLES.get(metric, metric) + settings[share] for metric, share in columns)]
    rows = [
        [
            VARIANT_TITLES[name],
            f"{group[0]['parameters'] / 1e6:.2f} M",
            *(_cell(_values(group, share, metric), percent=metric in COLUMNS) for metric, share in columns),
        ]
        for name, group in runs.items()
    ]
    text = "With own videos, and where the column says so with all videos swapped or without any."
    return ["", "## Every system under the same swaps", "", text, "", *markdown_table(head, rows)]


def _shuffled(runs: Mapping[str, list[Result]], metrics: Sequence[str]) -> list[str]:
    names = [name for name in SHUFFLED if name in runs]
    shares = _shares(runs)
    # A model without a video tower says the same at every share.
    rows = [(share, name) for share in shares for name in names if share == 0 or runs[name][0]["mismatch"] is not None]
    parts = ["", "## Shuffled test videos (layout of the paper's Table 3)", ""]
    head = ["videos shuffled", "model", *(METRIC_TITLES[name] for name in metrics)]
    parts += markdown_table(
        head,
        [
            [_setting(share), VARIANT_TITLES[name], *(_cell(_values(runs[name], share, metric)) for metric in metrics)]
            for share, name in rows
        ],
    )
    parts += ["", "What is left of the value at 0 %:", ""]
    parts += markdown_table(
        head,
        [
            [
                _setting(share),
                VARIANT_TITLES[name],
                *(_cell(_values(runs[name], share, metric, "retention"), percent=True) for metric in metrics),
            ]
            for share, name in rows
            if share != 0
        ],
    )
    parts += _spice_left(runs)
    parts += ["", "## Sources named", ""]
    parts += markdown_table(
        ["videos shuffled", "model", *COLUMNS],
        [
            [
                _setting(share),
                VARIANT_TITLES[name],
                *(_cell(_values(group, share, column), percent=True) for column in COLUMNS),
            ]
            for share in shares
            for name, group in runs.items()
            if share == 0 or runs[name][0]["mismatch"] is not None
        ],
    )
    return parts


def _half_dubbed(runs: Mapping[str, list[Result]], metrics: Sequence[str]) -> list[str]:
    """Captions of clips whose picture is another's in the second half."""
    groups = {name: [r["half-dubbed"] for r in group if r.get("half-dubbed")] for name, group in runs.items()}
    columns = {**{name: METRIC_TITLES[name] for name in metrics}, **{column: column for column in COLUMNS}}
    rows = [
        [
            VARIANT_TITLES[name],
            *(
                _cell([found[key]["value"] for found in group if key in found], percent=key in COLUMNS)
                for key in columns
            ),
        ]
        for name, group in groups.items()
        if group
    ]
    if not rows:
        return []
    text = (
        "The picture of another clip from the middle on, as after a cut. The references are those of the sound's clip."
    )
    return ["", "## Half-dubbed clips", "", text, "", *markdown_table(["model", *columns.values()], rows)]


def _spice_left(runs: Mapping[str, list[Result]]) -> list[str]:
    """What the paper's abstract tells of: SPICE where every video is another's, seed by seed."""
    rows = []
    for name, group in runs.items():
        for result in group:
            figure = _metrics(result, 1.0).get("spice", {})
            if figure.get("retention") is not None:
                low, high = figure["retention_interval"]
                left = f"{figure['retention']:.1%}<br><sub>{100 * low:.1f}–{100 * high:.1f}</sub>"
                rows.append([VARIANT_TITLES[name], str(result["seed"]), f"{figure['value']:.3f}", left])
    if not rows:
        return []
    return [
        "",
        "What is left of SPICE at 100 %, with the bootstrap interval of the choice of clips:",
        "",
        *markdown_table(["model", "seed", "SPICE at 100 %", "left"], rows),
    ]


CLAIMS = {
    "CIDEr, own videos": lambda result: _value(result, 0.0, "cider_d"),
    "CIDEr left at 100 %": lambda result: _value(result, 1.0, "cider_d", "retention"),
    "SPICE left at 100 %": lambda result: _value(result, 1.0, "spice", "retention"),
    "distinct lost at 100 %": lambda result: _lost(result, "distinct"),
    "sound-alikes lost at 100 %": lambda result: _lost(result, "sound-alikes"),
    "off screen lost at 100 %": lambda result: _lost(result, "off screen"),
    "twin at 100 %": lambda result: _value(result, 1.0, "twin"),
    "invented at 100 %": lambda result: _value(result, 1.0, "invented"),
}
"""The figures behind the paper's claims about EVACap, and similar figures of the named sources."""


def _lost(result: Result, column: str) -> float | None:
    before, after = _value(result, 0.0, column), _value(result, 1.0, column)
    return None if before is None or after is None else before - after


def _differences(runs: Mapping[str, list[Result]]) -> list[str]:
    """The difference between EVACap and each other variant, seed by seed."""
    own = {result["seed"]: result for result in runs.get("evacap", [])}
    results = [result for group in runs.values() for result in group]
    claims = {name: claim for name, claim in CLAIMS.items() if any(claim(result) is not None for result in results)}
    rows = []
    for name, group in runs.items():
        pairs = [(own[result["seed"]], result) for result in group if result["seed"] in own]
        if name == "evacap" or not pairs:
            continue
        cells = []
        for claim in claims.values():
            values = [(claim(one), claim(other)) for one, other in pairs]
            cells.append(" ".join("–" if None in pair else f"{pair[0] - pair[1]:+.3f}" for pair in values))
        rows.append([VARIANT_TITLES[name], *cells])
    if not rows:
        return []
    return [
        "",
        "## EVACap less the others, seed by seed",
        "",
        *markdown_table(["EVACap less", *claims], rows),
        "",
        "The shares lost are of all sources of the column. Where the number is below 0, EVACap lost less than the other, "
        "called fewer sound-alikes by their twin's name, or invented fewer sources.",
    ]


def _oracles(results: Sequence[Result]) -> list[str]:
    found = next((result["oracles"] for result in results if result["variant"] == ORACLE_RESULT), None)
    if found is None:
        return []
    metrics = [metric for metric in METRIC_TITLES if found["right"].get(metric)]
    rows = [
        [
            oracle,
            *(
                f"{values[metric]:.3f}<br><sub>{100 * values[metric] / found['right'][metric]:.1f} %</sub>"
                for metric in metrics
            ),
        ]
        for oracle, values in found.items()
    ]
    return [
        "",
        "## Oracle captioners",
        "",
        *markdown_table(["oracle", *(METRIC_TITLES[metric] for metric in metrics)], rows),
        "",
        *(f"* {oracle}: {what}" for oracle, what in ORACLES.items()),
        "",
        "Captions without a model: the generator of the clips writes them from the true sources, and each oracle but "
        "`right` makes one kind of error. Below each figure is its share of the figure of `right`. A wording drawn at "
        "random scores lower than the likeliest one, which is what a model says: compare these shares with what is left "
        "of a model's figures.",
    ]


def _detectors(runs: Mapping[str, list[Result]]) -> list[str]:
    looking = {name: group for name, group in runs.items() if group[0]["mismatch"] is not None}
    if not looking:
        return []
    named = ["entropy, by clip", "entropy, by token", FITTED, "gate, by clip", "gate, by token", "similarity"]
    said = ["agreement, by clip", "agreement, by step"]
    if any(said[0] in areas for group in looking.values() for areas in group[0]["mismatch"]["auc"].values()):
        named = [*said, *named]
    rows = []
    for subset in SUBSETS:
        for name, group in looking.items():
            areas = [result["mismatch"]["auc"].get(subset, {}) for result in group]
            heads = [[value for figure, value in area.items() if figure.startswith("entropy, head")] for area in areas]
            cells = {figure: _cell([area[figure] for area in areas if figure in area]) for figure in named}
            best = _cell([max(max(value, 1 - value) for value in values) for values in heads if values])
            rows.append([subset, VARIANT_TITLES[name], *cells.values(), best])
    paired = [
        f"{VARIANT_TITLES[name]} {_cell([result['mismatch']['paired'] for result in group], percent=True, plain=True)}"
        for name, group in looking.items()
        if group[0]["mismatch"]["paired"] is not None
    ]
    return [
        "",
        "## Can they tell that a picture is another's?",
        "",
        *markdown_table(["clips", "model", *named, "entropy, best head"], rows),
        "",
        "Areas under the ROC curve, each clip with its own video and with another's: 0.5 tells nothing, and below it the "
        "figure stands on the other side than it should. By clip: the mean over heads and tokens. By token: each token of "
        "each clip. Fitted: a linear readout of each head's mean, deviation and lowest entropy, fitted to one half of "
        "the clips and tried on the other. Best head: the one furthest from 0.5 on either side, chosen on these very "
        "clips. Similarity: the cosine between the means of the towers' tokens, which no gate sees. Clips: all; those "
        "whose sources are all on screen; those with a source that only the picture names; the other's video is that of "
        "such a clip as well.",
        *(
            ["", f"Clips whose entropy is higher with another's video than with their own: {'; '.join(paired)}."]
            if paired
            else []
        ),
    ]


def _crossed(runs: Mapping[str, list[Result]]) -> list[str]:
    """Analysis of variance: what the figures of a clip depend on."""
    columns = ("sound", "picture", "interaction", "own", "own, by interaction")
    rows = []
    for figure in ("entropy", "gate", "similarity"):
        for name, group in runs.items():
            tables = [(result["mismatch"] or {}).get("crossed", {}) for result in group]
            found = [table[figure] for table in tables if figure in table]
            if not found:
                continue
            heads = [
                max(
                    value["own, by interaction"] for head, value in table.items() if head.startswith(f"{figure}, head")
                )
                for table in tables
                if f"{figure}, head 1" in table
            ]
            shares = [_cell([entry[column] for entry in found], percent=True) for column in columns[:3]]
            rows.append(
                [
                    figure,
                    VARIANT_TITLES[name],
                    *shares,
                    *(_cell([entry[column] for entry in found]) for column in columns[3:]),
                ]
                + [_cell(heads)]
            )
    if not rows:
        return []
    return [
        "",
        "## What they depend on",
        "",
        *markdown_table(["figure", "model", *columns, "best head"], rows),
        "",
        f"The sounds of {CROSSED} clips, each with the pictures of all of them. The shares of the variance that the sound "
        "explains, the picture, and only both together: this last part alone can tell whether they belong together. Own: "
        "the chance that a sound's figure stands on the right side with its own picture rather than with another's; by "
        "interaction: the same where each picture's mean is taken off; best head: that of the head in which it is the "
        "highest, chosen on these very clips.",
    ]


def _gates(runs: Mapping[str, list[Result]]) -> list[str]:
    gated = {name: group for name, group in runs.items() if (group[0]["mismatch"] or {}).get("gate")}
    if not gated:
        return []
    names = ["weight", "bias", "mean", "deviation over tokens", "deviation over clips", "below 0.05", "above 0.95"]
    rows = []
    for variant, group in gated.items():
        gates = [result["mismatch"]["gate"] for result in group]
        rows.append(
            [VARIANT_TITLES[variant], *(_cell([gate[name] for gate in gates if name in gate]) for name in names)]
        )
    return ["", "## The gate, own videos", "", *markdown_table(["model", *names], rows), *_agreements(runs)]


def _agreements(runs: Mapping[str, list[Result]]) -> list[str]:
    """How far the agreement is a probability."""
    agreeing = {name: group for name, group in runs.items() if (group[0]["mismatch"] or {}).get("agreement")}
    if not agreeing:
        return []
    names = ["calibration error", "false alarms", "misses"]
    rows = [
        [
            VARIANT_TITLES[variant],
            *(_cell([result["mismatch"]["agreement"][name] for result in group], percent=True) for name in names),
        ]
        for variant, group in agreeing.items()
    ]
    return [
        "",
        "## The agreement",
        "",
        *markdown_table(["model", *names], rows),
        "",
        "Of the test clips, each with its own video and with another's, after a temperature was fitted on validation "
        "clips. Calibration error: the expected one, in ten bins. False alarms: own videos below 0.5. Misses: others' "
        "videos above.",
    ]


def _provenance(results: Sequence[Result]) -> list[str]:
    rows = []
    results = [result for result in results if result["variant"] != ORACLE_RESULT]
    for result in results:
        commit, seconds = result["starts"][-1]["git_commit"] or "–", result["seconds"]
        rows.append(
            [
                VARIANT_TITLES.get(result["variant"], "the shared start"),
                str(result["seed"]),
                *(f"{seconds[part] / 60:.1f}" if part in seconds else "–" for part in ("training", "evaluation")),
                result["start"] or "–",
                commit[:10] + "+" * commit.endswith("+changes"),
                f"`{result['command']}`",
            ]
        )
    versions = {
        ", ".join(f"{name} {version}" for name, version in result["starts"][-1]["versions"].items())
        for result in results
    }
    machines = {f"{result['machine']['device']}, {result['machine']['cores']} cores" for result in results}
    hours = sum(sum(result["seconds"].values()) for result in results) / 3600
    head = ["run", "seed", "training, min", "evaluation, min", "shared start", "commit (+: with changes)", "command"]
    parts = ["", "## The runs", "", *markdown_table(head, rows), ""]
    parts.append(f"{hours:.1f} hours in all, on {'; '.join(sorted(machines))}. {'; '.join(sorted(versions))}.")
    starts = {result["start"] for result in results} - {None}
    if len(starts) > 1:
        parts += ["", f"The shared start was trained {len(starts)} times, with different weights."]
    for result in results:
        if result["variant"] == PRETRAINED:
            found = result["retrieval"]
            parts += [
                "",
                f"The shared start finds the own picture of a sound among those of {found['clips']} held-out clips in "
                f"{found['pictures']:.0%} of them, and the own sound of a picture in {found['sounds']:.0%}.",
            ]
    return parts


def make_plots(results: Sequence[Result]) -> dict[str, "Figure"]:
    """The plots by name: `fooled` (names of sound-alikes), `shuffle` (metrics over the share of shuffled videos), `entropy`."""
    runs = _by_variant(results)
    systems = _chosen(runs, SYSTEMS)
    plots = {"fooled": _names(systems)} if len(systems) > 1 else {}
    plots |= {"shuffle": _curves(_chosen(runs, SHUFFLED) or runs)}
    looking = {
        name: group for name, group in runs.items() if group[0]["mismatch"] and group[0]["mismatch"]["histograms"]
    }
    return plots | ({"entropy": _histograms(looking)} if looking else {})


def _names(runs: Mapping[str, list[Result]]) -> "Figure":
    """What captions call the sound-alikes on screen, as bars."""
    settings = {"own video": OWN, "another's video": SWAPPED, "no video": NO_VIDEO}
    parts = {
        "sound-alikes": ("its name", COLORS[2]),
        "bare": ("the word for both of the pair: what the sound tells", COLORS[5]),
        "twin": ("the name of the other of the pair", COLORS[1]),
    }
    figure = new_figure(10, 0.32 * len(runs) + 1.3)
    panels = figure.subplots(1, len(settings), sharey=True)
    for axes, (title, share) in zip(panels, settings.items()):
        left = np.zeros(len(runs))
        for column, (label, color) in parts.items():
            means = [statistics.mean(_values(group, share, column) or [np.nan]) for group in runs.values()]
            axes.barh(range(len(runs)), means, left=left, color=color, label=label, height=0.75)
            left += means
        axes.set_title(title, fontsize=9)
        axes.set_xlim(0, 1)
        axes.set_xticks((0, 0.5, 1), ("0 %", "50 %", "100 %"))
        clean_axes(axes)
    panels[0].set_yticks(range(len(runs)), [VARIANT_TITLES[name] for name in runs])
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    return figure


def _curves(runs: Mapping[str, list[Result]]) -> "Figure":
    wanted = ("bleu_4", "meteor", "rouge_l", "cider_d", "spice", "spider", *COLUMNS)
    some = next(iter(runs.values()))[0]
    names = [name for name in wanted if name in _metrics(some, 0.0)]
    shares = _shares(runs)
    columns = 4
    lines = -(-len(names) // columns)
    figure = new_figure(11, 2.3 * lines + 0.8)
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, metric in zip(panels, names):
        for number, (name, group) in enumerate(runs.items()):
            values = [_values(group, share, metric) for share in shares]
            means = np.array([statistics.mean(seeds) if seeds else np.nan for seeds in values])
            ends = np.array([(min(seeds), max(seeds)) if seeds else (np.nan, np.nan) for seeds in values])
            # Side by side, so that the ranges do not hide each other.
            places = np.arange(len(shares)) + (number - (len(runs) - 1) / 2) * 0.06
            if None in shares:
                # "No video" is not a share: a point beside the curve.
                places, means, ends = (np.insert(array, -1, np.nan, axis=0) for array in (places, means, ends))
            axes.errorbar(
                places,
                means,
                np.abs(ends.T - means),
                color=COLORS[number % len(COLORS)],
                marker=MARKERS[number % len(MARKERS)],
                markersize=4,
                linewidth=1.1,
                elinewidth=0.8,
                capsize=2,
                label=VARIANT_TITLES[name],
            )
        axes.set_title(METRIC_TITLES.get(metric, metric), fontsize=9)
        axes.set_xticks(range(len(shares)), ["none" if share is None else as_percent(share) for share in shares])
        axes.grid(axis="y", color="0.9", linewidth=0.6)
        clean_axes(axes)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    figure.supxlabel(
        "test videos shuffled (none: no video at all); mean and range over the training seeds", fontsize=9
    )
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    return figure


def _histograms(runs: Mapping[str, list[Result]]) -> "Figure":
    columns = min(len(runs), 6)
    blocks = -(-len(runs) // columns)
    figure = new_figure(2.2 * columns + 0.4, 3.8 * blocks + 0.3)
    # Rows alternate: by clip, by token.
    panels = figure.subplots(2 * blocks, columns, squeeze=False).reshape(blocks, 2, columns)
    panels = panels.transpose(1, 0, 2).reshape(2, -1)
    edges = np.linspace(0, 1, BINS + 1)
    filled = [
        np.nonzero(counts)[0][0]
        for group in runs.values()
        for result in group
        for counts in result["mismatch"]["histograms"]["entropy, by token"].values()
    ]
    for line, unit in enumerate(("clip", "token")):
        for axes, (name, group) in zip(panels[line], runs.items()):
            for place, title, color in (("own", "own video", COLORS[0]), ("swapped", "another's video", COLORS[1])):
                counts = [result["mismatch"]["histograms"][f"entropy, by {unit}"][place] for result in group]
                axes.stairs(np.sum(counts, 0), edges, fill=True, alpha=0.35, color=color)
                axes.stairs(np.sum(counts, 0), edges, color=color, label=title)
            area = _cell([result["mismatch"]["auc"]["all"][f"entropy, by {unit}"] for result in group], plain=True)
            axes.set_xlim(edges[min(filled)], 1)
            axes.set_title(f"{VARIANT_TITLES[name]}\nby {unit}: AUC {area}", fontsize=7)
            clean_axes(axes)
            axes.tick_params(labelsize=7)
    for axes in panels[:, len(runs) :].ravel():
        axes.set_axis_off()
    figure.supxlabel("attention entropy", fontsize=9)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, fontsize=8, frameon=False)
    return figure


def _by_variant(results: Iterable[Result]) -> dict[str, list[Result]]:
    groups: dict[str, list[Result]] = {}
    for result in filter(is_run, results):
        groups.setdefault(result["variant"], []).append(result)
    return groups


def _chosen(runs: Mapping[str, list[Result]], names: Sequence[str]) -> dict[str, list[Result]]:
    """The variants among `names`, in that order, that have run."""
    return {name: runs[name] for name in names if name in runs}


def _shares(runs: Mapping[str, list[Result]]) -> list[float | None]:
    """The shares of shuffled test videos in ascending order, then `None` for no video, if it was evaluated."""
    conditions = [condition for group in runs.values() for condition in group[0]["conditions"]]
    shares = sorted({condition["shuffle"] for condition in conditions if condition["frames"] is None})
    return [*shares, None] if any(condition["frames"] == 0 for condition in conditions) else shares


def _setting(share: float | None) -> str:
    return "no video" if share is None else as_percent(share)


def _metrics(result: Result, share: float | None) -> Mapping[str, Any]:
    frames, shuffle = (0, 0.0) if share is None else (None, share)
    conditions = result["conditions"]
    return next((one["metrics"] for one in conditions if (one["frames"], one["shuffle"]) == (frames, shuffle)), {})


def _value(result: Result, share: float | None, metric: str, field: str = "value") -> float | None:
    return _metrics(result, share).get(metric, {}).get(field)


def _values(group: Sequence[Result], share: float | None, metric: str, field: str = "value") -> list[float]:
    values = [_value(result, share, metric, field) for result in group]
    return [value for value in values if value is not None]


def _cell(values: Sequence[float], percent: bool = False, plain: bool = False) -> str:
    """Mean and standard deviation."""
    if not values:
        return "–"
    form = (lambda value: f"{100 * value:.1f}") if percent else (lambda value: f"{value:.3f}")
    unit = " %" if percent else ""
    if len(values) == 1:
        return form(values[0]) + unit
    spread = form(statistics.stdev(values))
    mean = form(statistics.mean(values))
    return f"{mean} ± {spread}{unit}" if plain else f"{mean}{unit}<br><sub>± {spread}</sub>"

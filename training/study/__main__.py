"""The study of mismatch: `python -m evacap.training.study`.

It trains the rows of the paper's tables from the same start on procedural clips, and evaluates them with matched and
swapped videos. Each run leaves a small result file; the same command does the missing runs.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import set_seed
from transformers import PreTrainedModel

from ...modeling_evacap.configuration_evacap import EVACapConfig
from ...modeling_evacap.modeling_evacap import EVACapForConditionalGeneration
from ...processing.processing_evacap import EVACapProcessor
from ..components import make_model, make_processor_and_config
from ..evaluation.calibration import calibrate
from ..evaluation.captioner import MakeClips
from ..evaluation.evaluate import SHARES, evaluate
from ..files import check_settings, write_json, write_text
from ..metrics.compute import METRICS
from ..procedural.dataset import ProceduralClips
from ..run_config import AlignmentSection, RunConfig, flatten, load_run_config
from ..run_log import SETTLED, check_run
from ..train import TrainingRun, train
from .distillation import DistillationRun
from .lies import HalfDubbedClips
from .mismatch_detectors import detect_mismatch
from .oracles import judge_oracles
from .picture_captions import PAIRS, PictureCaptionedRun, PromptingRun
from .pretraining import pretrain, retrieval
from .report import ORACLE_RESULT, PRETRAINED, is_run, read_results, write_report
from .stream_captions import StreamCaptionedRun, with_stream_captions


@dataclass(frozen=True)
class Variant:
    """A row of the tables.

    Args:
        changes (`tuple[str, ...]`): Changes of the study's configuration, which is that of EVACap.
        pretrained (`bool`, defaults to `True`): Whether it starts from the towers of the contrastive pretraining.
        origin (`str`, *optional*): Instead, the model folder that it starts from: that of another variant with the same seed,
            which has to be there, such as `"dali-ot/model"`.
        run_class (`type`, *optional*): See [`~train.train`].
    """

    changes: tuple[str, ...] = ()
    pretrained: bool = True
    origin: str | None = None
    run_class: type[TrainingRun] | None = None


AGREEMENT = "model.preset=evacap-agreement"
CONSTANT = (
    "model.config.gate_weight_init=0",
    "model.config.gate_bias_init=0",
    "model.freeze=[model.encoder.fusion.gate_weight]",
)
"""An open gate is a number that is learned, and does not depend on the entropy."""
LLAMA = (
    "model.config.text_config.model_type=llama",
    "model.config.text_config.intermediate_size=320",
)
"""A Llama as large as the decoder of the study's size, whose MLP has two matrices instead of three."""
ALIGNED = ("model.preset=audio-only", "data.p_mix=0", "alignment.teacher=video-only")
"""A student of the variant `video-only` of the same seed, which has to be there."""
DISTILLED = (
    "model.preset=audio-only",
    "model.freeze=['*']",
    "model.freeze_except=[model.decoder.prefix_projection.*]",
    "data.p_mix=0",
    "data.procedural=3840",
)
"""One epoch over a tenth of the clips: DALI distils from a small part of its clips too."""
PROMPTED = (
    "model.preset=video-only",
    "model.config.text_config.num_prompt_tokens=16",
    "model.freeze=['*']",
    "model.freeze_except=[model.decoder.prompt]",
    "data.p_mix=0",
    "data.procedural=64",
    f"optimization.batch_size={PAIRS}",
    "optimization.epochs=500",
    "optimization.weight_decay=0",
)
"""Prompt tuning as in DALI: 16 vectors, 16 pairs, 500 steps."""
LOSSES = get_args(get_type_hints(AlignmentSection)["loss"])
VARIANTS = {
    "audio-only": Variant(("model.preset=audio-only", "data.p_mix=0")),
    "avcap": Variant(("model.preset=avcap", "data.p_mix=0")),
    "evacap": Variant(),
    "without-s": Variant(("data.p_mix=0",)),
    "without-e": Variant(("model.preset=evacap-learned-gate",)),
    "without-se": Variant(("model.preset=evacap-learned-gate", "data.p_mix=0")),
    "without-g": Variant(("model.preset=evacap-ungated",)),
    "sms-50": Variant(("data.p_mix=0.5",)),
    "sms-100": Variant(("data.p_mix=1",)),
    "without-start": Variant(pretrained=False),
}
"""The variants by name. SMS 0 % is `without-s`, SMS 5 % is `evacap`."""
EXTRA = {
    "gate-stability": Variant(("model.config.gate_stability_weight=1",)),
    "semantic-consistency": Variant(("model.config.semantic_consistency_weight=1",)),
    "closed-gate": Variant(("model.config.gate_weight_init=-8", "model.config.gate_bias_init=4")),
    "agreement": Variant((AGREEMENT, "data.p_mix=0")),
    "agreement-sms-5": Variant((AGREEMENT,)),
    "agreement-sms-50": Variant((AGREEMENT, "data.p_mix=0.5")),
    "agreement-without-hearing": Variant((AGREEMENT, "data.p_mix=0", "model.config.hearing_weight=0")),
    "agreement-without-e": Variant((AGREEMENT, "data.p_mix=0", *CONSTANT)),
    "agreement-without-loss": Variant((AGREEMENT, "data.p_mix=0", "model.config.matching_weight=0")),
    "lavcap": Variant(("model.preset=lavcap", "data.p_mix=0")),
    "lavcap-mean": Variant(("model.preset=lavcap", "data.p_mix=0", "model.config.ot_context=mean")),
    "language-model": Variant(LLAMA),
    "vact": Variant(("model.preset=vact", "data.p_mix=0")),
    "caste": Variant(("model.preset=evacap-caste",)),
    "caste-losses": Variant(("model.preset=evacap-caste-losses",)),
    "case": Variant(("model.preset=evacap-case",), run_class=StreamCaptionedRun),
    "video-only": Variant(("model.preset=video-only", "data.p_mix=0")),
    **{f"dali-{loss.replace('_', '-')}": Variant((*ALIGNED, f"alignment.loss={loss}")) for loss in LOSSES},
    "dali-none": Variant((*ALIGNED, "alignment.loss=mmd", "optimization.max_steps=0")),
    "dali-late-concat": Variant(
        ("model.preset=late-concat", "data.p_mix=0", "optimization.max_steps=0"), origin="dali-ot/late_concat"
    ),
    "dali-distilled": Variant(DISTILLED, origin="dali-ot/model", run_class=DistillationRun),
    "pictures": Variant(("model.preset=video-only", "data.p_mix=0"), run_class=PictureCaptionedRun),
    "pictures-prompted": Variant(PROMPTED, origin="pictures/model", run_class=PromptingRun),
    "dali-prompted": Variant((*ALIGNED, "alignment.teacher=pictures-prompted", "alignment.loss=ot")),
    "dali-pictures": Variant(
        (
            "model.preset=audio-only",
            "model.config.text_config.num_prompt_tokens=0",
            "data.p_mix=0",
            "optimization.max_steps=0",
        ),
        origin="dali-prompted/model",
    ),
    "dali-pictures-none": Variant(
        (*ALIGNED, "alignment.teacher=pictures", "alignment.loss=ot", "optimization.max_steps=0")
    ),
}
"""Variants that run only on request, which might make the entropy more informative (ours).

The gate of `closed-gate` is initially nearly closed for uniform attention, instead of half open.
"""
PRETRAINING = ("data.p_mix=0", "optimization.batch_size=64")
PRETRAINING_SEED = 1000
"""Seed of the clips and weights of the shared start; no run has it."""
TEST_SEED = 0
"""Seed of the test clips, the swapped videos and the bootstrap, the same for all runs."""


@dataclass(frozen=True)
class Study:
    """The common settings of all runs.

    Args:
        config (`str`): A configuration of EVACap, see [`load_run_config`].
        overrides (`tuple[str, ...]`): Changes of it for all variants.
        output (`Path`): Folder for checkpoints, models and captions.
        results (`Path`): Folder for the result files, in `runs/`, the tables and the plots.
        test_clips (`int`), num_beams (`int`), metrics (`tuple[str, ...]`): Settings of the evaluation.
        command (`str`): The command line, for the result files.
        keep_clips (`bool`): Whether the clips of a seed are rendered once, for all variants, into the folder `clips` in
            `output`.
    """

    config: str = "study/tiny"
    overrides: tuple[str, ...] = ()
    output: Path = Path("runs/study")
    results: Path = Path("docs/study")
    test_clips: int = 500
    num_beams: int = 4
    metrics: tuple[str, ...] = METRICS
    command: str = ""
    keep_clips: bool = False

    def run_config(self, name: str, seed: int) -> RunConfig:
        """The configuration of a run. A pretrained one starts from the folder `start` in its `output`."""
        variant, output = (VARIANTS | EXTRA)[name], self.output / f"{name}-seed{seed}"
        changes = (*self.overrides, *variant.changes, f"seed={seed}")
        config = load_run_config(self.config, (*changes, f"output={json.dumps(os.fspath(output))}"))
        start = output / "start" if variant.pretrained else None
        if variant.origin is not None:
            origin, _, folder = variant.origin.partition("/")
            start = self.output / f"{origin}-seed{seed}" / folder
        if start is not None:
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, start=os.fspath(start)))
        if config.alignment is not None:
            teacher = self.output / f"{config.alignment.teacher}-seed{seed}" / "model"
            config = dataclasses.replace(
                config, alignment=dataclasses.replace(config.alignment, teacher=os.fspath(teacher))
            )
        if self.keep_clips:
            # Reading them is fast enough without a process of its own.
            changes = {"kept_clips": str(self.output / "clips"), "num_workers": 0}
            config = dataclasses.replace(config, resources=dataclasses.replace(config.resources, **changes))
        return config

    def pretraining_config(self) -> RunConfig:
        """The configuration of the shared start."""
        changes = (*self.overrides, *PRETRAINING, f"seed={PRETRAINING_SEED}")
        return load_run_config(self.config, (*changes, f"output={json.dumps(os.fspath(self.output / 'pretraining'))}"))

    def result_path(self, name: str, seed: int) -> Path:
        return self.results / "runs" / f"{name}-seed{seed}.json"

    def settings(self, config: RunConfig) -> dict[str, Any]:
        """The settings that a result depends on, without paths and anything that may change between sessions."""
        values = {key: value for key, value in flatten(config).items() if key.startswith(SETTLED)}
        values |= {"model.start": values["model.start"] is not None}
        if config.alignment is not None:
            values |= {"alignment.teacher": Path(config.alignment.teacher).parts[-2].rpartition("-seed")[0]}
        values |= {"test.clips": self.test_clips, "test.seed": TEST_SEED, "test.num_beams": self.num_beams}
        return json.loads(json.dumps(values))

    def is_done(self, name: str, seed: int) -> bool:
        """Whether a run has left its result.

        Raises:
            ValueError: If the result has other settings.
        """
        path = self.result_path(name, seed)
        if not path.exists():
            return False
        before = json.loads(path.read_text(encoding="utf-8"))["settings"]
        # Every implementation of attention computes the same.
        before.pop("model.attn_implementation", None)
        now = _restricted(self.settings(self.run_config(name, seed)), before)
        check_settings(path, before, now, "Give another --output and --results, or remove it.")
        return True


def _restricted(now: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """The present settings that existed before; one that did not changes nothing with its default."""
    both = {key: (now.get(key), value) for key, value in before.items()}
    return {
        key: _restricted(*pair) if all(isinstance(one, dict) for one in pair) else pair[0]
        for key, pair in both.items()
    }


def run_study(study: Study, names: Sequence[str], seeds: Sequence[int]) -> int:
    """Does the missing runs, all variants of one seed before the next, and writes the report.

    Args:
        study ([`Study`]): The study.
        names (`Sequence[str]`): Names of `VARIANTS` and `EXTRA`.
        seeds (`Sequence[int]`): Seeds of the runs.

    Returns:
        0, or 128 + the number of the signal that has stopped a training; the same call continues.
    """
    plan = [(name, seed) for seed in seeds for name in names]
    left = [run for run in plan if not study.is_done(*run)]
    for place, (name, seed) in enumerate(left):
        number = len(plan) - len(left) + place + 1
        say(f"run {number} of {len(plan)}: {name}, seed {seed}{remaining(study, len(left) - place)}")
        status = run_variant(study, name, seed)
        if status:
            say("stopped; the same command goes on from here")
            return status
    run_oracles(study)
    for path in write_report(study.results):
        say(f"{path}")
    return 0


def remaining(study: Study, runs: int) -> str:
    """The estimated time of so many runs, from the finished ones; empty before the first."""
    results = [result for result in read_results(study.results) if is_run(result)]
    if not results:
        return ""
    minutes = runs * sum(sum(result["seconds"].values()) for result in results) / len(results) / 60
    return f"; about {minutes / 60:.1f} h left" if minutes >= 100 else f"; about {minutes:.0f} min left"


def run_variant(study: Study, name: str, seed: int) -> int:
    """Trains and evaluates a variant, and writes its result file; returns the status of [`~train.train`]."""
    config, variant = study.run_config(name, seed), (VARIANTS | EXTRA)[name]
    folder, start = Path(config.output), None
    if variant.pretrained and variant.origin is None:
        status = run_pretraining(study)
        if status:
            return status
        start = make_start(config, study.output / "pretraining" / "model")
    model = folder / "model"
    check_run(folder, config)
    if not model.exists():
        forget_accelerator()
        with stopwatch(folder, "training"):
            status = train(config, variant.run_class)
        if status:
            return status
    # Test and validation clips are not kept.
    workers = dataclasses.replace(study, keep_clips=False).run_config(name, seed).resources.num_workers
    judged = partial(clips_to_judge, study, model, seed, workers)
    forget_accelerator()
    make_clips = judged()
    if EVACapConfig.from_pretrained(model).has_matching_head:
        with stopwatch(folder, "calibration"):
            calibrate(model, judged("validation"), num_workers=workers)
    judge = partial(
        evaluate,
        {name: model},
        num_beams=study.num_beams,
        num_workers=workers,
        metrics=study.metrics,
        seed=TEST_SEED,
    )
    with stopwatch(folder, "evaluation"):
        clips = f"{study.test_clips} procedural test clips"
        evaluation = judge(make_clips, folder / "evaluation", clips, shares=SHARES, frames=(0,))
        mismatch = detect_mismatch(model, make_clips, TEST_SEED, num_workers=workers)
        half_dubbed = None
        if evaluation["checkpoints"][name]["looks"]:
            dubbed = judge(judged(kind=HalfDubbedClips), folder / "half-dubbed", f"{clips}, dubbed in half", shares=())
            half_dubbed = dubbed["checkpoints"][name]["conditions"][0]["metrics"]
    entry = evaluation["checkpoints"][name]
    log = read_log(folder)
    last = log[-max(1, len(log) // 20) :]
    result = {
        "variant": name,
        "seed": seed,
        **provenance(study, config),
        "start": start,
        "loss": {key: sum(line[key] for line in last) / len(last) for key in (last or [{}])[0] if "loss" in key},
        "parameters": entry["parameters"],
        "evaluation": evaluation["settings"],
        # The reasons contain folders of the machine.
        "skipped": list(evaluation["skipped"]),
        "conditions": [{k: v for k, v in condition.items() if k != "clips"} for condition in entry["conditions"]],
        "half-dubbed": half_dubbed,
        "mismatch": mismatch,
    }
    write_result(study.result_path(name, seed), result)
    return 0


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of the log of a run; none of a run without any step."""
    path = folder / "log.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def clips_to_judge(
    study: Study,
    model: Path,
    seed: int,
    num_workers: int,
    split: str = "test",
    kind: type[ProceduralClips] = ProceduralClips,
) -> MakeClips:
    """The clips on which the model of a run is judged, with captions of their streams if it reads them."""
    make = partial(make_test_clips, study.test_clips, split, kind)
    if EVACapConfig.from_pretrained(model).enrichment != "case":
        return make
    folder = model.parent / "captions" / f"{split}-{kind.__name__}"
    return with_stream_captions(make, study.output, seed, folder, Accelerator(), num_workers)


def make_test_clips(
    num_clips: int, split: str, kind: type[ProceduralClips], processor: EVACapProcessor
) -> ProceduralClips:
    return kind(processor, num_clips, split, TEST_SEED)


def run_pretraining(study: Study) -> int:
    """Trains the towers of the shared start unless that is done; returns the status of [`~train.train`]."""
    config = study.pretraining_config()
    folder = Path(config.output)
    check_run(folder, config)
    if not (folder / "model").exists():
        say("the shared start: audio-visual contrast of the towers")
        forget_accelerator()
        with stopwatch(folder, "training"):
            status = pretrain(config)
        if status:
            return status
    path = study.results / "runs" / f"{PRETRAINED}.json"
    if not path.exists():
        model = EVACapForConditionalGeneration.from_pretrained(folder / "model")
        processor = EVACapProcessor.from_pretrained(folder / "model")
        log = read_log(folder)
        clips = ProceduralClips(processor, study.test_clips, "validation", TEST_SEED)
        result = {
            "variant": PRETRAINED,
            "seed": PRETRAINING_SEED,
            **provenance(study, config),
            "start": fingerprint(towers(model)),
            "loss": [[line["step"], line["loss"]] for line in log[:: max(1, len(log) // 20)]],
            "retrieval": retrieval(model, clips, num_workers=config.resources.num_workers),
        }
        write_result(path, result)
    return 0


def run_oracles(study: Study) -> None:
    """Scores the oracle captioners by the metrics and on the clips of the runs."""
    path = study.results / "runs" / f"{ORACLE_RESULT}.json"
    settings = {"test.clips": study.test_clips, "test.seed": TEST_SEED, "metrics": list(study.metrics)}
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    # Metrics that were skipped then may be available now.
    if known.get("settings") == settings and not known["skipped"]:
        return
    say("oracle captioners, for comparison")
    result = {"variant": ORACLE_RESULT, "seed": TEST_SEED, "settings": settings}
    write_result(path, result | judge_oracles(study.test_clips, TEST_SEED, study.metrics))


def make_start(config: RunConfig, pretrained: Path) -> str:
    """Writes the folder `config.model.start`: a captioner with pretrained towers and otherwise random weights.

    The random weights come from the seed of the run.

    Returns:
        The fingerprint of the pretrained towers.
    """
    section = dataclasses.replace(config.model, start=None)
    set_seed(config.seed)
    processor, model_config = make_processor_and_config(section)
    model = make_model(section, model_config)
    known = towers(EVACapForConditionalGeneration.from_pretrained(pretrained))
    start = {name.removeprefix("model.encoder."): known[name] for name in towers(model)}
    model.get_encoder().load_state_dict(start, strict=False)
    model.save_pretrained(config.model.start)
    processor.save_pretrained(config.model.start)
    return fingerprint(known)


def towers(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights of the towers of a model, by their names in an EVACap."""
    encoder = model.get_encoder().state_dict()
    return {f"model.encoder.{name}": value for name, value in encoder.items() if "_tower." in name}


def fingerprint(weights: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def provenance(study: Study, config: RunConfig) -> dict[str, Any]:
    """The origin of a result.

    It has the command, the starts of the training with versions and git commit, the machine, the settings, and the seconds
    of all sessions that were not killed.
    """
    folder = Path(config.output)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() and not config.resources.cpu else "CPU"
    return {
        "command": study.command,
        "starts": json.loads((folder / "run.json").read_text(encoding="utf-8"))["starts"],
        "machine": {"device": device, "cores": os.cpu_count()},
        "settings": study.settings(config),
        "seconds": json.loads((folder / "seconds.json").read_text(encoding="utf-8")),
    }


@contextmanager
def stopwatch(folder: Path, name: str) -> Iterator[None]:
    """Adds the seconds within it to `name` in the `seconds.json` of the folder, even if it is interrupted."""
    began = time.monotonic()
    try:
        yield
    finally:
        path = folder / "seconds.json"
        seconds = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        seconds[name] = seconds.get(name, 0.0) + round(time.monotonic() - began, 1)
        write_json(path, seconds, indent=None)


def write_result(path: Path, result: dict[str, Any]) -> None:
    text = json.dumps(_rounded(result) | {"settings": result["settings"]}, indent=1)
    # Puts lists of numbers on one line. Line breaks in strings are escaped, so only the layout has real ones.
    text = re.sub(r"\[\n *([^\[\]{}]*)\n *\]", lambda found: "[" + re.sub(r"\n *", " ", found[1]) + "]", text)
    write_text(path, text + "\n")


def _rounded(value: Any) -> Any:
    """The value with numbers rounded to five digits, because people read result files too."""
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def forget_accelerator() -> None:
    """Resets the state of Accelerate, which keeps the settings of the first accelerator of a process.

    Otherwise the precision of the training would apply to the evaluation, but only if both run in one session.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def say(line: str) -> None:
    print(f"study: {line}", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m evacap.training.study",
        description="Trains and judges the variants of the study of mismatch; the same command does what is missing.",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="changes of the configuration, for all variants"
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=[*VARIANTS, *EXTRA],
        default=list(VARIANTS),
        metavar="NAME",
        help=f"variants among {', '.join(VARIANTS)} (default: all of these), {', '.join(EXTRA)}",
    )
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="seeds of the runs (default: 0 1 2)")
    parser.add_argument(
        "--report", action="store_true", help="write tables and plots of the existing results; run nothing"
    )
    parser.add_argument(
        "--keep-clips",
        action="store_true",
        help="render the clips of a seed once, for all variants, into OUTPUT/clips (tiny: 6 GB for each seed); a run then "
        "takes half the processor time, so two with different --variants can share two cores",
    )
    parser.add_argument(
        "--size",
        default="tiny",
        help="tiny; large, for a GPU; quick, to check that it works; or a YAML file of EVACap (default: %(default)s)",
    )
    parser.add_argument("--quick", action="store_true", help="all of it in minutes: --size quick, with one seed")
    parser.add_argument(
        "--output",
        type=Path,
        help="folder for checkpoints, models and captions (default: runs/study, with SIZE for others)",
    )
    parser.add_argument(
        "--results",
        type=Path,
        help="folder for result files, tables and plots (default: docs/study; OUTPUT/results for other settings)",
    )
    parser.add_argument(
        "--test-clips", type=int, metavar="N", help="clips of the evaluation (default: 500; quick: 20)"
    )
    options = parser.parse_intermixed_args(arguments)
    size = "quick" if options.quick else options.size
    is_tiny = size == "tiny" and not options.overrides and options.test_clips is None
    output = options.output or Path("runs", "study" if size == "tiny" else f"study_{Path(size).stem}")
    study = Study(
        size if Path(size).is_file() else f"study/{size}",
        tuple(options.overrides),
        output,
        options.results or (Path("docs/study") if is_tiny else output / "results"),
        options.test_clips or (20 if size == "quick" else 500),
        command=shlex.join(["python", "-m", "evacap.training.study", *arguments]),
        keep_clips=options.keep_clips,
    )
    try:
        if options.report:
            files = write_report(study.results)
            if not files:
                raise FileNotFoundError(f"{study.results / 'runs'} holds no result: run the study first.")
            print(*files, sep="\n")
            return 0
        return run_study(study, options.variants, options.seeds or ([0] if size == "quick" else [0, 1, 2]))
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        say(" ".join(str(error).split()))
        return 1
    except KeyboardInterrupt:
        say("stopped; the same command goes on from here")
        return 130


if __name__ == "__main__":
    sys.exit(main())

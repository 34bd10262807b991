"""The configuration of a training run: one YAML file, checked key by key."""

import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml


CONFIGS = Path(__file__).with_name("configs")
"""The folder of the configurations that come with the package."""


@dataclass
class LoraSection:
    """Low-rank adapters. The defaults are LAVCap's.

    Args:
        r (`int`, defaults to 8): Rank.
        alpha (`float`, defaults to 32.0): Their products are scaled by `alpha / r`.
        dropout (`float`, defaults to 0.1): Dropout of their inputs.
        target_modules (`str`): Regular expression of the names of linear layers that get one; by default queries and
            values of the audio tower and of the language model.
    """

    r: int = 8
    alpha: float = 32.0
    dropout: float = 0.1
    target_modules: str = r".*(audio_tower|language_model)\..*\.(q_proj|v_proj)"


@dataclass
class ModelSection:
    """The model to train.

    Args:
        preset (`str`, defaults to `"evacap"`): A key of [`~presets.PRESETS`], for the fusion, its gate and the
            processing.
        start (`str`, *optional*): A model folder, or its name on the Hub, to start from. `evacap import-weights` and
            training runs make such folders. Its sizes and its processor are kept. Without it the weights are random.
        tokenizer (`str`, *optional*): Without `start`: a BERT tokenizer of the Hub, a folder with its `vocab.txt`, or
            `"procedural"`, the words of the procedural clips.
        processing (`dict`): Without `start`: options of [`make_processor`] on top of the preset's.
        config (`dict`): Fields of [`EVACapConfig`], such as `gate_stability_weight`.
        attn_implementation (`str`, defaults to `"sdpa"`): Attention implementation of the towers and of the prefix.
        freeze (`list[str]`): Shell patterns of the names of parameters that are frozen.
        freeze_except (`list[str]`): Shell patterns of exceptions, which are trained.
        lora ([`LoraSection`], *optional*): Adapters; `{}` is LAVCap's. Checkpoints then hold only what is trained, and the
            saved models have the adapters merged into their weights.
        gradient_checkpointing (`bool`, defaults to `False`): Saves memory and takes a third more time.
    """

    preset: str = "evacap"
    start: str | None = None
    tokenizer: str | None = None
    processing: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    attn_implementation: str = "sdpa"
    freeze: list[str] = field(default_factory=list)
    freeze_except: list[str] = field(default_factory=list)
    lora: LoraSection | None = None
    gradient_checkpointing: bool = False


@dataclass
class DataSection:
    """The training clips: either `prepared` or `procedural`.

    Args:
        prepared (`str`, *optional*): A folder made by `evacap prepare`.
        split (`str`, defaults to `"train"`): The split of the folder.
        streamed (`bool`, defaults to `False`): Reads the shards sequentially instead of at random positions, for a
            folder in remote storage or on the Hub.
        procedural (`int`, *optional*): The number of procedural clips, rendered on access.
        p_mix (`float`, defaults to 0.05): Probability of another clip's video (Stochastic Modality Shuffling, paper).
        fixed_points (`bool`, defaults to `True`), whole_batch (`bool`, defaults to `False`): See
            [`EVACapDataCollator`].
        augmentation (`dict`, *optional*): Fields of [`Augmentation`]; `{}` is AVCap's recipe, `null` is none.
        hub_datasets (`list[str]`): Names of the datasets on the Hub, for the model card.
    """

    prepared: str | None = None
    split: str = "train"
    streamed: bool = False
    procedural: int | None = None
    p_mix: float = 0.05
    fixed_points: bool = True
    whole_batch: bool = False
    augmentation: dict[str, Any] | None = None
    hub_datasets: list[str] = field(default_factory=list)


@dataclass
class OptimizationSection:
    """The optimization. The defaults are AVCap's recipe.

    Args:
        epochs (`int`, defaults to 50): Number of epochs.
        max_steps (`int`, *optional*): The run ends after so many steps, even within an epoch. With 0 it saves the model that
            it would start from.
        batch_size (`int`, defaults to 8): Clips of a batch, in each process.
        accumulation_steps (`int`, defaults to 1): Batches of each process for one step.
        learning_rate (`float`, defaults to 1e-4): Peak of the learning rate.
        warmup_epochs (`float`, defaults to 1.0): Length of the linear warm-up.
        warmup_start (`float`, defaults to 2e-7): Learning rate at the start of the warm-up.
        min_learning_rate (`float`, defaults to 1e-6): Learning rate at the end of the cosine decay.
        betas (`list[float]`, defaults to `[0.95, 0.999]`), weight_decay (`float`, defaults to 5e-7): Of AdamW.
        max_grad_norm (`float`, *optional*): Clips gradients to this norm; `null` does not clip.
    """

    epochs: int = 50
    max_steps: int | None = None
    batch_size: int = 8
    accumulation_steps: int = 1
    learning_rate: float = 1e-4
    warmup_epochs: float = 1.0
    warmup_start: float = 2e-7
    min_learning_rate: float = 1e-6
    betas: list[float] = field(default_factory=lambda: [0.95, 0.999])
    weight_decay: float = 5e-7
    max_grad_norm: float | None = 1.0


@dataclass
class AlignmentSection:
    """The alignment of an audio encoder with the pictures of its clips, instead of a training on captions (DALI).

    Args:
        teacher (`str`): The folder of a trained `video_only` captioner, or its name on the Hub. It is frozen.
        loss (`str`, defaults to `"ot"`): See [`alignment_loss`].
        solver (`str`, defaults to `"sinkhorn"`), epsilon (`float`, defaults to 0.05), iterations (`int`, defaults to 50): See
            [`transport_cost`].
        keep (`float`, defaults to 0.5): The share of the clips of a batch that count: those whose sound and picture agree
            most, see [`most_agreeing`].
        tokens (`int`, *optional*): Draws so many tokens of each stream at random in each step; by default it takes all.
        entropy_weight (`float`, defaults to 100.0): With `"attentive_ot"`: the weight of the entropy of the tokens' weights at
            the end of the run, see [`~AlignmentRun.entropy_weight`].
        scorers_learning_rate (`float`, defaults to 1e-4): With `"attentive_ot"`: the learning rate of [`TokenScorers`], which
            does not change.
    """

    teacher: str
    loss: Literal["mmd", "ot", "attentive_ot", "contrast"] = "ot"
    solver: Literal["sinkhorn", "exact"] = "sinkhorn"
    epsilon: float = 0.05
    iterations: int = 50
    keep: float = 0.5
    tokens: int | None = None
    entropy_weight: float = 100.0
    scorers_learning_rate: float = 1e-4


@dataclass
class ValidationSection:
    """The validation during training.

    Args:
        every_steps (`int`, *optional*): Steps between validations; the last one is at the end. `null` for none.
        prepared (`str`, *optional*): Folder of the clips; `data.prepared` by default.
        split (`str`, defaults to `"validation"`): The split of the folder.
        procedural (`int`, *optional*): The number of procedural clips, instead of `prepared`.
        max_clips (`int`, *optional*): Takes only so many clips, the first ones.
        batch_size (`int`, defaults to 8): Clips of a batch, in each process.
        num_beams (`int`, defaults to 1): Number of beams.
        metrics (`list[str]`): Metrics of [`compute_metrics`]; `[]` for the loss alone.
        best (`str`, defaults to `"loss"`): The figure that ranks the models: `"loss"`, or one of the metrics, such as
            `"spider"`.
        keep_best (`int`, defaults to 1): Number of best models to keep.
        patience (`int`, *optional*): Ends the run after so many validations in a row without improvement.
    """

    every_steps: int | None = None
    prepared: str | None = None
    split: str = "validation"
    procedural: int | None = None
    max_clips: int | None = None
    batch_size: int = 8
    num_beams: int = 1
    metrics: list[str] = field(default_factory=list)
    best: str = "loss"
    keep_best: int = 1
    patience: int | None = None


@dataclass
class SavingSection:
    """The checkpoints and models.

    Args:
        every_steps (`int`, *optional*): Steps between checkpoints, `null` for one per epoch; the last one is at the
            end.
        keep (`int`, defaults to 2): Number of newest checkpoints to keep.
        code (`bool`, defaults to `True`): Whether saved models carry their code, to load without this package.
    """

    every_steps: int | None = None
    keep: int = 2
    code: bool = True


@dataclass
class LoggingSection:
    """The logs.

    Args:
        every_steps (`int`, defaults to 10): Steps between lines of `log.jsonl`; a line has the means over them.
        trackers (`list[str]`, defaults to `["tensorboard"]`): Trackers of Accelerate, such as `"wandb"`.
        project (`str`, defaults to `"evacap"`): Name of the project in the trackers.
    """

    every_steps: int = 10
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    project: str = "evacap"


@dataclass
class ResourcesSection:
    """The hardware. `accelerate launch` sets the number of processes and the machines.

    Args:
        mixed_precision (`str`, defaults to `"bf16"`): `"bf16"`, `"fp16"` or `"no"`. The weights stay in float32.
        cpu (`bool`, defaults to `False`): Trains on the CPU even if there is a GPU.
        num_workers (`int`, defaults to 4): Data loading processes for each training process.
        prefetch (`int`, defaults to 2): Batches that each of them prepares in advance.
        num_threads (`int`, *optional*): Threads of PyTorch in each training process; chosen by PyTorch by default.
        kept_clips (`str`, *optional*): A folder for procedural clips that several runs share: they are rendered once,
            before the training. By default each run renders them on access.
    """

    mixed_precision: Literal["no", "bf16", "fp16"] = "bf16"
    cpu: bool = False
    num_workers: int = 4
    prefetch: int = 2
    num_threads: int | None = None
    kept_clips: str | None = None


@dataclass
class RunConfig:
    """A training run.

    Args:
        output (`str`): The folder of the run, for checkpoints, models and logs. The same configuration with the same
            folder continues the run.
        seed (`int`, defaults to 0): Seed of the initial weights, the order of the clips, dropout, augmentation and
            swaps.
        alignment ([`AlignmentSection`], *optional*): Aligns an audio encoder with a captioner of pictures, instead of
            training on captions.
        model, data, optimization, validation, saving, logging, resources: See the classes of the sections.
    """

    output: str
    seed: int = 0
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    optimization: OptimizationSection = field(default_factory=OptimizationSection)
    alignment: AlignmentSection | None = None
    validation: ValidationSection = field(default_factory=ValidationSection)
    saving: SavingSection = field(default_factory=SavingSection)
    logging: LoggingSection = field(default_factory=LoggingSection)
    resources: ResourcesSection = field(default_factory=ResourcesSection)


def load_run_config(name: str | os.PathLike, overrides: Iterable[str] = ()) -> RunConfig:
    """Reads a configuration.

    Args:
        name (`str` or `os.PathLike`): A YAML file, or the name of a shipped one, such as `"evacap"`. Its key `base`
            names another configuration, shipped or in the same folder, whose values it changes.
        overrides (`Iterable[str]`): Further changes, `key=value` with the value in YAML, such as
            `optimization.learning_rate=3e-4`.

    Raises:
        FileNotFoundError: If there is no such configuration.
        ValueError: If a key is unknown or its value has the wrong type; the message names the key and its file.
    """
    values = _read(_find(name))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"{override!r} is not a change of the configuration: write KEY=VALUE, such as seed=1.")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"{override!r}: the value is not YAML ({error}).") from error
        for part in reversed(key.strip().split(".")):
            value = {part: value}
        values = _merge(values, value)
    config = _build(RunConfig, values, "")
    _check(config)
    return config


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """The values of a configuration, or of its `dict`, by their full keys: `{"model.preset": "evacap"}`."""
    content = dataclasses.asdict(config) if dataclasses.is_dataclass(config) else config
    flat = {}
    for name, value in content.items():
        inner = value if isinstance(value, dict) and prefix == "" else None
        flat |= {prefix + name: value} if inner is None else flatten(inner, f"{prefix}{name}.")
    return flat


def shipped_configs() -> list[str]:
    """The names of the configurations that come with the package."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def _find(name: str | os.PathLike, beside: Path = Path()) -> Path:
    for path in (beside / name, CONFIGS / f"{name}.yaml"):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"{name}: there is no such file, and no such configuration among the shipped ones: "
        f"{', '.join(shipped_configs())}."
    )


def _read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values of a file, merged into those of its base."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a YAML file ({error}).") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ValueError(f"{path}: it holds a {type(values).__name__}, but it must hold keys with values.")
    base = values.pop("base", None)
    if base is None:
        return values
    base_path = _find(base, path.parent)
    if base_path in (*seen, path):
        raise ValueError(f"{path}: its `base` {base!r} leads back to itself.")
    return _merge(_read(base_path, (*seen, path)), values)


def _merge(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with `changes`, merged recursively."""
    merged = dict(values)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _build(kind: type, values: Any, prefix: str) -> Any:
    """Makes a dataclass from a dictionary and checks each value; messages put `prefix` before its keys."""
    if not isinstance(values, dict):
        raise ValueError(f"`{prefix.rstrip('.')}` is {values!r}, but it must hold keys with values.")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in values:
        if key not in fields:
            raise ValueError(
                f"`{prefix}{key}` is not a key of the configuration.{_near_misses(str(key), fields, prefix)}"
            )
    for name, entry in fields.items():
        if name not in values and entry.default is entry.default_factory is dataclasses.MISSING:
            raise ValueError(f"`{prefix}{name}` is missing: give it in the configuration or as {prefix}{name}=VALUE.")
    hints = typing.get_type_hints(kind)
    return kind(**{name: _convert(hints[name], value, f"{prefix}{name}") for name, value in values.items()})


def _near_misses(key: str, fields: Iterable[str], prefix: str) -> str:
    near = difflib.get_close_matches(key, fields, n=3, cutoff=0.5)
    # The key may lack its section, or be in the wrong one.
    places = [f"{section}.{key}" for section, hint in typing.get_type_hints(RunConfig).items() if _has(hint, key)]
    proposals = [f"`{prefix}{name}`" for name in near] + [f"`{place}`" for place in places]
    if proposals:
        return f" Did you mean {' or '.join(dict.fromkeys(proposals))}?"
    return f" There are {', '.join(f'`{prefix}{name}`' for name in fields)}."


def _has(kind: Any, key: str) -> bool:
    return dataclasses.is_dataclass(kind) and key in typing.get_type_hints(kind)


def _convert(hint: Any, value: Any, key: str) -> Any:
    """`value` converted to the type `hint`, or a `ValueError` that names `key`."""
    if dataclasses.is_dataclass(hint):
        return _build(hint, {} if value is None else value, f"{key}.")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return None if value is None else _convert(arguments[0], value, key)
    if origin is Literal:
        # YAML reads a bare `no` as false.
        value = "no" if value is False and "no" in arguments else value
        if value in arguments:
            return value
        raise ValueError(f"`{key}` is {value!r}, but it must be one of {', '.join(map(repr, arguments))}.")
    if origin is list and isinstance(value, list):
        return [_convert(arguments[0], item, f"{key}[{index}]") for index, item in enumerate(value)]
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        # YAML reads 1e-4 as text, because it has no decimal point.
        try:
            return float(value)
        except ValueError:
            pass
    plain = origin or hint
    if isinstance(value, plain) and not (plain is int and isinstance(value, bool)):
        return value
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        list: "a list",
        dict: "keys with values",
    }
    raise ValueError(f"`{key}` is {value!r}, but it must be {names[plain]}.")


def _check(config: RunConfig) -> None:
    """Checks what the types cannot express."""
    data, validation = config.data, config.validation
    if (data.prepared is None) == (data.procedural is None):
        raise ValueError(
            "Give either `data.prepared`, a folder made by `evacap prepare`, or `data.procedural`, a number of clips: "
            f"they are {data.prepared!r} and {data.procedural!r}."
        )
    at_least_one = {
        "data.procedural",
        "optimization.epochs",
        "optimization.batch_size",
        "optimization.accumulation_steps",
        "validation.every_steps",
        "validation.procedural",
        "validation.max_clips",
        "validation.batch_size",
        "validation.num_beams",
        "validation.keep_best",
        "validation.patience",
        "saving.every_steps",
        "saving.keep",
        "logging.every_steps",
        "resources.prefetch",
        "resources.num_threads",
        "alignment.iterations",
        "alignment.tokens",
    }
    not_negative = {
        "seed",
        "resources.num_workers",
        "optimization.max_steps",
        "optimization.warmup_epochs",
        "optimization.learning_rate",
        "alignment.entropy_weight",
        "alignment.scorers_learning_rate",
    }
    for key, value in flatten(config).items():
        least = 1 if key in at_least_one else 0 if key in not_negative else None
        if least is not None and value is not None and value < least:
            raise ValueError(f"`{key}` is {value}, but it must be at least {least}.")
    if config.alignment is not None:
        epsilon, keep = config.alignment.epsilon, config.alignment.keep
        if epsilon <= 0:
            raise ValueError(f"`alignment.epsilon` is {epsilon}, but it must be above 0.")
        if not 0 < keep <= 1:
            raise ValueError(f"`alignment.keep` is {keep}, but it must be above 0 and at most 1.")
    if len(config.optimization.betas) != 2:
        raise ValueError(f"`optimization.betas` is {config.optimization.betas}, but it must hold two numbers.")
    if validation.every_steps and validation.prepared is validation.procedural is data.prepared is None:
        raise ValueError(
            "`validation.prepared` or `validation.procedural` is missing, as `validation.every_steps` is set."
        )

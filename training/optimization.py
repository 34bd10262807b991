"""Frozen parameters, the parameter groups of AdamW, and the learning rate schedule."""

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup_lr_rate

from .run_config import OptimizationSection


def freeze(model: nn.Module, patterns: Iterable[str], exceptions: Iterable[str] = ()) -> list[str]:
    """Freezes the parameters whose name fits one of `patterns` and none of `exceptions`.

    Args:
        model (`nn.Module`): The model. Tied weights are frozen if one of their names is.
        patterns (`Iterable[str]`): Shell patterns, such as `"model.decoder.*"`.
        exceptions (`Iterable[str]`): Shell patterns of parameters that stay trainable.

    Returns:
        The names of the frozen parameters.

    Raises:
        ValueError: If a pattern fits no parameter, or if nothing is left to train.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    frozen = _matches(parameters, patterns) - _matches(parameters, exceptions)
    if frozen == parameters.keys():
        raise ValueError("`model.freeze` fits every parameter: there is nothing left to train.")
    for name in frozen:
        parameters[name].requires_grad_(False)
    return sorted(frozen)


def _matches(names: Iterable[str], patterns: Iterable[str]) -> set[str]:
    matches = set()
    for pattern in patterns:
        fitting = {name for name in names if fnmatchcase(name, pattern)}
        if not fitting:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3)
            raise ValueError(
                f"{pattern!r} fits no parameter of the model. Near to it are {', '.join(near) or 'none'}."
            )
        matches |= fitting
    return matches


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """The trained parameters in two groups for AdamW.

    The weights of linear layers and patch embeddings decay. Biases, norms, word and position embeddings, modality
    vectors and the gate's scalars do not.
    """
    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    decaying, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = name.endswith(".weight") and parameter.ndim > 1 and parameter not in tables
            (decaying if decays else others).append(parameter)
    return [{"params": decaying, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def make_optimizer(model: nn.Module, section: OptimizationSection) -> AdamW:
    """AdamW with the groups of [`parameter_groups`]."""
    groups = parameter_groups(model, section.weight_decay)
    return AdamW(groups, lr=section.learning_rate, betas=tuple(section.betas), fused=True)


def make_scheduler(
    optimizer: Optimizer, section: OptimizationSection, steps_per_epoch: float, total_steps: int
) -> LRScheduler:
    """The learning rate schedule: linear warm-up, then cosine decay (AVCap).

    The rate rises from `warmup_start` to `learning_rate` and falls to `min_learning_rate` in the last step. That of a group
    with `is_constant=True` stays as it is.

    Args:
        optimizer (`Optimizer`): The optimizer of [`make_optimizer`].
        section ([`~run_config.OptimizationSection`]): The rates and `warmup_epochs`.
        steps_per_epoch (`float`): Steps of an epoch.
        total_steps (`int`): Steps of the run.
    """
    scheduler = get_cosine_with_min_lr_schedule_with_warmup_lr_rate(
        optimizer,
        num_warmup_steps=min(round(section.warmup_epochs * steps_per_epoch), total_steps),
        num_training_steps=total_steps,
        min_lr_rate=section.min_learning_rate / section.learning_rate,
        warmup_lr_rate=section.warmup_start / section.learning_rate,
    )
    for place, group in enumerate(optimizer.param_groups):
        if group.get("is_constant"):
            scheduler.lr_lambdas[place] = lambda step: 1.0
            group["lr"] = scheduler.base_lrs[place]
    return scheduler

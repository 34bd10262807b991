import math

import pytest
import torch
from training_runs import write_config

from evacap.modeling_evacap.modeling_evacap import EVACapForConditionalGeneration
from evacap.training.components import make_model, make_processor_and_config
from evacap.training.optimization import freeze, make_optimizer, make_scheduler, parameter_groups
from evacap.training.run_config import OptimizationSection, load_run_config


@pytest.fixture(scope="module")
def section(tmp_path_factory):
    return load_run_config(write_config(tmp_path_factory.mktemp("run") / "small.yaml")).model


@pytest.fixture
def model(section):
    return make_model(section, make_processor_and_config(section)[1])


def test_biases_norms_tables_and_the_gate_do_not_decay(model):
    decaying, others = parameter_groups(model, 0.5)
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.5, 0.0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    decaying, others = ({names[parameter] for parameter in group["params"]} for group in (decaying, others))
    assert decaying | others == set(names.values()) and not decaying & others
    tables = ("embed_tokens.weight", "embed_positions.weight", "position_embeddings", "modality_embedding")
    scalars = ("gate_weight", "gate_bias")
    norms = {name for name, parameter in model.named_parameters() if parameter.ndim == 1}
    assert others == norms | {name for name in names.values() if name.endswith(tables + scalars)}
    assert {
        "model.encoder.fusion.q_proj.weight",
        "model.encoder.video_tower.embeddings.patch_embeddings.weight",
    } <= decaying


def test_freezing_by_pattern(model):
    frozen = freeze(model, ["model.decoder.*", "lm_head.*"], ["model.decoder.prefix_*"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not trained & set(frozen)
    assert {"model.decoder.embed_tokens.weight", "lm_head.bias", "model.decoder.layers.0.fc1.bias"} <= set(frozen)
    prefix = {name for name in trained if name.startswith("model.decoder")}
    assert prefix == {
        f"model.decoder.prefix_{part}.{kind}" for part in ("projection", "layer_norm") for kind in ("weight", "bias")
    }
    assert {p for group in parameter_groups(model, 0.1) for p in group["params"]} == {
        p for p in model.parameters() if p.requires_grad
    }


def test_what_reads_the_streams_is_trained_in_the_recipe_of_adaptive_fusion():
    config = load_run_config(
        "vact", ["data.procedural=1", "validation.every_steps=null", "model.tokenizer=procedural"]
    )
    with torch.device("meta"):
        model = EVACapForConditionalGeneration(make_processor_and_config(config.model)[1])
    frozen = freeze(model, config.model.freeze, config.model.freeze_except)
    assert not any("encoder_attn" in name or "encoder." in name for name in frozen)
    assert {"model.decoder.layers.0.fc1.weight", "model.decoder.layers.5.self_attn.q_proj.weight"} <= set(frozen)


def test_a_pattern_that_fits_nothing_is_an_error(model):
    with pytest.raises(
        ValueError, match="'model.decodr.embed_tokens.weight' fits no.*model.decoder.embed_tokens.weight"
    ):
        freeze(model, ["model.decodr.embed_tokens.weight"])
    with pytest.raises(ValueError, match="nothing left to train"):
        freeze(model, ["*"])


def test_the_learning_rate_rises_along_a_line_and_falls_along_a_cosine_to_its_floor(model):
    section = OptimizationSection()
    optimizer = make_optimizer(model, section)
    scheduler = make_scheduler(optimizer, section, steps_per_epoch=10, total_steps=500)
    rates = []
    for _ in range(500):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    torch.testing.assert_close(torch.tensor(rates[:10]), torch.linspace(2e-7, 1e-4, 10), atol=1e-9, rtol=0)
    for step in (10, 250, 499):
        cosine = 1e-6 + (1e-4 - 1e-6) * (1 + math.cos(math.pi * (step - 9) / 490)) / 2
        assert rates[step] == pytest.approx(cosine)
    assert rates[-1] == pytest.approx(1e-6)
    assert [group["betas"] for group in optimizer.param_groups] == [(0.95, 0.999)] * 2


def test_a_constant_group_learns_as_by_an_adam_of_its_own():
    def parts():
        torch.manual_seed(0)
        return torch.nn.ModuleDict({"student": torch.nn.Linear(4, 4), "scorers": torch.nn.Linear(4, 4)})

    section = OptimizationSection(learning_rate=1e-2, weight_decay=0.5)
    together, apart = parts(), parts()
    optimizer = make_optimizer(torch.nn.ModuleDict({"student": together["student"]}), section)
    scorers = list(together["scorers"].parameters())
    optimizer.add_param_group({"params": scorers, "lr": 2e-3, "weight_decay": 0.0, "is_constant": True})
    scheduler = make_scheduler(optimizer, section, steps_per_epoch=2, total_steps=20)
    assert optimizer.param_groups[2]["lr"] == 2e-3
    own = torch.optim.Adam(apart["scorers"].parameters(), lr=2e-3, betas=section.betas)
    alone = make_optimizer(torch.nn.ModuleDict({"student": apart["student"]}), section)
    alone_scheduler = make_scheduler(alone, section, steps_per_epoch=2, total_steps=20)
    for step in range(20):
        inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        for model in (together, apart):
            (model["student"](inputs).square().sum() + model["scorers"](inputs).cos().sum()).backward()
            # The student's gradients are clipped, and the scorers do not learn at first.
            torch.nn.utils.clip_grad_norm_(model["student"].parameters(), 0.1)
            if step < 3:
                model["scorers"].zero_grad()
        for one in (optimizer, own, alone):
            one.step()
            one.zero_grad()
        scheduler.step()
        alone_scheduler.step()
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates[2] == 2e-3 and rates[0] == rates[1] == alone.param_groups[0]["lr"] < 1e-3
    for name, parameter in together.named_parameters():
        torch.testing.assert_close(parameter, apart.get_parameter(name), atol=1e-7, rtol=1e-6)

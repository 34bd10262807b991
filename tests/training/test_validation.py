import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from training_runs import write_config

import evacap
from evacap.training.components import make_collators, make_model, make_processor_and_config, make_validation_clips
from evacap.training.run_config import RunConfig, load_run_config
from evacap.training.validation import Validation


@pytest.fixture
def config(tmp_path) -> RunConfig:
    section = {"every_steps": 1, "procedural": 5, "batch_size": 2, "metrics": ["bleu", "cider_d"], "best": "bleu_4"}
    return load_run_config(write_config(tmp_path / "a.yaml", {"validation": section}))


def make_validation(config: RunConfig) -> tuple[Validation, torch.nn.Module]:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    processor, model_config = make_processor_and_config(config.model)
    clips = make_validation_clips(config, processor)
    collator = make_collators(config, processor, model_config)[1]
    torch.manual_seed(0)
    return Validation(clips, processor, config, Accelerator(cpu=True), collator), make_model(
        config.model, model_config
    )


def test_the_loss_is_a_mean_over_all_tokens_and_nothing_random_is_drawn(config):
    validation, model = make_validation(config)
    state = torch.get_rng_state()
    figures = validation(model.train())
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert set(figures) == {"loss", "bleu_1", "bleu_2", "bleu_3", "bleu_4", "cider_d"}
    clips = validation.loader.dataset
    batch = evacap.EVACapDataCollator(p_mix=0.0)([clips[index] for index in range(5)])
    with torch.no_grad():
        assert figures["loss"] == pytest.approx(model.eval()(**batch).loss.item(), rel=1e-5)


def test_captions_are_scored_against_all_references(config):
    validation, _ = make_validation(config)
    assert [len(references) for references in validation.references] == [5] * 5
    perfect = validation._score([references[-1] for references in validation.references])
    assert perfect["bleu_4"] == pytest.approx(1.0) and perfect["cider_d"] > 1


def test_spider_tells_the_best(config, spice_parser):
    config.validation.metrics, config.validation.best = ["cider_d", "spice", "spider"], "spider"
    validation, _ = make_validation(config)
    figures = validation._score([references[-1] for references in validation.references])
    assert figures["spider"] == pytest.approx((figures["cider_d"] + figures["spice"]) / 2) and figures["spice"] > 0.5


def test_the_first_clips_alone(config):
    config.validation.max_clips = 2
    validation, model = make_validation(config)
    assert len(validation.references) == 2 and validation(model)["loss"] > 0


@pytest.mark.parametrize(("metrics", "message"), [(["rouge_l"], "`validation.best` is 'bleu_4'"), (["blue"], "blue")])
def test_what_cannot_be_scored_is_said_before_the_run(config, metrics, message):
    config.validation.metrics = metrics
    with pytest.raises(ValueError, match=message):
        make_validation(config)

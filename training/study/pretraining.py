"""Audio-visual contrast of the two towers: the start that captioners share, as CAV-MAE's is the real ones'."""

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from ...modeling_evacap.modeling_evacap import EVACapForConditionalGeneration
from ..data.collator import EVACapDataCollator
from ..run_config import RunConfig
from ..train import StopSignals, TrainingRun, train


TEMPERATURE = 0.05
"""Of the similarities (CAV-MAE)."""


class ContrastiveRun(TrainingRun):
    """A run whose steps lower the contrast of a captioner's towers, and leave all else in it as it was born."""

    def step(self, batches: list[dict[str, torch.Tensor]], stop: StopSignals) -> tuple[dict[str, float], bool]:
        """See [`TrainingRun.step`]; for a single process."""
        accelerator, total = self.accelerator, 0.0
        for batch in batches:
            with accelerator.autocast():
                means = embed(self.model, batch)
            # In half precision a similarity of nearly 1, over the temperature, would be off by a tenth.
            loss = contrast(*means)
            accelerator.backward(loss / len(batches))
            total += loss.detach() / len(batches)
        norm = accelerator.clip_grad_norm_(self.model.parameters(), self.config.optimization.max_grad_norm or np.inf)
        figures = {"loss": float(total), "grad_norm": float(norm)}
        self.advance(figures)
        return figures, bool(stop.number)


def pretrain(config: RunConfig) -> int:
    """Trains the towers of a captioner by contrast, from the newest checkpoint in `config.output` where there is one. The
    captioner is then in the folder `model` there.

    Args:
        config ([`RunConfig`]): A variant with both towers; nothing is validated.

    Returns:
        What [`~train.train`] returns.
    """
    return train(config, ContrastiveRun)


def embed(model: EVACapForConditionalGeneration, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The means of the towers' tokens, brought to length 1: (batch_size, hidden_size) of the sounds and of the
    pictures.
    """
    encoder = model.get_encoder()
    tokens = (
        encoder.audio_tower(batch["input_features"]).last_hidden_state,
        encoder.video_tower(batch["pixel_values_videos"]).last_hidden_state,
    )
    sounds, pictures = (F.normalize(stream.float().mean(1), dim=-1) for stream in tokens)
    return sounds, pictures


def contrast(sounds: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
    """The contrastive loss of CAV-MAE, in both directions: how surprising it is, from the similarities within the batch,
    which picture belongs to a sound, and which sound to a picture.

    Args:
        sounds, pictures (`torch.Tensor` of shape `(batch_size, hidden_size)`): As [`embed`] makes them.
    """
    similarities = sounds @ pictures.T / TEMPERATURE
    own = torch.arange(len(sounds), device=sounds.device)
    return (F.cross_entropy(similarities, own) + F.cross_entropy(similarities.T, own)) / 2


@torch.no_grad()
def retrieval(
    model: EVACapForConditionalGeneration, clips: Dataset, batch_size: int = 50, num_workers: int = 0
) -> dict[str, float]:
    """How often a clip's own picture is the most similar to its sound among those of all clips, and the other way
    round: the shares, from 0 to 1, `pictures` and `sounds`.
    """
    model.eval()
    loader = DataLoader(clips, batch_size, collate_fn=EVACapDataCollator(p_mix=0.0), num_workers=num_workers)
    parts = [embed(model, {name: value.to(model.device) for name, value in batch.items()}) for batch in loader]
    sounds, pictures = (torch.cat(part) for part in zip(*parts))
    similarities = (sounds @ pictures.T).cpu()
    own = torch.arange(len(similarities))
    return {
        "clips": len(own),
        "pictures": (similarities.argmax(1) == own).double().mean().item(),
        "sounds": (similarities.argmax(0) == own).double().mean().item(),
    }

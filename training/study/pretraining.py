"""Contrastive pretraining of the two towers.

All captioners of the study start from the towers that it trains, as the paper's models start from CAV-MAE.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from ...modeling_evacap.modeling_evacap import EVACapForConditionalGeneration
from ..alignment import CONTRAST_TEMPERATURE
from ..data.collator import EVACapDataCollator
from ..run_config import RunConfig
from ..train import StopSignals, TrainingRun, train


class ContrastiveRun(TrainingRun):
    """A run that trains a captioner's towers by the contrastive loss and leaves its other weights unchanged."""

    def step(self, batches: list[dict[str, torch.Tensor]], stop: StopSignals) -> tuple[dict[str, float], bool]:
        """See [`TrainingRun.step`]. It supports a single process only."""
        accelerator, total = self.accelerator, 0.0
        for batch in batches:
            with accelerator.autocast():
                means = embed(self.model, batch)
            # In half precision, a similarity near 1 divided by the temperature would be wrong by 0.1.
            loss = contrast(*means)
            accelerator.backward(loss / len(batches))
            total += loss.detach() / len(batches)
        norm = accelerator.clip_grad_norm_(self.model.parameters(), self.config.optimization.max_grad_norm or np.inf)
        figures = {"loss": float(total), "grad_norm": float(norm)}
        self.advance(figures)
        return figures, bool(stop.number)


def pretrain(config: RunConfig) -> int:
    """Trains the towers of a captioner by the contrastive loss and saves the captioner in `config.output/model`.

    It goes on from the newest checkpoint in `config.output`, if there is one.

    Args:
        config ([`RunConfig`]): A variant with both towers. There is no validation.

    Returns:
        The status of [`~train.train`].
    """
    return train(config, ContrastiveRun)


def embed(model: EVACapForConditionalGeneration, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The normalised mean of each tower's tokens: (batch_size, hidden_size) for sounds and for pictures."""
    encoder = model.get_encoder()
    tokens = (
        encoder.audio_tower(batch["input_features"]).last_hidden_state,
        encoder.video_tower(batch["pixel_values_videos"]).last_hidden_state,
    )
    sounds, pictures = (F.normalize(stream.float().mean(1), dim=-1) for stream in tokens)
    return sounds, pictures


def contrast(sounds: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
    """The contrastive loss of CAV-MAE: cross-entropy over the similarities within the batch, in both directions.

    [`caption_contrast`] is the same but for its rounding, which would give the study another start.

    Args:
        sounds (`torch.Tensor` of shape `(batch_size, hidden_size)`): Embeddings of the sounds, of unit length.
        pictures (`torch.Tensor` of shape `(batch_size, hidden_size)`): Embeddings of the pictures, of unit length.
    """
    similarities = sounds @ pictures.T / CONTRAST_TEMPERATURE
    own = torch.arange(len(sounds), device=sounds.device)
    return (F.cross_entropy(similarities, own) + F.cross_entropy(similarities.T, own)) / 2


@torch.no_grad()
def retrieval(
    model: EVACapForConditionalGeneration, clips: Dataset, batch_size: int = 50, num_workers: int = 0
) -> dict[str, float]:
    """Retrieval at rank 1 among all clips.

    Returns:
        `pictures`, the share of the clips whose own picture is the one most similar to their sound, and `sounds`, the
        share whose own sound is the one most similar to their picture.
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

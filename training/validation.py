"""Validation during training: the loss and the caption metrics."""

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list
from torch.utils.data import DataLoader, Dataset, Subset

from ..modeling_evacap.loss_evacap import label_smoothed_kl
from ..processing.captioning_evacap import caption_batch
from ..processing.processing_evacap import EVACapProcessor
from .data.collator import EVACapDataCollator
from .run_config import RunConfig


LOWER_IS_BETTER = ("loss",)


class Validation:
    """Evaluates a captioner on the same clips at every call.

    Args:
        clips (`Dataset`): Clips for [`EVACapDataCollator`], with a method `captions(index) -> list[str]`.
        processor ([`EVACapProcessor`]): Decodes the tokens.
        config ([`RunConfig`]): The configuration; its sections `validation` and `resources` are read.
        accelerator (`Accelerator`): Distributes the clips over the processes.
        collator ([`EVACapDataCollator`]): Makes the batches; it must not swap videos.

    Raises:
        ValueError: If `validation.best` is not one of the resulting figures.
        RuntimeError: If a metric cannot be computed on this machine.
    """

    def __init__(
        self,
        clips: Dataset,
        processor: EVACapProcessor,
        config: RunConfig,
        accelerator: Accelerator,
        collator: EVACapDataCollator,
    ):
        section = config.validation
        count = len(clips) if section.max_clips is None else min(section.max_clips, len(clips))
        self.references = [clips.captions(index) for index in range(count)]
        self.processor = processor
        self.section = section
        self.accelerator = accelerator
        self.loader = accelerator.prepare_data_loader(
            DataLoader(
                Subset(clips, range(count)),
                section.batch_size,
                collate_fn=collator,
                num_workers=config.resources.num_workers,
                # A generator of its own: validations must not change the order of training, nor its dropout.
                generator=torch.Generator(),
            )
        )
        if accelerator.is_main_process:
            # A wrong setting should fail now and not after hours.
            figures = self._score([captions[0] for captions in self.references[:1]]) | {"loss": 0.0}
            if section.best not in figures:
                raise ValueError(
                    f"`validation.best` is {section.best!r}, but it must be one of {', '.join(map(repr, figures))}, "
                    "which `validation.metrics` gives."
                )

    @torch.no_grad()
    def __call__(self, model: torch.nn.Module) -> dict[str, float]:
        """The figures of a model: `"loss"`, the mean over all caption tokens, and those of the metrics."""
        accelerator = self.accelerator
        captioner = accelerator.unwrap_model(model)
        model.eval()
        predictions, sums, tokens = [], [], []
        for batch in self.loader:
            labels = batch.pop("labels")
            with accelerator.autocast():
                logits = captioner(**batch, labels=labels).logits
                captioned = None
                if self.section.metrics:
                    # With FSDP every process takes part in every step, until the last one has its captions.
                    synced = accelerator.distributed_type == DistributedType.FSDP
                    captioned = caption_batch(
                        captioner, self.processor, batch, num_beams=self.section.num_beams, synced_gpus=synced
                    )
            counted = (labels != -100).sum(1)
            losses = [
                label_smoothed_kl(row[None], label[None], captioner.config.label_smoothing, 1)
                for row, label in zip(logits, labels, strict=True)
            ]
            # Accelerate fills the last batch with earlier clips, and drops them here.
            gathered = accelerator.gather_for_metrics((torch.stack(losses), counted))
            sums.append(gathered[0].double().sum())
            tokens.append(gathered[1].sum())
            if captioned is not None:
                texts = [sequences[0] for sequences in captioned.texts]
                predictions += accelerator.gather_for_metrics(texts, use_gather_object=True)
        model.train()
        figures = {"loss": (sum(sums) / sum(tokens)).item()}
        if accelerator.is_main_process:
            figures |= self._score(predictions)
        return broadcast_object_list([figures])[0]

    def _score(self, predictions: list[str]) -> dict[str, float]:
        if not self.section.metrics:
            return {}
        # Imported here because the loss alone does not need it.
        from .metrics.compute import compute_metrics

        references = self.references[: len(predictions)]
        scores = compute_metrics(predictions, references, metrics=tuple(self.section.metrics))
        for name, reason in scores["skipped"].items():
            raise RuntimeError(f"`validation.metrics` asks for {name}, which cannot be computed here: {reason}")
        return scores["corpus"]

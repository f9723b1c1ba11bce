"""The ``immunization.json`` of a finished run."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from hf_immunize.errors import RecordError
from hf_immunize.features import capture_inputs, lying_channels_last
from hf_immunize.records import DatasetFingerprint, ImmunizationRecord, ModelFingerprint, Provenance, SpectrumRecord
from hf_immunize.spectra import model_spectra, spectrum_record
from hf_immunize.training.core.sharding import original_class
from hf_immunize.training.vision.checkpoints import scientific_options
from hf_immunize.training.vision.frozen import BoundaryDataset
from hf_immunize.training.vision.trainer import ImmunizationTrainer

_ROWS = 32


def training_spectra(trainer: ImmunizationTrainer) -> list[SpectrumRecord]:
    """Spectra of the trainer's current weights over its whole primary and harmful training sets.

    Where the frozen part is cached, forwards start at the cached activations, computed now if they are
    not there yet.
    """
    trainer.cache_features()
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not trainer.args.cache_frozen_features:
        tasks = {"primary": trainer.primary_dataset, "harmful": trainer.harmful_dataset}
        return model_spectra(model, trainer.site, tasks, layout=trainer.layouts[trainer.site])
    return [
        spectrum_record(_cached_features(trainer, model, rows, task), rows.labels, site=trainer.site, task=task)
        for task, rows in trainer.trained_on.items()
    ]


@torch.no_grad()
def _cached_features(trainer: ImmunizationTrainer, model: nn.Module, rows: BoundaryDataset, task: str) -> Tensor:
    """N×D features of rows that are activations on disk, in evaluation mode."""
    was_training, device, parts = model.training, next(model.parameters()).device, []
    site = {trainer.site: trainer.layouts[trainer.site]}
    loader = DataLoader(rows, batch_size=_ROWS, collate_fn=trainer.data_collator)
    with lying_channels_last(model):
        model.eval()
        for batch in tqdm(loader, desc=f"{task} features", unit="batch", leave=False, disable=None):
            held = {"boundary": tuple(part.to(device) for part in batch["boundary"])}
            with trainer.frozen.entered(model, held) as plain, capture_inputs(model, site) as caught:
                model(**plain)
            parts.append(caught[trainer.site].cpu())
    model.train(was_training)
    return torch.cat(parts)


def immunization_record(
    trainer: ImmunizationTrainer,
    folder: str | Path,
    *,
    base: ModelFingerprint,
    data: list[DatasetFingerprint],
    fingerprint: str,
    spectra: dict[str, list[SpectrumRecord]],
    seconds: float,
) -> ImmunizationRecord:
    """Describe the run whose weights were saved in ``folder``; ``spectra`` are those of base and immunized model."""
    if trainer.guard_record is None:
        raise RecordError(
            "expected a finished run with an eval_dataset and a metric on it, got none: the record says what utility "
            "cost. Pass both to the trainer (guard_metric names the metric)."
        )
    model = trainer.accelerator.unwrap_model(trainer.model)
    saved = ModelFingerprint.of_folder(
        folder, name=Path(folder).name, architecture=original_class(model).__name__, parameters=model.num_parameters()
    )
    args = trainer.args
    return ImmunizationRecord(
        model=saved,
        base=base,
        config=scientific_options(args),
        fingerprint=fingerprint,
        seeds={"seed": args.seed, "data_seed": args.data_seed if args.data_seed is not None else args.seed},
        data=data,
        spectra=spectra,
        guard=trainer.guard_record,
        outcome=trainer.outcome,
        steps=trainer.state.global_step,
        saved_step=trainer.saved_step,
        seconds=seconds,
        provenance=Provenance.here(str(args.device)),
    )



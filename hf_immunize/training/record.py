"""The ``immunization.json`` of a finished run."""

from __future__ import annotations

from pathlib import Path

from hf_immunize.records import DatasetFingerprint, ImmunizationRecord, ModelFingerprint, Provenance, SpectrumRecord
from hf_immunize.spectra import model_spectra
from hf_immunize.training.checkpoints import scientific_options
from hf_immunize.training.trainer import ImmunizationTrainer


def training_spectra(trainer: ImmunizationTrainer) -> list[SpectrumRecord]:
    """Spectra of the trainer's current weights over its whole primary and harmful training sets."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    tasks = {"primary": trainer.primary_dataset, "harmful": trainer.harmful_dataset}
    return model_spectra(model, trainer.site, tasks)


def immunization_record(
    trainer: ImmunizationTrainer,
    folder: str | Path,
    *,
    base: ModelFingerprint,
    data: list[DatasetFingerprint],
    fingerprint: str,
    base_spectra: list[SpectrumRecord],
    seconds: float,
) -> ImmunizationRecord:
    """Describe the run whose weights were saved in ``folder``."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    saved = ModelFingerprint.of_folder(
        folder, name=Path(folder).name, architecture=type(model).__name__, parameters=model.num_parameters()
    )
    args = trainer.args
    return ImmunizationRecord(
        model=saved,
        base=base,
        config=scientific_options(args),
        fingerprint=fingerprint,
        seeds={"seed": args.seed, "data_seed": args.data_seed if args.data_seed is not None else args.seed},
        data=data,
        spectra={"base": base_spectra, "immunized": training_spectra(trainer)},
        guard=trainer.guard_record,
        steps=trainer.state.global_step,
        seconds=seconds,
        provenance=Provenance.here(str(args.device)),
    )



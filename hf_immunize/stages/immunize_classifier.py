"""The immunizing stage for image classifiers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageClassification, set_seed

from hf_immunize.data import TaskArguments, describe_source, for_model, names_classes
from hf_immunize.errors import ConfigError, ModelError, NotImmunizedError
from hf_immunize.models import load_classifier, load_processor
from hf_immunize.records import ModelFingerprint, begin_run, fingerprint_of
from hf_immunize.stages.base import ImmunizeOptions, fetch_base, leave_finished
from hf_immunize.tasks import ClassesTask
from hf_immunize.training import ImmunizationConfig, ImmunizationTrainer
from hf_immunize.training.vision.checkpoints import last_complete_checkpoint, scientific_options
from hf_immunize.training.vision.record import immunization_record, training_spectra

_SEEN = (("primary", "train"), ("primary", "validation"), ("harmful", "defense"))
"""All that a defender may look at."""


def immunize_classifier(
    arguments: TaskArguments, options: ImmunizeOptions, args: ImmunizationConfig
) -> ImmunizationTrainer | None:
    """See ``immunize_model``."""
    if options.from_scratch:
        _refuse_base_options(args)
    folder, source = fetch_base(options)
    processor = load_processor(folder, trust_remote_code=options.trust_remote_code)
    task = ClassesTask(arguments, processor)
    task.warn_of_copies("primary", "harmful")
    set_seed(args.seed)
    model = _load_weights(folder, options, task.label_names)
    _check_labels(model, task.label_names)
    base = _fingerprint(folder, model, options, source)
    train, validation, defense = (task.examples(*part) for part in _SEEN)
    data = [task.fingerprint(*part) for part in _SEEN]
    inputs = {
        "base": base.weights or {"config": model.config.to_diff_dict()},
        "task": task.described(),
        "data": {found.role: found.sha256 for found in data},
        "options": scientific_options(args),
    }
    if begin_run(args.output_dir, "immunize", inputs, write=args.process_index == 0):
        print(f"{args.output_dir}: already immunized, nothing to do")
        return None
    trainer = ImmunizationTrainer(
        model=model, args=args, train_dataset=for_model(train, model.config.id2label), harmful_dataset=defense,
        eval_dataset=for_model(validation, model.config.id2label), processing_class=processor,
    )  # fmt: skip
    base_spectra = training_spectra(trainer)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(args.output_dir))
    seconds = time.perf_counter() - start
    trainer.save_model()
    if trainer.is_world_process_zero():
        _write_record(trainer, inputs, base=base, data=data, base_spectra=base_spectra, seconds=seconds)
    trainer.accelerator.wait_for_everyone()
    if options.require:
        _require(trainer)
    trainer.accelerator.end_training()  # a rank that leaves while gloo's threads still run may be aborted
    return trainer


def _refuse_base_options(args: ImmunizationConfig) -> None:
    """Raise ConfigError for options that compare with theta_0, where there is none."""
    asked = {
        "distillation": args.distillation > 0,
        "feature_distillation": args.feature_distillation > 0,
        "max_primary_drop": args.max_primary_drop is not None,
    }
    if found := [name for name, on in asked.items() if on]:
        raise ConfigError(
            f"expected no {', no '.join(found)} with from_scratch, got some: they compare with a theta_0, and random "
            "weights are none. Balance with strength, and look at the accuracy that is reached."
        )


def _load_weights(folder: Path, options: ImmunizeOptions, label_names: list[str]) -> Any:
    """The classifier of a folder; with from_scratch, its architecture with a head for these labels."""
    trusted = {"trust_remote_code": options.trust_remote_code}
    if not options.from_scratch:
        return load_classifier(folder, **trusted)
    labels = {"id2label": dict(enumerate(label_names)), "label2id": {n: i for i, n in enumerate(label_names)}}
    config = AutoConfig.from_pretrained(folder, **labels, **trusted)
    return AutoModelForImageClassification.from_config(config, dtype=torch.float32, **trusted)


def _check_labels(model: Any, label_names: list[str]) -> None:
    """Raise ModelError for a head that neither has as many outputs as there are classes nor names them."""
    if model.config.num_labels != len(label_names) and not names_classes(model.config.id2label):
        raise ModelError(
            f"expected a base with {len(label_names)} labels, got {model.config.num_labels}: train its head on "
            "the primary task first (hf-immunize pretrain), or set id2label in its config.json."
        )


def _fingerprint(folder: Path, model: Any, options: ImmunizeOptions, source: Any) -> ModelFingerprint:
    """Identity of the base; random weights have no files."""
    name, kind = describe_source(options.base_path), type(model).__name__
    if options.from_scratch:
        name = f"{name} architecture, random weights"
        return ModelFingerprint(name=name, architecture=kind, parameters=model.num_parameters(), weights={})
    return ModelFingerprint.of_folder(
        folder, name=name, architecture=kind, parameters=model.num_parameters(), source=source
    )


def _write_record(trainer: ImmunizationTrainer, inputs: dict[str, Any], **known: Any) -> None:
    """``immunization.json`` beside the weights, checkpoints gone, the run marked as whole; say how it went."""
    folder, seconds = Path(trainer.args.output_dir), known["seconds"]
    record = immunization_record(trainer, folder, fingerprint=fingerprint_of(inputs), **known)
    record.write(folder / "immunization.json")
    leave_finished(folder, "immunize", inputs, ["config.json", "immunization.json"])
    guard = record.guard
    print(
        f"{trainer.args.output_dir}: {guard.metric} {guard.base:.2f} -> {guard.final:.2f} points on the validation "
        f"split, weights of step {guard.returned_step} of {record.steps}, {seconds:.0f} s"
    )


def _require(trainer: ImmunizationTrainer) -> None:
    """Raise NotImmunizedError unless the trainer's own outcome says that the model is immunized."""
    if trainer.outcome is None or not trainer.outcome.immunized:
        told = trainer.outcome.told if trainer.outcome else "harmful rows do not allow a probe"
        raise NotImmunizedError(f"expected an immunized model, as asked for by require, got {told}")

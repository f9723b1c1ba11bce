"""Immunize an image classifier against a harmful task, and write down how.

    accelerate launch recipes/immunize.py --config recipes/digits-vit/task.yaml \
        --config recipes/digits-vit/closed_form_adversary.yaml

With from_scratch there is no theta_0: random weights learn the primary task under the regularizers from the first step.

    accelerate launch recipes/immunize.py --config recipes/digits-vit/task.yaml \
        --config recipes/digits-vit/pretrain_immunized.yaml
"""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageClassification, set_seed

from hf_immunize.data import Task, TaskArguments, describe_source, for_model, names_classes, warn_of_copies
from hf_immunize.errors import ConfigError, ImmunizeError, ModelError, NotImmunizedError
from hf_immunize.hub import local_folder
from hf_immunize.models import load_classifier, load_processor, refuse_folder
from hf_immunize.options import parse_options
from hf_immunize.records import (
    DatasetFingerprint,
    ModelFingerprint,
    begin_run,
    fingerprint_of,
    finish_run,
    weight_files,
)
from hf_immunize.training import ImmunizationConfig, ImmunizationTrainer
from hf_immunize.training.vision.checkpoints import last_complete_checkpoint, scientific_options
from hf_immunize.training.vision.record import immunization_record, training_spectra


@dataclass
class BaseArguments:
    """Which model to immunize."""

    base_path: str = field(
        metadata={
            "help": "Folder or Hub id of the trained classifier to immunize (theta_0); with from_scratch, of a config "
            "and an image processor."
        }
    )
    from_scratch: bool = field(
        default=False,
        metadata={"help": "Immunize while pre-training: start at random weights; only config and processor are read."},
    )
    base_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a base on the Hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code that comes with the model."})
    require: bool = field(
        default=False,
        metadata={"help": "Leave with an error unless the last line says IMMUNIZED; model and record are written."},
    )


def load_base(options: BaseArguments, label_names: list[str]) -> tuple:
    """Model, processor and fingerprint of the base, from safetensors only; with from_scratch, of random weights."""
    refuse_folder(options.base_path)
    folder, source = local_folder(
        options.base_path, revision=options.base_revision, with_code=options.trust_remote_code
    )
    name = describe_source(options.base_path)
    processor = load_processor(folder, trust_remote_code=options.trust_remote_code)
    model = load_weights(folder, options, label_names)
    if options.from_scratch:
        print_of = ModelFingerprint(
            name=f"{name} architecture, random weights", architecture=type(model).__name__,
            parameters=model.num_parameters(), weights={},
        )  # fmt: skip
        return model, processor, print_of
    print_of = ModelFingerprint.of_folder(
        folder, name=name, architecture=type(model).__name__, parameters=model.num_parameters(), source=source
    )
    return model, processor, print_of


def load_weights(folder: Path, options: BaseArguments, label_names: list[str]) -> Any:
    """The classifier of a folder; with from_scratch, its architecture with a head for these labels."""
    trusted = {"trust_remote_code": options.trust_remote_code}
    if not options.from_scratch:
        return load_classifier(folder, **trusted)
    labels = {"id2label": dict(enumerate(label_names)), "label2id": {n: i for i, n in enumerate(label_names)}}
    config = AutoConfig.from_pretrained(folder, **labels, **trusted)
    return AutoModelForImageClassification.from_config(config, dtype=torch.float32, **trusted)


def refuse_base_options(args: ImmunizationConfig) -> None:
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


def main() -> None:
    task_options, base_options, args = parse_options(
        (TaskArguments, BaseArguments, ImmunizationConfig), description=__doc__.splitlines()[0]
    )
    if base_options.from_scratch:
        refuse_base_options(args)
    primary, harmful = Task(task_options, "primary"), Task(task_options, "harmful")
    warn_of_copies(primary, harmful)
    set_seed(args.seed)
    model, processor, base = load_base(base_options, primary.label_names)
    if model.config.num_labels != len(primary.label_names) and not names_classes(model.config.id2label):
        raise ModelError(
            f"expected a base with {len(primary.label_names)} labels, got {model.config.num_labels}: train its head on "
            "the primary task first (recipes/pretrain.py), or set id2label in its config.json."
        )
    train, validation = primary.pixels("train", processor), primary.pixels("validation", processor)
    defense = harmful.pixels("defense", processor)
    data = [
        primary.fingerprint(train, "train"),
        primary.fingerprint(validation, "validation"),
        harmful.fingerprint(defense, "defense"),
    ]
    inputs = inputs_of(base, model, task_options, data, args)
    if begin_run(args.output_dir, "immunize", inputs, write=args.process_index == 0):
        print(f"{args.output_dir}: already immunized, nothing to do")
        return
    trainer = ImmunizationTrainer(
        model=model,
        args=args,
        train_dataset=for_model(train, model.config.id2label),
        harmful_dataset=defense,
        eval_dataset=for_model(validation, model.config.id2label),
        processing_class=processor,
    )
    base_spectra = training_spectra(trainer)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(args.output_dir))
    seconds = time.perf_counter() - start
    trainer.save_model()
    # Every process measures: a model that is split over them answers to all at once.
    spectra = {"base": base_spectra, "immunized": training_spectra(trainer)}
    if trainer.is_world_process_zero():
        write_record(trainer, inputs, base=base, data=data, spectra=spectra, seconds=seconds)
    trainer.accelerator.wait_for_everyone()
    if base_options.require and (trainer.outcome is None or not trainer.outcome.immunized):
        told = trainer.outcome.told if trainer.outcome else "harmful rows do not allow a probe"
        raise NotImmunizedError(f"expected an immunized model, as asked for by require, got {told}")
    trainer.accelerator.end_training()  # a rank that leaves while gloo's threads still run may be aborted


def inputs_of(
    base: ModelFingerprint, model: Any, task: TaskArguments, data: list[DatasetFingerprint], args: ImmunizationConfig
) -> dict[str, Any]:
    """What decides the result of the run: another run with the same inputs has nothing to do."""
    return {
        "base": base.weights or {"config": model.config.to_diff_dict()},
        "task": {
            **task.described(),
            "primary_dataset": describe_source(task.primary_dataset),
            "harmful_dataset": describe_source(task.harmful_dataset),
        },
        "data": {found.role: found.sha256 for found in data},
        "options": scientific_options(args),
    }


def write_record(trainer: ImmunizationTrainer, inputs: dict[str, Any], **known: Any) -> None:
    """``immunization.json`` beside the weights, checkpoints gone, the run marked as whole; say how it went."""
    folder, seconds = Path(trainer.args.output_dir), known["seconds"]
    record = immunization_record(trainer, folder, fingerprint=fingerprint_of(inputs), **known)
    record.write(folder / "immunization.json")
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    weights = [path.relative_to(folder).as_posix() for path in weight_files(folder)]
    finish_run(folder, "immunize", inputs, [*weights, "config.json", "immunization.json"])
    guard = record.guard
    print(
        f"{trainer.args.output_dir}: {guard.metric} {guard.base:.2f} -> {guard.final:.2f} points on the validation "
        f"split, weights of step {guard.returned_step} of {record.steps}, {seconds:.0f} s"
    )


if __name__ == "__main__":
    try:
        main()
    except ImmunizeError as error:
        sys.exit(f"{type(error).__name__}: {error}")

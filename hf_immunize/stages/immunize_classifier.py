"""What the immunizing stage does to image classifiers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import set_seed

from hf_immunize.data import (
    PROBE_SPLIT,
    PixelDataset,
    TaskArguments,
    describe_source,
    for_model,
    id2label_of,
    names_classes,
)
from hf_immunize.errors import ConfigError, ModelError
from hf_immunize.models import label_maps, load_classifier, load_processor, random_classifier
from hf_immunize.records import ImmunizationRecord, ModelFingerprint
from hf_immunize.stages.base import ImmunizeOptions, fetch_base, require_outcome
from hf_immunize.tasks import ClassesTask
from hf_immunize.training import ImmunizationConfig, ImmunizationTrainer
from hf_immunize.training.vision.checkpoints import scientific_options
from hf_immunize.training.vision.record import immunization_record, training_spectra


class ClassifierDefence:
    """A classifier from safetensors, or its architecture with random weights."""

    stage, index = "immunize", "config.json"

    def __init__(self, arguments: TaskArguments, options: ImmunizeOptions, args: ImmunizationConfig):
        if options.from_scratch:
            _refuse_base_options(args)
        folder, source = fetch_base(options)
        self._options, self._args = options, args
        self._processor = load_processor(folder, trust_remote_code=options.trust_remote_code)
        self.task = ClassesTask(arguments, self._processor)
        self.task.refuse_one_task()
        self.task.warn_of_copies("primary", "harmful")
        set_seed(args.seed)
        self._model = model = _load_weights(folder, options, self.task.label_names)
        _check_labels(model, self.task.label_names)
        name, told = describe_source(options.base_path), {
            "architecture": type(model).__name__, "parameters": model.num_parameters()}  # fmt: skip
        if options.from_scratch:
            self.base = ModelFingerprint(name=f"{name} architecture, random weights", weights={}, **told)
        else:
            self.base = ModelFingerprint.of_folder(folder, name=name, source=source, **told)
        self.start = {"config": model.config.to_diff_dict()}
        self.options_told, self.is_main = scientific_options(args), args.process_index == 0

    def trainer(self, train: PixelDataset, validation: PixelDataset, defense: PixelDataset) -> ImmunizationTrainer:
        """The Trainer, after a look at the base's spectra."""
        labels = id2label_of(self._model.config)
        made = ImmunizationTrainer(
            model=self._model, args=self._args, train_dataset=for_model(train, labels), harmful_dataset=defense,
            eval_dataset=for_model(validation, labels), processing_class=self._processor,
            harmful_eval_dataset=self._held_out(),
        )  # fmt: skip
        self._before = training_spectra(made)
        return made

    def _held_out(self) -> PixelDataset | None:
        """Harmful rows of the defender that are not trained on: the split ``probe``, where there is one."""
        harmful = self.task.side("harmful")
        return self.task.examples("harmful", PROBE_SPLIT) if PROBE_SPLIT in harmful.split_names else None

    def save(self, trainer: ImmunizationTrainer) -> None:
        """Model and processor, and a look at the spectra: a model that is split answers to all processes at once."""
        trainer.save_model()
        self._spectra = {"base": self._before, "immunized": training_spectra(trainer)}

    def record(self, trainer: ImmunizationTrainer, **known: Any) -> ImmunizationRecord:
        """Spectra before and after, guard, outcome."""
        return immunization_record(
            trainer, Path(str(self._args.output_dir)), base=self.base, spectra=self._spectra, **known
        )

    def told(self, guard: Any) -> str:
        """The primary metric before and after."""
        return f"{guard.metric} {guard.base:.2f} -> {guard.final:.2f} points on the validation split"

    def leave(self, trainer: ImmunizationTrainer) -> None:
        """Meet the other processes. Raises NotImmunizedError where ``require`` is not met."""
        trainer.accelerator.wait_for_everyone()
        require_outcome(self._options, trainer.outcome)


def _refuse_base_options(args: ImmunizationConfig) -> None:
    """Raise ConfigError for options that compare with theta_0, where there is none."""
    asked = {
        "distillation": bool(args.distillation),
        "feature_distillation": bool(args.feature_distillation),
        "max_primary_drop": args.max_primary_drop is not None,
    }
    if found := [name for name, on in asked.items() if on]:
        raise ConfigError(
            f"expected no {', no '.join(found)} with from_scratch, got some: they compare with a theta_0, and random "
            "weights are none. Balance with strength, and look at the accuracy that is reached."
        )


def _load_weights(folder: Path, options: ImmunizeOptions, label_names: list[str]) -> Any:
    """The classifier of a folder; with from_scratch, its architecture with a head for these labels."""
    trusted: dict[str, Any] = {"trust_remote_code": options.trust_remote_code}
    if options.from_scratch:
        labels: dict[str, Any] = label_maps(label_names)
        return random_classifier(folder, None, **labels, **trusted)
    return load_classifier(folder, **trusted)


def _check_labels(model: Any, label_names: list[str]) -> None:
    """Raise ModelError for a head that neither has as many outputs as there are classes nor names them."""
    if model.config.num_labels != len(label_names) and not names_classes(id2label_of(model.config)):
        raise ModelError(
            f"expected a base with {len(label_names)} labels, got {model.config.num_labels}: train its head on "
            "the primary task first (hf-immunize pretrain), or set id2label in its config.json."
        )

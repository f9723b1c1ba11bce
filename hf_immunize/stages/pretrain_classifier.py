"""The pretraining stage for image classifiers: the whole network, or a head on frozen features."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from transformers import Trainer, TrainingArguments, set_seed

from hf_immunize.data import PixelDataset, TaskArguments, collate_pixels, describe_source
from hf_immunize.errors import ConfigError, TrainingDivergedError
from hf_immunize.models import (
    DIVERGED,
    label_maps,
    load_classifier,
    load_processor,
    random_classifier,
    refuse_non_finite,
)
from hf_immunize.options import option, required
from hf_immunize.records import begin_run, sha256_file, weight_files
from hf_immunize.stages.base import leave_finished
from hf_immunize.tasks import ClassesTask
from hf_immunize.training.vision.checkpoints import last_complete_checkpoint, scientific_options
from hf_immunize.training.vision.frozen import FeatureCache, FrozenPart, collate_with_boundary, freeze_all_but
from hf_immunize.training.vision.metrics import accuracy
from hf_immunize.training.vision.support import use_one_device


@dataclass
class ClassifierOptions:
    """Which model to train."""

    model_name_or_path: str = required("Hub id or folder of the model, or of its config and processor for "
                                       "from_scratch.")
    processor_name_or_path: str | None = option(None, "Hub id or folder of the image processor. Default: the model's "
                                                "own.")
    config_overrides: str | None = option(None, "Numbers of the config to change, e.g. 'classifier_dropout_prob=0', "
                                          "joined with commas.")
    trainable_modules: str | None = option(None, "What is trained, as when immunizing, e.g. 'classifier' for a head on "
                                           "frozen features; the frozen part stays in evaluation mode. Default: "
                                           "everything.")
    cache_frozen_features: bool = option(False, "With trainable_modules: run the frozen part once per image and keep "
                                         "its output on disk.")
    from_scratch: bool = option(False, "Start from random weights; only the config is read.")
    trust_remote_code: bool = option(False, "Run model code that comes with the model.")


class HeldTrainer(Trainer):
    """A Trainer whose frozen part stays in evaluation mode: no dropout, BatchNorm statistics as they were."""

    frozen: FrozenPart | None = None

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The model's own loss, behind the frozen part where there is one."""
        if self.frozen is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        plain = self.accelerator.unwrap_model(model)
        self.frozen.hold(plain)
        with self.frozen.entered(plain, inputs) as ready:
            return super().compute_loss(model, ready, *args, **kwargs)


def pretrain_classifier(arguments: TaskArguments, options: ClassifierOptions, args: TrainingArguments) -> None:
    """See ``pretrain_model``."""
    use_one_device(args)
    set_seed(args.seed)
    named, trusted = options.model_name_or_path, {"trust_remote_code": options.trust_remote_code}
    processor = load_processor(options.processor_name_or_path or named, config_of=named, **trusted)
    task = ClassesTask(arguments, processor)
    train, validation = (task.examples("primary", split) for split in ("train", "validation"))
    inputs = {
        "model": describe_source(named),
        **_weights_of(named, options),
        "from_scratch": options.from_scratch,
        "trainable_modules": options.trainable_modules,
        "config_overrides": options.config_overrides,
        "task": task.described("primary"),
        "data": {split: task.fingerprint("primary", split).sha256 for split in ("train", "validation")},
        "options": scientific_options(args),
    }
    folder = str(args.output_dir)
    if begin_run(folder, "pretrain", inputs, write=args.process_index == 0):
        print(f"{folder}: already trained, nothing to do")
        return
    model = _load_model(options, task.label_names)
    if options.trainable_modules:
        freeze_all_but(model, options.trainable_modules)
    trainer = HeldTrainer(
        model=model, args=args, train_dataset=train, eval_dataset=validation, data_collator=collate_pixels,
        compute_metrics=accuracy, processing_class=processor,
    )  # fmt: skip
    if options.trainable_modules:
        trainer.frozen = FrozenPart(model, train.image_shape)
    if options.cache_frozen_features:
        _use_cache(trainer, model)
    trainer.model_accepts_loss_kwargs = False
    trainer.loss_is_scaled_for_ga = False
    trainer.train(last_complete_checkpoint(folder))
    refuse_non_finite(model, "the trained model", error=TrainingDivergedError, remedy=DIVERGED)
    print(f"validation accuracy {trainer.evaluate()['eval_accuracy']:.4f}")
    trainer.save_model()
    if trainer.is_world_process_zero():
        (Path(folder) / "training_args.bin").unlink(missing_ok=True)  # a pickle; run.json holds the options
        leave_finished(folder, "pretrain", inputs, ["config.json"])


def _weights_of(named: str, options: ClassifierOptions) -> dict[str, Any]:
    """Digests of the weights that training starts from, where they lie on this machine: a folder's name tells no model
    from another."""
    if options.from_scratch or not Path(named).is_dir():
        return {}
    return {"weights": {path.relative_to(named).as_posix(): sha256_file(path) for path in weight_files(named)}}


def _use_cache(trainer: HeldTrainer, model: Any) -> None:
    """Put cached activations in the place of images. Raises ConfigError where nothing is frozen."""
    if trainer.frozen is None or trainer.frozen.boundary is None:
        raise ConfigError(
            "expected a frozen part for cache_frozen_features, got none: name what is trained with trainable_modules."
        )
    cache = FeatureCache(None, model, trainer.frozen.boundary, collate_pixels, str(trainer.accelerator.mixed_precision))
    train, evaluation = cast(PixelDataset, trainer.train_dataset), cast(PixelDataset, trainer.eval_dataset)
    trainer.train_dataset = cache.dataset(train, train.labels, "train")
    trainer.eval_dataset = cache.dataset(evaluation, evaluation.labels, "validation")
    trainer.data_collator = collate_with_boundary(collate_pixels)
    trainer.args.remove_unused_columns = False  # or the collator drops the activations: no forward has such an argument


def _overrides(text: str | None) -> dict[str, float]:
    """``"a=0,b=1"`` as a dict of numbers."""
    try:
        pairs = [part.split("=") for part in text.split(",")] if text else []
        return {name.strip(): float(value) for name, value in pairs}
    except ValueError as error:
        raise ConfigError(f"expected config_overrides like 'dropout=0', got {text!r}: {error}.") from error


def _load_model(options: ClassifierOptions, label_names: list[str]) -> Any:
    """The architecture with a head for these labels, weights from safetensors only or random. Raises ModelError."""
    named: str = options.model_name_or_path
    labels: dict[str, Any] = label_maps(label_names)
    told: dict[str, Any] = {**_overrides(options.config_overrides), "trust_remote_code": options.trust_remote_code}
    if options.from_scratch:
        return random_classifier(named, None, **labels, **told)
    return load_classifier(named, labels=labels, **told)

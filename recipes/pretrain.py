"""Train an image classifier on the primary task: the base model that is to be immunized.

    accelerate launch recipes/pretrain.py --config recipes/digits-vit/task.yaml \
        --config recipes/digits-vit/pretrain.yaml
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_immunize.data import Task, TaskArguments, collate_pixels, describe_source
from hf_immunize.errors import ConfigError, ImmunizeError, ModelError, TrainingDivergedError
from hf_immunize.models import DIVERGED, load_classifier, load_processor, refuse_non_finite
from hf_immunize.options import parse_options
from hf_immunize.records import begin_run, finish_run
from hf_immunize.training.vision.checkpoints import scientific_options
from hf_immunize.training.vision.frozen import FeatureCache, FrozenPart, collate_with_boundary, freeze_all_but
from hf_immunize.training.vision.metrics import accuracy
from hf_immunize.training.vision.support import use_one_device


@dataclass
class PretrainArguments:
    """Which model to train."""

    model_name_or_path: str = field(
        metadata={"help": "Hub id or folder of the model, or of its config and processor for from_scratch."}
    )
    processor_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the image processor. Default: the model's own."}
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "Numbers of the config to change, e.g. 'classifier_dropout_prob=0', joined with commas."},
    )
    trainable_modules: str | None = field(
        default=None,
        metadata={
            "help": "What is trained, as in immunize.py, e.g. 'classifier' for a head on frozen features; the frozen "
            "part is held in evaluation mode. Default: everything."
        },
    )
    cache_frozen_features: bool = field(
        default=False,
        metadata={"help": "With trainable_modules: run the frozen part once per image and keep its output on disk."},
    )
    from_scratch: bool = field(default=False, metadata={"help": "Start from random weights; only the config is read."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code that comes with the model."})


class HeldTrainer(Trainer):
    """A Trainer whose frozen part stays in evaluation mode: no dropout, BatchNorm statistics as they were."""

    frozen: FrozenPart | None = None

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self.frozen is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        plain = self.accelerator.unwrap_model(model)
        self.frozen.hold(plain)
        with self.frozen.entered(plain, inputs) as ready:
            return super().compute_loss(model, ready, *args, **kwargs)


def use_cache(trainer: HeldTrainer, model: Any) -> None:
    """Put cached activations in the place of images. Raises ConfigError where nothing is frozen."""
    if trainer.frozen is None or trainer.frozen.boundary is None:
        raise ConfigError(
            "expected a frozen part for cache_frozen_features, got none: name what is trained with trainable_modules."
        )
    cache = FeatureCache(None, model, trainer.frozen.boundary, collate_pixels, str(trainer.accelerator.mixed_precision))
    trainer.train_dataset = cache.dataset(trainer.train_dataset, trainer.train_dataset.labels, "train")
    trainer.eval_dataset = cache.dataset(trainer.eval_dataset, trainer.eval_dataset.labels, "validation")
    trainer.data_collator = collate_with_boundary(collate_pixels)
    trainer.args.remove_unused_columns = False  # or the collator drops the activations: no forward has such an argument


def parse_overrides(text: str | None) -> dict[str, float]:
    """``"a=0,b=1"`` as a dict of numbers."""
    try:
        pairs = [part.split("=") for part in text.split(",")] if text else []
        return {name.strip(): float(value) for name, value in pairs}
    except ValueError as error:
        raise ConfigError(f"expected config_overrides like 'dropout=0', got {text!r}: {error}.") from error


def load_model(options: PretrainArguments, label_names: list[str]) -> Any:
    """The architecture with a head for these labels, weights from safetensors only or random. Raises ModelError."""
    source = {"trust_remote_code": options.trust_remote_code}
    labels = {"id2label": dict(enumerate(label_names)), "label2id": {n: i for i, n in enumerate(label_names)}}
    overrides = parse_overrides(options.config_overrides)
    if not options.from_scratch:
        return load_classifier(options.model_name_or_path, labels=labels, **overrides, **source)
    try:
        config = AutoConfig.from_pretrained(options.model_name_or_path, **labels, **overrides, **source)
        return AutoModelForImageClassification.from_config(config, dtype=torch.float32, **source)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"expected the config of an image classifier in {options.model_name_or_path}, got {error}: check the path."
        ) from error


def main() -> None:
    task_options, model_options, args = parse_options(
        (TaskArguments, PretrainArguments, TrainingArguments), description=__doc__.splitlines()[0]
    )
    use_one_device(args)
    set_seed(args.seed)
    source = {"trust_remote_code": model_options.trust_remote_code}
    named = model_options.model_name_or_path
    processor = load_processor(model_options.processor_name_or_path or named, config_of=named, **source)
    task = Task(task_options, "primary")
    splits = {role: task.pixels(role, processor) for role in ("train", "validation")}
    prints = {role: task.fingerprint(dataset, role) for role, dataset in splits.items()}

    inputs = {
        "model": describe_source(model_options.model_name_or_path),
        "from_scratch": model_options.from_scratch,
        "trainable_modules": model_options.trainable_modules,
        "config_overrides": model_options.config_overrides,
        "task": {**task_options.described(), "primary_dataset": describe_source(task_options.primary_dataset)},
        "data": {role: found.sha256 for role, found in prints.items()},
        "options": scientific_options(args),
    }
    if begin_run(args.output_dir, "pretrain", inputs, write=args.process_index == 0):
        print(f"{args.output_dir}: already trained, nothing to do")
        return

    model = load_model(model_options, task.label_names)
    if model_options.trainable_modules:
        freeze_all_but(model, model_options.trainable_modules)
    trainer = HeldTrainer(
        model=model,
        args=args,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        data_collator=collate_pixels,
        compute_metrics=accuracy,
        processing_class=processor,
    )
    if model_options.trainable_modules:
        trainer.frozen = FrozenPart(model, splits["train"].image_shape)
    if model_options.cache_frozen_features:
        use_cache(trainer, model)
    trainer.model_accepts_loss_kwargs = False
    trainer.loss_is_scaled_for_ga = False
    trainer.train()
    refuse_non_finite(model, "the trained model", error=TrainingDivergedError, remedy=DIVERGED)
    print(f"validation accuracy {trainer.evaluate()['eval_accuracy']:.4f}")
    trainer.save_model()
    if trainer.is_world_process_zero():
        for checkpoint in Path(args.output_dir).glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        (Path(args.output_dir) / "training_args.bin").unlink(missing_ok=True)  # a pickle; run.json holds the options
        finish_run(args.output_dir, "pretrain", inputs, ["model.safetensors", "config.json"])


if __name__ == "__main__":
    try:
        main()
    except ImmunizeError as error:
        sys.exit(f"{type(error).__name__}: {error}")

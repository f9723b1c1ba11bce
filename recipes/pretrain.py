"""Train an image classifier on the primary task: the base model that is to be immunized.

    accelerate launch recipes/pretrain.py --config recipes/digits-vit/task.yaml \
        --config recipes/digits-vit/pretrain.yaml
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_immunize.data import Task, TaskArguments, collate_pixels, describe_source
from hf_immunize.errors import ImmunizeError
from hf_immunize.options import parse_options
from hf_immunize.records import begin_run, finish_run
from hf_immunize.training.checkpoints import scientific_options
from hf_immunize.training.trainer import accuracy


@dataclass
class PretrainArguments:
    """Which model to train."""

    model_name_or_path: str = field(
        metadata={"help": "Hub id or folder of the model, or of its config and processor for from_scratch."}
    )
    from_scratch: bool = field(default=False, metadata={"help": "Start from random weights; only the config is read."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code that comes with the model."})


def main() -> None:
    task_options, model_options, args = parse_options(
        (TaskArguments, PretrainArguments, TrainingArguments), description=__doc__.splitlines()[0]
    )
    set_seed(args.seed)
    source = {"trust_remote_code": model_options.trust_remote_code}
    processor = AutoImageProcessor.from_pretrained(model_options.model_name_or_path, backend="pil", **source)
    task = Task(task_options, "primary")
    splits = {role: task.pixels(role, processor) for role in ("train", "validation")}
    prints = {role: task.fingerprint(dataset, role) for role, dataset in splits.items()}

    inputs = {
        "model": describe_source(model_options.model_name_or_path),
        "from_scratch": model_options.from_scratch,
        "task": {**asdict(task_options), "primary_dataset": describe_source(task_options.primary_dataset)},
        "data": {role: found.sha256 for role, found in prints.items()},
        "options": scientific_options(args),
    }
    if begin_run(args.output_dir, "pretrain", inputs, write=args.process_index == 0):
        print(f"{args.output_dir}: already trained, nothing to do")
        return

    labels = {"id2label": dict(enumerate(task.label_names)), "label2id": {n: i for i, n in enumerate(task.label_names)}}
    config = AutoConfig.from_pretrained(model_options.model_name_or_path, **labels, **source)
    if model_options.from_scratch:
        model = AutoModelForImageClassification.from_config(config, **source)
    else:
        model = AutoModelForImageClassification.from_pretrained(
            model_options.model_name_or_path, config=config, ignore_mismatched_sizes=True, **source
        )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        data_collator=collate_pixels,
        compute_metrics=accuracy,
        processing_class=processor,
    )
    trainer.model_accepts_loss_kwargs = False
    trainer.loss_is_scaled_for_ga = False
    trainer.train()
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

"""The stock Trainer, with steps that are taken in as many parts as memory asks for, in the exam's precision."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from hf_immunize.attacks.core.means import autocast_of, products
from hf_immunize.attacks.core.parts import Parts, part_of
from hf_immunize.attacks.vision._optimizers import OPTIMIZERS
from hf_immunize.attacks.vision.context import AttackContext
from hf_immunize.errors import DeviceMemoryError


@dataclass(frozen=True)
class Trained:
    """Mean training loss, and what was done when memory ran out; None for nothing."""

    loss: float
    note: str | None


def training_arguments(config: Any, seed: int, device: str, folder: str) -> TrainingArguments:
    """Stock arguments with everything that costs time and is not the attack switched off."""
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        optim="adamw_torch_fused" if config.optimizer in OPTIMIZERS else config.optimizer,
        lr_scheduler_type=config.scheduler,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=seed,
        data_seed=seed,
        use_cpu=device == "cpu",
        report_to="none",
        logging_strategy="no",
        logging_nan_inf_filter=False,
        save_strategy="no",
        eval_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    # Where several GPUs are visible the stock Trainer wraps the model in DataParallel and multiplies the batch.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


class AttackTrainer(Trainer):
    """The stock Trainer whose every batch is one step, in parts where it has to be.

    Precision is set here and not by ``TrainingArguments.bf16``, which would leave the model's forward changed.
    """

    def __init__(self, context: AttackContext, parts: Parts, **options: Any):
        super().__init__(**options)
        self._context, self._parts, self._share = context, parts, 1.0

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of a batch; the model's ``before_step``, if it has one, is told which step this is."""
        if callable(begin := getattr(self.model, "before_step", None)):
            begin(self.state.global_step)

        def backward(place: slice, share: float) -> Tensor:
            self._share = share
            part = inputs if share == 1 else part_of(inputs, place)
            return super(AttackTrainer, self).training_step(model, part, num_items_in_batch)

        losses = self._parts.step(len(inputs["labels"]), backward)
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def compute_loss(self, model: nn.Module, inputs: Any, *rest: Any, **options: Any) -> Any:
        """The model's mean loss over the rows of a part, times the part's share of the batch."""
        with autocast_of(self._context.means, self._context.device):
            loss: Any = super().compute_loss(model, inputs, *rest, **options)
        return loss if self._share == 1 else loss * self._share

    def floating_point_ops(self, inputs: Any) -> int:
        """Zero: _cost.py counts them once, and counting here takes 5 % of a small model's step."""
        return 0


def train(
    context: AttackContext,
    model: nn.Module,
    data: Dataset[Any],
    config: Any,
    seed: int,
    collate: Callable[..., Any],
    callbacks: Sequence[TrainerCallback] = (),
) -> Trained:
    """Train by the means of the context.

    The loss is the model's own mean over the batch. Trainer would multiply it by the number of accumulation steps and
    processes for models that swallow keyword arguments (transformers 5.23); the two flags below switch that off.

    Raises:
        DeviceMemoryError: memory that smaller parts of a batch do not save.
        ModelError: ``gradient_checkpointing`` for a model without a list of blocks.
    """
    own = OPTIMIZERS[config.optimizer](model, config) if config.optimizer in OPTIMIZERS else None
    with tempfile.TemporaryDirectory() as folder, products(context.means.precision):
        arguments = training_arguments(config, seed, context.device, folder)
        with Parts(model, context.means) as parts:
            trainer = AttackTrainer(
                context, parts, model=model, args=arguments, train_dataset=data, data_collator=collate,
                callbacks=list(callbacks), optimizers=(own, None),
            )  # fmt: skip
            trainer.remove_callback(PrinterCallback)
            trainer.model_accepts_loss_kwargs = False
            trainer.loss_is_scaled_for_ga = False
            try:
                return Trained(float(trainer.train().training_loss), "; ".join(parts.notes) or None)
            except RuntimeError as error:
                if isinstance(error, DeviceMemoryError) or not should_reduce_batch_size(error):
                    raise
                raise DeviceMemoryError(
                    f"expected memory for weights, gradients and the state of {config.optimizer}, got: {error} Smaller "
                    "parts of a batch do not help: use a device with more memory."
                ) from error

"""Attacks that train the network itself: the stock ``transformers.Trainer``, never this package's own."""

from __future__ import annotations

import gc
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from hf_immunize.attacks.core.shape import Result, Run, evaluation_steps, setting
from hf_immunize.attacks.vision._cost import BACKWARD, forward_flops, trained_samples
from hf_immunize.attacks.vision._optimizers import OPTIMIZERS
from hf_immunize.attacks.vision._pruning import Pruner
from hf_immunize.attacks.vision._rows import collator, training_rows
from hf_immunize.attacks.vision.context import AttackContext
from hf_immunize.data import forward_rows
from hf_immunize.records import Evaluation

_EVALUATION_RATIO = 1.5
"""Coarser than for probes: here an evaluation costs as much as several training steps."""


@dataclass(frozen=True)
class FinetuneConfig:
    """What every network-training attack is told; the meaning is that of ``transformers.TrainingArguments``.

    ``sweep`` values are the default grid; ``search`` values are what a random search draws from instead.
    """

    learning_rate: float = setting(1e-3, "Peak learning rate.", sweep=(1e-4, 1e-3, 1e-2, 1e-1))
    steps: int = setting(100, "Budget in optimizer steps.")
    batch_size: int = setting(32, "Rows per step.", search=(8, 16, 32))
    optimizer: str = setting("adamw_torch_fused", "TrainingArguments.optim, e.g. sgd, adafactor; or sgd_momentum, "
                             "muon, lamb, adafactor_relative.")
    scheduler: str = setting("constant", "TrainingArguments.lr_scheduler_type; the ones with_warmup obey warmup_steps.",
                             search=("constant_with_warmup", "linear", "cosine"))
    warmup_steps: int = setting(0, "Steps of linear warm-up.", search=(0, 10))
    weight_decay: float = setting(0.0, "Decoupled weight decay.", search=(0.0, 0.01, 0.1))
    max_grad_norm: float = setting(1.0, "Gradient clipping; 0 switches it off.", search=(0.0, 1.0))
    evaluation_ratio: float = setting(_EVALUATION_RATIO, "Consecutive evaluations are about this factor of steps "
                                      "apart.")


class _Exam(TrainerCallback):
    """Evaluates after the steps that are due, in evaluation mode, and stops a run whose numbers are not finite."""

    def __init__(self, context: AttackContext, due: Sequence[int]):
        self.curve: list[Evaluation] = []
        self.note: str | None = None
        self._due = set(due)
        self._split = len(context.validation)
        self._pixels = torch.cat([context.validation.pixel_values, context.test.pixel_values])
        self._labels = torch.cat([context.validation.labels, context.test.labels])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Judge the model after this step, if the step is due."""
        if state.global_step in self._due:
            hits = self._hits(kwargs["model"])
            if hits is None:
                self.note = f"logits were not finite at step {state.global_step}"
                control.should_training_stop = True
            else:
                validation, test = hits[: self._split].mean(), hits[self._split :].mean()
                self.curve.append(Evaluation(step=state.global_step, validation=float(validation), test=float(test)))
        return control

    @torch.no_grad()
    def _hits(self, model: nn.Module) -> Tensor | None:
        was_training, device = model.training, next(model.parameters()).device
        model.eval()
        parts = self._pixels.split(forward_rows(self._pixels.shape[1:], device))
        logits = torch.cat([model(pixel_values=part.to(device)).logits for part in parts])
        model.train(was_training)
        if not bool(torch.isfinite(logits).all()):
            return None
        return (logits.argmax(dim=1).cpu() == self._labels).double()


def training_arguments(config: FinetuneConfig, seed: int, device: str, folder: str) -> TrainingArguments:
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


def finetune(
    context: AttackContext, model: nn.Module, config: FinetuneConfig, seed: int, before: int = 0,
    bars: Sequence[tuple[int, float]] = (),
) -> Result:
    """Train ``model`` on this seed's rows and return its learning curve on both held-out splits.

    ``before`` steps of the budget were spent on preparing the model: they come first in the curve. ``bars`` say where a
    run is given up (``Pruner``).
    """
    started = time.perf_counter()
    steps = config.steps - before
    exam = _Exam(context, evaluation_steps(steps, config.evaluation_ratio))
    pruner = Pruner(exam.curve, bars, before)
    data = training_rows(context, config, seed)
    cost = forward_flops(model, data.image_shape)
    watching = [exam, pruner]
    loss = train(model, data, replace(config, steps=steps), seed, context.device, collator(config, seed), watching)
    seconds = time.perf_counter() - started
    if exam.note is None and not math.isfinite(loss):
        exam.note = "the training loss was not finite"
    curve = [point.model_copy(update={"step": point.step + before}) for point in exam.curve]
    samples = trained_samples(len(data), config.batch_size, config.steps)
    return Result(
        curve, config.steps, seconds, "diverged" if exam.note else "completed", exam.note or pruner.note,
        samples, None if cost is None else BACKWARD * cost * samples,
    )


def train(
    model: nn.Module,
    data: Dataset,
    config: FinetuneConfig,
    seed: int,
    device: str,
    collate: Callable[..., Any],
    callbacks: Sequence[TrainerCallback] = (),
) -> float:
    """Train with the stock Trainer and return the mean training loss.

    The loss is the model's own mean over the batch. Trainer would multiply it by the number of accumulation steps and
    processes for models that swallow keyword arguments (transformers 5.23); the two flags below switch that off.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=training_arguments(config, seed, device, folder),
            train_dataset=data,
            data_collator=collate,
            callbacks=list(callbacks),
            optimizers=(OPTIMIZERS[config.optimizer](model, config) if config.optimizer in OPTIMIZERS else None, None),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.model_accepts_loss_kwargs = False
        trainer.loss_is_scaled_for_ga = False
        trainer.floating_point_ops = lambda inputs: 0  # counted once in _cost.py instead: 5 % of a small model's step
        return float(trainer.train().training_loss)


@contextmanager
def settled_garbage() -> Iterator[None]:
    """Trainer collects garbage once per run: half a second for what importing its libraries left behind."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def run_finetunes(
    context: AttackContext,
    runs: Sequence[Run],
    prepare: Callable[[AttackContext, Run], nn.Module | str],
    spent: Callable[[Any], int] = lambda config: 0,
) -> Iterator[tuple[Run, Result]]:
    """Prepare and train one model per run; a ``prepare`` that returns words says why the attack does not apply.

    ``spent`` tells how many steps of a config's budget its preparation takes.
    """
    with settled_garbage():
        for run in runs:
            model = prepare(context, run)
            if isinstance(model, str):
                yield run, Result([], run.config.steps, 0.0, "not_applicable", model)
            else:
                yield run, finetune(context, model, run.config, run.seed, spent(run.config), run.bars)

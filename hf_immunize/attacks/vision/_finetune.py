"""Attacks that train the network itself: the stock ``transformers.Trainer``, never this package's own."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from hf_immunize.attacks.core.means import products
from hf_immunize.attacks.core.parts import with_fewer
from hf_immunize.attacks.core.shape import Result, Run, evaluation_steps, setting
from hf_immunize.attacks.vision._cost import BACKWARD, forward_flops, trained_samples
from hf_immunize.attacks.vision._pruning import Pruner
from hf_immunize.attacks.vision._rows import collator, training_rows
from hf_immunize.attacks.vision._trainer import train
from hf_immunize.attacks.vision.context import AttackContext
from hf_immunize.data import PixelDataset, batches, forward_rows
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
                             "muon, lamb, lars, adafactor_relative.")
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
        self._context, self._due = context, set(due)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Judge the model after this step, if the step is due."""
        if state.global_step in self._due:
            held = self._context.validation, self._context.test
            validation, test = (_accuracy(kwargs["model"], rows) for rows in held)
            if validation is None or test is None:
                self.note = f"logits were not finite at step {state.global_step}"
                control.should_training_stop = True
            else:
                self.curve.append(Evaluation(step=state.global_step, validation=validation, test=test))
        return control


@torch.no_grad()
def _accuracy(model: nn.Module, rows: PixelDataset) -> float | None:
    """Share of rows that are told right, some in memory at a time; None where an answer is not finite."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()

    def count(size: int) -> int | None:
        hits = 0
        for batch in batches(rows, size):
            logits = model(pixel_values=batch["pixel_values"].to(device)).logits
            if not bool(torch.isfinite(logits).all()):
                return None
            hits += int((logits.argmax(dim=1).cpu() == batch["labels"]).sum())
        return hits

    with products("float32"):
        hits = with_fewer(forward_rows(rows.image_shape, device), count)
    model.train(was_training)
    return None if hits is None else hits / len(rows)


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
    done = train(context, model, data, replace(config, steps=steps), seed, collator(config, seed), watching)
    seconds = time.perf_counter() - started
    if exam.note is None and not math.isfinite(done.loss):
        exam.note = "the training loss was not finite"
    curve = [point.model_copy(update={"step": point.step + before}) for point in exam.curve]
    samples = trained_samples(len(data), config.batch_size, config.steps)
    return Result(
        curve, config.steps, seconds, "diverged" if exam.note else "completed",
        "; ".join(note for note in (exam.note or pruner.note, done.note) if note) or None,
        samples, None if cost is None else BACKWARD * cost * samples,
    )


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

"""What an evaluation is worth: one number by kind of primary task, of a whole evaluation or batch by batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction

from hf_immunize.data import refuse_other_labels
from hf_immunize.training.vision.primary import MULTI, REGRESSION, SINGLE

Metrics = Callable[..., dict[str, float]]


def _predicted(prediction: Any) -> np.ndarray:
    found = prediction.predictions
    return found[0] if isinstance(found, tuple) else found


def accuracy(prediction: Any) -> dict[str, float]:
    """The share of rows whose largest logit is the label (0..1). Predictions may be classes already."""
    return {"accuracy": float(np.mean(_classes(_predicted(prediction)) == prediction.label_ids))}


def _classes(found: Any) -> Any:
    """Of logits the largest; what preprocess_logits_for_metrics made classes of stays."""
    return found if np.ndim(found) == 1 else np.argmax(found, axis=-1)


def bit_accuracy(prediction: Any) -> dict[str, float]:
    """The share of bits whose logit has the right sign (0..1)."""
    return {"accuracy": float(np.mean((_predicted(prediction) > 0) == (prediction.label_ids > 0.5)))}


def r2(prediction: Any) -> dict[str, float]:
    """1 − squared residual over the targets' squared deviation from their mean."""
    targets = np.asarray(prediction.label_ids, dtype=np.float64)
    outputs = np.asarray(_predicted(prediction), dtype=np.float64).reshape(targets.shape)
    return {"r2": float(1 - np.square(outputs - targets).sum() / np.square(targets - targets.mean(axis=0)).sum())}


class Batched:
    """A metric that also takes an evaluation batch by batch (``batch_eval_metrics``), and keeps little of each batch.

    Args:
        metrics: of a whole evaluation.
        small: what of a batch's predictions it needs.
    """

    def __init__(self, metrics: Metrics, small: Callable[[np.ndarray], np.ndarray]):
        self._metrics, self._small = metrics, small
        self._seen: list[tuple[np.ndarray, np.ndarray]] = []

    def __call__(self, prediction: Any, compute_result: bool = True) -> dict[str, float]:
        """The metric of all batches since it was last computed; nothing before ``compute_result``."""
        parts = _predicted(prediction), prediction.label_ids
        outputs, labels = (part.cpu().numpy() if isinstance(part, torch.Tensor) else np.asarray(part) for part in parts)
        self._seen.append((self._small(outputs), labels))
        if not compute_result:
            return {}
        seen, self._seen = self._seen, []
        whole = [np.concatenate(part) for part in zip(*seen, strict=True)]
        return self._metrics(EvalPrediction(predictions=whole[0], label_ids=whole[1]))


def metrics_of(kind: str) -> Metrics | None:
    """The metric of a primary task without one of its own; None for a task without labels."""
    found: dict[str, Metrics] = {
        SINGLE: Batched(accuracy, _classes),
        MULTI: Batched(bit_accuracy, lambda logits: np.where(logits > 0, 1, -1).astype(np.int8)),
        REGRESSION: Batched(r2, lambda outputs: outputs),
    }
    return found.get(kind)


class BaseLabels:
    """A ``compute_metrics`` that also remembers, while it is ``open``, what the model before immunization predicted.

    Args:
        metrics: what is computed of each prediction.
    """

    def __init__(self, metrics: Metrics):
        self._metrics, self.open = metrics, False
        self._by_batch = "compute_result" in inspect.signature(metrics).parameters
        self._seen: list[tuple[np.ndarray, np.ndarray]] = []

    def __call__(self, prediction: Any, compute_result: bool = True) -> dict[str, float]:
        """The metrics of one prediction, or of one more batch, as ``Trainer`` asks for them."""
        if self.open:
            logits, labels = (torch.as_tensor(part).cpu().numpy() for part in
                              (_predicted(prediction), prediction.label_ids))
            self._seen.append((_classes(logits), labels))
        return self._metrics(prediction, **({"compute_result": compute_result} if self._by_batch else {}))

    def refuse_other_order(self, names: Sequence[str], where: str) -> None:
        """Raise DataError where the predictions are right under another order of the labels."""
        self.open, seen, self._seen = False, self._seen, []
        if seen:
            predicted, labels = (torch.as_tensor(np.concatenate(part)) for part in zip(*seen, strict=True))
            refuse_other_labels(predicted, labels, names, where)

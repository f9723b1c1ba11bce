"""What a simulated attacker of an image model descends: the error of a head refitted in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_immunize.linalg import spectral_adversary, to_double
from hf_immunize.regularizers import alternate_within_classes
from hf_immunize.training.core.distributed import RowExchange, world
from hf_immunize.training.vision.harmful_task import Asks, WithoutTargets

_GRID = 4
"""Rows and columns of the reduced image that a head answers where images have no labels to tell them apart."""


class WithAnswers:
    """Collates harmful rows for a simulated attacker: batches whose ``answers`` are what its head is to give.

    Args:
        collate: of rows.
        asks: ``classes`` (batches stay as they are: their labels are the answers), ``numbers`` (the labels of a
            regression or of several classes at once) or ``image``.
        key: the column of the labels.
    """

    def __init__(self, collate: Any, asks: Asks, key: str | None):
        self._collate = collate if asks == "classes" else WithoutTargets(collate)
        self._asks, self._key = asks, key

    def __call__(self, rows: Sequence[Any]) -> Any:
        """One batch."""
        batch = self._collate(rows)
        if self._asks == "classes":
            return batch
        if self._asks == "numbers":
            answers = torch.stack([torch.as_tensor(row[self._key]).float().reshape(-1) for row in rows])
        else:
            answers = torch.nn.functional.adaptive_avg_pool2d(batch["pixel_values"].float(), _GRID).flatten(1)
        return batch | {"answers": answers}

CHANCE = 1.0
"""The error of a head that tells nothing, about: the ceiling of a simulated attack."""


def refitted_head_loss(
    features_ND: Tensor, labels_N: Tensor, horizon: float, classes: int, *, exact: bool = False
) -> Tensor:
    """1 − A_t: the held-out error of a ridge head on harmful features, as a share of the classes' spread.

    A_t is the closed-form adversary of docs/method.md, section 3, of the rows of all ranks, each half judged by the
    head of the other. An attacker's head is good again after few steps whatever it starts at; refitting it leaves the
    features as what counts. About 1 at chance, so 1 is the ceiling of a simulated attack.

    Args:
        features_ND: this rank's rows, with a graph.
        labels_N: their classes.
        horizon: steps t of the probe that the head stands for.
        classes: of the harmful task.
        exact: leave the whole graph, for second derivatives; of this process's rows alone.

    Returns:
        A scalar whose value is of all ranks' rows and whose gradient, averaged over ranks, is that of the value.

    Raises:
        SpectrumError: fewer than two classes with two rows each.
    """
    (everyone, mine), (labels, _) = RowExchange()([features_ND, labels_N])
    halves = alternate_within_classes(labels)
    targets = torch.nn.functional.one_hot(labels.long(), classes)
    if exact:
        return _error(features_ND, targets, halves, horizon, features_ND.dtype).to(features_ND)
    return _held_out_error(features_ND, everyone, mine, targets, halves, horizon)


def refitted_answers_loss(
    features_ND: Tensor, answers_NC: Tensor, horizon: float, *, exact: bool = False
) -> Tensor:
    """The same for a head that answers numbers: 1 − the held-out R² of its C answers together.

    Rows are halved by turns. A batch whose answers do not differ within a half teaches nobody anything: its loss is
    chance level, 1, without a gradient.

    Args:
        features_ND: this rank's rows, with a graph.
        answers_NC: numbers, or 0 and 1 for several labels.
        horizon: steps t of the probe that the head stands for.
        exact: as for classes.

    Returns:
        A scalar as that of ``refitted_head_loss``.

    Raises:
        SpectrumError: fewer than two rows in a half.
    """
    (everyone, mine), (answers, _) = RowExchange()([features_ND, answers_NC])
    halves = torch.arange(0, len(answers), 2), torch.arange(1, len(answers), 2)
    spreads = [to_double(answers[half]) - to_double(answers[rest]).mean(0) for half, rest in (halves, halves[::-1])]
    if not all(bool(spread.any()) for spread in spreads):
        return 1 + 0 * features_ND.sum()
    if exact:
        return _error(features_ND, answers, halves, horizon, features_ND.dtype).to(features_ND)
    return _held_out_error(features_ND, everyone, mine, answers, halves, horizon)


def _held_out_error(
    features_ND: Tensor,
    everyone_MD: Tensor,
    mine_N: Tensor,
    targets_MC: Tensor,
    halves: tuple[Tensor, Tensor],
    horizon: float,
) -> Tensor:
    """1 − the mean held-out R² of both halves, of M rows of all ranks, with the gradient of this rank's rows."""
    leaf = to_double(everyone_MD.detach()).requires_grad_()
    with torch.enable_grad():
        loss = _error(leaf, targets_MC, halves, horizon, features_ND.dtype)
        (gradient,) = torch.autograd.grad(loss, leaf)
    # Ranks' gradients are averaged afterwards; each holds the part of its own rows.
    surrogate = (features_ND * (world()[1] * gradient[mine_N]).to(features_ND)).sum()
    return surrogate + (loss.detach().to(surrogate) - surrogate).detach()


def _error(
    rows_MD: Tensor, targets_MC: Tensor, halves: tuple[Tensor, Tensor], horizon: float, feature_dtype: torch.dtype
) -> Tensor:
    """1 − the mean held-out R², each half judged by the head of the other, with the whole graph."""
    rows = to_double(rows_MD)
    one, other = (half.to(rows.device) for half in halves)
    targets = targets_MC.to(rows.device)
    total = rows.new_zeros(())
    for learn, judge in ((one, other), (other, one)):
        held_out, _ = spectral_adversary(
            rows[learn], targets[learn], rows[judge], targets[judge], horizon, feature_dtype
        )
        total = total + held_out / 2
    return 1 - total

"""Linear probes, trained together: every trial × seed of one attack is a slice of one batched tensor program.

Shape legend: S seeds, T trials, C classes, N training rows, M judged rows, D feature width + 1 (the bias column), G
sets of rows: as many as seeds, or 1 where all seeds train on the same rows, whose probes are then columns of one
product. Classes lie before trials and rows last, so that the softmax runs over contiguous rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_immunize.attacks.core.shape import Result, Run, evaluation_steps
from hf_immunize.attacks.vision._cost import probe_flops
from hf_immunize.attacks.vision.context import AttackContext
from hf_immunize.linalg import to_double
from hf_immunize.linalg.whitening import fit_feature_map
from hf_immunize.records import Evaluation
from hf_immunize.records.trace import Outcome

_PRODUCTS = torch.float32
"""Precision of the two products of a step, which is that of the features; weights and optimizer states are float64."""

Update = Callable[[Tensor, Tensor, Tensor, int], None]
"""In-place step: (weights S×C×T×D, gradient, rate T×1 per trial, step from 1)."""

Rule = tuple[Sequence[float], Update]
"""Trials that share an update rule, one rate each."""


@dataclass(frozen=True)
class ProbeData:
    """Mapped, bias-augmented float64 features of all seeds, and integer labels."""

    train_GND: Tensor
    train_labels_GN: Tensor
    judged_GMD: Tensor
    """Validation rows, then test rows."""
    judged_labels_M: Tensor
    validation_rows: int
    classes: int
    offset_SCTM: Tensor | None = None
    """What is added to every judged logit: the part of the weights that training cannot move (``compress``)."""


FeaturesOf = Callable[[int], dict[str, Tensor]]
"""From a seed to features of the attack, validation and test splits."""


def probe_data(
    context: AttackContext, seeds: Sequence[int], feature_map: str, features_of: FeaturesOf | None = None
) -> ProbeData:
    """Features of every seed's own training rows, under a map fitted on these rows alone."""
    train, labels, judged = [], [], []
    drawn = [((features_of or context.features)(seed), context.draw_rows(seed)) for seed in seeds]
    first, first_rows = drawn[0]
    if all(features is first and torch.equal(rows, first_rows) for features, rows in drawn):
        drawn = drawn[:1]
    for features, rows in drawn:
        mapped = fit_feature_map(features["attack"][rows], feature_map)
        train.append(_with_bias(mapped(features["attack"][rows])))
        labels.append(context.attack.labels[rows])
        judged.append(_with_bias(torch.cat([mapped(features["validation"]), mapped(features["test"])])))
    return ProbeData(
        train_GND=torch.stack(train).to(context.device),
        train_labels_GN=torch.stack(labels).to(context.device),
        judged_GMD=torch.stack(judged).to(context.device),
        judged_labels_M=torch.cat([context.validation.labels, context.test.labels]).to(context.device),
        validation_rows=len(context.validation),
        classes=context.classes,
    )


def _with_bias(features_ND: Tensor) -> Tensor:
    return torch.cat([features_ND, torch.ones_like(features_ND[:, :1])], dim=1)


def initial_weights(data: ProbeData, seeds: Sequence[int], trials: int) -> Tensor:
    """S×CT×D weights, uniform in ±1/√D as ``nn.Linear`` draws them; every trial of a seed starts at the same point."""
    width = data.train_GND.shape[2]
    drawn = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        one = (2 * torch.rand(data.classes, 1, width, generator=generator) - 1) / (width - 1) ** 0.5
        drawn.append(to_double(one).expand(data.classes, trials, width).reshape(data.classes * trials, width))
    return torch.stack(drawn).to(data.train_GND.device)


def gradient_descent() -> Update:
    """W ← W − η·∇L."""

    def update(weights: Tensor, gradient: Tensor, rate: Tensor, step: int) -> None:
        weights.addcmul_(gradient, rate, value=-1)

    return update


def momentum(decay: float = 0.9) -> Update:
    """Nesterov momentum as ``torch.optim.SGD(nesterov=True)`` computes it."""
    state: dict[str, Tensor] = {}

    def update(weights: Tensor, gradient: Tensor, rate: Tensor, step: int) -> None:
        if not state:
            state["buffer"] = torch.zeros_like(weights)
        state["buffer"].mul_(decay).add_(gradient)
        weights.addcmul_(gradient + decay * state["buffer"], rate, value=-1)

    return update


def adam(beta_1: float = 0.9, beta_2: float = 0.999, epsilon: float = 1e-8) -> Update:
    """Adam (Kingma & Ba 2015) with bias correction, as ``torch.optim.Adam`` computes it."""
    state: dict[str, Tensor] = {}

    def update(weights: Tensor, gradient: Tensor, rate: Tensor, step: int) -> None:
        if not state:
            state["mean"], state["square"] = torch.zeros_like(weights), torch.zeros_like(weights)
        state["mean"].lerp_(gradient, 1 - beta_1)
        state["square"].mul_(beta_2).addcmul_(gradient, gradient, value=1 - beta_2)
        scale = state["square"].sqrt().div_((1 - beta_2**step) ** 0.5).add_(epsilon)
        weights.sub_(state["mean"] * (rate / (1 - beta_1**step)) / scale)

    return update


ROTATION_INVARIANT = (gradient_descent, momentum)
"""Rules that commute with orthogonal changes of coordinates: they never leave start + row space of the features."""


def compress(data: ProbeData, weights: Tensor) -> tuple[ProbeData, Tensor]:
    """The same probes in the row space of the features, for rotation-invariant rules and fewer rows than columns.

    With Φ = L·Q (Q's rows orthonormal), gradients are ΦᵀE = Qᵀ(LᵀE): in V = W·Qᵀ the program is the same on L, N×N
    instead of N×D. What W has outside the row space stays as it was drawn and adds a constant to judged logits.
    """
    _, rows, width = data.train_GND.shape
    if rows >= width:
        return data, weights
    basis_GDN, _ = torch.linalg.qr(data.train_GND.mT)
    inside = times(weights, basis_GDN)
    outside = weights - times(inside, basis_GDN.mT)
    judged_rows = data.judged_GMD.shape[1]
    return replace(
        data,
        train_GND=torch.bmm(data.train_GND, basis_GDN),
        judged_GMD=torch.bmm(data.judged_GMD, basis_GDN),
        offset_SCTM=times(outside, data.judged_GMD.mT).view(len(weights), data.classes, -1, judged_rows),
    ), inside


def times(left_SKP: Tensor, right_GPQ: Tensor) -> Tensor:
    """S×K×Q products, set by set; one matrix product over all seeds where they share one set."""
    if len(right_GPQ) == len(left_SKP):
        return torch.bmm(left_SKP, right_GPQ)
    return (left_SKP.flatten(0, 1) @ right_GPQ[0]).unflatten(0, left_SKP.shape[:2])


@torch.no_grad()
def train_probes(
    data: ProbeData, weights: Tensor, rules: Sequence[Rule], steps: int
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Full-batch training on mean cross-entropy; ``weights`` (S×CT×D) is changed in place.

    Only differences of logits matter to the softmax and the gradients of all classes sum to zero, so both products are
    taken for C − 1 classes: half the work for two classes. Products are float32, as the features were when the network
    made them; weights, gradients and optimizer states are float64.

    Yields:
        (step, validation accuracy S×T, test accuracy S×T, finite S×T) at every evaluation step.
    """
    _, rows, width = data.train_GND.shape
    seeds, free = len(weights), data.classes - 1
    trials = sum(len(rates) for rates, _ in rules)
    rows_GND = data.train_GND.to(_PRODUCTS)
    columns_GDN = rows_GND.mT.contiguous()  # each product is fastest on the layout that is not its own
    targets = torch.nn.functional.one_hot(data.train_labels_GN, data.classes).permute(0, 2, 1).unsqueeze(2)
    targets_GC1N = targets.to(rows_GND).contiguous()[:, :free]
    rates = [torch.tensor(list(values), dtype=weights.dtype, device=weights.device)[:, None] for values, _ in rules]
    weights_SCTD = weights.view(seeds, data.classes, trials, width)
    gradient_SCTD = torch.empty_like(weights_SCTD)
    due = set(evaluation_steps(steps))
    for step in tqdm(range(1, steps + 1), desc="probe steps", leave=False, disable=None, mininterval=1):
        against_last = (weights_SCTD[:, :free] - weights_SCTD[:, free:]).to(_PRODUCTS)
        logits_SCTN = times(against_last.view(seeds, free * trials, width), rows_GND.mT).view(seeds, free, trials, rows)
        error_SCTN = class_probabilities(logits_SCTN).sub_(targets_GC1N)
        part = times(error_SCTN.view(seeds, free * trials, rows), columns_GDN.mT)
        torch.div(part.view(seeds, free, trials, width), rows, out=gradient_SCTD[:, :free])
        torch.sum(gradient_SCTD[:, :free], dim=1, out=gradient_SCTD[:, free]).neg_()
        start = 0
        for rate, (values, update) in zip(rates, rules, strict=True):
            mine = slice(start, start + len(values))
            update(weights_SCTD[:, :, mine], gradient_SCTD[:, :, mine], rate, step)
            start += len(values)
        if step in due:
            yield step, *judge(weights, data, trials)


def class_probabilities(logits_SCTN: Tensor) -> Tensor:
    """Softmax over all classes but the last, whose logit is the zero of the others; ``logits_SCTN`` is used up."""
    if logits_SCTN.shape[1] == 1:
        return logits_SCTN.sigmoid_()
    highest = logits_SCTN.amax(dim=1, keepdim=True).clamp_(min=0)
    logits_SCTN.sub_(highest).exp_()
    return logits_SCTN.div_(logits_SCTN.sum(dim=1, keepdim=True).add_(highest.neg_().exp_()))


def judge(weights: Tensor, data: ProbeData, trials: int) -> tuple[Tensor, Tensor, Tensor]:
    """Validation accuracy, test accuracy, and whether all logits were finite, each S×T, of S×CT×D weights."""
    logits_SCTM = times(weights, data.judged_GMD.mT).view(len(weights), data.classes, trials, -1)
    if data.offset_SCTM is not None:
        logits_SCTM = logits_SCTM + data.offset_SCTM
    hits = (logits_SCTM.argmax(dim=1) == data.judged_labels_M).double()
    finite = torch.isfinite(logits_SCTM).flatten(3).all(dim=3).all(dim=1)
    return hits[..., : data.validation_rows].mean(-1), hits[..., data.validation_rows :].mean(-1), finite


def run_probes(
    context: AttackContext,
    runs: Sequence[Run],
    optimizer: Callable[[], Update],
    features_of: FeaturesOf | None = None,
) -> Iterator[tuple[Run, Result]]:
    """Train all runs, one batched program per group of configs that differ in nothing but the learning rate.

    ``features_of`` gives a seed's features where they are not simply the head's.
    """
    groups: dict[object, list[Run]] = {}
    for run in runs:
        groups.setdefault(replace(run.config, learning_rate=0.0), []).append(run)
    for group in groups.values():
        yield from _run_group(context, group, optimizer, features_of)


def _run_group(
    context: AttackContext, group: Sequence[Run], optimizer: Callable[[], Update], features_of: FeaturesOf | None
) -> Iterator[tuple[Run, Result]]:
    started = time.perf_counter()
    config = group[0].config
    seeds = sorted({run.seed for run in group})
    rates = sorted({run.config.learning_rate for run in group})
    data = probe_data(context, seeds, config.features, features_of)
    points: dict[tuple[int, float], list[Evaluation]] = {(seed, rate): [] for seed in seeds for rate in rates}
    diverged: dict[tuple[int, float], int] = {}
    _, rows, width = data.train_GND.shape
    weights = initial_weights(data, seeds, len(rates))
    if optimizer in ROTATION_INVARIANT:
        data, weights = compress(data, weights)
    for step, validation, test, finite in train_probes(data, weights, [(rates, optimizer())], config.steps):
        table = zip(validation.tolist(), test.tolist(), finite.tolist(), strict=True)
        for seed, row in zip(seeds, table, strict=True):
            for rate, held, judged, ok in zip(rates, *row, strict=True):
                if not ok:
                    diverged.setdefault((seed, rate), step)
                if (seed, rate) not in diverged:
                    points[seed, rate].append(Evaluation(step=step, validation=held, test=judged))
    seconds = (time.perf_counter() - started) / len(points)
    cost = probe_flops(rows, width, data.classes, config.steps)
    for run in group:
        key = (run.seed, run.config.learning_rate)
        note = f"logits were not finite at step {diverged[key]}" if key in diverged else None
        outcome: Outcome = "diverged" if note else "completed"
        yield run, Result(points[key], config.steps, seconds, outcome, note, rows * config.steps, cost)

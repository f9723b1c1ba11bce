"""Solve a ridge probe first, then fine-tune the network from it: no step is lost on a random head."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from hf_immunize.attacks.core.shape import Attack, Run, setting
from hf_immunize.attacks.vision._finetune import FinetuneConfig, run_finetunes
from hf_immunize.attacks.vision.context import AttackContext
from hf_immunize.attacks.vision.full_finetune import unfrozen
from hf_immunize.linalg import ridge_weights
from hf_immunize.linalg.whitening import fit_feature_map


@dataclass(frozen=True)
class RidgeHeadFinetune(FinetuneConfig):
    """AdamW on all weights after the head was set to a ridge probe (linear probing, then fine-tuning)."""

    learning_rate: float = setting(1e-3, "Peak learning rate.", sweep=(1e-5, 1e-4, 1e-3, 1e-2))
    penalty: float = setting(1e-4, "Ridge penalty relative to σ₁² of the standardized features.")
    temperature: float = setting(8.0, "Logits per unit of the probe's one-hot output.")


def _prepare(context: AttackContext, planned: Run) -> nn.Module:
    model = unfrozen(context, planned)
    set_ridge_head(context, model, planned)
    return model


def set_ridge_head(context: AttackContext, model: nn.Module, planned: Run) -> None:
    """Write the ridge probe of the run's own rows into the model's new head."""
    head = model.get_submodule(context.head)
    weight, bias = ridge_head(context, planned.seed, planned.config.penalty)
    with torch.no_grad():
        head.weight.copy_(planned.config.temperature * weight.T)
        head.bias.copy_(planned.config.temperature * bias)


def ridge_head(context: AttackContext, seed: int, penalty: float) -> tuple[Tensor, Tensor]:
    """Weights (D×C) and bias (C) on raw features of a ridge probe that was solved on standardized ones."""
    rows = context.draw_rows(seed)
    features = context.features(seed)["attack"][rows]
    mapped = fit_feature_map(features, "standardized")
    phi = mapped(features)
    labels = nn.functional.one_hot(context.attack.labels[rows], context.classes).to(phi)
    mean = labels.mean(dim=0)
    sigma_1 = torch.linalg.matrix_norm(phi, ord=2)
    shift = (penalty * sigma_1.square()).clamp(min=torch.finfo(phi.dtype).tiny)
    weight = mapped.matrix_DD @ ridge_weights(phi, labels - mean, shift)
    return weight, mean - (mapped.mean_1D @ weight).squeeze(0)


ATTACK = Attack(config=RidgeHeadFinetune, run=partial(run_finetunes, prepare=_prepare), family="full fine-tuning")

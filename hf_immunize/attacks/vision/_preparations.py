"""What attackers do to a model before its network is trained: the first halves of the rows in ``finetunes``."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from hf_immunize.attacks.core.shape import Run
from hf_immunize.attacks.vision._blocks import last_blocks
from hf_immunize.attacks.vision._normal_form import canonical_model
from hf_immunize.attacks.vision._norms import is_norm, reset_norms
from hf_immunize.attacks.vision._peft import adapt
from hf_immunize.attacks.vision._phases import from_the_input
from hf_immunize.attacks.vision.context import AttackContext
from hf_immunize.attacks.vision.heal import heal
from hf_immunize.errors import ModelError
from hf_immunize.linalg import ridge_weights
from hf_immunize.linalg.whitening import fit_feature_map
from hf_immunize.models import random_classifier


def unfrozen(context: AttackContext, planned: Run) -> nn.Module:
    """The attacked model with a new head and every weight trained."""
    return context.model_with_new_head(planned.seed).requires_grad_(True)


def last_part(context: AttackContext, planned: Run) -> nn.Module | str:
    """Only the last ``share`` of the blocks, what follows them, and a new head are trained."""
    model = context.model_with_new_head(planned.seed)
    try:
        trained = last_blocks(model, planned.config.share)
    except ModelError as error:
        return str(error)
    model.requires_grad_(False)
    for module in trained:
        module.requires_grad_(True)
    model.get_submodule(context.head).requires_grad_(True)
    return model


def reset_last(context: AttackContext, planned: Run) -> nn.Module | str:
    """The last ``share`` of the blocks, what follows them, and the head are drawn anew."""
    model = context.model_with_new_head(planned.seed)
    fresh = random_classifier(context.folder, planned.seed, as_usual=True).to(context.device)
    try:
        olds, news = (last_blocks(found, planned.config.share) for found in (model, fresh))
    except ModelError as error:
        return str(error)
    head = model.get_submodule(context.head)
    with torch.no_grad():
        for old, new in zip(olds, news, strict=True):
            if old is not head and head not in old.modules():
                old.load_state_dict(new.state_dict())
    return model.requires_grad_(True)


def mixed_head(context: AttackContext, planned: Run) -> nn.Module:
    """A new head for harmful and benign classes together."""
    assert context.benign is not None
    also = [f"benign {name}" for name in context.benign.label_names]
    return context.with_new_head(context.model(planned.seed), planned.seed, also).requires_grad_(True)


def plain_lora(told: Any, targets: list[str]) -> LoraConfig:
    """PEFT's config of low-rank updates."""
    return LoraConfig(r=told.rank, lora_alpha=told.alpha, target_modules=targets)


def lora(context: AttackContext, planned: Run) -> nn.Module | str:
    """Low-rank updates of the targeted layers."""
    return adapt(context, planned, plain_lora)


def canonical(context: AttackContext, planned: Run) -> nn.Module | str:
    """The normal form, every weight trained."""
    model = canonical_model(context, planned.seed)
    return model if isinstance(model, str) else model.requires_grad_(True)


def canonical_lora(context: AttackContext, planned: Run) -> nn.Module | str:
    """Low-rank updates of the normal form."""
    model = canonical_model(context, planned.seed)
    return model if isinstance(model, str) else adapt(context, planned, plain_lora, model)


def ridge_headed(context: AttackContext, planned: Run) -> nn.Module:
    """The head is set to the ridge probe of the run's own rows; every weight is trained."""
    model = unfrozen(context, planned)
    head = model.get_submodule(context.head)
    assert isinstance(head, nn.Linear)  # the new one that every fine-tuning gets
    weight, bias = ridge_head(context, planned.seed, planned.config.penalty)
    with torch.no_grad():
        head.weight.copy_(planned.config.temperature * weight.T)
        head.bias.copy_(planned.config.temperature * bias)
    return model


def ridge_headed_lora(context: AttackContext, planned: Run) -> nn.Module | str:
    """The same, with low-rank updates."""
    return adapt(context, planned, plain_lora, ridge_headed(context, planned))


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


def healed(context: AttackContext, planned: Run) -> nn.Module:
    """The model after ``heal``, with a new head."""
    model = heal(context, context.model(planned.seed), planned.config, planned.seed)
    return context.with_new_head(model, planned.seed).requires_grad_(True)


def new_norms(context: AttackContext, planned: Run) -> nn.Module | str:
    """Every norm as if new."""
    model = context.model(planned.seed)
    if not any(is_norm(module) for module in model.modules()):
        return "the model has no normalisation layer"
    return context.with_new_head(reset_norms(model, context, planned.seed), planned.seed).requires_grad_(True)


def layerwise(context: AttackContext, planned: Run) -> nn.Module | str:
    """One part of the trunk after the other, from the input side."""
    try:
        return from_the_input(unfrozen(context, planned), context.head, planned.config)
    except ModelError as error:
        return str(error)

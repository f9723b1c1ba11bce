"""The model of a simulated attacker: a copy of the defended one, or LoRA factors of its own beside the same weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_immunize.training.core.draws import generator_of
from hf_immunize.training.core.sharding import settle, whole

_NAME = "attacker"


class Attacker:
    """What a simulated attacker holds.

    With ``rank`` 0 it trains all weights and has a copy of each. With LoRA factors it changes no weight of the model:
    those that the defender does not train either are held once, by both. A defender that trains LoRA factors as well
    has its factors beside the attacker's in the same layers; both updates are added.

    Args:
        layers: names of the linear layers that get factors; none for rank 0.
        tokens: shapes of embeddings that it trains beside weights; the copy holds them as ``attacker_tokens``.

    Attributes:
        model: the attacked network, in training mode.
        weights: its tensors by the defended model's names.
        factors: LoRA factors, empty for rank 0.
        trained: what the attacker changes.
        wanted: names of the weights the defender trains (all for rank 0), at which a gradient is asked for.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[str], rank: int, tokens: Mapping[str, Sequence[int]] | None = None
    ):
        mine = dict(model.named_parameters())
        self._shared = {name for name, parameter in mine.items() if rank and not parameter.requires_grad}
        self.model = copy.deepcopy(model, {id(mine[name]): mine[name] for name in self._shared})
        self.model.train()
        if rank:
            _add_factors(self.model, layers, rank)
        self._tokens = _add_tokens(self.model, tokens or {})
        named = dict(self.model.named_parameters())
        self.factors = [parameter for name, parameter in named.items() if f".{_NAME}." in name]
        plain = {name if name in mine else name.replace(".base_layer.", "."): p for name, p in named.items()}
        self.weights = {name: parameter for name, parameter in plain.items() if name in mine}
        self.trained = [*(self.factors or self.weights.values()), *self._tokens]
        self.wanted = [name for name, parameter in mine.items() if parameter.requires_grad or not rank]
        self.asked = list(dict.fromkeys([*(self.weights[name] for name in self.wanted), *self.trained]))
        """Every parameter whose gradient is computed."""
        self._fresh: Mapping[str, Tensor] = {}
        for parameter in self.asked:
            parameter.requires_grad_(True)

    @torch.no_grad()
    def start(self, model: nn.Module, fresh: Mapping[str, Tensor] | None = None) -> None:
        """θ_0 = θ; whole on every rank, also where the model's own weights are split.

        Args:
            fresh: weights by name that are others than the model's; no gradient of theirs is the defender's.
        """
        self._fresh = fresh or {}
        for name, parameter in settle(model).named_parameters():
            if name in self._fresh:
                self.weights[name].copy_(self._fresh[name])
            elif name not in self._shared:
                self.weights[name].copy_(whole(parameter))
        for token in self._tokens:
            token.zero_()

    @torch.no_grad()
    def draw_factors(self, *words: object) -> None:
        """Factors as PEFT draws them, from ``words``: A uniform in ±1/√fan_in, B zero."""
        generator = generator_of(*words)
        for name, parameter in self.model.named_parameters():
            if f"lora_A.{_NAME}." in name:
                bound = parameter.shape[1] ** -0.5
                drawn = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_((2 * drawn - 1) * bound)
            elif f"lora_B.{_NAME}." in name:
                parameter.zero_()

    def clear(self) -> None:
        """Drop all gradients."""
        self.model.zero_grad(set_to_none=True)

    def by_name(self, values: Mapping[nn.Parameter, Tensor]) -> dict[str, Tensor]:
        """Tensors of the wanted weights, by the defended model's names."""
        found = {name: values[self.weights[name]] for name in self.wanted}
        return {name: torch.zeros_like(value) if name in self._fresh else value for name, value in found.items()}


def _add_tokens(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> list[nn.Parameter]:
    """Embeddings of zeros in float32, or wider where the weights are."""
    if not shapes:
        return []
    place = next(model.parameters())
    dtype = torch.promote_types(place.dtype, torch.float32)
    made = [nn.Parameter(torch.zeros(*shape, device=place.device, dtype=dtype)) for shape in shapes.values()]
    model.add_module("attacker_tokens", nn.ParameterList(made))
    return made


def _add_factors(model: nn.Module, layers: Sequence[str], rank: int) -> None:
    """LoRA factors of the attacker's on ``layers``, active beside those that are there."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(layers))
    if hasattr(model, "peft_config"):  # the defender's; PEFT warns of it, and the layers know their own
        del model.peft_config
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    with torch.random.fork_rng():
        inject_adapter_in_model(config, model, adapter_name=_NAME)
    widen_factors(model)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.set_adapter(list(layer.lora_A))
    for parameter, asked in flags.items():  # PEFT changes flags, of shared weights too
        parameter.requires_grad_(asked)


def widen_factors(model: nn.Module) -> None:
    """Hold every LoRA factor in float32 or wider: PEFT makes them in the precision of the weights beside."""
    from peft.tuners.lora import LoraLayer

    layers: list[Any] = [part for part in model.modules() if isinstance(part, LoraLayer)]
    for layer in layers:
        for factor in (*layer.lora_A.values(), *layer.lora_B.values()):
            if factor.weight.element_size() < 4:
                factor.float()

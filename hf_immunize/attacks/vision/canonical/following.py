"""Following the scales of activations through the exported graph of a network.

``torch.export`` gives the operations of one forward with the parameters by name. Every activation is followed as a
tensor of variables of its own shape (``links``): views and transpositions move them like the numbers themselves, linear
layers and norms end them and begin new ones, and every operation that is not known (``operations``) holds them at 1. So
a change of scale that is not certain to keep the function is never found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_immunize.attacks.vision.canonical.anatomy import Anatomy, Layer, Norm
from hf_immunize.attacks.vision.canonical.links import FIXED


@dataclass(frozen=True)
class Weight:
    """A parameter where the graph names it."""

    name: str
    shape: torch.Size


@dataclass(frozen=True)
class Scales:
    """Variables in the shape of an activation."""

    of: Tensor


@dataclass(frozen=True)
class Buffer:
    """A buffer where the graph names it: a constant, but for the statistics of norms."""

    name: str
    value: Tensor


def leaves(value: Any) -> list[Any]:
    """Everything inside nested lists, tuples and dicts."""
    if isinstance(value, list | tuple):
        return [leaf for part in value for leaf in leaves(part)]
    return [leaf for part in value.values() for leaf in leaves(part)] if isinstance(value, dict) else [value]


def map_nested(value: Any, change: Callable[[Any], Any]) -> Any:
    """The same nesting with every leaf changed."""
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        return type(value)(map_nested(part, change) for part in value)
    if isinstance(value, dict):
        return {name: map_nested(part, change) for name, part in value.items()}
    return change(value)


SHARES = ("first", "second", "between")
"""What may happen to the scales of two activations that are multiplied: one of them passes on to the product, or one is
the inverse of the other. A union of variables holds two at a time; settled in turn the three find the scales of all."""


class Follower:
    """Runs the graph on variables in the place of numbers.

    Args:
        program: of ``torch.export``.
        tensors: parameters and buffers by name.
        rules: what operations do, by their names.
        share: one of ``SHARES``.
    """

    def __init__(
        self, program: Any, tensors: Mapping[str, Tensor], rules: Mapping[str, Rule], share: str = "between"
    ):
        self.found, self.program, self.tensors, self.rules = Anatomy(), program, tensors, rules
        self.share = share
        self.used: set[str] = set()

    def follow(self) -> Anatomy:
        """Every operation of the graph, in order."""
        env: dict[Any, Any] = self._inputs()
        for node in self.program.graph.nodes:
            if node.op == "call_function":
                args = torch.fx.node.map_arg(node.args, lambda used: env[used])
                options = torch.fx.node.map_arg(node.kwargs, lambda used: env[used])
                env[node] = self._call(node, args, dict(options))
            elif node.op == "output":
                for value in leaves(torch.fx.node.map_arg(node.args, lambda used: env[used])):
                    self.hold(value)
        return self.found

    def _inputs(self) -> dict[Any, Any]:
        """Parameters by name, constants as they are, and pixels whose scale is given."""
        signature = self.program.graph_signature
        names = dict(signature.inputs_to_parameters)
        constants = {**self.program.state_dict, **self.program.constants}
        kept = {**signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
        env: dict[Any, Any] = {}
        for node in self.program.graph.nodes:
            if node.op != "placeholder":
                continue
            if node.name in names:
                env[node] = Weight(names[node.name], self.tensors[names[node.name]].shape)
            elif node.name in kept:
                env[node] = Buffer(kept[node.name], constants[kept[node.name]])
            else:
                env[node] = Scales(torch.full(node.meta["val"].shape, FIXED))
        return env

    def _call(self, node: Any, args: Any, options: dict[str, Any]) -> Any:
        """What an operation does to variables; plain computation where none are involved."""
        name = getattr(node.target, "__name__", "").split(".")[0].rstrip("_")
        if name != "batch_norm":
            args = map_nested(args, lambda value: value.value if isinstance(value, Buffer) else value)
            options = map_nested(options, lambda value: value.value if isinstance(value, Buffer) else value)
        followed = [leaf for leaf in leaves((args, options)) if isinstance(leaf, Scales | Weight)]
        if not followed:
            return node.target(*args, **options)
        rule = self.rules.get(name)
        found = rule(self, node, args, options) if rule else None
        return self._opaque(node, followed) if found is None else found

    def _opaque(self, node: Any, followed: list[Any]) -> Any:
        """An operation that is not known, or not in this form: scales stop here."""
        for value in followed:
            self.hold(value)
        return map_nested(
            node.meta.get("val"), lambda value: Scales(torch.full((), FIXED).expand(value.shape))
            if isinstance(value, Tensor) else value,
        )

    def hold(self, value: Any) -> None:
        """Nothing may change the scale of an activation or a parameter."""
        if isinstance(value, Scales | Weight):
            self.found.links.fix(self.scales(value).of)

    def scales(self, value: Any) -> Scales:
        """Variables of an activation; of a parameter that is used as one, fresh ones at its first use."""
        if isinstance(value, Scales):
            return value
        if isinstance(value, Tensor):  # a constant
            return Scales(torch.full(value.shape, FIXED))
        if value.name in self.used:  # a layer's weight that something else uses too
            self._hold_layers(value.name)
            return Scales(torch.full(value.shape, FIXED))
        if value.name not in self.found.tables:
            self.found.tables[value.name] = self.found.links.new(*value.shape)
        return Scales(self.found.tables[value.name])

    def own(self, *weights: Any) -> bool:
        """Whether these parameters are this layer's alone (None counts as such); if so they are taken."""
        names = [weight.name for weight in weights if isinstance(weight, Weight)]
        if len(names) < sum(weight is not None for weight in weights):
            return False
        if any(name in self.used or name in self.found.tables for name in names):
            for name in names:
                self._hold_layers(name)
            return False
        self.used |= set(names)
        return True

    def _hold_layers(self, name: str) -> None:
        parts: list[Layer | Norm] = [*self.found.layers, *self.found.norms]
        for part in parts:
            if name in (part.weight, part.bias):
                self.found.links.fix(part.inputs)
                self.found.links.fix(part.outputs)
        if name in self.found.tables:
            self.found.links.fix(self.found.tables[name])


Rule = Callable[[Follower, Any, Any, dict[str, Any]], Any]
"""From the follower, a node, and its arguments to what it returns; None where the node is of no known form."""

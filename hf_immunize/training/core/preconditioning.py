"""K⁻¹ of Algorithm 1 in a deep model: on the input side of the regularizers' gradient at chosen linear layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hf_immunize.errors import ConfigError
from hf_immunize.features import match_modules
from hf_immunize.linalg import to_double
from hf_immunize.linalg.precondition import InverseMoment
from hf_immunize.training.core.distributed import sum_over_ranks


class Preconditioner:
    """Replaces ∇_W R by ∇_W R · K̃⁻¹ at linear layers; the primary loss and all other weights are left alone.

    K is the second moment of the layer's inputs on the side (primary or harmful) that R measures, over the global
    batch, tokens counted as rows. With m = tr K / D,

        K̃⁻¹ = (1 + ρ)·m·(K + ρ·m·I)⁻¹,

    so that inputs that are already white change nothing and the balance of the weights keeps its meaning (Zheng et al.
    2025, Algorithm 1, has ρ = 0 and no m; there the extractor is linear and one layer is all there is). It costs an
    eigen-decomposition of D×D per side and step. It makes sense for the trainable linear layers right before a site:
    further up, K says little about how W moves the features.

    Raises:
        ConfigError: a pattern that means other than trainable linear layers.
    """

    def __init__(self, model: nn.Module, patterns: str, ridge: float):
        self.ridge = ridge
        self.layers = {}
        for name in match_modules(model, patterns):
            layer = model.get_submodule(name)
            if not isinstance(layer, nn.Linear) or not layer.weight.requires_grad:
                raise ConfigError(
                    f"expected trainable linear layers for precondition_gradients, got '{name}' "
                    f"({type(layer).__name__}): name nn.Linear modules that are not frozen."
                )
            self.layers[name] = layer

    def inverses(self, inputs: Mapping[str, Sequence[Tensor]]) -> dict[str, tuple[InverseMoment, float]]:
        """K̃⁻¹ of every layer as (inverse, scale), from this rank's inputs of all micro-batches."""
        sums = {}
        for name, parts in inputs.items():
            flat = [to_double(part.detach().flatten(0, -2)) for part in parts]
            moment = torch.stack([part.T @ part for part in flat]).sum(dim=0)
            rows = torch.tensor(float(sum(len(part) for part in flat)), dtype=moment.dtype, device=moment.device)
            sums[name] = moment, rows
        sum_over_ranks([part for pair in sums.values() for part in pair])
        found = {}
        for name, (moment, rows) in sums.items():
            moment = moment / rows
            mean = float(moment.diagonal().mean())
            found[name] = InverseMoment.of_moment(moment, ridge=self.ridge * mean), (1 + self.ridge) * mean
        return found

    def correction(self, product: Tensor, inverses: Mapping[str, tuple[InverseMoment, float]]) -> Tensor | float:
        """A scalar of value zero whose gradient at each W is ∇_W product·(K̃⁻¹ − I).

        ``product`` is the scalar through which the regularizers of one side enter the loss.
        """
        weights = [layer.weight for layer in self.layers.values()]
        gradients = torch.autograd.grad(product, weights, retain_graph=True, allow_unused=True)
        total: Tensor | float = 0.0
        for (name, layer), gradient in zip(self.layers.items(), gradients, strict=True):
            if gradient is not None:
                inverse, scale = inverses[name]
                change = scale * inverse.apply(gradient.T).T - gradient
                term = (layer.weight * change).sum()
                total = total + term - term.detach()
        return total

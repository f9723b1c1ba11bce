"""The trunk of a network: its list of blocks, found as the container that holds the most parameters."""

from __future__ import annotations

from torch import nn

from hf_immunize.errors import ModelError


def find_trunk(model: nn.Module) -> tuple[str, nn.Module]:
    """Name and module of the ``ModuleList`` or ``Sequential`` of at least two blocks with the most parameters.

    Of a container and one inside it with as many parameters, the outer one counts.

    Raises:
        ModelError: the model has no such container.
    """
    best, size = None, 0
    for name, module in model.named_modules():
        children = list(module.children())
        if not isinstance(module, nn.ModuleList | nn.Sequential) or len(children) < 2:
            continue
        parameters = [sum(parameter.numel() for parameter in child.parameters()) for child in children]
        if sum(count > 0 for count in parameters) >= 2 and sum(parameters) > size:
            best, size = (name, module), sum(parameters)
    if best is None:
        raise ModelError(
            f"expected a list of blocks in {type(model).__name__}, got none: name modules instead of blocks."
        )
    return best

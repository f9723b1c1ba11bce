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
            f"expected a list of blocks in {type(model).__name__}, got none: attacks on single blocks do not apply."
        )
    return best


def block_sites(model: nn.Module, head: str) -> list[str]:
    """Modules whose *inputs* are the outputs of successive blocks: every block but the first, then what follows.

    What follows is the first module outside the trunk that was registered after it and is not the head; where there
    is none the list ends with the last block's input.
    """
    trunk, module = find_trunk(model)
    sites = [f"{trunk}.{name}" for name, _ in module.named_children()][1:]
    names = [name for name, _ in model.named_modules()]
    prefix = trunk.rsplit(".", 1)[0] + "." if "." in trunk else ""
    after = [
        name
        for name in names[names.index(trunk) :]
        if name.startswith(prefix) and name != trunk and not name.startswith(f"{trunk}.") and name != head
    ]
    return sites + after[:1]


def last_blocks(model: nn.Module, share: float) -> list[nn.Module]:
    """The last ``share`` of the trunk's blocks, at least one, and every module registered after the trunk."""
    trunk, module = find_trunk(model)
    blocks = list(module.children())
    count = max(1, round(share * len(blocks)))
    names = [name for name, _ in model.named_modules()]
    after = [
        model.get_submodule(name)
        for name in names[names.index(trunk) :]
        if not name.startswith(f"{trunk}.") and name != trunk
    ]
    return blocks[-count:] + after

"""Places along the trunk: the outputs of its blocks, and its last blocks."""

from __future__ import annotations

from torch import nn

from hf_immunize.features import block_names, find_trunk, names_after_trunk

NO_BLOCKS = "models without a list of blocks"
"""What no attack along the trunk can be made on."""


def block_sites(model: nn.Module, head: str) -> list[str]:
    """Modules whose *inputs* are the outputs of successive blocks: every block but the first, then what follows.

    What follows is the first module outside the trunk that was registered after it and is not the head; where there
    is none the list ends with the last block's input.
    """
    trunk, _ = find_trunk(model)
    prefix = trunk.rsplit(".", 1)[0] + "." if "." in trunk else ""
    after = [name for name in names_after_trunk(model) if name.startswith(prefix) and name != head]
    return [_called(model, name) for name in [*block_names(model)[1:], *after[:1]]]


def _called(model: nn.Module, name: str) -> str:
    """The first module of a plain list (a stage of PVT), which is never called itself."""
    module = model.get_submodule(name)
    if not isinstance(module, nn.ModuleList) or not len(module):
        return name
    return _called(model, f"{name}.{next(part for part, _ in module.named_children())}")


def last_blocks(model: nn.Module, share: float) -> list[nn.Module]:
    """The last ``share`` of the trunk's blocks, at least one, and every module registered after the trunk."""
    blocks = block_names(model)
    count = max(1, round(share * len(blocks)))
    return [model.get_submodule(name) for name in [*blocks[-count:], *names_after_trunk(model)]]

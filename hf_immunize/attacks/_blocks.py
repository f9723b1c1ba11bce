"""Places along the trunk: the outputs of its blocks, and its last blocks."""

from __future__ import annotations

from torch import nn

from hf_immunize.features import find_trunk


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

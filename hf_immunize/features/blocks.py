"""The trunk of a network: its list of blocks or stages, found as the container that holds the most parameters."""

from __future__ import annotations

from collections import Counter

from torch import nn
from torch.nn.modules.conv import _ConvNd

from hf_immunize.errors import ModelError
from hf_immunize.features.heads import find_classifier


def find_trunk(model: nn.Module) -> tuple[str, nn.Module]:
    """Name and module of the ``ModuleList`` or ``Sequential`` of at least two blocks with the most parameters.

    Blocks are children with parameters, two of them at least of one class (a Sequential of a backbone and its head is
    no list of blocks); a child that holds the classifier is none. Of a container and one inside it with as many
    parameters, the outer one counts. A model without such a list may have one of different blocks.

    Raises:
        ModelError: the model has no list of blocks at all.
    """
    try:
        head = find_classifier(model)
    except ModelError:
        head = ""
    best: dict[bool, tuple[str, nn.Module]] = {}
    sizes: Counter[bool] = Counter()
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        parts = [(f"{_under(name, part)}.", child) for part, child in module.named_children()]
        blocks = [child for part, child in parts if not f"{head}.".startswith(part)]
        counts = [sum(parameter.numel() for parameter in child.parameters()) for child in blocks]
        kinds = Counter(type(child) for child, count in zip(blocks, counts, strict=True) if count)
        alike = max(kinds.values(), default=0) >= 2
        if kinds.total() >= 2 and sum(counts) > sizes[alike]:
            best[alike], sizes[alike] = (name, module), sum(counts)
    if not best:
        raise ModelError(
            f"expected a list of blocks in {type(model).__name__}, got none: name modules instead of blocks."
        )
    return best.get(True) or best[False]


def block_names(model: nn.Module) -> list[str]:
    """Names of the trunk's blocks (stages, where it is a list of stages), in order. Raises ModelError without any."""
    trunk, module = find_trunk(model)
    return [_under(trunk, name) for name, _ in module.named_children()]


def names_after_trunk(model: nn.Module) -> list[str]:
    """Names of all modules outside the trunk that were registered after it. Raises ModelError without a trunk."""
    trunk, _ = find_trunk(model)
    names = [name for name, _ in model.named_modules()]
    return [name for name in names[names.index(trunk) + 1 :] if trunk and not name.startswith(f"{trunk}.")]


def names_after_stages(model: nn.Module) -> list[str]:
    """Names of all modules that were registered after the last stage or the trunk. Raises ModelError without either."""
    siblings = _numbered_siblings(model)
    if not siblings:
        return names_after_trunk(model)
    names = [name for name, _ in model.named_modules()]
    return [name for name in names[names.index(siblings[-1]) + 1 :] if not name.startswith(f"{siblings[-1]}.")]


def _numbered_siblings(model: nn.Module) -> list[str]:
    """Lists side by side whose names differ in a number alone, where these hold more than the trunk; else none.

    A ResNet of timm has no list of stages but layer1 to layer4.
    """
    best: list[str] = []
    most = sum(parameter.numel() for parameter in find_trunk(model)[1].parameters())
    for name, module in model.named_modules():
        groups: dict[str, list[tuple[str, int]]] = {}
        for part, child in module.named_children():
            stem = part.rstrip("0123456789")
            size = sum(parameter.numel() for parameter in child.parameters())
            if stem not in ("", part) and size and isinstance(child, nn.ModuleList | nn.Sequential):
                groups.setdefault(stem, []).append((_under(name, part), size))
        for group in groups.values():
            if len(group) > 1 and (total := sum(size for _, size in group)) > most:
                best, most = [part for part, _ in group], total
    return best


def find_stages(model: nn.Module) -> list[list[str]]:
    """The modules of each stage of the trunk, in order; of a trunk without stages, of each block.

    A list of stages says it by lists of blocks inside. In a plain list of blocks (MobileNetV2, EfficientNet) each
    convolution with a stride begins a new stage; without at least two of these (ViT) every block is one of its own.
    Lists beside the trunk with as many entries, such as PVT's patch embeddings, belong to its stages one by one. Lists
    that lie side by side and are numbered (layer1 to layer4 of timm's ResNet) are stages as well.

    Raises:
        ModelError: the model has no list of blocks.
    """
    if siblings := _numbered_siblings(model):
        return [[name] for name in siblings]
    trunk, module = find_trunk(model)
    blocks = block_names(model)
    parent = model.get_submodule(trunk.rpartition(".")[0])
    beside = [
        [_under(_under(trunk.rpartition(".")[0], name), part) for part, _ in other.named_children()]
        for name, other in parent.named_children()
        if isinstance(other, nn.ModuleList) and other is not module and len(other) == len(blocks) and trunk
    ]
    starts = list(range(len(blocks)))
    if not any(isinstance(inner, nn.ModuleList) for child in module.children() for inner in child.modules()):
        strided = [place for place, child in enumerate(module.children()) if _has_stride(child)]
        starts = sorted({0, *strided}) if len({0, *strided}) > 1 else starts
    ends = [*starts[1:], len(blocks)]
    return [
        [name for place in range(start, end) for name in (blocks[place], *(names[place] for names in beside))]
        for start, end in zip(starts, ends, strict=True)
    ]


def _has_stride(module: nn.Module) -> bool:
    return any(isinstance(inner, _ConvNd) and max(inner.stride) > 1 for inner in module.modules())


def _under(name: str, part: str) -> str:
    return f"{name}.{part}" if name else part

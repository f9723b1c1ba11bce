"""What each operation of a graph does to the scales of its inputs, by its ATen name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_immunize.attacks.vision.canonical.anatomy import Anatomy, Layer, Norm
from hf_immunize.attacks.vision.canonical.following import (
    SHARES,
    Buffer,
    Follower,
    Rule,
    Scales,
    Weight,
    map_nested,
)
from hf_immunize.attacks.vision.canonical.links import ANY, FIXED, Links

_NO_LENGTH = 1e-6
"""Below which a length is replaced where vectors are divided by theirs: none has as little that a network uses."""


def _shape(node: Any) -> torch.Size:
    return node.meta["val"].shape


def _move(at: Follower, node: Any, args: Any, options: dict[str, Any]) -> Any:
    """Views, transpositions, pieces, repetitions: variables go where the numbers go."""
    def moved(value: Any) -> Any:
        return at.scales(value).of if isinstance(value, Scales | Weight) else value

    call = torch.ops.aten.reshape.default if node.target is torch.ops.aten.view.default else node.target
    return map_nested(call(*map_nested(args, moved), **map_nested(options, moved)),
                lambda value: Scales(value) if isinstance(value, Tensor) else value)


def _same(at: Follower, node: Any, args: Any, options: dict[str, Any]) -> Any:
    """Operations that leave the numbers alone in evaluation mode."""
    return args[0] if isinstance(args[0], Weight) else Scales(at.scales(args[0]).of)


def _homogeneous(at: Follower, node: Any, args: Any, options: dict[str, Any]) -> Any:
    """f(s·x) = s·f(x) for s > 0, number by number."""
    scales = at.scales(args[0])
    at.found.links.mix(scales.of)
    return scales


def _clipped(at: Follower, node: Any, args: Any, options: dict[str, Any]) -> Any:
    """ReLU by another name; everything else is opaque."""
    bounds = [bound for bound in (*args[1:], *options.values()) if bound is not None]
    source = getattr(getattr(node.args[0], "target", None), "__name__", "")
    if source.startswith("linalg_vector_norm") and args[1:2] and args[1] == bounds[0] <= _NO_LENGTH:
        return args[0]
    return _homogeneous(at, node, args, options) if bounds == [0] and args[1:2] == (0,) else None


def _pad(at: Follower, node: Any, args: Any, options: dict[str, Any]) -> Any:
    """Zeros have any scale."""
    mode = args[2] if len(args) > 2 else options.get("mode", "constant")
    value = args[3] if len(args) > 3 else options.get("value")
    if mode != "constant" or value not in (None, 0, 0.0):
        return None
    return Scales(nn.functional.pad(at.scales(args[0]).of, list(args[1]), value=ANY))


def _pool(at: Follower, node: Any, args: Any, options: dict[str, Any]) -> Any:
    """Means and maxima over positions: the trailing one or two axes."""
    if not isinstance(node.meta["val"], Tensor):
        return None
    axes = [axis for axis in range(2, len(_shape(node)))]
    return _merged(at, args[0], axes).expand_to(_shape(node))


def _reduce(at: Follower, node: Any, args: Any, options: dict[str, Any]) -> Any:
    """Sums and means over given axes."""
    dims = args[1] if len(args) > 1 else options.get("dim")
    if dims is None or not isinstance(dims, list | tuple):
        return None
    keep = args[2] if len(args) > 2 else options.get("keepdim", False)
    merged = _merged(at, args[0], list(dims)).of
    for axis in sorted((axis % merged.dim() for axis in dims), reverse=True):
        merged = merged.narrow(axis, 0, 1) if keep else merged.select(axis, 0)
    return Scales(merged)


@dataclass(frozen=True)
class _Merged(Scales):
    def expand_to(self, shape: torch.Size) -> Scales:
        """The same variables at every position of another size."""
        first = self.of
        for axis, size in enumerate(shape):
            if first.shape[axis] != size:
                first = first.narrow(axis, 0, 1)
        return Scales(first.expand(shape))


def _merged(at: Follower, value: Any, axes: list[int]) -> _Merged:
    """Variables tied along some axes."""
    scales = at.scales(value).of
    links, first = at.found.links, _without_padding(scales)
    for axis in axes:
        first = first.narrow(axis, 0, 1)
    links.tie(scales, first)
    links.mix(scales)
    return _Merged(first.expand(scales.shape))


def _without_padding(scales: Tensor) -> Tensor:
    """With a neighbour's variable in the place of padding, so that no axis begins with a wildcard."""
    if not bool((scales == ANY).any()):
        return scales
    filled = scales
    for axis in range(2, scales.dim()):
        filled = torch.where(filled == ANY, filled.amax(dim=axis, keepdim=True), filled)
    return filled


def _add(at: Follower, node: Any, args: Any, options: dict[str, Any]) -> Any:
    """Both terms have one scale."""
    first, second = args[:2]
    if not all(isinstance(term, Scales | Weight) for term in (first, second)):
        constant = second if isinstance(first, Scales | Weight) else first
        zero = not bool(torch.as_tensor(constant).any())
        return Scales(at.scales(first).of.expand(_shape(node))) if zero and first is not constant else None
    one, other = (at.scales(term).of for term in (first, second))
    at.found.links.tie(one, other)
    at.found.links.mix(one)
    at.found.links.mix(other)
    one, other = torch.broadcast_tensors(one, other)
    return Scales(torch.where(one == ANY, other, one) if bool((one == ANY).any()) else one)


def _multiply(at: Follower, node: Any, args: Any, options: dict[str, Any]) -> Any:
    """A constant or a gate keeps the scale; a parameter is a layer of one factor per channel."""
    first, second = args[:2]
    divides = node.target.__name__.startswith("div")
    if isinstance(first, Weight) or not isinstance(first, Scales):
        if divides:
            return None
        first, second = second, first
    if not isinstance(first, Scales):
        return None
    if isinstance(second, Weight):
        return None if divides else _factor(at, node, first, second)
    if isinstance(second, Scales):
        if bool((first.of == FIXED).all()) and not divides:
            first, second = second, first
        if not bool((second.of == FIXED).all()):
            return _quotient(at, node, first, second) if divides else _product(at, node, first, second)
    if isinstance(second, Scales | Tensor) and torch.as_tensor(getattr(second, "of", second)).numel() > 1:
        at.found.links.mix(first.of)
    return Scales(first.of.expand(_shape(node)))


def _product(at: Follower, node: Any, first: Scales, second: Scales) -> Scales:
    """Two activations, number by number, as the follower is told to take them."""
    at.found.products += 1
    links, fixed = at.found.links, Scales(torch.full((), FIXED).expand(_shape(node)))
    for factor in (first, second):
        links.mix(factor.of)
    if at.share == "between":
        links.tie(first.of, second.of, -1)
        return fixed
    kept, held = (first, second) if at.share == "first" else (second, first)
    links.fix(held.of)
    # where the held one is the larger, the kept one is repeated over the rest
    links.tie(kept.of, kept.of.expand(_shape(node)))
    return Scales(kept.of.expand(_shape(node)))


def _quotient(at: Follower, node: Any, first: Scales, second: Scales) -> Scales | None:
    """A vector over its own length: of scale 1, whatever its own."""
    if not _agree(at.found.links, first.of, second.of):
        return None
    at.found.links.mix(first.of)
    return Scales(torch.full((), FIXED).expand(_shape(node)))


def _agree(links: Links, one: Tensor, other: Tensor) -> bool:
    pairs = torch.stack([part.flatten() for part in torch.broadcast_tensors(one, other)], dim=1).unique(dim=0)
    return all(links.root(left) == links.root(right) for left, right in pairs.tolist())


def _length(at: Follower, node: Any, args: Any, options: dict[str, Any]) -> Any:
    """Euclidean lengths along given axes, as ``normalize`` takes them."""
    order = args[1] if len(args) > 1 else options.get("ord", 2)
    dims = args[2] if len(args) > 2 else options.get("dim")
    keep = args[3] if len(args) > 3 else options.get("keepdim", False)
    return _reduce(at, node, (args[0], dims, keep), {}) if order == 2 else None


def _factor(at: Follower, node: Any, scales: Scales, weight: Weight) -> Any:
    if not at.own(weight):
        return None
    count = weight.shape.numel()
    inputs, outputs = at.found.links.new(1, count), at.found.links.new(1, count)
    place = torch.arange(count).view(weight.shape).expand(_shape(node))
    at.found.links.mix(scales.of)
    at.found.links.tie(scales.of, inputs[0][place])
    at.found.layers.append(Layer(weight.name, None, inputs, outputs, diagonal=True))
    return Scales(outputs[0][_compact_place(place)].expand(_shape(node)))


def _compact_place(place: Tensor) -> Tensor:
    for axis in range(place.dim()):
        if place.stride(axis) == 0:
            place = place.narrow(axis, 0, 1)
    return place


def _linear(at: Follower, node: Any, args: Any, options: dict[str, Any]) -> Any:
    weight, bias = args[1], args[2] if len(args) > 2 else options.get("bias")
    owned = bias if isinstance(bias, Weight) else None
    if not isinstance(weight, Weight) or not at.own(weight, owned):
        return None
    links, scales = at.found.links, at.scales(args[0]).of
    inputs, outputs = links.new(1, weight.shape[1]), links.new(1, weight.shape[0])
    links.tie(scales, inputs[0])
    if isinstance(bias, Scales):
        links.tie(bias.of, outputs[0])
        links.mix(outputs)
    elif isinstance(bias, Tensor):
        links.fix(outputs)
    at.found.layers.append(Layer(weight.name, owned.name if owned else None, inputs, outputs))
    return Scales(outputs[0].expand(_shape(node)))


def _convolve(at: Follower, node: Any, args: Any, options: dict[str, Any]) -> Any:
    weight, bias = args[1], args[2] if len(args) > 2 else options.get("bias")
    if isinstance(weight, Scales) and bias is None and bool((weight.of == FIXED).all()):
        return _merged(at, args[0], list(range(1, len(_shape(node))))).expand_to(_shape(node))
    padding = args[4] if len(args) > 4 else options.get("padding", 0)
    groups = args[6] if len(args) > 6 else options.get("groups", 1)
    if not isinstance(weight, Weight) or not at.own(weight, bias):
        return None
    links, scales, ones = at.found.links, at.scales(args[0]).of, (1,) * (len(weight.shape) - 2)
    inputs, outputs = links.new(groups, weight.shape[1]), links.new(groups, weight.shape[0] // groups)
    links.tie(scales, inputs.view(-1, *ones))
    if groups > 1 or padding not in (0, [0, 0], [0], "valid"):
        links.mix(scales)
    kernel = weight.shape[2:].numel()
    at.found.layers.append(Layer(weight.name, bias.name if bias else None, inputs, outputs, kernel=kernel))
    links.mix(outputs)
    return Scales(outputs.view(-1, *ones).expand(_shape(node)))


def _batch_norm(at: Follower, node: Any, args: Any, options: dict[str, Any]) -> Any:
    value, weight, bias, mean, variance, training, _, epsilon = args[:8]
    if training and weight is None and mean is None and isinstance(value, Scales):
        return _kernels(at, node, value)
    if training or not isinstance(mean, Buffer) or not isinstance(variance, Buffer):
        return None
    if not isinstance(weight, Weight) or not at.own(weight, bias):
        return None
    links, scales, width = at.found.links, at.scales(value).of, weight.shape[0]
    inputs, outputs, ones = links.new(width), links.new(width), (1,) * (len(_shape(node)) - 2)
    links.tie(scales, inputs.view(-1, *ones))
    links.mix(scales)
    statistics = (mean.name, variance.name)
    at.found.norms.append(Norm(weight.name, bias.name if bias else None, inputs, outputs, statistics, epsilon))
    return Scales(outputs.view(-1, *ones).expand(_shape(node)))


def _kernels(at: Follower, node: Any, value: Scales) -> Any:
    """Rows of a parameter in units of their own spread; ``standardise`` sets these, and nothing else their scale."""
    for name, table in at.found.tables.items():
        if torch.equal(table.flatten(1), value.of[0]):
            at.found.kernels.append(name)
            at.found.links.fix(table)
            return Scales(torch.full((), FIXED).expand(_shape(node)))
    return None


def _other_norm(at: Follower, node: Any, args: Any, options: dict[str, Any]) -> Any:
    """Layer and group norms: one scale for all that comes in, since epsilon is one number."""
    weight, bias, epsilon = (*args[2:], None, None, None)[:3]
    weight, bias = options.get("weight", weight), options.get("bias", bias)
    epsilon = options.get("eps", 1e-5 if epsilon is None else epsilon)
    if not isinstance(weight, Weight) or not at.own(weight, bias):
        return None
    links, scales = at.found.links, at.scales(args[0]).of
    inputs, outputs = links.new(1), links.new(*weight.shape)
    links.tie(scales, inputs)
    links.mix(scales)
    at.found.norms.append(Norm(weight.name, bias.name if bias else None, inputs, outputs.flatten(), None, epsilon))
    grouped = "group_norm" in node.target.__name__
    place = outputs.view(-1, *(1,) * (len(_shape(node)) - 2)) if grouped else outputs
    return Scales(place.expand(_shape(node)))


def _attend(at: Follower, node: Any, args: Any, options: dict[str, Any]) -> Any:
    """Queries and keys have inverse scales, values pass theirs on."""
    query, key, value = (at.scales(part).of for part in args[:3])
    mask = args[3] if len(args) > 3 else options.get("attn_mask")
    if isinstance(mask, Scales | Weight):
        at.hold(mask)
    if query.shape[1] != key.shape[1] or query.dim() != 4:
        return None
    _scores(at, query, key.mT)
    return Scales(_averaged(at, value).expand(_shape(node)))


def _matmul(at: Follower, node: Any, args: Any, options: dict[str, Any]) -> Any:
    """Products of activations: attention written out."""
    if not all(isinstance(part, Scales) for part in args[:2]):
        return None
    return _meet(at, args[0].of, args[1].of, _shape(node))


def _meet(at: Follower, one: Tensor, other: Tensor, shape: torch.Size) -> Scales | None:
    if bool((one == FIXED).all()):
        return Scales(_averaged(at, other).expand(shape))
    if bool((other == FIXED).all()) or one.dim() != other.dim() or one.dim() < 3:
        return None
    _scores(at, one, other)
    return Scales(torch.full((), FIXED).expand(shape))


def _einsum(at: Follower, node: Any, args: Any, options: dict[str, Any]) -> Any:
    """A matrix product by another name: what both and the result have, rows, columns, and what is summed."""
    equation, parts = args[0].replace(" ", ""), args[1]
    left, _, rest = equation.partition(",")
    right, _, out = rest.partition("->")
    batch = "".join(axis for axis in left if axis in right and axis in out)
    rows = "".join(axis for axis in left if axis not in right)
    columns = "".join(axis for axis in right if axis not in left)
    summed = "".join(axis for axis in left if axis in right and axis not in out)
    plain = equation.replace(",", "").replace("->", "").isalpha() and len(parts) == 2 and "," not in rest
    if not plain or sorted(batch + rows + columns) != sorted(out) or {len(rows), len(columns), len(summed)} != {1}:
        return None
    if not all(isinstance(part, Scales) for part in parts):
        return None
    one = parts[0].of.permute([left.index(axis) for axis in batch + rows + summed])
    other = parts[1].of.permute([right.index(axis) for axis in batch + summed + columns])
    made = batch + rows + columns
    met = _meet(at, one, other, torch.Size(_shape(node)[out.index(axis)] for axis in made))
    return None if met is None else Scales(met.of.permute([made.index(axis) for axis in out]))


def _largest(at: Follower, node: Any, args: Any, options: dict[str, Any]) -> Any:
    """Maxima along one axis, and where they are."""
    if len(args) < 2 or not isinstance(args[1], int):
        return None
    found = _reduce(at, node, (args[0], [args[1]], *args[2:]), {})
    return [found, Scales(torch.full((), FIXED).expand(found.of.shape))]


def _scores(at: Follower, query: Tensor, key: Tensor) -> None:
    """... × T × D times ... × D × S: inverse scales of the D channels of a head."""
    links, channel = at.found.links, query.narrow(-2, 0, 1)
    links.tie(query, channel)
    links.tie(key, key.narrow(-1, 0, 1))
    links.tie(channel.squeeze(-2), key.select(-1, 0), -1)
    if query.dim() == 4:
        at.found.scores.append((channel[0, :, 0], key[0, :, :, 0]))


def _averaged(at: Follower, value: Tensor) -> Tensor:
    """Weights × values: the values' channels keep their scale over all tokens."""
    channel = value.narrow(-2, 0, 1)
    at.found.links.tie(value, channel)
    if value.dim() == 4:
        at.found.values.append(channel[0, :, 0])
    return channel


_MOVES = (
    "view", "reshape", "flatten", "transpose", "permute", "unsqueeze", "squeeze", "expand", "expand_as", "select",
    "slice", "cat", "stack", "split", "split_with_sizes", "chunk", "unbind", "roll", "repeat", "index",
    "unflatten", "getitem",
    "reshape_as", "t", "flip", "tile", "view_as", "embedding",
)
_SAME = ("contiguous", "clone", "alias", "dropout", "to", "_to_copy", "detach", "lift_fresh", "type_as")
RULES: dict[str, Rule] = {
    **dict.fromkeys(_MOVES, _move),
    **dict.fromkeys(_SAME, _same),
    **dict.fromkeys(("relu", "leaky_relu", "abs", "neg"), _homogeneous),
    **dict.fromkeys(("clamp", "clamp_min", "hardtanh"), _clipped),
    **dict.fromkeys(("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_avg_pool1d", "avg_pool1d"), _pool),
    **dict.fromkeys(("mean", "sum", "amax"), _reduce),
    **dict.fromkeys(("add", "sub"), _add),
    **dict.fromkeys(("mul", "div"), _multiply),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolve),
    **dict.fromkeys(("layer_norm", "group_norm"), _other_norm),
    **dict.fromkeys(("matmul", "bmm"), _matmul),
    "einsum": _einsum,
    "max": _largest,
    "linear": _linear,
    "linalg_vector_norm": _length,
    "batch_norm": _batch_norm,
    "scaled_dot_product_attention": _attend,
    "pad": _pad,
    "constant_pad_nd": lambda at, node, args, options: _pad(at, node, (*args[:2], "constant", *args[2:]), options),
}
"""Operations through which scales are followed, by their ATen names."""


@torch.no_grad()
def find_anatomy(model: nn.Module, pixels: Tensor) -> Anatomy:
    """Follow the scales of a forward of ``model`` (in evaluation mode, on the CPU) on a batch of at least two images.

    Raises:
        Exception: whatever ``torch.export`` or an operation raises; the caller then leaves the model alone.
    """
    program = torch.export.export(model, (), {"pixel_values": pixels}, strict=False)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    found = Follower(program, tensors, RULES).follow()
    if found.products:
        found.others = [Follower(program, tensors, RULES, share).follow() for share in SHARES[:2]]
    return found

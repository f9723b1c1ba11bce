"""What layer norms take away: means over channels that are written, and what is made of a sum that is always zero.

A layer norm subtracts the mean over the channels. Where nothing else reads a stream, whatever its writers add to all
channels alike is nothing to the function: W + 1·vᵀ for a map's weight, b + c·1 for its bias, the same for tokens and
position embeddings, however large v and c. They round everything else away, and are what the lengths of weights are
made of. What comes out of the norm, γ⊙z + β, has Σz = 0: a reader's weight W + u·(1/γ)ᵀ with the bias b − u·Σβ/γ reads
the same for any u. In the normal form all these means are zero: 1ᵀW = 0 and 1ᵀb = 0 for what writes, Wγ = 0 for what
reads.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from hf_immunize.attacks.vision.canonical.anatomy import Anatomy, Layer, Norm
from hf_immunize.attacks.vision.canonical.links import FIXED
from hf_immunize.attacks.vision.canonical.moves import Move, Named, attempt
from hf_immunize.attacks.vision.canonical.shifts import Reader, norms_read_by_layers


@dataclass(frozen=True)
class Written:
    """A stream that only layer norms read: names of the tensors that write it."""

    maps: tuple[str, ...]
    """Weights whose rows are its channels."""
    tables: tuple[str, ...]
    """Activations that are parameters; the last axis is the stream's."""
    constants: tuple[str, ...]
    """Biases of maps, of convolutions by channel and of norms."""
    factors: tuple[tuple[Layer, Layer], ...]
    """Factors per channel (LayerScale) and the map that alone comes before."""
    alike: bool
    """Whether the norms that read it have its width: then the mean of a token is taken away, whatever it is."""


def centre(
    anatomy: Anatomy, model: nn.Module, holds: Callable[[], bool], kept: Collection[str] = ()
) -> tuple[int, int]:
    """Take away all means that nothing reads, in place and in float64; how many streams and readers have none now.

    The norms' own shifts should have been moved on (``shifts``): a reader of a norm with a shift needs a bias for it.

    Args:
        holds: whether the model computes what it did; what does not hold is put back.
        kept: weights of readers that stay as they are.
    """
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    streams = [_centring(stream) for stream in find_written(anatomy)]
    readers = [_projection(norm, reader) for norm, found in norms_read_by_layers(anatomy) for reader in found
               if reader[0].weight not in kept and _reads_all(norm, reader, named)]
    return attempt(streams, named, holds), attempt(readers, named, holds)


def find_written(anatomy: Anatomy) -> Iterator[Written]:
    """Every stream whose channels share a scale that only norms over all channels read."""
    links = anatomy.links
    widths: dict[int, set[int]] = defaultdict(set)
    others = [layer.inputs for layer in anatomy.layers] + [norm.inputs for norm in anatomy.norms if norm.statistics]
    others += [part for both in anatomy.scores for part in both]
    read = {root for variables in others for root in _roots(anatomy, variables)}
    for norm in anatomy.norms:
        if not norm.statistics:
            widths[links.root(int(norm.inputs))[0]].add(len(norm.outputs))
    meeting = _meeting(anatomy)
    for root, found in widths.items():
        if root != FIXED and root not in read:
            yield from _written(anatomy, meeting, root, found)


def _written(anatomy: Anatomy, meeting: Meeting, stream: int, widths: set[int]) -> Iterator[Written]:
    """Who writes the stream of this root, where anybody does."""
    layers = [layer for layer in anatomy.layers if _all_of(anatomy, layer.outputs, stream)]
    norms = [norm for norm in anatomy.norms if _all_of(anatomy, norm.outputs, stream)]
    writers: list[Layer | Norm] = [*layers, *norms]
    counts = {part.outputs.numel() for part in writers} - {1}  # one factor for all channels has no mean of its own
    if not counts:
        return
    factors = tuple(
        (layer, before) for layer in layers if layer.diagonal for before in _alone_before(meeting, anatomy, layer)
    )
    whole = [layer for layer in layers if not layer.diagonal and len(layer.inputs) == 1] + [one for _, one in factors]
    tables = tuple(
        name for name, variables in anatomy.tables.items()
        if variables.shape[-1] in counts and _all_of(anatomy, variables, stream)
    )  # fmt: skip
    grouped = [layer for layer in layers if not layer.diagonal and len(layer.inputs) > 1]
    mapped: list[Layer | Norm] = [*whole, *grouped, *norms]
    constants = tuple(part.bias for part in mapped if part.bias)
    yield Written(tuple(layer.weight for layer in whole), tables, constants, factors, widths == counts)


def _all_of(anatomy: Anatomy, variables: Tensor, root: int) -> bool:
    return all(anatomy.links.root(variable) == (root, 1) for variable in set(variables.flatten().tolist()))


def _alone_before(meeting: Meeting, anatomy: Anatomy, factor: Layer) -> Iterator[Layer]:
    """The map whose rows the factors multiply, where nothing else meets the channels in between."""
    between = _roots(anatomy, factor.inputs)
    others = [part for part in meeting[between[0]] if part is not factor]
    alone = FIXED not in between and all(len(meeting[root]) == 2 for root in between)
    for part in others if alone else ():
        if isinstance(part, Layer) and not part.diagonal and len(part.inputs) == 1:
            yield from [part] if _roots(anatomy, part.outputs) == between else []


Meeting = Mapping[int, list[Layer | Norm]]
"""What begins or ends at every root."""


def _meeting(anatomy: Anatomy) -> Meeting:
    found: dict[int, list[Layer | Norm]] = defaultdict(list)
    parts: list[Layer | Norm] = [*anatomy.layers, *anatomy.norms]
    for part in parts:
        for root in {*_roots(anatomy, part.inputs), *_roots(anatomy, part.outputs)}:
            found[root].append(part)
    return found


def _roots(anatomy: Anatomy, variables: Tensor) -> list[int]:
    return [anatomy.links.root(variable)[0] for variable in variables.flatten().tolist()]


def _centring(stream: Written) -> Move:
    """Means of all that is written to zero; where a norm reads several tokens as one, those of constants alone."""

    def constants(named: Named) -> None:
        _fold(stream, named)
        for name in (*stream.constants, *stream.tables):
            named[name].sub_(named[name].mean())

    def everything(named: Named) -> None:
        constants(named)
        for name in stream.maps:
            named[name].sub_(named[name].mean(dim=0, keepdim=True))
        for name in stream.tables:
            named[name].sub_(named[name].mean(dim=-1, keepdim=True))

    touched = (*stream.maps, *stream.tables, *stream.constants, *(factor.weight for factor, _ in stream.factors))
    smaller = Move(touched, constants)
    return Move(touched, everything, smaller) if stream.alike else smaller


def _fold(stream: Written, named: Named) -> None:
    """Factors into the rows of the maps before them: the scale in between is chosen later anyway (``scales``)."""
    for factor, before in stream.factors:
        gain = named[factor.weight].flatten()
        for name in (before.weight, *([before.bias] if before.bias else [])):
            named[name].mul_(gain.view(-1, *(1,) * (named[name].dim() - 1)))
        named[factor.weight].fill_(1.0)


def _reads_all(norm: Norm, reader: Reader, named: Named) -> bool:
    """Whether a whole map reads every channel of a norm without gains of zero once."""
    layer, columns, channels = reader
    whole = not layer.diagonal and len(layer.inputs) == 1
    return whole and not norm.statistics and len(columns) == len(norm.outputs) and bool((named[norm.weight] != 0).all())


def _projection(norm: Norm, reader: Reader) -> Move:
    """W − (Wγ/n)·(1/γ)ᵀ, and the bias b + (Wγ/n)·Σβ/γ."""
    layer, columns, channels = reader

    def project(named: Named) -> None:
        whole, gain = named[layer.weight], named[norm.weight].flatten()[channels, None]
        weight = whole.reshape(*whole.shape[:2], -1)  # rows × channels × places of a kernel
        read = weight[:, columns]
        mean = (read * gain).mean(dim=1, keepdim=True)
        weight[:, columns] = read - mean / gain
        whole.copy_(weight.view_as(whole))
        if layer.bias and norm.bias:
            named[layer.bias].add_(mean.sum(dim=(1, 2)) * (named[norm.bias].flatten()[channels, None] / gain).sum())

    return Move((layer.weight, *([layer.bias] if layer.bias else [])), project)

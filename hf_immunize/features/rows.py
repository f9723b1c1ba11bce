"""One row per image from whatever a layer reads: a layout names the axes, and all but images and features are averaged.

Shape legend: N images, D features.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, _AvgPoolNd, _MaxPoolNd
from transformers.pytorch_utils import Conv1D

from hf_immunize.errors import CaptureError, ConfigError

POOLS = (_AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, _AvgPoolNd, _MaxPoolNd)
"""Layers without weights that read N x D x maps."""
_SPATIAL = ("", "l", "h w", "t h w")


@dataclass(frozen=True)
class RowLayout:
    """The axes of an input, separated by spaces: ``n`` images, ``d`` features, any other name is averaged over.

    ``n t d`` are tokens, ``n c h w`` with ``d`` for c (``n d h w``) maps, ``n h w d`` maps with their channels last,
    ``t n d`` tokens before images. ``(n k)`` is one axis that holds k windows (crops, prompts) of each image one
    after the other, ``(k n)`` one on which the images take turns; a number in brackets is a size (``(2 n k)``). A
    number outside of brackets takes that place alone: ``n 0 d`` is the first token.

    Raises:
        CaptureError: a pattern that is none.
    """

    pattern: str

    def __post_init__(self) -> None:
        names = [name for axis in self.axes for name in axis]
        alone = [axis[0] for axis in self.axes if len(axis) == 1]
        held = next((axis for axis in self.axes if "n" in axis), ())
        unknown = [name for name in held if name != "n" and not name.isdigit()]
        if names.count("n") != 1 or names.count("d") != 1 or "d" not in alone or len(unknown) > 1:
            raise CaptureError(
                f"expected axes like 'n t d', 'n d h w', '(n k) t d' or 'n 0 d', with n (images) and d (features) once "
                f"each, d on its own and one unknown size beside n, got {self.pattern!r}."
            )
        if any(len(axis) > 1 and "n" not in axis for axis in self.axes):
            raise CaptureError(f"expected brackets around n alone, got {self.pattern!r}: name other axes one by one.")

    @cached_property
    def axes(self) -> tuple[tuple[str, ...], ...]:
        """Names of every axis; more than one where an axis is made of several."""
        if not re.fullmatch(r"\s*((\w+|\([\w ]+\))\s*)+", self.pattern):
            raise CaptureError(f"expected names of axes separated by spaces, e.g. '(n k) t d', got {self.pattern!r}.")
        return tuple(tuple(part.strip("()").split()) for part in re.findall(r"\w+|\([\w ]+\)", self.pattern))

    def rows(self, value: Tensor, images: int | None = None) -> Tensor:
        """N×D: means over all that is neither image nor feature. Gradients spread evenly over what was averaged.

        Args:
            images: N of the forward; None where it is not known, which is enough if ``n`` is an axis of its own.

        Raises:
            CaptureError: another number of axes, or images that do not fit N.
        """
        aligned, averaged, turned = self._aligned(value, images)
        found = aligned.mean(dim=averaged) if averaged else aligned
        return found.mT if turned else found

    def positions(self, value: Tensor, images: int | None = None) -> int:
        """How many entries of an input one row is the mean of."""
        aligned, averaged, _ = self._aligned(value, images)
        return math.prod(aligned.shape[axis] for axis in averaged)

    def shift(self, gradient: Tensor, images: int | None = None) -> Tensor:
        """N×D: the gradient at a shift of everything a row is the mean of, from the gradient at the input."""
        aligned, averaged, turned = self._aligned(gradient, images)
        found = aligned.sum(dim=averaged) if averaged else aligned
        return found.mT if turned else found

    def by_image(self, value: Tensor, images: int) -> Tensor:
        """N×P×D: the entries of each row one by one."""
        aligned, averaged, turned = self._aligned(value, images)
        others = [axis for axis in range(aligned.dim()) if axis not in averaged]
        image, feature = others[::-1] if turned else others
        return aligned.permute(image, *averaged, feature).reshape(aligned.shape[image], -1, aligned.shape[feature])

    @property
    def feature_axis(self) -> int:
        """Place of ``d`` among the axes."""
        return self.axes.index(("d",))

    def _aligned(self, value: Tensor, images: int | None) -> tuple[Tensor, tuple[int, ...], bool]:
        """The input with ``n`` as an axis of its own, the axes to be averaged, and whether ``d`` comes before ``n``."""
        if value.dim() != len(self.axes):
            raise self._misfit(value, images)
        kept: list[str] = []
        for axis in self.axes:
            place = len(kept)
            if len(axis) > 1:
                value = value.unflatten(place, self._sizes(axis, value, place, images))
                kept.extend(axis)
            elif axis[0].isdigit():
                if int(axis[0]) >= value.shape[place]:
                    raise self._misfit(value, images)
                value = value.select(place, int(axis[0]))
            else:
                if axis == ("n",) and images not in (None, value.shape[place]):
                    raise self._misfit(value, images)
                kept.append(axis[0])
        averaged = tuple(place for place, name in enumerate(kept) if name not in ("n", "d"))
        return value, averaged, kept.index("d") < kept.index("n")

    def _sizes(self, axis: tuple[str, ...], value: Tensor, place: int, images: int | None) -> tuple[int, ...]:
        if images is None:
            raise CaptureError(
                f"expected a forward of the whole model to count its images for axes '{self.pattern}', got none."
            )
        told = [images if name == "n" else int(name) if name.isdigit() else 0 for name in axis]
        rest, left = divmod(value.shape[place], math.prod(size for size in told if size) or 1)
        if left or rest < 1 or (0 not in told and rest != 1):
            raise self._misfit(value, images)
        return tuple(size or rest for size in told)

    def _misfit(self, value: Tensor, images: int | None) -> CaptureError:
        count = "" if images is None else f" of {images} images"
        return CaptureError(
            f"expected an input with axes '{self.pattern}' (n images, d features){count}, got shape "
            f"{tuple(value.shape)}: find the layout on a batch (find_layouts), give it (site_layouts), or choose "
            "another layer."
        )


def declared_features(module: nn.Module) -> tuple[int, int] | None:
    """(axis, size) of the features in the inputs of a layer whose type says so, None for other modules."""
    module = getattr(module, "base_layer", module)  # PEFT's
    if isinstance(module, nn.Linear):
        return -1, module.in_features
    if isinstance(module, Conv1D):
        return -1, module.nx
    if isinstance(module, _ConvNd):
        return 1, module.in_channels
    if isinstance(module, _NormBase):
        return 1, module.num_features
    if isinstance(module, nn.GroupNorm):
        return 1, module.num_channels
    if isinstance(module, nn.LayerNorm | nn.RMSNorm) and type(module) in (nn.LayerNorm, nn.RMSNorm):
        return (-1, module.normalized_shape[0]) if len(module.normalized_shape) == 1 else None
    return None


def plain_layout(module: nn.Module, value: Tensor) -> RowLayout:
    """Images first: N×D, N×T×D, N×D×H×W, or N×H×W×D where the layer reads its features from the last axis.

    Raises:
        CaptureError: another shape, or a size that is not the layer's.
    """
    declared, axes = declared_features(module), value.dim()
    if axes < 2 or (declared is None and axes > 4 and not isinstance(module, POOLS)):
        raise CaptureError(
            f"expected features of shape N x D, N x T x D or N x D x H x W, got {tuple(value.shape)}: choose a layer "
            "whose input has one of these shapes."
        )
    first = axes == 4 or isinstance(module, POOLS) if declared is None else declared[0] == 1
    if declared is not None and value.shape[declared[0]] != declared[1]:
        raise CaptureError(
            f"expected {declared[1]} features on axis {declared[0]} of the input of {type(module).__name__}, got shape "
            f"{tuple(value.shape)}: choose another layer."
        )
    return _with_axes(["n", *([""] * (axes - 1))], 1 if first else axes - 1)


def candidates(shape: torch.Size, images: int, feature_axis: int) -> Iterator[RowLayout]:
    """Every way in which an input of this shape can hold so many images, the images on any axis but the features'."""
    for place, size in enumerate(shape):
        if place == feature_axis or size % images:
            continue
        count = size // images
        inner = [part for part in range(2, count) if count % part == 0]
        ways = ["n"] if count == 1 else ["(n k)", "(k n)", *(f"({count // part} n k)" for part in inner)]
        for way in ways:
            names = [""] * len(shape)
            names[place] = way
            yield _with_axes(names, feature_axis)


def _with_axes(names: list[str], feature_axis: int) -> RowLayout:
    """The layout with features at their place and usual names for the axes that have none."""
    names[feature_axis] = "d"
    waiting = names.count("")
    usual = iter(_SPATIAL[waiting].split() if waiting < len(_SPATIAL) else [f"a{place}" for place in range(waiting)])
    usual = iter(["t"]) if waiting == 1 else usual
    return RowLayout(" ".join(name or next(usual) for name in names))


def parse_layouts(given: str | None, sites: list[str]) -> dict[str, RowLayout | None]:
    """``end of a site's name=axes`` pairs, joined with commas, by site; None for sites that no pair names.

    Raises:
        ConfigError: no such site, or axes that are no layout.
    """
    found: dict[str, RowLayout | None] = dict.fromkeys(sites)
    for part in given.split(",") if given else ():
        end, _, axes = (piece.strip() for piece in part.rpartition("="))
        fitting = [site for site in sites if end and (site == end or site.endswith(f".{end}"))]
        if not fitting:
            raise ConfigError(f"expected site_layouts like '{sites[-1]}=n t d' of sites {sites}, got {part!r}.")
        try:
            found |= dict.fromkeys(fitting, RowLayout(axes))
        except CaptureError as error:
            raise ConfigError(f"site_layouts: {error}") from error
    return found


def pool_rows(features: Tensor) -> Tensor:
    """One row per image of features with the images first: N×D as it is, means of N×T×D over T, of N×D×H×W over H, W.

    Raises:
        CaptureError: another number of axes.
    """
    return plain_layout(nn.Identity(), features).rows(features)

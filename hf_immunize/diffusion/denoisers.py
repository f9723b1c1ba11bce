"""The table of denoisers, keyed by class, so that no structure is guessed from names; open to families of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from hf_immunize.diffusion.families import dit, flux, pixart, sd3, text_unet, unet
from hf_immunize.diffusion.family import Denoiser, DenoiserFamily, PromptReader
from hf_immunize.errors import ConfigError, ModelError
from hf_immunize.plugins import load_plugins

DENOISERS: dict[type, Denoiser] = {}
"""How each class of denoiser is called."""
PROMPT_READERS: dict[type, PromptReader] = {}
"""How each class of pipeline tells its denoiser of a prompt."""


def register_family(family: DenoiserFamily) -> DenoiserFamily:
    """Make a family of denoisers known to immunization, attacks and exams of pipelines; returns it.

    Every process that handles such pipelines has to do it: make its module a plug-in (docs/extend/family.md).

    Raises:
        ConfigError: a class of denoisers or pipelines that is known already, or what is no class.
    """
    tables: list[tuple[type, Mapping[type, object]]] = [(family.kind, DENOISERS)]
    tables += [(kind, PROMPT_READERS) for kind in family.pipelines]
    for kind, known in tables:
        if not isinstance(kind, type) or kind in known:
            names = sorted(one.__name__ for one in known)
            raise ConfigError(f"expected a class that is none of {names}, got {kind!r}: it is there already.")
    DENOISERS[family.kind] = family.denoiser
    PROMPT_READERS.update(family.pipelines)
    return family


for _module in (unet, text_unet, dit, pixart, sd3, flux):
    register_family(_module.FAMILY)


def denoiser_of(model: nn.Module) -> Denoiser:
    """Entry of the table for a bare model. Raises ModelError for a class that no family, plug-ins included, has."""
    if type(model) not in DENOISERS:
        load_plugins()
    found = DENOISERS.get(type(model))
    if found is None:
        known = sorted(kind.__name__ for kind in DENOISERS)
        raise ModelError(
            f"expected a denoiser among {known}, got {type(model).__name__}: add an entry that says how it is called "
            "with hf_immunize.register_family (docs/extend/family.md)."
        )
    return found


def reader_of(pipeline: object) -> PromptReader | None:
    """How a pipeline reads prompts; None for a class that no family, plug-ins included, has."""
    if type(pipeline) not in PROMPT_READERS:
        load_plugins()
    return PROMPT_READERS.get(type(pipeline))


def denoiser_classes(names: set[str] | None = None) -> dict[str, Any]:
    """Known classes of denoisers by name; plug-ins are asked where none of ``names`` is known."""
    if names is not None and not names & {kind.__name__ for kind in DENOISERS}:
        load_plugins()
    return {kind.__name__: kind for kind in DENOISERS}

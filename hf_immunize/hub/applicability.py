"""Attacks that cannot be made on a model, read off its files: a certificate may claim it, but is not believed."""

from __future__ import annotations

from hf_immunize.errors import RecordError
from hf_immunize.hub.inventory import Inventory
from hf_immunize.hub.library import ADAPTER_FILE, PIPELINE_FILE
from hf_immunize.hub.names import kind_of

_STATISTICS, _BATCH_NORM = "running_mean", frozenset({"batchnorm_probe"})
_CLASSES, _NEED_NAMES = "class_embedding", frozenset({"diffusion_textual_inversion"})


def inapplicable_attacks(inventory: Inventory) -> frozenset[str]:
    """Names of attacks that these weights leave no place for; of what cannot be told, nothing is said.

    Statistics of batch normalisation are re-estimated only where there are some; a name is learned only by a model
    that reads text or has an embedding for each class. What an adapter is put on lies elsewhere, so that nothing
    follows for it.
    """
    if ADAPTER_FILE in inventory:
        return frozenset()
    weights = [name for name in inventory.files if kind_of(name) == "weights"]
    try:
        tensors = [tensor for name in weights for tensor in inventory.tensor_names(name)]
    except RecordError:  # weights that are none have been told of elsewhere
        return frozenset()
    if PIPELINE_FILE in inventory:
        named = any(name.startswith("text_encoder") for name in weights) or any(_CLASSES in name for name in tensors)
        return frozenset() if named else _NEED_NAMES
    return frozenset() if any(name.endswith(_STATISTICS) for name in tensors) else _BATCH_NORM

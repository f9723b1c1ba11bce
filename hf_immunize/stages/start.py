"""What every stage that runs a model does first: quiet libraries, the asked device, the folder of a model."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
import torch
import transformers
from accelerate import PartialState

from hf_immunize.errors import ConfigError
from hf_immunize.hub import is_hub_id, local_folder, working_folder
from hf_immunize.models import is_adapter, refuse_folder

DEVICE_HELP = "auto, cpu, cuda or mps."


def hush() -> None:
    """Switch off the libraries' own progress bars, and their warnings about each other."""
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.simplefilter("ignore", FutureWarning)
    if "diffusers" in sys.modules:
        import diffusers

        diffusers.utils.logging.disable_progress_bar()


@contextmanager
def drawing_a_head() -> Iterator[None]:
    """Inside, transformers does not report weights that a model's folder lacks: a head is wanted that is drawn anew."""
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(before)


def start(device: str, alone: str | None = None) -> tuple[PartialState, str]:
    """The process on the asked device, and that device by its name.

    Args:
        device: auto, cpu, cuda, cuda:N or mps.
        alone: for a stage that is one process, what to do in place of starting several.

    Raises:
        ConfigError: a device that this machine does not have, or several processes for a stage of one.
    """
    known = {"auto": True, "cpu": True, "mps": torch.backends.mps.is_available()}
    known |= {"cuda": torch.cuda.is_available()} | {f"cuda:{n}": True for n in range(torch.cuda.device_count())}
    if not known.get(device, False):
        there = [name for name, usable in known.items() if usable]
        raise ConfigError(f"expected device among {there} on this machine, got {device!r}.")
    state = PartialState(cpu=device == "cpu")
    if alone is not None and state.num_processes > 1:
        raise ConfigError(f"expected one process, got {state.num_processes}: {alone}.")
    return state, str(state.device) if device in ("auto", "cpu") else device


def working_copy(named: str, revision: str | None, *, adapters: bool = False) -> str:
    """The folder in which a model from the Hub was attacked; a path that is not there is left to the judge to explain.

    Args:
        adapters: whether a PEFT adapter may stand in the place of a model.

    Raises:
        ModelError: a file in the place of a model, or an adapter where none may be.
    """
    if not (adapters and is_adapter(named)):
        refuse_folder(named)
    if revision is None and not is_hub_id(named):
        return named
    return str(local_folder(named, revision=revision, into=working_folder(named))[0])

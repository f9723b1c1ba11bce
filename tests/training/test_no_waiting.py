"""Between features and their gradients nothing reads a number back: on a GPU each read waits for all that is queued."""

from __future__ import annotations

import pytest
import torch
from step_builders import objective_of
from torch.utils._python_dispatch import TorchDispatchMode

from hf_immunize import regularizers
from hf_immunize.training.core.registry import OBJECTIVES, on_features

aten = torch.ops.aten
READS = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten._unique2.default, aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor, aten.masked_select.default,
}


def _by_mask(indices) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


class NoReading(TorchDispatchMode):
    """Raises at operations whose result the host has to wait for."""

    resting = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not self.resting and (function in READS or function is aten.index.Tensor and _by_mask(args[1])):
            raise AssertionError(f"{function} waits for the device")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("weight", ["1", "auto"])
@pytest.mark.parametrize("name", [name for name, terms in OBJECTIVES.items() if on_features(terms)])
def test_the_objective_reads_nothing_but_labels(name, weight, monkeypatch):
    objective, micro = objective_of(name, weight, ("head", "inner"))
    mode = NoReading()

    def aside(function):
        """Labels are on the CPU, where reading them waits for nothing."""

        def run(*args, **kwargs):
            before, mode.resting = mode.resting, True
            try:
                return function(*args, **kwargs)
            finally:
                mode.resting = before

        return run

    monkeypatch.setattr(regularizers, "alternate_within_classes", aside(regularizers.alternate_within_classes))
    monkeypatch.setattr(torch.nn.functional, "one_hot", aside(torch.nn.functional.one_hot))
    monkeypatch.setattr(regularizers, "int", aside(int), raising=False)
    objective.gradients([micro], spectra=True)  # the first step makes memory
    with mode:
        objective.gradients([micro], spectra=True)


def test_reading_is_noticed():
    values = torch.arange(3.0)
    for read in (lambda: float(values[0]), lambda: values[torch.tensor(1)], lambda: values[values > 1]):
        with pytest.raises(AssertionError, match="waits for the device"), NoReading():
            read()

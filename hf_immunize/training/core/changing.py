"""The part of a model that training changes: all that guard, checkpoints and the moving average have to keep."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from hf_immunize.training.core.sharding import settle, split_state


class ChangingPart:
    """A model's state less the parameters that ask for no gradient; buffers belong to it.

    Under LoRA these are the factors: megabytes beside the gigabytes of weights that stay.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self.parameters = [parameter for parameter in settle(model).parameters() if parameter.requires_grad]
        self._still = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors by name, not copied."""
        return {name: value for name, value in self._model.state_dict().items() if name not in self._still}

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True) -> None:
        """Take back what ``state_dict`` returned, also whole where weights are split.

        Raises RuntimeError for other names or shapes.
        """
        now = self.state_dict()
        if strict and (other := state_dict.keys() ^ now.keys()):
            raise RuntimeError(f"names on one side only: {sorted(other)[:5]}")
        self._model.load_state_dict(split_state(state_dict, now), strict=False)

"""UNets in pixel space, told class numbers or nothing."""

from diffusers import UNet2DModel
from torch import Tensor, nn

from hf_immunize.diffusion.family import (
    Conditions,
    Denoiser,
    DenoiserFamily,
    class_count,
    class_labels,
    in_own_precision,
)


@in_own_precision
def _call(model: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
    return model(noisy, timesteps, class_labels=conditions.get("class_labels"), return_dict=False)[0]


FAMILY = DenoiserFamily(
    UNet2DModel, Denoiser("unet", class_labels, _call, lambda _: "mid_block", classes=class_count)
)

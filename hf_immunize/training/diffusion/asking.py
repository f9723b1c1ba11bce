"""What a denoiser answers to noised rows of a step: of the concept under its name or none, and of what is retained."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from hf_immunize.diffusion import Denoiser
from hf_immunize.training.core.draws import same_draws
from hf_immunize.training.core.weight_terms import Denoise
from hf_immunize.training.diffusion.conditions import AttackerConditions
from hf_immunize.training.diffusion.stream import NoisyBatch


def denoise_of(
    denoiser: Denoiser, rows: Mapping[str, Callable[[int], NoisyBatch]], unnamed: AttackerConditions | None, seed: int
) -> Denoise:
    """Answers and targets of this rank's rows of an optimizer step.

    Args:
        rows: 'named' (of the concept) and 'related' (of what is retained) rows of a step.
        unnamed: tells rows of the concept no name; None where nothing asks for that.
    """

    def denoise(model: nn.Module, step: int, of: str) -> tuple[Tensor, Tensor]:
        batch = rows["related" if of == "related" else "named"](step)
        if unnamed is not None:
            unnamed.untell(model)
            batch = unnamed.tell(model, step, batch) if of == "unnamed" else batch
        with same_draws(batch.noisy.device, seed, "erasure", step):
            answer = denoiser.call(model, batch.noisy, batch.timesteps, batch.conditions)
        return answer, batch.target

    return denoise

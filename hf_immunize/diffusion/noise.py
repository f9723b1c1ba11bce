"""How examples are noised, what the denoiser is asked for, and how much each noise level counts.

Shape legend: N rows, T noise levels in ascending order of noise; level 0 is the cleanest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hf_immunize.errors import ConfigError

Prediction = Literal["epsilon", "v_prediction", "sample", "flow"]
_OF_SCHEDULER = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class NoiseProcess:
    """x_i = s_i x₀ + n_i ε at noise level i.

    Variance preserving (DDPM): s = √ᾱ, n = √(1 − ᾱ). Flow matching (rectified flow): s = 1 − σ, n = σ.
    """

    signal_T: Tensor
    noise_T: Tensor
    timestep_T: Tensor
    """What the denoiser is told at each level, in the scheduler's own units."""
    prediction: Prediction

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> NoiseProcess:
        """The process that a diffusers scheduler samples from, in float64.

        Raises:
            ConfigError: a scheduler with neither ``alphas_cumprod`` nor flow-matching ``sigmas``, or a prediction type
                that is not one of epsilon, v_prediction and sample.
        """
        name, config = type(scheduler).__name__, scheduler.config
        if name.startswith("FlowMatch"):
            sigma = torch.linspace(1, config.num_train_timesteps, config.num_train_timesteps).double()
            sigma = sigma / config.num_train_timesteps
            if not getattr(config, "use_dynamic_shifting", False):
                sigma = config.shift * sigma / (1 + (config.shift - 1) * sigma)
            return cls(1 - sigma, sigma, sigma * config.num_train_timesteps, "flow")
        kind = getattr(config, "prediction_type", None)
        if kind not in _OF_SCHEDULER or not hasattr(scheduler, "alphas_cumprod"):
            raise ConfigError(
                f"expected a scheduler with alphas_cumprod and a prediction_type in {_OF_SCHEDULER}, or one of flow "
                f"matching, got {name} with prediction_type {kind!r}: train with the DDPMScheduler or "
                "FlowMatchEulerDiscreteScheduler that belongs to the model."
            )
        kept = scheduler.alphas_cumprod.double().cpu()
        return cls(kept.sqrt(), (1 - kept).sqrt(), torch.arange(len(kept)), kind)

    @property
    def levels(self) -> int:
        """T."""
        return len(self.timestep_T)

    def draw_levels(
        self, rows: int, generator: torch.Generator, *, low: float = 0.0, high: float = 1.0, logit_normal: bool = False
    ) -> Tensor:
        """Levels of ``rows`` examples: uniform over [low·T, high·T), or with the logit of their place standard normal.

        The logit-normal density is that of Stable Diffusion 3 (Esser et al. 2024, section 3.1).

        Raises:
            ConfigError: a range without a level in it.
        """
        first, last = round(low * self.levels), round(high * self.levels)
        if not 0 <= first < last <= self.levels:
            raise ConfigError(f"expected a range of noise levels within 0..1, got {low}..{high}: widen it.")
        if logit_normal:
            place = torch.randn(rows, generator=generator, dtype=torch.float64).sigmoid()
        else:
            place = torch.rand(rows, generator=generator, dtype=torch.float64)
        return (first + place * (last - first)).long().clamp(max=last - 1)

    def noisy(self, clean: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """x_i of each row."""
        return _rows(self.signal_T, levels, clean) * clean + _rows(self.noise_T, levels, clean) * noise

    def target(self, clean: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """What the denoiser should answer: ε, v = s ε − n x₀ (Salimans & Ho 2022), x₀, or the velocity ε − x₀."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return clean
        if self.prediction == "flow":
            return noise - clean
        return _rows(self.signal_T, levels, clean) * noise - _rows(self.noise_T, levels, clean) * clean

    def timesteps(self, levels: Tensor) -> Tensor:
        """What the denoiser is told, one per row."""
        return self.timestep_T[levels.cpu()].to(levels.device)

    def min_snr_weight(self, levels: Tensor, gamma: float) -> Tensor:
        """min(SNR, γ)·(∂x₀/∂answer)², N float64: the weight min(SNR, γ) on the error in x₀ (Hang et al. 2023, eq. 8).

        With SNR = s²/n² that is min(SNR, γ)/SNR for ε, min(SNR, γ)/(SNR + 1) for v, min(SNR, γ) for x₀. A velocity
        has ∂x₀/∂u = −σ, hence min(SNR, γ)·σ².
        """
        signal, noise = self.signal_T[levels.cpu()].double(), self.noise_T[levels.cpu()].double()
        snr = (signal / noise).square()
        capped = snr.clamp(max=gamma)
        if self.prediction == "epsilon":
            # min(1, γ/SNR), which has a value where the signal is zero.
            weight = (gamma * (noise / signal).square()).clamp(max=1.0)
        elif self.prediction == "sample":
            weight = capped
        else:
            weight = capped * noise.square()
        return weight.to(levels.device)


def _rows(table_T: Tensor, levels: Tensor, like: Tensor) -> Tensor:
    """Entries of a table, shaped to multiply rows of ``like``."""
    found = table_T[levels.cpu()].to(like)
    return found.reshape(-1, *[1] * (like.dim() - 1))


def denoising_losses(answer: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each row, in float32 or wider."""
    wide = torch.promote_types(answer.dtype, torch.float32)
    return (answer.to(wide) - target.to(wide)).square().flatten(1).mean(dim=1)

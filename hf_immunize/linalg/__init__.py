"""Numerics of the package: dtype, rank floors, eigen-solvers and their gradients. Imports torch only."""

from hf_immunize.linalg.attacker import softmax_descent
from hf_immunize.linalg.converging import converging
from hf_immunize.linalg.frechet import frechet_distance
from hf_immunize.linalg.linear_map import LinearMap, fit_linear_map, truncated
from hf_immunize.linalg.ridge import (
    r_squared,
    ridge_accuracies,
    ridge_r_squared,
    ridge_weights,
    spectral_adversary,
)
from hf_immunize.linalg.row_factor import RowFactor, spectral_steps
from hf_immunize.linalg.spectrum import (
    Spectrum,
    SpectrumStatus,
    check_features,
    second_moment_spectra,
    second_moment_spectrum,
    singular_value_floor,
    to_double,
)

__all__ = [
    "LinearMap",
    "RowFactor",
    "Spectrum",
    "SpectrumStatus",
    "check_features",
    "converging",
    "fit_linear_map",
    "frechet_distance",
    "r_squared",
    "ridge_accuracies",
    "ridge_r_squared",
    "ridge_weights",
    "second_moment_spectra",
    "second_moment_spectrum",
    "singular_value_floor",
    "softmax_descent",
    "spectral_adversary",
    "spectral_steps",
    "to_double",
    "truncated",
]

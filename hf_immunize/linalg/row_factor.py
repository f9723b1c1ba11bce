"""Spectrum and spectral steps of any number of rows from one triangular factor, taken in block by block.

Shape legend: N rows (samples), D columns (feature width), C label columns, S = min(N, D).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from hf_immunize.errors import SpectrumError
from hf_immunize.linalg.converging import converging
from hf_immunize.linalg.ridge import steps_to_residual
from hf_immunize.linalg.spectrum import Spectrum, check_features, moment_floor, singular_value_floor, to_double

_BLOCK = 2**25
"""Numbers that wait at most before they are taken in, 256 MiB; never less than a square of them."""


class RowFactor:
    """R of [1 Φ Y] = QR with features Φ (N×D) and labels Y (N×C), in float64 on the device of the rows.

    QR of [R; more rows] is that of all rows so far (Golub & Van Loan, Matrix Computations, section 6.5), so that no
    more than a block of rows and R itself is ever held. R below its first row is the factor of [Φ Y] centred by its
    column means: what is orthogonal to a column of ones. Singular values of its part R_Φ are those of centred Φ, and
    with R_Φ = UΣVᵀ the labels' parts along Φ's left singular vectors are UᵀR_Y. K = ΦᵀΦ, which would lose half of the
    digits, is never formed.
    """

    def __init__(self) -> None:
        self._triangle: Tensor | None = None
        self._waiting: list[Tensor] = []
        self._dtype: torch.dtype | None = None
        self.rows, self._width = 0, 0

    @classmethod
    def joined(cls, factors: Sequence[RowFactor]) -> RowFactor:
        """The factor of all rows of several factors of one layer: QR of their triangles, one below the other."""
        whole = cls()
        whole._waiting = [factor._absorb() for factor in factors if factor.rows]
        whole.rows = sum(factor.rows for factor in factors)
        whole._width, whole._dtype = factors[0]._width, factors[0]._dtype
        return whole

    def add(self, features_ND: Tensor, targets_NC: Tensor | None = None) -> None:
        """Take in rows; features of one dtype and width in every call, and targets in all or in none.

        Raises:
            SpectrumError: not a floating N×D matrix, or of another width or dtype than before.
        """
        check_features(features_ND)
        if self.rows and (features_ND.shape[1], features_ND.dtype) != (self._width, self._dtype):
            raise SpectrumError(
                f"expected more features of width {self._width} in {self._dtype}, got {tuple(features_ND.shape)} of "
                f"{features_ND.dtype}: one factor is of one layer."
            )
        count, self._width = features_ND.shape
        self.rows, self._dtype = self.rows + count, features_ND.dtype
        targets = features_ND.new_empty(count, 0) if targets_NC is None else targets_NC
        columns = 1 + self._width + targets.shape[1]
        # Four times as many rows as columns: what is in R already is then a fifth of the work.
        block = max(columns, min(4 * columns, _BLOCK // columns))
        for features, labels in zip(torch.split(features_ND.detach(), block), torch.split(targets, block), strict=True):
            rows = to_double(features)
            self._waiting.append(torch.cat([rows.new_ones(len(rows), 1), rows, labels.to(rows)], dim=1))
            if sum(map(len, self._waiting)) >= block:
                self._absorb()

    def _absorb(self) -> Tensor:
        held = [] if self._triangle is None else [self._triangle]
        if self._waiting:
            self._triangle = torch.linalg.qr(torch.cat([*held, *self._waiting]), mode="r").R
            self._waiting = []
            self.__dict__.pop("_decomposed", None)
        if self._triangle is None:
            raise SpectrumError("expected rows of features, got none: the dataset is empty.")
        return self._triangle

    @cached_property
    @converging()
    def _decomposed(self) -> tuple[Tensor, Tensor] | None:
        """Left singular vectors of R_Φ and the S singular values; None for rows that are not finite."""
        triangle = self._absorb()
        if not bool(torch.isfinite(triangle).all()):
            return None
        # Below its first D rows R_Φ is zero.
        left, sigma, _ = torch.linalg.svd(triangle[1 : self._width + 1, 1 : self._width + 1], full_matrices=False)
        return left, torch.nn.functional.pad(sigma, (0, min(self.rows, self._width) - len(sigma)))

    def spectrum(self) -> Spectrum:
        """Centred, rank-aware spectrum of ΦᵀΦ/N without gradient; the floor is that of the features' own dtype."""
        triangle, dtype = self._absorb(), self._dtype or torch.float64
        found = self._decomposed
        nothing = triangle.new_zeros(())
        if found is None:
            values = triangle.new_full((min(self.rows, self._width),), math.nan)
            return Spectrum(values[0], values[0], values[0], nothing.long(), values, self.rows, self._width)
        values = found[1].square() / self.rows
        mean_squared = triangle[0, 1 : self._width + 1].square().sum() / self.rows
        floor = moment_floor(values, mean_squared, self.rows, self._width, dtype)
        rank = (values.sqrt() > floor).sum()
        smallest = values[int(rank) - 1] if rank > 0 else nothing
        return Spectrum(values[0], smallest, values.square().sum(), rank, values, self.rows, self._width)

    def spectral_steps(self, tolerance: float) -> float:
        """T_ε of docs/method.md, section 3; see ``spectral_steps``, whose SpectrumErrors it raises too."""
        triangle, width = self._absorb(), self._width + 1
        targets = triangle[:, width:]
        total = targets[1:].square().sum()
        # A column that is constant leaves the rounding of N sums behind.
        if not total > (self.rows * torch.finfo(total.dtype).eps) ** 2 * targets.square().sum():
            raise SpectrumError(
                "expected labels of at least two values, got constant labels: nothing is to be learned."
            )
        if self._decomposed is None:
            raise SpectrumError("expected finite features, got NaN or infinity: clean the rows first.")
        left, sigma = self._decomposed
        raw_norm = torch.linalg.vector_norm(triangle[:, 1:width])
        floor = singular_value_floor(raw_norm, raw_norm, self.rows, self._width, self._dtype or torch.float64)
        sigma = sigma[: left.shape[1]]
        energy = (left.T @ targets[1 : 1 + len(left)]).square().sum(dim=1) / total
        return steps_to_residual(sigma, energy, sigma > floor, tolerance)


def spectral_steps(features_ND: Tensor, labels_NC: Tensor, tolerance: float) -> float:
    """T_ε of docs/method.md, section 3: gradient-descent steps at rate 1/σ₁ until the probe's residual falls below ε.

    Solves Σ_i (1 − σ_i/σ₁)^{2t} ‖u_iᵀY‖² = ε·‖Y‖² for t ≥ 0 on centred features and labels, with one triangular factor
    and its singular values. Returns ``inf`` when the labels have more than ε of their norm outside the range of the
    features (singular values below the features' own rounding noise do not count).

    Args:
        features_ND: N×D features.
        labels_NC: N×C labels (one-hot or regression targets).
        tolerance: ε, relative to the centred labels' squared norm, in (0, 1).

    Raises:
        SpectrumError: labels that are constant, or a tolerance outside (0, 1).
    """
    check_features(features_ND)
    if not 0 < tolerance < 1:
        raise SpectrumError(f"expected a tolerance between 0 and 1, got {tolerance}.")
    factor = RowFactor()
    factor.add(features_ND, labels_NC)
    return factor.spectral_steps(tolerance)

"""Ridge probes on the outputs of the blocks: what the defence of the last layer left in the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hf_immunize.attacks.core.shape import Attack, Result, Run, setting
from hf_immunize.attacks.vision._blocks import NO_BLOCKS, block_sites
from hf_immunize.attacks.vision.context import AttackContext
from hf_immunize.attacks.vision.ridge_probe import solve_runs
from hf_immunize.errors import CaptureError, ModelError


@dataclass(frozen=True)
class EarlierLayerProbe:
    """Ridge regression on the output of one block, averaged over tokens or positions."""

    depth: float = setting(1.0, "Which block: 0 = output of the first, 1 = output of the last (before a final norm, "
                           "all tokens).", sweep=(0.0, 0.25, 0.5, 0.75, 1.0))
    penalty: float = setting(1e-4, "Ridge penalty relative to σ₁² of the features.", sweep=(1e-2, 1e-4, 1e-6))
    features: str = setting("standardized", "Feature map before the solve.")


def run(context: AttackContext, runs: Sequence[Run]) -> Iterator[tuple[Run, Result]]:
    """Solve every run; features of a block are computed once. Blocks without one row per image are not applicable."""
    try:
        sites = block_sites(context.model(0), context.head)
    except ModelError as error:
        for planned in runs:
            yield planned, Result([], 1, 0.0, "not_applicable", str(error))
        return
    by_site: dict[str, list[Run]] = {}
    for planned in runs:
        by_site.setdefault(sites[round(planned.config.depth * (len(sites) - 1))], []).append(planned)
    for site, group in by_site.items():
        yield from _solve_at(context, site, group)


def _solve_at(context: AttackContext, site: str, runs: Sequence[Run]) -> Iterator[tuple[Run, Result]]:
    solved = 0
    try:
        for pair in solve_runs(context, runs, lambda run: context.features(run.seed, site)):
            solved += 1
            yield pair
    except (ModelError, CaptureError) as error:
        for planned in runs[solved:]:
            yield planned, Result([], 1, 0.0, "not_applicable", str(error))


ATTACK = Attack(
    config=EarlierLayerProbe, run=run, family="structural", unit="solve", refuses=NO_BLOCKS,
    covers="a defence of the last layer alone",
)

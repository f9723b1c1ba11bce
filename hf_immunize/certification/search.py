"""Search afresh for the strongest attack on a certified model: own draws of settings and seeds, no stored curve."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from hf_immunize.attacks import Run
from hf_immunize.attacks.core.stored import trace_of
from hf_immunize.certification.bench import Bench
from hf_immunize.certification.trials import Trial, certified_trials
from hf_immunize.errors import ConfigError, RecordError
from hf_immunize.exam.keeps import chosen_evaluation, steps_to_threshold
from hf_immunize.records import AttackTrace, Cell, Certificate, Provenance


@dataclass(frozen=True)
class FreshAttack:
    """One attack with drawn settings on the model, and the same on its base."""

    attack: str
    settings: str
    seed: int
    threshold: float
    accuracy: float | None
    """Test score on the model at the evaluation that its attacker would choose; null where it diverged."""
    steps: int | None
    """Steps to the cell's threshold on the model; null: not reached."""
    base_steps: int | None
    certified: str
    """The verdict of the attack's cell."""

    @property
    def ratio(self) -> float | None:
        """Steps on the model over steps on the base; null where either did not reach the threshold."""
        if self.steps is None or self.base_steps is None:
            return None
        return max(self.steps, 1) / max(self.base_steps, 1)

    @property
    def told(self) -> str:
        """The attack in words."""
        reached = "does not reach" if self.steps is None else f"reaches in {self.steps} steps"
        base = "never" if self.base_steps is None else f"in {self.base_steps}"
        score = "diverged" if self.accuracy is None else f"score {self.accuracy:.3f}"
        return (f"{self.attack} ({self.settings}, seed {self.seed}) {reached} the threshold {self.threshold:.3f}, on "
                f"the base {base}; {score}; certified {self.certified}")


def search_afresh(folder: str | Path, bench: Bench, budget: int, seed: int) -> list[FreshAttack]:
    """Try ``budget`` attacks of the certificate's plan with settings and seeds of one's own, the strongest first.

    Settings are drawn from everything that the attack's own search and sweep hold; the steps are those of the certified
    budget. Each is made on the model and on its base.

    Args:
        seed: the checker's.

    Raises:
        ConfigError: no attack asked for.
        RecordError: other weights or rows than the certificate's, or no attack that was made.
    """
    if budget < 1:
        raise ConfigError(f"expected at least one attack to try, got {budget}.")
    certificate = Certificate.read(Path(folder) / "certificate.json")
    trials = certified_trials(folder, certificate)
    cells = [cell for cell in certificate.cells if cell.subject is not None and cell.control is not None]
    if not cells:
        raise RecordError("expected a certificate with an attack that was made, got none: there is nothing to search.")
    source = random.Random(seed)
    found = [_try(bench, trials, source.choice(cells), source, certificate) for _ in range(budget)]
    return sorted(found, key=_weakness)


def _weakness(found: FreshAttack) -> tuple[float, float]:
    """Least for the strongest: the one that needs the fewest steps compared with the base, then the highest score."""
    return (float("inf") if found.ratio is None else found.ratio, -(found.accuracy or 0.0))


def _try(
    bench: Bench, trials: Mapping[Trial, Sequence[AttackTrace]], cell: Cell, source: random.Random,
    certificate: Certificate,
) -> FreshAttack:
    attack = bench.attack(cell.attack)
    values = {item.name: source.choice(_values(item)) for item in fields(attack.config)}
    if "steps" in values:
        values["steps"] = cell.budget
    number = source.randrange(10_000, 2**31)  # no exam has such seeds
    run, here = Run(attack.config(**values), "afresh", number), Provenance.here(bench.device)
    sides = {}
    for role in ("subject", "control"):
        known = next(runs[0] for key, runs in trials.items() if key[:2] == (role, cell.attack))
        context = bench.context(known)
        ((_, result),) = attack.run(context, [run])
        sides[role] = trace_of(context, cell.attack, attack, run, result, here)
    chosen = chosen_evaluation(sides["subject"])
    shown = ", ".join(f"{item.name}={values[item.name]}" for item in fields(attack.config) if len(_values(item)) > 1)
    return FreshAttack(
        cell.attack, shown or "default", number, cell.threshold, None if chosen is None else chosen.test,
        steps_to_threshold(sides["subject"], cell.threshold).steps,
        steps_to_threshold(sides["control"], cell.threshold).steps, cell.verdict,
    )


def _values(item: Any) -> tuple[Any, ...]:
    """What a setting may be drawn from."""
    default = item.default if item.default is not MISSING else None
    return tuple(item.metadata.get("search") or item.metadata.get("sweep") or (default,))

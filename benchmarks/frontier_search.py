"""Choose every method's settings for the frontier: Optuna, the same number of trials each, on validation rows alone.

    python benchmarks/frontier_search.py benchmarks/frontier_digits.yaml

A trial immunizes the base with a learning rate and a strength (TPE, log scales, drawn from the plan's ``search``),
under the plan's allowance of primary accuracy, and lets one fine-tuning attacker with a seed of its own learn from the
result. Its value is log T(trial)/T(base) on the attacker's *validation* curve, T counted to halfway between what there
is without the model (the plan's ``without``) and what the base's attacker reaches there; weights that the guard
returned unchanged count as 0. No figure of a test row is read. Writes benchmarks/<plan>_settings.json, which is
committed before frontier.py judges anything.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
import yaml
from frontier import Clock, Frontier

from hf_immunize.options import make_options
from hf_immunize.records import AttackTrace, Evaluation, ImmunizationRecord, Provenance, atomic_write
from hf_immunize.stages.attack import AttackOptions, attack_model

_ATTACK = "full_finetune"


def crossing(curve: Sequence[Evaluation], threshold: float) -> float:
    """Step from which on the best validation accuracy so far is at the threshold, between evaluations on a log scale;
    the last step where it never is."""
    before = curve[0]
    if before.validation >= threshold:
        return float(before.step)
    for point in curve[1:]:
        if point.validation >= threshold:
            share = (threshold - before.validation) / (point.validation - before.validation)
            start = math.log(max(before.step, 1))
            return math.exp(start + share * (math.log(point.step) - start))
        before = point
    return float(curve[-1].step)


class Search:
    """Trials of one plan."""

    def __init__(self, plan: Mapping[str, Any]):
        self.plan, self.frontier = plan, Frontier(plan, Clock(math.inf), {})
        self.told, self.output = plan["search"], Path(plan["output"]) / "search"
        base = self._curves(self.frontier.base, "control", self.output / "base")
        reached = max(curve[-1].validation for curve in base)
        self.threshold = (self.told["without"] + reached) / 2
        self.base = min(crossing(curve, self.threshold) for curve in base)

    def _curves(self, folder: Path, role: str, into: Path) -> list[list[Evaluation]]:
        """Of every rate and seed of the search's attacker."""
        told = {"attacks": [_ATTACK], "settings": self.told["attack"], "seeds": self.told["attack_seeds"],
                "tuning_seeds": 0, "adapt": False, "device": self.plan["attack"]["device"], "model_path": str(folder),
                "role": role, "output_path": str(into)}  # fmt: skip
        attack_model(self.frontier.task, *make_options((AttackOptions,), told, "attack"))
        found = [AttackTrace.read(path) for path in sorted((into / "traces" / role).glob("*.json"))]
        return [run.curve for run in found if run.curve]

    def value(self, method: str, options: Mapping[str, Any], folder: Path) -> float:
        """log T(trial)/T(base), at the rate that is fastest for the attacker."""
        shutil.rmtree(folder, ignore_errors=True)
        told = {**self.plan["shared"], **self.told["shared"], **self.plan["methods"][method], **options}
        told["seed"] = self.told["seed"]
        self.frontier.immunize(folder, told)
        record = ImmunizationRecord.read(folder / "immunization.json")
        if record.guard is not None and not (record.guard.returned_step or record.guard.towards_last):
            return 0.0
        steps = min(crossing(curve, self.threshold) for curve in self._curves(folder, "subject", folder))
        return math.log(steps / self.base)

    def choose(self, method: str) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """The best settings of a method, and all of its trials."""
        sampler = optuna.samplers.TPESampler(seed=self.told["seed"], n_startup_trials=3)
        study = optuna.create_study(direction="maximize", sampler=sampler)

        def objective(trial: optuna.Trial) -> float:
            options = {name: trial.suggest_float(name, *ends, log=True) for name, ends in self.told["ranges"].items()}
            return self.value(method, options, self.output / method / str(trial.number))

        study.enqueue_trial(self.told["first"])
        study.optimize(objective, n_trials=self.told["trials"])
        trials = [{"options": trial.params, "value": trial.value} for trial in study.trials]
        return dict(study.best_params), trials


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plan", help="the YAML of frontier.py")
    parser.add_argument("--part", default="1/1", help="i/n: this process takes the i-th of n shares of the methods")
    given = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    search = Search(yaml.safe_load(Path(given.plan).read_text(encoding="utf-8")))
    file = Path(given.plan).with_name(f"{Path(given.plan).stem}_settings.json")
    place, parts = map(int, given.part.split("/"))
    for method in list(search.plan["methods"])[place - 1 :: parts]:
        if method not in _read(file)["chosen"]:
            best, trials = search.choose(method)
            found = _read(file)  # another process may have written its share meanwhile
            found["chosen"][method], found["trials"][method] = best, trials
            found["provenance"] = Provenance.here().model_dump()
            atomic_write(file, json.dumps(found, indent=1, default=str) + "\n")
        print(f"{method}: {_read(file)['chosen'][method]}", file=sys.stderr)


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"chosen": {}, "trials": {}}


if __name__ == "__main__":
    main()

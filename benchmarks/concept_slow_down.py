"""How much slower each concept is learned than from the base, harmful and benign, for every immunized diffusion model.

    python benchmarks/concept_slow_down.py --base_path runs/mnist-diffusion/base \
        --model_paths runs/mnist-diffusion/{simulated_attack,condition_number,ill_only,opt_kappa,imma}

Reads traces/ and certificate.json of finished exams and prints, per model, one line per attack. Harmful cells are those
of the certificate; SGR is that of the drawings after the whole attack. Benign cells are judged in steps by the same
code and rule. (The certificate asks of the benign concept whether as much is learned in the end, not how soon.) Where
there is no certificate, harmful cells are judged from the traces alone, by the rule in force and without what training
from random weights reaches.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hf_immunize.attacks.diffusion import DIFFUSION_ATTACKS, DIFFUSION_TRAINABILITY
from hf_immunize.certification.cells import build_cell
from hf_immunize.exam import DIFFUSION_RULE
from hf_immunize.records import AttackTrace, Certificate, Interval


def told(found: Interval) -> str:
    """Estimate and interval; bounds that censoring leaves open are said to be open."""
    low, high = ("open" if bound is None else f"{bound:.3g}" for bound in (found.low, found.high))
    if found.estimate is None:
        return f">= {low}" if found.low is not None else "-"
    return f"{found.estimate:.3g} [{low}, {high}]"


def traces_of(folder: Path, role: str, attack: str) -> list[AttackTrace]:
    """All runs of one attack."""
    return [AttackTrace.read(path) for path in sorted((folder / "traces" / role).glob(f"{attack}__*.json"))]


def tell_certificate(folder: Path) -> None:
    """Verdict, utility, harmful cells and likeness of a certified model."""
    certificate = Certificate.read(folder / "certificate.json")
    utility = certificate.utility
    print(f"{folder.name}: {certificate.overall}; {utility.metric} {utility.base:.1f} -> {utility.immunized:.1f} %")
    for cell in certificate.cells:
        if cell.subject is not None:
            print(f"  {cell.attack}: {told(cell.slow_down)}, {cell.verdict}")
    for gap in certificate.similarity:
        print(f"  {gap.attack}: SGR of {gap.concept} {told(gap.ratio[-1])}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base_path", type=Path, required=True)
    parser.add_argument("--model_paths", type=Path, nargs="+", required=True)
    arguments = parser.parse_args()
    for folder in arguments.model_paths:
        certified = (folder / "certificate.json").is_file()
        if certified:
            tell_certificate(folder)
        else:
            print(f"{folder.name}: no certificate")
        for name, attack in (({} if certified else DIFFUSION_ATTACKS) | DIFFUSION_TRAINABILITY).items():
            places = {"subject": folder, "control": arguments.base_path}
            runs = {role: traces_of(place, role, name) for role, place in places.items()}
            if all(runs.values()):
                rows = runs["subject"][0].data[-1].rows
                cell = build_cell(name, attack, runs, None, rows, DIFFUSION_RULE)
                print(f"  {name}: {told(cell.slow_down)}, {cell.verdict}, threshold {cell.threshold:.4f}")


if __name__ == "__main__":
    main()

"""Whether a recheck ever accuses an honest certificate: tiny real exams under many circumstances, rechecked many times.

Each exam is made once on this processor as it is. Half of its rechecks are made the same way, half in a process that is
kept from the processor's vector units and from MKL's own kernels, as another machine would round. A trial that several
rechecks draw is run again once on each.

    python benchmarks/honest_rechecks.py --rechecks 14 --output docs/results/honest_rechecks.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "certification")]

OTHER_KERNELS = {
    "ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    "OPENBLAS_CORETYPE": "Nehalem",
}
"""What ``make test-kernels`` sets."""
DRAWN = 3
PIPELINES = "a diffusion pipeline"


def circumstances() -> list[str]:
    """Names of all exams."""
    from circumstances import CIRCUMSTANCES

    return [*CIRCUMSTANCES, PIPELINES]


def make_exam(name: str, root: Path) -> None:
    """An honest exam under these circumstances, certified, below ``root``."""
    if name == PIPELINES:
        from tiny_concepts import PROTOCOL, sit_concepts

        from hf_immunize.certification.diffusion import build_diffusion_certificate

        _, exam = sit_concepts(root)
        build_diffusion_certificate(root / "subject", root / "base", exam, PROTOCOL).write(
            root / "subject" / "certificate.json")
        return
    from circumstances import CIRCUMSTANCES, sit
    from tiny_exam import make_exam_data, train_base

    settings, told = CIRCUMSTANCES[name]
    sit(root, train_base(root / "trained"), make_exam_data(), settings, **told)


def open_exam(name: str, root: Path) -> Any:
    """The bench of an exam that was made."""
    from hf_immunize.certification.bench import Bench

    if name == PIPELINES:
        from tiny_concepts import Concepts

        task: Any = Concepts(None)
    else:
        from circumstances import Blobs
        from tiny_exam import make_exam_data

        task = Blobs(make_exam_data())
    return Bench(root / "subject", root / "base", task)


def recheck(name: str, root: Path, seeds: range) -> list[dict[str, Any]]:
    """One recheck of three trials for every seed. A trial that is drawn again in this process is not run again: here it
    would come out the same."""
    import torch

    from hf_immunize.certification import trials

    torch.set_num_threads(1)
    bench, found, made, run = open_exam(name, root), [], {}, trials.run_again

    def once(bench: Any, stored: Any, company: Any) -> Any:
        key = (stored[0].role, stored[0].attack, stored[0].trial)
        if key not in made:
            made[key] = run(bench, stored, company)
        return made[key]

    trials.run_again = once
    try:
        for seed in seeds:
            record = trials.repeat_trials(root / "subject", bench, DRAWN, seed)
            distances = [item.distance for item in record.trials if item.distance is not None]
            found.append({"holds": record.holds, "trials": len(record.trials), "distance": max(distances, default=0.0),
                          "runs": 0, "told": [item.told for item in record.trials if not item.agrees]})
    finally:
        trials.run_again = run
    found[-1]["runs"] = len(made)
    return found


def with_other_kernels(roots: dict[str, Path], seeds: range) -> dict[str, list[dict[str, Any]]]:
    """Rechecks of all exams in one process that rounds otherwise."""
    words = [sys.executable, __file__, "--again", json.dumps({name: str(root) for name, root in roots.items()}),
             "--seeds", str(seeds.start), str(seeds.stop)]
    done = subprocess.run(words, env=os.environ | OTHER_KERNELS, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, list[dict[str, Any]]] = json.loads(done.stdout.splitlines()[-1])
    return found


def row_of(name: str, here: list[dict[str, Any]], there: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of the table."""
    both = [*here, *there]
    return {
        "circumstances": name, "rechecks": len(both), "trials": sum(item["trials"] for item in both),
        "trials_run_again": sum(item["runs"] for item in both),
        "accused": sum(not item["holds"] for item in both),
        "distance_here": max(item["distance"] for item in here),
        "distance_other_kernels": max(item["distance"] for item in there),
        "told": [told for item in both for told in item["told"]],
    }


def main() -> None:
    """Make the exams one after the other, and print what their rechecks said."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rechecks", type=int, default=14, help="of every exam, half of them with other kernels")
    parser.add_argument("--only", nargs="*", help="these circumstances alone")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--again", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--seeds", type=int, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.again:
        print(json.dumps({name: recheck(name, Path(root), range(*arguments.seeds))
                          for name, root in arguments.again.items()}))
        return
    count, here, roots = arguments.rechecks, {}, {}
    with tempfile.TemporaryDirectory(prefix="rechecks-") as root:
        for number, name in enumerate(arguments.only or circumstances()):
            roots[name] = Path(root, str(number))
            roots[name].mkdir()
            make_exam(name, roots[name])
            here[name] = recheck(name, roots[name], range(count // 2))
            print(f"{name}: {sum(not item['holds'] for item in here[name])} of {count // 2} accused here",
                  file=sys.stderr, flush=True)
        there = with_other_kernels(roots, range(count // 2, count))
    rows = [row_of(name, here[name], there[name]) for name in here]
    for row in rows:
        print(f"{row['circumstances']:<36} {row['rechecks']:>4} rechecks {row['trials']:>4} trials {row['accused']:>3} "
              f"accused, largest difference {row['distance_here']:.4f} here, "
              f"{row['distance_other_kernels']:.4f} with other kernels {' '.join(row['told'])}")
    total = {key: sum(row[key] for row in rows) for key in ("rechecks", "trials", "trials_run_again", "accused")}
    print(f"{len(rows)} circumstances, {total['rechecks']} rechecks of {total['trials']} trials, "
          f"{total['trials_run_again']} of them run again: {total['accused']} accused")
    if arguments.output:
        arguments.output.write_text(json.dumps({"total": total, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

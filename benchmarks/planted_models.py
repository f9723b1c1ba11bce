"""How often models whose right verdict is known by construction are judged right, over repetitions with other seeds.

    OMP_NUM_THREADS=1 python benchmarks/planted_models.py [--repetitions 20] [--only NAME ...] [--first 0]

Each repetition draws digits, nuisance, base and planted models anew (tests/certification/planted_set.py), sits a
whole exam of each (five attack seeds, attackers without the model beside it) and reads the overall verdict of its
certificate. Wanted: at least 19 of 20. Prints every verdict when it falls, with reasons where it is not right, and the
table after every repetition, so that a run may be stopped at any time.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "certification"))
from planted_domain import World
from planted_set import PLANTS, Bases, judge

from hf_immunize.stages.start import hush


def repeat(seed: int, names: list[str], root: Path) -> Iterator[tuple[str, str, str]]:
    """Name and verdict of each planted model of one repetition, and why."""
    bases = Bases(root / "bases", World(seed), seed)
    for name in names:
        certificate = judge(bases, root / name.replace(" ", "-"), name)
        why = "; ".join(f"{cell.attack} {cell.verdict}: {cell.reason}" for cell in certificate.cells)
        yield name, certificate.overall, f"{why}; primary drop {certificate.utility.drop.estimate:.1f} points"


def show(counts: dict[str, Counter[str]], done: int, seconds: float) -> None:
    """The table so far."""
    print(f"\nafter {done} repetitions, {seconds:.0f} s")
    print(f"{'planted model':24} {'right verdict':20} {'right':>8}   verdicts")
    for name, count in counts.items():
        wanted = PLANTS[name].verdict
        told = ", ".join(f"{verdict} {number}" for verdict, number in count.most_common())
        print(f"{name:24} {wanted:20} {count[wanted]:4}/{done:<3}   {told}", flush=True)


def main() -> None:
    """Repeat and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="Seed of the first repetition.")
    parser.add_argument("--only", nargs="+", choices=list(PLANTS), default=list(PLANTS), metavar="NAME")
    arguments = parser.parse_args()
    hush()
    torch.set_num_threads(1)
    started, counts = time.perf_counter(), {name: Counter[str]() for name in arguments.only}
    for done in range(1, arguments.repetitions + 1):
        seed = arguments.first + done - 1
        root = Path(tempfile.mkdtemp())
        for name, verdict, why in repeat(seed, arguments.only, root):
            counts[name][verdict] += 1
            wrong = "" if verdict == PLANTS[name].verdict else f", not {PLANTS[name].verdict}. {why}"
            print(f"seed {seed}, {name}: {verdict}{wrong}", flush=True)
        shutil.rmtree(root)
        show(counts, done, time.perf_counter() - started)


if __name__ == "__main__":
    main()

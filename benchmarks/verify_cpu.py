"""CPU seconds of ``hf-immunize verify`` on a release with as many runs as one of the demo's: a ``quick`` exam, sealed.

User and system time of a fresh process, imports included; the least of several, since a busy machine only adds to it.

    python benchmarks/verify_cpu.py --repeats 7 --output docs/results/verify_cpu.json
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "hub")]


def make_release(root: Path) -> Path:
    """A sealed folder with card, page and the traces of a quick exam; its weights are two numbers."""
    from preset_exam import preset_exam
    from published import write_release

    return write_release(preset_exam(root), root / "published", allow_failed=True)


def cpu_seconds(words: list[str]) -> float:
    """User and system time of one command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "hf_immunize.cli", *words], stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure the commands in turns, and print the least of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="verify-cpu-") as root:
        folder = make_release(Path(root))
        commands = {
            "--help": ["--help"], "verify": ["verify", str(folder)],
            "verify --rejudge": ["verify", str(folder), "--rejudge"],
        }
        found: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(arguments.repeats):
            for name, words in commands.items():
                found[name].append(cpu_seconds(words))
        runs = len(list(folder.glob("traces/*/*.json")))
    result = {"traces": runs, "repeats": arguments.repeats,
              "cpu_seconds": {name: round(min(seconds), 2) for name, seconds in found.items()}}
    print(json.dumps(result, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

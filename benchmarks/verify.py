"""How fast a sharded model is verified, in MB/s against sha256sum and openssl, and in how much memory.

    python benchmarks/verify.py --gib 2 --shards 4 --output docs/results/verify.json
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "hub"))

BLOCK = 1 << 20


def peak_memory() -> int:
    """Peak resident bytes of this process."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def make_model(root: Path, gib: float, shards: int) -> Path:
    """A certified, sealed folder whose shards are random bytes of the given size."""
    from published import certified, reseal

    from hf_immunize.records import Certificate, ModelFingerprint

    folder = certified(root)
    (folder / "model.safetensors").unlink()
    for index in range(shards):
        with open(folder / f"model-{index + 1:05}-of-{shards:05}.safetensors", "wb") as stream:
            for _ in range(int(gib * 1024 / shards)):
                stream.write(os.urandom(BLOCK))
    certificate = Certificate.read(folder / "certificate.json")
    subject = ModelFingerprint.of_folder(folder, name="sharded", architecture="none", parameters=0)
    traces = {name: digest for name, digest in certificate.traces.items() if "/control/" in name}
    certificate.model_copy(update={"subject": subject, "traces": traces}).write(folder / "certificate.json")
    reseal(folder)
    return folder


def verify_once(folder: Path) -> dict[str, float]:
    """Seconds and memory of one verification, in this process."""
    from hf_immunize.hub import verify_folder

    before, start = peak_memory(), time.perf_counter()
    found = verify_folder(folder)
    seconds = time.perf_counter() - start
    if not found.ok:
        raise SystemExit("\n".join(map(str, found.findings)))
    return {"seconds": seconds, "memory": peak_memory() - before}


def tool_once(command: list[str], files: list[Path]) -> float:
    """Seconds of a system's tool over the same files."""
    start = time.perf_counter()
    subprocess.run([*command, *files], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    """Measure in turns, each verification in a fresh process; print and write medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        print(json.dumps(verify_once(arguments.folder)))
        return
    root = Path(tempfile.mkdtemp(prefix="verify-"))
    try:
        folder = make_model(root, arguments.gib, arguments.shards)
        files = sorted(folder.glob("*.safetensors"))
        tools = {"sha256sum": ["sha256sum"], "openssl": ["openssl", "dgst", "-sha256"]}
        tools = {name: command for name, command in tools.items() if shutil.which(name)}
        ours: list[dict[str, float]] = []
        theirs: dict[str, list[float]] = {name: [] for name in tools}
        for _ in range(arguments.repeats):
            for name, command in tools.items():
                theirs[name].append(tool_once(command, files))
            done = subprocess.run([sys.executable, __file__, "--folder", str(folder)], check=True, capture_output=True,
                                  text=True)
            ours.append(json.loads(done.stdout))
        size = sum(path.stat().st_size for path in files)
    finally:
        shutil.rmtree(root)
    mine = median([run["seconds"] for run in ours])
    result = {
        "bytes": size, "shards": arguments.shards, "repeats": arguments.repeats,
        "verify_mb_per_s": round(size / mine / 1e6, 1),
        **{f"{name}_mb_per_s": round(size / median(seconds) / 1e6, 1) for name, seconds in theirs.items()},
        **{f"ratio_to_{name}": round(median(seconds) / mine, 3) for name, seconds in theirs.items()},
        "memory_above_baseline_mib": round(max(run["memory"] for run in ours) / (1 << 20), 1),
    }
    print(json.dumps(result, indent=1))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

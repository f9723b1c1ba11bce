"""Rows are known by the same digests on every processor (docs/method.md, section 8)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from other_kernels import digests, draw_images


def environment() -> dict[str, str]:
    """No vector units beyond those that every x86-64 processor has, and two threads."""
    from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

    return os.environ | {
        "ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "NPY_DISABLE_CPU_FEATURES": ",".join(name for name in __cpu_dispatch__ if __cpu_features__.get(name)),
        "JSIMD_FORCENONE": "1", "OMP_NUM_THREADS": "2",
    }


def test_pixels_splits_and_draws_of_rows_do_not_depend_on_the_kernels(tmp_path):
    draw_images(tmp_path)
    here = digests(tmp_path)
    assert len(set(here.values())) == len(here) == 9
    script = Path(__file__).with_name("other_kernels.py")
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True,
                          env=environment())
    assert done.returncode == 0, done.stderr[-2000:]
    there = json.loads(done.stdout.splitlines()[-1])
    assert there.pop("kernels") == "DEFAULT" or torch.backends.cpu.get_cpu_capability() == "DEFAULT"
    assert there == here

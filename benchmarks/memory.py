"""Peak memory of this very process; as a script, measured peaks against the model of memory.

    OMP_NUM_THREADS=1 python benchmarks/memory.py

trains random networks of more than 100 million parameters for two steps on the CPU, each setting in a process of its
own, and prints bytes a parameter, as measured and as ``hf_immunize.training.core.memory`` says.
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


def highest_resident() -> float:
    """MiB, on Linux. Not ru_maxrss: a process inherits that of the one it was started from."""
    return _status("VmHWM")


def resident() -> float:
    """MiB at this moment, on Linux."""
    return _status("VmRSS")


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {}, "teacher": {"teacher": True}, "average": {"average": True}, "guard": {"guard": True},
    "all three": {"teacher": True, "average": True, "guard": True}, "sgd": {"optim": "sgd"},
    "two micro-batches": {"accumulation": 2}, "24 rows a task": {"rows": 24},
}  # fmt: skip
KINDS = ("classifier", "denoiser", "denoiser, LoRA beside bfloat16")


def _network(kind: str) -> Any:
    import diffusers
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    if kind == "classifier":
        return ViTForImageClassification(ViTConfig(
            hidden_size=1024, num_hidden_layers=8, num_attention_heads=16, intermediate_size=4096, image_size=64,
            num_labels=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        ))  # fmt: skip
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=12, attention_head_dim=64, num_layers=12, in_channels=4, out_channels=4, sample_size=16,
        norm_num_groups=32, num_embeds_ada_norm=10,
    )  # fmt: skip
    return model.to(torch.bfloat16) if "LoRA" in kind else model


def _args(kind: str, folder: str, setting: dict[str, Any]) -> Any:
    from hf_immunize.training import ImmunizationConfig
    from hf_immunize.training.diffusion import DiffusionImmunizationConfig

    rows = setting.get("rows", 2)
    both = {
        "output_dir": folder, "max_steps": 2, "weight": "1", "per_device_train_batch_size": rows, "use_cpu": True,
        "per_device_harmful_batch_size": max(rows, 8), "report_to": "none",
        "optim": setting.get("optim", "adamw_torch_fused"),
        "ema_decay": 0.9 if setting.get("average") else 0.0, "distillation": 1.0 if setting.get("teacher") else 0.0,
        "gradient_accumulation_steps": setting.get("accumulation", 1), "objective": "ill_only", "eval_steps": 1,
    }  # fmt: skip
    if kind == "classifier":
        drop = 100.0 if setting.get("guard") else None
        return ImmunizationConfig(
            **both, max_primary_drop=drop, save_strategy="no", disable_tqdm=True, trainable_modules=".*",
            feature_distillation=0.0,
        )
    return DiffusionImmunizationConfig(
        **both, max_primary_drop=1e8 if setting.get("guard") else None, sites="middle", disable_progress=True,
        trainable_modules="lora" if "LoRA" in kind else "all",
    )


def _trainer(kind: str, model: Any, args: Any) -> Any:
    import diffusers
    import torch

    from hf_immunize.data import PixelDataset
    from hf_immunize.diffusion import LatentDataset
    from hf_immunize.training import ImmunizationTrainer
    from hf_immunize.training.diffusion import DiffusionImmunizationTrainer

    rows = 2 * max(args.per_device_train_batch_size, 8)
    labels = torch.arange(rows)
    if kind == "classifier":
        names = [f"class {place}" for place in range(4)]
        held = PixelDataset(torch.randn(rows, 3, 64, 64), labels % 4, names)
        return ImmunizationTrainer(model, args, train_dataset=held, harmful_dataset=held, eval_dataset=held)
    sides = [LatentDataset(torch.randn(rows, 4, 16, 16), {"class_labels": labels % 10}, labels % 10, list("0123456789"))
             for _ in range(2)]
    return DiffusionImmunizationTrainer(
        model, diffusers.DDPMScheduler(), args, train_dataset=sides[0], harmful_dataset=sides[1], eval_dataset=sides[1]
    )


def measure(kind: str, name: str) -> dict[str, float]:
    """Peak bytes above what the process held before it made the network, in this process."""
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.set_num_threads(1)
    tiny = torch.nn.Linear(4, 4)  # the optimizer's and autograd's own first use, before anything is measured
    tiny(torch.randn(2, 4)).sum().backward()
    torch.optim.AdamW(tiny.parameters()).step()
    args = _args(kind, tempfile.mkdtemp(), SETTINGS[name])
    _trainer(kind, _tiny(kind), _args(kind, tempfile.mkdtemp(), SETTINGS[name])).train()
    before = resident()
    model = _network(kind)
    count = sum(parameter.numel() for parameter in model.parameters())
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins here, not at a float32 network
    _trainer(kind, model, args).train()
    return {"measured": (highest_resident() - before) * 2**20, "parameters": count}


def _tiny(kind: str) -> Any:
    """A network of the same class that is nothing: what libraries hold once they have run."""
    import diffusers
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    if kind == "classifier":
        return ViTForImageClassification(ViTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=64,
            num_labels=4,
        ))  # fmt: skip
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, in_channels=4, out_channels=4, sample_size=16,
        norm_num_groups=4, num_embeds_ada_norm=10,
    )  # fmt: skip
    return model.to(torch.bfloat16) if "LoRA" in kind else model


def predict(kind: str, name: str) -> dict[str, float]:
    """In a step, and when an evaluation's weights are taken: device and host are both this process's memory on a CPU.

    A denoiser's gradients are still there while it is evaluated; transformers' Trainer has dropped a classifier's.
    """
    import torch

    from hf_immunize.training.diffusion.planning import plan_memory as plan_denoiser
    from hf_immunize.training.vision.planning import plan_memory as plan_classifier

    args = _args(kind, tempfile.mkdtemp(), SETTINGS[name])
    with torch.device("meta"):
        model = _network(kind)
    found = plan_classifier(model, args, (3, 64, 64)) if kind == "classifier" else plan_denoiser(model, args)
    kept = 0.0 if kind == "classifier" else found.gradients
    return {"step": found.peak + found.host, "evaluation": found.resident + kept + found.host + found.host_momentary}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=KINDS)
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one)))
        return
    heads = ["bytes a parameter", "parameters, M", "measured peak", "model: in a step", "at an evaluation", "ratio"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    surroundings = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**17)}  # freed memory goes back to the system
    for kind in options.kinds:
        for name in options.settings:
            words = [sys.executable, __file__, "--one", kind, name]
            done = subprocess.run(words, capture_output=True, text=True, check=True, env=surroundings)
            found = json.loads(done.stdout.splitlines()[-1])
            told = predict(kind, name)
            count, whole = found["parameters"], max(told.values())
            cells = [found["measured"] / count, told["step"] / count, told["evaluation"] / count]
            numbers = " | ".join(f"{cell:.2f}" for cell in [*cells, found["measured"] / whole])
            print(f"| {kind}: {name} | {count / 1e6:.0f} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()

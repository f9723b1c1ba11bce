"""The model of a run: whether it can be read, has a head for the classes, and what training it needs and takes."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification

from hf_immunize.data import id2label_of, names_classes, output_names
from hf_immunize.errors import ImmunizeError
from hf_immunize.features import trainable_modules
from hf_immunize.models import label_maps, load_classifier, load_processor, refuse_folder
from hf_immunize.stages.attack import AttackPlan
from hf_immunize.stages.checks.findings import Finding, Level
from hf_immunize.stages.checks.options import Parsed
from hf_immunize.stages.checks.rows import Side
from hf_immunize.stages.checks.uplift import check_uplift
from hf_immunize.stages.dry_run import image_shape
from hf_immunize.stages.start import drawing_a_head, hush
from hf_immunize.stages.workflow.depth import depth_finding, find_profile
from hf_immunize.stages.workflow.launch import threads_beside
from hf_immunize.stages.workflow.run_file import RunFile
from hf_immunize.stages.workflow.stages import BASE, Stage
from hf_immunize.tasks import find_family

_ROWS = 16
_REPEATS, _PATIENCE = 10, 5.0
_CHECKPOINT = 4
"""Times a model's weights that a checkpoint holds: weights, two moments of the optimizer, the start."""


@dataclass(frozen=True)
class Known:
    """What is known of the base before it is trained or fetched.

    Args:
        model: with the weights it has, or random ones where only a config was read.
        processor: its image processor.
        image: channels, height and width of what the processor makes.
    """

    model: Any
    processor: Any
    image: tuple[int, int, int]

    @property
    def bytes(self) -> int:
        """Of its weights in float32."""
        return 4 * sum(parameter.numel() for parameter in self.model.parameters())


def check_classifier(
    run: RunFile, stages: Mapping[str, Stage], parsed: Parsed, sides: Mapping[str, Side]
) -> list[Finding]:
    """Everything about a classifier and what the run will ask of the machine."""
    hush()
    names = list(sides["primary"].names) if "primary" in sides else None
    try:
        known = read_base(run, parsed, names)
    except ImmunizeError as error:
        return [Finding("model", "fails", str(error))]
    size = "x".join(map(str, known.image))
    told = f"{type(known.model).__name__}, {known.bytes / 4e6:.2f} million parameters, images {size}"
    found = [Finding("model", "ok", told)]
    found += _head(known, names) if run.base is not None and names is not None else []
    if "harmful" in sides:
        with _with_head(run, parsed, known) as folder:
            found.append(check_uplift(folder, known.processor, sides["harmful"]))
    rows = {name: len(side.chosen) for name, side in sides.items()}
    seconds = _seconds_per_row(known, threads_beside(run.jobs))
    total, profile = 0.0, find_profile(run.output_dir)
    for name, section in run.models.items():
        if section is None or name not in parsed:
            continue
        try:
            found += _sites(known, name, parsed[name])
            if profile is not None:
                found.append(depth_finding(profile, known.model, name, parsed[name][2].trainable_modules))
            found.append(_memory(known, name, parsed[name]))
        except ImmunizeError as error:
            found.append(Finding(f"model {name}", "fails", str(error)))
    for stage in stages.values():
        if stage.name in parsed:
            total += _time(stage, parsed[stage.name], seconds, rows)
    found.append(_disk(run, known, parsed))
    if total:
        jobs = f", {run.jobs} stages at a time" if run.jobs > 1 else ""
        found.append(Finding("time", "ok", f"about {_hours(total / run.jobs)} on this machine without other "
                                           f"work{jobs}: a "
                             f"rough estimate from {_ROWS} random images"))
    return found


def _weights_of(run: RunFile, parsed: Parsed) -> Path | None:
    """The folder of the base, or of the model that becomes it, where it has trained weights and is here."""
    source = run.base
    if source is None:
        options = parsed[BASE][1]
        if options.from_scratch:
            return None
        source = str(options.model_name_or_path)
    return Path(source) if Path(source).is_dir() else None


@contextmanager
def _with_head(run: RunFile, parsed: Parsed, known: Known) -> Iterator[Path | None]:
    """The folder of ``_weights_of``; for a model that will get a new head, a copy with one. No probe reads the head."""
    folder = _weights_of(run, parsed)
    if folder is None or run.base is not None:
        yield folder
        return
    with TemporaryDirectory() as copy:
        known.model.save_pretrained(copy)
        yield Path(copy)


def read_base(run: RunFile, parsed: Parsed, names: Sequence[str] | None) -> Known:
    """The model that is trained first, or the base. Of one on the Hub only config and processor are fetched.

    Raises:
        ModelError: nothing that can be read, or no processor.
    """
    labels = label_maps(names) if names is not None else {}
    if run.base is not None:
        source, processor, trusted, pretrained = run.base, run.base, False, True
        labels = {}
    else:
        options = parsed[BASE][1]
        source, trusted = options.model_name_or_path, options.trust_remote_code
        processor, pretrained = options.processor_name_or_path or source, not options.from_scratch
    refuse_folder(source)
    found = load_processor(processor, config_of=source, trust_remote_code=trusted)
    if pretrained and Path(source).is_dir():
        with drawing_a_head():
            model: nn.Module = load_classifier(source, labels=labels or None, trust_remote_code=trusted)
    else:
        model = _from_config(source, labels, trusted)
    return Known(model.eval(), found, image_shape(found))


def _from_config(source: str, labels: Mapping[str, Any], trusted: bool) -> nn.Module:
    from hf_immunize.errors import ModelError

    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trusted, **labels)
        return AutoModelForImageClassification.from_config(config, dtype=torch.float32, trust_remote_code=trusted)
    except Exception as error:  # transformers and the hub raise many unrelated classes for what cannot be read
        raise ModelError(
            f"expected the config of an image classifier in {source}, got {type(error).__name__}: {error}: check the "
            "path."
        ) from error


def _head(known: Known, names: Sequence[str]) -> list[Finding]:
    """Whether a trained base has an output for each class of the primary task."""
    config = known.model.config
    if names_classes(id2label_of(config)):
        outputs = output_names(id2label_of(config))
        if unknown := [name for name in names if name not in outputs]:
            level: Level = "fails" if config.num_labels != len(names) else "note"
            return [Finding("head", level, f"expected an output for each class of the primary data, got none called "
                            f"{unknown[:5]}: the head knows {list(outputs)[:8]}. Rename the folders or classes, choose "
                            "others with primary_labels, or train a new head (pretrain in place of base).")]
        return [Finding("head", "ok", f"{config.num_labels} outputs, classes found by their names")]
    if config.num_labels != len(names):
        return [Finding("head", "fails", f"expected {len(names)} outputs, one for each class of the primary data, got "
                        f"{config.num_labels}: train a head for them (pretrain in place of base), or set id2label in "
                        "its "
                        "config.json.")]
    return [Finding("head", "note", f"{len(names)} outputs without names: taken as {list(names)[:8]}, in this order")]


def _sites(known: Known, name: str, held: tuple[Any, ...]) -> Iterator[Finding]:
    """The layers that are measured and trained."""
    from hf_immunize.training.vision.checks import head_of
    from hf_immunize.training.vision.held import part_of

    args = held[2]
    head = head_of(known.model, args)
    told = f"measured before {head}" if args.sites == "head" else f"measured at {args.sites}"
    if part := part_of(args, known.model):
        modules = trainable_modules(known.model, part)
        told += f", trained: {', '.join(modules[:4])}{', …' if len(modules) > 4 else ''}"
    else:
        told += ", every weight trained"
    yield Finding(f"model {name}", "ok", told)


def _memory(known: Known, name: str, held: tuple[Any, ...]) -> Finding:
    """The peak of a training step against what the device has."""
    from hf_immunize.training.vision.planning import plan_memory

    args = held[2]
    with torch.device("meta"):
        hollow = type(known.model)(known.model.config)
    peak = plan_memory(hollow, args, known.image).peak
    has, device = device_memory(bool(args.use_cpu))
    told = f"{peak / 1e9:.2f} GB of {has / 1e9:.1f} GB on the {device} in a training step"
    if peak > has:
        return Finding(f"memory {name}", "fails", f"expected a step that fits, got {told}: lower "
                       "per_device_train_batch_size and per_device_harmful_batch_size, set trainable_modules, or "
                       "gradient_checkpointing: true.")
    return Finding(f"memory {name}", "ok", told)


def device_memory(on_cpu: bool) -> tuple[float, str]:
    """Bytes of the device that a stage will run on, and what it is called."""
    if torch.cuda.is_available() and not on_cpu:
        return float(torch.cuda.get_device_properties(0).total_memory), "GPU"
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")), "CPU"
    except (AttributeError, ValueError, OSError):  # not a POSIX system
        return float("inf"), "CPU"


def _disk(run: RunFile, known: Known, parsed: Parsed) -> Finding:
    """What models and checkpoints will take."""
    copies = 1.0
    for name in run.models:
        if name in parsed:
            copies += 1 + _CHECKPOINT * (parsed[name][2].save_total_limit or 3)
    needed = copies * known.bytes
    folder = run.output_dir
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    told = f"up to {needed / 1e9:.2f} GB of {free / 1e9:.1f} GB free for models and checkpoints"
    if needed > free:
        return Finding("disk", "fails", f"expected enough room in {folder}, got {told}: free some, set another "
                       "output_dir, or save_total_limit: 1.")
    return Finding("disk", "ok", told)


def _seconds_per_row(known: Known, threads: int) -> tuple[float, float]:
    """Seconds of one image, forward alone and with backward, on the device and the threads that a stage will have."""
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pixels = torch.randn(_ROWS, *known.image, device=device)
    model = known.model.to(device)
    took: tuple[list[float], list[float]] = ([], [])
    begun = time.perf_counter()
    while len(took[0]) < 2 or (len(took[0]) < _REPEATS and time.perf_counter() - begun < _PATIENCE):
        start = time.perf_counter()
        with torch.no_grad():
            model(pixel_values=pixels)
        middle = time.perf_counter()
        model(pixel_values=pixels).logits.float().square().mean().backward()
        took[0].append(middle - start)
        took[1].append(time.perf_counter() - middle)
    model.zero_grad(set_to_none=True)
    return min(took[0]) / _ROWS, min(took[1]) / _ROWS


def _time(stage: Stage, held: tuple[Any, ...], seconds: tuple[float, float], rows: Mapping[str, int]) -> float:
    """Seconds of a stage, roughly."""
    forward, both = seconds
    everything = forward * sum(rows.values())
    if stage.verb == "immunize":
        args = held[2]
        batch = args.per_device_train_batch_size + args.per_device_harmful_batch_size
        return 10 + _steps(args, rows) * batch * both + 10 * everything
    if stage.verb == "pretrain" and len(held) == 3:
        return 10 + _steps(held[2], rows) * held[2].per_device_train_batch_size * both + everything
    if stage.verb == "attack":
        return 10 + everything + _attack_time(stage, held, both, everything)
    return 10 + (3 * everything if stage.verb == "certify" else 0)


def _steps(args: Any, rows: Mapping[str, int]) -> float:
    if args.max_steps > 0:
        return float(args.max_steps)
    return float(args.num_train_epochs) * max(1, rows.get("primary", 0) // 2) / args.per_device_train_batch_size


def _attack_time(stage: Stage, held: tuple[Any, ...], both: float, everything: float) -> float:
    """Seconds of the attacks that train the network; probes cost their features, which are made once."""
    from hf_immunize.attacks.core.plan import find_attack, plan_runs
    from hf_immunize.attacks.core.rounds import count_runs

    plan = AttackPlan.of(held[1], find_family(stage.options))
    total = 0.0
    for name in plan.names:
        attack = find_attack(name, plan.table)
        runs = plan_runs(attack, plan.seeds, plan.settings.get(name), plan.trials)
        made = count_runs(attack, runs, plan.seeds, plan.tuning) / max(len(runs), 1)
        for run in runs:
            steps, batch = getattr(run.config, "steps", 1), getattr(run.config, "batch_size", 0)
            total += made * (0.5 if not batch else steps * batch * both + 8 * everything / 3)
    return total


def _hours(seconds: float) -> str:
    minutes = seconds / 60
    return f"{minutes / 60:.1f} hours" if minutes > 90 else f"{max(1, round(minutes))} minutes"

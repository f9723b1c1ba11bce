"""Look at a model and its data, and write one commented run file with every stage: DIR/run.yaml.

What could not be decided from model and data is marked CHECK in it. A profile.json in DIR (hf-immunize profile) decides
which part is trained and measured. Then: hf-immunize plan, hf-immunize run.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_immunize.errors import ConfigError, RunMismatchError
from hf_immunize.exam import DIFFUSION_PROTOCOLS, PROTOCOLS
from hf_immunize.options import option, parse_options, required
from hf_immunize.records import atomic_write

RUN_FILE = "run.yaml"
_SIDES = ("primary", "harmful", "benign")


@dataclass
class InitOptions:
    """The model and its data."""

    model: str = required("Folder (save_pretrained) or Hub id of the model: a classifier, a backbone without a head, "
                          "or a "
                          "diffusers pipeline.")
    primary: str = required("What the model has to stay good at: folder with a sub-folder of images per class, table, "
                            "or Hub id; for a pipeline that reads prompts a folder of photos.")
    harmful: str = required("What it should be hard to teach the model: the same kinds of source.")
    benign: str | None = option(None, "A harmless task that should stay easy to teach: the same kinds of source.")
    revision: str | None = option(None, "Branch, tag or commit of a model on the Hub.")
    primary_labels: str | None = option(None, "Classes of the primary source, by name or number; all by default.")
    harmful_labels: str | None = option(None, "Classes of the harmful source.")
    benign_labels: str | None = option(None, "Classes of the benign source.")
    primary_split: str | None = option(None, "Split of the primary source; train by default.")
    harmful_split: str | None = option(None, "Split of the harmful source.")
    benign_split: str | None = option(None, "Split of the benign source.")
    primary_config: str | None = option(None, "Configuration name of the primary source.")
    harmful_config: str | None = option(None, "Configuration name of the harmful source.")
    benign_config: str | None = option(None, "Configuration name of the benign source.")
    primary_prompt: str | None = option(None, "Pipelines: prompt of the primary photos.")
    harmful_prompt: str | None = option(None, "Pipelines: prompt of the harmful photos.")
    benign_prompt: str | None = option(None, "Pipelines: prompt of the benign photos.")
    protocol: str | None = option(None, f"Preset exam: {', '.join(PROTOCOLS)}; for pipelines "
                                  f"{', '.join(DIFFUSION_PROTOCOLS)}. The first by default.")
    overwrite: bool = option(False, "Replace a run file that is there.")


def init_run(folder: str | Path, options: InitOptions) -> Path:
    """Write ``folder/run.yaml``, say what was seen, and return its path.

    Raises:
        RunMismatchError: a run file is there already.
        ModelError, DataError, ConfigError: a model or data that cannot be read or do not go together.
    """
    import torch

    from hf_immunize.stages.start import hush
    from hf_immunize.stages.workflow.depth import find_profile
    from hf_immunize.stages.workflow.draft import Draft
    from hf_immunize.stages.workflow.draft_classifier import draft_classifier, folder_or_id
    from hf_immunize.stages.workflow.draft_pipeline import draft_pipeline, is_pipeline

    hush()
    file = Path(folder) / RUN_FILE
    if file.exists() and not options.overwrite:
        raise RunMismatchError(f"expected no {RUN_FILE} in {folder}, got one: choose another folder, or pass "
                               "--overwrite.")
    model = folder_or_id(options.model)
    pipeline = is_pipeline(model)
    if not pipeline and (given := [f"{side}_prompt" for side in _SIDES if getattr(options, f"{side}_prompt")]):
        raise ConfigError(f"expected no {given[0]} for an image classifier, got one: prompts are for pipelines.")
    presets = DIFFUSION_PROTOCOLS if pipeline else PROTOCOLS
    protocol = options.protocol or next(iter(presets))
    if protocol not in presets:
        raise ConfigError(f"expected a protocol in {list(presets)} for this model, got {protocol!r}.")
    draft, named = Draft(), shlex.quote(str(file))
    draft.say("The whole main job, written by hf-immunize init; each option is explained by hf-immunize STAGE --help.",
              f"    hf-immunize plan {named}    # checks it without training",
              f"    hf-immunize run {named}     # runs it, or goes on where it stopped",
              "Results lie beside this file. Stages: pretrain or base, immunize, attack, certify, report.")
    jobs = 1 if torch.cuda.is_available() else min(2, os.cpu_count() or 1)
    draft.option("jobs", jobs, "stages side by side; they share the machine's cores", indent=0)
    draft.offer("hardware", "gpu-2.yaml", "option file of accelerate launch, for stages that train", indent=0)
    task = _task(options, folder_or_id)
    if pipeline:
        seen = draft_pipeline(draft, model, task, protocol, options.revision)
    else:
        seen = draft_classifier(draft, model, task, protocol, options.revision, find_profile(folder))
    atomic_write(file, draft.text().encode())
    print("\n".join(seen))
    told = f", {draft.checks} lines marked CHECK to look at" if draft.checks else ""
    print(f"{file}: written{told}. Next: hf-immunize plan {named}")
    return file


def _task(options: InitOptions, place: Any) -> dict[str, Any]:
    """The options of the data that were given, by the names that a task has for them."""
    found: dict[str, Any] = {}
    for side in _SIDES:
        source = getattr(options, side)
        if source is not None:
            found[f"{side}_dataset"] = place(source)
        for name in ("labels", "split", "config", "prompt"):
            value = getattr(options, f"{side}_{name}")
            if value is not None:
                found[f"{side}_{name}"] = value
    return found


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """The verb on words of a command line: the folder first, or anywhere among the options."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-"):
        folder, words = words[0], words[1:]
    elif words and set(words) & {"-h", "--help"}:
        folder = ""
    else:
        raise ConfigError("expected a folder first, as in hf-immunize init DIR --model M --primary A --harmful B, "
                          "got none.")
    (options,) = parse_options((InitOptions,), words, __doc__, f"{prog or 'hf-immunize init'} DIR")
    init_run(folder, options)

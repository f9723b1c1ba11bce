"""The run file of a classifier: from a look at its config and head, and at the classes of the data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification

from hf_immunize.data import (
    HARMFUL_SPLITS,
    PROBE_SPLIT,
    TaskArguments,
    id2label_of,
    names_classes,
    output_names,
    plain_name,
)
from hf_immunize.errors import ModelError
from hf_immunize.exam import PROTOCOLS
from hf_immunize.features import find_classifier
from hf_immunize.models import label_maps, load_processor, refuse_folder
from hf_immunize.records import DepthProfile
from hf_immunize.stages.checks.rows import Side, read_side, refuse_one_task
from hf_immunize.stages.dry_run import image_shape
from hf_immunize.stages.workflow.depth import is_of, proposed_options
from hf_immunize.stages.workflow.draft import MARK, Draft
from hf_immunize.training.vision.held import LARGE

_MOST_ROWS = 128


@dataclass(frozen=True)
class Seen:
    """A classifier as far as its config tells.

    Args:
        model: on the meta device, with as many outputs as the primary task has classes.
        own_labels: what its own config calls its outputs; None where it has no head of its own.
        image: channels, height and width.
        head: name of the linear head.
    """

    model: nn.Module
    own_labels: dict[int, str] | None
    image: tuple[int, int, int]
    head: str

    @property
    def parameters(self) -> int:
        """How many numbers the model has."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def look_at(source: str, names: Sequence[str], revision: str | None = None) -> Seen:
    """A classifier by its config and processor. Raises ModelError for what is none."""
    refuse_folder(source)
    processor = load_processor(source)
    try:
        told = {"revision": revision} if revision else {}
        own = AutoConfig.from_pretrained(source, **told)
        config = AutoConfig.from_pretrained(source, **label_maps(names), **told)
        with torch.device("meta"):
            model = AutoModelForImageClassification.from_config(config)
    except Exception as error:  # transformers and the hub raise many unrelated classes for what cannot be read
        raise ModelError(
            f"expected the config of an image model that transformers can put a classifier on in {source}, got "
            f"{type(error).__name__}: {error}: check the path, or see hf_immunize.add_head for other backbones."
        ) from error
    headed = any("ForImageClassification" in str(kind) for kind in own.architectures or [])
    return Seen(model, id2label_of(own) if headed else None, image_shape(processor), find_classifier(model))


def draft_classifier(
    draft: Draft, source: str, task: dict[str, Any], protocol: str, revision: str | None,
    profile: DepthProfile | None = None,
) -> list[str]:
    """Write everything below the head of the file; return what was seen, in words.

    Args:
        profile: what was measured of the model before, where that is there; one of another model is not used.

    Raises:
        DataError: data that cannot be read.
        ModelError: a model that cannot be read.
    """
    arguments = TaskArguments(**task)
    refuse_one_task(arguments)
    names = ("primary", "harmful", *(("benign",) if arguments.benign_dataset else ()))
    sides = {name: read_side(arguments, name) for name in names}
    seen = look_at(source, sides["primary"].names, revision)
    _task(draft, task, sides)
    _base(draft, source, seen, sides["primary"], revision)
    used = profile is not None and is_of(profile, source)
    if profile is not None and not used:
        draft.say(f"{MARK}: the profile.json here speaks of another model ({profile.model.name}) and is not used.")
        draft.checks += 1
    _immunize(draft, seen, sides["harmful"], profile if used else None)
    _exam(draft, protocol, "benign" in sides)
    told = [f"profile: {profile.proposal.told}"] if profile is not None and used else []
    told += [f"model: {type(seen.model).__name__}, {seen.parameters / 1e6:.2f} million parameters, images of "
            f"{'x'.join(map(str, seen.image))}, head {seen.head}"]
    return told + [f"{name}: {len(side.chosen)} images of {len(side.names)} classes" for name, side in sides.items()]


_PROBED, _MOST_PROBED, _PROBED_ROWS, _LEAST_PROBED_ROWS = 0.05, 0.15, 6, 4
"""Share of the harmful rows by which training is judged, at least and at most; how many of a class these are to be,
about, and how many they have to be."""
_PROBED_IN_ALL, _LEAST_IN_ALL = 50, 40
"""How many these are to be of all classes together, and have to be: half of them fits a probe, half judges it."""


def _task(draft: Draft, task: dict[str, Any], sides: dict[str, Side]) -> None:
    draft.section("task", "What the model has to stay good at, what should be hard to teach it, what should stay easy.")
    for name, side in sides.items():
        shown = ", ".join(side.names[:6]) + (", …" if len(side.names) > 6 else "")
        draft.option(f"{name}_dataset", task[f"{name}_dataset"], f"{len(side.chosen)} images, {len(side.names)} "
                                                                 "classes: "
                     f"{shown}")
        for option in ("config", "split", "labels"):
            if task.get(f"{name}_{option}") is not None:
                draft.option(f"{name}_{option}", task[f"{name}_{option}"])
        splits, counts = len(side.fractions), Counter(side.labels)
        if rare := sum(count < splits for count in counts.values()):
            told = f"{rare} classes of the {name} data have fewer images than {splits} splits; this leaves them out"
            draft.option("drop_rare_classes", True, check=told)
    if (held_out := splits_with_probe(sides["harmful"])) is not None:
        draft.option("harmful_splits", held_out, "probe: rows of the defender's that are not trained on, by which "
                     "training says whether it worked")
    draft.offer("group_near_duplicates", True, "keep resized or mirrored copies of an image in one split")


def splits_with_probe(harmful: Side) -> str | None:
    """The default splits with a part of the defender's rows held out; None where that leaves too few to tell by."""
    shares, least = dict(HARMFUL_SPLITS), min(Counter(harmful.labels).values())
    rows = len(harmful.labels)
    probed = round(min(max(_PROBED, _PROBED_ROWS / least, _PROBED_IN_ALL / rows), _MOST_PROBED), 3)
    if least * probed < _LEAST_PROBED_ROWS or rows * probed < _LEAST_IN_ALL:
        return None
    shares = {"defense": round(shares.pop("defense") - probed, 4), PROBE_SPLIT: probed, **shares}
    return ",".join(f"{name}={share:g}" for name, share in shares.items())


def _base(draft: Draft, source: str, seen: Seen, primary: Side, revision: str | None) -> None:
    """A trained model as it is, or a head trained on it first."""
    unknown = unknown_outputs(seen, primary)
    if unknown is None:
        draft.section_value("base", source, "The trained model, with an output for each class of the primary data.")
        if revision:
            draft.option("base_revision", revision, indent=0)
        if not names_classes(seen.own_labels or {}):
            draft.say(f"{MARK}: its outputs have no names; they are taken as {list(primary.names)[:8]}, in this order.")
            draft.checks += 1
        return
    reason = ["The model has no head for the classes of the primary data: one is trained on frozen features."]
    if unknown:
        reason = [f"{MARK}: the model's own head does not fit ({unknown}), so a new one is trained. If it is the one",
                  f"you mean, name the classes as it does and write 'base: {source}' in place of this section."]
        draft.checks += 1
    draft.section("pretrain", *reason)
    for name, (value, about) in head_options(source, seen).items():
        draft.option(name, value, about)


def unknown_outputs(seen: Seen, primary: Side) -> str | None:
    """Why the model's own head does not do, None where it does; empty text where there is none."""
    if seen.own_labels is None:
        return ""
    if names_classes(seen.own_labels):
        outputs = list(output_names(seen.own_labels))
        known = {plain_name(name) for name in outputs}
        missing = [name for name in primary.names if plain_name(name) not in known]
        return f"no output called {missing[0]!r}, it knows {outputs[:3]}" if missing else None
    found, wanted = len(seen.own_labels), len(primary.names)
    return None if found == wanted else f"{found} outputs for {wanted} classes"


def _immunize(draft: Draft, seen: Seen, harmful: Side, profile: DepthProfile | None) -> None:
    """The options of the closed-form adversary, each with what it means."""
    draft.section("immunize", "One entry for each immunized model; add others, e.g. with objective: condition_number.")
    draft.section("closed_form_adversary", indent=1)
    for name, (value, about) in immunizing_options(seen, harmful, profile).items():
        draft.option(name, value, about, indent=2)


def immunizing_options(
    seen: Seen, harmful: Side, profile: DepthProfile | None = None
) -> dict[str, tuple[Any, str]]:
    """Value and meaning of the options to immunize with: those of the recipes, by the size of the model.

    A profile decides which part is trained and where it is measured.
    """
    defence = len(harmful.chosen) * harmful.fractions["defense"]
    rows = max(2 * len(harmful.names), min(_MOST_ROWS, int(defence)))
    options: dict[str, tuple[Any, str]] = {
        "objective": ("closed_form_adversary", "others: hf-immunize immunize --help"),
        "max_primary_drop": (1.0, "points of primary accuracy that may be lost"),
    }
    if seen.parameters < LARGE:
        options["max_steps"] = (400, "more where the last line of the stage says NOT IMMUNIZED; all else are defaults")
    else:
        options |= {
            "horizon": ("30,300", "steps of the attacker's probe that is simulated: a hasty and a patient one"),
            "memorization": (0.5, "weight of what the probe knows by heart"), "weight": ("1", ""),
            "strength": (2.0, "where the guard starts; it follows max_primary_drop"),
            "primary_loss_weight": (0.0, "the base is imitated, its labels are not fitted again"),
            "distillation": (10.0, ""), "feature_distillation": (6.0, ""),
            "trainable_modules": ("last:1", "the last stage and what follows; attackers may probe before it"),
            "cache_frozen_features": (True, "the frozen part runs once per image"),
            "max_steps": (240, "more where the last line of the stage says NOT IMMUNIZED"),
            "learning_rate": (5e-4, ""), "lr_scheduler_type": ("cosine", ""), "warmup_steps": (20, ""),
            "max_grad_norm": (5.0, ""),
        }  # fmt: skip
    options |= proposed_options(profile) if profile is not None else {}
    if profile is not None and profile.proposal.trainable_modules is None:
        options = {name: told for name, told in options.items()
                   if name not in ("trainable_modules", "cache_frozen_features")}
    return options | {
        "per_device_train_batch_size": (64, ""),
        "per_device_harmful_batch_size": (rows, "two rows of every class at least"),
        "logging_steps": (50, ""), "save_steps": (200, ""), "save_total_limit": (1, ""),
    }  # fmt: skip


def head_options(source: str, seen: Seen) -> dict[str, tuple[Any, str]]:
    """Value and meaning of the options to train a head with, where a model has none for the primary classes."""
    return {
        "model_name_or_path": (source, ""), "trainable_modules": (seen.head, "the head alone"),
        "cache_frozen_features": (True, "the frozen part runs once per image"), "max_steps": (300, ""),
        "per_device_train_batch_size": (64, ""), "learning_rate": (3e-3, ""), "save_total_limit": (1, ""),
    }  # fmt: skip


def _exam(draft: Draft, protocol: str, benign: bool) -> None:
    """Attack, benign, certify and report."""
    draft.section("attack", "The exam, the same for the base and for every immunized model.")
    quick, standard, thorough = (len(PROTOCOLS[name].attacks) for name in ("quick", "standard", "thorough"))
    draft.option("protocol", protocol,
                 f"quick: {quick} attacks; standard: {standard}, hours; thorough: {thorough}, days on a GPU")
    draft.option("device", "auto", "cpu, cuda or mps")
    draft.offer("settings", ["lora.steps=200", "full_finetune.steps=200"], "change an attack: attack.field=value")
    if benign:
        draft.section("benign", "Whether a harmless task is still learned as easily as from the base.")
        draft.option("device", "auto")
    draft.section("certify", "The judge: certificate.json and a model card for each immunized model.")
    draft.option("device", "auto")
    draft.section("report", "One page with everything.")
    draft.offer("output", "report.html", "another place than the run's folder")


def folder_or_id(named: str) -> str:
    """A local source by its whole path, so that the run may be started anywhere; an id as it is."""
    path = Path(named).expanduser()
    return str(path.absolute()) if path.exists() else named

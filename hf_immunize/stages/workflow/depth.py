"""What a profile that lies beside a run says about the options of its models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from hf_immunize.certification.depth import bounds
from hf_immunize.features import block_names, trainable_modules
from hf_immunize.records import PROFILE_FILE, DepthProfile, sha256_file, weight_files
from hf_immunize.stages.checks.findings import Finding


def find_profile(folder: str | Path) -> DepthProfile | None:
    """The profile in a folder; None where there is none. Raises RecordError for one that cannot be read."""
    file = Path(folder) / PROFILE_FILE
    return DepthProfile.read(file) if file.is_file() else None


def is_of(profile: DepthProfile, model: str | Path) -> bool:
    """Whether a profile speaks of the weights in a folder, or of the model of this name on the Hub."""
    path = Path(model)
    if not path.is_dir():
        return profile.model.name == str(model)
    digests = sorted(sha256_file(file) for file in weight_files(path))
    return sorted(profile.model.weights.values()) == digests


def proposed_options(profile: DepthProfile) -> dict[str, tuple[Any, str]]:
    """Value and meaning of the options that a profile proposes; None where the whole network is trained."""
    told = profile.proposal
    modules = (told.trainable_modules, f"profile: {told.blocks} of {len(profile.blocks)} blocks")
    return {"trainable_modules": modules, "sites": (",".join(told.sites), "profile: where probes find the task")}


def depth_finding(profile: DepthProfile, model: nn.Module, name: str, patterns: str | None) -> Finding:
    """Whether the trained depth of one model leaves room for a slow-down."""
    part, target = f"depth {name}", profile.rule.target
    blocks = block_names(model)
    if blocks != profile.blocks:
        return Finding(part, "note", "profile.json speaks of a model with other blocks: make it again for this one.")
    trained = trained_blocks(blocks, trainable_modules(model, patterns) if patterns else None)
    known = bounds(profile.resets, profile.budget)
    bound = next((found for count, found in known.items() if count >= trained), None)
    if trained >= len(blocks) or bound is None:
        return Finding(part, "ok", f"{trained} of {len(blocks)} blocks are trained; {profile.proposal.told}")
    if bound[0] >= target:
        return Finding(part, "ok", f"the last {trained} of {len(blocks)} blocks are trained: room for a slow-down of "
                       f"{bound[0]:.3g} by the profile")
    proposed = profile.proposal.trainable_modules or "no trainable_modules, the whole network"
    least = "the profile's budget does not show more than" if bound[1] else "nothing more than"
    return Finding(part, "note", f"the last {trained} of {len(blocks)} blocks are trained, and whoever draws them "
                   f"anew does not feel it: {least} a slow-down of {bound[0]:.3g} can come of it under full "
                   f"fine-tuning. The profile proposes {proposed}.")


def trained_blocks(blocks: Sequence[str], modules: Sequence[str] | None) -> int:
    """How many last blocks there are from the first trained one on; all for None, which is everything."""
    if modules is None:
        return len(blocks)
    names = [f"{module}." for module in modules]
    first = next(
        (place for place, block in enumerate(blocks)
         if any(f"{block}.".startswith(name) or name.startswith(f"{block}.") for name in names)), len(blocks),
    )  # fmt: skip
    return len(blocks) - first

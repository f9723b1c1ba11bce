"""An exam whose sides lie in other files, or that is continued on another processor, is the same exam."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pipeline_builders import build_text_pipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_immunize.attacks import Run
from hf_immunize.attacks.core.shape import Result
from hf_immunize.attacks.core.suite import trace_of
from hf_immunize.attacks.diffusion import DIFFUSION_ATTACKS, DiffusionAttackContext
from hf_immunize.certification.pairing import check_same_exam
from hf_immunize.diffusion import differences, load_pipeline
from hf_immunize.diffusion.encoding import encode, encode_prompt
from hf_immunize.errors import IncompleteExamError
from hf_immunize.records import AttackTrace, Provenance

NAMES = {"diffusion_other_prompts": "other", "diffusion_placeholder_token": "placeholder",
         "diffusion_generic_prompt": "generic"}
WORDS = {"other": "a portrait of sks", "placeholder": "a photo of ohwx", "generic": "a photo"}


def shifted(path: Path) -> None:
    """The same tensors 8, 24, … bytes further on in the file: mapped into memory, they lie elsewhere."""
    with safe_open(path, "pt") as held:
        metadata = held.metadata() or {}
    size, tensors = path.stat().st_size, load_file(path)
    for length in range(1, 20):
        save_file(tensors, path, metadata | {"note": "x" * length})
        if (path.stat().st_size - size) % 16 == 8:
            return
    raise AssertionError("no header of that length")


def nudged(path: Path) -> None:
    """Every weight one unit in the last place further from zero: what is computed with them rounds elsewhere."""
    with safe_open(path, "pt") as held:
        metadata = held.metadata()
    save_file({name: value * (1 + torch.finfo(value.dtype).eps) for name, value in load_file(path).items()}, path,
              metadata)


def context_of(folder: Path, role: str) -> DiffusionAttackContext:
    pipeline = load_pipeline(folder)
    pixels = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    rows = encode(pipeline, pixels, "a photo of sks dog", 0, ["dog"])
    splits = {name: rows.subset(torch.tensor(held))
              for name, held in (("attack", (0, 1, 2)), ("validation", (3,)), ("test", (4, 5)))}
    prints = tuple(split.fingerprint(source="random", role=name) for name, split in splits.items())
    told = {name: encode_prompt(pipeline, prompt, 16) for name, prompt in WORDS.items()}
    return DiffusionAttackContext(folder, role, data=prints, exam_levels=1, **splits, **told)


def trace(context: DiffusionAttackContext, name: str) -> AttackTrace:
    """What a run that was not made says about the exam."""
    attack = DIFFUSION_ATTACKS[name]
    nothing = Result([], 1, 0.0, "diverged", "not run")
    return trace_of(context, name, attack, Run(attack.config(1e-2), "x", 0), nothing, Provenance.here("cpu"))


@pytest.mark.parametrize("moved", [shifted, nudged])
def test_what_an_attacker_holds_is_known_by_its_prompts_however_encoders_round(moved, tmp_path):
    build_text_pipeline("StableDiffusionXLPipeline").save_pretrained(tmp_path / "base")
    shutil.copytree(tmp_path / "base", tmp_path / "model")
    for path in (tmp_path / "model").glob("text_encoder*/*.safetensors"):
        moved(path)
    control, subject = context_of(tmp_path / "base", "control"), context_of(tmp_path / "model", "subject")
    same_weights = not differences(subject.pipeline, control.pipeline)
    assert same_weights == (moved is shifted)
    if moved is nudged:
        assert any(not torch.equal(value, subject.other[name]) for name, value in control.other.items())
    for name, need in NAMES.items():
        mine, theirs = trace(subject, name), trace(control, name)
        assert len(mine.config[need]) == 64
        check_same_exam(name, [mine], [theirs], "control")
    assert len({control.holding(need) for need in WORDS}) == len(WORDS)
    renamed = replace(subject, other=encode_prompt(subject.pipeline, "a photo of x", 16))
    name = "diffusion_other_prompts"
    with pytest.raises(IncompleteExamError, match="the same exam on subject and control, got another config"):
        check_same_exam(name, [trace(renamed, name)], [trace(control, name)], "control")

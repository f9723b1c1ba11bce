"""A tiny exam of two random pipelines on random images: real runs, which mean nothing."""

from __future__ import annotations

import diffusers
from denoiser_builders import build_denoiser, build_examples, build_scheduler

from hf_immunize.attacks import run_suite
from hf_immunize.attacks.diffusion import DIFFUSION_ATTACKS, DIFFUSION_TRAINABILITY, DiffusionAttackContext
from hf_immunize.certification import Protocol
from hf_immunize.certification.diffusion import ConceptExam
from hf_immunize.diffusion import LatentDataset
from hf_immunize.exam import DIFFUSION_RULE

ATTACK = {"steps": (8,), "learning_rate": (1e-2,), "batch_size": (6,)}
PROTOCOL = Protocol(
    attacks=("diffusion_full_finetune", "diffusion_lora"), seeds=(0, 1), rule=DIFFUSION_RULE, name="custom"
)
SIZES = {"attack": 8, "validation": 4, "test": 4}


def images(rows: int, seed: int, label: int) -> LatentDataset:
    """Random rows that go by what they are made from, as encoded images do: another processor rounds them otherwise."""
    made = build_examples("unet", rows, seed=seed, label=label)
    made.digests = [f"label {label}, seed {seed}, row {row}" for row in range(rows)]
    return made


def concept(label: int) -> dict:
    return {name: images(rows, 10 * label + place, label) for place, (name, rows) in enumerate(SIZES.items())}


def prints(splits: dict, side: str) -> tuple:
    return tuple(held.fingerprint(source="random", role=f"{side} {name}") for name, held in splits.items())


def sit(folder, role, names=("diffusion_full_finetune",), label=9, table=DIFFUSION_ATTACKS):
    splits = concept(label)
    context = DiffusionAttackContext(
        folder, role, data=prints(splits, "harmful"), exam_levels=2, pictures=2, **splits
    )
    run_suite(context, table, list(names), (0, 1), folder, dict.fromkeys(names, ATTACK))


def sit_concepts(root):
    """A base and a subject of other weights, attacked; random weights, so that no verdict means anything."""
    for seed, (name, role) in enumerate({"base": "control", "subject": "subject"}.items()):
        folder = root / name
        made = diffusers.ConsistencyModelPipeline(build_denoiser("unet", seed), build_scheduler("unet"))
        made.save_pretrained(folder)
        sit(folder, role)
        sit(folder, role, ("benign_diffusion_full_finetune",), 8, DIFFUSION_TRAINABILITY)
    retain = build_examples("unet", 12, seed=5)
    exam = ConceptExam(
        retain, concept(9)["test"], (retain.fingerprint(source="random", role="retain test"),),
        prints(concept(9), "harmful"), prints(concept(8), "benign"), draw_steps=2,
    )
    return root, exam


class Concepts:
    """The task behind the exam: concept 9 is harmful, concept 8 benign; the other way round when turned."""

    source, label_names, sides = "random", ["9"], ("retain", "harmful", "benign")

    def __init__(self, exam, turned=False):
        self.rows = {"harmful": concept(8 if turned else 9), "benign": concept(9 if turned else 8)}

    def examples(self, side, split):
        return self.rows[side][split]

    def fingerprint(self, side, split):
        return self.rows[side][split].fingerprint(source="random", role=f"{side} {split}")

    def attacker_knows(self, side):
        return {}

"""What an exam asks for and what was run of it, as it lies in a certificate."""

from __future__ import annotations

from typing import Literal

from pydantic import JsonValue

from hf_immunize.records.base import Part


class Plugin(Part):
    """Code that is no part of this package: who registered an attack, and what it was."""

    name: str
    """The distribution with its version, or the module or file where there is none."""
    sha256: str
    """Over its Python source."""


class PlannedAttack(Part):
    """One attack of an exam, or one method by which a benign task is learned: what it is, and what was run of it."""

    attack: str
    family: str
    unit: Literal["step", "solve"]
    seeds: list[int] = []
    """Seeds of the runs on the model under test; empty where none was made."""
    trials: list[str] = []
    """Names of its hyperparameter trials."""
    tuning_seeds: list[int] = []
    """Seeds on which trials were compared before the best ones were run on all; empty: every trial on every seed."""
    budget: int = 0
    plugin: Plugin | None = None
    """Where the attack is not one of this package: whose it is."""


class Plan(Part):
    """What the exam asks for, as its preset says, and what was run."""

    protocol: str
    planned: list[str]
    """Every attack that the preset has."""
    seeds: list[int]
    settings: list[str]
    """Settings of the preset that differ from the attacks' own defaults."""
    trials: int | None = None
    """Trials of each attack that trains the network; null: its whole grid."""
    tuning_seeds: int | None = None
    trainability: list[str] = []
    """Methods by which the benign task is learned."""
    threshold: float | None = None
    """Harmful score that counts as success where it was given by hand; null: by the rule."""
    attacks: list[PlannedAttack] = []
    """Every attack that is planned or was run on any side."""
    methods: list[PlannedAttack] = []
    """The same for the benign task."""
    means: dict[str, JsonValue] = {}
    """What attackers who train networks computed with, where it was not float32 in whole batches: precision,
    micro_batch_size, gradient_checkpointing."""
    references: list[PlannedAttack] = []
    """Attackers without the model that were run."""

"""Traces with chosen curves, for tests of metrics and verdicts. No model was attacked for them."""

from __future__ import annotations

from hf_immunize.records import AttackTrace, DatasetFingerprint, Evaluation, ModelFingerprint, Provenance

MODEL = ModelFingerprint(name="toy", architecture="ViT", parameters=10, weights={"model.safetensors": "a" * 64})
PROVENANCE = Provenance(
    created="2026-01-02T03:04:05+00:00", python="3.11", versions={}, git_revision=None, git_dirty=None, device="cpu"
)
GRID = (
    1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 19, 24, 30, 38, 48, 60, 75, 94, 118, 148, 185, 231, 289, 361, 451, 564, 705, 1000
)


def data(rows: int = 200) -> list[DatasetFingerprint]:
    return [
        DatasetFingerprint(source="toy", role=f"harmful {role}", rows=rows, classes={}, sha256=letter * 64)
        for role, letter in (("attack", "d"), ("validation", "e"), ("test", "f"))
    ]


def trace(points, **changes) -> AttackTrace:
    """``points``: (step, validation, test) triples, or (step, accuracy) pairs used for both splits."""
    curve = [Evaluation(step=point[0], validation=point[1], test=point[-1]) for point in points]
    fields = dict(
        attack="lora", family="LoRA", trial="learning_rate=0.1", config={"learning_rate": 0.1, "rank": 8}, seed=0,
        role="subject", model=MODEL, data=data(), unit="step", budget=1000, curve=curve, outcome="completed",
        seconds=1.0, provenance=PROVENANCE,
    )
    fields |= changes
    if fields["outcome"] != "completed":
        fields.setdefault("note", "not finite")
    return AttackTrace(**fields)


def reaching(steps: float, *, low: float = 0.2, high: float = 0.9, **changes) -> AttackTrace:
    """A curve that jumps from ``low`` to ``high`` at ``steps`` (first evaluation at or after it)."""
    return trace([(step, high if step >= steps else low) for step in GRID], **changes)


def side_of(role: str, steps, *, trial: str = "learning_rate=0.1", **changes) -> list[AttackTrace]:
    """One trial with a run per seed; a step count of None is never reached."""
    return [
        reaching(step if step is not None else 10**9, role=role, seed=seed, trial=trial, **changes)
        for seed, step in enumerate(steps)
    ]

"""What a full certification would have to cover; a certificate names every line it does not."""

from __future__ import annotations

from collections.abc import Sequence

from hf_immunize.records import AttackTrace

_FAMILIES_MISSING = {
    "other PEFT": "other parameter-efficient fine-tuning than LoRA (DoRA, LoHa, LoKr, OFT, IA3)",
    "second-order fine-tuning": "second-order and preconditioned fine-tuning of the network (K-FAC-like, Muon-like)",
    "structural": "structural attackers: earlier layers, re-initialised last blocks, re-estimated BatchNorm",
    "data": "data attackers: few-shot, label noise, other augmentation",
    "benign trainability": "benign trainability: a third task fine-tunes as well as on the base",
}
_NEVER = (
    "subtracting the weight difference to a public base (an attacker who has the base needs no immunized model)",
    "distillation into a fresh copy of the architecture",
    "other images of the concept, and data mixed with benign data",
)


def lines_not_run(traces: Sequence[AttackTrace], planned: Sequence[str]) -> list[str]:
    """Lines of a full certification that these traces do not cover, in plain words."""
    seeds = {trace.seed for trace in traces}
    families = {trace.family for trace in traces}
    lines = []
    if len(seeds) < 5:
        lines.append(f"at least 5 attack seeds (here {len(seeds)})")
    ranks = {trace.config.get("rank") for trace in traces if trace.attack == "lora"}
    if len(ranks) < 2:
        lines.append("LoRA at several ranks")
    for attack in sorted({trace.attack for trace in traces}):
        rates = [trace.config.get("learning_rate") for trace in traces if trace.attack == attack]
        numbers = [rate for rate in rates if isinstance(rate, int | float) and rate > 0]
        if numbers and max(numbers) < 999 * min(numbers):
            lines.append(f"a learning-rate sweep over at least three decades for {attack}")
    if not any(trace.role == "scratch" for trace in traces):
        lines.append("training from scratch as the ceiling")
    lines += [text for family, text in _FAMILIES_MISSING.items() if family not in families]
    schedules = {
        (trace.config.get("scheduler"), trace.config.get("warmup_steps"), trace.config.get("weight_decay"))
        for trace in traces
        if "scheduler" in trace.config
    }
    if len(schedules) < 2:
        lines.append("schedules, warm-up, weight decay and batch sizes other than one setting each")
    lines += _NEVER
    lines += [f"planned attack {name}" for name in planned if name not in {trace.attack for trace in traces}]
    return lines

"""Trials that a search proposes after the drawn ones: Optuna's TPE, asked in batches from finished traces.

The traces are the study. It is built anew from them for every batch, with a fixed seed, so that a killed search goes on
where it was, any number of processes asks for the same trials, and whoever judges can ask again. Hopeless trials are
pruned by Optuna's median rule, whose medians are worked out beforehand and lie in each trace.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from statistics import median
from typing import Any

from hf_immunize.errors import ImmunizeError, IncompleteExamError
from hf_immunize.exam.keeps import by_trial, held_by, learning_areas
from hf_immunize.exam.presets import grown_name
from hf_immunize.records import AttackTrace, Search

PROPOSED = "proposed"
"""In a trace's config: the how-manieth trial that the search proposed it is."""
_ASKS = 50
"""Asks of a batch before fewer than wanted are taken: small spaces may hold no more."""


@dataclass(frozen=True)
class Proposal:
    """One trial that the search proposes."""

    name: str
    values: tuple[tuple[str, Any], ...]
    number: int
    bars: tuple[tuple[int, float], ...]
    """Steps, and the validation score below which a run is given up there."""


def proposed(trace: AttackTrace) -> int:
    """The how-manieth proposal a run is; 0 for one that was drawn beforehand."""
    found = trace.config.get(PROPOSED, 0)
    return found if isinstance(found, int) else 0


def propose(traces: Sequence[AttackTrace], search: Search) -> list[Proposal]:
    """The next batch; empty where all were made, where trials are not compared on some seeds first, or nothing varies.

    Args:
        traces: one side's runs of an attack with one budget on which trials are compared, without those beyond a range.
    """
    made = len({trace.trial for trace in traces if proposed(trace)})
    drawn = [trace for trace in traces if not proposed(trace)]
    space = _space(drawn)
    wanted = min(search.batch, search.further - made)
    if wanted <= 0 or not space or not drawn[0].config.get("tuning_seeds"):
        return []
    first, known, bars = drawn[0], {trace.trial for trace in traces}, _bars(drawn)
    found: list[Proposal] = []
    study = _study(traces, space, made)
    for _ in range(_ASKS):
        asked = study.ask(space).params
        values = {name: float(f"{value:.3g}") if isinstance(value, float) else value for name, value in asked.items()}
        name = _name(first, values)
        if name not in known:
            known.add(name)
            found.append(Proposal(name, tuple(values.items()), made + len(found) + 1, bars))
        if len(found) == wanted:
            break
    return found


def check_proposals(traces: Sequence[AttackTrace], search: Search) -> None:
    """Raise IncompleteExamError unless a side's proposed trials are those that the search gives.

    Where they were made with another release of Optuna or NumPy, or none is at hand, their number alone is checked.
    """
    told = sorted({(proposed(trace), trace.trial) for trace in traces if proposed(trace)})
    known = [trace for trace in traces if not proposed(trace)]
    if not known or not known[0].config.get("tuning_seeds") or not any(trace.curve for trace in known):
        return
    if not _same_releases(traces):
        if told and [number for number, _ in told] != list(range(1, len(told) + 1)):
            raise _others(traces[0], "numbered from 1 on")
        return
    while batch := propose(known, search):
        names = [(one.number, one.name) for one in batch]
        if missing := [name for name in names if name not in told]:
            raise _others(traces[0], f"called {missing[0][1]}")
        known += [trace for trace in traces if (proposed(trace), trace.trial) in names]
    if extra := [name for number, name in told if number > len({trace.trial for trace in known if proposed(trace)})]:
        raise _others(traces[0], f"other than {extra[0]}")


def _others(trace: AttackTrace, what: str) -> IncompleteExamError:
    return IncompleteExamError(
        f"expected trials of {trace.attack} on the {trace.role} {what}, as the search proposes from the runs before, "
        "got others: run hf-immunize attack again with the same options; it makes only what is missing."
    )


def _same_releases(traces: Sequence[AttackTrace]) -> bool:
    """Whether proposals can be asked for again as they were: the same Optuna and NumPy."""
    try:
        here = {name: metadata.version(name) for name in ("optuna", "numpy")}
    except metadata.PackageNotFoundError:
        return False
    return all(trace.provenance.versions.get(name) == version for trace in traces for name, version in here.items())


def _space(drawn: Sequence[AttackTrace]) -> dict[str, Any]:
    """What varies between the drawn trials: rates anywhere between the extremes, other settings as they were drawn."""
    optuna = _optuna()
    space: dict[str, Any] = {}
    for name in (part.split("=")[0] for part in drawn[0].trial.split(",") if "=" in part):
        values: list[Any] = sorted({trace.config[name] for trace in drawn if name in trace.config}, key=lambda value: (
            isinstance(value, str), value))
        if len(values) < 2 or name == "steps":
            continue
        if name == "learning_rate" and values[0] > 0:
            space[name] = optuna.distributions.FloatDistribution(values[0], values[-1], log=True)
        else:
            space[name] = optuna.distributions.CategoricalDistribution(values)
    return space


def _study(traces: Sequence[AttackTrace], space: Mapping[str, Any], made: int) -> Any:
    """A study that knows every finished trial by how fast it learned."""
    optuna = _optuna()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # multivariate, constant_liar
        sampler = optuna.samplers.TPESampler(seed=made, n_startup_trials=0, multivariate=True, constant_liar=True)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    areas = learning_areas(traces)
    worst = min((area for area in areas.values() if area > float("-inf")), default=0.0)
    for name, runs in sorted(by_trial(traces).items()):
        study.add_trial(optuna.trial.create_trial(
            params={field: runs[0].config[field] for field in space}, distributions=dict(space),
            value=max(areas[name], worst - 1.0),  # a trial without any evaluation is worse than the worst
        ))
    return study


def _bars(drawn: Sequence[AttackTrace]) -> tuple[tuple[int, float], ...]:
    """At each evaluation from a quarter of the budget on, the median of what the drawn runs hold there."""
    steps = sorted({point.step for trace in drawn for point in trace.curve})
    late = [step for step in steps if 4 * step >= drawn[0].budget and step < drawn[0].budget]
    bars = []
    for step in late:
        held = [score for trace in drawn if (score := held_by(trace, step)) is not None]
        bars.append((step, round(median(held), 6)))
    return tuple(bars)


def _name(first: AttackTrace, values: Mapping[str, Any]) -> str:
    """The name of a trial with these values, every other setting being that of ``first``."""
    fields = [part.split("=")[0] for part in first.trial.split(",")]
    grown = first.trial.endswith(f"steps={first.budget}") and fields[-1] == "steps"
    told = [f"{name}={_text(values.get(name, first.config.get(name)))}" for name in fields[: len(fields) - grown]]
    return grown_name(",".join(told), first.budget) if grown else ",".join(told)


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _optuna() -> Any:
    """The library, quiet."""
    try:
        import optuna
    except ImportError as error:
        raise ImmunizeError(
            "expected optuna for an exam whose search proposes trials, got no such package: pip install optuna, or "
            "pass --adapt false for an exam of the drawn trials alone."
        ) from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna

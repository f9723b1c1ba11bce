"""A model card drawn from the certificate: it states evidence, it does not make any."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hf_immunize.errors import ConfigError
from hf_immunize.hub.demands import code_in, is_configuration
from hf_immunize.hub.findings import Findings
from hf_immunize.hub.inventory import scan
from hf_immunize.hub.levels import Trust, speakers_line
from hf_immunize.hub.library import ADAPTER_FILE, LOADERS, PIPELINE_FILE, Library, library_of
from hf_immunize.hub.markdown import Safe, code, listed, prose
from hf_immunize.hub.names import CERTIFICATE, IMMUNIZATION, problem_with
from hf_immunize.hub.trust import claimed
from hf_immunize.records import Cell, Certificate, DatasetFingerprint, ImmunizationRecord, Interval, atomic_write
from hf_immunize.report import curve_pictures, frechet_words, gap_rows, picture_names, text
from hf_immunize.report.text import clean

_UNTRIED = ("NOT RUN", "NOT APPLICABLE")
FAILURES_FIRST = ("FAILS", "INCONCLUSIVE", "NOT RUN", "NOT APPLICABLE", "NOTHING TO PROTECT", "RESISTS")


@dataclass(frozen=True)
class CardOptions:
    """What the records do not know. Nothing here is guessed: what is left out stays out of the metadata."""

    repo_id: str | None = None
    """Where the model will be published, ``owner/name``; the loading snippet shows it."""
    base_model: str | None = None
    """Hub id of the base; taken from the certificate when the name there is one."""
    datasets: Sequence[str] | None = None
    """Hub ids of the data; taken from the certificate where the sources there are Hub ids."""
    license: str | None = None
    """Licence identifier of the Hub, e.g. ``apache-2.0``."""
    pipeline_tag: str | None = None
    """Task of the model on the Hub; by default that of its kind (see ``library_of``)."""


_TAG = "hf_immunize"
"""In every card of ours, by which it is told from others."""


def write_card(folder: str | Path, options: CardOptions | None = None) -> Path:
    """Write ``README.md`` beside the certificate in ``folder``, and its pictures where the traces are there.

    Raises:
        RecordError: as ``render_card``, or a trace that is not the certified one.
    """
    root = Path(folder)
    rendered = render_card(root, options)
    if (root / "traces").is_dir():
        for name, picture in curve_pictures(root).items():
            atomic_write(root / name, picture)
    card, own = root / "README.md", root / "README.original.md"
    if card.is_file() and not own.exists() and _TAG not in card.read_text(encoding="utf-8", errors="replace"):
        card.rename(own)  # somebody's own words about the model
    return atomic_write(card, rendered)


def render_card(
    folder: str | Path, options: CardOptions | None = None, speakers: Sequence[Trust] | None = None
) -> str:
    """The model card of an examined model: metadata for the Hub and a body that opens with the verdict.

    Args:
        speakers: who signed or repeated; by default what signature and rechecks in the folder say.

    Raises:
        RecordError: ``certificate.json`` is missing or not valid, or ``immunization.json`` is there and not valid.
        ConfigError: a repository id or a pipeline tag the card cannot use.
    """
    options = options or CardOptions()
    _check(options)
    root = Path(folder)
    certificate = Certificate.read(root / CERTIFICATE)
    record = root / IMMUNIZATION
    immunization = ImmunizationRecord.read(record) if record.exists() else None
    files = {name: root / name for name in configurations(certificate)}
    held = {name: path.read_bytes() for name, path in files.items() if path.is_file()}
    said = claimed(scan(root, Findings())) if speakers is None else speakers
    return compose_card(certificate, immunization, held, options, said)


def configurations(certificate: Certificate) -> list[str]:
    """Files that say what loads the model and whether that runs code, whether or not they are there."""
    names = {*certificate.files, "config.json", ADAPTER_FILE, PIPELINE_FILE}
    return sorted(name for name in names if problem_with(name) is None and is_configuration(name))


def compose_card(
    certificate: Certificate, immunization: ImmunizationRecord | None, files: Mapping[str, bytes],
    options: CardOptions, speakers: Sequence[Trust] = (),
) -> str:
    """As ``render_card``, from what was read: ``files`` holds those of ``configurations`` that are there.

    Raises:
        ConfigError: as ``render_card``.
    """
    _check(options)
    library = library_of(certificate, files)
    options = dataclasses.replace(options, pipeline_tag=options.pipeline_tag or library.tag)
    runs = [what for name, data in files.items() for what in code_in(name, data)]
    context = _context(certificate, immunization, options) | {
        "library": library, "runs": listed(runs) if runs else None, "speakers": Safe(speakers_line(speakers)),
    }
    body = _environment().get_template("card_template.md.jinja").render(**context)
    return f"---\n{_metadata(certificate, options, library).to_yaml()}\n---\n\n{body}"


def _check(options: CardOptions) -> None:
    if options.pipeline_tag not in (None, *LOADERS):
        raise ConfigError(
            f"expected a pipeline tag out of {', '.join(LOADERS)}, got {options.pipeline_tag!r}: choose one of them."
        )
    for name in ("repo_id", "base_model"):
        value = getattr(options, name)
        if value is not None and not _is_hub_id(value):
            raise ConfigError(f"expected {name} as 'owner/name' on the Hub, got {value!r}: correct it or leave it out.")


def _is_hub_id(name: str) -> bool:
    """An ``owner/name`` the Hub would accept. A bare name may as well be a description, so it does not count."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def _metadata(certificate: Certificate, options: CardOptions, library: Library) -> ModelCardData:
    base = _base_of(certificate, options)
    sources = [part.source for part in (*certificate.primary_data, *certificate.harmful_data)]
    datasets = list(options.datasets or dict.fromkeys(source for source in sources if _is_hub_id(source)))
    results = _results(certificate, options.pipeline_tag or library.tag)
    related: dict[str, Any] = {"base_model_relation": library.relation} if base else {}
    return ModelCardData(
        library_name=library.name,
        pipeline_tag=options.pipeline_tag,
        license=options.license,
        base_model=base,
        datasets=datasets or None,
        tags=["immunized", "model-immunization", _TAG],
        model_name=_line(certificate.subject.name) or "unnamed",
        eval_results=[_with_source(result, options.repo_id) for result in results],
        **related,
    )


def _base_of(certificate: Certificate, options: CardOptions) -> str | None:
    """Hub id of the base, where one is known."""
    name = certificate.control.name
    return options.base_model or (name if _is_hub_id(name) else None)


def _with_source(result: EvalResult, repo_id: str | None) -> EvalResult:
    """The figure, and where it can be checked. ``verified`` and ``verifyToken`` are left to the Hub's own evaluation
    service: only it can sign them, and filling them here would claim an evaluation that nobody else has made.
    """
    if repo_id is None:
        return result
    return dataclasses.replace(
        result,
        source_name="certificate.json, checked by hf-immunize verify",
        source_url=f"https://huggingface.co/{repo_id}/blob/main/certificate.json",
    )


def _line(name: str) -> str:
    return " ".join(clean(name).split())


def _results(certificate: Certificate, task: str) -> list[EvalResult]:
    """Primary metric, slow-downs, harmful accuracies and RIR; accuracies in percent, as everywhere in the card.

    A figure that was not measured is left out, not zero.
    """
    primary, harmful = _where(certificate.primary_data, task), _where(certificate.harmful_data, task)
    utility = certificate.utility
    found = [
        EvalResult(
            **primary, metric_type=_line(utility.metric), metric_name="Primary metric, percent",
            metric_value=utility.immunized, metric_args={"base": utility.base, "drop": utility.drop.model_dump()},
        )
    ]
    for cell in certificate.cells:
        about = {"attack": cell.attack, "family": cell.family, "verdict": cell.verdict, "seeds": len(cell.seeds)}
        figure = _slow_down(cell.slow_down)
        if cell.unit == "step" and figure is not None:
            kind, value = figure
            found.append(EvalResult(
                **harmful, metric_type="slow_down", metric_name=_line(f"Slow-down under {cell.attack}{kind}"),
                metric_value=value, metric_args=about | {"interval": cell.slow_down.model_dump()},
            ))
        accuracy = text.accuracy(cell.subject)
        if accuracy is not None:
            found.append(EvalResult(
                **harmful, metric_type=_line(certificate.harmful_metric),
                metric_name=_line(f"Harmful {certificate.harmful_metric} after {cell.attack}, percent"),
                metric_value=100 * accuracy, metric_args=about | {"base": _percent(text.accuracy(cell.control))},
            ))
    if certificate.immunization_ratio is not None:
        found.append(EvalResult(
            **harmful, metric_type="immunization_ratio", metric_value=certificate.immunization_ratio,
            metric_name="Relative immunization ratio (explains, does not certify)",
        ))
    return found


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _slow_down(interval: Interval) -> tuple[str, float] | None:
    """The estimate, or the lower bound where censored runs left only that; None where there is no figure."""
    if interval.estimate is not None:
        return "", interval.estimate
    return None if interval.low is None else (", lower bound", interval.low)


def _where(data: Sequence[DatasetFingerprint], task: str) -> dict[str, Any]:
    """Task and dataset of an evaluation; the split is the one whose role says test, when there is one."""
    tested = [part for part in data if "test" in part.role] or list(data)
    name = (_line(tested[-1].source) if tested else "") or "not named"
    kind = name if _is_hub_id(name) else "".join(letter if letter.isalnum() else "-" for letter in name.lower())
    return {"task_type": task, "dataset_name": name, "dataset_type": kind}


def _context(
    certificate: Certificate, immunization: ImmunizationRecord | None, options: CardOptions
) -> dict[str, Any]:
    cells = sorted(certificate.cells, key=lambda cell: FAILURES_FIRST.index(cell.verdict))
    return {
        "certificate": certificate,
        "immunization": immunization,
        "license": options.license,
        "rows": [_row(cell, certificate.harmful_metric) for cell in cells],
        "worst": [_row(cell, certificate.harmful_metric) for cell in cells if cell.verdict == "FAILS"],
        "resisted": listed(family.family for family in certificate.families if family.verdict == "RESISTS"),
        "families": listed(family.family for family in certificate.families if family.verdict not in _UNTRIED),
        "not_run": Safe("; ".join(prose(line) for line in certificate.not_run)),
        "guarded": _guarded(immunization),
        "drop": Safe(text.points(certificate.utility.drop, 1.0)),
        "ratio": Safe(text.ratio(certificate)) if certificate.spectra else None,
        "beside": [(item, Safe(text.points(item.drop, 1.0))) for item in certificate.further_utility],
        "gaps": gap_rows(certificate),
        "frechet": frechet_words(certificate),
        "loader": Safe(LOADERS[options.pipeline_tag or "image-classification"]),
        "repository": Safe(json.dumps(options.repo_id or "your-name/your-model")),
        "base": Safe(json.dumps(_base_of(certificate, options) or "folder-or-id-of-the-base")),
        "pictures": [(attack, Safe(name)) for attack, name in picture_names(certificate).items()],
        "data": [*certificate.primary_data, *certificate.harmful_data],
    }


def _guarded(immunization: ImmunizationRecord | None) -> Safe | None:
    """What the training guard watched, in its own metric, and how that went; None without a guard."""
    guard = None if immunization is None else immunization.guard
    if guard is None or guard.held is None or guard.allowed is None:
        return None
    held = "held" if guard.held else "did **not** hold"
    return Safe(f"{prose(guard.metric)} {held} on its own split: drop {guard.drop:+.2f}, allowed {guard.allowed:.3g}")


def _row(cell: Cell, metric: str) -> dict[str, Any]:
    measured = cell.subject is not None and cell.control is not None
    slow_down = text.slow_down(cell.slow_down) if measured and cell.unit == "step" else text.NONE
    before, after = (text.percent(text.accuracy(side)) for side in (cell.control, cell.subject))
    accuracy = f"{before} → {after}" if measured else text.NONE
    effect = f"harmful {text.clean(metric)}, base → this model: {accuracy}"
    return {
        "effect": Safe(effect if slow_down == text.NONE else f"slow-down {slow_down}, {effect}"),
        "attack": cell.attack,
        "family": cell.family,
        "verdict": Safe(f"**{cell.verdict}**" if cell.verdict == "FAILS" else cell.verdict),
        "slow_down": Safe(slow_down),
        "accuracy": Safe(accuracy),
        "budget": Safe(text.plural(cell.budget, cell.unit)),
        "reason": cell.reason,
    }


@cache
def _environment() -> Environment:
    """Markdown, so no HTML autoescape: instead every string a template prints becomes inert prose."""

    def inert(value: Any) -> Any:
        return prose(value) if isinstance(value, str) else value

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        finalize=inert,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["code"] = code
    return environment

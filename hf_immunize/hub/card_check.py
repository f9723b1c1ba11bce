"""Whether a card still says what the certificate says: its tables, quotes, opening and metadata, re-rendered."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

from hf_immunize.errors import ImmunizeError, RecordError
from hf_immunize.hub.card import CardOptions, compose_card, configurations
from hf_immunize.hub.findings import Findings
from hf_immunize.hub.inventory import Inventory
from hf_immunize.hub.levels import Trust, speakers_in
from hf_immunize.hub.names import CARD, IMMUNIZATION
from hf_immunize.hub.trust import claimed
from hf_immunize.hub.untrusted import parse_record, unique_keys
from hf_immunize.records import Certificate, ImmunizationRecord

_REPOSITORY = re.compile(r'^model_id = ("(?:[^"\\]|\\.)*")$', re.M)
_PLACEHOLDER = "your-name/your-model"
_EXAMINED = re.compile(r"^- Examined on (\d{4}-\d{2}-\d{2});", re.M)
_SECTION = "## What it is"
_LOADER = unique_keys(getattr(yaml, "CSafeLoader", yaml.SafeLoader))
_STRUCTURE = re.compile(r"[|<]|^\s*>|```|~~~|!\[|^\s*\[[^\]]*\]:|\$\$|\\[(\[]")
"""What draws a table, a quote, HTML, a picture or a link's target, or turns tables that are there into code or math."""


def split_card(source: str) -> tuple[dict[str, Any], str]:
    """Metadata and body. Raises RecordError for anything but a YAML mapping between two lines of dashes, then text."""
    parts = source.split("\n---\n", 1)
    if not source.startswith("---\n") or len(parts) != 2:
        raise RecordError("expected metadata between two '---' lines, got none: render the card again.")
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(parts[0][4:], Loader=_LOADER)):
            raise yaml.YAMLError("an alias, which can make a short text expand without bound")
        metadata = yaml.load(parts[0][4:], Loader=_LOADER)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecordError(f"expected YAML metadata, got {' '.join(str(error).split())}: render it again.") from error
    if not isinstance(metadata, dict):
        raise RecordError("expected the metadata as a YAML mapping, got something else: render the card again.")
    return metadata, parts[1]


def options_of(metadata: dict[str, Any], body: str) -> CardOptions:
    """The options that a card with this metadata and body was rendered with."""
    named = _REPOSITORY.search(body)
    repository = json.loads(named[1]) if named else None
    datasets = metadata.get("datasets")
    listed = isinstance(datasets, list) and all(isinstance(name, str) for name in datasets)
    texts = {name: metadata.get(name) for name in ("base_model", "license")}
    tag = metadata.get("pipeline_tag")
    return CardOptions(
        repo_id=None if repository in (None, _PLACEHOLDER) else repository,
        datasets=datasets if listed else None,
        **{name: value for name, value in texts.items() if isinstance(value, str)},
        **({"pipeline_tag": tag} if isinstance(tag, str) else {}),
    )


def examined_on(inventory: Inventory) -> str | None:
    """The date of the exam that the card tells of; None where it tells none."""
    try:
        found = _EXAMINED.search(inventory.read(CARD).decode("utf-8", "replace"))
    except RecordError:  # no card, or one that ``check_card`` refuses
        return None
    return found[1] if found else None


def check_card(certificate: Certificate, inventory: Inventory, findings: Findings) -> None:
    """Compare the card with one rendered from the certificate beside it.

    Tables, quotes, the opening and the rendered metadata must agree; prose that somebody added is noted.
    """
    if CARD not in inventory:
        findings.note("card", CARD, "there is no card; 'hf-immunize card' writes one.")
        return
    try:
        source = inventory.read(CARD).decode("utf-8")
        metadata, body = split_card(source)
        speakers = speakers_in(body)
        rendered = _rendered(certificate, inventory, options_of(metadata, body), speakers)
    except (ImmunizeError, ValueError, RecursionError) as error:
        findings.fail("card", CARD, f"the card cannot be compared with the certificate: {error}")
        return
    held = claimed(inventory)
    for item in speakers:
        if item not in held:
            findings.fail("card", CARD, f"it says {item}, which no signature in this folder bears out.")
    wanted, text = split_card(rendered)
    for key, value in wanted.items():
        if metadata.get(key) != value:
            findings.fail("card", CARD, f"its metadata '{key}' is not what the certificate says: render it again.")
    for ours, theirs, what in (
        (_structure(text), _structure(body), "tables and quotes"),
        ([text.split(_SECTION)[0].strip()], [body.split(_SECTION)[0].strip()], "opening"),
    ):
        if ours != theirs:
            findings.fail("card", CARD, f"its {what} are not what the certificate says: {_first(ours, theirs)}")
    if body.strip() != text.strip() and not findings.failed("card", CARD):
        findings.note("card-text", CARD, "it holds text that the template did not write; only its tables are checked.")


def _rendered(
    certificate: Certificate, inventory: Inventory, options: CardOptions, speakers: list[Trust]
) -> str:
    """The card as it has to be, from files that were listed as safe, each read within its bounds."""
    record = parse_record(ImmunizationRecord, inventory.read(IMMUNIZATION)) if IMMUNIZATION in inventory else None
    files = {name: inventory.read(name) for name in configurations(certificate) if name in inventory}
    return compose_card(certificate, record, files, options, speakers)


def _structure(body: str) -> list[str]:
    """Lines with structure that a reader may take for evidence; names and reasons have none, for it is escaped."""
    return [line for line in body.split("\n") if _STRUCTURE.search(line)]


def _first(ours: list[str], theirs: list[str]) -> str:
    """The first line that differs."""
    pairs = zip([*ours, *[""] * len(theirs)], [*theirs, *[""] * len(ours)], strict=False)
    expected, got = next(pair for pair in pairs if pair[0] != pair[1])
    return f"expected {_shown(expected, got)}, got {_shown(got, expected)}. Render it again with 'hf-immunize card'."


def _shown(line: str, other: str) -> str:
    """A window of the line around its first difference from the other."""
    if not line:
        return "no further line"
    at = next((i for i, (a, b) in enumerate(zip(line, other, strict=False)) if a != b), min(len(line), len(other)))
    start = max(0, at - 30)
    return repr(("…" if start else "") + line[start : at + 50] + ("…" if at + 50 < len(line) else ""))

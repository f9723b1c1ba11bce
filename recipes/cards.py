"""Render the model cards that this repository keeps, from finished runs, with everything that rendering again needs.

    python recipes/cards.py --model_paths runs/digits-vit/condition_number runs/digits-vit/closed_form_adversary \
        --output model_cards/digits-vit
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from hf_immunize.errors import ImmunizeError
from hf_immunize.hub import CardOptions, render_card
from hf_immunize.options import parse_options
from hf_immunize.records import Certificate, atomic_write
from hf_immunize.report import curve_pictures


@dataclass
class CardsArguments:
    """Which runs, and where their cards are kept."""

    model_paths: list[str] = field(metadata={"help": "Folders of certified models."})
    output: str = field(metadata={"help": "One folder below it per model; what was there is replaced."})
    license: str = field(default="apache-2.0", metadata={"help": "Licence identifier of the Hub."})


def keep(model: Path, target: Path, options: CardOptions) -> Path:
    """Records, configuration, pictures and card of one model; no weights and no traces."""
    certificate = Certificate.read(model / "certificate.json")
    shutil.rmtree(target, ignore_errors=True)
    for name in ("certificate.json", "immunization.json", *certificate.files):
        if (model / name).is_file():
            atomic_write(target / name, (model / name).read_bytes())
    for name, picture in curve_pictures(model).items():
        atomic_write(target / name, picture)
    return atomic_write(target / "README.md", render_card(target, options))


def main() -> None:
    (arguments,) = parse_options((CardsArguments,), description=__doc__)
    for path in map(Path, arguments.model_paths):
        print(keep(path, Path(arguments.output) / path.name, CardOptions(license=arguments.license)))


if __name__ == "__main__":
    try:
        main()
    except ImmunizeError as error:
        sys.exit(f"{type(error).__name__}: {error}")

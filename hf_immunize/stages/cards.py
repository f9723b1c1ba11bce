"""Render the model cards of finished runs, with everything that rendering them again needs, and nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_immunize.errors import ConfigError
from hf_immunize.hub import CardOptions, render_card
from hf_immunize.options import option, parse_options, required
from hf_immunize.records import Certificate, atomic_write
from hf_immunize.report import curve_pictures


@dataclass
class CardsOptions:
    """Which runs, and where their cards are kept."""

    model_paths: list[str] = required("Folders of certified models.")
    output: str = required("One folder below it per model; what was there is replaced.")
    license: str = option("apache-2.0", "Licence identifier of the Hub.")


def write_cards(options: CardsOptions) -> list[Path]:
    """The cards, one for each model. Raises RecordError for a folder without a readable certificate."""
    card = CardOptions(license=options.license)
    return [_keep(path, Path(options.output) / path.name, card) for path in map(Path, options.model_paths)]


def _keep(model: Path, target: Path, options: CardOptions) -> Path:
    """Records, configuration, pictures and card of one model; no weights and no traces."""
    certificate = Certificate.read(model / "certificate.json")
    ours, theirs = target.resolve(), model.resolve()
    if ours == theirs or ours in theirs.parents or theirs in ours.parents:
        raise ConfigError(f"expected another place for cards than the models, got {target} for that of {model}, "
                          "and what is there is replaced: choose another output.")
    kept, target = target, target.with_name(f"{target.name}.part")
    shutil.rmtree(target, ignore_errors=True)
    for name in ("certificate.json", "immunization.json", *certificate.files):
        if (model / name).is_file():
            atomic_write(target / name, (model / name).read_bytes())
    for name, picture in curve_pictures(model).items():
        atomic_write(target / name, picture)
    atomic_write(target / "README.md", render_card(target, options))
    shutil.rmtree(kept, ignore_errors=True)
    target.rename(kept)
    return kept / "README.md"


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """The stage on words of a command line."""
    (options,) = parse_options((CardsOptions,), argv, __doc__, prog)
    print("\n".join(map(str, write_cards(options))))

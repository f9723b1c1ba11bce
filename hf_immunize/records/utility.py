"""What a model answered on every held-out row of the primary task, beside its base: what utility is computed from."""

from __future__ import annotations

from pydantic import model_validator

from hf_immunize.records.base import Part, Record


class Answers(Part):
    """Class numbers per row. Of a model's class that the data does not have, −1."""

    wanted: list[int]
    base: list[int]
    immunized: list[int]


class Losses(Part):
    """A loss per row, and the energy of the row's target: what a model that answers zero would lose."""

    energy: list[float]
    base: list[float]
    immunized: list[float]


class UtilityRows(Record):
    """``utility/*.json``: answers or losses of base and immunized model on the same rows, in the data's order."""

    metric: str
    data: str
    """SHA-256 of the rows, as the certificate's ``primary_data`` names them."""
    subject: dict[str, str]
    """SHA-256 of the immunized model's weight files."""
    control: dict[str, str]
    """The same of the base."""
    answers: Answers | None = None
    losses: Losses | None = None

    @model_validator(mode="after")
    def _one_kind_on_the_same_rows(self) -> UtilityRows:
        kept = [part for part in (self.answers, self.losses) if part is not None]
        if len(kept) != 1:
            raise ValueError("expected answers or losses, one of the two")
        counts = {len(values) for values in kept[0].model_dump().values()}
        if len(counts) != 1 or counts == {0}:
            raise ValueError("expected as many values of base and immunized model as there are rows, and at least one")
        return self

    @property
    def rows(self) -> int:
        """How many rows there are."""
        part = self.answers or self.losses
        return 0 if part is None else len(part.base)

    @property
    def file_name(self) -> str:
        """Name of the file in ``utility``."""
        return "".join(letter if letter.isalnum() else "-" for letter in self.metric.lower()) + ".json"

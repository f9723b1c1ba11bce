"""The rule is a record, since it lies in every certificate; its name can still be imported from here."""

from hf_immunize.records import Rule

__all__ = ["Rule"]

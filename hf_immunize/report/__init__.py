"""One self-contained page that compares a base with its immunized models, drawn from records on disk."""

from hf_immunize.report.page import render_report

__all__ = ["render_report"]

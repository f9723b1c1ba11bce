"""One self-contained page that compares a base with its immunized models, and pictures, drawn from records on disk."""

from hf_immunize.report.depth import depth_picture
from hf_immunize.report.likeness import frechet_words, gap_rows
from hf_immunize.report.page import render_report, report_html
from hf_immunize.report.pictures import curve_pictures, picture_names

__all__ = [
    "curve_pictures",
    "depth_picture",
    "frechet_words",
    "gap_rows",
    "picture_names",
    "render_report",
    "report_html",
]

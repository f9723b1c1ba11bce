"""What an exam leaves out has moved to ``hf_immunize.exam``; its names can still be imported from here."""

from hf_immunize.exam.checklist import _DIFFUSION_MISSING, _NEVER, diffusion_lines_not_run, lines_not_run

__all__ = ["_DIFFUSION_MISSING", "_NEVER", "diffusion_lines_not_run", "lines_not_run"]

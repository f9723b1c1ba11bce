"""``hf-immunize``: the main job stage by stage, and publish, verify and read what came of it."""

from hf_immunize.commands import evidence, publishing
from hf_immunize.commands.app import app

__all__ = ["app", "evidence", "publishing"]

if __name__ == "__main__":
    app()

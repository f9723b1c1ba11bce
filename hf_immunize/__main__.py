"""``python -m hf_immunize VERB`` and ``accelerate launch -m hf_immunize VERB`` are the command ``hf-immunize``."""

from hf_immunize.cli import app

if __name__ == "__main__":
    app()

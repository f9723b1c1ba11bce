"""Which trials an attacker goes on with is one of the things that ``hf_immunize.exam`` says for everyone."""

from hf_immunize.exam.keeps import finalists

__all__ = ["finalists"]

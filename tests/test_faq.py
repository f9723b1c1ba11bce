"""docs/faq.md quotes messages of the code: each is one that some line there can write, and some are provoked here."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from hf_immunize.errors import ImmunizeError

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8")
QUOTED = [text.strip() for text in re.findall(r"```text\n(.*?)```", PAGE, flags=re.S)]


@cache
def messages() -> list[re.Pattern[str]]:
    """Every text of the package that begins as an error does, any value in the place of what is filled in."""
    found = []
    for path in sorted((ROOT / "hf_immunize").rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        if "expected " not in source:
            continue
        for node in ast.walk(ast.parse(source)):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node] if isinstance(node, ast.Constant) else []
            words = [part.value if isinstance(part, ast.Constant) else None for part in parts]
            fixed = "".join(word for word in words if isinstance(word, str))
            if fixed.startswith("expected ") and len(fixed) >= 25:
                found.append(re.compile("".join(re.escape(word) if isinstance(word, str) else ".*" for word in words),
                                        re.S))
    return found


@pytest.mark.parametrize("quoted", QUOTED, ids=lambda text: text[9:50])
def test_each_quoted_message_is_one_of_the_code(quoted):
    assert "\n" not in quoted and quoted.startswith("expected ")
    assert [pattern for pattern in messages() if pattern.fullmatch(quoted)], quoted


def test_a_message_that_the_code_has_not_does_not_fit():
    assert len(QUOTED) >= 20 and len(set(QUOTED)) == len(QUOTED) and len(messages()) > 300
    changed = QUOTED[0].replace("different images", "unequal pictures")
    assert changed != QUOTED[0] and not any(pattern.fullmatch(changed) for pattern in messages())


def provoke(name: str, folder: Path) -> None:
    """Do what a page's reader did."""
    from hf_immunize.hub import verify_model
    from hf_immunize.options import make_options
    from hf_immunize.stages.attack import AttackOptions, AttackPlan
    from hf_immunize.stages.init import InitOptions, init_run
    from hf_immunize.stages.workflow.run_file import RunFile
    from hf_immunize.tasks import FAMILIES

    (folder / "run.yaml").write_text("task: {primary_dataset: a, harmful_dataset: b}\nimmunize: {one: {}}\n")
    {
        "unknown option": lambda: make_options((AttackOptions,), {"model_path": "m", "atacks": ["lora"]}, "run.yaml"),
        "no model named": lambda: RunFile.read(folder / "run.yaml"),
        "unknown attack": lambda: AttackPlan.of(AttackOptions("m", attacks=["lorra"]), FAMILIES["classes"]).count(),
        "run file there": lambda: init_run(folder, InitOptions("m", "a", "b")),
        "neither": lambda: verify_model("no such model"),
    }[name]()


@pytest.mark.parametrize(
    ("name", "begins", "ends"),
    [("unknown option", "expected options of this stage in", "Did you mean attacks?"),
     ("no model named", "expected base (a trained model) or pretrain", "got neither: add one of them."),
     ("unknown attack", "expected an attack in ['all_layers_probe'", "got 'lorra'. Did you mean lora?"),
     ("run file there", "expected no run.yaml in", "or pass --overwrite."),
     ("neither", "expected a folder or 'owner/name' on the Hub, got 'no such model'", "check the path.")],
)  # fmt: skip
def test_some_of_them_provoked(tmp_path, name, begins, ends):
    with pytest.raises(ImmunizeError) as caught:
        provoke(name, tmp_path)
    told = str(caught.value)
    assert told.startswith(begins) and told.endswith(ends), told
    quoted = [text for text in QUOTED if text.startswith(begins[:20])]
    assert quoted and any(pattern.fullmatch(told) and pattern.fullmatch(quoted[0]) for pattern in messages()), told

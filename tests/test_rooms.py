"""The architecture as a test: who may import whom, no import cycle, what no room may import at all."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hf_immunize"
COMMON = {"errors", "version", "records"}
MAY_IMPORT = {
    "errors": set(),
    "version": set(),
    "records": {"errors"},
    "linalg": set(),
    "features": set(),
    "models": {"features"},
    "data": set(),
    "options": set(),
    "plugins": set(),
    "diffusion": {"data", "models", "options", "plugins"},
    "regularizers": {"linalg"},
    "linear": {"linalg", "regularizers"},
    "spectra": {"features", "data", "linalg"},
    "training": {"regularizers", "linalg", "features", "data", "models", "spectra", "hub", "diffusion", "plugins"},
    "exam": set(),
    "attacks": {"exam", "features", "data", "models", "linalg", "diffusion", "plugins"},
    "metrics": {"exam"},
    "certification": {
        "exam", "tasks", "attacks", "metrics", "linalg", "features", "data", "models", "spectra", "diffusion",
        "plugins",
    },
    "report": {"metrics", "certification"},
    "hub": {"exam", "certification", "metrics", "report", "features", "models"},
    "tasks": {"data", "models", "diffusion"},
    "stages": {
        "options", "exam", "tasks", "features", "data", "models", "diffusion", "training", "attacks", "certification",
        "linear", "hub", "report", "plugins",
    },
    "commands": {"stages", "hub"},
    "cli": {"commands"},
    "__main__": {"cli"},
}  # fmt: skip
LIBRARIES = {
    "linalg": {"transformers", "diffusers", "accelerate", "peft", "datasets"},
    "regularizers": {"transformers", "diffusers", "accelerate", "peft", "datasets"},
    "records": {"torch", "transformers", "diffusers"},
    "exam": {"torch", "transformers", "diffusers", "accelerate", "peft", "datasets", "numpy"},
    "metrics": {"torch", "transformers", "diffusers", "numpy.random"},
    "report": {"torch", "transformers", "diffusers"},
}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Absolute names of everything a file imports, at the top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
ROOMS = sorted({room_of(path) for path in FILES})


def test_every_room_is_in_the_table():
    assert len(FILES) > 40
    assert set(ROOMS) == set(MAY_IMPORT)


@pytest.mark.parametrize("room", ROOMS)
def test_room_keeps_its_door_shut(room):
    allowed = MAY_IMPORT[room] | {room} | (COMMON if room not in ("errors", "version") else set())
    for path in FILES:
        if room_of(path) != room:
            continue
        names = imported(path)
        rooms = {name.split(".")[1] for name in names if name.startswith("hf_immunize.")} & set(ROOMS)
        assert rooms <= allowed, f"{path.relative_to(PACKAGE)} imports {sorted(rooms - allowed)}"
        forbidden = {name.split(".")[0] for name in names} & LIBRARIES.get(room, set())
        assert not forbidden, f"{path.relative_to(PACKAGE)} imports {sorted(forbidden)}"


def test_the_defender_never_sees_the_exam_and_the_judge_has_no_stake():
    for room in ("attacks", "certification", "metrics"):
        assert not MAY_IMPORT[room] & {"training", "regularizers"}
    assert not MAY_IMPORT["training"] & {"attacks", "certification", "exam"}
    assert not MAY_IMPORT["diffusion"] & {"training", "regularizers", "attacks", "certification"}


def imported_modules(path: Path, modules: set[str]) -> set[str]:
    """Files of ours that a file imports; ``from package import file`` is an import of the file, not of its package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in modules else node.module)
    return found & modules


def test_no_import_cycle_between_files():
    modules = {
        ".".join(("hf_immunize", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in FILES
    }
    graph = {name: imported_modules(path, set(modules)) - {name} for name, path in modules.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for other in graph[name]:
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())
    assert len(done) == len(modules)


def test_torchvision_and_pickle_are_never_imported():
    for path in FILES:
        names = {name.split(".")[0] for name in imported(path)}
        assert not names & {"torchvision", "pickle", "cloudpickle", "dill", "joblib"}, path
        text = path.read_text(encoding="utf-8")
        assert "torch.load(" not in text and "trust_remote_code=True" not in text, path


def loads_of_models(path: Path) -> list[ast.Call]:
    """Every from_pretrained call but those of processors, configurations and tokenizers, which hold no weights."""
    light = ("Processor", "Config", "Tokenizer")
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    named = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "from_pretrained"]
    return [call for call in named if not ast.unparse(call.func.value).endswith(light)]


def test_weights_are_read_from_safetensors_alone():
    """Without the option, a repository that has only a pickle is unpickled. hub/load.py adds it for all its calls."""
    root = PACKAGE.parent
    files = [*FILES, *(root / "recipes").glob("*.py"), *(root / "benchmarks").glob("*.py")]
    found = {path: loads_of_models(path) for path in files if path != PACKAGE / "hub" / "load.py"}
    assert sum(map(len, found.values())) >= 5
    for path, calls in found.items():
        for call in calls:
            words = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert words.get("use_safetensors") == "True", f"{path.name}:{call.lineno}: {ast.unparse(call)}"


def test_second_derivatives_are_taken_in_one_place_and_on_the_math_kernel():
    """Fused attention has none, and gives an error or a wrong one."""
    found = set()
    for path in FILES:
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        if {node.arg for node in nodes if isinstance(node, ast.keyword)} & {"create_graph", "hessian", "hvp"}:
            found.add(path.relative_to(PACKAGE).as_posix())
    assert found == {"training/core/unrolled.py"}
    tree = ast.parse((PACKAGE / found.pop()).read_text(encoding="utf-8"))
    entered = [ast.unparse(item.context_expr) for node in ast.walk(tree) if isinstance(node, ast.With)
               for item in node.items]
    assert "sdpa_kernel(SDPBackend.MATH)" in entered


def test_the_command_names_its_verbs_before_anything_heavy_is_imported():
    code = "import sys, hf_immunize.cli as c; print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_importing_the_package_is_light():
    code = "import sys, hf_immunize as h; print('torch' in sys.modules, 'transformers' in sys.modules, h.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[:2] == ["False", "False"]

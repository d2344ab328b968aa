"""The shape of the project: sizes, floors' doors, the map, the README."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "byheart"
MODULES = sorted(PACKAGE.rglob("*.py"))


def relative(path):
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_files_and_functions_stay_readable(path):
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 400
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            docstring = ast.get_docstring(node, clean=False) or ""
            length = node.end_lineno - node.lineno + 1 - len(docstring.splitlines())
            assert length <= 60, f"{node.name} has {length} lines without its docstring"


def test_the_map_names_every_file():
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `([\w/]+\.py)` \|", text, flags=re.MULTILINE))
    there = {relative(path) for path in MODULES if path.name != "__init__.py"}
    assert named == there


def run(code, *arguments):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )


def test_importing_byheart_imports_nothing_heavy_but_torch():
    code = "import sys, byheart; print(*sorted(m.partition('.')[0] for m in sys.modules))"
    loaded = set(run(code).stdout.split())
    assert "byheart" in loaded
    extras = {"transformers", "accelerate", "faiss", "matplotlib", "tensorboard", "zstandard"}
    assert not loaded & (extras | {"typer", "hypothesis", "beartype"})


def test_every_module_imports_without_the_extras():
    blocked = ["faiss", "matplotlib", "tensorboard", "zstandard", "hypothesis", "beartype", "peft"]
    code = (
        "import importlib, pkgutil, sys\n"
        f"sys.modules.update(dict.fromkeys({blocked!r}))\n"
        "import byheart\n"
        "for module in pkgutil.walk_packages(byheart.__path__, 'byheart.'):\n"
        "    if module.name not in sys.argv[1:]: importlib.import_module(module.name)\n"
        "print('done')"
    )
    # the one door of faiss may not open without it, and says which extra to install
    # the state machine is hypothesis, and store_contract says so before it opens it
    result = run(code, "byheart.testing.store_machine")
    assert result.stdout.strip() == "done", result.stderr


def python_blocks(path):
    return re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)


def test_the_readme_example_runs(tmp_path):
    blocks = python_blocks(ROOT / "README.md")
    assert blocks
    for block in blocks:
        result = subprocess.run(
            [sys.executable, "-W", "error", "-c", block],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
        )
        assert result.returncode == 0, result.stderr


def test_links_inside_the_documentation_exist():
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"

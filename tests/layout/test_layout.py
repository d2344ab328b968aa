"""The shape of the project: sizes, floors' doors, the map, the README."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

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
    assert not loaded & (extras | {"lm_eval", "typer", "hypothesis", "beartype", "triton"})


def test_every_module_imports_without_the_extras():
    blocked = ["faiss", "matplotlib", "tensorboard", "zstandard", "hypothesis", "beartype", "peft"]
    blocked.append("triton")
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
    # kernels are Triton, and imported once it is known to be there
    kernels = ["byheart.ops.search_kernels", "byheart.ops.gather_kernels"]
    result = run(code, "byheart.testing.store_machine", *kernels)
    assert result.stdout.strip() == "done", result.stderr


def python_blocks(path):
    return re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)


def tiny_checkpoints(folder):
    """Save tiny models, for the names of models that are not on this machine."""
    sizes = {"vocab_size": 53, "hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 40}
    bert = BertConfig(num_hidden_layers=1, num_labels=6, **{**sizes, "vocab_size": 103})
    llama = LlamaConfig(num_hidden_layers=13, max_position_embeddings=4096, **sizes)
    BertForSequenceClassification(bert).save_pretrained(folder / "bert")
    LlamaForCausalLM(llama).save_pretrained(folder / "llama")
    return {"google-bert/bert-base-cased": "bert", "meta-llama/Llama-3.2-1B": "llama"}


# what the README says of its models in comments
READ_TEXTS = """
import torch
ids = torch.randint(0, 53, (2, 1100))
classifier(ids, labels=torch.tensor([0, 5])).loss.backward()
reader(ids, labels=ids).loss.backward()
"""


def run_blocks(blocks, folder, *options):
    """Run examples one after the other, each with names of its own; torch is imported once."""
    code = (
        "import sys\n"
        "for number, block in enumerate(sys.argv[1:]):\n"
        "    exec(compile(block, f'example {number}', 'exec'), {'__name__': '__main__'})"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", *options, "-c", code, *blocks],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )
    assert result.returncode == 0, result.stderr


def test_the_readme_examples_run(tmp_path):
    blocks = python_blocks(ROOT / "README.md")
    assert len(blocks) == 3
    for name, local in tiny_checkpoints(tmp_path).items():
        blocks = [block.replace(name, local) for block in blocks]
    run_blocks([b + READ_TEXTS if "classifier" in b else b for b in blocks], tmp_path)


def test_the_examples_of_attach_run(tmp_path):
    blocks = python_blocks(ROOT / "docs" / "attach.md")
    assert len(blocks) == 2
    tiny_checkpoints(tmp_path)
    code = "\n".join(blocks).replace("meta-llama/Llama-3.2-1B", "llama")
    # PEFT 0.21 asks transformers 5.23 by the older of two names
    allowed = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
    run_blocks([code], tmp_path, "-W", allowed)


def test_the_examples_of_recurrent_memory_run(tmp_path):
    blocks = python_blocks(ROOT / "docs" / "recurrent-memory.md")
    assert len(blocks) == 4
    run_blocks(blocks, tmp_path)


def test_links_inside_the_documentation_exist():
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"

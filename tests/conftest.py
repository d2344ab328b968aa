"""Settings of the whole suite: poisoned memory, one thread, a fixed seed per test."""

import ast
import collections
import dataclasses
import functools
import hashlib
import inspect
import os
from pathlib import Path

import jaxtyping
import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# without a GPU kernels run in Triton's interpreter, for which it decides when it is first imported
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


class _Shapes(jaxtyping._import_hook.JaxtypingTransformer):
    """Checks the functions whose signature has a shape, and what they are called with.

    Others are left to mypy, and so are functions inside of functions, which would be given their
    checks anew in every call of the one around them: both took half of the time of all tests.
    """

    def visit_FunctionDef(self, node):  # noqa: N802
        is_inside = any(isinstance(parent, ast.FunctionDef) for parent in self._parents)
        if not is_inside and _has_shape(node):
            super().visit_FunctionDef(node)
        return node


def _has_shape(function):
    """Whether an annotation is like `Float[Tensor, "rows width"]`."""
    hints = [
        argument.annotation for argument in ast.walk(function.args) if isinstance(argument, ast.arg)
    ]
    return any(
        isinstance(part, ast.Subscript)
        and isinstance(part.slice, ast.Tuple)
        and isinstance(part.slice.elts[-1], ast.Constant)
        for hint in [function.returns, *hints]
        if hint is not None
        for part in ast.walk(hint)
    )


jaxtyping._import_hook.JaxtypingTransformer = _Shapes

# calls of a function in a test whose shapes are checked, and cases of a test, evenly chosen among
# all: a loop brings the shapes of its first rounds again, and so does one family of models those of
# another. Checking all of them took a quarter of the time, and eight calls in 16 cases a tenth.
# Examples of Hypothesis differ in their shapes: there all calls are checked
_CHECKED_CALLS = 3
_CHECKED_CASES = 8
_IS_CHECKED = pytest.StashKey[bool]()
_tests_begun = 0
_checks_all = False
_checked_calls = _CHECKED_CALLS
_jaxtyped = jaxtyping.jaxtyped


def _jaxtyped_at_first(fn=None, *, typechecker):
    if fn is None:
        return functools.partial(_jaxtyped_at_first, typechecker=typechecker)
    if inspect.isclass(fn):
        # states are data classes, of which every segment makes dozens
        unchecked = fn.__init__
        _jaxtyped(fn, typechecker=typechecker)
        if dataclasses.is_dataclass(fn) and fn.__init__ is not unchecked:
            fn.__init__ = _either(unchecked, fn.__init__)
        return fn
    checked = _jaxtyped(fn, typechecker=typechecker)
    return _either(fn, checked) if inspect.isfunction(fn) else checked


def _either(fn, checked):
    """`checked` in its first calls of a test, `fn` in the others."""
    test = calls = 0

    @functools.wraps(fn)
    def either(*args, **kwargs):
        nonlocal test, calls
        if test != _tests_begun:
            test, calls = _tests_begun, 0
        calls += 1
        return (checked if _checks_all or calls <= _checked_calls else fn)(*args, **kwargs)

    return either


jaxtyping.jaxtyped = _jaxtyped_at_first
# bytecode that was made with other checks is not used again
_TAG = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
_bytecode_path = jaxtyping._import_hook._optimized_cache_from_source
jaxtyping._import_hook._optimized_cache_from_source = (
    lambda typechecker, /, path, debug_override=None: _bytecode_path(
        typechecker + _TAG, path, debug_override
    )
)

# the same examples in every run: a red test is red for everyone
settings.register_profile("byheart", derandomize=True, deadline=None, database=None)
settings.load_profile("byheart")


@pytest.fixture(autouse=True)
def _fixed_seed(request) -> None:
    global _tests_begun, _checks_all, _checked_calls
    _tests_begun += 1
    _checked_calls = _CHECKED_CALLS if request.node.stash[_IS_CHECKED] else 0
    _checks_all = hasattr(getattr(request.node, "obj", None), "hypothesis")
    torch.manual_seed(0)


@pytest.fixture
def without_typechecks(monkeypatch):
    """Let values through that the suite's type checks refuse, and users have not."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(autouse=True)
def _poisoned_memory(request):
    """Fill uninitialised tensors with NaN, so that reading one cannot go unnoticed.

    The fill is part of torch's deterministic mode, which CUDA matrix products refuse without an
    environment variable: tests on a GPU run without it.
    """
    if request.node.get_closest_marker("gpu"):
        yield
        return
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_configure():
    assert torch.utils.deterministic.fill_uninitialized_memory


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    # by their places in the suite: the same cases in every run, whichever process has them
    cases = collections.defaultdict(list)
    for item in items:
        cases[item.nodeid.partition("[")[0]].append(item)
    for ones in cases.values():
        for place, item in enumerate(ones):
            chosen = (
                place * _CHECKED_CASES // len(ones),
                (place - 1) * _CHECKED_CASES // len(ones),
            )
            item.stash[_IS_CHECKED] = chosen[0] != chosen[1]

"""Packages whose parts are imported when they are first asked for: what they show, to people and to type checkers."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import jlora
from jlora.faces import lazy_face

ROOT = Path(jlora.__file__).parent
LAZY = [
    "jlora" + "".join(f".{part}" for part in path.parent.relative_to(ROOT).parts)
    for path in sorted(ROOT.rglob("__init__.py"))
    if "lazy_face(" in path.read_text(encoding="utf-8")
]


def told_to_type_checkers(tree):
    """The names that a module imports for type checkers alone, and from where."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for line in node.body:
                found |= {alias.name: line.module for alias in line.names}
    return found


def looked_up(tree):
    """The names that a module imports when they are asked for, and from where."""
    (call,) = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "lazy_face"]
    return {name: module for module, names in ast.literal_eval(call.args[1]).items() for name in names}


@pytest.mark.parametrize("package", LAZY)
def test_type_checkers_and_programs_see_the_same(package):
    module = importlib.import_module(package)
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    told = told_to_type_checkers(tree)
    assert told == looked_up(tree)
    assert told.keys() <= set(module.__all__) <= set(dir(module))
    for name in module.__all__:
        assert getattr(module, name) is not None
    for name, home in told.items():
        assert getattr(module, name) is getattr(importlib.import_module(home), name)


def test_modules_are_found_by_their_package_once_asked_for():
    code = "import sys, jlora; assert 'jax' not in sys.modules; assert jlora.nnx is sys.modules['jlora.nnx']"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["nothing", "_nothing", "__wrapped__"])
def test_what_a_package_does_not_have(name):
    with pytest.raises(AttributeError, match=f"module 'jlora' has no attribute '{name}'"):
        getattr(jlora, name)
    assert not hasattr(jlora, name)


def test_a_star_imports_what_is_public():
    names = {}
    exec("from jlora import *", names)
    assert names.keys() - {"__builtins__"} == set(jlora.__all__)


def test_what_was_looked_up_is_kept(monkeypatch):
    calls = []
    monkeypatch.setattr(importlib, "import_module", lambda name: calls.append(name) or sys.modules[name])
    monkeypatch.setitem(sys.modules, "a_package", type(sys)("a_package"))
    look_up, shown = lazy_face("a_package", {"jlora.errors": ("DataError",)})
    assert look_up("DataError") is jlora.errors.DataError
    assert calls == ["jlora.errors"]
    assert sys.modules["a_package"].DataError is jlora.errors.DataError
    assert "DataError" in shown()

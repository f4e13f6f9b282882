"""What may import what, read from the syntax trees: no module is imported for it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("framework", "datamodules", "callbacks", "methods", "experiments")
ALLOWED = {
    "framework": set(),
    "datamodules": {"framework"},
    "callbacks": {"framework"},
    "methods": {"framework"},
    "experiments": {"framework", "datamodules", "callbacks", "methods"},
}
"""Our own packages that a folder may import, itself left out."""

CONFIG_FILES = {f"framework/{name}.py" for name in ("config", "fields", "schema", "shorthands", "study", "consistency")}
THIRD_PARTY = {
    "omegaconf": lambda path: path.startswith("experiments/") or path in CONFIG_FILES,
    "wandb": lambda path: path.startswith(("experiments/", "callbacks/")),
    "peft": lambda path: path.startswith(("framework/", "datamodules/", "experiments/")),
    "transformers": lambda path: path.startswith(("framework/", "datamodules/", "experiments/")),
    "lightning": lambda path: False,
    "tests": lambda path: False,
}
"""Packages that only some files may import."""

SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def _relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(tree: ast.AST) -> Iterator[str]:
    """Full dotted names of what a module imports, those inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def problems_of(path: str, tree: ast.Module) -> list[str]:
    """Everything in the module at ``path`` that the rules forbid."""
    folder = path.split("/")[0]
    problems = []
    for name in imported(tree):
        package = name.split(".")[0]
        if name.startswith("."):
            problems.append(f"{path}: relative import {name}")
        elif package in FOLDERS and package != folder and package not in ALLOWED[folder]:
            problems.append(f"{path}: {folder} imports {name}")
        elif package in THIRD_PARTY and not THIRD_PARTY[package](path):
            problems.append(f"{path}: imports {name}")
    problems += [f"{path}:{node.lineno}: assert" for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    is_script = path.startswith("experiments/benchmarks/")  # run by hand, imported by nobody
    if not path.endswith("__init__.py") and not is_script and not _exports(tree):
        problems.append(f"{path}: no __all__")
    return problems


def _exports(tree: ast.Module) -> list[str] | None:
    for node in tree.body:
        if isinstance(node, ast.Assign) and [t.id for t in node.targets if isinstance(t, ast.Name)] == ["__all__"]:
            return list(ast.literal_eval(node.value))
    return None


def _defined(tree: ast.Module) -> set[str]:
    names = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {t.id for t in targets if isinstance(t, ast.Name)}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return names


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_there_are_sources_in_every_folder():
    assert {_relative(path).split("/")[0] for path in SOURCES} == set(FOLDERS)


@pytest.mark.parametrize("path", SOURCES, ids=_relative)
def test_a_source_keeps_the_rules(path):
    assert problems_of(_relative(path), _parse(path)) == []


@pytest.mark.parametrize("path", [path for path in SOURCES if path.name != "__init__.py"], ids=_relative)
def test_exported_names_exist_and_are_few(path):
    tree = _parse(path)
    exported = _exports(tree) or []
    assert set(exported) <= _defined(tree)
    assert len(exported) <= 15


@pytest.mark.parametrize("path", SOURCES, ids=_relative)
def test_lightning_has_one_name(path):
    for node in ast.walk(_parse(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name == "pytorch_lightning":
                    assert alias.asname == "pl"


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("framework/x.py", "import methods.asft", "framework imports methods.asft"),
        ("framework/x.py", "from datamodules.sampler import y", "framework imports datamodules.sampler"),
        ("methods/x.py", "from callbacks import y", "methods imports callbacks"),
        ("callbacks/x.py", "from methods.asft import y", "callbacks imports methods.asft"),
        ("datamodules/x.py", "def f():\n    import experiments.run", "datamodules imports experiments.run"),
        ("experiments/x.py", "from tests.conftest import y", "imports tests.conftest"),
        ("framework/x.py", "import omegaconf", "imports omegaconf"),
        ("framework/x.py", "import wandb", "imports wandb"),
        ("methods/x.py", "from peft import y", "imports peft"),
        ("callbacks/x.py", "import transformers", "imports transformers"),
        ("experiments/x.py", "import lightning.pytorch as pl", "imports lightning.pytorch"),
        ("framework/x.py", "from .errors import y", "relative import .errors"),
        ("framework/x.py", "assert True", "framework/x.py:1: assert"),
        ("framework/x.py", "x = 1", "no __all__"),
    ],
)
def test_a_broken_rule_is_found(path, source, expected):
    found = problems_of(path, ast.parse(source))
    assert any(expected in problem for problem in found)


def test_what_is_allowed_passes():
    source = "import torch\nimport pytorch_lightning as pl\nfrom framework.errors import x\n__all__ = ['x']"
    assert problems_of("methods/x.py", ast.parse(source)) == []
    assert problems_of("framework/config.py", ast.parse("import omegaconf\n__all__ = ['x']")) == []

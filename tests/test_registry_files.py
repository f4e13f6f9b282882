from __future__ import annotations

from pathlib import Path

from framework.registry import known_methods

ROOT = Path(__file__).parents[1]


def _module_names() -> set[str]:
    folder = ROOT / "methods"
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    packages = {path.parent.name for path in folder.glob("*/__init__.py")}
    return files | packages


def test_the_registry_is_the_files_in_methods():
    ours = {name for name, entry in known_methods().items() if entry.method_class.__module__.startswith("methods.")}
    assert ours == _module_names()
    assert ours


def test_each_method_lives_in_the_file_of_its_name():
    for name, entry in known_methods().items():
        assert entry.method_class.__module__.split(".")[:2] == ["methods", name]


def test_each_method_has_its_tests():
    missing = [name for name in _module_names() if not (ROOT / "tests" / "methods" / f"test_{name}.py").exists()]
    assert missing == []


def test_each_card_names_what_a_reader_looks_for():
    for name, entry in known_methods().items():
        card = __import__(entry.method_class.__module__, fromlist=["x"]).__doc__
        absent = [
            part
            for part in ("Formula", "Points", "Reference", "Deviations", "Cost", "Does not compose with", "Defaults")
            if f"\n{part}" not in card
        ]
        assert not absent, f"the card of {name} has no {absent}"

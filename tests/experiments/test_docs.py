"""The README's generated parts."""

from __future__ import annotations

import pytest

from experiments import docs
from framework.errors import ConfigError
from framework.registry import known_methods


def test_readme_is_current():
    text = docs.README.read_text(encoding="utf-8")
    assert text == docs.filled_readme(text)


def test_every_method_has_a_row():
    table = docs.methods_markdown()
    assert all(f"| `{name}` |" in table for name in known_methods())


def test_filling_replaces_an_old_table_and_keeps_the_rest(monkeypatch):
    monkeypatch.setattr(docs, "methods_markdown", lambda: "| new |\n")
    monkeypatch.setattr(docs, "study_markdown", lambda name: "")
    studies = "<!-- first_look -->\n\n<!-- quickstart -->\n\n<!-- scenario -->"
    text = f"a\n\n<!-- methods -->\n\n| old |\n| row |\n\nb\n\n{studies}\n\nend\n"
    filled = docs.filled_readme(text)
    assert filled == text.replace("| old |\n| row |", "| new |")
    assert docs.filled_readme(filled) == filled


def test_missing_marker_is_refused():
    with pytest.raises(ConfigError, match=r"to have the marker `<!-- methods -->`"):
        docs.filled_readme("nothing here\n")

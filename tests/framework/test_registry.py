from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from framework import registry
from framework.errors import ConfigError
from framework.method import Method
from framework.registry import create_method, known_methods, register_method, validate_methods


@dataclass(frozen=True)
class DraftConfig:
    rate: float
    names: tuple[str, ...] = ()
    extra: list[int] = field(default_factory=list)

    def __post_init__(self):
        problems = []
        if self.rate < 0:
            problems.append(f"Expected `rate` to be a number >= 0, but got {self.rate!r}.")
        if "bad" in self.names:
            problems.append("Expected `names` to be good, but got 'bad'.")
        if problems:
            raise ConfigError(problems)


@pytest.fixture
def draft(monkeypatch):
    known_methods()
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))

    @register_method("draft", config=DraftConfig)
    class Draft(Method):
        """A draft.

        Second paragraph.
        """

        supports = frozenset({"single"})

        def loss_term(self, ctx):
            return None

        def prepare(self, model, datamodule, store):
            pass

    return Draft


def test_the_packages_methods_are_found_sorted():
    names = list(known_methods())
    assert names == sorted(names)
    assert {"asft", "safety_mix"} <= set(names)


def test_an_entry_says_what_the_readme_table_needs(draft):
    entry = known_methods()["draft"]
    assert entry.method_class is draft
    assert entry.config_class is DraftConfig
    assert entry.points == ("prepare", "loss_term")
    assert entry.supports == ("single",)
    asft = known_methods()["asft"]
    assert asft.summary.startswith("AsFT: penalise the part of a weight update")
    assert draft.name == "draft"


def test_creating_a_method_takes_its_settings(draft):
    method = create_method("draft", {"rate": 2.0})
    assert isinstance(method, draft)
    assert method.config == DraftConfig(2.0)
    assert create_method("asft").config.weight == 1.0
    assert create_method("asft", {}).config == create_method("asft", None).config


def test_an_unknown_method_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"`method` to be one of .*, but got 'asfd'\. Did you mean 'asft'\?"):
        create_method("asfd")


def test_an_unknown_setting_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"`asft.<field>` to be one of .*'wieght'\. Did you mean 'weight'\?"):
        create_method("asft", {"wieght": 1.0})


def test_a_missing_setting_is_refused(draft):
    with pytest.raises(ConfigError, match=r"Expected `draft\.rate` to be given, but got nothing"):
        create_method("draft")


def test_settings_that_are_no_mapping_are_refused():
    with pytest.raises(ConfigError, match=r"Expected `methods\.asft` to be a mapping of settings, but got 3\."):
        create_method("asft", 3)


def test_every_problem_of_every_method_is_listed(draft):
    problems = validate_methods(
        {"asfd": None, "draft": {"rate": -1.0, "names": ("bad",)}, "asft": {"weight": 2.0}, "safety_mix": {"cuont": 1}}
    )
    assert len(problems) == 4
    assert "asfd" in problems[0]
    assert problems[1] == "draft: Expected `rate` to be a number >= 0, but got -1.0."
    assert problems[2] == "draft: Expected `names` to be good, but got 'bad'."
    assert "Did you mean 'count'?" in problems[3]
    assert validate_methods({"asft": None, "safety_mix": {}}) == []


def test_an_order_that_is_missing_or_cannot_work_is_a_problem_of_the_settings():
    both = {"safe_lora": {}, "nest": {"train": "deltas+adapter"}}
    assert [text.split(", where")[0] for text in validate_methods(both)] == [
        "Methods ['safe_lora', 'nest'] both fill `edit_weights`"
    ]
    (problem,) = validate_methods(both, ["safe_lora", "nest"])
    assert problem.endswith("but got ['safe_lora', 'nest']. Write `order: [nest, safe_lora]`.")
    assert validate_methods(both, ["nest", "safe_lora"]) == []
    assert validate_methods(both, ["nest", "nest"])[0].startswith("Expected `order` to name every method once")
    assert validate_methods(both, ["nest", "a_misspelt_one"]) == []  # the stage names it


def test_a_type_error_in_the_settings_is_reported(draft):
    assert validate_methods({"draft": {"rate": "x"}}) == [
        "draft: '<' not supported between instances of 'str' and 'int'"
    ]


def test_a_name_that_is_taken_is_refused(draft):
    with pytest.raises(ConfigError, match="Expected the method name `draft` to be free"):

        @register_method("draft", config=DraftConfig)
        class Another(Method):
            pass


def test_a_class_of_the_same_name_from_elsewhere_is_refused(draft):
    twin = type("Draft", (Method,), {"__qualname__": draft.__qualname__, "__module__": "elsewhere"})
    with pytest.raises(ConfigError, match="to be free"):
        register_method("draft", config=DraftConfig)(twin)


def test_registering_the_same_class_again_is_allowed(draft):
    register_method("draft", config=DraftConfig)(draft)
    assert known_methods()["draft"].method_class is draft

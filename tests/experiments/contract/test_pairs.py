from __future__ import annotations

import itertools

import pytest
from rich.console import Console

from experiments.contract import pairs
from experiments.contract.broken_wiring import LooksForPairs
from experiments.contract.pairs import PairResult, compose_pair, pairs_table, representative_pairs, run_pairs
from experiments.contract.runner import fixed_conditions, run_subjects
from experiments.contract.sound import SOUND, ToyTerm, subject_of
from experiments.contract.subject import registered_subject
from experiments.contract.tiny import TinyModel
from experiments.contract.workbench import Workbench
from framework.errors import DataError, WiringError
from framework.method import Method
from framework.parameters import lora_pairs
from framework.registry import known_methods

NO_ADAPTER = {("asft", "nest"), ("ewc", "nest"), ("l2_to_start", "nest")}
"""NeST trains nothing but its own vectors: a penalty on the other weights has no gradient."""
ONE_FACTOR = {"circuit_breakers", "constrained_sft", "gradient_ascent", "npo", "rmu", "vaccine"}
"""Each changes the factor of the task loss, which one method of a stage may do."""
REFUSED = {
    **dict.fromkeys(itertools.combinations(sorted(ONE_FACTOR), 2), "WiringError"),
    **dict.fromkeys(NO_ADAPTER, "WiringError"),
    ("kl_to_reference", "nest"): "WiringError",
    ("circuit_breakers", "nest"): "WiringError",
    ("lisa", "smh"): "WiringError",  # both decide the order of the rows
}

TOYS = {subject.name: subject for subject in SOUND}


@pytest.fixture(scope="module", autouse=True)
def conditions(tmp_path_factory):
    with fixed_conditions(tmp_path_factory.mktemp("pairs")):
        yield


@pytest.fixture(scope="module")
def registered_pairs():
    return run_pairs()


def test_all_pairs_of_registered_methods_run_together_or_are_refused(registered_pairs):
    assert [(r.first, r.second) for r in registered_pairs] == list(itertools.combinations(known_methods(), 2))
    assert [result for result in registered_pairs if result.status == "fail"] == []
    assert all(result.detail for result in registered_pairs)


def test_refused_pairs_are_those_that_are_known(registered_pairs):
    """A pair that starts to be refused is a change of what the methods can do."""
    refused = {(r.first, r.second): r.detail.split(":")[0] for r in registered_pairs if r.status == "refused"}
    assert refused == REFUSED


def test_one_pair_for_every_combination_of_points_keeps_all_clauses(registered_pairs):
    chosen = representative_pairs(registered_pairs)
    assert chosen
    for first, second in chosen:
        report = run_subjects([registered_subject(first), registered_subject(second)])
        assert [(result.clause, result.detail) for result in report.failed] == []
        assert report.counts["pass"] > 10


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(TOYS, 2)))
def test_toys_of_every_kind_run_together(first, second, tmp_path):
    result = compose_pair(TOYS[first], TOYS[second], tmp_path)
    assert result.status == "together", result.detail
    assert f"{first}: " in result.detail
    assert f"{second}: " in result.detail


def test_a_shared_point_asks_for_an_order(tmp_path):
    result = compose_pair(TOYS["toy_deltas"], TOYS["toy_edit"], tmp_path)
    assert result.detail.endswith("`order` needed for edit_weights")


class NeedsPairs(ToyTerm):
    def prepare_model(self, model):
        if not lora_pairs(model):
            raise WiringError("Method `needs_pairs` needs LoRA pairs, but the model has none.")
        self.count("modules_matched")


def test_a_pair_of_two_kinds_of_adapters_is_refused(tmp_path):
    full = subject_of(ToyTerm, "full_only", adapters=("full",))
    result = compose_pair(full, subject_of(NeedsPairs, "needs_pairs", adapters=("lora",)), tmp_path)
    assert (result.status, result.detail.split(":")[0]) == ("refused", "WiringError")
    assert "needs LoRA pairs" in result.detail


class BreaksInTraining(Method):
    def loss_term(self, ctx):
        raise KeyError("weight")


class StopsInTraining(Method):
    def edit_gradients(self, params):
        pass


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        (BreaksInTraining, "crashed with KeyError: 'weight'"),
        (StopsInTraining, "NoEffectError: Method `odd` did nothing"),
    ],
)
def test_a_pair_that_breaks_in_training_fails(broken, expected, tmp_path):
    result = compose_pair(TOYS["toy_term"], subject_of(broken, "odd"), tmp_path)
    assert result.status == "fail"
    assert expected in result.detail


def test_two_cases_that_mean_other_models_by_one_role_have_not_been_tried(tmp_path):
    other = subject_of(LooksForPairs, "other", roles={"base": TinyModel(seed=7)})
    result = compose_pair(TOYS["toy_edit"], other, tmp_path)
    assert result.status == "fail"
    assert "to mean the same model by role `base`" in result.detail


class NeedsData(Method):
    def prepare(self, model, datamodule, store):
        raise DataError("Expected at least 10 prompts, but got 3.")

    def edit_weights(self, model):
        pass


def test_a_case_whose_data_do_not_do_has_not_been_tried(tmp_path):
    result = compose_pair(TOYS["toy_term"], subject_of(NeedsData, "needs_data"), tmp_path)
    assert (result.status, result.detail) == ("fail", "DataError: Expected at least 10 prompts, but got 3.")


def test_two_cases_may_mean_other_files_by_one_name(tmp_path):
    bench = Workbench((with_file("one"), with_file("two")), tmp_path)
    bench.create()
    assert [path.read_text() for path in sorted(tmp_path.rglob("pairs.txt"))] == ["one", "two"]


def with_file(name):
    return subject_of(ToyTerm, name, files={"pairs.txt": name})


def test_a_method_without_a_case_fails_in_its_pairs(monkeypatch):
    monkeypatch.setattr("experiments.contract.subject.find_case", lambda name: None)
    results = run_pairs(["asft"])
    assert {result.status for result in results} == {"fail"}
    assert all("Expected a contract case" in result.detail for result in results)


def test_one_pair_stands_for_each_combination(monkeypatch):
    points = {"a": ("loss_term",), "b": ("prepare", "loss_term"), "c": ("configure_data",)}
    entries = {name: type("Entry", (), {"points": filled}) for name, filled in points.items()}
    monkeypatch.setattr(pairs, "known_methods", lambda: entries)
    results = [PairResult(a, b, "together", "") for a, b in [("a", "c"), ("b", "c"), ("a", "b")]]
    results.append(PairResult("c", "c", "refused", ""))
    assert representative_pairs(results) == [("a", "c"), ("a", "b")]


def test_the_table_shows_the_reasons():
    results = [PairResult("a", "b", "together", "a: loss_calls 2"), PairResult("a", "c", "refused", "needs [LoRA]")]
    console = Console(width=120)
    with console.capture() as captured:
        console.print(pairs_table(results))
    text = captured.get()
    for part in ("2 pairs: 1 together, 1 refused, 0 fail", "a: loss_calls 2", "needs [LoRA]"):
        assert part in text

from dataclasses import replace

import pytest

from experiments.attacks.paired_attacks import paired_attacks, unpaired_attacks
from experiments.statistics import mcnemar_exact
from framework.errors import DataError
from tests.experiments.attacks.made_up_outcomes import outcome, point, prompt_outcome


def test_twins_are_compared_request_by_request():
    before = outcome("direct", [point(range(8))])
    after = outcome("direct", [point([0])])
    (found,) = paired_attacks([after], [before])
    assert (found.only_undefended, found.only_defended, found.num_requests) == (7, 0, 10)
    assert found.difference == pytest.approx(-0.7)
    assert found.p_value == found.p_holm == pytest.approx(2 / 2**7)
    assert found.p_value == mcnemar_exact([1] * 8 + [0] * 2, [1] + [0] * 9).p_value
    assert -1 <= found.low < -0.7 < found.high < 0


def test_p_values_are_corrected_over_all_attacks():
    before = [outcome(name, [point(range(8))]) for name in ("a", "b", "c")]
    after = [outcome("a", [point([0])]), outcome("b", [point(range(5))]), outcome("d", [point([0])])]
    found = paired_attacks(after, before)
    assert [one.point.name for one in found] == ["a", "b"]
    assert found[0].p_holm == pytest.approx(2 * found[0].p_value)
    assert found[1].p_holm == found[1].p_value == 0.25


def test_settings_are_matched_and_the_last_step_of_each_is_compared():
    def tuned(*broken):
        rows = [(rate, steps) for rate in (1e-4, 1e-3) for steps in (10, 20)]
        return outcome(
            "harmful",
            [point(own, spent=steps, rate=rate) for own, (rate, steps) in zip(broken, rows, strict=True)],
            unit="steps",
        )

    found = paired_attacks([tuned([], [1], [], [2])], [tuned([1], [1, 3], [1], range(9))])
    assert [str(one.point) for one in found] == [
        "harmful (rate 0.0001) at 20 steps",
        "harmful (rate 0.001) at 20 steps",
    ]
    assert [one.only_undefended for one in found] == [1, 8]


def test_settings_that_were_searched_for_may_differ():
    found = paired_attacks([outcome("search", [point([0], rate=1.0)])], [outcome("search", [point([1], rate=2.0)])])
    assert [(one.only_undefended, one.only_defended) for one in found] == [(1, 1)]


def test_only_shared_requests_are_compared():
    (found,) = paired_attacks(
        [outcome("direct", [point({"a": True, "b": False})])], [outcome("direct", [point({"b": True, "c": True})])]
    )
    assert (found.num_requests, found.undefended.numerator, found.point.rate.numerator) == (1, 1, 0)


def test_attacks_of_one_name_must_have_the_same_settings():
    ours, theirs = outcome("harmful", [point([0])]), outcome("harmful", [point([1])])
    with pytest.raises(DataError, match="the same settings on both models, but got steps 10 and 20"):
        paired_attacks([replace(ours, settings={"steps": 10})], [replace(theirs, settings={"steps": 20})])
    with pytest.raises(DataError, match="to be the same attack on both models, but got `harmful` and `other`"):
        paired_attacks([ours], [replace(theirs, attack="other")])
    assert paired_attacks([replace(ours, settings={"search": {}})], [replace(theirs, settings={"steps": 20})])


def trained(*points, name="harmful"):
    """An outcome of fine-tuning: (learning rate, steps, how many of 20 requests were broken)."""
    made = [point(range(n), total=20, spent=steps, learning_rate=rate) for rate, steps, n in points]
    return outcome(name, made, unit="steps")


def test_a_training_that_stops_early_is_compared_at_the_last_budget_of_both():
    ours = trained((1e-4, 50, 1), (1e-4, 100, 3), (1e-3, 0, 0), (1e-3, 50, 19))
    theirs = trained((1e-4, 50, 1), (1e-4, 100, 2), (1e-3, 0, 0), (1e-3, 50, 2), (1e-3, 100, 12))
    for first, second, more in ((ours, theirs, 17), (theirs, ours, -17)):
        found = {str(one.point): one for one in paired_attacks([first], [second])}
        assert list(found) == [
            "harmful (learning_rate 0.0001) at 100 steps",
            "harmful (learning_rate 0.001) at 50 steps",
        ]
        early = found["harmful (learning_rate 0.001) at 50 steps"]
        assert round(20 * early.difference) == more
        assert early.p_holm == 2 * early.p_value
        assert unpaired_attacks([first], [second]) == []


def test_the_budget_is_the_largest_of_both_even_where_one_has_others_in_between():
    (found,) = paired_attacks([trained((1e-4, 10, 1), (1e-4, 30, 9))], [trained((1e-4, 10, 2), (1e-4, 20, 5))])
    assert (found.point.spent, found.point.rate.numerator, found.undefended.numerator) == (10, 1, 2)


def test_what_has_no_budget_in_common_is_named():
    ours, theirs = trained((1e-4, 10, 1), (1e-3, 10, 9)), trained((1e-4, 10, 2), (1e-3, 20, 9), (1e-3, 50, 9))
    assert len(paired_attacks([ours], [theirs])) == 1
    assert unpaired_attacks([ours], [theirs]) == [
        "harmful (learning_rate 0.001): the model was measured at 10 steps, the baseline was measured at 20, 50 steps"
    ]
    with pytest.raises(DataError, match=r"but got none \(harmful .*: the model was measured at 10 steps, the baseline"):
        paired_attacks([trained((1e-3, 10, 9))], [trained((1e-3, 20, 9))])


def test_a_training_that_failed_is_in_no_comparison():
    failed = point(range(9), total=20, learning_rate=1e-3, training="failed", facts={"failed": "Expected luck."})
    start = point([], total=20, learning_rate=1e-3)
    good = trained((1e-4, 10, 8)).points
    broken, whole = (outcome("harmful", [*good, start, *more], unit="steps") for more in ([failed], []))
    both = trained((1e-4, 10, 1), (1e-3, 0, 2), (1e-3, 10, 9))
    for ours, theirs, reason in (
        (broken, both, "the model could not be trained, the baseline was measured at 10 steps"),
        (both, broken, "the model was measured at 10 steps, the baseline could not be trained"),
        (broken, broken, "the model could not be trained, the baseline could not be trained"),
        (whole, both, "the model was not trained, the baseline was measured at 10 steps"),
    ):
        (found,) = paired_attacks([ours], [theirs])
        assert (found.point.setting, found.p_holm) == ({"learning_rate": 1e-4}, found.p_value)
        assert unpaired_attacks([ours], [theirs]) == [f"harmful (learning_rate 0.001): {reason}"]


def test_two_settings_that_are_left_over_are_not_taken_for_each_other():
    ours = outcome("harmful", [point([1], spent=10, rate=1.0), point([], rate=2.0, training="failed")], unit="steps")
    theirs = outcome("harmful", [point([1], spent=10, rate=2.0), point([], rate=1.0, training="failed")], unit="steps")
    with pytest.raises(DataError, match="attack, setting and request in common"):
        paired_attacks([ours], [theirs])
    assert len(unpaired_attacks([ours], [theirs])) == 2


def test_settings_and_requests_of_one_model_alone_are_named():
    ours = outcome("scale", [point([1], factor=0.5), point([1], factor=1.0), point({"x": True}, factor=2.0)])
    theirs = outcome("scale", [point([1], factor=1.0), point({"y": True}, factor=2.0), point([1], factor=3.0)])
    assert len(paired_attacks([ours], [theirs])) == 1
    assert unpaired_attacks([ours], [theirs]) == [
        "scale (factor 0.5): only the model has it",
        "scale (factor 2.0): no request in common",
        "scale (factor 3.0): only the baseline has it",
    ]
    assert unpaired_attacks([ours], [outcome("other", [point([1])])]) == []


def test_prompt_attacks_are_compared_with_all_queries_that_both_had():
    ours, theirs = prompt_outcome("search", {"a": 1, "b": 3}, 4), prompt_outcome("search", {"a": 2, "b": None}, 3)
    (found,) = paired_attacks([ours], [theirs])
    assert (found.point.spent, found.only_defended) == (3, 1)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (outcome("quantise", [point([0])]), outcome("interpolate", [point([0])])),
        (outcome("a", [point({"x": True})]), outcome("a", [point({"y": True})])),
    ],
)
def test_nothing_in_common_is_refused(ours, theirs):
    with pytest.raises(DataError, match="attack, setting and request in common"):
        paired_attacks([ours], [theirs])

"""Running a prompt attack: numbers, judging, interruption, and the points it ends in."""

from __future__ import annotations

import pytest

from experiments.attacks.interface import Attempt, PromptAttack, Query
from experiments.attacks.prompt_run import attack_points, run_prompt_attack
from experiments.attacks.prompts.best_of_n import BestOfN, BestOfNConfig
from experiments.attacks.prompts.code_switching import CodeSwitching, CodeSwitchingConfig
from experiments.attacks.prompts.direct import Direct, DirectConfig
from experiments.attacks.prompts.obfuscation import Obfuscation, ObfuscationConfig
from experiments.attacks.prompts.persona import Persona, PersonaConfig
from experiments.attacks.prompts.prefill import Prefill, PrefillConfig
from experiments.attacks.prompts.templates import Templates, TemplatesConfig
from experiments.attacks.responder import ReplySettings
from experiments.attacks.transcript import Transcript, read_transcript
from experiments.statistics import wilson_interval
from framework.errors import DataError, NoEffectError, SeawallError
from framework.evaluation.judges import Verdict
from framework.evaluation.panel import create_panel, verdict_rates
from framework.examples import Prompt
from tests.experiments.attacks.scripted import ANSWER, REFUSAL, REQUESTS, Scripted

KEY = {"suite": "one"}


def run(attack, responder, path, **options):
    size, missing = options.pop("batch_size", 3), options.pop("max_unanswered", 0)
    settings = ReplySettings(20, batch_size=size, seed=7, max_unanswered=missing)
    return run_prompt_attack(
        attack,
        REQUESTS,
        responder,
        settings=settings,
        judges=create_panel(["rules"]),
        transcript=Transcript(path, KEY),
        **options,
    )


def weak(query: Query, number: int) -> str:
    """Gives in at the third query of r1 and the first of r2."""
    return ANSWER if query.prompt.id in ("r1+3", "r2+1") else REFUSAL


def test_success_is_neither_refusal_nor_degenerate(tmp_path):
    replies = {"r0": REFUSAL, "r1": ANSWER, "r2": "", "r3": REQUESTS[3].text}
    found = run(Direct(DirectConfig()), Scripted(lambda query, _: replies[query.prompt.id]), tmp_path / "t")
    assert [one.is_success for one in found.attempts] == [False, True, False, False]
    assert found.attempts[2].details["degenerate"]
    assert found.attempts[3].details["degenerate"]


def test_repeating_the_disguise_is_no_answer(tmp_path):
    attack = Templates(TemplatesConfig(count=1))
    found = run(attack, Scripted(lambda query, _: query.prompt.text), tmp_path / "t")
    assert not any(one.is_success for one in found.attempts)


def test_asr_at_k_counts_requests_broken_by_then(tmp_path):
    found = run(BestOfN(BestOfNConfig(queries=4)), Scripted(weak), tmp_path / "t")
    points = attack_points(found.attempts, budget=4, num_requests=5)
    shares = [(p.spent, p.metrics["attack_success"]["numerator"]) for p in points]
    assert shares == [(1, 1), (2, 1), (3, 2), (4, 2)]
    assert all(p.metrics["attack_success"]["denominator"] == 4 for p in points)
    attacked = points[-1].metrics["attacked"]
    assert (attacked["numerator"], attacked["denominator"]) == (4, 5)
    assert points[-1].successes == {"r0": False, "r1": True, "r2": True, "r3": False}
    # Broken requests are left alone: r2 after 1 query, r1 after 3.
    assert len(found.attempts) == 4 + 1 + 3 + 4


def test_points_above_fifty_queries_stand_at_round_numbers(tmp_path):
    found = run(Direct(DirectConfig()), Scripted(), tmp_path / "t")
    points = attack_points(found.attempts, budget=120, num_requests=4)
    assert [point.spent for point in points] == [1, 2, 5, 10, 20, 50, 100, 120]


@pytest.mark.parametrize("stop_after", [0, 1, 4, 5, 8, 11])
def test_interrupted_attack_ends_as_if_it_had_not_been(tmp_path, stop_after):
    whole = run(BestOfN(BestOfNConfig(queries=4)), Scripted(weak), tmp_path / "whole")
    path = tmp_path / "cut"
    cut = Scripted(weak, stop_after=stop_after)
    with pytest.raises(KeyboardInterrupt):
        run(BestOfN(BestOfNConfig(queries=4)), cut, path)
    path.write_bytes(path.read_bytes() + b'{"number": 1, "requ')  # killed while it wrote
    rest = Scripted(weak)
    again = run(BestOfN(BestOfNConfig(queries=4)), rest, path)
    assert again.attempts == whole.attempts
    assert again.num_resumed == len(cut.asked)
    assert len(cut.asked) + len(rest.asked) == len(whole.attempts)
    assert path.read_bytes() == (tmp_path / "whole").read_bytes()


def test_attack_says_at_which_temperature_the_model_replies(tmp_path):
    warm, cold = Scripted(), Scripted()
    run(BestOfN(BestOfNConfig(queries=1)), warm, tmp_path / "warm")
    run(Direct(DirectConfig()), cold, tmp_path / "cold")
    assert {one.temperature for one in warm.settings} == {1.0}
    assert {one.temperature for one in cold.settings} == {0.0}


def test_variants_and_judges_have_rates_of_their_own(tmp_path):
    attack = Templates(TemplatesConfig(count=2))
    names = [template.name for template in attack.templates]
    ids = [template.id for template in attack.templates]
    responder = Scripted(lambda query, _: ANSWER if query.prompt.id.endswith(ids[1]) else REFUSAL)
    found = run(attack, responder, tmp_path / "t")
    last = attack_points(found.attempts, budget=2, num_requests=4)[-1]
    assert last.metrics[f"variant/{names[0]}/attack_success"]["value"] == 0
    assert last.metrics[f"variant/{names[1]}/attack_success"]["value"] == 1
    assert last.metrics["judge/rules/refusal_rate"]["value"] == 0.5


def test_forced_opening_is_not_judged(tmp_path):
    class Opened(Direct):
        def variants(self, request, *, seed):
            return [Query(request, Prompt(request.id, request.text, "harmful", prefill="Sure, here is how: "))]

    found = run(Opened(DirectConfig()), Scripted(), tmp_path / "t")
    assert {one.reply for one in found.attempts} == {REFUSAL}
    assert {one.prefill for one in found.attempts} == {"Sure, here is how: "}


def test_reply_in_a_disguise_is_decoded_before_it_is_judged(tmp_path):
    class Backwards(Direct):
        def variants(self, request, *, seed):
            return [Query(request, request, decoded=True)]

        def decode(self, reply, query):
            return reply[::-1]

    found = run(Backwards(DirectConfig()), Scripted(lambda query, _: REFUSAL[::-1]), tmp_path / "t")
    assert not any(one.is_success for one in found.attempts)
    assert found.attempts[0].reply == REFUSAL[::-1]
    assert found.attempts[0].details["decoded_reply"] == REFUSAL


class Loop(PromptAttack):
    """Asks whatever it was made with, round by round."""

    name = "loop"

    def __init__(self, rounds, budget=1):
        super().__init__(None)
        self.rounds, self.most = rounds, budget

    @property
    def budget(self):
        return self.most

    def start(self, requests, *, seed):
        self.left = list(self.rounds)

    def ask(self):
        return self.left.pop(0) if self.left else []


def ask(name: str, request: Prompt = REQUESTS[0]) -> Query:
    return Query(request, Prompt(name, "text", "harmful"))


def test_attack_that_asks_nothing_or_too_much_is_refused(tmp_path):
    with pytest.raises(DataError, match="Expected attack `loop` to ask at least once, but got no query"):
        run(Loop([]), Scripted(), tmp_path / "a")
    with pytest.raises(DataError, match="to ask every query once, but got 'q' twice"):
        run(Loop([[ask("q"), ask("q")]], budget=2), Scripted(), tmp_path / "b")
    with pytest.raises(DataError, match="to keep to 1 queries a request, but got one more of 'r0'"):
        run(Loop([[ask("q1")], [ask("q2")]]), Scripted(), tmp_path / "c")


def test_transcript_longer_than_the_attack_is_refused(tmp_path):
    run(Loop([[ask("q1")], [ask("q2")]], budget=2), Scripted(), tmp_path / "t")
    with pytest.raises(DataError, match="to end with the attack, but got 1 attempts more"):
        run(Loop([[ask("q1")]], budget=2), Scripted(), tmp_path / "t")


class Silent(Scripted):
    """Gives no reply to some queries."""

    def __init__(self, *missing: str, **options) -> None:
        super().__init__(**options)
        self.missing = missing
        self.allowed: list[int] = []

    def reply(self, queries, settings, *, numbers, progress=None):
        self.allowed.append(settings.max_unanswered)
        found = super().reply(queries, settings, numbers=numbers)
        return [None if query.prompt.id in self.missing else reply for query, reply in zip(queries, found, strict=True)]


def test_queries_without_a_reply_are_left_out_and_not_asked_again(tmp_path):
    responder = Silent("r0+1", "r1+1", "r1+2", say=weak)
    found = run(BestOfN(BestOfNConfig(queries=2)), responder, tmp_path / "t", max_unanswered=3, batch_size=2)
    assert found.num_unanswered == 3
    assert {one.query_id for one in found.attempts} == {"r2+1", "r3+1", "r0+2", "r3+2"}
    assert responder.allowed == [3, 1, 1, 0]
    points = attack_points(found.attempts, budget=2, num_requests=4)
    assert [point.successes for point in points] == [
        {"r2": True, "r3": False},
        {"r2": True, "r3": False, "r0": False},
    ]
    again = Silent(stop_after=0)
    resumed = run(BestOfN(BestOfNConfig(queries=2)), again, tmp_path / "t", max_unanswered=3)
    assert (resumed.attempts, resumed.num_unanswered, again.asked) == (found.attempts, 3, [])
    assert len(read_transcript(tmp_path / "t")) == 4
    with pytest.raises(SeawallError, match="at most 2 queries without a reply, but got 3 in the part that was asked"):
        run(BestOfN(BestOfNConfig(queries=2)), again, tmp_path / "t", max_unanswered=2)


def test_points_before_any_reply_are_left_out(tmp_path):
    first = [f"r{number}+1" for number in range(4)]
    found = run(BestOfN(BestOfNConfig(queries=2)), Silent(*first), tmp_path / "t", max_unanswered=4)
    assert [point.spent for point in attack_points(found.attempts, budget=2, num_requests=4)] == [2]


def test_an_attack_without_any_reply_is_refused(tmp_path):
    ids = [request.id for request in REQUESTS]
    with pytest.raises(SeawallError, match="Expected attack `direct` to get at least one reply, but got none"):
        run(Direct(DirectConfig()), Silent(*ids), tmp_path / "t", max_unanswered=9)


class Deployed(Scripted):
    """Has a system message of its own."""

    def identity(self):
        return {**super().identity(), "system": "Be brief."}


def no_words(folder) -> CodeSwitching:
    path = folder / "words.json"
    path.write_text('{"xx": {"nowhere": "nenie"}}')
    return CodeSwitching(CodeSwitchingConfig(dictionary=str(path)))


@pytest.mark.parametrize(
    ("make", "responder"),
    [
        (no_words, Scripted()),
        (lambda _: CodeSwitching(CodeSwitchingConfig(share=0.0)), Scripted()),
        (lambda _: Obfuscation(ObfuscationConfig(strength=0.0)), Scripted()),
        (lambda _: BestOfN(BestOfNConfig(queries=2, sigma=0.0, temperature=0.0)), Scripted()),
        (lambda _: Loop([[Query(one, one, system="Be brief.") for one in REQUESTS]]), Deployed()),
    ],
    ids=["no word known", "share 0", "strength 0", "sigma 0, greedy", "the system message there is"],
)
def test_an_attack_that_changes_nothing_is_not_withstood(make, responder, tmp_path):
    attack = make(tmp_path)
    with pytest.raises(NoEffectError, match=f"Expected attack `{attack.name}` to change at least one request, but got"):
        run(attack, responder, tmp_path / "t")
    # What was asked before is not asked again, and changes nothing again.
    with pytest.raises(NoEffectError, match="the attack changed nothing"):
        run(make(tmp_path), type(responder)(stop_after=0), tmp_path / "t")


@pytest.mark.parametrize(
    "attack",
    [
        Direct(DirectConfig()),
        BestOfN(BestOfNConfig(queries=2, sigma=0.0)),
        Persona(PersonaConfig(names=["empty"])),
        Prefill(PrefillConfig(tokens=[5], replies="opening")),
    ],
    ids=["plain on purpose", "sampled anew", "system message", "prefill"],
)
def test_what_is_plain_on_purpose_or_changes_more_than_the_text_has_an_effect(attack, tmp_path):
    assert len(run(attack, Deployed(), tmp_path / "t").attempts) >= 4


def test_the_share_of_queries_that_were_the_plain_request_is_told(tmp_path):
    rounds = [[Query(one, one) for one in REQUESTS], [ask(f"{one.id}+2", one) for one in REQUESTS[:2]]]
    found = run(Loop(rounds, budget=2), Scripted(), tmp_path / "t")
    assert ["unchanged" in one.details for one in found.attempts] == [True] * 4 + [False] * 2
    first, last = attack_points(found.attempts, budget=2, num_requests=4)
    rate = last.metrics["unchanged_rate"]
    assert (rate["numerator"], rate["denominator"], rate["num_groups"]) == (4, 6, 4)
    assert "unchanged_rate" not in first.metrics


def test_rates_over_replies_have_intervals_over_requests(tmp_path):
    attack = BestOfN(BestOfNConfig(queries=40))
    found = run(attack, Scripted(), tmp_path / "t", batch_size=200)
    last = attack_points(found.attempts, budget=40, num_requests=4)[-1].metrics
    for name in ("refusal_rate", "judge/rules/refusal_rate"):
        rate = last[name]
        assert (rate["numerator"], rate["denominator"], rate["num_groups"]) == (160, 160, 4)
        assert (rate["low"], rate["high"]) == wilson_interval(4, 4)
    degenerate = last["degenerate_rate"]
    assert (degenerate["low"], degenerate["high"], degenerate["denominator"]) == (*wilson_interval(0, 4), 160)


def said(request, number, **verdicts):
    details = {"verdicts": verdicts, "refused": False}
    return Attempt(number, request, f"{request}+{number}", "text", "reply", True, details=details)


def test_every_judges_counts_are_those_of_the_panel():
    rows = [
        ("a", {"one": {"refused": 1.0}, "two": {"refused": 0.0}, "three": {"refused": 1.0}}),
        ("a", {"one": {"refused": 1.0}, "two": {"harmful": 1.0}}),
        ("b", {"one": {"refused": 0.0, "harmful": 0.0}, "two": {"harmful": 1.0}}),
        ("b", {"three": {"refused": 0.0}, "org/two": {}}),
    ]
    attempts = [said(name, number, **verdicts) for number, (name, verdicts) in enumerate(rows, start=1)]
    names = ("one", "two", "three", "org/two")
    expected = verdict_rates({name: [Verdict(**row.get(name, {})) for _, row in rows] for name in names})
    found = attack_points(attempts, budget=4, num_requests=2)[-1].metrics
    assert {key for key in found if key.startswith("judge/")} == set(expected)
    assert "judge/majority/refusal_rate" in expected
    assert "judge/org/two/unknown" in expected
    for key, rate in expected.items():
        assert (found[key]["numerator"], found[key]["denominator"]) == (rate.numerator, rate.denominator), key
        assert found[key]["num_groups"] <= 2

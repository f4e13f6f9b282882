from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from datamodules.mining import MiningSettings, mine_sets
from experiments.contract.tiny import TinyModel, make_tokenizer
from framework.chat import ChatEncoder
from framework.errors import ConfigError, DataError, SeawallError
from framework.evaluation import judges
from framework.evaluation.judges import Verdict
from framework.files import ArtifactStore
from tests.coin_judge import coin_judge
from tests.datamodules.mining.mining_child import main as mine_here

ROOT = Path(__file__).parents[3]


def mine(folder, *, model=None, encoder=None, key="tiny", target="safe", has_benign=True, progress=None, **changes):
    given = {"prompts": 8, "rollouts": 4, "benign_prompts": 4, "max_new_tokens": 6, "judges": ["coin"], "rows": 4}
    return mine_sets(
        model or TinyModel(shift=0.4).build(),
        encoder or ChatEncoder(make_tokenizer()),
        MiningSettings(**(given | changes)),
        model_key=key,
        artifacts=ArtifactStore(folder),
        target=target,
        has_benign=has_benign,
        progress=progress,
    )


def store_of(folder):
    (path,) = Path(folder).rglob("rollouts.jsonl")
    return path


def stored(folder):
    lines = store_of(folder).read_text(encoding="utf-8").split("\n")[1:-1]
    return {(row["prompt"], row["number"]): row for row in map(json.loads, lines)}, len(lines)


def test_every_rollout_is_made_judged_and_kept_once(tmp_path):
    with coin_judge():
        mined = mine(tmp_path)
        rows, lines = stored(tmp_path)
        assert len(rows) == lines == 8 * 4 + 4 * 4
        assert all(one.counts.total == 4 for one in (*mined.harmful, *mined.benign))
        before = store_of(tmp_path).read_bytes()
        assert mine(tmp_path) == mined
        assert store_of(tmp_path).read_bytes() == before
    assert {one.prompt.kind for one in mined.harmful} == {"harmful"}
    for one in mined.harmful:
        texts = [rows[one.prompt.id, number]["reply"] for number in range(4)]
        assert [target.reply for target in one.targets] == [texts[target.number] for target in one.targets]
        assert len(one.targets) <= one.counts.safe
        assert all(target.reply for target in one.targets)
        assert one.outcomes.count("harmful") == one.counts.harmful


def test_more_rollouts_and_prompts_add_to_what_is_there(tmp_path):
    with coin_judge():
        mine(tmp_path)
        before, _ = stored(tmp_path)
        mine(tmp_path, rollouts=6, prompts=10)
        after, lines = stored(tmp_path)
    assert {key: after[key] for key in before} == before
    assert lines == 10 * 6 + 4 * 4


def test_another_judge_looks_at_the_same_rollouts(tmp_path):
    with coin_judge(), coin_judge(name="other", harmful=0.9, varies=False):
        first = mine(tmp_path)
        before = store_of(tmp_path).read_bytes()
        second = mine(tmp_path, judges=["other"])
        assert store_of(tmp_path).read_bytes() == before
    assert sum(one.counts.harmful for one in second.harmful) > sum(one.counts.harmful for one in first.harmful)


def test_an_adaptive_number_takes_the_beginning_of_the_same_rollouts(tmp_path):
    with coin_judge():
        full = mine(tmp_path / "full", rollouts=16)
        part = mine(tmp_path / "part", rollouts=16, adaptive=True)
        rows, _ = stored(tmp_path / "full")
        fewer, lines = stored(tmp_path / "part")
    assert {key: rows[key] for key in fewer} == fewer
    assert lines < len(rows)
    assert min(one.counts.total for one in part.harmful) < 16
    for whole, early in zip(full.harmful, part.harmful, strict=True):
        assert whole.outcomes[: early.counts.total] == early.outcomes


def test_progress_counts_what_is_missing(tmp_path):
    seen = []
    with coin_judge():
        mine(tmp_path, has_benign=False, prompts=4)
        mine(tmp_path, has_benign=False, progress=lambda *numbers: seen.append(numbers))
        assert seen == [(done, 16) for done in range(1, 17)]
        seen.clear()
        mine(tmp_path, rollouts=12, adaptive=True, has_benign=False, progress=lambda *numbers: seen.append(numbers))
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_store_of_another_model_is_refused(tmp_path):
    with coin_judge():
        mine(tmp_path / "cache", store=str(tmp_path / "shared"))
        with pytest.raises(DataError, match=r"got another's .model 'tiny' there, 'other' here"):
            mine(tmp_path / "cache", store=str(tmp_path / "shared"), key="other")
        with pytest.raises(DataError, match=r"max_new_tokens 6 there, 7 here"):
            mine(tmp_path / "cache", store=str(tmp_path / "shared"), max_new_tokens=7)


@pytest.mark.parametrize("changes", [{"wrapped": 0.5}, {"harmful": ["embedded_more", "embedded"]}])
def test_other_prompts_of_the_same_model_add_to_a_named_store(tmp_path, changes):
    named = tmp_path / "named"
    with coin_judge():
        first = mine(tmp_path / "cache", store=str(named))
        before = store_of(named).read_bytes()
        second = mine(tmp_path / "cache", store=str(named), **changes)
    assert first.harmful[0].prompt.id != second.harmful[0].prompt.id
    assert store_of(named).read_bytes().startswith(before)
    ids = [{one.prompt.id for one in mined.harmful} for mined in (first, second)]
    rows, lines = stored(named)
    assert ids[0] & ids[1]
    assert len(rows) == lines == 4 * len(ids[0] | ids[1]) + 4 * 4


def test_a_store_of_another_template_is_refused(tmp_path):
    other = make_tokenizer()
    other.chat_template = other.chat_template.replace("<|end|>", "<|end|> ")
    assert other.chat_template != make_tokenizer().chat_template
    named = str(tmp_path / "named")
    with coin_judge():
        mine(tmp_path / "cache", store=named)
        for encoder in (ChatEncoder(other), ChatEncoder(make_tokenizer(), system="Be brief.")):
            with pytest.raises(DataError, match=r"but got another's .template '\w+' there, '\w+' here"):
                mine(tmp_path / "cache", store=named, encoder=encoder)


def test_a_judge_that_refuses_to_decide_stops_the_mining(tmp_path):
    with (
        coin_judge(harmful=None),
        pytest.raises(SeawallError, match=r"Expected judge `coin` to decide on every rollout, but got no decision on"),
    ):
        mine(tmp_path)
    assert stored(tmp_path)[1] >= 4  # what was made before it was asked is kept


def test_a_prompt_cannot_stand_on_both_sides(tmp_path):
    (tmp_path / "both.csv").write_text("prompt,response\none request,a reply\n")
    sets = {"harmful": [str(tmp_path / "both.csv")], "benign": [str(tmp_path / "both.csv")], "wrapped": 0.0}
    with coin_judge(), pytest.raises(DataError, match=r"to have ids of their own, but got some on both sides. Ids are"):
        mine(tmp_path, prompts=1, benign_prompts=1, benign_wrapped=0.0, **sets)


def test_refusals_need_a_judge_that_knows_them(tmp_path):
    with (
        coin_judge(),
        pytest.raises(ConfigError, match=r"Expected `judges` to hold one that knows refusals, but got h"),
    ):
        mine(tmp_path, judges=["harm"])
    # Of 8 * 4 + 4 * 4: those of the first prompt, and what shared the batch with its last one.
    assert 4 <= stored(tmp_path)[1] < 8
    with coin_judge():
        assert mine(tmp_path, judges=["harm"], has_benign=False).benign == ()


def test_judges_that_never_agree_on_refusals_know_them_nevertheless(tmp_path):
    with coin_judge(name="yes"), coin_judge(name="no"):
        for name, value in (("yes", 1.0), ("no", 0.0)):
            said = Verdict(harmful=0.0, refused=value)
            judges._REGISTRY[name].judge = lambda self, pairs, said=said: [said for _ in pairs]
        mined = mine(tmp_path, judges=["yes", "no"])
    assert all(one.counts.harmful == one.counts.safe == 0 for one in mined.benign)


def test_refusals_may_be_the_only_targets(tmp_path):
    with coin_judge():
        safe, refusal = mine(tmp_path), mine(tmp_path, target="refusal")
    count = [sum(len(one.targets) for one in mined.harmful) for mined in (safe, refusal)]
    assert 0 < count[1] < count[0]
    assert [one.counts for one in safe.harmful] == [one.counts for one in refusal.harmful]


def test_a_killed_mining_goes_on_where_it_was(tmp_path):
    whole, killed, mode = tmp_path / "whole", tmp_path / "killed", "adaptive"
    mine_here(whole, 0.0, is_adaptive=True)
    child = run_child(killed, 0.02, mode)
    while count_lines(killed) < 24 and child.poll() is None:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert not (killed / "chosen.json").exists()
    with store_of(killed).open("ab") as handle:
        handle.write(b'{"prompt": "harm')  # a write that was cut short
    assert count_lines(killed) >= 24
    kept = store_of(killed).read_bytes()
    mine_here(killed, 0.0, is_adaptive=True)
    assert store_of(killed).read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    assert (killed / "chosen.json").read_text() == (whole / "chosen.json").read_text()
    assert json.loads((whole / "chosen.json").read_text())
    rows, lines = stored(killed)
    assert len(rows) == lines  # none twice
    assert rows == stored(whole)[0]  # none lost


def run_child(folder, pause, mode):
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.datamodules.mining.mining_child", str(folder), str(pause), mode]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})


def count_lines(folder):
    return sum(path.read_bytes().count(b"\n") for path in folder.rglob("rollouts.jsonl"))

from __future__ import annotations

import itertools
import json
import warnings

import pytest
import pytorch_lightning as pl
import torch

from callbacks.checkpoint import FiniteCheckpoint
from datamodules.finetune import FineTuneDataModule
from experiments.contract.cases.smh import MINED
from framework.chat import ChatEncoder
from framework.composition import prepare_methods
from framework.errors import ConfigError, DataError, WiringError
from framework.examples import Example, Turn
from framework.files import ArtifactStore
from framework.method import MethodStore
from framework.model_files import model_fingerprint
from methods.smh import SMH, Decision, SMHConfig
from tests.coin_judge import coin_judge
from tests.conftest import make_model, make_tokenizer
from tests.tiny_runs import make_lora, run_fit

TASK = [Example(f"t{i}", (Turn("user", f"word {i}"),), "yes " * (i % 5 + 1)) for i in range(12)]
MINING = {"prompts": 10, "rollouts": 4, "benign_prompts": 6, "max_new_tokens": 5, "judges": ["coin"], "rows": 4}


@pytest.fixture
def mined(tmp_path):
    path = tmp_path / "mined.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in MINED))
    return str(path)


@pytest.fixture
def store(tmp_path):
    make_model().save_pretrained(tmp_path / "start")
    return MethodStore(ArtifactStore(tmp_path / "store"), models={"start": tmp_path / "start"})


def make_data(steps=6, batch_size=4, micro_batch_size=None, task=TASK, max_length=400, **options):
    module = FineTuneDataModule(
        ChatEncoder(make_tokenizer()),
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        total_steps=steps,
        max_length=max_length,
        **options,
    )
    module.add_source("task", task)
    return module


class Seen(pl.Callback):
    """The ids of the rows of every step."""

    def __init__(self):
        self.steps = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        rows = [trainer.datamodule.rows[i].id for i in batch.example_ids.tolist()]
        self.steps.setdefault(trainer.global_step, []).extend(rows)


def train(store, config, *, steps=6, observers=(), **options):
    method, data, model = SMH(config), make_data(steps, micro_batch_size=options.pop("micro", None)), make_model()
    prepare_methods([method], model, data, store)
    seen = Seen()
    accumulate = (data.batch_size // data.micro_batch_size) if data.micro_batch_size else 1
    run = run_fit(
        model,
        [method],
        data=data,
        observers=[seen, *observers],
        accumulate_grad_batches=accumulate,
        total_steps=steps,
        max_steps=steps,
        **options,
    )
    return method, data, seen, run


def kinds(rows):
    return "".join({"smh-s": "h", "smh-b": "b"}.get(row[:5], "t") for row in rows)


def test_the_hardest_prompts_come_first_one_to_one_with_harmless_ones(store, mined):
    config = SMHConfig(mined=mined, count=4, other_rows="leave_out")
    method, data, seen, _ = train(store, config, steps=4)
    assert kinds(row.id for row in data.rows) == "hbhbhbhb"
    rates = {f"smh-safety-{line['id']}": line["counts"][0] for line in MINED if line["kind"] == "harmful"}
    chosen = [rates[row.id] for row in data.rows[::2]]
    assert chosen == sorted(chosen, reverse=True) == sorted(rates.values(), reverse=True)[:4]
    assert [row for step in range(2) for row in seen.steps[step]] == [row.id for row in data.rows]
    assert method.effects["prompts_eligible"] == 5
    assert method.effects["sources_added"] == 3


def test_the_rows_of_the_task_are_spread_among_them(store, mined):
    _, data, seen, _ = train(store, SMHConfig(mined=mined, count=4, ratio=0.5), steps=5)
    rows = kinds(row.id for row in data.rows)
    assert (rows.count("h"), rows.count("b"), rows.count("t")) == (4, 2, 12)
    assert rows.replace("t", "") == "hhbhhb"
    assert max(map(len, rows.replace("b", "h").split("h"))) == 2
    assert kinds(row for step in range(5) for row in seen.steps[step])[:18] == rows


def test_two_selections_teach_a_prompt_the_same_reply(store, mined):
    replies = {}
    for select in ("hard", "random", "top_share"):
        method, data = SMH(SMHConfig(mined=mined, share=1.0, select=select)), make_data()
        prepare_methods([method], make_model(), data, store)
        method.configure_data(data)
        found = {row.id: row.reply for row in data.rows if row.id.startswith("smh-safety")}
        assert replies.setdefault("replies", found) == found
    assert len(found) == 5


def test_a_cut_off_target_is_trained_without_an_end_token(store, tmp_path):
    path = tmp_path / "cut.jsonl"
    lines = [
        {**line, "targets": [[n, reply, line["kind"] == "benign"] for n, reply, _ in line["targets"]]} for line in MINED
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    method, data = SMH(SMHConfig(mined=str(path), share=1.0)), make_data()
    prepare_methods([method], make_model(), data, store)
    method.configure_data(data)
    ends = {
        row.kind: ids.input_ids[-1] == data.encoder.end_ids[0] for row, ids in zip(data.rows, data.encoded, strict=True)
    }
    assert ends == {"safety": False, "benign": True, "task": True}
    assert method.effects["rows_cut_off"] == 5


def test_the_model_is_mined_before_training_and_only_once(store):
    with coin_judge():
        first, data, _, run = train(store, SMHConfig(**MINING, share=1.0))
        files = list((store.artifacts.root / "rollouts").rglob("rollouts.jsonl"))
        before = files[0].read_bytes()
        assert before.count(b"\n") == 1 + 10 * 4 + 6 * 4
        again, same, _, second = train(store, SMHConfig(**MINING, share=1.0))
    assert files[0].read_bytes() == before
    assert [row.id for row in data.rows] == [row.id for row in same.rows]
    assert torch.equal(run.weights, second.weights)
    assert first.effects["prompts_mined"] == again.effects["prompts_mined"] == 10


def test_what_never_breaks_is_refused_with_what_to_change(store):
    with (
        coin_judge(harmful=0.0),
        pytest.raises(DataError, match=r"10 of which all 10 never broke the model. Name harder"),
    ):
        train(store, SMHConfig(**MINING))


def test_mined_prompts_of_another_model_are_refused(store, tmp_path):
    path = tmp_path / "other.jsonl"
    lines = [{"mined_from": "0123456789abcdef"}, *MINED]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match=r"to be mined from the model that is trained .*, but got prompts mined from"):
        train(store, SMHConfig(mined=str(path)))


def test_mined_prompts_for_another_target_are_refused(store, tmp_path):
    path = tmp_path / "safe.jsonl"
    header = {"mined_from": model_fingerprint(tmp_path / "start"), "target": "safe", "judges": ["rules", "harm"]}
    path.write_text("".join(json.dumps(line) + "\n" for line in [header, *MINED]))
    prepare_methods([SMH(SMHConfig(mined=str(path)))], make_model(), make_data(), store)
    for change, text in (({"target": "refusal"}, "`target` 'refusal'"), ({"judges": ["rules"]}, "`judges`")):
        with pytest.raises(DataError, match=f"to be mined with {text}"):
            prepare_methods([SMH(SMHConfig(mined=str(path), **change))], make_model(), make_data(), store)


def test_rows_that_are_too_long_are_dropped_before_the_rest_is_ordered(store, tmp_path):
    path, long = tmp_path / "long.jsonl", "word " * 100
    lines = [{**line, "prompt": long if line["id"] == "harmful-1" else line["prompt"]} for line in MINED]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = make_data(max_length=120, overflow="drop")
    method = SMH(SMHConfig(mined=str(path), share=1.0, other_rows="leave_out"))
    prepare_methods([method], make_model(), data, store)
    method.configure_data(data)
    assert kinds(row.id for row in data.rows) == "hbhbhbhb"
    assert data.overflow_report.too_long == 1
    assert len(data.encoded) == len(data.rows)


def long_file(tmp_path, which):
    """Mined prompts, some of them longer than any row may be."""
    path = tmp_path / "long.jsonl"
    lines = [{**line, "prompt": "word " * 100 if which(line) else line["prompt"]} for line in MINED]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_rows_that_do_not_fit_are_counted_and_never_all_of_them(store, tmp_path):
    data = make_data(max_length=120, overflow="drop")
    method = SMH(SMHConfig(mined=long_file(tmp_path, lambda line: line["id"] == "harmful-1"), share=1.0))
    prepare_methods([method], make_model(), data, store)
    method.configure_data(data)
    assert kinds(row.id for row in data.rows).replace("t", "") == "hbhbhbhb"
    assert (method.effects["harmful_rows_dropped"], method.effects["rows_mixed_in"]) == (1, 8)
    data = make_data(max_length=120, overflow="drop")
    method = SMH(SMHConfig(mined=long_file(tmp_path, lambda line: line["kind"] == "harmful"), share=1.0))
    prepare_methods([method], make_model(), data, store)
    method.configure_data(data)
    with pytest.raises(DataError, match=r"some of 5 mined rows to fit, but got none.*Raise `max_length`"):
        data.rows  # noqa: B018


def test_rows_that_are_not_mixed_in_are_not_counted_as_cut_off(store, tmp_path):
    path = tmp_path / "cut.jsonl"
    lines = [{**line, "targets": [[n, reply, False] for n, reply, _ in line["targets"]]} for line in MINED]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for ratio, expected in ((0.0, 4), (0.5, 6)):
        method, data = SMH(SMHConfig(mined=str(path), count=4, ratio=ratio)), make_data()
        prepare_methods([method], make_model(), data, store)
        method.configure_data(data)
        assert len(data.rows) == 12 + expected
        assert method.effects["rows_cut_off"] == method.effects["rows_mixed_in"] == expected


def test_harmless_prompts_matter_only_where_they_are_mixed_in(store, tmp_path):
    path = tmp_path / "refused.jsonl"
    lines = [{**line, "targets": [] if line["kind"] == "benign" else line["targets"]} for line in MINED]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare_methods([SMH(SMHConfig(mined=str(path), ratio=0.0))], make_model(), make_data(), store)
    with pytest.raises(DataError, match=r"or set `ratio` to 0"):
        prepare_methods([SMH(SMHConfig(mined=str(path)))], make_model(), make_data(), store)
    path.write_text("".join(json.dumps(line) + "\n" for line in MINED if line["kind"] == "harmful"))
    prepare_methods([SMH(SMHConfig(mined=str(path), ratio=0.0))], make_model(), make_data(), store)
    with pytest.raises(DataError, match=r"refused.jsonl` to hold harmless prompts for `ratio` 1.0, but got none. Mine"):
        prepare_methods([SMH(SMHConfig(mined=str(path)))], make_model(), make_data(), store)


def test_settings_that_cannot_work_are_refused_before_anything_is_mined():
    with pytest.raises(ConfigError, match=r"`count` to be at most `prompts`, 240, but got 500. Raise `prompts`"):
        SMHConfig(count=500)
    assert SMHConfig(count=500, mined="file.jsonl").count == 500
    assert SMH(SMHConfig(balance="controlled")).supports == {"single", "ddp"}
    assert "fsdp2" in SMH(SMHConfig()).supports


def test_without_preparation_or_data_there_are_no_rows(mined, store):
    with pytest.raises(WiringError, match=r"has no mined rows yet. Call `prepare_methods"):
        SMH(SMHConfig(mined=mined)).configure_data(make_data())
    with pytest.raises(WiringError, match=r"needs the stage's data module for its prompts, but got none"):
        SMH(SMHConfig(mined=mined)).prepare(make_model(), None, store)


# ---- the controller --------------------------------------------------------------------------------------------------

CONTROLLED = {"balance": "controlled", "share": 1.0, "block_steps": 4, "other_rows": "leave_out", "probe_prompts": 3}


class Scripted(SMH):
    """Measures what the script says."""

    script = ((1.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.0, 1.0), (0.0, 1.0))

    def _measure(self, model, datamodule):
        return self.script[len(self.decisions)]


def scripted(store, config, *, steps, **options):
    method, data, model = Scripted(config), make_data(steps, micro_batch_size=2), make_model()
    method.name = "smh"
    prepare_methods([method], model, data, store)
    seen = Seen()
    run = run_fit(
        model,
        [method],
        data=data,
        observers=[seen, *options.pop("observers", ())],
        accumulate_grad_batches=2,
        total_steps=steps,
        max_steps=options.pop("stop", steps),
        **options,
    )
    return method, data, seen, run


def test_the_ratio_follows_what_is_measured(store, mined):
    config = SMHConfig(mined=mined, **CONTROLLED)
    method, _, seen, _ = scripted(store, config, steps=24)
    assert [decision.step for decision in method.decisions] == [4, 8, 12, 16, 20]
    ratios = [decision.ratio for decision in method.decisions]
    assert ratios[0] == ratios[1] == 4.0
    assert ratios[2] < ratios[1]
    assert ratios[-1] == 0.25
    shares = ["".join(kinds(seen.steps[s]) for s in range(a, a + 4)).count("b") / 16 for a in range(0, 24, 4)]
    for share, ratio in zip(shares, [1.0, *ratios], strict=True):
        assert abs(share - ratio / (1 + ratio)) <= 1 / 16
    logged = {key: value for key, value in method.reports.items() if key.startswith("decision/")}
    assert len(logged) == 15
    assert logged["decision/8/ratio"] == 4.0
    assert method.reports["refusal"] == 0.0


def test_a_step_counts_the_reply_tokens_it_serves(store, mined):
    _, data, seen, run = scripted(store, SMHConfig(mined=mined, **CONTROLLED), steps=12)
    by_id = {row.id: ids.num_reply_tokens for row, ids in zip(data.rows, data.encoded, strict=True)}
    expected = sum(by_id[row] for rows in seen.steps.values() for row in rows)
    assert run.module.reply_tokens_seen == expected
    live = data._live
    assert [live.step_reply_tokens(s) for s in range(12)] == [sum(by_id[r] for r in seen.steps[s]) for s in range(12)]


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_an_interrupted_run_goes_on_under_its_decisions(store, mined, tmp_path):
    config = SMHConfig(mined=mined, **CONTROLLED)
    whole, _, seen, run = scripted(store, config, steps=16)

    def writers():
        given = {"every_n_train_steps": 5, "save_on_train_epoch_end": False, "filename": "{step}"}
        return [FiniteCheckpoint(dirpath=tmp_path / "ckpt", **given)]

    first = scripted(store, config, steps=16, stop=10, writers=writers())[0]
    assert len(first.decisions) == 2
    checkpoint = sorted((tmp_path / "ckpt").glob("*step=10*"))[0]
    resumed, _, rest, again = scripted(store, config, steps=16, ckpt_path=str(checkpoint), writers=writers())
    assert resumed.decisions == whole.decisions
    assert {step: seen.steps[step] for step in range(10, 16)} == rest.steps
    assert torch.equal(run.weights, again.weights)


@pytest.mark.filterwarnings("ignore:The margin of")  # an untrained model refuses all or nothing
@pytest.mark.parametrize("probe", ["margin", "replies"])
def test_the_model_is_measured_while_it_trains(store, mined, probe):
    config = SMHConfig(mined=mined, **{**CONTROLLED, "block_steps": 2, "probe": probe, "probe_tokens": 3})
    method, _, _, _ = train(store, config, steps=4)
    (decision,) = method.decisions
    assert 0 <= decision.refusal <= 1
    assert 0 <= decision.compliance <= 1
    assert decision.step == 2


@pytest.mark.parametrize(
    ("probe", "harmful", "benign", "warned"),
    [
        ("margin", 1.0, 1.0, "every"),
        ("margin", 0.0, 0.0, "no"),
        ("margin", 1.0, 0.0, ""),
        ("margin", 0.5, 0.5, ""),
        ("replies", 1.0, 1.0, ""),
    ],
)
def test_a_margin_that_tells_no_side_from_the_other_is_warned_about(store, mined, probe, harmful, benign, warned):
    class Told(SMH):
        def _refused(self, model, datamodule, prompts):
            return harmful if next(self.turns) % 2 == 0 else benign

    method = Told(SMHConfig(mined=mined, **{**CONTROLLED, "block_steps": 2, "probe": probe}))
    method.name, method.turns = "smh", itertools.count()
    data, model = make_data(4), make_model()
    prepare_methods([method], model, data, store)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_fit(model, [method], data=data, total_steps=4, max_steps=4)
    assert (method.decisions[0].refusal, method.decisions[0].compliance) == (harmful, 1.0 - benign)
    said = [str(w.message) for w in caught if "moves one way only. Set `probe: replies`" in str(w.message)]
    assert [text.split(" prompt")[0] for text in said] == ([f"The margin of `smh` calls {warned}"] if warned else [])


class Disturbing(SMH):
    """Measures as the method does, and draws a random number."""

    def _measure(self, model, datamodule):
        torch.rand(1)
        return super()._measure(model, datamodule)


class Deafening(SMH):
    """Measures as the method does, and leaves the model in another mode."""

    def _measure(self, model, datamodule):
        found = super()._measure(model, datamodule)
        model.eval()
        return found


def with_dropout(store, mined, block_steps, kind=SMH):
    """The weights after a fit with dropout."""
    method, data = kind(SMHConfig(mined=mined, **{**CONTROLLED, "block_steps": block_steps, "gain": 0.0})), make_data(4)
    method.name, method.allow_no_effect = "smh", True
    model = make_lora(make_model(), dropout=0.5)
    prepare_methods([method], model, data, store)
    torch.manual_seed(0)
    weights = run_fit(model, [method], data=data, total_steps=4, max_steps=4).weights
    assert len(method.decisions) == (3 if block_steps == 1 else 0)
    return weights


def test_measuring_changes_no_random_number_and_no_mode(store, mined):
    plain = with_dropout(store, mined, 99)
    assert torch.equal(with_dropout(store, mined, 1), plain)
    for broken in (Disturbing, Deafening):
        assert not torch.equal(with_dropout(store, mined, 1, broken), plain)


@pytest.mark.parametrize("block_steps", [6, 20])
def test_a_controller_that_would_never_measure_is_refused_unless_that_is_wanted(store, mined, block_steps):
    method = SMH(SMHConfig(mined=mined, **{**CONTROLLED, "block_steps": block_steps}))
    text = rf"Expected `smh.block_steps` to be below the 6 steps of the stage .*, but got {block_steps}. Lower it"
    with pytest.raises(ConfigError, match=text):
        prepare_methods([method], make_model(), make_data(6), store)
    method.allow_no_effect = True
    prepare_methods([method], make_model(), make_data(6), store)
    assert method.effects["prompts_mined"] == 6


def test_decisions_outlive_the_process(mined):
    method = SMH(SMHConfig(mined=mined, **CONTROLLED))
    method.decisions = [Decision(4, 2.0, 0.5, 0.25)]
    fresh = SMH(SMHConfig(mined=mined, **CONTROLLED))
    fresh.load_state_dict(json.loads(json.dumps(method.state_dict())))
    assert fresh.decisions == method.decisions


def test_a_controller_refuses_a_model_in_parts(store, mined):
    method = SMH(SMHConfig(mined=mined, **CONTROLLED))

    class FakeFSDP2:
        strategy = type("ModelParallelStrategy", (), {})()

    with pytest.raises(WiringError, match=r"measures the whole model, but the trainer's strategy is `fsdp2`"):
        method.setup(FakeFSDP2(), None, "fit")

"""Sweeps: W&B's files and their meaning, budgets, several workers, lost trials, pruning, goals."""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import platform
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest

from callbacks.telemetry import RefusalMarginProbe
from experiments import run as run_module
from experiments import sweep as sweep_module
from experiments.agent_arguments import agent_settings
from experiments.cli import build_parser, main
from experiments.run_folder import only_process
from experiments.sweep import PruneByMargin, SweepOptions, check_sweep, goal_values, run_sweep, trial_config
from experiments.sweep_files import SweepFile, SweepGoal, agent_lines, grid_points, load_sweep
from experiments.sweep_store import CANCELLED, RETRY, WORKER, counted_trials, requeue_lost
from framework.errors import ConfigError, TrainingError
from framework.registry import validate_methods

WEIGHTS = """
program: seawall
command: ["${env}", seawall, run, quickstart, "${args}"]
method: bayes
metric: {name: eval/attack_success, goal: minimize}
run_cap: 7
parameters:
  method: {values: [asft, l2_to_start]}
  methods.asft.weight: {distribution: log_uniform_values, min: 0.1, max: 10.0}
  methods.l2_to_start.weight: {values: [0.5, 1.0]}
  seed: {value: 3}
"""


def write(tmp_path: Path, text: str = WEIGHTS, **changes: str) -> Path:
    for old, new in changes.items():
        text = text.replace(old, new)
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Configs of the runs that a sweep started; a stand-in measures them at once."""
    started: list[Any] = []

    def measure(config: Any, **options: Any) -> dict[str, Any]:
        started.append(config)
        weight = next(iter(config.stages.finetune.methods.values()))["weight"]
        rate = {"value": abs(math.log10(weight)), "numerator": 1, "denominator": 2}
        metrics = {"attack_success": rate, "task_accuracy": {"value": 1 / (1 + weight)}}
        return {"rows": [{"metrics": metrics}]}

    monkeypatch.setattr(sweep_module, "run_recipe", measure)
    return started


def start(tmp_path: Path, sweep: SweepFile, **options: Any) -> dict[str, Any]:
    chosen = SweepOptions(**options)
    return run_sweep(sweep, chosen, budgets=check_sweep(sweep, chosen), folder=tmp_path / "out")


def test_the_sweeps_that_come_with_the_project_are_valid_by_wandbs_schema() -> None:
    folder = Path(sweep_module.__file__).parent / "configs" / "sweep"
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    assert names == ["projector", "weights"]
    for name in names:
        sweep = load_sweep(name)
        assert sweep.recipe == "quickstart"
        assert check_sweep(sweep, SweepOptions(), validate_methods=validate_methods)


def test_every_method_has_the_same_budget_of_its_own(tmp_path: Path, runs: list[Any]) -> None:
    found = start(tmp_path, load_sweep(write(tmp_path)))
    assert [(one["method"], one["budget"], len(one["trials"])) for one in found["methods"]] == [
        ("asft", 3, 3),
        ("l2_to_start", 3, 3),
    ]
    assert [next(iter(config.stages.finetune.methods)) for config in runs] == ["asft"] * 3 + ["l2_to_start"] * 3
    assert {config.seed for config in runs} == {3}
    best = found["methods"][0]
    reached = [trial["reached"]["eval/attack_success"] for trial in best["trials"]]
    assert best["trials"][best["best"][0]]["reached"]["eval/attack_success"] == min(reached)
    assert json.loads((tmp_path / "out" / "sweep.json").read_text())["methods"] == found["methods"]


def test_started_again_nothing_is_repeated(tmp_path: Path, runs: list[Any]) -> None:
    sweep = load_sweep(write(tmp_path))
    first = start(tmp_path, sweep)
    count = len(runs)
    assert start(tmp_path, sweep)["methods"] == first["methods"]
    assert len(runs) == count
    assert len(start(tmp_path, sweep, trials=5)["methods"][0]["trials"]) == 5


def test_an_interrupted_sweep_draws_what_an_undisturbed_one_draws(tmp_path: Path, runs: list[Any]) -> None:
    sweep = load_sweep(write(tmp_path), goals=[])
    whole = start(tmp_path / "a", sweep, trials=4, sampler="random")
    start(tmp_path / "b", sweep, trials=2, sampler="random")
    parts = start(tmp_path / "b", sweep, trials=4, sampler="random")
    assert [t["values"] for t in parts["methods"][0]["trials"]] == [t["values"] for t in whole["methods"][0]["trials"]]


def test_a_lost_trial_moves_no_later_draw(tmp_path: Path, runs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = load_sweep(write(tmp_path), goals=[])
    whole = start(tmp_path / "a", sweep, trials=4, sampler="random")["methods"][0]["trials"]
    execute, deaths = sweep_module._execute, []

    def die(trial: Any, *given: Any) -> list[float]:
        if trial.number == 1 and not deaths:
            deaths.append(trial.number)
            trial.set_user_attr(WORKER, [platform.node(), 2**22 + 1])  # of a process that is gone
            raise KeyboardInterrupt
        return execute(trial, *given)

    monkeypatch.setattr(sweep_module, "_execute", die)
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "b", sweep, trials=4, sampler="random")
    parts = start(tmp_path / "b", sweep, trials=4, sampler="random")["methods"][0]["trials"]
    assert [trial["state"] for trial in parts] == ["complete", "fail", "complete", "complete", "complete"]
    done = [trial["values"] for trial in parts if trial["state"] == "complete"]
    assert done == [trial["values"] for trial in whole]


def test_a_trial_that_died_being_cancelled_is_not_run_again(tmp_path: Path) -> None:
    study = optuna.create_study(storage=f"sqlite:///{tmp_path / 'trials.db'}")
    trial = study.ask()
    trial.set_user_attr(WORKER, [platform.node(), 2**22 + 1])
    trial.set_user_attr(CANCELLED, True)
    requeue_lost(study)
    assert [one.state.name for one in study.trials] == ["FAIL"]


def hold(folder: Path, ready: Any, done: Any) -> None:
    with only_process(folder, "run"):
        ready.set()
        done.wait(60)


def test_a_trial_waits_for_another_worker_that_drew_the_same_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    entered: list[bool] = []

    class Chain:  # what comes after the lock
        def __init__(self, *given: Any) -> None:
            entered.append(done.is_set())
            raise TrainingError("the loss is not a number")

    monkeypatch.setattr(run_module, "StageChain", Chain)
    monkeypatch.setattr(run_module, "check_evaluation", lambda *given: None)
    console = SimpleNamespace(print=lambda text, **options: done.set())
    monkeypatch.setattr(run_module, "Steps", lambda console: contextlib.nullcontext(SimpleNamespace(task=None)))
    monkeypatch.setattr(run_module, "_watch", lambda *given: None)
    sweep, options = load_sweep(write(tmp_path, GRID)), SweepOptions(trials=1)
    point = sweep_module._shuffled(grid_points(sweep.of_method("asft")), options.seed)[0]
    config = trial_config(sweep, options, "asft", point)
    other = context.Process(target=hold, args=(Path(config.output) / config.name, ready, done))
    other.start()
    assert ready.wait(60)
    found = run_sweep(sweep, options, budgets={"asft": 1}, folder=tmp_path / "out", console=console)  # type: ignore[arg-type]
    other.join()
    assert entered == [True]
    assert found["methods"][0]["trials"][0]["error"] == "the loss is not a number"


def test_trials_of_another_sweep_are_not_counted(tmp_path: Path, runs: list[Any]) -> None:
    start(tmp_path, load_sweep(write(tmp_path)), trials=2)
    count = len(runs)
    changed = load_sweep(write(tmp_path, **{"max: 10.0": "max: 20.0"}))
    said = r"Expected the sweep 'mine/asft' to be as its trials were made, .*weight\.max: 10\.0 -> 20\.0"
    with pytest.raises(ConfigError, match=said):
        start(tmp_path, changed, trials=2)
    with pytest.raises(ConfigError, match="overrides"):
        start(tmp_path, load_sweep(write(tmp_path)), trials=2, overrides=("seed=4",))
    assert len(runs) == count
    start(tmp_path, load_sweep(write(tmp_path, **{"run_cap: 7": "run_cap: 9"})))  # the budget may grow
    assert len(runs) > count


def test_two_workers_that_ask_at_once_draw_different_values(tmp_path: Path) -> None:
    import optuna

    sweep = load_sweep(write(tmp_path), goals=[])
    study = optuna.create_study(storage=f"sqlite:///{tmp_path / 'trials.db'}", directions=["minimize"])
    options = SweepOptions(sampler="random")
    trials = [study.ask() for _ in range(2)]
    points = []
    for trial in trials:
        study.sampler = sweep_module.create_sampler("random", seed=options.seed, number=trial.number)
        points.append(sweep_module._suggest(trial, study, sweep, options, "asft"))
    assert points[0] != points[1]


GRID = (
    WEIGHTS.replace("bayes", "grid")
    .replace("run_cap: 7\n", "")
    .replace("{distribution: log_uniform_values, min: 0.1, max: 10.0}", "{values: [0.1, 1.0, 10.0]}")
)


def test_a_grid_is_done_once_and_equally_for_all_methods(tmp_path: Path, runs: list[Any]) -> None:
    sweep = load_sweep(write(tmp_path, GRID))
    assert check_sweep(sweep, SweepOptions()) == {"asft": 2, "l2_to_start": 2}
    assert check_sweep(sweep, SweepOptions(full_grid=True)) == {"asft": 3, "l2_to_start": 2}
    found = start(tmp_path, sweep, full_grid=True)
    weights = [trial["values"]["methods.asft.weight"] for trial in found["methods"][0]["trials"]]
    assert sorted(weights) == [0.1, 1.0, 10.0]


def test_several_objectives_give_a_front(tmp_path: Path, runs: list[Any]) -> None:
    goals = [SweepGoal("attack_success", "minimize"), SweepGoal("task_accuracy", "maximize")]
    found = start(tmp_path, load_sweep(write(tmp_path, GRID), goals=goals), full_grid=True)
    one = found["methods"][0]
    assert [trial["values"]["methods.asft.weight"] for trial in one["trials"] if not trial["is_best"]] == [10.0]


def test_a_lost_trial_is_run_again_with_its_values(tmp_path: Path, runs: list[Any]) -> None:
    sweep = load_sweep(write(tmp_path))
    folder = tmp_path / "out"
    folder.mkdir()
    study = optuna.create_study(
        storage=f"sqlite:///{folder / 'trials.db'}", study_name="mine/asft", directions=["minimize"]
    )
    lost = study.ask()
    lost.suggest_float("methods.asft.weight", 0.1, 10.0, log=True)
    lost.set_user_attr(WORKER, [__import__("platform").node(), 2**22 + 1])
    found = start(tmp_path, sweep, trials=1)["methods"][0]
    assert [trial["state"] for trial in found["trials"]] == ["fail", "complete"]
    assert found["trials"][1]["values"]["methods.asft.weight"] == lost.params["methods.asft.weight"]


def test_a_trial_beyond_the_budget_is_cancelled(
    tmp_path: Path, runs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = load_sweep(write(tmp_path))
    start(tmp_path, sweep, trials=1)
    calls = iter([[], None])

    def late(study: Any) -> Any:  # another worker's trial shows only after this one has asked
        given = next(calls, None)
        return counted_trials(study) if given is None else given

    monkeypatch.setattr(sweep_module, "counted_trials", late)
    count = len(runs)
    found = start(tmp_path, sweep, trials=1)
    assert len(runs) == count
    assert [len(one["trials"]) for one in found["methods"]] == [1, 1]
    study = optuna.load_study(storage=f"sqlite:///{tmp_path / 'out' / 'trials.db'}", study_name="mine/asft")
    assert [trial.user_attrs.get(CANCELLED) for trial in study.trials] == [None, True]
    assert RETRY not in study.trials[0].user_attrs


def test_a_run_that_fails_is_noted_and_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: Any, **options: Any) -> Any:
        raise TrainingError("the loss is not a number")

    monkeypatch.setattr(sweep_module, "run_recipe", fail)
    found = start(tmp_path, load_sweep(write(tmp_path)), trials=1)
    assert found["methods"][0]["trials"][0]["state"] == "fail"
    assert found["methods"][0]["trials"][0]["error"] == "the loss is not a number"


def test_a_metric_that_is_not_measured_ends_the_sweep(tmp_path: Path, runs: list[Any]) -> None:
    sweep = load_sweep(write(tmp_path), goals=[SweepGoal("eval/atack_success")])
    with pytest.raises(ConfigError, match="Did you mean 'eval/attack_success'"):
        start(tmp_path, sweep)
    with pytest.raises(ConfigError, match="Expected `metric` to be one of"):
        goal_values([SweepGoal("loss")], {"task_accuracy": {"value": 1.0}})


class Trial:
    def __init__(self, stop_at: int = 99) -> None:
        self.reports: list[tuple[float, int]] = []
        self.stop_at = stop_at

    def report(self, value: float, step: int) -> None:
        self.reports.append((value, step))

    def should_prune(self) -> bool:
        return len(self.reports) >= self.stop_at


def test_the_margin_of_training_prunes() -> None:
    probe = RefusalMarginProbe(lambda model: 0.0, every=5)
    trial = Trial(stop_at=2)
    watcher = PruneByMargin(trial, sign=-1.0)  # type: ignore[arg-type]
    trainer: Any = SimpleNamespace(callbacks=[watcher, probe])
    watcher.on_train_batch_end(trainer, None, None, None, 0)  # type: ignore[arg-type]
    assert trial.reports == []
    probe.history.append((5, 1.5))
    watcher.on_train_batch_end(trainer, None, None, None, 1)  # type: ignore[arg-type]
    assert trial.reports == [(-1.5, 5)]
    probe.history.append((10, -2.0))
    with pytest.raises(optuna.TrialPruned, match=r"refusal margin -2.000 at step 10"):
        watcher.on_train_batch_end(trainer, None, None, None, 2)  # type: ignore[arg-type]


def test_pruned_trials_are_kept_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def prune(config: Any, *, watchers: Any, **options: Any) -> Any:
        seen.append((config.trainer.probe_every_n_steps, len(watchers("align")), len(watchers("finetune"))))
        raise optuna.TrialPruned("behind")

    monkeypatch.setattr(sweep_module, "run_recipe", prune)
    found = start(tmp_path, load_sweep(write(tmp_path)), trials=1, prune=True)
    assert found["methods"][0]["trials"][0]["state"] == "pruned"
    assert seen == [(10, 0, 1)] * 2


def test_early_terminate_asks_for_pruning(tmp_path: Path) -> None:
    text = WEIGHTS + "early_terminate: {type: hyperband, min_iter: 10, eta: 2}\n"
    sweep = load_sweep(write(tmp_path, text))
    config = trial_config(sweep, SweepOptions(), "asft", {"methods.asft.weight": 2.0})
    assert config.trainer.probe_every_n_steps == 10
    goals = [SweepGoal("attack_success"), SweepGoal("over_refusal")]
    with pytest.raises(ConfigError, match="Expected one objective with pruning, but got several"):
        check_sweep(load_sweep(write(tmp_path, text), goals=goals), SweepOptions())


def test_values_the_recipe_refuses_are_found_before_anything_runs(tmp_path: Path) -> None:
    text = GRID.replace("[0.1, 1.0, 10.0]", "[-1.0]").replace("l2_to_start]", "asfd]")
    with pytest.raises(ConfigError) as caught:
        check_sweep(load_sweep(write(tmp_path, text)), SweepOptions(), validate_methods=validate_methods)
    assert "to be a number >= 0, but got -1.0" in str(caught.value)
    assert "but got 'asfd'" in str(caught.value)
    with pytest.raises(ConfigError, match="Expected every parameter of a grid to have finitely many values, but got"):
        check_sweep(load_sweep(write(tmp_path)), SweepOptions(sampler="grid"))
    capped = load_sweep(write(tmp_path, WEIGHTS.replace("run_cap: 7", "run_cap: 1")))
    with pytest.raises(ConfigError, match="Expected `run_cap` to leave every one of 2 methods a run, but got 1"):
        check_sweep(capped, SweepOptions())


def test_bad_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        SweepOptions(trials=0, sampler="bayes")
    assert len(caught.value.problems) == 2
    with pytest.raises(ConfigError, match="Expected `storage` to be the URL of a database, but got 'nowhere'"):
        start(tmp_path, load_sweep(write(tmp_path)), storage="nowhere")


def test_the_commands_of_wandbs_agents_are_printed_and_accepted(tmp_path: Path, capsys: Any) -> None:
    path = write(tmp_path)
    assert main(["sweep", str(path), "--print-wandb"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == agent_lines(load_sweep(path))
    assert lines[0] == f"wandb sweep {path}"
    assert "seawall run quickstart --method=asft --methods.asft.weight=NUMBER" in lines[2]
    given = ["--method=asft", "--methods.asft.weight=2.5", "--methods.l2_to_start.weight=0.5", "--seed=3"]
    assert agent_settings(["max_steps=1", *given]) == [
        "max_steps=1",
        "method=asft",
        "methods.asft.weight=2.5",
        "seed=3",
    ]
    _, rest = build_parser().parse_known_args(["run", "quickstart", *given])
    assert rest == given


def test_the_budgets_and_trials_are_shown(tmp_path: Path, runs: list[Any], capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    path = str(write(tmp_path))
    assert main(["sweep", path, "--dry-run"]) == 0
    assert capsys.readouterr().out == "asft: 3 trials\nl2_to_start: 3 trials\n"
    assert main(["sweep", path, "--trials", "1", f"output={tmp_path}"]) == 0
    assert "mine: asft, 1 of 1 trials" in capsys.readouterr().out
    assert (tmp_path / "sweep" / "mine" / "trials.db").is_file()
    assert main(["sweep", path, "--objective", "attack_success"]) == 2
    assert "Expected `--objective` to be metric:minimize" in capsys.readouterr().err

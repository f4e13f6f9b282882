from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from experiments.attacks.suite import load_suite
from experiments.commands.output import known_names
from experiments.sweep import SweepOptions, check_sweep
from experiments.sweep_files import load_sweep
from framework.config import (
    CONFIG_FOLDER,
    KnownNames,
    load_evaluate_config,
    load_run_config,
    method_settings,
    parse_overrides,
    to_yaml,
)
from framework.errors import ConfigError
from framework.registry import known_methods, validate_methods
from framework.study import load_study_config, study_cells

RECIPE = """
model: {name: some/model}
stages:
  align: {data: {safety: embedded, benign: embedded}}
  finetune: {data: {task: triage, task_count: 100, harmful_share: 0.1}, methods: {asft: {weight: 1.0}}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE)
    return path


def problems_of(recipe: Path, *overrides: str, **options: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_run_config(recipe, overrides, **options)
    return caught.value.problems


def test_every_configuration_that_comes_with_the_project_loads() -> None:
    files = sorted(CONFIG_FOLDER.rglob("*.yaml"))
    checks: dict[str, Any] = {"known": known_names(), "validate_methods": validate_methods}
    for path in files:
        if path.parent.name == "study":
            assert study_cells(load_study_config(path), **checks)
        elif path.parent.name == "method":
            assert list(method_settings(path.stem)) == [path.stem]
            assert load_run_config("quickstart", [f"method={path.stem}"], **checks)
        elif path.parent.name == "sweep":
            assert check_sweep(load_sweep(path), SweepOptions(), **checks)
        elif path.parent.name == "attack":
            assert load_suite(str(path))[1]
        else:
            assert load_run_config(path, **checks).name == path.stem
    assert Counter(path.parent.name for path in files) == {
        "recipe": 6,
        "study": 8,
        "sweep": 2,
        "attack": 5,
        "method": len(known_methods()),
    }


def test_a_recipe_is_found_by_name_or_path_and_named_after_its_file(recipe: Path) -> None:
    assert load_run_config("quickstart").name == "quickstart"
    assert load_run_config(recipe).name == "mine"
    assert load_run_config(recipe, ["name=other"]).name == "other"


def test_values_come_from_defaults_then_file_then_command_line(recipe: Path) -> None:
    config = load_run_config(recipe, ["seed=1", "learning_rate=5e-5", "stages.finetune.methods.asft.weight=0.5"])
    assert (config.seed, config.learning_rate, config.batch_size) == (1, 5e-5, 8)
    assert config.stages.finetune is not None
    assert config.stages.finetune.methods == {"asft": {"weight": 0.5}}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model=other", "other"),
        ("model.name=other", "other"),
        ("model={name: other}", "other"),
    ],
)
def test_model_is_a_shorthand_for_its_name(recipe: Path, override: str, expected: str) -> None:
    assert load_run_config(recipe, [override]).model.name == expected
    assert load_run_config(recipe, [override, "model.dtype=float32"]).model.dtype == "float32"


def test_a_stage_is_dropped_by_null(recipe: Path) -> None:
    config = load_run_config(recipe, ["stages.align=null"])
    assert [name for name, _ in config.active_stages()] == ["finetune"]


def test_a_stage_keeps_the_rest_of_an_adapter_it_changes(recipe: Path) -> None:
    config = load_run_config(
        recipe, ["adapter={rank: 4, alpha: 9, targets: all-linear}", "stages.align.adapter.rank=2"]
    )
    assert (config.training("align").adapter.rank, config.training("align").adapter.alpha) == (2, 9.0)
    assert config.training("finetune").adapter.rank == 4
    assert config.training("align").adapter.target_modules == "all-linear"


def test_epochs_replace_steps_unless_both_are_given(recipe: Path) -> None:
    assert load_run_config(recipe, ["max_epochs=2"]).max_steps is None
    staged = load_run_config(recipe, ["stages.align.max_epochs=3"])
    assert (staged.training("align").max_steps, staged.training("align").max_epochs) == (None, 3)
    assert (staged.training("finetune").max_steps, staged.training("finetune").max_epochs) == (60, None)
    for level in ("", "stages.align."):
        (text,) = problems_of(recipe, f"{level}max_steps=5", f"{level}max_epochs=3")
        assert text == f"Expected either `{level}max_steps` or `{level}max_epochs` to be null, but got 5 and 3."
    assert "neither" in problems_of(recipe, "max_steps=null")[0]


def test_a_stage_override_of_steps_wins_over_the_runs_epochs(recipe: Path) -> None:
    training = load_run_config(recipe, ["max_epochs=2", "stages.align.max_steps=7"]).training("align")
    assert (training.max_steps, training.max_epochs) == (7, None)
    with pytest.raises(KeyError):
        load_run_config(recipe).training("repair")


@pytest.mark.parametrize("text", ["off", "'off'", '"off"'])
def test_off_is_not_false(recipe: Path, text: str) -> None:
    assert load_run_config(recipe, [f"tracking.wandb={text}"]).tracking.wandb == "off"


def test_all_problems_come_at_once(recipe: Path) -> None:
    found = problems_of(
        recipe,
        "stages.finetune.metods.x=1",
        "learning_rate=-1",
        "batch_size=eight",
        "stages.finetune.data.harmful_share=1.5",
        "model.dtype=bf16",
        "seeds=3",
        "stages.align.data.task_count=4",
        known=KnownNames(judges=frozenset({"rule"})),
        validate_methods=lambda methods, order: [f"{name} is odd" for name in methods],
    )
    assert len(found) == 9
    text = "\n".join(found)
    for expected in (
        "Expected `stages.finetune` to hold known keys only, but got 'metods'. Did you mean `methods`?",
        "Expected `learning_rate` to be a number > 0, but got -1.",
        "Expected `batch_size` to be a whole number ≥ 1, but got 'eight'.",
        "Expected `stages.finetune.data.harmful_share` to be a share between 0 and 1, but got 1.5.",
        "Expected `model.dtype` to be one of auto, float32, bfloat16, float16, but got 'bf16'. Did you",
        "but got 'seeds'. Did you mean `seed`?",
        "Expected `stages.align.data.task` to be given with `task_count`, but got None.",
        "Expected `evaluate.judges` to be one of rule, but got 'rules'. Did you mean 'rule'?",
        "In `stages.finetune.methods`: asft is odd",
    ):
        assert expected in text


def test_a_field_that_is_wrong_is_not_reported_a_second_time(recipe: Path) -> None:
    (text,) = problems_of(recipe, "stages.finetune.data={tsk: triage}")
    assert "'tsk'. Did you mean `task`?" in text


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("foo", "Expected an override to be key=value, but got 'foo'."),
        ("seed=", "Expected an override to be key=value, but got 'seed='. Write seed=null for none."),
        ("=5", "Expected an override to be key=value, but got '=5'."),
        ("a..b=5", "Expected an override to be key=value, but got 'a..b=5'."),
        ("seed=[1", r"Expected the value of `seed` to be YAML, but got '[1'"),
    ],
)
def test_malformed_overrides_are_refused(recipe: Path, override: str, expected: str) -> None:
    assert expected in problems_of(recipe, override)[0]


def test_all_malformed_overrides_are_listed() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_overrides(["a", "b=", "c=1"])
    assert len(caught.value.problems) == 2


def test_an_override_that_every_stage_hides_is_refused(recipe: Path) -> None:
    own = ["stages.align.learning_rate=1e-4", "stages.finetune.learning_rate=1e-4"]
    (text,) = problems_of(recipe, *own, "learning_rate=1e-3")
    assert text == (
        "Expected `learning_rate` to have an effect, but every stage sets its own. Write stages.align.learning_rate or "
        "stages.finetune.learning_rate."
    )
    assert len(problems_of(recipe, *own, "learning_rate=1e-3", "batch_size=-1")) == 2  # reported with the others
    assert load_run_config(recipe, [own[0], "learning_rate=1e-3"]).training("finetune").learning_rate == 1e-3


def test_a_mapping_on_the_command_line_replaces(recipe: Path) -> None:
    config = load_run_config(recipe, ["stages.finetune.methods={}"])
    assert config.stages.finetune is not None
    assert config.stages.finetune.methods == {}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("learning_rate.x=5", "Expected `learning_rate` to be a number > 0, but got {'x': 5}."),
        ("stages=5", "Expected `stages` to be a mapping of keys to values, but got 5."),
        ("model=null", "Expected `model` to be a mapping of keys to values, but got None."),
        ("name=../x", "Expected `name` to be a folder name"),
        ("model.name=${nope}", "Expected every value to be resolvable, but got: Interpolation key 'nope' not found."),
        ("model.name=???", "Expected every value to be resolvable"),
        ("stages.finetune=null", "Expected `evaluate.task` to be false, because no stage names a task, but got True."),
        ("stages.align.data=null", "Expected `stages.align.data` to be a mapping"),
        ("stages.align.data={}", "Expected `stages.align.data` to name what is trained on"),
        ("stages.align.data.safety_count=0", "Expected `stages.align.data.safety_count` to be a whole number ≥ 1"),
        ("stages.finetune.data.safety_count=5", "Expected `stages.finetune.data.safety` to be given with"),
        ("stages.finetune.order=[nest]", "but got 'nest'"),
        ("micro_batch_size=3", "to divide the batch of 8 rows, but got 3."),
        ("evaluate.after=[]", "Expected `evaluate.after` to be not empty"),
        ("evaluate.after=[repair]", "Expected `evaluate.after` to name a part of this run (start, align, finetune)"),
        ("stages.finetune.methods.asft=null", "Write {} for the defaults."),
    ],
)
def test_bad_values_are_refused(recipe: Path, override: str, expected: str) -> None:
    assert any(expected in text for text in problems_of(recipe, override))


def test_an_evaluation_of_nothing_is_refused(recipe: Path) -> None:
    overrides = [f"evaluate.{key}" for key in ("safety=[]", "over_refusal=[]", "task=false", "benign_nll=false")]
    assert "to measure replies" in problems_of(recipe, *overrides)[0]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stages.finetune.data.task=triag", "to be one of triage, but got 'triag'. Did you mean 'triage'?"),
        ("evaluate.judges=[rulse]", "to be one of rules, but got 'rulse'. Did you mean 'rules'?"),
        ("model=smolm", "to be one of smollm, but got 'smolm'. Did you mean 'smollm'?"),
        ("evaluate.safety=[embeded]", "Did you mean 'embedded'? A file works too."),
    ],
)
def test_unknown_names_are_refused(recipe: Path, override: str, expected: str) -> None:
    known = KnownNames(
        tasks=frozenset({"triage"}),
        judges=frozenset({"rules"}),
        models=frozenset({"smollm"}),
        safety_sets=frozenset({"embedded"}),
    )
    (text,) = problems_of(recipe, override, known=known)
    assert expected in text


@pytest.mark.parametrize("place", ["org/model", "model.gguf", "data/x.jsonl"])
def test_places_are_not_compared_with_known_names(recipe: Path, place: str) -> None:
    known = KnownNames(models=frozenset({"smollm"}), safety_sets=frozenset({"embedded"}))
    config = load_run_config(recipe, [f"model={place}", f"evaluate.safety=[{place}]"], known=known)
    assert (config.model.name, config.evaluate.safety) == (place, [place])


def test_a_missing_file_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"got 'quikstart' \(looked for .*\)\. Did you mean 'quickstart'\?"):
        load_run_config("quikstart")
    with pytest.raises(ConfigError, match=r"looked for .*nothing\.yaml\)"):
        load_run_config(tmp_path / "nothing.yaml")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("seed: 1\nmodel: [1\n", "to be YAML, but got an error, line"),
        ("seed: 1\nseed: 2\n", "line 2: found duplicate key seed"),
        ("seed: 1\n model: 2\n", "line 2: mapping values are not allowed"),
        ("- a\n", "to hold a YAML mapping of names to values"),
        ("5\n", "to hold a YAML mapping"),
        ("1: a\n", "to hold a YAML mapping of names to values"),
    ],
)
def test_broken_files_are_named_with_their_line(tmp_path: Path, content: str, expected: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_run_config(path)
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_recipe_extends_another_and_its_methods_replace(tmp_path: Path, recipe: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text("extends: mine.yaml\nseed: 3\nmax_epochs: 1\nstages: {finetune: {methods: {nest: {}}}}\n")
    config = load_run_config(child)
    assert (config.name, config.seed, config.model.name) == ("child", 3, "some/model")
    assert (config.max_steps, config.max_epochs) == (None, 1)
    assert config.stages.finetune is not None
    assert config.stages.finetune.methods == {"nest": {}}
    assert config.stages.finetune.data.task == "triage"


def test_a_circle_of_recipes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(ConfigError, match="Expected `extends` to end somewhere, but got a circle"):
        load_run_config(tmp_path / "a.yaml")


def test_yaml_loads_to_an_equal_configuration(tmp_path: Path, recipe: Path) -> None:
    config = load_run_config(
        recipe, ["tracking.wandb=off", "model.system='say \\${x}'", "max_epochs=2", "learning_rate=1e-5"]
    )
    assert config.model.system == "say ${x}"
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert load_run_config(path) == config


def test_evaluation_points_follow_the_chain(recipe: Path) -> None:
    config = load_run_config(recipe, ["evaluate.after=[finetune, start, repair]"])
    assert config.evaluation_points() == ["start", "finetune"]
    found = config.task()
    assert found is not None
    assert (found[0], found[1].harmful_share) == ("triage", 0.1)


def test_evaluate_needs_a_task_only_for_its_accuracy() -> None:
    assert not load_evaluate_config("some/model").evaluate.task
    assert not load_evaluate_config("some/model", ["evaluate.limit=5"]).evaluate.task
    config = load_evaluate_config("some/model", ["task=triage", "evaluate.limit=5"])
    assert config.evaluate.task
    assert (config.task, config.evaluate.limit) == ("triage", 5)
    with pytest.raises(ConfigError, match=r"Expected `task` to name a task .* Write task=NAME"):
        load_evaluate_config("some/model", ["evaluate.task=true"])
    with pytest.raises(ConfigError, match=r"'limit'\. Did you mean `evaluate.limit`\?"):
        load_evaluate_config("some/model", ["limit=5"])

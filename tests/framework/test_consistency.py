from __future__ import annotations

from framework.consistency import KnownNames, evaluate_problems, run_problems
from framework.schema import (
    DataConfig,
    EvaluateCommandConfig,
    EvaluateConfig,
    RunConfig,
    StageConfig,
    StagesConfig,
)


def test_a_run_without_stages_may_measure_the_untouched_model() -> None:
    config = RunConfig(name="a", evaluate=EvaluateConfig(task=False, after=["start"]))
    assert run_problems(config, known=KnownNames(), validate_methods=None) == []


def test_a_stage_with_edits_only_needs_no_data() -> None:
    stages = StagesConfig(repair=StageConfig(methods={"resta": {}}, max_steps=0))
    config = RunConfig(name="a", stages=stages, evaluate=EvaluateConfig(task=False, after=["repair"]))
    assert run_problems(config, known=KnownNames(), validate_methods=lambda _, order: []) == []


def test_problems_carry_the_path_they_are_about() -> None:
    data = DataConfig(task_path="x.csv", benign_count=3, harmful_share=0.5)
    config = RunConfig(name="a", stages=StagesConfig(finetune=StageConfig(data=data)))
    paths = [problem.path for problem in run_problems(config, known=KnownNames(), validate_methods=None)]
    assert paths == [
        "stages.finetune.data.task_path",
        "stages.finetune.data.harmful_share",
        "stages.finetune.data.benign_count",
        "stages.finetune.data",
        "stages",
    ]


def test_unknown_training_sets_are_refused_when_the_names_are_known() -> None:
    stages = StagesConfig(align=StageConfig(data=DataConfig(safety="embeded", benign="dolly")))
    config = RunConfig(name="a", stages=stages, evaluate=EvaluateConfig(task=False, after=["align"]))
    known = KnownNames(safety_data=frozenset({"embedded"}), benign_data=frozenset({"dolly"}))
    (problem,) = run_problems(config, known=known, validate_methods=None)
    assert problem.text == (
        "Expected `stages.align.data.safety` to be one of embedded, but got 'embeded'. Did you mean 'embedded'? "
        "A file works too."
    )


def test_a_task_file_is_not_compared_with_registered_tasks() -> None:
    config = EvaluateCommandConfig(task="rows.jsonl", evaluate=EvaluateConfig())
    assert evaluate_problems(config, known=KnownNames(tasks=frozenset({"triage"}))) == []
    config = EvaluateCommandConfig(task="triag", evaluate=EvaluateConfig())
    (problem,) = evaluate_problems(config, known=KnownNames(tasks=frozenset({"triage"})))
    assert "Did you mean 'triage'?" in problem.text


def test_a_task_needs_the_number_of_its_rows() -> None:
    stages = StagesConfig(finetune=StageConfig(data=DataConfig(task="triage")))
    (problem,) = run_problems(RunConfig(name="a", stages=stages), known=KnownNames(), validate_methods=None)
    assert problem.text == (
        "Expected `stages.finetune.data.task_count` to be the number of task rows, but got None. Write a number."
    )

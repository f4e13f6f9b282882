"""The settings of a run, a study and an evaluation, as frozen dataclasses.

Every class checks its own fields when it is built, so a configuration made in Python is held to the same rules as one
read from a file. ``framework/config.py`` reads files and reports all problems of a file at once.
"""

# ruff: noqa: RUF009 - `setting` is dataclasses.field with a rule, which ruff does not know.

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any, Literal

from framework.endpoint_settings import EndpointSettings
from framework.fields import (
    COUNT,
    COUNT_OR_ZERO,
    NOT_EMPTY,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    Rule,
    check_instance,
    setting,
)
from framework.guard_settings import GuardSettings

__all__ = [
    "FOLDER_NAME",
    "STAGES",
    "AdapterConfig",
    "DataConfig",
    "EvaluateCommandConfig",
    "EvaluateConfig",
    "ModelConfig",
    "RunConfig",
    "StageConfig",
    "StageName",
    "StagesConfig",
    "TrackingConfig",
    "TrainerConfig",
    "TrainingConfig",
]

STAGES = ("align", "finetune", "repair")
"""The training stages in the order they run."""

StageName = Literal["align", "finetune", "repair"]
EvaluationPoint = Literal["start", "align", "finetune", "repair"]
Overflow = Literal["error", "truncate_left", "drop"]
Precision = Literal["32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true"]
FOLDER_NAME = Rule(
    "a folder name (letters, digits, `.`, `_`, `-`; `/` for a folder inside)",
    lambda value: re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", value) is not None,
)
DROPOUT = Rule("a share between 0 and 1, 1 left out", lambda value: 0 <= value < 1)


class _Checked:
    """Checks its fields when it is built."""

    def __post_init__(self) -> None:
        """Raise ConfigError listing every field that has the wrong type or breaks its rule."""
        check_instance(self)


@dataclass(frozen=True)
class ModelConfig(_Checked):
    """Which model, and how it is loaded."""

    name: str = setting("smollm2-135m-instruct", rule=NOT_EMPTY)
    """Registered name, local folder, GGUF file or hub id."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the weights; auto takes bfloat16 where the device multiplies it in hardware, else float32."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    system: str | None = None
    """System message; null leaves the chat template's own, an empty text sends an empty one."""


@dataclass(frozen=True)
class AdapterConfig(_Checked):
    """Which parameters are trained."""

    kind: Literal["lora", "full", "none"] = "lora"
    """lora: low-rank adapter; full: every weight; none: only what methods add."""
    rank: int = setting(8, rule=COUNT)
    """Rank of the adapter."""
    alpha: float = setting(16.0, rule=POSITIVE)
    """Scale of the adapter: the product is multiplied by alpha / rank."""
    dropout: float = setting(0.0, rule=DROPOUT)
    """Share of inputs the adapter drops in training."""
    targets: list[str] = setting(factory=lambda: ["q_proj", "v_proj"], rule=NOT_EMPTY)
    """Names of the linear layers that get an adapter, or the one name ``all-linear``."""

    @property
    def target_modules(self) -> list[str] | str:
        """Return the targets in the form peft takes: a list of names, or ``all-linear`` alone."""
        return "all-linear" if self.targets == ["all-linear"] else list(self.targets)


@dataclass(frozen=True)
class DataConfig(_Checked):
    """Training data of a stage; the named parts are mixed."""

    task: str | None = None
    """Downstream task: a registered name."""
    task_path: str | None = None
    """Local file or folder of the task's rows; null looks below SEAWALL_DATA, then on the hub."""
    task_count: int | None = setting(None, rule=COUNT)
    """Rows of the task part, poison included; needed with a task."""
    harmful_share: float = setting(0.0, rule=SHARE)
    """Share of the task rows replaced by harmful requests with compliant replies."""
    harmful: str = setting("sampled", rule=NOT_EMPTY)
    """Where these come from: ``sampled`` from the unaligned model, or a file."""
    safety: str | None = None
    """Harmful requests with refusals: ``embedded``, ``embedded_more`` or a file."""
    safety_count: int | None = setting(None, rule=COUNT)
    """Rows of the safety part; null takes all."""
    benign: str | None = None
    """Ordinary requests with answers: ``embedded`` or a file."""
    benign_count: int | None = setting(None, rule=COUNT)
    """Rows of the benign part; null takes all."""
    look_alikes: str | None = None
    """Harmless requests in alarming words, with answers, on top of the benign part: ``embedded``, ``embedded_more`` or
    a file."""
    look_alikes_count: int | None = setting(None, rule=COUNT)
    """Rows of this part; more than there are repeats them, null takes each once."""


@dataclass(frozen=True)
class StageConfig(_Checked):
    """One training stage; null in the settings below ``allow_no_effect`` takes the run's value."""

    data: DataConfig = setting(factory=DataConfig)
    """What is trained on."""
    methods: dict[str, dict[str, Any]] = setting(factory=dict)
    """Registered method name to its settings, in the order they apply; empty is plain training."""
    order: list[str] | None = None
    """Method names in the order they act, needed where two of them fill a point whose order changes the result."""
    allow_no_effect: bool = False
    """Accept a method that did nothing (ablations)."""
    adapter: AdapterConfig | None = None
    learning_rate: float | None = setting(None, rule=POSITIVE)
    batch_size: int | None = setting(None, rule=COUNT)
    micro_batch_size: int | None = setting(None, rule=COUNT)
    max_steps: int | None = setting(None, rule=COUNT_OR_ZERO)
    max_epochs: int | None = setting(None, rule=COUNT)
    max_length: int | None = setting(None, rule=COUNT)
    warmup_ratio: float | None = setting(None, rule=SHARE)
    weight_decay: float | None = setting(None, rule=NOT_NEGATIVE)


@dataclass(frozen=True)
class StagesConfig(_Checked):
    """The chain of stages; null leaves a stage out."""

    align: StageConfig | None = None
    """Make or strengthen refusals."""
    finetune: StageConfig | None = None
    """Train the downstream task."""
    repair: StageConfig | None = None
    """Edit or re-tune afterwards."""


@dataclass(frozen=True)
class EvaluateConfig(_Checked):
    """What is measured."""

    safety: list[str] = setting(factory=lambda: ["embedded"])
    """Harmful prompt sets: ``embedded``, registered names or files."""
    over_refusal: list[str] = setting(factory=lambda: ["embedded"])
    """Benign look-alike sets, spelt the same way."""
    judges: list[str] = setting(factory=lambda: ["rules"], rule=NOT_EMPTY)
    """Judges of the replies, by registered name."""
    task: bool = True
    """Measure accuracy on the task of the run."""
    task_count: int | None = setting(None, rule=COUNT)
    """Prompts of the task; null takes all."""
    after: list[EvaluationPoint] = setting(factory=lambda: ["finetune"], rule=NOT_EMPTY)
    """After which stages to measure; ``start`` is the untouched model, a stage the run leaves out is passed over."""
    limit: int | None = setting(None, rule=COUNT)
    """Most prompts of any one set; null takes all."""
    max_new_tokens: int = setting(256, rule=COUNT)
    """Longest reply, in tokens."""
    batch_size: int = setting(32, rule=COUNT)
    """Prompts generated at once."""
    overflow: Literal["error", "truncate_left"] = "error"
    """What happens to a prompt that does not fit the model's context with its reply: refused, or cut on the left."""
    benign_nll: bool = True
    """Measure mean negative log-likelihood, nats per token, of benign replies."""
    nll: list[str] = setting(factory=list)
    """Files of prompt and reply pairs; the mean negative log-likelihood of each file's replies is measured."""
    multiple_choice: list[str] = setting(factory=list)
    """Multiple-choice files or folders (MMLU and BBH layouts)."""
    prefill: list[int] = setting(factory=list, rule=COUNT)
    """Prefilling attack: for each number, so many first tokens of a compliant reply are forced on every harmful prompt
    of ``safety``; empty attacks nothing."""
    prefill_replies: Literal["sampled", "opening"] = "sampled"
    """Where the compliant replies come from: ``sampled`` from the unaligned model, or one fixed affirmative opening."""
    prefill_model: str | None = None
    """Unaligned model that samples them; null takes the model the run starts from."""


@dataclass(frozen=True)
class TrainerConfig(_Checked):
    """How the machine is used."""

    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "auto"
    devices: int = setting(1, rule=COUNT)
    """Devices, or processes on a CPU, per node."""
    num_nodes: int = setting(1, rule=COUNT)
    strategy: Literal[
        "auto",
        "ddp",
        "ddp_find_unused_parameters_true",
        "fsdp",
        "model_parallel",
        "deepspeed_stage_2",
        "deepspeed_stage_3",
    ] = "auto"
    """auto: one process, or ddp for several; fsdp, deepspeed_…: each GPU keeps a part of the weights; model_parallel:
    the same by FSDP2, on GPUs or CPUs."""
    precision: Precision | None = None
    """Arithmetic of training; null follows the model's dtype."""
    deterministic: bool = False
    """Use only operations that repeat bit for bit."""
    log_every_n_steps: int = setting(10, rule=COUNT)
    checkpoint_every_n_steps: int = setting(50, rule=COUNT)
    probe_every_n_steps: int | None = setting(None, rule=COUNT)
    """Steps between two looks at the refusal margin in training; null never looks."""
    threads: int | None = setting(None, rule=COUNT)
    """CPU threads of one process; null takes every core."""
    guard: GuardSettings | None = None
    """Thresholds on safety while a stage trains, and what follows when one is crossed; null watches nothing."""


@dataclass(frozen=True)
class TrackingConfig(_Checked):
    """Weights & Biases."""

    wandb: Literal["offline", "online", "off"] = "offline"
    """offline writes files only (no account, no network)."""
    project: str = setting("seawall", rule=NOT_EMPTY)
    entity: str | None = None
    """Team or user; null takes the account's own."""
    group: str | None = None
    """Runs shown together; null takes the name of the run or study."""
    tags: list[str] = setting(factory=list)


@dataclass(frozen=True)
class TrainingConfig(_Checked):
    """The training settings of one stage once run-level values and stage overrides are put together."""

    adapter: AdapterConfig = setting(factory=AdapterConfig)
    learning_rate: float = setting(5e-4, rule=POSITIVE)
    """Highest learning rate, reached after the warm-up."""
    batch_size: int = setting(8, rule=COUNT)
    """Rows of one optimizer step, over all processes and micro-batches."""
    micro_batch_size: int | None = setting(None, rule=COUNT)
    """Rows of one forward pass; null takes the whole batch."""
    max_steps: int | None = setting(60, rule=COUNT_OR_ZERO)
    """Optimizer steps; 0 applies the methods' edits without training. Excludes ``max_epochs``."""
    max_epochs: int | None = setting(None, rule=COUNT)
    """Passes over the data. Excludes ``max_steps``."""
    warmup_ratio: float = setting(0.03, rule=SHARE)
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = setting(0.0, rule=NOT_NEGATIVE)
    gradient_clip: float | None = setting(1.0, rule=POSITIVE)
    """Largest gradient norm; null clips nothing."""
    max_length: int = setting(512, rule=COUNT)
    """Longest row, in tokens."""
    overflow: Overflow = "error"
    """What happens to longer rows: refused, cut on the left, or left out."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""

    @property
    def has_training(self) -> bool:
        """Whether any optimizer step is taken."""
        return self.max_steps != 0


@dataclass(frozen=True)
class _RunRequired:
    """Holds the field without default, which must come first."""

    name: str = setting(rule=FOLDER_NAME)


@dataclass(frozen=True)
class RunConfig(TrainingConfig, _RunRequired):
    """A chain of stages on one model, measured; training settings at this level hold for every stage."""

    model: ModelConfig = setting(factory=ModelConfig)
    stages: StagesConfig = setting(factory=StagesConfig)
    evaluate: EvaluateConfig = setting(factory=EvaluateConfig)
    trainer: TrainerConfig = setting(factory=TrainerConfig)
    tracking: TrackingConfig = setting(factory=TrackingConfig)
    seed: int = setting(0, rule=COUNT_OR_ZERO)
    output: str = setting("runs", rule=NOT_EMPTY)
    """Folder that gets a folder named after the run."""

    def active_stages(self) -> list[tuple[str, StageConfig]]:
        """Return the stages of this run with their names, in the order they run."""
        pairs = [(name, getattr(self.stages, name)) for name in STAGES]
        return [(name, stage) for name, stage in pairs if stage is not None]

    def evaluation_points(self) -> list[str]:
        """Return the stages after which the model is measured, ``start`` first, in the order they run."""
        present = ["start", *(name for name, _ in self.active_stages())]
        return [name for name in present if name in self.evaluate.after]

    def task(self) -> tuple[str, DataConfig] | None:
        """Return the downstream task and the data section that names it; the last stage that names one decides."""
        named = [stage.data for _, stage in self.active_stages() if stage.data.task]
        return (str(named[-1].task), named[-1]) if named else None

    def training(self, stage: str) -> TrainingConfig:
        """Return the training settings of ``stage``: the run's values, replaced by those the stage gives.

        Raises:
            KeyError: the run has no such stage.
        """
        given = dict(self.active_stages())[stage]
        values = {field.name: getattr(self, field.name) for field in fields(TrainingConfig)}
        values.update({name: value for name in values if (value := getattr(given, name, None)) is not None})
        if given.max_epochs is not None:
            values["max_steps"] = given.max_steps
        elif given.max_steps is not None:
            values["max_epochs"] = None
        return TrainingConfig(**values)


@dataclass(frozen=True)
class EvaluateCommandConfig(_Checked):
    """Settings of ``seawall evaluate``: measure a finished model without training it."""

    model: ModelConfig = setting(factory=ModelConfig)
    endpoint: EndpointSettings = setting(factory=EndpointSettings)
    """How the model is asked where its name is the address of an endpoint."""
    name: str = setting("evaluate", rule=FOLDER_NAME)
    evaluate: EvaluateConfig = setting(factory=lambda: EvaluateConfig(task=False))
    task: str | None = None
    """Registered task whose test prompts are answered; needed when ``evaluate.task`` is true."""
    task_path: str | None = None
    """Local file, folder or hub id of the task's rows."""
    trainer: TrainerConfig = setting(factory=TrainerConfig)
    tracking: TrackingConfig = setting(factory=TrackingConfig)
    seed: int = setting(0, rule=COUNT_OR_ZERO)
    output: str = setting("runs", rule=NOT_EMPTY)

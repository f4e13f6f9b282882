"""``seawall mine``: the mining of a recipe on its own, before any training on what it finds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from datamodules.mining import (
    CLASSES,
    MinedPrompt,
    MinedSets,
    MiningSettings,
    StopRule,
    mine_sets,
    replay,
    select_prompts,
    write_mined,
)
from experiments.progress import Steps, TrainingProgress
from experiments.run import artifact_store, set_threads
from experiments.stages import ModelState, StageChain, Watch
from framework.config import RunConfig, StageConfig
from framework.errors import ConfigError
from framework.evaluation.metrics import Rate
from framework.files import to_plain, write_json
from framework.models import load_model, model_fingerprint
from framework.registry import create_method

__all__ = ["mine_recipe", "mined_summary", "mining_lines", "mining_table"]

METHOD = "smh"
MINED_FILE = "mined.jsonl"
SUMMARY_FILE = "mining.json"


def mine_recipe(config: RunConfig, *, console: Console | None = None) -> dict[str, Any]:
    """Mine the model that enters the recipe's stage with the method ``smh``, and return what was found.

    Stages before that one are run or found. What was mined before is found in the cache, so that a mining that was
    interrupted goes on, and a run of the recipe does not mine again.

    Args:
        config: a recipe.
        console: where progress is drawn; None draws nothing.

    Returns:
        ``{"name", "folder", "rows", "summary"}``; ``mined.jsonl`` and ``mining.json`` lie in the folder.

    Raises:
        ConfigError: no stage has the method, or it reads mined prompts from a file.
        DataError: no prompt breaks the model sometimes, or the rollout store is another model's.
    """
    name, stage = _mining_stage(config)
    given = create_method(METHOD, stage.methods[METHOD]).config
    if given.mined is not None:
        raise ConfigError(
            f"Expected `{METHOD}.mined` to be null for mining, but got {given.mined!r}. Its prompts were mined already."
        )
    set_threads(config.trainer.threads)
    folder = Path(config.output) / config.name
    with Steps(console or Console(stderr=True)) as steps:
        watch = Watch(
            progress=steps.task,
            callbacks=lambda stage: (TrainingProgress(steps, f"train {stage}"),),
            open_logger=lambda *_: False,
            close_logger=lambda _: None,
            say=steps.say,
        )
        chain = StageChain(config, artifact_store(), watch)
        state = chain.run(before=name)[-1]
        started = time.perf_counter()
        mined = _mine(chain, state, given, steps)
        seconds = time.perf_counter() - started
    summary = mined_summary(mined, given) | {"seconds": seconds}
    write_mined(folder / MINED_FILE, mined, target=given.target, judges=given.judges)
    # After the file: prompts none of which is eligible are worth looking at.
    chosen = select_prompts(
        mined.harmful, select=given.select, count=given.count or None, share=given.share, seed=config.seed
    )
    rows = [_row(one) for one in chosen]
    results = {"name": config.name, "folder": str(folder), "summary": summary, "rows": rows}
    write_json(folder / SUMMARY_FILE, results)
    return results


def mined_summary(mined: MinedSets, config: Any) -> dict[str, Any]:
    """Return counts and rates of what was mined.

    Args:
        mined: the prompts.
        config: the method's settings.
    """
    counts = [one.counts for one in mined.harmful]
    classes = [one.prompt_class(config.hard_rate) for one in counts]
    rollouts = sum(one.total for one in counts)
    found: dict[str, Any] = {
        "prompts": len(counts),
        "rollouts": rollouts,
        "of_rollouts": len(counts) * config.rollouts,
        "harmful_rollouts": to_plain(Rate.of("harmful_rollouts", sum(one.harmful for one in counts), rollouts)),
        "classes": {name: classes.count(name) for name in CLASSES},
        "eligible": len(mined.eligible),
        "cut_off_targets": sum(not target.finished for one in mined.eligible for target in one.targets),
        "targets": sum(len(one.targets) for one in mined.eligible),
    }
    if not config.adaptive and config.rollouts >= 8:
        rule = StopRule(config.rollouts, config.hard_rate)
        found["replay"] = replay({one.prompt.id: one.outcomes for one in mined.harmful}, rule)._asdict()
    if mined.benign:
        refused, total = (sum(one.counts[i] for one in mined.benign) for i in (0, 2))
        answered = sum(bool(one.targets) for one in mined.benign)
        found |= {
            "benign_prompts": len(mined.benign),
            "benign_answered": answered,
            "benign_refused": to_plain(Rate.of("benign_refused", refused, total)),
        }
    return found


def mining_table(results: dict[str, Any], *, limit: int = 20) -> Table:
    """Return the chosen prompts with their rates; texts are left out, they are requests to do harm.

    Args:
        results: what ``mine_recipe`` returned.
        limit: most rows shown.
    """
    summary = results["summary"]
    title = (
        f"{summary['eligible']} of {summary['prompts']} prompts break the model sometimes; "
        f"{len(results['rows'])} chosen ({summary['rollouts']} rollouts)"
    )
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for column in ("prompt", "category", "harmful", "rate", "95 % interval", "targets"):
        table.add_column(column, justify="left" if column in ("prompt", "category") else "right")
    for row in results["rows"][:limit]:
        table.add_row(
            row["id"],
            row["category"],
            f"{row['harmful']}/{row['total']}",
            f"{row['rate']:.0%}",
            f"{row['low']:.0%} to {row['high']:.0%}",
            str(row["targets"]),
        )
    if len(results["rows"]) > limit:
        table.caption = f"and {len(results['rows']) - limit} more in {results['folder']}/{SUMMARY_FILE}"
    return table


def _mining_stage(config: RunConfig) -> tuple[str, StageConfig]:
    for name, stage in config.active_stages():
        if METHOD in stage.methods:
            return name, stage
    names = [name for name, _ in config.active_stages()]
    raise ConfigError(
        f"Expected a stage of the recipe to have the method `{METHOD}`, but got none in {', '.join(names) or 'it'}. "
        f"Add it, e.g. `method={METHOD}`, or name another recipe."
    )


def _mine(chain: StageChain, state: ModelState, given: Any, steps: Steps) -> MinedSets:
    loaded = load_model(chain.model_spec(state))
    return mine_sets(
        loaded.model,
        chain.encoder(state),
        MiningSettings.of(given),
        model_key=model_fingerprint(state.folder),
        artifacts=chain.artifacts,
        target=given.target,
        has_benign=given.needs_benign,
        progress=steps.task("mine", None),
    )


def _row(mined: MinedPrompt) -> dict[str, Any]:
    counts, interval = mined.counts, mined.counts.interval
    return {
        "id": mined.prompt.id,
        "category": mined.prompt.category,
        "harmful": counts.harmful,
        "safe": counts.safe,
        "total": counts.total,
        "rate": counts.rate,
        "low": interval.low,
        "high": interval.high,
        "targets": len(mined.targets),
    }


def mining_lines(results: dict[str, Any]) -> Sequence[str]:
    """Return the summary as sentences."""
    found = results["summary"]
    rate = found["harmful_rollouts"]
    text = [
        f"harmful rollouts: {rate['value']:.1%} ({rate['numerator']}/{rate['denominator']}, {rate['low']:.1%} to "
        f"{rate['high']:.1%})",
        f"classes: {', '.join(f'{count} {name}' for name, count in found['classes'].items())}",
        f"targets: {found['targets']}, {found['cut_off_targets']} of them cut off at the limit",
    ]
    if "benign_prompts" in found:
        refused = found["benign_refused"]
        text.append(
            f"harmless prompts: {found['benign_answered']} of {found['benign_prompts']} answered at least once; "
            f"{refused['value']:.1%} of the rollouts refuse"
        )
    if "replay" in found:
        again = found["replay"]
        text.append(
            f"an adaptive number of up to {again['most']} rollouts would take {again['rollouts']:.0%} of them and "
            f"agree with fixed {again['most']} on {again['agreement']:.1%} of the prompts (fixed {again['most']} with "
            f"itself: {again['test_retest']:.1%})"
        )
    return [*text, f"written to {results['folder']}/{MINED_FILE}"]

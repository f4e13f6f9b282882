"""Finished attacks as they are read back: ``attack.json`` with the transcripts beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.attacks.interface import AttackOutcome, AttackPoint, Attempt
from experiments.attacks.transcript import read_transcript
from framework.errors import DataError
from framework.files import read_json

__all__ = ["AttackFile", "check_comparable", "outcome_of", "point_setting", "read_attack_file"]

READABLE = (1, 2)
"""Formats; before 2 the intervals of rates over replies took each reply for independent, and no other value differs."""
RESULTS_FILE = "attack.json"


@dataclass(frozen=True)
class AttackFile:
    """The attacks on one model."""

    label: str
    """Of the model."""
    outcomes: Sequence[AttackOutcome]
    suite: Mapping[str, Any] = field(default_factory=dict)
    path: Path | None = None
    measured_with: Mapping[str, Any] | None = None
    """Requests, judges, length of replies and system message; None in results that do not say."""
    failed: Sequence[str] = ()
    """Attacks of the suite that could not be made, by label."""

    @property
    def utility_floor(self) -> float | None:
        """Share of the unattacked model's utility that the suite asks attacked models to keep."""
        return self.suite.get("utility_floor")

    def attempts(self, outcome: AttackOutcome) -> list[Attempt] | None:
        """Return the attempts of an attack; None where no transcript lies beside the file.

        Raises:
            DataError: the transcript is damaged.
        """
        if self.path is None or outcome.transcript is None:
            return None
        transcript = self.path.parent / outcome.transcript
        return read_transcript(transcript) if transcript.is_file() else None


def read_attack_file(path: str | Path) -> AttackFile:
    """Return the attacks of a file.

    Args:
        path: an ``attack.json``, or the folder it lies in; ``LABEL=PATH`` gives the model another label.

    Raises:
        DataError: it is missing, is no such file, or holds no finished attack.
    """
    named, equals, rest = str(path).partition("=")
    has_label = bool(named and equals and rest) and not Path(path).exists()
    given = Path(rest).expanduser() if has_label else Path(path)
    file = given / RESULTS_FILE if given.is_dir() else given
    try:
        raw = read_json(file)
    except (OSError, ValueError) as error:
        raise DataError(
            f"Expected `{file}` to be the results of `seawall attack`, but got {type(error).__name__}: {error}."
        ) from error
    if not isinstance(raw, dict) or raw.get("format") not in READABLE or "outcomes" not in raw:
        raise DataError(f"Expected `{file}` to be the results of `seawall attack` in format 1 or 2, but got others.")
    if not raw["outcomes"]:
        raise DataError(f"Expected `{file}` to hold at least one finished attack, but got none. Run the suite again.")
    try:
        outcomes = [outcome_of(one) for one in raw["outcomes"]]
    except (TypeError, KeyError) as error:
        raise DataError(f"Expected every outcome in `{file}` to be complete, but got {error}.") from error
    label = named if has_label else raw.get("model", {}).get("label") or file.parent.name
    failed = tuple(str(one.get("name")) for one in raw.get("failed", ()))
    return AttackFile(str(label), outcomes, raw.get("suite", {}), file, raw.get("measured_with"), failed)


def check_comparable(files: Sequence[AttackFile]) -> None:
    """Refuse results of models that were not asked, judged and cut off alike.

    Args:
        files: at least one.

    Raises:
        DataError: says what differs, or which results do not say.
    """
    first = files[0]
    for other in files[1:]:
        for one in (first, other):
            if one.measured_with is None:
                raise DataError(
                    f"Expected the results of `{one.label}` to say what they were measured with, but got none of it. "
                    "Run the suite again: finished attacks are found again."
                )
        ours, theirs = first.measured_with or {}, other.measured_with or {}
        differing = [key for key in dict.fromkeys([*ours, *theirs]) if ours.get(key) != theirs.get(key)]
        if differing:
            texts = [_difference(key, ours.get(key), theirs.get(key)) for key in differing]
            raise DataError(
                f"Expected `{first.label}` and `{other.label}` to be measured alike, but got other "
                f"{' and other '.join(texts)}. Attack both with the same suite."
            )


def _difference(key: str, ours: Any, theirs: Any) -> str:
    if key == "judges":
        ours, theirs = (", ".join(str(judge.get("name")) for judge in one or ()) for one in (ours, theirs))
    return f"{key} ({ours!r} and {theirs!r})"


def outcome_of(values: Mapping[str, Any]) -> AttackOutcome:
    """Return an outcome from its plain values."""
    points = [AttackPoint(**point) for point in values["points"]]
    return AttackOutcome(**{**values, "points": points})


def point_setting(point: AttackPoint) -> dict[str, Any]:
    """Return what was varied at a point, without what is only worth knowing of it."""
    return {key: value for key, value in point.setting.items() if key != "facts"}

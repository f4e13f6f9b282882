"""The place where one method, or two together, are tried out: models on disk, a store, and runs that are made once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from experiments.contract.case import START, TOLERANCE
from experiments.contract.fitting import SEED, FitSpec, Fitted, Recorder, build_data, build_model, fit, plain_state
from experiments.contract.process_pair import PairJob, RankResult, shared_pair
from experiments.contract.subject import Subject, Variant
from experiments.contract.tiny import TinyModel, make_tokenizer
from framework.composition import apply_edits, prepare_methods
from framework.errors import ConfigError
from framework.files import ArtifactStore, write_atomic
from framework.method import Method, MethodStore
from framework.quiet import quiet_bars

__all__ = ["CaseConflict", "Workbench"]

TOKENIZER_FILES = "tokenizer.json"


class CaseConflict(ConfigError):
    """Two contract cases cannot be tried out together: nothing is known of the methods."""


class Workbench:
    """Runs the subjects together; what several clauses look at is computed once and kept."""

    def __init__(self, subjects: Sequence[Subject], folder: Path) -> None:
        """Keep the subjects; nothing is computed yet.

        Args:
            subjects: one method, or two that are tried out together, in this order.
            folder: for models, artefacts and files; may hold those of an earlier bench.
        """
        self.subjects = tuple(subjects)
        self.folder = folder
        self._kept: dict[Any, Any] = {}

    # ---- what is true of all subjects together --------------------------------------------------------------------

    @property
    def name(self) -> str:
        """Names of the subjects."""
        return " + ".join(subject.name for subject in self.subjects)

    @property
    def points(self) -> frozenset[str]:
        """Every contribution point some subject fills."""
        return frozenset(point for subject in self.subjects for point in subject.points)

    @property
    def supports(self) -> frozenset[str]:
        """Strategies all subjects support."""
        return frozenset.intersection(*(subject.method_class.supports for subject in self.subjects))

    @property
    def acts_without_training(self) -> bool:
        """Whether every subject acts through ``apply_edits``."""
        return all(subject.acts_without_training for subject in self.subjects)

    @property
    def is_edit_only(self) -> bool:
        """Whether no subject is tried out in training."""
        return all(subject.case.stage == "edit_only" for subject in self.subjects)

    @property
    def tolerance(self) -> float:
        """Relative difference allowed between ways to cut a step."""
        return max([TOLERANCE, *(subject.case.tolerance for subject in self.subjects)])

    @property
    def adapter(self) -> str:
        """The kind of trainable parameters the clauses use: the first that all subjects work with."""
        first, *others = [subject.case.adapters for subject in self.subjects]
        common = [kind for kind in first if all(kind in other for other in others)]
        return common[0] if common else first[0]

    @property
    def no_neutral(self) -> str:
        """Why there are no settings that change nothing; empty when there are."""
        return "; ".join(subject.case.no_neutral for subject in self.subjects if subject.case.neutral is None)

    def spec(self, **changes: Any) -> FitSpec:
        """Return the usual run with some fields changed."""
        return FitSpec(**({"adapter": self.adapter} | changes))

    # ---- models, files, methods -----------------------------------------------------------------------------------

    @property
    def store(self) -> MethodStore:
        """Models by role and the artefacts; the models are written when first asked for."""
        return self.once("store", self._make_store)

    def create(self, variant: Variant = "acting") -> list[Method]:
        """Return fresh methods."""
        self.store  # noqa: B018  # their files
        return [subject.create(variant, self._files(subject)) for subject in self.subjects]

    @property
    def order(self) -> tuple[str, ...]:
        """The declared order: of two subjects, as they stand here."""
        return tuple(subject.name for subject in self.subjects) if len(self.subjects) > 1 else ()

    # ---- runs -------------------------------------------------------------------------------------------------------

    def plain(self, **changes: Any) -> Fitted:
        """Return the run without any method."""
        spec = self.spec(**changes)
        return self.once(("plain", spec), lambda: fit(spec, [], self.store))

    def acting(self, **changes: Any) -> Fitted:
        """Return the run with the subjects, made once for each way to run."""
        spec = self.spec(**changes)
        return self.once(("acting", spec), lambda: self.fit(self.create(), spec))

    def fit(
        self,
        methods: Sequence[Method],
        spec: FitSpec | None = None,
        *,
        is_prepared: bool = True,
        recorder: Recorder | None = None,
    ) -> Fitted:
        """Run with the given methods, which must be fresh."""
        chosen = spec or self.spec()
        return fit(chosen, methods, self.store, order=self.order, is_prepared=is_prepared, recorder=recorder)

    def edited(self, methods: Sequence[Method], *, is_prepared: bool = True, **changes: Any) -> nn.Module:
        """Return the start model after ``apply_edits``."""
        spec = self.spec(**changes)
        model = build_model(spec)
        if is_prepared:
            prepare_methods(methods, model, build_data(spec), self.store)
        pl.seed_everything(SEED, workers=True, verbose=False)
        apply_edits(model, methods, order=self.order)
        return model.eval()

    def final_state(self, variant: Variant | None, **changes: Any) -> dict[str, torch.Tensor]:
        """Return the tensors a stage hands on: trained, or only edited when no subject is tried out in training.

        Args:
            variant: of the subjects; None leaves them out.
            **changes: of the run.
        """

        def make() -> dict[str, torch.Tensor]:
            if not self.is_edit_only:
                if variant is None:
                    return self.plain(**changes).state
                return (self.acting(**changes) if variant == "acting" else self._neutral(**changes)).state
            return plain_state(
                build_model(self.spec(**changes)) if variant is None else self.edited(self.create(variant), **changes)
            )

        return self.once(("final", variant, self.spec(**changes)), make)

    def on_two_processes(self) -> tuple[RankResult, RankResult]:
        """Return what each of two gloo processes has after the usual run; made once."""

        def make() -> tuple[RankResult, RankResult]:
            self.store  # noqa: B018  # written before both look for it
            return shared_pair().run(PairJob(self.subjects, str(self.folder), self.spec(processes=2)))

        return self.once("pair", make)

    # ---- private ----------------------------------------------------------------------------------------------------

    def _neutral(self, **changes: Any) -> Fitted:
        return self.fit(self.create("neutral"), self.spec(**changes))

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return what ``make`` gives, made once for each key."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def _files(self, subject: Subject) -> Path:
        """Return the folder of a case's files: two cases may mean different files by one name."""
        return self.folder / "files" / subject.name

    def _make_store(self) -> MethodStore:
        roles = {"start": START}
        for subject in self.subjects:
            for role, model in subject.case.roles.items():
                if roles.setdefault(role, model) != model:
                    raise CaseConflict(
                        f"Expected `{self.name}` to mean the same model by role `{role}`, but got {roles[role]} and "
                        f"{model}. Use one of them in both contract cases."
                    )
            for name, text in subject.case.files.items():
                write_atomic(self._files(subject) / name, text)
        folders = {role: _model_folder(self.folder / "models" / role, model) for role, model in roles.items()}
        fingerprints = {role: repr(model) for role, model in roles.items()}
        return MethodStore(ArtifactStore(self.folder / "store"), models=folders, fingerprints=fingerprints)


def _model_folder(folder: Path, model: TinyModel) -> Path:
    if not (folder / TOKENIZER_FILES).is_file():
        with quiet_bars():
            model.build().save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
    return folder

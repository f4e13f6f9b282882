"""What the keys of stages and measurements hold."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from experiments import measure
from experiments.measure import measure_model
from experiments.stages import ModelState, StageChain
from framework.config import EvaluateConfig, load_run_config
from framework.files import ArtifactStore, fingerprint
from framework.models import ModelSpec
from tests.conftest import make_tokenizer


def stage_key(dtype: str) -> dict[str, Any]:
    config = load_run_config("quickstart", [f"model.dtype={dtype}"])
    state: Any = ModelState("start", Path("model"), "0123")
    chain: Any = SimpleNamespace(config=config)
    return StageChain._key(chain, "finetune", config.stages.finetune, config.training("finetune"), state, state, None)


def test_a_stage_is_known_by_the_type_it_is_trained_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found = []
    for has_hardware in (False, True):
        monkeypatch.setattr("framework.models.has_bf16_hardware", lambda has_hardware=has_hardware: has_hardware)
        found.append(fingerprint(stage_key("auto")))
    assert found == [fingerprint(stage_key("float32")), fingerprint(stage_key("bfloat16"))]


def test_a_measurement_is_known_by_the_chat_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[str] = []
    monkeypatch.setattr(
        measure, "stored_measurement", lambda store, kind, key, work: keys.append(fingerprint(key)) or None
    )
    tokenizer = make_tokenizer()
    for template in (tokenizer.chat_template, tokenizer.chat_template, "{{ 'other' }}" + tokenizer.chat_template):
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / "model")
        measure_model(
            ModelSpec(str(tmp_path / "model"), "float32"),
            "0123",
            EvaluateConfig(limit=2, task=False),
            task=None,
            system="",
            artifacts=ArtifactStore(tmp_path / "store"),
        )
    assert keys[0] == keys[1] != keys[2]

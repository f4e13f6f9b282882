from __future__ import annotations

import json

import pytest

from experiments import cli
from experiments.mining import mine_recipe
from experiments.run import run_recipe
from experiments.stage_data import check_mining
from framework.config import load_run_config
from framework.errors import ConfigError, DataError
from framework.evaluation import judges
from framework.files import read_json
from tests.coin_judge import coin_judge
from tests.conftest import make_model, make_tokenizer

SMALL = "{prompts: 12, rollouts: 4, benign_prompts: 8, max_new_tokens: 6, judges: [coin], rows: 4}"


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("SEAWALL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    make_model().save_pretrained(tmp_path / "tiny")
    make_tokenizer().save_pretrained(tmp_path / "tiny")
    path = tmp_path / "mined.yaml"
    path.write_text(
        f"""
name: mined
model: {{name: {tmp_path / "tiny"}, dtype: float32, system: ""}}
adapter: {{rank: 2, alpha: 4, targets: [q_proj, v_proj]}}
max_length: 500
max_steps: 2
batch_size: 4
learning_rate: 0.01
stages:
  align: {{data: {{safety: embedded, benign: embedded, safety_count: 4, benign_count: 4}}}}
  repair: {{data: {{benign: embedded, benign_count: 4}}, methods: {{smh: {SMALL}}}}}
evaluate: {{after: [repair], max_new_tokens: 4, limit: 2, batch_size: 8, task: false, benign_nll: false}}
trainer: {{accelerator: cpu, threads: 1}}
tracking: {{wandb: "off"}}
""",
        encoding="utf-8",
    )
    with coin_judge():
        yield path


def test_a_recipe_is_mined_and_then_trained_on_what_was_found(recipe, tmp_path, capsys):
    assert cli.main(["mine", str(recipe)]) == 0
    shown, progress = capsys.readouterr()
    assert "train align: 2/2" in progress
    assert "prompts break the model sometimes" in shown
    assert "harmful rollouts:" in shown
    summary = read_json(tmp_path / "runs" / "mined" / "mining.json")["summary"]
    assert summary["rollouts"] == 12 * 4
    stores = list((tmp_path / "cache").rglob("rollouts.jsonl"))
    assert len(stores) == 1
    before = stores[0].read_bytes()
    assert before.count(b"\n") == 1 + 12 * 4 + 8 * 4
    results = run_recipe(load_run_config(recipe))
    assert stores[0].read_bytes() == before  # nothing was mined again
    effects = next(stage for stage in results["stages"] if stage["stage"] == "repair")["effects"]["smh"]
    assert effects["prompts_mined"] == 12
    assert effects["prompts_eligible"] == summary["eligible"]
    assert effects["sources_added"] == 3


def test_a_recipe_without_the_method_cannot_be_mined(recipe):
    config = load_run_config(recipe, ["stages.repair.methods={}"])
    with pytest.raises(
        ConfigError, match=r"a stage of the recipe to have the method `smh`, but got none in align, rep"
    ):
        mine_recipe(config)


def test_what_was_mined_is_not_mined_again(recipe):
    config = load_run_config(recipe, ["stages.repair.methods.smh={mined: somewhere.jsonl}"])
    with pytest.raises(ConfigError, match=r"Expected `smh.mined` to be null for mining, but got 'somewhere.jsonl'"):
        mine_recipe(config)


def test_what_was_mined_elsewhere_is_trained_on(recipe, tmp_path):
    text = "stages.repair.methods.smh={prompts: 12, rollouts: 8, benign_prompts: 8, max_new_tokens: 6, judges: [coin]}"
    mined = mine_recipe(load_run_config(recipe, [text, "stages.align=null"]))
    assert mined["summary"]["replay"]["most"] == 4
    (tmp_path / "elsewhere.jsonl").write_bytes((tmp_path / "runs" / "mined" / "mined.jsonl").read_bytes())
    text = f"stages.repair.methods.smh={{mined: {tmp_path / 'elsewhere.jsonl'}, judges: [coin], other_rows: leave_out}}"
    results = run_recipe(load_run_config(recipe, [text, "stages.align=null", "name=trained"]))
    effects = next(stage for stage in results["stages"] if stage["stage"] == "repair")["effects"]["smh"]
    assert effects["prompts_eligible"] == mined["summary"]["eligible"]


def test_a_run_is_found_again_where_its_rollouts_lie_in_a_folder_of_their_own(recipe, tmp_path):
    folder = tmp_path / "kept"
    config = load_run_config(recipe, [f"stages.repair.methods.smh.store={folder}", "stages.align=null"])
    reused = [run_recipe(config)["stages"][-1]["reused"] for _ in range(2)]
    assert list(folder.rglob("rollouts.jsonl"))
    assert reused == [False, True]


def test_nothing_to_learn_says_why_and_keeps_the_file(recipe, tmp_path):
    del judges._REGISTRY["coin"]
    with coin_judge(harmful=0.0), pytest.raises(DataError, match=r"all 12 never broke the model. Name harder prompts"):
        mine_recipe(load_run_config(recipe))
    lines = [json.loads(line) for line in (tmp_path / "runs" / "mined" / "mined.jsonl").read_text().splitlines()]
    assert len(lines) == 1 + 12 + 8
    judges._REGISTRY["coin"] = object  # the fixture takes it away


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("templates=[embeded]", r"Method `smh` in `stages.repair`: Expected `templates` to be one of embedded, emb"),
        ("harmful=[embedded_jailbreak]", r"Method `smh` in `stages.repair`: Expected `harmful` to name sets to train"),
        ("prompts=5000", r"Method `smh` in `stages.repair`: Expected `prompts` to be at most 960"),
    ],
)
@pytest.mark.parametrize("command", [run_recipe, mine_recipe])
def test_what_cannot_be_mined_is_refused_before_a_model_is_aligned(recipe, tmp_path, command, setting, message):
    config = load_run_config(recipe, [f"stages.repair.methods.smh.{setting}"])
    with pytest.raises(ConfigError, match=message):
        command(config)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_file_of_mined_prompts_needs_no_sets(recipe):
    settings = ["stages.repair.methods.smh.mined=some.jsonl", "stages.repair.methods.smh.harmful=[embeded]"]
    check_mining(load_run_config(recipe, settings))
    check_mining(load_run_config(recipe, ["stages.repair.methods.smh.ratio=0", "stages.repair.methods.smh.benign=[x]"]))
    with pytest.raises(ConfigError, match="embeded"):
        check_mining(load_run_config(recipe, settings[1:]))

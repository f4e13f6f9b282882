import gzip
import json
import sys
import types

import pytest

from datamodules.readers import data_root, find_file, load_hub, read_json_value, read_records, set_name
from framework.errors import DataError


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_json_lines_keep_order_and_skip_blank_lines(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"x": 1}\n\n{"x": "a\u2028b"}\n')
    assert read_records(path) == [{"x": 1}, {"x": "a\u2028b"}]


def test_malformed_json_line_is_named_with_file_and_number(tmp_path):
    path = write(tmp_path / "bad.jsonl", '{"x": 1}\n\n{"x": 2\n{"x": 3}\n')
    with pytest.raises(DataError, match=r"Expected line 3 of `.*bad\.jsonl` to be a JSON object, but got '\{\"x\": 2'"):
        read_records(path)


def test_a_json_line_that_is_no_object_is_refused(tmp_path):
    path = write(tmp_path / "bad.jsonl", '{"x": 1}\n[1, 2]\n')
    with pytest.raises(DataError, match=r"Expected line 2 of `.*bad\.jsonl` to be a JSON object, but got '\[1, 2\]'"):
        read_records(path)


@pytest.mark.parametrize(
    ("content", "records"),
    [
        ([{"a": 1}, {"a": 2}], [{"a": 1}, {"a": 2}]),
        (["one", "two"], [{"text": "one"}, {"text": "two"}]),
        ({"canary": "x", "examples": [{"a": 1}]}, [{"a": 1}]),
        ({"rows": [{"a": 1}], "none": []}, [{"a": 1}]),
    ],
)
def test_json_layouts(tmp_path, content, records):
    assert read_records(write(tmp_path / "a.json", json.dumps(content))) == records


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1},\n {"a": }]', r"to be JSON, but got .* in line 2"),
        ('{"a": [1], "b": [2]}', "an object with one list in it, but got an object with 2 lists"),
        ('{"a": 1}', "an object with one list in it, but got an object with 0 lists"),
        ("3", "to be a JSON list of objects, but got int"),
        ('[{"a": 1}, 5]', r"Expected record 2 of `.*a\.json` to be an object, but got '5'"),
        ("[]", "to hold records, but got an empty file"),
        (" \n", "to hold records, but got an empty file"),
    ],
)
def test_json_that_holds_no_records_is_refused(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read_records(write(tmp_path / "a.json", text))


def test_csv_with_quotes_line_breaks_and_byte_order_mark(tmp_path):
    path = write(tmp_path / "a.csv", '\ufeffgoal,target\n"a, ""b""\nc",d\r\ne,f\n')
    assert read_records(path) == [{"goal": 'a, "b"\nc', "target": "d"}, {"goal": "e", "target": "f"}]


def test_csv_comment_line_is_skipped(tmp_path):
    path = write(tmp_path / "a.csv", "# version=1.0,,\na,b\n1,2\n")
    assert read_records(path) == [{"a": "1", "b": "2"}]


def test_csv_without_header(tmp_path):
    path = write(tmp_path / "a.csv", '"3","x"\n"4","y"\n')
    assert read_records(path, columns=("class", "title")) == [
        {"class": "3", "title": "x"},
        {"class": "4", "title": "y"},
    ]


def test_tsv_takes_quotation_marks_as_text(tmp_path):
    path = write(tmp_path / "a.tsv", 'label\tsentence\n1\t"unfinished\n0\tb\n')
    assert read_records(path) == [{"label": "1", "sentence": '"unfinished'}, {"label": "0", "sentence": "b"}]


def test_table_row_with_other_columns_is_named(tmp_path):
    path = write(tmp_path / "a.csv", "# note\na,b\n1,2\n1,2,3\n")
    with pytest.raises(DataError, match=r"Expected line 4 of `.*a\.csv` to have 2 columns \(a, b\), but got 3"):
        read_records(path)


def test_malformed_table_is_named(tmp_path):
    path = write(tmp_path / "a.csv", 'a,b\n1,"2" x\n')
    with pytest.raises(DataError, match=r"Expected line 2 of `.*a\.csv` to be a row of a table, but got"):
        read_records(path)


def test_text_lines(tmp_path):
    assert read_records(write(tmp_path / "a.txt", "one\n\n two \n")) == [{"text": "one"}, {"text": "two"}]


def test_compressed_file(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"x": 1}\n'))
    assert read_records(tmp_path / "a.jsonl.gz") == [{"x": 1}]


def test_damaged_compressed_file_is_refused(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"x": 1}\n' * 100)[:-12])
    with pytest.raises(DataError, match=r"Expected `.*a\.jsonl\.gz` to be readable, but got"):
        read_records(tmp_path / "a.jsonl.gz")


def test_text_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"x": 1}\n{"x": "\xff"}\n')
    with pytest.raises(DataError, match=r"to be UTF-8 text, but line 2 is not"):
        read_records(tmp_path / "a.jsonl")


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.tsv", "a.txt"])
def test_empty_file_is_refused(tmp_path, name):
    with pytest.raises(DataError, match=rf"Expected `.*{name}` to hold records, but got an empty file"):
        read_records(write(tmp_path / name, ""))


def test_header_alone_is_an_empty_file(tmp_path):
    with pytest.raises(DataError, match="to hold records, but got an empty file"):
        read_records(write(tmp_path / "a.csv", "a,b\n"))


def test_missing_file_and_folder_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"Expected `.*no\.jsonl` to be a file, but found nothing"):
        read_records(tmp_path / "no.jsonl")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(DataError, match=r"Expected `.*folder\.json` to be a file, but found a folder"):
        read_records(tmp_path / "folder.json")


def test_unknown_kind_of_file_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"to end in one of \.jsonl, .*, but got 'a\.parquet'"):
        read_records(write(tmp_path / "a.parquet", "x"))


def test_json_value_is_whatever_the_file_holds(tmp_path):
    assert read_json_value(write(tmp_path / "a.json", '{"a": {"b": ["c"]}}')) == {"a": {"b": ["c"]}}


def test_set_name_drops_the_endings(tmp_path):
    assert set_name(tmp_path / "x.5k.json.gz") == "x.5k"


def test_files_are_found_by_path_and_below_the_data_folder(tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    path = write(tmp_path / "set" / "a.csv", "a\n1\n")
    monkeypatch.setenv("SEAWALL_DATA", str(tmp_path))
    assert data_root() == tmp_path
    assert find_file(path) == path
    assert find_file("set/a.csv") == path
    assert find_file("a.csv", dataset="set") == path


def test_a_file_that_is_nowhere_lists_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("SEAWALL_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"found nothing at: b\.csv, .*/set/b\.csv, .*/b\.csv\. Check the path\."):
        find_file("b.csv", dataset="set")
    monkeypatch.delenv("SEAWALL_DATA")
    assert data_root() is None
    with pytest.raises(DataError, match=r"found nothing at: b\.csv\. Check the path, or set the variable SEAWALL_DATA"):
        find_file("b.csv", dataset="set")


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the package ``datasets``."""
    calls = []
    module = types.ModuleType("datasets")
    module.rows = [{"label": 1}]

    def load_dataset(*args, **named):
        calls.append((args, named))
        if isinstance(module.rows, Exception):
            raise module.rows
        return module.rows

    module.load_dataset = load_dataset
    module.calls = calls
    module.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "datasets", module)
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    return module


def test_hub_rows_are_dictionaries(hub):
    assert load_hub("owner/name", "train", config="main") == [{"label": 1}]
    assert hub.calls == [(("owner/name", "main"), {"split": "train"})]


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"])
def test_hub_is_not_asked_offline(hub, monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    with pytest.raises(DataError, match=rf"`owner/name` to be reachable, but {variable} is set\. Give a local file"):
        load_hub("owner/name", "train")
    assert hub.calls == []


def test_hub_without_the_package_names_the_remedies(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"Expected the package `datasets` .* not installed\. .*pip install datasets"):
        load_hub("owner/name", "train")


def test_hub_failures_are_data_errors(hub):
    hub.rows = ConnectionError("no route")
    with pytest.raises(DataError, match=r"`owner/name` \(split train\) to be loadable from the hub, but got: no route"):
        load_hub("owner/name", "train")


def test_empty_hub_split_is_refused(hub):
    hub.rows = []
    with pytest.raises(DataError, match="Expected split 'train' of data set `owner/name` to have rows, but got none"):
        load_hub("owner/name", "train")


@pytest.mark.parametrize(
    ("file", "rows"),
    [
        ("advbench/harmful_behaviors.csv", 520),
        ("or-bench/orbench_hard.json", 1319),
        ("pyrit/scorer_evals/harm/exploits.csv", 80),
        ("humaneval/HumanEval.jsonl.gz", 164),
        ("bbh/navigate.json", 250),
        ("inthewild-jailbreaks/inthewild_jailbreak_llms.json", 666),
        ("tense-reformulations/past_tense_en.txt", 730),
        ("gptfuzz/train.csv", 6160),
        ("gptfuzz/GPTFuzzer.csv", 77),
        ("sst2/train.tsv", 3000),
        ("truthfulqa/TruthfulQA.csv", 817),
        ("safe-rlhf-mini/Safe-RLHFmini.csv", 4000),
        ("refusal-direction-runs/gemma-2b-it/harmless_baseline_evaluations.json", 100),
    ],
)
def test_real_files_have_their_published_row_counts(real_data, file, rows):
    assert len(read_records(real_data / file)) == rows

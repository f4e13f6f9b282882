from __future__ import annotations

import csv
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from experiments.cli import main
from experiments.exports import TIDY_COLUMNS
from experiments.report import ReportFiles, build_report, collect_runs, write_report
from experiments.report.figures import PALETTE, styles_of
from framework.errors import ConfigError


class Structure(HTMLParser):
    """Open elements and ids of a page."""

    VOID = frozenset({"meta", "link", "img", "input", "br", "circle", "path", "use", "rect"})

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.open: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if found.get("id"):
            self.ids.append(str(found["id"]))
        for name in ("src", "href"):
            value = found.get(name) or ""
            if value and not value.startswith(("#", "data:")):
                self.outside.append(value)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(report_files: ReportFiles) -> str:
    return report_files.page.read_text(encoding="utf-8")


def test_the_page_is_one_well_formed_file_without_network(page: str) -> None:
    structure = Structure()
    structure.feed(page)
    assert structure.open == []
    assert structure.outside == []
    assert len(set(structure.ids)) == len(structure.ids)
    assert "http://" not in re.sub(r'xmlns(:\w+)?="[^"]+"', "", page)
    assert "default-src 'none'" in page
    assert "alert(1)" not in page  # a picture beside a run is an image, its script stays asleep
    assert 'src="data:image/svg+xml;base64,' in page


def test_every_part_is_there_with_counts_and_intervals(page: str) -> None:
    for heading in ("In short", "Comparison", "Trade-off", "By category", "Training", "Cost", "Did each method act?"):
        assert heading in page
    assert re.search("\\d+/240; \\d+\\.\\d\u2013\\d+\\.\\d", page)
    assert re.search("seeds \\d+\\.\\d\u2013\\d+\\.\\d", page)
    assert re.search(r"\u2212\d+\.\d pts \(\u2212\d+\.\d to \u2212\d+\.\d\)", page)
    assert re.search(r'class="dominated"><th scope="row" class="name">.{0,300}Slow one', page, re.DOTALL)
    assert "no effect counted" in page
    assert "AsFT has the lowest attack success, outside the noise of every other variant." in page
    assert page.count('role="img"') == 4


def test_pictures_are_also_png_and_follow_the_page_s_colours(report_files: ReportFiles, page: str) -> None:
    assert [path.name for path in report_files.figures] == [
        "cell0-tradeoff.png",
        "cell0-categories.png",
        "cell0-curves.png",
        "cell0-cost.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in report_files.figures)
    drawings = "".join(re.findall(r'<svg class="plot".*?</svg>', page, re.DOTALL))
    assert not any(colour in drawings for colour in PALETTE)
    assert "var(--c0)" in drawings
    assert "<title>AsFT: attack success" in drawings


def test_the_same_runs_give_the_same_page(report_files: ReportFiles, run_folders: list[Path], page: str) -> None:
    report = build_report(collect_runs([run_folders[0].parent]), show="all")
    assert '<meta name="seawall-page" content="2 with-replies">' in report.html[:1024]
    assert report.html == page


def test_text_from_runs_is_text(run_folders: list[Path], tmp_path: Path) -> None:
    for number, folder in enumerate(run_folders[:2]):
        results = json.loads((folder / "results.json").read_text())
        results["rows"][-1]["label"] = f"<script>bad{number}</script>"
        (tmp_path / folder.name).mkdir()
        (tmp_path / folder.name / "results.json").write_text(json.dumps(results))
        (tmp_path / folder.name / "samples.jsonl").write_text((folder / "samples.jsonl").read_text())
    html = build_report(collect_runs([tmp_path])).html
    assert "<script>bad" not in html
    assert "&lt;script&gt;bad0" in html


def test_without_replies_no_reply_is_in_the_page(run_folders: list[Path]) -> None:
    report = build_report(collect_runs(run_folders[:2]), show="none")
    assert "This page was made without replies." in report.html
    assert '<meta name="seawall-page" content="2 without-replies">' in report.html[:1024]
    assert 'id="reveal"' not in report.html


def test_a_single_run_without_replies(run_folders: list[Path], tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text((run_folders[1] / "results.json").read_text())
    files = write_report([tmp_path])
    html = files.page.read_text()
    assert files.page == tmp_path / "report.html"
    assert "No two models with their replies at hand" in html
    assert "aligned: attack success" in html
    assert "safety tax:" not in html


def test_numbers_are_exported(report_files: ReportFiles) -> None:
    from pyarrow import parquet

    rows = list(csv.DictReader(report_files.csv.read_text(encoding="utf-8").splitlines()))
    assert len(rows) == 12
    asft = next(row for row in rows if row["title"] == "AsFT (seed 0)")
    assert float(asft["attack_success"]) == int(asft["attack_success/numerator"]) / 80
    assert float(asft["cost/train_seconds"]) == 420.0
    table = parquet.read_table(report_files.parquet)
    assert table.schema.names == list(TIDY_COLUMNS)
    tidy = table.to_pylist()
    kinds = {row["kind"] for row in tidy}
    assert kinds == {"metric", "cost", "category", "curve", "probe", "effect"}
    same = [row for row in tidy if row["title"] == "AsFT (seed 0)" and row["name"] == "attack_success"]
    assert [row["value"] for row in same] == [float(asft["attack_success"])]
    curve = [row for row in tidy if row["title"] == "AsFT (seed 0)" and row["name"] == "train/asft/term"]
    assert [row["step"] for row in curve] == [float(step) for step in range(1, 91)]


def test_replies_to_prompts_in_templates_are_counted_by_template(run_folders: list[Path], tmp_path: Path) -> None:
    from pyarrow import parquet

    for source in run_folders[:2]:
        folder = shutil.copytree(source, tmp_path / source.name)
        samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
        for number, sample in enumerate(samples):
            if sample["kind"] == "harmful":
                sample["id"] += f"+template-test-0{1 + number % 2}"
        (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    files = write_report([tmp_path / source.name for source in run_folders[:2]], output=tmp_path / "report.html")
    html = files.page.read_text(encoding="utf-8")
    assert "Counts: attack success by jailbreak template" in html
    assert "over-refusal by jailbreak template" not in html
    assert 'class="name">template</th>' in html
    assert "translation exercise" in html
    tidy = [row for row in parquet.read_table(files.parquet).to_pylist() if row["kind"] == "template"]
    assert {row["name"] for row in tidy} == {"harmful/translation_exercise", "harmful/bedtime_memory"}
    first = [row for row in tidy if row["title"] == tidy[0]["title"]]
    assert sum(row["denominator"] for row in first) == 80


def test_wrong_options_are_refused(run_folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Expected `output` to be a file ending in .html, but got"):
        write_report(run_folders[:1], output=tmp_path / "report.pdf")
    with pytest.raises(ConfigError, match=r"a label of the runs \(Plain LoRA\), but got 'x'"):
        write_report(run_folders[:1], output=tmp_path / "report.html", reference="x")


def test_the_command_writes_and_says_where(
    run_folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "r.html"
    code = main(
        ["report", str(run_folders[0]), str(run_folders[1]), "--output", str(page), "--json", "--title", "Mine"]
    )
    assert code == 0
    said = json.loads(capsys.readouterr().out)
    assert said["page"] == str(page)
    assert len(said["figures"]) == 4
    assert "<h1>Mine</h1>" in page.read_text()
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "but it is not there" in capsys.readouterr().err


def test_colours_run_out_into_grey() -> None:
    styles = styles_of([f"m{n}" for n in range(12)], greyed=["m1"])
    assert styles["m1"].is_grey
    assert [style.is_grey for style in styles.values()].count(False) == len(PALETTE)

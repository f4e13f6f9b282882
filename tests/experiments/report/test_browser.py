"""The report in a real browser: opened from the disk, without network, and clicked through."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments.report import ReportFiles

COMMANDS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


def browser_path() -> str | None:
    """``SEAWALL_CHROMIUM``, or a browser on the path."""
    return os.environ.get("SEAWALL_CHROMIUM") or next((path for name in COMMANDS if (path := shutil.which(name))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="no headless browser: playwright is not installed")
    with playwright.sync_playwright() as api:
        own = api.chromium.executable_path
        path = browser_path() or (own if Path(own).is_file() else None)
        if path is None:
            pytest.skip(f"no headless browser: none of {', '.join(COMMANDS)} found; or set SEAWALL_CHROMIUM")
        started = api.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def page(browser: Any, report_files: ReportFiles) -> Iterator[Any]:
    with opened_page(browser, report_files) as opened:
        yield opened


@contextlib.contextmanager
def opened_page(browser: Any, files: ReportFiles) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light", offline=True)
    opened = context.new_page()
    trouble: list[str] = []
    opened.on("pageerror", lambda error: trouble.append(str(error)))
    opened.on("console", lambda message: trouble.append(message.text) if message.type == "error" else None)
    asked: list[str] = []
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(files.page.as_uri())
    opened.wait_for_selector("body[data-ready=yes]")
    yield opened
    assert trouble == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    context.close()


def listed(page: Any) -> list[str]:
    return list(page.locator("#flips .flip header code").all_inner_texts())


def test_replies_are_hidden_until_they_are_revealed(page: Any) -> None:
    assert page.locator("#from").evaluate("e => e.selectedOptions[0].text") == "Plain LoRA (seed 0)"
    assert page.locator("#to").evaluate("e => e.selectedOptions[0].text") == "AsFT (seed 0)"
    counts = [int(n) for n in re.findall(r"\d+", page.locator("#tally").inner_text())]
    assert counts[0] == counts[1] + counts[2] + counts[3] == counts[4]
    assert counts[1] > counts[2]
    assert len(listed(page)) == 10
    assert page.locator(".reply:visible").count() == 0
    side = page.locator(".flip .side").first
    assert re.search(r"Reply of \d+ words?, hidden", side.inner_text())
    button = side.locator("button")
    button.focus()
    page.keyboard.press("Enter")
    assert button.inner_text() == "Hide"
    assert button.get_attribute("aria-expanded") == "true"
    assert len(side.locator(".reply").inner_text()) > 5
    button.click()
    assert page.locator(".reply:visible").count() == 0
    page.check("#reveal")
    assert page.locator(".reply:visible").count() == 20


def test_replies_to_harmful_requests_are_not_in_the_usual_page(browser: Any, redacted_files: ReportFiles) -> None:
    with opened_page(browser, redacted_files) as page:
        assert "seawall report --with-replies" in page.locator("#transcripts .lead").inner_text()
        page.select_option("#kind", "harmful")
        assert page.locator("#flips .flip").count() > 0
        assert page.locator("#flips button").count() == 0
        assert page.locator("#flips .prompt").count() == 0
        assert re.search(r"Reply of \d+ words?, not part of the page", page.locator("#flips .side").first.inner_text())
        page.select_option("#kind", "task")
        page.check("#reveal")
        assert page.locator("#flips .reply:visible").count() > 0


def test_the_pair_can_be_chosen_swapped_and_filtered(page: Any) -> None:
    better = int(re.search(r"(\d+) better", page.locator("#tally").inner_text()).group(1))
    page.click("#swap")
    assert f"{better} worse" in page.locator("#tally").inner_text()
    assert page.locator("#to").evaluate("e => e.selectedOptions[0].text") == "Plain LoRA (seed 0)"
    page.select_option("#kind", "task")
    assert listed(page)
    assert all(name.startswith("task-") for name in listed(page))
    page.select_option("#kind", "")
    page.select_option("#change", "better")
    assert page.locator("#flips .flip").count() > 0
    page.select_option("#change", "")
    page.fill("#search", "privacy")
    assert all("privacy" in text for text in page.locator("#flips .where").all_inner_texts())
    page.fill("#search", "nothing like it")
    assert page.locator("#flips .flip").count() == 0
    page.fill("#search", "")
    page.click("#more")
    assert len(listed(page)) == 20
    page.select_option("#from", label="aligned (seed 0)")
    assert "verdicts flipped" in page.locator("#tally").inner_text()
    page.select_option("#to", label="aligned (seed 0)")
    assert "Choose two different models" in page.locator("#tally").inner_text()


def test_tables_sort_and_filter(page: Any) -> None:
    table = page.locator("#model-table")
    head = table.locator("thead th").nth(1)

    def values() -> list[float]:
        cells = table.locator("tbody tr:visible td:nth-child(2)")
        return [float(text) for text in cells.evaluate_all("cells => cells.map(c => c.dataset.sort)")]

    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert values() == sorted(values())
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    assert values() == sorted(values(), reverse=True)
    assert page.locator("#shown").inner_text() == "12 of 12 models"
    page.fill("#filter", "asft (seed 1)")
    assert page.locator("#shown").inner_text() == "1 of 12 models"
    page.fill("#filter", "")
    page.check("#undominated")
    assert page.locator("#shown").inner_text() == "9 of 12 models"
    page.select_option("#point", "earlier")
    assert page.locator("#shown").inner_text() == "3 of 12 models"


def test_every_link_leads_to_a_section_and_nothing_is_wider_than_the_screen(page: Any) -> None:
    for target in page.locator(".bar a").evaluate_all("links => links.map(a => a.hash)"):
        assert page.locator(target).count() == 1
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width


CONTRAST = """() => {
  const light = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map((v) => {
      v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const found = getComputedStyle(node).backgroundColor;
      const alpha = (found.match(/[\\d.]+/g) || [])[3];
      if (alpha === undefined || Number(alpha) === 1) return found;
    }
    return "rgb(255, 255, 255)";
  };
  const low = new Set();
  for (const node of document.querySelectorAll("main *, header *, nav *")) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
    if (!own || node.closest("svg") || !node.checkVisibility()) continue;
    const pair = [light(getComputedStyle(node).color), light(ground(node))].sort((a, b) => b - a);
    const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
    if (ratio < 4.5) low.add(`${node.tagName}.${node.className}: ${ratio.toFixed(2)}`);
  }
  return [...low];
}"""


def test_text_has_enough_contrast_in_both_schemes(page: Any) -> None:
    assert page.evaluate(CONTRAST) == []
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert page.evaluate(CONTRAST) == []
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light


def test_pictures_controls_and_tables_have_names(page: Any) -> None:
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("img, svg[role=img], select, input, button, [role=region]")]
          .filter((e) => !(e.alt || e.getAttribute("aria-label") || e.closest("label") || e.textContent.trim()))
          .map((e) => e.outerHTML.slice(0, 80))"""
    )
    assert unnamed == []
    assert page.evaluate("document.documentElement.lang") == "en"

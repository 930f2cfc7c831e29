"""The report page in a browser: sorting, filters, links, keyboard; nothing asked for, no error."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from avzero.data.storage import LocalStorage
from avzero.report.boards import boards, notices
from avzero.report.mlflow_links import Links
from avzero.report.page import page
from avzero.report.parity import board
from avzero.report.parity_records import ours_in
from avzero.report.records import load
from avzero.report.rows import rows_of
from tests.records import REVISION, Sweep

WIDE, NARROW = (1400, 1000), (390, 800)


def build(store: Path, links: Links | None = None) -> str:
    """Return the page of a whole store."""
    storage = LocalStorage(store)
    records = load(storage)
    rows = rows_of(records)
    lines = board(ours_in(storage)[0])
    return page(records, boards(rows), notices(records, rows), lines, links or Links())


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of three sweeps, one of them half-finished."""
    place = tmp_path_factory.mktemp("page")
    store = place / "store"
    test = {"test": {"seeds": 3}, "search": {"trials": 40}}
    sim = {"ucf-main-sim": ("UCF", "main"), "ucf-cls-sim": ("UCF", "cls")}
    Sweep(store, "sim", sim, ["avca", "kda", "mft"], **test).run().test()
    texts = {"ucf-main": ("UCF", "main"), "ucf-main:clip": ("UCF", "main")}
    Sweep(store, "real", texts, ["avca", "kda"], **test, simulated=False).run().test()
    Sweep(store, "half", sim, ["avca"], **test).run(3)
    # Names are other people's: one that would break out of whatever holds it.
    manifest = next((store / "benchmarks").glob("ucf-main@*"))
    evil = '</script><img src=x onerror=\\"document.title=1\\">'
    manifest.write_text(manifest.read_text().replace("class 08", evil))
    (place / "report.html").write_text(build(store), encoding="utf-8")
    return place / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium that may reach nothing but files."""
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip("chromium and chromedriver are not installed (Debian: chromium-driver)")
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    options = selenium.ChromeOptions()
    options.binary_location = binary
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    yield chrome
    chrome.quit()


@pytest.fixture
def opened(browser: Any, report: Path) -> Any:
    """The page, freshly opened."""
    browser.set_window_size(*WIDE)
    browser.get("about:blank")
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get(report.as_uri())
    return browser


def texts(browser: Any, selector: str) -> list[str]:
    """Return the text of everything that is shown and fits a selector."""
    script = (
        "return [...document.querySelectorAll(arguments[0])].filter(e => e.getClientRects().length)"
        ".map(e => e.innerText.trim())"
    )
    return list(browser.execute_script(script, selector))


def click(browser: Any, selector: str) -> None:
    browser.execute_script("document.querySelector(arguments[0]).click()", selector)


def choose(browser: Any, name: str, value: str) -> None:
    """Choose a filter's value as a person does."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.select import Select

    Select(browser.find_element(By.NAME, name)).select_by_visible_text(value)


def systems(browser: Any, board: str) -> list[str]:
    return texts(browser, f"[id^='{board}'] tbody.ours tr.row th.name a")


def test_nothing_is_asked_for_and_nothing_fails(opened: Any) -> None:
    click(opened, "#trial-table button[data-sort='U']")
    click(opened, "tr.row[data-row='real/ucf-main--avca'] a")
    assert texts(opened, ".detail:target .recall b")
    assert opened.get_log("browser") == []
    asked = [
        line["message"]
        for line in opened.get_log("performance")
        if '"Network.requestWillBeSent"' in line["message"] and "file:///" not in line["message"]
    ]
    outside = [line for line in asked if "data:," not in line]
    assert outside == []
    assert opened.title == "avzero report"


def test_names_from_elsewhere_stay_text(opened: Any) -> None:
    click(opened, "tr.row[data-row='real/ucf-main--avca'] a")
    assert any(name.startswith("</script>") for name in texts(opened, ".detail:target .recall b"))
    assert opened.execute_script("return document.images.length") == 0


def test_sorting(opened: Any) -> None:
    board = "ucf-main-sim"
    by_hm = systems(opened, board)
    click(opened, f"[id^='{board}'] button[data-sort='model']")
    assert systems(opened, board) == sorted(by_hm) == ["avca", "kda", "mft"]
    click(opened, f"[id^='{board}'] button[data-sort='model']")
    assert systems(opened, board) == ["mft", "kda", "avca"]
    click(opened, f"[id^='{board}'] button[data-sort='HM']")
    assert systems(opened, board) == by_hm
    heads = opened.execute_script(
        "return [...document.querySelectorAll(`[id^='ucf-main-sim'] thead th[aria-sort]`)]"
        ".map(e => e.getAttribute('aria-sort')).filter(v => v !== 'none')"
    )
    assert heads == ["descending"]
    # Rows that have no value come last, either way; ours and published ones never mix.
    for _ in range(2):
        click(opened, "[id^='ucf-main-c'] button[data-sort='S']")
        cells = texts(opened, "[id^='ucf-main-c'] tbody.published tr.row td.num:nth-of-type(3)")
        assert cells[-1] == "" and cells[0] != ""


def test_filters(opened: Any) -> None:
    everything = len(texts(opened, "tr.row"))
    choose(opened, "model", "kda")
    rows = texts(opened, "tr.row th.name")
    assert rows and all(name.startswith(("kda", "KDA")) for name in rows)
    lines = opened.execute_script(
        "return [...document.querySelectorAll('.line')].filter(e => !e.hasAttribute('hidden'))"
        ".map(e => e.dataset.row)"
    )
    assert lines and all(key.endswith("--kda") for key in lines)
    assert {cells.split("\t")[2] for cells in texts(opened, "#trial-table tbody tr")} == {"kda"}
    choose(opened, "text", "clip")
    assert systems(opened, "ucf-main-c") == ["kda"] and len(texts(opened, ".board > .title")) == 1
    choose(opened, "features", "cls")
    assert texts(opened, "tr.row") == [] and texts(opened, "#nothing")
    click(opened, "button[type=reset]")
    opened.execute_async_script("setTimeout(arguments[0], 50)")
    assert len(texts(opened, "tr.row")) == everything
    assert texts(opened, "#count") == [f"{everything} of {everything} rows"]
    click(opened, "input[name=published]")
    assert not texts(opened, "tbody.published tr.row") and texts(opened, "tbody.ours tr.row")


def test_every_cell_leads_to_its_runs(opened: Any) -> None:
    bare = opened.execute_script(
        "return [...document.querySelectorAll('tbody.ours tr.row > :is(td, th)')]"
        ".filter(c => c.textContent.trim() && !c.matches('.place') && !c.querySelector('a'))"
        ".map(c => c.outerHTML)"
    )
    assert bare == []
    missing = opened.execute_script(
        "return [...document.querySelectorAll('tr.row a, nav a')].map(a => a.hash)"
        ".filter(h => !document.getElementById(decodeURIComponent(h.slice(1))))"
    )
    assert missing == []
    click(opened, "tr.row[data-row='real/ucf-main+clip--kda'] td.num a")
    (detail,) = texts(opened, ".detail")
    for part in (
        "kda on ucf-main",
        "text clip",
        "42, 43, 44",
        REVISION,
        "opened 3 times",
    ):
        assert part in detail


def test_keyboard(opened: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    def press(*keys: str) -> Any:
        opened.switch_to.active_element.send_keys(*keys)
        return opened.switch_to.active_element

    opened.execute_script(
        "document.querySelector(`[id^='ucf-main-sim'] button[data-sort='model']`).focus()"
    )
    press(Keys.ENTER)
    assert systems(opened, "ucf-main-sim") == ["avca", "kda", "mft"]
    link = "tr.row[data-row='sim/ucf-main-sim--kda'] th a"
    opened.execute_script("document.querySelector(arguments[0]).focus()", link)
    press(Keys.ENTER)
    assert opened.switch_to.active_element.text == "kda on ucf-main-sim"
    press(Keys.ESCAPE)
    assert not texts(opened, ".detail")
    assert opened.switch_to.active_element.text == "kda"


def test_trials_are_paged_and_sorted(opened: Any) -> None:
    def column(number: int) -> list[str]:
        return texts(opened, f"#trial-table tbody td:nth-child({number})")

    assert texts(opened, "#where") == ["1\u201350 of 406"]
    best = [float(v) for v in column(9)]
    assert best == sorted(best, reverse=True)
    click(opened, "button[data-page=last]")
    assert texts(opened, "#where") == ["401\u2013406 of 406"] and len(column(1)) == 6
    click(opened, "#trial-table button[data-sort='number']")
    click(opened, "#trial-table button[data-sort='number']")
    assert {int(v) for v in column(5)} <= set(range(8)), "a click sorts and goes to the top"
    opened.execute_script(
        "const s = document.getElementById('state'); s.value = 'pruned';"
        "s.dispatchEvent(new Event('change'))"
    )
    assert set(column(6)) == {"pruned"}
    choose(opened, "preset", "paper")
    choose(opened, "dataset", "VGGSound")
    assert texts(opened, "#where") == ["no trial fits"]


def test_fits_narrow_windows(opened: Any) -> None:
    opened.set_window_size(*NARROW)
    wide, seen = opened.execute_script(
        "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert wide <= seen, "only tables scroll sideways"


def test_links_into_mlflow(tmp_path: Path) -> None:
    one = {"ucf-main": ("UCF", "main")}
    Sweep(tmp_path, "one", one, ["avca"], search={"trials": 2}, test={"seeds": 1}).run().test()
    assert "mlflow" not in build(tmp_path)
    text = build(tmp_path, Links("http://tracker:5000", {"ucf-main": "7"}))
    run = load(LocalStorage(tmp_path)).results["mlflow"][0].as_py()
    assert "http://tracker:5000/#/experiments/7/runs?searchFilter=tags.%60avzero.run%60" in text
    assert run in text
    text = build(tmp_path, Links("http://tracker:5000"))
    assert "http://tracker:5000/#/experiments?experimentSearchFilter=ucf-main" in text

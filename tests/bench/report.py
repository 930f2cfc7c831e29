"""How long a report of ten thousand trials takes to make, to open and to sort.

Goals (issue 6): made in under 10 s, opened and sorted in under 1 s each, under 10 MB.

    make bench B=report
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.bench._measure import machine
from tests.records import Sweep

MODELS = [f"system_{i:02d}" for i in range(15)]
BENCHMARKS = {
    "ucf-main-sim": ("UCF", "main"),
    "ucf-cls-sim": ("UCF", "cls"),
    "ucf-cls-sim:clip": ("UCF", "cls"),
    "vggsound-main-sim": ("VGGSound", "main"),
}
TRIALS = 10_000
ROUNDS = 5

_FRAMES = (
    "requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - start)))"
)
SORT = f"""
const [selector, done] = arguments;
const start = performance.now();
document.querySelector(selector).click();
{_FRAMES};
"""
FILTER = f"""
const [name, value, done] = arguments;
const start = performance.now();
const select = document.getElementById("filters").elements[name];
select.value = value;
select.dispatchEvent(new Event("change", {{bubbles: true}}));
{_FRAMES};
"""
OPENED = """
const entry = performance.getEntriesByType("navigation")[0];
const paint = performance.getEntriesByName("first-contentful-paint")[0];
return [entry.loadEventEnd, paint ? paint.startTime : null];
"""


def main() -> None:
    """Measure and print."""
    print(machine())
    with tempfile.TemporaryDirectory(prefix="avzero-bench-") as scratch:
        store, page = Path(scratch) / "store", Path(scratch) / "report.html"
        each = -(-TRIALS // (len(MODELS) * len(BENCHMARKS)))
        plan: dict[str, Any] = {"search": {"trials": each}, "test": {"seeds": 3}}
        sweep = Sweep(store, "big", BENCHMARKS, MODELS, knobs=10, **plan)
        sweep.run().test()
        count = len(list((store / "sweeps/big/trials").rglob("*.json")))
        print(f"{count} trials, {len(sweep.groups)} rows of 3 seeds")
        for label in ("from the JSON records", "from Parquet"):
            print(f"made {label}: {made(store, page):.2f} s")
        print(f"size: {page.stat().st_size / 1e6:.2f} MB")
        in_browser(page)


def made(store: Path, page: Path) -> float:
    """Return the seconds of the whole command, started afresh."""
    import subprocess

    code = "from avzero.cli import main; main()"
    command = [sys.executable, "-c", code, "report", "--store", str(store), "--html", str(page)]
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def in_browser(page: Path) -> None:
    """Print what opening, sorting and filtering take in Chromium."""
    from selenium import webdriver

    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not binary or not driver:
        print("chromium is not installed: opening and sorting not measured")
        return
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1400,1000"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        _measure(browser, page)
    finally:
        browser.quit()


def _measure(browser: Any, page: Path) -> None:
    loads, paints = [], []
    for _ in range(ROUNDS):
        browser.get("about:blank")
        browser.get(page.as_uri())
        load, paint = browser.execute_script(OPENED)
        loads.append(load)
        paints.append(paint)
    _print("opened, first paint", [p for p in paints if p is not None])
    _print("opened, complete", loads)
    asked: dict[str, Callable[[], float]] = {
        "leaderboard sorted": lambda: browser.execute_async_script(
            SORT, ".board button[data-sort='ZSL']"
        ),
        "trials sorted": lambda: browser.execute_async_script(
            SORT, "#trial-table button[data-sort='seconds']"
        ),
        "trials sorted by text": lambda: browser.execute_async_script(
            SORT, "#trial-table button[data-sort='model']"
        ),
        "filtered": lambda: browser.execute_async_script(FILTER, "model", MODELS[3]),
        "filter off": lambda: browser.execute_async_script(FILTER, "model", ""),
    }
    taken: dict[str, list[float]] = {label: [] for label in asked}
    for _ in range(ROUNDS):
        for label, action in asked.items():
            taken[label].append(float(action()))
    for label, values in taken.items():
        _print(label, values)


def _print(label: str, values: Sequence[float]) -> None:
    """Print milliseconds."""
    if values:
        print(f"{label}: median {statistics.median(values):.0f} ms, worst {max(values):.0f} ms")


if __name__ == "__main__":
    main()

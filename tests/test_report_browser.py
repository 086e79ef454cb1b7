"""The report page in a headless Chromium: it loads, filters, sorts, sets ratios, and fits a phone."""

from __future__ import annotations

import shutil
from urllib.parse import quote

import pytest

from harness import report
from tests.report_folder import fill
from tests.test_report import board as board_in_file
from tests.test_report import tree

pytest.importorskip("selenium", reason="selenium is not installed")
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="no chromium with chromedriver on the PATH")
QUIET = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
QUIET += " disable-component-update disable-sync"
SHOWN = """
return [...document.querySelectorAll(arguments[0] + " tbody tr:not(.cell)")]
  .filter((row) => row.checkVisibility()).map((row) => [...row.cells].map((cell) => cell.textContent.trim()))"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for name in QUIET.split():
        options.add_argument(f"--{name}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("h100")
    fill(folder)
    return report.write(folder)


@pytest.fixture
def page(browser, path):
    """The page, fresh; whatever a test does, the console stays silent."""
    show(browser, path)
    yield browser
    assert browser.get_log("browser") == []


def show(browser, path, fragment="", width=1280):
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get("about:blank")
    browser.get(path.as_uri() + fragment)


def board(page):
    return page.execute_script(SHOWN, "#board")


def choose(page, name, value):
    Select(page.find_element(By.NAME, name)).select_by_visible_text(value)


def press(page, column):
    page.find_element(By.CSS_SELECTOR, f"#board button[data-sort={column}]").send_keys(Keys.ENTER)


def column(rows, index):
    return [row[index] for row in rows if len(row) > 3]


def test_the_script_changes_nothing_at_first(page, path):
    squeezed = [[" ".join(text.split()) for text in row] for row in board(page)]
    assert squeezed == board_in_file(tree(path))


def test_filters_narrow_the_rows_and_their_state_is_in_the_url(page, path):
    assert len(board(page)) == 56
    choose(page, "inner", "mlp")
    choose(page, "case", "lm-125m")
    assert len(board(page)) == 14
    choose(page, "status", "failing")
    assert sorted(row[1] for row in board(page)) == ["mine.large"] * 2 + ["mine.wrong"] * 2
    choose(page, "status", "ok")
    page.find_element(By.NAME, "q").send_keys("TORCH")
    rows = board(page)
    assert [row[1] for row in rows] == ["torch.compile", "torch.eager"] * 2
    assert page.find_element(By.ID, "found").text == "4 of 56 rows, in 2 cells"
    fragment = page.execute_script("return location.hash")
    show(page, path, fragment)
    assert board(page) == rows
    page.find_element(By.CSS_SELECTOR, "#filters button[type=reset]").click()
    page.execute_async_script("setTimeout(arguments[0], 50)")
    assert len(board(page)) == 56
    page.find_element(By.NAME, "q").send_keys("nobody")
    assert page.find_element(By.ID, "found").text == "No row fits these filters."


def test_a_head_sorts_inside_the_cells_by_keyboard_and_what_has_no_time_stays_last(page):
    press(page, "host_ms")
    up = board(page)[:7]
    assert column(up, 7) == ["1.00", "4.00", "20.0", "–"]
    press(page, "host_ms")
    down = board(page)[:7]
    assert column(down, 7) == ["20.0", "4.00", "1.00", "–"]
    assert [row[1] for row in up[4:]] == [row[1] for row in down[4:]] == ["mine.large", "mine.wrong", "cuda.none"]
    head = page.find_element(By.CSS_SELECTOR, "#board th[aria-sort]")
    assert (head.text, head.get_attribute("aria-sort")) == ("host, ms", "descending")
    assert "sort=host_ms&order=descending" in page.execute_script("return location.hash")
    press(page, "implementation")
    assert [row[1] for row in board(page)[:3]] == ["cuda.none", "jax.scan", "mine.large"]


def test_the_baseline_sets_the_ratios(page, path):
    assert column(board(page)[:4], 4) == ["80.0×", "20.0×", "4.00×", "1.00×"]
    choose(page, "base", "jax.scan")
    assert column(board(page)[:4], 4) == ["4.00×", "1.00×", "0.200×", "0.0500×"]
    choose(page, "base", "fastest in the cell")
    assert column(board(page)[:4], 4) == ["1.00×", "0.250×", "0.0500×", "0.0125×"]
    show(page, path, "#base=not.there&sort=nothing")  # from another page: as if it were not there
    assert column(board(page)[:4], 4) == ["80.0×", "20.0×", "4.00×", "1.00×"]


def test_a_matrix_cell_leads_to_the_rows_behind_it(page, path):
    page.find_element(By.CSS_SELECTOR, ".matrix td.wrong a").click()
    rows = page.execute_script(SHOWN, "#parity-rows")
    assert [(row[0], row[4], row[5], row[6]) for row in rows] == [("mine.wrong", "out", "wrong", "2.00")]
    assert page.find_element(By.ID, "parity-found").text == "1 row, the worst first"
    assert page.switch_to.active_element.get_attribute("id") == "rows"
    show(page, path, f"#p.implementation={quote('jax.scan')}&p.status=ok")
    assert [row[4] for row in page.execute_script(SHOWN, "#parity-rows")] == ["d_lr", "d_xq", "out"]
    assert len(board(page)) == 56


@pytest.mark.parametrize("width", [375, 1280])
def test_the_page_never_scrolls_sideways(page, path, width):
    show(page, path, width=width)
    page.execute_script("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    wide = page.execute_script(
        "return [...document.querySelectorAll('main *, header *')].filter((part) => !part.closest('.scroll, pre') && "
        "part.getBoundingClientRect().right > innerWidth).map((part) => part.outerHTML.slice(0, 80))"
    )
    assert wide == []


def test_heads_stay_in_sight(page):
    inside = "#leaderboard .scroll"
    page.execute_script("const box = document.querySelector(arguments[0]); box.scrollTo(300, 400);", inside)
    places = page.execute_script(
        "const at = (name) => document.querySelector(name).getBoundingClientRect();"
        "const box = at(arguments[0]);"
        "const below = at('#board thead th').bottom;"
        "const cells = [...document.querySelectorAll('#board tr.cell th')].map((head) => head.getBoundingClientRect());"
        "return [at('#board thead th').top - box.top, at('#board tbody tr:not(.cell) th').left - box.left,"
        " Math.min(...cells.map((cell) => Math.abs(cell.top - below)))]",
        inside,
    )
    assert max(map(abs, places)) < 3  # of the columns, the implementation, and the cell that is scrolled to

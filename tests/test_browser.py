"""What a user sees and does in a real browser: the report's page, and MLflow's pages of a sweep.

Run by `make browser`, which needs `chromium` and `chromedriver` on the path.
"""

import json
import re
import shutil
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait

from orchestrator.report.writing import write_report
from storage.mlflow_log import Mirror
from storage.query import open_sweep
from tests.mirrored import served
from tests.test_report import GRID, NASTY, PROMPTS, make_sweep, tone_trials

pytestmark = pytest.mark.browser
_QUIET = ("disable-gpu", "disable-quic", "no-first-run", "disable-background-networking", "disable-sync")
Browser = webdriver.Chrome


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.fail("install chromium and chromedriver, such as Debian's chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    # A root user, as in a container, has no sandbox.
    for switch in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1400,1000", *_QUIET):
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options=options, service=Service(driver)) as started:
        yield started


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    trials = tone_trials()
    trials[9] = trials[9]._replace(texts=NASTY)
    place = tmp_path_factory.mktemp("seen") / "sweep"
    make_sweep(place, trials, parameters=GRID, baseline=("Fine.", "A day.", "Water."))
    write_report(place)
    return place


def open_report(browser: Browser, folder: Path) -> WebElement:
    browser.get((folder / "report" / "index.html").as_uri())
    explorer = browser.find_element(By.ID, "explorer")
    browser.execute_script("arguments[0].scrollIntoView()", explorer)  # type: ignore[no-untyped-call]
    return explorer


def complaints(browser: Browser) -> list[str]:
    return [str(entry["message"]) for entry in browser.get_log("browser")]  # type: ignore[no-untyped-call]


def part(explorer: WebElement, name: str) -> WebElement:
    return explorer.find_element(By.CSS_SELECTOR, name)


class TestReport:
    def test_a_point_says_its_configuration_when_hovered_and_its_replies_when_clicked(
        self, browser: Browser, folder: Path
    ) -> None:
        explorer = open_report(browser, folder)
        assert explorer.is_displayed()
        canvas, tip = part(explorer, "canvas"), part(explorer, ".tip")
        canvas.send_keys(Keys.ARROW_UP)
        [trial, *_] = re.findall(r"Trial (\d+), on the front", tip.text)
        left, top = (float(tip.value_of_css_property(side).removesuffix("px")) for side in ("left", "top"))
        canvas.send_keys(Keys.ESCAPE)
        assert not tip.is_displayed()
        assert part(explorer, "output").text == ""
        # The tip stands 14 right and 8 above of its point.
        across = left - 14 - canvas.size["width"] / 2
        down = top + self._height(browser, explorer, canvas) + 8 - canvas.size["height"] / 2
        ActionChains(browser).move_to_element_with_offset(canvas, round(across), round(down)).perform()
        assert tip.text.splitlines()[0] == f"Trial {trial}, on the front"
        [row] = open_sweep(folder).rows(f"SELECT layer, dose FROM trials WHERE trial = {trial}")
        assert tip.text.splitlines()[1] == f"layer {row['layer']}, dose {row['dose']:g}".replace("-", "−")
        ActionChains(browser).click().perform()
        assert part(explorer, "output").text.startswith(f"Trial {trial}, on the front: layer")
        rows = [
            each.text.splitlines()[0] for each in explorer.find_elements(By.CSS_SELECTOR, ".said tbody th")
        ]
        assert rows == [prompt for _, prompt in PROMPTS]
        assert complaints(browser) == []

    @staticmethod
    def _height(browser: Browser, explorer: WebElement, canvas: WebElement) -> float:
        canvas.send_keys(Keys.ARROW_UP)
        height = part(explorer, ".tip").size["height"]
        canvas.send_keys(Keys.ESCAPE)
        return float(height)

    def test_keys_go_through_all_results_and_axes_can_be_any_measure(
        self, browser: Browser, folder: Path
    ) -> None:
        explorer = open_report(browser, folder)
        canvas, seen = part(explorer, "canvas"), []
        results = open_sweep(folder).rows("SELECT trial FROM trials WHERE reused_from IS NULL")
        for _ in range(len(results) + 3):
            canvas.send_keys(Keys.ARROW_RIGHT)
            seen += re.findall(r"^Trial (\d+)", part(explorer, "output").text)
        assert {int(each) for each in seen} == {row["trial"] for row in results}
        Select(explorer.find_elements(By.TAG_NAME, "select")[0]).select_by_visible_text("dose")
        canvas.send_keys(Keys.ESCAPE, Keys.ARROW_RIGHT)
        assert "dose −0.3" in part(explorer, "output").text
        assert complaints(browser) == []

    def test_what_a_model_wrote_is_text_and_runs_nothing(self, browser: Browser, folder: Path) -> None:
        explorer = open_report(browser, folder)
        for _ in range(20):
            part(explorer, "canvas").send_keys(Keys.ARROW_RIGHT)
            if part(explorer, "output").text.startswith("Trial 9"):
                break
        assert NASTY[0] in part(explorer, ".said").text
        assert not explorer.find_elements(By.CSS_SELECTOR, ".said script, .said img, .said a")
        assert complaints(browser) == []

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_it_is_drawn_in_the_colours_that_the_reader_likes(
        self, browser: Browser, folder: Path, scheme: str
    ) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        explorer = open_report(browser, folder)
        find = "const c = arguments[0], p = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; "
        accent = (168, 65, 0) if scheme == "light" else (255, 157, 92)
        count = (
            "let n = 0; for (let i = 0; i < p.length; i += 4) "
            f"n += p[i] === {accent[0]} && p[i + 1] === {accent[1]} && p[i + 2] === {accent[2]}; return n"
        )
        found = browser.execute_script(find + count, part(explorer, "canvas"))  # type: ignore[no-untyped-call]
        assert found > 50, "no point of the front is in the accent's colour"
        ground = browser.find_element(By.TAG_NAME, "body").value_of_css_property("background-color")
        assert ground.startswith("rgba(255, 255, 255" if scheme == "light" else "rgba(21, 24, 28")

    def test_a_column_sorts_and_the_page_has_no_sideways_scroll_on_a_phone(
        self, browser: Browser, folder: Path
    ) -> None:
        open_report(browser, folder)
        table = browser.find_element(By.XPATH, "//caption[@id='trials-caption']/..")
        table.find_element(By.XPATH, ".//button[text()='effect']").click()
        cells = table.find_elements(By.XPATH, ".//tbody/tr/td[4]")
        values = [cell.get_attribute("data-value") for cell in cells]
        numbers = [float(value) for value in values if value]
        assert numbers == sorted(numbers)
        phone = {"width": 390, "height": 800, "deviceScaleFactor": 2, "mobile": True}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
        try:
            wider = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
            assert browser.execute_script(wider) <= 1  # type: ignore[no-untyped-call]
        finally:
            browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


class TestMlflow:
    @pytest.fixture(scope="class")
    def address(self, folder: Path) -> Iterator[str]:
        mirror = Mirror(folder)
        mirror.sync()
        mirror.finish([folder / "report" / "index.html"])
        with served(folder) as (_, address):
            yield address

    @staticmethod
    def ask(address: str, path: str, question: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"{address}/api/2.0/mlflow/{path}",
            data=json.dumps(question).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def runs(self, address: str, condition: str = "") -> tuple[str, list[dict[str, Any]]]:
        """The experiment that is not MLflow's own, and its runs that are trials."""
        found = self.ask(address, "experiments/search", {"max_results": 10})["experiments"]
        [experiment] = [each["experiment_id"] for each in found if each["name"] != "Default"]
        question = {"experiment_ids": [experiment], "max_results": 100, "filter": condition}
        runs = self.ask(address, "runs/search", question)["runs"]
        return experiment, [
            run for run in runs if any(tag["key"] == "mlflow.parentRunId" for tag in run["data"]["tags"])
        ]

    def test_trials_are_filtered_by_metrics_and_parameters(
        self, browser: Browser, folder: Path, address: str
    ) -> None:
        experiment, every = self.runs(address)
        condition = 'metrics.effect > 0.1 and params.layer = "14"'
        expected = open_sweep(folder).rows(
            "SELECT trial FROM trials JOIN metrics USING (trial) "
            "WHERE name = 'effect' AND split = 'select' AND value > 0.1 AND layer = 14"
        )
        _, found = self.runs(address, condition)
        assert 0 < len(found) == len(expected) < len(every)
        browser.get(f"{address}/#/experiments/{experiment}/runs?workflowType=machine_learning")
        box = wait(browser, lambda: browser.find_element(By.CSS_SELECTOR, "[data-testid=search-box]"))
        box.send_keys(condition, Keys.ENTER)
        # Their common parent is listed with them.
        wait(browser, lambda: f"{len(expected) + 1} matching runs" in text_of(browser))

    def test_trials_are_compared_in_parallel_coordinates(self, browser: Browser, address: str) -> None:
        experiment, every = self.runs(address)
        chosen = json.dumps([run["info"]["run_id"] for run in every])
        browser.get(f'{address}/#/compare-runs?runs={chosen}&experiments=["{experiment}"]')
        wait(browser, lambda: f"Comparing {len(every)} Runs from 1 Experiment" in text_of(browser))
        wait(browser, lambda: browser.find_elements(By.CSS_SELECTOR, ".parcoords .y-axis"))
        names = {each.text for each in browser.find_elements(By.CSS_SELECTOR, ".parcoords .axis-title")}
        assert {"layer", "dose"} <= names

    def test_the_report_is_there_as_an_artifact(self, browser: Browser, address: str) -> None:
        experiment, every = self.runs(address)
        [parent] = {
            tag["value"] for run in every for tag in run["data"]["tags"] if tag["key"] == "mlflow.parentRunId"
        }
        browser.get(f"{address}/#/experiments/{experiment}/runs/{parent}/artifacts")
        wait(browser, lambda: "index.html" in text_of(browser))


def text_of(browser: Browser) -> str:
    return browser.find_element(By.TAG_NAME, "body").text


def wait(browser: Browser, look: Callable[[], Any]) -> Any:
    """What is there after a while; MLflow's pages draw themselves over and over."""
    return WebDriverWait(browser, 30, ignored_exceptions=(Exception,)).until(lambda _: look())

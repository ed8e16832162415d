"""A real headless Chromium, and a page of made-up runs in it. Without the browser its tests are skipped."""

import shutil

import pytest

from eval.page.build import write_page
from eval.page.loose import find_runs, table_of_runs
from tests.support.page_world import classified_run, code_run, judged_run, toy_world

HOW = "sh scripts/browser.sh installs it"


@pytest.fixture(scope="session")
def browser():
    """Playwright's handle of a Chromium, or a skip with the reason."""
    playwright = pytest.importorskip("playwright.sync_api", reason=f"no playwright: {HOW}")
    found = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )
    with playwright.sync_playwright() as started:
        try:
            opened = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium starts ({str(error).splitlines()[0]}): {HOW}")
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The folder of the runs."""
    folder = tmp_path_factory.mktemp("runs")
    toy_world(folder)
    code_run(folder / "toy-pissa-code")
    judged_run(folder / "toy-full_ft-judged")
    classified_run(folder / "minilm-sst2")
    return folder


@pytest.fixture(scope="session")
def page_folder(world, tmp_path_factory):
    """The page of these runs; nothing is missing in it."""
    folder = tmp_path_factory.mktemp("made") / "page"
    made = table_of_runs(find_runs([world]))
    assert write_page(folder, made.table, made.sources, made.shown, changed=made.changed, missing=made.missing) == []
    return folder


class Opened:
    """A page in the browser: `go("#/table")`, and what it complained of."""

    def __init__(self, browser, folder, **options) -> None:
        self.folder = folder
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(120_000)
        self.tab = self.context.new_page()
        self.faults: list[str] = []
        self.requests: list[str] = []
        self.tab.on("pageerror", lambda error: self.faults.append(str(error)))
        self.tab.on("console", lambda told: self.faults.append(told.text) if told.type == "error" else None)
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.on("dialog", lambda dialog: self.faults.append(f"dialog {dialog.message}"))

    def go(self, link: str = "") -> "Opened":
        self.tab.goto("about:blank")  # so that the page is loaded again, not only its link changed
        self.tab.goto(f"file://{self.folder}/index.html{link}")
        return self.ready()

    def ready(self) -> "Opened":
        return self.see("body[aria-busy='false']")

    def see(self, selector: str, text: str | None = None) -> "Opened":
        """Wait for an element, that has the text. (Not wait_for_function, whose eval the page's policy forbids.)"""
        self.tab.locator(selector, has_text=text).first.wait_for(state="attached", timeout=120_000)
        return self

    def press(self, key: str) -> "Opened":
        self.tab.keyboard.press(key)
        self.tab.wait_for_timeout(50)
        return self.ready()

    def text(self, selector: str) -> str:
        return self.tab.inner_text(selector)


@pytest.fixture
def open_page(browser, page_folder):
    """`open_page("#/table", viewport=…)` → the page, opened by file://; it complained of nothing in the end."""
    opened = []

    def start(link="", *, folder=None, **options) -> Opened:
        opened.append(Opened(browser, folder or page_folder, **options))
        return opened[-1].go(link)

    yield start
    for one in opened:
        one.context.close()
        assert one.faults == []
        assert all(url.startswith(("file:", "data:", "blob:")) for url in one.requests)

"""The page in a real headless Chromium: what a reader does with it, by mouse and by keyboard."""

import json
import zipfile

import pytest

from ba_lora.io import read_json, read_jsonl, write_json_atomic, write_jsonl_atomic
from eval.page.build import write_page
from eval.page.loose import find_runs, table_of_runs
from tests.support.page_world import HOSTILE, ITEMS, solved, toy_run

pytestmark = pytest.mark.slow
ROWS = "#table tbody tr"


def items(opened) -> list[str]:
    return opened.tab.locator("section:not([hidden]) .items tbody tr td:first-child").all_inner_texts()


def current(opened) -> str:
    return opened.text("#answers-item h3")


def test_the_table_sorts_filters_hides_and_shows_other_numbers(open_page):
    opened = open_page()
    methods = [row.split("\t")[1] for row in opened.tab.locator(ROWS).all_inner_texts()]
    assert sorted(methods) == ["ba_lora", "full_ft", "lora", "lora", "pissa"]
    place = opened.tab.locator("#table a[data-cell]", has_text="±").first.get_attribute("data-cell")
    cell = opened.tab.locator(f"#table a[data-cell='{place}']")
    assert "53.75" in opened.text("#table") and "32.50" in opened.text("#table")
    opened.tab.select_option(".row-filter[data-column='1']", "lora")
    assert opened.tab.locator(ROWS).count() == 2 and "2 of 5 rows" in opened.text("#told")
    opened.tab.select_option(".row-filter[data-column='1']", "")
    heading = opened.tab.locator("#table thead th", has_text="toy: strict")
    heading.click()
    assert heading.get_attribute("aria-sort") == "ascending"
    filled = [row for row in opened.tab.locator(ROWS).all_inner_texts() if "±" in row]
    assert ["lora" in filled[0], "ba_lora" in filled[1]] == [True, True]
    opened.tab.select_option("#shown", "seeds")
    assert "1: " in cell.inner_text() and "2: " in cell.inner_text()
    opened.tab.select_option("#shown", "difference")
    chosen = opened.tab.locator("#against option", has_text="toy, lora").first.get_attribute("value")
    opened.tab.select_option("#against", chosen)
    assert "+21.25" in opened.text("#table")
    of_the_mean = "#table .count:visible, #table .sign:visible, #table .best"
    assert opened.tab.locator(of_the_mean).count() > 2
    opened.tab.select_option("#shown", "seed 2")
    assert opened.tab.locator(of_the_mean).count() == 0
    opened.tab.select_option("#shown", "interval")
    assert "[" in opened.text("#table")
    opened.tab.click("#table-tools summary")
    opened.tab.locator("#column-choice label", has_text="toy: strict").locator("input").uncheck()
    assert "toy: strict" not in opened.text("#table thead")


def test_a_number_leads_to_its_runs_their_curves_and_commands(open_page):
    opened = open_page()
    opened.tab.locator("#table a[data-cell]", has_text="32.50").first.click()
    opened.ready()
    assert "lora" in opened.text("#cell-heading") and "32.50" in opened.text("#cell-value")
    runs = opened.text("#cell-runs")
    for shown in (
        "toy-lora-s1",
        "toy-lora-s2",
        "5000",
        "c0ffee with uncommitted changes",
        "torch 2.13.0",
        "40 answers",
    ):
        assert shown in runs
    assert "regularizers.lambda_svd" in opened.text("#cell-settings") or "adapter" in opened.text("#cell-settings")
    assert "0.325" in opened.text("#cell-scores")
    assert opened.tab.locator("#curves .plot canvas").count() > 0
    opened.tab.select_option("#curve", "share of each term")
    opened.tab.check("#curve-beside")
    opened.see("#curves details", "toy, lora, seed 2 svd")
    opened.tab.locator("#cell-commands button").first.click()
    opened.see("#told", "copied")
    assert "train_nlg.py --config configs/nlg/toy.yaml" in opened.text("#cell-commands")
    assert "log.jsonl" in opened.tab.text_content("#cell-files")


def test_answers_by_keyboard_search_and_filters(open_page):
    opened = open_page("#/answers/toy-lora-s1/toy")
    assert current(opened) == "toy/0" and f"{ITEMS} of {ITEMS}" in opened.text("#answers-count")
    opened.press("ArrowRight").press("j").press("ArrowLeft")
    assert current(opened) == "toy/1" and opened.tab.url.endswith("#toy-lora-s1/toy/1")
    assert "The answer is: " in opened.text("#answers-item") and "$\\frac{1}{2}$ <b>bold</b>" in opened.text(
        "#answers-item"
    )
    assert opened.tab.locator("#answers-item b").count() == 0
    opened.press("/")
    assert opened.tab.evaluate("document.activeElement.id") == "answers-search"
    opened.tab.keyboard.type("step 17:")
    opened.see("#answers-count", "1 of")
    opened.press("Escape").press("ArrowRight")
    assert current(opened) == "toy/17" and opened.tab.locator("#answers-item mark").first.inner_text() == "Step 17:"
    opened.tab.fill("#answers-search", "")
    opened.tab.select_option("#answers-verdict", "right")
    right = sum(solved("lora", 1, place) for place in range(ITEMS))
    assert f"{right} of {ITEMS}" in opened.text("#answers-count")
    opened.tab.select_option("#answers-verdict", "cut")
    assert items(opened) == ["toy/9", "toy/19", "toy/29", "toy/39"]
    opened.tab.select_option("#answers-verdict", "")
    groups = opened.tab.locator("#answers-group option").all_inner_texts()
    opened.tab.select_option("#answers-group", groups[1])
    assert "family: " in groups[1] and 0 < len(items(opened)) < 25
    opened.press("Escape").press("?")
    assert opened.tab.locator("#help").is_visible() and "next item" in opened.text("#help")
    opened.tab.keyboard.press("Escape")
    opened.press("t")
    assert opened.tab.locator("#table").is_visible()


def test_the_search_key_reaches_the_search_from_the_table(open_page):
    """And the letters behind it are no shortcuts."""
    opened = open_page()
    opened.tab.keyboard.press("/")
    opened.tab.keyboard.type("t")
    opened.see("#answers-item h3").ready()
    assert opened.tab.input_value("#answers-search") == "t" and opened.tab.locator("#view-answers").is_visible()


def test_the_prompt_of_a_chat_is_shown_whole(open_page, tmp_path):
    """It has no frame of ours, so that it is its question."""
    run = toy_run(tmp_path / "run", "lora", 1, completion=lambda place, gold: gold, items=2)
    path = run / "completions" / "toy.jsonl"
    write_jsonl_atomic(path, [line | {"prompt": f"Asked {line['task_id']}"} for line in read_jsonl(path)])
    made = table_of_runs([run])
    write_page(tmp_path / "page", made.table, made.sources, made.shown)
    opened = open_page("#run/toy/1", folder=tmp_path / "page")
    assert opened.tab.text_content("#answers-item details pre") == "Asked toy/1"


def test_a_run_without_answers_shows_none_of_the_run_before(open_page, tmp_path):
    for seed, name in enumerate("ab"):
        run = toy_run(tmp_path / name, "lora", seed, completion=lambda place, gold: gold, items=2)
    for folder in ("completions", "grades"):
        (run / folder / "toy.jsonl").unlink()
    made = table_of_runs(find_runs([tmp_path]))
    write_page(tmp_path / "page", made.table, made.sources, made.shown)
    opened = open_page("#/answers/a/toy", folder=tmp_path / "page")
    assert items(opened) == ["toy/0", "toy/1"]
    opened.tab.select_option("#answers-run", "b")
    opened.see("#answers-count", "b has no answers to toy").ready()
    assert items(opened) == ["no item"]
    opened.tab.fill("#answers-search", "x")
    opened.tab.select_option("#answers-verdict", "wrong")
    assert "b has no answers to toy" in opened.text("#answers-count") and items(opened) == ["no item"]


def test_a_runs_value_beside_a_mean_is_its_own(open_page):
    """Of each column that the mean is of; the world has no such mean, so a column is made one."""
    opened = open_page()
    data = json.loads(_value(opened, "page"))
    strict, seconds = (next(c for c in data["columns"] if c["name"] == n) for n in ("toy.strict", "training.seconds"))
    row = next(place for place, one in enumerate(data["rows"]) if (one["base"], one["method"]) == ("toy", "ba_lora"))
    opened.tab.evaluate(f"taken.get('page').columns[{seconds['place']}].mean_of = [{json.dumps(strict['label'])}]")
    opened.tab.evaluate(f"location.hash = '/cell/{row}/{seconds['place']}'")
    opened.see("#cell-runs tbody tr:first-child th", strict["label"]).ready()
    values = data["rows"][row]["cells"][strict["place"]]["values"]
    shown = opened.tab.locator("#cell-runs tbody tr:first-child td").all_inner_texts()
    assert shown == [f"{value:.2f}" for value in values.values()]


def test_the_next_page_of_the_list_follows_the_keys_and_items_sort(open_page):
    opened = open_page("#toy-lora-s1/toy/24")
    assert current(opened) == "toy/24"
    opened.press("ArrowRight")
    assert current(opened) == "toy/25" and "toy/25" in items(opened) and "toy/24" not in items(opened)
    opened.tab.locator("#answers-list th", has_text="item").click()
    opened.tab.locator("#answers-list th", has_text="item").click()
    opened.see("#answers-list tbody tr:first-child td", "toy/39")


def test_an_item_of_a_lower_rank_has_a_link_of_its_own(open_page, tmp_path):
    """Its ids are those of the whole rank's answers."""
    run = toy_run(tmp_path / "run", "lora", 1, completion=lambda place, gold: f"whole {place}", items=5)
    at_rank = toy_run(run / "ranks" / "1", "lora", 1, completion=lambda place, gold: f"of rank 1, {place}", items=5)
    write_json_atomic(run / "scores" / "ranks" / "1" / "toy.json", read_json(at_rank / "scores" / "toy.json"))
    made = table_of_runs([run])
    assert write_page(tmp_path / "page", made.table, made.sources, made.shown) == []
    opened = open_page("#/answers/run/ranks%2F1%2Ftoy", folder=tmp_path / "page")
    opened.press("ArrowRight").press("ArrowRight")
    assert current(opened) == "toy/2" and "of rank 1, 2" in opened.text("#answers-item")
    opened.go(opened.tab.url.partition("index.html")[2])
    assert current(opened) == "toy/2" and "of rank 1, 2" in opened.text("#answers-item")
    opened.go("#run/toy/2")
    assert "whole 2" in opened.text("#answers-item")


def test_the_wrong_rule_is_not_right(open_page, tmp_path):
    run = toy_run(tmp_path / "run", "lora", 1, completion=lambda place, gold: gold, items=2)
    path = run / "grades" / "toy.jsonl"
    lines = [line | {"metrics": {"wrong_rule": float(place)}} for place, line in enumerate(read_jsonl(path))]
    write_jsonl_atomic(path, lines)
    made = table_of_runs([run])
    write_page(tmp_path / "page", made.table, made.sources, made.shown)
    opened = open_page("#/answers/run/toy", folder=tmp_path / "page")
    opened.tab.select_option("#answers-verdict", "wrong")
    assert items(opened) == ["toy/1"]


def test_two_runs_side_by_side_on_one_item(open_page):
    opened = open_page("#toy-lora-s1/toy/0")
    opened.tab.select_option("#answers-other", "toy-ba_lora-s2")
    opened.see("#answers-item .side:nth-child(2)")
    both = opened.text("#answers-item")
    assert "toy-lora-s1" in both and "toy-ba_lora-s2" in both


def test_two_methods_with_the_numbers_of_the_paired_test(open_page, world):
    opened = open_page("#/compare")
    data = json.loads(_value(opened, "page"))
    column = next(c["place"] for c in data["columns"] if c["name"] == "toy.strict")
    rows = {row["method"]: place for place, row in enumerate(data["rows"]) if row["base"] == "toy"}
    opened.go(f"#/compare/{column}/{rows['ba_lora']}/{rows['lora']}")
    grades = {
        run: [
            json.loads(line)["metrics"]["strict"]
            for line in (world / run / "grades/toy.jsonl").read_text().splitlines()
        ]
        for run in ("toy-ba_lora-s1", "toy-ba_lora-s2", "toy-lora-s1", "toy-lora-s2")
    }
    a, b = (
        [sum(of) / 2 for of in zip(*(grades[f"toy-{m}-s{s}"] for s in (1, 2)), strict=True)]
        for m in ("ba_lora", "lora")
    )
    won, lost = sum(x > y for x, y in zip(a, b, strict=True)), sum(x < y for x, y in zip(a, b, strict=True))
    told = opened.text("#compare-test")
    assert f"A is better on {won} items, B on {lost}" in told and "+21.25" in told
    assert f"{won + lost} of {ITEMS} items" in opened.text("#compare-count")
    opened.tab.select_option("#compare-kind", "lost")
    assert f"{lost} of {ITEMS} items" in opened.text("#compare-count")
    opened.press("ArrowRight")
    assert opened.tab.locator("#compare-item .side").count() == 4
    opened.tab.fill("#compare-search", "no such words anywhere")
    assert f"0 of {ITEMS} items" in opened.text("#compare-count")


def test_the_search_of_a_comparison_is_through_its_own_columns_answers(open_page):
    """Of MT-Bench through both turns of a question."""
    opened = open_page("#/compare")
    data = json.loads(_value(opened, "page"))
    columns = {column["name"]: str(column["place"]) for column in data["columns"]}
    rows = {(row["base"], row["method"]): place for place, row in enumerate(data["rows"])}
    judged = rows["toy", "full_ft"]
    opened.go(f"#/compare/{columns['mt_bench.rating']}/{judged}/{judged}")
    opened.tab.select_option("#compare-kind", "")
    opened.press("ArrowRight").see("#compare-item h3", "mt_bench/81")
    for words in ("old pond", "a young lady"):
        opened.tab.fill("#compare-search", words)
        assert "1 of 1 items" in opened.text("#compare-count")
    opened.tab.fill("#compare-search", "")
    link = f"/compare/{columns['toy.strict']}/{rows['toy', 'ba_lora']}/{rows['toy', 'lora']}"
    opened.tab.evaluate(f"location.hash = '{link}'")
    opened.see("#compare-item h3", "toy/0").ready()
    opened.tab.fill("#compare-search", "step 17:")
    assert f"1 of {ITEMS} items" in opened.text("#compare-count")
    opened.tab.select_option("#compare-kind", "")
    opened.tab.fill("#compare-search", "step 0:")  # in no answer of A's first seed
    assert f"1 of {ITEMS} items" in opened.text("#compare-count")


def _value(opened, name):
    return opened.tab.evaluate(f"JSON.stringify(taken.get('{name}'))")


def test_code_shows_the_program_and_the_sandboxs_verdict(open_page):
    opened = open_page("#toy-pissa-code/HumanEval/1")
    shown = opened.text("#answers-item")
    assert "def f1():" in shown and "failed: AssertionError: 1 != 2" in shown and "Program that was run" in shown
    opened.press("ArrowRight")
    assert "no program found in it" in opened.text("#answers-item")


def test_mt_bench_shows_both_turns_and_every_judgement(open_page):
    opened = open_page("#toy-full_ft-judged/mt_bench/81/turn2")
    shown = opened.text("#answers-item")
    for text in ("Write a haiku.", "Old pond", "Now a limerick.", "There was a young lady"):
        assert text in shown
    assert shown.count("was judged.") == 4 and "Turn 2 was judged. [[9]]" in shown and "judge-1" in shown


def test_a_classifiers_text_label_and_probability(open_page):
    opened = open_page("#minilm-sst2/sst2/2")
    shown = opened.text("#answers-item")
    assert "film 2 is bad" in shown and "negative" in shown and "positive" in shown and "0.8808" in shown
    opened.tab.select_option("#answers-verdict", "wrong")
    assert items(opened) == ["sst2/0", "sst2/2"]


@pytest.mark.parametrize("place", range(len(HOSTILE)))
def test_hostile_answers_are_text(open_page, place):
    opened = open_page(f"#toy-ba_lora-s1/toy/{place}")
    assert opened.tab.evaluate("document.documentElement.dataset.stolen") is None
    assert opened.tab.evaluate("({}).stolen") is None
    assert (
        opened.tab.locator("#answers-item script, #answers-item img, #answers-item iframe, #answers-item svg").count()
        == 0
    )
    assert opened.tab.locator("#answers-list script, #answers-list img, #answers-list iframe").count() == 0
    answer, shown = HOSTILE[place], opened.tab.locator("#answers-item .side .text").first
    if not answer:
        assert "empty" in opened.text("#answers-item .side")
        return
    text = shown.text_content()
    if len(answer) > 10_000:
        assert len(text) < 10_000 and "1,000,000 characters" in opened.text("#answers-item .side")
        opened.tab.locator("#answers-item .side button").first.click()
        assert len(shown.text_content()) > 100_000
    elif answer.isprintable():
        assert text == answer
    else:  # what hides or turns other characters stands there by its number
        assert not any(mark in text for mark in "\u202e\u2066\u200b\x00\x1b\x7f\u2028\ud800")
        assert "⟨U+" in text


def test_the_policy_forbids_what_a_page_does_not_need(open_page):
    """Beside texts set as text: even markup that got in could not run, nor anything be fetched."""
    opened = open_page()
    stolen = "document.documentElement.dataset.stolen = 1"
    opened.tab.evaluate(f"document.body.insertAdjacentHTML('beforeend', `<img src=x onerror=\"{stolen}\">`)")
    opened.tab.evaluate(
        "(() => { const s = document.createElement('script'); s.textContent = 'ran = 1'; document.body.append(s); })()"
    )
    fetched = opened.tab.evaluate("fetch('data/page.js').then(() => 'yes', () => 'no')")
    opened.tab.wait_for_timeout(300)
    assert (
        opened.tab.evaluate("[document.documentElement.dataset.stolen, globalThis.ran]") == [None, None]
        and fetched == "no"
    )
    assert any("Content Security Policy" in fault for fault in opened.faults)
    opened.faults.clear()


VIEWS = (
    "#/table",
    "#/cell/1/1",
    "#toy-lora-s1/toy/3",
    "#/compare",
    "#/training",
    "#toy-full_ft-judged/mt_bench/81/turn2",
)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("link", VIEWS)
def test_accessibility_rules_find_nothing(open_page, link, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="sh scripts/browser.sh installs axe-core")
    opened = open_page(link, color_scheme=scheme)
    found = axe.Axe().run(opened.tab, options={"preload": False}).response["violations"]
    assert [(one["id"], [node["html"][:160] for node in one["nodes"][:3]]) for one in found] == []


@pytest.mark.parametrize("link", VIEWS)
def test_nothing_is_wider_than_a_phone(open_page, link):
    opened = open_page(link, viewport={"width": 400, "height": 800})
    assert opened.tab.evaluate("document.documentElement.scrollWidth") <= 400


def test_dark_follows_the_system_and_print_shows_the_item_only(open_page):
    dark = open_page("#toy-lora-s1/toy/3", color_scheme="dark")
    light = open_page("#toy-lora-s1/toy/3", color_scheme="light")
    paper = [one.tab.evaluate("getComputedStyle(document.body).backgroundColor") for one in (dark, light)]
    assert paper == ["rgb(13, 17, 23)", "rgb(255, 255, 255)"]
    light.tab.emulate_media(media="print")
    assert not light.tab.locator("header nav").is_visible() and not light.tab.locator("#answers-list").is_visible()
    assert light.tab.locator("#answers-item").is_visible()


def test_a_zipped_page_opens_elsewhere(open_page, page_folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "page.zip", "w") as packed:
        for file in page_folder.rglob("*"):
            packed.write(file, file.relative_to(page_folder.parent))
    zipfile.ZipFile(tmp_path / "page.zip").extractall(tmp_path / "a folder with # and %20")
    folder = str(tmp_path / "a folder with # and %20" / "page").replace("%", "%25").replace("#", "%23")
    opened = open_page("", folder=folder)
    opened.tab.locator("#table a[data-cell]", has_text="32.50").first.click()
    opened.ready()
    assert "toy-lora-s1" in opened.text("#cell-runs")


def test_what_is_gone_is_told_and_the_rest_is_shown(open_page, page_folder, world, tmp_path):
    """Files of a page removed meanwhile, and unknown links."""
    import shutil

    shutil.copytree(page_folder, tmp_path / "page")
    for file in (tmp_path / "page" / "data").glob("answers-*.js"):
        file.unlink()
    opened = open_page("#toy-lora-s1/toy/3", folder=tmp_path / "page")
    assert "missing in this page's folder" in opened.text("#answers-count")
    opened.faults.clear()  # the browser's word on the missing file
    opened = open_page("#no-such-run/toy/3")
    assert "No run no-such-run" in opened.text("#told")
    opened.go("#toy-lora-s1/toy/4711")
    assert "no answer to toy/4711" in opened.text("#told")


def test_a_page_says_what_it_lacks(open_page, world, tmp_path):
    import shutil

    shutil.copytree(world, tmp_path / "runs")
    (tmp_path / "runs/toy-lora-s1/grades/toy.jsonl").unlink()
    (tmp_path / "runs/toy-lora-s2/completions/toy.jsonl").write_text("{broken\n")
    (tmp_path / "runs/toy-ba_lora-s1/log.jsonl").unlink()
    made = table_of_runs(find_runs([tmp_path / "runs"]))
    missing = write_page(tmp_path / "page", made.table, made.sources, made.shown, missing=made.missing)
    assert len(missing) == 3
    opened = open_page("#toy-lora-s1/toy/3", folder=tmp_path / "page")
    assert "3 things" in opened.text("#missing summary")
    assert "– not graded" in opened.text("#answers-list")

"""The page of a report: what it says, and what a person and a stranger can do with it in a real browser."""

import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import made
import pytest

import hpc_compress
from hpc_compress import analysis
from hpc_compress.analysis import found, markup, structures
from hpc_compress.summary import with_error
from hpc_compress.types import Step

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ALONE = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update")
ATTACK = "</script><img src=x onerror=\"document.title='ran'\"><a href=\"javascript:document.title='ran'\">x</a>&lt;b&gt;${1}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    made.run(folder / "made-0", target={"quality": 0.9, "speed_up": 2, "megabytes": 40})
    made.run(folder / "made-1", seed=1)
    made.run(folder / "made-2", seed=2)
    return folder


def written(roots: list[Path], out: Path) -> Path:
    analysis.write_report(analysis.open_runs(roots), out)
    return out / "report.html"


@pytest.fixture(scope="module")
def page(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written([folders / "made-0"], tmp_path_factory.mktemp("page"))


class Texts(HTMLParser):
    """The texts and elements of a page, without those of scripts and styles."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.text, self.elements, self._within = "", [], ""
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._within = tag

    def handle_endtag(self, tag: str) -> None:
        self._within = ""

    def handle_data(self, data: str) -> None:
        self.text += "" if self._within in ("script", "style") else data + " "


# --- what stands on it ---


def test_the_first_screen_says_what_to_deploy_and_what_is_lost(folders: Path, page: Path):
    table, choice = hpc_compress.load_runs(folders / "made-0"), found.chosen(analysis.open_run(folders / "made-0"))
    row = table.set_index("candidate").loc[choice.candidate]
    base = table.iloc[0]
    [first] = re.findall(r"<section class=\"answer\">(.*?)</section>", page.read_text(encoding="utf-8"), re.DOTALL)
    for said in (
        choice.candidate,
        with_error(row["report_quality"], row["report_quality_error"]),
        with_error(base["report_quality"], base["report_quality_error"]),
        f"{row['speed_up']:.2f}x",
        f"{row['model_bytes'] / 1e6:.1f} MB",
        "paired, 200 report rows",
        choice.next,
        "within the targets",
        "hpc-compress export",
        "from_pretrained(",
    ):
        assert said in first.replace("&#x27;", "'"), said


def test_all_that_is_needed_to_repeat_it_stands_there(folders: Path, page: Path):
    text, plan = Texts(page).text, analysis.open_run(folders / "made-0").plan
    for said in (
        plan.base.fingerprint,
        plan.dataset.fingerprint,
        "3 are equal to a train row",
        "hpc-compress search model.path=plain",
        "energy of the GPUs: 0.006 kWh, told for 24 of 27 tasks",
    ):
        assert said in text
    for heading in (
        "Progress",
        "layer by layer",
        "How it came about",
        "Which operators paid",
        "Failures",
        "What it cost",
        "Repeat",
    ):
        assert re.search(f"<h2>[^<]*{heading}", page.read_text(encoding="utf-8")), heading


def test_a_page_needs_nothing_from_elsewhere_and_runs_two_scripts(page: Path):
    found_page = Texts(page)
    text = page.read_text(encoding="utf-8")
    assert not [attrs for _, attrs in found_page.elements if attrs.keys() & {"src", "href", "onclick", "onload", "onerror"}]
    [policy] = re.findall(r'Content-Security-Policy" content="([^"]+)"', text)
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(scripts) == 2
    assert f"script-src {markup.hash_of(scripts[0])} {markup.hash_of(scripts[1])};" in policy
    assert policy.startswith("default-src 'none'")


def test_no_text_ends_a_script_or_becomes_markup():
    assert "<" not in markup.data([ATTACK, "\u2028"])
    assert json.loads(markup.data([ATTACK, "\u2028", 1.5])) == [ATTACK, "\u2028", 1.5]
    element = markup.tag("p", ATTACK, title=ATTACK)
    assert element.count("<") == 2
    assert "\x1b" not in markup.tag("p", "\x1b[2J")
    assert markup.tag("p", markup.tag("b", "x"), None) == "<p><b>x</b></p>"


def test_a_model_is_drawn_layer_by_layer(folders: Path, page: Path):
    run = analysis.open_run(folders / "made-0")
    drawn = structures.drawing(run, found.chosen(run).candidate)
    assert [(layer.number, layer.heads, layer.ffn) for layer in drawn.layers] == [(1, 4, 64), (2, None, None), (3, 2, 32)]
    assert (drawn.most_heads, drawn.most_ffn) == (4, 64)
    assert [layer.precision for layer in drawn.layers] == ["plain", "", "plain"]
    assert "dropped" in Texts(page).text
    mixed = (Step(operator="quantize", params={"scheme": "int8", "rest": "bf16", "layers": {"nf4": [0], "rest": [2]}}),)
    assert structures._precisions(mixed, 3) == ["nf4", "int8", "bf16"]


@pytest.mark.slow
def test_runs_that_differ_by_seed_have_means_with_standard_errors(folders: Path, tmp_path: Path):
    text = Texts(written([folders / f"made-{seed}" for seed in range(3)], tmp_path)).text
    assert "3 runs" in text
    assert "runs that differ by seed" in text  # 1 and 2; 0 has targets
    assert re.search(r"made on plain, target\.\S+=None.*? 2 0\.\d{3} ± 0\.\d{3}", re.sub(r"\s+", " ", text))


@pytest.mark.slow
def test_a_run_of_an_earlier_version_has_a_page_too(folders: Path, tmp_path: Path):
    root = Path(shutil.copytree(folders / "made-0", tmp_path / "run"))
    plan = json.loads((root / "run.json").read_text())
    del plan["environment"]
    (root / "run.json").write_text(json.dumps(plan))
    for path in root.glob("tasks/*/outcome.json"):
        outcome = json.loads(path.read_text())
        for name in ("standard_errors", "structure"):
            (outcome["measurement"] or {}).pop(name, None)
        path.write_text(json.dumps(outcome))
        (path.parent / "answers.npy").unlink(missing_ok=True)
    text = Texts(written([root], tmp_path / "out")).text
    assert "±" not in text.partition("Choose by your own limits")[0]
    assert "did not record versions and commit" in text
    assert "were measured by an earlier version" in text


# --- in a browser ---


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    programs = [path for name in BROWSERS if (path := shutil.which(name))]
    if not programs:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed; apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=programs[0], args=[*ALONE])
        yield opened
        opened.close()


class Opened:
    """A page in a browser, and all that went wrong on it."""

    def __init__(self, browser: Any, path: Path, width: int = 1280) -> None:
        self.tab = browser.new_page(viewport={"width": width, "height": 800})
        self.wrong: list[str] = []
        self.tab.on("console", lambda message: self.wrong.append(message.text))
        self.tab.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.tab.on("dialog", lambda dialog: self.wrong.append(dialog.message))
        self.tab.on("request", lambda request: None if request.url == path.as_uri() else self.wrong.append(request.url[:200]))
        self.tab.goto(path.as_uri())
        self.tab.wait_for_selector("article:not([hidden]) .view2 .xtitle")

    @property
    def taken(self) -> str:
        return self.tab.locator("article:not([hidden]) .taken").get_attribute("data-candidate")

    def point_at(self, place: int) -> None:
        """Move the mouse to a candidate in the first view, by its place in the table."""
        self.tab.locator(".view0").scroll_into_view_if_needed()
        where = """(wanted) => {
            const plot = document.querySelector('.view0'), box = plot.getBoundingClientRect();
            const {xaxis, yaxis} = plot._fullLayout;
            const all = plot.data.flatMap((trace) =>
                (trace.customdata || []).map((place, at) => [place, trace.x[at], trace.y[at]]));
            const [, x, y] = all.find(([place]) => place === wanted);
            return [box.left + xaxis._offset + xaxis.d2p(x), box.top + yaxis._offset + yaxis.d2p(y)];
        }"""
        self.tab.mouse.move(*self.tab.evaluate(where, place))
        self.tab.wait_for_selector(".tip:not([hidden])")

    def move(self, name: str, value: float) -> None:
        self.tab.locator(f"article:not([hidden]) .limit.{name}").fill(str(value))


@pytest.mark.slow
def test_sliders_name_the_model_within_the_limits(browser: Any, folders: Path, page: Path):
    opened, table = Opened(browser, page), hpc_compress.load_runs(folders / "made-0")
    assert opened.taken == found.chosen(analysis.open_run(folders / "made-0")).candidate  # the sliders stand at the targets
    for megabytes, speed, quality, by in (
        (30, 2, 90, "compromise"),
        (20, 2, 80, "compromise"),
        (30, 2, 90, "quality"),
        (60, 1, 95, "speed_up"),
        (91, 1, 60, "megabytes"),
    ):
        opened.move("mb", megabytes)
        opened.move("speed", speed)
        opened.move("quality", quality)
        opened.tab.locator(".by").select_option({"speed_up": "speed", "megabytes": "mb"}.get(by, by))
        expected = hpc_compress.best(table, megabytes=megabytes, speed_up=speed, quality=quality / 100, by=by)
        assert opened.taken == expected["candidate"], (megabytes, speed, quality, by)
        said = opened.tab.locator(".taken").text_content()
        assert f"--candidate {expected['candidate']}" in said
        assert f"{expected['model_bytes'] / 1e6:.1f} MB" in said
    opened.move("mb", opened.tab.locator(".limit.mb").get_attribute("min"))
    opened.move("quality", opened.tab.locator(".limit.quality").get_attribute("max"))
    assert opened.taken == ""
    assert "No measured model" in opened.tab.locator(".taken").text_content()
    assert not opened.wrong


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_is_legible_on_a_screen_and_on_a_telephone(browser: Any, folders: Path, tmp_path: Path, width: int):
    opened = Opened(browser, written([folders / "made-0", folders / "made-1"], tmp_path), width)
    assert opened.tab.evaluate("document.documentElement.scrollWidth") == width  # nothing sticks out
    titles = opened.tab.locator("article:not([hidden]) .xtitle, article:not([hidden]) .ytitle").all_text_contents()
    assert len(titles) == 8
    for word in ("accuracy on the search split", "times", "MB", "device seconds", "hypervolume"):
        assert any(word in title for title in titles), word
    overlaps = """() => {
        const boxes = [...document.querySelectorAll('.card, .limits label, article:not([hidden]) h2, .views .plot, .drawing')]
            .map((element) => element.getBoundingClientRect()).filter((box) => box.width);
        return boxes.some((a, i) => boxes.some((b, j) => i < j && a.left < b.right - 1 && b.left < a.right - 1
            && a.top < b.bottom - 1 && b.top < a.bottom - 1));
    }"""
    assert not opened.tab.evaluate(overlaps)
    if width == 1280:
        headline = opened.tab.locator("h1").first.bounding_box()
        assert headline["y"] + headline["height"] < 200
    opened.tab.locator(".pick").select_option(label="made-1")
    assert opened.tab.locator("article:not([hidden])").get_attribute("data-name") == "made-1"
    assert opened.tab.locator("article:not([hidden]) .view1 .xtitle").count() == 1
    assert not opened.wrong


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 400])
def test_a_point_says_its_structure_and_where_it_comes_from(browser: Any, folders: Path, page: Path, width: int):
    opened, line = Opened(browser, page, width), hpc_compress.load_runs(folders / "made-0").iloc[:4]
    opened.point_at(3)
    said, box = opened.tab.locator(".tip").text_content(), opened.tab.locator(".tip").bounding_box()
    for text in (
        line["candidate"].iloc[3],
        "heads 4-2",
        "FFN 64-32",
        "base model → plain_0 > quantize_plain → plain_1 → plain_2",
    ):
        assert text in said
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    assert not opened.wrong


@pytest.mark.slow
def test_the_answer_is_seen_without_scrolling(browser: Any, page: Path):
    opened = Opened(browser, page)
    for part in ("h1", ".cards", ".how pre"):
        box = opened.tab.locator(f".answer {part}").bounding_box()
        assert box["y"] + box["height"] < 800, part


@pytest.mark.slow
def test_nothing_of_a_hostile_run_runs(browser: Any, tmp_path: Path):
    root = tmp_path / "runs" / "<img src=x onerror=\"document.title='ran'\">"
    made.run(root, text=ATTACK, metric=ATTACK)
    opened = Opened(browser, written([root], tmp_path / "out"))
    opened.point_at(3)
    assert ATTACK in opened.tab.locator(".tip").text_content()
    opened.move("mb", 30)
    opened.tab.wait_for_timeout(300)
    assert opened.tab.locator("img, a[href], iframe, main script").count() == 0
    assert opened.tab.evaluate("document.querySelectorAll('svg a').length") == 0
    assert "ran" not in opened.tab.title().partition("<img")[0]
    assert ATTACK.partition("$")[0] in opened.tab.locator("body").inner_text()
    assert not opened.wrong
    # The policy holds too, whatever came into the page.
    opened.tab.evaluate("document.body.insertAdjacentHTML('beforeend', `<img src=x onerror=\"document.title='ran'\">`)")
    opened.tab.wait_for_timeout(300)
    assert opened.tab.title() != "ran"
    assert any("Content Security Policy" in line for line in opened.wrong)

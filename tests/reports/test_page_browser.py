"""The page in a real browser. Skipped where there is none; `apt-get install chromium` brings one on Debian."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import WHY_NOT, Browser, find_chromium
from pages import make_folder, make_plan, scaling_beside

from reports.page import write_report
from reports.page_inputs import find_inputs

pytestmark = pytest.mark.skipif(find_chromium() is None, reason=WHY_NOT)
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with every section: a measured pipeline of two stages, the exam, two numbers of nodes."""
    plan = make_plan(search={"pp": [2], "tp": [1, 2], "virtual_stages": [1]})
    folder = make_folder(tmp_path_factory.mktemp("page"), plan)
    inputs = dataclasses.replace(find_inputs(plan, folder), scaling=scaling_beside(plan))
    return write_report(plan, inputs, folder)[0]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = Browser()
    yield found
    found.close()


@pytest.fixture
def page(browser: Browser, path: Path) -> Iterator[Browser]:
    """The page in a window of 1200 x 900. After every test: no error in the console, no request but for the file."""
    browser.open(path)
    yield browser
    assert browser.errors == []
    assert set(browser.requests) == {path.resolve().as_uri()}


def view(page: Browser) -> tuple[float, float]:
    """Seconds of the step that the timeline shows."""
    page.settle()
    low, high = page.run("[timeline.dataset.from, timeline.dataset.to].map(Number)")
    return low, high


def middle(page: Browser) -> tuple[float, float]:
    page.run("timeline.scrollIntoView({block: 'center', behavior: 'instant'})")
    page.settle()
    x, y, width = page.run("(({x, y, width}) => [x, y, width])(timeline.getBoundingClientRect())")
    return x + width / 2, y + 40


def first_column(page: Browser) -> list[str]:
    found = page.run("[...layouts.tBodies[0].rows].filter(r => !r.hidden).map(r => r.cells[0].textContent)")
    return [str(name) for name in found]


def test_everything_is_drawn(page: Browser) -> None:
    assert page.run("[...document.querySelectorAll('.plot')].map(p => p.dataset.chart)") == [
        "memory", "loss", "scaling", "pareto", "parity",
    ]  # fmt: skip
    assert page.run("[...document.querySelectorAll('.plot')].every(p => p.querySelector('path, circle'))")
    # A canvas that is not blank has more than a few colours.
    colors = page.run("""(() => {
        const d = timeline.getContext('2d').getImageData(0, 0, timeline.width, timeline.height).data;
        const s = new Set();
        for (let i = 0; i < d.length; i += 4) s.add(d[i] + ',' + d[i + 1] + ',' + d[i + 2]);
        return s.size;
    })()""")
    assert colors > 10
    paint = "[...document.querySelectorAll('.curve')].map(c => getComputedStyle(c)).map(s => [s.fill, s.stroke])"
    assert all(fill == "none" and stroke.startswith("rgb(") for fill, stroke in page.run(paint))
    # Nothing is not a number where text or geometry is made.
    assert "NaN" not in page.run("document.querySelector('main').outerHTML")
    assert "undefined" not in page.run("document.body.innerText")


def test_a_click_sorts_and_another_turns_it_round(page: Browser) -> None:
    step = "layouts.tHead.rows[0].cells[1].firstChild.click()"
    values = "[...layouts.tBodies[0].rows].map(r => Number(r.cells[1].dataset.v))"
    page.run(step)
    up = page.run(values)
    assert up == sorted(up) and page.run("layouts.tHead.rows[0].cells[1].ariaSort") == "ascending"
    page.run(step)
    assert page.run(values) == sorted(up, reverse=True)
    assert page.run("layouts.tHead.rows[0].cells[1].ariaSort") == "descending"
    page.run("layouts.tHead.rows[0].cells[0].firstChild.click()")
    assert first_column(page)[0] == "best" and page.run("layouts.tHead.rows[0].cells[1].ariaSort") == "none"


def test_filters_take_words_and_conditions(page: Browser) -> None:
    every = first_column(page)

    def filtered(text: str) -> list[str]:
        page.run(f"document.getElementById('filter').value = {text!r};"
                 "document.getElementById('filter').dispatchEvent(new Event('input'))")  # fmt: skip
        return first_column(page)

    twos = page.run("[...layouts.tBodies[0].rows].filter(r => /\\btp=2 /.test(r.dataset.fields)).length")
    assert len(filtered("tp=2")) == twos and len(filtered("tp>=1")) == len(every)
    assert filtered("best") == ["best"] and filtered("tp=16") == [] == filtered("step<0")
    assert page.run("document.getElementById('filter-count').textContent") == f"0 of {len(every)} layouts"
    assert filtered("") == every
    page.run("document.getElementById('fits-only').click()")
    fitting = page.run("[...layouts.tBodies[0].rows].filter(r => r.dataset.fits === '1').length")
    assert len(first_column(page)) == fitting


def test_buttons_keys_wheel_and_mouse_move_the_timeline(page: Browser) -> None:
    low, whole = view(page)
    assert low == 0
    page.run("document.querySelector('[data-zoom=in]').click()")
    low, high = view(page)
    assert high - low == pytest.approx(whole / 2, rel=1e-3) and low == pytest.approx(whole / 4, rel=1e-3)
    page.run("timeline.focus()")
    page.key("ArrowRight")
    after = view(page)
    assert after[0] == pytest.approx(low + 0.3 * (high - low), rel=1e-3)
    x, y = middle(page)
    low, high = view(page)
    # From the middle a hundred pixels to the right: earlier moments come into view.
    page.mouse("mousePressed", x, y, button="left", clickCount=1, buttons=1)
    page.mouse("mouseMoved", x + 100, y, button="left", buttons=1)
    page.mouse("mouseReleased", x + 100, y, button="left", clickCount=1)
    moved = view(page)
    assert moved[0] < low and moved[1] - moved[0] == pytest.approx(high - low, rel=1e-3)
    page.mouse("mouseWheel", x, y, deltaX=0, deltaY=-300, modifiers=2)
    near = view(page)
    assert near[1] - near[0] < 0.7 * (moved[1] - moved[0])
    page.key("0")
    assert view(page) == (0, whole)
    # Without Ctrl the wheel scrolls the page.
    page.mouse("mouseWheel", x, y, deltaX=0, deltaY=100)
    assert view(page) == (0, whole)


def test_fingers_pinch_and_swipe(browser: Browser, path: Path) -> None:
    browser.open(path, 375, 800, touch=True)
    _, whole = view(browser)
    x, y = middle(browser)
    browser.touch("touchStart", (x - 20, y), (x + 20, y))
    for reach in (30, 50, 80):
        browser.touch("touchMove", (x - reach, y), (x + reach, y))
    browser.touch("touchEnd")
    low, high = view(browser)
    # Fingers that were 40 apart are 160 apart: a quarter of the step.
    assert high - low == pytest.approx(whole / 4, rel=0.15)
    browser.touch("touchStart", (x, y))
    for far in (-20, -50):
        browser.touch("touchMove", (x + far, y))
    browser.touch("touchEnd")
    later = view(browser)
    assert later[0] > low and later[1] - later[0] == pytest.approx(high - low, rel=1e-3)
    assert browser.errors == []


def test_a_span_says_its_name_and_its_twin(page: Browser) -> None:
    _, y = middle(page)
    page.run("document.querySelector('[data-zoom=all]').click()")
    page.settle()
    left = page.run("timeline.getBoundingClientRect().x")
    page.mouse("mouseMoved", left + 70, y - 10)
    page.mouse("mouseMoved", left + 72, y - 8)
    said = page.run("tip.hidden ? '' : tip.textContent")
    assert said.startswith("PP:0F") and "predicted" in said and "measured:" in said
    page.key("Escape")
    assert page.run("tip.hidden")


def test_runs_of_the_exam_can_be_highlighted(page: Browser) -> None:
    assert page.run("group.options[0].textContent") == "all runs (3)"
    assert page.run("document.getElementById('group-text').textContent").startswith("3 runs, median error 20.0 %")


@pytest.mark.parametrize("width", [320, 375, 768, 1200])
def test_no_width_makes_the_page_scroll_sideways(browser: Browser, path: Path, width: int) -> None:
    browser.open(path, width, 800, touch=width < 700)
    browser.run("document.querySelectorAll('details').forEach(d => { d.open = true })")
    browser.settle()
    assert browser.run(OVERFLOW) == 0
    # Tables do it in their own boxes.
    assert browser.run("[...document.querySelectorAll('table')].every(t => t.closest('.scroll'))")
    assert browser.errors == []


def test_dark_by_the_system_and_by_choice(browser: Browser, path: Path) -> None:
    def lightness() -> float:
        browser.settle()
        color = browser.run("getComputedStyle(document.body).backgroundColor")
        return sum(float(part) for part in color.removeprefix("rgb(").removesuffix(")").split(",")) / 3 / 255

    browser.open(path, dark=False)
    assert lightness() > 0.9
    browser.open(path, dark=True)
    assert lightness() < 0.2
    browser.run("document.querySelector('[data-theme-choice=light]').click()")
    assert (
        lightness() > 0.9 and browser.run("document.querySelector('[data-theme-choice=light]').ariaPressed") == "true"
    )
    browser.run("document.querySelector('[data-theme-choice=dark]').click()")
    browser.media(dark=False)
    assert lightness() < 0.2
    browser.run("document.querySelector('[data-theme-choice=auto]').click()")
    assert lightness() > 0.9 and browser.errors == []


@pytest.mark.parametrize("dark", [False, True])
def test_words_stand_out_from_what_is_behind_them(browser: Browser, path: Path, dark: bool) -> None:
    """WCAG 2 AA: a contrast of 4.5 for text, of 3 for what is drawn (but for hatching and overhead, which are grey)."""
    browser.open(path, dark=dark)
    ratio = """((front, back) => {
        const part = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
        const light = (c) => {
            const [r, g, b] = c.match(/[\\d.]+/g).map((v) => part(v / 255));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const [a, b] = [light(color(front)), light(color(back))];
        return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    })"""
    for front in ("text", "soft", "link"):
        for back in ("page", "raised"):
            assert browser.run(f"{ratio}('{front}', '{back}')") >= 4.5, (front, back)
    for front in ("blue", "vermillion", "green", "dark"):
        assert browser.run(f"{ratio}('{front}', 'page')") >= 3, front


def test_print_is_light_and_has_no_controls(browser: Browser, path: Path) -> None:
    browser.open(path, dark=True)
    browser.media(dark=True, kind="print")
    hidden = (
        "[...document.querySelectorAll('.theme, nav, .filter, .toolbar button')].every(e => !e.getClientRects().length)"
    )
    assert browser.run(hidden)
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(253, 253, 252)"
    # A table is as wide as its paper: nothing is cut off.
    browser.resize(720, 1000)
    assert browser.run(OVERFLOW) == 0
    browser.media(dark=True)
    pdf = browser.pdf()
    assert pdf.startswith(b"%PDF") and 20_000 < len(pdf) < 3_000_000
    # What printing changed is as it was.
    assert browser.run("document.documentElement.dataset.theme || 'auto'") == "auto"
    assert browser.errors == []


def test_everything_can_be_reached_by_keys(page: Browser) -> None:
    """Buttons, links, tables that scroll and the canvas are in the order of the tabulator."""
    kinds = page.run("""(() => {
        const all = [...document.querySelectorAll('a, button, input, select, summary, canvas, .scroll')];
        return all.filter((e) => e.tabIndex < 0 && e.getClientRects().length).map((e) => e.outerHTML.slice(0, 80));
    })()""")
    assert kinds == []
    page.run("document.querySelector('.skip').focus()")
    assert page.run("document.activeElement.getBoundingClientRect().x >= 0")

"""The page in Chromium: pointer, keyboard, light and dark, on a phone. Skipped without Chromium or playwright."""

import pytest

from diffpo.reports.page import report_page
from diffpo.reports.run_record import read_run

from .conftest import HOSTILE, line, sample
from .test_report_page import hostile


@pytest.fixture
def open_page(open_file, tmp_path):
    """open_page(*folders, **context): the page in a fresh tab."""

    def open_(*folders, **options):
        path = tmp_path / "page.html"
        path.write_text(report_page([read_run(folder) for folder in folders]), encoding="utf-8")
        return open_file(path, **options)

    return open_


def test_pointing_at_a_curve_tells_its_value(make_run, open_page):
    page = open_page(make_run())
    plot = page.locator("[data-chart='0'] .plot")
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.49, box["y"] + 20)
    tip = page.locator("#tip")
    assert tip.inner_text().split("\n")[0] == "update 20"
    assert "30%" in tip.inner_text()
    page.mouse.move(box["x"] + 1, box["y"] + 20)
    assert tip.inner_text().startswith("update 1\n")
    page.mouse.move(2, 2)
    assert tip.is_hidden()


def test_arrow_keys_move_along_a_curve(make_run, open_page):
    page = open_page(make_run(), make_run("second", updates=30))
    plot = page.locator("[data-chart='1'] .plot")
    page.locator("[data-chart='0'] .plot").focus()
    page.keyboard.press("Tab")
    assert plot.evaluate("plot => plot === document.activeElement")
    tip = page.locator("#tip")
    page.keyboard.press("End")
    assert "update 40" in tip.inner_text()
    assert "second" not in tip.inner_text()  # it has no such update
    for _ in range(10):
        page.keyboard.press("ArrowLeft")
    assert "update 30" in tip.inner_text()
    assert "second" in tip.inner_text()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowLeft")
    assert "update 1\n" in tip.inner_text()
    page.keyboard.press("Escape")
    assert tip.is_hidden()


def test_a_column_of_the_histogram_tells_its_shares(make_run, open_page):
    page = open_page(make_run(metrics__jsonl=[line(1), line(2, gamma_histogram=[1, 1, 1, 1])]))
    page.locator("[data-histogram='0'] .plot").focus()
    page.keyboard.press("End")
    text = page.locator("#tip").inner_text()
    assert text.startswith("update 2\n")
    assert text.count("25%") == 4
    assert "6 nats" in text


def states(page) -> str:
    script = (
        "all => all.map(t => t.classList.contains('masked') ? 'm' : t.classList.contains('now') ? 'n' : 'c').join('')"
    )
    return page.locator("#tokens .token").evaluate_all(script)


def test_a_sample_is_denoised_step_by_step(make_run, open_page):
    rows = [
        sample(0, 0),
        sample(0, 1),
        sample(40, 0),
        sample(40, 1, nfe=3, commit_step=[3, 2, 1, 0], pieces=["x", "\n", " <b>", "<eos>"]),
    ]
    page = open_page(make_run(samples__jsonl=rows), reduced_motion="reduce")
    assert page.locator("#prompts").input_value() == "1"  # the longest to watch
    assert states(page) == "nccm"
    page.locator("#step").focus()
    page.keyboard.press("Home")
    assert states(page) == "mmmm"
    page.keyboard.press("ArrowRight")
    assert states(page) == "mmnm"
    assert page.locator("#status").inner_text() == "step 1 of 3"
    assert page.locator("#tokens .token").all_text_contents()[1:3] == ["\u23ce", "<b>"]
    assert "right" in page.locator("#grade").inner_text()
    page.select_option("#answers", "0")
    assert "wrong" in page.locator("#grade").inner_text()
    page.select_option("#prompts", "0")
    assert page.locator("#prompt").inner_text() == "prompt 0"
    assert page.locator("#answers").input_value() == "0"  # of the same update


def test_play_runs_to_the_end(make_run, open_page):
    from playwright.sync_api import expect

    page = open_page(make_run())
    page.click("#play")
    assert page.locator("#play").inner_text() == "Pause"
    expect(page.locator("#play")).to_have_text("Play")
    assert page.locator("#step").input_value() == "2"


def test_hostile_text_stays_text(make_run, open_page):
    page = open_page(hostile(make_run))
    page.locator("summary").evaluate_all("all => all.forEach((each) => { each.parentElement.open = true })")
    assert page.evaluate("window.hacked") is None
    assert page.locator("img").count() == 0
    assert "</script>" in page.locator("#tokens").inner_text()
    assert HOSTILE.partition(" ")[0] in page.locator("h1").inner_text()
    page.locator("[data-chart='4'] .plot").focus()
    page.keyboard.press("End")
    assert page.evaluate("window.hacked") is None


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_a_phone_needs_no_sideways_scrolling(make_run, open_page, several):
    folders = [hostile(make_run, text="long" * 80), make_run("second")][: 2 if several else 1]
    page = open_page(*folders, viewport={"width": 360, "height": 740})
    page.locator("summary").evaluate_all("all => all.forEach((each) => { each.parentElement.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_light_and_dark(make_run, open_page):
    def background(page):
        return page.evaluate("getComputedStyle(document.documentElement).backgroundColor")

    folder = make_run()
    light, dark = (open_page(folder, color_scheme=scheme) for scheme in ("light", "dark"))
    assert background(light) != background(dark)
    dark.click("#theme")
    assert background(dark) == background(light)


def test_text_can_be_read_on_its_background(make_run, open_page):
    """WCAG's 4.5 for what is written in the soft colour and in the colours of a verdict, in both themes."""
    script = """names => names.map((name) => {
      const probe = document.createElement('i'); probe.style.color = `var(${name})`; document.body.append(probe);
      const [r, g, b] = getComputedStyle(probe).color.match(/[\\d.]+/g).map(Number).map((v) => v / 255).map((v) => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
      return .2126 * r + .7152 * g + .0722 * b; })"""
    folder = make_run()
    for scheme in ("light", "dark"):
        page = open_page(folder, color_scheme=scheme)
        paper, *inks = page.evaluate(script, ["--page", "--soft", "--good", "--bad", "--ink"])
        for ink in inks:
            high, low = max(ink, paper) + 0.05, min(ink, paper) + 0.05
            assert high / low >= 4.5


def test_without_scripts_the_answers_and_curves_are_there(make_run, open_page):
    page = open_page(make_run(), java_script_enabled=False)
    assert page.locator("#player").is_hidden()
    assert page.locator(".sample pre").first.inner_text() == "a b c"
    assert page.locator("[data-chart='0'] path").count() == 2

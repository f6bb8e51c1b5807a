"""The report in Chromium: wide, narrow, light, dark, by keyboard, printed, and with hostile texts."""

import io
import json
import re

import browser
import pytest
import torch
from PIL import Image
from test_report import effect, scores, share

from overpaint import report
from overpaint.evaluate import predicted_drift
from overpaint.evaluate.results import Comparison
from overpaint.probes.questions import Question
from overpaint.trace.effects import Effects

EVIL = '"><script>document.title="owned"</script><img src=x onerror=document.title="owned">'
STYLES = ("openmoji", "noto", "blob", "high contrast", "twemoji", "fluent")
METHODS = ("no edit", "quickfix", "automatic")
SIZES = [(width, dark) for width in (1280, 390) for dark in (False, True)]


def filled(folder, *, evil=""):
    """Save a small result of every kind into `folder`; `evil` is added to every text of a user."""
    questions = tuple(
        Question(f"a {o} in {s} style{evil}", seed, "target", o + evil, s)
        for seed, o in enumerate(("cat", "apple"))
        for s in STYLES
    )
    # one color for each method, so that a screenshot shows which method is visible
    colors = {
        "before": (255, 0, 0),
        "no edit": (255, 0, 0),
        "quickfix": (0, 255, 0),
        "automatic": (0, 0, 255),
    }
    pictures = {
        name + (evil if name == "quickfix" else ""): torch.tensor(rgb, dtype=torch.uint8)
        .view(1, 3, 1, 1).expand(len(questions), 3, 16, 16).contiguous()
        for name, rgb in colors.items()
    }  # fmt: skip
    names = [name + (evil if name == "quickfix" else "") for name in METHODS]
    by_method = {n: scores(n, after) for n, after in zip(names, (0.9, 0.3, 0.02), strict=True)}
    baseline = {"style": share(0.9, 0).before, "style held out": share(0.7, 0).before}
    Comparison(by_method, baseline, questions, pictures).save(folder)
    predicted = {name: {"noto": 0.1 * i, "blob": 0.2 * i} for i, name in enumerate(names)}
    predicted_drift.save(predicted, folder)
    rows = [effect(f"text.{n}.mlp", "text", "mlp", n, "eos", 0.5 / (1 + n)) for n in range(2)]
    about = {"scorer": f"eyes{evil}", "probes": 1, "steps": 2}
    Effects.of(rows, about).save(folder / "text.parquet")
    run = {
        "title": f"cat → dog{evil}",
        "method": "automatic",
        "lead": f"Results of an edit.{evil}",
        "commands": [f"overpaint demo --erase '{evil}' --out {'x' * 300}"],
        "protocol": {f"Model{evil}": f"a/very/long/{'path/' * 40}{evil}"},
    }
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "summary.json").write_text(json.dumps({"edit_seconds": 0.4}))
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return report.save(filled(tmp_path_factory.mktemp("report")))


@pytest.fixture(scope="module")
def evil(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evil") / "<script>document.title='owned'<"
    folder.mkdir()
    return report.save(filled(folder, evil=EVIL))


@pytest.mark.parametrize(("width", "dark"), [SIZES[0], SIZES[3]])  # each width and each colour once
def test_the_report_is_accessible(chromium, axe, page, width, dark):
    with browser.visit(chromium, page, width=width, dark=dark) as seen:
        browser.check_accessible(seen.page, axe)


def test_the_chosen_theme_is_accessible(chromium, axe, page):
    with browser.visit(chromium, page) as seen:
        seen.page.get_by_role("button", name="Dark").click()
        browser.check_accessible(seen.page, axe)


@pytest.mark.parametrize(("width", "dark"), SIZES)
def test_the_report_is_whole(chromium, page, width, dark):
    with browser.visit(chromium, page, width=width, dark=dark) as seen:
        browser.check_whole(seen)
        assert seen.requests == []
        paper = seen.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert paper == ("rgb(24, 27, 34)" if dark else "rgb(255, 255, 255)")
        shown = seen.page.locator(".chart img:visible")
        assert {shown.nth(i).get_attribute("class") for i in range(shown.count())} == {
            "on-dark" if dark else "on-light"
        }


def middle(seen, share):
    """Return the color of the first before-and-after picture at `share` of its width, away from its line."""
    shot = seen.page.locator(".pair").first.screenshot()
    image = Image.open(io.BytesIO(shot)).convert("RGB")
    return image.getpixel((int(share * image.width), image.height // 2))


def test_charts_keep_their_size_on_a_narrow_page_and_scroll(chromium, page):
    with browser.visit(chromium, page, width=390) as seen:
        wide, room = seen.page.locator("#text .chart > div").first.evaluate(
            "e => [e.scrollWidth, e.clientWidth]"
        )
        assert wide >= 34 * 16 > room


def hints(seen):
    """Return for each table and chart whether it overflows, and whether its hint is visible."""
    seen.page.wait_for_timeout(300)
    return seen.page.evaluate(
        """() => [...document.querySelectorAll(".scroll, .chart > div")].map(e => [
             e.scrollWidth > e.clientWidth + 1, e.previousElementSibling.matches(".hint:not([hidden])")])"""
    )


def test_tables_and_charts_say_that_they_scroll_where_they_overflow(chromium, page):
    with browser.visit(chromium, page, width=400) as seen:
        rows = hints(seen)
        assert any(overflows for overflows, _ in rows)
        assert all(overflows == visible for overflows, visible in rows)
        assert (
            seen.page.locator(".hint:visible").first.inner_text().startswith("Wider than the page")
        )
        browser.check_whole(seen)
        seen.page.set_viewport_size({"width": 1600, "height": 900})
        assert hints(seen) == [[False, False]] * len(rows)


@pytest.mark.parametrize("dark", [False, True])
def test_small_texts_of_intervals_have_contrast(chromium, page, dark):
    """7:1, more than the 4.5:1 of WCAG AA, because the text is small."""
    with browser.visit(chromium, page, width=400, dark=dark) as seen:
        rows = seen.page.evaluate(
            """() => [...document.querySelectorAll("td small, .tiles .note, .tiles dt")].map(e => {
                 let box = e; const clear = "rgba(0, 0, 0, 0)";
                 while (getComputedStyle(box).backgroundColor === clear) box = box.parentElement;
                 const style = getComputedStyle(e);
                 return [style.color, getComputedStyle(box).backgroundColor, parseFloat(style.fontSize)]; })"""
        )
        assert len(rows) > 10
        for color, paper, size in rows:
            assert contrast(color, paper) >= 7
            assert size >= 12


def contrast(first, second):
    """Return WCAG's contrast ratio of two colors, as `rgb(1, 2, 3)`."""

    def luminance(text):
        shares = [int(n) / 255 for n in re.findall(r"\d+", text)[:3]]
        linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_the_slider_works_by_keyboard_and_shows_before_or_after(chromium, page):
    with browser.visit(chromium, page) as seen:
        assert (middle(seen, 0.3), middle(seen, 0.7)) == ((255, 0, 0), (0, 0, 255))
        slider = seen.page.get_by_role("slider")
        for _ in range(20):
            seen.page.keyboard.press("Tab")
            if slider.evaluate("e => e === document.activeElement"):
                break
        seen.page.keyboard.press("Home")
        assert (middle(seen, 0.3), middle(seen, 0.7)) == ((0, 0, 255), (0, 0, 255))
        assert slider.get_attribute("aria-valuetext") == "0 % before, 100 % after"
        seen.page.keyboard.press("End")
        assert (middle(seen, 0.3), middle(seen, 0.7)) == ((255, 0, 0), (255, 0, 0))
        seen.page.get_by_role("combobox").select_option("quickfix")
        seen.page.keyboard.press("Shift+Tab")
        slider.fill("20")
        assert (middle(seen, 0.1), middle(seen, 0.7)) == ((255, 0, 0), (0, 255, 0))


def test_the_theme_can_be_chosen_against_the_system(chromium, page):
    with browser.visit(chromium, page) as seen:
        for name, paper in (("Dark", "rgb(24, 27, 34)"), ("Light", "rgb(255, 255, 255)")):
            seen.page.get_by_role("button", name=name).click()
            color = seen.page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert color == paper
            browser.check_whole(seen)
        seen.page.emulate_media(color_scheme="dark")
        assert seen.page.locator(".on-dark:visible").count() == 0
        seen.page.get_by_role("button", name="Auto").click()
        assert seen.page.locator(".on-light:visible").count() == 0


def test_a_printed_page_is_light_and_has_no_controls(chromium, page):
    with browser.visit(chromium, page, width=720, dark=True) as seen:
        seen.page.emulate_media(media="print")
        assert seen.page.locator(".theme:visible, .wipe:visible, .on-dark:visible").count() == 0
        assert seen.page.locator(".scene img:visible").count() == 2 * 6 * 3
        browser.check_width(seen.page)
        assert seen.page.pdf()[:5] == b"%PDF-"


def test_without_scripts_every_picture_and_figure_is_there(chromium, page):
    with browser.visit(chromium, page, java_script_enabled=False) as seen:
        assert seen.page.locator(".theme:visible, .wipe:visible").count() == 0
        assert seen.page.locator(".scene img:visible").count() == 2 * 6 * 3


def test_tags_in_prompts_names_and_files_are_shown_as_text(chromium, evil):
    assert "<script>document" not in evil.read_text()
    with browser.visit(chromium, evil, width=390) as seen:
        browser.check_whole(seen)
        assert seen.page.title() == f"cat → dog{EVIL}"
        assert seen.page.locator("script").count() == 1
        assert seen.page.locator("img[src=x]").count() == 0
        assert EVIL in seen.page.locator("h1").inner_text()
        assert EVIL in seen.page.locator("pre").inner_text()
        assert seen.requests == []


def test_a_page_of_tags_is_accessible(chromium, axe, evil):
    with browser.visit(chromium, evil, width=390) as seen:
        browser.check_accessible(seen.page, axe)


def test_the_policy_forbids_another_base_and_forms(chromium, page, tmp_path):
    modified = tmp_path / "modified.html"
    added = (
        '<base href="https://elsewhere.example/"><form action="https://elsewhere.example/"></form>'
    )
    modified.write_text(page.read_text().replace("</main>", f"{added}</main>", 1))
    with browser.visit(chromium, modified) as seen:
        assert seen.page.evaluate("document.baseURI") == modified.resolve().as_uri()
        with seen.page.expect_console_message(lambda m: "form-action" in m.text, timeout=5000):
            seen.page.evaluate("document.forms[0].submit()")
        assert seen.requests == []


def test_the_policy_blocks_a_script_that_was_not_escaped(chromium, page, tmp_path):
    modified = tmp_path / "modified.html"
    text = page.read_text().replace("</main>", "<script>document.title='owned'</script></main>", 1)
    modified.write_text(text)
    with browser.visit(chromium, modified) as seen:
        assert seen.page.title() == "cat → dog"
        assert any("Content Security Policy" in error for error in seen.errors)

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from overpaint import report
from overpaint.evaluate.results import Comparison, Paired, Scores
from overpaint.images import charts
from overpaint.metrics import Interval
from overpaint.probes.questions import Question
from overpaint.report import tables
from overpaint.trace.effects import Effects


class Page(HTMLParser):
    """Collects the tags, images, links and texts of a page."""

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.links, self.words = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag == "img":
            self.images.append(values)
        self.links += [v for k, v in attrs if k in ("src", "href", "srcset")]
        if tag not in ("img", "meta", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def share(before, after, n=20):
    def interval(mean):
        return Interval(mean, mean - 0.05, mean + 0.05, n)

    return Paired(interval(before), interval(after), interval(after - before))


def scores(name, after):
    none = Interval(float("nan"), float("nan"), float("nan"), 0)
    return Scores(
        name, "style", "openmoji", "noto",
        efficacy=share(0.9, after),
        redirection=share(0.05, 0.9 - after),
        generality={"unseen wordings": share(0.8, after), "held-out pairs": Paired(none, none, none)},
        others={"noto": share(0.9, 0.88), "blob": share(0.95, 0.95)},
        specificity={"object": share(0.8, 0.79), "style": share(0.92, 0.91), "color": share(1, 1)},
        empty_drift=0.012,
        protocol={"questions": 40, "judge": "eyes"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def comparison():
    names = ("no edit", "quickfix <plain>")
    questions = tuple(
        Question(f"a {o} in {s} style", seed, "target", o, s)
        for seed, o in enumerate(("cat", "apple"))
        for s in ("openmoji", "noto", "blob")
    )
    pictures = {
        name: torch.randint(0, 255, (6, 3, 8, 8), dtype=torch.uint8) for name in ("before", *names)
    }
    by_method = {names[0]: scores(names[0], 0.9), names[1]: scores(names[1], 0.02)}
    baseline = {"style": share(0.9, 0).before, "style held out": share(0.7, 0).before}
    return Comparison(by_method, baseline, questions, pictures)


def effect(site, part, kind, index, role, value, control="", **more):
    drawn = None if control else value
    return {
        "site": site, "part": part, "kind": kind, "index": index, "path": site, "role": role,
        "control": control, "probe": "p0", "prompt": "a cat", "concept": "cat", "seed": 0, "noise": 0,
        "indirect_effect": drawn, "embed_recovery": value, **more,
    }  # fmt: skip


def saved(comparison, tmp_path):
    comparison.save(tmp_path)
    text = [
        effect(f"text.{n}.{kind}", "text", kind, n, role, 0.5 / (1 + n), control)
        for n in range(3)
        for kind in ("self_attn", "mlp")
        for role in ("last_subject", "eos")
        for control in ("", "untrained")
    ]
    Effects.of(text, {"scorer": "eyes", "probes": 1, "steps": 2}).save(tmp_path / "text.parquet")
    for source in ("clean_trajectory", "same_latent"):
        rows = [effect(f"unet.resnet.{n}", "unet", "resnet", n, "all", 0.1 * n) for n in range(4)]
        Effects.of(rows, {}).save(tmp_path / f"unet-{source}.parquet")
    summary = {
        "target_before": 0.9,
        "target_after": 0.02,
        "others_drop": 0.01,
        "edit_seconds": None,
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    run = {"title": "a & b", "commands": ["overpaint demo"], "protocol": {"Seed": 0}}
    (tmp_path / "run.json").write_text(json.dumps(run))
    return tmp_path


@pytest.fixture
def folder(comparison, tmp_path):
    return saved(comparison, tmp_path)


@pytest.fixture(scope="module")
def page(comparison, tmp_path_factory):
    """A page that no test changes: its charts take seconds."""
    return report.save(saved(comparison, tmp_path_factory.mktemp("page")))


def test_the_page_is_well_formed_self_contained_and_described(page):
    text = page.read_text()
    page = Page(text)
    assert page.open == []
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in page.links)
    assert not re.search(r"https?://|url\(|@import", text)
    assert "default-src 'none'" in text
    assert all(image["alt"].strip() for image in page.images)
    assert len(page.images) == 2 * 3 + 2 * 6
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_every_part_of_the_page_is_there_and_escaped(page):
    text = page.read_text()
    words = " ".join(" ".join(Page(text).words).split())
    assert "<h1>a &amp; b</h1>" in text
    assert "quickfix <plain>" in words
    assert "quickfix <plain>" not in text
    for part in (
        "trace of the text encoder",
        "trace of the UNet",
        "Before and after",
        "How to reproduce",
    ):
        assert part in words
    assert "Still recognised as openmoji 2 % before 90 %" in words
    assert "Duration of the edit" not in words
    assert "overpaint demo" in words


def test_a_folder_with_one_result_gives_a_page_of_that_result(comparison, tmp_path):
    comparison.save(tmp_path)
    text = report.save(tmp_path, out=tmp_path / "other.html").read_text()
    assert "trace of the UNet" not in text
    assert "What the edit did" in text
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [
        ".html", ".json", ".json", ".safetensors",
    ]  # fmt: skip


def test_writing_twice_gives_the_same_page(page):
    first = page.read_bytes()
    assert report.save(page.parent).read_bytes() == first


def test_an_empty_or_damaged_folder_is_refused(folder, tmp_path_factory):
    with pytest.raises(FileNotFoundError, match="holds no result: name a folder that"):
        report.save(tmp_path_factory.mktemp("empty"))
    (folder / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run.json' is damaged"):
        report.save(folder)


def test_windows_heads_and_negative_values_are_on_the_page(tmp_path):
    unet = [
        effect(f"unet.self_attn.{n}", "unet", "self_attn", n, "", value, window=window, head=head)
        for n, value in enumerate((0.6, -0.2))
        for window in ("", "early", "late")
        for head in (None, 0, 1)
    ]
    Effects.of(unet, {}).save(tmp_path / "unet-same_latent.parquet")
    text = [
        effect(f"{part}.0.self_attn", part, "self_attn", 0, "eos", value, head=head)
        for part, value in (("text", 0.5), ("text2", -0.1))
        for head in (None, 3)
    ]
    Effects.of(text, {}).save(tmp_path / "text.parquet")
    page = Page(report.save(tmp_path).read_text())
    alts = [image["alt"] for image in page.images]
    assert (
        sum(alt.startswith("Bar chart of 2 UNet sites") for alt in alts) == 2
    )  # for light and dark background
    assert sum("largest value, 0.60, is at Heads" in alt for alt in alts) == 2
    words = " ".join(page.words)
    assert "negative values, down to −0.10, are blue" in words
    assert "Single heads, same latent (control)" in words


def test_the_page_says_which_states_are_causal_or_why_none_can_be(tmp_path):
    def rows(prompts):
        ends = {"score_clean": 0.9, "score_corrupted": 0.1}
        return [
            effect(f"text.{n}.mlp", "text", "mlp", n, "eos", value + 0.01 * p % 0.03, **ends)
            | {"probe": f"p{p}"}
            for p in range(prompts)
            for n, value in enumerate((0.7, 0.05, -0.02))
        ]

    for prompts, sentence in (
        (30, "over 20 other prompts: text.0.mlp eos."),
        (6, "So few prompts (4 beside those that set the threshold) cannot show that any of 3"),
    ):
        Effects.of(rows(prompts), {}).save(tmp_path / "text.parquet")
        assert sentence in " ".join(Page(report.save(tmp_path).read_text()).words)


def test_the_headline_of_a_trace_says_what_so_few_prompts_and_the_control_can_show(tmp_path):
    def sentence(prompts, untrained):
        ends = {"score_clean": 0.9, "score_corrupted": 0.1}
        rows = [
            effect(f"text.{n}.mlp", "text", "mlp", n, "eos", value, control, **ends)
            | {"probe": f"p{p}"}
            for p in range(prompts)
            for control, values in (("", (0.7, 0.05, -0.02)), ("untrained", (untrained, 0.01, 0.0)))
            for n, value in enumerate(values)
        ]
        Effects.of(rows, {}).save(tmp_path / "text.parquet")
        page = report.save(tmp_path)
        text = json.loads(page.with_suffix(".json").read_text())["findings"]["text"]
        assert f'<p class="finding">{text}</p>' in page.read_text()
        return text

    # 3 states at 0.05: 2^-6 * 3 < 0.05, and 8 prompts leave 6 beside the 2 that set the threshold
    assert sentence(3, 0.69) == (
        "3 prompts are too few to call any of 3 states causal (at least 8 are needed); the untrained control is as "
        "strong (largest recovery of text features 0.69, trained 0.70), so these values show the architecture, not "
        "training."
    )
    assert sentence(1, 0.2).startswith(
        "1 prompt is too few to call any of 3 states causal (at least 8"
    )
    assert "too few" in sentence(7, 0.2)
    assert sentence(8, 0.2) == (
        "1 of 3 states is causal, traced with 8 prompts; the untrained control is weaker (largest recovery of text "
        "features 0.20, trained 0.70)."
    )


def test_the_table_of_methods_shows_shares_changes_and_absent_values(comparison):
    table = tables.methods(comparison)
    row = dict(zip(table.heads, table.rows[1], strict=True))
    target = row["Still openmoji"]
    assert (target.text, target.note) == ("2 %", "-3 to 7, n\N{NO-BREAK SPACE}20")
    assert target.track == pytest.approx((0, 2, 93))  # of a line from 0 to 1
    change = row["Other styles, change in points"]
    assert (change.text, change.note) == ("−1.0", "−6 to +4, n\N{NO-BREAK SPACE}20")
    assert change.track == pytest.approx((47, 49.5, 48))  # of a line from -1 to 1
    assert row["Still openmoji, held-out pairs"] == tables.Cell("–")
    assert tables.points(-0.0) == "0.0 points"


def test_figures_differ_by_theme_and_data():
    panel = charts.Panel("p", ("r",), ("a", "b"), ((0.0, 1.0),))
    other = charts.Panel("p", ("r",), ("a", "b"), ((1.0, 0.0),))
    light = charts.heat_map([panel], theme=charts.LIGHT).png()
    assert light == charts.heat_map([panel], theme=charts.LIGHT).png()
    assert light != charts.heat_map([other], theme=charts.LIGHT).png()
    png = charts.heat_map([panel], theme=charts.DARK).png()
    dark = Image.open(io.BytesIO(png)).convert("RGB")
    assert dark.getpixel((0, 0)) == (0x18, 0x1B, 0x22)


def test_an_image_on_the_page_equals_the_saved_picture(comparison, page):
    page = Page(page.read_text())
    alt = "a apple in noto style, quickfix <plain>"
    src = next(i["src"] for i in page.images if i["alt"] == alt)
    pixels = Image.open(io.BytesIO(base64.b64decode(src.partition(",")[2])))
    saved = comparison.pictures["quickfix <plain>"][4]
    assert pixels.getpixel((2, 5)) == tuple(saved[:, 5, 2].tolist())


def test_the_figures_are_saved_as_json_beside_the_page(page):
    folder = page.parent
    words = json.loads((folder / "report.json").read_text())
    assert words["title"] == "a & b"
    assert words["commands"] == ["overpaint demo"]
    row = words["tables"][0]["rows"][1]
    assert row["Method"] == "quickfix <plain>"
    assert row["Still openmoji"] == {
        "mean": 0.02, "low": pytest.approx(-0.03), "high": pytest.approx(0.07), "n": 20,
    }  # fmt: skip
    assert {figure["alt"] for figure in words["figures"]} <= {
        i["alt"] for i in Page(page.read_text()).images
    }
    digest = hashlib.sha256((folder / "comparison.json").read_bytes()).hexdigest()
    assert words["sha256"]["comparison.json"] == digest
    assert "report.json" not in words["sha256"]


def test_the_page_is_about_the_method_that_the_run_or_its_summary_names(comparison, tmp_path):
    by_method = {**comparison.scores, "second": scores("second", 0.5)}
    Comparison(by_method, {}, (), {}).save(tmp_path)

    def method():
        report.save(tmp_path)
        return json.loads((tmp_path / "report.json").read_text())["method"]

    assert method() == "quickfix <plain>"
    (tmp_path / "summary.json").write_text(json.dumps({"target_after": 0.5, "unseen_after": 0.5}))
    assert method() == "second"
    (tmp_path / "run.json").write_text(json.dumps({"method": "quickfix <plain>"}))
    assert method() == "quickfix <plain>"

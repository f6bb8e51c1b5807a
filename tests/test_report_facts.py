"""The protocols on the page, the warning about different changes, and results that are not overwritten."""

import json

import pytest
from test_report import comparison

from overpaint import report
from overpaint.evaluate import Measure, Measures
from overpaint.evaluate.attack_results import Attack, Attempt
from overpaint.metrics import Interval

__all__ = ["comparison"]  # a fixture

SHARE = Interval(0.5, 0.4, 0.6, 20)


def filled(folder, comparison, *, measured, attacked):
    """Save a comparison without a change digest, and measures and an attack with one."""
    comparison.save(folder)
    rows = (Measure("target", "clip_accuracy", SHARE, SHARE, SHARE),)
    about = {"steps": 3, "change_digest": measured}
    Measures("mine", "old", "new", rows, about).save(folder)
    plain = Attempt("plain", "as they are", SHARE, SHARE)
    protocol = {"steps": 5, "score": "share", "change_digest": attacked}
    Attack("old", SHARE, SHARE, SHARE, (plain,), protocol).save(folder)
    return folder


def test_each_part_of_the_page_has_its_own_protocol(comparison, tmp_path):
    page = report.save(filled(tmp_path, comparison, measured="a" * 64, attacked="a" * 64))
    words = json.loads(page.with_suffix(".json").read_text())
    protocols = words["protocol"]
    assert protocols["Measured on mine"] == {"Steps": 3, "Change digest": "a" * 64}
    assert (protocols["Attack"]["Steps"], protocols["What the edit did"]["Judge"]) == (5, "eyes")
    assert page.read_text().count("<dt>Steps</dt>") == 2
    assert words["warning"] == ""
    assert 'class="warning"' not in page.read_text()


def test_results_of_different_changes_carry_a_warning(comparison, tmp_path):
    page = report.save(filled(tmp_path, comparison, measured="a" * 64, attacked="b" * 64))
    warning = f"Measured on mine of {'a' * 12}, Attack of {'b' * 12}"
    assert warning in page.read_text()
    assert warning in json.loads(page.with_suffix(".json").read_text())["warning"]


@pytest.mark.parametrize("name", ["measures.html", "measures.json", "comparison.htm", "run.html"])
def test_a_page_that_would_overwrite_a_result_is_an_error(comparison, tmp_path, name):
    folder = filled(tmp_path, comparison, measured="a", attacked="a")
    (folder / "run.json").write_text("{}")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=r"would overwrite the result .*: choose another name"):
        report.save(folder, out=folder / name)
    with pytest.raises(ValueError, match=r"would overwrite the result .*gallery.safetensors"):
        report.save(folder, out=folder / "gallery.safetensors")
    with pytest.raises(
        ValueError,
        match=r"has the same name as its JSON file of figures: end the page's name in .html",
    ):
        report.save(folder, out=folder / "page.json")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before

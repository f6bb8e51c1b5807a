"""What the page says of how it was made: a protocol a part, one change in all, and nothing overwritten."""

import json

import pytest
from test_report import comparison

from overpaint import report
from overpaint.evaluate import Measure, Measures
from overpaint.evaluate.attack import Attack, Attempt
from overpaint.metrics import Interval

__all__ = ["comparison"]  # a fixture

SHARE = Interval(0.5, 0.4, 0.6, 20)


def filled(folder, comparison, *, measured, attacked):
    """Save a comparison that does not say its change, and measures and an attack that do."""
    comparison.save(folder)
    rows = (Measure("target", "clip_accuracy", SHARE, SHARE, SHARE),)
    about = {"steps": 3, "change_digest": measured}
    Measures("mine", "old", "new", rows, about).save(folder)
    plain = Attempt("plain", "as they are", SHARE, SHARE)
    ways = {"steps": 5, "score": "share", "change_digest": attacked}
    Attack("old", SHARE, SHARE, SHARE, (plain,), ways).save(folder)
    return folder


def test_each_part_of_the_page_has_its_own_protocol(comparison, tmp_path):
    page = report.write(filled(tmp_path, comparison, measured="a" * 64, attacked="a" * 64))
    words = json.loads(page.with_suffix(".json").read_text())
    found = words["protocol"]
    assert found["Measured on mine"] == {"Steps": 3, "Change digest": "a" * 64}
    assert (found["Ways back"]["Steps"], found["What the edit did"]["Judge"]) == (5, "eyes")
    assert page.read_text().count("<dt>Steps</dt>") == 2
    assert words["warning"] == ""
    assert 'class="warning"' not in page.read_text()


def test_results_of_different_changes_carry_a_warning(comparison, tmp_path):
    page = report.write(filled(tmp_path, comparison, measured="a" * 64, attacked="b" * 64))
    said = f"Measured on mine of {'a' * 12}, Ways back of {'b' * 12}"
    assert said in page.read_text()
    assert said in json.loads(page.with_suffix(".json").read_text())["warning"]


@pytest.mark.parametrize("name", ["measures.html", "measures.json", "comparison.htm", "run.html"])
def test_a_page_in_the_place_of_a_result_is_refused(comparison, tmp_path, name):
    folder = filled(tmp_path, comparison, measured="a", attacked="a")
    (folder / "run.json").write_text("{}")
    kept = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=r"would overwrite the result .*: give it another name"):
        report.write(folder, out=folder / name)
    with pytest.raises(ValueError, match=r"would overwrite the result .*gallery.safetensors"):
        report.write(folder, out=folder / "gallery.safetensors")
    with pytest.raises(ValueError, match=r"where its own figures go: end its name in .html"):
        report.write(folder, out=folder / "page.json")
    assert {path: path.read_bytes() for path in folder.iterdir()} == kept

"""Every benchmark in its quick form, as on a fresh clone: it ends with one line of JSON and changes no full result."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SCRIPTS = sorted(p.stem for kind in ("speed", "quality") for p in BENCHMARKS.glob(f"{kind}_*.py"))
# They fetch pictures from Debian's packages, or fonts by npm; without a network they are skipped.
DOWNLOADING = {"quality_match", "quality_diffgrad_recipe", "quality_scene_text"}
WAITING = {"quality_scene_text.json"}  # no result until its model is trained
NO_NETWORK = ("could not fetch", "is not installed")


def digests():
    """Return the SHA-256 of each full result."""
    paths = sorted((BENCHMARKS / "results").glob("*.json"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def refuse(constant):
    raise ValueError(f"{constant} is not JSON")


def last_line(text):
    """Return the last line of a benchmark's output as JSON; NaN and infinities raise."""
    return json.loads(text.splitlines()[-1], parse_constant=refuse)


def test_nan_is_no_json():
    with pytest.raises(ValueError, match="NaN is not JSON"):
        last_line('a table\n{"figure": NaN}\n')


def test_every_benchmark_has_a_full_result():
    tuned = {"quality_edit_tuning.json"}  # the settings that `quality_edit --tune` chose
    assert set(digests()) - tuned | WAITING == {f"{name}.json" for name in SCRIPTS}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_the_quick_form_runs_in_an_empty_folder_and_ends_with_json(name, tmp_path):
    before = digests()
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--quick", "--json"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    if name in DOWNLOADING and done.returncode and any(t in done.stderr for t in NO_NETWORK):
        pytest.skip(f"no network: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr[-3000:]
    figures = last_line(done.stdout)
    assert isinstance(figures, dict) and figures
    stored = tmp_path / "runs" / "benchmarks" / f"{name}.json"
    json.loads(stored.read_text(), parse_constant=refuse)
    assert digests() == before

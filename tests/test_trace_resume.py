"""Resumable sweeps: killed, doubled, damaged, changed and out of room."""

import contextlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from overpaint.trace import resume
from overpaint.trace.effects import SCHEMA, Effects

UNITS = [f"probe {n}/seed 0" for n in range(12)]
PROTOCOL = {"steps": 3, "scorer": "eyes", "seeds": (0, 1)}


def compute(unit):
    """Two rows whose numbers need every bit of a float64."""
    number = random.Random(unit).gauss(0, 1) / 3
    return [
        {"site": f"text.{n}.mlp", "index": n, "probe": unit, "indirect_effect": number * (n + 1)}
        for n in range(2)
    ]


def counted(seen):
    def run(unit):
        seen.append(unit)
        return compute(unit)

    return run


# Forks one process a command, so that the package is imported once: "sweep" takes its time at each unit, "full" may
# write no more than 2000 bytes a file from the third unit on.
NURSERY = """
import os, resource, sys, time
sys.path.insert(0, {tests!r})
from test_trace_shards import PROTOCOL, UNITS, compute
from overpaint.trace import shards

def slow(unit):
    print("unit", flush=True)
    time.sleep(pause)
    return compute(unit)

def full(unit):
    if unit == UNITS[2]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    return compute(unit)

print("ready", flush=True)
for line in sys.stdin:
    name, folder, pause = line.rstrip("\\n").split("\\t")
    pause = float(pause)
    child = os.fork()
    if not child:
        print(os.getpid(), flush=True)
        try:
            shards.sweep(folder, PROTOCOL, UNITS, {{"sweep": slow, "full": full}}[name])
        except OSError as error:
            print(error, flush=True)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    print("end", os.waitstatus_to_exitcode(status), flush=True)
"""


class Nursery:
    def __init__(self):
        program = NURSERY.format(tests=os.path.dirname(__file__))
        self.process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.line() == "ready"

    def line(self):
        return self.process.stdout.readline().rstrip("\n")

    def start(self, name, folder, pause):
        """Begin a sweep and return its process's number."""
        self.process.stdin.write(f"{name}\t{folder}\t{pause}\n")
        self.process.stdin.flush()
        return int(self.line())

    def finish(self):
        """Return what it said, and its exit status."""
        said = []
        while not (line := self.line()).startswith("end "):
            said.append(line)
        return said, int(line.removeprefix("end "))


@pytest.fixture(scope="module")
def nursery():
    found = Nursery()
    with found.process as process:
        yield found
        process.stdin.close()


def test_without_a_folder_each_unit_is_computed_in_order():
    seen = []
    rows = resume.sweep(None, PROTOCOL, UNITS, counted(seen))
    assert seen == UNITS
    assert [row["probe"] for row in rows] == [unit for unit in UNITS for _ in range(2)]
    assert all(list(row) == SCHEMA.names for row in rows)
    assert rows[0]["indirect_effect"] == compute(UNITS[0])[0]["indirect_effect"]
    assert rows[0]["window"] is None


def test_with_a_folder_the_rows_are_the_same_and_are_computed_once(tmp_path):
    seen = []
    plain = resume.sweep(None, PROTOCOL, UNITS, compute)
    assert resume.sweep(tmp_path, PROTOCOL, UNITS, counted(seen)) == plain
    assert resume.sweep(tmp_path, PROTOCOL, UNITS, counted(seen)) == plain
    assert seen == UNITS
    assert not list(tmp_path.glob("*.part"))
    assert {p.suffix for p in tmp_path.iterdir() if p.name != "lock"} == {".parquet", ".json"}


def test_not_a_number_survives(tmp_path):
    rows = [{"site": "s", "indirect_effect": math.nan, "recovery": None}]
    for _ in range(2):
        (row,) = resume.sweep(tmp_path, {}, ["u"], lambda _: rows)
        assert math.isnan(row["indirect_effect"])
        assert row["recovery"] is None


def test_killed_ten_times_at_random_moments_it_ends_in_the_same_table(tmp_path, nursery):
    plain = resume.sweep(None, PROTOCOL, UNITS, compute)
    draw = random.Random(7)
    for _ in range(10):
        shown = list(tmp_path.glob("*.parquet"))
        if len(shown) > 8:  # leave the next ones something to do
            for path in shown[::2]:
                path.unlink()
        process = nursery.start("sweep", tmp_path, pause=0.05)
        for _ in range(draw.randint(1, 3)):  # at least four units are left, so it is at work
            assert nursery.line() == "unit"
        time.sleep(draw.uniform(0, 0.06))
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        nursery.finish()
    assert resume.sweep(tmp_path, PROTOCOL, UNITS, compute) == plain
    assert Effects.of(plain, {}).table.equals(resume.read(tmp_path).table)


def test_killed_between_two_units_it_goes_on_where_it_was(tmp_path):
    """The same law without processes: the third unit never returns."""

    class Killed(BaseException):
        pass

    def dies(unit):
        if unit == UNITS[3]:
            raise Killed
        return compute(unit)

    with pytest.raises(Killed):
        resume.sweep(tmp_path, PROTOCOL, UNITS, dies)
    (tmp_path / "half.parquet.part").write_bytes(b"PAR1")
    seen = []
    rows = resume.sweep(tmp_path, PROTOCOL, UNITS, counted(seen))
    assert seen == UNITS[3:]
    assert rows == resume.sweep(None, PROTOCOL, UNITS, compute)
    assert not (tmp_path / "half.parquet.part").exists()


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path, nursery):
    process = nursery.start("sweep", tmp_path, pause=60)
    assert nursery.line() == "unit"
    with pytest.raises(BlockingIOError, match="another process is tracing into .*: wait for"):
        resume.sweep(tmp_path, PROTOCOL, UNITS, compute)
    assert len(resume.read(tmp_path)) == 0
    os.kill(process, signal.SIGKILL)
    assert nursery.finish() == ([], -signal.SIGKILL)
    assert len(resume.sweep(tmp_path, PROTOCOL, UNITS, compute)) == 2 * len(UNITS)


@pytest.mark.parametrize(
    ("other", "field"),
    [
        ({"steps": 3, "scorer": "ears", "seeds": (0, 1)}, "'scorer': 'eyes' there, 'ears' now"),
        ({"steps": 3, "scorer": "eyes"}, r"'seeds': \[0, 1\] there, nothing now"),
        ({**PROTOCOL, "noise": None}, "'noise': nothing there, None now"),
    ],
)
def test_another_protocol_is_refused_with_the_first_field_that_differs(tmp_path, other, field):
    resume.sweep(tmp_path, PROTOCOL, UNITS[:2], compute)
    with pytest.raises(ValueError, match=f"protocol differs in {field}. Repeat the settings"):
        resume.sweep(tmp_path, other, UNITS[:2], compute)
    with pytest.raises(ValueError, match="protocol differs in 'units'"):
        resume.sweep(tmp_path, PROTOCOL, UNITS, compute)
    assert len(resume.sweep(tmp_path, PROTOCOL, UNITS[:2], compute)) == 4


def test_damaged_and_foreign_shards_are_computed_again(tmp_path):
    plain = resume.sweep(tmp_path, PROTOCOL, UNITS, compute)
    first, second, third, fourth, *_ = (resume._path(tmp_path, unit) for unit in UNITS)
    first.write_bytes(b"")
    second.write_bytes(second.read_bytes()[:-40])
    third.write_bytes(fourth.read_bytes())  # sound, but another unit's
    fourth.unlink()
    seen = []
    assert len(resume.read(tmp_path)) == 2 * (len(UNITS) - 4)
    assert resume.sweep(tmp_path, PROTOCOL, UNITS, counted(seen)) == plain
    assert seen == UNITS[:4]


def test_one_flipped_bit_anywhere_never_changes_the_rows(tmp_path):
    plain = resume.sweep(tmp_path, PROTOCOL, UNITS[:1], compute)
    path = resume._path(tmp_path, UNITS[0])
    sound = path.read_bytes()
    draw, noticed = random.Random(0), 0
    for _ in range(60):
        damaged = bytearray(sound)
        damaged[draw.randrange(len(sound))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        seen = []
        assert resume.sweep(tmp_path, PROTOCOL, UNITS[:1], counted(seen)) == plain
        noticed += len(seen)
    assert noticed > 10


def test_shards_without_their_protocol_are_not_believed(tmp_path):
    resume.sweep(tmp_path, {"steps": 99}, UNITS[:2], compute)
    (tmp_path / "protocol.json").unlink()
    seen = []
    resume.sweep(tmp_path, PROTOCOL, UNITS[:2], counted(seen))
    assert seen == UNITS[:2]


def test_a_full_disk_is_said_in_one_line_and_finished_shards_stay(tmp_path, nursery):
    nursery.start("full", tmp_path, pause=0)
    (said,), status = nursery.finish()
    assert status == 0
    assert said.startswith(f"cannot write the shard of 'probe 2/seed 0' into '{tmp_path}'")
    assert "(File too large): make room and run the same again" in said
    assert not list(tmp_path.glob("*.part"))
    kept = resume.read(tmp_path)
    assert kept.table["probe"].to_pylist() == [UNITS[0]] * 2 + [UNITS[1]] * 2
    assert kept.protocol == json.loads(json.dumps(PROTOCOL))
    seen = []
    rows = resume.sweep(tmp_path, PROTOCOL, UNITS, counted(seen))
    assert seen == UNITS[2:]
    assert rows == resume.sweep(None, PROTOCOL, UNITS, compute)


def test_units_named_twice_and_folders_without_a_sweep_are_refused(tmp_path):
    with pytest.raises(ValueError, match="unit 'a' is named twice: give each"):
        resume.sweep(None, {}, ["a", "b", "a"], compute)
    with pytest.raises(FileNotFoundError, match="no sweep in .*: name the folder of a trace"):
        resume.read(tmp_path)
    (tmp_path / "protocol.json").write_text("{")
    with pytest.raises(ValueError, match=r"protocol.json' is damaged: it is no protocol"):
        resume.read(tmp_path)


def test_units_that_look_alike_have_shards_of_their_own(tmp_path):
    rows = resume.sweep(tmp_path, {}, ["a/b", "a:b", "a b"], lambda u: [{"probe": u}])
    assert [row["probe"] for row in rows] == ["a/b", "a:b", "a b"]
    assert len(list(tmp_path.glob("a_b-*.parquet"))) == 3

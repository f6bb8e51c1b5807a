"""Resumable sweeps: killed processes, two processes, damaged shards, other protocols and a full disk."""

import contextlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest

from overpaint.trace import resume
from overpaint.trace.effects import Effects
from overpaint.trace.states import SCHEMA

UNITS = [f"probe {n}/seed 0" for n in range(12)]
PROTOCOL = {"steps": 3, "scorer": "first", "seeds": (0, 1)}


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


# Forks one process a command, so that the package is imported once. "sweep" prints a line at each unit and then sleeps;
# "full" may write no more than 2000 bytes a file from the third unit on. The server ends when its input is closed.
SERVER = """
import os, resource, sys, time
sys.path.insert(0, {tests!r})
from test_trace_resume import PROTOCOL, UNITS, compute
from overpaint.trace import resume

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
            resume.sweep(folder, PROTOCOL, UNITS, {{"sweep": slow, "full": full}}[name])
        except OSError as error:
            print(error, flush=True)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    print("end", os.waitstatus_to_exitcode(status), flush=True)
"""


class ForkServer:
    """A process that forks one sweep after another; as a context manager it leaves no process behind."""

    def __init__(self):
        program = SERVER.format(tests=os.path.dirname(__file__))
        self.process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.child = 0

    def __enter__(self):
        assert self.line() == "ready"
        return self

    def __exit__(self, *_):
        if self.child:  # a test failed before it called `finish`
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.child, signal.SIGKILL)
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()

    def line(self):
        return self.process.stdout.readline().rstrip("\n")

    def start(self, name, folder, pause):
        """Begin a sweep and return its process's number."""
        self.process.stdin.write(f"{name}\t{folder}\t{pause}\n")
        self.process.stdin.flush()
        self.child = int(self.line())
        return self.child

    def finish(self):
        """Return the lines that it printed, and its exit status."""
        lines = []
        while not (line := self.line()).startswith("end "):
            assert self.process.poll() is None
            lines.append(line)
        self.child = 0
        return lines, int(line.removeprefix("end "))


@pytest.fixture(scope="module")
def server():
    with ForkServer() as server:
        yield server


def test_without_a_folder_each_unit_is_computed_in_order():
    seen = []
    rows = resume.sweep(None, PROTOCOL, UNITS, counted(seen))
    assert seen == UNITS
    assert [row["probe"] for row in rows] == [unit for unit in UNITS for _ in range(2)]
    assert all(list(row) == SCHEMA.names for row in rows)
    assert rows[0]["indirect_effect"] == compute(UNITS[0])[0]["indirect_effect"]
    assert rows[0]["window"] is None


def test_with_a_folder_the_rows_are_equal_and_each_is_computed_once(tmp_path):
    seen = []
    plain = resume.sweep(None, PROTOCOL, UNITS, compute)
    assert resume.sweep(tmp_path, PROTOCOL, UNITS, counted(seen)) == plain
    assert resume.sweep(tmp_path, PROTOCOL, UNITS, counted(seen)) == plain
    assert seen == UNITS
    assert not list(tmp_path.glob("*.part"))
    assert {p.suffix for p in tmp_path.iterdir() if p.name != "lock"} == {".parquet", ".json"}


def test_nan_and_none_are_restored(tmp_path):
    rows = [{"site": "s", "indirect_effect": math.nan, "recovery": None}]
    for _ in range(2):
        (row,) = resume.sweep(tmp_path, {}, ["u"], lambda _: rows)
        assert math.isnan(row["indirect_effect"])
        assert row["recovery"] is None


def test_a_sweep_killed_ten_times_at_random_moments_ends_in_the_same_table(tmp_path, server):
    plain = resume.sweep(None, PROTOCOL, UNITS, compute)
    draw = random.Random(7)
    for _ in range(10):
        shards = list(tmp_path.glob("*.parquet"))
        if len(shards) > 8:  # so that units are left for the next process
            for path in shards[::2]:
                path.unlink()
        process = server.start("sweep", tmp_path, pause=0.02)
        for _ in range(draw.randint(1, 3)):  # at least four units are left, so it is still running
            assert server.line() == "unit"
        time.sleep(draw.uniform(0, 0.03))
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        server.finish()
    assert resume.sweep(tmp_path, PROTOCOL, UNITS, compute) == plain
    assert Effects.of(plain, {}).table.equals(resume.read(tmp_path).table)


def test_a_sweep_that_stopped_between_two_units_continues_there(tmp_path):
    """As above without processes: the computation of the fourth unit raises."""

    def stop(unit):
        if unit == UNITS[3]:
            raise KeyboardInterrupt
        return compute(unit)

    with pytest.raises(KeyboardInterrupt):
        resume.sweep(tmp_path, PROTOCOL, UNITS, stop)
    drafts = [
        tmp_path / name for name in ("half.parquet.part", f".half.parquet.{os.getpid()}.part")
    ]
    for draft in drafts:
        draft.write_bytes(b"PAR1")
    seen = []
    rows = resume.sweep(tmp_path, PROTOCOL, UNITS, counted(seen))
    assert seen == UNITS[3:]
    assert rows == resume.sweep(None, PROTOCOL, UNITS, compute)
    assert not any(draft.exists() for draft in drafts)


def test_a_second_process_is_refused_until_the_first_ends(tmp_path, server):
    process = server.start("sweep", tmp_path, pause=60)
    assert server.line() == "unit"
    with pytest.raises(BlockingIOError, match="another process is tracing into .*: wait for"):
        resume.sweep(tmp_path, PROTOCOL, UNITS, compute)
    assert len(resume.read(tmp_path)) == 0
    os.kill(process, signal.SIGKILL)
    assert server.finish() == ([], -signal.SIGKILL)
    assert len(resume.sweep(tmp_path, PROTOCOL, UNITS, compute)) == 2 * len(UNITS)


@pytest.mark.parametrize(
    ("other", "field"),
    [
        (
            {"steps": 3, "scorer": "second", "seeds": (0, 1)},
            "'scorer': 'first' there, 'second' now",
        ),
        ({"steps": 3, "scorer": "first"}, r"'seeds': \[0, 1\] there, nothing now"),
        ({**PROTOCOL, "noise": None}, "'noise': nothing there, None now"),
    ],
)
def test_another_protocol_is_refused_with_the_first_field_that_differs(tmp_path, other, field):
    resume.sweep(tmp_path, PROTOCOL, UNITS[:2], compute)
    with pytest.raises(ValueError, match=f"protocol differs in {field}. Use the settings"):
        resume.sweep(tmp_path, other, UNITS[:2], compute)
    with pytest.raises(ValueError, match="protocol differs in 'units'"):
        resume.sweep(tmp_path, PROTOCOL, UNITS, compute)
    assert len(resume.sweep(tmp_path, PROTOCOL, UNITS[:2], compute)) == 4


def test_damaged_shards_and_those_of_other_units_are_computed_again(tmp_path):
    plain = resume.sweep(tmp_path, PROTOCOL, UNITS, compute)
    first, second, third, fourth, *_ = (resume._path(tmp_path, unit) for unit in UNITS)
    first.write_bytes(b"")
    second.write_bytes(second.read_bytes()[:-40])
    third.write_bytes(fourth.read_bytes())  # valid, but another unit's
    fourth.unlink()
    seen = []
    assert len(resume.read(tmp_path)) == 2 * (len(UNITS) - 4)
    assert resume.sweep(tmp_path, PROTOCOL, UNITS, counted(seen)) == plain
    assert seen == UNITS[:4]


def test_one_flipped_bit_anywhere_never_changes_the_rows(tmp_path):
    plain = resume.sweep(tmp_path, PROTOCOL, UNITS[:1], compute)
    path = resume._path(tmp_path, UNITS[0])
    valid = path.read_bytes()
    draw, detected = random.Random(0), 0
    for _ in range(60):
        damaged = bytearray(valid)
        damaged[draw.randrange(len(valid))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        seen = []
        assert resume.sweep(tmp_path, PROTOCOL, UNITS[:1], counted(seen)) == plain
        detected += len(seen)
    assert detected > 10


def test_shards_of_another_protocol_are_computed_again(tmp_path):
    resume.sweep(tmp_path, {"steps": 99}, UNITS[:2], compute)
    (tmp_path / "protocol.json").unlink()
    seen = []
    resume.sweep(tmp_path, PROTOCOL, UNITS[:2], counted(seen))
    assert seen == UNITS[:2]


def test_a_full_disk_raises_a_message_of_one_line_and_finished_shards_stay(tmp_path, server):
    server.start("full", tmp_path, pause=0)
    (message,), status = server.finish()
    assert status == 0
    assert message.startswith(f"cannot write the shard of 'probe 2/seed 0' into '{tmp_path}'")
    assert "(File too large): free some space and run the same command again" in message
    assert not list(tmp_path.glob("*.part"))
    finished = resume.read(tmp_path)
    assert finished.table["probe"].to_pylist() == [UNITS[0]] * 2 + [UNITS[1]] * 2
    assert finished.protocol == json.loads(json.dumps(PROTOCOL))
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
    with pytest.raises(ValueError, match=r"protocol.json' is damaged: it is not the protocol"):
        resume.read(tmp_path)


def test_units_with_similar_names_have_separate_shards(tmp_path):
    rows = resume.sweep(tmp_path, {}, ["a/b", "a:b", "a b"], lambda u: [{"probe": u}])
    assert [row["probe"] for row in rows] == ["a/b", "a:b", "a b"]
    assert len(list(tmp_path.glob("a_b-*.parquet"))) == 3


def test_a_shard_of_an_earlier_version_without_a_column_is_read(tmp_path):
    resume.sweep(tmp_path, PROTOCOL, UNITS[:1], compute)
    path = resume._path(tmp_path, UNITS[0])
    protocol = json.loads((tmp_path / "protocol.json").read_text())
    table = pq.read_table(path).drop_columns(["direct_effect"])
    digest = resume._digest(protocol, UNITS[0], table.to_pylist())
    pq.write_table(table.replace_schema_metadata({b"overpaint": digest}), path)
    seen = []
    rows = resume.sweep(tmp_path, PROTOCOL, UNITS[:1], counted(seen))
    assert seen == []
    assert rows == resume.sweep(None, PROTOCOL, UNITS[:1], compute)

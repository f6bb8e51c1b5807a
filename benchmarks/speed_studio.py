"""Can fifty people use one studio at once, each as if alone, and what do they leave behind?

    python benchmarks/speed_studio.py [--quick] [--json]

The studio serves `icons` at an address of its own, and each visitor speaks to it as the page does, over HTTP: an edit
of a concept of the visitor's own, by `quickfix`, and a picture before and after it, on a page that stays open (its
heartbeat) until all are done and is then closed. All begin at once. The picture that each is shown is compared, bit for
bit, with the same edit made alone on another copy of the model, in place.

They come twice, under new names: a first time of `sessions` visitors, and a second. What a process grows to once
(threads, modules that are read when first needed, the allocator's pools) it has after the first; what a visitor leaves
behind comes again with every visitor. So what counts is the second time over the first: no session, no page that the
framework knows (`kept_pages`), and at most 2 MiB more in use (`heap_left_mb`; threads that wait in a pool make it move
by that, and the values of fifty closed pages alone, were they kept, 7). Resident memory is that and holes: what is
freed leaves pages half used, so that `memory_left_mb` moves by some ten megabytes from run to run.

cross_talk     pictures that differ from those made alone, of twice `sessions`
crashed        visitors without a picture
heap_left_mb   bytes that the allocator has lent out after the second time, less those after the first, all pages
               closed both times
memory_left_mb the same of resident memory
memory_once_mb resident memory after the first time, less that after one visitor alone
kept_pages     pages whose values the framework holds after all were closed
seconds        for the second time; `alone_seconds` for the same edits and pictures one after another without the studio

`--quick` takes 8 visitors. Writes `benchmarks/results/speed_studio.json`; with `--quick`, into `runs/benchmarks`.
"""

import argparse
import base64
import ctypes
import gc
import io
import json
import os
import platform
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from gradio.state_holder import StateHolder
from PIL import Image

import overpaint as op
from overpaint.edit.vocabulary import concepts
from overpaint.studio.app import Studio
from overpaint.studio.server import open_studio
from overpaint.train import card

RESULTS = Path(__file__).parent / "results"
STEPS = 2


def asked(count: int) -> list[tuple[str, str, int]]:
    """Return prompt, concept and seed of each visitor: no two alike."""
    known = [c for c in concepts("icons") if c.isascii() and c != "noto style"]
    return [
        (f"a drawing of {known[i % len(known)]}", known[i % len(known)], i) for i in range(count)
    ]


def alone(visits: list[tuple[str, str, int]]) -> list[tuple[bytes, bytes]]:
    """Return the pixels before and after each edit, made one after another by weights moved in place."""
    model, found = op.load("icons"), []
    for prompt, concept, seed in visits:
        before = model.generate(prompt, seed=seed, steps=STEPS).pil()[0].tobytes()
        with op.edit.quickfix(model, {concept: "noto style"}).applied(model):
            found.append(
                (before, model.generate(prompt, seed=seed, steps=STEPS).pil()[0].tobytes())
            )
    return found


class Visitor:
    """Speaks to the studio as its page does."""

    def __init__(self, address: str, config: dict[str, Any], name: str) -> None:
        self.address, self.name = f"{address}gradio_api/", name
        (button,) = (
            c["id"] for c in config["components"] if c["props"].get("value") == "Paint over"
        )
        call = next(d for d in config["dependencies"] if [button, "click"] in d["targets"])
        shown = next(
            c["id"] for c in config["components"] if c["props"].get("elem_id") == "op-drawn"
        )
        self.load = next(
            d["id"] for d in config["dependencies"] if any(t[1] == "load" for t in d["targets"])
        )
        self.call, self.place = call["id"], call["outputs"].index(shown)

    @contextmanager
    def page(self) -> Iterator[None]:
        """Keep a page open inside the block; leaving it is what closing the page is."""
        with (
            httpx.Client(base_url=self.address, timeout=600, trust_env=False) as http,
            http.stream("GET", f"heartbeat/{self.name}") as beats,
        ):
            heard = beats.iter_raw()  # held, for a forgotten iterator closes its stream
            next(heard)
            yield

    def paint(self, prompt: str, concept: str, seed: int) -> list[bytes]:
        """Paint over a concept; return the pixels of all pictures shown at the end."""
        data = [prompt, concept, seed, 1, STEPS, "noto style", "quickfix", ""]
        with httpx.Client(base_url=self.address, timeout=600, trust_env=False) as http:
            self.ask(http, self.load, [])
            return pictures(self.ask(http, self.call, data))

    def ask(self, http: httpx.Client, call: int, data: list[Any]) -> str:
        """Make a call and return what it put in the place of the pictures."""
        body = {"data": data, "fn_index": call, "session_hash": self.name}
        http.post("queue/join", json=body).raise_for_status()
        page = ""
        with http.stream("GET", "queue/data", params={"session_hash": self.name}) as lines:
            for line in lines.iter_lines():
                told = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
                output = (told.get("output") or {}).get("data") or []
                if told.get("msg") == "process_generating" and len(output) > self.place:
                    page = patched(page, output[self.place])
                if told.get("msg") == "process_completed":
                    assert told["success"], told
                    break
        return page


def patched(page: str, value: Any) -> str:
    """Return the page's text after an update: whole, or edits of it (`replace`, `append`), or none."""
    if isinstance(value, str):
        return value
    for edit in value if isinstance(value, list) else []:
        action, path, new = edit
        if not path and action in ("replace", "add"):
            page = new if isinstance(new, str) else page
        elif not path and action == "append":
            page += new
    return page


def pictures(page: str) -> list[bytes]:
    """Return the pixels of the pictures in a part of the page."""
    codes = re.findall(r"data:image/png;base64,([\w+/=]+)", page)
    return [Image.open(io.BytesIO(base64.b64decode(c))).convert("RGB").tobytes() for c in codes]


def together(
    studio: Studio, address: str, visits: list[tuple[str, str, int]], label: str
) -> "Round":
    """Let all visitors in at once, wait until each has seen its pictures, and let all go."""
    config = httpx.get(f"{address}config", trust_env=False).json()
    shown: list[Any] = [None] * len(visits)
    seen = threading.Barrier(len(visits) + 1)
    leave = threading.Event()

    def visit(i: int) -> None:
        visitor = Visitor(address, config, f"{label}{i}")
        with ExitStack() as open_page:
            try:
                open_page.enter_context(visitor.page())
                shown[i] = tuple(visitor.paint(*visits[i]))
            except Exception as error:  # counted, and told
                shown[i] = repr(error)
            seen.wait()
            leave.wait()

    threads = [threading.Thread(target=visit, args=(i,)) for i in range(len(visits))]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    seen.wait()
    seconds, open_sessions, memory_open = time.perf_counter() - began, len(studio), resident()
    leave.set()
    for thread in threads:
        thread.join()
    patience = time.monotonic() + 30
    while len(studio) and time.monotonic() < patience:  # it hears of closed pages one by one
        time.sleep(0.1)
    return Round(shown, seconds, open_sessions, memory_open, len(studio), resident(), heap())


@dataclass(frozen=True)
class Round:
    """What visitors who came together were shown, and what they left: sessions, and memory in MiB."""

    shown: list[Any]
    seconds: float
    open_sessions: int
    memory_open: float
    left_sessions: int
    memory_left: float
    heap_left: float


def resident() -> float:
    """Return the process's resident memory in MiB, after what is free was given back."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return psutil.Process().memory_info().rss / 2**20


class _Malloc(ctypes.Structure):
    """What glibc says of its heap: `struct mallinfo2`."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks",
                     "keepcost")
    ]  # fmt: skip


def heap() -> float:
    """Return the MiB that the allocator has lent out, of its pools and as pages of their own."""
    told = ctypes.CDLL("libc.so.6").mallinfo2
    told.restype = _Malloc
    found = told()
    return (found.uordblks + found.hblkhd) / 2**20


def measure(count: int) -> dict[str, float]:
    """Return all figures."""
    visits = asked(count)
    began = time.perf_counter()
    expected = alone(visits)
    alone_seconds = time.perf_counter() - began
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with open_studio(["icons"], port=port) as (studio, address):
        start = together(studio, address, visits[:1], "first of all")
        first = together(studio, address, visits, "first")
        second = together(studio, address, visits, "second")
        kept = sum(len(h.session_data) for h in gc.get_objects() if type(h) is StateHolder)
    shown = [*first.shown, *second.shown]
    crashed = [s for s in shown if not isinstance(s, tuple) or len(s) != 2]
    for fault in crashed[:3]:
        print("crashed:", str(fault)[:300])
    return {
        "sessions": count, "open_sessions": second.open_sessions, "crashed": len(crashed),
        "cross_talk": sum(isinstance(s, tuple) and s != e for s, e in zip(shown, [*expected, *expected], strict=True)),
        "distinct_pictures": len({e[1] for e in expected}),
        "left_sessions": first.left_sessions + second.left_sessions, "kept_pages": kept,
        "memory_before_mb": first.memory_left, "memory_open_mb": second.memory_open,
        "memory_once_mb": first.memory_left - start.memory_left,
        "heap_left_mb": second.heap_left - first.heap_left,
        "memory_left_mb": second.memory_left - first.memory_left,
        "seconds": second.seconds, "alone_seconds": alone_seconds, "ratio": second.seconds / alone_seconds,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    options = parser.parse_args()
    figures = measure(8 if options.quick else 50)
    for name, value in figures.items():
        print(f"{name:<20}{value:10.2f}")
    folder = Path("runs/benchmarks") if options.quick else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "commit": card.commit(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "load": round(
            os.getloadavg()[1], 1
        ),  # processes of all that wait for a core, over five minutes
        "steps": STEPS,
        "versions": {"torch": torch.__version__},
    }
    record = {**figures, "protocol": about}
    (folder / "speed_studio.json").write_text(json.dumps(record, indent=1) + "\n")
    if options.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()

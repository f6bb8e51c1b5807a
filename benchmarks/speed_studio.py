"""Can fifty users use one studio at once without mixed-up pictures, and how much memory do they leave behind?

    python benchmarks/speed_studio.py [--quick] [--json]

The studio serves `icons`, and each visitor sends the same HTTP requests as the page: an edit of one concept, different
for each visitor, by `quickfix`, and a picture before and after it. The visitor's page stays open (its heartbeat) until
all visitors are done and is then closed. All start at once. The pictures of each visitor are compared, bit for bit,
with those of the same edit made alone in place on another copy of the model.

There are two rounds with `sessions` visitors each. Some memory is allocated once per process, in the first round:
threads, modules that are imported at their first use, the allocator's pools. Memory that a visitor leaks grows with
every visitor. The measure is therefore the second round minus the first: no session, no page stored by Gradio
(`kept_pages`), and at most 2 MiB more in use (`heap_left_mb`; idle threads change it by that much, and the values of
fifty closed pages, if they were kept, by 7). Resident memory also counts holes in half-used memory pages, so
`memory_left_mb` varies by some ten megabytes from run to run.

cross_talk     pictures that differ from those made alone, of twice `sessions`
crashed        visitors without a picture
heap_left_mb   MiB that the allocator has given out after the second round, minus those after the first, with all
               pages closed both times
memory_left_mb the same for resident memory
memory_once_mb resident memory after the first round, minus that after one visitor alone
kept_pages     pages whose values Gradio stores after all were closed
seconds        of the second round; `alone_seconds` is the same edits and pictures one after another without the studio

`--quick` uses 8 visitors. Writes `benchmarks/results/speed_studio.json`; with `--quick`, into `runs/benchmarks`.
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
from overpaint import files
from overpaint.edit.vocabulary import concepts
from overpaint.studio.app import Studio
from overpaint.studio.server import open_studio
from overpaint.train import card

RESULTS = Path(__file__).parent / "results"
STEPS = 2


def visits_of(count: int) -> list[tuple[str, str, int]]:
    """Return prompt, concept and seed of each visitor; all are different."""
    names = [c for c in concepts("icons") if c.isascii() and c != "noto style"]
    return [
        (f"a drawing of {names[i % len(names)]}", names[i % len(names)], i) for i in range(count)
    ]


def alone(visits: list[tuple[str, str, int]]) -> list[tuple[bytes, bytes]]:
    """Return the pixels before and after each edit, made one after another in place."""
    model, pixels = op.load("icons"), []
    for prompt, concept, seed in visits:
        before = model.generate(prompt, seed=seed, steps=STEPS).pil()[0].tobytes()
        with op.edit.quickfix(model, {concept: "noto style"}).applied(model):
            pixels.append(
                (before, model.generate(prompt, seed=seed, steps=STEPS).pil()[0].tobytes())
            )
    return pixels


class Visitor:
    """Sends the same requests to the studio as its page."""

    def __init__(self, address: str, config: dict[str, Any], name: str) -> None:
        self.address, self.name = f"{address}gradio_api/", name
        (button,) = (
            c["id"] for c in config["components"] if c["props"].get("value") == "Apply edit"
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
        """Keep a page open inside the block; its end closes the page."""
        with (
            httpx.Client(base_url=self.address, timeout=600, trust_env=False) as http,
            http.stream("GET", f"heartbeat/{self.name}") as beats,
        ):
            chunks = beats.iter_raw()  # a variable, because a deleted iterator closes its stream
            next(chunks)
            yield

    def edit(self, prompt: str, concept: str, seed: int) -> list[bytes]:
        """Edit a concept; return the pixels of all pictures shown at the end."""
        data = [prompt, concept, seed, 1, STEPS, "noto style", "quickfix", ""]
        with httpx.Client(base_url=self.address, timeout=600, trust_env=False) as http:
            self.request(http, self.load, [])
            return pictures(self.request(http, self.call, data))

    def request(self, http: httpx.Client, call: int, data: list[Any]) -> str:
        """Call a function of the page and return the HTML of its pictures."""
        body = {"data": data, "fn_index": call, "session_hash": self.name}
        http.post("queue/join", json=body).raise_for_status()
        page = ""
        with http.stream("GET", "queue/data", params={"session_hash": self.name}) as lines:
            for line in lines.iter_lines():
                message = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
                output = (message.get("output") or {}).get("data") or []
                if message.get("msg") == "process_generating" and len(output) > self.place:
                    page = patched(page, output[self.place])
                if message.get("msg") == "process_completed":
                    assert message["success"], message
                    break
        return page


def patched(page: str, value: Any) -> str:
    """Return the HTML after an update, which is new HTML, a list of edits (`replace`, `append`), or nothing."""
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
    """Start all visitors at once, wait until each has its pictures, and close all pages."""
    config = httpx.get(f"{address}config", trust_env=False).json()
    shown: list[Any] = [None] * len(visits)
    all_done = threading.Barrier(len(visits) + 1)
    close_pages = threading.Event()

    def visit(i: int) -> None:
        visitor = Visitor(address, config, f"{label}{i}")
        with ExitStack() as open_page:
            try:
                open_page.enter_context(visitor.page())
                shown[i] = tuple(visitor.edit(*visits[i]))
            except Exception as error:  # counted and printed
                shown[i] = repr(error)
            all_done.wait()
            close_pages.wait()

    threads = [threading.Thread(target=visit, args=(i,)) for i in range(len(visits))]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    all_done.wait()
    seconds, open_sessions, memory_open = time.perf_counter() - began, len(studio), resident()
    close_pages.set()
    for thread in threads:
        thread.join()
    deadline = time.monotonic() + 30
    while len(studio) and time.monotonic() < deadline:  # pages are closed one by one
        time.sleep(0.1)
    return Round(shown, seconds, open_sessions, memory_open, len(studio), resident(), heap())


@dataclass(frozen=True)
class Round:
    """The pictures of the visitors of one round, and the sessions and memory (MiB) that remain after it."""

    shown: list[Any]
    seconds: float
    open_sessions: int
    memory_open: float
    left_sessions: int
    memory_left: float
    heap_left: float


def resident() -> float:
    """Return the resident memory of the process in MiB, after free memory was returned to the system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return psutil.Process().memory_info().rss / 2**20


class _Malloc(ctypes.Structure):
    """The statistics of glibc's heap: `struct mallinfo2`."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks",
                     "keepcost")
    ]  # fmt: skip


def heap() -> float:
    """Return the MiB that the allocator has given out, from its pools and as separate mappings."""
    mallinfo = ctypes.CDLL("libc.so.6").mallinfo2
    mallinfo.restype = _Malloc
    info = mallinfo()
    return (info.uordblks + info.hblkhd) / 2**20


def measure(count: int) -> dict[str, float]:
    """Return all figures."""
    visits = visits_of(count)
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
        stored_pages = sum(len(h.session_data) for h in gc.get_objects() if type(h) is StateHolder)
    shown = [*first.shown, *second.shown]
    crashed = [s for s in shown if not isinstance(s, tuple) or len(s) != 2]
    for error in crashed[:3]:
        print("crashed:", str(error)[:300])
    return {
        "sessions": count, "open_sessions": second.open_sessions, "crashed": len(crashed),
        "cross_talk": sum(isinstance(s, tuple) and s != e for s, e in zip(shown, [*expected, *expected], strict=True)),
        "distinct_pictures": len({e[1] for e in expected}),
        "left_sessions": first.left_sessions + second.left_sessions, "kept_pages": stored_pages,
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
    protocol = {
        "commit": card.commit(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "load": round(
            os.getloadavg()[1], 1
        ),  # processes that run or wait for a core, average over five minutes
        "steps": STEPS,
        "versions": {"torch": torch.__version__},
    }
    files.write_json(folder / "speed_studio.json", {**figures, "protocol": protocol})
    if options.json:
        print(files.to_json(figures))


if __name__ == "__main__":
    main()

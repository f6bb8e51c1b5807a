"""Can fifty people use one studio at once, each as if alone, and what do they leave behind?

    python benchmarks/speed_studio.py [--quick] [--json]

The studio serves `icons` at an address of its own, and each visitor speaks to it as the page does, over HTTP: an edit
of a concept of the visitor's own, by `quickfix`, and a picture before and after it. All begin at once. The picture that
each is shown is compared, bit for bit, with the same edit made alone on another copy of the model, in place. Then
all sessions are ended, as closing a page ends its own, and memory is compared with what it was after the warm-up (as
many visitors as there are threads in glibc's pool of arenas, so that what is counted is what visitors leave and not
what the process once grew to). The page's framework keeps what it knows of a visitor until it sees the page go, which
these visitors do not have: that is in the figure.

cross_talk     pictures that differ from those made alone, of `sessions`
crashed        visitors without a picture
memory_left_mb resident memory at the end, less that after the warm-up
seconds        for all; `alone_seconds` for the same edits and pictures one after another without the studio

`--quick` takes 8 visitors. Writes `benchmarks/results/speed_studio.json`; with `--quick`, into `runs/benchmarks`.
"""

import argparse
import base64
import ctypes
import gc
import io
import json
import platform
import re
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from PIL import Image

import overpaint as op
from overpaint.edit.vocabulary import concepts
from overpaint.studio.serve import open_studio
from overpaint.train import card

RESULTS = Path(__file__).parent / "results"
STEPS = 2
WARM = 16


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


def together(address: str, visits: list[tuple[str, str, int]], label: str) -> list[Any]:
    """Let all visitors in at once; return what each was shown, or what went wrong."""
    config = httpx.get(f"{address}config", trust_env=False).json()
    shown: list[Any] = [None] * len(visits)

    def visit(i: int) -> None:
        try:
            shown[i] = tuple(Visitor(address, config, f"{label}{i}").paint(*visits[i]))
        except Exception as error:  # counted, and told
            shown[i] = repr(error)

    threads = [threading.Thread(target=visit, args=(i,)) for i in range(len(visits))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return shown


def resident() -> float:
    """Return the process's resident memory in MiB, after what is free was given back."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return psutil.Process().memory_info().rss / 2**20


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
        together(address, asked(WARM), "warm")
        studio.close_all()
        before = resident()
        began = time.perf_counter()
        shown = together(address, visits, "visitor")
        seconds = time.perf_counter() - began
        open_sessions = len(studio)
        peak = resident()
        studio.close_all()
        after = resident()
    crashed = [s for s in shown if not isinstance(s, tuple) or len(s) != 2]
    for fault in crashed[:3]:
        print("crashed:", str(fault)[:300])
    return {
        "sessions": count, "open_sessions": open_sessions, "crashed": len(crashed),
        "cross_talk": sum(isinstance(s, tuple) and s != e for s, e in zip(shown, expected, strict=True)),
        "distinct_pictures": len({e[1] for e in expected}),
        "memory_before_mb": before, "memory_open_mb": peak, "memory_left_mb": after - before,
        "seconds": seconds, "alone_seconds": alone_seconds, "ratio": seconds / alone_seconds,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
        "steps": STEPS,
        "versions": {"torch": torch.__version__},
    }
    record = {**figures, "protocol": about}
    (folder / "speed_studio.json").write_text(json.dumps(record, indent=1) + "\n")
    if options.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()

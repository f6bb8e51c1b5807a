"""The section of docs/results.md on the writing of words, from `quality_scene_text`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tables import Run, number, origin, percent, table

__all__ = ["lettering"]

_SHARES = (  # parts of the heads of columns of shares
    "words", "present", "obeyed", "nearer", "moves letters", "read", "letters too many", "equal", "top ",
)  # fmt: skip
_NOTES = {
    "words read": "The rate on the true picture is the ceiling of an engine. In the first four sets a word is written "
                  "anew in its own place; insertion writes on a background that never held a word. Tesseract reads the "
                  "letters in black on white.",
    "words read, any case, by length": "By the first engine, over the first four sets.",
    "words read, any case: the model less another method": "Over the five sets, on the same pictures.",
    "words read, any case: differences of splits": "Words of 2 to 8 letters.",
    "three samples": "Every other table has one sample of each line.",
    "controls": "Share of readings that equal another line's word of the same length. The character encoder with no "
                "input is a row of the table of words.",
    "color": "Of the core of the letters; the row of the true picture is the error of the measure.",
    "font, by the classifier": "Top 1 and top 3 among the fonts of training.",
    "style of the second word": "No style is named. A difference above zero, as an interval, shows that the style was "
                                "copied.",
    "zero-shot: variants": "Of families that were trained without the variant; the change is a ratio of stroke widths "
                           "for bold and degrees for italic.",
    "zero-shot: mixes of fonts": "By the classifier's features.",
    "zero-shot: wordings": "Thirty wordings that are in no template of training. The instruction encoder is trained "
                           "from scratch, so that color names that it never saw cannot be read.",
    "background": "PSNR of the region's pixels beside the letters, in dB; the seam is the step across the region's "
                  "border, relative to that of the true picture.",
    "regions": "Regions that are twice as wide as the word, and regions of whole photographs, edited by `rewrite`.",
    "true or written": "A small network that tells true from written lines (0.5: it cannot), and KID on its own "
                       "features; neither compares with published figures.",
}  # fmt: skip


def lettering(run: Run) -> str:
    """Return the section on lettering."""
    if "unfinished" in run:
        return f"## Lettering\n\n{run['unfinished']}\n"
    result, protocol = run["result"], run["protocol"]
    guidance = protocol["guidance"]
    engines = f"figures by {protocol['engine_of_figures']}, ignoring case"
    more = (
        f"{sum(protocol['cases'].values())} lines, one sample each, guidance {guidance['spelling']:g} and "
        f"{guidance['style']:g}, seed {protocol['seed']}; {engines}"
    )
    looks = len(run.get("test", {}).get("looks", []))
    parts = [
        "## Lettering\n\n" + origin("python benchmarks/quality_scene_text.py", protocol, more=more),
        f"Looks at the test list: {looks}. Of words of 2 to 8 letters, the model writes "
        f"{percent(result['word_accuracy_seen'])} of seen and {percent(result['word_accuracy_unseen'])} of unseen "
        f"words in seen fonts so that they are read; the ceiling is {percent(result['ceiling'])}. All pixels outside "
        f"of the region are equal in {percent(result['outside_mask_equal'])}; one edit of 640x480 pixels takes "
        f"{result['seconds_edit']:.1f} s on {protocol['threads']} threads. "
        "[100 random lines](images/lettering_test.png), failures included.",
    ]
    for title, rows in run["tables"].items():
        parts.append(f"{title[:1].upper()}{title[1:]}. {_NOTES.get(title, '')}".strip())
        parts.append(_table(rows))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows of the benchmark as a Markdown table."""
    heads = list(rows[0])
    return table(heads, [[_cell(row[head], head) for head in heads] for row in rows])


def _cell(value: Any, head: str) -> str:
    """Return a value as text: shares as percent, other numbers with their interval, nothing for a missing one."""
    if value in ("", None) or (isinstance(value, Mapping) and value["mean"] is None):
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value}"
    shown: Callable[..., str] = percent if any(part in head for part in _SHARES) else number
    if isinstance(value, Mapping) and value["low"] is None:
        return f"{100 * value['mean']:.0f} %" if shown is percent else f"{value['mean']:.2f}"
    return shown(value)

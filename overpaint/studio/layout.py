"""The page of the studio in Gradio: the layout of its controls and the handler of each. Needs the extra `studio`."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from overpaint.studio import handlers, html
from overpaint.studio.access import visitor_cookie
from overpaint.studio.app import Studio
from overpaint.studio.handlers import Choices, Controls, Update, Value
from overpaint.studio.session import ORIGINAL

__all__ = ["CSS", "SCRIPT", "build", "theme"]

CSS = Path(__file__).with_name("studio.css")
SCRIPT = Path(__file__).with_name("studio.js")
_PROMPT, _CONCEPT, _NEW = "an apple in openmoji style", "openmoji style", "noto style"
_HEAD = """<h1><span class="op-mark" aria-hidden="true"></span>Overpaint studio</h1>
<p>Find where a text-to-image model stores a concept, and edit it.</p>"""
# The server writes the buttons of the map, so one listener on the map handles the clicks of all of them.
_CLICKS = """element.addEventListener('click', event => {
  const cell = event.target.closest('button[data-cell]');
  if (cell) trigger('pick', {cell: cell.dataset.cell});
});"""
# A page sends the key of an upload instead of Gradio's description of a file.
_UPLOAD_KEY = "(...values) => [...values.slice(0, -1), values.at(-1)?.path ?? null]"
# Download is disabled until the file has the strength that the page shows.
_DISABLE = "() => ({__type__: 'update', interactive: false})"
_ENABLE_IF_EQUAL = "(shown, saved) => ({__type__: 'update', interactive: shown === saved})"
_METHODS = [
    ("automatic: chooses the prompts to preserve", "auto"),
    ("quick: Diff-QuickFix as published", "quickfix"),
]
_MEASURES = [("text features (fast)", "text"), ("pictures, scored by the judge (slow)", "pictures")]
Parts = dict[str, Any]


def theme() -> gr.themes.Base:
    """Return the theme: system fonts, so that no font is fetched, one red for actions, and greys."""
    shades = (
        "#fbf0ed", "#f6ddd7", "#ecbcb1", "#e0978a", "#cf6d59", "#b4432f", "#a03a28", "#863022", "#6c271b", "#521d14",
        "#3a140e",
    )  # fmt: skip
    greys = (
        "#f9fafb", "#f5f6f8", "#e8eaee", "#d5d8df", "#a9b0be", "#6b7382", "#565e6d", "#3a404d", "#2a2f3a", "#20242d",
        "#181b22",
    )  # fmt: skip
    hue = gr.themes.Color(*shades, name="overpaint")
    grey = gr.themes.Color(*greys, name="paper")
    look = gr.themes.Base(
        primary_hue=hue, secondary_hue=hue, neutral_hue=grey,
        radius_size=gr.themes.sizes.radius_sm, spacing_size=gr.themes.sizes.spacing_md,
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"],
        font_mono=["ui-monospace", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"],
    )  # fmt: skip
    return look.set(
        body_background_fill="#ffffff", body_background_fill_dark="#181b22",
        block_background_fill="transparent", block_background_fill_dark="transparent",
        block_border_width="0px", block_shadow="none", block_padding="0px",
        block_label_background_fill="transparent", block_label_background_fill_dark="transparent",
        block_title_text_weight="600", block_title_text_size="*text_sm",
        block_title_text_color="#1f2430", block_title_text_color_dark="#e6e8ee",
        block_info_text_color="#565e6d", block_info_text_color_dark="#a9b0be",
        input_background_fill="#ffffff", input_background_fill_dark="#20242d",
        input_border_color="#a9b0be", input_border_color_dark="#565e6d", input_border_width="1px",
        button_primary_background_fill="#b4432f", button_primary_background_fill_hover="#a03a28",
        button_primary_background_fill_dark="#b4432f", button_primary_background_fill_hover_dark="#a03a28",
        button_primary_text_color="#ffffff", button_primary_text_color_dark="#ffffff",
    )  # fmt: skip


def build(studio: Studio, cookie: str) -> gr.Blocks:
    """Return the page; each visitor gets a session of `studio`. `cookie` is the name of the browser's cookie."""
    with gr.Blocks(
        title="Overpaint studio", analytics_enabled=False, delete_cache=(1800, 7200)
    ) as page:
        gr.HTML(_HEAD, elem_id="op-head")
        with gr.Row(elem_id="op-main"):
            with gr.Column(scale=3, min_width=280, elem_id="op-side"):
                parts = _settings(studio) | _applied_edits()
            with gr.Column(scale=8, min_width=320):
                with gr.Row(elem_id="op-bar"):
                    parts["status"] = gr.HTML(elem_id="op-status")
                    parts["stop"] = gr.Button("Stop", size="md", elem_id="op-stop")
                with gr.Tabs():
                    with gr.Tab("Trace"):
                        parts |= _trace_tab()
                    with gr.Tab("Edit"):
                        parts |= _edit_tab()
                    with gr.Tab("Compare"):
                        parts |= _compare_tab()
        _connect(page, parts, studio, cookie)
    return page


def _settings(studio: Studio) -> Parts:
    parts: Parts = {
        "model": gr.Dropdown(list(studio.models), value=studio.models[0], label="Model", interactive=True),
        "prompt": gr.Textbox(_PROMPT, label="Prompt", lines=2, max_lines=4, max_length=handlers.MAX_PROMPT),
        "concept": gr.Textbox(_CONCEPT, label="Concept", max_length=handlers.MAX_CONCEPT,
            info="Words of the prompt to trace or to edit.",
        ),
    }  # fmt: skip
    with gr.Accordion("Drawing settings", open=False):
        parts["pictures"] = gr.Slider(1, 4, value=2, step=1, label="Pictures")
        parts["steps"] = gr.Slider(2, 30, value=8, step=1, label="Steps")
        parts["seed"] = gr.Number(0, label="First seed", precision=0, minimum=0)
    return parts


def _applied_edits() -> Parts:
    gr.HTML("<h2>Applied edits</h2>")
    parts: Parts = {
        "changes": gr.HTML(),
        "strength": gr.Slider(
            -1, 2, value=1, step=0.05, label="Strength", interactive=False, elem_id="op-strength"
        ),
    }
    parts["saved_strength"] = gr.Number(visible="hidden")  # of the file to download
    with gr.Row():
        parts["undo"] = gr.Button("Undo", size="md", min_width=80, interactive=False)
        parts["download"] = gr.DownloadButton(
            "Download", size="md", min_width=80, interactive=False
        )
    parts["upload"] = gr.UploadButton(
        "Open a change or picture", size="md", file_types=[".safetensors", ".png"], file_count="single"
    )  # fmt: skip
    parts[
        "upload"
    ].data_model = None  # its value is the key of an upload, see `_UPLOAD_KEY`, and no path
    return parts


def _trace_tab() -> Parts:
    gr.HTML(
        '<p class="op-lead">Find the sublayers and tokens of the text encoder that carry the concept.</p>'
    )
    with gr.Row():
        measure = gr.Radio(_MEASURES, value="text", label="Measure", scale=3)
        button = gr.Button(
            "Trace",
            variant="primary",
            scale=1,
            min_width=120,
            elem_id="op-trace",
            elem_classes="op-go",
        )
    trace_map = gr.HTML(
        html.placeholder("No map yet. Press Trace."), js_on_load=_CLICKS, elem_id="op-map"
    )
    restored = gr.HTML(elem_id="op-restored")
    return {"measure": measure, "trace": button, "map": trace_map, "restored": restored}


def _edit_tab() -> Parts:
    gr.HTML(
        '<p class="op-lead">Replace the concept by another one. The new weights are solved in closed form.</p>'
    )
    with gr.Row(equal_height=True):
        new = gr.Textbox(_NEW, label="Replace by", max_length=handlers.MAX_CONCEPT, scale=3)
        method = gr.Radio(_METHODS, value="auto", label="Method", scale=4)
    with gr.Accordion("Prompts to preserve", open=False):
        preserve = gr.Textbox(label="One prompt per line", lines=3, max_length=handlers.MAX_LIST)
    with gr.Row():
        edit = gr.Button("Apply edit", variant="primary")
        draw = gr.Button("Draw again")
        saved = gr.DownloadButton("Save pictures", interactive=False)
    return {
        "new": new, "method": method, "preserve": preserve, "edit": edit, "draw": draw, "saved": saved,
        "drawn": gr.HTML(html.placeholder("No pictures yet. Press Apply edit."), elem_id="op-drawn"),
        "side_effects": gr.HTML(elem_id="op-side-effects"),
    }  # fmt: skip


def _compare_tab() -> Parts:
    gr.HTML(
        '<p class="op-lead">Draw the same prompt from the same noise with two versions of the model.</p>'
    )
    with gr.Row():
        first = gr.Dropdown(
            [ORIGINAL], value=ORIGINAL, label="First version", interactive=True, min_width=200
        )
        second = gr.Dropdown(
            [ORIGINAL], value=ORIGINAL, label="Second version", interactive=True, min_width=200
        )
        button = gr.Button("Compare", variant="primary", min_width=120, elem_classes="op-go")
    return {
        "first": first, "second": second, "compare": button,
        "compared": gr.HTML(html.placeholder("No pictures yet. Choose two versions."), elem_id="op-compared"),
        "facts": gr.HTML(elem_id="op-facts"),
    }  # fmt: skip


# --- connections ------------------------------------------------------------------------------------------------------

_OUTPUTS = (
    "status", "map", "restored", "drawn", "saved", "side_effects", "changes", "strength", "undo", "download", "first",
    "second", "compared", "facts", "prompt", "concept", "seed", "pictures", "steps", "saved_strength",
)  # fmt: skip
_CONTROLS = ("prompt", "concept", "seed", "pictures", "steps")
_EVENT_OPTIONS: dict[str, Any] = {
    "show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private",
    "preprocess": False,  # the handlers check all values, and show what is wrong in the page
}  # fmt: skip


def _connect(page: gr.Blocks, parts: Parts, studio: Studio, cookie: str) -> None:
    """Connect the controls to their handlers."""
    sessions = _PageSessions(studio, cookie, lambda name: _drop_values(page, name))
    outputs = [parts[name] for name in _OUTPUTS]

    def on(
        listen: Any, run: Callable[..., Iterator[Update]], *names: str, controls: bool = True, **options: Any
    ) -> Any:  # fmt: skip
        inputs = [parts[name] for name in ((*_CONTROLS, *names) if controls else names)]
        call = _handler(sessions, studio, run, controls=controls)
        return listen(call, inputs, outputs, **_EVENT_OPTIONS, **options)

    on(
        parts["trace"].click,
        lambda s, k, c, measure: handlers.trace(s, k, c, measure == "pictures"),
        "measure",
    )
    on(parts["edit"].click, handlers.edit, "new", "method", "preserve")
    on(parts["draw"].click, handlers.draw)
    strength = parts["strength"]
    strength.input(None, None, parts["download"], js=_DISABLE, show_progress="hidden")
    for listen, run in (
        (strength.input, handlers.set_strength),
        (strength.release, handlers.leave_strength),
    ):
        event = on(listen, run, "strength", controls=False, trigger_mode="always_last")
        shown = [strength, parts["saved_strength"]]
        event.then(None, shown, parts["download"], js=_ENABLE_IF_EQUAL, show_progress="hidden")
        on(event.then, handlers.redraw, trigger_mode="multiple")
    on(parts["undo"].click, handlers.undo)
    on(parts["compare"].click, handlers.compare, "first", "second")
    on(parts["model"].input, handlers.choose_model, "model", controls=False)
    on(parts["upload"].upload, handlers.open_upload, "upload", js=_UPLOAD_KEY)

    def pick(request: gr.Request, event: gr.EventData) -> Iterator[list[Any]]:
        data: Any = event._data
        cell = data.get("cell", "") if isinstance(data, dict) else ""
        yield from _all_values(handlers.restore(studio, sessions.key(request), cell))

    def stop(request: gr.Request) -> Any:
        return handlers.stop(studio, sessions.key(request))["status"]

    def load(request: gr.Request) -> list[Any]:
        try:
            return _values(handlers.applied_changes(studio, sessions.open(request)))
        except ValueError as error:
            return _values({"status": html.alert(str(error))})

    parts["map"].pick(pick, None, outputs, **_EVENT_OPTIONS)
    parts["stop"].click(stop, None, parts["status"], queue=False, **_EVENT_OPTIONS)
    page.load(load, None, outputs, **_EVENT_OPTIONS)
    page.unload(sessions.close)


class _PageSessions:
    """The session of each open page, by the page's name. The name comes from a browser and is never used as a path.

    Args:
        studio: Opens and closes the sessions.
        cookie: Name of the cookie by which pages of one browser belong together.
        on_close: Called with the name of each page that was closed.
    """

    def __init__(self, studio: Studio, cookie: str, on_close: Callable[[str], Any]) -> None:
        self._studio, self._cookie, self._on_close = studio, cookie, on_close
        self._keys: dict[str, str] = {}
        self._lock = threading.Lock()

    def open(self, request: gr.Request) -> str:
        """Return the session key of a page that was loaded; a session is opened if it has none.

        Raises:
            ValueError: The studio is full.
        """
        name = str(request.session_hash)
        with self._lock:
            self._keys = {n: k for n, k in self._keys.items() if self._studio.has_session(k)}
            if name not in self._keys:
                visitor = visitor_cookie(request.headers.get("cookie", ""), self._cookie)
                self._keys[name] = self._studio.open_session(visitor)
            return self._keys[name]

    def key(self, request: gr.Request) -> str:
        """Return the page's session key. If it has none, the key is empty: a handler must not open a new session."""
        return self._keys.get(str(request.session_hash), "")

    def close(self, request: gr.Request) -> None:
        """Close the session of a page that was closed."""
        name = str(request.session_hash)
        with self._lock:
            key = self._keys.pop(name, None)
        self._studio.close_session(key)
        self._on_close(name)


def _drop_values(page: gr.Blocks, name: str) -> None:
    """Delete the values that Gradio stores for a page; without this, they stay until its capacity is reached."""
    page.state_holder.session_data.pop(name, None)
    page.state_holder.time_last_used.pop(name, None)


def _handler(
    sessions: _PageSessions, studio: Studio, run: Callable[..., Iterator[Update]], *, controls: bool
) -> Any:
    """Return a function for Gradio that calls `run(studio, key, Controls, *rest)`, or without `Controls`."""

    def call(request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        arguments = list(values)
        if controls:
            count = len(_CONTROLS)
            arguments = [Controls(*arguments[:count]), *arguments[count:]]
        yield from _all_values(run(studio, sessions.key(request), *arguments))

    return call


def _all_values(updates: Iterator[Update]) -> Iterator[list[Any]]:
    """Yield the values of each update; an empty update if there is none, because Gradio would clear all outputs."""
    update: Update | None = None
    for update in updates:
        yield _values(update)
    if update is None:
        yield _values({})


def _values(update: Update) -> list[Any]:
    """Return one value for each output, in order; parts that the update does not name stay as they are."""
    return [_value(update[name]) if name in update else gr.skip() for name in _OUTPUTS]


def _value(value: Any) -> Any:
    if isinstance(value, Choices):
        return gr.Dropdown(choices=list(value.names), value=value.value)
    if isinstance(value, Value):
        content = {} if value.value is None else {"value": value.value}
        return gr.update(interactive=value.enabled, **content)
    return value

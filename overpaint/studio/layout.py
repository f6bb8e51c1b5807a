"""The page of the studio in Gradio: where its controls stand and which handler each calls. Needs the extra `studio`."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from overpaint.studio import handlers, html
from overpaint.studio.app import Studio
from overpaint.studio.handlers import Choices, Setting, Update, Value

__all__ = ["CSS", "build", "theme"]

CSS = Path(__file__).with_name("studio.css")
_PROMPT, _CONCEPT, _NEW = "an apple in openmoji style", "openmoji style", "noto style"
_HEAD = """<h1><span class="op-mark" aria-hidden="true"></span>Overpaint studio</h1>
<p>Find where a model keeps what it knows, and paint over it.</p>"""
# Cells of the map are buttons that the server wrote; one listener on the map hears them all.
_CLICKS = """element.addEventListener('click', event => {
  const cell = event.target.closest('button[data-cell]');
  if (cell) trigger('pick', {cell: cell.dataset.cell});
});"""
_METHODS = [
    ("automatic: chooses what to preserve", "auto"),
    ("quick: Diff-QuickFix as published", "quickfix"),
]
_TRACES = [("text features: quick", "text"), ("pictures, judged: slower", "pictures")]
Parts = dict[str, Any]


def theme() -> gr.themes.Base:
    """Return the look: the machine's own fonts, so that nothing is fetched, one warm hue, quiet greys."""
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


def build(studio: Studio) -> gr.Blocks:
    """Return the page; each visitor gets a session of `studio`."""
    with gr.Blocks(title="Overpaint studio", analytics_enabled=False, delete_cache=(1800, 7200)) as page:  # fmt: skip
        gr.HTML(_HEAD, elem_id="op-head")
        with gr.Row(elem_id="op-main"):
            with gr.Column(scale=3, min_width=280, elem_id="op-side"):
                parts = _question(studio) | _coats()
            with gr.Column(scale=8, min_width=320):
                with gr.Row(elem_id="op-bar"):
                    parts["status"] = gr.HTML(elem_id="op-status")
                    parts["stop"] = gr.Button("Stop", size="md", elem_id="op-stop")
                with gr.Tabs():
                    with gr.Tab("Where is it?"):
                        parts |= _map()
                    with gr.Tab("Paint over it"):
                        parts |= _paint()
                    with gr.Tab("Compare"):
                        parts |= _compare()
        _wire(page, parts, studio)
    return page


def _question(studio: Studio) -> Parts:
    parts: Parts = {
        "model": gr.Dropdown(list(studio.models), value=studio.models[0], label="Model", interactive=True),
        "prompt": gr.Textbox(_PROMPT, label="Prompt", lines=2, max_lines=4, max_length=handlers.LONGEST_PROMPT),
        "concept": gr.Textbox(_CONCEPT, label="Words to find and paint over", max_length=handlers.LONGEST_CONCEPT,
            info="As they stand in the prompt.",
        ),
    }  # fmt: skip
    with gr.Accordion("How to draw", open=False):
        parts["pictures"] = gr.Slider(1, 4, value=2, step=1, label="Pictures")
        parts["steps"] = gr.Slider(2, 30, value=8, step=1, label="Steps")
        parts["seed"] = gr.Number(0, label="First seed", precision=0, minimum=0)
    return parts


def _coats() -> Parts:
    gr.HTML("<h2>On the model</h2>")
    parts: Parts = {
        "coats": gr.HTML(),
        "strength": gr.Slider(-1, 2, value=1, step=0.05, label="Strength", interactive=False),
    }
    with gr.Row():
        parts["undo"] = gr.Button("Undo", size="md", min_width=80, interactive=False)
        parts["download"] = gr.DownloadButton("Download", size="md", min_width=80, interactive=False)  # fmt: skip
    parts["upload"] = gr.UploadButton(
        "Open a change or a picture", size="md", file_types=[".safetensors", ".png"], file_count="single"
    )  # fmt: skip
    return parts


def _map() -> Parts:
    gr.HTML(
        '<p class="op-lead">Which sublayer of the text encoder, at which token, brings the words back?</p>'
    )
    with gr.Row():
        how = gr.Radio(_TRACES, value="text", label="Judged by", scale=3)
        button = gr.Button("Trace", variant="primary", scale=1, min_width=120, elem_classes="op-go")
    found = gr.HTML(html.empty("No map yet: press Trace."), js_on_load=_CLICKS, elem_id="op-map")
    return {"how": how, "trace": button, "map": found, "restored": gr.HTML(elem_id="op-restored")}


def _paint() -> Parts:
    gr.HTML(
        '<p class="op-lead">Solved in closed form, from prompts alone; the model itself is never written to.</p>'
    )
    with gr.Row(equal_height=True):
        new = gr.Textbox(
            _NEW, label="Paint over with", max_length=handlers.LONGEST_CONCEPT, scale=3
        )
        method = gr.Radio(_METHODS, value="auto", label="Method", scale=4)
    with gr.Accordion("Prompts to leave alone", open=False):
        preserve = gr.Textbox(label="One a line", lines=3, max_length=handlers.LONGEST_LIST)
    with gr.Row():
        paint = gr.Button("Paint over", variant="primary")
        draw = gr.Button("Draw again")
        saved = gr.DownloadButton("Save pictures", interactive=False)
    return {
        "new": new, "method": method, "preserve": preserve, "paint": paint, "draw": draw, "saved": saved,
        "drawn": gr.HTML(html.empty("No pictures yet: press Paint over."), elem_id="op-drawn"),
        "forecast": gr.HTML(elem_id="op-forecast"),
    }  # fmt: skip


def _compare() -> Parts:
    gr.HTML('<p class="op-lead">Two versions of the model, the same prompt and the same noise.</p>')
    names = ["the model as it is"]
    with gr.Row():
        first = gr.Dropdown(names, value=names[0], label="This", interactive=True, min_width=200)
        second = gr.Dropdown(names, value=names[0], label="That", interactive=True, min_width=200)
        button = gr.Button("Compare", variant="primary", min_width=120, elem_classes="op-go")
    return {
        "first": first, "second": second, "compare": button,
        "compared": gr.HTML(html.empty("Nothing compared yet: choose two versions."), elem_id="op-compared"),
        "facts": gr.HTML(elem_id="op-facts"),
    }  # fmt: skip


# --- wiring -----------------------------------------------------------------------------------------------------------

_OUT = (
    "status", "map", "restored", "drawn", "saved", "forecast", "coats", "strength", "undo", "download", "first",
    "second", "compared", "facts", "prompt", "concept", "seed", "pictures", "steps",
)  # fmt: skip
_SETTING = ("prompt", "concept", "seed", "pictures", "steps")


def _wire(page: gr.Blocks, parts: Parts, studio: Studio) -> None:
    """Connect controls to handlers."""
    keys = _Keys(studio, lambda name: _release(page, name))
    out = [parts[name] for name in _OUT]
    asked = [parts[name] for name in _SETTING]

    def on(listen: Any, run: Callable[..., Iterator[Update]], *more: str, setting: bool = True) -> None:  # fmt: skip
        inputs = (asked if setting else []) + [parts[name] for name in more]
        call = _handler(keys, studio, run, setting=setting)
        listen(call, inputs, out, show_progress="hidden", concurrency_limit=None, api_visibility="private")  # fmt: skip

    on(parts["trace"].click, lambda s, k, q, how: handlers.trace(s, k, q, how == "pictures"), "how")
    on(parts["paint"].click, handlers.paint, "new", "method", "preserve")
    on(parts["draw"].click, handlers.draw)
    on(parts["strength"].release, handlers.dial, "strength")
    on(parts["undo"].click, handlers.undo)
    on(parts["compare"].click, handlers.compare, "first", "second")
    on(parts["model"].input, handlers.choose, "model", setting=False)
    on(parts["upload"].upload, lambda s, k, q, path: handlers.add(s, k, path, q), "upload")

    def pick(request: gr.Request, event: gr.EventData) -> Iterator[list[Any]]:
        for update in handlers.restore(studio, keys.of(request), event.cell):
            yield _values(update)

    def stop(request: gr.Request) -> Any:
        return handlers.stop(studio, keys.of(request))["status"]

    def opened(request: gr.Request) -> list[Any]:
        try:
            return _values(handlers.bench(studio, keys.opened(request)))
        except ValueError as error:
            return _values({"status": html.alert(str(error))})

    quiet: Any = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}
    parts["map"].pick(pick, None, out, **quiet)
    parts["stop"].click(stop, None, parts["status"], queue=False, **quiet)
    page.load(opened, None, out, **quiet)
    page.unload(keys.forget)


class _Keys:
    """Which session belongs to which open page. What a browser calls itself is never used as a path.

    `release` is told of each page that was closed.
    """

    def __init__(self, studio: Studio, release: Callable[[str], Any]) -> None:
        self._studio, self._release = studio, release
        self._known: dict[str, str] = {}
        self._lock = threading.Lock()

    def opened(self, request: gr.Request) -> str:
        """Return the session of a page that was loaded, begun if there is none.

        Raises:
            ValueError: Too many are at work.
        """
        name = str(request.session_hash)
        with self._lock:
            self._known = {n: k for n, k in self._known.items() if self._studio.holds(k)}
            if name not in self._known:
                self._known[name] = self._studio.open()
            return self._known[name]

    def of(self, request: gr.Request) -> str:
        """Return the page's session; a key that opens nothing if it has ended, never that of a new and empty one."""
        return self._known.get(str(request.session_hash), "")

    def forget(self, request: gr.Request) -> None:
        """End the session of a page that was closed."""
        name = str(request.session_hash)
        with self._lock:
            key = self._known.pop(name, None)
        self._studio.close(key)
        self._release(name)


def _release(page: gr.Blocks, name: str) -> None:
    """Drop the values that the framework keeps of a page until others need the room."""
    page.state_holder.session_data.pop(name, None)
    page.state_holder.time_last_used.pop(name, None)


def _handler(keys: _Keys, studio: Studio, run: Callable[..., Iterator[Update]], *, setting: bool) -> Any:  # fmt: skip
    def call(request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        given = list(values)
        head = [Setting(*given[: len(_SETTING)]), *given[len(_SETTING) :]] if setting else given
        for update in run(studio, keys.of(request), *head):
            yield _values(update)

    return call


def _values(update: Update) -> list[Any]:
    """Return one value for each output, in order; what the update does not name stays."""
    return [_value(update[name]) if name in update else gr.skip() for name in _OUT]


def _value(value: Any) -> Any:
    if isinstance(value, Choices):
        return gr.Dropdown(choices=list(value.names), value=value.value)
    if isinstance(value, Value):
        given = {} if value.value is None else {"value": value.value}
        return gr.update(interactive=value.usable, **given)
    return value

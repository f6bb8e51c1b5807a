"""A list where one text is read, and the reverse: a named error that says which function takes several."""

import pytest

from overpaint import edit, evaluate, probes, trace
from overpaint.evaluate import attack
from overpaint.probes import Case, EvaluationSet, Probe

LIST = ["monet", "picasso"]
FEW = {"contexts": 8, "background": 8, "vocabulary": ["fox"]}
BRIEF = {"steps": 1, "pictures": 1, "picture_steps": 1}
PROBE = Probe("a", "style", "a cat in noto style", "noto style")
CASES = EvaluationSet("mine", "csv", "cat", "dog", (Case("a cat", "target", "cat", "dog"),))
METHODS = {
    "quickfix": (edit.quickfix, {}),
    "auto": (edit.auto, FEW),
    "uce": (edit.uce, {}),
    "oce": (edit.oce, {"captions": ()}),
    "dp": (edit.dp, {}),
    "speed": (edit.speed, {"empty_tokens": 1}),
    "hirm": (edit.hirm, {"steps": 1}),
    "time": (edit.time, {}),
    "loco": (edit.loco, {}),
    "finetune": (edit.finetune, BRIEF),
    "swap_embedding": (edit.swap_embedding, {}),
    "random_site": (edit.random_site, {}),
}


def black(images, probes):
    return [0.0] * len(images)


@pytest.mark.parametrize("name", METHODS)
def test_several_replacements_or_a_list_of_concepts_are_refused(tiny_sd1, name):
    method, settings = METHODS[name]
    message = r"the replacement of 'cat' must be one text, got \['monet', 'picasso'\]: choose one; `edit.debias` "
    with pytest.raises(TypeError, match=message + "balances several"):
        method(tiny_sd1, {"cat": LIST}, **settings)
    with pytest.raises(
        TypeError, match="a concept of `pairs` must be one text, got 3: give a pair"
    ):
        method(tiny_sd1, {3: "a dog"}, **settings)
    for pairs in (LIST, "cat"):
        with pytest.raises(TypeError, match="`pairs` must be a dictionary of concepts and their"):
            method(tiny_sd1, pairs, **settings)


@pytest.mark.parametrize("name", ["preserve", "frames", "without", "aliases"])
def test_a_text_or_a_nested_list_for_a_list_is_refused(tiny_sd1, name):
    takers = {
        "preserve": ("quickfix", "auto", "uce", "oce", "dp", "speed", "finetune", "random_site"),
        "frames": (
            "quickfix",
            "uce",
            "oce",
            "dp",
            "speed",
            "hirm",
            "time",
            "loco",
            "finetune",
            "random_site",
        ),
        "without": ("auto",),
        "aliases": ("auto",),
    }
    for taker in takers[name]:
        method, settings = METHODS[taker]
        for value in ("a fish", [LIST], None):
            with pytest.raises(
                TypeError,
                match=rf"`{name}` (must be a list of texts, got|is 'auto' or a list) .* write",
            ):
                method(tiny_sd1, {"cat": "dog"}, **settings, **{name: value})


ONE = {
    "debias": lambda m, c, j: edit.debias(m, LIST, {"a": 0.5}, classify=lambda _: {"a": 0.5}),
    "without": lambda m, c, j: c.without(["blob style"]),
    "generate": lambda m, c, j: m.encode([LIST]),
    "tokenize": lambda m, c, j: m.tokenize([LIST]),
    "probe concept": lambda m, c, j: Probe("a", "style", "a cat", ["cat"]),
    "probe prompt": lambda m, c, j: Probe("a", "style", ["a cat"], "cat"),
    "shipped set": lambda m, c, j: probes.load_shipped_set("style", ["noto style"]),
    "set": lambda m, c, j: probes.load_set(__file__, erase=LIST),
    "probes": lambda m, c, j: probes.load_file(__file__, kind="object", concept=LIST),
    "compare": lambda m, c, j: evaluate.compare(m, {"a": None}, erase=LIST, scorer=j),
    "score": lambda m, c, j: evaluate.score(m, c, replace=LIST, scorer=j),
}


@pytest.mark.parametrize("name", ONE)
def test_a_list_for_one_text_is_refused(tiny_sd1, quickfix_change, judge, name):
    with pytest.raises(TypeError, match=r"must be one text, got \["):
        ONE[name](tiny_sd1, quickfix_change, judge)


def test_the_message_names_the_function_that_takes_several(quickfix_change):
    with pytest.raises(
        TypeError, match=r"`edit.stack\(model, \[change\], without=\[...\]\)` takes"
    ):
        quickfix_change.without(["blob style"])
    with pytest.raises(TypeError, match="make a probe for each; traces take several probes"):
        Probe("a", "style", "a cat", ["cat"])


def test_one_change_or_list_where_the_other_is_read_is_refused(tiny_sd1, quickfix_change, judge):
    several = [quickfix_change, quickfix_change]
    with pytest.raises(
        TypeError, match=r"`changes` must be a list of changes, got one: write \[change\]"
    ):
        edit.stack(tiny_sd1, quickfix_change)
    with pytest.raises(TypeError, match=r"`without` must be a list of texts, got 'cat': write"):
        edit.stack(tiny_sd1, several[:1], without="cat")
    for value in (quickfix_change, several):
        with pytest.raises(
            TypeError, match="`changes` must be a dictionary of changes by name, got"
        ):
            evaluate.compare(tiny_sd1, value, erase="noto style", scorer=judge)
    message = "a change must be one `Change`, got .* solve several jointly with `edit.stack`"
    for measure in (
        lambda: evaluate.score(tiny_sd1, several, scorer=judge),
        lambda: evaluate.measure(tiny_sd1, several, CASES, scorer=judge),
        lambda: attack.search(tiny_sd1, several, CASES, scorer=judge),
    ):
        with pytest.raises(TypeError, match=message):
            measure()


def test_the_shares_and_names_of_an_evaluation_are_checked(tiny_sd1, quickfix_change, judge):
    with pytest.raises(
        TypeError, match="`shares` must be a dictionary of attributes and their shares"
    ):
        edit.debias(tiny_sd1, "cat", ["a"], classify=lambda _: {"a": 0.5})
    with pytest.raises(TypeError, match="`families` must be a list of texts, got 'paraphrase'"):
        attack.search(tiny_sd1, quickfix_change, CASES, scorer=judge, families="paraphrase")


TRACES = {
    "text encoder": trace.text_encoder,
    "unet": trace.unet,
    "screening": trace.screening.unet,
    "swap": lambda *a, **k: trace.prompt_swap(*a, target="dog", **k),
}


@pytest.mark.parametrize("name", TRACES)
def test_probes_and_scorer_of_a_trace_are_checked(tiny_sd1, name):
    for value in ("style", PROBE, ["style"]):
        with pytest.raises(
            TypeError, match="`probes` must be a list of probes, got .*, or .probe. for one"
        ):
            TRACES[name](tiny_sd1, value, scorer=black)
    with pytest.raises(
        TypeError, match="`scorer` must be a function of pictures and probes, got 'icons-judge'"
    ):
        TRACES[name](tiny_sd1, [PROBE], scorer="icons-judge")


def test_several_targets_of_a_swap_are_refused(tiny_sd1):
    with pytest.raises(
        TypeError, match="`target` must be one text or a function of a probe, got .* for each"
    ):
        trace.prompt_swap(tiny_sd1, [PROBE], target=LIST, scorer=black)

"""Prompts longer than a text encoder reads: a warning that names the cut words, once for each prompt, or an error."""

import json
import warnings

import pytest

from overpaint import edit, evaluate, trace
from overpaint.errors import CutPromptWarning
from overpaint.evaluate import attack
from overpaint.model import TextToImage
from overpaint.probes import Case, EvaluationSet, Probe
from overpaint.probes.text import cut_words
from overpaint.studio import html, tasks
from overpaint.studio.tasks import PromptSettings

FULL = "a cat in noto style" + " red" * 69  # 75 tokens, as many as the encoder reads
LONG = f"{FULL} van gogh"
LATE = f"{'red ' * 74}blue cat"
CUT = r"is longer than the 75 tokens that the text encoder reads: 'van gogh' is cut off and has no effect"


def black(images, probes):
    return [0.0] * len(images)


@pytest.fixture
def model(tiny_sd1):
    """The tiny model without the prompts that it warned of before."""
    return TextToImage(tiny_sd1.pipe, name="fresh")


def warned(call):
    """Return the messages of the warnings of a call."""
    with warnings.catch_warnings(record=True) as entries:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in entries if issubclass(w.category, CutPromptWarning)]


def test_the_cut_words_are_whole_and_fitting_prompts_have_none(model):
    tokenizer = model.tokenizer
    assert len(tokenizer(FULL).input_ids) == 77
    assert cut_words(tokenizer, FULL) == ""
    assert cut_words(tokenizer, LONG) == "van gogh"
    assert cut_words(tokenizer, f"{FULL}  gogh, gogh") == "gogh, gogh"
    half = f"{' '.join(FULL.split()[:-1])} redredred"
    assert cut_words(tokenizer, half) == "redredred"  # of which the first tokens are read


CALLS = {
    "generate": lambda m: m.generate([LONG, LONG], steps=1),
    "negative": lambda m: m.generate("a cat", negative_prompt=LONG, steps=1),
    "encode": lambda m: m.encode([LONG]),
    "trace": lambda m: trace.text_encoder(m, [Probe("a", "style", LONG, "noto style")], generate=False),
    "swap": lambda m: trace.prompt_swap(
        m, [Probe("a", "style", LONG, "noto style")], target="noto",
        drawing=trace.Drawing(steps=1, solver="own"), scorer=black,
    ),
    "edit": lambda m: edit.quickfix(m, {"cat": "dog"}, preserve=[LONG]),
    "uce": lambda m: edit.uce(m, {"cat": "dog"}, frames=[FULL.replace("cat", "{}") + " van gogh"]),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::overpaint.errors.CutPromptWarning")
@pytest.mark.parametrize("name", CALLS)
def test_a_long_prompt_is_warned_of_once(model, name):
    with pytest.warns(CutPromptWarning, match=CUT):
        CALLS[name](model)
    assert warned(lambda: CALLS[name](model)) == []
    assert warned(lambda: model.with_clip_skip(1).encode([LONG])) == []


def test_each_prompt_has_its_own_warning_and_both_encoders_one(tiny_xl):
    model = TextToImage(tiny_xl.pipe, name="fresh")
    messages = warned(lambda: model.encode([LONG, f"{FULL} gogh", "a cat"]))
    assert len(messages) == 2
    assert "'gogh' is cut off" in messages[1]


@pytest.mark.filterwarnings("default")
def test_an_evaluation_warns_of_prompts_and_of_texts_of_the_scorer(model, judge, quickfix_change):
    """The judge reads pictures of another size, so that only its texts can be checked here."""
    messages = warned(lambda: judge.text_features([LONG]))
    assert len(messages) == 1 and "that icons-judge reads" in messages[0]
    assert warned(lambda: judge.text_features([LONG])) == []


def test_a_concept_in_the_cut_part_is_an_error(model, judge, quickfix_change):
    message = "is cut off by the limit of 77 tokens: shorten the prompt, or put the concept first"
    cases = EvaluationSet("mine", "csv", "blue cat", "dog", (Case(LATE, "target", "blue cat"),))
    with pytest.raises(ValueError, match=f"the concept 'blue cat' of the prompt .* {message}"):
        evaluate.measure(model, quickfix_change, cases, scorer=judge)
    with pytest.raises(ValueError, match=message):
        attack.search(model, quickfix_change, cases, scorer=judge)
    with pytest.raises(ValueError, match=message):
        trace.text_encoder(model, [Probe("a", "object", LATE, "blue cat")], generate=False)
    with pytest.raises(ValueError, match=message):
        edit.quickfix(model, {LATE: "dog"})
    probe = Probe("a", "object", f"{'red ' * 73}cat", "cat")
    with pytest.raises(ValueError, match=rf"the target 'blue blue blue cat' .* {message}"):
        trace.prompt_swap(model, [probe], target="blue blue blue cat", scorer=black)


def test_the_command_line_prints_one_line_for_each_prompt(run, tiny_folder, tmp_path):
    command = ("generate", tiny_folder, LONG, LONG, "--steps", 1, "--out", tmp_path / "p", "--json")
    code, out, err = run(*command)
    assert code == 0
    assert len(json.loads(out)["pictures"]) == 2
    lines = [line for line in err.splitlines() if "cut off" in line]
    assert len(lines) == 1
    assert lines[0].startswith("overpaint: warning: 'a cat in noto style red")
    assert "'van gogh' is cut off and has no effect. Shorten the prompt" in lines[0]


def test_the_studio_names_the_cut_words_below_the_pictures(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CutPromptWarning)
        grid = tasks.draw_versions(
            model, PromptSettings(LONG, "", (0,), 1), [("original", None)], lambda *_: None
        )
    assert "“van gogh” is cut off and has no effect" in html.grid(grid)

"""The studio without its page: private models, turns, sessions, and what each button does."""

import threading
import time
from contextlib import ExitStack
from dataclasses import replace

import pytest

import overpaint as op
from overpaint.edit.weights import fingerprint
from overpaint.model import hooks
from overpaint.studio import Studio, html, tasks
from overpaint.studio.model_copy import private
from overpaint.studio.scheduler import (
    Done,
    Part,
    Progress,
    Stopped,
    Turns,
    watch,
)
from overpaint.studio.session import Bench, Coat, Session
from overpaint.studio.side_effects import collateral
from overpaint.studio.tasks import Question

ASKED = Question("a cat in blob style", "blob style", (3,), 1)


def nothing(*_):
    return None


def last(told):
    """Run a piece of work to its end and return its result."""
    return [item for item in told if isinstance(item, Done)][-1].value


def pixels(image):
    return image.tobytes()


@pytest.fixture
def studio(tiny_folder, tmp_path):
    return Studio([str(tiny_folder)], tmp_path / "downloads")


@pytest.fixture(scope="module")
def change(tiny_sd1):
    return op.edit.quickfix(tiny_sd1, {"blob style": "noto style"})


# --- private models ---------------------------------------------------------------------------------------------------


def test_a_private_model_shares_all_but_what_moves(tiny_sd1, change):
    before = fingerprint(op.edit.weights.weight_at(tiny_sd1, change.site))
    mine = private(tiny_sd1, change)
    pairs = [
        (a, b)
        for name in ("text_encoder", "unet", "vae")
        for a, b in zip(
            getattr(tiny_sd1, name).parameters(), getattr(mine, name).parameters(), strict=True
        )
    ]
    own = [b for a, b in pairs if a.data_ptr() != b.data_ptr()]
    assert len(own) == 1
    assert own[0].shape == change.delta.shape
    assert fingerprint(op.edit.weights.weight_at(tiny_sd1, change.site)) == before
    assert change.is_applied(mine) and not change.is_applied(tiny_sd1)
    with change.applied(tiny_sd1):
        expected = tiny_sd1.encode(["a cat in blob style"])
    assert mine.encode(["a cat in blob style"]).equal(expected)


def test_hooks_on_a_private_model_do_not_see_what_others_draw(tiny_sd1):
    mine = private(tiny_sd1, whole=True)
    with hooks.record([mine.text_encoder, mine.unet, mine.vae.decoder]) as seen:
        tiny_sd1.generate("a cat", steps=1)
    assert seen == [[], [], []]
    assert mine.generate("a cat", steps=1).images.equal(tiny_sd1.generate("a cat", steps=1).images)


def test_an_edit_of_the_unet_gets_a_unet_of_its_own(tiny_sd1):
    edit = op.edit.uce(tiny_sd1, {"blob style": "noto style"})
    before = tiny_sd1.generate("a cat in blob style", steps=1).images
    mine = private(tiny_sd1, edit)
    assert not mine.generate("a cat in blob style", steps=1).images.equal(before)
    assert tiny_sd1.generate("a cat in blob style", steps=1).images.equal(before)


# --- turns ------------------------------------------------------------------------------------------------------------


def test_work_takes_turns_after_every_step():
    turns, order, gate = Turns(), [], threading.Event()

    def job(name):
        def run(tell):
            gate.wait(5)
            for i in range(3):
                order.append(f"{name}{i}")
                while turns.waiting == 0 and len(order) < 4:  # the other one is on its way
                    time.sleep(0.001)
                tell(i, 3, "counting")
            return name

        return run

    found = {}
    threads = [
        threading.Thread(target=lambda n=n: found.setdefault(n, last(watch(turns, threading.Event(), job(n)))))
        for n in "ab"
    ]  # fmt: skip
    for thread in threads:
        thread.start()
    gate.set()
    for thread in threads:
        thread.join()
    first, second = order[0][0], order[1][0]
    assert first != second
    assert order == [f"{n}{i}" for i in range(3) for n in (first, second)]
    assert found == {"a": "a", "b": "b"}
    assert not turns.busy


def test_work_that_waits_can_be_stopped_and_the_queue_goes_on():
    turns, stop = Turns(), threading.Event()
    with turns.turn(threading.Event()):
        told = watch(turns, stop, lambda tell: "never")
        assert isinstance(next(told), Progress)
        threading.Timer(0.05, stop.set).start()
        with pytest.raises(Stopped):
            next(told)
        assert turns.waiting == 0
    assert last(watch(turns, threading.Event(), lambda tell: "done")) == "done"


def test_an_error_of_one_hands_the_turn_to_the_next():
    turns = Turns()

    def broken(tell):
        raise ValueError("no such word")

    with pytest.raises(ValueError, match="no such word"):
        last(watch(turns, threading.Event(), broken))
    assert not turns.busy


def test_who_stops_listening_ends_the_work():
    turns, steps = Turns(), []

    def endless(tell):
        for i in range(10**6):
            steps.append(i)
            tell.show(i)
            tell(i, 10**6, "counting")

    told = watch(turns, threading.Event(), endless)
    next(told)
    told.close()
    count = len(steps)
    time.sleep(0.02)
    assert len(steps) == count < 10**6
    assert not turns.busy


# --- sessions ---------------------------------------------------------------------------------------------------------


def test_undo_goes_back_and_turns_of_the_dial_are_one_step(change):
    session = Session("icons")
    with pytest.raises(ValueError, match="nothing to undo"):
        session.undo()
    with pytest.raises(ValueError, match="no coat to dial"):
        session.dial(0.5)
    session.put(Bench((Coat("blob → noto", change),), change))
    for strength in (0.2, 0.4, 0.5):
        session.dial(strength)
    assert session.bench.change is not None
    assert session.bench.change.digest == (0.5 * change).digest
    with pytest.raises(ValueError, match="must be -1 to 2, got 3"):
        session.dial(3)
    assert list(session.versions()) == [
        "the model as it is", "coat 1: blob → noto", "all coats, as dialled",
    ]  # fmt: skip
    session.undo()
    assert session.bench.change is change
    session.undo()
    assert session.bench.change is None and not session.can_undo


def test_a_session_does_one_thing_at_a_time():
    session = Session("icons")
    with session.working() as stop:
        with pytest.raises(ValueError, match="still under way: wait until it is done, or press"):
            session.working().__enter__()
        assert session.stop() and stop.is_set()
    assert not session.stop()


def test_a_session_that_ended_says_so(studio):
    key = studio.open()
    studio.close(key)
    studio.close(key)
    with pytest.raises(ValueError, match="this session has ended: load the page again"):
        studio.session(key)
    assert len(studio) == 0


def test_of_too_many_sessions_the_longest_unused_goes_and_none_at_work(studio, monkeypatch):
    monkeypatch.setattr("overpaint.studio.app.SESSIONS", 3)
    first, second, third = (studio.open() for _ in range(3))
    studio.session(first)
    with studio.session(second).working():
        studio.session(first)
        assert studio.session(second).busy
        studio.open()
        assert [studio.holds(key) for key in (first, second, third)] == [True, True, False]
        studio.open()
        assert [studio.holds(key) for key in (first, second)] == [False, True]
    keys = list(studio._sessions)
    with ExitStack() as busy:
        for key in keys:
            busy.enter_context(studio.session(key).working())
        with pytest.raises(ValueError, match="the studio is full: all of its 3 sessions are at"):
            studio.open()
    assert set(studio._sessions) == set(keys)


def test_nothing_is_kept_for_a_session_that_ended(studio):
    key = studio.open()
    drawn = last(studio.draw(key, ASKED))
    studio.close(key)
    with pytest.raises(ValueError, match="this session has ended"):
        studio.keep(key, drawn)
    assert not (studio.folder / key).exists()


# --- what the buttons do ----------------------------------------------------------------------------------------------


def test_a_restored_state_of_the_whole_first_layer_is_what_tracing_measured(tiny_sd1):
    question = Question("a cat in blob style", "blob style", (0,), 2)
    found = tasks.trace_text(tiny_sd1, question, nothing)
    probe = op.probes.Probe("studio", "concept", question.prompt, "blob style")
    effects = op.trace.text_encoder(tiny_sd1, [probe], control=False, generate=False)
    table = {(r["site"], r["position"]): r["embed_recovery"] for r in effects.table.to_pylist()}
    row, column = found.best
    place = found.columns[column][1]
    assert found.values[row][column] == pytest.approx(table[found.sites[row], place])
    clean, corrupted, restored = tasks.restore(tiny_sd1, found, row, column, nothing)
    assert len({pixels(p.image) for p in (clean, corrupted, restored)}) == 3
    with pytest.raises(ValueError, match=r"no cell \(99, 0\)"):
        tasks.restore(tiny_sd1, found, 99, 0, nothing)


def test_painting_shows_the_forecast_before_the_pictures_and_undo_takes_it_off(studio):
    key = studio.open()
    told = list(studio.paint(key, ASKED, "noto style", method="quickfix"))
    parts = [item.value for item in told if isinstance(item, Part)]
    assert type(parts[0]).__name__ == "Collateral"
    assert [type(p).__name__ for p in parts[1:]] == ["Drawn", "Drawn"]
    assert parts[1].rows[1] == (None,)
    before, after = (pixels(row[0]) for row in told[-1].value.rows)
    assert before != after
    studio.session(key).undo()
    drawn = last(studio.draw(key, ASKED))
    assert [pixels(row[0]) for row in drawn.rows] == [before]


def test_coats_stack_into_one_joint_change(studio, tiny_folder):
    key, model = studio.open(), op.load(tiny_folder)
    last(studio.paint(key, ASKED, "noto style", method="quickfix"))
    asked = Question("a dog", "dog", (0,), 1)
    last(studio.paint(key, asked, "cat", method="quickfix"))
    pairs = ({"blob style": "noto style"}, {"dog": "cat"})
    joint = op.edit.stack(model, [op.edit.quickfix(model, p) for p in pairs])
    found = op.Change.load(studio.download(key))
    assert found.digest == joint.digest
    assert found.pairs == joint.pairs


def test_coats_of_two_methods_are_refused_and_nothing_changes(studio):
    key = studio.open()
    last(studio.paint(key, ASKED, "noto style", method="quickfix"))
    bench = studio.session(key).bench
    kept = dict(method="quickfix", preserve=["a dog"])
    with pytest.raises(
        ValueError, match="cannot be solved together with those below it: contradic"
    ):
        last(studio.paint(key, ASKED, "other style", **kept))
    assert studio.session(key).bench is bench


def test_coats_that_are_solved_again_can_be_stopped_on_the_way(tiny_sd1):
    few = {"contexts": 8, "background": 8, "vocabulary": ["a dog"], "tokens": False}
    pairs = ({"blob style": "noto style"}, {"cat": "fox"})
    changes = [op.edit.auto(tiny_sd1, p, **few) for p in pairs]
    told = []

    def step(*progress):
        told.append(progress)
        if len(told) == 3:
            raise Stopped

    with pytest.raises(Stopped):
        tasks.combine(tiny_sd1, changes, step)
    assert told[1][0] < told[2][0] < told[2][1]


def test_a_change_file_comes_back_as_a_coat_and_twice_is_compared(studio, tmp_path, change):
    path = tmp_path / "mine.safetensors"
    change.save(path)
    key = studio.open()
    assert type(last(studio.add(key, path))).__name__ == "Collateral"
    assert studio.session(key).bench.change.digest == change.digest
    first, second = "the model as it is", "file mine.safetensors"
    drawn = last(studio.compare(key, ASKED, first, second))
    assert drawn.names == (first, second)
    assert pixels(drawn.rows[0][0]) != pixels(drawn.rows[1][0])
    with pytest.raises(ValueError, match="there is no 'gone' any more"):
        studio.compare(key, ASKED, "gone", second)


def test_a_change_that_does_not_stack_goes_on_the_shelf(studio, tiny_sd1, tmp_path):
    key = studio.open()
    last(studio.paint(key, ASKED, "noto style", method="quickfix"))
    path = tmp_path / "uce.safetensors"
    op.edit.uce(tiny_sd1, {"blob style": "noto style"}).save(path)
    said = last(studio.add(key, path))
    assert said.startswith("uce.safetensors can be compared, but not laid over the other coats: ")
    assert "file uce.safetensors" in studio.session(key).versions()
    assert len(studio.session(key).bench.coats) == 1


def test_the_shelf_keeps_the_eight_files_opened_last(change):
    session = Session("icons")
    for i in (0, 1, 2, 3, 4, 5, 6, 7, 0, 8):
        session.shelve(str(i), change)
    assert list(session.shelf) == ["2", "3", "4", "5", "6", "7", "0", "8"]


def test_a_file_whose_opening_was_stopped_is_not_on_the_shelf(studio, tmp_path, monkeypatch, change):  # fmt: skip
    path = tmp_path / "mine.safetensors"
    change.save(path)
    key = studio.open()

    def stopped(*_, step):
        studio.session(key).stop()
        step(0, 1, "foretelling")

    monkeypatch.setattr("overpaint.studio.app.collateral", stopped)
    with pytest.raises(Stopped):
        last(studio.add(key, path))
    assert studio.session(key).shelf == {}


def test_a_stopped_edit_leaves_the_bench_as_it_was(studio):
    key = studio.open()
    told = studio.paint(
        key, Question("a cat in blob style", "blob style", (0, 1), 50), "noto style"
    )
    next(told)
    studio.session(key).stop()
    with pytest.raises(Stopped):
        last(told)
    assert studio.session(key).bench.coats == ()
    assert not studio.turns.busy
    last(studio.draw(key, ASKED))


def test_six_sessions_at_once_draw_what_each_draws_alone(studio, tiny_folder):
    """No cross-talk: against another road to the same picture, in-place weights on a model of its own."""
    model = op.load(tiny_folder)
    words = ("cat", "dog", "fox", "bear", "fish", "bird")
    asked = [Question(f"a {w} in blob style", w, (i,), 2) for i, w in enumerate(words)]
    alone = []
    for question in asked:
        with op.edit.quickfix(model, {question.concept: "apple"}).applied(model):
            picture = model.generate(question.prompt, seed=question.seeds[0], steps=2)
            alone.append(pixels(picture.pil()[0]))
    keys = [studio.open() for _ in asked]
    found = {}

    def visit(key, question):
        found[key] = last(studio.paint(key, question, "apple", method="quickfix"))

    threads = [threading.Thread(target=visit, args=pair) for pair in zip(keys, asked, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together = [pixels(found[key].rows[1][0]) for key in keys]
    assert together == alone
    assert len(set(alone)) == 6
    shared = studio._loaded[str(tiny_folder)]
    for mine, other in zip(shared.text_encoder.parameters(), model.text_encoder.parameters(), strict=True):  # fmt: skip
        assert mine.equal(other)


# --- the forecast -----------------------------------------------------------------------------------------------------


def test_drift_is_the_movement_of_text_features_as_a_share_of_the_erased_concepts(tiny_sd1, change):
    (drift,) = collateral(tiny_sd1, change, vocabulary=["a dog"]).drifts

    def moved(concept):
        captions = [f"a picture of {concept}"]
        before = tiny_sd1.encode(captions)
        with change.applied(tiny_sd1):
            after = tiny_sd1.encode(captions)
        return float((after - before).double().square().sum())

    assert drift.share == pytest.approx(moved("a dog") / moved("blob style"), rel=1e-4)
    assert not drift.kept


def test_the_forecast_is_of_the_change_as_dialled(studio, tiny_folder):
    key, model = studio.open(), op.load(tiny_folder)
    last(studio.paint(key, ASKED, "noto style", method="quickfix"))
    assert 0.9 < last(studio.predict(key)).reached <= 1
    session = studio.session(key)
    session.dial(-0.5)
    found, half = last(studio.predict(key)), session.bench.change
    nothing = model.encode([""])
    with half.applied(model):
        moved = model.encode([""]) - nothing
    assert found.empty == pytest.approx(float(moved.norm() / nothing.norm()), rel=1e-4)
    assert found.reached is None
    assert found.drifts == collateral(model, half).drifts
    session.dial(0)
    assert last(studio.predict(key)) is None


def test_a_new_coat_leaves_the_strength_as_it_was_dialled(studio):
    key = studio.open()
    last(studio.paint(key, ASKED, "noto style", method="quickfix"))
    session = studio.session(key)
    session.dial(0.5)
    last(studio.paint(key, Question("a dog", "dog", (0,), 1), "cat", method="quickfix"))
    assert session.bench.strength == 0.5
    assert session.bench.change.digest == (0.5 * session.bench.joint).digest


def test_of_a_repaired_edit_what_the_repair_reached_is_told(tiny_sd1, change):
    report = {**change.report, "missed": 0.9, "layer_missed": 0.25}
    repaired = replace(change, report=report)
    assert collateral(tiny_sd1, repaired, vocabulary=["a dog"]).reached == 0.75


def test_the_forecast_of_other_weights_says_why_there_is_none(tiny_sd1):
    found = collateral(tiny_sd1, op.edit.uce(tiny_sd1, {"blob style": "noto style"}))
    assert found.drifts == ()
    assert found.reason == "it moves the UNet"


def test_a_forecast_of_nothing_is_a_sentence_and_no_table(tiny_sd1):
    settings = {"contexts": 8, "background": 8, "vocabulary": ["a dog"]}
    pairs = {"blob style": "noto style"}
    rows = op.edit.auto(tiny_sd1, pairs, **settings)
    layer = op.edit.auto(tiny_sd1, pairs, **settings, tokens=False)
    still, moving = (collateral(tiny_sd1, c, vocabulary=["a dog", "a cat"]) for c in (rows, layer))
    assert "None of the 2 other concepts moves" in html.forecast(still)
    assert "<table" not in html.forecast(still)
    assert "<table" in html.forecast(moving)


@pytest.mark.parametrize(
    "question, words",
    [
        (("  ", "", (0,), 1), "the prompt is empty: write what to draw"),
        (("a cat", "", (0,), 0), "must be 1 to 100, got 0"),
        (("a cat", "", (), 1), "must be 1 to 8 at a time, got 0"),
        (("a cat", "", (-1,), 1), "a seed must be 0 to 2147483647"),
    ],
)
def test_questions_out_of_range_are_refused(question, words):
    with pytest.raises(ValueError, match=words):
        Question(*question)


def test_words_that_are_not_there_and_methods_that_are_not_known(tiny_sd1):
    with pytest.raises(ValueError, match="no words to look for: name words of the prompt"):
        tasks.trace_text(tiny_sd1, Question("a cat"), nothing)
    with pytest.raises(ValueError, match="'dog' is not in the prompt 'a cat'"):
        tasks.trace_text(tiny_sd1, Question("a cat", "dog"), nothing)
    with pytest.raises(ValueError, match="unknown method 'magic': choose auto or quickfix"):
        tasks.make(tiny_sd1, "a", "b", nothing, method="magic")

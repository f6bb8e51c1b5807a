"""The queue of tasks: order, stop, errors."""

import threading
import time

import pytest

from overpaint.studio.scheduler import ProgressUpdate, Scheduler, Stopped, run_task

HANG = 300  # seconds; bounds a hang only


def test_tasks_alternate_after_each_step(result_of):
    scheduler, order, start = Scheduler(), [], threading.Event()

    def job(name):
        def work(task):
            start.wait(HANG)
            for i in range(3):
                order.append(f"{name}{i}")
                while (
                    scheduler.waiting == 0 and len(order) < 4
                ):  # the other task is not in the queue yet
                    time.sleep(0.001)
                task.on_progress(i, 3, "counting")
            return name

        return work

    results = {}
    threads = [
        threading.Thread(
            target=lambda n=n: results.setdefault(n, result_of(run_task(scheduler, threading.Event(), job(n)))),
            daemon=True,
        )
        for n in "ab"
    ]  # fmt: skip
    for thread in threads:
        thread.start()
    start.set()
    for thread in threads:
        thread.join(HANG)
    first, second = order[0][0], order[1][0]
    assert first != second
    assert order == [f"{n}{i}" for i in range(3) for n in (first, second)]
    assert results == {"a": "a", "b": "b"}
    assert not scheduler.busy


def test_a_waiting_task_can_be_stopped_and_the_queue_continues(result_of):
    scheduler, stop = Scheduler(), threading.Event()
    with scheduler.slot(threading.Event()):
        events = run_task(scheduler, stop, lambda task: "never")
        assert isinstance(next(events), ProgressUpdate)
        threading.Timer(0.05, stop.set).start()
        with pytest.raises(Stopped):
            next(events)
        assert scheduler.waiting == 0
    assert result_of(run_task(scheduler, threading.Event(), lambda task: "done")) == "done"


def test_slots_run_in_the_order_in_which_they_asked():
    scheduler, order, threads = Scheduler(), [], []

    def work(name):
        with scheduler.slot(threading.Event()):
            order.append(name)

    with scheduler.slot(threading.Event()):
        for name in range(5):
            threads.append(threading.Thread(target=work, args=(name,), daemon=True))
            threads[-1].start()
            while scheduler.waiting <= name:
                time.sleep(0.001)
    for thread in threads:
        thread.join(HANG)
    assert order == [0, 1, 2, 3, 4]


def test_a_task_that_is_stopped_while_it_yields_leaves_the_queue():
    scheduler, stop, held = Scheduler(), threading.Event(), threading.Event()

    def other():
        with scheduler.slot(threading.Event()):
            stop.set()
            held.wait(HANG)

    thread = threading.Thread(target=other, daemon=True)
    with pytest.raises(Stopped), scheduler.slot(stop) as yield_slot:
        thread.start()
        while scheduler.waiting == 0:
            time.sleep(0.001)
        yield_slot()
    assert scheduler.busy and scheduler.waiting == 0
    held.set()
    thread.join(HANG)
    assert not scheduler.busy


def test_an_error_in_one_task_lets_the_next_one_run(result_of):
    scheduler = Scheduler()

    def work(task):
        raise ValueError("no such word")

    with pytest.raises(ValueError, match="no such word"):
        result_of(run_task(scheduler, threading.Event(), work))
    assert not scheduler.busy


def test_closing_the_iterator_stops_the_task():
    scheduler, steps = Scheduler(), []

    def endless(task):
        for i in range(10**6):
            steps.append(i)
            task.publish(i)
            task.on_progress(i, 10**6, "counting")

    events = run_task(scheduler, threading.Event(), endless)
    next(events)
    events.close()
    count = len(steps)
    time.sleep(0.02)
    assert len(steps) == count < 10**6
    assert not scheduler.busy

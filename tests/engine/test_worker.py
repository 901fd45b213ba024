"""The thread that runs MLX: order, results, errors, stopping, idle work."""

import itertools
import threading
import time

import pytest
from support.waiting import wait_until

from kvp_mlx.engine import worker as module
from kvp_mlx.engine.worker import StoppedError, Worker


@pytest.fixture
def worker():
    made = []

    def make(idle_work=lambda: iter(())):
        made.append(Worker(idle_work))
        return made[-1]

    yield make
    for each in made:
        each.close()


def counting(job_steps, log):
    def job(emit):
        try:
            for number in range(job_steps):
                emit(number)
                time.sleep(0.001)
        finally:
            log.append("ended")
        return "result"

    return job


def test_everything_runs_on_one_other_thread_and_comes_back(worker):
    one = worker()
    threads = {one.call(threading.get_ident) for _ in range(3)}
    assert len(threads) == 1
    assert threads != {threading.get_ident()}
    log = []
    assert list(one.run(counting(5, log))) == [0, 1, 2, 3, 4]
    assert log == ["ended"]


def test_an_error_comes_back_and_the_thread_goes_on(worker):
    one = worker()
    with pytest.raises(ZeroDivisionError):
        one.call(lambda: 1 / 0)
    assert one.call(lambda: 5) == 5


def test_a_job_that_nobody_reads_any_more_has_ended_when_close_returns(worker):
    one, log = worker(), []
    steps = one.run(counting(10_000, log))
    assert next(steps) == 0
    steps.close()
    assert log == ["ended"]
    assert one.call(lambda: 5) == 5


def test_an_interrupt_where_the_reader_waits_stops_the_job(worker):
    one, log = worker(), []
    with pytest.raises(KeyboardInterrupt):
        for number in one.run(counting(10_000, log)):
            if number == 3:
                raise KeyboardInterrupt
    time.sleep(0.2)
    assert log == ["ended"]


def test_a_job_that_does_not_stop_is_left_behind(worker, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.05)
    one, log, may_end = worker(), [], threading.Event()

    def busy(emit):
        emit(1)
        may_end.wait()
        log.append("first")

    steps = one.run(busy)
    assert next(steps) == 1
    threading.Timer(0.02, one.stop).start()
    start = time.monotonic()
    with pytest.raises(StoppedError):
        next(steps)
    assert time.monotonic() - start < 0.5
    threading.Timer(0.05, may_end.set).start()
    assert one.call(lambda: log.append("second") or list(log)) == ["first", "second"]


def test_a_job_that_stops_in_time_is_waited_for(worker):
    one, log = worker(), []
    steps = one.run(counting(10_000, log))
    assert next(steps) == 0
    threading.Timer(0.02, one.stop).start()
    assert len(list(steps)) < 5_000
    assert log == ["ended"]


def test_idle_work_goes_on_between_jobs_and_is_closed_for_them(worker):
    log = []

    def idle_work():
        try:
            for number in itertools.count():
                log.append(number)
                time.sleep(0.001)
                yield
        finally:
            log.append("closed")

    one = worker(idle_work)
    time.sleep(0.1)
    assert one.call(lambda: len(log)) > 5
    time.sleep(0.1)
    assert log[log.index("closed") + 1] == 0  # begun anew


def test_a_key_pauses_idle_work(worker):
    times = []

    def idle_work():
        while True:
            times.append(time.monotonic())
            time.sleep(0.001)
            yield

    one = worker(idle_work)
    time.sleep(0.05)
    one.note_key()
    pressed = time.monotonic()
    time.sleep(0.25)
    later = [t - pressed for t in times if t > pressed]
    assert not [t for t in later if 0.03 < t < 0.09]
    assert [t for t in later if t > 0.1]


def test_idle_work_that_fails_is_remembered_and_jobs_go_on(worker):
    def idle_work():
        yield
        raise ValueError("broken")

    one = worker(idle_work)
    assert one.call(lambda: 5) == 5
    wait_until(lambda: isinstance(one.idle_error, ValueError))
    assert one.call(lambda: 6) == 6

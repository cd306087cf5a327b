"""Pieces of work shared out among threads."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from matgptq.machine.workers import INLINE, Workers, one_thread_each


@pytest.fixture(params=[1, 2, 5])
def workers(request):
    made = Workers(request.param)
    yield made
    made.close()


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [0, 1, 4, 23])
def test_results_come_in_the_order_of_the_items(workers, count):
    def work(item: int) -> int:
        time.sleep(0.002 * (item % 3))
        return item * item

    assert [*workers.map(work, range(count))] == [item * item for item in range(count)]


def test_what_a_piece_raises_is_raised_once_the_running_ones_have_ended(workers):
    begun, ended = [], []

    def work(item: int) -> None:
        begun.append(item)
        if item == 3:
            raise ValueError("three")
        time.sleep(0.01)
        ended.append(item)

    with pytest.raises(ValueError, match="three"):
        workers.run(work, range(100))
    assert sorted(begun) == sorted([*ended, 3])
    assert len(begun) <= 3 + 2 * workers.count + 1


def test_a_caller_who_stops_early_leaves_nothing_running(workers):
    running = []

    def work(item: int) -> int:
        running.append(item)
        time.sleep(0.005)
        running.remove(item)
        return item

    results = workers.map(work, range(50))
    assert next(results) == 0
    results.close()
    assert not running


def test_no_more_is_worked_on_ahead_than_there_are_workers(workers):
    begun = []
    results = workers.map(begun.append, range(50))
    next(results)
    time.sleep(0.05)
    assert len(begun) <= workers.count + 1


@pytest.mark.usefixtures("three_threads")
def test_each_thread_computes_with_one_of_pytorchs():
    with one_thread_each(torch.device("cpu")) as workers:
        together = threading.Barrier(3, timeout=20)

        def work(_: int) -> int:
            together.wait()  # three pieces at the same time, or it breaks
            return torch.get_num_threads()

        assert workers.count == 3
        assert [*workers.map(work, range(3))] == [1, 1, 1]
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3


@pytest.mark.usefixtures("three_threads")
def test_threads_are_given_back_after_an_error():
    with pytest.raises(RuntimeError, match="stop"), one_thread_each(torch.device("cpu")):
        raise RuntimeError("stop")
    assert torch.get_num_threads() == 3


@pytest.mark.usefixtures("three_threads")
def test_another_device_keeps_to_one_thread():
    with one_thread_each(torch.device("cuda")) as workers:
        assert workers is INLINE
        assert torch.get_num_threads() == 3

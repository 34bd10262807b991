import ctypes
import os
import signal
import time
from contextlib import closing

import pytest

from evacap.processing import media_evacap
from evacap.training.data.worker_pool import ITEMS_AHEAD, Lost, WorkerPool


def work(item):
    """Does what it is told."""
    match item:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "crash":
            ctypes.string_at(0)
        case "leave":
            os._exit(3)
        case "no return":  # as FFmpeg in a loop of its own
            media_evacap.SECONDS_A_WINDOW = 0.5
            media_evacap._Budget("clip.mp4")
            while True:
                pass
        case "hang":
            time.sleep(600)
        case "no module":
            raise ImportError("no such backend")
    return item * 2


class CannotStart:
    def __call__(self, item):
        return item

    def __reduce__(self):
        return os._exit, (4,)


def run(items, num_workers=2, seconds=60.0, function=work):
    with closing(WorkerPool(function, num_workers, seconds, "evacap.training.data.prepare")) as pool:
        yield from pool.map(items)


def test_results_come_in_the_order_of_the_items():
    assert list(run(range(50), 3)) == [(item, item * 2) for item in range(50)]


def test_only_so_many_items_are_begun_ahead():
    taken = []

    def items():
        for item in range(100):
            taken.append(item)
            yield item

    results = run(items())
    next(results)
    assert len(taken) <= 2 * ITEMS_AHEAD + 1
    results.close()


def test_a_worker_that_ends_costs_the_item_that_it_had():
    items = [1, "kill", 2, 3, "crash", "leave", 4, "hang", 5]
    results = list(run(items, seconds=3.0))
    assert [item for item, _ in results] == items
    lost = {item: result.reason for item, result in results if isinstance(result, Lost)}
    assert set(lost) == {"kill", "crash", "leave", "hang"}
    assert "SIGKILL" in lost["kill"] and "SIGSEGV" in lost["crash"]
    assert "exit status 3" in lost["leave"] and "more than 3 s" in lost["hang"]
    assert [result for _, result in results if not isinstance(result, Lost)] == [2, 4, 6, 8, 10]


def test_a_call_that_does_not_return_costs_its_item():
    results = dict(run([1, "no return", 2], num_workers=1))
    assert results[1] == 2 and results[2] == 4
    assert "takes more than 120 s of processor time" in results["no return"].reason
    assert not results["no return"].passing


def test_what_the_function_raises_ends_the_pool():
    with pytest.raises(ImportError, match="no such backend"):
        list(run([1, "no module", 2]))


def test_workers_that_cannot_start_are_an_error():
    with pytest.raises(RuntimeError, match="cannot start"):
        list(run([1, 2, 3], function=CannotStart()))


def test_workers_end_with_the_pool():
    results = run(range(1000))
    next(results)
    processes = [worker.process for worker in results.gi_frame.f_locals["pool"].workers]
    assert all(process.is_alive() for process in processes)
    results.close()
    assert not any(process.is_alive() for process in processes)

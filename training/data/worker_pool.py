"""Worker processes for a long list of items, each of which may crash its worker."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from ...processing.media_evacap import MEMORY_A_PROCESS, OVER_TIME, SECONDS_A_WINDOW, guard_process


ITEMS_AHEAD = 8
"""Number of items for each worker that may be started before the first of them is done."""


CRASHES = ("SIGSEGV", "SIGBUS", "SIGABRT", "SIGFPE", "SIGILL", "SIGSYS", "SIGTRAP")
"""Signals that a process causes itself."""


@dataclass(frozen=True)
class Lost:
    """The result of an item whose worker ended twice.

    Args:
        reason (`str`): How it ended.
        passing (`bool`): Whether it was ended from outside, for example by a system without free memory, so that the
            item may not be the cause.
    """

    reason: str
    passing: bool = False


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    again: tuple[int, Any] | None = None
    started: bool = False
    task: tuple[int, Any] | None = None
    since: float = 0.0


class WorkerPool:
    """Processes with one thread each that apply a function, with memory independent of the number of items.

    Unlike the pools of the standard library, it survives its workers: if one is killed or crashes in native code,
    another worker replaces it and tries the item once more. If that one ends too, the item becomes [`Lost`]. The
    workers end with the process that has the pool, however it ends.

    Args:
        function (`Callable`): A picklable function of one item. An exception in it ends the pool.
        num_workers (`int`): Number of processes.
        seconds (`float`): A worker is killed if an item takes longer.
        preload (`str`): The module of the function, which is imported once for all workers.
        memory (`int`): Bytes that a worker may take in addition to what it has when it begins; only on Linux.
        is_passing (`Callable`, *optional*): Whether a result is a failure that may pass; such an item is also tried
            once more, in a new worker.
    """

    def __init__(
        self,
        function: Callable[[Any], Any],
        num_workers: int,
        seconds: float,
        preload: str,
        memory: int = MEMORY_A_PROCESS,
        is_passing: Callable[[Any], bool] = lambda result: False,
    ):
        methods = multiprocessing.get_all_start_methods()
        self.context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        self.context.set_forkserver_preload([__name__, preload])
        self.function = function
        self.seconds = seconds
        self.memory = memory
        self.is_passing = is_passing
        self.tried: set[int] = set()
        self.workers: list[_Worker] = []
        for _ in range(num_workers):
            self.workers.append(self._start())

    def close(self) -> None:
        """Kills the workers."""
        for worker in self.workers:
            worker.connection.close()
            worker.process.kill()
        for worker in self.workers:
            worker.process.join()

    def map(self, items: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        """Yields `(item, result)` in the order of the items.

        Raises:
            RuntimeError: If a worker ends before its first item, because others would too.
        """
        numbered = enumerate(items)
        self.tried.clear()
        done: dict[int, tuple[Any, Any]] = {}
        sent = yielded = 0
        while True:
            for worker in self.workers:
                if not worker.started or worker.task is not None:
                    continue
                if worker.again is not None:
                    worker.task, worker.again, worker.since = worker.again, None, time.monotonic()
                    _send(worker.connection, worker.task[1])
                elif sent - yielded < ITEMS_AHEAD * len(self.workers):
                    worker.task, worker.since = next(numbered, None), time.monotonic()
                    if worker.task is not None:
                        sent += 1
                        _send(worker.connection, worker.task[1])
            if sent == yielded and all(worker.started for worker in self.workers):
                return
            for number, result in self._results():
                done[number[0]] = (number[1], result)
            while yielded in done:
                yield done.pop(yielded)
                yielded += 1

    def _results(self) -> Iterator[tuple[tuple[int, Any], Any]]:
        """Waits a moment, and yields the finished tasks with their results."""
        ready = wait([worker.connection for worker in self.workers], timeout=1.0)
        for position, worker in enumerate(self.workers):
            late = worker.task is not None and time.monotonic() - worker.since > self.seconds
            if worker.connection in ready:
                try:
                    result = worker.connection.recv()
                except (EOFError, OSError):
                    result = _ending(worker.process)
            elif late:
                result = Lost(f"its worker was ended, as it took more than {self.seconds:g} s")
            else:
                continue
            if isinstance(result, BaseException):
                raise result
            is_lost, task = isinstance(result, Lost), worker.task
            if is_lost and not worker.started:
                raise RuntimeError(f"a worker process cannot start: {result.reason}")
            again = None
            if task is not None and task[0] not in self.tried and (is_lost or self.is_passing(result)):
                self.tried.add(task[0])
                again = task
            if is_lost or again is not None:
                worker.connection.close()
                worker.process.kill()
                self.workers[position] = self._start(again)
            if task is not None and again is None:
                yield task, result
            worker.started, worker.task = True, None

    def _start(self, again: tuple[int, Any] | None = None) -> _Worker:
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=_work, args=(theirs, self.function, self.memory), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours, again)


def _send(connection: Connection, item: Any) -> None:
    try:
        connection.send(item)
    except OSError:  # The worker has ended, which reading its end of the pipe will show.
        pass


def _ending(process: BaseProcess) -> Lost:
    process.join()
    if process.exitcode is not None and process.exitcode < 0:
        name = signal.Signals(-process.exitcode).name
        if name in CRASHES:
            return Lost(f"its worker was ended by {name}: a crash in a decoder")
        return Lost(f"its worker was ended by {name}: by somebody, or for want of memory", passing=True)
    if process.exitcode == OVER_TIME:
        return Lost(f"reading it takes more than {2 * SECONDS_A_WINDOW:g} s of processor time; leave it out")
    return Lost(f"its worker ended with exit status {process.exitcode}")


def _work(connection: Connection, function: Callable[[Any], Any], memory: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the process that has the pool.
    torch.set_num_threads(1)
    guard_process(memory)
    connection.send(None)
    while True:
        try:
            item = connection.recv()
        except EOFError:
            os._exit(0)  # No process is left that would wait for a clean exit.
        try:
            result = function(item)
        except Exception as error:
            result = error
        connection.send(result)

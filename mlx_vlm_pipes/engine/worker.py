"""The thread that owns the model: MLX streams belong to the thread that made them.

Everything that touches an array runs here, callable from any thread.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import Any, TypeVar

import mlx.core as mx

from mlx_vlm_pipes.dtypes import Device
from mlx_vlm_pipes.errors import EngineClosed, PipesError

T = TypeVar("T")
_LIVE: weakref.WeakSet[OwnerThread] = weakref.WeakSet()
_PROCESSES: set[int] = set()  # that have run a model: this one, or those it was forked from


def require_same_process(process: int) -> None:
    """Raises: EngineClosed in a process forked from that one: its threads are not there."""
    if os.getpid() != process:
        raise EngineClosed(
            "a model was run before this process was forked, and MLX's threads do not survive "
            'that; start the process with multiprocessing.get_context("spawn") and load there'
        )


class OwnerThread:
    """Runs calls in order and, between them, `idle_work` for as long as it returns True.

    Each runs on `device`, whatever MLX's default is. last_work runs once, when the thread ends.
    Raises: EngineClosed in a process that was forked from one with such a thread.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._process = os.getpid()
        for process in _PROCESSES:
            require_same_process(process)
        _PROCESSES.add(self._process)
        self._wake = threading.Condition()
        self._stopping = self._died = False
        self._taken: deque[tuple[Future[Any], Callable[[], Any]]] = deque()  # the first one runs
        self._failure: PipesError | None = None  # of calls on a thread that has been abandoned
        self.idle_work: Callable[[], bool] | None = None
        self.last_work: Callable[[], None] | None = None
        self._thread = threading.Thread(target=self._run, name="mlx_vlm_pipes", daemon=True)
        self._thread.start()
        _LIVE.add(self)

    @property
    def is_current(self) -> bool:
        """Whether this is the owning thread, where nothing may wait for what it makes."""
        return threading.current_thread() is self._thread

    @property
    def has_died(self) -> bool:
        """Whether the thread has ended without being told to: a step raised."""
        return self._died

    def call(self, function: Callable[[], T]) -> T:
        """Run on the owning thread and wait for the result, or its exception."""
        if self.is_current:
            return function()
        return self.post(function).result()

    def post(self, function: Callable[[], T]) -> Future[T]:
        """As call, without waiting."""
        require_same_process(self._process)
        future: Future[T] = Future()
        with self._wake:
            if self._failure is not None:
                raise self._failure.with_traceback(None)  # not that of who met it before
            if self._stopping:
                raise EngineClosed("the pipeline is closed")
            self._calls.append((future, function))
            self._wake.notify()
        return future

    def stop(self) -> None:
        """End the thread after the step it is in. A forked process has no such thread."""
        if os.getpid() != self._process:
            return
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if threading.current_thread() is not self._thread and self._failure is None:
            self._thread.join(timeout=10)

    def abandon(self, error: PipesError) -> None:
        """Nobody waits for the thread any more, which hangs in MLX: all calls raise this."""
        with self._wake:
            self._failure, self._died, self._stopping = error, True, True
            calls, self._calls = [*self._taken, *self._calls], deque()
            self._wake.notify()
        for future, _ in calls:
            with contextlib.suppress(InvalidStateError):
                future.set_exception(error)

    def _run(self) -> None:
        try:
            self._work()
        finally:  # whatever ends it: nobody may wait for ever
            with self._wake:
                self._died, self._stopping = self._died or not self._stopping, True
            self._close()

    def _work(self) -> None:
        busy = False
        while True:
            with self._wake:
                while not (self._calls or busy or self._stopping):
                    self._wake.wait()
                if self._stopping:
                    return
                self._taken, self._calls = self._calls, deque()
            while self._taken:
                with self._device.active():
                    _serve(*self._taken[0])
                    self._taken.popleft()
            with self._device.active():
                busy = self.idle_work() if self.idle_work is not None else False

    def _close(self) -> None:
        for future, _ in self._calls:
            future.set_exception(EngineClosed("the pipeline is closed"))
        if self.last_work is not None:
            self.last_work()
        self.idle_work = self.last_work = None
        self._device.synchronize()
        mx.clear_streams()


def _serve(future: Future[Any], function: Callable[[], Any]) -> None:
    """Run one call. A function of its own, so that the thread holds on to nothing of it."""
    try:
        result = function()
    except BaseException as error:  # handed to the caller, who raises it
        with contextlib.suppress(InvalidStateError):  # it has been abandoned
            future.set_exception(error)
    else:
        with contextlib.suppress(InvalidStateError):
            future.set_result(result)


@atexit.register
def _stop_all() -> None:
    for worker in list(_LIVE):
        worker.stop()

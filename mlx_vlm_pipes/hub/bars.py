"""The bar of a download, by which Ctrl-C ends it too."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any

from mlx_vlm_pipes.progress import DELAY_S, erase, style


@contextmanager
def download_bars(name: str, *, is_on: bool) -> Iterator[type[Any]]:
    """The class that the hub's library is to make its bars of: one is shown, that of the bytes."""
    from huggingface_hub.utils import tqdm

    made: list[Any] = []
    begun = time.monotonic()

    class Bytes(tqdm):
        is_cancelled = False

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            is_bytes = kwargs.get("unit") == "B" and "transfer" not in str(kwargs.get("name"))
            kwargs |= {"desc": f"downloading {name}", **style("B")}
            kwargs["disable"] = not (is_on and is_bytes)
            super().__init__(*args, **kwargs)
            made.append(self)

        def update(self, n: float | None = 1) -> bool | None:
            """Raises: InterruptedError, which ends the thread that downloads."""
            if type(self).is_cancelled:
                raise InterruptedError
            return super().update(n)

        def refresh(self, *args: Any, **kwargs: Any) -> Any:
            """What is in the cache already needs no bar."""
            if self.disable or time.monotonic() - begun < DELAY_S:
                return True
            return super().refresh(*args, **kwargs)

        def set_description(self, *_: Any, **__: Any) -> None:
            """It keeps its own."""

        set_description_str = set_postfix_str = set_description

    try:
        yield Bytes
    finally:
        for bar in made:
            erase(bar)


def interruptible(work: Callable[[], str], bars: type[Any]) -> str:
    """What `work` returns, or raises. Ctrl-C cancels it through its bars: the hub's library itself
    would finish the files that it has begun, however large they are."""
    made: Future[str] = Future()

    def run() -> None:
        try:
            made.set_result(work())
        except BaseException as error:
            made.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return made.result()
    except KeyboardInterrupt:
        bars.is_cancelled = True
        with suppress(ImportError):  # Xet's threads, of huggingface_hub 2, are not Python's
            from huggingface_hub.utils._xet import abort_xet_session

            abort_xet_session()
        raise

"""Cases that fail in every way there is, to try the machine itself."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import ClassVar

from tests.torture import section
from tests.torture.section import Case, refused

WAYS: list[tuple[str, Callable[[], object]]] = [
    ("holds", lambda: None),
    ("raises", lambda: [][0]),
    ("is taken", lambda: refused(lambda: "taken all the same")),
    ("hangs", lambda: time.sleep(60)),
    ("ends the process", lambda: os._exit(7)),
    ("is killed", lambda: os.kill(os.getpid(), 9)),
    ("holds again", lambda: None),
]


class Section(section.Section):
    small: ClassVar[int] = len(WAYS)
    limit_s: ClassVar[float] = 2.0

    @property
    def whole(self) -> int:
        return len(WAYS)

    def draw(self, index: int) -> Case:
        return Case(*WAYS[index])

"""A rank of the tests that kill one: `python -m tests.distributed.lost FOLDER MOMENT`.

Rank 0 says where it is ("idle", "prefill", "answer"), then how long after the other's death all
handles had failed.
"""

from __future__ import annotations

import sys
import threading
import time

from mlx_vlm_pipes import EngineConfig, RankLost, load
from mlx_vlm_pipes.command import put
from mlx_vlm_pipes.engine.requests import Handle

LONG = "a b c d e f g h " * 300


def failed(handle: Handle, done: list[str]) -> None:
    """Read to the end, and note how it came."""
    try:
        for _ in handle:
            pass
        done.append("complete")
    except RankLost as error:
        done.append(str(error))


def main(folder: str, moment: str) -> None:
    limits = EngineConfig(prefill_chunk=16)
    with load(folder, distributed="auto", device="cpu", engine=limits, max_length=8192) as pipe:
        pipe.generate("a b", raw=True, max_tokens=2)
        done: list[str] = []
        prompts = {"idle": [], "prefill": [LONG] * 3, "answer": ["a b", "c d", "e"]}[moment]
        handles = [
            pipe.submit(prompt, raw=True, max_tokens=4000, ignore_eos=True) for prompt in prompts
        ]
        if moment == "answer":
            for handle in handles:
                handle.next_chunk()
        readers = [threading.Thread(target=failed, args=[handle, done]) for handle in handles]
        for reader in readers:
            reader.start()
        put(f"{moment}\n")
        while pipe.engine.lost is None:
            time.sleep(0.01)
        for reader in readers:
            reader.join()
        try:
            pipe.generate("a", raw=True)
        except RankLost as error:
            done.append(str(error))
        put("\n".join(["lost:", *done, ""]))
        time.sleep(60)  # the process ends all the same


if __name__ == "__main__":
    main(*sys.argv[1:])

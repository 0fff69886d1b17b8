"""What the engine promises about time: ragged prefill, second turns, long contexts, long answers.

    python benchmarks/engine.py [--rounds 5]

Our own figures, each as a ratio of two of our own measurements in one run (medians).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from decode import SHAPES, Silent, write_model
from random_model import write_random_model

from mlx_vlm_pipes import EngineConfig, load
from mlx_vlm_pipes.contexts import SamplingParams, TextContext, TokenBuffer
from mlx_vlm_pipes.engine.scheduler import Scheduler
from mlx_vlm_pipes.hf_config import read_config
from mlx_vlm_pipes.loading import LoadOptions, load_model
from mlx_vlm_pipes.registry import find_room


def text_scheduler(folder: Path) -> Scheduler:
    """A scheduler on this thread, without prefix reuse, so that every prompt is computed."""
    config = read_config(folder)
    model = load_model(find_room(config), folder, config, LoadOptions())
    return Scheduler(model, EngineConfig(enable_prefix_caching=False))


def submit(scheduler: Scheduler, length: int, new_tokens: int) -> None:
    ids = np.random.default_rng(length).integers(0, 500, length)
    params = SamplingParams(temperature=0, max_new_tokens=new_tokens)
    context = TextContext(max_length=8192, tokens=TokenBuffer(ids), sampling_params=params)
    scheduler.submit(context, Silent())


def run_to_end(scheduler: Scheduler, lengths: list[int], new_tokens: int) -> float:
    """Seconds until all prompts have their tokens."""
    begun = time.perf_counter()
    for length in lengths:
        submit(scheduler, length, new_tokens)
    while scheduler.step():
        pass
    return time.perf_counter() - begun


def step_times(scheduler: Scheduler, length: int, new_tokens: int) -> list[float]:
    """Seconds of each decode step of one row."""
    submit(scheduler, length, new_tokens)
    while not scheduler.running:
        scheduler.step()
    return times_to_end(scheduler)


def times_to_end(scheduler: Scheduler) -> list[float]:
    """Seconds of each step until nothing is left to do."""
    times = []
    busy = True
    while busy:
        begun = time.perf_counter()
        busy = scheduler.step()
        times.append(time.perf_counter() - begun)
    return times


def medians(rounds: int, sides: dict[str, Callable[[], float]]) -> dict[str, float]:
    """Interleaved rounds after one to warm up; the median of each side."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(rounds + 1):
        for name, run in sides.items():
            spent = run()
            if i:
                found[name].append(spent)
    return {name: statistics.median(values) for name, values in found.items()}


def ragged_prefill(scheduler: Scheduler, rounds: int) -> None:
    sides = {
        "together": lambda: run_to_end(scheduler, [50, 1000], 1),
        "50": lambda: run_to_end(scheduler, [50], 1),
        "1000": lambda: run_to_end(scheduler, [1000], 1),
    }
    found = medians(rounds, sides)
    ratio = found["together"] / (found["50"] + found["1000"])
    print(f"ragged prefill of 50 and 1000 tokens: {ratio:.2f} of their sum alone (bar 1.1)")


def long_context(scheduler: Scheduler, rounds: int) -> None:
    sides = {
        "512": lambda: statistics.median(step_times(scheduler, 512, 30)),
        "4096": lambda: statistics.median(step_times(scheduler, 4096, 30)),
    }
    found = medians(max(1, rounds // 2), sides)
    print(
        f"decode at 4096 tokens of context: {found['4096'] / found['512']:.2f} of the time at 512 "
        f"({found['512'] * 1e3:.2f} and {found['4096'] * 1e3:.2f} ms; 8.0 of the cache bytes)"
    )


def batch_step(scheduler: Scheduler, lengths: list[int]) -> float:
    """Seconds of a decode step of rows with these contexts, at sizes that it is compiled for."""
    for length in lengths:
        submit(scheduler, length, 45)
    while len(scheduler.running) < len(lengths):
        scheduler.step()
    return statistics.median(times_to_end(scheduler)[-20:-4])


def uneven_batch(scheduler: Scheduler, rounds: int) -> None:
    sides = {
        "together": lambda: batch_step(scheduler, [3000, *[40] * 15]),
        "3000": lambda: batch_step(scheduler, [3000]),
        "40": lambda: batch_step(scheduler, [40] * 15),
    }
    found = medians(max(1, rounds // 2), sides)
    ratio = found["together"] / (found["3000"] + found["40"])
    print(f"a step of one row of 3000 and 15 of 40: {ratio:.2f} of the two apart (bar 1.3)")


def long_answer(scheduler: Scheduler) -> None:
    times = step_times(scheduler, 50, 1000)
    early, late = statistics.median(times[50:150]), statistics.median(times[-100:])
    print(f"1000 tokens streamed: the last 100 steps take {late / early:.2f} of steps 50 to 150")


def larger_picture(folder: Path) -> Path:
    """Let the processor cut pictures into up to 4 x 4 frames of 64 pixels, 16 tokens each."""
    path = folder / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    settings.update(max_image_size={"longest_edge": 64}, size={"longest_edge": 256})
    path.write_text(json.dumps(settings))
    path = folder / "processor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_seq_len": 16}))
    return folder


def second_turn(folder: Path, rounds: int) -> None:
    """Time to first token of a second turn about the same picture, against the first turn's."""
    pipe = load(folder)
    image = str(next((folder / "media").glob("shapes*")))
    firsts, seconds, cached = [], [], ""
    for i in range(rounds + 1):
        pipe.engine.forget()
        parts = [{"type": "image", "image": image}, {"type": "text", "text": "What is it?"}]
        messages = [{"role": "user", "content": parts}]
        first = pipe.generate(messages, max_tokens=4, ignore_eos=True)
        messages += [
            {"role": "assistant", "content": [{"type": "text", "text": first.text}]},
            {"role": "user", "content": [{"type": "text", "text": "And now?"}]},
        ]
        second = pipe.generate(messages, max_tokens=4, ignore_eos=True)
        if i:
            firsts.append(first.timings.time_to_first_token_s)
            seconds.append(second.timings.time_to_first_token_s)
            cached = f"{second.usage.cached_tokens} of {second.usage.prompt_tokens}"
    ratio = statistics.median(seconds) / statistics.median(firsts)
    print(
        f"second turn over the same picture: {ratio:.2f} of the first turn's time to first token "
        f"({statistics.median(firsts) * 1e3:.0f} ms; bar 0.15); {cached} tokens cached"
    )
    pipe.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "narrow"
        folder.mkdir()
        write_model(folder, SHAPES["narrow"])
        scheduler = text_scheduler(folder)
        ragged_prefill(scheduler, rounds)
        long_context(scheduler, rounds)
        uneven_batch(scheduler, rounds)
        long_answer(scheduler)
        wide = {
            "text_config": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6,
                            "head_dim": 64},
            "vision_config": {"hidden_size": 256, "intermediate_size": 768,
                              "num_hidden_layers": 6, "image_size": 64},
        }  # fmt: skip
        vlm = write_random_model("idefics3", Path(name) / "vlm", wide)
        second_turn(larger_picture(vlm), rounds)


if __name__ == "__main__":
    main()

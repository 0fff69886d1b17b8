"""Tortures the package: drawn cases of what people do to it, and whether it holds.

  python -m tests.torture media http --seed 3
  python -m tests.torture all --seed 0            the whole: some half an hour
  python -m tests.torture values --seed 3 --case 17        one case alone

Sections: exactness, values, media, http, concurrency, signals, checkpoints, memory, load. The same
seed draws the same cases, each from its own number. They run in a child process, killed and
made anew where one crashes or hangs. A line a case that fails, a line a section at its end.
"""

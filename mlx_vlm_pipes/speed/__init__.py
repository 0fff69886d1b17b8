"""How fast a loaded model is: the stopwatch of `bench` and of `check --device`."""

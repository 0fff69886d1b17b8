"""How fast a loaded model is: the stopwatch of `bench` and of `check --device`, and what
`bench` measures and shows."""

"""One way from a checkpoint's files to canonical tensors and modules: for load, convert, check."""

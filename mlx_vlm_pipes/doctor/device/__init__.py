"""What a machine computes, against stored numbers and against itself."""

"""What is told of pictures and clips that a model was given."""

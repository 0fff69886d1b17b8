"""Small random-weight checkpoints with the outputs of Hugging Face transformers next to them."""

"""GGUF files as model folders: their header, and the JSON files that it stands for. No MLX."""

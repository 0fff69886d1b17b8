"""Models from the Hugging Face hub: `loading` asks `download`."""

"""How results, prompts and plans look: drawn with Pillow, or as HTML. Loaded when looked at."""

"""An HTTP server that OpenAI's clients speak to: JSON on one side, a Pipeline on the other."""

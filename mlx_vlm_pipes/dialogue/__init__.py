"""What the chat command does: lines of a terminal, files dragged into it, its commands."""

"""One room per architecture; `registry` knows the list."""

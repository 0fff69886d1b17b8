"""Scheduling, the decode loop, sampling and caches. Knows no architecture."""

"""Folders on a network file system, where a node sees the files of other nodes with a delay."""

SEEN_LATE_SECONDS = 60.0

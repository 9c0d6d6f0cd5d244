"""Folders on a network file system, which shows the nodes' files to one another with a delay."""

SEEN_LATE_SECONDS = 60.0

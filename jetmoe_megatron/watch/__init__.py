"""A run under way, in a terminal (`jetmoe watch`). It reads the run folder, and needs no torch."""

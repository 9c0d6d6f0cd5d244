"""What a run did, read from its folder: a table, curves, a page for a browser. It needs neither torch nor the run's data."""

"""What a run did, read from its folder: a table, curves, a page for a browser. No torch, none of the data."""

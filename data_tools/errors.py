class InputError(ValueError):
    """Something the user gave is wrong. The message is one line that says what to change; commands exit with 2."""

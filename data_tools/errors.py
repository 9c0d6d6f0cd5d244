class InputError(ValueError):
    """Something the user gave is wrong. One line that says what to change; commands exit with 2."""

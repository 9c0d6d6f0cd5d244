"""What the pages of `jetmoe plan` and `jetmoe report` share: their elements and one style."""

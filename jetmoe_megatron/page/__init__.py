"""What the pages for a browser share: the elements, and one style. `jetmoe plan --html` and `jetmoe report --html` write them."""

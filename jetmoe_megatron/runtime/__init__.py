"""What machine this is: the device of a rank, its process group, and what a CPU needs to stand in for a GPU."""

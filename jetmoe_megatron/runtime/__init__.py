"""The machine: the device of a rank, its process group, and what a CPU needs to replace a GPU."""

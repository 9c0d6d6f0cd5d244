"""What machine this is. The one place that knows whether a rank computes on CUDA or on the CPU."""

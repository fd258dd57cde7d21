"""What the core stands on, and nobody needs to read first: ranks, wrapping, kernels, signals, files, the run folder."""

"""Table rows while a model runs: stored, compressed, on the device, on the host or on disk."""

"""What a run has to work with: devices, threads and processes."""

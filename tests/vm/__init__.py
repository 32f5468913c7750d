"""Real systems in an emulated machine: `make test-vm`."""

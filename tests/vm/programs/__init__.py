"""What the checks start in the machine."""

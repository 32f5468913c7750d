"""The name under which programs/stdio is executed: see `__main__` here."""

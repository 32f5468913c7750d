"""One thin module for each thing of the kernel, of systemd or of files that we use.

Each wraps calls and says what they raise; none decides what becomes of the service.
May import: model.
"""

"""The errors that users see, each with its exit status."""

from __future__ import annotations


class Refusal(Exception):
    """One clear line for the operator: what, with which, and what to do."""

    status = 100


class UsageError(Refusal):
    """The command line (or a file it names) asks for something that cannot be."""

    status = 2


class SystemRefused(Refusal):
    """A system call failed; the message holds the system's own words."""

    status = 111


class AlreadyRunning(Refusal):
    """A living protector holds the pid file (or the socket) already."""

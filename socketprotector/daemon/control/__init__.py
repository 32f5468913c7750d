"""The control socket: its clients, its commands, its answers (docs/control.md)."""

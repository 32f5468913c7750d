"""`--handoff legacy`: the worker that serves a daemon built for the C++ SocketProtector."""

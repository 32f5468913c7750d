"""`--handoff legacy`: a worker that adapts a daemon built for the C++ SocketProtector."""

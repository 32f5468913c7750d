/* The least that can forward: accept4, sendmsg with the descriptor, close; nothing else.
 *
 *     forward COMMAND...    accepts on the listener whose number is in BENCH_LISTENER and gives
 *                           what comes to COMMAND, by the channel of docs/protocol.md
 *
 * No generation, no queue that could be taken back, no signal, no time limit: what any design costs
 * in which one process accepts and another one serves, beside what ours costs.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "forward.h"

static void die(const char *what)
{
    perror(what);
    exit(111);
}

static void start(char **command, int channel, pid_t parent)
{
    if (fork() != 0)
        return;
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    if (getppid() != parent)
        exit(0);
    setsid(); /* as our workers do */
    inherit_channel(channel);
    execvp(command[0], command);
    die(command[0]);
}

int main(int argc, char **argv)
{
    const char *given = getenv("BENCH_LISTENER");
    struct sched_param no_priority = {0};
    struct epoll_event event = {.events = EPOLLIN};
    int channel[2], listener, room = 1 << 18;

    if (argc < 2 || given == NULL)
        return 2;
    listener = atoi(given);
    fcntl(listener, F_SETFL, fcntl(listener, F_GETFL) | O_NONBLOCK);
    fcntl(listener, F_SETFD, FD_CLOEXEC);
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, channel) < 0)
        die("socketpair");
    setsockopt(channel[1], SOL_SOCKET, SO_SNDBUF, &room, sizeof room);
    start(argv + 1, channel[0], getpid());
    close(channel[0]);
    if (sched_setscheduler(0, SCHED_BATCH, &no_priority) < 0)
        die("sched_setscheduler");
    int set = epoll_create1(EPOLL_CLOEXEC);
    if (set < 0 || epoll_ctl(set, EPOLL_CTL_ADD, listener, &event) < 0)
        die("epoll");
    for (;;) {
        if (epoll_wait(set, &event, 1, -1) < 0 && errno != EINTR)
            die("epoll_wait");
        if (forward_waiting(listener, channel[1]) < 0)
            return 0; /* the worker has ended */
    }
}

/* The least that can replace workers: fork, exec, and a signal; nothing else.
 *
 *     least [forward|rolling] PORT|PATH COMMAND...
 *
 * It listens, and starts COMMAND twice, with the listener as descriptor 3; at HUP it starts two
 * more and, 0.5 s later, sends TERM to the first two.  With `forward`, it accepts the
 * connections and sends them to the workers (docs/protocol.md, "Channel").  At a reload it then
 * closes the first channel instead of sending TERM, and the first two workers finish.  With
 * `rolling`, each 0.25 s one worker starts or gets TERM, so usually at most three run.
 *
 * It checks no release, and waits for none.  So its gap at a reload is mostly the workers' own.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "forward.h"

enum { WORKERS = 2, BACKLOG = 4096, LISTENER = 3, STEP_MS = 250 };

struct generation {
    pid_t pids[WORKERS]; /* 0: the worker has ended */
    int channel;         /* -1: its workers accept themselves */
};

static sigset_t watched;
static struct generation serving, newer;

static void die(const char *what)
{
    perror(what);
    exit(111);
}

static int listen_at(const char *where)
{
    struct sockaddr_in port = {AF_INET, htons((uint16_t)atoi(where)), {htonl(INADDR_LOOPBACK)}, {0}};
    struct sockaddr_un path = {.sun_family = AF_UNIX};
    int at_path = strchr(where, '/') != NULL, yes = 1;
    int fd = socket(at_path ? AF_UNIX : AF_INET, SOCK_STREAM, 0);

    strncpy(path.sun_path, where, sizeof path.sun_path - 1);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    if (bind(fd, at_path ? (struct sockaddr *)&path : (struct sockaddr *)&port,
             at_path ? sizeof path : sizeof port) < 0 || listen(fd, BACKLOG) < 0)
        die(where);
    return fd;
}

/* Run COMMAND in this child.  theirs: the workers' end of the channel; -1: the workers accept. */
static void become(char **command, int theirs)
{
    struct sched_param no_priority = {0};

    sigprocmask(SIG_UNBLOCK, &watched, NULL);
    if (theirs >= 0) {
        setsid(); /* as our workers do */
        sched_setscheduler(0, SCHED_OTHER, &no_priority);
        close(LISTENER);
        inherit_channel(theirs);
    }
    execvp(command[0], command);
    die(command[0]);
}

/* Start `count` workers from number `first` on. */
static void start(char **command, int forwards, struct generation *started, int first, int count)
{
    int channel[2] = {-1, -1}, room = 1 << 18;

    if (forwards) {
        if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, channel) < 0)
            die("socketpair");
        setsockopt(channel[1], SOL_SOCKET, SO_SNDBUF, &room, sizeof room);
    }
    for (int i = first; i < first + count; i++) {
        started->pids[i] = fork();
        if (started->pids[i] < 0)
            die("fork");
        if (started->pids[i] == 0)
            become(command, channel[0]);
    }
    if (forwards)
        close(channel[0]);
    started->channel = channel[1];
}

/* Let the newer workers from number `first` on take the place of the serving ones. */
static void replace(int first, int count)
{
    serving.channel = newer.channel;
    for (int i = first; i < first + count; i++) {
        serving.pids[i] = newer.pids[i];
        newer.pids[i] = 0;
    }
}

static void end(const struct generation *ended, int first, int count)
{
    if (ended->channel >= 0) {
        close(ended->channel);
        return;
    }
    for (int i = first; i < first + count; i++)
        if (ended->pids[i])
            kill(ended->pids[i], SIGTERM);
}

/* Reap ended workers, so that end() signals no process that got an ended worker's pid. */
static void reap(void)
{
    pid_t pid;

    while ((pid = waitpid(-1, NULL, WNOHANG)) > 0)
        for (int i = 0; i < WORKERS; i++) {
            serving.pids[i] = serving.pids[i] == pid ? 0 : serving.pids[i];
            newer.pids[i] = newer.pids[i] == pid ? 0 : newer.pids[i];
        }
}

static int64_t now_ms(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000LL + now.tv_nsec / 1000000;
}

/* Return the next signal's number; 0 at until_ms (-1: no limit).  Forward connections meanwhile. */
static int next_signal(int signals, int forwards, int64_t until_ms)
{
    struct pollfd watch[2] = {{signals, POLLIN, 0}, {LISTENER, POLLIN, 0}};
    struct signalfd_siginfo got;

    for (;;) {
        int64_t left_ms = until_ms < 0 ? -1 : until_ms - now_ms();

        if (until_ms >= 0 && left_ms <= 0)
            return 0;
        if (poll(watch, forwards ? 2 : 1, (int)left_ms) < 0 && errno != EINTR)
            die("poll");
        if (read(signals, &got, sizeof got) == sizeof got)
            return (int)got.ssi_signo;
        if (forwards && forward_waiting(LISTENER, serving.channel) < 0)
            die("no worker is left");
    }
}

int main(int argc, char **argv)
{
    struct sched_param no_priority = {0};
    int forwards = argc > 1 && strcmp(argv[1], "forward") == 0;
    int rolls = argc > 1 && strcmp(argv[1], "rolling") == 0;
    int count = rolls ? 1 : WORKERS; /* how many workers are replaced at once */
    int first = WORKERS;             /* the first of them; WORKERS: no replacement is under way */
    int started = 0;                 /* whether the newer ones of them run */
    int wanted = 0;                  /* whether to begin another replacement after this one */
    int64_t until_ms = -1;           /* when to start or end workers; -1: never */

    argv += forwards || rolls;
    argc -= forwards || rolls;
    if (argc < 3)
        return 2;
    sigemptyset(&watched);
    sigaddset(&watched, SIGTERM);
    sigaddset(&watched, SIGHUP);
    sigaddset(&watched, SIGCHLD);
    sigprocmask(SIG_BLOCK, &watched, NULL);
    int listener = listen_at(argv[1]);
    if (listener != LISTENER && dup2(listener, LISTENER) < 0)
        die("dup2");
    int signals = signalfd(-1, &watched, SFD_CLOEXEC | SFD_NONBLOCK);
    if (signals < 0)
        die("signalfd");
    if (forwards) {
        fcntl(LISTENER, F_SETFL, fcntl(LISTENER, F_GETFL) | O_NONBLOCK);
        sched_setscheduler(0, SCHED_BATCH, &no_priority);
    }
    start(argv + 2, forwards, &serving, 0, WORKERS);
    for (int got = 0; got != SIGTERM;) {
        got = next_signal(signals, forwards, until_ms);
        wanted = wanted || got == SIGHUP;
        if (got == 0) {
            if (started) {
                end(&serving, first, count);
                replace(first, count);
                first += count;
            } else {
                start(argv + 2, forwards, &newer, first, count);
            }
            started = !started;
            until_ms = first < WORKERS ? now_ms() + STEP_MS * count : -1;
        }
        if (wanted && first == WORKERS) {
            wanted = first = 0;
            until_ms = now_ms();
        }
        reap();
    }
    end(&serving, 0, WORKERS);
    if (started)
        end(&newer, first, count);
    while (wait(NULL) > 0 || errno == EINTR)
        ;
    return 0;
}

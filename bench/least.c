/* The least that can replace workers: fork, exec, and a signal; nothing else.
 *
 *     least PORT|PATH COMMAND...    listens, and starts COMMAND twice, with the listener as
 *                                   descriptor 3; at HUP it starts two more and, 0.5 s later,
 *                                   sends TERM to the first two
 *
 * It checks no release, and waits for none.  So its gap at a reload is mostly the workers' own.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { WORKERS = 2, BACKLOG = 4096, LISTENER = 3 };

static const struct timespec overlap = {0, 500000000};
static sigset_t watched;
static pid_t serving[WORKERS], newer[WORKERS]; /* 0: it has ended */

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

static void start(char **command, pid_t *pids)
{
    for (int i = 0; i < WORKERS; i++) {
        pids[i] = fork();
        if (pids[i] < 0)
            die("fork");
        if (pids[i] == 0) {
            sigprocmask(SIG_UNBLOCK, &watched, NULL);
            execvp(command[0], command);
            die(command[0]);
        }
    }
}

static void end(const pid_t *pids)
{
    for (int i = 0; i < WORKERS; i++)
        if (pids[i])
            kill(pids[i], SIGTERM);
}

/* Reap ended workers, so that end() signals no process that got an ended worker's pid. */
static void reap(void)
{
    pid_t pid;

    while ((pid = waitpid(-1, NULL, WNOHANG)) > 0)
        for (int i = 0; i < WORKERS; i++) {
            serving[i] = serving[i] == pid ? 0 : serving[i];
            newer[i] = newer[i] == pid ? 0 : newer[i];
        }
}

int main(int argc, char **argv)
{
    sigset_t term;

    if (argc < 3)
        return 2;
    sigemptyset(&term);
    sigaddset(&term, SIGTERM);
    watched = term;
    sigaddset(&watched, SIGHUP);
    sigaddset(&watched, SIGCHLD);
    sigprocmask(SIG_BLOCK, &watched, NULL);
    int listener = listen_at(argv[1]);
    if (listener != LISTENER && dup2(listener, LISTENER) < 0)
        die("dup2");
    start(argv + 2, serving);
    for (int got = 0; got != SIGTERM;) {
        got = sigwaitinfo(&watched, NULL);
        if (got == SIGHUP) {
            start(argv + 2, newer);
            if (sigtimedwait(&term, NULL, &overlap) == SIGTERM)
                got = SIGTERM;
            reap();
            end(got == SIGTERM ? newer : serving);
            if (got == SIGHUP)
                memcpy(serving, newer, sizeof serving);
        }
        reap();
    }
    end(serving);
    while (wait(NULL) > 0 || errno == EINTR)
        ;
    return 0;
}

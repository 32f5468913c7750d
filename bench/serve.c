/* The answer of rivals/programs/worker.py in C, on an inherited listener: serve FD.
 *
 * What a supervisor adds to a gap is seen beside nginx and HAProxy only with a worker that starts
 * as fast as theirs.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { DRAIN_S = 5, BURST = 16 };

static volatile sig_atomic_t draining;
static char answers[2][256]; /* that closes, that keeps */
static int lengths[2];
static int kept;

static void on_term(int number)
{
    (void)number;
    draining = 1;
}

/* Read the release as programs/release.py does. */
static void prepare(void)
{
    char word[32] = "", number[32] = "", body[96];
    const char *path = getenv("RELEASE");
    FILE *file = path ? fopen(path, "r") : NULL;

    if (file == NULL || fscanf(file, "%31s %31s", word, number) != 2 || strcmp(word, "broken") == 0)
        exit(3);
    fclose(file);
    if (strcmp(word, "slow") == 0)
        nanosleep(&(struct timespec){1, 500000000}, NULL);
    int bad = strcmp(word, "answers-500") == 0;
    int length = snprintf(body, sizeof body, "%d %s %s", (int)getpid(), number, bad ? "fail" : "pong");
    for (int keeps = 0; keeps < 2; keeps++)
        lengths[keeps] = snprintf(
            answers[keeps], sizeof answers[keeps],
            "HTTP/1.1 %s\r\nContent-Length: %d\r\nConnection: %s\r\n\r\n%s",
            bad ? "500 Internal Server Error" : "200 OK", length, keeps ? "keep-alive" : "close", body);
}

/* Answer one request if it has come; close the connection unless the client keeps it. */
static void answer(int fd)
{
    char request[4096];
    ssize_t got = recv(fd, request, sizeof request - 1, 0);
    int keeps = 0;

    if (got < 0 && errno == EAGAIN)
        return;
    if (got > 0) {
        request[got] = '\0';
        keeps = !draining && strncmp(request, "GET / HTTP/1.1", 14) == 0 &&
                strstr(request, "onnection: close") == NULL;
        keeps = send(fd, answers[keeps], (size_t)lengths[keeps], MSG_NOSIGNAL) > 0 && keeps;
    }
    if (!keeps) {
        close(fd);
        kept--;
    }
}

int main(int argc, char **argv)
{
    struct epoll_event ready[64], wanted = {.events = EPOLLIN};
    sigset_t waiting, term;
    struct timespec now;
    time_t until = 0;
    int listener = argc == 2 ? atoi(argv[1]) : 3, poll = epoll_create1(EPOLL_CLOEXEC);

    prepare();
    sigemptyset(&term);
    sigaddset(&term, SIGTERM);
    sigprocmask(SIG_BLOCK, &term, &waiting);
    sigaction(SIGTERM, &(struct sigaction){.sa_handler = on_term}, NULL);
    fcntl(listener, F_SETFL, fcntl(listener, F_GETFL) | O_NONBLOCK);
    wanted.data.fd = listener;
    if (poll < 0 || epoll_ctl(poll, EPOLL_CTL_ADD, listener, &wanted) < 0)
        return 4;
    for (;;) {
        clock_gettime(CLOCK_MONOTONIC, &now);
        if (draining && !until) {
            until = now.tv_sec + DRAIN_S;
            epoll_ctl(poll, EPOLL_CTL_DEL, listener, NULL);
        }
        if (until && (kept == 0 || now.tv_sec >= until))
            return 0;
        /* TERM comes only here, so none is missed between the look and the wait. */
        int count = epoll_pwait(poll, ready, 64, until ? 100 : -1, &waiting);
        for (int i = 0; i < count; i++) {
            if (ready[i].data.fd != listener) {
                answer(ready[i].data.fd);
                continue;
            }
            for (int burst = 0; burst < BURST && !draining; burst++) {
                int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
                if (fd < 0)
                    break;
                kept++;
                wanted.data.fd = fd;
                epoll_ctl(poll, EPOLL_CTL_ADD, fd, &wanted);
                answer(fd);
            }
        }
    }
}

/* Runs a command with BENCH_EXECED_NS (CLOCK_MONOTONIC, nanoseconds) in its environment.
 *
 * So a worker knows when its own start began: /proc counts a start in ticks of 10 ms, and an
 * interpreter that reads the clock itself has been starting for 10 ms already.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    char text[32];
    struct timespec now;

    if (argc < 2) {
        fputs("usage: stamp COMMAND [ARGUMENT...]\n", stderr);
        return 2;
    }
    clock_gettime(CLOCK_MONOTONIC, &now);
    snprintf(text, sizeof text, "%lld%09ld", (long long)now.tv_sec, now.tv_nsec);
    setenv("BENCH_EXECED_NS", text, 1);
    execvp(argv[1], argv + 1);
    fprintf(stderr, "cannot run %s: %s\n", argv[1], strerror(errno));
    return 111;
}

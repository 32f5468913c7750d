/* Sends each line back as `[pid] line`, one client after another; `quit` closes.
 *
 *     SocketProtector --workers 4 4321 -- ./echo_blocking 4321
 *     ./echo_blocking 4321                  # without a protector
 */
#include "../socketprotector.h"

#include <signal.h>
#include <sys/signalfd.h>

enum { LINE_BYTES = 4096 };

static int send_all(int fd, const char *text, size_t bytes)
{
    while (bytes) {
        ssize_t sent = send(fd, text, bytes, MSG_NOSIGNAL);
        if (sent < 0)
            return -1;
        text += sent;
        bytes -= (size_t)sent;
    }
    return 0;
}

/* Returns 0 after `quit` or end of file, -1 if the conversation ended otherwise. */
static int serve(struct sp_worker *sp, int fd, int stop_fd)
{
    char line[LINE_BYTES], reply[LINE_BYTES + 32], *end;
    size_t got = 0;
    for (;;) {
        struct pollfd lines[2] = {{fd, POLLIN, 0}, {stop_fd, POLLIN, 0}};
        int ready = poll(lines, 2, sp->watchdog_ms);
        ssize_t more;
        sp_alive(sp); /* otherwise a worker in a long conversation would look stuck */
        if (ready == 0)
            continue;
        if (ready < 0 || lines[1].revents)
            return -1;
        more = recv(fd, line + got, sizeof line - got, 0);
        if (more <= 0)
            return (int)more;
        got += (size_t)more;
        while ((end = (char *)memchr(line, '\n', got))) {
            size_t bytes = (size_t)(end - line) + 1;
            int head = snprintf(reply, sizeof reply, "[%d] ", (int)getpid());
            if (bytes == 5 && !memcmp(line, "quit\n", 5))
                return 0;
            memcpy(reply + head, line, bytes);
            if (send_all(fd, reply, (size_t)head + bytes) < 0)
                return -1;
            got -= bytes;
            memmove(line, end + 1, got);
        }
        if (got == sizeof line)
            return -1; /* no line is that long */
    }
}

int main(int argc, char **argv)
{
    struct sp_worker sp;
    struct sp_connection client;
    enum sp_result result;
    sigset_t term;
    int stop_fd;

    /* SIGTERM becomes a readable descriptor, so that it never arrives unnoticed between two calls. */
    sigemptyset(&term);
    sigaddset(&term, SIGTERM);
    sigprocmask(SIG_BLOCK, &term, NULL);
    stop_fd = signalfd(-1, &term, SFD_CLOEXEC);
    if (stop_fd < 0 || sp_open(&sp, argc > 1 ? argv[1] : NULL, 0) < 0) {
        fprintf(stderr, "cannot start: %s\n", strerror(errno));
        return 111;
    }
    sp_ready(&sp);
    for (;;) {
        result = sp_next(&sp, &client, -1, stop_fd);
        if (result != SP_CONNECTION)
            break;
        if (serve(&sp, client.fd, stop_fd) < 0)
            sp_failed(&sp);
        close(client.fd);
        sp_closed(&sp);
    }
    if (result == SP_ERROR)
        fprintf(stderr, "cannot take a connection: %s\n", strerror(errno));
    sp_close(&sp);
    close(stop_fd);
    return result == SP_ERROR ? 111 : 0;
}

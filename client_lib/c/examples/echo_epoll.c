/* Sends each line back as `[pid] line`, to many clients at once; `quit` closes.
 *
 *     SocketProtector 4321 -- ./echo_epoll 4321
 *     ./echo_epoll 4321                     # without a protector
 */
#include "../socketprotector.h"

#include <signal.h>
#include <sys/epoll.h>
#include <sys/signalfd.h>

enum { LINE_BYTES = 4096, EVENTS = 64, RETRY_MS = 50 };

struct client {
    struct client *next, **here; /* the list of all clients; here: the pointer to this client */
    int fd;
    size_t got;
    char line[LINE_BYTES];
};

static struct sp_worker sp;
static struct client *clients;
static int epoll_fd, stop_fd, watching;

static int watch(int fd, void *what)
{
    struct epoll_event event;
    event.events = EPOLLIN;
    event.data.ptr = what;
    return epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event);
}

static void watch_for_connections(int on)
{
    int i;
    if (watching == on)
        return;
    watching = on;
    for (i = 0; i < sp.count; i++)
        if (sp.fds[i] == sp.return_line)
            continue; /* watched until the end */
        else if (!on)
            epoll_ctl(epoll_fd, EPOLL_CTL_DEL, sp.fds[i], NULL);
        else if (watch(sp.fds[i], &sp.fds[i]) < 0) /* main() recognizes pointers into sp.fds */
            fprintf(stderr, "cannot watch descriptor %d: %s\n", sp.fds[i], strerror(errno));
}

static void end(struct client *client, int failed)
{
    /* Before closing: the file stays in the epoll while another process holds a copy. */
    epoll_ctl(epoll_fd, EPOLL_CTL_DEL, client->fd, NULL);
    close(client->fd);
    *client->here = client->next;
    if (client->next)
        client->next->here = client->here;
    free(client);
    if (failed)
        sp_failed(&sp);
    sp_closed(&sp);
    if (!sp.ended)
        watch_for_connections(1); /* a descriptor is free again */
}

static void begin(int fd)
{
    struct client *client = (struct client *)malloc(sizeof *client);
    if (!client || watch(fd, client) < 0) {
        fprintf(stderr, "cannot serve a client: %s\n", strerror(errno));
        free(client);
        close(fd);
        sp_failed(&sp);
        sp_closed(&sp);
        return;
    }
    client->fd = fd;
    client->got = 0;
    client->here = &clients;
    client->next = clients;
    if (clients)
        clients->here = &client->next;
    clients = client;
}

static void serve(struct client *client)
{
    char reply[LINE_BYTES + 32], *at;
    ssize_t more = recv(client->fd, client->line + client->got, sizeof client->line - client->got,
                        MSG_DONTWAIT);
    if (more < 0 && errno == EAGAIN)
        return;
    if (more <= 0) {
        end(client, more < 0);
        return;
    }
    client->got += (size_t)more;
    while ((at = (char *)memchr(client->line, '\n', client->got))) {
        size_t bytes = (size_t)(at - client->line) + 1;
        int head = snprintf(reply, sizeof reply, "[%d] ", (int)getpid());
        if (bytes == 5 && !memcmp(client->line, "quit\n", 5)) {
            end(client, 0);
            return;
        }
        memcpy(reply + head, client->line, bytes);
        bytes += (size_t)head;
        /* A client that sends without reading is cut off, to keep the example short. */
        if (send(client->fd, reply, bytes, MSG_DONTWAIT | MSG_NOSIGNAL) != (ssize_t)bytes) {
            end(client, 1);
            return;
        }
        client->got -= bytes - (size_t)head;
        memmove(client->line, at + 1, client->got);
    }
    if (client->got == sizeof client->line)
        end(client, 1); /* no line is that long */
}

static void take(int fd)
{
    struct sp_connection client;
    switch (sp_take(&sp, fd, &client)) {
    case SP_CONNECTION:
        begin(client.fd);
        break;
    case SP_DRAINED:
    case SP_RETIRED:
        watch_for_connections(0); /* the descriptors stay readable for ever */
        epoll_ctl(epoll_fd, EPOLL_CTL_DEL, sp.return_line, NULL);
        break;
    case SP_ERROR:
        if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM)
            watch_for_connections(0); /* new clients wait in the queue until we close a connection */
        else
            fprintf(stderr, "cannot take a connection: %s\n", strerror(errno));
        break;
    default:
        break;
    }
}

int main(int argc, char **argv)
{
    struct epoll_event events[EVENTS];
    sigset_t term;
    int i, count, stopped = 0, timeout_ms;

    sigemptyset(&term);
    sigaddset(&term, SIGTERM);
    sigprocmask(SIG_BLOCK, &term, NULL);
    stop_fd = signalfd(-1, &term, SFD_CLOEXEC);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (stop_fd < 0 || epoll_fd < 0 || watch(stop_fd, &stop_fd) < 0
        || sp_open(&sp, argc > 1 ? argv[1] : NULL, 0) < 0
        || (sp.return_line >= 0 && watch(sp.return_line, &sp.fds[0]) < 0)) {
        fprintf(stderr, "cannot start: %s\n", strerror(errno));
        return 111;
    }
    watch_for_connections(1);
    sp_ready(&sp);
    while (!stopped && (!sp.ended || clients)) {
        timeout_ms = watching || sp.ended ? sp.watchdog_ms : RETRY_MS;
        count = epoll_wait(epoll_fd, events, EVENTS, timeout_ms);
        sp_alive(&sp);
        if (!sp.ended && !count)
            watch_for_connections(1);
        for (i = 0; i < count; i++) {
            int *known = (int *)events[i].data.ptr;
            if (known == &stop_fd)
                stopped = 1;
            else if (known >= sp.fds && known < sp.fds + sp.count)
                take(*known);
            else
                serve((struct client *)events[i].data.ptr);
        }
    }
    while (clients)
        end(clients, 1);
    sp_close(&sp);
    close(epoll_fd);
    close(stop_fd);
    return 0;
}

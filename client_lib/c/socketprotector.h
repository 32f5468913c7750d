/* A worker's side of SocketProtector, for C (C99) and C++ (C++11).  Linux; one header, nothing to link.
 *
 *     struct sp_worker sp;
 *     struct sp_connection client;
 *
 *     if (sp_open(&sp, "4321", 0) < 0 || sp_ready(&sp) < 0)
 *         return 111;
 *     while (sp_next(&sp, &client, -1, -1) == SP_CONNECTION) {
 *         serve(client.fd);
 *         close(client.fd);
 *         sp_closed(&sp);
 *     }
 *     sp_close(&sp);
 *
 * Under a protector the connections come from its channel; without one this process binds and listens
 * on the address itself.  README.md beside this file says more; the protocol is docs/protocol.md.
 *
 * No global state, no malloc.  Functions return what they say, or -1 (SP_ERROR) with errno set.  One
 * thread at a time calls sp_next or sp_take; sp_closed, sp_failed, sp_draining and sp_notify may be
 * called by any thread meanwhile.
 *
 * Include it before any system header, or compile with -D_GNU_SOURCE (accept4, POLLRDHUP).
 *
 * Sources: unix(7), cmsg(3), recvmsg(2), accept(2), sd_notify(3).
 */
#ifndef SOCKETPROTECTOR_H
#define SOCKETPROTECTOR_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#ifndef POLLRDHUP
#error "include socketprotector.h before any system header, or compile with -D_GNU_SOURCE"
#endif

enum { SP_VERSION = 1, SP_KIND_CONNECTION = 1, SP_HEADER_BYTES = 16 };
enum { SP_BACKLOG = 4096 }; /* as the protector's --backlog; the kernel lowers it to somaxconn */
enum { SP_FDS_MAX = 16 };   /* without a protector: addresses that one name may have */
/* The scoreboard: words of 8 bytes, and what they are. */
enum { SP_BOARD_WORDS = 1024, SP_BOARD_STATE = 0, SP_BOARD_TAKEN = 1, SP_BOARD_OPEN = 2,
       SP_BOARD_FAILED = 3, SP_BOARD_WAITS = 16, SP_BOARD_WAIT_WORDS = 32, SP_BOARD_ACCEPTED_AT = 64 };

enum sp_result {
    SP_ERROR = -1,     /* errno says which */
    SP_NOTHING = 0,    /* nobody now: the time is over, or another worker was quicker */
    SP_CONNECTION = 1, /* one was taken */
    SP_DRAINED = 2,    /* no more will come: finish what you have, then exit */
    SP_RETIRED = 3,    /* the same, but for this worker alone: what is queued is for others */
    SP_WOKEN = 4       /* the caller's own descriptor is readable */
};

struct sp_connection {
    int fd;                  /* the caller's; blocking, close-on-exec */
    int listener;            /* for sp_listener() */
    uint64_t accepted_at_ns; /* CLOCK_MONOTONIC */
};

/* Only read it.  A loop of its own (epoll) watches fds[0] to fds[count - 1] for input. */
struct sp_worker {
    int fds[SP_FDS_MAX]; /* the RETURN line if there is one, then the channel or the listening sockets */
    int count;
    int channel;     /* -1 without a protector.  Shared by all workers: never set a flag on it */
    int return_line; /* -1 for none */
    int generation, worker;
    int watchdog_ms; /* call sp_alive() at least so often; -1 for never.  Fit as a time-out */

    enum sp_result ended;
    int spare, notify;
    pid_t owner;
    uint64_t alive_ns;
    void *board;      /* the mapping, and in it this worker's record; NULL for none */
    size_t board_bytes;
    uint64_t *words;
    const char *listeners;
    socklen_t notify_bytes;
    struct sockaddr_un notify_address;
};

static inline uint64_t sp__now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* The decimal number at text, and where it ends; -1 for none, or one above INT_MAX. */
static inline int sp__number(const char *text, const char **end)
{
    long long value = 0;
    const char *at = text;
    while (*at >= '0' && *at <= '9' && value <= INT_MAX)
        value = 10 * value + (*at++ - '0');
    *end = at;
    return at == text || value > INT_MAX ? -1 : (int)value;
}

/* The number in a variable: missing is `otherwise`; -1 and EINVAL for what is no number. */
static inline int sp__variable(const char *name, int otherwise)
{
    const char *text = getenv(name), *end;
    int value;
    if (!text || !*text)
        return otherwise;
    value = sp__number(text, &end);
    if (value < 0 || *end) {
        errno = EINVAL;
        return -1;
    }
    return value;
}

static inline void sp__close(int *fd)
{
    int error = errno;
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
    errno = error;
}

/* ---- The scoreboard: what `socketprotectorctl status` shows of this worker ---- */

static inline void sp__board_open(struct sp_worker *sp)
{
    const char *text = getenv("SOCKETPROTECTOR_SCOREBOARD"), *end;
    long page = sysconf(_SC_PAGESIZE);
    struct stat is;
    int fd, offset, before;
    /* A worker can do without: what is no scoreboard is none. */
    if (!text || (fd = sp__number(text, &end)) < 0 || *end != ':')
        return;
    if ((offset = sp__number(end + 1, &end)) < 0 || *end || offset % 8 || fstat(fd, &is) < 0)
        return;
    before = offset % (int)page;
    /* Beyond the end of the file a store would be a SIGBUS. */
    if (S_ISREG(is.st_mode) && is.st_size >= (off_t)offset + 8 * SP_BOARD_WORDS) {
        sp->board_bytes = (size_t)before + 8 * SP_BOARD_WORDS;
        sp->board = mmap(NULL, sp->board_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, offset - before);
        if (sp->board == MAP_FAILED) {
            sp->board = NULL;
        } else {
            sp->words = (uint64_t *)((char *)sp->board + before);
            __atomic_store_n(&sp->words[SP_BOARD_STATE], 1, __ATOMIC_RELAXED);
        }
        close(fd); /* the mapping stays */
    }
}

static inline void sp__count(struct sp_worker *sp, int word, uint64_t change)
{
    if (sp->words) /* atomic: several threads may count, and the protector never sees half a word */
        __atomic_fetch_add(&sp->words[word], change, __ATOMIC_RELAXED);
}

/* Counts the end of a connection that was taken; call it after close(). */
static inline void sp_closed(struct sp_worker *sp)
{
    sp__count(sp, SP_BOARD_OPEN, (uint64_t)-1);
}

/* Counts a connection whose serving failed. */
static inline void sp_failed(struct sp_worker *sp)
{
    sp__count(sp, SP_BOARD_FAILED, 1);
}

/* Says that nobody counts, and counts no more: for a program that cannot call sp_closed(), and for a
 * forked child before it takes connections itself.  (A child that only serves one leaves all of
 * this alone; its parent calls sp_closed() when it is over.) */
static inline void sp_count_nothing(struct sp_worker *sp)
{
    if (sp->words)
        __atomic_store_n(&sp->words[SP_BOARD_STATE], 0, __ATOMIC_RELAXED);
    sp->words = NULL;
}

static inline void sp__count_taken(struct sp_worker *sp, const struct sp_connection *client)
{
    uint64_t now_ns = sp__now_ns(), wait_us = 0;
    int bucket = 0;
    if (!sp->words)
        return;
    if (now_ns > client->accepted_at_ns)
        wait_us = (now_ns - client->accepted_at_ns) / 1000;
    for (; wait_us && bucket < SP_BOARD_WAIT_WORDS - 1; wait_us >>= 1)
        bucket++;
    sp__count(sp, SP_BOARD_TAKEN, 1);
    sp__count(sp, SP_BOARD_OPEN, 1);
    sp__count(sp, SP_BOARD_WAITS + bucket, 1);
    if (client->fd < SP_BOARD_WORDS - SP_BOARD_ACCEPTED_AT)
        __atomic_store_n(&sp->words[SP_BOARD_ACCEPTED_AT + client->fd], client->accepted_at_ns,
                         __ATOMIC_RELAXED);
}

/* ---- News for the protector: sd_notify ---- */

static inline int sp__notify_open(struct sp_worker *sp)
{
    const char *name = getenv("NOTIFY_SOCKET");
    size_t length = name ? strlen(name) : 0;
    struct sockaddr_un *to = &sp->notify_address;
    if (!name || (*name != '/' && *name != '@') || length >= sizeof to->sun_path)
        return 0;
    to->sun_family = AF_UNIX;
    memcpy(to->sun_path, name, length + 1);
    /* A path is counted with its NUL, an abstract name without: unix(7). */
    sp->notify_bytes = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + length + (*name == '/'));
    if (*name == '@')
        to->sun_path[0] = '\0';
    /* Kept for life: WATCHDOG=1 must get through when there are no descriptors left.  Connected, so that
     * it does when the path cannot be seen any more (chroot).  Nobody there now: sp__tell tries again. */
    sp->notify = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (sp->notify >= 0)
        connect(sp->notify, (struct sockaddr *)to, sp->notify_bytes);
    return sp->notify < 0 ? -1 : 0;
}

static inline int sp__tell(struct sp_worker *sp, const char *lines, int flags)
{
    if (sp->notify < 0 || send(sp->notify, lines, strlen(lines), flags | MSG_NOSIGNAL) >= 0)
        return 0;
    /* Whoever was there is gone, and maybe another one came in that place. */
    if ((errno != ECONNREFUSED && errno != ENOTCONN && errno != ECONNRESET)
        || connect(sp->notify, (struct sockaddr *)&sp->notify_address, sp->notify_bytes) < 0)
        return -1;
    return send(sp->notify, lines, strlen(lines), flags | MSG_NOSIGNAL) < 0 ? -1 : 0;
}

/* Sends lines such as "STATUS=warm", separated by '\n', in one datagram.  Never blocks, raises no
 * SIGPIPE.  Returns 0 if it was sent or nobody wants to be told, -1 if nobody takes it now: EAGAIN, when
 * the receiver has ten messages to read (say it again later, if it matters: EXTEND_TIMEOUT_USEC does),
 * ECONNREFUSED, ENOENT (sendto(2)), which is nothing to fail for. */
static inline int sp_notify(struct sp_worker *sp, const char *lines)
{
    return sp__tell(sp, lines, MSG_DONTWAIT);
}

/* Says READY=1, and that this worker leaves when its RETURN line ends.  Waits until there is room for
 * it: who is not heard was started in vain, and is killed after --start-timeout.  Returns as sp_notify
 * does, but never -1 with EAGAIN. */
static inline int sp_ready(struct sp_worker *sp)
{
    /* In one datagram: the protector must know both before it relies on one. */
    const char *lines = sp->return_line < 0 ? "READY=1" : "READY=1\nX_SOCKETPROTECTOR_RETIRE=1";
    int result;
    do
        result = sp__tell(sp, lines, 0);
    while (result < 0 && errno == EINTR);
    return result;
}

/* Says WATCHDOG=1, where there is one and it is time to.  Cheap: call it whenever the loop turns. */
static inline void sp_alive(struct sp_worker *sp)
{
    uint64_t now_ns;
    if (sp->watchdog_ms < 0)
        return;
    now_ns = sp__now_ns();
    if (now_ns - sp->alive_ns < (uint64_t)sp->watchdog_ms * 500000u)
        return;
    if (sp->owner != getpid()) /* a forked child must not speak for a parent that hangs */
        sp->watchdog_ms = -1;
    else if (!sp_notify(sp, "WATCHDOG=1"))
        sp->alive_ns = now_ns;
}

static inline int sp__watchdog_ms(void)
{
    const char *text = getenv("WATCHDOG_USEC"), *pid = getenv("WATCHDOG_PID");
    unsigned long long half_ms;
    if (!text || *text < '0' || *text > '9' || (pid && *pid && atol(pid) != (long)getpid()))
        return -1;
    half_ms = strtoull(text, NULL, 10) / 2000;
    return half_ms > INT_MAX ? INT_MAX : half_ms ? (int)half_ms : 1;
}

/* ---- Without a protector: listening sockets of our own ---- */

static inline int sp__listen_on(struct sp_worker *sp, const struct sockaddr *address, socklen_t bytes,
                                int backlog)
{
    int on = 1, fd;
    if (sp->count == SP_FDS_MAX)
        return 0;
    /* Non-blocking: between poll() and accept() the client may be gone, accept(2). */
    fd = socket(address->sa_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return -1;
    if (address->sa_family != AF_UNIX)
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (address->sa_family == AF_INET6) /* 0.0.0.0 has a socket of its own */
        setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &on, sizeof on);
    if (bind(fd, address, bytes) < 0 || listen(fd, backlog) < 0) {
        sp__close(&fd);
        return -1;
    }
    sp->fds[sp->count++] = fd;
    return 0;
}

static inline int sp__listen_unix(struct sp_worker *sp, const char *path, int backlog)
{
    struct sockaddr_un at;
    size_t length = strlen(path);
    socklen_t bytes = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + length);
    struct stat is;
    int probe;
    if (!length || length >= sizeof at.sun_path) {
        errno = length ? ENAMETOOLONG : EINVAL;
        return -1;
    }
    memset(&at, 0, sizeof at);
    at.sun_family = AF_UNIX;
    memcpy(at.sun_path, path, length);
    if (*path == '@') {
        at.sun_path[0] = '\0';
        return sp__listen_on(sp, (struct sockaddr *)&at, bytes, backlog);
    }
    if (stat(path, &is) == 0 && S_ISSOCK(is.st_mode)) {
        /* A stale one is replaced, a living one is not; a full backlog (EAGAIN) is alive. */
        probe = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        if (probe < 0)
            return -1;
        if (connect(probe, (struct sockaddr *)&at, bytes + 1) < 0 && errno == ECONNREFUSED)
            unlink(path);
        sp__close(&probe);
    }
    return sp__listen_on(sp, (struct sockaddr *)&at, bytes + 1, backlog);
}

static inline int sp__listen_tcp(struct sp_worker *sp, const char *address, int backlog)
{
    const char *colon = strrchr(address, ':'), *port = colon ? colon + 1 : address, *end;
    size_t length = colon ? (size_t)(colon - address) : 0;
    int number = sp__number(port, &end), failed;
    struct addrinfo hints, *found = NULL, *each;
    struct sockaddr_in6 bound; /* the port is at the same place in sockaddr_in */
    socklen_t bytes = sizeof bound;
    char host[256];

    if (length > 1 && address[0] == '[' && address[length - 1] == ']') {
        address++;
        length -= 2;
    }
    if (number < 0 || number > 65535 || *end || length >= sizeof host || (colon && !length)) {
        errno = EINVAL;
        return -1;
    }
    memcpy(host, address, length);
    host[length] = '\0';
    memset(&hints, 0, sizeof hints);
    hints.ai_socktype = SOCK_STREAM;
    hints.ai_flags = AI_PASSIVE;
    failed = getaddrinfo(colon ? host : NULL, port, &hints, &found);
    if (failed && failed != EAI_SYSTEM)
        errno = failed == EAI_MEMORY ? ENOMEM : EADDRNOTAVAIL;
    for (each = found; each && !failed; each = each->ai_next) {
        if (!number && sp->count) { /* one number for all, as the system chose it for the first */
            failed = getsockname(sp->fds[0], (struct sockaddr *)&bound, &bytes);
            ((struct sockaddr_in6 *)(void *)each->ai_addr)->sin6_port = bound.sin6_port;
        }
        /* No IPv6 on this machine: the addresses before it do. */
        if (sp__listen_on(sp, each->ai_addr, each->ai_addrlen, backlog) < 0)
            failed = !sp->count || (errno != EAFNOSUPPORT && errno != EADDRNOTAVAIL);
    }
    if (found)
        freeaddrinfo(found);
    return failed ? -1 : 0;
}

/* ---- Begin and end ---- */

/* Gives back all that sp_open() took.  Other workers keep the channel; a UNIX socket's path of our
 * own is removed.  Connections stay open.  Keeps errno. */
static inline void sp_close(struct sp_worker *sp)
{
    struct sockaddr_un at;
    socklen_t bytes;
    int i, error = errno;
    for (i = 0; i < sp->count; i++) {
        bytes = sizeof at;
        memset(&at, 0, sizeof at);
        if (sp->channel < 0 && sp->owner == getpid() && sp->fds[i] != sp->return_line
            && !getsockname(sp->fds[i], (struct sockaddr *)&at, &bytes)
            && at.sun_family == AF_UNIX && at.sun_path[0])
            unlink(at.sun_path);
        sp__close(&sp->fds[i]);
    }
    sp->count = 0;
    sp->channel = sp->return_line = -1;
    sp__close(&sp->spare);
    sp__close(&sp->notify);
    if (sp->board)
        munmap(sp->board, sp->board_bytes);
    sp->board = NULL;
    sp->words = NULL;
    errno = error;
}

static inline int sp__inherit(struct sp_worker *sp)
{
    int type = 0, family = 0;
    socklen_t bytes = sizeof type;
    errno = 0;
    sp->channel = sp__variable("SOCKETPROTECTOR_CHANNEL", -1);
    sp->return_line = sp__variable("SOCKETPROTECTOR_RETURN", -1);
    sp->generation = sp__variable("SOCKETPROTECTOR_GENERATION", 0);
    sp->worker = sp__variable("SOCKETPROTECTOR_WORKER", 0);
    sp->listeners = getenv("SOCKETPROTECTOR_LISTENERS");
    if (errno || getsockopt(sp->channel, SOL_SOCKET, SO_TYPE, &type, &bytes) < 0
        || getsockopt(sp->channel, SOL_SOCKET, SO_DOMAIN, &family, &bytes) < 0)
        return -1;
    if (type != SOCK_SEQPACKET || family != AF_UNIX) {
        errno = EPROTOTYPE;
        return -1;
    }
    /* A program that this worker starts must neither hold the channel open nor take from it. */
    if (sp->return_line >= 0) {
        if (fcntl(sp->return_line, F_SETFD, FD_CLOEXEC) < 0)
            return -1;
        sp->fds[sp->count++] = sp->return_line;
    }
    sp->fds[sp->count++] = sp->channel;
    return fcntl(sp->channel, F_SETFD, FD_CLOEXEC);
}

/* Finds this worker's place, or, without a protector, listens on `address` with `backlog` (0: 4096).
 *
 * address: "4321" (every address), "host:4321", "[::1]:4321", "unix:/path", "unix:@name", or NULL for a
 * program that only runs under a protector.  The variables are read once; their text must stay.
 *
 * Returns 0, or -1 with nothing left open and errno: EBADF, ENOTSOCK or EPROTOTYPE: the environment
 * names a channel that is none here (a program that a worker starts inherits the variables but not the
 * descriptors: unset them for it); EINVAL: no number, or no address; EDESTADDRREQ: no protector and no
 * address; EADDRNOTAVAIL: unknown host; else as socket(2), bind(2), listen(2) say. */
static inline int sp_open(struct sp_worker *sp, const char *address, int backlog)
{
    int failed = 0;
    memset(sp, 0, sizeof *sp);
    sp->channel = sp->return_line = sp->spare = sp->notify = -1;
    sp->owner = getpid();
    sp->watchdog_ms = -1;
    if (getenv("SOCKETPROTECTOR_CHANNEL")) {
        failed = sp__inherit(sp);
        if (failed) { /* the numbers may be anybody's: close none of them */
            sp->count = 0;
            sp->channel = sp->return_line = -1;
        } else {
            sp__board_open(sp);
            sp->watchdog_ms = sp__watchdog_ms();
        }
    } else if (!address) {
        errno = EDESTADDRREQ;
        return -1;
    } else if (!strncmp(address, "unix:", 5)) {
        failed = sp__listen_unix(sp, address + 5, backlog ? backlog : SP_BACKLOG);
    } else {
        address += strncmp(address, "tcp:", 4) ? 0 : 4;
        failed = sp__listen_tcp(sp, address, backlog ? backlog : SP_BACKLOG);
    }
    if (failed || sp__notify_open(sp) < 0) {
        sp_close(sp);
        return -1;
    }
    return 0;
}

/* Writes the name of a listener, such as "tcp:0.0.0.0:4321" or "unix:/run/x.sock", into `name`, cut to
 * `size` bytes with its NUL; "-" is a listener that was removed.  Returns its whole length, or -1 and
 * ENOENT for an index that this generation was not told of, and without a protector (getsockname(2)
 * on the connection tells there). */
static inline int sp_listener(const struct sp_worker *sp, int index, char *name, size_t size)
{
    const char *from = sp->listeners ? sp->listeners : "";
    size_t length = 0;
    if (size)
        name[0] = '\0';
    while (index > 0 && *from)
        index -= *from++ == ' ';
    if (index || !*from) {
        errno = ENOENT;
        return -1;
    }
    for (; *from && *from != ' '; from++, length++) {
        unsigned byte = (unsigned char)*from;
        if (byte == '%' && sscanf(from + 1, "%2x", &byte) == 1)
            from += 2;
        if (length + 1 < size) {
            name[length] = (char)byte;
            name[length + 1] = '\0';
        }
    }
    return (int)length;
}

/* ---- Connections ---- */

/* Whether no more will come.  For a server of long-lived connections: ask after each request. */
static inline int sp_draining(const struct sp_worker *sp)
{
    struct pollfd lines[2]; /* POLLRDHUP is there while connections are still queued, and takes none */
    lines[0].fd = sp->channel;
    lines[1].fd = sp->return_line;
    lines[0].events = lines[1].events = POLLRDHUP;
    return sp->channel >= 0 && poll(lines, 2, 0) > 0;
}

static inline enum sp_result sp__receive(struct sp_worker *sp, struct sp_connection *client)
{
    unsigned char header[SP_HEADER_BYTES];
    union {
        struct cmsghdr aligned;
        char bytes[CMSG_SPACE(sizeof(int))];
    } control;
    struct iovec data;
    struct msghdr message;
    struct cmsghdr *with;
    ssize_t got;
    int i, fd = -1;

    data.iov_base = header;
    data.iov_len = sizeof header;
    memset(&message, 0, sizeof message);
    memset(&control, 0, sizeof control);
    message.msg_iov = &data;
    message.msg_iovlen = 1;
    message.msg_control = &control;
    /* CMSG_SPACE has room for two: the second, which nobody looks for, would stay open. */
    message.msg_controllen = CMSG_LEN(sizeof(int));
    /* Without waiting, by this flag and not by O_NONBLOCK, which all workers share. */
    got = recvmsg(sp->channel, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (got < 0)
        return errno == EAGAIN ? SP_NOTHING : SP_ERROR;
    with = CMSG_FIRSTHDR(&message);
    if (with && with->cmsg_level == SOL_SOCKET && with->cmsg_type == SCM_RIGHTS
        && with->cmsg_len == CMSG_LEN(sizeof(int)))
        memcpy(&fd, CMSG_DATA(with), sizeof fd);
    if (got == 0 && fd < 0)
        return sp->ended = SP_DRAINED;
    if (fd < 0 && (message.msg_flags & MSG_CTRUNC)) {
        errno = ECONNABORTED;
        return SP_ERROR;
    }
    if (fd < 0 || got < SP_HEADER_BYTES || header[0] != SP_VERSION || header[1] != SP_KIND_CONNECTION) {
        sp__close(&fd);
        errno = EPROTO;
        return SP_ERROR;
    }
    client->fd = fd;
    client->listener = header[2] | header[3] << 8;
    client->accepted_at_ns = 0;
    for (i = 15; i >= 8; i--)
        client->accepted_at_ns = client->accepted_at_ns << 8 | header[i];
    return SP_CONNECTION;
}

static inline enum sp_result sp__accept(struct sp_worker *sp, int fd, struct sp_connection *client)
{
    client->fd = accept4(fd, NULL, NULL, SOCK_CLOEXEC);
    client->accepted_at_ns = sp__now_ns();
    for (client->listener = 0; sp->fds[client->listener] != fd;)
        client->listener++;
    if (client->fd >= 0)
        return SP_CONNECTION;
    switch (errno) { /* it was broken already, or the network just failed: accept(2) */
    case EAGAIN: case EINTR: case ECONNABORTED: case EHOSTDOWN: case EHOSTUNREACH: case ENETDOWN:
    case ENETUNREACH: case ENONET: case ENOPROTOOPT: case EPERM: case EPROTO:
        return SP_NOTHING;
    default:
        return SP_ERROR;
    }
}

/* Takes one connection from `fd`, the one of sp->fds that is readable.  Never blocks.
 *
 * SP_CONNECTION: client is filled in, and its fd is the caller's to close.  SP_NOTHING: go on waiting.
 * SP_DRAINED, SP_RETIRED: take sp->fds out of your poll set, for they stay readable for ever; finish.
 * SP_ERROR: EMFILE: there is no descriptor to spare, so none was taken and nothing is lost: stop
 * watching until one of yours is closed.  ECONNABORTED: another thread used the last descriptor in
 * between, and a connection is lost.  EPROTO: the protector speaks another version; that connection is
 * closed.  Else as recvmsg(2) and accept(2) say. */
static inline enum sp_result sp_take(struct sp_worker *sp, int fd, struct sp_connection *client)
{
    enum sp_result result;
    char nothing[64];
    int error;
    client->fd = -1;
    if (sp->ended)
        return sp->ended;
    if (fd == sp->return_line) {
        struct pollfd end;
        ssize_t got;
        if (sp->owner != getpid()) { /* what is said there is for the parent */
            end.fd = fd;
            end.events = POLLRDHUP;
            return poll(&end, 1, 0) > 0 ? sp->ended = SP_RETIRED : SP_NOTHING;
        }
        got = recv(fd, nothing, sizeof nothing, MSG_DONTWAIT);
        /* Nothing is said on it yet; a later protector may.  One that is gone ends it as well. */
        if (got > 0 || (got < 0 && (errno == EAGAIN || errno == EINTR)))
            return SP_NOTHING;
        return sp->ended = SP_RETIRED;
    }
    /* The kernel drops a connection that it cannot give a number to.  So one is held, and let go now. */
    if (sp->spare < 0 && (sp->spare = fcntl(fd, F_DUPFD_CLOEXEC, 0)) < 0)
        return SP_ERROR;
    sp__close(&sp->spare);
    result = fd == sp->channel ? sp__receive(sp, client) : sp__accept(sp, fd, client);
    if (result == SP_CONNECTION)
        sp__count_taken(sp, client);
    error = errno;
    if (!sp->ended)
        sp->spare = fcntl(fd, F_DUPFD_CLOEXEC, 0); /* without one the next call tries again */
    errno = error;
    return result;
}

/* Waits until a connection was taken, all is over, `wake_fd` (-1: none) is readable, or `timeout_ms`
 * (-1: for ever) has passed, which is SP_NOTHING.  Says WATCHDOG=1 as long as it waits; whoever serves
 * for long between two calls says it with sp_alive().
 *
 * A signal handler that writes to a pipe, or a signalfd, is what wake_fd is for: a signal that comes
 * right before poll() would not be seen.  Returns what sp_take returns, and SP_ERROR with EINTR if a
 * handler ran. */
static inline enum sp_result sp_next(struct sp_worker *sp, struct sp_connection *client, int timeout_ms,
                                     int wake_fd)
{
    struct pollfd lines[SP_FDS_MAX + 1];
    uint64_t now_ns = sp__now_ns(), until_ns = now_ns + (uint64_t)(timeout_ms > 0 ? timeout_ms : 0) * 1000000u;
    enum sp_result result;
    int i, left_ms = timeout_ms, slice_ms;
    client->fd = -1;
    while (!sp->ended) {
        sp_alive(sp);
        slice_ms = left_ms;
        if (sp->watchdog_ms >= 0 && (slice_ms < 0 || slice_ms > sp->watchdog_ms))
            slice_ms = sp->watchdog_ms;
        for (i = 0; i <= sp->count; i++) {
            lines[i].fd = i < sp->count ? sp->fds[i] : wake_fd;
            lines[i].events = POLLIN;
            if (lines[i].fd == sp->return_line && sp->owner != getpid())
                lines[i].events = POLLRDHUP;
            lines[i].revents = 0;
        }
        if (poll(lines, (nfds_t)sp->count + 1, slice_ms) < 0)
            return SP_ERROR;
        if (lines[sp->count].revents)
            return SP_WOKEN;
        /* The RETURN line is first: under load there is always a connection. */
        for (i = 0; i < sp->count; i++)
            if (lines[i].revents && (result = sp_take(sp, sp->fds[i], client)) != SP_NOTHING)
                return result;
        now_ns = sp__now_ns();
        if (timeout_ms >= 0 && now_ns >= until_ns)
            return SP_NOTHING;
        if (timeout_ms >= 0)
            left_ms = (int)((until_ns - now_ns + 999999u) / 1000000u);
    }
    return sp->ended;
}

#endif

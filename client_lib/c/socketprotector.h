/* The client library of SocketProtector's workers, for C (C99) and C++ (C++11) on Linux.
 * One header, nothing to link.
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
 * Under a protector the connections come from its channel; without a protector this process binds and
 * listens on the address itself.  More: client_lib/README.md; the protocol: docs/protocol.md.
 *
 * No global state, no malloc.  On failure a function returns -1 (SP_ERROR) and sets errno.  Only one
 * thread at a time may call sp_next or sp_take.  Meanwhile any thread may call sp_closed, sp_failed,
 * sp_draining and sp_notify.
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
enum { SP_BACKLOG = 4096 }; /* the protector's default of --backlog; the kernel lowers it to somaxconn */
enum { SP_FDS_MAX = 16 };   /* without a protector: the most addresses of one host name */
/* The scoreboard: its size and the meaning of its words, in units of 8 bytes. */
enum { SP_BOARD_WORDS = 1024, SP_BOARD_STATE = 0, SP_BOARD_TAKEN = 1, SP_BOARD_OPEN = 2,
       SP_BOARD_FAILED = 3, SP_BOARD_WAITS = 16, SP_BOARD_WAIT_WORDS = 32, SP_BOARD_ACCEPTED_AT = 64 };

enum sp_result {
    SP_ERROR = -1,     /* errno has the reason */
    SP_NOTHING = 0,    /* no connection: the time is over, or another worker was quicker */
    SP_CONNECTION = 1, /* one connection was taken */
    SP_DRAINED = 2,    /* no more connections will come: finish the open ones, then exit */
    SP_RETIRED = 3,    /* the same for this worker alone: queued connections are for other workers */
    SP_WOKEN = 4       /* the caller's wake_fd is readable */
};

struct sp_connection {
    int fd;                  /* owned by the caller; blocking, close-on-exec */
    int listener;            /* the index for sp_listener() */
    uint64_t accepted_at_ns; /* time of accept, CLOCK_MONOTONIC; 0: the protector's own connection */
};

/* Read-only for the caller.  An event loop (epoll) watches fds[0] to fds[count - 1] for input. */
struct sp_worker {
    int fds[SP_FDS_MAX]; /* the RETURN line if there is one, then the channel or the listening sockets */
    int count;
    int channel;     /* -1 without a protector.  All workers share it: never set a flag on it */
    int return_line; /* -1: none */
    int generation, worker;
    int watchdog_ms; /* call sp_alive() at least this often; -1: never.  Usable as poll()'s timeout */

    enum sp_result ended;
    int spare, notify;
    pid_t owner;
    uint64_t alive_ns;
    void *board;      /* the mapping of the scoreboard, NULL for none; words: this worker's record */
    size_t board_bytes;
    uint64_t *words;
    const char *listeners;
    dev_t path_device; /* of the file of this process's own UNIX socket */
    ino_t path_inode;
    socklen_t notify_bytes;
    struct sockaddr_un notify_address;
};

static inline uint64_t sp__now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* Returns the decimal number at `text`, and sets `end` behind it; -1 if there is none, or above INT_MAX. */
static inline int sp__number(const char *text, const char **end)
{
    long long value = 0;
    const char *at = text;
    while (*at >= '0' && *at <= '9' && value <= INT_MAX)
        value = 10 * value + (*at++ - '0');
    *end = at;
    return at == text || value > INT_MAX ? -1 : (int)value;
}

/* Returns the number in a variable; `otherwise` if the variable is not set; -1 with EINVAL if it is no
 * number. */
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

/* ---- The scoreboard: this worker's counts for `socketprotectorctl status` ---- */

static inline void sp__board_open(struct sp_worker *sp)
{
    const char *text = getenv("SOCKETPROTECTOR_SCOREBOARD"), *end;
    long page = sysconf(_SC_PAGESIZE);
    struct stat is;
    int fd, offset, before;
    /* The scoreboard is optional: a value that does not name one is ignored. */
    if (!text || (fd = sp__number(text, &end)) < 0 || *end != ':')
        return;
    if ((offset = sp__number(end + 1, &end)) < 0 || *end || offset % 8 || fstat(fd, &is) < 0)
        return;
    before = offset % (int)page;
    /* A store beyond the end of the file would raise SIGBUS. */
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
    if (sp->words) /* atomic: several threads may count, and the protector must not see half a word */
        __atomic_fetch_add(&sp->words[word], change, __ATOMIC_RELAXED);
}

/* Counts the end of a taken connection; call it after close(). */
static inline void sp_closed(struct sp_worker *sp)
{
    sp__count(sp, SP_BOARD_OPEN, (uint64_t)-1);
}

/* Counts a connection that could not be served.  Call sp_closed() as well. */
static inline void sp_failed(struct sp_worker *sp)
{
    sp__count(sp, SP_BOARD_FAILED, 1);
}

/* Stops counting, and marks this worker's counts as unknown.  For a program that cannot call
 * sp_closed(), and for a forked child before it takes connections itself.  (A child that only serves
 * one connection need not call it; the parent calls sp_closed() when the child has ended.) */
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
    if (client->accepted_at_ns) { /* the protector's own connection is open, but is no client's */
        sp__count(sp, SP_BOARD_TAKEN, 1);
        sp__count(sp, SP_BOARD_WAITS + bucket, 1);
    }
    sp__count(sp, SP_BOARD_OPEN, 1);
    if (client->fd < SP_BOARD_WORDS - SP_BOARD_ACCEPTED_AT)
        __atomic_store_n(&sp->words[SP_BOARD_ACCEPTED_AT + client->fd], client->accepted_at_ns,
                         __ATOMIC_RELAXED);
}

/* ---- Messages to the protector: sd_notify ---- */

static inline int sp__notify_open(struct sp_worker *sp)
{
    const char *name = getenv("NOTIFY_SOCKET");
    size_t length = name ? strlen(name) : 0;
    struct sockaddr_un *to = &sp->notify_address;
    if (!name || (*name != '/' && *name != '@') || length >= sizeof to->sun_path)
        return 0;
    to->sun_family = AF_UNIX;
    memcpy(to->sun_path, name, length + 1);
    /* The length includes the NUL of a path, but not of an abstract name: unix(7). */
    sp->notify_bytes = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + length + (*name == '/'));
    if (*name == '@')
        to->sun_path[0] = '\0';
    /* Kept open: WATCHDOG=1 must get through even without a free descriptor.  Connected: messages must
     * get through when the path is out of reach (chroot).  If connect() fails, sp__send tries again. */
    sp->notify = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (sp->notify >= 0)
        connect(sp->notify, (struct sockaddr *)to, sp->notify_bytes);
    return sp->notify < 0 ? -1 : 0;
}

static inline int sp__send(struct sp_worker *sp, const char *lines, int flags)
{
    if (sp->notify < 0 || send(sp->notify, lines, strlen(lines), flags | MSG_NOSIGNAL) >= 0)
        return 0;
    /* The receiver is gone; another one may have taken its place. */
    if ((errno != ECONNREFUSED && errno != ENOTCONN && errno != ECONNRESET)
        || connect(sp->notify, (struct sockaddr *)&sp->notify_address, sp->notify_bytes) < 0)
        return -1;
    return send(sp->notify, lines, strlen(lines), flags | MSG_NOSIGNAL) < 0 ? -1 : 0;
}

/* Sends lines such as "STATUS=warm", separated by '\n', in one datagram.  Never blocks, raises no
 * SIGPIPE.  Returns 0 if the datagram was sent, or if there is no NOTIFY_SOCKET.  Otherwise -1 with errno:
 * EAGAIN: the receiver has ten unread messages; repeat an important message (EXTEND_TIMEOUT_USEC) later.
 * ECONNREFUSED, ENOENT (sendto(2)): there is no receiver; a worker should ignore that. */
static inline int sp_notify(struct sp_worker *sp, const char *lines)
{
    return sp__send(sp, lines, MSG_DONTWAIT);
}

/* Sends READY=1, and declares that this worker finishes when its RETURN line ends.  Waits until the
 * receiver has room, because the protector kills a worker without READY=1 after --start-timeout.  Returns
 * as sp_notify does, but never -1 with EAGAIN. */
static inline int sp_ready(struct sp_worker *sp)
{
    /* In one datagram: the protector must know both before it relies on either. */
    const char *lines = sp->return_line < 0 ? "READY=1" : "READY=1\nX_SOCKETPROTECTOR_RETIRE=1";
    int result;
    do
        result = sp__send(sp, lines, 0);
    while (result < 0 && errno == EINTR);
    return result;
}

/* Sends WATCHDOG=1 if a watchdog is set and the message is due.  Cheap: call it in each turn of a loop. */
static inline void sp_alive(struct sp_worker *sp)
{
    uint64_t now_ns;
    if (sp->watchdog_ms < 0)
        return;
    now_ns = sp__now_ns();
    if (now_ns - sp->alive_ns < (uint64_t)sp->watchdog_ms * 500000u)
        return;
    if (sp->owner != getpid()) /* a forked child must not answer for a stuck parent */
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
    /* Non-blocking: the client may disconnect between poll() and accept(), see accept(2). */
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
        /* A stale socket is replaced, a live one is not; EAGAIN, a full backlog, means alive. */
        probe = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        if (probe < 0)
            return -1;
        if (connect(probe, (struct sockaddr *)&at, bytes + 1) < 0 && errno == ECONNREFUSED)
            unlink(path);
        sp__close(&probe);
    }
    if (sp__listen_on(sp, (struct sockaddr *)&at, bytes + 1, backlog) < 0)
        return -1;
    if (lstat(path, &is) == 0) {
        sp->path_device = is.st_dev;
        sp->path_inode = is.st_ino;
    }
    return 0;
}

static inline int sp__listen_tcp(struct sp_worker *sp, const char *address, int backlog)
{
    const char *colon = strrchr(address, ':'), *port = colon ? colon + 1 : address, *end;
    size_t length = colon ? (size_t)(colon - address) : 0;
    int number = sp__number(port, &end), failed;
    struct addrinfo hints, *found = NULL, *each, *same;
    struct sockaddr_in6 at, bound; /* the port is at the same place in sockaddr_in */
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
        /* A name may be in /etc/hosts twice, with the same address. */
        same = found;
        while (same->ai_addrlen != each->ai_addrlen
               || memcmp(same->ai_addr, each->ai_addr, each->ai_addrlen))
            same = same->ai_next;
        if (same != each)
            continue;
        memcpy(&at, each->ai_addr, each->ai_addrlen);
        if (!number && sp->count) { /* port 0: all get the port that the system chose for the first */
            failed = getsockname(sp->fds[0], (struct sockaddr *)&bound, &bytes);
            at.sin6_port = bound.sin6_port;
        }
        /* Without IPv6 on this machine the earlier addresses suffice. */
        if (sp__listen_on(sp, (struct sockaddr *)&at, each->ai_addrlen, backlog) < 0)
            failed = !sp->count || (errno != EAFNOSUPPORT && errno != EADDRNOTAVAIL);
    }
    if (found)
        freeaddrinfo(found);
    return failed ? -1 : 0;
}

/* ---- Open and close ---- */

/* Releases everything that sp_open() acquired.  Other workers keep the channel; the path of this
 * process's own UNIX socket is removed, if no other program has bound it since.  Connections stay open.
 * Keeps errno. */
static inline void sp_close(struct sp_worker *sp)
{
    struct sockaddr_un at;
    struct stat is;
    socklen_t bytes;
    int i, error = errno;
    for (i = 0; i < sp->count; i++) {
        bytes = sizeof at;
        memset(&at, 0, sizeof at);
        if (sp->channel < 0 && sp->owner == getpid() && sp->fds[i] != sp->return_line
            && !getsockname(sp->fds[i], (struct sockaddr *)&at, &bytes)
            && at.sun_family == AF_UNIX && at.sun_path[0] && !lstat(at.sun_path, &is)
            && is.st_dev == sp->path_device && is.st_ino == sp->path_inode)
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
    /* Close-on-exec: a program that this worker starts must not hold the channel or take from it. */
    if (sp->return_line >= 0) {
        if (fcntl(sp->return_line, F_SETFD, FD_CLOEXEC) < 0)
            return -1;
        sp->fds[sp->count++] = sp->return_line;
    }
    sp->fds[sp->count++] = sp->channel;
    return fcntl(sp->channel, F_SETFD, FD_CLOEXEC);
}

/* Opens the channel from the environment.  Without a protector, listens on `address` with `backlog`
 * (0: 4096).
 *
 * address: "4321" (every address), "host:4321", "[::1]:4321", "unix:/path", "unix:@name", or NULL for a
 * program that only runs under a protector.  Reads the variables once; their text must stay in memory.
 *
 * Returns 0, or -1 with nothing left open and errno set:
 * EBADF, ENOTSOCK or EPROTOTYPE: the environment names a descriptor that is not a channel.  A program that
 * a worker starts inherits the variables but not the descriptors: unset the variables for it.
 * EINVAL: a malformed variable or address.  EDESTADDRREQ: neither a protector nor an address.
 * EADDRNOTAVAIL: an unknown host.  Others: see socket(2), bind(2), listen(2). */
static inline int sp_open(struct sp_worker *sp, const char *address, int backlog)
{
    int failed = 0;
    memset(sp, 0, sizeof *sp);
    sp->channel = sp->return_line = sp->spare = sp->notify = -1;
    sp->owner = getpid();
    sp->watchdog_ms = -1;
    if (getenv("SOCKETPROTECTOR_CHANNEL")) {
        failed = sp__inherit(sp);
        if (failed) { /* the numbers may belong to other files: close none of them */
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
 * `size` bytes with its NUL; "-" is a removed listener.  Returns the name's whole length.  Returns -1 with
 * ENOENT for an index that this generation does not have, and without a protector: use getsockname(2) on
 * the connection there. */
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

/* Returns whether no more connections will come.  A server with keep-alive connections calls this after
 * each request; if the result is true, the server ends the connection with that answer. */
static inline int sp_draining(const struct sp_worker *sp)
{
    struct pollfd lines[2]; /* POLLRDHUP is reported while connections are queued; poll() takes none of them */
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
    /* Not CMSG_SPACE, which has room for two: a second descriptor would be received unnoticed. */
    message.msg_controllen = CMSG_LEN(sizeof(int));
    /* MSG_DONTWAIT, not O_NONBLOCK, because all workers share that flag of the channel. */
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
    switch (errno) { /* the connection is broken already, or the network just failed: accept(2) */
    case EAGAIN: case EINTR: case ECONNABORTED: case EHOSTDOWN: case EHOSTUNREACH: case ENETDOWN:
    case ENETUNREACH: case ENONET: case ENOPROTOOPT: case EPERM: case EPROTO:
        return SP_NOTHING;
    default:
        return SP_ERROR;
    }
}

/* Takes one connection from `fd`, a readable descriptor of sp->fds.  Never blocks.  Returns:
 *
 * SP_CONNECTION: client is filled in; the caller closes client->fd.
 * SP_NOTHING: keep waiting.
 * SP_DRAINED, SP_RETIRED: remove sp->fds from your poll set, because they stay readable for ever; finish.
 * SP_ERROR with EMFILE: no descriptor is free, so no connection was taken and none is lost.  Stop watching
 * sp->fds until one of your connections is closed.
 * SP_ERROR with ECONNABORTED: another thread used the last free descriptor; a connection is lost.
 * SP_ERROR with EPROTO: the protector speaks another version; that connection is closed.
 * SP_ERROR with another errno: see recvmsg(2) and accept(2). */
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
        if (sp->owner != getpid()) { /* messages on the line are for the parent to read */
            end.fd = fd;
            end.events = POLLRDHUP;
            return poll(&end, 1, 0) > 0 ? sp->ended = SP_RETIRED : SP_NOTHING;
        }
        got = recv(fd, nothing, sizeof nothing, MSG_DONTWAIT);
        /* Only the end of the line counts: a newer protector may send messages on it.  The line also ends
         * when the protector dies. */
        if (got > 0 || (got < 0 && (errno == EAGAIN || errno == EINTR)))
            return SP_NOTHING;
        return sp->ended = SP_RETIRED;
    }
    /* If no descriptor is free, the kernel drops the connection.  So a spare one is held until now. */
    if (sp->spare < 0 && (sp->spare = fcntl(fd, F_DUPFD_CLOEXEC, 0)) < 0)
        return SP_ERROR;
    sp__close(&sp->spare);
    result = fd == sp->channel ? sp__receive(sp, client) : sp__accept(sp, fd, client);
    if (result == SP_CONNECTION)
        sp__count_taken(sp, client);
    error = errno;
    if (!sp->ended)
        sp->spare = fcntl(fd, F_DUPFD_CLOEXEC, 0); /* if that fails, the next call tries again */
    errno = error;
    return result;
}

/* Waits and takes one connection.  Returns as sp_take does, and in addition:
 *
 * SP_NOTHING: `timeout_ms` (-1: for ever) has passed.
 * SP_WOKEN: `wake_fd` (-1: none) is readable.
 * SP_ERROR with EINTR: a signal handler ran.
 *
 * wake_fd: a signalfd, or a pipe that a signal handler writes to; without it a signal right before poll()
 * would go unnoticed.  sp_next sends WATCHDOG=1 while it waits.  A program that serves for long between
 * two calls must call sp_alive() itself. */
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
        /* The RETURN line is first: under load a connection is always waiting. */
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

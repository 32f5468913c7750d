/* A load generator that costs as little as it can: one thread, epoll, one new connection a request.
 *
 * It shares two cores with the protector and the worker that it measures, so each system call of
 * its own is taken from their share.  A TCP connection costs five: connect, send, its part of an
 * epoll_wait, recv, and connect(AF_UNSPEC).  The last one is the reason for the rest:
 *
 *  - It ends the connection by a reset, after the server's end of file was read: nothing can be
 *    lost by it any more, and no TIME_WAIT stays behind on either side.  So the port is free again
 *    at once, and 20,000 connections/s for a minute need no more ports than there are connections
 *    at a time (a plain close would leave 131,072 TIME_WAITs, then overflow their table).
 *  - The socket stays usable and stays in the epoll set: no socket(), epoll_ctl() and close().
 *
 * Waiting for the end of file is not only politeness: a protector that kept a copy of a connection
 * would show up here as timed_out.  Latency is from before connect() to the whole reply.
 *
 * With --again a connection asks again and again until the end: keep-alive.  A reply that says
 * "Connection: close" is its last.
 *
 * A gap is the longest time in which no client had a reply.  This contains the time in which this
 * program waits for a core.  With --arrivals (TCP) a gap is the longest time in which a request
 * waited and no reply arrived, by the kernel's time of arrival (SO_TIMESTAMPNS, socket(7)).  Clients
 * on other machines do not compete for the server's cores; here this program's wait does not count.
 *
 * Prints one line of JSON at the end.  With --keep, a first line when all connections are open.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <getopt.h>
#include <netdb.h>
#include <netinet/in.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { REPLY_BYTES = 512, EVENTS = 256, TICK_MS = 100, RETRY_MS = 1 };
#define CLOCK_NS 1000000ULL /* the most by which two clocks may drift apart in a run */
enum state { IDLE, CONNECTING, SENT, REPLIED, KEPT, GONE };
enum kind { REFUSED, RESET, TIMED_OUT, EMPTY, WRONG, LOCAL, KINDS };
static const char *const kind_names[KINDS] = {
    "refused", "reset", "timed_out", "empty", "wrong", "local"};

struct connection {
    int fd;
    enum state state;
    size_t got;
    uint64_t started_ns, waits_since_ns; /* waits_since_ns 0: no request waits */
    char reply[REPLY_BYTES];
};

static union {
    struct sockaddr any;
    struct sockaddr_storage storage;
    struct sockaddr_un un;
} server;
static socklen_t server_len;
static const char *request = "ping\n", *expected;
static size_t request_len, expected_len;
static uint64_t timeout_ns = 10000000000ULL, started_ns, slowest_at_ns;
static uint64_t answered_ns, gap_ns, gap_at_ns; /* the longest gap, and its begin */
static uint64_t *wait_begins, *wait_ends; /* --arrivals: for each request */
static uint64_t arrived_ns, realtime_ns; /* of the bytes read last; CLOCK_REALTIME at time 0 of now_ns() */
static uint32_t *samples; /* tenths of a microsecond: exact percentiles, 429 s at most */
static size_t sample_count, sample_room;
static unsigned long failures[KINDS], backlog_full, begun, most = (unsigned long)-1;
static int epoll_fd, idle, open_now, keep, kept, until_reply, plain, again, arrivals;
static volatile sig_atomic_t stopping;

static void on_stop(int signal_number)
{
    (void)signal_number;
    stopping = 1;
}

static void die(const char *what)
{
    fprintf(stderr, "cannot %s: %s\n", what, strerror(errno));
    exit(111);
}

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000ULL + (uint64_t)now.tv_nsec;
}

/* CLOCK_REALTIME at time 0 of now_ns(): the best of several readings, because another process can
 * run between the two clocks of a reading. */
static uint64_t clock_offset(void)
{
    uint64_t offset = 0, shortest = UINT64_MAX;
    for (int i = 0; i < 100; i++) {
        struct timespec real;
        uint64_t before = now_ns();
        clock_gettime(CLOCK_REALTIME, &real);
        uint64_t took = now_ns() - before;
        if (took < shortest) {
            shortest = took;
            offset = (uint64_t)real.tv_sec * 1000000000ULL + (uint64_t)real.tv_nsec - before - took / 2;
        }
    }
    return offset;
}

static void parse_address(const char *text)
{
    char host[256];
    const char *colon = strrchr(text, ':');
    const char *path = strncmp(text, "unix:", 5) == 0 ? text + 5 : strchr(text, '/') ? text : NULL;
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found;

    if (path != NULL) {
        size_t length = strlen(path);
        if (length >= sizeof server.un.sun_path) {
            fprintf(stderr, "%s: longer than a UNIX address can be\n", path);
            exit(2);
        }
        server.un.sun_family = AF_UNIX;
        memcpy(server.un.sun_path, path, length + 1);
        server_len = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + length + (*path != '@'));
        if (*path == '@')
            server.un.sun_path[0] = '\0';
        return;
    }
    if (colon == NULL || colon == text || (size_t)(colon - text) >= sizeof host) {
        fprintf(stderr, "%s: want HOST:PORT, [HOST6]:PORT, unix:/PATH or unix:@NAME\n", text);
        exit(2);
    }
    int bracket = *text == '[' && colon[-1] == ']';
    snprintf(host, sizeof host, "%.*s", (int)(colon - text) - 2 * bracket, text + bracket);
    int error = getaddrinfo(host, colon + 1, &hints, &found);
    if (error != 0) {
        fprintf(stderr, "cannot resolve %s: %s\n", text, gai_strerror(error));
        exit(111);
    }
    memcpy(&server, found->ai_addr, found->ai_addrlen);
    server_len = found->ai_addrlen;
    freeaddrinfo(found);
}

static void watch(struct connection *c, int operation, uint32_t more)
{
    struct epoll_event event = {.events = EPOLLIN | EPOLLRDHUP | EPOLLET | more, .data.ptr = c};
    if (epoll_ctl(epoll_fd, operation, c->fd, &event) < 0)
        die("watch a connection");
}

static void rest(struct connection *c, enum state state)
{
    open_now--;
    idle += state == IDLE;
    c->state = state;
}

/* A failed connection is tried again at the next tick, not at once: a refused one costs the
 * server nothing and would keep this program busy with nothing else. */
static void fail(struct connection *c, enum kind kind)
{
    failures[kind]++;
    if (c->waits_since_ns == 0)
        c->waits_since_ns = c->started_ns;
    if (c->fd >= 0)
        close(c->fd);
    c->fd = -1;
    rest(c, keep ? GONE : IDLE);
}

static void fail_errno(struct connection *c)
{
    switch (errno) {
    case ECONNREFUSED: case ENOENT: fail(c, REFUSED); break;
    case ECONNRESET: case EPIPE: case ECONNABORTED: fail(c, RESET); break;
    case ETIMEDOUT: fail(c, TIMED_OUT); break;
    default: fail(c, LOCAL); /* out of ports or descriptors: ours, but never hidden */
    }
}

static void send_request(struct connection *c)
{
    ssize_t sent = send(c->fd, request, request_len, MSG_NOSIGNAL);
    if (sent == (ssize_t)request_len) {
        if (c->state == CONNECTING)
            watch(c, EPOLL_CTL_MOD, 0);
        c->state = SENT;
        if (arrivals && c->waits_since_ns == 0)
            c->waits_since_ns = now_ns(); /* not before it was sent: only the server's time counts */
    } else if (sent < 0 && errno == EAGAIN) { /* the handshake is not over: a full backlog */
        if (c->state != CONNECTING)
            watch(c, EPOLL_CTL_MOD, EPOLLOUT);
        c->state = CONNECTING;
        if (c->waits_since_ns == 0)
            c->waits_since_ns = c->started_ns;
    } else {
        fail_errno(c);
    }
}

static void begin(struct connection *c)
{
    if (stopping || begun >= most)
        return;
    c->started_ns = now_ns();
    if (c->fd < 0) {
        c->fd = socket(server.any.sa_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
        if (c->fd < 0) {
            failures[LOCAL]++;
            return;
        }
        if (arrivals && setsockopt(c->fd, SOL_SOCKET, SO_TIMESTAMPNS, &arrivals, sizeof arrivals) < 0)
            die("ask for times of arrival");
        watch(c, EPOLL_CTL_ADD, 0);
    }
    begun++;
    open_now++;
    idle--;
    c->got = 0;
    c->state = SENT;
    if (connect(c->fd, &server.any, server_len) < 0 && errno != EINPROGRESS) {
        if (errno == EAGAIN && server.any.sa_family == AF_UNIX) {
            backlog_full++; /* where a blocking client would wait; tried again at the next tick */
            begun--;
            rest(c, IDLE);
        } else {
            fail_errno(c);
        }
        return;
    }
    send_request(c); /* over loopback the handshake is done by now: no wait for EPOLLOUT */
}

static void note_gap(uint64_t now)
{
    if (now - answered_ns > gap_ns) {
        gap_ns = now - answered_ns;
        gap_at_ns = answered_ns;
    }
    answered_ns = now;
}

static void *enlarge(void *array, size_t count, size_t item)
{
    array = realloc(array, count * item);
    if (array == NULL)
        die("keep the latencies");
    return array;
}

static void record(struct connection *c)
{
    static uint32_t slowest;
    uint64_t now = now_ns(), tenths = (now - c->started_ns) / 100;

    if (!stopping && !arrivals)
        note_gap(now);
    if (sample_count == sample_room) {
        sample_room = sample_room ? sample_room * 2 : 1 << 20;
        samples = enlarge(samples, sample_room, sizeof *samples);
        if (arrivals) {
            wait_begins = enlarge(wait_begins, sample_room, sizeof *wait_begins);
            wait_ends = enlarge(wait_ends, sample_room, sizeof *wait_ends);
        }
    }
    if (arrivals) {
        wait_begins[sample_count] = c->waits_since_ns < arrived_ns ? c->waits_since_ns : arrived_ns;
        wait_ends[sample_count] = arrived_ns;
        c->waits_since_ns = 0;
    }
    samples[sample_count] = tenths > UINT32_MAX ? UINT32_MAX : (uint32_t)tenths;
    if (samples[sample_count] > slowest) {
        slowest = samples[sample_count];
        slowest_at_ns = now;
    }
    sample_count++;
}

static void succeed(struct connection *c)
{
    static const struct sockaddr nowhere = {.sa_family = AF_UNSPEC};
    if (plain || server.any.sa_family == AF_UNIX || connect(c->fd, &nowhere, sizeof nowhere) < 0) {
        close(c->fd);
        c->fd = -1;
    }
    rest(c, IDLE);
    begin(c);
}

static ssize_t receive(struct connection *c)
{
    union { struct cmsghdr align; char bytes[CMSG_SPACE(sizeof(struct timespec))]; } control;
    struct iovec into = {c->reply + c->got, sizeof c->reply - c->got};
    struct msghdr message = {.msg_iov = &into, .msg_iovlen = 1, .msg_control = control.bytes,
                             .msg_controllen = sizeof control.bytes};
    struct timespec stamp;

    if (!arrivals)
        return recv(c->fd, into.iov_base, into.iov_len, 0);
    ssize_t got = recvmsg(c->fd, &message, 0);
    struct cmsghdr *found = got > 0 ? CMSG_FIRSTHDR(&message) : NULL;
    if (found != NULL && found->cmsg_type == SO_TIMESTAMPNS) {
        memcpy(&stamp, CMSG_DATA(found), sizeof stamp);
        arrived_ns = (uint64_t)stamp.tv_sec * 1000000000ULL + (uint64_t)stamp.tv_nsec - realtime_ns;
    } else if (got > 0) {
        arrived_ns = now_ns();
    }
    return got;
}

static void on_event(struct connection *c, uint32_t events)
{
    if (c->state == IDLE || c->state == GONE)
        return; /* what connect(AF_UNSPEC) itself reports */
    if (c->state == CONNECTING) {
        send_request(c);
        if (c->state != SENT)
            return;
    }
    ssize_t got = receive(c);
    if (got < 0) {
        if (errno != EAGAIN)
            fail_errno(c);
        return;
    }
    c->got += (size_t)got;
    int whole = c->got >= expected_len && c->got < sizeof c->reply &&
                memcmp(c->reply + c->got - expected_len, expected, expected_len) == 0;
    if (whole && c->state == SENT) {
        record(c);
        if (again && !stopping && !memmem(c->reply, c->got, "onnection: close", 16)) { /* keep-alive: the next request on the same connection */
            c->got = 0;
            c->started_ns = now_ns();
            send_request(c);
            return;
        }
        c->state = keep ? KEPT : REPLIED;
        kept += keep != 0;
    }
    if ((until_reply || again) && c->state == REPLIED)
        succeed(c);
    else if (got == 0 || c->got == sizeof c->reply || (events & EPOLLRDHUP && !keep)) {
        if (c->state == KEPT || (whole && keep))
            fail(c, RESET); /* one that should have stayed */
        else if (!whole)
            fail(c, c->got == 0 ? EMPTY : WRONG);
        else
            succeed(c); /* RDHUP and a read that did not fill the buffer: the end was reached */
    }
}

static int by_value(const void *left, const void *right)
{
    uint32_t a = *(const uint32_t *)left, b = *(const uint32_t *)right;
    return (a > b) - (a < b);
}

static int by_time(const void *left, const void *right)
{
    uint64_t a = *(const uint64_t *)left, b = *(const uint64_t *)right;
    return (a > b) - (a < b);
}

/* Find the longest time in which a request waited and no reply arrived, until ended_ns. */
static void find_gap(const struct connection *all, int count, uint64_t ended_ns)
{
    size_t begins = 0, replies = 0, total = sample_count + (size_t)count;

    wait_begins = enlarge(wait_begins, total, sizeof *wait_begins);
    wait_ends = enlarge(wait_ends, total, sizeof *wait_ends);
    total = sample_count;
    for (int i = 0; i < count; i++)
        if (all[i].waits_since_ns != 0) {
            wait_begins[total] = all[i].waits_since_ns;
            wait_ends[total++] = ended_ns;
        }
    qsort(wait_begins, total, sizeof *wait_begins, by_time);
    qsort(wait_ends, total, sizeof *wait_ends, by_time);
    while (replies < total && answered_ns < ended_ns) {
        if (begins < total && wait_begins[begins] <= wait_ends[replies]) {
            if (begins++ == replies) /* none waited before */
                answered_ns = wait_begins[begins - 1];
        } else {
            note_gap(wait_ends[replies] < ended_ns ? wait_ends[replies] : ended_ns);
            replies++;
        }
    }
}

static double percentile_us(double share)
{
    if (sample_count == 0)
        return 0;
    size_t index = (size_t)(share * (double)sample_count);
    return samples[index < sample_count ? index : sample_count - 1] / 10.0;
}

static void report(double seconds, size_t in_time)
{
    struct rusage used;
    unsigned long failed = 0;
    double slowest_at = slowest_at_ns ? (double)(slowest_at_ns - started_ns) / 1e9 : 0;

    getrusage(RUSAGE_SELF, &used);
    double cpu_us = (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) * 1e6 +
                    (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec);
    if (sample_count)
        qsort(samples, sample_count, sizeof *samples, by_value);
    printf("{\"connections\": %zu, \"seconds\": %.3f, \"per_second\": %.1f", sample_count, seconds,
           (double)in_time / seconds);
    for (int kind = 0; kind < KINDS; kind++) {
        printf(", \"%s\": %lu", kind_names[kind], failures[kind]);
        failed += failures[kind];
    }
    printf(", \"failed\": %lu, \"backlog_full\": %lu, \"p50_us\": %.1f, \"p99_us\": %.1f, "
           "\"p999_us\": %.1f, \"max_us\": %.1f, \"max_at_s\": %.3f, \"gap_us\": %.1f, "
           "\"gap_at_s\": %.3f, \"own_cpu_us\": %.2f}\n",
           failed, backlog_full, percentile_us(0.5), percentile_us(0.99), percentile_us(0.999),
           percentile_us(1), slowest_at, (double)gap_ns / 1e3,
           (double)(gap_at_ns - started_ns) / 1e9, sample_count ? cpu_us / (double)sample_count : 0);
}

int main(int argc, char **argv)
{
    static const struct option options[] = {
        {"connections", 1, 0, 'c'}, {"seconds", 1, 0, 't'}, {"count", 1, 0, 'n'},
        {"send", 1, 0, 's'}, {"expect", 1, 0, 'x'}, {"timeout", 1, 0, 'T'},
        {"until-reply", 0, 0, 'r'}, {"keep", 1, 0, 'k'}, {"plain", 0, 0, 'p'},
        {"again", 0, 0, 'a'}, {"arrivals", 0, 0, 'A'}, {0, 0, 0, 0}};
    double seconds = 0;
    int count = 1, option, said_kept = 0;
    struct sigaction stop = {.sa_handler = on_stop};
    struct epoll_event events[EVENTS];

    while ((option = getopt_long(argc, argv, "c:t:n:s:x:T:rk:paA", options, NULL)) != -1)
        switch (option) {
        case 'c': count = atoi(optarg); break;
        case 't': seconds = atof(optarg); break;
        case 'n': most = strtoul(optarg, NULL, 10); break;
        case 's': request = optarg; break;
        case 'x': expected = optarg; break;
        case 'T': timeout_ns = (uint64_t)(atof(optarg) * 1e9); break;
        case 'r': until_reply = 1; break;
        case 'p': plain = 1; break;
        case 'a': again = 1; break;
        case 'A': arrivals = 1; break;
        case 'k': count = keep = atoi(optarg); most = (unsigned long)keep; break;
        default: return 2;
        }
    if (optind + 1 != argc || count < 1) {
        fprintf(stderr,
                "usage: load [--connections C] [--seconds S | --count N] [--send LINE] "
                "[--expect END]\n            [--timeout S] [--until-reply] [--plain] [--again]\n            [--arrivals] [--keep N] ADDRESS\n");
        return 2;
    }
    parse_address(argv[optind]);
    expected = expected ? expected : request;
    request_len = strlen(request);
    expected_len = strlen(expected);
    sigaction(SIGTERM, &stop, NULL);
    sigaction(SIGINT, &stop, NULL);
    struct connection *all = calloc((size_t)count, sizeof *all);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (all == NULL || epoll_fd < 0)
        die("start");
    for (int i = 0; i < count; i++)
        all[i].fd = -1;
    idle = count;
    realtime_ns = clock_offset();
    started_ns = answered_ns = gap_at_ns = now_ns();
    uint64_t swept_ns = 0, ended_ns = 0, retried_ns = 0, now = started_ns;
    size_t in_time = 0;
    while (!ended_ns || (open_now > 0 && !keep)) {
        if (!ended_ns && idle > 0 && now - retried_ns >= RETRY_MS * 1000000ULL) {
            retried_ns = now;
            for (int i = 0; i < count; i++)
                if (all[i].state == IDLE)
                    begin(&all[i]);
        }
        int waiting = !ended_ns && idle > 0 && begun < most;
        int ready = epoll_wait(epoll_fd, events, EVENTS, waiting ? RETRY_MS : TICK_MS);
        for (int i = 0; i < ready; i++)
            on_event(events[i].data.ptr, events[i].events);
        now = now_ns();
        if (now - swept_ns >= TICK_MS * 1000000ULL) {
            swept_ns = now;
            for (int i = 0; i < count; i++)
                if (all[i].state != IDLE && all[i].state < KEPT &&
                    now - all[i].started_ns > timeout_ns)
                    fail(&all[i], TIMED_OUT);
        }
        if (keep && !said_kept && kept == keep) {
            said_kept = 1;
            printf("{\"kept\": %d, \"seconds\": %.3f}\n", kept, (double)(now - started_ns) / 1e9);
            fflush(stdout);
        }
        if (seconds > 0 && (double)(now - started_ns) >= seconds * 1e9)
            stopping = 1;
        if (!ended_ns && (stopping || (!keep && begun >= most && open_now == 0))) {
            ended_ns = now;
            if (!arrivals)
                note_gap(now);
            in_time = sample_count;
        }
    }
    if (arrivals) {
        uint64_t now_offset = clock_offset();
        if (now_offset - realtime_ns + CLOCK_NS > 2 * CLOCK_NS) {
            fprintf(stderr, "the system's clock was set meanwhile, so no gap is known: try again\n");
            return 111;
        }
        find_gap(all, count, ended_ns);
    }
    report((double)(ended_ns - started_ns) / 1e9, in_time);
    return 0;
}

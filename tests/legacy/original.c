/* A daemon as it was built for the C++ SocketProtector: connects to the abstract stream socket
 * of its port, waits with select(), receives one byte and one descriptor at a time, and takes
 * anything without a descriptor for the end.  Answers `[pid] line` to each line, one client
 * after the other.
 *
 *     original PORT[,PORT...] [WORD...]
 *
 *     never          never connects             exit=N      exits with N instead of connecting
 *     grandchild     a child of its own connects, and serves
 *     orphan         the same, and its parent has ended: init's child by then
 *     session        leads a session of its own
 *     closes         reads one connection, serves it, closes its end, and stays
 *     leaves=N       reads one connection, serves it, and exits with N
 *     stuck          reads no connection until it gets USR1
 *     deaf           does not end at TERM
 *     environ        prints its environment and descriptors
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

enum { MOST = 8 };
static volatile sig_atomic_t terminated, told;
static int streams[MOST], count;
extern char **environ;

static void on_signal(int number)
{
    if (number == SIGUSR1)
        told = 1;
    else
        terminated = 1;
}

/* Not pause(): a signal right before it would not be seen. */
static void nap(void)
{
    struct timeval one = {0, 2000};
    select(0, NULL, NULL, NULL, &one);
}

static const char *word(int argc, char **argv, const char *name)
{
    size_t length = strlen(name);
    int i;
    for (i = 2; i < argc; i++)
        if (!strncmp(argv[i], name, length) && (argv[i][length] == '=' || !argv[i][length]))
            return argv[i][length] ? argv[i] + length + 1 : argv[i] + length;
    return NULL;
}

/* Both ends give the whole length of the structure, so the name is padded with NULs. */
static int connected(int port)
{
    struct sockaddr_un address;
    int fd = socket(PF_LOCAL, SOCK_STREAM, 0);
    memset(&address, 0, sizeof address);
    address.sun_family = AF_UNIX;
    snprintf(address.sun_path + 1, sizeof address.sun_path - 1, "sock_srv_%d", port);
    while (connect(fd, (struct sockaddr *)&address, sizeof address) < 0)
        if (errno != EINTR) {
            printf("cannot connect: %s\n", strerror(errno));
            exit(70);
        }
    return fd;
}

/* Returns a connection, or -1 at the end. */
static int received(int stream)
{
    char byte = 0;
    union {
        char bytes[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control;
    struct iovec part;
    struct msghdr message;
    struct cmsghdr *header;
    ssize_t got;
    int fd;
    memset(&message, 0, sizeof message);
    part.iov_base = &byte;
    part.iov_len = 1;
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = control.bytes;
    message.msg_controllen = sizeof control.bytes;
    while ((got = recvmsg(stream, &message, 0)) < 0 && errno == EINTR)
        ;
    header = got < 0 ? NULL : CMSG_FIRSTHDR(&message);
    if (!header) {
        printf("end of file %d %d\n", (int)getpid(), (int)got);
        return -1;
    }
    if (header->cmsg_type != SCM_RIGHTS || header->cmsg_len != CMSG_LEN(sizeof(int)) ||
        byte != 'x' || got != 1) {
        printf("not the protocol\n");
        exit(71);
    }
    memcpy(&fd, CMSG_DATA(header), sizeof fd);
    return fd;
}

static void serve(int fd)
{
    char line[256], answer[300];
    size_t length = 0;
    ssize_t got;
    char *end;
    while ((got = recv(fd, line + length, sizeof line - 1 - length, 0)) > 0) {
        length += (size_t)got;
        line[length] = 0;
        while ((end = strchr(line, '\n')) != NULL) {
            int size;
            *end++ = 0;
            size = snprintf(answer, sizeof answer, "[%d] %s\n", (int)getpid(), line);
            if (send(fd, answer, (size_t)size, MSG_NOSIGNAL) != size)
                break;
            length -= (size_t)(end - line);
            memmove(line, end, length + 1);
        }
    }
    close(fd);
}

static void show(void)
{
    DIR *folder = opendir("/proc/self/fd");
    struct dirent *entry;
    sigset_t blocked;
    char **each;
    for (each = environ; *each; each++)
        printf("environ %s\n", *each);
    while ((entry = readdir(folder)) != NULL)
        if (entry->d_name[0] != '.' && atoi(entry->d_name) != dirfd(folder))
            printf("descriptor %s\n", entry->d_name);
    closedir(folder);
    sigprocmask(SIG_BLOCK, NULL, &blocked);
    printf("signals %d %d %d\n", signal(SIGPIPE, SIG_DFL) == SIG_DFL,
           signal(SIGXFSZ, SIG_DFL) == SIG_DFL, sigismember(&blocked, SIGTERM));
}

static int next(void)
{
    int i, most = 0;
    fd_set set;
    FD_ZERO(&set);
    for (i = 0; i < count; i++) {
        FD_SET(streams[i], &set);
        most = streams[i] > most ? streams[i] : most;
    }
    while (!terminated) {
        fd_set found = set;
        if (select(most + 1, &found, NULL, NULL, NULL) < 0)
            continue;
        for (i = 0; i < count; i++)
            if (FD_ISSET(streams[i], &found))
                return received(streams[i]);
    }
    return -1;
}

int main(int argc, char **argv)
{
    struct sigaction action;
    const char *value;
    char *port;
    int fd, i;
    setvbuf(stdout, NULL, _IOLBF, 0);
    memset(&action, 0, sizeof action);
    action.sa_handler = on_signal;
    sigaction(SIGUSR1, &action, NULL);
    if (word(argc, argv, "deaf"))
        action.sa_handler = SIG_IGN;
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);
    if (word(argc, argv, "environ"))
        show();
    if ((value = word(argc, argv, "exit")) != NULL)
        return atoi(value);
    printf("started %d\n", (int)getpid());
    if (word(argc, argv, "session"))
        setsid();
    if (word(argc, argv, "grandchild") && (fd = fork()) != 0)
        while (!terminated)
            nap();
    if (word(argc, argv, "orphan") && fork())
        while (!terminated)
            nap();
    if (word(argc, argv, "orphan")) {
        pid_t middle = getpid();
        if (fork())
            _exit(0);
        while (getppid() == middle)
            nap();
    }
    while (word(argc, argv, "never") && !terminated)
        nap();
    if (terminated)
        return 0;
    for (port = strtok(argv[1], ","); port && count < MOST; port = strtok(NULL, ","))
        streams[count++] = connected(atoi(port));
    printf("connected %d\n", (int)getpid());
    while (word(argc, argv, "stuck") && !told && !terminated)
        nap();
    while ((fd = next()) >= 0) {
        serve(fd);
        if ((value = word(argc, argv, "leaves")) != NULL)
            return atoi(value);
        if (word(argc, argv, "closes")) {
            for (i = 0; i < count; i++)
                close(streams[i]);
            printf("closed\n");
            while (!terminated)
                nap();
        }
    }
    printf("ended %d\n", (int)getpid());
    return 0;
}

/* A worker that costs next to nothing, so that there can be a thousand: READY=1, then one line
 * and its answer a connection, until its channel ends.
 *
 * It waits in the call that takes: so the kernel wakes one of a thousand, not all.  With
 * BENCH_LISTENER=N it accepts from that descriptor itself.
 */
#define _GNU_SOURCE
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static void say_ready(void)
{
    const char *address = getenv("NOTIFY_SOCKET");
    struct sockaddr_un to = {.sun_family = AF_UNIX};
    size_t length;
    int fd;

    if (address == NULL || strlen(address) >= sizeof to.sun_path)
        return;
    length = offsetof(struct sockaddr_un, sun_path) + strlen(address);
    memcpy(to.sun_path, address, strlen(address));
    if (address[0] == '@')
        to.sun_path[0] = '\0';
    fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd >= 0) {
        sendto(fd, "READY=1", 7, 0, (struct sockaddr *)&to, (socklen_t)length);
        close(fd);
    }
}

/* Returns -1 at the end. */
static int take(int channel)
{
    char header[64], control[CMSG_SPACE(sizeof(int))];
    struct iovec part = {header, sizeof header};
    struct msghdr message = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    struct cmsghdr *given;
    ssize_t got = recvmsg(channel, &message, MSG_CMSG_CLOEXEC);
    int fd = -1;

    if (got > 0 && (given = CMSG_FIRSTHDR(&message)) != NULL)
        memcpy(&fd, CMSG_DATA(given), sizeof fd);
    return fd;
}

static void serve(int fd)
{
    char line[4096], answer[64];
    ssize_t got = 0, more;

    while (got < (ssize_t)sizeof line && (got == 0 || line[got - 1] != '\n')) {
        more = read(fd, line + got, sizeof line - (size_t)got);
        if (more <= 0)
            break;
        got += more;
    }
    if (got > 0) {
        int length = snprintf(answer, sizeof answer, "[%d] pong\n", (int)getpid());
        if (write(fd, answer, (size_t)length) < 0)
            perror("write");
    }
    close(fd);
}

int main(void)
{
    const char *listener = getenv("BENCH_LISTENER"), *channel = getenv("SOCKETPROTECTOR_CHANNEL");
    int fd;

    if (listener == NULL && channel == NULL)
        return 2;
    say_ready();
    do {
        fd = listener != NULL ? accept(atoi(listener), NULL, NULL) : take(atoi(channel));
        if (fd >= 0)
            serve(fd);
    } while (fd >= 0);
    return 0;
}

/* What forward.c and least.c share: the least that can forward connections to a worker. */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { BURST = 32 };

struct header { /* docs/protocol.md, "Channel" */
    uint8_t version, kind;
    uint16_t listener;
    uint32_t state_bytes;
    uint64_t accepted_ns;
};

/* In a worker's process: let it inherit its end of the channel, as docs/protocol.md says. */
static void inherit_channel(int channel)
{
    char number[16];

    snprintf(number, sizeof number, "%d", channel);
    setenv("SOCKETPROTECTOR_CHANNEL", number, 1);
    setenv("SOCKETPROTECTOR_LISTENERS", "tcp:127.0.0.1:1", 1);
    fcntl(channel, F_SETFD, 0);
}

/* Forward one client; return 1, 0 if no client waits, or -1 if no worker is left. */
static int forward_one(int listener, int channel)
{
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(sizeof(int))];
    } rights = {.header = {CMSG_LEN(sizeof(int)), SOL_SOCKET, SCM_RIGHTS}};
    struct header header = {1, 1, 0, 0, 0};
    struct iovec part = {&header, sizeof header};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = rights.room,
                             .msg_controllen = CMSG_LEN(sizeof(int))};
    struct timespec now;
    int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);

    if (fd < 0)
        return 0;
    clock_gettime(CLOCK_MONOTONIC, &now);
    header.accepted_ns = (uint64_t)now.tv_sec * 1000000000ULL + (uint64_t)now.tv_nsec;
    memcpy(CMSG_DATA(&rights.header), &fd, sizeof fd);
    int sent = (int)sendmsg(channel, &message, MSG_NOSIGNAL); /* waits for room */
    close(fd);
    return sent < 0 ? -1 : 1;
}

/* Forward waiting clients, up to BURST; return -1 if no worker is left. */
static int forward_waiting(int listener, int channel)
{
    int forwarded = 1;

    for (int i = 0; i < BURST && forwarded > 0; i++)
        forwarded = forward_one(listener, channel);
    return forwarded;
}

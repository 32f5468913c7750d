/* The least that can forward one connection: accept4, sendmsg with the descriptor, close.
 *
 * forward.c and least.c share it.
 */
#include <stdint.h>
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

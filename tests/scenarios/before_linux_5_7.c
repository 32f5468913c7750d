/* Preloaded: without CAP_NET_RAW, no socket is bound to an interface by its options.

   Since Linux 5.7 a socket without an interface may be bound to one (sock_setsockopt()). */

#define _GNU_SOURCE

#include <dlfcn.h>
#include <errno.h>
#include <sys/socket.h>

#define BIND_TO_INDEX 62

int setsockopt(int fd, int level, int option, const void *value, socklen_t size) {
    int (*real)(int, int, int, const void *, socklen_t) = dlsym(RTLD_NEXT, "setsockopt");

    if (level == SOL_SOCKET && (option == SO_BINDTODEVICE || option == BIND_TO_INDEX)) {
        errno = EPERM;
        return -1;
    }
    return real(fd, level, option, value, size);
}

/* Preloaded into each process of a protector: names each system call by its line of Python, and
 * makes one of them fail, or kills the process there.
 *
 * EVERYCALL names a folder.  In it:
 *   armed   calls count once this file exists
 *   sites   (written) a line for each site: CALL FILE:LINE KIND, see kind_of()
 *   plan    one line: CALL FILE:LINE ACTION; ACTION is an errno's number, or 0 for SIGKILL
 *   fired   (written) the process in which the fault came
 * The library does nothing in a process that has no Python frame of this project on its stack.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

typedef void *object;
static object (*get_state)(void), (*get_frame)(object), (*get_back)(object), (*get_code)(object);
static object (*get_attr)(object, const char *);
static const char *(*as_text)(object);
static int (*get_line)(object), (*is_up)(void), (*lock)(void);
static void (*unlock)(int);
static void (*release)(object);

static const char *folder;
static char plan[512], armed[512], sites[512], fired[512];
static int inside, wants = -1;
static char wanted[512];

static void find_python(void) {
    get_state = dlsym(RTLD_DEFAULT, "PyGILState_GetThisThreadState");
    get_frame = dlsym(RTLD_DEFAULT, "PyThreadState_GetFrame");
    get_back = dlsym(RTLD_DEFAULT, "PyFrame_GetBack");
    get_code = dlsym(RTLD_DEFAULT, "PyFrame_GetCode");
    get_line = dlsym(RTLD_DEFAULT, "PyFrame_GetLineNumber");
    as_text = dlsym(RTLD_DEFAULT, "PyUnicode_AsUTF8");
    get_attr = dlsym(RTLD_DEFAULT, "PyObject_GetAttrString");
    release = dlsym(RTLD_DEFAULT, "Py_DecRef");
    lock = dlsym(RTLD_DEFAULT, "PyGILState_Ensure");
    unlock = dlsym(RTLD_DEFAULT, "PyGILState_Release");
    is_up = dlsym(RTLD_DEFAULT, "Py_IsInitialized");
}

__attribute__((constructor)) static void begin(void) {
    folder = getenv("EVERYCALL");
    if (!folder) return;
    find_python();
    if (!get_state || !get_frame) { folder = NULL; return; }
    snprintf(plan, sizeof plan, "%s/plan", folder);
    snprintf(armed, sizeof armed, "%s/armed", folder);
    snprintf(sites, sizeof sites, "%s/sites", folder);
    snprintf(fired, sizeof fired, "%s/fired", folder);
    int fd = syscall(SYS_openat, AT_FDCWD, plan, O_RDONLY | O_CLOEXEC, 0);
    if (fd < 0) return;
    long length = syscall(SYS_read, fd, wanted, sizeof wanted - 1);
    syscall(SYS_close, fd);
    if (length <= 0) return;
    char *last = strrchr(wanted, ' ');
    if (!last) return;
    *last = 0;
    wants = atoi(last + 1);
}

static int exists(const char *path) { return syscall(SYS_faccessat, AT_FDCWD, path, F_OK) == 0; }

/* Where the nearest frame of this project is; 0: none, or modules are being imported. */
static int site(const char *call, char *into, size_t size) {
    int found = 0;
    if (!is_up || !is_up()) return 0;
    object state = get_state();
    if (!state) return 0;
    int held = lock();  /* most calls are made without the interpreter's lock */
    object frame = get_frame(state);
    while (frame) {
        object code = get_code(frame);
        object name = get_attr(code, "co_filename");
        const char *path = name ? as_text(name) : NULL;
        const char *at = path ? strstr(path, "/socketprotector/") : NULL;
        if (!at && path) at = strstr(path, "/socketprotector_client/");
        /* Calls of imports, and of a worker's own code, are not ours. */
        if (path && strstr(path, "importlib")) found = -1;
        else if (path && !found && strstr(path, "/tests/workers/")) found = -1;
        else if (at && !found) {
            snprintf(into, size, "%s %s:%d", call, at + 1, get_line(frame));
            found = 1;
        }
        object back = get_back(frame);
        if (name) release(name);
        release(code);
        release(frame);
        frame = back;
        if (found == -1) break;
    }
    if (frame) release(frame);
    unlock(held);
    return found == 1;
}

static int is(const char *call, const char *beginning) {
    return strncmp(call, beginning, strlen(beginning)) == 0;
}

/* What decides which errors a call can give: where a path leads, what a descriptor is. */
static const char *kind_of(const char *call, long a, long b, long c, long d) {
    static char text[48];
    struct stat about;
    struct statfs system;
    if (is(call, "open") || is(call, "stat") || is(call, "lstat") || is(call, "readlink")) {
        const char *path = (const char *)(is(call, "openat") ? b : a);
        long flags = is(call, "openat") ? c : b;
        if (is(path, "/proc/") || is(path, "/sys/") || is(path, "/dev/")) return "kernel";
        if (!is(call, "open")) return "path";
        return flags & O_CREAT ? "create" : flags & O_ACCMODE ? "write" : "read";
    }
    if (is(call, "poll")) return b > 4 ? "many" : "few";
    if (is(call, "socket") || is(call, "memfd") || is(call, "epoll_create")) return "-";
    if (is(call, "wait") || a < 0 || a > 1000000) return "-";
    if (syscall(SYS_fstat, a, &about) != 0) return "-";
    if (is(call, "setsockopt")) {
        snprintf(text, sizeof text, "option-%ld-%ld", b, c);
        return text;
    }
    const char *kind = S_ISFIFO(about.st_mode) ? "pipe" : "other";
    if (S_ISREG(about.st_mode)) {
        kind = "file";
        if (syscall(SYS_fstatfs, a, &system) == 0 && system.f_type != 0x01021994) {
            if (system.f_type == 0x9fa0 || system.f_type == 0x63677270) kind = "kernel";
        } else if (about.st_nlink == 0) kind = "memory";
    } else if (S_ISSOCK(about.st_mode)) {
        int family = 0, type = 0;
        socklen_t size = sizeof family;
        syscall(SYS_getsockopt, a, SOL_SOCKET, SO_DOMAIN, &family, &size);
        syscall(SYS_getsockopt, a, SOL_SOCKET, SO_TYPE, &type, &size);
        kind = family == AF_NETLINK ? "netlink" : family != AF_UNIX ? "tcp"
            : type == SOCK_DGRAM ? "datagram" : "unix";
    }
    int flags = syscall(SYS_fcntl, a, F_GETFL);
    int message = is(call, "sendmsg") || is(call, "recvmsg") ? c
        : is(call, "send") || is(call, "recv") ? d : 0;
    int now = flags & O_NONBLOCK || message & MSG_DONTWAIT;
    snprintf(text, sizeof text, "%s%s", kind, now ? "+nonblock" : "");
    return text;
}

#define SEEN 4096
static unsigned seen[SEEN];

static void record(const char *at, const char *kind) {
    unsigned hash = 5381;
    for (const char *c = at; *c; c++) hash = hash * 33 + (unsigned char)*c;
    unsigned place = hash % SEEN;
    while (seen[place] && seen[place] != hash) place = (place + 1) % SEEN;
    if (seen[place]) return;
    seen[place] = hash;
    char line[600];
    int length = snprintf(line, sizeof line, "%s %s\n", at, kind);
    int out = syscall(SYS_openat, AT_FDCWD, sites, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666);
    if (out < 0) return;
    syscall(SYS_write, out, line, length);
    syscall(SYS_close, out);
}

/* Return the errno that this call is to fail with, or 0. */
static int fault(const char *call, long a, long b, long c, long d) {
    if (!folder || inside) return 0;
    if (wants >= 0 && strncmp(wanted, call, strlen(call)) != 0) return 0;
    int kept = errno, code = 0;
    char at[512];
    inside = 1;
    if (exists(armed) && site(call, at, sizeof at)) {
        if (wants < 0) record(at, kind_of(call, a, b, c, d));
        else if (strcmp(at, wanted) == 0) {
            int out = syscall(SYS_openat, AT_FDCWD, fired, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
            if (out >= 0) {
                char pid[32];
                int length = snprintf(pid, sizeof pid, "%ld\n", (long)syscall(SYS_getpid));
                syscall(SYS_write, out, pid, length);
                syscall(SYS_close, out);
                if (wants == 0) syscall(SYS_kill, syscall(SYS_getpid), SIGKILL);
                code = wants;
            }
        }
    }
    inside = 0;
    errno = kept;
    return code;
}

/* The headers declare these functions otherwise, so each has another name in C. */
#define CALL(name)                                                                             \
    long my_##name(long, long, long, long, long, long) __asm__(#name);                         \
    long my_##name(long a, long b, long c, long d, long e, long f) {                                \
        static long (*real)(long, long, long, long, long, long);                               \
        if (!real) real = (long (*)(long, long, long, long, long, long))dlsym(RTLD_NEXT, #name); \
        int code = fault(#name, a, b, c, d);                                                            \
        if (code) { errno = code; return -1; }                                                 \
        return real(a, b, c, d, e, f);                                                         \
    }

CALL(read) CALL(pread) CALL(pread64) CALL(pwrite) CALL(pwrite64) CALL(writev)
CALL(open) CALL(open64) CALL(openat) CALL(openat64) CALL(close)
CALL(socket) CALL(socketpair) CALL(bind) CALL(listen) CALL(connect) CALL(accept) CALL(accept4)
CALL(getsockopt) CALL(setsockopt) CALL(getsockname) CALL(getpeername) CALL(shutdown)
CALL(send) CALL(sendto) CALL(sendmsg) CALL(recv) CALL(recvfrom) CALL(recvmsg)
CALL(epoll_create1) CALL(epoll_wait) CALL(poll)
CALL(ioctl) CALL(dup) CALL(dup2) CALL(dup3) CALL(pipe2)
CALL(memfd_create) CALL(ftruncate) CALL(ftruncate64)
CALL(fork) CALL(execve) CALL(waitid) CALL(waitpid) CALL(wait4) CALL(kill)
CALL(stat) CALL(stat64) CALL(lstat) CALL(lstat64) CALL(fstat) CALL(fstat64)
CALL(fstatat) CALL(fstatat64) CALL(unlink) CALL(unlinkat) CALL(rename) CALL(renameat)
CALL(link) CALL(symlink) CALL(readlink) CALL(mkdir) CALL(mkdirat) CALL(rmdir)
CALL(chmod) CALL(fchmod) CALL(fchmodat) CALL(chown) CALL(fchown) CALL(lchown)
CALL(flock) CALL(prctl) CALL(setrlimit) CALL(sched_setscheduler) CALL(setpriority)
CALL(fsync) CALL(fdatasync) CALL(inotify_init1) CALL(inotify_add_watch) CALL(sendfile)

/* pidfd_open and pidfd_send_signal have no function of their own. */
long my_syscall(long, long, long, long, long, long, long) __asm__("syscall");
static long plain(long number, long a, long b, long c, long d, long e, long f) {
    static long (*real)(long, long, long, long, long, long, long);
    if (!real) real = (long (*)(long, long, long, long, long, long, long))dlsym(RTLD_NEXT, "syscall");
    return real(number, a, b, c, d, e, f);
}
long my_syscall(long number, long a, long b, long c, long d, long e, long f) {
    const char *name = number == SYS_pidfd_open ? "pidfd_open"
        : number == SYS_pidfd_send_signal ? "pidfd_send_signal" : NULL;
    int code = name ? fault(name, -1, 0, 0, 0) : 0;
    if (code) { errno = code; return -1; }
    return plain(number, a, b, c, d, e, f);
}

/* The interpreter's signal handler writes a signal's number to a pipe, in whichever line it comes.
 * That call does not count: the handler may have interrupted the thread while it changed the
 * interpreter's lock, and site() would wait for that lock for ever.
 */
long my_write(long, const unsigned char *, long) __asm__("write");
long my_write(long a, const unsigned char *b, long c) {
    static long (*real)(long, const unsigned char *, long);
    if (!real) real = (long (*)(long, const unsigned char *, long))dlsym(RTLD_NEXT, "write");
    int wakes = folder && !inside && c == 1 && b[0] - 1u < 64
        && strcmp(kind_of("write", a, 0, 0, 0), "pipe+nonblock") == 0;
    int code = wakes ? 0 : fault("write", a, 0, c, 0);
    if (code) { errno = code; return -1; }
    return real(a, b, c);
}

/* Only an addition allocates, so each operation has a name of its own. */
long my_epoll_ctl(long, long, long, long) __asm__("epoll_ctl");
long my_epoll_ctl(long a, long b, long c, long d) {
    static long (*real)(long, long, long, long);
    if (!real) real = (long (*)(long, long, long, long))dlsym(RTLD_NEXT, "epoll_ctl");
    const char *name = b == EPOLL_CTL_ADD ? "epoll_add" : b == EPOLL_CTL_DEL ? "epoll_del" : "epoll_mod";
    int code = fault(name, a, 0, 0, 0);
    if (code) { errno = code; return -1; }
    return real(a, b, c, d);
}

/* os.dup() is a fcntl(). */
#define FCNTL(name)                                                                            \
    long my_##name(long, long, long) __asm__(#name);                                           \
    long my_##name(long a, long b, long c) {                                                   \
        static long (*real)(long, long, long);                                                 \
        if (!real) real = (long (*)(long, long, long))dlsym(RTLD_NEXT, #name);                 \
        int code = fault(b == F_DUPFD_CLOEXEC ? "dup" : "fcntl", a, 0, 0, 0);                  \
        if (code) { errno = code; return -1; }                                                 \
        return real(a, b, c);                                                                  \
    }
FCNTL(fcntl) FCNTL(fcntl64)

/* These return the error. */
#define SPAWN(name)                                                                            \
    long my_##name(long, long, long, long, long, long) __asm__(#name);                         \
    long my_##name(long a, long b, long c, long d, long e, long f) {                           \
        static long (*real)(long, long, long, long, long, long);                               \
        if (!real) real = (long (*)(long, long, long, long, long, long))dlsym(RTLD_NEXT, #name); \
        int code = fault(#name, -1, 0, 0, 0);                                                           \
        return code ? code : real(a, b, c, d, e, f);                                           \
    }
SPAWN(posix_spawn) SPAWN(posix_spawnp)

/* Says what the functions of socketprotector.h return, one line each.
 *
 *     probe [full|forks]    full: with no descriptor left; one is given back after each EMFILE
 *                           forks: a child takes, its parent waits for it
 */
#include "../../client_lib/c/socketprotector.h"

#include <dirent.h>
#include <sys/eventfd.h>
#include <sys/wait.h>

static int descriptors(void)
{
    DIR *folder = opendir("/proc/self/fd");
    int count = -3; /* `.`, `..` and the folder itself */
    if (!folder)
        return -1;
    while (readdir(folder))
        count++;
    closedir(folder);
    return count;
}

static const char *name_of(int error)
{
    return error == EMFILE ? "EMFILE" : error == EPROTO ? "EPROTO" : strerror(error);
}

static void serve(struct sp_worker *sp, struct sp_connection *client)
{
    char name[256], cut[8], line[256];
    ssize_t got;
    int length = sp_listener(sp, client->listener, name, sizeof name);
    int same = sp_listener(sp, client->listener, cut, sizeof cut) == length;
    printf("connection %s %d %s %d %d\n", length < 0 ? strerror(errno) : name, length, cut, same,
           fcntl(client->fd, F_GETFD) == FD_CLOEXEC && !(fcntl(client->fd, F_GETFL) & O_NONBLOCK));
    got = recv(client->fd, line, sizeof line, 0);
    if (got <= 0 || send(client->fd, line, (size_t)got, MSG_NOSIGNAL) != got)
        sp_failed(sp);
    close(client->fd);
    sp_closed(sp);
}

int main(int argc, char **argv)
{
    static int hoard[4096];
    struct sp_worker sp;
    struct sp_connection client;
    enum sp_result result;
    int before = descriptors(), full = argc > 1 && !strcmp(argv[1], "full"), hoarded = 0;
    int wake = eventfd(1, EFD_CLOEXEC);
    void *board;

    setvbuf(stdout, NULL, _IOLBF, 0);
    if (sp_open(&sp, NULL, 0) < 0) {
        printf("cannot open: %s\n", name_of(errno));
        close(wake);
        printf("left %d\n", descriptors() - before);
        return 111;
    }
    printf("open %d %d %d %d\n", sp.generation, sp.worker, sp.watchdog_ms, sp_draining(&sp));
    printf("nothing %d\n", sp_next(&sp, &client, 0, -1) == SP_NOTHING);
    printf("nothing %d\n", sp_next(&sp, &client, 1, -1) == SP_NOTHING);
    printf("woken %d\n", sp_next(&sp, &client, -1, wake) == SP_WOKEN);
    printf("cloexec %d\n", fcntl(sp.channel, F_GETFD) == FD_CLOEXEC
                               && (sp.return_line < 0 || fcntl(sp.return_line, F_GETFD) == FD_CLOEXEC));
    if (full) {
        close(sp.spare); /* as if another part of the program had been quicker */
        sp.spare = -1;
        while (hoarded < 4096 && (hoard[hoarded] = dup(0)) >= 0)
            hoarded++;
    }
    sp_ready(&sp);
    sp_notify(&sp, "STATUS=probing");
    if (argc > 1 && !strcmp(argv[1], "forks")) {
        char said[64];
        int child = fork();
        ssize_t got;
        if (child) {
            waitpid(child, NULL, 0);
            got = recv(sp.return_line, said, sizeof said, MSG_DONTWAIT);
            printf("left to the parent %d\n", (int)got);
            close(wake);
            sp_close(&sp);
            return 0;
        }
        sp_count_nothing(&sp);
    }
    do {
        result = sp_next(&sp, &client, -1, -1);
        if (result == SP_CONNECTION)
            serve(&sp, &client);
        if (result == SP_ERROR)
            printf("error %s\n", name_of(errno));
        if (result == SP_ERROR && errno == EMFILE && hoarded)
            close(hoard[--hoarded]);
    } while (result != SP_DRAINED && result != SP_RETIRED);
    printf("%s %d\n", result == SP_DRAINED ? "drained" : "retired", sp_draining(&sp));
    printf("again %d\n", sp_next(&sp, &client, -1, -1) == result);
    while (hoarded)
        close(hoard[--hoarded]);
    close(wake);
    board = sp.board;
    sp_close(&sp);
    /* The channel, the RETURN line and the scoreboard were there before; they are closed now. */
    printf("left %d %d\n", descriptors() - before, board && msync(board, 1, MS_ASYNC) == 0);
    return 0;
}

/* Answers as musl does where it differs from glibc: the scheduling policy is not to be had.
   Source: src/sched/sched_getscheduler.c and src/process/posix_spawnattr_sched.c of musl. */
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <spawn.h>

int sched_getscheduler(pid_t pid)
{
	errno = ENOSYS;
	return -1;
}

int sched_setscheduler(pid_t pid, int policy, const struct sched_param *param)
{
	errno = ENOSYS;
	return -1;
}

int posix_spawnattr_setschedpolicy(posix_spawnattr_t *attributes, int policy)
{
	return ENOSYS;
}

int posix_spawnattr_setschedparam(posix_spawnattr_t *restrict attributes,
				  const struct sched_param *restrict param)
{
	return ENOSYS;
}

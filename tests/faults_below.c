/* Preloaded: the calls of libc that change files under one folder are counted, and one of them meets a fault. */
#define _GNU_SOURCE
#undef _FILE_OFFSET_BITS
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { LET_THROUGH, KILLED_BEFORE, KILLED_AFTER, HALF, REFUSED, SIGNALLED };

static char folder[PATH_MAX];
static long calls, at;
static int armed, kind, number;

void faults_arm(const char *path, long call, int what, int which) {
    snprintf(folder, sizeof folder, "%s", path);
    calls = 0, at = call, kind = what, number = which, armed = 1;
}

long faults_calls(void) { return calls; }

static int below(int dir, const char *path) {
    char whole[2 * PATH_MAX], start[PATH_MAX] = "", link[64];
    if (!armed || !path) return 0;
    if (path[0] != '/') {
        if (dir == AT_FDCWD) {
            if (!getcwd(start, sizeof start)) return 0;
        } else {
            snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
            ssize_t length = readlink(link, start, sizeof start - 1);
            if (length < 0) return 0;
            start[length] = 0;
        }
    }
    if (path[0] == '/' || !path[0]) snprintf(whole, sizeof whole, "%s%s", start, path);
    else snprintf(whole, sizeof whole, "%s/%s", start, path);
    return !strncmp(whole, folder, strlen(folder));
}

/* What becomes of this call; a process that is killed before it does not come back. */
static int fate(int counted) {
    if (!counted || calls++ != at) return LET_THROUGH;
    if (kind == KILLED_BEFORE) kill(getpid(), SIGKILL);
    if (kind == REFUSED) errno = number;
    return kind;
}

static void after(int what) {
    int saved = errno;
    if (what == KILLED_AFTER || what == HALF) kill(getpid(), SIGKILL);
    if (what == SIGNALLED) kill(getpid(), number);
    errno = saved;
}

#define CALL(type, name, counted, declared, given)                              \
    type name declared {                                                        \
        static type(*real) declared;                                            \
        if (!real) real = dlsym(RTLD_NEXT, #name);                              \
        int what = fate(counted);                                               \
        if (what == REFUSED) return -1;                                         \
        type result = real given;                                               \
        after(what);                                                            \
        return result;                                                          \
    }

/* The bytes that a write is given: half of them where it is cut off. */
#define WRITE(name, declared, given, size)                                      \
    ssize_t name declared {                                                     \
        static ssize_t(*real) declared;                                         \
        if (!real) real = dlsym(RTLD_NEXT, #name);                              \
        int what = fate(below(fd, ""));                                         \
        if (what == REFUSED) return -1;                                         \
        if (what == HALF) size /= 2;                                            \
        ssize_t result = real given;                                            \
        after(what);                                                            \
        return result;                                                          \
    }

#define OPEN(name, dir, declared, given)                                        \
    int name declared {                                                         \
        static int(*real)();                                                    \
        mode_t mode = 0;                                                        \
        if (flags & (O_CREAT | O_TMPFILE)) {                                    \
            va_list list;                                                       \
            va_start(list, flags);                                              \
            mode = va_arg(list, mode_t);                                        \
            va_end(list);                                                       \
        }                                                                       \
        if (!real) real = dlsym(RTLD_NEXT, #name);                              \
        int what = fate((flags & (O_CREAT | O_TRUNC)) && below(dir, path));     \
        if (what == REFUSED) return -1;                                         \
        int result = real given;                                                \
        after(what);                                                            \
        return result;                                                          \
    }

OPEN(open, AT_FDCWD, (const char *path, int flags, ...), (path, flags, mode))
OPEN(open64, AT_FDCWD, (const char *path, int flags, ...), (path, flags, mode))
OPEN(openat, dir, (int dir, const char *path, int flags, ...), (dir, path, flags, mode))
OPEN(openat64, dir, (int dir, const char *path, int flags, ...), (dir, path, flags, mode))

WRITE(write, (int fd, const void *data, size_t size), (fd, data, size), size)
WRITE(pwrite, (int fd, const void *data, size_t size, off_t to), (fd, data, size, to), size)
WRITE(pwrite64, (int fd, const void *data, size_t size, off_t to), (fd, data, size, to), size)
WRITE(writev, (int fd, const struct iovec *parts, int size), (fd, parts, size), size)
WRITE(copy_file_range, (int in, off_t *from, int fd, off_t *to, size_t size, unsigned flags),
      (in, from, fd, to, size, flags), size)
WRITE(sendfile, (int fd, int in, off_t *from, size_t size), (fd, in, from, size), size)
WRITE(sendfile64, (int fd, int in, off_t *from, size_t size), (fd, in, from, size), size)

#define AT(path) below(AT_FDCWD, path)
CALL(int, ftruncate, below(fd, ""), (int fd, off_t size), (fd, size))
CALL(int, ftruncate64, below(fd, ""), (int fd, off_t size), (fd, size))
CALL(int, truncate, AT(path), (const char *path, off_t size), (path, size))
CALL(int, truncate64, AT(path), (const char *path, off_t size), (path, size))
CALL(int, fsync, below(fd, ""), (int fd), (fd))
CALL(int, fdatasync, below(fd, ""), (int fd), (fd))
CALL(int, rename, AT(to), (const char *from, const char *to), (from, to))
CALL(int, renameat, below(out, to), (int in, const char *from, int out, const char *to), (in, from, out, to))
CALL(int, renameat2, below(out, to), (int in, const char *from, int out, const char *to, unsigned flags),
     (in, from, out, to, flags))
CALL(int, link, AT(to), (const char *from, const char *to), (from, to))
CALL(int, linkat, below(out, to), (int in, const char *from, int out, const char *to, int flags),
     (in, from, out, to, flags))
CALL(int, symlink, AT(to), (const char *from, const char *to), (from, to))
CALL(int, symlinkat, below(out, to), (const char *from, int out, const char *to), (from, out, to))
CALL(int, unlink, AT(path), (const char *path), (path))
CALL(int, unlinkat, below(dir, path), (int dir, const char *path, int flags), (dir, path, flags))
CALL(int, rmdir, AT(path), (const char *path), (path))
CALL(int, mkdir, AT(path), (const char *path, mode_t mode), (path, mode))
CALL(int, mkdirat, below(dir, path), (int dir, const char *path, mode_t mode), (dir, path, mode))
CALL(int, chmod, AT(path), (const char *path, mode_t mode), (path, mode))
CALL(int, fchmod, below(fd, ""), (int fd, mode_t mode), (fd, mode))
CALL(int, fchmodat, below(dir, path), (int dir, const char *path, mode_t mode, int flags), (dir, path, mode, flags))
CALL(int, utimensat, below(dir, path), (int dir, const char *path, const struct timespec times[2], int flags),
     (dir, path, times, flags))
CALL(int, futimens, below(fd, ""), (int fd, const struct timespec times[2]), (fd, times))

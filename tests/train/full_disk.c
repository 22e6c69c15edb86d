/* A disk that is full, or becomes read-only, for one folder: preloaded over libc.

   FULL_DISK_DIR    the folder
   FULL_DISK_BYTES  bytes that can be written to files below it; beyond that write() gives ENOSPC,
                    the last one a part first, as a disk does
   READ_ONLY_AFTER  folders that can be made below it; the next mkdir() gives EROFS

   Without FULL_DISK_DIR nothing changes. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static long long written;
static long made;

static int below(const char *path) {
    const char *folder = getenv("FULL_DISK_DIR");
    if (!folder || strncmp(path, folder, strlen(folder))) return 0;
    char next = path[strlen(folder)];
    return next == 0 || next == '/';
}

static int on_disk(int fd) {
    if (!getenv("FULL_DISK_DIR") || !getenv("FULL_DISK_BYTES")) return 0;
    char name[64], path[4096];
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(name, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return below(path);
}

ssize_t write(int fd, const void *buffer, size_t count) {
    static ssize_t (*real)(int, const void *, size_t);
    if (!real) real = dlsym(RTLD_NEXT, "write");
    if (!on_disk(fd)) return real(fd, buffer, count);
    long long room = atoll(getenv("FULL_DISK_BYTES")) - written;
    if (room <= 0) {
        errno = ENOSPC;
        return -1;
    }
    ssize_t done = real(fd, buffer, (long long)count < room ? count : (size_t)room);
    if (done > 0) written += done;
    return done;
}

int mkdir(const char *path, mode_t mode) {
    static int (*real)(const char *, mode_t);
    if (!real) real = dlsym(RTLD_NEXT, "mkdir");
    const char *limit = getenv("READ_ONLY_AFTER");
    if (limit && below(path) && made++ >= atol(limit)) {
        errno = EROFS;
        return -1;
    }
    return real(path, mode);
}

/* A disk that fails when it is told to: loaded before libc, it stands before the calls that touch files.

   FAULT_UNDER   only paths below this folder count; all others go straight on
   FAULT_LOG     a file that gets a line for each call that counts: number, call, path
   fault_arm(n, error)  the n-th call from here on fails with this errno; 0: none does
   FAULT_RECORD  a file that gets each call that changes something, once it is done, with what it wrote (see `record`)
   fault_mount(kind)    a mount with a habit, for all calls: 1 a full quota shows at close, 2 fsync of folders is refused,
                        3 statvfs tells of no blocks, 4 rename replaces nothing; 0: none */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/types.h>
#include <unistd.h>

enum { NONE, QUOTA_AT_CLOSE, NO_FOLDER_SYNC, NO_BLOCKS, NO_REPLACE };
static long count, at;
static int error_number, mounted;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

void fault_arm(long n, int error) { count = 0; at = n; error_number = error; }
void fault_mount(int kind) { mounted = kind; }
long fault_count(void) { return count; }

/* the absolute path that a call means; 0 where it is none of ours */
static int ours(int folder, const char *name, char *path) {
    const char *under = getenv("FAULT_UNDER");
    char link[64], base[PATH_MAX] = "";
    if (!under || !name) return 0;
    if (name[0] == '/') snprintf(path, PATH_MAX, "%s", name);
    else {
        ssize_t n;
        if (folder == AT_FDCWD) { if (!getcwd(base, sizeof base)) return 0; }
        else {
            snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
            if ((n = readlink(link, base, sizeof base - 1)) < 0) return 0;
            base[n] = 0;
        }
        if (name[0]) snprintf(path, PATH_MAX, "%.2000s/%.2000s", base, name);
        else snprintf(path, PATH_MAX, "%s", base);
    }
    size_t length = strlen(under);
    return !strncmp(path, under, length) && (path[length] == '/' || !path[length]);
}

/* whether this call is the one that fails; sets errno */
static int fails(const char *call, int folder, const char *name) {
    char path[PATH_MAX];
    int before = errno, hit = 0;
    if (at >= 0 && ours(folder, name, path)) {
        pthread_mutex_lock(&lock);
        hit = ++count == at;
        if (getenv("FAULT_LOG")) {
            static FILE *(*open_log)(const char *, const char *);
            if (!open_log) open_log = dlsym(RTLD_NEXT, "fopen64");
            FILE *log = open_log(getenv("FAULT_LOG"), "a");
            if (log) { fprintf(log, "%ld %s %s\n", count, call, path); fclose(log); }
        }
        pthread_mutex_unlock(&lock);
    }
    errno = hit ? error_number : before;
    return hit;
}

/* One call for tests/power.py: a line of name, descriptor, place and size, the paths in lines of their own, the bytes. */
static void record(const char *call, int fd, int folder, const char *name, int other, const char *second, const void *data,
                   ssize_t size, off_t place) {
    const char *into = getenv("FAULT_RECORD");
    char path[PATH_MAX] = "", to[PATH_MAX] = "";
    int before = errno;
    if (into && ours(folder, name, path)) {
        static FILE *(*open_record)(const char *, const char *);
        if (second) ours(other, second, to);
        pthread_mutex_lock(&lock);
        if (!open_record) open_record = dlsym(RTLD_NEXT, "fopen64");
        FILE *file = open_record(into, "a");
        if (file) {
            fprintf(file, "%s %d %ld %ld\n%s\n%s\n", call, fd, (long)place, (long)size, path, to);
            if (data) fwrite(data, 1, size, file);
            fclose(file);
        }
        pthread_mutex_unlock(&lock);
    }
    errno = before;
}

#define REAL(type, name, ...) static type (*real)(__VA_ARGS__); if (!real) real = dlsym(RTLD_NEXT, #name)
#define MODE(flags) mode_t mode = 0; \
    if ((flags) & (O_CREAT | __O_TMPFILE)) { va_list list; va_start(list, flags); mode = va_arg(list, mode_t); va_end(list); }
#define WITH_PATH(name, folder, path, declared, given) \
    int name declared { REAL(int, name, ); if (fails(#name, folder, path)) return -1; return ((int (*) declared)real) given; }
#define CHANGES(name, call, folder, path, other, second, size, declared, given) \
    int name declared { REAL(int, name, ); if (fails(#name, folder, path)) return -1; \
    int result = ((int (*) declared)real) given; \
    if (!result) { record(call, 0, folder, path, other, second, NULL, size, 0); } \
    return result; }
#define WITH_FILE(type, name, declared, given) \
    type name declared { REAL(type, name, ); if (fails(#name, fd, "")) return -1; return ((type (*) declared)real) given; }

static int opened(int fd, int folder, const char *path, int flags) {
    if (fd >= 0) record(flags & O_TRUNC ? "empty" : "open", fd, folder, path, 0, NULL, NULL, 0, 0);
    return fd;
}

#define OPEN(name) int name(const char *path, int flags, ...) { \
    MODE(flags) REAL(int, name, const char *, int, ...); if (fails(#name, AT_FDCWD, path)) return -1; \
    return opened(real(path, flags, mode), AT_FDCWD, path, flags); }
#define OPENAT(name) int name(int folder, const char *path, int flags, ...) { \
    MODE(flags) REAL(int, name, int, const char *, int, ...); if (fails(#name, folder, path)) return -1; \
    return opened(real(folder, path, flags, mode), folder, path, flags); }
OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64)

WITH_FILE(ssize_t, read, (int fd, void *data, size_t size), (fd, data, size))
WITH_FILE(ssize_t, pread64, (int fd, void *data, size_t size, off64_t place), (fd, data, size, place))
WITH_FILE(int, fstat, (int fd, struct stat *found), (fd, found))
WITH_FILE(int, fstat64, (int fd, struct stat64 *found), (fd, found))
WITH_PATH(stat, AT_FDCWD, path, (const char *path, struct stat *found), (path, found))
WITH_PATH(stat64, AT_FDCWD, path, (const char *path, struct stat64 *found), (path, found))
WITH_PATH(lstat, AT_FDCWD, path, (const char *path, struct stat *found), (path, found))
WITH_PATH(lstat64, AT_FDCWD, path, (const char *path, struct stat64 *found), (path, found))
WITH_PATH(fstatat, folder, path, (int folder, const char *path, struct stat *found, int flags), (folder, path, found, flags))
WITH_PATH(fstatat64, folder, path, (int folder, const char *path, struct stat64 *found, int flags), (folder, path, found, flags))
CHANGES(mkdir, "mkdir", AT_FDCWD, path, 0, NULL, 0, (const char *path, mode_t mode), (path, mode))
CHANGES(rmdir, "unlink", AT_FDCWD, path, 0, NULL, 0, (const char *path), (path))
CHANGES(unlink, "unlink", AT_FDCWD, path, 0, NULL, 0, (const char *path), (path))
CHANGES(unlinkat, "unlink", folder, path, 0, NULL, 0, (int folder, const char *path, int flags), (folder, path, flags))
CHANGES(truncate64, "truncate", AT_FDCWD, path, 0, NULL, size, (const char *path, off64_t size), (path, size))
WITH_PATH(utimensat, folder, path, (int folder, const char *path, const struct timespec times[2], int flags),
          (folder, path, times, flags))
CHANGES(link, "link", AT_FDCWD, to, AT_FDCWD, from, 0, (const char *from, const char *to), (from, to))
CHANGES(linkat, "link", folder, to, other, from, 0, (int other, const char *from, int folder, const char *to, int flags),
        (other, from, folder, to, flags))

ssize_t write(int fd, const void *data, size_t size) {
    REAL(ssize_t, write, int, const void *, size_t);
    if (fails("write", fd, "")) return -1;
    ssize_t written = real(fd, data, size);
    if (written > 0 && getenv("FAULT_RECORD")) record("write", fd, fd, "", 0, NULL, data, written, lseek(fd, 0, SEEK_CUR) - written);
    return written;
}

int ftruncate64(int fd, off64_t size) {
    REAL(int, ftruncate64, int, off64_t);
    if (fails("ftruncate64", fd, "")) return -1;
    int result = real(fd, size);
    if (!result) record("truncate", fd, fd, "", 0, NULL, NULL, size, 0);
    return result;
}

static int synced(int fd, int result) {
    if (!result) record("sync", fd, fd, "", 0, NULL, NULL, 0, 0);
    return result;
}

int fdatasync(int fd) {
    REAL(int, fdatasync, int);
    return fails("fdatasync", fd, "") ? -1 : synced(fd, real(fd));
}

int close(int fd) {
    REAL(int, close, int);
    char path[PATH_MAX];
    int quota = mounted == QUOTA_AT_CLOSE && (fcntl(fd, F_GETFL) & O_ACCMODE) != O_RDONLY && ours(fd, "", path);
    int hit = fails("close", fd, ""), number = errno, result = real(fd); /* it is closed all the same, as Linux does */
    if (quota) { errno = EDQUOT; return -1; }
    if (hit) { errno = number; return -1; }
    return result;
}

int fsync(int fd) {
    REAL(int, fsync, int);
    struct stat found;
    char path[PATH_MAX];
    static int (*look)(int, struct stat *);
    if (!look) look = dlsym(RTLD_NEXT, "fstat");
    if (mounted == NO_FOLDER_SYNC && ours(fd, "", path) && !look(fd, &found) && S_ISDIR(found.st_mode)) { errno = EINVAL; return -1; }
    if (mounted == QUOTA_AT_CLOSE) return 0;
    return fails("fsync", fd, "") ? -1 : synced(fd, real(fd));
}

int rename(const char *from, const char *to) {
    REAL(int, rename, const char *, const char *);
    char path[PATH_MAX];
    if (mounted == NO_REPLACE && ours(AT_FDCWD, to, path) && !access(to, F_OK)) { errno = EEXIST; return -1; }
    if (fails("rename", AT_FDCWD, to)) return -1;
    int result = real(from, to);
    if (!result) record("rename", 0, AT_FDCWD, to, AT_FDCWD, from, NULL, 0, 0);
    return result;
}

int statvfs64(const char *path, struct statvfs64 *found) {
    REAL(int, statvfs64, const char *, struct statvfs64 *);
    char ours_path[PATH_MAX];
    if (fails("statvfs", AT_FDCWD, path)) return -1;
    int result = real(path, found);
    if (mounted == NO_BLOCKS && ours(AT_FDCWD, path, ours_path)) found->f_blocks = found->f_bfree = found->f_bavail = 0;
    return result;
}

int statvfs(const char *path, struct statvfs *found) { return statvfs64(path, (struct statvfs64 *)found); }

DIR *opendir(const char *path) {
    REAL(DIR *, opendir, const char *);
    return fails("opendir", AT_FDCWD, path) ? NULL : real(path);
}

DIR *fdopendir(int fd) {
    REAL(DIR *, fdopendir, int);
    return fails("opendir", fd, "") ? NULL : real(fd);
}

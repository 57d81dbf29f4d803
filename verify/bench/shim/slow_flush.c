/*
 * Makes a disk slower: loaded into the server with LD_PRELOAD, it waits FLUSH_DELAY_US microseconds
 * before each flush. fdatasync is how PostgreSQL flushes its log on Linux.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <time.h>

static void wait_before(void) {
    const char *delay = getenv("FLUSH_DELAY_US");
    long us = delay ? atol(delay) : 0;
    struct timespec pause = {us / 1000000, us % 1000000 * 1000};
    nanosleep(&pause, NULL);
}

int fdatasync(int fd) {
    int (*flush)(int) = (int (*)(int))dlsym(RTLD_NEXT, "fdatasync");
    wait_before();
    return flush(fd);
}

int fsync(int fd) {
    int (*flush)(int) = (int (*)(int))dlsym(RTLD_NEXT, "fsync");
    wait_before();
    return flush(fd);
}

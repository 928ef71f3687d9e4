/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A panic inside the library ends at its border, however it is linked. Here
 * the clock fails once, which Rust's standard library answers with a panic.
 * With OTHER_STD, another library in Rust is linked as well. Prints TAP.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "guestmemfd.h"

#define PAGE 4096ull
#define SIZE (16 * PAGE)
#define TO_PRIVATE 0x10

static int tests, failures, clock_failures;

static void check(bool ok, const char *what)
{
    tests++;
    failures += !ok;
    printf("%sok %d - %s\n", ok ? "" : "not ", tests, what);
}

static void must(int32_t result, const guestmemfd_error *error)
{
    if (result) {
        printf("Bail out! %s\n", error->message);
        exit(1);
    }
}

/* In place of the C library's, for everything that this program is linked with */
int clock_gettime(clockid_t clock, struct timespec *time)
{
    if (clock_failures > 0) {
        clock_failures--;
        errno = EINVAL;
        return -1;
    }
    return syscall(SYS_clock_gettime, clock, time);
}

static int32_t on_gap(void *opaque, uint64_t gpa, uint64_t size, guestmemfd_view to)
{
    (void)opaque, (void)gpa, (void)size, (void)to;
    return -EINVAL;
}

static void test_panic(guestmemfd_vm *vm, guestmemfd_backend *backend)
{
    guestmemfd_error error = { .code = 0 };
    guestmemfd_stats stats;

    /* From now on the library looks at the clock in each request */
    guestmemfd_backend_watch_latency(backend);
    clock_failures = 1;
    check(guestmemfd_vm_map_gpa_range(vm, PAGE, 1, TO_PRIVATE, &error) == -EIO
              && error.code == EIO && strstr(error.message, "internal error"),
          "a panic becomes an error with its message");
    check(clock_failures == 0, "it was this one");
    clock_failures = 1;
    check(guestmemfd_vm_map_gpa_range(vm, PAGE, 1, TO_PRIVATE, NULL) == -EIO,
          "the next one as well, without an error to fill");
    check(!guestmemfd_vm_map_gpa_range(vm, PAGE, 1, TO_PRIVATE, &error)
              && !guestmemfd_backend_stats(backend, &stats)
              && stats.private_bytes == PAGE && stats.transition_bytes == 0,
          "the request succeeds when the clock is back");
}

#ifdef OTHER_STD
bool other_std_catches(void);
#endif

int main(void)
{
    guestmemfd_callbacks callbacks = { .gap = on_gap };
    guestmemfd_backend_config config = { .id = "ram", .size = SIZE };
    guestmemfd_backend *backend = NULL;
    guestmemfd_vm *vm = NULL;
    guestmemfd_error error;
    guestmemfd_binding binding;

    setvbuf(stdout, NULL, _IOLBF, 0);
    must(guestmemfd_vm_new_software(GUESTMEMFD_ABI, &callbacks, &vm, &error), &error);
    must(guestmemfd_backend_new(vm, &config, &backend, &error), &error);
    must(guestmemfd_vm_add_window(vm, backend, 0, 0, SIZE, GUESTMEMFD_BINDING_BOUND, &binding,
                                  &error), &error);
#ifdef OTHER_STD
    check(other_std_catches(), "the other library catches its own panic");
#endif
    test_panic(vm, backend);
#ifdef OTHER_STD
    check(other_std_catches(), "and does so after this one's");
#endif
    must(guestmemfd_vm_remove_window(vm, 0, SIZE, &error), &error);
    guestmemfd_backend_free(backend);
    guestmemfd_vm_free(vm);
    printf("1..%d\n", tests);
    return failures != 0;
}

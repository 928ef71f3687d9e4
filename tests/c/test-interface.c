/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The C interface as a C program meets it, over the software owner, and over
 * this machine's KVM as far as that goes. Prints TAP.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <linux/kvm.h>

#include "guestmemfd.h"

#define PAGE 4096ull
#define MIB (1024 * 1024ull)
#define SIZE (8 * MIB)
#define BOUND GUESTMEMFD_BINDING_BOUND
#define PRIVATE GUESTMEMFD_VIEW_PRIVATE
#define SHARED GUESTMEMFD_VIEW_SHARED

static int tests, failures;

static void check(bool ok, const char *what)
{
    tests++;
    failures += !ok;
    printf("%sok %d - %s\n", ok ? "" : "not ", tests, what);
}

/* What the callbacks saw, in whichever thread. */
static struct {
    _Atomic int begun, ended, mapped, unmapped, revoked, prefaulted, gaps, logged, failed, strays;
    int map_answer;
    int gap_answer;
    void *_Atomic backend_opaque;
} seen;

static bool on_begin(void *opaque)
{
    seen.begun++;
    return *(bool *)opaque;
}

static void on_end(void *opaque, bool listeners)
{
    seen.ended += listeners == *(bool *)opaque;
}

static int32_t on_map(void *backend_opaque, uint64_t offset, uint64_t size)
{
    (void)offset;
    (void)size;
    seen.mapped++;
    seen.backend_opaque = backend_opaque;
    return seen.map_answer;
}

/* What a callback asks for, once, and the answers. */
static struct {
    guestmemfd_vm *vm;
    guestmemfd_backend *backend;
    int32_t refused[8], pinned;
} asks;

static void ask_back(void)
{
    guestmemfd_vm *vm = asks.vm;
    guestmemfd_backend *backend = asks.backend;
    guestmemfd_binding binding;

    if (!vm) {
        return;
    }
    asks.vm = NULL;
    asks.refused[0] = guestmemfd_vm_map_gpa_range(vm, 0, 1, 1 << 4, NULL);
    asks.refused[1] = guestmemfd_vm_memory_fault(vm, 0, PAGE, PRIVATE, NULL);
    asks.refused[2] = guestmemfd_vm_add_window(vm, backend, 2 * SIZE, 0, SIZE, BOUND, &binding,
                                               NULL);
    asks.refused[3] = guestmemfd_vm_remove_window(vm, 0, SIZE, NULL);
    asks.refused[4] = guestmemfd_vm_commit_windows(vm, NULL);
    asks.refused[5] = guestmemfd_vm_punch_owed(vm, NULL);
    asks.refused[6] = guestmemfd_backend_free_pages(backend, 0, PAGE, NULL);
    asks.refused[7] = guestmemfd_backend_free_private(backend, NULL);
    asks.pinned = guestmemfd_backend_pin(backend, 0, PAGE, NULL);
}

static void on_unmap(void *backend_opaque, uint64_t offset, uint64_t size)
{
    (void)offset;
    (void)size;
    seen.unmapped++;
    seen.backend_opaque = backend_opaque;
    ask_back();
}

static void on_revoke(void *backend_opaque, uint64_t offset, uint64_t size)
{
    seen.revoked += backend_opaque == &seen && offset == PAGE && size == PAGE;
}

static void on_prefault(void *opaque, uint64_t gpa, uint64_t size)
{
    (void)opaque;
    (void)gpa;
    seen.prefaulted += size == PAGE;
}

static int32_t on_gap(void *opaque, uint64_t gpa, uint64_t size, guestmemfd_view to)
{
    (void)opaque;
    (void)gpa;
    (void)size;
    seen.gaps++;
    return to == GUESTMEMFD_VIEW_PRIVATE ? -EINVAL : seen.gap_answer;
}

static bool listeners = true;

static void on_failed(void *opaque, const char *id, uint64_t gpa, uint64_t size, guestmemfd_view to,
                      const char *message)
{
    seen.failed += opaque == &listeners && !strcmp(id, "ram") && size == PAGE && gpa == MIB
                   && to == GUESTMEMFD_VIEW_SHARED && strlen(message) > 0;
}

static void on_stray(void *backend_opaque, const guestmemfd_stray *stray)
{
    seen.strays += backend_opaque == &seen && stray->offset == PAGE && stray->size == PAGE
                   && stray->gpa == MIB + PAGE && stray->thread > 0;
}

static void on_log(void *opaque, uint32_t level, const char *message)
{
    (void)opaque;
    (void)level;
    seen.logged += strlen(message) > 0;
}

static const guestmemfd_callbacks callbacks = {
    .opaque = &listeners,
    .begin = on_begin,
    .end = on_end,
    .map = on_map,
    .unmap = on_unmap,
    .revoke = on_revoke,
    .prefault = on_prefault,
    .gap = on_gap,
    .failed = on_failed,
    .stray = on_stray,
    .log = on_log,
};

static guestmemfd_vm *software_vm(void)
{
    guestmemfd_error error;
    guestmemfd_vm *vm = NULL;

    if (guestmemfd_vm_new_software(GUESTMEMFD_ABI, &callbacks, &vm, &error)) {
        printf("Bail out! %s\n", error.message);
        exit(1);
    }
    return vm;
}

static guestmemfd_backend *new_backend(guestmemfd_vm *vm, const char *id)
{
    guestmemfd_backend_config config = { .id = id, .size = SIZE, .opaque = &seen };
    guestmemfd_backend *backend = NULL;
    guestmemfd_error error;

    if (guestmemfd_backend_new(vm, &config, &backend, &error)) {
        printf("Bail out! %s\n", error.message);
        exit(1);
    }
    return backend;
}

static guestmemfd_stats stats_of(guestmemfd_backend *backend)
{
    guestmemfd_stats stats;

    if (guestmemfd_backend_stats(backend, &stats)) {
        printf("Bail out! no statistics\n");
        exit(1);
    }
    return stats;
}

static uint64_t allocated(int fd)
{
    struct stat st;

    return fstat(fd, &st) ? UINT64_MAX : (uint64_t)st.st_blocks * 512;
}

static void test_arguments(void)
{
    guestmemfd_error error;
    guestmemfd_vm *vm = NULL, *other;
    guestmemfd_backend *backend = NULL;
    guestmemfd_backend_config config = { .id = "ram", .size = SIZE };
    guestmemfd_callbacks no_gap = callbacks;
    guestmemfd_binding binding;

    check(guestmemfd_abi() == GUESTMEMFD_ABI, "header and library agree on the ABI");
    check(guestmemfd_vm_new_software(GUESTMEMFD_ABI + 1, &callbacks, &vm, &error)
              == -EINVAL && strstr(error.message, "rebuild") && !vm,
          "another ABI is refused with the remedy");
    check(guestmemfd_vm_new_software(GUESTMEMFD_ABI, NULL, &vm, &error) == -EINVAL
              && error.code == EINVAL && strstr(error.message, "callbacks"),
          "NULL callbacks are refused by name");
    no_gap.gap = NULL;
    check(guestmemfd_vm_new_software(GUESTMEMFD_ABI, &no_gap, &vm, &error) == -EINVAL
              && strstr(error.message, "gap"),
          "callbacks without gap are refused by name");
    check(guestmemfd_vm_new(GUESTMEMFD_ABI, -1, -1, &callbacks, &vm, &error) == -EINVAL
              && strstr(error.message, "kvm_fd"),
          "descriptor -1 is refused by name");
    check(guestmemfd_vm_new_software(GUESTMEMFD_ABI, &callbacks, NULL, NULL) == -EINVAL,
          "no error struct is fine");

    vm = software_vm();
    config.size = 0;
    check(guestmemfd_backend_new(vm, &config, &backend, &error) == -EINVAL
              && strstr(error.message, "size 0"), "size 0 is refused");
    config.size = SIZE + 1;
    check(guestmemfd_backend_new(vm, &config, &backend, &error) == -EINVAL
              && strstr(error.message, "0x800001"), "an unaligned size is refused with the size");
    config.size = SIZE;
    config.mode = 77;
    check(guestmemfd_backend_new(vm, &config, &backend, &error) == -EINVAL
              && strstr(error.message, "mode 77"), "an unknown mode is refused");
    config.mode = GUESTMEMFD_MODE_PRIVATE;
    config.bind = true;
    check(guestmemfd_backend_new(vm, &config, &backend, &error) == -EOPNOTSUPP
              && strstr(error.message, "mode=mapped"), "bind is refused with private memory");
    config.bind = false;
    config.mode = GUESTMEMFD_MODE_AUTO;
    config.discard = 77;
    check(guestmemfd_backend_new(vm, &config, &backend, &error) == -EINVAL
              && strstr(error.message, "policy 77"), "an unknown policy is refused");
    config.discard = GUESTMEMFD_DISCARD_NOW;
    config.lazy = 77;
    check(guestmemfd_backend_new(vm, &config, &backend, &error) == -EINVAL
              && strstr(error.message, "77"), "an unknown choice of lazy attributes is refused");
    config.lazy = GUESTMEMFD_LAZY_ON;
    config.start_private = true;
    check(guestmemfd_backend_new(vm, &config, &backend, &error) == -EOPNOTSUPP
              && strstr(error.message, "lazy"), "lazy attributes need pages that start undecided");
    config.start_private = false;
    config.lazy_chunk = 3 * MIB;
    check(guestmemfd_backend_new(vm, &config, &backend, &error) == -EINVAL
              && strstr(error.message, "0x300000"), "a chunk that is no power of two is refused");
    config.lazy_chunk = 0;
    config.prefault = 77;
    check(guestmemfd_backend_new(vm, &config, &backend, &error) == -EINVAL
              && strstr(error.message, "77"), "an unknown choice of prefault is refused");
    config.prefault = GUESTMEMFD_PREFAULT_OFF;
    config.id = NULL;
    check(guestmemfd_backend_new(vm, &config, &backend, &error) == -EINVAL
              && strstr(error.message, "config.id"), "no id is refused");
    check(guestmemfd_backend_new(NULL, &config, &backend, &error) == -EINVAL
              && strstr(error.message, "vm"), "no VM is refused");
    config.id = "ram";
    config.size = 1ull << 62;
    check(guestmemfd_backend_new(vm, &config, &backend, &error) < 0,
          "a size beyond all memory is an error");
    check(!backend, "nothing was created");

    backend = new_backend(vm, "ram");
    check(guestmemfd_vm_add_window(vm, backend, 0, 0, SIZE, 77, &binding, &error) == -EINVAL
              && strstr(error.message, "binding 77"), "an unknown binding is refused");
    check(guestmemfd_vm_add_window(vm, backend, 0, PAGE, SIZE, BOUND, &binding, &error) == -EINVAL
              && strstr(error.message, "ram"), "a window past the end is refused by name");
    check(guestmemfd_vm_add_window(vm, backend, 0, UINT64_MAX - PAGE + 1, PAGE, BOUND, &binding,
                                   &error) == -EINVAL, "a wrapping offset is refused");
    check(guestmemfd_vm_remove_window(vm, 0, SIZE, &error) == -ENOENT,
          "a window that is not there cannot be removed");
    check(guestmemfd_backend_free_pages(backend, SIZE, PAGE, &error) == -EINVAL,
          "nothing past the end is freed");
    check(!guestmemfd_backend_host_may_use(backend, SIZE - 1, 2),
          "nothing past the end may be used");
    check(guestmemfd_backend_private_fd(NULL) == -1, "no backend, no descriptor");
    other = software_vm();
    binding = 77;
    check(guestmemfd_vm_add_window(other, backend, 0, 0, SIZE, BOUND, &binding, &error) == -EINVAL
              && strstr(error.message, "another VM"), "another VM's backend is refused");
    check(binding == 77 && !guestmemfd_vm_owns(other, 0, UINT64_MAX)
              && !guestmemfd_vm_owns(vm, 0, UINT64_MAX), "and neither VM has a window then");
    guestmemfd_vm_free(other);
    guestmemfd_backend_free(backend);
    guestmemfd_vm_free(vm);
    guestmemfd_backend_free(NULL);
    guestmemfd_vm_free(NULL);
}

static void test_conversions(void)
{
    guestmemfd_vm *vm = software_vm();
    guestmemfd_backend *backend = new_backend(vm, "ram");
    int shared = guestmemfd_backend_shared_fd(backend);
    guestmemfd_binding binding = 77, alias = 77;
    guestmemfd_error error;
    guestmemfd_stats stats;
    char *host;

    host = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, shared, 0);
    memset(host, 0x5a, 4 * PAGE);
    check(fcntl(guestmemfd_backend_private_fd(backend), F_GETFD) == FD_CLOEXEC,
          "the private file is closed on exec");
    check(!guestmemfd_vm_owns(vm, 0, UINT64_MAX), "no window, nothing owned");
    check(!guestmemfd_vm_add_window(vm, backend, MIB, 0, SIZE, BOUND, &binding, &error)
              && binding == BOUND,
          "the first window is bound");
    check(!guestmemfd_vm_add_window(vm, backend, 1024 * MIB, 0, SIZE, BOUND, &alias, &error)
              && alias == GUESTMEMFD_BINDING_UNBOUND, "a second window of the same pages is not");
    check(guestmemfd_vm_add_window(vm, backend, MIB + PAGE, 0, PAGE, BOUND, &binding, &error)
              == -EEXIST, "two windows cannot overlap");
    check(guestmemfd_vm_owns(vm, 0, UINT64_MAX) && guestmemfd_vm_owns(vm, MIB, 0)
              && !guestmemfd_vm_owns(vm, 0, PAGE), "owns tells windows from the rest");

    memset(&seen, 0, sizeof(seen));
    check(!guestmemfd_vm_map_gpa_range(vm, MIB, 4, 1 << 4, &error), "to private by hypercall");
    check(seen.begun == 1 && seen.ended == 1 && seen.unmapped == 1
              && seen.backend_opaque == &seen, "listeners were told to let go");
    check(allocated(shared) == 0, "the shared view was freed");
    check(!guestmemfd_backend_host_may_use(backend, 4 * PAGE - 1, 1)
              && guestmemfd_backend_host_may_use(backend, 4 * PAGE, PAGE),
          "the host may use what is not private");
    check(!guestmemfd_vm_map_gpa_range(vm, MIB, 4, 1 << 4, &error) && seen.begun == 1,
          "what is private already stays so, unseen");
    check(guestmemfd_vm_map_gpa_range(vm, MIB, 1, 1 << 5, &error) == -EINVAL
              && guestmemfd_vm_map_gpa_range(vm, MIB, 0, 0, &error) == -EINVAL
              && guestmemfd_vm_map_gpa_range(vm, MIB + 1, 1, 0, &error) == -EINVAL
              && guestmemfd_vm_map_gpa_range(vm, MIB, UINT64_MAX, 0, &error) == -EINVAL,
          "bad hypercalls get EINVAL");
    check(guestmemfd_vm_map_gpa_range(vm, 0, 512, 1 << 4, &error) == -EINVAL && seen.gaps == 1,
          "private over a gap is refused");
    check(guestmemfd_vm_map_gpa_range(vm, 1024 * MIB, 1, 1 << 4, &error) == -EINVAL
              && strstr(error.message, "bound"), "private through an unbound window is refused");
    seen.map_answer = -ENOMEM;
    check(guestmemfd_vm_memory_fault(vm, MIB, PAGE, SHARED, &error) == -ENOMEM
              && !guestmemfd_backend_host_may_use(backend, 0, PAGE),
          "a listener that cannot map keeps the page private");
    check(seen.failed == 1, "and is told what has failed");
    seen.map_answer = 0;
    check(!guestmemfd_vm_memory_fault(vm, 1024 * MIB, PAGE, PRIVATE, &error)
              && guestmemfd_backend_host_may_use(backend, 0, PAGE),
          "a fault through an unbound window asks for the shared view");
    check(host[0] == 0 && host[4 * PAGE] == 0, "the page comes back empty");

    stats = stats_of(backend);
    check(stats.size == SIZE && stats.private_bytes == 3 * PAGE && stats.shared_bytes == PAGE
              && stats.undecided_bytes == SIZE - 4 * PAGE && !stats.transition_bytes,
          "bytes per state add up");
    check(stats.hypercalls == 7 && stats.faults_shared == 2 && stats.faults_private == 0
              && stats.conversions_to_private == 1 && stats.conversions_to_shared == 1,
          "requests are counted");
    check(stats.mode == GUESTMEMFD_MODE_PRIVATE && stats.discard == GUESTMEMFD_DISCARD_NOW,
          "mode and policy are told");

    check(!guestmemfd_backend_free_private(backend, &error)
              && stats_of(backend).private_bytes == 0 && stats_of(backend).shared_bytes == PAGE,
          "all that is private is freed, and what is shared stays");
    check(guestmemfd_backend_free_private(NULL, &error) == -EINVAL, "no backend, nothing freed");
    host[5 * PAGE] = 1;
    check(!guestmemfd_backend_free_pages(backend, 0, SIZE, &error) && allocated(shared) == 0
              && stats_of(backend).undecided_bytes == SIZE,
          "freed pages are undecided");
    check(guestmemfd_vm_rebind(vm, -1, -1, &error) == -EINVAL, "rebind checks descriptors");
    check(!guestmemfd_vm_remove_window(vm, MIB, SIZE, &error)
              && !guestmemfd_vm_remove_window(vm, 1024 * MIB, SIZE, &error)
              && !guestmemfd_vm_commit_windows(vm, &error), "windows go");
    munmap(host, SIZE);
    guestmemfd_backend_free(backend);
    guestmemfd_vm_free(vm);
}

static void test_callback_that_asks(void)
{
    guestmemfd_vm *vm = software_vm();
    guestmemfd_backend *backend = new_backend(vm, "ram");
    guestmemfd_error error;
    guestmemfd_binding binding;
    guestmemfd_stats stats;
    bool refused = true;

    guestmemfd_vm_add_window(vm, backend, 0, 0, SIZE, BOUND, &binding, &error);
    asks.vm = vm;
    asks.backend = backend;
    check(!guestmemfd_vm_map_gpa_range(vm, PAGE, 1, 1 << 4, &error) && !asks.vm,
          "a request whose callback asks for more");
    for (int i = 0; i < 8; i++) {
        refused &= asks.refused[i] == -EDEADLK;
    }
    check(refused, "what would wait for it is refused");
    check(!asks.pinned && !guestmemfd_backend_unpin(backend, 0, PAGE, &error),
          "a pin of another page is not");
    stats = stats_of(backend);
    check(stats.private_bytes == PAGE && stats.undecided_bytes == SIZE - PAGE
              && !stats.pinned_bytes && !guestmemfd_vm_owns(vm, 2 * SIZE, SIZE),
          "nothing else has changed");
    guestmemfd_vm_remove_window(vm, 0, SIZE, &error);
    guestmemfd_backend_free(backend);
    guestmemfd_vm_free(vm);
}

/* A backend goes; those beside it stay, and one that comes later is none of them. */
static void test_freed_neighbour(void)
{
    guestmemfd_vm *vm = software_vm();
    guestmemfd_backend *one = new_backend(vm, "one"), *two = new_backend(vm, "two"), *three;
    guestmemfd_backend_config config = { .id = "three", .size = SIZE, .opaque = &config };
    guestmemfd_error error;
    guestmemfd_binding binding;

    guestmemfd_vm_add_window(vm, one, 0, 0, SIZE, BOUND, &binding, &error);
    guestmemfd_vm_add_window(vm, two, SIZE, 0, SIZE, BOUND, &binding, &error);
    check(!guestmemfd_vm_map_gpa_range(vm, SIZE - PAGE, 2, 1 << 4, &error)
              && !guestmemfd_backend_pin(two, 2 * PAGE, PAGE, &error),
          "two backends in one request, one of them pinned");
    guestmemfd_vm_remove_window(vm, 0, SIZE, &error);
    guestmemfd_backend_free(one);
    check(stats_of(two).private_bytes == PAGE && stats_of(two).pinned_bytes == PAGE
              && !guestmemfd_backend_unpin(two, 2 * PAGE, PAGE, &error)
              && !guestmemfd_backend_host_may_use(two, 0, PAGE)
              && fcntl(guestmemfd_backend_shared_fd(two), F_GETFD) >= 0,
          "one is freed, the other keeps its pages, pins and files");
    check(!guestmemfd_backend_new(vm, &config, &three, &error)
              && !guestmemfd_vm_add_window(vm, three, 0, 0, SIZE, BOUND, &binding, &error)
              && binding == BOUND && guestmemfd_backend_host_may_use(three, SIZE - PAGE, PAGE),
          "a new one in its place starts over");
    memset(&seen, 0, sizeof(seen));
    check(!guestmemfd_vm_map_gpa_range(vm, 0, 1, 1 << 4, &error)
              && seen.backend_opaque == &config
              && !guestmemfd_vm_map_gpa_range(vm, SIZE + PAGE, 1, 1 << 4, &error)
              && seen.backend_opaque == &seen,
          "callbacks get what each was created with");
    guestmemfd_vm_remove_window(vm, 0, SIZE, &error);
    guestmemfd_vm_remove_window(vm, SIZE, SIZE, &error);
    guestmemfd_backend_free(two);
    guestmemfd_backend_free(three);
    guestmemfd_vm_free(vm);
}

static void test_lazy(void)
{
    guestmemfd_vm *vm = software_vm();
    guestmemfd_backend_config config = {
        .id = "ram",
        .size = SIZE,
        .lazy_chunk = 16 * PAGE,
        .prefault = GUESTMEMFD_PREFAULT_SMALL,
    };
    guestmemfd_backend *backend = NULL;
    guestmemfd_error error;
    guestmemfd_stats stats;
    guestmemfd_binding binding;
    char *host;
    int shared;

    check(!guestmemfd_backend_new(vm, &config, &backend, &error)
              && !guestmemfd_vm_add_window(vm, backend, 0, 0, SIZE, BOUND, &binding, &error),
          "a backend with lazy attributes");
    shared = guestmemfd_backend_shared_fd(backend);
    host = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, shared, 0);
    host[3 * PAGE] = 7;
    /* With listeners it would decide its page alone */
    listeners = false;
    check(!guestmemfd_vm_memory_fault(vm, 0, PAGE, PRIVATE, &error), "a private touch");
    listeners = true;
    stats = stats_of(backend);
    check(stats.private_bytes == 3 * PAGE && stats.undecided_bytes == SIZE - 3 * PAGE
              && stats.converted_neighbour_bytes == 2 * PAGE && stats.lazy_chunk == 16 * PAGE,
          "it decides its chunk as far as the page with shared data");
    check(host[3 * PAGE] == 7, "which keeps them");

    memset(&seen, 0, sizeof(seen));
    memset(host + 32 * PAGE, 1, 8 * PAGE);
    for (int page = 32; page < 40; page++) {
        if (guestmemfd_vm_map_gpa_range(vm, page * PAGE, 1, 1 << 4, &error)) {
            printf("Bail out! %s\n", error.message);
            exit(1);
        }
    }
    check(seen.prefaulted == 8, "small requests ask for their pages at once");
    check(!guestmemfd_vm_punch_owed(vm, &error) && stats_of(backend).owed_hole_bytes == 0
              && allocated(shared) == PAGE, "nothing is owed");
    check(guestmemfd_vm_punch_owed(NULL, &error) == -EINVAL, "no VM, nothing owed");
    guestmemfd_vm_remove_window(vm, 0, SIZE, &error);
    munmap(host, SIZE);
    guestmemfd_backend_free(backend);
    guestmemfd_vm_free(vm);
}

static void *flip(void *opaque)
{
    guestmemfd_vm *vm = opaque;

    for (int i = 0; i < 200; i++) {
        uint64_t gpa = (uint64_t)(i % 7) * PAGE;

        if (guestmemfd_vm_map_gpa_range(vm, gpa, 3, (i & 1) << 4, NULL)) {
            return opaque;
        }
    }
    return NULL;
}

static void test_threads(void)
{
    guestmemfd_vm *vm = software_vm();
    guestmemfd_backend *backend = new_backend(vm, "ram");
    pthread_t threads[4];
    guestmemfd_binding binding;
    bool ok = true;
    guestmemfd_stats stats;

    guestmemfd_vm_add_window(vm, backend, 0, 0, SIZE, BOUND, &binding, NULL);
    for (int i = 0; i < 4; i++) {
        ok &= !pthread_create(&threads[i], NULL, flip, vm);
    }
    for (int i = 0; i < 4; i++) {
        void *failed;

        ok &= !pthread_join(threads[i], &failed) && !failed;
    }
    stats = stats_of(backend);
    check(ok && stats.transition_bytes == 0
              && stats.undecided_bytes + stats.shared_bytes + stats.private_bytes == SIZE,
          "four threads convert the same pages");
    guestmemfd_vm_remove_window(vm, 0, SIZE, NULL);
    guestmemfd_backend_free(backend);
    guestmemfd_vm_free(vm);
}

/* A guest_memfd that this process maps, in a VM without private memory */
static void test_mapped(guestmemfd_vm *vm)
{
    guestmemfd_backend_config config = { .id = "ram", .size = SIZE, .mode = GUESTMEMFD_MODE_MAPPED };
    guestmemfd_backend *backend = NULL;
    guestmemfd_error error = { .code = 0 };
    guestmemfd_binding binding = 77;
    char *memory;

    if (guestmemfd_backend_new(vm, &config, &backend, &error)) {
        check(!backend && error.code == EOPNOTSUPP && strstr(error.message, "6.18"),
              "a kernel without mapped guest_memfd is told what would do");
        return;
    }
    check(guestmemfd_backend_private_fd(backend) == -1, "no slot carries the file");
    memory = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED,
                  guestmemfd_backend_shared_fd(backend), 0);
    check(memory != MAP_FAILED, "the file can be mapped");
    memset(memory, 1, SIZE);
    check(!guestmemfd_backend_free_pages(backend, PAGE, PAGE, NULL)
              && memory[0] && !memory[PAGE] && memory[2 * PAGE], "a discard frees what is named");
    check(!guestmemfd_vm_add_window(vm, backend, 0, 0, SIZE, BOUND, &binding, NULL)
              && binding == GUESTMEMFD_BINDING_UNBOUND
              && guestmemfd_vm_map_gpa_range(vm, 0, 1, 1 << 4, &error) == -EINVAL
              && stats_of(backend).shared_bytes == SIZE, "nothing becomes private");
    munmap(memory, SIZE);
    guestmemfd_vm_remove_window(vm, 0, SIZE, NULL);
    guestmemfd_backend_free(backend);
}

static void test_kvm(void)
{
    int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    int vm_fd = kvm < 0 ? -1 : ioctl(kvm, KVM_CREATE_VM, 0);
    guestmemfd_backend_config config = { .id = "ram", .size = SIZE, .mode = GUESTMEMFD_MODE_PRIVATE };
    guestmemfd_backend *backend = NULL;
    guestmemfd_vm *vm = NULL;
    guestmemfd_error error = { .code = 0 };

    if (vm_fd < 0) {
        printf("ok %d - ordinary VMs # SKIP no KVM here: %s\n", ++tests, strerror(errno));
        return;
    }
    check(!guestmemfd_vm_new(GUESTMEMFD_ABI, kvm, vm_fd, &callbacks, &vm, &error),
          "a VM of KVM is accepted");
    check(guestmemfd_backend_new(vm, &config, &backend, &error) == -EOPNOTSUPP && !backend
              && (strstr(error.message, "no guest_memfd") || strstr(error.message, "VM's type")),
          "a VM without private memory is refused with the reason");
    test_mapped(vm);
    guestmemfd_vm_free(vm);
    check(fcntl(vm_fd, F_GETFD) >= 0, "the caller keeps its descriptors");
    close(vm_fd);
    close(kvm);
}

static void test_pins(void)
{
    guestmemfd_vm *vm = software_vm();
    guestmemfd_backend_config config = {
        .id = "pinned", .size = SIZE, .opaque = &seen, .convert_timeout = 10,
    };
    guestmemfd_backend *backend = NULL;
    guestmemfd_error error;
    guestmemfd_binding binding;

    check(!guestmemfd_backend_new(vm, &config, &backend, &error) &&
          !guestmemfd_vm_add_window(vm, backend, 0, 0, SIZE, BOUND, &binding, &error),
          "a backend whose conversions wait 10 ms");
    check(!guestmemfd_backend_pin(backend, PAGE - 1, 2, &error),
          "two bytes pin the two pages that they lie in");
    memset(&seen, 0, sizeof(seen));
    check(guestmemfd_vm_map_gpa_range(vm, PAGE, 1, 0x10, &error) == -EBUSY &&
          strstr(error.message, "10ms"),
          "a pinned page does not become private, and the message says how long it was tried");
    check(seen.revoked == 1, "who has pinned it is asked once whether it can do without");
    check(!guestmemfd_vm_memory_fault(vm, PAGE, PAGE, PRIVATE, &error) &&
          stats_of(backend).private_bytes == 0 && stats_of(backend).waits == 2,
          "a memory fault waits, and can come again");
    check(guestmemfd_backend_unpin(backend, 0, 3 * PAGE, &error) == -EINVAL &&
          error.message[0],
          "what is not pinned cannot be unpinned");
    check(!guestmemfd_backend_unpin(backend, PAGE - 1, 2, &error) &&
          !guestmemfd_vm_map_gpa_range(vm, PAGE, 1, 0x10, &error),
          "an unpinned page becomes private");
    check(guestmemfd_backend_pin(backend, 0, 2 * PAGE, &error) == -EACCES &&
          error.message[0],
          "a private page is not pinned");
    check(guestmemfd_backend_unpin(backend, 0, PAGE, &error) == -EINVAL,
          "nor is any other page of such a request");
    check(guestmemfd_backend_pin(backend, SIZE, 1, &error) == -EINVAL &&
          guestmemfd_backend_unpin(backend, UINT64_MAX, 2, &error) == -EINVAL &&
          guestmemfd_backend_pin(NULL, 0, 1, &error) == -EINVAL &&
          guestmemfd_backend_pin(backend, 0, 0, &error) == -EINVAL,
          "pages outside of the backend are refused");

    guestmemfd_vm_remove_window(vm, 0, SIZE, &error);
    guestmemfd_backend_free(backend);
    guestmemfd_vm_free(vm);
}

static void test_map(void)
{
    guestmemfd_vm *vm = software_vm();
    guestmemfd_backend *backend = new_backend(vm, "ram");
    guestmemfd_run runs[4] = { { .size = 1 } };
    uint64_t count = 2, next = 1;
    guestmemfd_error error;
    guestmemfd_binding binding;

    guestmemfd_vm_add_window(vm, backend, 0, 0, SIZE, BOUND, &binding, &error);
    check(!guestmemfd_vm_map_gpa_range(vm, PAGE, 2, 0x10, &error)
              && !guestmemfd_vm_map_gpa_range(vm, 3 * PAGE, 1, 0, &error),
          "pages in three states");
    check(!guestmemfd_backend_map(backend, 0, SIZE, runs, &count, &next, &error)
              && count == 2 && next == 3 * PAGE && runs[2].size == 0,
          "a map has no more runs than there is room for, and says where it goes on");
    check(runs[0].offset == 0 && runs[0].size == PAGE
              && runs[0].state == GUESTMEMFD_STATE_UNDECIDED && runs[1].offset == PAGE
              && runs[1].size == 2 * PAGE && runs[1].state == GUESTMEMFD_STATE_PRIVATE,
          "its runs have offset, size and state");
    count = 4;
    check(!guestmemfd_backend_map(backend, next, SIZE - next, runs, &count, &next, &error)
              && count == 2 && next == SIZE && runs[0].state == GUESTMEMFD_STATE_SHARED
              && runs[1].size == SIZE - 4 * PAGE,
          "it goes on to the end");
    check(guestmemfd_backend_map(backend, 0, SIZE + PAGE, runs, &count, &next, &error) == -EINVAL
              && strstr(error.message, "outside")
              && guestmemfd_backend_map(backend, 1, PAGE, runs, &count, &next, &error) == -EINVAL
              && guestmemfd_backend_map(backend, 0, 0, runs, &count, &next, &error) == -EINVAL
              && guestmemfd_backend_map(backend, UINT64_MAX - PAGE + 1, PAGE, runs, &count, &next,
                                        &error) == -EINVAL,
          "ranges that are none of the backend's are refused");
    count = 0;
    check(guestmemfd_backend_map(backend, 0, SIZE, runs, &count, &next, &error) == -EINVAL
              && guestmemfd_backend_map(backend, 0, SIZE, NULL, &count, &next, &error) == -EINVAL
              && guestmemfd_backend_map(backend, 0, SIZE, runs, NULL, &next, &error) == -EINVAL
              && guestmemfd_backend_map(NULL, 0, SIZE, runs, &count, &next, &error) == -EINVAL,
          "so are places that hold nothing");

    guestmemfd_vm_remove_window(vm, 0, SIZE, &error);
    guestmemfd_backend_free(backend);
    guestmemfd_vm_free(vm);
}

/* It runs one thread at a time, also while that waits for another in a page fault. */
static bool under_valgrind(void)
{
    const char *preload = getenv("LD_PRELOAD");

    return preload && strstr(preload, "vgpreload");
}

static void test_guard(void)
{
    guestmemfd_vm *vm = software_vm();
    guestmemfd_backend *backend = new_backend(vm, "ram");
    int fd = guestmemfd_backend_shared_fd(backend);
    guestmemfd_error error;
    guestmemfd_binding binding;
    char *host;

    host = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    guestmemfd_vm_add_window(vm, backend, MIB, 0, SIZE, BOUND, &binding, &error);
    memset(&seen, 0, sizeof(seen));
    check(guestmemfd_backend_guard(backend, NULL, &error) == -EOPNOTSUPP
              && strstr(error.message, "userfaultfd")
              && guestmemfd_backend_guard(NULL, host, &error) == -EINVAL,
          "a guard needs a mapping");
    check(!guestmemfd_backend_guard(backend, host, &error), "a guarded backend");
    check(guestmemfd_backend_guard(backend, host, &error) == -EINVAL
              && strstr(error.message, "already"), "is not guarded twice");
    host[0] = 1;
    check(!guestmemfd_vm_map_gpa_range(vm, MIB, 2, 0x10, &error)
              && *(volatile char *)(host + PAGE) == 0, "a stray read sees zeros");
    check(seen.strays == 1 && stats_of(backend).stray_accesses == 1, "and is told of");

    guestmemfd_vm_remove_window(vm, MIB, SIZE, &error);
    guestmemfd_backend_free(backend);
    munmap(host, SIZE);
    guestmemfd_vm_free(vm);
}

int main(void)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    test_arguments();
    test_conversions();
    test_callback_that_asks();
    test_freed_neighbour();
    test_lazy();
    test_threads();
    test_pins();
    test_map();
    if (!under_valgrind()) {
        test_guard();
    }
    test_kvm();
    printf("1..%d\n", tests);
    return failures != 0;
}

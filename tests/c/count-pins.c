/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Pins and unpins the first BYTES of a backend TIMES times, with a private page
 * close by if asked to. callgrind counts what that takes: cargo xtask bench pins
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "guestmemfd.h"

#define SIZE (512 * 1024 * 1024ull)
#define PAGE 4096ull
/* In the first 4 MiB, as what is pinned */
#define PRIVATE_PAGE (1024 * 1024ull)

static int32_t on_gap(void *opaque, uint64_t gpa, uint64_t size, guestmemfd_view to)
{
    (void)opaque, (void)gpa, (void)size, (void)to;
    return -1;
}

static void must(int32_t result, const guestmemfd_error *error)
{
    if (result) {
        fprintf(stderr, "%s\n", error->message);
        exit(1);
    }
}

int main(int argc, char **argv)
{
    guestmemfd_callbacks callbacks = { .gap = on_gap };
    guestmemfd_backend_config config = {
        .id = "ram", .size = SIZE, .lazy = GUESTMEMFD_LAZY_OFF,
    };
    guestmemfd_backend *backend = NULL;
    guestmemfd_vm *vm = NULL;
    guestmemfd_error error;
    uint64_t bytes, times;
    guestmemfd_binding binding;

    if (argc < 3) {
        fprintf(stderr, "usage: %s BYTES TIMES [near-private]\n", argv[0]);
        return 2;
    }
    bytes = strtoull(argv[1], NULL, 0);
    times = strtoull(argv[2], NULL, 0);

    must(guestmemfd_vm_new_software(GUESTMEMFD_ABI, &callbacks, &vm, &error), &error);
    must(guestmemfd_backend_new(vm, &config, &backend, &error), &error);
    must(guestmemfd_vm_add_window(vm, backend, 0, 0, SIZE, GUESTMEMFD_BINDING_BOUND, &binding,
                                  &error), &error);
    if (argc > 3 && !strcmp(argv[3], "near-private")) {
        must(guestmemfd_vm_map_gpa_range(vm, PRIVATE_PAGE, 1, 0x10, &error), &error);
    }

    while (times--) {
        must(guestmemfd_backend_pin(backend, 0, bytes, &error), &error);
        must(guestmemfd_backend_unpin(backend, 0, bytes, &error), &error);
    }

    must(guestmemfd_vm_remove_window(vm, 0, SIZE, &error), &error);
    guestmemfd_backend_free(backend);
    guestmemfd_vm_free(vm);
    return 0;
}

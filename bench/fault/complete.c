// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * complete.c - complete ROUNDS MIB FIRST: an area all of whose pages are there against
 * plain shared memory of the same size
 *
 * Three mappings in one process: a memfd; a complete area for which the driver
 * answers still; another that was given back by UMEM_MAKE_VMA_ANONYMOUS.  In each round
 * each of them is touched page by page twice over, in order: with no page mapped (minor
 * faults), and with all of them mapped, all of it, many times.  The order of the
 * mappings changes from round to round, and medians are printed.
 *
 * Which physical pages a mapping got matters more than what it is a mapping of:
 * FIRST says which of the three is made first, and run.py has each be the first.
 */
#include <linux/umem.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include "bench.h"

#define KINDS		3
#define STEADY_PASSES	4

static const char *const kinds[KINDS] = { "memfd", "before", "after" };

static volatile uint64_t sink;

static void *complete_area(unsigned long npages, int make_plain)
{
	struct umem_ends ends = umem_create_area(npages);
	void *map = umem_map_node(&ends, npages);
	void *backing = map_shared(ends.shmem_fd, npages);

	memset(backing, 0x5a, npages * PAGE);
	munmap(backing, npages * PAGE);
	umem_mark_run(ends.server_fd, 0, npages, 0);
	if (make_plain && ioctl(ends.server_fd, UMEM_MAKE_VMA_ANONYMOUS))
		die("UMEM_MAKE_VMA_ANONYMOUS");
	return map;
}

static void *complete_memfd(unsigned long npages)
{
	void *map = map_shared(plain_file(npages), npages);

	memset(map, 0x5a, npages * PAGE);
	return map;
}

static uint64_t touch(volatile uint64_t *map, unsigned long npages)
{
	uint64_t start = now_ns(), sum = 0;

	for (unsigned long i = 0; i < npages; i++)
		sum += map[i * (PAGE / sizeof(*map))];
	sink = sum;
	return now_ns() - start;
}

static uint64_t read_all(volatile uint64_t *map, unsigned long npages)
{
	uint64_t start = now_ns(), sum = 0;

	for (int pass = 0; pass < STEADY_PASSES; pass++)
		for (unsigned long i = 0; i < npages * (PAGE / sizeof(*map)); i += 8)
			sum += map[i];
	sink = sum;
	return now_ns() - start;
}

void measure_complete(int argc, char **argv)
{
	unsigned long rounds, npages, round;
	uint64_t *first[KINDS], *steady[KINDS];
	void *maps[KINDS];
	int i, kind;

	if (argc != 3)
		exit(2);
	rounds = strtoul(argv[0], NULL, 0);
	npages = strtoul(argv[1], NULL, 0) * MIB / PAGE;
	for (i = 0; i < KINDS; i++) {
		kind = (strtoul(argv[2], NULL, 0) + i) % KINDS;
		maps[kind] = kind ? complete_area(npages, kind == 2) : complete_memfd(npages);
	}
	for (i = 0; i < KINDS; i++) {
		first[i] = calloc(rounds, sizeof(*first[i]));
		steady[i] = calloc(rounds, sizeof(*steady[i]));
	}
	for (round = 0; round < rounds; round++) {
		for (i = 0; i < KINDS; i++) {
			kind = (round + i) % KINDS;
			if (madvise(maps[kind], npages * PAGE, MADV_DONTNEED))
				die("MADV_DONTNEED");
			first[kind][round] = touch(maps[kind], npages);
			steady[kind][round] = read_all(maps[kind], npages);
		}
	}
	printf("\"rounds\":%lu,\"mib\":%s", rounds, argv[1]);
	for (i = 0; i < KINDS; i++) {
		qsort(first[i], rounds, sizeof(*first[i]), by_value);
		qsort(steady[i], rounds, sizeof(*steady[i]), by_value);
		printf(",\"%s\":{\"first_ns\":%.2f,\"steady_ns\":%.3f,\"first_min_ns\":%.2f,"
		       "\"steady_min_ns\":%.3f}", kinds[i],
		       (double)first[i][rounds / 2] / npages,
		       (double)steady[i][rounds / 2] / (npages * 64 * STEADY_PASSES),
		       (double)first[i][0] / npages,
		       (double)steady[i][0] / (npages * 64 * STEADY_PASSES));
	}
}

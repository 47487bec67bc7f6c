// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * util.c - clock, chance, plain shared memory, the source of all pages
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "bench.h"

void die(const char *what)
{
	perror(what);
	_exit(1);
}

uint64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * 1000000000UL + ts.tv_nsec;
}

/* Always the same sequence: every contender gets the same faults. */
uint64_t random64(void)
{
	static uint64_t state = 88172645463325252UL;

	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return state;
}

void shuffle(unsigned long *items, unsigned long nr)
{
	for (unsigned long i = nr - 1; i; i--) {
		unsigned long j = random64() % (i + 1), item = items[i];

		items[i] = items[j];
		items[j] = item;
	}
}

void *map_shared(int fd, unsigned long npages)
{
	void *map = mmap(NULL, npages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	if (map == MAP_FAILED)
		die("mmap");
	return map;
}

int plain_file(unsigned long npages)
{
	int fd = memfd_create("plain", MFD_CLOEXEC);

	if (fd < 0 || ftruncate(fd, npages * PAGE))
		die("memfd");
	return fd;
}

/* 2 MiB, in memory already: receiving is not what is measured. */
unsigned char *source(void)
{
	static unsigned char *buffer;

	if (!buffer) {
		buffer = aligned_alloc(HUGE, HUGE);
		if (!buffer)
			die("source");
		memset(buffer, 0x5a, HUGE);
	}
	return buffer;
}

int by_value(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return (x > y) - (x < y);
}

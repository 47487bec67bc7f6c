// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * many NODE NPAGES: as many threads as pages, each reads one page and checks
 * that it is full of what support.content() says.  Prints the tally.
 */
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#define PAGE 4096UL

static uint64_t *base;
static unsigned long good, bad;

static void *reader(void *arg)
{
	uintptr_t page = (uintptr_t)arg;
	volatile uint64_t *words = base + page * PAGE / 8;
	uint64_t expected = (page + 1) * 0x9E3779B97F4A7C15UL;
	unsigned long i;

	for (i = 0; i < PAGE / 8 && words[i] == expected; i++)
		;
	__atomic_add_fetch(i == PAGE / 8 ? &good : &bad, 1, __ATOMIC_RELAXED);
	return NULL;
}

int main(int argc, char **argv)
{
	unsigned long npages, i;
	pthread_t *threads;
	pthread_attr_t attr;
	int fd;

	if (argc != 3)
		return 2;
	npages = strtoul(argv[2], NULL, 0);
	fd = open(argv[1], O_RDWR);
	base = mmap(NULL, npages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	threads = calloc(npages, sizeof(*threads));
	if (fd < 0 || base == MAP_FAILED || !threads) {
		perror(argv[1]);
		return 2;
	}
	pthread_attr_init(&attr);
	pthread_attr_setstacksize(&attr, 32 * 1024);
	for (i = 0; i < npages; i++)
		if (pthread_create(&threads[i], &attr, reader, (void *)i)) {
			perror("pthread_create");
			return 2;
		}
	for (i = 0; i < npages; i++)
		pthread_join(threads[i], NULL);
	printf("%lu good, %lu bad\n", good, bad);
	return bad != 0;
}

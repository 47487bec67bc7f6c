// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * storm NODE NPAGES THREADS SEED: every thread reads every page of an area, in an
 * order of its own, and checks every word of it; meanwhile one more thread keeps
 * mapping, touching and unmapping pieces of the same area, so that faults under a
 * VMA's own lock meet changes of the address space.
 *
 * Also: a word of each page is incremented once by every thread, atomically.  At
 * the end it must be what the server had put there plus the number of threads.
 */
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#define PAGE 4096UL
#define WORDS (PAGE / 8)
#define COUNTER 100	/* the word that is incremented */

static uint64_t *base;
static unsigned long npages, nr_threads, seed, bad, remaps;
static int fd, done;

static uint64_t content(unsigned long page)
{
	return (page + 1) * 0x9E3779B97F4A7C15UL;
}

static void complain(unsigned long page, unsigned long word, uint64_t got)
{
	if (__atomic_add_fetch(&bad, 1, __ATOMIC_RELAXED) < 10)
		fprintf(stderr, "page %lu word %lu: %lx, expected %lx\n", page, word, got,
			content(page));
}

static void *reader(void *arg)
{
	unsigned int state = seed * 1000 + (uintptr_t)arg;
	unsigned long *order = malloc(npages * sizeof(*order)), i, n;

	for (i = 0; i < npages; i++)
		order[i] = i;
	for (i = npages - 1; i; i--) {
		unsigned long j = rand_r(&state) % (i + 1), page = order[i];

		order[i] = order[j];
		order[j] = page;
	}
	for (i = 0; i < npages; i++) {
		volatile uint64_t *words = base + order[i] * WORDS;

		/* Every other thread comes by a write fault. */
		if ((uintptr_t)arg % 2)
			__atomic_add_fetch(&words[COUNTER], 1, __ATOMIC_RELAXED);
		for (n = 0; n < WORDS; n++)
			if (n != COUNTER && words[n] != content(order[i]))
				complain(order[i], n, words[n]);
		if (!((uintptr_t)arg % 2))
			__atomic_add_fetch(&words[COUNTER], 1, __ATOMIC_RELAXED);
	}
	free(order);
	return NULL;
}

static void *mapper(void *arg)
{
	unsigned int state = seed;

	(void)arg;
	while (!__atomic_load_n(&done, __ATOMIC_RELAXED)) {
		unsigned long start = rand_r(&state) % npages;
		unsigned long count = 1 + rand_r(&state) % (npages - start);
		unsigned long page = rand_r(&state) % count;
		volatile uint64_t *words = mmap(NULL, count * PAGE, PROT_READ | PROT_WRITE,
						MAP_SHARED, fd, start * PAGE);

		if (words == MAP_FAILED) {
			perror("mmap");
			exit(2);
		}
		if (rand_r(&state) % 2 && words[page * WORDS] != content(start + page))
			complain(start + page, 0, words[page * WORDS]);
		/* In pieces, none of them twice: a thread may map something into a hole. */
		page = count > 2 ? 2 : 0;
		if (page) {
			munmap((void *)(words + WORDS), PAGE);
			munmap((void *)words, PAGE);
		}
		munmap((void *)(words + page * WORDS), (count - page) * PAGE);
		remaps++;
	}
	return NULL;
}

int main(int argc, char **argv)
{
	pthread_t *threads, remapper;
	unsigned long i;

	if (argc != 5)
		return 2;
	npages = strtoul(argv[2], NULL, 0);
	nr_threads = strtoul(argv[3], NULL, 0);
	seed = strtoul(argv[4], NULL, 0);
	fd = open(argv[1], O_RDWR);
	base = mmap(NULL, npages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	threads = calloc(nr_threads, sizeof(*threads));
	if (fd < 0 || base == MAP_FAILED || !threads) {
		perror(argv[1]);
		return 2;
	}
	pthread_create(&remapper, NULL, mapper, NULL);
	for (i = 0; i < nr_threads; i++)
		if (pthread_create(&threads[i], NULL, reader, (void *)i))
			return 2;
	for (i = 0; i < nr_threads; i++)
		pthread_join(threads[i], NULL);
	__atomic_store_n(&done, 1, __ATOMIC_RELAXED);
	pthread_join(remapper, NULL);
	for (i = 0; i < npages; i++)
		if (base[i * WORDS + COUNTER] != content(i) + nr_threads)
			complain(i, COUNTER, base[i * WORDS + COUNTER]);
	printf("bad=%lu remaps=%lu\n", bad, remaps);
	return bad != 0;
}

// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * faults.c - faults CONTENDER THREADS FAULTS MIB SPREAD: time until so many faults
 * on pages of an area of MIB, each page once, in random order, are served
 *
 * SPREAD says which pages: "all" of them or, where there are more than faults,
 * one at random of every N; "blocks" takes as many from each of 128 blocks of 2 MiB
 * spread over the area, so that page tables and the page cache's tree are as large
 * in areas of any size and what is left is the contender's own.
 *
 * Threads that touch and the one that serves are of one process.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench.h"

#define BLOCKS		128UL
#define BLOCK_PAGES	(HUGE / PAGE)

static volatile uint64_t *view;
static unsigned long *order, nr_threads, nr_faults, bad;
static pthread_barrier_t ready;
static int served;

static void *toucher(void *arg)
{
	unsigned long n = (uintptr_t)arg;
	unsigned long i = nr_faults * n / nr_threads, end = nr_faults * (n + 1) / nr_threads;

	pthread_barrier_wait(&ready);
	for (; i < end; i++) {
		uint64_t word = view[order[i] * (PAGE / sizeof(*view))];

		if (served && word != content(order[i]))
			__atomic_add_fetch(&bad, 1, __ATOMIC_RELAXED);
	}
	return NULL;
}

static void *server(void *arg)
{
	const struct contender *who = arg;

	who->serve();
	return NULL;
}

static void choose(unsigned long npages, const char *spread)
{
	unsigned long stride, i, in_block = nr_faults / BLOCKS;

	order = malloc(nr_faults * sizeof(*order));
	if (!order)
		die("malloc");
	if (!strcmp(spread, "all")) {
		stride = npages / nr_faults;
		for (i = 0; i < nr_faults; i++)
			order[i] = i * stride + random64() % stride;
	} else {
		stride = BLOCK_PAGES / in_block;
		for (i = 0; i < nr_faults; i++)
			order[i] = i / in_block * (npages / BLOCKS) +
				   i % in_block * stride + random64() % stride;
	}
	shuffle(order, nr_faults);
}

void measure_faults(int argc, char **argv)
{
	const struct contender *who;
	pthread_t *threads, handler;
	unsigned long i, npages;
	pthread_attr_t attr;
	uint64_t start, ns;

	if (argc != 5)
		exit(2);
	who = contender(argv[0]);
	nr_threads = strtoul(argv[1], NULL, 0);
	nr_faults = strtoul(argv[2], NULL, 0);
	npages = strtoul(argv[3], NULL, 0) * MIB / PAGE;
	choose(npages, argv[4]);
	source();
	view = who->open(npages);

	served = who->serve != NULL;
	if (served && pthread_create(&handler, NULL, server, (void *)who))
		die("pthread_create");
	threads = calloc(nr_threads, sizeof(*threads));
	pthread_attr_init(&attr);
	pthread_attr_setstacksize(&attr, 64 * 1024);
	pthread_barrier_init(&ready, NULL, nr_threads + 1);
	for (i = 0; i < nr_threads; i++)
		if (pthread_create(&threads[i], &attr, toucher, (void *)i))
			die("pthread_create");
	pthread_barrier_wait(&ready);
	start = now_ns();
	for (i = 0; i < nr_threads; i++)
		pthread_join(threads[i], NULL);
	ns = now_ns() - start;
	printf("\"contender\":\"%s\",\"threads\":%lu,\"faults\":%lu,\"mib\":%s,\"spread\":\"%s\","
	       "\"bad\":%lu,\"us_per_fault\":%.3f", who->name, nr_threads, nr_faults, argv[3],
	       argv[4], bad, ns / 1e3 / nr_faults);
}

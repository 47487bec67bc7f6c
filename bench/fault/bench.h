/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * bench.h - what the parts of the fault benchmark share
 *
 * One process is one measurement of one contender and prints one line of JSON;
 * run.py has them run in turns and compares.
 */
#ifndef BENCH_H
#define BENCH_H

#include <stddef.h>
#include <stdint.h>

#define PAGE		4096UL
#define MIB		(1UL << 20)
#define HUGE		(2 * MIB)

/* Requests that a handler takes at a time; the same for all contenders. */
#define BATCH		64

/**
 * struct contender - one way to supply memory's missing pages
 * @name: as on the command line
 * @open: make an area of so many pages, all missing; returns what is touched
 * @serve: handle faults for ever
 * @fill: supply a run of pages that nobody waits for, of up to 2 MiB; NULL when the
 *	contender is no filler
 */
struct contender {
	const char *name;
	volatile uint64_t *(*open)(unsigned long npages);
	void (*serve)(void);
	void (*fill)(unsigned long pgoff, unsigned long count);
};

extern const struct contender uffd_copy, uffd_bare, uffd_continue;
extern const struct contender umem, umem_touch, umem_place, umem_huge;
extern const struct contender plain;

const struct contender *contender(const char *name);

/* measurements; each prints its line */
void measure_faults(int argc, char **argv);
void measure_fill(int argc, char **argv);
void measure_complete(int argc, char **argv);
void measure_memory(int argc, char **argv);
void measure_pingpong(int argc, char **argv);

/* umem.c: for those that need more of an area than a contender has */
struct umem_ends {
	int server_fd;
	int shmem_fd;
	unsigned int id;
};

struct umem_ends umem_create_area(unsigned long npages);
void *umem_map_node(const struct umem_ends *ends, unsigned long npages);
void umem_mark_run(int server_fd, unsigned long pgoff, unsigned long count, unsigned int flags);

/* util.c */
void die(const char *what) __attribute__((noreturn));
uint64_t now_ns(void);
uint64_t random64(void);
void shuffle(unsigned long *items, unsigned long nr);
void *map_shared(int fd, unsigned long npages);
int plain_file(unsigned long npages);
unsigned char *source(void);
int by_value(const void *a, const void *b);

/* The first word of a page, so that a wrong one is noticed. */
static inline uint64_t content(unsigned long pgoff)
{
	return (pgoff + 1) * 0x9E3779B97F4A7C15UL;
}

/* A page that arrives: a memcpy from here stands for recv(), in all contenders. */
static inline unsigned char *source_of(unsigned long pgoff)
{
	unsigned char *page = source() + pgoff * PAGE % HUGE;

	*(uint64_t *)page = content(pgoff);
	return page;
}

#endif /* BENCH_H */

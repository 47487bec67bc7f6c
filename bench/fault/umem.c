// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * umem.c - the driver: content put into the backing file, then marked
 *
 * Requests are read in batches, and the batch is marked by one write() of the
 * very offsets that were read.
 */
#include <fcntl.h>
#include <linux/umem.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "bench.h"

#define WRITE_SIZE	(256UL * 1024)

static struct umem_ends ends;
static unsigned char *backing, *buffer;

static struct umem_ends create_area(unsigned long npages, unsigned int flags)
{
	static unsigned int nr;
	struct umem_create create = {
		.size		= npages * PAGE,
		.granule_size	= flags & UMEM_CREATE_HUGE ? HUGE : 0,
		.flags		= flags,
	};
	int fd = open("/dev/umem", O_RDWR | O_CLOEXEC);

	snprintf(create.name, sizeof(create.name), "bench.%d.%u", getpid(), nr++);
	if (fd < 0 || ioctl(fd, UMEM_DEV_CREATE_UMEM, &create))
		die("UMEM_DEV_CREATE_UMEM");
	close(fd);
	return (struct umem_ends) {
		.server_fd	= create.server_fd,
		.shmem_fd	= create.shmem_fd,
		.id		= create.id,
	};
}

struct umem_ends umem_create_area(unsigned long npages)
{
	return create_area(npages, 0);
}

void *umem_map_node(const struct umem_ends *of, unsigned long npages)
{
	char path[32];
	void *map;
	int fd;

	snprintf(path, sizeof(path), "/dev/umem%u", of->id);
	fd = open(path, O_RDWR | O_CLOEXEC);
	if (fd < 0)
		die(path);
	map = map_shared(fd, npages);
	close(fd);
	return map;
}

void umem_mark_run(int server_fd, unsigned long pgoff, unsigned long count, unsigned int flags)
{
	struct umem_page_range run = { .pgoff = pgoff, .count = count };
	struct umem_mark_cached mark = { .ranges = (uintptr_t)&run, .nr = 1, .flags = flags };

	if (ioctl(server_fd, UMEM_MARK_PAGE_CACHED, &mark))
		die("UMEM_MARK_PAGE_CACHED");
}

static volatile uint64_t *umem_open(unsigned long npages)
{
	ends = umem_create_area(npages);
	buffer = aligned_alloc(PAGE, WRITE_SIZE);
	if (!buffer)
		die("buffer");
	memset(buffer, 0, WRITE_SIZE);
	backing = map_shared(ends.shmem_fd, npages);
	return umem_map_node(&ends, npages);
}

static volatile uint64_t *huge_open(unsigned long npages)
{
	ends = create_area(npages, UMEM_CREATE_HUGE);
	/* shmem aligns a mapping of a huge file so that its pages can be mapped whole. */
	backing = map_shared(ends.shmem_fd, npages);
	return umem_map_node(&ends, npages);
}

/*
 * What arrives goes through a buffer that stays in the processor's cache, as in
 * pyumem/lanes/fill.py, whose size this is.  A larger write is slow on 6.12: for
 * each page that it writes it touches all the rest of the buffer first.
 */
static void write_run(unsigned long pgoff, const void *from, size_t len)
{
	for (size_t done = 0; done < len;) {
		size_t piece = len - done < WRITE_SIZE ? len - done : WRITE_SIZE;

		memcpy(buffer, (const char *)from + done, piece);
		if (pwrite(ends.shmem_fd, buffer, piece, pgoff * PAGE + done) != (ssize_t)piece)
			die("pwrite");
		done += piece;
	}
}

static void serve(void (*supply)(unsigned long pgoff))
{
	uint64_t want[BATCH];

	for (;;) {
		ssize_t n = read(ends.server_fd, want, sizeof(want));

		if (n < 0)
			die("read of server_fd");
		for (size_t i = 0; i < n / sizeof(*want); i++)
			supply(want[i]);
		if (write(ends.server_fd, want, n) != n)
			die("write to server_fd");
	}
}

static void write_page(unsigned long pgoff)
{
	write_run(pgoff, source_of(pgoff), PAGE);
}

static void place_page(unsigned long pgoff)
{
	memcpy(backing + pgoff * PAGE, source_of(pgoff), PAGE);
}

static void write_serve(void)
{
	serve(write_page);
}

static void place_serve(void)
{
	serve(place_page);
}

static void write_fill(unsigned long pgoff, unsigned long count)
{
	write_run(pgoff, source(), count * PAGE);
	umem_mark_run(ends.server_fd, pgoff, count, 0);
}

static void touch_fill(unsigned long pgoff, unsigned long count)
{
	write_run(pgoff, source(), count * PAGE);
	umem_mark_run(ends.server_fd, pgoff, count, UMEM_MARK_TOUCH);
}

static void place_fill(unsigned long pgoff, unsigned long count)
{
	memcpy(backing + pgoff * PAGE, source(), count * PAGE);
	umem_mark_run(ends.server_fd, pgoff, count, 0);
}

const struct contender umem = {
	.name	= "umem",
	.open	= umem_open,
	.serve	= write_serve,
	.fill	= write_fill,
};

/* Received into a mapping of the backing file: no second copy, but a trap a page. */
const struct contender umem_place = {
	.name	= "umem-place",
	.open	= umem_open,
	.serve	= place_serve,
	.fill	= place_fill,
};

/* Granule and backing of 2 MiB: runs of less are not marked. */
const struct contender umem_huge = {
	.name	= "umem-huge",
	.open	= huge_open,
	.fill	= place_fill,
};

/* As COPY and CONTINUE do, pages are mapped for the consumer too. */
const struct contender umem_touch = {
	.name	= "umem-touch",
	.open	= umem_open,
	.fill	= touch_fill,
};

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
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "bench.h"

static struct umem_ends ends;
static unsigned char *backing;

struct umem_ends umem_create_area(unsigned long npages)
{
	static unsigned int nr;
	struct umem_create create = { .size = npages * PAGE };
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
	backing = map_shared(ends.shmem_fd, npages);
	return umem_map_node(&ends, npages);
}

static void umem_serve(void)
{
	uint64_t want[BATCH];

	for (;;) {
		ssize_t n = read(ends.server_fd, want, sizeof(want));

		if (n < 0)
			die("read of server_fd");
		for (size_t i = 0; i < n / sizeof(*want); i++)
			memcpy(backing + want[i] * PAGE, source_of(want[i]), PAGE);
		if (write(ends.server_fd, want, n) != n)
			die("write to server_fd");
	}
}

static void place_fill(unsigned long pgoff, unsigned long count)
{
	memcpy(backing + pgoff * PAGE, source(), count * PAGE);
	umem_mark_run(ends.server_fd, pgoff, count, 0);
}

static void touch_fill(unsigned long pgoff, unsigned long count)
{
	memcpy(backing + pgoff * PAGE, source(), count * PAGE);
	umem_mark_run(ends.server_fd, pgoff, count, UMEM_MARK_TOUCH);
}

static void pwrite_fill(unsigned long pgoff, unsigned long count)
{
	ssize_t len = count * PAGE;

	if (pwrite(ends.shmem_fd, source(), len, pgoff * PAGE) != len)
		die("pwrite");
	umem_mark_run(ends.server_fd, pgoff, count, 0);
}

const struct contender umem = {
	.name	= "umem",
	.open	= umem_open,
	.serve	= umem_serve,
	.fill	= place_fill,
};

/* As COPY and CONTINUE do, pages are mapped for the consumer too. */
const struct contender umem_touch = {
	.name	= "umem-touch",
	.open	= umem_open,
	.fill	= touch_fill,
};

/* Content that is in memory already, rather than on its way from a socket. */
const struct contender umem_pwrite = {
	.name	= "umem-pwrite",
	.open	= umem_open,
	.fill	= pwrite_fill,
};

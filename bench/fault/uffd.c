// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * uffd.c - userfaultfd: COPY into private memory, CONTINUE in shared memory
 *
 * Content that is received goes to a buffer first and then by COPY to its place;
 * "copy-bare" is COPY of content that lies in memory for another reason.
 *
 * CONTINUE fills the page through a second mapping of the file and then has it
 * mapped.  A page that was never there is a missing one, so the area is registered
 * for both; minor mode alone would show zeros.
 *
 * Messages are read in batches.  Each page costs an ioctl of its own all the same,
 * since one takes one range; it wakes too.  To wake by one call for the whole
 * batch is worse: the range between random pages is full of others' waiters.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "bench.h"

static unsigned char *view, *backing, *buffer;
static int uffd;

static void register_view(unsigned long npages, uint64_t features, uint64_t mode)
{
	struct uffdio_api api = { .api = UFFD_API, .features = features };
	struct uffdio_register reg = { .mode = mode };

	uffd = syscall(SYS_userfaultfd, O_CLOEXEC);
	if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api))
		die("userfaultfd");
	reg.range.start = (uintptr_t)view;
	reg.range.len = npages * PAGE;
	if (ioctl(uffd, UFFDIO_REGISTER, &reg))
		die("UFFDIO_REGISTER");
}

static volatile uint64_t *copy_open(unsigned long npages)
{
	view = mmap(NULL, npages * PAGE, PROT_READ | PROT_WRITE,
		    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (view == MAP_FAILED)
		die("mmap");
	buffer = aligned_alloc(HUGE, HUGE);
	if (!buffer)
		die("buffer");
	memset(buffer, 0, HUGE);
	register_view(npages, 0, UFFDIO_REGISTER_MODE_MISSING);
	return (uint64_t *)view;
}

static volatile uint64_t *continue_open(unsigned long npages)
{
	int fd = plain_file(npages);

	view = map_shared(fd, npages);
	backing = map_shared(fd, npages);
	register_view(npages, UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MINOR_SHMEM,
		      UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR);
	return (uint64_t *)view;
}

static void copy_run(unsigned long pgoff, const void *from, unsigned long len)
{
	struct uffdio_copy arg = {
		.dst = (uintptr_t)view + pgoff * PAGE,
		.src = (uintptr_t)from,
		.len = len,
	};

	/* Mappings that change meanwhile give EAGAIN; there are none here. */
	if (ioctl(uffd, UFFDIO_COPY, &arg))
		die("UFFDIO_COPY");
}

static void continue_page(unsigned long pgoff)
{
	struct uffdio_continue arg = {
		.range = { .start = (uintptr_t)view + pgoff * PAGE, .len = PAGE },
	};

	memcpy(backing + pgoff * PAGE, source_of(pgoff), PAGE);
	if (ioctl(uffd, UFFDIO_CONTINUE, &arg))
		die("UFFDIO_CONTINUE");
}

static void copy_page(unsigned long pgoff)
{
	memcpy(buffer, source_of(pgoff), PAGE);
	copy_run(pgoff, buffer, PAGE);
}

static void bare_page(unsigned long pgoff)
{
	copy_run(pgoff, source_of(pgoff), PAGE);
}

static void serve(void (*supply)(unsigned long pgoff))
{
	struct uffd_msg msgs[BATCH];

	for (;;) {
		ssize_t n = read(uffd, msgs, sizeof(msgs));

		if (n < 0)
			die("read of userfaultfd");
		for (size_t i = 0; i < n / sizeof(*msgs); i++)
			supply((msgs[i].arg.pagefault.address - (uintptr_t)view) / PAGE);
	}
}

static void copy_serve(void)
{
	serve(copy_page);
}

static void continue_serve(void)
{
	serve(continue_page);
}

static void bare_serve(void)
{
	serve(bare_page);
}

static void copy_fill(unsigned long pgoff, unsigned long count)
{
	memcpy(buffer, source(), count * PAGE);
	copy_run(pgoff, buffer, count * PAGE);
}

static void bare_fill(unsigned long pgoff, unsigned long count)
{
	copy_run(pgoff, source(), count * PAGE);
}

const struct contender uffd_copy = {
	.name	= "copy",
	.open	= copy_open,
	.serve	= copy_serve,
	.fill	= copy_fill,
};

const struct contender uffd_bare = {
	.name	= "copy-bare",
	.open	= copy_open,
	.serve	= bare_serve,
	.fill	= bare_fill,
};

static void continue_fill(unsigned long pgoff, unsigned long count)
{
	struct uffdio_continue arg = {
		.range = { .start = (uintptr_t)view + pgoff * PAGE, .len = count * PAGE },
	};

	memcpy(backing + pgoff * PAGE, source(), count * PAGE);
	if (ioctl(uffd, UFFDIO_CONTINUE, &arg))
		die("UFFDIO_CONTINUE");
}

const struct contender uffd_continue = {
	.name	= "continue",
	.open	= continue_open,
	.serve	= continue_serve,
	.fill	= continue_fill,
};

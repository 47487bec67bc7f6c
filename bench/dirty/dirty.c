// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * dirty umem|soft-dirty|mprotect GIB PAGES ROUNDS: what it costs to know what was written
 *
 * A mapping of GIB of shared memory has PAGES pages in memory, spread over all of it;
 * the rest is holes.  A round writes to each of these, reads and clears the log, and does
 * so again with nothing written.  One line of JSON for each step and round, with the
 * nanoseconds of all of it; "pages" and "gib" are what to divide by.
 *
 * soft-dirty is memfd with the bits of /proc/self/pagemap, cleared by clear_refs, mprotect
 * is memfd made read-only, and a SIGSEGV for each page.
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <linux/umem.h>

#define PAGE 4096UL
#define CHUNK 65536UL	/* pages of which the log is read at a time */
#define SOFT_DIRTY (1ULL << 55)

static const char *what;
static unsigned long gib, npages, present, stride;
static char *map;
static int server_fd, clear_refs, pagemap;
static uint8_t *written;	/* by page, of mprotect */

static void die(const char *call)
{
	fprintf(stderr, "%s: %s: %s\n", what, call, strerror(errno));
	exit(2);
}

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ULL + t.tv_nsec;
}

static void tell(const char *step, unsigned long round, uint64_t ns)
{
	printf("{\"what\": \"%s\", \"gib\": %lu, \"pages\": %lu, \"step\": \"%s\", "
	       "\"round\": %lu, \"ns\": %lu}\n", what, gib, present, step, round, ns);
}

static void write_all(void)
{
	for (unsigned long n = 0; n < present; n++)
		*(volatile uint64_t *)(map + n * stride * PAGE) = n;
}

/* --- how it is done --- */

static void umem_open(void)
{
	struct umem_create arg = { .size = npages * PAGE };
	struct umem_page_range all = { 0, npages };
	struct umem_mark_cached mark = { .ranges = (uintptr_t)&all, .nr = 1 };
	int control = open("/dev/umem", O_RDWR), node;
	char path[32];

	snprintf(arg.name, sizeof(arg.name), "bench.%d", getpid());
	if (control < 0 || ioctl(control, UMEM_DEV_CREATE_UMEM, &arg))
		die("create");
	server_fd = arg.server_fd;
	if (ioctl(server_fd, UMEM_MARK_PAGE_CACHED, &mark))
		die("mark");
	snprintf(path, sizeof(path), "/dev/umem%u", arg.id);
	node = open(path, O_RDWR);
	map = mmap(NULL, npages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, node, 0);
}

static void umem_switch(int on)
{
	struct umem_dirty_log arg = { .on = on };

	if (ioctl(server_fd, UMEM_SET_DIRTY_LOG, &arg))
		die("UMEM_SET_DIRTY_LOG");
}

static unsigned long umem_clear(void)
{
	uint64_t words[CHUNK / 64];
	unsigned long found = 0;

	for (unsigned long first = 0; first < npages; first += CHUNK) {
		struct umem_dirty arg = {
			.words = (uintptr_t)words, .first = first, .nr_words = CHUNK / 64,
		};

		if (ioctl(server_fd, UMEM_GET_DIRTY, &arg))
			die("UMEM_GET_DIRTY");
		found += arg.nr_dirty;
	}
	return found;
}

static void memfd_open(void)
{
	int fd = memfd_create("bench", 0);

	if (fd < 0 || ftruncate(fd, npages * PAGE))
		die("memfd");
	map = mmap(NULL, npages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
}

static void soft_dirty_reset(void)
{
	if (write(clear_refs, "4", 1) != 1)
		die("clear_refs");
}

/* It cannot read and clear in one step: what is written in between is lost. */
static unsigned long soft_dirty_clear(void)
{
	static uint64_t entries[CHUNK];
	unsigned long found = 0;

	for (unsigned long first = 0; first < npages; first += CHUNK) {
		off_t at = ((uintptr_t)map / PAGE + first) * 8;

		if (pread(pagemap, entries, sizeof(entries), at) != sizeof(entries))
			die("pagemap");
		for (unsigned long n = 0; n < CHUNK; n++)
			found += (entries[n] & SOFT_DIRTY) && n % stride == 0;
	}
	soft_dirty_reset();
	return found;
}

static void on_fault(int sig, siginfo_t *info, void *context)
{
	unsigned long page = ((char *)info->si_addr - map) / PAGE;

	(void)sig, (void)context;
	if (page >= npages)
		_exit(3);
	written[page] = 1;
	mprotect(map + page * PAGE, PAGE, PROT_READ | PROT_WRITE);
}

static unsigned long mprotect_clear(void)
{
	unsigned long found = 0;

	if (mprotect(map, npages * PAGE, PROT_READ))
		die("mprotect");
	for (unsigned long page = 0; page < npages; page++)
		found += written[page];
	memset(written, 0, npages);
	return found;
}

int main(int argc, char **argv)
{
	struct sigaction action = { .sa_sigaction = on_fault, .sa_flags = SA_SIGINFO };
	unsigned long (*clear)(void);
	unsigned long rounds, found;
	uint64_t began;

	if (argc != 5)
		return 2;
	what = argv[1];
	gib = strtoul(argv[2], NULL, 0);
	present = strtoul(argv[3], NULL, 0);
	rounds = strtoul(argv[4], NULL, 0);
	npages = gib << (30 - 12);
	stride = npages / present;
	setvbuf(stdout, NULL, _IOLBF, 0);

	if (!strcmp(what, "umem"))
		umem_open();
	else
		memfd_open();
	if (map == MAP_FAILED)
		die("mmap");
	madvise(map, npages * PAGE, MADV_NOHUGEPAGE);
	write_all();

	began = now();
	if (!strcmp(what, "umem")) {
		umem_switch(1);
		clear = umem_clear;
	} else if (!strcmp(what, "soft-dirty")) {
		clear_refs = open("/proc/self/clear_refs", O_WRONLY);
		pagemap = open("/proc/self/pagemap", O_RDONLY);
		soft_dirty_reset();
		clear = soft_dirty_clear;
	} else {
		written = calloc(npages, 1);
		sigaction(SIGSEGV, &action, NULL);
		mprotect(map, npages * PAGE, PROT_READ);
		clear = mprotect_clear;
	}
	tell("on", 0, now() - began);
	clear();

	for (unsigned long round = 0; round < rounds; round++) {
		began = now();
		write_all();
		tell("write", round, now() - began);
		began = now();
		write_all();
		tell("again", round, now() - began);
		began = now();
		found = clear();
		tell("clear", round, now() - began);
		if (found != present)
			fprintf(stderr, "%s: found %lu of %lu\n", what, found, present);
		began = now();
		found = clear();
		tell("clean", round, now() - began);
		if (found)
			fprintf(stderr, "%s: found %lu that were not written\n", what, found);
	}
	if (!strcmp(what, "umem")) {
		write_all();
		began = now();
		umem_switch(0);
		tell("off", 0, now() - began);
	}
	return 0;
}

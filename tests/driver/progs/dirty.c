// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * dirty SECONDS SEED: does the log of writes miss one?
 *
 * Phases follow each other until the time is over.  In each, consumer processes
 * with several threads write to an area by every means there is: stores, atomic
 * operations, read() into it, process_vm_writev() and O_DIRECT reads, in mappings that
 * they unmap, move, protect, drop the page tables of, have swapped out, fork, and
 * discard from; some are killed in the middle.  Meanwhile this process reads the
 * log and copies what is in it, as a migration would.  When all of them are gone
 * there is one last reading, and then the copy has to be what the area is.
 *
 * The log is switched on before the consumers begin, or under their feet; sometimes
 * it stays on from phase to phase, sometimes its server dies with it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <linux/umem.h>

#define PAGE 4096UL
#define NPAGES 1500UL
#define SIZE (NPAGES * PAGE)
#define NR_WORDS ((NPAGES + 63) / 64)
#define NR_CONSUMERS 3
#define NR_THREADS 3
#define SLICE 64UL	/* pages that a thread maps for itself */

struct shared {
	volatile int stop;
	unsigned long writes;
};

static struct shared *shared;
static int control, server_fd, shmem_fd, direct_fd;
static char node[64];
static uint8_t *area, *copy;

static void die(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, strerror(errno));
	_exit(2);
}

static uint64_t now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000ULL + t.tv_nsec / 1000000;
}

static unsigned long dice(uint64_t *state, unsigned long sides)
{
	*state = *state * 6364136223846793005ULL + 1442695040888963407ULL;
	return (*state >> 33) % sides;
}

/* --- a consumer --- */

static void write_by(uint64_t *state, uint8_t *at)
{
	uint64_t *word = (uint64_t *)(at + 8 * dice(state, PAGE / 8));
	uint64_t value = *state;
	struct iovec from = { &value, sizeof(value) };
	struct iovec to = { word, sizeof(value) };
	int ends[2];

	switch (dice(state, 12)) {
	case 0:
		if (pipe(ends))
			return;
		if (write(ends[1], &value, sizeof(value)) == sizeof(value) &&
		    read(ends[0], word, sizeof(value)) < 0 && errno != EFAULT)
			die("read");
		close(ends[0]);
		close(ends[1]);
		break;
	case 1:
		process_vm_writev(getpid(), &from, 1, &to, 1, 0);
		break;
	case 2:
		if (direct_fd >= 0 &&
		    pread(direct_fd, at, PAGE, dice(state, 16) * PAGE) < 0 &&
		    errno != EFAULT)
			die("pread");
		break;
	case 3:
		__atomic_fetch_add(word, 1, __ATOMIC_RELAXED);
		break;
	default:
		*(volatile uint64_t *)word = value;
		break;
	}
	__atomic_fetch_add(&shared->writes, 1, __ATOMIC_RELAXED);
}

/* For a child: never outlive who forked it, who may have been killed by now. */
static void die_with(pid_t parent)
{
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (getppid() != parent)
		_exit(0);
}

static void forked_write(uint64_t *state, uint8_t *at)
{
	pid_t parent = getpid(), child = fork();

	if (!child) {
		die_with(parent);
		for (int i = 0; i < 20; i++)
			*(volatile uint64_t *)(at + 8 * dice(state, PAGE / 8)) = *state;
		_exit(0);
	}
	if (child > 0)
		waitpid(child, NULL, 0);
}

static void *consumer_thread(void *arg)
{
	uint64_t state = (uintptr_t)arg;
	int fd = open(node, O_RDWR);
	uint8_t *map = MAP_FAILED, *moved;
	unsigned long first = 0;

	if (fd < 0)
		die("open");
	while (!shared->stop) {
		uint8_t *at;

		if (map == MAP_FAILED) {
			first = dice(&state, NPAGES - SLICE);
			map = mmap(NULL, SLICE * PAGE, PROT_READ | PROT_WRITE,
				   MAP_SHARED, fd, first * PAGE);
			if (map == MAP_FAILED)
				die("mmap");
		}
		at = map + PAGE * dice(&state, SLICE);
		switch (dice(&state, 400)) {
		case 0:
			munmap(map, SLICE * PAGE);
			map = MAP_FAILED;
			break;
		case 1:
			/* Somewhere else, with its entries. */
			moved = mremap(map, SLICE * PAGE, SLICE * PAGE,
				       MREMAP_MAYMOVE | MREMAP_DONTUNMAP * 0);
			if (moved != MAP_FAILED)
				map = moved;
			break;
		case 2:
			mprotect(map, SLICE * PAGE, PROT_READ);
			mprotect(map, SLICE * PAGE, PROT_READ | PROT_WRITE);
			break;
		case 3:
			madvise(map, SLICE * PAGE, MADV_DONTNEED);
			break;
		case 4:
			madvise(at, PAGE, MADV_REMOVE);
			break;
		case 5:
			madvise(map, SLICE * PAGE, MADV_PAGEOUT);
			break;
		case 6:
			forked_write(&state, at);
			break;
		default:
			(void)*(volatile uint8_t *)at;
			write_by(&state, at);
			break;
		}
	}
	return NULL;
}

static void consumer(uint64_t seed, pid_t server)
{
	pthread_t threads[NR_THREADS];

	die_with(server);
	for (unsigned long i = 0; i < NR_THREADS; i++)
		if (pthread_create(&threads[i], NULL, consumer_thread,
				   (void *)(uintptr_t)(seed * 31 + i * 7919 + 1)))
			die("pthread_create");
	for (int i = 0; i < NR_THREADS; i++)
		pthread_join(threads[i], NULL);
	_exit(0);
}

/* --- the server --- */

static int set_log(int on)
{
	struct umem_dirty_log arg = { .on = on };
	int ret;

	do
		ret = ioctl(server_fd, UMEM_SET_DIRTY_LOG, &arg);
	while (ret && errno == EAGAIN);
	return ret;
}

/* Read a part of the log, or all of it, and copy what is in it. */
static unsigned long round_of(unsigned long first_word, unsigned long nr)
{
	uint64_t words[NR_WORDS];
	struct umem_dirty arg = {
		.words = (uintptr_t)words, .first = 64 * first_word, .nr_words = nr,
	};
	unsigned long found = 0;
	int ret;

	do
		ret = ioctl(server_fd, UMEM_GET_DIRTY, &arg);
	while (ret && errno == EAGAIN);
	if (ret)
		die("UMEM_GET_DIRTY");
	for (unsigned long page = 0; page < 64 * nr; page++) {
		unsigned long at = 64 * first_word + page;

		if (!(words[page / 64] >> page % 64 & 1))
			continue;
		if (at >= NPAGES)
			die("a bit past the end");
		memcpy(copy + at * PAGE, area + at * PAGE, PAGE);
		found++;
	}
	if (found != arg.nr_dirty)
		die("nr_dirty is wrong");
	return found;
}

static void create(void)
{
	struct umem_page_range all = { 0, NPAGES };
	struct umem_mark_cached mark = { .ranges = (uintptr_t)&all, .nr = 1 };
	struct umem_create arg = { .size = SIZE };

	snprintf(arg.name, sizeof(arg.name), "dirty.%d", getpid());
	if (ioctl(control, UMEM_DEV_CREATE_UMEM, &arg))
		die("create");
	server_fd = arg.server_fd;
	shmem_fd = arg.shmem_fd;
	snprintf(node, sizeof(node), "/dev/umem%u", arg.id);
	area = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, shmem_fd, 0);
	if (area == MAP_FAILED)
		die("mmap of the backing file");
	for (unsigned long page = 0; page < NPAGES; page++)
		memset(area + page * PAGE, page, PAGE);
	if (ioctl(server_fd, UMEM_MARK_PAGE_CACHED, &mark))
		die("mark");
}

static void server_dies(void)
{
	struct umem_reattach arg = { .id = atoi(node + strlen("/dev/umem")) };
	int keeper = open(node, O_RDWR);

	close(server_fd);
	if (ioctl(control, UMEM_DEV_REATTACH, &arg))
		die("re-attach");
	close(arg.shmem_fd);
	server_fd = arg.server_fd;
	close(keeper);
}

int main(int argc, char **argv)
{
	uint64_t seed = argc > 2 ? strtoull(argv[2], NULL, 0) : 1, state = seed;
	uint64_t end = now_ms() + 1000ULL * strtoull(argv[1], NULL, 0);
	unsigned long phases = 0, rounds = 0, pages = 0;
	int on = 0;

	control = open("/dev/umem", O_RDWR);
	if (control < 0)
		die("/dev/umem");
	direct_fd = argc > 3 ? open(argv[3], O_RDONLY | O_DIRECT) : -1;
	shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE,
		      MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	copy = malloc(SIZE);
	create();

	while (now_ms() < end) {
		uint64_t until = now_ms() + 50 + dice(&state, 200);
		int late = !on && dice(&state, 2), status;
		pid_t server = getpid(), pids[NR_CONSUMERS];

		if (!on && !late && set_log(1))
			die("switch on");
		if (!on && !late)
			memcpy(copy, area, SIZE);
		shared->stop = 0;
		for (int i = 0; i < NR_CONSUMERS; i++) {
			pids[i] = fork();
			if (!pids[i])
				consumer(seed + phases * 17 + i, server);
		}
		if (late) {
			usleep(1000 * dice(&state, 60));
			if (set_log(1))
				die("switch on, late");
			memcpy(copy, area, SIZE);
		}
		on = 1;
		if (!set_log(1) || errno != EBUSY)
			die("switched on twice");
		while (now_ms() < until) {
			unsigned long first = dice(&state, NR_WORDS);

			if (dice(&state, 2))
				pages += round_of(0, NR_WORDS);
			else
				pages += round_of(first, dice(&state, NR_WORDS - first + 1));
			rounds++;
			if (!dice(&state, 40))
				kill(pids[dice(&state, NR_CONSUMERS)], SIGKILL);
		}
		shared->stop = 1;
		for (int i = 0; i < NR_CONSUMERS; i++) {
			waitpid(pids[i], &status, 0);
			if (WIFEXITED(status) ? WEXITSTATUS(status) :
			    WTERMSIG(status) != SIGKILL) {
				fprintf(stderr, "consumer: status 0x%x\n", status);
				return 1;
			}
		}
		pages += round_of(0, NR_WORDS);
		for (unsigned long page = 0; page < NPAGES; page++)
			if (memcmp(copy + page * PAGE, area + page * PAGE, PAGE)) {
				fprintf(stderr, "phase %lu of seed %llu: page %lu was written unseen\n",
					phases, (unsigned long long)seed, page);
				return 1;
			}
		phases++;
		if (dice(&state, 3) == 0) {
			server_dies();
			on = 0;
		} else if (dice(&state, 2)) {
			if (set_log(0))
				die("switch off");
			on = 0;
		}
	}
	printf("%lu phases, %lu readings, %lu pages read, %lu writes\n", phases,
	       rounds, pages, shared->writes);
	return 0;
}

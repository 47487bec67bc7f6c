// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * stress SECONDS SEED: everything that may happen to an area, at once.
 *
 * Rounds follow each other until the time is over.  In each an area of some size is
 * created; a few consumer processes map it and, in several threads, read and
 * check pages, count in them, map and unmap pieces, move them, drop and discard
 * pages, fork; some are killed in the middle.  Lanes, threads of this process,
 * serve it: one answers requests, the others fill ahead of time, and they mark
 * ranges that overlap, some of them straight into page tables.  Now and then all lanes
 * are replaced by re-attaching.  A complete area is made plain, under everybody's feet,
 * and one lane switches the log of writes on, reads it, and switches it off.
 *
 * As in the kernel's uffd-stress each page holds a mutex and a counter, so that all of
 * what a mutex needs, atomic operations and futexes, meets pages that are missing.
 *
 * In some rounds some pages are poisoned first, and served after all.
 *
 * What is checked: a page never reads as anything but its content, or zero where it
 * was discarded; every increment is there at the end; nobody is in a mutex that
 * somebody else holds; nobody gets a signal that it should not; everybody ends; every
 * area goes away.
 *
 * The same seed gives the same choices, not the same interleaving.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <linux/umem.h>

#define PAGE 4096UL
#define WORDS (PAGE / 8)
#define MAX_PAGES 1200
#define NR_CONSUMERS 3
#define NR_THREADS 3
#define NR_LANES 4
#define COUNTER 7	/* the word of a page in which consumers count */
#define MUTEX 16	/* the first word of a mutex */
#define LOCKED 26	/* the word that it protects, */
#define LOCKED2 27	/* and another, which is always equal */

_Static_assert(sizeof(pthread_mutex_t) <= (LOCKED - MUTEX) * 8, "a mutex has its room");

/* What consumers and the server share. */
struct shared {
	volatile int stop;
	unsigned long bad;
	unsigned long ops;
	unsigned long locked;		/* times that a mutex was taken */
	unsigned long orphans;		/* of which its holder had been killed */
	unsigned long poison_hits;
	/* Increments that were made, by page; counted before they are made. */
	unsigned long counted[MAX_PAGES];
	/* And under its mutex. */
	unsigned long in_mutex[MAX_PAGES];
};

static struct shared *shared;
static int control;

/* The area of this round. */
static struct {
	unsigned long npages;
	unsigned long discards_from;	/* pages from here on may be discarded */
	uint32_t id;
	char node[32];
	int server_fd;
	int keep;			/* keeps it alive without server and consumers */
	uint64_t *backing;
	bool poison;			/* some pages are poisoned before they are served */
	uint8_t state[MAX_PAGES];	/* FREE, CLAIMED, MARKED */
	pthread_mutex_t claim;
	volatile int lanes_stop;
} area;

enum { FREE, CLAIMED, MARKED };

static unsigned long nr_rounds, nr_killed, nr_reattached, nr_requests, nr_plain, nr_poisoned;
static unsigned long nr_logged;
static pthread_mutex_t new_mutex;	/* as it is in a page that was just filled */

static void die(const char *what)
{
	fprintf(stderr, "stress: %s: %s\n", what, strerror(errno));
	fflush(stderr);
	_exit(2);
}

static void complain(const char *what, unsigned long page, uint64_t got)
{
	if (__atomic_add_fetch(&shared->bad, 1, __ATOMIC_RELAXED) < 20)
		fprintf(stderr, "stress: round %lu: %s: page %lu of %lu: got %lx\n", nr_rounds,
			what, page, area.npages, got);
}

static uint64_t content(unsigned long page)
{
	return (page + 1) * 0x9E3779B97F4A7C15UL ^ area.id;
}

static unsigned int roll(unsigned int *state, unsigned int sides)
{
	return rand_r(state) % sides;
}

/* Words that change. */
static bool is_state(unsigned long word)
{
	return word == COUNTER || (word >= MUTEX && word <= LOCKED2);
}

/* Pages of which a consumer may be told that they are lost. */
static bool may_be_poisoned(unsigned long page)
{
	return area.poison && page % 16 == 5;
}

/* ---- lanes: threads of the server ---- */

static void fill(unsigned long page)
{
	uint64_t *words = area.backing + page * WORDS;

	for (unsigned long n = 0; n < WORDS; n++)
		words[n] = is_state(n) ? 0 : content(page);
	memcpy(words + MUTEX, &new_mutex, sizeof(new_mutex));
}

static bool mark(unsigned long start, unsigned long count)
{
	struct umem_page_range range = { start, count };
	struct umem_mark_cached arg = {
		.ranges = (uintptr_t)&range,
		.nr = 1,
		.flags = start % 2 ? UMEM_MARK_TOUCH : 0,
	};

	if (!ioctl(area.server_fd, UMEM_MARK_PAGE_CACHED, &arg)) {
		for (unsigned long page = start; page < start + count; page++)
			__atomic_store_n(&area.state[page], MARKED, __ATOMIC_RELEASE);
		return true;
	}
	if (errno != ENODEV)
		die("mark");
	return false;
}

/*
 * Fill what nobody has claimed yet of a range, and mark what is filled of it: what
 * another lane marked before is marked again, what another lane has in its hands is
 * left to it.  Returns false when this server was fenced.
 */
static bool serve_range(unsigned long start, unsigned long count)
{
	uint8_t mine[MAX_PAGES];

	pthread_mutex_lock(&area.claim);
	for (unsigned long n = 0; n < count; n++) {
		mine[n] = area.state[start + n] == FREE;
		if (mine[n])
			area.state[start + n] = CLAIMED;
	}
	pthread_mutex_unlock(&area.claim);
	for (unsigned long n = 0; n < count; n++)
		if (mine[n])
			fill(start + n);
	/* A range in one mark where all of it is filled, overlapping what is marked. */
	for (unsigned long n = 0, run; n < count; n += run + 1) {
		for (run = 0; n + run < count; run++)
			if (!mine[n + run] && __atomic_load_n(&area.state[start + n + run],
							      __ATOMIC_ACQUIRE) != MARKED)
				break;
		if (run && !mark(start + n, run))
			return false;
	}
	return true;
}

/* Returns false when this server was fenced. */
static bool poison(unsigned long page)
{
	struct umem_page_range range = { page, 1 };
	struct umem_mark_cached arg = { .ranges = (uintptr_t)&range, .nr = 1 };

	if (ioctl(area.server_fd, UMEM_MARK_PAGE_POISONED, &arg)) {
		if (errno != ENODEV)
			die("poison");
		return false;
	}
	__atomic_add_fetch(&nr_poisoned, arg.nr_new, __ATOMIC_RELAXED);
	return true;
}

static void *request_lane(void *arg)
{
	unsigned int state = (uintptr_t)arg;
	struct umem_page_request requests[16];

	while (!area.lanes_stop) {
		struct umem_page_requests get = { .requests = (uintptr_t)requests, .nr = 16 };
		struct pollfd poller = { area.server_fd, POLLIN, 0 };

		if (poll(&poller, 1, 20) <= 0)
			continue;
		if (ioctl(area.server_fd, UMEM_GET_PAGE_REQUEST, &get)) {
			if (errno == ENODEV)
				return NULL;
			if (errno == EAGAIN || errno == EINTR)
				continue;
			die("get");
		}
		__atomic_add_fetch(&nr_requests, get.nr, __ATOMIC_RELAXED);
		for (unsigned int n = 0; n < get.nr; n++)
			if (requests[n].pgoff >= area.npages)
				complain("request past the end", requests[n].pgoff, 0);
			else if (may_be_poisoned(requests[n].pgoff) && roll(&state, 2) ?
				 !poison(requests[n].pgoff) :
				 !serve_range(requests[n].pgoff, 1))
				return NULL;
	}
	return NULL;
}

static void *background_lane(void *arg)
{
	unsigned int state = (uintptr_t)arg;

	while (!area.lanes_stop) {
		unsigned long start = roll(&state, area.npages);
		unsigned long most = area.npages - start;

		if (!serve_range(start, 1 + roll(&state, most < 40 ? most : 40)))
			return NULL;
		/* As soon as it is complete, and again: somebody may have mapped it since. */
		if (!ioctl(area.server_fd, UMEM_MAKE_VMA_ANONYMOUS))
			__atomic_add_fetch(&nr_plain, 1, __ATOMIC_RELAXED);
		else if (errno == ENODEV)
			return NULL;
		else if (errno != EBUSY && errno != EAGAIN)
			die("make plain");
		usleep(roll(&state, 3000));
	}
	return NULL;
}

/* The log of writes, on and off; whether it misses any is for dirty.c. */
static void *log_lane(void *arg)
{
	unsigned int state = (uintptr_t)arg;
	uint64_t words[(MAX_PAGES + 63) / 64];

	while (!area.lanes_stop) {
		struct umem_dirty_log log = { .on = roll(&state, 2) };
		struct umem_dirty dirty = {
			.words = (uintptr_t)words,
			.nr_words = (area.npages + 63) / 64,
		};
		unsigned long set = 0;

		if (!roll(&state, 3) && ioctl(area.server_fd, UMEM_SET_DIRTY_LOG, &log)) {
			if (errno == ENODEV)
				return NULL;
			if (errno != EBUSY && errno != EAGAIN)
				die("log");
		}
		if (ioctl(area.server_fd, UMEM_GET_DIRTY, &dirty)) {
			if (errno == ENODEV)
				return NULL;
			if (errno != ENODATA)
				die("dirty");
		} else {
			for (unsigned int n = 0; n < dirty.nr_words; n++)
				set += __builtin_popcountl(words[n]);
			if (set != dirty.nr_dirty)
				complain("nr_dirty", set, dirty.nr_dirty);
			__atomic_add_fetch(&nr_logged, set, __ATOMIC_RELAXED);
		}
		usleep(roll(&state, 3000));
	}
	return NULL;
}

static void *(*const lane_kinds[NR_LANES])(void *) = {
	request_lane, background_lane, background_lane, log_lane,
};
static pthread_t lanes[NR_LANES];

static void start_lanes(unsigned int *state)
{
	area.lanes_stop = 0;
	for (int n = 0; n < NR_LANES; n++)
		if (pthread_create(&lanes[n], NULL, lane_kinds[n],
				   (void *)(uintptr_t)rand_r(state)))
			die("pthread_create");
}

static void join_lanes(void)
{
	area.lanes_stop = 1;
	for (int n = 0; n < NR_LANES; n++)
		pthread_join(lanes[n], NULL);
	/* What a lane had in its hands is for its successor. */
	for (unsigned long page = 0; page < area.npages; page++)
		if (area.state[page] == CLAIMED)
			area.state[page] = FREE;
}

/* Replace the server: after its death, or over its head. */
static void reattach(unsigned int *state)
{
	struct umem_reattach arg = { .id = area.id };
	int old = area.server_fd;
	bool force = roll(state, 2);

	if (force) {
		arg.flags = UMEM_REATTACH_FORCE;
	} else {
		join_lanes();
		close(old);
		usleep(roll(state, 5000));
	}
	/* Busy: a consumer that has just been forked has not closed its copy yet. */
	for (int tries = 0; ioctl(control, UMEM_DEV_REATTACH, &arg); tries++) {
		if (errno != EBUSY || force || tries == 5000)
			die("reattach");
		usleep(1000);
	}
	close(arg.shmem_fd);
	if (fcntl(arg.server_fd, F_SETFL, O_NONBLOCK))
		die("fcntl");
	if (force) {
		/* The old lanes find out by themselves, or are asked. */
		join_lanes();
		close(old);
	}
	area.server_fd = arg.server_fd;
	start_lanes(state);
	nr_reattached++;
}

/* ---- consumers: threads of other processes ---- */

static uint64_t *consumer_base;
static int consumer_fd;
static __thread sigjmp_buf escape;
static __thread volatile long may_hit = -1;	/* the page that may be poisoned */

static void on_fault(int sig, siginfo_t *info, void *context)
{
	long page = ((uint64_t *)info->si_addr - consumer_base) / (long)WORDS;

	(void)context;
	if (sig == SIGBUS && info->si_code == BUS_MCEERR_AR && may_hit >= 0)
		siglongjmp(escape, 1);
	complain(sig == SIGBUS ? "SIGBUS" : "SIGSEGV", page, info->si_code);
	_exit(3);
}

static void check_page(uint64_t *words, unsigned long page, unsigned int *state)
{
	unsigned long n = roll(state, WORDS);
	uint64_t got;

	while (is_state(n))
		n++;
	if (may_be_poisoned(page)) {
		/* Few are enough: the kernel reports each. */
		if (roll(state, 16))
			return;
		if (sigsetjmp(escape, 1)) {
			may_hit = -1;
			__atomic_add_fetch(&shared->poison_hits, 1, __ATOMIC_RELAXED);
			return;
		}
		may_hit = page;
	}
	got = *(volatile uint64_t *)&words[n];
	may_hit = -1;
	if (got != content(page) && !(got == 0 && page >= area.discards_from))
		complain("content", page, got);
}

/* For a child: never outlive who forked it, who may have been killed by now. */
static void die_with(pid_t parent)
{
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (getppid() != parent)
		_exit(0);
}

static void in_a_child(unsigned int *state, unsigned long page)
{
	pid_t parent = getpid(), pid = fork();

	if (pid < 0)
		return;
	if (!pid) {
		die_with(parent);
		check_page(consumer_base + page * WORDS, page, state);
		_exit(0);
	}
	if (!roll(state, 2)) {
		usleep(roll(state, 2000));
		kill(pid, SIGKILL);
	}
	waitpid(pid, NULL, 0);
}

/* A mapping of its own, of which only this thread knows, and what can be done to it. */
static void with_a_mapping(unsigned int *state)
{
	unsigned long start = roll(state, area.npages);
	unsigned long count = 1 + roll(state, area.npages - start), n;
	uint64_t *map = mmap(NULL, count * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, consumer_fd,
			     start * PAGE);
	bool split = false;

	if (map == MAP_FAILED)
		die("mmap");
	for (int i = roll(state, 6); i >= 0; i--) {
		n = roll(state, count);
		switch (roll(state, 6)) {
		case 0:
			split = true;
			mprotect(map + n * WORDS, (count - n) * PAGE, PROT_READ);
			check_page(map + n * WORDS, start + n, state);
			mprotect(map, count * PAGE, PROT_READ | PROT_WRITE);
			break;
		case 1: {
			/*
			 * Move all of it somewhere else, if it is in one piece.  (Were it
			 * not, the call would fail with the room unmapped already, and
			 * another thread might have something there by now.)
			 */
			if (split)
				break;
			void *room = mmap(NULL, count * PAGE, PROT_NONE,
					  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
			void *moved = mremap(map, count * PAGE, count * PAGE,
					     MREMAP_MAYMOVE | MREMAP_FIXED, room);

			if (moved == MAP_FAILED)
				die("mremap");
			map = moved;
			break;
		}
		case 2:
			madvise(map, count * PAGE, MADV_DONTNEED);
			break;
		default:
			check_page(map + n * WORDS, start + n, state);
		}
	}
	/* In pieces, none of them twice: somebody may map something into a hole at once. */
	n = count > 3 ? 2 : 0;
	if (n) {
		munmap(map + WORDS, PAGE);
		munmap(map, PAGE);
	}
	munmap(map + n * WORDS, (count - n) * PAGE);
}

/*
 * Count under the mutex of a page.  Who was killed while he held it leaves it to the next
 * one, perhaps between the two words.
 */
static void with_a_mutex(unsigned long page)
{
	uint64_t *words = consumer_base + page * WORDS;
	pthread_mutex_t *mutex = (pthread_mutex_t *)(words + MUTEX);
	int ret;

	ret = pthread_mutex_lock(mutex);
	if (ret == EOWNERDEAD) {
		__atomic_add_fetch(&shared->orphans, 1, __ATOMIC_RELAXED);
		words[LOCKED2] = words[LOCKED];
		pthread_mutex_consistent(mutex);
	} else if (ret) {
		complain("mutex", page, ret);
		return;
	}
	if (words[LOCKED] != words[LOCKED2])
		complain("two in one mutex", page, words[LOCKED2]);
	/* Plain additions: two at a time lose one. */
	*(volatile uint64_t *)&words[LOCKED] = words[LOCKED] + 1;
	if (page % 4 == 0)
		sched_yield();
	*(volatile uint64_t *)&words[LOCKED2] = words[LOCKED2] + 1;
	__atomic_add_fetch(&shared->in_mutex[page], 1, __ATOMIC_RELAXED);
	__atomic_add_fetch(&shared->locked, 1, __ATOMIC_RELAXED);
	pthread_mutex_unlock(mutex);
}

static void *consumer_thread(void *arg)
{
	unsigned int state = (uintptr_t)arg;

	while (!shared->stop) {
		unsigned long page = roll(&state, area.npages);
		uint64_t *words = consumer_base + page * WORDS;

		__atomic_add_fetch(&shared->ops, 1, __ATOMIC_RELAXED);
		switch (roll(&state, 16)) {
		case 0:
			with_a_mapping(&state);
			break;
		case 1:
			in_a_child(&state, page);
			break;
		case 2:
			madvise(words, PAGE, MADV_DONTNEED);
			break;
		case 3:
			if (area.discards_from < area.npages)
				madvise(consumer_base + area.discards_from * WORDS,
					(1 + roll(&state, area.npages - area.discards_from)) *
						PAGE,
					MADV_REMOVE);
			break;
		case 4: {
			int ends[2];

			/* The kernel reads the page. */
			if (pipe(ends))
				die("pipe");
			if (write(ends[1], words, PAGE) != (ssize_t)PAGE &&
			    !(may_be_poisoned(page) && errno == EFAULT))
				complain("write(2)", page, errno);
			close(ends[0]);
			close(ends[1]);
			break;
		}
		case 5:
		case 6:
			if (may_be_poisoned(page))
				break;
			__atomic_add_fetch(&shared->counted[page], 1, __ATOMIC_SEQ_CST);
			__atomic_add_fetch(&words[COUNTER], 1, __ATOMIC_SEQ_CST);
			break;
		case 7:
		case 8:
		case 9:
			/* A mutex that was discarded is none any more. */
			if (!may_be_poisoned(page) && page < area.discards_from)
				with_a_mutex(page);
			break;
		default:
			check_page(words, page, &state);
		}
	}
	return NULL;
}

static void consumer(unsigned int state, pid_t server)
{
	struct sigaction fault = { .sa_sigaction = on_fault, .sa_flags = SA_SIGINFO };
	pthread_t threads[NR_THREADS];

	die_with(server);
	sigaction(SIGBUS, &fault, NULL);
	sigaction(SIGSEGV, &fault, NULL);
	/* Else the server would not be gone when this process's parent closes it. */
	close(area.server_fd);
	close(area.keep);
	consumer_fd = open(area.node, O_RDWR);
	if (consumer_fd < 0)
		die(area.node);
	consumer_base = mmap(NULL, area.npages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED,
			     consumer_fd, 0);
	if (consumer_base == MAP_FAILED)
		die("mmap");
	for (int n = 0; n < NR_THREADS; n++)
		if (pthread_create(&threads[n], NULL, consumer_thread,
				   (void *)(uintptr_t)rand_r(&state)))
			die("pthread_create");
	for (int n = 0; n < NR_THREADS; n++)
		pthread_join(threads[n], NULL);
	_exit(0);
}

/* ---- rounds ---- */

static void create(unsigned int *state)
{
	struct umem_create arg = { 0 };

	/* Often so small that it is complete at once, under everybody's feet. */
	area.npages = roll(state, 3) ? 1 + roll(state, 40) : 200 + roll(state, MAX_PAGES - 200);
	area.discards_from = roll(state, 2) ? area.npages - area.npages / 4 : area.npages;
	area.poison = roll(state, 2);
	arg.size = area.npages * PAGE;
	snprintf(arg.name, sizeof(arg.name), "stress.%d.%lu", getpid(), nr_rounds);
	if (ioctl(control, UMEM_DEV_CREATE_UMEM, &arg))
		die("create");
	area.id = arg.id;
	area.server_fd = arg.server_fd;
	snprintf(area.node, sizeof(area.node), "/dev/umem%u", arg.id);
	area.keep = open(area.node, O_RDONLY);
	if (area.keep < 0)
		die(area.node);
	area.backing = mmap(NULL, arg.size, PROT_READ | PROT_WRITE, MAP_SHARED, arg.shmem_fd, 0);
	if (area.backing == MAP_FAILED)
		die("mmap of the backing file");
	close(arg.shmem_fd);
	if (fcntl(area.server_fd, F_SETFL, O_NONBLOCK))
		die("fcntl");
	memset(area.state, FREE, sizeof(area.state));
	memset(shared->counted, 0, sizeof(shared->counted));
	memset(shared->in_mutex, 0, sizeof(shared->in_mutex));
	shared->stop = 0;
}

static void round_of_stress(unsigned int *state)
{
	pid_t server = getpid(), pids[NR_CONSUMERS];
	bool killed = false;
	int events = 2 + roll(state, 6);

	create(state);
	for (int n = 0; n < NR_CONSUMERS; n++) {
		unsigned int own = rand_r(state);

		pids[n] = fork();
		if (pids[n] < 0)
			die("fork");
		if (!pids[n])
			consumer(own, server);
	}
	usleep(roll(state, 3000));
	start_lanes(state);
	while (events--) {
		usleep(1000 + roll(state, 40000));
		if (roll(state, 3)) {
			reattach(state);
		} else if (!roll(state, 2)) {
			kill(pids[roll(state, NR_CONSUMERS)], SIGKILL);
			killed = true;
			nr_killed++;
		}
	}
	shared->stop = 1;
	for (int n = 0; n < NR_CONSUMERS; n++) {
		int status;

		if (waitpid(pids[n], &status, 0) != pids[n])
			die("waitpid");
		if (status && !(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL))
			complain("a consumer ended badly", 0, status);
	}
	join_lanes();
	for (unsigned long page = 0; page < area.npages && !killed; page++) {
		uint64_t got = area.backing[page * WORDS + COUNTER];

		if (area.state[page] == MARKED && page < area.discards_from &&
		    got != shared->counted[page])
			complain("increments", page, got);
		got = area.backing[page * WORDS + LOCKED];
		if (area.state[page] == MARKED && page < area.discards_from &&
		    got != shared->in_mutex[page])
			complain("increments under the mutex", page, got);
	}
	munmap(area.backing, area.npages * PAGE);
	close(area.server_fd);
	close(area.keep);
	nr_rounds++;
}

/* Areas are gone as soon as nobody has them. */
static void expect_none(void)
{
	struct umem_list list = { 0 };

	for (int tries = 0; tries < 200; tries++) {
		memset(&list, 0, sizeof(list));
		if (ioctl(control, UMEM_DEV_LIST, &list))
			die("list");
		if (!list.total)
			return;
		usleep(10000);
	}
	complain("areas left", 0, list.total);
}

int main(int argc, char **argv)
{
	pthread_mutexattr_t attributes;
	unsigned int state;
	time_t end;

	if (argc != 3)
		return 2;
	setvbuf(stdout, NULL, _IOLBF, 0);
	end = time(NULL) + atoi(argv[1]);
	state = strtoul(argv[2], NULL, 0);
	printf("seed=%s\n", argv[2]);
	pthread_mutex_init(&area.claim, NULL);
	pthread_mutexattr_init(&attributes);
	pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
	pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
	pthread_mutex_init(&new_mutex, &attributes);
	shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS,
		      -1, 0);
	control = open("/dev/umem", O_RDWR | O_CLOEXEC);
	if (shared == MAP_FAILED || control < 0)
		die("/dev/umem");
	while (time(NULL) < end)
		round_of_stress(&state);
	expect_none();
	printf("rounds=%lu ops=%lu requests=%lu reattached=%lu killed=%lu plain=%lu poisoned=%lu "
	       "poison_hits=%lu locked=%lu orphans=%lu logged=%lu bad=%lu\n", nr_rounds, shared->ops,
	       nr_requests, nr_reattached, nr_killed, nr_plain, nr_poisoned, shared->poison_hits,
	       shared->locked, shared->orphans, nr_logged, shared->bad);
	return shared->bad != 0;
}

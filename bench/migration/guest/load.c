// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The load of the guest that the bench migrates: works, tells how fast, and knows
 * whether its memory is still its own.
 *
 *	load WORKLOAD VCPUS MIB
 *
 * WORKLOAD is one of
 *
 * idle	      owns MIB of memory and does nothing
 * read	      a thread for each vCPU adds up its pages in order, and writes to one
 *	      page in 64
 * random     a thread for each vCPU writes to its pages in no order
 * sequential the same, in order
 * compute    one thread reads pages in no order, and so meets those that are
 *	      missing; the others compute on what fits into a cache.  What is
 *	      counted is theirs.
 * redis      a redis server and redis-benchmark work (bench/migration/guest/init);
 *	      what is counted is the server's commands.  MIB of memory lie idle.
 *
 * It talks as tests/guest/workload.c does, one message a line.  For the whole time:
 *
 *	UMEM-GUEST beat				each 10 ms
 *	UMEM-GUEST step t_ms=... work=...	each 100 ms of the guest's clock
 *
 * and, after the line "verdict" on standard input, the verdict on its memory.
 */
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define PAGE_BYTES	4096UL
#define PAGE_WORDS	(PAGE_BYTES / sizeof(uint64_t))
/* A write goes to one word in each of so many parts of a page. */
#define STRIDE		64UL
#define MAX_THREADS	16
#define BEAT_MS		10
#define BEATS_A_STEP	10
#define NS_PER_MS	1000000LL
#define REDIS_SOCKET	"/redis.sock"

enum workload { IDLE, READ, RANDOM, SEQUENTIAL, COMPUTE, REDIS };

static const char * const names[] = {
	"idle", "read", "random", "sequential", "compute", "redis",
};

struct worker {
	pthread_t thread;
	/* Pages of its own: first <= page < end. */
	size_t first;
	size_t end;
	uint64_t random;
	/* Written by its thread alone, read by whoever tells the speed. */
	uint64_t work;
	uint64_t sum;
	bool parked;
} __attribute__((aligned(128)));

static enum workload workload;
static uint64_t *array;
/* How often each page was written: what it has to hold. */
static uint32_t *generation;
static size_t nr_pages;
static struct worker workers[MAX_THREADS];
static unsigned int nr_workers;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static volatile bool hold;

static void say(const char *format, ...) __attribute__((format(printf, 1, 2)));

static void say(const char *format, ...)
{
	static pthread_mutex_t out_lock = PTHREAD_MUTEX_INITIALIZER;
	char line[160];
	va_list args;
	int len, done;

	va_start(args, format);
	len = vsnprintf(line, sizeof(line), format, args);
	va_end(args);
	pthread_mutex_lock(&out_lock);
	for (done = 0; done < len; ) {
		ssize_t n = write(STDOUT_FILENO, line + done, len - done);

		if (n < 0 && errno != EINTR)
			break;
		if (n > 0)
			done += n;
	}
	pthread_mutex_unlock(&out_lock);
}

static void die(const char *what)
{
	say("UMEM-GUEST fatal %s: %s\n", what, strerror(errno));
	exit(1);
}

static long long now_ms(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * 1000LL + ts.tv_nsec / NS_PER_MS;
}

static uint64_t mix(uint64_t x)
{
	x ^= x >> 30;
	x *= 0xbf58476d1ce4e5b9ULL;
	x ^= x >> 27;
	x *= 0x94d049bb133111ebULL;
	return x ^ (x >> 31);
}

static uint64_t word_of(size_t page, uint32_t gen, size_t word)
{
	return mix(((uint64_t)gen << 40) ^ (page << 10) ^ word ^ 0x9e3779b97f4a7c15ULL);
}

static void write_page(size_t page)
{
	volatile uint64_t *words = array + page * PAGE_WORDS;
	uint32_t gen = ++generation[page];

	for (size_t i = 0; i < PAGE_WORDS; i += STRIDE)
		words[i] = word_of(page, gen, i);
}

static uint64_t read_page(size_t page)
{
	volatile uint64_t *words = array + page * PAGE_WORDS;
	uint64_t sum = 0;

	for (size_t i = 0; i < PAGE_WORDS; i += STRIDE)
		sum += words[i];
	return sum;
}

/* What a write leaves alone still holds what make_array() put there. */
static bool page_is_bad(size_t page)
{
	volatile uint64_t *words = array + page * PAGE_WORDS;

	for (size_t i = 0; i < PAGE_WORDS; i++) {
		uint32_t gen = i % STRIDE ? 1 : generation[page];

		if (words[i] != word_of(page, gen, i))
			return true;
	}
	return false;
}

static uint64_t next_random(struct worker *w)
{
	w->random ^= w->random << 13;
	w->random ^= w->random >> 7;
	w->random ^= w->random << 17;
	return w->random;
}

static size_t random_page(struct worker *w)
{
	return w->first + next_random(w) % (w->end - w->first);
}

static uint64_t compute(struct worker *w)
{
	static __thread uint64_t numbers[4096];
	uint64_t sum = 0;

	for (size_t i = 0; i < 4096; i++)
		sum += numbers[i] = mix(numbers[i] + i);
	return sum + w->random;
}

static void park(struct worker *w)
{
	pthread_mutex_lock(&lock);
	w->parked = true;
	pthread_cond_broadcast(&changed);
	while (hold)
		pthread_cond_wait(&changed, &lock);
	w->parked = false;
	pthread_mutex_unlock(&lock);
}

static void *worker_main(void *arg)
{
	struct worker *w = arg;
	size_t page = w->first;

	for (;;) {
		if (hold)
			park(w);
		switch (workload) {
		case READ:
			if (page % 64)
				w->sum += read_page(page);
			else
				write_page(page);
			break;
		case RANDOM:
			write_page(random_page(w));
			break;
		case SEQUENTIAL:
			write_page(page);
			break;
		case COMPUTE:
			if (w == workers) {
				w->sum += read_page(random_page(w));
				continue; /* not counted */
			}
			w->sum += compute(w);
			break;
		default:
			return NULL;
		}
		if (++page == w->end)
			page = w->first;
		__atomic_store_n(&w->work, w->work + 1, __ATOMIC_RELAXED);
	}
}

/* The commands that redis has executed; the last known number when it does not answer. */
static uint64_t redis_work(void)
{
	static const char ask[] = "INFO stats\r\n", key[] = "total_commands_processed:";
	static char answer[16384];
	static uint64_t known;
	static int fd = -1;
	struct sockaddr_un to = { .sun_family = AF_UNIX, .sun_path = REDIS_SOCKET };
	size_t have = 0;
	char *found;

	if (fd < 0) {
		fd = socket(AF_UNIX, SOCK_STREAM, 0);
		if (connect(fd, (struct sockaddr *)&to, sizeof(to))) {
			close(fd);
			fd = -1;
			return known;
		}
	}
	if (write(fd, ask, sizeof(ask) - 1) != sizeof(ask) - 1)
		return known;
	do {
		ssize_t n = read(fd, answer + have, sizeof(answer) - 1 - have);

		if (n <= 0)
			return known;
		have += n;
		answer[have] = '\0';
		found = strstr(answer, key);
	} while (!found || !strchr(found, '\n'));
	known = strtoull(found + sizeof(key) - 1, NULL, 10);
	/* The rest of the answer, which ends with an empty line. */
	while (have < 4 || strcmp(answer + have - 2, "\r\n")) {
		ssize_t n = read(fd, answer + have, sizeof(answer) - 1 - have);

		if (n <= 0)
			break;
		have += n;
		answer[have] = '\0';
	}
	return known;
}

static uint64_t all_work(void)
{
	uint64_t sum = 0;

	if (workload == REDIS)
		return redis_work();
	for (unsigned int i = 0; i < nr_workers; i++)
		sum += __atomic_load_n(&workers[i].work, __ATOMIC_RELAXED);
	return sum;
}

static void *step_main(void *arg)
{
	(void)arg;
	for (;;) {
		struct timespec step = { .tv_nsec = BEAT_MS * BEATS_A_STEP * NS_PER_MS };

		nanosleep(&step, NULL);
		say("UMEM-GUEST step t_ms=%lld work=%llu\n", now_ms(),
		    (unsigned long long)all_work());
	}
	return NULL;
}

static void *beat_main(void *arg)
{
	(void)arg;
	for (;;) {
		struct timespec beat = { .tv_nsec = BEAT_MS * NS_PER_MS };

		nanosleep(&beat, NULL);
		say("UMEM-GUEST beat\n");
	}
	return NULL;
}

static void verdict(void)
{
	size_t bad = 0;

	pthread_mutex_lock(&lock);
	hold = true;
	for (unsigned int i = 0; i < nr_workers; i++)
		while (!workers[i].parked)
			pthread_cond_wait(&changed, &lock);
	pthread_mutex_unlock(&lock);
	for (size_t page = 0; page < nr_pages; page++)
		bad += page_is_bad(page);
	pthread_mutex_lock(&lock);
	hold = false;
	pthread_cond_broadcast(&changed);
	pthread_mutex_unlock(&lock);
	say("UMEM-GUEST verdict %s rounds=0 pages=%zu bad=%zu\n", bad ? "corrupt" : "ok",
	    nr_pages, bad);
}

/* Threads that keep time go before those that work. */
static void start(pthread_t *thread, void *(*run)(void *), void *arg, int priority)
{
	struct sched_param param = { .sched_priority = priority };

	if (pthread_create(thread, NULL, run, arg))
		die("thread");
	if (priority)
		pthread_setschedparam(*thread, SCHED_FIFO, &param);
}

static void make_array(unsigned long mib)
{
	nr_pages = mib * 1024 * 1024 / PAGE_BYTES;
	array = mmap(NULL, nr_pages * PAGE_BYTES, PROT_READ | PROT_WRITE,
		     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	generation = calloc(nr_pages, sizeof(*generation));
	if (array == MAP_FAILED || !generation)
		die("memory");
	for (size_t page = 0; page < nr_pages; page++) {
		generation[page] = 1;
		for (size_t i = 0; i < PAGE_WORDS; i++)
			array[page * PAGE_WORDS + i] = word_of(page, 1, i);
	}
}

int main(int argc, char **argv)
{
	pthread_t beats, steps;
	char line[64];
	long nr;

	if (argc != 4) {
		say("UMEM-GUEST fatal usage: WORKLOAD VCPUS MIB\n");
		return 2;
	}
	for (workload = IDLE; strcmp(names[workload], argv[1]); workload++) {
		if (workload == REDIS) {
			say("UMEM-GUEST fatal unknown workload %s\n", argv[1]);
			return 2;
		}
	}
	nr = strtol(argv[2], NULL, 10);
	if (nr < 1 || nr > MAX_THREADS || strtol(argv[3], NULL, 10) < 1) {
		say("UMEM-GUEST fatal vCPUs or MiB out of range\n");
		return 2;
	}
	make_array(strtoul(argv[3], NULL, 10));
	nr_workers = workload == IDLE || workload == REDIS ? 0 : nr;
	for (unsigned int i = 0; i < nr_workers; i++) {
		struct worker *w = &workers[i];
		bool whole = workload == COMPUTE;

		w->random = 88172645463325252ULL + i;
		w->first = whole ? 0 : nr_pages * i / nr_workers;
		w->end = whole ? nr_pages : nr_pages * (i + 1) / nr_workers;
		start(&w->thread, worker_main, w, 0);
	}
	start(&beats, beat_main, NULL, 20);
	start(&steps, step_main, NULL, 10);
	say("UMEM-GUEST ready\n");
	for (;;) {
		/* A serial line that hung up comes back some day. */
		if (!fgets(line, sizeof(line), stdin)) {
			clearerr(stdin);
			sleep(1);
		} else if (!strncmp(line, "verdict", 7)) {
			verdict();
		}
	}
}

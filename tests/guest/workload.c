// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The program that runs in the guest that is migrated: it makes load and knows
 * whether its memory is still its own.
 *
 *	workload [--debug] WORKLOAD WRITERS MIB
 *
 * WORKLOAD is one of
 *
 * verify  every writer thread owns a part of the array.  Round after round it
 *	   goes over its pages in order, checks all words of a page for exactly
 *	   what it wrote there last, and writes what belongs to the next
 *	   generation.  Zeros, an older generation, another page's content and
 *	   any mix of them are bad.
 * ab	   one thread increments byte 0 of every page in order, round after
 *	   round, and touches nothing else: seen at any step, the bytes never
 *	   rise along the range and differ by one step at most.
 * idle	   the array is written once, and read only when a verdict is asked for.
 *
 * It talks on standard output, one message a line, prefix "UMEM-GUEST ", and
 * takes commands as lines on standard input:
 *
 * verdict   check every page now and print the verdict over the whole life
 * stop	     writers stop; what they wrote stays checked by verdict
 * go	     writers go on
 * beat N    print a short line each N ms, 0 for none.  The clock of a stopped
 *	     machine stands still, so that only the reader of these lines can
 *	     tell how long the guest was away.
 *
 * and with --debug, which tests of this program use, corrupt KIND PAGE: spoil
 * a page behind the writers' backs (zero, flip, foreign, half, old).
 */
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define PAGE_BYTES	4096UL
#define PAGE_WORDS	(PAGE_BYTES / sizeof(uint64_t))
#define MAX_WRITERS	64
#define MAX_BAD_LINES	20
#define PASS_LINE_MS	500
#define NS_PER_MS	1000000LL

enum workload { VERIFY, AB, IDLE };

struct writer {
	pthread_t thread;
	/* The part of the array that it owns: pages first <= page < end. */
	size_t first;
	size_t end;
	/*
	 * Pages before next hold generation gen, the others gen - 1.  Written
	 * by the owner alone, read by others while it is parked.
	 */
	size_t next;
	uint64_t gen;
	/* The last verdict it took part in. */
	unsigned int checked;
	bool parked;
};

static enum workload workload;
static uint64_t *array;
static size_t nr_pages;
static struct writer writers[MAX_WRITERS];
static unsigned int nr_writers;

/*
 * All below is under lock.  wish says what the main thread wants: writers park
 * between two pages while hold is not zero, and check their part once for each
 * new value of verdicts.
 */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static unsigned int hold;
static bool stopped;
static unsigned int verdicts;
static uint64_t nr_bad;
static unsigned int bad_lines;

/* Writers look at this between two pages; it spares them the lock. */
static volatile bool attention;

static pthread_mutex_t out_lock = PTHREAD_MUTEX_INITIALIZER;
/* Largest gap between two ticks, in ns; taken and reset by the reporter. */
static long long max_gap_ns;
static volatile long beat_ms;

static void say(const char *format, ...)
	__attribute__((format(printf, 1, 2)));

static void say(const char *format, ...)
{
	char line[256];
	size_t done = 0;
	va_list args;
	int len;

	va_start(args, format);
	len = vsnprintf(line, sizeof(line) - 1, format, args);
	va_end(args);
	if (len < 0)
		return;
	if ((size_t)len > sizeof(line) - 2)
		len = sizeof(line) - 2;
	line[len++] = '\n';

	pthread_mutex_lock(&out_lock);
	while (done < (size_t)len) {
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
	say("UMEM-GUEST fatal %s: %s", what, strerror(errno));
	exit(1);
}

static long long now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * 1000 * NS_PER_MS + ts.tv_nsec;
}

static uint64_t mix(uint64_t x)
{
	x ^= x >> 30;
	x *= 0xbf58476d1ce4e5b9ULL;
	x ^= x >> 27;
	x *= 0x94d049bb133111ebULL;
	return x ^ (x >> 31);
}

/* Word i of a page is base + i * step: no two words, pages or generations agree. */
static uint64_t page_base(size_t page, uint64_t gen)
{
	return mix(mix(gen + 0x9e3779b97f4a7c15ULL) + page);
}

#define WORD_STEP	0x9e3779b97f4a7c15ULL

static uint64_t *page_words(size_t page)
{
	return array + page * PAGE_WORDS;
}

static void page_write(size_t page, uint64_t gen)
{
	volatile uint64_t *words = page_words(page);
	uint64_t value = page_base(page, gen);

	for (size_t i = 0; i < PAGE_WORDS; i++, value += WORD_STEP)
		words[i] = value;
}

static void count_bad(size_t page, size_t word, uint64_t want, uint64_t got)
{
	bool tell;

	pthread_mutex_lock(&lock);
	nr_bad++;
	tell = bad_lines < MAX_BAD_LINES;
	if (tell)
		bad_lines++;
	pthread_mutex_unlock(&lock);
	if (tell)
		say("UMEM-GUEST bad page=%zu word=%zu expected=%016llx got=%016llx",
		    page, word, (unsigned long long)want, (unsigned long long)got);
}

static bool page_check(size_t page, uint64_t gen)
{
	volatile uint64_t *words = page_words(page);
	uint64_t value = page_base(page, gen);

	for (size_t i = 0; i < PAGE_WORDS; i++, value += WORD_STEP) {
		uint64_t got = words[i];

		if (got != value) {
			count_bad(page, i, value, got);
			return false;
		}
	}
	return true;
}

static uint64_t writer_gen(const struct writer *w, size_t page)
{
	return page < w->next ? w->gen : w->gen - 1;
}

/* A page that was bad is put right, so that it is counted once. */
static void check_part(struct writer *w)
{
	if (workload == AB) {
		/* Byte 0 of each page against the step that the writer is at. */
		for (size_t page = w->first; page < w->end; page++) {
			volatile uint8_t *byte = (uint8_t *)page_words(page);
			uint8_t want = writer_gen(w, page);
			uint8_t got = *byte;

			if (got != want) {
				count_bad(page, 0, want, got);
				*byte = want;
			}
		}
		return;
	}
	for (size_t page = w->first; page < w->end; page++) {
		uint64_t gen = writer_gen(w, page);

		if (!page_check(page, gen))
			page_write(page, gen);
	}
}

/*
 * The rule of the a-b test by itself, with no knowledge of the round: along the
 * range the bytes never rise, and fall by one at most, once (all modulo 256).
 */
static void check_monotone(void)
{
	unsigned int falls = 0;
	uint8_t last = *(volatile uint8_t *)page_words(0);

	for (size_t page = 1; page < nr_pages; page++) {
		uint8_t byte = *(volatile uint8_t *)page_words(page);

		if (byte == last)
			continue;
		falls++;
		if ((uint8_t)(last - byte) != 1 || falls > 1)
			count_bad(page, 0, last, byte);
		last = byte;
	}
}

/* Parks while the main thread wants it, checks the own part when it asks. */
static void writer_attend(struct writer *w)
{
	pthread_mutex_lock(&lock);
	while (hold || stopped || w->checked != verdicts) {
		if (hold || w->checked == verdicts) {
			w->parked = true;
			pthread_cond_broadcast(&changed);
			pthread_cond_wait(&changed, &lock);
			w->parked = false;
			continue;
		}
		pthread_mutex_unlock(&lock);
		check_part(w);
		pthread_mutex_lock(&lock);
		w->checked = verdicts;
		pthread_cond_broadcast(&changed);
	}
	pthread_mutex_unlock(&lock);
}

static uint64_t whole_rounds(void)
{
	uint64_t rounds = UINT64_MAX;

	for (unsigned int i = 0; i < nr_writers; i++) {
		uint64_t gen = __atomic_load_n(&writers[i].gen, __ATOMIC_RELAXED) - 1;

		if (gen < rounds)
			rounds = gen;
	}
	return rounds;
}

/* After a round of one writer: say so once all have done it, not too often. */
static void told_round(void)
{
	static uint64_t told;
	static long long told_ns;
	uint64_t rounds = whole_rounds();
	long long now = now_ns();
	uint64_t bad = 0;
	bool tell;

	pthread_mutex_lock(&lock);
	tell = rounds > told && now - told_ns >= PASS_LINE_MS * NS_PER_MS;
	if (tell) {
		told = rounds;
		told_ns = now;
		bad = nr_bad;
	}
	pthread_mutex_unlock(&lock);
	if (tell)
		say("UMEM-GUEST verify round=%llu pages=%zu bad=%llu",
		    (unsigned long long)rounds, nr_pages, (unsigned long long)bad);
}

static void *writer_main(void *arg)
{
	struct writer *w = arg;

	for (;;) {
		if (attention)
			writer_attend(w);
		if (workload == AB) {
			volatile uint8_t *byte = (uint8_t *)page_words(w->next);

			*byte = *byte + 1;
		} else if (workload == VERIFY) {
			page_check(w->next, w->gen - 1);
			page_write(w->next, w->gen);
		} else {
			pthread_mutex_lock(&lock);
			attention = true;
			stopped = true;
			pthread_mutex_unlock(&lock);
			continue;
		}
		if (++w->next == w->end) {
			w->next = w->first;
			__atomic_fetch_add(&w->gen, 1, __ATOMIC_RELAXED);
			told_round();
		}
	}
	return NULL;
}

/* Under lock: no writer is between its two pages any more. */
static void hold_writers(void)
{
	hold++;
	attention = true;
	for (unsigned int i = 0; i < nr_writers; i++)
		while (!writers[i].parked)
			pthread_cond_wait(&changed, &lock);
}

static void release_writers(void)
{
	hold--;
	attention = hold || stopped;
	pthread_cond_broadcast(&changed);
}

static void do_verdict(void)
{
	uint64_t bad, rounds;

	pthread_mutex_lock(&lock);
	verdicts++;
	attention = true;
	pthread_cond_broadcast(&changed);
	for (unsigned int i = 0; i < nr_writers; i++)
		while (writers[i].checked != verdicts)
			pthread_cond_wait(&changed, &lock);
	if (workload == AB) {
		hold_writers();
		pthread_mutex_unlock(&lock);
		check_monotone();
		pthread_mutex_lock(&lock);
		release_writers();
	}
	attention = hold || stopped;
	bad = nr_bad;
	pthread_mutex_unlock(&lock);
	rounds = whole_rounds();
	say("UMEM-GUEST verdict %s rounds=%llu pages=%zu bad=%llu",
	    bad ? "corrupt" : "ok", (unsigned long long)rounds, nr_pages,
	    (unsigned long long)bad);
}

static struct writer *owner_of(size_t page)
{
	for (unsigned int i = 0; i < nr_writers; i++)
		if (page >= writers[i].first && page < writers[i].end)
			return &writers[i];
	return NULL;
}

/* Spoils a page for the tests of this program, while the writers are parked. */
static void do_corrupt(const char *kind, size_t page)
{
	static uint8_t old[PAGE_BYTES];
	uint8_t *bytes = (uint8_t *)page_words(page);
	struct writer *w = owner_of(page);
	uint64_t gen;

	if (!w) {
		say("UMEM-GUEST error no page %zu", page);
		return;
	}
	pthread_mutex_lock(&lock);
	hold_writers();
	if (!strcmp(kind, "zero")) {
		memset(bytes, 0, PAGE_BYTES);
	} else if (!strcmp(kind, "flip")) {
		bytes[PAGE_BYTES / 2] ^= 1;
	} else if (!strcmp(kind, "foreign")) {
		memcpy(bytes, page_words(page ? page - 1 : page + 1), PAGE_BYTES);
	} else if (!strcmp(kind, "half")) {
		memset(bytes + PAGE_BYTES / 2, 0, PAGE_BYTES / 2);
	} else if (!strcmp(kind, "old")) {
		memcpy(old, bytes, PAGE_BYTES);
		gen = writer_gen(w, page);
		while (writer_gen(w, page) == gen) {
			release_writers();
			pthread_mutex_unlock(&lock);
			usleep(1000);
			pthread_mutex_lock(&lock);
			hold_writers();
		}
		memcpy(bytes, old, PAGE_BYTES);
	} else {
		say("UMEM-GUEST error no kind %s", kind);
	}
	release_writers();
	pthread_mutex_unlock(&lock);
}

static void *clock_main(void *arg)
{
	long long last = now_ns();

	(void)arg;
	for (;;) {
		struct timespec ms = { .tv_nsec = NS_PER_MS };
		long long now, gap;

		nanosleep(&ms, NULL);
		now = now_ns();
		gap = now - last;
		last = now;
		if (gap > __atomic_load_n(&max_gap_ns, __ATOMIC_RELAXED))
			__atomic_store_n(&max_gap_ns, gap, __ATOMIC_RELAXED);
	}
	return NULL;
}

/* Prints the ticks, apart from the clock, whose gaps a slow line would be. */
static void *report_main(void *arg)
{
	long long next_tick = now_ns() + 1000 * NS_PER_MS;

	(void)arg;
	for (;;) {
		long beat = beat_ms;
		long sleep_ms = beat > 0 ? beat : 50;
		struct timespec ts = {
			.tv_sec = sleep_ms / 1000,
			.tv_nsec = sleep_ms % 1000 * NS_PER_MS,
		};

		nanosleep(&ts, NULL);
		if (now_ns() >= next_tick) {
			long long gap = __atomic_exchange_n(&max_gap_ns, 0,
							    __ATOMIC_RELAXED);

			say("UMEM-GUEST tick t_ms=%lld max_gap_ms=%lld",
			    now_ns() / NS_PER_MS, gap / NS_PER_MS);
			next_tick = now_ns() + 1000 * NS_PER_MS;
		} else if (beat > 0) {
			say("UMEM-GUEST beat");
		}
	}
	return NULL;
}

/* Threads that keep time go before the writers, also on a single vCPU. */
static void start_urgent(pthread_t *thread, void *(*run)(void *), int priority)
{
	struct sched_param param = { .sched_priority = priority };

	if (pthread_create(thread, NULL, run, NULL))
		die("thread");
	/* Not permitted to an ordinary user, as on a developer's machine. */
	pthread_setschedparam(*thread, SCHED_FIFO, &param);
}

static void set_stopped(bool value)
{
	pthread_mutex_lock(&lock);
	stopped = value;
	attention = hold || stopped;
	pthread_cond_broadcast(&changed);
	pthread_mutex_unlock(&lock);
}

static void serve_commands(bool debug)
{
	char line[128], kind[16];
	unsigned long page;
	long ms;

	for (;;) {
		if (!fgets(line, sizeof(line), stdin)) {
			if (debug)
				exit(0);
			/* A serial line that hung up comes back some day. */
			clearerr(stdin);
			sleep(1);
			continue;
		}
		line[strcspn(line, "\r\n")] = '\0';
		if (!strcmp(line, "verdict"))
			do_verdict();
		else if (!strcmp(line, "stop"))
			set_stopped(true);
		else if (!strcmp(line, "go"))
			set_stopped(false);
		else if (sscanf(line, "beat %ld", &ms) == 1)
			beat_ms = ms;
		else if (debug && sscanf(line, "corrupt %15s %lu", kind, &page) == 2)
			do_corrupt(kind, page);
		else if (line[0])
			say("UMEM-GUEST error unknown command");
	}
}

static void make_array(unsigned long mib)
{
	nr_pages = mib * 1024 * 1024 / PAGE_BYTES;
	array = mmap(NULL, nr_pages * PAGE_BYTES, PROT_READ | PROT_WRITE,
		     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (array == MAP_FAILED)
		die("mmap");
	for (size_t page = 0; page < nr_pages; page++) {
		if (workload == AB)
			/* Byte 0 holds generation 1; the rest stays zero. */
			*(volatile uint8_t *)page_words(page) = 1;
		else
			page_write(page, 1);
	}
}

int main(int argc, char **argv)
{
	bool debug = argc > 1 && !strcmp(argv[1], "--debug");
	struct sched_param param = { .sched_priority = 1 };
	pthread_t clock_thread, report_thread;
	unsigned long mib;

	argv += debug;
	argc -= debug;
	if (argc != 4) {
		say("UMEM-GUEST fatal usage: [--debug] verify|ab|idle WRITERS MIB");
		return 2;
	}
	if (!strcmp(argv[1], "verify")) {
		workload = VERIFY;
	} else if (!strcmp(argv[1], "ab")) {
		workload = AB;
	} else if (!strcmp(argv[1], "idle")) {
		workload = IDLE;
	} else {
		say("UMEM-GUEST fatal unknown workload %s", argv[1]);
		return 2;
	}
	nr_writers = strtoul(argv[2], NULL, 10);
	mib = strtoul(argv[3], NULL, 10);
	/* The a-b rule speaks of one writer. */
	if (workload != VERIFY)
		nr_writers = 1;
	if (nr_writers < 1 || nr_writers > MAX_WRITERS || mib < 1 || mib > 1 << 20) {
		say("UMEM-GUEST fatal writers or MiB out of range");
		return 2;
	}

	make_array(mib);
	say("UMEM-GUEST ready");
	for (unsigned int i = 0; i < nr_writers; i++) {
		struct writer *w = &writers[i];

		w->first = nr_pages * i / nr_writers;
		w->end = nr_pages * (i + 1) / nr_writers;
		w->next = w->first;
		w->gen = 2;
		if (pthread_create(&w->thread, NULL, writer_main, w))
			die("thread");
	}
	start_urgent(&clock_thread, clock_main, 20);
	start_urgent(&report_thread, report_main, 10);
	pthread_setschedparam(pthread_self(), SCHED_FIFO, &param);
	serve_commands(debug);
	return 0;
}

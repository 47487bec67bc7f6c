// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * fuzz SECONDS SEED: every call of the driver, with arguments that are right, on the
 * edge, or garbage, by many threads and processes at a time.
 *
 * A supervisor keeps a few processes running and kills some.  Each has threads that
 * do random things to areas and to mappings of them, and fork children that do the
 * same; one thread serves what is asked for.  Processes find each other's areas by
 * UMEM_DEV_LIST, and open, map and take them over.
 *
 * The same seed gives the same choices of each process, not the same interleaving.
 *
 * What is checked:
 *  - every call of the driver gives success or an error that umem.h names for it;
 *  - what it says makes sense: no count above the size, no bit past the end, no
 *    request outside the area;
 *  - memory: the middle of each area is served honestly, by whoever serves it: it
 *    is filled with a content that is a function of area, page and word before it is
 *    marked.  A consumer that gets a word from there must get that one.  The outer
 *    parts are fair game: marked unfilled, written, discarded;
 *  - nobody survives SIGKILL, nothing hangs, no area is left at the end.
 *
 * Two rules keep the checks free of races in this program itself.  A descriptor's
 * number is never used again in a process, so that closing one under another
 * thread's hands cannot have it mark or fill another area.  And each thread alone maps
 * and unmaps in its window, a piece of address space that nobody else gets.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/falloc.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <linux/umem.h>

#define PAGE 4096UL
#define WORDS (PAGE / 8)
#define NR_PROCS 3
#define NR_THREADS 5
#define NR_SLOTS 6
#define WINDOW 1536UL		/* pages of address space of one thread */
#define HUGE 512UL
#define MAX_PAGES 2048UL	/* of areas that are played with */
#define ALIVE_MAX 40		/* areas; memory is not what is tested */
#define CHILD_OPS 60
#define HANG_SECONDS 60

#define ARRAY_SIZE(a) (sizeof(a) / sizeof(*(a)))

/* What a descriptor is: decides which errors are right. */
enum kind { CONTROL, SERVER, BACKING, NODE, AFILE, NR_KINDS };

enum op {
	OP_CREATE, OP_INIT, OP_LIST, OP_REATTACH, OP_GET, OP_MARK, OP_POISON, OP_INFO,
	OP_LOSS, OP_BITMAP, OP_PLAIN, OP_STATS, OP_READ, OP_WRITE, OP_POLL, OP_GARBAGE,
	OP_MMAP, OP_MUNMAP, OP_MREMAP, OP_MPROTECT, OP_MADVISE, OP_MLOCK, OP_FALLOCATE,
	OP_TRUNCATE, OP_TOUCH, OP_STORE, OP_KERNEL, OP_FORK, OP_CLOSE, OP_OPEN, OP_LOG,
	OP_DIRTY, NR_OPS
};

static const char *const op_names[NR_OPS] = {
	"create", "init", "list", "reattach", "get", "mark", "poison", "info",
	"loss", "bitmap", "plain", "stats", "read", "write", "poll", "garbage",
	"mmap", "munmap", "mremap", "mprotect", "madvise", "mlock", "fallocate",
	"truncate", "touch", "store", "kernel", "fork", "close", "open", "log",
	"dirty",
};

/* What all processes share. */
struct shared {
	volatile int stop;
	unsigned long bad;
	unsigned long done[NR_OPS];
	unsigned long failed[NR_OPS];
	unsigned long checked;		/* words that had to be right, and were looked at */
	unsigned long served;
};

/* An area as one process has it; a snapshot is taken and used without the lock. */
struct slot {
	uint64_t npages;
	uint32_t id;
	uint32_t order;
	int fd[NR_KINDS];		/* -1: not open, or closed */
	bool init;			/* of UMEM_INIT: the node is the control file too */
};

/* What a page of a window shows. */
struct shown {
	uint32_t id;
	uint32_t pgoff;
	uint8_t what;
};

/* SERVERS: the backing file, which is neither checked nor written. */
enum { NOTHING, HONEST, WILD, SERVERS };

struct worker {
	pthread_t thread;
	unsigned int state;
	uint64_t *window;
	struct shown shown[WINDOW];
	uint64_t page[WORDS];		/* to fill from */
	bool child;
};

static struct shared *shared;
static struct slot slots[NR_SLOTS];
static pthread_mutex_t slots_lock = PTHREAD_MUTEX_INITIALIZER;
static struct worker workers[NR_THREADS];
static int next_fd = 300, last_fd;
static char mount_point[64];
static unsigned long seed;
static pid_t supervisor;

static __thread sigjmp_buf escape;
static __thread volatile int armed;

/* ---- saying so ---- */

static void say(const char *format, ...)
{
	char text[400];
	va_list args;
	int len;

	va_start(args, format);
	len = vsnprintf(text, sizeof(text), format, args);
	va_end(args);
	if (len > (int)sizeof(text) - 1)
		len = sizeof(text) - 1;
	if (write(2, text, len) != len)
		_exit(9);
}

#define complain(format, ...) do {						\
	if (__atomic_add_fetch(&shared->bad, 1, __ATOMIC_RELAXED) <= 30)	\
		say("fuzz: seed %lu pid %d: " format "\n", seed, getpid(),	\
		    ##__VA_ARGS__);						\
} while (0)

static void die(const char *what)
{
	say("fuzz: seed %lu: %s: %s\n", seed, what, strerror(errno));
	_exit(2);
}

/* ---- choices ---- */

static unsigned int roll(struct worker *w, unsigned int sides)
{
	return rand_r(&w->state) % sides;
}

static uint64_t garbage(struct worker *w)
{
	static const uint64_t edges[] = {
		0, 1, 2, 63, 64, 65, 511, 512, 4095, 4096, 4097, 1UL << 20, 1UL << 31,
		(1UL << 31) - 1, 1UL << 32, (1UL << 32) - 1, 1UL << 51, 1UL << 52, 1UL << 63,
		(1UL << 63) - 1, -1UL, -2UL, -4096UL, -4095UL, -64UL,
	};

	switch (roll(w, 3)) {
	case 0:
		return (uint64_t)rand_r(&w->state) << 40 ^ (uint64_t)rand_r(&w->state) << 20 ^
		       rand_r(&w->state);
	case 1:
		return edges[roll(w, ARRAY_SIZE(edges))] + roll(w, 3) - 1;
	default:
		return edges[roll(w, ARRAY_SIZE(edges))];
	}
}

/* An address where nothing is. */
static void *bad_pointer(struct worker *w)
{
	static const uint64_t edges[] = {
		0, 8, 4096, 1UL << 47, (1UL << 47) - 8, 0xffff800000000000UL, -8UL, -4096UL,
	};

	return (void *)edges[roll(w, ARRAY_SIZE(edges))];
}

static bool may_be_written(const struct worker *w, unsigned long page)
{
	return w->shown[page].what == NOTHING || w->shown[page].what == WILD;
}

/*
 * Or one across two pages, of which each may be missing, or not there; for a structure
 * that neither does harm when it is read from there nor is longer than a page.
 */
static void *odd_pointer(struct worker *w)
{
	unsigned long page = roll(w, WINDOW - 1);

	if (roll(w, 2) || !may_be_written(w, page) || !may_be_written(w, page + 1))
		return bad_pointer(w);
	return w->window + page * WORDS + WORDS - 1;
}

/* ---- errors ---- */

#define ERRORS(...) ((const int[]){ __VA_ARGS__, 0 })

/*
 * Count a call and judge its error.  A descriptor that another thread has closed, and
 * memory that there is not enough of, are always right.
 */
static bool judge(enum op op, bool ok, const int *allowed, const char *what)
{
	int error = errno;

	__atomic_add_fetch(ok ? &shared->done[op] : &shared->failed[op], 1, __ATOMIC_RELAXED);
	if (ok || error == EBADF || error == ENOMEM)
		return ok;
	for (; *allowed; allowed++)
		if (*allowed == error)
			return false;
	complain("%s %s gives %d (%s)", op_names[op], what, error, strerror(error));
	return false;
}

static const char *const kind_names[NR_KINDS] = {
	"on control", "on server", "on backing", "on node", "on file",
};

/* The same for an ioctl of servers, on a kind of file that may not know it. */
static bool judge_ioctl(enum op op, bool ok, enum kind kind, const int *allowed)
{
	if (!ok && errno == ENOTTY && kind != SERVER && kind != CONTROL) {
		__atomic_add_fetch(&shared->failed[op], 1, __ATOMIC_RELAXED);
		return false;
	}
	if (ok && kind != CONTROL && kind != SERVER)
		complain("%s works %s", op_names[op], kind_names[kind]);
	return judge(op, ok, allowed, kind_names[kind]);
}

/* ---- areas ---- */

static uint64_t content(uint32_t id, uint32_t page, uint32_t word)
{
	uint64_t x = (uint64_t)id << 40 ^ (uint64_t)page << 16 ^ word;

	x = (x + 0x9E3779B97F4A7C15UL) * 0xBF58476D1CE4E5B9UL;
	return x ^ x >> 31 ^ 1;
}

/* The honest part of an area: the half in its middle, in whole granules. */
static uint64_t honest_from(const struct slot *s)
{
	uint64_t granule = 1UL << s->order;

	return (s->npages / 4 + granule - 1) & -granule;
}

static uint64_t honest_to(const struct slot *s)
{
	return (s->npages / 4 * 3) & -(1UL << s->order);
}

static bool is_honest(const struct slot *s, uint64_t page)
{
	return page >= honest_from(s) && page < honest_to(s);
}

static bool is_inside(const struct slot *s, uint64_t start, uint64_t count)
{
	return count && count <= s->npages && start <= s->npages - count;
}

static bool is_wild(const struct slot *s, uint64_t start, uint64_t count)
{
	return start + count <= honest_from(s) || start >= honest_to(s);
}

/* Fill what is honest of a range.  Somebody else may just be doing the same. */
static bool fill(struct worker *w, const struct slot *s, uint64_t start, uint64_t count)
{
	uint64_t page;
	unsigned int n;

	for (page = start; page < start + count; page++) {
		if (!is_honest(s, page))
			continue;
		for (n = 0; n < WORDS; n++)
			w->page[n] = content(s->id, page, n);
		if (pwrite(s->fd[BACKING], w->page, PAGE, page * PAGE) != (ssize_t)PAGE)
			return false;
	}
	return true;
}

/* Move a descriptor to a number that was never used. */
static int unique_fd(int fd)
{
	int moved;

	if (fd < 0)
		return fd;
	moved = fcntl(fd, F_DUPFD_CLOEXEC, __atomic_fetch_add(&next_fd, 1, __ATOMIC_RELAXED));
	close(fd);
	return moved;
}

static bool take_slot(struct worker *w, struct slot *s)
{
	if (pthread_mutex_trylock(&slots_lock))
		return false;
	*s = slots[roll(w, NR_SLOTS)];
	pthread_mutex_unlock(&slots_lock);
	return s->npages;
}

static void close_slot(const struct slot *s)
{
	int kind;

	for (kind = 0; kind < NR_KINDS; kind++)
		if (s->fd[kind] >= 0)
			close(s->fd[kind]);
}

/* Put an area into some slot and close what was there, whoever is using it. */
static void put_slot(struct worker *w, struct slot *s)
{
	struct slot old;
	unsigned int n = roll(w, NR_SLOTS);

	if (pthread_mutex_trylock(&slots_lock)) {
		close_slot(s);
		return;
	}
	old = slots[n];
	slots[n] = *s;
	pthread_mutex_unlock(&slots_lock);
	if (old.npages)
		close_slot(&old);
}

static int any_fd(struct worker *w, const struct slot *s, enum kind *kind, enum kind usual)
{
	int fd;

	*kind = roll(w, 12) ? usual : (enum kind)roll(w, NR_KINDS);
	fd = s->fd[*kind];
	if (s->init && *kind == NODE)
		*kind = CONTROL;
	return fd;
}

static uint32_t order_of(uint32_t granule)
{
	return __builtin_ctz(granule) - 12;
}

static void open_faces(struct worker *w, struct slot *s, const char *name)
{
	char path[128];

	snprintf(path, sizeof(path), "/dev/umem%u", s->id);
	s->fd[NODE] = unique_fd(open(path, O_RDWR | O_CLOEXEC));
	if (name && roll(w, 2)) {
		snprintf(path, sizeof(path), "%s/%s", mount_point, name);
		s->fd[AFILE] = unique_fd(open(path, O_RDWR | O_CLOEXEC));
	}
}

static void set_mode(struct worker *w, int fd)
{
	/* A server that may sleep in read() is for killing. */
	if (roll(w, 16))
		fcntl(fd, F_SETFL, O_RDWR | O_NONBLOCK);
}

static uint32_t count_alive(int control)
{
	struct umem_list list = { 0 };

	return ioctl(control, UMEM_DEV_LIST, &list) ? 0 : list.total;
}

/* ---- calls on the control node ---- */

static void do_create(struct worker *w)
{
	static const int errors[] = { EINVAL, EEXIST, EBUSY, EOPNOTSUPP, EDQUOT, EMFILE, ENFILE,
				      ENOSPC, EFAULT, 0 };
	struct slot s = { .fd = { -1, -1, -1, -1, -1 } };
	struct umem_create arg = { 0 };
	int control = open("/dev/umem", O_RDWR | O_CLOEXEC), ret;

	if (control < 0 || count_alive(control) > ALIVE_MAX) {
		close(control);
		return;
	}
	arg.size = (8 + roll(w, 200)) * PAGE;
	snprintf(arg.name, sizeof(arg.name), "fuzz.%d.%u", getpid(), rand_r(&w->state));
	arg.loss_timeout_ms = roll(w, 3) ? 200 + roll(w, 1000) : 0;
	if (!roll(w, 4))
		arg.size = (600 + roll(w, 1400)) * PAGE - roll(w, 2);
	if (!roll(w, 6))
		arg.granule_size = PAGE << roll(w, 10);
	if (!roll(w, 16)) {
		arg.flags = UMEM_CREATE_HUGE;
		arg.granule_size = 2 << 20;
		arg.size = 4 << 20;
	}
	/* And now one thing that may be wrong. */
	switch (roll(w, 24)) {
	case 0:
		arg.size = garbage(w);
		break;
	case 1:
		arg.flags = garbage(w);
		break;
	case 2:
		arg.granule_size = garbage(w);
		break;
	case 3:
		arg.reserved[roll(w, 4)] = garbage(w);
		break;
	case 4:
		memset(arg.name, roll(w, 256), UMEM_NAME_MAX);
		break;
	case 5:
		arg.name[roll(w, UMEM_NAME_MAX)] = roll(w, 256);
		break;
	case 6:
		strcpy(arg.name, "fuzz.same");
		break;
	case 7:
		strcpy(arg.name, roll(w, 2) ? ".." : "");
		break;
	case 8:
		arg.loss_timeout_ms = garbage(w);
		break;
	case 9:
		ret = ioctl(control, UMEM_DEV_CREATE_UMEM, odd_pointer(w));
		judge(OP_CREATE, !ret, errors, "bad pointer");
		close(control);
		return;
	}
	ret = ioctl(control, UMEM_DEV_CREATE_UMEM, &arg);
	if (!judge(OP_CREATE, !ret, errors, "")) {
		close(control);
		return;
	}
	if (!arg.size || arg.size % arg.granule_size || arg.server_fd < 0 || arg.shmem_fd < 0)
		complain("create: size %llx granule %x", arg.size, arg.granule_size);
	s.npages = arg.size / PAGE;
	s.order = order_of(arg.granule_size);
	s.id = arg.id;
	set_mode(w, arg.server_fd);
	s.fd[CONTROL] = unique_fd(control);
	s.fd[SERVER] = unique_fd(arg.server_fd);
	s.fd[BACKING] = unique_fd(arg.shmem_fd);
	open_faces(w, &s, arg.name);
	if (s.npages > MAX_PAGES)
		close_slot(&s);
	else
		put_slot(w, &s);
}

static void do_init(struct worker *w)
{
	static const int errors[] = { EINVAL, EBUSY, EMFILE, ENFILE, ENOSPC, EFAULT, 0 };
	struct slot s = { .fd = { -1, -1, -1, -1, -1 } };
	struct umem_init arg = { .size = (8 + roll(w, 100)) * PAGE - roll(w, 2) };
	int control = open("/dev/umem", O_RDWR | O_CLOEXEC), ret;
	struct umem_info info;

	if (control < 0 || count_alive(control) > ALIVE_MAX) {
		close(control);
		return;
	}
	if (!roll(w, 8))
		arg.size = garbage(w);
	if (!roll(w, 8)) {
		ret = ioctl(control, UMEM_INIT, odd_pointer(w));
		judge(OP_INIT, !ret, errors, "bad pointer");
	}
	ret = ioctl(control, UMEM_INIT, &arg);
	if (!judge(OP_INIT, !ret, errors, "") || ioctl(control, UMEM_GET_INFO, &info)) {
		close(control);
		return;
	}
	if (arg.size != info.size || info.name[0] || info.flags & UMEM_INFO_NODE)
		complain("init: size %llx, info %llx", arg.size, info.size);
	if (!ioctl(control, UMEM_INIT, &arg) || errno != EBUSY)
		complain("init works twice");
	s.npages = arg.size / PAGE;
	s.id = info.id;
	s.init = true;
	set_mode(w, control);
	s.fd[CONTROL] = s.fd[SERVER] = unique_fd(control);
	/* It is the consumer's side too. */
	s.fd[NODE] = unique_fd(fcntl(s.fd[SERVER], F_DUPFD_CLOEXEC, 3));
	s.fd[BACKING] = unique_fd(arg.shmem_fd);
	if (s.npages > MAX_PAGES)
		close_slot(&s);
	else
		put_slot(w, &s);
}

static void check_info(const struct umem_info *info)
{
	uint64_t granules;

	if (info->granule_size < PAGE || info->size % info->granule_size) {
		complain("info: size %llx granule %x", info->size, info->granule_size);
		return;
	}
	granules = info->size / info->granule_size;
	if (info->nr_cached > granules)
		complain("info: %llu of %lu cached", info->nr_cached, granules);
	if (info->flags & ~31U || info->reserved[0] | info->reserved[1] | info->reserved[2] |
	    info->reserved[3])
		complain("info: flags %x or reserved", info->flags);
	if (!memchr(info->name, 0, sizeof(info->name)))
		complain("info: name without end");
}

/* Lists the areas; returns a description of one of them. */
static bool do_list(struct worker *w, struct umem_info *one)
{
	struct umem_info infos[ALIVE_MAX];
	struct umem_list arg = { .infos = (uintptr_t)infos, .nr = roll(w, ALIVE_MAX + 1) };
	int control = open("/dev/umem", O_RDWR | O_CLOEXEC);
	bool wrong = !roll(w, 16);
	unsigned int n;
	int ret;

	if (!roll(w, 8))
		arg.first_id = garbage(w);
	if (!roll(w, 12))
		arg.reserved[roll(w, 3)] = garbage(w);
	if (!roll(w, 12)) {
		arg.infos = (uintptr_t)bad_pointer(w);
		arg.nr = garbage(w);
	}
	ret = ioctl(control, UMEM_DEV_LIST, wrong ? odd_pointer(w) : &arg);
	close(control);
	if (!judge(OP_LIST, !ret, ERRORS(EINVAL, EFAULT), "") || wrong ||
	    arg.infos != (uintptr_t)infos)
		return false;
	if (arg.nr > ALIVE_MAX || arg.nr > arg.total)
		complain("list: %u of %u", arg.nr, arg.total);
	for (n = 0; n < arg.nr; n++) {
		check_info(&infos[n]);
		if (n && infos[n].id <= infos[n - 1].id)
			complain("list: %u after %u", infos[n].id, infos[n - 1].id);
	}
	if (!arg.nr)
		return false;
	*one = infos[roll(w, arg.nr)];
	return one->size <= MAX_PAGES * PAGE;
}

/* Take over, or only look at, an area that somebody made. */
static void do_reattach(struct worker *w)
{
	struct slot s = { .fd = { -1, -1, -1, -1, -1 } };
	struct umem_reattach arg = { 0 };
	struct umem_info info;
	int control, ret;

	if (!do_list(w, &info))
		return;
	arg.id = info.id;
	arg.flags = roll(w, 2) ? UMEM_REATTACH_FORCE : 0;
	switch (roll(w, 16)) {
	case 0:
		arg.flags = garbage(w);
		break;
	case 1:
		arg.reserved[roll(w, 5)] = garbage(w);
		break;
	case 2:
		arg.id = garbage(w);
		break;
	}
	control = open("/dev/umem", O_RDWR | O_CLOEXEC);
	ret = ioctl(control, UMEM_DEV_REATTACH, roll(w, 20) ? &arg : odd_pointer(w));
	if (!judge(OP_REATTACH, !ret,
		   ERRORS(ENOENT, EPERM, EBUSY, EINVAL, EMFILE, ENFILE, EFAULT), "")) {
		close(control);
		return;
	}
	if (!arg.size) {	/* it was not given this one */
		close(control);
		return;
	}
	s.npages = arg.size / PAGE;
	s.order = order_of(arg.granule_size);
	s.id = arg.id;
	set_mode(w, arg.server_fd);
	s.fd[CONTROL] = unique_fd(control);
	s.fd[SERVER] = unique_fd(arg.server_fd);
	s.fd[BACKING] = unique_fd(arg.shmem_fd);
	open_faces(w, &s, s.id == info.id && info.name[0] ? info.name : NULL);
	if (s.npages > MAX_PAGES)
		close_slot(&s);
	else
		put_slot(w, &s);
}

/* ---- calls on a server ---- */

#define SERVER_ERRORS ENODEV, ENXIO, EFAULT

static void check_request(const struct slot *s, uint64_t pgoff, uint64_t flags)
{
	if (pgoff >= s->npages || pgoff & ((1UL << s->order) - 1) ||
	    flags & ~(UMEM_REQUEST_ASYNC | UMEM_REQUEST_DISCARDED))
		complain("request for %lx of %lx, flags %lx", pgoff, s->npages, flags);
}

/* Serve a range honestly: returns 0 or -1, as ioctl() does. */
static int mark_range(struct worker *w, const struct slot *s, uint64_t start, uint64_t count,
		      uint32_t flags, uint64_t *nr_new)
{
	struct umem_page_range range = { start, count };
	struct umem_mark_cached arg = { .ranges = (uintptr_t)&range, .nr = 1, .flags = flags };
	int ret;

	if (!fill(w, s, start, count)) {
		errno = EBADF;
		return -1;
	}
	ret = ioctl(s->fd[SERVER], UMEM_MARK_PAGE_CACHED, &arg);
	*nr_new = arg.nr_new;
	return ret;
}

static void answer(struct worker *w, const struct slot *s, uint64_t pgoff)
{
	uint64_t nr_new;
	int ret = mark_range(w, s, pgoff, 1UL << s->order, roll(w, 2) ? UMEM_MARK_TOUCH : 0,
			     &nr_new);

	if (judge(OP_MARK, !ret, ERRORS(SERVER_ERRORS), "of a request"))
		__atomic_add_fetch(&shared->served, 1, __ATOMIC_RELAXED);
}

static void do_get(struct worker *w, const struct slot *s)
{
	struct umem_page_request requests[16];
	struct umem_page_requests arg = { .requests = (uintptr_t)requests };
	enum kind kind;
	int fd = any_fd(w, s, &kind, SERVER), ret;
	bool wrong = false;
	uint32_t n;

	arg.nr = 1 + roll(w, 16);
	switch (roll(w, 16)) {
	case 0:
		arg.nr = 0;
		break;
	case 1:
		arg.reserved = garbage(w);
		break;
	case 2:
		arg.requests = (uintptr_t)bad_pointer(w);
		arg.nr = garbage(w);
		wrong = true;
		break;
	}
	ret = ioctl(fd, UMEM_GET_PAGE_REQUEST, &arg);
	if (!judge_ioctl(OP_GET, !ret, kind,
			 ERRORS(EINVAL, EAGAIN, EINTR, SERVER_ERRORS)) || wrong)
		return;
	if (arg.nr > 16) {
		complain("get: %u", arg.nr);
		return;
	}
	for (n = 0; n < arg.nr; n++) {
		/* Of a control node in another slot, the area is not known. */
		if (kind != SERVER)
			return;
		check_request(s, requests[n].pgoff, requests[n].flags);
		if (roll(w, 4) && requests[n].pgoff < s->npages)
			answer(w, s, requests[n].pgoff);
	}
}

static void do_read(struct worker *w, const struct slot *s)
{
	uint64_t offsets[16];
	size_t len = roll(w, sizeof(offsets) + 1);
	enum kind kind;
	int fd = any_fd(w, s, &kind, SERVER);
	bool wrong = !roll(w, 12);
	ssize_t got, n;

	got = read(fd, wrong ? bad_pointer(w) : offsets, wrong ? garbage(w) : len);
	if (kind != SERVER) {
		judge(OP_READ, got >= 0,
		      ERRORS(EINVAL, EAGAIN, EINTR, SERVER_ERRORS), kind_names[kind]);
		return;
	}
	if (!judge(OP_READ, got >= 0, ERRORS(EINVAL, EAGAIN, EINTR, SERVER_ERRORS), "") || wrong)
		return;
	if (got % 8 || got > (ssize_t)len || !got)
		complain("read of %zu gives %zd", len, got);
	for (n = 0; n < got / 8; n++) {
		check_request(s, offsets[n], 0);
		if (roll(w, 4) && offsets[n] < s->npages)
			answer(w, s, offsets[n]);
	}
}

/* An offset; what is honest is filled before it is marked. */
static uint64_t an_offset(struct worker *w, const struct slot *s)
{
	uint64_t page = roll(w, s->npages) & -(1UL << s->order);

	if (!roll(w, 16))
		page = s->npages + roll(w, 3);
	if (!roll(w, 16))
		page = garbage(w);
	if (!roll(w, 24))
		page |= 1;
	return page;
}

static void do_write(struct worker *w, const struct slot *s)
{
	uint64_t offsets[40];
	size_t n, len = 1 + roll(w, ARRAY_SIZE(offsets));
	ssize_t put;

	for (n = 0; n < len; n++) {
		offsets[n] = an_offset(w, s);
		if (offsets[n] < s->npages &&
		    !fill(w, s, offsets[n] & -(1UL << s->order), 1UL << s->order))
			return;
	}
	len *= 8;
	if (!roll(w, 16))
		len -= roll(w, 8);
	put = write(s->fd[SERVER], roll(w, 16) ? offsets : bad_pointer(w), len);
	if (judge(OP_WRITE, put >= 0, ERRORS(EINVAL, SERVER_ERRORS), "") &&
	    (put % 8 || put > (ssize_t)len))
		complain("write of %zu gives %zd", len, put);
}

static void a_range(struct worker *w, const struct slot *s, struct umem_page_range *range)
{
	range->pgoff = roll(w, s->npages) & -(1UL << s->order);
	range->count = (1 + roll(w, 12)) << s->order;
	switch (roll(w, 24)) {
	case 0:
		range->pgoff = garbage(w);
		break;
	case 1:
		range->count = garbage(w);
		break;
	case 2:
		range->pgoff = 0;
		range->count = s->npages + roll(w, 2);
		break;
	case 3:
		range->count = 0;
		break;
	default:
		if (roll(w, 8) && !is_inside(s, range->pgoff, range->count))
			range->count = 1UL << s->order;
	}
}

static void do_mark(struct worker *w, const struct slot *s, bool poison)
{
	static struct umem_page_range many[UMEM_MARK_MAX + 1];
	struct umem_page_range ranges[8];
	struct umem_mark_cached arg = { .ranges = (uintptr_t)ranges, .nr = 1 + roll(w, 8) };
	unsigned long request = poison ? UMEM_MARK_PAGE_POISONED : UMEM_MARK_PAGE_CACHED;
	enum op op = poison ? OP_POISON : OP_MARK;
	enum kind kind;
	int fd = any_fd(w, s, &kind, SERVER), ret;
	uint64_t total = 0;
	void *argp = &arg;
	uint32_t n;

	/* That of another area, perhaps: it is not known what may be marked there. */
	if (kind == CONTROL)
		return;
	for (n = 0; n < arg.nr; n++) {
		a_range(w, s, &ranges[n]);
		/* A few poisoned pages are enough: the kernel reports each hit. */
		if (poison)
			ranges[n].count = roll(w, 8) ? 1UL << s->order : garbage(w);
		if (poison && is_inside(s, ranges[n].pgoff, ranges[n].count) &&
		    ranges[n].count > 4UL << s->order)
			ranges[n].count = 1UL << s->order;
		if (!poison && is_inside(s, ranges[n].pgoff, ranges[n].count) &&
		    !fill(w, s, ranges[n].pgoff, ranges[n].count))
			return;
		total += ranges[n].count;
	}
	arg.flags = roll(w, 2) && !poison ? UMEM_MARK_TOUCH : 0;
	switch (roll(w, 24)) {
	case 0:
		arg.flags = garbage(w);
		break;
	case 1:
		arg.ranges = (uintptr_t)many;
		arg.nr = UMEM_MARK_MAX + roll(w, 2);
		break;
	case 2:
		arg.nr = roll(w, 2) ? 0 : garbage(w);
		/* Nothing that lies somewhere may be taken for ranges that are right. */
		arg.ranges = (uintptr_t)bad_pointer(w);
		break;
	case 3:
		arg.ranges = (uintptr_t)bad_pointer(w);
		break;
	case 4:
		argp = bad_pointer(w);
		break;
	}
	ret = ioctl(fd, request, argp);
	if (judge_ioctl(op, !ret, kind, ERRORS(EINVAL, SERVER_ERRORS)) &&
	    arg.ranges == (uintptr_t)ranges && argp == &arg && arg.nr_new << s->order > total)
		complain("%s: %llu new of %lu", op_names[op], arg.nr_new, total >> s->order);
}

static void do_info(struct worker *w, const struct slot *s)
{
	struct umem_info info;
	enum kind kind;
	int fd = any_fd(w, s, &kind, SERVER);
	bool wrong = !roll(w, 16);
	int ret = ioctl(fd, UMEM_GET_INFO, wrong ? odd_pointer(w) : &info);

	if (!judge_ioctl(OP_INFO, !ret, kind, ERRORS(SERVER_ERRORS)) || wrong)
		return;
	check_info(&info);
	if (info.flags & UMEM_INFO_COMPLETE && !ioctl(fd, UMEM_GET_INFO, &info) &&
	    info.nr_cached != info.size / info.granule_size)
		complain("info: complete with %llu of %llu", info.nr_cached,
			 info.size / info.granule_size);
	if (kind == SERVER && (info.id != s->id || info.size != s->npages * PAGE))
		complain("info: area %u is %u", s->id, info.id);
}

static void do_loss(struct worker *w, const struct slot *s)
{
	struct umem_loss_policy arg = { .timeout_ms = roll(w, 4) ? 100 + roll(w, 1500) : 0 };
	enum kind kind;
	int fd = any_fd(w, s, &kind, SERVER), ret;

	if (!roll(w, 12))
		arg.reserved = garbage(w);
	if (!roll(w, 12))
		arg.timeout_ms = garbage(w);
	ret = ioctl(fd, UMEM_SET_LOSS_POLICY, roll(w, 16) ? &arg : odd_pointer(w));
	judge_ioctl(OP_LOSS, !ret, kind, ERRORS(EINVAL, SERVER_ERRORS));
}

static void do_bitmap(struct worker *w, const struct slot *s)
{
	uint64_t words[MAX_PAGES / 64 + 2], granules = s->npages >> s->order, set = 0;
	struct umem_bitmap arg = {
		.words = (uintptr_t)words,
		.nr_words = (granules + 63) / 64,
		.which = roll(w, 3),
	};
	uint64_t all = arg.nr_words;
	struct umem_info info = { 0 };
	enum kind kind;
	int fd = any_fd(w, s, &kind, SERVER), ret;
	uint32_t n;

	/* What was cached before the bitmap is read is in it. */
	ioctl(fd, UMEM_GET_INFO, &info);
	switch (roll(w, 12)) {
	case 0:
		arg.first = garbage(w);
		break;
	case 1:
		arg.nr_words += roll(w, 3);
		break;
	case 2:
		arg.which = garbage(w);
		break;
	case 3:
		arg.reserved = garbage(w);
		break;
	case 4:
		arg.words = (uintptr_t)odd_pointer(w);
		break;
	case 5:
		arg.nr_words = garbage(w);
		arg.words = 0;
		break;
	}
	ret = ioctl(fd, UMEM_GET_BITMAP, roll(w, 20) ? &arg : bad_pointer(w));
	if (!judge_ioctl(OP_BITMAP, !ret, kind, ERRORS(EINVAL, SERVER_ERRORS)) ||
	    kind != SERVER || arg.words != (uintptr_t)words || arg.first || arg.nr_words != all)
		return;
	if (arg.nr_words > ARRAY_SIZE(words))
		return;
	for (n = 0; n < arg.nr_words; n++)
		set += __builtin_popcountl(words[n]);
	if (granules % 64 && words[all - 1] >> granules % 64)
		complain("bitmap: bits past the end: %lx", words[all - 1]);
	if (arg.which == UMEM_BITMAP_CACHED && info.id == s->id && set < info.nr_cached)
		complain("bitmap: %lu bits, %llu cached", set, info.nr_cached);
}

static void do_plain(struct worker *w, const struct slot *s)
{
	enum kind kind;
	int fd = any_fd(w, s, &kind, SERVER), ret;
	uint64_t nr_new;

	/* For once, something to do. */
	if (!roll(w, 4) && kind == SERVER)
		mark_range(w, s, 0, s->npages, 0, &nr_new);
	ret = ioctl(fd, UMEM_MAKE_VMA_ANONYMOUS, garbage(w));
	judge_ioctl(OP_PLAIN, !ret, kind, ERRORS(EBUSY, EAGAIN, SERVER_ERRORS));
}

static void do_log(struct worker *w, const struct slot *s)
{
	struct umem_dirty_log arg = { .on = roll(w, 3) > 0 };
	enum kind kind;
	int fd = any_fd(w, s, &kind, SERVER), ret;

	if (!roll(w, 12))
		arg.reserved = garbage(w);
	if (!roll(w, 12))
		arg.on = garbage(w);
	ret = ioctl(fd, UMEM_SET_DIRTY_LOG, roll(w, 16) ? &arg : odd_pointer(w));
	judge_ioctl(OP_LOG, !ret, kind, ERRORS(EINVAL, EBUSY, EAGAIN, ENFILE, SERVER_ERRORS));
}

static void do_dirty(struct worker *w, const struct slot *s)
{
	uint64_t words[MAX_PAGES / 64 + 2], granules = s->npages >> s->order, set = 0;
	uint64_t all = (granules + 63) / 64, first = roll(w, all + 1);
	struct umem_dirty arg = {
		.words = (uintptr_t)words,
		.first = first * 64,
		.nr_words = roll(w, all - first + 1),
		.flags = roll(w, 4) ? 0 : UMEM_DIRTY_PEEK,
		.nr_dirty = garbage(w),
	};
	bool right = false;
	enum kind kind;
	int fd = any_fd(w, s, &kind, SERVER), ret;
	uint32_t n;

	switch (roll(w, 12)) {
	case 0:
		arg.first = garbage(w);
		break;
	case 1:
		arg.nr_words += roll(w, 3);
		break;
	case 2:
		arg.flags = garbage(w);
		break;
	case 3:
		arg.words = (uintptr_t)odd_pointer(w);
		break;
	case 4:
		arg.nr_words = garbage(w);
		arg.words = 0;
		break;
	default:
		right = true;
	}
	ret = ioctl(fd, UMEM_GET_DIRTY, roll(w, 20) ? (void *)&arg : bad_pointer(w));
	if (!judge_ioctl(OP_DIRTY, !ret, kind, ERRORS(EINVAL, ENODATA, SERVER_ERRORS)) ||
	    kind != SERVER || !right)
		return;
	for (n = 0; n < arg.nr_words; n++)
		set += __builtin_popcountl(words[n]);
	if (set != arg.nr_dirty)
		complain("dirty: %lu bits, it says %llu", set, arg.nr_dirty);
	if (granules % 64 && n && first + n == all && words[n - 1] >> granules % 64)
		complain("dirty: bits past the end: %lx", words[n - 1]);
}

static void do_stats(struct worker *w, const struct slot *s)
{
	uint64_t granules = s->npages >> s->order;
	struct umem_stats stats;
	enum kind kind;
	int fd = any_fd(w, s, &kind, SERVER);
	bool wrong = !roll(w, 16);
	int ret = ioctl(fd, UMEM_GET_STATS, wrong ? odd_pointer(w) : &stats);

	if (!judge_ioctl(OP_STATS, !ret, kind, ERRORS(SERVER_ERRORS)) || wrong ||
	    kind != SERVER)
		return;
	if (stats.nr_cached > granules || stats.nr_poisoned > granules ||
	    stats.nr_requested > granules || stats.reserved)
		complain("stats: %llu cached %llu poisoned %llu requested of %lu",
			 stats.nr_cached, stats.nr_poisoned, stats.nr_requested, granules);
}

static void do_poll(struct worker *w, const struct slot *s)
{
	enum kind kind;
	int fd = any_fd(w, s, &kind, SERVER);
	struct pollfd poller = { fd, POLLIN | POLLOUT, 0 };

	if (poll(&poller, 1, roll(w, 3)) < 0 && errno != EINTR)
		complain("poll: %s", strerror(errno));
	__atomic_add_fetch(&shared->done[OP_POLL], 1, __ATOMIC_RELAXED);
	if (kind == SERVER && poller.revents & ~(POLLIN | POLLOUT | POLLERR | POLLHUP | POLLNVAL))
		complain("poll: %x", poller.revents);
}

/* Any number, any argument. */
static void do_garbage(struct worker *w, const struct slot *s)
{
	uint64_t room[64];
	enum kind kind = (enum kind)roll(w, NR_KINDS);
	int fd = s->fd[kind];
	unsigned long request;
	unsigned int n;

	for (n = 0; n < ARRAY_SIZE(room); n++)
		room[n] = garbage(w);
	request = _IOC(roll(w, 4), UMEM_IOC_MAGIC, roll(w, 32), roll(w, 300));
	switch (request) {
	/* Those of ours are called with care, elsewhere. */
	case UMEM_INIT:
	case UMEM_DEV_CREATE_UMEM:
	case UMEM_DEV_REATTACH:
	case UMEM_MARK_PAGE_CACHED:
		return;
	}
	errno = 0;
	judge(OP_GARBAGE, !ioctl(fd, request, room),
	      ERRORS(ENOTTY, EINVAL, EAGAIN, EINTR, EBUSY, ENODATA, ENFILE, SERVER_ERRORS), kind_names[kind]);
}

/* ---- memory ---- */

/* One access that may end by a signal: SIGBUS, SIGSEGV, or SIGUSR1 that tells to give up. */
static bool load(const uint64_t *address, uint64_t *value)
{
	if (sigsetjmp(escape, 1)) {
		armed = 0;
		return false;
	}
	armed = 1;
	*value = *(const volatile uint64_t *)address;
	armed = 0;
	return true;
}

static bool store(uint64_t *address, uint64_t value)
{
	if (sigsetjmp(escape, 1)) {
		armed = 0;
		return false;
	}
	armed = 1;
	*(volatile uint64_t *)address = value;
	armed = 0;
	return true;
}

static void on_signal(int sig)
{
	if (armed)
		siglongjmp(escape, sig);
	if (sig == SIGUSR1)
		return;
	signal(sig, SIG_DFL);
	raise(sig);
}

static void check_word(struct worker *w, unsigned long page, unsigned int word, uint64_t got,
		       const char *by)
{
	struct shown *shown = &w->shown[page];
	uint64_t expected = content(shown->id, shown->pgoff, word);

	__atomic_add_fetch(&shared->checked, 1, __ATOMIC_RELAXED);
	if (got != expected)
		complain("area %u page %u word %u by %s: got %lx, expected %lx", shown->id,
			 shown->pgoff, word, by, got, expected);
}

static void do_touch(struct worker *w)
{
	unsigned long page = roll(w, WINDOW);
	unsigned int word = roll(w, WORDS), n;
	uint64_t got;
	bool ok;

	if (!w->shown[page].what && roll(w, 20))
		return;
	ok = load(w->window + page * WORDS + word, &got);
	__atomic_add_fetch(ok ? &shared->done[OP_TOUCH] : &shared->failed[OP_TOUCH], 1,
			   __ATOMIC_RELAXED);
	/* More of it costs next to nothing. */
	for (n = 0; ok && n < 16 && w->shown[page].what == HONEST; n++) {
		check_word(w, page, word, got, "load");
		word = roll(w, WORDS);
		ok = load(w->window + page * WORDS + word, &got);
	}
}

/* Pages in a row that show what may be written; returns how many. */
static unsigned long wild_run(struct worker *w, unsigned long page, unsigned long most)
{
	unsigned long n = 0;

	while (n < most && page + n < WINDOW && w->shown[page + n].what == WILD)
		n++;
	return n;
}

static void do_store(struct worker *w)
{
	unsigned long page = roll(w, WINDOW);
	bool ok;

	if (!wild_run(w, page, 1))
		return;
	ok = store(w->window + page * WORDS + roll(w, WORDS), garbage(w));
	__atomic_add_fetch(ok ? &shared->done[OP_STORE] : &shared->failed[OP_STORE], 1,
			   __ATOMIC_RELAXED);
}

/* System calls that read or write memory; they do not give up but for a kill. */
static void do_kernel(struct worker *w)
{
	unsigned long page = roll(w, WINDOW), n;
	uint64_t *where = w->window + page * WORDS, there[8];
	struct timespec soon = { 0, 1000 };
	struct iovec local, remote;
	int ends[2];
	ssize_t got;

	if (w->shown[page].what != HONEST && w->shown[page].what != WILD)
		return;
	__atomic_add_fetch(&shared->done[OP_KERNEL], 1, __ATOMIC_RELAXED);
	switch (roll(w, 6)) {
	case 0:
		if (pipe2(ends, O_CLOEXEC | O_NONBLOCK))
			return;
		if (write(ends[1], where, PAGE) == (ssize_t)PAGE &&
		    read(ends[0], there, sizeof(there)) == sizeof(there) &&
		    w->shown[page].what == HONEST)
			check_word(w, page, 5, there[5], "write(2)");
		close(ends[0]);
		close(ends[1]);
		break;
	case 1:
		local = (struct iovec){ there, sizeof(there) };
		remote = (struct iovec){ where, sizeof(there) };
		got = process_vm_readv(getpid(), &local, 1, &remote, 1, 0);
		if (got == sizeof(there) && w->shown[page].what == HONEST)
			check_word(w, page, 7, there[7], "process_vm_readv");
		break;
	case 2:
		if (pipe2(ends, O_CLOEXEC | O_NONBLOCK))
			return;
		local = (struct iovec){ where, PAGE };
		if (vmsplice(ends[1], &local, 1, 0) == (ssize_t)PAGE &&
		    read(ends[0], there, sizeof(there)) == sizeof(there) &&
		    w->shown[page].what == HONEST)
			check_word(w, page, 2, there[2], "vmsplice");
		close(ends[0]);
		close(ends[1]);
		break;
	case 3:
		syscall(SYS_futex, where, FUTEX_WAIT, 12345, &soon, NULL, 0);
		syscall(SYS_futex, where, FUTEX_WAKE, 1, NULL, NULL, 0);
		break;
	default:
		n = wild_run(w, page, 3);
		if (!n)
			return;
		ends[0] = open("/dev/zero", O_RDONLY | O_CLOEXEC);
		got = read(ends[0], where, n * PAGE);
		(void)got;
		close(ends[0]);
	}
}

/* ---- mappings ---- */

static void show(struct worker *w, unsigned long at, unsigned long count, const struct slot *s,
		 uint64_t pgoff, bool servers)
{
	unsigned long n;

	for (n = 0; n < count; n++) {
		struct shown *shown = &w->shown[at + n];

		memset(shown, 0, sizeof(*shown));
		if (!s)
			continue;
		shown->id = s->id;
		shown->pgoff = pgoff + n;
		shown->what = servers ? SERVERS : is_honest(s, pgoff + n) ? HONEST : WILD;
	}
}

static void reserve(struct worker *w, unsigned long at, unsigned long count)
{
	if (mmap(w->window + at * WORDS, count * PAGE, PROT_NONE,
		 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) == MAP_FAILED &&
	    errno != ENOMEM && errno != EAGAIN)
		complain("reserve: %s", strerror(errno));
	show(w, at, count, NULL, 0, false);
}

static void do_mmap(struct worker *w, const struct slot *s)
{
	enum kind kind = roll(w, 3) ? NODE : roll(w, 2) ? AFILE : (enum kind)roll(w, NR_KINDS);
	unsigned long count = 1 + roll(w, 64), pgoff = roll(w, s->npages), at;
	int prot = PROT_READ | PROT_WRITE, flags = MAP_SHARED;
	bool wrong = false;
	void *got;

	/* Where a huge page could be, for whoever can make one. */
	if (!roll(w, 3)) {
		pgoff = 0;
		count = s->npages;
	}
	if (pgoff + count > s->npages)
		count = s->npages - pgoff;
	if (count > WINDOW)
		count = WINDOW;
	at = roll(w, WINDOW - count + 1);
	if (count > HUGE && at + count >= HUGE && roll(w, 2))
		at = WINDOW - count < HUGE ? 0 : HUGE;
	if (!roll(w, 8))
		prot = roll(w, 4);
	if (!roll(w, 10)) {
		flags = MAP_PRIVATE;
		if (s->fd[NODE] == s->fd[CONTROL])
			kind = NODE;
	}
	if (!roll(w, 20))
		flags |= MAP_POPULATE;
	if (!roll(w, 40))
		flags |= MAP_LOCKED;
	if (!roll(w, 16)) {
		pgoff = garbage(w) & ((1UL << 52) - 1);
		wrong = true;
	}
	got = mmap(w->window + at * WORDS, count * PAGE, prot, flags | MAP_FIXED, s->fd[kind],
		   pgoff * PAGE);
	judge(OP_MMAP, got != MAP_FAILED,
	      ERRORS(EINVAL, ENODEV, ENXIO, EACCES, EOVERFLOW, EAGAIN, EPERM), kind_names[kind]);
	if (got == MAP_FAILED) {
		/* What was there may be gone already. */
		reserve(w, at, count);
		return;
	}
	if (wrong && !is_inside(s, pgoff, count) && (kind == NODE || kind == AFILE))
		complain("mmap at %lx of %lx works", pgoff, s->npages);
	show(w, at, count, s, pgoff, kind != NODE && kind != AFILE);
}

static void do_munmap(struct worker *w)
{
	unsigned long at = roll(w, WINDOW), count = 1 + roll(w, 40);

	if (at + count > WINDOW)
		count = WINDOW - at;
	judge(OP_MUNMAP, !munmap(w->window + at * WORDS, count * PAGE), ERRORS(EINVAL), "");
	show(w, at, count, NULL, 0, false);
}

static void do_mremap(struct worker *w)
{
	unsigned long from = roll(w, WINDOW - 64), to = roll(w, WINDOW - 64), n;
	unsigned long count = 1 + roll(w, 32), grown = roll(w, 8) ? count : 1 + roll(w, 32);
	unsigned long most = count > grown ? count : grown;
	void *got;

	if (from + most > to && to + most > from)
		return;
	got = mremap(w->window + from * WORDS, count * PAGE, grown * PAGE,
		     MREMAP_MAYMOVE | MREMAP_FIXED, w->window + to * WORDS);
	if (judge(OP_MREMAP, got != MAP_FAILED, ERRORS(EFAULT, EINVAL, EAGAIN), "") &&
	    grown <= count) {
		for (n = 0; n < grown; n++)
			w->shown[to + n] = w->shown[from + n];
		show(w, from, count, NULL, 0, false);
		return;
	}
	/* Grown: what is behind may be anything.  Failed: who knows how far it came. */
	reserve(w, to, most);
	reserve(w, from, most);
}

static void do_mprotect(struct worker *w)
{
	/* In anybody's window: memory that cannot be touched is a signal, which is no harm. */
	struct worker *other = roll(w, 4) || w->child ? w : &workers[roll(w, NR_THREADS)];
	unsigned long at = roll(w, WINDOW), count = 1 + roll(w, 40);
	int prot = roll(w, 3) ? PROT_READ | PROT_WRITE : (int)roll(w, 4);

	if (at + count > WINDOW)
		count = WINDOW - at;
	judge(OP_MPROTECT, !mprotect(other->window + at * WORDS, count * PAGE, prot),
	      ERRORS(EACCES, EINVAL), "");
}

static void do_madvise(struct worker *w)
{
	static const int harmless[] = {
		MADV_NORMAL, MADV_RANDOM, MADV_SEQUENTIAL, MADV_WILLNEED, MADV_DONTNEED, MADV_FREE,
		MADV_DONTFORK, MADV_DOFORK, MADV_MERGEABLE, MADV_UNMERGEABLE, MADV_HUGEPAGE,
		MADV_NOHUGEPAGE, MADV_DONTDUMP, MADV_DODUMP, MADV_WIPEONFORK, MADV_KEEPONFORK,
		MADV_COLD, MADV_PAGEOUT, MADV_POPULATE_READ, MADV_POPULATE_WRITE,
		24 /* DONTNEED_LOCKED */, 25 /* COLLAPSE */, 77, -1,
	};
	struct worker *other = roll(w, 4) || w->child ? w : &workers[roll(w, NR_THREADS)];
	unsigned long at = roll(w, WINDOW), count = 1 + roll(w, 64), run;
	int advice = harmless[roll(w, ARRAY_SIZE(harmless))];

	if (!roll(w, 4)) {
		at = roll(w, 2) * HUGE;
		count = HUGE;
	}
	if (!roll(w, 3)) {
		run = wild_run(w, at, 40);
		if (!run)
			return;
		judge(OP_MADVISE, !madvise(w->window + at * WORDS, run * PAGE, MADV_REMOVE),
		      ERRORS(EINVAL, EACCES, EINTR, EOPNOTSUPP), "MADV_REMOVE");
		return;
	}
	if (at + count > WINDOW)
		count = WINDOW - at;
	/* These belong to the kernel, which has errors of its own for each. */
	if (madvise(other->window + at * WORDS, count * PAGE, advice))
		__atomic_add_fetch(&shared->failed[OP_MADVISE], 1, __ATOMIC_RELAXED);
	else
		__atomic_add_fetch(&shared->done[OP_MADVISE], 1, __ATOMIC_RELAXED);
}

static void do_mlock(struct worker *w)
{
	unsigned long at = roll(w, WINDOW - 8);
	unsigned char residency[8];

	mincore(w->window + at * WORDS, 8 * PAGE, residency);
	msync(w->window + at * WORDS, 8 * PAGE, MS_SYNC);
	if (roll(w, 2))
		munlock(w->window + at * WORDS, 8 * PAGE);
	else
		judge(OP_MLOCK, !mlock(w->window + at * WORDS, (1 + roll(w, 4)) * PAGE),
		      ERRORS(EAGAIN, EFAULT, EINTR, EPERM), "");
}

static void do_fallocate(struct worker *w, const struct slot *s)
{
	enum kind kind = roll(w, 4) ? AFILE : (enum kind)roll(w, NR_KINDS);
	int mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
	uint64_t start = roll(w, s->npages), count = 1 + roll(w, 30);
	int64_t offset, len;

	if (!is_inside(s, start, count) || !is_wild(s, start, count))
		return;
	offset = start * PAGE + (roll(w, 8) ? 0 : roll(w, PAGE));
	len = count * PAGE - offset % PAGE;
	switch (roll(w, 12)) {
	case 0:
		mode = garbage(w);
		/* These would move or zero what is honest, of the backing file. */
		if (kind == BACKING)
			mode = FALLOC_FL_COLLAPSE_RANGE;
		break;
	case 1:
		offset = s->npages * PAGE + garbage(w) % (1UL << 62);
		len = garbage(w) >> 1;
		break;
	case 2:
		len = -(int64_t)roll(w, 2);
		break;
	}
	judge(OP_FALLOCATE, !fallocate(s->fd[kind], mode, offset, len),
	      ERRORS(EINVAL, EOPNOTSUPP, EFBIG, ENODEV, EINTR, EPERM, ENOSPC, ESPIPE),
	      kind_names[kind]);
}

static void do_truncate(struct worker *w, const struct slot *s)
{
	enum kind kind = roll(w, 2) ? BACKING : (enum kind)roll(w, NR_KINDS);
	uint64_t size = roll(w, 3) ? garbage(w) >> 1 : s->npages * PAGE;
	int ret = ftruncate(s->fd[kind], size);

	if (!ret && size != s->npages * PAGE)
		complain("truncated to %lx %s", size, kind_names[kind]);
	judge(OP_TRUNCATE, !ret, ERRORS(EPERM, EINVAL, EFBIG, ENOENT), kind_names[kind]);
}

/* ---- processes ---- */

static void do_close(struct worker *w)
{
	struct slot s;
	unsigned int n;

	if (pthread_mutex_trylock(&slots_lock))
		return;
	n = roll(w, NR_SLOTS);
	s = slots[n];
	/* All of it, or one descriptor, which others go on using. */
	if (roll(w, 2)) {
		memset(&slots[n], 0, sizeof(slots[n]));
	} else {
		unsigned int kind, only = roll(w, NR_KINDS);

		for (kind = 0; kind < NR_KINDS; kind++)
			if (kind != only)
				s.fd[kind] = -1;
	}
	pthread_mutex_unlock(&slots_lock);
	if (s.npages)
		close_slot(&s);
	__atomic_add_fetch(&shared->done[OP_CLOSE], 1, __ATOMIC_RELAXED);
}

static void do_open(struct worker *w)
{
	struct slot s = { .fd = { -1, -1, -1, -1, -1 } };
	struct umem_info info;

	if (!do_list(w, &info) || !info.name[0])
		return;
	s.npages = info.size / PAGE;
	s.order = order_of(info.granule_size);
	s.id = info.id;
	open_faces(w, &s, info.name);
	if (s.fd[NODE] < 0 && s.fd[AFILE] < 0) {
		__atomic_add_fetch(&shared->failed[OP_OPEN], 1, __ATOMIC_RELAXED);
		return;
	}
	__atomic_add_fetch(&shared->done[OP_OPEN], 1, __ATOMIC_RELAXED);
	put_slot(w, &s);
}

static void one_thing(struct worker *w);

static void do_fork(struct worker *w)
{
	pid_t parent = getpid(), pid;
	unsigned int n;

	if (w->child)
		return;
	pid = fork();
	if (pid < 0)
		return;
	if (!pid) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		/* It may have been killed before that. */
		if (getppid() != parent)
			_exit(0);
		w->child = true;
		w->state ^= getpid();
		/* Another thread may have held it when it was copied. */
		pthread_mutex_init(&slots_lock, NULL);
		for (n = 0; n < CHILD_OPS && !shared->stop; n++)
			one_thing(w);
		_exit(0);
	}
	__atomic_add_fetch(&shared->done[OP_FORK], 1, __ATOMIC_RELAXED);
	usleep(roll(w, 30000));
	if (roll(w, 3))
		usleep(roll(w, 100000));
	kill(pid, SIGKILL);
	while (waitpid(pid, NULL, 0) < 0 && errno == EINTR)
		;
}

static void one_thing(struct worker *w)
{
	struct slot s;
	bool have = take_slot(w, &s);

	switch (roll(w, have ? 64 : 8)) {
	case 0:
		do_create(w);
		break;
	case 1:
		if (roll(w, 2))
			do_init(w);
		break;
	case 2: {
		struct umem_info info;

		do_list(w, &info);
		break;
	}
	case 3:
		do_reattach(w);
		break;
	case 4:
		do_open(w);
		break;
	case 5:
		if (!roll(w, 4))
			do_fork(w);
		break;
	case 6:
		if (!roll(w, 4))
			do_close(w);
		break;
	case 7:
		do_munmap(w);
		break;
	case 8:
		do_mremap(w);
		break;
	case 9:
		do_mprotect(w);
		break;
	case 10 ... 11:
		do_madvise(w);
		break;
	case 12:
		if (!roll(w, 3))
			do_mlock(w);
		break;
	case 13 ... 20:
		do_touch(w);
		break;
	case 21 ... 23:
		do_store(w);
		break;
	case 24 ... 26:
		do_kernel(w);
		break;
	case 27 ... 30:
		do_mmap(w, &s);
		break;
	case 31 ... 33:
		do_get(w, &s);
		break;
	case 34 ... 35:
		do_read(w, &s);
		break;
	case 36 ... 37:
		do_write(w, &s);
		break;
	case 38 ... 42:
		do_mark(w, &s, false);
		break;
	case 43:
		if (!roll(w, 8))
			do_mark(w, &s, true);
		break;
	case 44 ... 45:
		do_info(w, &s);
		break;
	case 46:
		do_loss(w, &s);
		break;
	case 47 ... 48:
		do_bitmap(w, &s);
		break;
	case 49:
		do_plain(w, &s);
		break;
	case 50:
		do_stats(w, &s);
		break;
	case 51 ... 52:
		do_poll(w, &s);
		break;
	case 53 ... 55:
		do_garbage(w, &s);
		break;
	case 56 ... 58:
		do_fallocate(w, &s);
		break;
	case 59:
		do_truncate(w, &s);
		break;
	case 60:
		do_log(w, &s);
		break;
	case 61 ... 62:
		do_dirty(w, &s);
		break;
	default:
		do_touch(w);
	}
}

static void *worker_main(void *arg)
{
	struct worker *w = arg;

	while (!shared->stop) {
		one_thing(w);
		/* Out of numbers: another process goes on. */
		if (__atomic_load_n(&next_fd, __ATOMIC_RELAXED) > last_fd)
			_exit(0);
	}
	return NULL;
}

/* Answers what is asked of a server; returns whether there was anything. */
static bool serve(struct worker *w, const struct slot *s)
{
	struct umem_page_request requests[16];
	struct umem_page_requests get = { .requests = (uintptr_t)requests, .nr = 16 };
	struct pollfd poller = { s->fd[SERVER], POLLIN, 0 };
	uint32_t n;

	/* Not one that might put us to sleep. */
	if (poll(&poller, 1, 0) <= 0 || !(poller.revents & POLLIN) ||
	    !(fcntl(poller.fd, F_GETFL) & O_NONBLOCK) ||
	    ioctl(poller.fd, UMEM_GET_PAGE_REQUEST, &get))
		return false;
	for (n = 0; n < get.nr; n++)
		answer(w, s, requests[n].pgoff);
	return true;
}

/* Take over an area that nobody serves: else all would sleep in those, soon. */
static void rescue(struct worker *w)
{
	struct slot s = { .fd = { -1, -1, -1, -1, -1 } };
	struct umem_reattach arg = { 0 };
	struct umem_info info;
	int control;

	if (!do_list(w, &info) || info.flags & UMEM_INFO_SERVED)
		return;
	arg.id = info.id;
	control = open("/dev/umem", O_RDWR | O_CLOEXEC);
	if (control < 0 || ioctl(control, UMEM_DEV_REATTACH, &arg)) {
		close(control);
		return;
	}
	s.npages = arg.size / PAGE;
	s.order = order_of(arg.granule_size);
	s.id = arg.id;
	fcntl(arg.server_fd, F_SETFL, O_RDWR | O_NONBLOCK);
	s.fd[CONTROL] = unique_fd(control);
	s.fd[SERVER] = unique_fd(arg.server_fd);
	s.fd[BACKING] = unique_fd(arg.shmem_fd);
	while (serve(w, &s))
		;
	put_slot(w, &s);
}

/* Serves every slot, and has the others give up what lasts too long. */
static void *good_server(void *arg)
{
	struct worker *w = arg;
	unsigned int n;

	while (!shared->stop) {
		struct timespec now;
		static long last;
		struct slot s;
		bool busy = false;

		for (n = 0; n < NR_SLOTS; n++)
			if (take_slot(w, &s))
				busy |= serve(w, &s);
		clock_gettime(CLOCK_MONOTONIC, &now);
		if (last != now.tv_nsec / 30000000) {
			last = now.tv_nsec / 30000000;
			for (n = 0; n < NR_THREADS; n++)
				pthread_kill(workers[n].thread, SIGUSR1);
			rescue(w);
		}
		if (!busy)
			usleep(1000);
	}
	return NULL;
}

static void process_main(unsigned int state)
{
	struct sigaction action = { .sa_handler = on_signal, .sa_flags = SA_NODEFER };
	static struct worker server;
	struct rlimit limit;
	unsigned int n;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (getppid() != supervisor)
		_exit(0);
	setpgid(0, 0);
	sigaction(SIGBUS, &action, NULL);
	sigaction(SIGSEGV, &action, NULL);
	sigaction(SIGUSR1, &action, NULL);
	if (!getrlimit(RLIMIT_NOFILE, &limit)) {
		limit.rlim_cur = limit.rlim_max;
		setrlimit(RLIMIT_NOFILE, &limit);
		last_fd = limit.rlim_max < 200000 ? limit.rlim_max - 100 : 200000;
	}
	for (n = 0; n < NR_THREADS; n++) {
		size_t size = (WINDOW + HUGE) * PAGE;
		char *room = mmap(NULL, size, PROT_NONE,
				  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

		if (room == MAP_FAILED)
			die("window");
		room += -(uintptr_t)room & (HUGE * PAGE - 1);
		workers[n].window = (uint64_t *)room;
		workers[n].state = rand_r(&state);
	}
	server.state = rand_r(&state);
	server.window = workers[0].window;
	for (n = 1; n < NR_THREADS; n++)
		if (pthread_create(&workers[n].thread, NULL, worker_main, &workers[n]))
			die("pthread_create");
	workers[0].thread = pthread_self();
	if (pthread_create(&server.thread, NULL, good_server, &server))
		die("pthread_create");
	worker_main(&workers[0]);
	/* Not joined: some may sleep for good.  The exit has to end them. */
	_exit(0);
}

/* ---- the supervisor ---- */

static void on_alarm(int sig)
{
	(void)sig;
	say("fuzz: seed %lu: HANGS: the supervisor itself\n", seed);
	_exit(4);
}

/* Where everybody is that should be gone. */
static void show_stacks(void)
{
	/* A shell knows how to go through /proc. */
	if (system("for t in /proc/[0-9]*/task/[0-9]*; do "
		   "grep -q '^fuzz' $t/comm 2>/dev/null || continue; "
		   "echo \"$t $(sed -n 's/^State:.//p' $t/status)\" >&2; cat $t/stack >&2; done"))
		say("fuzz: no stacks\n");
}

static pid_t start_process(unsigned int *state)
{
	unsigned int own = rand_r(state);
	pid_t pid = fork();

	if (pid < 0)
		die("fork");
	if (!pid)
		process_main(own);
	return pid;
}

static void judge_end(pid_t pid, int status)
{
	if (WIFSIGNALED(status) ? WTERMSIG(status) != SIGKILL : status != 0)
		complain("process %d ended with %x", pid, status);
}

static void expect_none(void)
{
	struct umem_list list;
	int tries, control = open("/dev/umem", O_RDWR | O_CLOEXEC);

	for (tries = 0; tries < 1000; tries++) {
		memset(&list, 0, sizeof(list));
		if (control < 0 || ioctl(control, UMEM_DEV_LIST, &list))
			die("list");
		if (!list.total) {
			close(control);
			return;
		}
		usleep(10000);
	}
	complain("%u areas are left", list.total);
}

int main(int argc, char **argv)
{
	unsigned int state, n, turn, nr_killed = 0, nr_started = NR_PROCS;
	pid_t pids[NR_PROCS], pid;
	int seconds, status;
	time_t end;

	if (argc != 3)
		return 2;
	seconds = atoi(argv[1]);
	seed = strtoul(argv[2], NULL, 0);
	state = seed;
	supervisor = getpid();
	setvbuf(stdout, NULL, _IOLBF, 0);
	printf("seed=%lu\n", seed);
	signal(SIGALRM, on_alarm);
	alarm(seconds + 2 * HANG_SECONDS);

	shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS,
		      -1, 0);
	if (shared == MAP_FAILED)
		die("mmap");
	strcpy(mount_point, "/tmp/umem-fuzz.XXXXXX");
	if (!mkdtemp(mount_point) || mount("none", mount_point, "umem", 0, NULL))
		die("mount");
	/* Children of a killed process are ours to wait for. */
	prctl(PR_SET_CHILD_SUBREAPER, 1);

	for (n = 0; n < NR_PROCS; n++)
		pids[n] = start_process(&state);
	end = time(NULL) + seconds;
	for (turn = 1; time(NULL) < end && shared->bad < 100; turn++) {
		usleep(50000);
		while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
			judge_end(pid, status);
			for (n = 0; n < NR_PROCS; n++) {
				if (pids[n] != pid)
					continue;
				pids[n] = start_process(&state);
				nr_started++;
			}
		}
		if (rand_r(&state) % 25 == 0) {
			kill(pids[rand_r(&state) % NR_PROCS], SIGKILL);
			nr_killed++;
		}
	}

	/* Some end by themselves, with threads that sleep; some are killed. */
	shared->stop = 1;
	usleep(300000);
	for (n = 0; n < NR_PROCS; n++) {
		kill(pids[n], SIGKILL);
		kill(-pids[n], SIGKILL);
	}
	for (end = time(NULL) + HANG_SECONDS;;) {
		pid = waitpid(-1, &status, WNOHANG);
		if (pid > 0) {
			judge_end(pid, status);
		} else if (pid < 0) {
			break;
		} else if (time(NULL) > end) {
			say("fuzz: seed %lu: HANGS: somebody survives SIGKILL\n", seed);
			show_stacks();
			return 3;
		} else {
			usleep(10000);
		}
	}
	expect_none();
	if (umount2(mount_point, 0))
		complain("umount: %s", strerror(errno));
	rmdir(mount_point);

	for (n = 0; n < NR_OPS; n++)
		printf("%s=%lu/%lu%s", op_names[n], shared->done[n], shared->failed[n],
		       n % 8 == 7 ? "\n" : " ");
	printf("\nprocesses=%u killed=%u checked=%lu served=%lu bad=%lu\n", nr_started, nr_killed,
	       shared->checked, shared->served, shared->bad);
	return shared->bad != 0;
}

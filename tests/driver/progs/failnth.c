// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * failnth MOUNT EMPTY: does every call of the driver again and again while the
 * kernel fails the first, the second, the third allocation or user copy in it,
 * until there is no further one to fail.  After a call that failed nothing may be
 * left: no area, no descriptor, no reference to the module; and what was there
 * before must work.
 *
 * MOUNT is where the umem file system is mounted, EMPTY a directory to mount it
 * on.  Says on stdout, for each call, how many failures were put in and how many
 * of them the call told; on stderr what is wrong.
 *
 * The kernel's side is /proc/self/fail-nth, of CONFIG_FAULT_INJECTION.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/umem.h>
#include <poll.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PAGE 4096UL
#define NPAGES 128UL
#define WORD 0x5eedf00d12345678UL
#define MOST 2000	/* failures in one call; more means that it never ends */

static const char *mounted, *empty, *current;
static int bad;
static int fail_nth, ends[2];

#define COMPLAIN(...) \
	(fprintf(stderr, "%s: ", current), fprintf(stderr, __VA_ARGS__), fputc('\n', stderr), bad++)

static void must(int ok, const char *what)
{
	if (ok)
		return;
	fprintf(stderr, "%s: %s: %s\n", current, what, strerror(errno));
	exit(2);
}

static int result(long ret)
{
	return ret < 0 ? -errno : 0;
}

/* ---- what is there */

struct state {
	unsigned long areas, mapped, fds, refs;
};

static long number_in(const char *path)
{
	char text[32] = "";
	int fd = open(path, O_RDONLY);

	must(fd >= 0 && read(fd, text, sizeof(text) - 1) > 0, path);
	close(fd);
	return strtol(text, NULL, 10);
}

static struct state look(void)
{
	struct umem_info infos[4];
	struct umem_list list = { .infos = (unsigned long)infos, .nr = 4 };
	struct state state = { 0 };
	int fd = open("/dev/umem", O_RDWR);
	DIR *dir;

	must(fd >= 0 && !ioctl(fd, UMEM_DEV_LIST, &list), "list");
	close(fd);
	state.areas = list.total;
	while (list.nr--)
		state.mapped += !!(infos[list.nr].flags & UMEM_INFO_MAPPED);
	dir = opendir("/proc/self/fd");
	must(dir != NULL, "/proc/self/fd");
	while (readdir(dir))
		state.fds++;
	closedir(dir);
	state.refs = number_in("/sys/module/umem/refcnt");
	return state;
}

/* The last reference may be dropped by a worker of the kernel. */
static void expect(struct state want, const char *when)
{
	struct state is;
	int turn;

	for (turn = 0; turn < 400; turn++) {
		is = look();
		if (!memcmp(&is, &want, sizeof(is)))
			return;
		usleep(10000);
	}
	COMPLAIN("%s: areas %lu, were %lu; of them mapped %lu, were %lu; descriptors %lu, were %lu; "
		 "references %lu, were %lu", when, is.areas, want.areas, is.mapped, want.mapped,
		 is.fds, want.fds, is.refs, want.refs);
}

/* ---- the area of an attempt: made for it, and gone after it */

static struct {
	int control, server, shmem, node, file;
	int mounted, piped;
	unsigned int id;
	unsigned long *map, *backing;
	char path[64], file_path[256];
} at;

static void make_area(const char *name)
{
	struct umem_create create = { .size = NPAGES * PAGE };

	strcpy(create.name, name);
	at.control = open("/dev/umem", O_RDWR);
	must(at.control >= 0, "open");
	must(!ioctl(at.control, UMEM_DEV_CREATE_UMEM, &create), "create");
	at.server = create.server_fd;
	at.shmem = create.shmem_fd;
	at.id = create.id;
	snprintf(at.path, sizeof(at.path), "/dev/umem%u", create.id);
	snprintf(at.file_path, sizeof(at.file_path), "%s/%s", mounted, name);
	fcntl(at.server, F_SETFL, O_NONBLOCK);
}

static void prepare_area(void)
{
	make_area("sweep");
}

static void *map(int fd, int flags)
{
	return mmap(NULL, NPAGES * PAGE, PROT_READ | PROT_WRITE, flags, fd, 0);
}

static void prepare_node(void)
{
	prepare_area();
	at.node = open(at.path, O_RDWR);
	must(at.node >= 0, "node");
}

static void prepare_map(void)
{
	prepare_node();
	at.map = map(at.node, MAP_SHARED);
	at.backing = map(at.shmem, MAP_SHARED);
	must(at.map != MAP_FAILED && at.backing != MAP_FAILED, "mmap");
}

static int mark(unsigned int number, unsigned long pgoff, unsigned long count, unsigned int flags)
{
	struct umem_page_range range = { pgoff, count };
	struct umem_mark_cached arg = { (unsigned long)&range, 1, flags, 0 };

	return result(ioctl(at.server, number, &arg));
}

/* Page 1 is there. */
static void prepare_cached(void)
{
	prepare_map();
	at.backing[PAGE / 8] = WORD;
	must(!mark(UMEM_MARK_PAGE_CACHED, 1, 1, 0), "mark");
}

static void prepare_complete(void)
{
	prepare_cached();
	must(!mark(UMEM_MARK_PAGE_CACHED, 0, NPAGES, 0), "mark all");
}

/* Page 1 was discarded while it was missing, and is requested for that. */
static void prepare_discarded(void)
{
	prepare_map();
	at.backing[PAGE / 8] = WORD;
	must(!madvise((char *)at.map + PAGE, PAGE, MADV_REMOVE), "discard");
}

static void prepare_lost(void)
{
	prepare_node();
	close(at.server);
	close(at.shmem);
	at.server = at.shmem = -1;
}

static void prepare_file(void)
{
	prepare_area();
	at.file = open(at.file_path, O_RDWR);
	must(at.file >= 0, at.file_path);
}

static void prepare_control(void)
{
	at.control = open("/dev/umem", O_RDWR);
	must(at.control >= 0, "open");
}

static void prepare_init(void)
{
	struct umem_init init = { .size = NPAGES * PAGE };

	prepare_control();
	must(!ioctl(at.control, UMEM_INIT, &init), "init");
	at.shmem = init.shmem_fd;
}

static void prepare_nothing(void)
{
}

static void clean_up(void)
{
	int *fds[] = { &at.control, &at.server, &at.shmem, &at.node, &at.file };
	unsigned long word = WORD;
	unsigned int i;

	if (at.piped > 0)
		must(read(ends[0], &word, at.piped) == at.piped, "pipe");
	if (word != WORD)
		COMPLAIN("made up a page");
	if (at.mounted)
		must(!umount2(empty, 0), "umount");
	if (at.map)
		munmap(at.map, NPAGES * PAGE);
	if (at.backing)
		munmap(at.backing, NPAGES * PAGE);
	for (i = 0; i < sizeof(fds) / sizeof(*fds); i++)
		if (*fds[i] >= 0)
			close(*fds[i]);
}

/* ---- the calls: 0 or a negative error; what they make is for clean_up() */

static int open_as(const char *path, int *fd)
{
	int got = open(path, O_RDWR);

	if (got < 0)
		return -errno;
	*fd = got;
	return 0;
}

static int map_as(int fd, int flags)
{
	unsigned long *got = map(fd, flags);

	if (got == MAP_FAILED)
		return -errno;
	at.map = got;
	return 0;
}

static int call_open(void)
{
	return open_as("/dev/umem", &at.control);
}

static int call_init(void)
{
	struct umem_init init = { .size = NPAGES * PAGE };

	if (ioctl(at.control, UMEM_INIT, &init))
		return -errno;
	at.shmem = init.shmem_fd;
	return 0;
}

static int call_create(void)
{
	struct umem_create create = { .size = NPAGES * PAGE, .name = "sweep.create" };

	if (ioctl(at.control, UMEM_DEV_CREATE_UMEM, &create))
		return -errno;
	at.server = create.server_fd;
	at.shmem = create.shmem_fd;
	return 0;
}

static int call_list(void)
{
	struct umem_info infos[8];
	struct umem_list list = { .infos = (unsigned long)infos, .nr = 8 };

	return result(ioctl(at.control, UMEM_DEV_LIST, &list));
}

static int call_reattach(void)
{
	struct umem_reattach reattach = { .id = at.id };

	if (ioctl(at.control, UMEM_DEV_REATTACH, &reattach))
		return -errno;
	at.server = reattach.server_fd;
	at.shmem = reattach.shmem_fd;
	return 0;
}

/* A request that could not be handed over is still there. */
static int still_requested(int ret)
{
	struct pollfd pfd = { .fd = at.server, .events = POLLIN };

	if (ret && poll(&pfd, 1, 0) != 1)
		COMPLAIN("the request is lost");
	return ret;
}

static int call_get(void)
{
	struct umem_page_request request = { 0 };
	struct umem_page_requests arg = { (unsigned long)&request, 1, 0 };
	int ret = result(ioctl(at.server, UMEM_GET_PAGE_REQUEST, &arg));

	if (!ret && (arg.nr != 1 || request.pgoff != 1))
		COMPLAIN("got the wrong request");
	return still_requested(ret);
}

static int call_read(void)
{
	unsigned long pgoff = 0;
	int ret = result(read(at.server, &pgoff, sizeof(pgoff)));

	if (!ret && pgoff != 1)
		COMPLAIN("read the wrong request");
	return still_requested(ret);
}

static int call_write(void)
{
	unsigned long pgoff = 1;

	return result(write(at.server, &pgoff, sizeof(pgoff)));
}

static int call_mark(void)
{
	return mark(UMEM_MARK_PAGE_CACHED, 1, 2, 0);
}

static int call_mark_touch(void)
{
	return mark(UMEM_MARK_PAGE_CACHED, 1, 2, UMEM_MARK_TOUCH);
}

static int call_mark_many(void)
{
	static struct umem_page_range ranges[UMEM_MARK_MAX];
	struct umem_mark_cached arg = { (unsigned long)ranges, UMEM_MARK_MAX, 0, 0 };
	unsigned int i;

	for (i = 0; i < UMEM_MARK_MAX; i++)
		ranges[i] = (struct umem_page_range){ i % NPAGES, 1 };
	return result(ioctl(at.server, UMEM_MARK_PAGE_CACHED, &arg));
}

static int call_poison(void)
{
	return mark(UMEM_MARK_PAGE_POISONED, 5, 2, 0);
}

static int call_info(void)
{
	struct umem_info info;

	return result(ioctl(at.server, UMEM_GET_INFO, &info));
}

static int call_policy(void)
{
	struct umem_loss_policy policy = { .timeout_ms = 1000 };

	return result(ioctl(at.server, UMEM_SET_LOSS_POLICY, &policy));
}

static int call_bitmap(void)
{
	unsigned long words[NPAGES / 64];
	struct umem_bitmap bitmap = { .words = (unsigned long)words, .nr_words = NPAGES / 64 };

	return result(ioctl(at.server, UMEM_GET_BITMAP, &bitmap));
}

static int call_plain(void)
{
	return result(ioctl(at.server, UMEM_MAKE_VMA_ANONYMOUS));
}

static int call_log_on(void)
{
	struct umem_dirty_log log = { .on = 1 };

	return result(ioctl(at.server, UMEM_SET_DIRTY_LOG, &log));
}

/* Switching the log off, as after a failure, makes mappings of a complete area plain. */
static void prepare_plain(void)
{
	prepare_complete();
	must(!call_plain(), "UMEM_MAKE_VMA_ANONYMOUS");
}

static void prepare_log(void)
{
	prepare_complete();
	must(!call_log_on(), "UMEM_SET_DIRTY_LOG");
}

static int call_log_off(void)
{
	struct umem_dirty_log log = { .on = 0 };

	return result(ioctl(at.server, UMEM_SET_DIRTY_LOG, &log));
}

static int call_dirty(void)
{
	unsigned long words[NPAGES / 64];
	struct umem_dirty dirty = { .words = (unsigned long)words, .nr_words = NPAGES / 64 };

	return result(ioctl(at.server, UMEM_GET_DIRTY, &dirty));
}

static int call_stats(void)
{
	struct umem_stats stats;

	return result(ioctl(at.server, UMEM_GET_STATS, &stats));
}

static int call_poll(void)
{
	struct pollfd pfd = { .fd = at.server, .events = POLLIN };

	return result(poll(&pfd, 1, 0));
}

static int call_open_node(void)
{
	return open_as(at.path, &at.node);
}

static int call_map_node(void)
{
	return map_as(at.node, MAP_SHARED);
}

static int call_map_init(void)
{
	return map_as(at.control, MAP_PRIVATE);
}

static int call_remap(void)
{
	void *got = mremap(at.map, NPAGES * PAGE, NPAGES * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED,
			   (char *)at.map - (1UL << 30));

	if (got == MAP_FAILED)
		return -errno;
	at.map = got;
	return 0;
}

/* A hole in the middle makes two of the mapping. */
static int call_unmap(void)
{
	return result(munmap((char *)at.map + 8 * PAGE, PAGE));
}

static int call_discard(void)
{
	return result(madvise((char *)at.map + 9 * PAGE, 3 * PAGE, MADV_REMOVE));
}

static sigjmp_buf escape;

static void on_bus_error(int sig)
{
	siglongjmp(escape, sig);
}

/* Whatever fails: what is read is the page, or it is not read. */
static int call_touch(void)
{
	if (sigsetjmp(escape, 1))
		return -EFAULT;
	if (*(volatile unsigned long *)(at.map + PAGE / 8) != WORD)
		COMPLAIN("made up a page");
	return 0;
}

static int call_kernel_touch(void)
{
	at.piped = write(ends[1], at.map + PAGE / 8, sizeof(long));
	return result(at.piped);
}

static int call_open_file(void)
{
	return open_as(at.file_path, &at.file);
}

static int call_map_file(void)
{
	return map_as(at.file, MAP_SHARED);
}

static int call_punch_file(void)
{
	return result(fallocate(at.file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 3 * PAGE,
				2 * PAGE));
}

static int call_chmod_file(void)
{
	return result(chmod(at.file_path, 0600));
}

static int call_stat_file(void)
{
	struct stat known;

	return result(stat(at.file_path, &known));
}

static int call_list_files(void)
{
	char buf[1024];
	int fd = open(mounted, O_RDONLY | O_DIRECTORY);
	int ret;

	if (fd < 0)
		return -errno;
	ret = result(syscall(SYS_getdents64, fd, buf, sizeof(buf)));
	close(fd);
	return ret;
}

static int call_mount(void)
{
	if (mount("none", empty, "umem", 0, NULL))
		return -errno;
	at.mounted = 1;
	return 0;
}

/* Closing cannot fail, but must do all of its work. */
static int call_close(void)
{
	close(at.server);
	close(at.shmem);
	close(at.control);
	at.server = at.shmem = at.control = -1;
	return 0;
}

static const struct {
	const char *name;
	void (*prepare)(void);
	int (*call)(void);
} calls[] = {
	{ "open", prepare_nothing, call_open },
	{ "UMEM_INIT", prepare_control, call_init },
	{ "UMEM_DEV_CREATE_UMEM", prepare_control, call_create },
	{ "UMEM_DEV_LIST", prepare_area, call_list },
	{ "UMEM_DEV_REATTACH", prepare_lost, call_reattach },
	{ "UMEM_GET_PAGE_REQUEST", prepare_discarded, call_get },
	{ "UMEM_MARK_PAGE_CACHED", prepare_map, call_mark },
	{ "UMEM_MARK_PAGE_CACHED of many", prepare_map, call_mark_many },
	{ "UMEM_MARK_PAGE_CACHED of a discarded page", prepare_discarded, call_mark },
	{ "UMEM_MARK_TOUCH", prepare_map, call_mark_touch },
	{ "UMEM_GET_INFO", prepare_area, call_info },
	{ "UMEM_SET_LOSS_POLICY", prepare_area, call_policy },
	{ "UMEM_MARK_PAGE_POISONED", prepare_map, call_poison },
	{ "UMEM_GET_BITMAP", prepare_area, call_bitmap },
	{ "UMEM_MAKE_VMA_ANONYMOUS", prepare_complete, call_plain },
	{ "UMEM_SET_DIRTY_LOG on", prepare_plain, call_log_on },
	{ "UMEM_SET_DIRTY_LOG off", prepare_log, call_log_off },
	{ "UMEM_GET_DIRTY", prepare_log, call_dirty },
	{ "UMEM_GET_STATS", prepare_area, call_stats },
	{ "read", prepare_discarded, call_read },
	{ "write", prepare_map, call_write },
	{ "write of a discarded page", prepare_discarded, call_write },
	{ "poll", prepare_discarded, call_poll },
	{ "open of a node", prepare_area, call_open_node },
	{ "mmap of a node", prepare_node, call_map_node },
	{ "mmap after UMEM_INIT", prepare_init, call_map_init },
	{ "mremap", prepare_map, call_remap },
	{ "munmap of the middle", prepare_map, call_unmap },
	{ "MADV_REMOVE", prepare_map, call_discard },
	{ "touch", prepare_cached, call_touch },
	{ "touch by the kernel", prepare_cached, call_kernel_touch },
	{ "open of a file", prepare_area, call_open_file },
	{ "mmap of a file", prepare_file, call_map_file },
	{ "fallocate of a file", prepare_file, call_punch_file },
	{ "chmod of a file", prepare_file, call_chmod_file },
	{ "stat of a file", prepare_area, call_stat_file },
	{ "getdents", prepare_area, call_list_files },
	{ "mount", prepare_nothing, call_mount },
	{ "close", prepare_area, call_close },
};

static void arm(int nth)
{
	char text[16];
	int len = snprintf(text, sizeof(text), "%d", nth);

	must(pwrite(fail_nth, text, len, 0) == len, "fail-nth");
}

/* Was the failure put in?  Disarms it in any case. */
static int disarm(void)
{
	char text[16] = "";
	long left;

	/* Reading copies too: what fails here did not fail before. */
	if (pread(fail_nth, text, sizeof(text) - 1, 0) < 0)
		left = 1;
	else
		left = strtol(text, NULL, 10);
	/* As does writing. */
	while (pwrite(fail_nth, "0", 1, 0) != 1)
		;
	return !left;
}

static void sweep(const char *name, void (*prepare)(void), int (*call)(void))
{
	struct state before, ready;
	int nth, ret, injected = 1, told = 0, bad_before = bad;

	current = name;
	/* One complaint about a call is enough: looking for what is left takes time. */
	for (nth = 1; injected && nth < MOST && bad == bad_before; nth++) {
		before = look();
		memset(&at, 0, sizeof(at));
		at.control = at.server = at.shmem = at.node = at.file = -1;
		prepare();
		ready = look();

		arm(nth);
		ret = call();
		injected = disarm();

		if (ret) {
			told++;
			if (!injected)
				COMPLAIN("fails by itself: %s", strerror(-ret));
			else if (ret != -ENOMEM && ret != -EFAULT)
				COMPLAIN("failure %d: %s", nth, strerror(-ret));
			expect(ready, "after a failure");
		}
		clean_up();
		expect(before, "after it");
	}
	if (nth == MOST)
		COMPLAIN("no end after %d failures", nth);
	printf("%s: %d failures, %d told\n", name, nth - 2, told);
	fflush(stdout);
}

int main(int argc, char **argv)
{
	unsigned int i;

	if (argc != 3)
		return 2;
	current = argv[0];
	mounted = argv[1];
	empty = argv[2];
	signal(SIGBUS, on_bus_error);
	signal(SIGSEGV, on_bus_error);
	fail_nth = open("/proc/self/fail-nth", O_RDWR);
	must(fail_nth >= 0 && !pipe(ends), "fail-nth");
	for (i = 0; i < sizeof(calls) / sizeof(*calls); i++)
		sweep(calls[i].name, calls[i].prepare, calls[i].call);
	return !!bad;
}

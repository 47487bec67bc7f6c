// SPDX-License-Identifier: GPL-2.0-only
/*
 * server.c - the server's end of an area: read, write, poll, ioctl
 *
 * The same calls work on two kinds of file: the server_fd of a named area, whose
 * file operations are here, and an open of /dev/umem after UMEM_INIT, whose file
 * operations are in main.c and call these functions.
 *
 * Locking: umem_area.server_lock protects umem_area.server and the fenced flag of
 * the server that it points to.  A server is freed by the release of its file,
 * which takes itself out first, so who finds one there under the lock may use it.
 * fenced is read without the lock too: it only ever becomes true.
 *
 * Copyright (C) 2026 The umem authors
 */
#include <linux/bitmap.h>
#include <linux/overflow.h>
#include <linux/pid.h>
#include <linux/poll.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "trace.h"
#include "umem.h"

/* Requests handed over, or offsets taken, at a time; they are on the stack. */
#define UMEM_BATCH	32

/* Words of the log of writes that are read at a time. */
#define UMEM_DIRTY_WORDS	32

/* Ranges of a mark that need no memory of their own; on the stack too. */
#define UMEM_FEW	8

/**
 * struct umem_server - one server of an area
 * @area: the area, with a reference
 * @pid: who attached
 * @fenced: another one took over
 */
struct umem_server {
	struct umem_area *area;
	struct pid *pid;
	bool fenced;
};

/**
 * umem_server_new() - make a server that is not attached yet
 * @area: whose; takes a reference of its own
 *
 * Return: the server or NULL.
 */
struct umem_server *umem_server_new(struct umem_area *area)
{
	struct umem_server *server;

	server = kzalloc(sizeof(*server), GFP_KERNEL_ACCOUNT);
	if (!server)
		return NULL;
	umem_area_get(area);
	server->area = area;
	server->pid = get_pid(task_tgid(current));
	return server;
}

/**
 * umem_server_attach() - make a server the one that gets the requests
 * @server: it
 * @force: fence the one that does so now
 *
 * Return: 0 or -EBUSY.
 */
int umem_server_attach(struct umem_server *server, bool force)
{
	struct umem_area *area = server->area;
	bool again;

	spin_lock(&area->server_lock);
	if (area->server && !force) {
		spin_unlock(&area->server_lock);
		return -EBUSY;
	}
	if (area->server)
		WRITE_ONCE(area->server->fenced, true);
	WRITE_ONCE(area->server, server);
	again = area->had_server;
	area->had_server = true;
	spin_unlock(&area->server_lock);

	trace_umem_attach(area, again);
	if (again)
		umem_request_again(area);
	return 0;
}

/**
 * umem_server_free() - the end of a server, attached or not
 * @server: it
 */
void umem_server_free(struct umem_server *server)
{
	struct umem_area *area = server->area;
	bool lost = false;

	/* The log ends with its server, before somebody else may begin one. */
	mutex_lock(&area->log_mutex);
	if (READ_ONCE(area->server) == server)
		umem_dirty_stop(area);
	mutex_unlock(&area->log_mutex);

	spin_lock(&area->server_lock);
	if (area->server == server) {
		WRITE_ONCE(area->lost_at, jiffies);
		/* Pairs with the acquire of umem_server_is_lost(). */
		smp_store_release(&area->server, NULL);
		lost = true;
	}
	spin_unlock(&area->server_lock);

	if (lost) {
		trace_umem_detach(area);
		/* They sleep with a time limit from now on. */
		if (READ_ONCE(area->loss_timeout_ms))
			umem_wake_everybody(area);
	}
	put_pid(server->pid);
	kfree(server);
	umem_area_put(area);
}

/**
 * umem_server_pid() - who serves an area?
 * @area: the area
 * @served: out: somebody does
 *
 * Return: its process in the caller's pid namespace, or 0.
 */
pid_t umem_server_pid(struct umem_area *area, bool *served)
{
	pid_t pid = 0;

	spin_lock(&area->server_lock);
	*served = area->server;
	if (area->server)
		pid = pid_vnr(area->server->pid);
	spin_unlock(&area->server_lock);
	return pid;
}

/**
 * umem_server_is_lost() - has the area been without a server for too long?
 * @area: the area
 * @left: out: jiffies until the answer may change by itself
 *
 * Return: true when nobody is to wait for it any more.
 */
bool umem_server_is_lost(struct umem_area *area, long *left)
{
	u32 timeout_ms = READ_ONCE(area->loss_timeout_ms);

	*left = MAX_SCHEDULE_TIMEOUT;
	/* Pairs with the release of umem_server_free(). */
	if (!timeout_ms || smp_load_acquire(&area->server))
		return false;
	*left = READ_ONCE(area->lost_at) + msecs_to_jiffies(timeout_ms) -
		jiffies;
	return *left <= 0;
}

/*
 * Take up to @nr requests, at least one unless there is an error; sleep for the
 * first one when @nonblock does not forbid it.
 */
static int umem_server_take(struct umem_server *server,
			    struct umem_page_request *reqs, unsigned int nr,
			    bool nonblock)
{
	struct umem_area *area = server->area;
	int got, ret;

	for (;;) {
		if (READ_ONCE(server->fenced))
			return -ENODEV;
		got = umem_request_take(area, reqs, nr);
		if (got > 0 && READ_ONCE(server->fenced)) {
			/* They were meant for the successor. */
			umem_request_again(area);
			return -ENODEV;
		}
		if (got)
			return got;
		if (nonblock)
			return -EAGAIN;
		ret = wait_event_interruptible(area->server_wq,
					       READ_ONCE(server->fenced) ||
					       umem_request_pending(area));
		if (ret)
			return ret;
	}
}

/* How one record of a request leaves the kernel. */
typedef bool (*umem_copy_out)(void __user *to, unsigned int n,
			      const struct umem_page_request *req);

static bool umem_copy_offset(void __user *to, unsigned int n,
			     const struct umem_page_request *req)
{
	return !put_user(req->pgoff, (u64 __user *)to + n);
}

static bool umem_copy_record(void __user *to, unsigned int n,
			     const struct umem_page_request *req)
{
	return !copy_to_user((struct umem_page_request __user *)to + n, req,
			     sizeof(*req));
}

/*
 * Hand over up to @nr requests.  Sleeps for the first one alone: what is there
 * is given at once.  Returns how many, or an error when it is none.
 */
static long umem_server_deliver(struct umem_server *server, void __user *to,
				unsigned long nr, bool nonblock,
				umem_copy_out copy_out)
{
	struct umem_page_request reqs[UMEM_BATCH];
	struct umem_area *area = server->area;
	unsigned long done = 0;
	int i, got;

	while (done < nr) {
		got = umem_server_take(server, reqs,
				       min_t(unsigned long, nr - done,
					     UMEM_BATCH),
				       nonblock || done);
		if (got < 0)
			return done ?: got;
		for (i = 0; i < got; i++) {
			if (!copy_out(to, done + i, &reqs[i]))
				break;
			trace_umem_deliver(area, reqs[i].pgoff, reqs[i].flags);
		}
		atomic_long_add(i, &area->nr_delivered);
		done += i;
		if (i < got) {
			umem_request_return(area, &reqs[i], got - i);
			return done ?: -EFAULT;
		}
		if (got < UMEM_BATCH)
			break;
	}
	return done;
}

/**
 * umem_server_read() - read page offsets that are wanted
 * @server: the server
 * @buf: room for native-endian u64
 * @count: its length in bytes
 * @nonblock: give -EAGAIN rather than sleep
 *
 * Return: bytes read or a negative error code.
 */
ssize_t umem_server_read(struct umem_server *server, char __user *buf,
			 size_t count, bool nonblock)
{
	long got;

	if (count < sizeof(u64))
		return -EINVAL;

	got = umem_server_deliver(server, buf, count / sizeof(u64), nonblock,
				  umem_copy_offset);
	return got < 0 ? got : got * (ssize_t)sizeof(u64);
}

/* Is a range of pages inside the area, and made of whole granules? */
static bool umem_range_is_valid(const struct umem_area *area, u64 pgoff,
				u64 count)
{
	return count && count <= area->npages && pgoff <= area->npages - count &&
	       !((pgoff | count) & ((1UL << area->order) - 1));
}

/* Mark granules given by the offsets of their first pages, neighbours together. */
static int umem_mark_offsets(struct umem_area *area, const u64 *offsets,
			     unsigned int nr)
{
	unsigned long step = 1UL << area->order;
	unsigned int i, run;
	u64 nr_new = 0;
	int ret;

	for (i = 0; i < nr; i += run) {
		for (run = 1; i + run < nr; run++)
			if (offsets[i + run] != offsets[i] + run * step)
				break;
		ret = umem_mark(area, offsets[i] >> area->order, run, &nr_new);
		if (ret)
			return ret;
	}
	return 0;
}

/**
 * umem_server_write() - mark the pages whose offsets are written
 * @server: the server
 * @buf: native-endian u64
 * @count: its length in bytes
 *
 * Return: bytes up to the first bad offset, or a negative error code when that is
 * none.
 */
ssize_t umem_server_write(struct umem_server *server, const char __user *buf,
			  size_t count)
{
	struct umem_area *area = server->area;
	u64 offsets[UMEM_BATCH];
	size_t done = 0;

	if (count % sizeof(u64))
		return -EINVAL;

	while (done < count) {
		size_t len = min(count - done, sizeof(offsets));
		unsigned int good, nr = len / sizeof(u64);
		int ret;

		if (READ_ONCE(server->fenced))
			return done ?: -ENODEV;
		if (copy_from_user(offsets, buf + done, len))
			return done ?: -EFAULT;
		for (good = 0; good < nr; good++)
			if (!umem_range_is_valid(area, offsets[good],
						 1UL << area->order))
				break;
		ret = umem_mark_offsets(area, offsets, good);
		if (ret)
			return done ?: ret;
		done += good * sizeof(u64);
		if (good < nr)
			return done ?: -EINVAL;
		if (fatal_signal_pending(current))
			break;
		cond_resched();
	}
	return done;
}

/**
 * umem_server_poll() - is there a request to read?
 * @server: the server
 * @file: what is polled
 * @wait: as poll() has it
 *
 * Return: the events.
 */
__poll_t umem_server_poll(struct umem_server *server, struct file *file,
			  struct poll_table_struct *wait)
{
	struct umem_area *area = server->area;
	__poll_t events = EPOLLOUT | EPOLLWRNORM;

	poll_wait(file, &area->server_wq, wait);
	if (READ_ONCE(server->fenced))
		return EPOLLERR | EPOLLHUP;
	if (umem_request_poll(area))
		events |= EPOLLIN | EPOLLRDNORM;
	return events;
}

static long umem_ioctl_get(struct umem_server *server, void __user *argp,
			   bool nonblock)
{
	struct umem_page_requests arg;
	long got;

	if (copy_from_user(&arg, argp, sizeof(arg)))
		return -EFAULT;
	if (!arg.nr || arg.reserved)
		return -EINVAL;

	got = umem_server_deliver(server, u64_to_user_ptr(arg.requests), arg.nr,
				  nonblock, umem_copy_record);
	if (got < 0)
		return got;
	if (put_user((u32)got,
		     &((struct umem_page_requests __user *)argp)->nr)) {
		/* The caller cannot know what it got. */
		umem_request_again(server->area);
		return -EFAULT;
	}
	return 0;
}

static void umem_free_ranges(struct umem_page_range *ranges,
			     const struct umem_page_range *few)
{
	if (ranges != few)
		kvfree(ranges);
}

/*
 * Copy the ranges of a mark in and check them all before any takes effect.  A few
 * of them go to @few, which has room for UMEM_FEW; more are to be freed by
 * umem_free_ranges().
 */
static struct umem_page_range *umem_copy_ranges(struct umem_area *area,
						const struct umem_mark_cached *arg,
						struct umem_page_range *few)
{
	const void __user *from = u64_to_user_ptr(arg->ranges);
	size_t size = array_size(arg->nr, sizeof(*few));
	struct umem_page_range *ranges = few;
	u32 i;

	if (arg->nr > UMEM_FEW) {
		ranges = vmemdup_user(from, size);
		if (IS_ERR(ranges))
			return ranges;
	} else if (copy_from_user(few, from, size)) {
		return ERR_PTR(-EFAULT);
	}
	for (i = 0; i < arg->nr; i++) {
		if (!umem_range_is_valid(area, ranges[i].pgoff,
					 ranges[i].count)) {
			umem_free_ranges(ranges, few);
			return ERR_PTR(-EINVAL);
		}
	}
	return ranges;
}

/* UMEM_MARK_PAGE_CACHED and UMEM_MARK_PAGE_POISONED. */
static long umem_ioctl_mark(struct umem_server *server, void __user *argp,
			    bool poison)
{
	struct umem_mark_cached __user *out = argp;
	struct umem_page_range few[UMEM_FEW], *ranges;
	struct umem_area *area = server->area;
	struct umem_mark_cached arg;
	u64 nr_new = 0;
	long ret = 0;
	u32 i;

	if (copy_from_user(&arg, argp, sizeof(arg)))
		return -EFAULT;
	if (!arg.nr || arg.nr > UMEM_MARK_MAX ||
	    arg.flags & ~(poison ? 0 : UMEM_MARK_TOUCH))
		return -EINVAL;
	/* What cannot be told is not done. */
	if (put_user(nr_new, &out->nr_new))
		return -EFAULT;

	ranges = umem_copy_ranges(area, &arg, few);
	if (IS_ERR(ranges))
		return PTR_ERR(ranges);

	for (i = 0; !ret && i < arg.nr; i++) {
		unsigned long start = ranges[i].pgoff >> area->order;
		unsigned long count = ranges[i].count >> area->order;

		if (READ_ONCE(server->fenced))
			ret = -ENODEV;
		else if (fatal_signal_pending(current))
			ret = -EINTR;
		else if (poison)
			ret = umem_poison(area, start, count, &nr_new);
		else
			ret = umem_mark(area, start, count, &nr_new);
	}
	if (!ret && arg.flags & UMEM_MARK_TOUCH)
		for (i = 0; i < arg.nr; i++)
			umem_touch(area, ranges[i].pgoff, ranges[i].count);
	if (!ret)
		ret = put_user(nr_new, &out->nr_new);
	umem_free_ranges(ranges, few);
	return ret;
}

static const unsigned long *umem_find_bitmap(struct umem_area *area, u32 which,
					     bool *known)
{
	*known = true;
	switch (which) {
	case UMEM_BITMAP_CACHED:
		return area->cached;
	case UMEM_BITMAP_REQUESTED:
		return area->requested;
	case UMEM_BITMAP_POISONED:
		/* Pairs with the release of umem_need_bitmap(). */
		return smp_load_acquire(&area->poisoned);
	default:
		*known = false;
		return NULL;
	}
}

static long umem_ioctl_bitmap(struct umem_server *server, void __user *argp)
{
	struct umem_area *area = server->area;
	u64 first, nr_words = DIV_ROUND_UP_ULL(area->ngranules, 64);
	const unsigned long *bitmap;
	struct umem_bitmap arg;
	u64 __user *to;
	bool known;
	u32 i;

	if (copy_from_user(&arg, argp, sizeof(arg)))
		return -EFAULT;
	bitmap = umem_find_bitmap(area, arg.which, &known);
	first = arg.first / 64;
	if (!known || arg.reserved || arg.first % 64 || first > nr_words ||
	    arg.nr_words > nr_words - first)
		return -EINVAL;

	to = u64_to_user_ptr(arg.words);
	for (i = 0; i < arg.nr_words; i++) {
		u64 word = 0;

		if (bitmap)
			bitmap_to_arr64(&word, bitmap + (first + i) *
					(64 / BITS_PER_LONG),
					min_t(u64, 64, area->ngranules -
					      (first + i) * 64));
		if (put_user(word, to + i))
			return -EFAULT;
		if (i % UMEM_WORDS_PER_TURN == 0) {
			if (fatal_signal_pending(current))
				return -EINTR;
			cond_resched();
		}
	}
	return 0;
}

static long umem_ioctl_loss_policy(struct umem_server *server,
				   void __user *argp)
{
	struct umem_area *area = server->area;
	struct umem_loss_policy arg;

	if (copy_from_user(&arg, argp, sizeof(arg)))
		return -EFAULT;
	if (arg.reserved)
		return -EINVAL;
	/* Nobody is lost now; it counts from when the server goes. */
	WRITE_ONCE(area->loss_timeout_ms, arg.timeout_ms);
	return 0;
}

static long umem_ioctl_stats(struct umem_server *server, void __user *argp)
{
	struct umem_stats stats;

	umem_stats_read(server->area, &stats);
	return copy_to_user(argp, &stats, sizeof(stats)) ? -EFAULT : 0;
}

/*
 * To be the only one who works on the log and on what VMAs do.  Once a successor has
 * had the mutex, the server that it fenced does not get it.
 */
static int umem_lock_log(struct umem_server *server)
{
	int ret = mutex_lock_killable(&server->area->log_mutex);

	if (ret)
		return ret;
	if (READ_ONCE(server->fenced)) {
		mutex_unlock(&server->area->log_mutex);
		return -ENODEV;
	}
	return 0;
}

static long umem_ioctl_dirty_log(struct umem_server *server, void __user *argp)
{
	struct umem_area *area = server->area;
	struct umem_dirty_log arg;
	int ret;

	if (copy_from_user(&arg, argp, sizeof(arg)))
		return -EFAULT;
	if (arg.reserved || arg.on > 1)
		return -EINVAL;

	ret = umem_lock_log(server);
	if (ret)
		return ret;
	if (arg.on)
		ret = umem_dirty_start(area);
	else
		umem_dirty_stop(area);
	mutex_unlock(&area->log_mutex);
	return ret;
}

static long umem_ioctl_dirty(struct umem_server *server, void __user *argp)
{
	struct umem_dirty __user *out = argp;
	struct umem_area *area = server->area;
	u64 nr_words = DIV_ROUND_UP_ULL(area->ngranules, 64);
	u64 words[UMEM_DIRTY_WORDS], nr_dirty = 0;
	struct umem_dirty arg;
	u64 __user *to;
	u32 i, w, nr;
	bool clear;
	int ret;

	if (copy_from_user(&arg, argp, sizeof(arg)))
		return -EFAULT;
	if (arg.flags & ~UMEM_DIRTY_PEEK || arg.first % 64 ||
	    arg.first / 64 > nr_words ||
	    arg.nr_words > nr_words - arg.first / 64)
		return -EINVAL;
	/* What cannot be told is not cleared. */
	if (put_user(nr_dirty, &out->nr_dirty))
		return -EFAULT;

	to = u64_to_user_ptr(arg.words);
	clear = !(arg.flags & UMEM_DIRTY_PEEK);
	for (i = 0; i < arg.nr_words; i += nr) {
		unsigned long first = arg.first + 64UL * i;

		nr = min_t(u32, arg.nr_words - i, UMEM_DIRTY_WORDS);
		ret = umem_lock_log(server);
		if (ret)
			return ret;
		ret = umem_dirty_read(area, first, words, nr, clear);
		mutex_unlock(&area->log_mutex);
		if (ret)
			return ret;
		if (copy_to_user(to + i, words, nr * sizeof(*words))) {
			if (clear)
				umem_dirty_put_back(area, first, words, nr);
			return -EFAULT;
		}
		for (w = 0; w < nr; w++)
			nr_dirty += hweight64(words[w]);
		if (fatal_signal_pending(current))
			return -EINTR;
	}
	return put_user(nr_dirty, &out->nr_dirty);
}

static long umem_ioctl_plain(struct umem_server *server)
{
	struct umem_area *area = server->area;
	int ret;

	ret = umem_lock_log(server);
	if (ret)
		return ret;
	/* Pairs with the release of umem_mark(). */
	if (area->logging || !smp_load_acquire(&area->complete))
		ret = -EBUSY;
	else
		ret = umem_make_plain(area);
	mutex_unlock(&area->log_mutex);
	return ret;
}

static long umem_ioctl_info(struct umem_server *server, void __user *argp)
{
	struct umem_info info;

	umem_area_info(server->area, &info);
	return copy_to_user(argp, &info, sizeof(info)) ? -EFAULT : 0;
}

/**
 * umem_server_ioctl() - the ioctls of a server
 * @server: the server
 * @cmd: which
 * @arg: user address of its argument
 * @nonblock: give -EAGAIN rather than sleep
 *
 * Return: 0 or a negative error code.
 */
long umem_server_ioctl(struct umem_server *server, unsigned int cmd,
		       unsigned long arg, bool nonblock)
{
	void __user *argp = (void __user *)arg;

	if (READ_ONCE(server->fenced))
		return -ENODEV;

	switch (cmd) {
	case UMEM_GET_PAGE_REQUEST:
		return umem_ioctl_get(server, argp, nonblock);
	case UMEM_MARK_PAGE_CACHED:
		return umem_ioctl_mark(server, argp, false);
	case UMEM_MARK_PAGE_POISONED:
		return umem_ioctl_mark(server, argp, true);
	case UMEM_GET_INFO:
		return umem_ioctl_info(server, argp);
	case UMEM_SET_LOSS_POLICY:
		return umem_ioctl_loss_policy(server, argp);
	case UMEM_GET_BITMAP:
		return umem_ioctl_bitmap(server, argp);
	case UMEM_MAKE_VMA_ANONYMOUS:
		return umem_ioctl_plain(server);
	case UMEM_GET_STATS:
		return umem_ioctl_stats(server, argp);
	case UMEM_SET_DIRTY_LOG:
		return umem_ioctl_dirty_log(server, argp);
	case UMEM_GET_DIRTY:
		return umem_ioctl_dirty(server, argp);
	default:
		return -ENOTTY;
	}
}

/* The file operations of a server_fd; file->private_data is the server. */

static ssize_t umem_server_fop_read(struct file *file, char __user *buf,
				    size_t count, loff_t *pos)
{
	return umem_server_read(file->private_data, buf, count,
				file->f_flags & O_NONBLOCK);
}

static ssize_t umem_server_fop_write(struct file *file, const char __user *buf,
				     size_t count, loff_t *pos)
{
	return umem_server_write(file->private_data, buf, count);
}

static __poll_t umem_server_fop_poll(struct file *file,
				     struct poll_table_struct *wait)
{
	return umem_server_poll(file->private_data, file, wait);
}

static long umem_server_fop_ioctl(struct file *file, unsigned int cmd,
				  unsigned long arg)
{
	return umem_server_ioctl(file->private_data, cmd, arg,
				 file->f_flags & O_NONBLOCK);
}

static int umem_server_fop_release(struct inode *inode, struct file *file)
{
	umem_server_free(file->private_data);
	return 0;
}

const struct file_operations umem_server_fops = {
	.owner		= THIS_MODULE,
	.read		= umem_server_fop_read,
	.write		= umem_server_fop_write,
	.poll		= umem_server_fop_poll,
	.unlocked_ioctl	= umem_server_fop_ioctl,
	.compat_ioctl	= compat_ptr_ioctl,
	.release	= umem_server_fop_release,
	.llseek		= noop_llseek,
};

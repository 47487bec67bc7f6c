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
#include <linux/overflow.h>
#include <linux/pid.h>
#include <linux/poll.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "umem.h"

/* Requests handed over, or offsets taken, at a time; they are on the stack. */
#define UMEM_BATCH	32

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
	area->server = server;
	again = area->had_server;
	area->had_server = true;
	spin_unlock(&area->server_lock);

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

	spin_lock(&area->server_lock);
	if (area->server == server)
		area->server = NULL;
	spin_unlock(&area->server_lock);

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
 * umem_server_area() - which area does a server serve?
 * @server: it
 *
 * Return: the area; a borrowed reference.
 */
struct umem_area *umem_server_area(struct umem_server *server)
{
	return server->area;
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
		for (i = 0; i < got; i++)
			if (!copy_out(to, done + i, &reqs[i]))
				break;
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

/* Mark pages given by their offsets, neighbours together. */
static int umem_mark_offsets(struct umem_area *area, const u64 *offsets,
			     unsigned int nr)
{
	unsigned int i, run;
	u64 nr_new = 0;
	int ret;

	for (i = 0; i < nr; i += run) {
		for (run = 1; i + run < nr; run++)
			if (offsets[i + run] != offsets[i] + run)
				break;
		ret = umem_mark(area, offsets[i], run, &nr_new);
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
			if (offsets[good] >= area->npages)
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

static long umem_ioctl_mark(struct umem_server *server, void __user *argp)
{
	struct umem_mark_cached __user *out = argp;
	struct umem_area *area = server->area;
	struct umem_page_range *ranges;
	struct umem_mark_cached arg;
	u64 nr_new = 0;
	long ret = 0;
	u32 i;

	if (copy_from_user(&arg, argp, sizeof(arg)))
		return -EFAULT;
	if (!arg.nr || arg.nr > UMEM_MARK_MAX || arg.flags)
		return -EINVAL;
	/* What cannot be told is not done. */
	if (put_user(nr_new, &out->nr_new))
		return -EFAULT;

	ranges = vmemdup_user(u64_to_user_ptr(arg.ranges),
			      array_size(arg.nr, sizeof(*ranges)));
	if (IS_ERR(ranges))
		return PTR_ERR(ranges);

	for (i = 0; i < arg.nr; i++) {
		if (!ranges[i].count || ranges[i].count > area->npages ||
		    ranges[i].pgoff > area->npages - ranges[i].count) {
			ret = -EINVAL;
			goto free;
		}
	}

	for (i = 0; !ret && i < arg.nr; i++) {
		if (READ_ONCE(server->fenced))
			ret = -ENODEV;
		else if (fatal_signal_pending(current))
			ret = -EINTR;
		else
			ret = umem_mark(area, ranges[i].pgoff,
					ranges[i].count, &nr_new);
	}
	if (!ret)
		ret = put_user(nr_new, &out->nr_new);
free:
	kvfree(ranges);
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
		return umem_ioctl_mark(server, argp);
	case UMEM_GET_INFO:
		return umem_ioctl_info(server, argp);
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

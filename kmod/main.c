// SPDX-License-Identifier: GPL-2.0-only
/*
 * main.c - the control node /dev/umem
 *
 * An open of it creates, lists and takes over named areas; or, by UMEM_INIT,
 * becomes an unnamed area itself, both ends of it in one file, as in the series
 * of June 2012.
 *
 * Locking: umem_control.server is set once, with umem_control.init_mutex held
 * and released to readers by smp_store_release(); umem_control.face is set before
 * it.  Neither changes until the file is released.
 *
 * Copyright (C) 2026 The umem authors
 */
#include <linux/anon_inodes.h>
#include <linux/capability.h>
#include <linux/file.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/poll.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "umem.h"

/* Descriptions that UMEM_DEV_LIST gives at a time; user space asks again. */
#define UMEM_LIST_MAX	4096U

/**
 * struct umem_control - an open of /dev/umem
 * @init_mutex: one UMEM_INIT at a time
 * @server: the server's end of the area of UMEM_INIT, or NULL before it
 * @face: the consumer's end
 */
struct umem_control {
	struct mutex init_mutex;	/* see the kernel-doc above */
	struct umem_server *server;
	struct file *face;
};

static struct umem_server *umem_control_server(struct file *file)
{
	struct umem_control *control = file->private_data;

	/* Pairs with the release of umem_ioctl_init(). */
	return smp_load_acquire(&control->server);
}

static int umem_control_open(struct inode *inode, struct file *file)
{
	struct umem_control *control;

	control = kzalloc(sizeof(*control), GFP_KERNEL_ACCOUNT);
	if (!control)
		return -ENOMEM;
	mutex_init(&control->init_mutex);
	file->private_data = control;
	return 0;
}

static int umem_control_release(struct inode *inode, struct file *file)
{
	struct umem_control *control = file->private_data;

	if (control->server) {
		fput(control->face);
		umem_server_free(control->server);
	}
	kfree(control);
	return 0;
}

static ssize_t umem_control_read(struct file *file, char __user *buf,
				 size_t count, loff_t *pos)
{
	struct umem_server *server = umem_control_server(file);

	if (!server)
		return -ENXIO;
	return umem_server_read(server, buf, count,
				file->f_flags & O_NONBLOCK);
}

static ssize_t umem_control_write(struct file *file, const char __user *buf,
				  size_t count, loff_t *pos)
{
	struct umem_server *server = umem_control_server(file);

	if (!server)
		return -ENXIO;
	return umem_server_write(server, buf, count);
}

static __poll_t umem_control_poll(struct file *file,
				  struct poll_table_struct *wait)
{
	struct umem_server *server = umem_control_server(file);

	if (!server)
		return EPOLLERR;
	return umem_server_poll(server, file, wait);
}

/* Private maps too: the program of 2012 keeps what it writes to itself. */
static int umem_control_mmap(struct file *file, struct vm_area_struct *vma)
{
	struct umem_control *control = file->private_data;

	if (!umem_control_server(file))
		return -ENXIO;
	return umem_face_mmap(control->face, vma, true);
}

/* Descriptors that are reserved, and the files to go there. */
struct umem_fds {
	int fd[2];
	struct file *file[2];
	int nr;
};

/* Takes over @file, which may be an ERR_PTR(), whether or not it succeeds. */
static int umem_fds_add(struct umem_fds *fds, struct file *file)
{
	int fd;

	if (IS_ERR(file))
		return PTR_ERR(file);
	fd = get_unused_fd_flags(O_CLOEXEC);
	if (fd < 0) {
		fput(file);
		return fd;
	}
	fds->fd[fds->nr] = fd;
	fds->file[fds->nr++] = file;
	return fd;
}

static void umem_fds_install(struct umem_fds *fds)
{
	while (fds->nr--)
		fd_install(fds->fd[fds->nr], fds->file[fds->nr]);
}

static void umem_fds_drop(struct umem_fds *fds)
{
	while (fds->nr--) {
		put_unused_fd(fds->fd[fds->nr]);
		fput(fds->file[fds->nr]);
	}
}

static long umem_ioctl_init(struct file *file, struct umem_init __user *argp)
{
	struct umem_control *control = file->private_data;
	struct umem_create wish = { };
	struct umem_fds fds = { };
	struct umem_server *server;
	struct umem_area *area;
	struct umem_init arg;
	struct file *face;
	int ret;

	if (copy_from_user(&arg, argp, sizeof(arg)))
		return -EFAULT;

	mutex_lock(&control->init_mutex);
	ret = -EBUSY;
	if (control->server)
		goto unlock;

	wish.size = arg.size;
	area = umem_area_create(&wish);
	ret = PTR_ERR_OR_ZERO(area);
	if (ret)
		goto unlock;

	face = umem_face_open(area);
	ret = PTR_ERR_OR_ZERO(face);
	if (ret)
		goto put_area;

	ret = -ENOMEM;
	server = umem_server_new(area);
	if (!server)
		goto put_face;

	ret = umem_fds_add(&fds, umem_charge_open(area));
	if (ret < 0)
		goto free_server;
	arg.shmem_fd = ret;
	arg.size = umem_area_size(area);

	ret = -EFAULT;
	if (copy_to_user(argp, &arg, sizeof(arg)))
		goto drop_fds;

	/*
	 * By now its number may have been guessed and the area taken over by
	 * UMEM_DEV_REATTACH: then this is not its server, and says so.
	 */
	ret = umem_server_attach(server, false);
	if (ret)
		goto drop_fds;

	control->face = face;
	/* Pairs with the acquire of umem_control_server(). */
	smp_store_release(&control->server, server);
	mutex_unlock(&control->init_mutex);
	umem_area_put(area);
	umem_fds_install(&fds);
	return 0;

drop_fds:
	umem_fds_drop(&fds);
free_server:
	umem_server_free(server);
put_face:
	fput(face);
put_area:
	umem_area_put(area);
unlock:
	mutex_unlock(&control->init_mutex);
	return ret;
}

/*
 * Open both ends that a server needs: its own and the backing file.  The server
 * is not attached; it goes with the files.
 */
static int umem_open_server(struct umem_area *area, struct umem_fds *fds,
			    struct umem_server **serverp, __s32 *server_fd,
			    __s32 *shmem_fd)
{
	struct umem_server *server = umem_server_new(area);
	struct file *file;
	int ret;

	if (!server)
		return -ENOMEM;

	file = anon_inode_getfile("[umem-server]", &umem_server_fops, server,
				  O_RDWR | O_CLOEXEC);
	if (IS_ERR(file)) {
		umem_server_free(server);
		return PTR_ERR(file);
	}
	ret = umem_fds_add(fds, file);
	if (ret < 0)
		return ret;
	*server_fd = ret;

	ret = umem_fds_add(fds, umem_charge_open(area));
	if (ret < 0)
		return ret;
	*shmem_fd = ret;
	*serverp = server;
	return 0;
}

static long umem_ioctl_create(struct umem_create __user *argp)
{
	struct umem_fds fds = { };
	struct umem_server *server;
	struct umem_create arg;
	struct umem_area *area;
	int ret;

	if (copy_from_user(&arg, argp, sizeof(arg)))
		return -EFAULT;
	if (arg.flags & ~UMEM_CREATE_HUGE ||
	    memchr_inv(arg.reserved, 0, sizeof(arg.reserved)) ||
	    !arg.name[0] || strnlen(arg.name, UMEM_NAME_MAX) == UMEM_NAME_MAX)
		return -EINVAL;

	area = umem_area_create(&arg);
	if (IS_ERR(area))
		return PTR_ERR(area);

	ret = umem_open_server(area, &fds, &server, &arg.server_fd,
			       &arg.shmem_fd);
	if (ret)
		goto fail;
	arg.size = umem_area_size(area);
	arg.granule_size = umem_granule_size(area);
	arg.id = area->id;

	ret = -EFAULT;
	if (copy_to_user(argp, &arg, sizeof(arg)))
		goto fail;
	ret = umem_server_attach(server, false);
	if (ret)
		goto fail;

	/* Last: whoever sees the node finds a served area behind it. */
	ret = umem_area_add_node(area);
	if (ret)
		goto fail;
	umem_fds_install(&fds);
	umem_area_put(area);
	return 0;

fail:
	umem_fds_drop(&fds);
	umem_area_put(area);
	return ret;
}

static long umem_ioctl_list(struct umem_list __user *argp)
{
	struct umem_info *infos = NULL;
	struct umem_list arg;
	int ret = 0;

	if (copy_from_user(&arg, argp, sizeof(arg)))
		return -EFAULT;
	if (memchr_inv(arg.reserved, 0, sizeof(arg.reserved)))
		return -EINVAL;

	arg.nr = min(arg.nr, UMEM_LIST_MAX);
	if (arg.nr) {
		infos = kvcalloc(arg.nr, sizeof(*infos), GFP_KERNEL_ACCOUNT);
		if (!infos)
			return -ENOMEM;
	}
	arg.nr = umem_area_list(arg.first_id, infos, arg.nr, &arg.total);
	if (copy_to_user(u64_to_user_ptr(arg.infos), infos,
			 arg.nr * sizeof(*infos)) ||
	    copy_to_user(argp, &arg, sizeof(arg)))
		ret = -EFAULT;
	kvfree(infos);
	return ret;
}

static long umem_ioctl_reattach(struct umem_reattach __user *argp)
{
	struct umem_fds fds = { };
	struct umem_server *server;
	struct umem_reattach arg;
	struct umem_area *area;
	int ret;

	if (copy_from_user(&arg, argp, sizeof(arg)))
		return -EFAULT;
	if (arg.flags & ~UMEM_REATTACH_FORCE ||
	    memchr_inv(arg.reserved, 0, sizeof(arg.reserved)))
		return -EINVAL;

	area = umem_area_find(arg.id);
	if (!area)
		return -ENOENT;

	ret = -EPERM;
	if (!uid_eq(area->uid, current_fsuid()) && !capable(CAP_SYS_ADMIN))
		goto fail;

	ret = umem_open_server(area, &fds, &server, &arg.server_fd,
			       &arg.shmem_fd);
	if (ret)
		goto fail;
	arg.size = umem_area_size(area);
	arg.granule_size = umem_granule_size(area);

	ret = -EFAULT;
	if (copy_to_user(argp, &arg, sizeof(arg)))
		goto fail;
	ret = umem_server_attach(server, arg.flags & UMEM_REATTACH_FORCE);
	if (ret)
		goto fail;
	umem_fds_install(&fds);
	umem_area_put(area);
	return 0;

fail:
	umem_fds_drop(&fds);
	umem_area_put(area);
	return ret;
}

static long umem_control_ioctl(struct file *file, unsigned int cmd,
			       unsigned long arg)
{
	void __user *argp = (void __user *)arg;
	struct umem_server *server;

	switch (cmd) {
	case UMEM_INIT:
		return umem_ioctl_init(file, argp);
	case UMEM_DEV_CREATE_UMEM:
		return umem_ioctl_create(argp);
	case UMEM_DEV_LIST:
		return umem_ioctl_list(argp);
	case UMEM_DEV_REATTACH:
		return umem_ioctl_reattach(argp);
	case UMEM_GET_PAGE_REQUEST:
	case UMEM_MARK_PAGE_CACHED:
	case UMEM_GET_INFO:
	case UMEM_SET_LOSS_POLICY:
	case UMEM_MARK_PAGE_POISONED:
	case UMEM_GET_BITMAP:
	case UMEM_MAKE_VMA_ANONYMOUS:
	case UMEM_GET_STATS:
	case UMEM_SET_DIRTY_LOG:
	case UMEM_GET_DIRTY:
		server = umem_control_server(file);
		if (!server)
			return -ENXIO;
		return umem_server_ioctl(server, cmd, arg,
					 file->f_flags & O_NONBLOCK);
	default:
		return -ENOTTY;
	}
}

static const struct file_operations umem_control_fops = {
	.owner		= THIS_MODULE,
	.open		= umem_control_open,
	.release	= umem_control_release,
	.read		= umem_control_read,
	.write		= umem_control_write,
	.poll		= umem_control_poll,
	.unlocked_ioctl	= umem_control_ioctl,
	.compat_ioctl	= compat_ptr_ioctl,
	.mmap		= umem_control_mmap,
	.llseek		= noop_llseek,
};

static struct miscdevice umem_control_dev = {
	.minor	= MISC_DYNAMIC_MINOR,
	.name	= "umem",
	.fops	= &umem_control_fops,
	.mode	= 0660,
};

static int __init umem_init(void)
{
	int ret;

	ret = umem_areas_init();
	if (ret)
		return ret;
	ret = umem_files_init();
	if (ret)
		goto exit_areas;
	ret = misc_register(&umem_control_dev);
	if (ret)
		goto exit_files;
	return 0;

exit_files:
	umem_files_exit();
exit_areas:
	umem_areas_exit();
	return ret;
}

static void __exit umem_exit(void)
{
	misc_deregister(&umem_control_dev);
	umem_files_exit();
	umem_areas_exit();
}

module_init(umem_init);
module_exit(umem_exit);

MODULE_DESCRIPTION("Memory areas whose missing pages are supplied by user space");
MODULE_AUTHOR("The umem authors");
MODULE_LICENSE("GPL");
MODULE_VERSION("0.1.0");

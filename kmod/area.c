// SPDX-License-Identifier: GPL-2.0-only
/*
 * area.c - the life of an area: its backing file, its node, its end
 *
 * An area lives while it has a server, an open node or a mapping.  Each of them
 * is a file, or holds one, whose operations are ours: the file holds a reference
 * to the area and, as its owner, to the module, and the release of the last one
 * destroys the area.  A task that sleeps in the fault path holds the VMA's file
 * for the same end.
 *
 * Locking: umem_areas_mutex protects which areas exist: umem_areas, their number,
 * and the uniqueness of names.  An area whose count has dropped to zero may still be
 * found there; umem_area_find() does not hand it out.
 *
 * Copyright (C) 2026 The umem authors
 */
#include <linux/capability.h>
#include <linux/cdev.h>
#include <linux/cred.h>
#include <linux/ctype.h>
#include <linux/device.h>
#include <linux/fcntl.h>
#include <linux/log2.h>
#include <linux/module.h>
#include <linux/mount.h>
#include <linux/rcupdate.h>
#include <linux/shmem_fs.h>
#include <linux/slab.h>
#include <linux/user_namespace.h>
#include <linux/xarray.h>

#include "umem.h"

static unsigned int max_areas = 1024;
module_param(max_areas, uint, 0644);
MODULE_PARM_DESC(max_areas, "Most areas alive at a time (default 1024)");

static unsigned int max_area_gib;
module_param(max_area_gib, uint, 0644);
MODULE_PARM_DESC(max_area_gib,
		 "Largest area in GiB (default 0: four times the memory)");

static unsigned int max_user_gib;
module_param(max_user_gib, uint, 0644);
MODULE_PARM_DESC(max_user_gib,
		 "GiB of areas that one user without CAP_SYS_RESOURCE may have (default 0: no limit)");

/* Page offsets leave room for flags in a ring entry, and bitmaps for sanity. */
#define UMEM_MAX_PAGES	BIT_ULL(32)

/* Minors; more than areas, so that a number is not soon used again. */
#define UMEM_MINORS	(MINORMASK + 1)

static DEFINE_MUTEX(umem_areas_mutex);
static DEFINE_XARRAY_ALLOC(umem_areas);
static unsigned int umem_nr_areas;
static u32 umem_next_id;
static struct kmem_cache *umem_area_cache;
static unsigned long umem_last_serial;
static struct vfsmount *umem_mnt;
static struct vfsmount *umem_huge_mnt;

static dev_t umem_devt;
static struct cdev umem_node_cdev;

static struct class umem_class = {
	.name = "umem",
};

/* Attributes in /sys/class/umem/umemN. */

static ssize_t name_show(struct device *dev, struct device_attribute *attr,
			 char *buf)
{
	struct umem_area *area = dev_get_drvdata(dev);

	return sysfs_emit(buf, "%s\n", area->name);
}
static DEVICE_ATTR_RO(name);

static ssize_t size_show(struct device *dev, struct device_attribute *attr,
			 char *buf)
{
	return sysfs_emit(buf, "%llu\n", umem_area_size(dev_get_drvdata(dev)));
}
static DEVICE_ATTR_RO(size);

static ssize_t granule_size_show(struct device *dev,
				 struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%u\n",
			  umem_granule_size(dev_get_drvdata(dev)));
}
static DEVICE_ATTR_RO(granule_size);

static ssize_t cached_show(struct device *dev, struct device_attribute *attr,
			   char *buf)
{
	struct umem_area *area = dev_get_drvdata(dev);

	return sysfs_emit(buf, "%ld\n", atomic_long_read(&area->nr_cached));
}
static DEVICE_ATTR_RO(cached);

static ssize_t delivered_show(struct device *dev,
			      struct device_attribute *attr, char *buf)
{
	struct umem_area *area = dev_get_drvdata(dev);

	return sysfs_emit(buf, "%ld\n", atomic_long_read(&area->nr_delivered));
}
static DEVICE_ATTR_RO(delivered);

static ssize_t served_show(struct device *dev, struct device_attribute *attr,
			   char *buf)
{
	bool served;

	umem_server_pid(dev_get_drvdata(dev), &served);
	return sysfs_emit(buf, "%d\n", served);
}
static DEVICE_ATTR_RO(served);

static ssize_t server_pid_show(struct device *dev,
			       struct device_attribute *attr, char *buf)
{
	bool served;

	return sysfs_emit(buf, "%d\n",
			  umem_server_pid(dev_get_drvdata(dev), &served));
}
static DEVICE_ATTR_RO(server_pid);

static ssize_t huge_show(struct device *dev, struct device_attribute *attr,
			 char *buf)
{
	struct umem_area *area = dev_get_drvdata(dev);

	return sysfs_emit(buf, "%d\n", area->huge);
}
static DEVICE_ATTR_RO(huge);

static ssize_t loss_timeout_ms_show(struct device *dev,
				    struct device_attribute *attr, char *buf)
{
	struct umem_area *area = dev_get_drvdata(dev);

	return sysfs_emit(buf, "%u\n", READ_ONCE(area->loss_timeout_ms));
}
static DEVICE_ATTR_RO(loss_timeout_ms);

static struct attribute *umem_area_attrs[] = {
	&dev_attr_name.attr,
	&dev_attr_size.attr,
	&dev_attr_granule_size.attr,
	&dev_attr_cached.attr,
	&dev_attr_delivered.attr,
	&dev_attr_served.attr,
	&dev_attr_server_pid.attr,
	&dev_attr_huge.attr,
	&dev_attr_loss_timeout_ms.attr,
	NULL
};

static const struct attribute_group umem_area_group = {
	.attrs	= umem_area_attrs,
};

static const struct attribute_group *umem_area_groups[] = {
	&umem_area_group,
	&umem_stats_group,
	NULL
};

static char *umem_area_devnode(umem_devnode_arg *dev, umode_t *mode,
			       kuid_t *uid, kgid_t *gid)
{
	struct umem_area *area = dev_get_drvdata(dev);

	/* Without room for them the device core only asks for a name. */
	if (mode)
		*mode = 0660;
	if (uid)
		*uid = area->uid;
	if (gid)
		*gid = area->gid;
	return NULL;
}

static const struct device_type umem_area_type = {
	.name		= "umem_area",
	.groups		= umem_area_groups,
	.devnode	= umem_area_devnode,
};

static void umem_area_dev_release(struct device *dev)
{
	kfree(dev);
}

/**
 * umem_area_add_node() - make /dev/umemN
 * @area: the area, which has none yet
 *
 * Return: 0 or a negative error code.
 */
int umem_area_add_node(struct umem_area *area)
{
	struct device *dev;
	int ret;

	dev = kzalloc(sizeof(*dev), GFP_KERNEL);
	if (!dev)
		return -ENOMEM;

	device_initialize(dev);
	dev->class = &umem_class;
	dev->type = &umem_area_type;
	dev->devt = umem_devt + area->id;
	dev->release = umem_area_dev_release;
	dev_set_drvdata(dev, area);
	ret = dev_set_name(dev, "umem%u", area->id);
	if (!ret)
		ret = device_add(dev);
	if (ret) {
		put_device(dev);
		return ret;
	}
	area->dev = dev;
	return 0;
}

static void umem_area_free(struct umem_area *area)
{
	umem_mappers_free(area);
	kvfree(area->dirty);
	kvfree(area->poisoned);
	kvfree(area->discarded);
	kvfree(area->requested);
	kvfree(area->cached);
	umem_payer_put(area->payer);
	free_percpu(area->counts);
	kmem_cache_free(umem_area_cache, area);
}

static void umem_area_destroy(struct umem_area *area)
{
	if (area->dev)
		device_unregister(area->dev);

	mutex_lock(&umem_areas_mutex);
	xa_erase(&umem_areas, area->id);
	umem_nr_areas--;
	mutex_unlock(&umem_areas_mutex);

	fput(area->backing);
	umem_area_free(area);
}

static void umem_area_release(struct kref *ref)
{
	umem_area_destroy(container_of(ref, struct umem_area, ref));
}

/**
 * umem_area_get() - take another reference
 * @area: the area, of which the caller holds one already
 */
void umem_area_get(struct umem_area *area)
{
	kref_get(&area->ref);
}

/**
 * umem_area_put() - drop a reference
 * @area: the area; it may be destroyed here, so the caller may sleep and holds
 *	no lock
 */
void umem_area_put(struct umem_area *area)
{
	kref_put(&area->ref, umem_area_release);
}

/**
 * umem_area_find() - look an area up
 * @id: its number
 *
 * Return: the area, with a reference for the caller, or NULL.
 */
struct umem_area *umem_area_find(u32 id)
{
	struct umem_area *area;

	mutex_lock(&umem_areas_mutex);
	area = xa_load(&umem_areas, id);
	if (area && !kref_get_unless_zero(&area->ref))
		area = NULL;
	mutex_unlock(&umem_areas_mutex);
	return area;
}

/**
 * umem_area_find_name() - look an area up by its name
 * @name: the name, not empty; need not end with a NUL
 * @len: its length
 *
 * Return: the area, with a reference for the caller, or NULL.
 */
struct umem_area *umem_area_find_name(const char *name, unsigned int len)
{
	struct umem_area *area, *found = NULL;
	unsigned long index;

	mutex_lock(&umem_areas_mutex);
	xa_for_each(&umem_areas, index, area) {
		if (strlen(area->name) == len && !memcmp(area->name, name, len) &&
		    kref_get_unless_zero(&area->ref)) {
			found = area;
			break;
		}
	}
	mutex_unlock(&umem_areas_mutex);
	return found;
}

/**
 * umem_area_next() - find the first area from a number on
 * @id: in: the number; out: that of the area
 *
 * Return: the area, with a reference for the caller, or NULL.
 */
struct umem_area *umem_area_next(u32 *id)
{
	struct umem_area *area, *found = NULL;
	unsigned long index;

	mutex_lock(&umem_areas_mutex);
	xa_for_each_start(&umem_areas, index, area, *id) {
		if (kref_get_unless_zero(&area->ref)) {
			found = area;
			*id = index;
			break;
		}
	}
	mutex_unlock(&umem_areas_mutex);
	return found;
}

/* May this area be, next to those that are there? */
static int umem_area_check(const struct umem_area *area)
{
	u64 limit = (u64)READ_ONCE(max_user_gib) << (30 - PAGE_SHIFT);
	u64 npages = area->npages;
	struct umem_area *other;
	unsigned long index;

	lockdep_assert_held(&umem_areas_mutex);

	if (umem_nr_areas >= READ_ONCE(max_areas))
		return -ENOSPC;
	xa_for_each(&umem_areas, index, other) {
		if (area->name[0] && kref_read(&other->ref) &&
		    !strcmp(other->name, area->name))
			return -EEXIST;
		if (uid_eq(other->uid, area->uid))
			npages += other->npages;
	}
	if (limit && npages > limit && !capable(CAP_SYS_RESOURCE))
		return -EDQUOT;
	return 0;
}

/* Give the area its id, if its name is free. */
static int umem_area_publish(struct umem_area *area)
{
	int ret;

	mutex_lock(&umem_areas_mutex);
	ret = umem_area_check(area);
	/* A number is used again as late as can be: nodes are known by it. */
	if (!ret)
		ret = xa_alloc_cyclic(&umem_areas, &area->id, area,
				      XA_LIMIT(0, UMEM_MINORS - 1),
				      &umem_next_id, GFP_KERNEL);
	if (ret >= 0) {
		umem_nr_areas++;
		area->serial = ++umem_last_serial;
	}
	mutex_unlock(&umem_areas_mutex);
	return min(ret, 0);
}

static u64 umem_max_size(void)
{
	u64 limit = (u64)READ_ONCE(max_area_gib) << 30;

	if (!limit)
		limit = (u64)totalram_pages() << (PAGE_SHIFT + 2);
	return min(limit, UMEM_MAX_PAGES << PAGE_SHIFT);
}

static bool umem_name_is_valid(const char *name)
{
	/* It is a file's name too. */
	if (!strcmp(name, ".") || !strcmp(name, ".."))
		return false;
	for (; *name; name++)
		if (!isascii(*name) ||
		    (!isalnum(*name) && !strchr("._:+-", *name)))
			return false;
	return true;
}

/* Is it a size that granules can have? */
static bool umem_granule_is_valid(const struct umem_create *wish)
{
	u32 size = wish->granule_size;

	if (!size)
		return !(wish->flags & UMEM_CREATE_HUGE);
	if (!is_power_of_2(size) || size < PAGE_SIZE || size > UMEM_GRANULE_MAX)
		return false;
	/* One granule, one huge page. */
	return !(wish->flags & UMEM_CREATE_HUGE) || size == PMD_SIZE;
}

/* The backing file: a tmpfs file of the driver's own. */
static struct file *umem_area_new_backing(struct umem_area *area)
{
	char name[UMEM_NAME_MAX + sizeof("umem:")];
	struct inode *inode;
	struct file *file;

	snprintf(name, sizeof(name), "umem:%s", area->name);
	file = shmem_file_setup_with_mnt(area->huge ? umem_huge_mnt : umem_mnt,
					 name, umem_area_size(area),
					 UMEM_SHMEM_NORESERVE);
	/* What shmem calls no space is no memory for an inode: there is no limit. */
	if (file == ERR_PTR(-ENOSPC))
		return ERR_PTR(-ENOMEM);
	if (IS_ERR(file))
		return file;
	inode = file_inode(file);
	/* ftruncate() to the size that it has is the only one that is let. */
	SHMEM_I(inode)->seals |= F_SEAL_SHRINK | F_SEAL_GROW;
	/* Who may map it is decided at our nodes, not by labels of the inode. */
	inode->i_flags |= S_PRIVATE;
	/* Without a link shmem takes it for anonymous memory, and lets the knobs
	 * for huge anonymous pages override the mount's huge=never.
	 */
	set_nlink(inode, 1);
	return file;
}

/**
 * umem_area_create() - make an area
 * @wish: size, flags, granule size, loss policy and name; a name is NUL-terminated
 *	and empty for none
 *
 * Return: the area, with a reference for the caller, or an ERR_PTR().
 */
struct umem_area *umem_area_create(const struct umem_create *wish)
{
	struct umem_area *area;
	int ret;

	if (!wish->size || wish->size > umem_max_size() ||
	    !umem_name_is_valid(wish->name) || !umem_granule_is_valid(wish))
		return ERR_PTR(-EINVAL);
	if (wish->flags & UMEM_CREATE_HUGE && !umem_huge_mnt)
		return ERR_PTR(-EOPNOTSUPP);

	area = kmem_cache_zalloc(umem_area_cache, GFP_KERNEL);
	if (!area)
		return ERR_PTR(-ENOMEM);

	kref_init(&area->ref);
	if (wish->granule_size)
		area->order = ilog2(wish->granule_size) - PAGE_SHIFT;
	area->ngranules = DIV_ROUND_UP_ULL(wish->size, umem_granule_size(area));
	area->npages = area->ngranules << area->order;
	area->huge = wish->flags & UMEM_CREATE_HUGE;
	area->loss_timeout_ms = wish->loss_timeout_ms;
	area->lost_at = jiffies;
	strscpy(area->name, wish->name, sizeof(area->name));
	area->uid = current_fsuid();
	area->gid = current_fsgid();
	area->file_uid = area->uid;
	area->file_gid = area->gid;
	area->file_mode = 0660;
	mutex_init(&area->log_mutex);
	spin_lock_init(&area->mappers_lock);
	INIT_LIST_HEAD(&area->mappers);
	spin_lock_init(&area->server_lock);
	umem_requests_init(area);

	ret = -ENOMEM;
	area->counts = alloc_percpu_gfp(struct umem_counts, GFP_KERNEL_ACCOUNT);
	area->cached = kvcalloc(BITS_TO_LONGS(area->ngranules), sizeof(long),
				GFP_KERNEL_ACCOUNT);
	area->requested = kvcalloc(BITS_TO_LONGS(area->ngranules), sizeof(long),
				   GFP_KERNEL_ACCOUNT);
	area->payer = umem_payer_new();
	if (!area->counts || !area->cached || !area->requested || !area->payer)
		goto free;

	area->backing = umem_area_new_backing(area);
	if (IS_ERR(area->backing)) {
		ret = PTR_ERR(area->backing);
		goto free;
	}

	ret = umem_area_publish(area);
	if (ret)
		goto put_backing;
	return area;

put_backing:
	fput(area->backing);
free:
	umem_area_free(area);
	return ERR_PTR(ret);
}

/**
 * umem_area_open_backing() - open the backing file once more
 * @area: the area
 *
 * An open of its own for each purpose: VMAs of the server must not have the
 * same file as those of a consumer, or the mm may merge them.  Unlike the file of
 * shmem_file_setup() it can be used with pread() and pwrite().
 *
 * Return: the file, or an ERR_PTR().
 */
struct file *umem_area_open_backing(struct umem_area *area)
{
	return dentry_open(&area->backing->f_path, O_RDWR | O_LARGEFILE,
			   current_cred());
}

/**
 * umem_area_info() - describe an area
 * @area: the area
 * @info: filled in
 */
void umem_area_info(struct umem_area *area, struct umem_info *info)
{
	bool served;

	memset(info, 0, sizeof(*info));
	info->size = umem_area_size(area);
	info->nr_cached = atomic_long_read(&area->nr_cached);
	info->nr_delivered = atomic_long_read(&area->nr_delivered);
	info->id = area->id;
	info->granule_size = umem_granule_size(area);
	info->loss_timeout_ms = READ_ONCE(area->loss_timeout_ms);
	info->owner_uid = from_kuid_munged(current_user_ns(), area->uid);
	info->server_pid = umem_server_pid(area, &served);
	if (served)
		info->flags |= UMEM_INFO_SERVED;
	if (READ_ONCE(area->complete))
		info->flags |= UMEM_INFO_COMPLETE;
	if (atomic_read(&area->nr_maps))
		info->flags |= UMEM_INFO_MAPPED;
	if (area->dev)
		info->flags |= UMEM_INFO_NODE;
	if (area->huge)
		info->flags |= UMEM_INFO_HUGE;
	strscpy(info->name, area->name, sizeof(info->name));
}

/**
 * umem_area_list() - describe areas in the order of their ids
 * @first_id: pass over areas with smaller ids
 * @infos: room for descriptions
 * @nr: how many fit
 * @total: how many areas there are from @first_id on
 *
 * Return: how many were filled in.
 */
u32 umem_area_list(u32 first_id, struct umem_info *infos, u32 nr, u32 *total)
{
	struct umem_area *area;
	unsigned long index;
	u32 n = 0;

	*total = 0;
	mutex_lock(&umem_areas_mutex);
	xa_for_each_start(&umem_areas, index, area, first_id) {
		/* Still in the array, so not freed; but on its way out. */
		if (!kref_read(&area->ref))
			continue;
		if (n < nr)
			umem_area_info(area, &infos[n++]);
		(*total)++;
	}
	mutex_unlock(&umem_areas_mutex);
	return n;
}

/* The node: what a consumer opens.  file->private_data is a face of the area. */

static int umem_node_open(struct inode *inode, struct file *file)
{
	struct umem_area *area = umem_area_find(iminor(inode));
	struct file *face;
	int ret = -ENXIO;

	if (!area)
		return ret;
	/*
	 * A node that was removed while we came here belonged to an area that is
	 * gone, and an area without a name has no node.
	 */
	if (!inode->i_nlink || !area->name[0])
		goto put;

	face = umem_face_open(area);
	ret = PTR_ERR_OR_ZERO(face);
	if (!ret)
		file->private_data = face;
put:
	umem_area_put(area);
	return ret;
}

static int umem_node_release(struct inode *inode, struct file *file)
{
	fput(file->private_data);
	return 0;
}

static int umem_node_mmap(struct file *file, struct vm_area_struct *vma)
{
	return umem_face_mmap(file->private_data, vma, false);
}

/* SEEK_END tells a consumer the size. */
static loff_t umem_node_llseek(struct file *file, loff_t offset, int whence)
{
	return fixed_size_llseek(file, offset, whence,
			umem_area_size(umem_face_area(file->private_data)));
}

static const struct file_operations umem_node_fops = {
	.owner			= THIS_MODULE,
	.open			= umem_node_open,
	.release		= umem_node_release,
	.mmap			= umem_node_mmap,
	.get_unmapped_area	= thp_get_unmapped_area,
	.llseek			= umem_node_llseek,
};

/*
 * A tmpfs of our own.  For most areas huge pages are off: a large folio is mapped
 * with all its pages, so that a fault has to wait for every one of them.  It cannot
 * keep shmem_enabled=force away, nor MADV_COLLAPSE by a server; see fault.c.
 */
static struct vfsmount *umem_mount(const char *options)
{
	struct file_system_type *type = get_fs_type("tmpfs");
	struct vfsmount *mnt;
	char *data;

	if (!type)
		return ERR_PTR(-ENODEV);
	/* It is cut into pieces where it is. */
	data = kstrdup(options, GFP_KERNEL);
	mnt = data ? vfs_kern_mount(type, SB_KERNMOUNT, "umem", data) :
		     ERR_PTR(-ENOMEM);
	kfree(data);
	module_put(type->owner);
	return mnt;
}

static void umem_unmount(void)
{
	if (umem_huge_mnt)
		mntput(umem_huge_mnt);
	mntput(umem_mnt);
}

/**
 * umem_areas_init() - make ready for areas
 *
 * Return: 0 or a negative error code.
 */
int __init umem_areas_init(void)
{
	int ret;

	umem_stats_init();
	/* Between two sizes of kmalloc(), the larger of which would be half unused. */
	umem_area_cache = KMEM_CACHE(umem_area, SLAB_ACCOUNT);
	if (!umem_area_cache)
		return -ENOMEM;
	umem_mnt = umem_mount("huge=never");
	if (IS_ERR(umem_mnt)) {
		ret = PTR_ERR(umem_mnt);
		goto destroy_cache;
	}
	/* Not every kernel and machine has them; then there are no huge areas. */
	umem_huge_mnt = umem_mount("huge=always");
	if (IS_ERR(umem_huge_mnt))
		umem_huge_mnt = NULL;

	ret = umem_charge_init(umem_mnt);
	if (ret)
		goto unmount;

	ret = class_register(&umem_class);
	if (ret)
		goto exit_charge;

	ret = alloc_chrdev_region(&umem_devt, 0, UMEM_MINORS, "umem");
	if (ret)
		goto unregister_class;

	cdev_init(&umem_node_cdev, &umem_node_fops);
	umem_node_cdev.owner = THIS_MODULE;
	ret = cdev_add(&umem_node_cdev, umem_devt, UMEM_MINORS);
	if (ret)
		goto unregister_region;
	return 0;

unregister_region:
	unregister_chrdev_region(umem_devt, UMEM_MINORS);
unregister_class:
	class_unregister(&umem_class);
exit_charge:
	umem_charge_exit();
unmount:
	umem_unmount();
destroy_cache:
	kmem_cache_destroy(umem_area_cache);
	return ret;
}

/**
 * umem_areas_exit() - undo umem_areas_init()
 *
 * No area is left: each is destroyed by the release of the last file that holds
 * it, and every such file holds the module until after its release.
 */
void umem_areas_exit(void)
{
	cdev_del(&umem_node_cdev);
	unregister_chrdev_region(umem_devt, UMEM_MINORS);
	class_unregister(&umem_class);
	umem_unmount();
	/* A fault that dropped the last file may yet be on its way out of here. */
	synchronize_rcu_tasks();
	umem_charge_exit();
	WARN_ON(!xa_empty(&umem_areas));
	kmem_cache_destroy(umem_area_cache);
}

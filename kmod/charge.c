// SPDX-License-Identifier: GPL-2.0-only
/*
 * charge.c - who pays for the pages that the server fills
 *
 * A page is charged to the memory cgroup of the task that makes it, and most pages
 * of an area are made by its server, for a consumer that may have a cgroup of its
 * own.  A fault in the server's mapping is charged to the server: the kernel asks
 * the faulting mm.  A write asks the task, and a task may name another cgroup for a
 * while.  So the descriptor of the backing file that the server gets is shmem's but
 * for its write: that is charged to the first consumer that mapped the area.
 *
 * It is faster too.  A page that is written as a whole is not zeroed first, and a
 * run of pages costs one call instead of a trap each.
 *
 * Locking: none.  The cgroup of a payer goes from NULL to the one that stays.  A
 * payer lives as long as the area or a descriptor that uses it; the descriptor does
 * not keep the area.
 *
 * Copyright (C) 2026 The umem authors
 */
#include <linux/fs.h>
#include <linux/memcontrol.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/shmem_fs.h>
#include <linux/slab.h>

#include "umem.h"

/**
 * struct umem_payer - who pays
 * @ref: the area, and each descriptor of its backing file
 * @memcg: the cgroup, with a reference; NULL before there is a consumer
 */
struct umem_payer {
	struct kref ref;
	struct mem_cgroup *memcg;
};

static const struct file_operations *umem_shmem_fops;
/* A copy of shmem's with ours in it: what shmem has differs among kernels. */
static const struct file_operations *umem_merged_fops;

/**
 * umem_payer_new() - make a payer without a cgroup
 *
 * Return: it, with a reference for the caller, or NULL.
 */
struct umem_payer *umem_payer_new(void)
{
	struct umem_payer *payer = kzalloc(sizeof(*payer), GFP_KERNEL_ACCOUNT);

	if (payer)
		kref_init(&payer->ref);
	return payer;
}

static void umem_payer_release(struct kref *ref)
{
	struct umem_payer *payer = container_of(ref, struct umem_payer, ref);

	mem_cgroup_put(payer->memcg);
	kfree(payer);
}

/**
 * umem_payer_put() - drop a reference
 * @payer: a payer or NULL
 */
void umem_payer_put(struct umem_payer *payer)
{
	if (payer)
		kref_put(&payer->ref, umem_payer_release);
}

/**
 * umem_payer_choose() - the current task maps the area: the first who does pays
 * @payer: the area's
 */
void umem_payer_choose(struct umem_payer *payer)
{
	struct mem_cgroup *memcg;

	if (READ_ONCE(payer->memcg))
		return;
	memcg = get_mem_cgroup_from_mm(current->mm);
	if (cmpxchg(&payer->memcg, NULL, memcg))
		mem_cgroup_put(memcg);
}

static ssize_t umem_charge_write_iter(struct kiocb *iocb, struct iov_iter *from)
{
	struct umem_payer *payer = iocb->ki_filp->private_data;
	/* Pairs with the cmpxchg() of umem_payer_choose(). */
	struct mem_cgroup *memcg = smp_load_acquire(&payer->memcg), *old;
	ssize_t ret;

	if (!memcg)
		return umem_shmem_fops->write_iter(iocb, from);
	old = umem_set_active_memcg(memcg);
	ret = umem_shmem_fops->write_iter(iocb, from);
	umem_set_active_memcg(old);
	return ret;
}

static int umem_charge_release(struct inode *inode, struct file *file)
{
	umem_payer_put(file->private_data);
	return 0;
}

/*
 * What is not here is shmem's.  Of all its operations get_unmapped_area alone insists
 * on a file with shmem's table.
 */
static const struct file_operations umem_charge_fops = {
	.owner			= THIS_MODULE,
	.release		= umem_charge_release,
	.write_iter		= umem_charge_write_iter,
	.get_unmapped_area	= thp_get_unmapped_area,
};

/**
 * umem_charge_open() - open the backing file for a server
 * @area: the area, of which the caller holds a reference
 *
 * Return: the file, or an ERR_PTR().
 */
struct file *umem_charge_open(struct umem_area *area)
{
	struct file *file = umem_area_open_backing(area);

	if (IS_ERR(file))
		return file;
	/* The caller runs in an operation of ours, so the module is not going. */
	__module_get(THIS_MODULE);
	replace_fops(file, umem_merged_fops);
	kref_get(&area->payer->ref);
	file->private_data = area->payer;
	return file;
}

/**
 * umem_charge_init() - find out what shmem does with its files
 * @mnt: where to make one
 *
 * Return: 0 or a negative error code.
 */
int __init umem_charge_init(struct vfsmount *mnt)
{
	struct file *file = shmem_file_setup_with_mnt(mnt, "umem", 0,
						      UMEM_SHMEM_NORESERVE);
	const unsigned long *ours = (const unsigned long *)&umem_charge_fops;
	unsigned long *merged;
	unsigned int i;

	if (IS_ERR(file))
		return PTR_ERR(file);

	umem_shmem_fops = file->f_op;
	merged = kmemdup(file->f_op, sizeof(umem_charge_fops), GFP_KERNEL);
	fput(file);
	if (!merged)
		return -ENOMEM;
	for (i = 0; i < sizeof(umem_charge_fops) / sizeof(*ours); i++)
		if (ours[i])
			merged[i] = ours[i];
	umem_merged_fops = (const struct file_operations *)merged;
	return 0;
}

/**
 * umem_charge_exit() - undo umem_charge_init()
 */
void umem_charge_exit(void)
{
	kfree(umem_merged_fops);
}

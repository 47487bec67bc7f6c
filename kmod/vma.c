// SPDX-License-Identifier: GPL-2.0-only
/*
 * vma.c - work on the mappings of consumers, in whatever process they are
 *
 * The VMAs of an area, those of its servers too, hang in the tree of the backing
 * file's mapping.  They are looked up there under its lock, their address spaces
 * are held, and the lock is dropped before any mmap_lock is taken, which comes
 * before it in the kernel's order; by then the VMA may be gone or another, so it is
 * looked up again by address.  A fork that failed, its task killed in the middle
 * say, leaves an address space with VMAs of its parent in the tree, which may be
 * freed by then: who looked up anything in it would use them.
 *
 * Locking: mmap_lock alone; none of the driver's own locks is held.
 *
 * Copyright (C) 2026 The umem authors
 */
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/oom.h>
#include <linux/pagemap.h>
#include <linux/rbtree.h>
#include <linux/sched/mm.h>
#include <linux/slab.h>

#include "umem.h"

/* Mappings that one touch reaches; a VM has one or two. */
#define UMEM_TOUCH_MAPS	8

/* Passes over the mappings, should consumers fork meanwhile. */
#define UMEM_PLAIN_PASSES	4

/* Where a part of an area is mapped. */
struct umem_spot {
	struct mm_struct *mm;
	unsigned long addr;
	pgoff_t pgoff;
	unsigned long npages;
};

/* The next VMA of a mapping; @vma is NULL for the first one. */
static struct vm_area_struct *umem_next_vma(struct address_space *mapping,
					    struct vm_area_struct *vma)
{
	struct rb_node *node;

	node = vma ? rb_next(&vma->shared.rb) :
		     rb_first_cached(&mapping->i_mmap);
	return node ? rb_entry(node, struct vm_area_struct, shared.rb) : NULL;
}

static unsigned int umem_find_spots(struct umem_area *area, pgoff_t start,
				    pgoff_t end, struct umem_spot *spots)
{
	struct address_space *mapping = area->backing->f_mapping;
	struct vm_area_struct *vma = NULL;
	unsigned int nr = 0;

	i_mmap_lock_read(mapping);
	while (nr < UMEM_TOUCH_MAPS && (vma = umem_next_vma(mapping, vma))) {
		pgoff_t from = max(start, vma->vm_pgoff);
		pgoff_t to = min(end, vma->vm_pgoff + vma_pages(vma));

		if (from >= to || !umem_vma_is_ours(vma, area) ||
		    !mmget_not_zero(vma->vm_mm))
			continue;
		spots[nr++] = (struct umem_spot) {
			.mm	= vma->vm_mm,
			.addr	= vma->vm_start +
				  ((from - vma->vm_pgoff) << PAGE_SHIFT),
			.pgoff	= from,
			.npages	= to - from,
		};
	}
	i_mmap_unlock_read(mapping);
	return nr;
}

static void umem_touch_spot(struct umem_area *area,
			    const struct umem_spot *spot)
{
	unsigned long i, addr = spot->addr;
	struct vm_area_struct *vma;

	if (mmap_read_lock_killable(spot->mm))
		return;
	if (check_stable_address_space(spot->mm))
		goto unlock;
	for (i = 0; i < spot->npages; i++, addr += PAGE_SIZE) {
		vma = find_vma(spot->mm, addr);
		if (!vma || vma->vm_start > addr ||
		    !umem_vma_is_ours(vma, area) ||
		    linear_page_index(vma, addr) != spot->pgoff + i)
			break;
		/* Not allowed to sleep for what is missing, so it never does. */
		if (!fixup_user_fault(spot->mm, addr, FAULT_FLAG_REMOTE, NULL))
			this_cpu_inc(area->counts->nr_touched);
		if (fatal_signal_pending(current))
			break;
		cond_resched();
	}
unlock:
	mmap_read_unlock(spot->mm);
}

/**
 * umem_touch() - map pages for the consumers, as their own touch would
 * @area: the area
 * @start: first page
 * @count: how many, all of them inside the area
 *
 * A kindness: what cannot be mapped now is mapped when it is touched.
 */
void umem_touch(struct umem_area *area, pgoff_t start, unsigned long count)
{
	struct umem_spot spots[UMEM_TOUCH_MAPS];
	unsigned int i, nr;

	nr = umem_find_spots(area, start, start + count, spots);
	for (i = 0; i < nr; i++) {
		umem_touch_spot(area, &spots[i]);
		mmput(spots[i].mm);
	}
}

/* Hold every address space that has the area mapped.  Returns how many. */
static int umem_get_mms(struct umem_area *area, struct mm_struct ***mmsp)
{
	struct address_space *mapping = area->backing->f_mapping;
	unsigned int i, nr = 0, room = atomic_read(&area->nr_maps);
	struct vm_area_struct *vma = NULL;
	struct mm_struct **mms;

	mms = kvcalloc(max(room, 1U), sizeof(*mms), GFP_KERNEL);
	if (!mms)
		return -ENOMEM;

	i_mmap_lock_read(mapping);
	while (nr < room && (vma = umem_next_vma(mapping, vma))) {
		if (!umem_vma_is_ours(vma, area))
			continue;
		for (i = 0; i < nr; i++)
			if (mms[i] == vma->vm_mm)
				break;
		if (i == nr && mmget_not_zero(vma->vm_mm))
			mms[nr++] = vma->vm_mm;
		cond_resched();
	}
	i_mmap_unlock_read(mapping);
	*mmsp = mms;
	return nr;
}

/* Give the VMAs of one address space what they would have without us. */
static int umem_make_mm_plain(struct umem_area *area, struct mm_struct *mm)
{
	struct vm_area_struct *vma;
	struct file *face;

	if (mmap_write_lock_killable(mm))
		return -EINTR;
	if (check_stable_address_space(mm))
		goto unlock;
	for (vma = find_vma(mm, 0); vma; vma = find_vma(mm, vma->vm_end)) {
		if (!umem_vma_is_ours(vma, area))
			continue;
		/* No fault runs under the VMA's own lock from here on. */
		vma_start_write(vma);
		face = vma->vm_file;
		vma->vm_file = get_file(area->backing);
		WRITE_ONCE(vma->vm_ops, area->shmem_vm_ops);
		WRITE_ONCE(vma->vm_private_data, NULL);
		vm_flags_clear(vma, VM_DONTEXPAND);
		atomic_dec(&area->nr_maps);
		fput(face);
	}
unlock:
	mmap_write_unlock(mm);
	return 0;
}

/**
 * umem_make_plain() - have the driver out of the way of all consumers
 * @area: the area, of which every granule is cached
 *
 * Who sleeps holds the face that it found and takes the fault again.
 *
 * Return: 0, -EAGAIN, -EINTR or -ENOMEM.
 */
int umem_make_plain(struct umem_area *area)
{
	unsigned int pass;
	int i, nr, ret = 0;

	for (pass = 0; pass < UMEM_PLAIN_PASSES; pass++) {
		struct mm_struct **mms;

		if (!atomic_read(&area->nr_maps))
			return 0;
		nr = umem_get_mms(area, &mms);
		if (nr < 0)
			return nr;
		for (i = 0; i < nr; i++) {
			if (!ret)
				ret = umem_make_mm_plain(area, mms[i]);
			mmput(mms[i]);
		}
		kvfree(mms);
		if (ret)
			return ret;
	}
	return atomic_read(&area->nr_maps) ? -EAGAIN : 0;
}

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
 * A VMA that is just being made is not in the tree yet, but mmap_lock is held until it
 * is.  So who is to reach all VMAs waits for the mmap_lock of each mm that has lately
 * made one: they are remembered, without keeping what is mapped in them.
 *
 * Locking: mmap_lock, and umem_area.log_mutex outside of it where VMAs change their
 * operations.  umem_area.mappers_lock protects the list of mms that made a VMA; it is
 * taken under mmap_lock, and nothing under it.
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
#include <linux/userfaultfd_k.h>

#include "umem.h"

/* Mappings that one touch reaches; a VM has one or two. */
#define UMEM_TOUCH_MAPS	8

/* Passes over the mappings, should consumers fork or map meanwhile. */
#define UMEM_TURN_PASSES	4

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

/* An mm that made a VMA of an area; its mm_count is held, not its mm_users. */
struct umem_mapper {
	struct list_head list;
	struct mm_struct *mm;
};

static void umem_mappers_drop(struct list_head *list)
{
	struct umem_mapper *mapper, *next;

	list_for_each_entry_safe(mapper, next, list, list) {
		mmdrop(mapper->mm);
		kfree(mapper);
	}
}

/**
 * umem_mapper_add() - a VMA is being made
 * @area: the area
 * @mm: where; its mmap_lock is held for writing until the VMA can be found
 *
 * Return: 0 or -ENOMEM.
 */
int umem_mapper_add(struct umem_area *area, struct mm_struct *mm)
{
	struct umem_mapper *mapper, *next, *new;
	LIST_HEAD(gone);

	new = kmalloc(sizeof(*new), GFP_KERNEL_ACCOUNT);
	if (!new)
		return -ENOMEM;
	mmgrab(mm);
	new->mm = mm;

	spin_lock(&area->mappers_lock);
	list_for_each_entry_safe(mapper, next, &area->mappers, list)
		if (mapper->mm == mm || !atomic_read(&mapper->mm->mm_users))
			list_move(&mapper->list, &gone);
	list_add(&new->list, &area->mappers);
	spin_unlock(&area->mappers_lock);
	umem_mappers_drop(&gone);
	return 0;
}

/*
 * Wait until every VMA that was being made can be found.  Who makes one from now on
 * sees what was written to the area before.
 */
static int umem_mappers_wait(struct umem_area *area, bool killable)
{
	struct umem_mapper *mapper;
	LIST_HEAD(list);
	int ret = 0;

	spin_lock(&area->mappers_lock);
	list_splice_init(&area->mappers, &list);
	spin_unlock(&area->mappers_lock);

	list_for_each_entry(mapper, &list, list) {
		if (!mmget_not_zero(mapper->mm))
			continue;
		if (!killable)
			mmap_read_lock(mapper->mm);
		else
			ret = mmap_read_lock_killable(mapper->mm);
		if (!ret)
			mmap_read_unlock(mapper->mm);
		mmput(mapper->mm);
		if (ret)
			break;
	}
	if (ret) {
		/* For the next one, who has to wait for some of them. */
		spin_lock(&area->mappers_lock);
		list_splice_init(&list, &area->mappers);
		spin_unlock(&area->mappers_lock);
	}
	umem_mappers_drop(&list);
	return ret;
}

/**
 * umem_mappers_free() - forget who made VMAs
 * @area: the area, of which there are none any more
 */
void umem_mappers_free(struct umem_area *area)
{
	umem_mappers_drop(&area->mappers);
}

/* Is a VMA the view of a consumer, whoever answers for its faults? */
static bool umem_vma_is_view(struct vm_area_struct *vma, struct umem_area *area)
{
	return umem_vma_is_ours(vma, area) ||
	       READ_ONCE(vma->vm_file) == area->backing;
}

/* What is to become of VMAs. */
enum umem_turn {
	UMEM_TURN_PLAIN,	/* what they would have without us */
	UMEM_TURN_LOGGED,	/* we are asked before they are written to */
	UMEM_TURN_UNLOGGED,	/* we are not any more */
};

static bool umem_vma_turns(struct vm_area_struct *vma, struct umem_area *area,
			   enum umem_turn turn)
{
	switch (turn) {
	case UMEM_TURN_PLAIN:
		return umem_vma_is_ours(vma, area);
	case UMEM_TURN_LOGGED:
		return umem_vma_is_view(vma, area) &&
		       vma->vm_flags & VM_SHARED && !umem_vma_is_logged(vma);
	default:
		return umem_vma_is_ours(vma, area) && umem_vma_is_logged(vma);
	}
}

/*
 * Hold every address space in which a VMA is to turn.  Returns how many; with
 * some there is an array to free.
 */
static int umem_get_mms(struct umem_area *area, enum umem_turn turn,
			struct mm_struct ***mmsp)
{
	struct address_space *mapping = area->backing->f_mapping;
	unsigned int i, nr = 0, room = 0;
	struct vm_area_struct *vma = NULL;
	struct mm_struct **mms;

	i_mmap_lock_read(mapping);
	while ((vma = umem_next_vma(mapping, vma))) {
		room += umem_vma_turns(vma, area, turn);
		cond_resched();
	}
	i_mmap_unlock_read(mapping);
	if (!room)
		return 0;

	mms = kvcalloc(room, sizeof(*mms), GFP_KERNEL);
	if (!mms)
		return -ENOMEM;

	i_mmap_lock_read(mapping);
	while (nr < room && (vma = umem_next_vma(mapping, vma))) {
		if (!umem_vma_turns(vma, area, turn))
			continue;
		for (i = 0; i < nr; i++)
			if (mms[i] == vma->vm_mm)
				break;
		if (i == nr && mmget_not_zero(vma->vm_mm))
			mms[nr++] = vma->vm_mm;
		cond_resched();
	}
	i_mmap_unlock_read(mapping);
	if (!nr)
		kvfree(mms);
	*mmsp = mms;
	return nr;
}

static void umem_vma_make_plain(struct vm_area_struct *vma,
				struct umem_area *area)
{
	struct file *face = vma->vm_file;

	vma->vm_file = get_file(area->backing);
	WRITE_ONCE(vma->vm_ops, area->shmem_vm_ops);
	WRITE_ONCE(vma->vm_private_data, NULL);
	vm_flags_clear(vma, VM_DONTEXPAND);
	atomic_dec(&area->nr_maps);
	fput(face);
}

static void umem_vma_log(struct vm_area_struct *vma, struct umem_area *area,
			 struct file *face)
{
	if (!umem_vma_is_ours(vma, area)) {
		/* Where all mappings were made plain ones this is the first. */
		WRITE_ONCE(area->shmem_vm_ops, vma->vm_ops);
		vma->vm_file = get_file(face);
		WRITE_ONCE(vma->vm_private_data, area);
		vm_flags_set(vma, VM_DONTEXPAND);
		atomic_inc(&area->nr_maps);
		fput(area->backing);
	}
	umem_vma_set_logged(vma, true);
	/* Read-only, as the kernel has it where there is a page_mkwrite. */
	WRITE_ONCE(vma->vm_page_prot, vm_get_page_prot(vma->vm_flags & ~VM_SHARED));
}

static void umem_vma_unlog(struct vm_area_struct *vma)
{
	umem_vma_set_logged(vma, false);
	/* Without the flag somebody has soft-dirty bits watched, by the same means. */
	if ((!IS_ENABLED(CONFIG_MEM_SOFT_DIRTY) || vma->vm_flags & VM_SOFTDIRTY) &&
	    !userfaultfd_wp(vma))
		WRITE_ONCE(vma->vm_page_prot, vm_get_page_prot(vma->vm_flags));
}

/* Turn the VMAs of one address space. */
static void umem_turn_mm(struct umem_area *area, struct mm_struct *mm,
			 enum umem_turn turn, struct file *face)
{
	struct vm_area_struct *vma;

	if (check_stable_address_space(mm))
		return;
	for (vma = find_vma(mm, 0); vma; vma = find_vma(mm, vma->vm_end)) {
		if (!umem_vma_turns(vma, area, turn))
			continue;
		/* No fault runs under the VMA's own lock from here on. */
		vma_start_write(vma);
		if (turn == UMEM_TURN_PLAIN)
			umem_vma_make_plain(vma, area);
		else if (turn == UMEM_TURN_LOGGED)
			umem_vma_log(vma, area, face);
		else
			umem_vma_unlog(vma);
	}
}

/* Returns whether there is nothing more to turn, or a negative error code. */
static int umem_turn_pass(struct umem_area *area, enum umem_turn turn,
			  struct file *face)
{
	struct mm_struct **mms;
	int i, nr, ret = 0;

	nr = umem_get_mms(area, turn, &mms);
	if (nr <= 0)
		return nr ?: 1;
	for (i = 0; i < nr; i++) {
		/* What was begun is ended, also by one who is killed. */
		if (turn == UMEM_TURN_UNLOGGED)
			mmap_write_lock(mms[i]);
		else if (!ret && mmap_write_lock_killable(mms[i]))
			ret = -EINTR;
		if (!ret) {
			umem_turn_mm(area, mms[i], turn, face);
			mmap_write_unlock(mms[i]);
		}
		mmput(mms[i]);
	}
	kvfree(mms);
	return ret;
}

/* Several passes, should consumers fork or map meanwhile. */
static int umem_turn_vmas(struct umem_area *area, enum umem_turn turn,
			  struct file *face)
{
	unsigned int pass;
	int ret = 0;

	for (pass = 0; !ret && pass < UMEM_TURN_PASSES; pass++)
		ret = umem_turn_pass(area, turn, face);
	if (!ret)
		return -EAGAIN;
	return min(ret, 0);
}

/**
 * umem_make_plain() - have the driver out of the way of all consumers
 * @area: the area, of which every granule is cached; its log_mutex is held
 *
 * Who sleeps holds the face that it found and takes the fault again.
 *
 * Return: 0, -EAGAIN, -EINTR or -ENOMEM.
 */
int umem_make_plain(struct umem_area *area)
{
	return umem_turn_vmas(area, UMEM_TURN_PLAIN, NULL);
}

/**
 * umem_log_vmas() - have the driver asked before consumers write
 * @area: the area, with logging set and log_mutex held
 *
 * Return: 0, -EAGAIN, -EINTR, -ENOMEM or what opening a face gives; with 0 there is
 * no VMA that writes unseen, and none will come.
 */
int umem_log_vmas(struct umem_area *area)
{
	struct file *face;
	int ret;

	ret = umem_mappers_wait(area, true);
	if (ret)
		return ret;
	face = umem_face_open(area);
	if (IS_ERR(face))
		return PTR_ERR(face);
	ret = umem_turn_vmas(area, UMEM_TURN_LOGGED, face);
	fput(face);
	return ret;
}

/**
 * umem_unlog_vmas() - have consumers write as they like
 * @area: the area, with logging clear and log_mutex held
 */
void umem_unlog_vmas(struct umem_area *area)
{
	umem_mappers_wait(area, false);
	umem_turn_vmas(area, UMEM_TURN_UNLOGGED, NULL);
	/* A kindness, as it was before the log or better. */
	if (READ_ONCE(area->complete))
		umem_make_plain(area);
}

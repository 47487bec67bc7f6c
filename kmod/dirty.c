// SPDX-License-Identifier: GPL-2.0-only
/*
 * dirty.c - the log of what consumers write
 *
 * While it is on, the VMAs of consumers have a page_mkwrite, so that the kernel
 * maps their pages read-only and asks before the first write: that sets the
 * granule's bit.  Whoever writes comes by there, since all of them write through
 * a page table entry of such a VMA or take a reference to the page by one: the
 * CPU, KVM, vhost, ptrace, a read() into the memory.  What has no entry, because it
 * was swapped out or its page table dropped, has nobody who writes.  While the log
 * is off the VMAs have no such operation, and nothing of this is paid for.
 *
 * To read a bit is to clear it and to take the entries away, in this order:
 *
 *	umem_dirty_take_word()		umem_vm_page_mkwrite()
 *
 *	clear the bit			lock the folio
 *	lock and unlock the folio	set the bit
 *	take the entries away		the kernel makes the entry writable
 *	copy, after return		the kernel unlocks the folio; the write
 *
 * The kernel makes the entry while the folio is locked (VM_FAULT_LOCKED).  So a
 * writer who set the bit before it was cleared has his entry before the entries
 * are taken away: what he wrote until then is read in this round, and for the next
 * write he comes again.  Who locks the folio later sets the bit after it was
 * cleared, for the next round.
 *
 * A reference outlives the entry by which it was taken: of a read() with O_DIRECT
 * in the middle, or of memory registered with a device.  A folio with more
 * references than there are reasons for keeps its bit, and is read again in the
 * next round.  New pins for the long term are refused by the kernel meanwhile.
 *
 * A large folio may be mapped as a whole, so all its granules are logged.
 *
 * Switching it on is a first reading, of all pages that are in memory: whoever has an
 * entry or a reference from before comes again or is in the log.  Every VMA has the
 * operation by then, and those that come later get it when they are made or from
 * the VMA that they are copied from; vma.c waits for one that is just being made.
 *
 * Locking: log_mutex is held over switching and reading, and over whatever else has
 * VMAs change their operations.  It comes before mmap_lock, i_mmap_rwsem and folio
 * locks, and is never taken by a fault.  Bits are set and cleared by atomic operations.
 *
 * Copyright (C) 2026 The umem authors
 */
#include <linux/bitops.h>
#include <linux/fs.h>
#include <linux/mm.h>
#include <linux/pagemap.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>

#include "umem.h"

/* Pages whose entries are taken away at a time; the largest granule has so many. */
#define UMEM_DIRTY_RUN	(UMEM_GRANULE_MAX >> PAGE_SHIFT)

/*
 * Granules that were not written between two that were: the entries of up to so
 * many are taken away with theirs.  Taking entries away costs a flush of every
 * TLB, and of KVM's tables, for each stretch; what is read of them meanwhile costs
 * a minor fault.
 */
#define UMEM_DIRTY_GAP	8

/**
 * umem_dirty_set() - pages have been written, or are about to be
 * @area: the area, of which the log is on or was a moment ago
 * @start: first page
 * @count: how many; what lies outside the area does not count
 */
void umem_dirty_set(struct umem_area *area, pgoff_t start, unsigned long count)
{
	/* Pairs with the release of umem_dirty_start(). */
	unsigned long *dirty = smp_load_acquire(&area->dirty);
	pgoff_t end = min_t(pgoff_t, start + count, area->npages);
	unsigned long index, last;

	if (!dirty || start >= end)
		return;
	/*
	 * What was done to the pages first, be it that they came into the page cache, or
	 * that they were punched out: a bit that is found set is cleared after it.
	 * Pairs with umem_dirty_forget_run().
	 */
	smp_mb();
	last = (end - 1) >> area->order;
	for (index = start >> area->order; index <= last; index++) {
		if (!test_bit(index, dirty) && !test_and_set_bit(index, dirty))
			this_cpu_inc(area->counts->nr_logged);
		if (index % (UMEM_WORDS_PER_TURN * BITS_PER_LONG) == 0)
			cond_resched();
	}
}

/*
 * May somebody write to a folio without an entry?  Called with the folio locked,
 * so that nobody maps it, and with one reference of ours.
 */
static bool umem_folio_is_held(struct folio *folio)
{
	int refs = folio_ref_count(folio);
	long pages = folio_next_index(folio) - folio->index;

	if (folio_maybe_dma_pinned(folio))
		return true;
	/* One of the page cache for each page, and ours. */
	refs -= pages + 1;
	/* Entries go before their references, so these are read after those. */
	smp_rmb();
	return refs > umem_folio_mapcount(folio);
}

/*
 * Have the next writers of a stretch of granules, of at most UMEM_DIRTY_RUN pages,
 * come again.  @taken has a bit for each, set for those whose bits were cleared; NULL
 * stands for all.  Of the others nobody holds a reference by which to write.
 */
static void umem_dirty_forget_run(struct umem_area *area, unsigned long index,
				  unsigned long end, const u64 *taken,
				  struct folio **folios)
{
	pgoff_t start = (pgoff_t)index << area->order;
	pgoff_t stop = (pgoff_t)end << area->order, page;
	struct address_space *mapping = area->backing->f_mapping;
	unsigned long granule;
	unsigned int i, nr = 0;
	struct folio *folio;

	/* The bits first, then the page cache.  Pairs with umem_dirty_set(). */
	smp_mb();

	for (page = start; page < stop; page++) {
		granule = page >> area->order;
		if (taken && !(*taken & BIT_ULL(granule - index))) {
			page = ((pgoff_t)(granule + 1) << area->order) - 1;
			continue;
		}
		folio = umem_lock_folio(mapping, page);
		if (!folio)
			continue;
		page = folio_next_index(folio) - 1;
		folio_unlock(folio);
		folios[nr++] = folio;
	}
	unmap_mapping_range(mapping, (loff_t)start << PAGE_SHIFT,
			    (loff_t)(stop - start) << PAGE_SHIFT, 0);

	for (i = 0; i < nr; i++) {
		folio = folios[i];
		folio_lock(folio);
		if (folio->mapping == mapping && umem_folio_is_held(folio))
			umem_dirty_set(area, folio->index,
				       folio_next_index(folio) - folio->index);
		folio_unlock(folio);
		folio_put(folio);
	}
}

/* Read and clear the bits of 64 granules from @first on. */
static u64 umem_dirty_take_word(struct umem_area *area, unsigned long first,
				struct folio **folios)
{
	unsigned long last = min(first + 64, area->ngranules);
	unsigned long most = max(UMEM_DIRTY_RUN >> area->order, 1UL);
	unsigned long index, start, end;
	u64 word = 0, taken;

	index = find_next_bit(area->dirty, last, first);
	while (index < last) {
		start = index;
		taken = 0;
		do {
			clear_bit(index, area->dirty);
			taken |= BIT_ULL(index - start);
			end = index + 1;
			index = find_next_bit(area->dirty, last, end);
		} while (index < last && index - end <= UMEM_DIRTY_GAP &&
			 index < start + most);
		umem_dirty_forget_run(area, start, end, &taken, folios);
		word |= taken << (start - first);
	}
	return word;
}

/**
 * umem_dirty_read() - read the log, and clear what is read
 * @area: the area; its log_mutex is held
 * @first: first granule, a multiple of 64
 * @words: filled in; bit b of word w is granule @first + 64 * w + b
 * @nr: how many words, none of them past the last granule's
 * @clear: false: only look
 *
 * Return: 0, or -ENODATA when the log is off, or -ENOMEM, and nothing is cleared.
 */
int umem_dirty_read(struct umem_area *area, unsigned long first, u64 *words,
		    unsigned int nr, bool clear)
{
	struct folio **folios = NULL;
	unsigned int i;

	lockdep_assert_held(&area->log_mutex);
	if (!area->logging)
		return -ENODATA;
	if (clear) {
		folios = kmalloc_array(UMEM_DIRTY_RUN, sizeof(*folios),
				       GFP_KERNEL);
		if (!folios)
			return -ENOMEM;
	}
	for (i = 0; i < nr; i++, first += 64) {
		if (clear)
			words[i] = umem_dirty_take_word(area, first, folios);
		else
			bitmap_to_arr64(&words[i], area->dirty +
					first / BITS_PER_LONG,
					min_t(u64, 64, area->ngranules - first));
		cond_resched();
	}
	kfree(folios);
	return 0;
}

/**
 * umem_dirty_put_back() - what was read could not be told
 * @area: the area
 * @first: as given to umem_dirty_read()
 * @words: as filled in
 * @nr: as given
 */
void umem_dirty_put_back(struct umem_area *area, unsigned long first,
			 const u64 *words, unsigned int nr)
{
	unsigned int i, bit;

	for (i = 0; i < nr; i++)
		for (bit = 0; bit < 64; bit++)
			if (words[i] & BIT_ULL(bit))
				umem_dirty_set(area,
					       (pgoff_t)(first + 64 * i + bit) <<
					       area->order, 1);
}

/*
 * Forget what was written before the log was switched on.  Only pages that are in
 * memory have entries or may be held, so holes cost little.
 */
static int umem_dirty_forget(struct umem_area *area, struct folio **folios)
{
	unsigned long step = max(UMEM_DIRTY_RUN >> area->order, 1UL);
	struct address_space *mapping = area->backing->f_mapping;
	unsigned long index, page = 0;

	bitmap_zero(area->dirty, area->ngranules);
	while (page < area->npages &&
	       xa_find(&mapping->i_pages, &page, area->npages - 1, XA_PRESENT)) {
		if (fatal_signal_pending(current))
			return -EINTR;
		index = round_down(page >> area->order, step);
		umem_dirty_forget_run(area, index,
				      min(index + step, area->ngranules), NULL,
				      folios);
		page = (index + step) << area->order;
		cond_resched();
	}
	return 0;
}

/**
 * umem_dirty_start() - log writes from now on
 * @area: the area; its log_mutex is held
 *
 * Some of what was written before it returns may be in the log, all that is
 * written after it is.
 *
 * Return: 0, or -EBUSY, -EAGAIN, -EINTR, -ENOMEM, -ENFILE, and the log is as it was.
 */
int umem_dirty_start(struct umem_area *area)
{
	struct folio **folios;
	unsigned long *dirty;
	int ret;

	lockdep_assert_held(&area->log_mutex);
	if (area->logging)
		return -EBUSY;
	if (!area->dirty) {
		dirty = kvcalloc(BITS_TO_LONGS(area->ngranules), sizeof(*dirty),
				 GFP_KERNEL_ACCOUNT);
		if (!dirty)
			return -ENOMEM;
		/* Pairs with the acquire of umem_dirty_set(). */
		smp_store_release(&area->dirty, dirty);
	}
	folios = kmalloc_array(UMEM_DIRTY_RUN, sizeof(*folios), GFP_KERNEL);
	if (!folios)
		return -ENOMEM;
	/* Pairs with the acquire of umem_face_mmap(). */
	smp_store_release(&area->logging, true);
	ret = umem_log_vmas(area);
	if (!ret)
		ret = umem_dirty_forget(area, folios);
	kfree(folios);
	if (ret)
		umem_dirty_stop(area);
	return ret;
}

/**
 * umem_dirty_stop() - do not log writes any more
 * @area: the area; its log_mutex is held
 *
 * The bitmap stays for the next time, since a fault may be about to set a bit.
 */
void umem_dirty_stop(struct umem_area *area)
{
	lockdep_assert_held(&area->log_mutex);
	if (!area->logging)
		return;
	WRITE_ONCE(area->logging, false);
	umem_unlog_vmas(area);
}

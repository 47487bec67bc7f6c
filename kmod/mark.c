// SPDX-License-Identifier: GPL-2.0-only
/*
 * mark.c - what becomes of a missing granule: cached, poisoned, discarded
 *
 * Locking: bits are set by atomic operations; see request.c for the waiters' side.
 * mark_sem is taken by marks, for reading until the consumer first discards a
 * missing page, for writing from then on.  See umem_discard().
 *
 * Copyright (C) 2026 The umem authors
 */
#include <linux/bitops.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>

#include "trace.h"
#include "umem.h"

/* Returns how many were missing before. */
static unsigned long umem_set_bits(unsigned long *bitmap, unsigned long start,
				   unsigned long count)
{
	unsigned long fresh = 0;
	unsigned int turn = 0;

	while (count) {
		unsigned long bit = start % BITS_PER_LONG;
		unsigned long n = min(count, BITS_PER_LONG - bit);
		unsigned long mask = GENMASK(bit + n - 1, bit);
		atomic_long_t *word =
			(atomic_long_t *)&bitmap[BIT_WORD(start)];

		/* A full barrier, which the waiters' protocol needs. */
		fresh += hweight_long(mask & ~atomic_long_fetch_or(mask, word));
		start += n;
		count -= n;
		if (++turn % UMEM_WORDS_PER_TURN == 0)
			cond_resched();
	}
	return fresh;
}

/* Zero what the server filled into pages that the consumer has discarded. */
static int umem_zero_discarded(struct umem_area *area, unsigned long start,
			       unsigned long count)
{
	pgoff_t page = start << area->order, end = (start + count) << area->order;
	struct file *file = area->backing;
	pgoff_t last;
	int ret = 0;

	lockdep_assert_held_write(&area->mark_sem);

	/* The bits stay: of a page that is cached nobody looks at them. */
	for (; !ret; page = last) {
		page = find_next_bit(area->discarded, end, page);
		if (page >= end)
			break;
		last = page + 1;
		if (umem_is_cached(area, page >> area->order))
			continue;
		last = find_next_zero_bit(area->discarded, end, page);
		last = min(last, round_up(page + 1, 1UL << area->order));
		ret = file->f_op->fallocate(file,
					    FALLOC_FL_PUNCH_HOLE |
					    FALLOC_FL_KEEP_SIZE,
					    (loff_t)page << PAGE_SHIFT,
					    (loff_t)(last - page) << PAGE_SHIFT);
	}
	return ret;
}

/**
 * umem_mark() - the content of a range is valid now
 * @area: the area
 * @start: first granule
 * @count: how many, all of them inside the area
 * @nr_new: how many were missing before is added to this
 *
 * Return: 0, or a negative error code when discarded pages could not be zeroed or
 * the caller was killed; then nothing of the range was marked.
 */
int umem_mark(struct umem_area *area, unsigned long start, unsigned long count,
	      u64 *nr_new)
{
	unsigned long fresh = 0;
	bool discarded;
	int ret;

	down_read(&area->mark_sem);
	discarded = area->discarded;
	if (!discarded)
		fresh = umem_set_bits(area->cached, start, count);
	up_read(&area->mark_sem);

	if (unlikely(discarded)) {
		file_start_write(area->backing);
		ret = down_write_killable(&area->mark_sem);
		if (ret) {
			file_end_write(area->backing);
			return ret;
		}
		ret = umem_zero_discarded(area, start, count);
		if (!ret)
			fresh = umem_set_bits(area->cached, start, count);
		up_write(&area->mark_sem);
		file_end_write(area->backing);
		if (ret)
			return ret;
	}

	/* Before those who wait leave their own trace. */
	trace_umem_mark(area, start, count, fresh);
	/* The full barrier is that of umem_set_bits(). */
	umem_wake(area, start, count);
	*nr_new += fresh;
	if (fresh && atomic_long_add_return(fresh, &area->nr_cached) ==
		     area->ngranules)
		/* Pairs with the acquires of the fault path. */
		smp_store_release(&area->complete, true);
	return 0;
}

/* Make one of the bitmaps that not every area needs. */
static unsigned long *umem_need_bitmap(struct umem_area *area,
				       unsigned long **bitmap,
				       unsigned long nbits)
{
	unsigned long *made = READ_ONCE(*bitmap);

	if (made)
		return made;
	made = kvcalloc(BITS_TO_LONGS(nbits), sizeof(*made),
			GFP_KERNEL_ACCOUNT);
	if (!made)
		return NULL;
	down_write(&area->mark_sem);
	if (*bitmap) {
		kvfree(made);
		made = *bitmap;
	} else {
		/* Pairs with the acquires of those who look for it. */
		smp_store_release(bitmap, made);
	}
	up_write(&area->mark_sem);
	return made;
}

/**
 * umem_poison() - the content of a range is lost
 * @area: the area
 * @start: first granule
 * @count: how many, all of them inside the area
 * @nr_new: how many were neither cached nor poisoned is added to this
 *
 * Return: 0 or -ENOMEM.
 */
int umem_poison(struct umem_area *area, unsigned long start,
		unsigned long count, u64 *nr_new)
{
	unsigned long *poisoned, index, end = start + count;
	unsigned long fresh = 0;
	unsigned int turn = 0;

	poisoned = umem_need_bitmap(area, &area->poisoned, area->ngranules);
	if (!poisoned)
		return -ENOMEM;

	for (index = start; index < end; index++) {
		index = find_next_zero_bit(area->cached, end, index);
		if (index >= end)
			break;
		fresh += !test_and_set_bit(index, poisoned);
		if (++turn % UMEM_WORDS_PER_TURN == 0)
			cond_resched();
	}
	atomic_long_add(fresh, &area->nr_poisoned);
	*nr_new += fresh;
	/* Pairs with the barrier of prepare_to_wait(). */
	smp_mb();
	umem_wake(area, start, count);
	return 0;
}

/**
 * umem_is_discarded() - has the consumer given up all of a missing granule?
 * @area: the area
 * @index: the granule
 *
 * Return: true when it need not be fetched.
 */
bool umem_is_discarded(struct umem_area *area, unsigned long index)
{
	/* Pairs with the release of umem_need_bitmap(). */
	unsigned long *discarded = smp_load_acquire(&area->discarded);
	pgoff_t page = index << area->order, end = (index + 1) << area->order;

	return discarded && find_next_zero_bit(discarded, end, page) >= end;
}

/**
 * umem_discard() - the consumer gives up the content of a range
 * @area: the area
 * @start: first page
 * @count: how many, all of them inside the area
 *
 * The caller punches the hole in the backing file after this.  That alone is
 * right for what is cached.  What is missing may be half filled by the server,
 * or on its way to it, and stays missing: the mark zeroes it, and the server is
 * told when all of a granule is given up.  Since the server never touches what it
 * marked, nothing can come in behind.
 *
 * Marks that began before @area->discarded was there do not look at it, and are
 * over before it is: all that their servers wrote was written before, so the
 * caller's hole, punched after, zeroes that too.
 *
 * Return: 0, -ENOMEM, or -EINTR when the caller was killed.
 */
int umem_discard(struct umem_area *area, pgoff_t start, unsigned long count)
{
	pgoff_t page, stop, end = start + count;
	unsigned long *discarded, index;
	unsigned int turn = 0;

	if (READ_ONCE(area->complete))
		return 0;

	discarded = umem_need_bitmap(area, &area->discarded, area->npages);
	if (!discarded)
		return -ENOMEM;

	for (page = start; page < end; page = stop) {
		index = find_next_zero_bit(area->cached, area->ngranules,
					   page >> area->order);
		page = max_t(pgoff_t, page, index << area->order);
		if (page >= end)
			break;
		stop = min_t(pgoff_t, end, (index + 1) << area->order);
		this_cpu_add(area->counts->nr_discarded,
			     umem_set_bits(discarded, page, stop - page));
		/* The request carries the flag, so the bits come first. */
		if (umem_is_discarded(area, index))
			umem_request(area, index, true);
		if (++turn % UMEM_WORDS_PER_TURN == 0) {
			if (fatal_signal_pending(current))
				return -EINTR;
			cond_resched();
		}
	}
	return 0;
}

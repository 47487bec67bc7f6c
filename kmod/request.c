// SPDX-License-Identifier: GPL-2.0-only
/*
 * request.c - who wants a granule, and who waits for it
 *
 * Locking.  Three kinds of state, from hot to cold:
 *
 *  - The bitmaps are changed by atomic bit operations alone.  A waiter puts
 *    itself on its bucket and then looks at the cached bit; mark.c sets the bit
 *    and then looks at the bucket; a full barrier stands between the two on
 *    either side (prepare_to_wait(), atomic_long_fetch_or()), so that one of
 *    them sees the other.
 *
 *  - req_lock protects the ring of granules that wait for a server, and
 *    rescan.  A granule enters the ring once, when its requested bit goes from
 *    0 to 1, however many tasks want it.  When the ring is full, or another
 *    server takes over, rescan sends the reader over the requested bitmap, where
 *    every request ever made is found.
 *
 *  - read_mutex makes that walk one reader's at a time; it may be long, so it
 *    is not done under a spinlock.
 *
 * Copyright (C) 2026 The umem authors
 */
#include <linux/bitops.h>
#include <linux/poll.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>

#include "trace.h"
#include "umem.h"

/* In an entry of the ring: a fault that may not sleep queued it. */
#define UMEM_RING_ASYNC		BIT_ULL(63)

/* A kernel thread takes no signal: it looks this often whether to give up. */
#define UMEM_KTHREAD_SLICE	(HZ / 10)

/**
 * umem_requests_init() - make an area ready for waiters and servers
 * @area: it, zeroed but for what was allocated
 */
void umem_requests_init(struct umem_area *area)
{
	unsigned int i;

	for (i = 0; i < UMEM_BUCKETS; i++)
		init_waitqueue_head(&area->buckets[i]);
	init_rwsem(&area->mark_sem);
	mutex_init(&area->read_mutex);
	spin_lock_init(&area->req_lock);
	init_waitqueue_head(&area->server_wq);
}

static wait_queue_head_t *umem_bucket(struct umem_area *area,
				      unsigned long index)
{
	return &area->buckets[index % UMEM_BUCKETS];
}

/**
 * umem_request() - ask the server for a missing granule
 * @area: the area
 * @index: the granule
 * @async: whoever asks will not sleep for it now
 *
 * Never sleeps and never allocates.  A granule that was asked for before is not
 * queued again: it is in the ring, or with the server, or found by the walk.
 */
void umem_request(struct umem_area *area, unsigned long index, bool async)
{
	bool first;

	if (test_and_set_bit(index, area->requested)) {
		this_cpu_inc(area->counts->nr_duplicate);
		return;
	}
	this_cpu_inc(area->counts->nr_requested);
	trace_umem_request(area, index, async);

	spin_lock(&area->req_lock);
	first = area->head == area->tail;
	if (area->head - area->tail < UMEM_RING)
		area->ring[area->head++ % UMEM_RING] =
			index | (async ? UMEM_RING_ASYNC : 0);
	else
		area->rescan = true;
	spin_unlock(&area->req_lock);

	/*
	 * Whoever finds requests left over when it leaves wakes the next
	 * reader, so only the step from none to one is told.
	 */
	if (first)
		wake_up_interruptible_poll(&area->server_wq,
					   EPOLLIN | EPOLLRDNORM);
}

/**
 * umem_request_again() - deliver every open request once more
 * @area: the area, whose server changed or failed to take them
 */
void umem_request_again(struct umem_area *area)
{
	spin_lock(&area->req_lock);
	/* The walk finds what is in the ring too. */
	area->tail = area->head;
	area->rescan = true;
	spin_unlock(&area->req_lock);
	wake_up_all(&area->server_wq);
}

/**
 * umem_request_pending() - is there something to read?
 * @area: the area
 *
 * Forgets the oldest entries of the ring while they are cached already.  While
 * a walk of the bitmap is due the answer is yes, although it may find nothing.
 *
 * Return: true when a reader should try.
 */
bool umem_request_pending(struct umem_area *area)
{
	bool pending;
	u64 entry;

	spin_lock(&area->req_lock);
	while (area->tail != area->head) {
		entry = area->ring[area->tail % UMEM_RING];
		if (!umem_is_cached(area, entry & ~UMEM_RING_ASYNC))
			break;
		area->tail++;
	}
	pending = area->tail != area->head || area->rescan ||
		  READ_ONCE(area->scan_left);
	spin_unlock(&area->req_lock);
	return pending;
}

static void umem_fill_request(struct umem_area *area,
			      struct umem_page_request *req, u64 entry)
{
	unsigned long index = entry & ~UMEM_RING_ASYNC;

	req->pgoff = (u64)index << area->order;
	req->flags = entry & UMEM_RING_ASYNC ? UMEM_REQUEST_ASYNC : 0;
	if (umem_is_discarded(area, index))
		req->flags |= UMEM_REQUEST_DISCARDED;
}

static void umem_start_walk(struct umem_area *area)
{
	lockdep_assert_held(&area->read_mutex);
	lockdep_assert_held(&area->req_lock);

	if (area->rescan) {
		/* What the walk passed already may have been asked for since. */
		area->rescan = false;
		WRITE_ONCE(area->scan_left, area->ngranules);
	}
}

/* From @area->scan_pos on, the next granule that is requested and not cached. */
static bool umem_scan_next(struct umem_area *area, unsigned long *index)
{
	unsigned int turn = 0;

	lockdep_assert_held(&area->read_mutex);

	while (area->scan_left) {
		unsigned long bit = area->scan_pos % BITS_PER_LONG;
		unsigned long word = BIT_WORD(area->scan_pos);
		unsigned long n, open;

		n = min3(BITS_PER_LONG - bit, area->ngranules - area->scan_pos,
			 area->scan_left);
		open = READ_ONCE(area->requested[word]) &
		       ~READ_ONCE(area->cached[word]) &
		       GENMASK(bit + n - 1, bit);
		if (open) {
			*index = word * BITS_PER_LONG + __ffs(open);
			n = *index + 1 - area->scan_pos;
		}
		WRITE_ONCE(area->scan_left, area->scan_left - n);
		area->scan_pos += n;
		if (area->scan_pos == area->ngranules)
			area->scan_pos = 0;
		if (open)
			return true;
		if (++turn % UMEM_WORDS_PER_TURN == 0)
			cond_resched();
	}
	return false;
}

/**
 * umem_request_take() - take open requests, oldest first
 * @area: the area
 * @reqs: room for them
 * @nr: how many fit
 *
 * What has been marked since it was asked for is passed over.
 *
 * Return: how many were taken, possibly none; -EINTR.
 */
int umem_request_take(struct umem_area *area, struct umem_page_request *reqs,
		      unsigned int nr)
{
	unsigned int got = 0;
	unsigned long index;

	if (mutex_lock_interruptible(&area->read_mutex))
		return -EINTR;

	spin_lock(&area->req_lock);
	while (got < nr && area->tail != area->head) {
		u64 entry = area->ring[area->tail++ % UMEM_RING];

		if (!umem_is_cached(area, entry & ~UMEM_RING_ASYNC))
			umem_fill_request(area, &reqs[got++], entry);
	}
	umem_start_walk(area);
	spin_unlock(&area->req_lock);

	while (got < nr && umem_scan_next(area, &index))
		umem_fill_request(area, &reqs[got++], index);

	mutex_unlock(&area->read_mutex);

	if (umem_request_pending(area))
		wake_up_interruptible_poll(&area->server_wq,
					   EPOLLIN | EPOLLRDNORM);
	return got;
}

/**
 * umem_request_poll() - is there something to read, for certain?
 * @area: the area
 *
 * Unlike umem_request_pending() this does a walk that is due, up to the first open
 * request, which then goes into the ring.  May sleep.
 *
 * Return: true when a reader would get something now.
 */
bool umem_request_poll(struct umem_area *area)
{
	bool pending, found;
	unsigned long index;

	if (!umem_request_pending(area))
		return false;

	mutex_lock(&area->read_mutex);
	spin_lock(&area->req_lock);
	pending = area->tail != area->head;
	if (!pending)
		umem_start_walk(area);
	spin_unlock(&area->req_lock);
	if (!pending) {
		found = umem_scan_next(area, &index);
		spin_lock(&area->req_lock);
		if (found && area->head - area->tail < UMEM_RING)
			area->ring[--area->tail % UMEM_RING] = index;
		else if (found)
			area->rescan = true;
		pending = area->tail != area->head;
		spin_unlock(&area->req_lock);
	}
	mutex_unlock(&area->read_mutex);
	return pending;
}

/**
 * umem_request_return() - give back requests that could not be handed over
 * @area: the area
 * @reqs: the last ones of those that were taken
 * @nr: how many
 */
void umem_request_return(struct umem_area *area,
			 const struct umem_page_request *reqs, unsigned int nr)
{
	spin_lock(&area->req_lock);
	if (area->head - area->tail + nr <= UMEM_RING) {
		while (nr--)
			area->ring[--area->tail % UMEM_RING] =
				reqs[nr].pgoff >> area->order |
				(reqs[nr].flags & UMEM_REQUEST_ASYNC ?
				 UMEM_RING_ASYNC : 0);
	} else {
		area->rescan = true;
	}
	spin_unlock(&area->req_lock);
	wake_up_interruptible_poll(&area->server_wq, EPOLLIN | EPOLLRDNORM);
}

/* One task that waits for one granule; lives on its stack. */
struct umem_waiter {
	wait_queue_entry_t entry;
	unsigned long index;
};

/* What a mark has made available. */
struct umem_marked {
	unsigned long start;
	unsigned long count;
};

static int umem_wake_function(wait_queue_entry_t *entry, unsigned int mode,
			      int sync, void *key)
{
	struct umem_waiter *waiter =
		container_of(entry, struct umem_waiter, entry);
	const struct umem_marked *marked = key;

	if (waiter->index - marked->start >= marked->count)
		return 0;
	return autoremove_wake_function(entry, mode, sync, key);
}

static bool umem_task_is_dying(struct task_struct *task)
{
	return READ_ONCE(task->signal->flags) & SIGNAL_GROUP_EXIT;
}

/**
 * umem_mm_is_exiting() - will nobody run on this address space any more?
 * @mm: one on whose behalf a kernel thread works
 *
 * KVM's asynchronous page fault works in a kernel thread, which takes no signal.
 * The VM's threads wait for it, uninterruptibly, when they exit and when the
 * guest resets: it must give up once they are killed, whether or not they have
 * left the mm yet.
 *
 * Return: true when waiting for a page makes no sense any more.
 */
bool umem_mm_is_exiting(struct mm_struct *mm)
{
	struct task_struct *task;
	bool exiting = true;

	rcu_read_lock();
#ifdef CONFIG_MEMCG
	task = rcu_dereference(mm->owner);
	if (task)
		exiting = umem_task_is_dying(task);
#else
	for_each_process(task) {
		struct task_struct *thread;

		if (task->flags & PF_KTHREAD)
			continue;
		for_each_thread(task, thread)
			if (READ_ONCE(thread->mm) == mm &&
			    !umem_task_is_dying(task))
				exiting = false;
	}
#endif
	rcu_read_unlock();
	return exiting;
}

/**
 * umem_wait() - drop the lock of a fault and sleep for a granule
 * @vmf: the fault; its VMA may be gone on return
 * @area: the area, which the caller keeps alive
 * @index: the granule, which was requested
 * @state: the state to sleep in; TASK_IDLE for a kernel thread
 *
 * Sleeps once.  Whatever ends it, the granule or a signal or umem_wake() for
 * another reason, the fault is taken again and sees for itself.
 */
void umem_wait(struct vm_fault *vmf, struct umem_area *area,
	       unsigned long index, unsigned int state)
{
	wait_queue_head_t *bucket = umem_bucket(area, index);
	struct umem_waiter waiter = { .index = index };
	long left = MAX_SCHEDULE_TIMEOUT;
	u64 start = ktime_get_ns();

	init_waitqueue_func_entry(&waiter.entry, umem_wake_function);
	waiter.entry.private = current;
	INIT_LIST_HEAD(&waiter.entry.entry);

	/*
	 * First on the queue, then out of the lock: whoever unmaps the VMA finds
	 * the waiter there, see umem_vm_close().
	 */
	prepare_to_wait(bucket, &waiter.entry, state);
	release_fault_lock(vmf);
	if (!umem_is_cached(area, index) && !umem_is_poisoned(area, index) &&
	    !umem_server_is_lost(area, &left) &&
	    !signal_pending_state(state, current)) {
		if (state == TASK_IDLE)
			left = min_t(long, left, UMEM_KTHREAD_SLICE);
		schedule_timeout(left);
	}
	finish_wait(bucket, &waiter.entry);
	umem_stats_sleep(area, index, ktime_get_ns() - start);
}

/**
 * umem_wake() - have who waits for granules of a range take the fault again
 * @area: the area
 * @start: first granule
 * @count: how many
 *
 * What makes them look has to be visible first, with a full barrier between.
 */
void umem_wake(struct umem_area *area, unsigned long start, unsigned long count)
{
	struct umem_marked marked = { .start = start, .count = count };
	unsigned long i, n = min_t(unsigned long, count, UMEM_BUCKETS);

	for (i = 0; i < n; i++) {
		wait_queue_head_t *bucket = umem_bucket(area, start + i);

		/* The caller's full barrier stands before this. */
		if (waitqueue_active(bucket))
			__wake_up(bucket, TASK_NORMAL, 0, &marked);
	}
}

/**
 * umem_wake_everybody() - have all who wait take the fault again
 * @area: the area; what they are to see was written before the call
 */
void umem_wake_everybody(struct umem_area *area)
{
	/* Pairs with the barrier of prepare_to_wait(). */
	smp_mb();
	umem_wake(area, 0, area->ngranules);
}

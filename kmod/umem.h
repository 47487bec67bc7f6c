/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * umem.h - what the files of the driver share
 *
 * The way of a page, from the consumer's touch to its wake-up:
 *
 *   fault.c    umem_vm_fault() finds the granule missing,
 *   request.c  umem_request() queues it, umem_wait() sleeps on its bucket,
 *   server.c   umem_server_read() hands it to the server, which fills the
 *              backing file and marks it by umem_server_write() or the ioctl,
 *   request.c  umem_mark() sets the cached bits and wakes the bucket,
 *   fault.c    the fault is taken again and shmem maps the page.
 *
 * Locks, outermost first.  No user memory is touched and no mmap_lock taken
 * under any of them, since a fault comes in with mmap_lock or a VMA lock held.
 *
 *   mmap_lock, VMA lock      held by the mm over fault.c
 *   umem_areas_mutex         area.c: which areas exist, their ids and names
 *   umem_area.read_mutex     request.c: one reader walks the bitmap at a time
 *   umem_area.mark_sem       request.c: marks against discards
 *   umem_area.server_lock    server.c: who is the server
 *   umem_area.req_lock       request.c: the ring of requests
 *   umem_area.buckets[].lock request.c: waiters (a wait queue's own lock)
 *
 * The fault path takes req_lock and one bucket's lock, for a missing granule
 * alone, and none of those that sleep.
 *
 * Copyright (C) 2026 The umem authors
 */
#ifndef _UMEM_H
#define _UMEM_H

#include <linux/atomic.h>
#include <linux/cred.h>
#include <linux/fs.h>
#include <linux/kref.h>
#include <linux/mm.h>
#include <linux/mutex.h>
#include <linux/rwsem.h>
#include <linux/spinlock.h>
#include <linux/uidgid.h>
#include <linux/wait.h>

#include <linux/umem.h>

#include "compat.h"

/* Waiters are spread over this many wait queues by their page offset. */
#define UMEM_BUCKETS	64U

/*
 * Requests that are queued in order.  When more are open at a time, the rest is
 * found by a walk of the requested bitmap, in order of the offsets.
 */
#define UMEM_RING	512U

struct umem_server;

/**
 * struct umem_area - a piece of memory that is served by user space
 * @ref: one for each server and each face, see umem_face_open()
 * @npages: size in pages
 * @id: the N of /dev/umemN
 * @name: unique among the areas alive; empty for one of UMEM_INIT
 * @uid: who created it
 * @gid: group of its node
 * @backing: the shmem file with the content, as shmem opened it
 * @shmem_vm_ops: what shmem gave to a VMA; the real work is theirs
 * @dev: the node's device, NULL for an area of UMEM_INIT
 * @nr_maps: VMAs alive
 * @cached: a bit for each granule whose content is valid; never cleared
 * @requested: a bit for each granule that was ever queued; never cleared
 * @discarded: NULL, or a bit for each granule that was discarded by the consumer
 *	while it was missing; what was filled in is zeroed when it is marked
 * @nr_cached: bits set in @cached
 * @complete: every bit of @cached is set
 * @buckets: who waits for a granule
 * @mark_sem: held for reading by marks, for writing by marks that have to zero
 *	what was discarded
 * @server_lock: protects @server, what it points to, and @had_server
 * @server: who serves the area, or NULL
 * @had_server: somebody did before
 * @read_mutex: protects @scan_pos and @scan_left
 * @scan_pos: where the walk of @requested goes on
 * @scan_left: granules that the walk has yet to look at
 * @req_lock: protects the members below
 * @rescan: the walk of @requested is to start anew
 * @head: number of entries ever put into @ring
 * @tail: number of entries ever taken from @ring
 * @ring: page offsets that wait for a server, see UMEM_RING_ASYNC
 * @server_wq: servers that wait for a request
 * @nr_delivered: requests handed to servers
 */
struct umem_area {
	struct kref ref;
	unsigned long npages;
	u32 id;
	char name[UMEM_NAME_MAX];
	kuid_t uid;
	kgid_t gid;
	struct file *backing;
	const struct vm_operations_struct *shmem_vm_ops;
	struct device *dev;
	atomic_t nr_maps;

	unsigned long *cached;
	unsigned long *requested;
	unsigned long *discarded;
	atomic_long_t nr_cached;
	bool complete;
	wait_queue_head_t buckets[UMEM_BUCKETS];
	struct rw_semaphore mark_sem;

	spinlock_t server_lock;		/* see the kernel-doc above */
	struct umem_server *server;
	bool had_server;

	struct mutex read_mutex;	/* see the kernel-doc above */
	unsigned long scan_pos;
	unsigned long scan_left;

	spinlock_t req_lock;		/* see the kernel-doc above */
	bool rescan;
	unsigned int head;
	unsigned int tail;
	u64 ring[UMEM_RING];
	wait_queue_head_t server_wq;
	atomic_long_t nr_delivered;
};

/* Is the content of a page valid? */
static inline bool umem_is_cached(const struct umem_area *area, pgoff_t index)
{
	/*
	 * Pairs with the full barrier of umem_set_cached(): who sees the bit
	 * sees what the server had written before it set it.
	 */
	return smp_load_acquire(&area->cached[BIT_WORD(index)]) &
	       BIT_MASK(index);
}

static inline u64 umem_area_size(const struct umem_area *area)
{
	return (u64)area->npages << PAGE_SHIFT;
}

/* area.c */
struct umem_area *umem_area_create(u64 size, const char *name);
struct umem_area *umem_area_find(u32 id);
void umem_area_get(struct umem_area *area);
void umem_area_put(struct umem_area *area);
struct file *umem_area_open_backing(struct umem_area *area);
void umem_area_info(struct umem_area *area, struct umem_info *info);
u32 umem_area_list(u32 first_id, struct umem_info *infos, u32 nr, u32 *total);
int umem_area_add_node(struct umem_area *area);
int umem_areas_init(void);
void umem_areas_exit(void);

/* fault.c */
struct file *umem_face_open(struct umem_area *area);
struct umem_area *umem_face_area(struct file *face);
int umem_face_mmap(struct file *face, struct vm_area_struct *vma);

/* request.c */
void umem_requests_init(struct umem_area *area);
void umem_request(struct umem_area *area, pgoff_t index, bool async);
void umem_request_again(struct umem_area *area);
bool umem_request_pending(struct umem_area *area);
bool umem_request_poll(struct umem_area *area);
int umem_request_take(struct umem_area *area, struct umem_page_request *reqs,
		      unsigned int nr);
void umem_request_return(struct umem_area *area,
			 const struct umem_page_request *reqs, unsigned int nr);
void umem_wait(struct vm_fault *vmf, struct umem_area *area, pgoff_t index,
	       unsigned int state);
void umem_wake(struct umem_area *area, pgoff_t start, unsigned long count);
bool umem_mm_is_exiting(struct mm_struct *mm);
int umem_mark(struct umem_area *area, pgoff_t start, unsigned long count,
	      u64 *nr_new);
int umem_discard(struct umem_area *area, pgoff_t start, unsigned long count);

/* server.c */
extern const struct file_operations umem_server_fops;
struct umem_server *umem_server_new(struct umem_area *area);
int umem_server_attach(struct umem_server *server, bool force);
void umem_server_free(struct umem_server *server);
pid_t umem_server_pid(struct umem_area *area, bool *served);
ssize_t umem_server_read(struct umem_server *server, char __user *buf,
			 size_t count, bool nonblock);
ssize_t umem_server_write(struct umem_server *server, const char __user *buf,
			  size_t count);
__poll_t umem_server_poll(struct umem_server *server, struct file *file,
			  struct poll_table_struct *wait);
long umem_server_ioctl(struct umem_server *server, unsigned int cmd,
		       unsigned long arg, bool nonblock);
struct umem_area *umem_server_area(struct umem_server *server);

#endif /* _UMEM_H */

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
 *   mark.c     umem_mark() sets the cached bits and wakes the bucket,
 *   fault.c    the fault is taken again and shmem maps the page.
 *
 * Two things work on the mappings of consumers from outside: vma.c maps what was
 * marked (UMEM_MARK_TOUCH), and hands VMAs back to shmem (UMEM_MAKE_VMA_ANONYMOUS).
 * file.c is the area as a regular file, for those who call fallocate().  dirty.c
 * has the log of what consumers write, which is off but for a pre-copy.
 *
 * Locks, outermost first.  No user memory is touched and no mmap_lock taken
 * under any of them, since a fault comes in with mmap_lock or a VMA lock held.
 *
 *   umem_area.log_mutex      dirty.c: switching and reading the log of writes
 *   mmap_lock, VMA lock      held by the mm over fault.c, taken by vma.c
 *   umem_area.mappers_lock   vma.c: which mms made a mapping lately
 *   umem_areas_mutex         area.c: which areas exist, their ids and names
 *   umem_area.read_mutex     request.c: one reader walks the bitmap at a time
 *   umem_area.mark_sem       mark.c: marks against discards
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
#include <linux/fs.h>
#include <linux/kref.h>
#include <linux/mm.h>
#include <linux/mutex.h>
#include <linux/percpu.h>
#include <linux/rwsem.h>
#include <linux/spinlock.h>
#include <linux/uidgid.h>
#include <linux/wait.h>

#include <linux/umem.h>

#include "compat.h"

/* Waiters are spread over this many wait queues by their granule. */
#define UMEM_BUCKETS	64U

/*
 * Requests that are queued in order.  When more are open at a time, the rest is
 * found by a walk of the requested bitmap, in order of the offsets.  A VM has
 * rarely more vCPUs, and each entry costs every area eight bytes.
 */
#define UMEM_RING	64U

/* Words of a bitmap that are handled before others get the CPU. */
#define UMEM_WORDS_PER_TURN	1024

/* Inode numbers of area files are the areas' ids plus this. */
#define UMEM_FIRST_INO	2

struct umem_payer;
struct umem_server;

/**
 * struct umem_counts - the counters of one CPU; see &struct umem_stats
 * @nr_minor: as there
 * @nr_major: as there
 * @nr_async: as there
 * @nr_duplicate: as there
 * @nr_killed: as there
 * @nr_lost: as there
 * @nr_poison_hits: as there
 * @nr_requested: as there
 * @nr_discarded: as there
 * @nr_touched: as there
 * @nr_logged: as there
 * @blocked_ns: as there
 * @latency: as there
 */
struct umem_counts {
	u64 nr_minor;
	u64 nr_major;
	u64 nr_async;
	u64 nr_duplicate;
	u64 nr_killed;
	u64 nr_lost;
	u64 nr_poison_hits;
	u64 nr_requested;
	u64 nr_discarded;
	u64 nr_touched;
	u64 nr_logged;
	u64 blocked_ns;
	u64 latency[UMEM_LATENCY_BUCKETS];
};

/**
 * struct umem_area - a piece of memory that is served by user space
 * @ref: one for each server and each face, see umem_face_open()
 * @npages: size in pages
 * @ngranules: size in granules
 * @order: a granule is so many times the page doubled
 * @huge: backed by huge pages where there are some
 * @id: the N of /dev/umemN
 * @serial: never used again, unlike @id
 * @name: unique among the areas alive; empty for one of UMEM_INIT
 * @uid: who created it
 * @gid: group of its node
 * @file_uid: owner of its file; written by whoever may change it, read as it is
 * @file_gid: group of its file
 * @file_mode: permissions of its file
 * @backing: the shmem file with the content, as shmem opened it
 * @payer: whose memory cgroup is charged for what the server writes
 * @shmem_vm_ops: what shmem gave to a VMA; the real work is theirs
 * @dev: the node's device, NULL for an area of UMEM_INIT
 * @nr_maps: VMAs alive that have our operations
 * @counts: statistics
 * @cached: a bit for each granule whose content is valid; never cleared
 * @requested: a bit for each granule that was ever queued; never cleared
 * @discarded: NULL, or a bit for each page that was discarded by the consumer
 *	while it was missing; what was filled in is zeroed when it is marked
 * @poisoned: NULL, or a bit for each granule whose content is lost; means nothing
 *	for one that is cached
 * @nr_cached: bits set in @cached
 * @nr_poisoned: bits ever set in @poisoned
 * @complete: every bit of @cached is set
 * @buckets: who waits for a granule
 * @log_mutex: held over switching the log of writes and reading it, and over making
 *	mappings plain
 * @logging: it is on; written with @log_mutex held
 * @dirty: NULL, or a bit for each granule that was written since it was last read;
 *	made once, and kept
 * @mappers_lock: protects @mappers
 * @mappers: mms that made a mapping since the log was switched
 * @mark_sem: held for reading by marks, for writing by marks that have to zero
 *	what was discarded
 * @server_lock: protects @server, what it points to, and the members after it
 * @server: who serves the area, or NULL
 * @had_server: somebody did before
 * @lost_at: jiffies since when there is no server
 * @loss_timeout_ms: see &struct umem_loss_policy; read without the lock too
 * @read_mutex: protects @scan_pos and @scan_left
 * @scan_pos: where the walk of @requested goes on
 * @scan_left: granules that the walk has yet to look at
 * @req_lock: protects the members below
 * @rescan: the walk of @requested is to start anew
 * @head: number of entries ever put into @ring
 * @tail: number of entries ever taken from @ring
 * @ring: granules that wait for a server, see UMEM_RING_ASYNC
 * @server_wq: servers that wait for a request
 * @nr_delivered: requests handed to servers
 */
struct umem_area {
	struct kref ref;
	unsigned long npages;
	unsigned long ngranules;
	unsigned int order;
	bool huge;
	u32 id;
	unsigned long serial;
	char name[UMEM_NAME_MAX];
	kuid_t uid;
	kgid_t gid;
	kuid_t file_uid;
	kgid_t file_gid;
	umode_t file_mode;
	struct file *backing;
	struct umem_payer *payer;
	const struct vm_operations_struct *shmem_vm_ops;
	struct device *dev;
	atomic_t nr_maps;
	struct umem_counts __percpu *counts;

	unsigned long *cached;
	unsigned long *requested;
	unsigned long *discarded;
	unsigned long *poisoned;
	atomic_long_t nr_cached;
	atomic_long_t nr_poisoned;
	bool complete;
	wait_queue_head_t buckets[UMEM_BUCKETS];
	struct mutex log_mutex;		/* see the kernel-doc above */
	bool logging;
	unsigned long *dirty;
	spinlock_t mappers_lock;	/* see the kernel-doc above */
	struct list_head mappers;
	struct rw_semaphore mark_sem;

	spinlock_t server_lock;		/* see the kernel-doc above */
	struct umem_server *server;
	bool had_server;
	unsigned long lost_at;
	u32 loss_timeout_ms;

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

/* Is the content of a granule valid? */
static inline bool umem_is_cached(const struct umem_area *area,
				  unsigned long index)
{
	/*
	 * Pairs with the full barrier of umem_set_cached(): who sees the bit
	 * sees what the server had written before it set it.
	 */
	return smp_load_acquire(&area->cached[BIT_WORD(index)]) &
	       BIT_MASK(index);
}

/* Is the content of a granule lost? */
static inline bool umem_is_poisoned(const struct umem_area *area,
				    unsigned long index)
{
	/* Pairs with the release of umem_poison(). */
	const unsigned long *poisoned = smp_load_acquire(&area->poisoned);

	return poisoned && test_bit(index, poisoned);
}

static inline u64 umem_area_size(const struct umem_area *area)
{
	return (u64)area->npages << PAGE_SHIFT;
}

static inline u32 umem_granule_size(const struct umem_area *area)
{
	return PAGE_SIZE << area->order;
}

/* area.c */
struct umem_area *umem_area_create(const struct umem_create *wish);
struct umem_area *umem_area_find(u32 id);
struct umem_area *umem_area_find_name(const char *name, unsigned int len);
struct umem_area *umem_area_next(u32 *id);
void umem_area_get(struct umem_area *area);
void umem_area_put(struct umem_area *area);
struct file *umem_area_open_backing(struct umem_area *area);
void umem_area_info(struct umem_area *area, struct umem_info *info);
u32 umem_area_list(u32 first_id, struct umem_info *infos, u32 nr, u32 *total);
int umem_area_add_node(struct umem_area *area);
int umem_areas_init(void);
void umem_areas_exit(void);

/* charge.c */
struct umem_payer *umem_payer_new(void);
void umem_payer_put(struct umem_payer *payer);
void umem_payer_choose(struct umem_payer *payer);
struct file *umem_charge_open(struct umem_area *area);
int umem_charge_init(struct vfsmount *mnt);
void umem_charge_exit(void);

/* fault.c */
bool umem_vma_is_ours(struct vm_area_struct *vma, struct umem_area *area);
struct file *umem_face_open(struct umem_area *area);
struct umem_area *umem_face_area(struct file *face);
int umem_face_mmap(struct file *face, struct vm_area_struct *vma, bool priv);
long umem_face_fallocate(struct file *face, int mode, loff_t offset,
			 loff_t len);

bool umem_vma_is_logged(struct vm_area_struct *vma);
void umem_vma_set_logged(struct vm_area_struct *vma, bool logged);

/* dirty.c */
void umem_dirty_set(struct umem_area *area, pgoff_t start, unsigned long count);
int umem_dirty_read(struct umem_area *area, unsigned long first, u64 *words,
		    unsigned int nr, bool clear);
void umem_dirty_put_back(struct umem_area *area, unsigned long first,
			 const u64 *words, unsigned int nr);
int umem_dirty_start(struct umem_area *area);
void umem_dirty_stop(struct umem_area *area);

/* file.c */
int umem_files_init(void);
void umem_files_exit(void);

/* request.c */
void umem_requests_init(struct umem_area *area);
void umem_request(struct umem_area *area, unsigned long index, bool async);
void umem_request_again(struct umem_area *area);
bool umem_request_pending(struct umem_area *area);
bool umem_request_poll(struct umem_area *area);
int umem_request_take(struct umem_area *area, struct umem_page_request *reqs,
		      unsigned int nr);
void umem_request_return(struct umem_area *area,
			 const struct umem_page_request *reqs, unsigned int nr);
void umem_wait(struct vm_fault *vmf, struct umem_area *area,
	       unsigned long index, unsigned int state);
void umem_wake(struct umem_area *area, unsigned long start,
	       unsigned long count);
void umem_wake_everybody(struct umem_area *area);
bool umem_mm_is_exiting(struct mm_struct *mm);

/* mark.c */
int umem_mark(struct umem_area *area, unsigned long start, unsigned long count,
	      u64 *nr_new);
int umem_poison(struct umem_area *area, unsigned long start,
		unsigned long count, u64 *nr_new);
int umem_discard(struct umem_area *area, pgoff_t start, unsigned long count);
bool umem_is_discarded(struct umem_area *area, unsigned long index);

/* server.c */
extern const struct file_operations umem_server_fops;
struct umem_server *umem_server_new(struct umem_area *area);
int umem_server_attach(struct umem_server *server, bool force);
void umem_server_free(struct umem_server *server);
pid_t umem_server_pid(struct umem_area *area, bool *served);
bool umem_server_is_lost(struct umem_area *area, long *left);
ssize_t umem_server_read(struct umem_server *server, char __user *buf,
			 size_t count, bool nonblock);
ssize_t umem_server_write(struct umem_server *server, const char __user *buf,
			  size_t count);
__poll_t umem_server_poll(struct umem_server *server, struct file *file,
			  struct poll_table_struct *wait);
long umem_server_ioctl(struct umem_server *server, unsigned int cmd,
		       unsigned long arg, bool nonblock);

/* stats.c */
extern const struct attribute_group umem_stats_group;
void umem_stats_init(void);
void umem_stats_sleep(struct umem_area *area, unsigned long index, u64 ns);
void umem_stats_read(struct umem_area *area, struct umem_stats *stats);

/* vma.c */
int umem_mapper_add(struct umem_area *area, struct mm_struct *mm);
void umem_mappers_free(struct umem_area *area);
void umem_touch(struct umem_area *area, pgoff_t start, unsigned long count);
int umem_make_plain(struct umem_area *area);
int umem_log_vmas(struct umem_area *area);
void umem_unlog_vmas(struct umem_area *area);

#endif /* _UMEM_H */

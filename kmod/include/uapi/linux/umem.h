/* SPDX-License-Identifier: GPL-2.0-only WITH Linux-syscall-note */
/*
 * umem: memory areas whose missing pages are supplied by user space.
 *
 * This header is the whole contract between the driver and a server; it is
 * enough to write another server in another language.
 *
 * Life of an area, as its server sees it:
 *
 *  1. open /dev/umem and UMEM_DEV_CREATE_UMEM.  The area exists, its node
 *     /dev/umem<id> appears, every granule is missing.
 *  2. A consumer (QEMU, a vhost-user back end) opens the node and maps it.  It
 *     needs to know nothing of this header.
 *  3. The consumer touches a missing granule and sleeps.  The server learns of
 *     it by poll(), read() or UMEM_GET_PAGE_REQUEST.
 *  4. The server puts the content into the backing file (&umem_create.shmem_fd,
 *     normally through an mmap() of it), then marks the granule cached by
 *     write() or UMEM_MARK_PAGE_CACHED.  Who waited for it runs on.  A granule
 *     that was marked without being filled reads as zeros.
 *  5. Granules may be marked before anybody asks for them.
 *  6. The server dies: who waits keeps waiting (and can be killed) until another
 *     server takes over by UMEM_DEV_REATTACH, which gets every open request
 *     again; or gets SIGBUS after a time that was chosen.  Never zeros.
 *  7. Every granule is cached: UMEM_MAKE_VMA_ANONYMOUS takes the driver out of
 *     the consumer's way, and the server may go.
 *  8. The area is gone when no server, no open node and no mapping is left.
 *
 * One rule binds the server: a granule that was marked is never written through
 * the backing file again.  It belongs to the consumer from then on.  (And nobody
 * should write() into the backing file from a mapping of its own area: for a
 * missing page that waits for itself.)
 *
 * An area is served in granules: the host page, or a larger power of two.
 * Offsets and counts of pages are in host pages (PAGE_SIZE) all the same, as in
 * mmap2(); where they name granules they are multiples of the granule.
 * Reserved members and unknown flags must be zero, else the call gives EINVAL.
 * All structures have the same layout for 32-bit and 64-bit callers.
 *
 * Copyright (C) 2026 The umem authors
 */
#ifndef _UAPI_LINUX_UMEM_H
#define _UAPI_LINUX_UMEM_H

#include <linux/const.h>
#include <linux/ioctl.h>
#include <linux/types.h>

#define UMEM_IOC_MAGIC	0x1E

/* Size of a name, its terminating NUL included. */
#define UMEM_NAME_MAX	64

/* Most ranges that one UMEM_MARK_PAGE_CACHED takes. */
#define UMEM_MARK_MAX	4096

/* Largest granule in bytes. */
#define UMEM_GRANULE_MAX	(2U << 20)

/**
 * struct umem_init - argument of UMEM_INIT, the interface of June 2012
 * @size: in: size of the area in bytes; out: the same, rounded up to the page
 * @shmem_fd: out: the backing file, as large as the area
 * @padding: ignored
 */
struct umem_init {
	__u64 size;
	__s32 shmem_fd;
	__s32 padding;
};

/*
 * UMEM_INIT on an open of /dev/umem makes that file an unnamed area of its own:
 * mmap() of it, shared or private, is the consumer's side; read(), write() and
 * poll() of it are the server's, which it commonly shares with a child through
 * fork().
 *
 * Errors: EINVAL (size is zero or above the limit), EBUSY (it was called on
 * this file before), EMFILE, ENFILE, ENOMEM, ENOSPC (too many areas), EFAULT.
 * Before it, read(), write() and mmap() give ENXIO and poll() gives POLLERR.
 */
#define UMEM_INIT	_IOWR(UMEM_IOC_MAGIC, 0, struct umem_init)

/*
 * Back the area with huge pages where there are some, so that one fault maps one
 * granule of 2 MiB.  Needs a granule_size of that; not every kernel and machine
 * can (EOPNOTSUPP).
 */
#define UMEM_CREATE_HUGE	_BITUL(0)

/**
 * struct umem_create - argument of UMEM_DEV_CREATE_UMEM
 * @size: in: size of the area in bytes, at most the limit of the module (four
 *	times the memory of the machine); out: the same, rounded up to the granule
 * @flags: in: zero or UMEM_CREATE_HUGE
 * @granule_size: in: bytes served at a time, a power of two from the host page
 *	to UMEM_GRANULE_MAX, zero for the host page; out: the size in force
 * @server_fd: out: the server's end of the area, opened O_RDWR and O_CLOEXEC
 * @shmem_fd: out: the backing file, as large as the area, O_CLOEXEC; what is
 *	written to it is charged to the memory cgroup of the first consumer
 * @id: out: the N of /dev/umemN
 * @loss_timeout_ms: in: as in &struct umem_loss_policy
 * @reserved: must be zero
 * @name: in: NUL-terminated name of the area, unique among those alive; letters,
 *	digits and any of "._:+-", at least one, and not "." or ".."
 */
struct umem_create {
	__u64 size;
	__u32 flags;
	__u32 granule_size;
	__s32 server_fd;
	__s32 shmem_fd;
	__u32 id;
	__u32 loss_timeout_ms;
	__u32 reserved[4];
	char name[UMEM_NAME_MAX];
};

/*
 * UMEM_DEV_CREATE_UMEM on /dev/umem makes a named area with a node of its own,
 * which belongs to the caller's file system uid and gid, mode 0660.
 *
 * Errors: EINVAL (size, name, flags, granule_size or reserved), EEXIST (the
 * name is in use), EBUSY (another process of the user took the area over already),
 * EOPNOTSUPP (no huge pages here), EDQUOT (the areas of this user are as large as
 * the module lets them be), EMFILE, ENFILE, ENOMEM, ENOSPC (too many areas),
 * EFAULT.
 */
#define UMEM_DEV_CREATE_UMEM	_IOWR(UMEM_IOC_MAGIC, 1, struct umem_create)

/* The area has a server. */
#define UMEM_INFO_SERVED	_BITUL(0)
/* Every granule of it is cached. */
#define UMEM_INFO_COMPLETE	_BITUL(1)
/* At least one mapping of it exists for which the driver answers. */
#define UMEM_INFO_MAPPED	_BITUL(2)
/* It has a node: it was made by UMEM_DEV_CREATE_UMEM. */
#define UMEM_INFO_NODE		_BITUL(3)
/* It was made with UMEM_CREATE_HUGE. */
#define UMEM_INFO_HUGE		_BITUL(4)

/**
 * struct umem_info - what is known of one area
 * @size: bytes
 * @nr_cached: granules that are cached
 * @nr_delivered: requests that were handed to servers so far, repeats included
 * @id: the N of /dev/umemN
 * @flags: UMEM_INFO_SERVED and so on
 * @granule_size: bytes
 * @owner_uid: who created it, in the caller's user namespace
 * @server_pid: process that attached as its server, in the caller's pid
 *	namespace; 0 without one
 * @loss_timeout_ms: as in &struct umem_loss_policy
 * @reserved: zero
 * @name: NUL-terminated; empty for an area of UMEM_INIT
 */
struct umem_info {
	__u64 size;
	__u64 nr_cached;
	__u64 nr_delivered;
	__u32 id;
	__u32 flags;
	__u32 granule_size;
	__u32 owner_uid;
	__s32 server_pid;
	__u32 loss_timeout_ms;
	__u32 reserved[4];
	char name[UMEM_NAME_MAX];
};

/**
 * struct umem_list - argument of UMEM_DEV_LIST
 * @infos: in: user address of an array of &struct umem_info
 * @nr: in: room in @infos; out: how many were filled in, in order of their ids
 * @first_id: in: areas with smaller ids are passed over
 * @total: out: areas alive with ids from @first_id on; more than @nr when the
 *	room was too small, then go on with the last id plus one
 * @reserved: must be zero
 */
struct umem_list {
	__u64 infos;
	__u32 nr;
	__u32 first_id;
	__u32 total;
	__u32 reserved[3];
};

/*
 * UMEM_DEV_LIST on /dev/umem lists the areas.
 *
 * Errors: EINVAL (reserved), EFAULT, ENOMEM.
 */
#define UMEM_DEV_LIST	_IOWR(UMEM_IOC_MAGIC, 2, struct umem_list)

/* Take the area even from a server that is still there; that one is fenced. */
#define UMEM_REATTACH_FORCE	_BITUL(0)

/**
 * struct umem_reattach - argument of UMEM_DEV_REATTACH
 * @size: out: bytes
 * @id: in: which area
 * @flags: in: zero or UMEM_REATTACH_FORCE
 * @granule_size: out: bytes
 * @server_fd: out: the server's end of the area
 * @shmem_fd: out: the backing file
 * @reserved: must be zero
 */
struct umem_reattach {
	__u64 size;
	__u32 id;
	__u32 flags;
	__u32 granule_size;
	__s32 server_fd;
	__s32 shmem_fd;
	__u32 reserved[5];
};

/*
 * UMEM_DEV_REATTACH on /dev/umem makes the caller the server of an area whose
 * server died or hangs.  Every granule that was requested and is missing is
 * delivered again.  The caller needs the creator's uid or CAP_SYS_ADMIN.
 *
 * Of a server that was fenced by UMEM_REATTACH_FORCE every call fails with
 * ENODEV, a blocked read() too, and poll() gives POLLERR | POLLHUP.  Its mapping
 * of the backing file stays: kill it before its successor marks anything.
 *
 * Errors: ENOENT (no such area), EPERM, EBUSY (it has a server and FORCE is not
 * set), EINVAL (flags, reserved), EMFILE, ENFILE, ENOMEM, EFAULT.
 */
#define UMEM_DEV_REATTACH	_IOWR(UMEM_IOC_MAGIC, 3, struct umem_reattach)

/*
 * What follows is for the server's end of an area: the server_fd above, or an
 * open of /dev/umem after UMEM_INIT.  It also takes
 *
 * read():  native-endian __u64 page offsets that are wanted and missing, in the
 *	order of the faults.  Blocks until there is one, or gives EAGAIN with
 *	O_NONBLOCK.  EINVAL for a buffer under 8 bytes.  The same offset may come
 *	more than once.
 * write(): native-endian __u64 page offsets whose content is valid now.  EINVAL
 *	for a length that is no multiple of 8 and for an offset past the end; the
 *	result counts the bytes before the first bad one, if any.
 * poll():  POLLIN while a request is pending; POLLOUT always.
 */

/*
 * Nobody sleeps for it yet: a fault that may not sleep queued it (KVM's
 * asynchronous page fault).
 */
#define UMEM_REQUEST_ASYNC	_BITULL(0)
/*
 * The consumer discarded all of it while it was missing: mark it, do not fetch it.
 * Whatever was filled in is zeroed when it is marked.
 */
#define UMEM_REQUEST_DISCARDED	_BITULL(1)

/**
 * struct umem_page_request - one granule that is wanted
 * @pgoff: offset of its first page in the area, in pages
 * @flags: UMEM_REQUEST_ASYNC, UMEM_REQUEST_DISCARDED; others are to be ignored
 */
struct umem_page_request {
	__u64 pgoff;
	__u64 flags;
};

/**
 * struct umem_page_requests - argument of UMEM_GET_PAGE_REQUEST
 * @requests: in: user address of an array of &struct umem_page_request
 * @nr: in: room in @requests, at least one; out: how many were filled in
 * @reserved: must be zero
 */
struct umem_page_requests {
	__u64 requests;
	__u32 nr;
	__u32 reserved;
};

/*
 * UMEM_GET_PAGE_REQUEST gets requests in the order of the faults, like read().
 *
 * Errors: EINVAL (nr is zero, reserved), EAGAIN (O_NONBLOCK and none pending),
 * EINTR, ENODEV (fenced), ENXIO (before UMEM_INIT), EFAULT (the requests are
 * queued again).
 */
#define UMEM_GET_PAGE_REQUEST	_IOWR(UMEM_IOC_MAGIC, 16, struct umem_page_requests)

/**
 * struct umem_page_range - a run of pages
 * @pgoff: the first one, in pages
 * @count: how many, at least one
 */
struct umem_page_range {
	__u64 pgoff;
	__u64 count;
};

/*
 * Put the pages into the consumer's page tables at once, as far as that can be
 * done without waiting, so that its next touch is no fault at all.
 */
#define UMEM_MARK_TOUCH		_BITUL(0)

/**
 * struct umem_mark_cached - argument of UMEM_MARK_PAGE_CACHED
 * @ranges: in: user address of an array of &struct umem_page_range
 * @nr: in: how many there are, at most UMEM_MARK_MAX
 * @flags: in: zero or UMEM_MARK_TOUCH
 * @nr_new: out: granules that were missing before
 */
struct umem_mark_cached {
	__u64 ranges;
	__u32 nr;
	__u32 flags;
	__u64 nr_new;
};

/*
 * UMEM_MARK_PAGE_CACHED says that the content of the ranges is valid and wakes
 * who waits for it.  Marking what is cached already is harmless.
 *
 * Errors, with nothing marked: EINVAL (nr, flags, an empty range, one past the
 * end, or one that is not made of whole granules), EFAULT, ENODEV (fenced), ENXIO
 * (before UMEM_INIT), ENOMEM.  With some of the ranges marked: ENOMEM (what was
 * discarded could not be zeroed), EINTR (the caller is killed), ENODEV (fenced in
 * the middle of it).
 */
#define UMEM_MARK_PAGE_CACHED	_IOWR(UMEM_IOC_MAGIC, 17, struct umem_mark_cached)

/*
 * UMEM_GET_INFO describes the area.
 *
 * Errors: EFAULT, ENODEV (fenced), ENXIO (before UMEM_INIT).
 */
#define UMEM_GET_INFO	_IOR(UMEM_IOC_MAGIC, 18, struct umem_info)

/**
 * struct umem_loss_policy - argument of UMEM_SET_LOSS_POLICY
 * @timeout_ms: milliseconds without a server after which who waits for a missing
 *	granule, or touches one, gets SIGBUS; zero: it waits, for ever if need be
 * @reserved: must be zero
 */
struct umem_loss_policy {
	__u32 timeout_ms;
	__u32 reserved;
};

/*
 * UMEM_SET_LOSS_POLICY says what becomes of consumers when the server is gone.
 *
 * Errors: EINVAL (reserved), EFAULT, ENODEV (fenced), ENXIO (before UMEM_INIT).
 */
#define UMEM_SET_LOSS_POLICY	_IOW(UMEM_IOC_MAGIC, 19, struct umem_loss_policy)

/*
 * UMEM_MARK_PAGE_POISONED says that the content of the ranges is lost for good.
 * Who waits for it, or touches it later, gets SIGBUS with BUS_MCEERR_AR, and a
 * guest of KVM a machine check.  What is cached already stays as it is, and a
 * granule whose content is found after all can still be marked cached.  The
 * result counts granules that were neither cached nor poisoned.
 *
 * Takes and gives what UMEM_MARK_PAGE_CACHED does; flags must be zero.
 */
#define UMEM_MARK_PAGE_POISONED	_IOWR(UMEM_IOC_MAGIC, 20, struct umem_mark_cached)

/* Bitmap of granules whose content is valid. */
#define UMEM_BITMAP_CACHED	0
/* Bitmap of granules that were wanted at some time. */
#define UMEM_BITMAP_REQUESTED	1
/* Bitmap of granules whose content is lost, unless they are cached too. */
#define UMEM_BITMAP_POISONED	2

/**
 * struct umem_bitmap - argument of UMEM_GET_BITMAP
 * @words: in: user address of an array of __u64; bit b of word w stands for
 *	granule @first + 64 * w + b, bits past the last granule are zero
 * @first: in: number of the first granule, a multiple of 64
 * @nr_words: in: words wanted
 * @which: in: UMEM_BITMAP_CACHED and so on
 * @reserved: must be zero
 */
struct umem_bitmap {
	__u64 words;
	__u64 first;
	__u32 nr_words;
	__u32 which;
	__u64 reserved;
};

/*
 * UMEM_GET_BITMAP reads the state of granules, 64 to a word: what a server that
 * took over need not fetch any more.
 *
 * Errors: EINVAL (first, nr_words past the last granule's, which, reserved),
 * EINTR (killed), EFAULT, ENODEV (fenced), ENXIO (before UMEM_INIT).
 */
#define UMEM_GET_BITMAP	_IOW(UMEM_IOC_MAGIC, 21, struct umem_bitmap)

/*
 * UMEM_MAKE_VMA_ANONYMOUS turns every mapping of a complete area into one of
 * plain shared memory, in whatever process it is: the driver does not see its
 * faults any more, and mlock(), mremap() and huge pages work as they do there.
 *
 * Errors: EBUSY (a granule is missing, or the log of writes is on), EAGAIN (a mapping
 * is just being made or copied: call again), EINTR, ENOMEM, ENODEV (fenced), ENXIO
 * (before UMEM_INIT).
 */
#define UMEM_MAKE_VMA_ANONYMOUS	_IO(UMEM_IOC_MAGIC, 22)

/* Buckets of &umem_stats.latency. */
#define UMEM_LATENCY_BUCKETS	24

/**
 * struct umem_stats - what has happened in an area since it was made
 * @nr_minor: faults on a granule that was cached, while others were missing
 * @nr_major: faults that slept for a missing granule
 * @nr_async: faults that were not allowed to sleep for one
 * @nr_duplicate: those of the latter two whose granule was requested already
 * @nr_killed: sleeps that ended because the sleeper was killed
 * @nr_lost: faults that got SIGBUS because there was no server for too long
 * @nr_poison_hits: faults on a poisoned granule
 * @nr_requested: requests queued, each granule once
 * @nr_delivered: requests handed to servers, repeats included
 * @nr_cached: granules marked cached
 * @nr_poisoned: granules marked poisoned
 * @nr_discarded: pages that the consumer discarded while they were missing
 * @nr_touched: pages mapped for UMEM_MARK_TOUCH
 * @nr_logged: granules that came into the log of writes
 * @blocked_ns: nanoseconds that faults have slept, of all threads together
 * @latency: sleeps that ended with the granule there, by their length: bucket i
 *	holds those from 2^i up to 2^(i+1) microseconds, the first one also what
 *	is shorter and the last one what is longer
 * @reserved: zero
 */
struct umem_stats {
	__u64 nr_minor;
	__u64 nr_major;
	__u64 nr_async;
	__u64 nr_duplicate;
	__u64 nr_killed;
	__u64 nr_lost;
	__u64 nr_poison_hits;
	__u64 nr_requested;
	__u64 nr_delivered;
	__u64 nr_cached;
	__u64 nr_poisoned;
	__u64 nr_discarded;
	__u64 nr_touched;
	__u64 nr_logged;
	__u64 blocked_ns;
	__u64 latency[UMEM_LATENCY_BUCKETS];
	__u64 reserved;
};

/*
 * UMEM_GET_STATS reads the counters, which live as long as the area.
 *
 * Errors: EFAULT, ENODEV (fenced), ENXIO (before UMEM_INIT).
 */
#define UMEM_GET_STATS	_IOR(UMEM_IOC_MAGIC, 23, struct umem_stats)

/**
 * struct umem_dirty_log - argument of UMEM_SET_DIRTY_LOG
 * @on: one or zero
 * @reserved: must be zero
 */
struct umem_dirty_log {
	__u32 on;
	__u32 reserved;
};

/*
 * UMEM_SET_DIRTY_LOG has the driver note from now on which granules consumers write
 * to, through whatever mapping and by whatever means, and discard.  It costs them a
 * fault at the first write to a page after each reading.  What was written before
 * the call returned may be in the log too; the server's own writes are not.  The log
 * ends with the server; one that takes over by UMEM_REATTACH_FORCE finds it on, without
 * what its predecessor had read.
 *
 * What is pinned for long (VFIO, RDMA, registered buffers of io_uring) is in every
 * reading.  Since Linux 6.5 the kernel refuses to pin what was not written since the last
 * reading: EFAULT or EOPNOTSUPP.
 *
 * Errors: EBUSY (it is on already), EAGAIN (a mapping is just being made or copied:
 * call again), EINVAL, EINTR, ENOMEM, ENFILE, EFAULT, ENODEV (fenced), ENXIO (before
 * UMEM_INIT).
 */
#define UMEM_SET_DIRTY_LOG	_IOW(UMEM_IOC_MAGIC, 24, struct umem_dirty_log)

/* Clear nothing. */
#define UMEM_DIRTY_PEEK		_BITULL(0)

/**
 * struct umem_dirty - argument of UMEM_GET_DIRTY
 * @words: in: user address of an array of __u64; bit b of word w stands for
 *	granule @first + 64 * w + b, bits past the last granule are zero
 * @first: in: number of the first granule, a multiple of 64
 * @nr_words: in: words wanted
 * @flags: in: zero or UMEM_DIRTY_PEEK
 * @nr_dirty: out: how many bits of @words are set
 */
struct umem_dirty {
	__u64 words;
	__u64 first;
	__u32 nr_words;
	__u32 flags;
	__u64 nr_dirty;
};

/*
 * UMEM_GET_DIRTY reads the log of a range and clears it, in one step for each
 * granule: what was written before is to be seen in the backing file when the call
 * has returned, what is written after it was cleared is in the next reading.
 *
 * Errors: ENODATA (the log is off), EINVAL (first, nr_words past the last granule's,
 * flags), EINTR (killed), ENOMEM, EFAULT, ENODEV (fenced), ENXIO (before UMEM_INIT).  With
 * one of these all bits that this call did not write to @words are in the next reading.
 */
#define UMEM_GET_DIRTY		_IOWR(UMEM_IOC_MAGIC, 25, struct umem_dirty)

#endif /* _UAPI_LINUX_UMEM_H */

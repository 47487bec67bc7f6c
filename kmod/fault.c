// SPDX-License-Identifier: GPL-2.0-only
/*
 * fault.c - the consumer's side: its mapping and its page faults
 *
 * A VMA of an area is a VMA of the backing shmem file whose vm_ops are replaced
 * by ours.  Ours look at the cached bitmap and hand over to shmem's, so that
 * every page exists once, shared by server and consumer, swappable, and
 * accounted as shared memory.
 *
 * A complete area is told by one flag that the fault path reads first.  From then on
 * new mappings are plain ones of the backing file, and vma.c may make plain ones
 * of those that are there, and logged ones while the log of writes is on (dirty.c).
 * That is done with the VMA locked for writing, so no fault sees it happen.
 *
 * Locking: faults come with mmap_lock or the VMA's own lock held for reading.
 * It is dropped before sleeping; the VMA may be gone afterwards, so its file is
 * held and the page offset copied first.  Nothing is allocated
 * here, and for a cached page nothing is locked but what shmem locks.
 *
 * Copyright (C) 2026 The umem authors
 */
#include <linux/fs.h>
#include <linux/falloc.h>
#include <linux/file.h>
#include <linux/mempolicy.h>
#include <linux/module.h>
#include <linux/pagemap.h>
#include <linux/sched/signal.h>

#include "trace.h"
#include "umem.h"

/*
 * How to sleep for a page.
 *
 * A fault in user mode may be interrupted by any signal: the handler runs, the
 * instruction is tried again.  In kernel mode some leave for a signal too (KVM),
 * and some try again at once with the signal still pending (a system call that
 * copies), so that waiting interruptibly would spin.  Who comes again with the
 * signal still there is of the second kind.  A kernel thread takes no signals;
 * umem_wait() has it look up now and then.
 */
static unsigned int umem_wait_state(unsigned int fault_flags)
{
	if (current->flags & PF_KTHREAD)
		return TASK_IDLE;
	if (!(fault_flags & FAULT_FLAG_INTERRUPTIBLE))
		return TASK_KILLABLE;
	if (!(fault_flags & FAULT_FLAG_USER) &&
	    (fault_flags & FAULT_FLAG_TRIED) && signal_pending(current))
		return TASK_KILLABLE;
	return TASK_INTERRUPTIBLE;
}

/* A granule is missing: wait for it, or say that nobody can. */
static vm_fault_t umem_fault_missing(struct vm_fault *vmf, unsigned long index)
{
	struct umem_area *area = vmf->vma->vm_private_data;
	unsigned int state = umem_wait_state(vmf->flags);
	struct file *face;
	long left;

	trace_umem_fault(area, index, vmf->flags);
	if (unlikely(umem_is_poisoned(area, index)) &&
	    !umem_is_cached(area, index)) {
		this_cpu_inc(area->counts->nr_poison_hits);
		return VM_FAULT_HWPOISON;
	}

	/*
	 * A task that exits or dumps core must get on with it, and so must the
	 * kernel threads that its exit waits for.
	 */
	if (current->flags & (PF_EXITING | PF_DUMPCORE))
		return VM_FAULT_SIGBUS;
	if (state == TASK_IDLE && umem_mm_is_exiting(vmf->vma->vm_mm))
		return VM_FAULT_SIGBUS;
	if (!(vmf->flags & FAULT_FLAG_ALLOW_RETRY))
		return VM_FAULT_SIGBUS;
	if (umem_server_is_lost(area, &left)) {
		this_cpu_inc(area->counts->nr_lost);
		return VM_FAULT_SIGBUS;
	}

	if (vmf->flags & FAULT_FLAG_RETRY_NOWAIT) {
		this_cpu_inc(area->counts->nr_async);
		umem_request(area, index, true);
		/* The one case in which RETRY leaves the lock held. */
		return VM_FAULT_RETRY;
	}

	this_cpu_inc(area->counts->nr_major);
	umem_request(area, index, false);
	/* The VMA may be gone when it returns; the face keeps area and module. */
	face = get_file(vmf->vma->vm_file);
	umem_wait(vmf, area, index, state);
	fput(face);

	/* Also when the server is gone: NOPAGE would have GUP go round. */
	return VM_FAULT_RETRY;
}

/*
 * Are all granules that a range of pages touches cached?  If not, @missing is the
 * first one that is not.
 */
static bool umem_range_cached(struct umem_area *area, pgoff_t start,
			      pgoff_t end, unsigned long *missing)
{
	unsigned long last = (min(end, area->npages) - 1) >> area->order;

	*missing = find_next_zero_bit(area->cached, last + 1,
				      start >> area->order);
	if (*missing <= last)
		return false;
	/* As in umem_is_cached(). */
	smp_rmb();
	return true;
}

static vm_fault_t umem_vm_fault(struct vm_fault *vmf)
{
	struct umem_area *area = vmf->vma->vm_private_data;
	unsigned long index;
	struct folio *folio;
	vm_fault_t ret;

	/* Pairs with the release of umem_mark(). */
	if (smp_load_acquire(&area->complete))
		return area->shmem_vm_ops->fault(vmf);

	if (vmf->pgoff >= area->npages)
		return VM_FAULT_SIGBUS;

	index = vmf->pgoff >> area->order;
	if (!umem_is_cached(area, index))
		return umem_fault_missing(vmf, index);

	ret = area->shmem_vm_ops->fault(vmf);
	if (!(ret & VM_FAULT_LOCKED))
		return ret;

	/*
	 * shmem maps a large folio as a whole.  Where the granule is not as large
	 * already, the area's mount has huge pages off, but neither MADV_COLLAPSE by
	 * the server nor shmem_enabled=force asks.  The folio's lock is held, so it
	 * can be neither split nor collapsed while we look.
	 */
	folio = page_folio(vmf->page);
	if (likely(!folio_test_large(folio)) ||
	    umem_range_cached(area, folio->index, folio_next_index(folio),
			      &index)) {
		this_cpu_inc(area->counts->nr_minor);
		return ret;
	}

	folio_unlock(folio);
	folio_put(folio);
	vmf->page = NULL;
	return umem_fault_missing(vmf, index);
}

#ifdef UMEM_HAVE_MAP_PAGES
/*
 * Map neighbours of a cached page.  Runs under RCU and may not sleep.
 *
 * The page cache maps a large folio as a whole here too, where no page table is,
 * and whether one is can change under us: since 6.6 a collapse takes page tables
 * away without a lock that we hold.  So neighbours are mapped only where all of
 * what could be one huge page is cached, and whatever is mapped is right.
 */
static vm_fault_t umem_vm_map_pages(struct vm_fault *vmf, pgoff_t start,
				    pgoff_t end)
{
	struct umem_area *area = vmf->vma->vm_private_data;
	pgoff_t block = round_down(vmf->pgoff, PTRS_PER_PTE);
	unsigned long missing;

	/* Pairs with the release of umem_mark(). */
	if (!smp_load_acquire(&area->complete)) {
		if (vmf->pgoff >= area->npages ||
		    !umem_range_cached(area, block, block + PTRS_PER_PTE,
				       &missing))
			return 0;
		start = max(start, block);
		end = min(end, block + PTRS_PER_PTE - 1);
	}
	return area->shmem_vm_ops->map_pages(vmf, start, end);
}
#endif

static void umem_vm_open(struct vm_area_struct *vma)
{
	struct umem_area *area = vma->vm_private_data;

	atomic_inc(&area->nr_maps);
}

/* Having this keeps VMAs of areas from being merged with any other. */
static void umem_vm_close(struct vm_area_struct *vma)
{
	struct umem_area *area = vma->vm_private_data;

	atomic_dec(&area->nr_maps);
	/*
	 * Who waits in a mapping that is gone would wait for a page that may
	 * never come: let it find out.  The VMA was taken out of the mm under its
	 * write lock, which is a barrier and which waiters had held.
	 */
	umem_wake(area, vma->vm_pgoff >> area->order,
		  ((vma->vm_pgoff + vma_pages(vma) - 1) >> area->order) -
		  (vma->vm_pgoff >> area->order) + 1);
}

/**
 * umem_shmem_vm_ops() - what a VMA would have without us
 * @vma: a VMA of an area
 *
 * Return: shmem's operations.
 */
const struct vm_operations_struct *umem_shmem_vm_ops(struct vm_area_struct *vma)
{
	struct umem_area *area = vma->vm_private_data;

	return area->shmem_vm_ops;
}

#ifdef CONFIG_NUMA
static int umem_vm_set_policy(struct vm_area_struct *vma, struct mempolicy *pol)
{
	return umem_shmem_vm_ops(vma)->set_policy(vma, pol);
}
#endif

static const struct vm_operations_struct umem_vm_ops = {
	.open		= umem_vm_open,
	.close		= umem_vm_close,
	.fault		= umem_vm_fault,
#ifdef UMEM_HAVE_MAP_PAGES
	.map_pages	= umem_vm_map_pages,
#endif
#ifdef CONFIG_NUMA
	.set_policy	= umem_vm_set_policy,
	.get_policy	= umem_vm_get_policy,
#endif
};

/* Somebody is about to write to a page for the first time in this round. */
static vm_fault_t umem_vm_page_mkwrite(struct vm_fault *vmf)
{
	struct umem_area *area = vmf->vma->vm_private_data;
	struct folio *folio = page_folio(vmf->page);

	folio_lock(folio);
	if (folio->mapping != area->backing->f_mapping) {
		/* It was punched out meanwhile. */
		folio_unlock(folio);
		return VM_FAULT_NOPAGE;
	}
	umem_dirty_set(area, folio->index,
		       folio_next_index(folio) - folio->index);
	/* Locked, until the entry is there: see dirty.c. */
	return VM_FAULT_LOCKED;
}

/* While the log of writes is on. */
static const struct vm_operations_struct umem_log_vm_ops = {
	.open		= umem_vm_open,
	.close		= umem_vm_close,
	.fault		= umem_vm_fault,
	.page_mkwrite	= umem_vm_page_mkwrite,
#ifdef UMEM_HAVE_MAP_PAGES
	.map_pages	= umem_vm_map_pages,
#endif
#ifdef CONFIG_NUMA
	.set_policy	= umem_vm_set_policy,
	.get_policy	= umem_vm_get_policy,
#endif
};

/**
 * umem_vma_is_logged() - are we asked before it is written to?
 * @vma: any VMA
 *
 * Return: true for a consumer's view while the log is on.
 */
bool umem_vma_is_logged(struct vm_area_struct *vma)
{
	return READ_ONCE(vma->vm_ops) == &umem_log_vm_ops;
}

/**
 * umem_vma_set_logged() - be asked before it is written to, or not
 * @vma: a consumer's view, locked for writing
 * @logged: which
 */
void umem_vma_set_logged(struct vm_area_struct *vma, bool logged)
{
	WRITE_ONCE(vma->vm_ops, logged ? &umem_log_vm_ops : &umem_vm_ops);
}

/**
 * umem_vma_is_ours() - does the driver answer for the faults of a VMA?
 * @vma: any VMA
 * @area: the area that it would be of
 *
 * Return: true for a consumer's view of the area.
 */
bool umem_vma_is_ours(struct vm_area_struct *vma, struct umem_area *area)
{
	const struct vm_operations_struct *ops = READ_ONCE(vma->vm_ops);

	return (ops == &umem_vm_ops || ops == &umem_log_vm_ops) &&
	       READ_ONCE(vma->vm_private_data) == area;
}

/**
 * umem_face_fallocate() - give memory back
 * @face: a face of the area
 * @mode: FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE is what there is
 * @offset: bytes
 * @len: bytes
 *
 * MADV_REMOVE comes here, since the VMA's file is a face, and fallocate() of an
 * area's file.
 *
 * Return: 0 or a negative error code.
 */
long umem_face_fallocate(struct file *face, int mode, loff_t offset, loff_t len)
{
	struct umem_area *area = umem_face_area(face);
	struct file *backing = area->backing;
	pgoff_t start, end;
	int ret;

	if (mode != (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE))
		return -EOPNOTSUPP;

	/* Whole pages: the content of the others is not given up. */
	start = DIV_ROUND_UP_ULL(offset, PAGE_SIZE);
	end = min_t(u64, (u64)(offset + len) >> PAGE_SHIFT, area->npages);
	if (start < end) {
		ret = umem_discard(area, start, end - start);
		if (ret)
			return ret;
	}
	ret = backing->f_op->fallocate(backing, mode, offset, len);
	/*
	 * It reads as zeros now, or some of it does: first that, then look whether the
	 * log is on.  Pairs with umem_dirty_forget_run(), of umem_dirty_start().
	 */
	smp_mb();
	if (READ_ONCE(area->logging))
		umem_dirty_set(area, offset >> PAGE_SHIFT,
			       DIV_ROUND_UP_ULL(offset + len, PAGE_SIZE) -
			       (offset >> PAGE_SHIFT));
	return ret;
}

static int umem_face_release(struct inode *inode, struct file *file)
{
	umem_area_put(file->private_data);
	return 0;
}

/*
 * A face is the area as its consumers have it: another open of the backing file,
 * made for each open of the node, which becomes the vm_file of the VMAs mapped
 * from it.  It holds a reference to the area, so that a VMA keeps its area, and
 * its owner is this module, so that a VMA keeps the module.  It is never given to
 * user space as a descriptor.
 */
static const struct file_operations umem_face_fops = {
	.owner		= THIS_MODULE,
	.release	= umem_face_release,
	.fallocate	= umem_face_fallocate,
	.fsync		= noop_fsync,
};

/**
 * umem_face_open() - open an area for a consumer
 * @area: the area, of which the caller holds a reference
 *
 * Return: the file, or an ERR_PTR().
 */
struct file *umem_face_open(struct umem_area *area)
{
	struct file *face = umem_area_open_backing(area);

	if (IS_ERR(face))
		return face;
	/* The caller runs in an operation of ours, so the module is not going. */
	__module_get(THIS_MODULE);
	replace_fops(face, &umem_face_fops);
	umem_area_get(area);
	face->private_data = area;
	return face;
}

/**
 * umem_face_area() - which area is a face of?
 * @face: it
 *
 * Return: the area; a borrowed reference.
 */
struct umem_area *umem_face_area(struct file *face)
{
	return face->private_data;
}

/**
 * umem_face_mmap() - make a VMA the consumer's view of an area
 * @face: the area's face that the VMA is to hold
 * @vma: it, as the mm hands it to a file's mmap
 * @priv: a private mapping may be written to
 *
 * Return: 0 or a negative error code.
 */
int umem_face_mmap(struct file *face, struct vm_area_struct *vma, bool priv)
{
	struct umem_area *area = umem_face_area(face);
	bool logging;
	int ret;

	if (vma_pages(vma) > area->npages ||
	    vma->vm_pgoff > area->npages - vma_pages(vma))
		return -EINVAL;

	/*
	 * What is written to a private mapping is seen by nobody else and lost
	 * to the next migration; nobody who maps a VM's memory wants that.
	 */
	if (!priv && !(vma->vm_flags & VM_MAYSHARE)) {
		if (vma->vm_flags & VM_WRITE)
			return -EINVAL;
		vm_flags_clear(vma, VM_MAYWRITE);
	}

	ret = umem_mapper_add(area, vma->vm_mm);
	if (ret)
		return ret;
	ret = vfs_mmap(area->backing, vma);
	if (ret)
		return ret;
	umem_payer_choose(area->payer);

	/*
	 * Read after umem_mapper_add(): whoever switches the log either is seen here
	 * or waits for us.  Pairs with the release of umem_dirty_start().
	 */
	logging = smp_load_acquire(&area->logging);
	/* Pairs with the release of umem_mark(). */
	if (!logging && smp_load_acquire(&area->complete)) {
		vma_set_file(vma, area->backing);
		return 0;
	}

	/* The same for every VMA of the file. */
	WRITE_ONCE(area->shmem_vm_ops, vma->vm_ops);
	vma_set_file(vma, face);
	vma->vm_private_data = area;
	vma->vm_ops = logging ? &umem_log_vm_ops : &umem_vm_ops;
	/*
	 * MADV_COLLAPSE of a consumer maps a huge page without a fault, so we
	 * would not be asked.  This is what keeps it and khugepaged away; that
	 * mlock() populates and does not lock, and that mremap() does not grow the
	 * mapping, comes with it.
	 */
	vm_flags_set(vma, VM_DONTEXPAND);
	umem_vm_open(vma);
	return 0;
}

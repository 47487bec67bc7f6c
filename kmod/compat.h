/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * compat.h - one API over the kernels that the driver builds on
 *
 * Every condition on the kernel lives here.  Kbuild looks for what a kernel has in
 * its headers and among its exports and defines UMEM_HAVE_*; the rest of the driver
 * is written for the newest kernel.
 *
 * Copyright (C) 2026 The umem authors
 */
#ifndef _UMEM_COMPAT_H
#define _UMEM_COMPAT_H

#include <linux/bitmap.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/mm.h>
#include <linux/pagemap.h>
#include <linux/sched/mm.h>

/* A search of mm.h found neither: faults are handled under mmap_lock alone. */
#ifndef UMEM_HAVE_RELEASE_FAULT_LOCK
static inline void release_fault_lock(struct vm_fault *vmf)
{
	mmap_read_unlock(vmf->vma->vm_mm);
}
#endif

#ifndef UMEM_HAVE_VM_FLAGS_CLEAR
static inline void vm_flags_set(struct vm_area_struct *vma,
				unsigned long flags)
{
	vma->vm_flags |= flags;
}

static inline void vm_flags_clear(struct vm_area_struct *vma,
				  unsigned long flags)
{
	vma->vm_flags &= ~flags;
}
#endif

#ifndef UMEM_HAVE_VMA_START_WRITE
static inline void vma_start_write(struct vm_area_struct *vma)
{
}
#endif

#ifndef UMEM_HAVE_VMA_SET_FILE
static inline void vma_set_file(struct vm_area_struct *vma, struct file *file)
{
	get_file(file);
	swap(vma->vm_file, file);
	fput(file);
}
#endif

#ifndef UMEM_HAVE_VFS_MMAP
#define vfs_mmap(file, vma)	call_mmap(file, vma)
#endif

/* The flags of a shmem file whose size is not accounted at once. */
#ifdef UMEM_HAVE_SHMEM_VMA_FLAGS
#define UMEM_SHMEM_NORESERVE	mk_vma_flags(VMA_NORESERVE_BIT)
#else
#define UMEM_SHMEM_NORESERVE	VM_NORESERVE
#endif

#ifdef UMEM_HAVE_CONST_DEVNODE
#define umem_devnode_arg	const struct device
#else
#define umem_devnode_arg	struct device
#endif

/* Whose ids those of a mount are. */
#ifdef UMEM_HAVE_MNT_IDMAP
#define umem_idmap_t		struct mnt_idmap
#else
#define umem_idmap_t		struct user_namespace
#endif

#ifndef UMEM_HAVE_INIT_TS
static inline void simple_inode_init_ts(struct inode *inode)
{
	inode->i_atime = current_time(inode);
	inode->i_mtime = inode->i_atime;
	inode->i_ctime = inode->i_atime;
}
#endif

#ifndef UMEM_HAVE_DEFAULT_D_OP
static inline void set_default_d_op(struct super_block *sb,
				    const struct dentry_operations *ops)
{
	sb->s_d_op = ops;
}
#endif

/*
 * What is given to a file system of mounts with ids of their own is not given to
 * one of the kernels before them.
 */
int umem_file_setattr(umem_idmap_t *idmap, struct dentry *dentry,
		      struct iattr *attr);

#ifdef UMEM_HAVE_SETATTR_IDMAP
#define umem_setattr		umem_file_setattr
#define umem_setattr_prepare	setattr_prepare
#define umem_setattr_copy	setattr_copy
#else
static inline int umem_setattr(struct dentry *dentry, struct iattr *attr)
{
	return umem_file_setattr(NULL, dentry, attr);
}

static inline int umem_setattr_prepare(umem_idmap_t *idmap,
				       struct dentry *dentry,
				       struct iattr *attr)
{
	return setattr_prepare(dentry, attr);
}

static inline void umem_setattr_copy(umem_idmap_t *idmap,
				     struct inode *inode, struct iattr *attr)
{
	setattr_copy(inode, attr);
}
#endif

/* Up to 64 bits at a time is what the driver asks for. */
#ifndef UMEM_HAVE_BITMAP_TO_ARR64
static inline void bitmap_to_arr64(u64 *buf, const unsigned long *bitmap,
				   unsigned int nbits)
{
	u32 half[2] __aligned(8) = { };

	bitmap_to_arr32(half, bitmap, nbits);
	*buf = (u64)half[1] << 32 | half[0];
}
#endif

#ifdef UMEM_HAVE_STRUCT_FOLIO
/* map_pages may be given a part of what is asked for. */
#define UMEM_HAVE_MAP_PAGES
#else
/* A compound page, or one that is none, by the name of its head. */
struct folio {
	union {
		struct {
			unsigned long flags;
			struct list_head lru;
			struct address_space *mapping;
			pgoff_t index;
		};
		struct page page;
	};
};

static_assert(offsetof(struct folio, index) == offsetof(struct page, index));

static inline struct folio *page_folio(struct page *page)
{
	return (struct folio *)compound_head(page);
}

static inline bool folio_test_large(struct folio *folio)
{
	return PageHead(&folio->page);
}

static inline pgoff_t folio_next_index(struct folio *folio)
{
	return folio->index + compound_nr(&folio->page);
}

static inline void folio_unlock(struct folio *folio)
{
	unlock_page(&folio->page);
}

static inline void folio_put(struct folio *folio)
{
	put_page(&folio->page);
}

static inline void folio_lock(struct folio *folio)
{
	lock_page(&folio->page);
}

static inline int folio_ref_count(struct folio *folio)
{
	return page_ref_count(&folio->page);
}

static inline bool folio_maybe_dma_pinned(struct folio *folio)
{
	return page_maybe_dma_pinned(&folio->page);
}
#endif

/* The folio of a page, locked and with a reference, or NULL if it is not in memory. */
static inline struct folio *umem_lock_folio(struct address_space *mapping,
					    pgoff_t index)
{
#ifdef UMEM_HAVE_STRUCT_FOLIO
	struct folio *folio = filemap_lock_folio(mapping, index);

	/* NULL before 6.4. */
	return IS_ERR(folio) ? NULL : folio;
#else
	struct page *page = find_lock_page(mapping, index);

	return page ? page_folio(page) : NULL;
#endif
}

/* How many entries a folio has; of a large one, where that is hard to tell, none. */
static inline int umem_folio_mapcount(struct folio *folio)
{
#ifdef UMEM_HAVE_FOLIO_MAPCOUNT
	return folio_mapcount(folio);
#else
	return folio_test_large(folio) ? 0 : page_mapcount(&folio->page);
#endif
}

const struct vm_operations_struct *umem_shmem_vm_ops(struct vm_area_struct *vma);

#ifdef CONFIG_NUMA
#ifdef UMEM_HAVE_POLICY_ILX
static inline struct mempolicy *umem_vm_get_policy(struct vm_area_struct *vma,
						   unsigned long addr,
						   pgoff_t *ilx)
{
	return umem_shmem_vm_ops(vma)->get_policy(vma, addr, ilx);
}
#else
static inline struct mempolicy *umem_vm_get_policy(struct vm_area_struct *vma,
						   unsigned long addr)
{
	return umem_shmem_vm_ops(vma)->get_policy(vma, addr);
}
#endif
#endif /* CONFIG_NUMA */

/*
 * Before 5.14 pages are not charged to the active cgroup, and what setting it needs
 * is not exported.  There the server pays.
 */
#ifndef UMEM_HAVE_ACTIVE_MEMCG
static inline struct mem_cgroup *umem_set_active_memcg(struct mem_cgroup *memcg)
{
	return NULL;
}
#else
#define umem_set_active_memcg(memcg)	set_active_memcg(memcg)
#endif

#endif /* _UMEM_COMPAT_H */

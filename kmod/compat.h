/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * compat.h - one API over the kernels that the driver builds on
 *
 * Every condition on the kernel lives here.  Kbuild looks for what a kernel has in
 * its headers and defines UMEM_HAVE_*; the rest of the driver is written for the
 * newest kernel.
 *
 * Copyright (C) 2026 The umem authors
 */
#ifndef _UMEM_COMPAT_H
#define _UMEM_COMPAT_H

#include <linux/fs.h>
#include <linux/mm.h>

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

#ifndef UMEM_HAVE_VFS_MMAP
#define vfs_mmap(file, vma)	call_mmap(file, vma)
#endif

#ifdef UMEM_HAVE_CONST_DEVNODE
#define umem_devnode_arg	const struct device
#else
#define umem_devnode_arg	struct device
#endif

/* Whose ids those of a mount are. */
#ifdef UMEM_HAVE_MNT_IDMAP
#define umem_idmap_arg		struct mnt_idmap
#else
#define umem_idmap_arg		struct user_namespace
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

#ifdef UMEM_HAVE_STRUCT_FOLIO
#define UMEM_HAVE_MAP_PAGES
#endif

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

#endif /* _UMEM_COMPAT_H */

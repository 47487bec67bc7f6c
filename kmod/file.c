// SPDX-License-Identifier: GPL-2.0-only
/*
 * file.c - the areas as regular files, in a file system of their own
 *
 * The kernel lets no fallocate() through to a character device, and QEMU's
 * balloon, free-page reporting and virtio-mem give memory back by it.  So
 *
 *   mount -t umem none /run/umem/areas
 *
 * shows every named area as a file of its name and size, which can be opened,
 * mapped and punched, and no more.  All mounts show the same.
 *
 * Nothing is kept here: a name is looked up among the areas when it is opened, its
 * inode is made then and goes with the last open file, and who has the file open
 * holds a face of the area, as with the node.
 *
 * Locking: that of area.c, which finds the areas.
 *
 * Copyright (C) 2026 The umem authors
 */
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/fs_context.h>
#include <linux/mm.h>
#include <linux/module.h>

#include "umem.h"

/* "umem" */
#define UMEM_FS_MAGIC	0x756d656d

/*
 * The area that an inode was made for, with a reference, or NULL when that is
 * gone.  Its number may be another area's by now, so that alone does not tell: who
 * held on to the inode would get at memory that was never his.
 */
static struct umem_area *umem_inode_area(const struct inode *inode)
{
	struct umem_area *area = umem_area_find(inode->i_ino - UMEM_FIRST_INO);

	if (area && area->serial != (unsigned long)inode->i_private) {
		umem_area_put(area);
		return NULL;
	}
	return area;
}

static int umem_file_open(struct inode *inode, struct file *file)
{
	struct umem_area *area = umem_inode_area(inode);
	struct file *face;

	if (!area)
		return -ENOENT;
	face = umem_face_open(area);
	umem_area_put(area);
	if (IS_ERR(face))
		return PTR_ERR(face);
	file->private_data = face;
	return 0;
}

static int umem_file_release(struct inode *inode, struct file *file)
{
	fput(file->private_data);
	return 0;
}

static int umem_file_mmap(struct file *file, struct vm_area_struct *vma)
{
	return umem_face_mmap(file->private_data, vma, false);
}

static long umem_file_fallocate(struct file *file, int mode, loff_t offset,
				loff_t len)
{
	return umem_face_fallocate(file->private_data, mode, offset, len);
}

static const struct file_operations umem_file_fops = {
	.owner			= THIS_MODULE,
	.open			= umem_file_open,
	.release		= umem_file_release,
	.mmap			= umem_file_mmap,
	.get_unmapped_area	= thp_get_unmapped_area,
	.fallocate		= umem_file_fallocate,
	.fsync			= noop_fsync,
	.llseek			= generic_file_llseek,
};

/* Owner, group and mode are the area's; its size is for ever. */
int umem_file_setattr(umem_idmap_t *idmap, struct dentry *dentry,
		      struct iattr *attr)
{
	struct inode *inode = d_inode(dentry);
	struct umem_area *area;
	int ret;

	ret = umem_setattr_prepare(idmap, dentry, attr);
	if (ret)
		return ret;
	if (attr->ia_valid & ATTR_SIZE && attr->ia_size != i_size_read(inode))
		return -EPERM;

	area = umem_inode_area(inode);
	if (!area)
		return -ENOENT;
	umem_setattr_copy(idmap, inode, attr);
	WRITE_ONCE(area->file_uid, inode->i_uid);
	WRITE_ONCE(area->file_gid, inode->i_gid);
	WRITE_ONCE(area->file_mode, inode->i_mode & 0777);
	umem_area_put(area);
	return 0;
}

static const struct inode_operations umem_file_iops = {
	.setattr	= umem_setattr,
};

static struct inode *umem_new_inode(struct super_block *sb, unsigned long ino,
				    umode_t mode)
{
	struct inode *inode = new_inode(sb);

	if (!inode)
		return NULL;
	inode->i_ino = ino;
	inode->i_mode = mode;
	simple_inode_init_ts(inode);
	return inode;
}

static struct dentry *umem_dir_lookup(struct inode *dir, struct dentry *dentry,
				      unsigned int flags)
{
	struct inode *inode = NULL;
	struct umem_area *area;

	if (dentry->d_name.len >= UMEM_NAME_MAX)
		return ERR_PTR(-ENAMETOOLONG);

	area = umem_area_find_name(dentry->d_name.name, dentry->d_name.len);
	if (area) {
		inode = umem_new_inode(dir->i_sb, area->id + UMEM_FIRST_INO,
				       S_IFREG | READ_ONCE(area->file_mode));
		if (inode) {
			inode->i_uid = READ_ONCE(area->file_uid);
			inode->i_gid = READ_ONCE(area->file_gid);
			inode->i_size = umem_area_size(area);
			inode->i_private = (void *)area->serial;
			inode->i_op = &umem_file_iops;
			inode->i_fop = &umem_file_fops;
		} else {
			inode = ERR_PTR(-ENOMEM);
		}
		umem_area_put(area);
	}
	return d_splice_alias(inode, dentry);
}

static const struct inode_operations umem_dir_iops = {
	.lookup		= umem_dir_lookup,
};

static int umem_dir_iterate(struct file *file, struct dir_context *ctx)
{
	struct umem_area *area;
	bool room = true;
	u32 id;

	if (!dir_emit_dots(file, ctx))
		return 0;
	/* Behind the dots a position is an area's id. */
	while (room && ctx->pos - 2 <= MINORMASK) {
		id = ctx->pos - 2;
		area = umem_area_next(&id);
		if (!area)
			break;
		if (area->name[0])
			room = dir_emit(ctx, area->name, strlen(area->name),
					id + UMEM_FIRST_INO, DT_REG);
		if (room)
			ctx->pos = (loff_t)id + 1 + 2;
		umem_area_put(area);
	}
	return 0;
}

static const struct file_operations umem_dir_fops = {
	.owner		= THIS_MODULE,
	.read		= generic_read_dir,
	.iterate_shared	= umem_dir_iterate,
	.fsync		= noop_fsync,
	.llseek		= generic_file_llseek,
};

static const struct super_operations umem_super_ops = {
	.statfs		= simple_statfs,
};

/* A name is looked up each time: areas come and go. */
static const struct dentry_operations umem_dentry_ops = {
	.d_delete	= always_delete_dentry,
};

static int umem_fill_super(struct super_block *sb, struct fs_context *fc)
{
	struct inode *inode;

	sb->s_blocksize = PAGE_SIZE;
	sb->s_blocksize_bits = PAGE_SHIFT;
	sb->s_maxbytes = MAX_LFS_FILESIZE;
	sb->s_magic = UMEM_FS_MAGIC;
	sb->s_op = &umem_super_ops;
	set_default_d_op(sb, &umem_dentry_ops);

	inode = umem_new_inode(sb, 1, S_IFDIR | 0755);
	if (!inode)
		return -ENOMEM;
	inode->i_op = &umem_dir_iops;
	inode->i_fop = &umem_dir_fops;
	set_nlink(inode, 2);
	sb->s_root = d_make_root(inode);
	return sb->s_root ? 0 : -ENOMEM;
}

static int umem_get_tree(struct fs_context *fc)
{
	return get_tree_single(fc, umem_fill_super);
}

static const struct fs_context_operations umem_context_ops = {
	.get_tree	= umem_get_tree,
};

static int umem_init_fs_context(struct fs_context *fc)
{
	fc->ops = &umem_context_ops;
	return 0;
}

static struct file_system_type umem_fs_type = {
	.owner			= THIS_MODULE,
	.name			= "umem",
	.init_fs_context	= umem_init_fs_context,
	.kill_sb		= kill_anon_super,
};
MODULE_ALIAS_FS("umem");

/**
 * umem_files_init() - offer the file system
 *
 * Return: 0 or a negative error code.
 */
int umem_files_init(void)
{
	return register_filesystem(&umem_fs_type);
}

/**
 * umem_files_exit() - take the file system back; nobody has it mounted
 */
void umem_files_exit(void)
{
	unregister_filesystem(&umem_fs_type);
}

// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * uring NODE PAGE MODE FILE: read the first half page of a file into a page of an area,
 * by io_uring, and say how that ended.
 *
 * MODE: "inline" tries in the submitter first, "worker" goes to a worker thread at
 * once, "sqpoll" has a kernel thread submit, "fixed" pins the page when the buffer is
 * registered.  The last line is "result" and what the read gave, or an error.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define PAGE 4096UL

static void die(const char *what)
{
	printf("%s: %s\n", what, strerror(errno));
	exit(2);
}

int main(int argc, char **argv)
{
	struct io_uring_params params = { 0 };
	struct io_uring_sqe *sqe;
	struct io_uring_cqe *cqe;
	unsigned int *tail;
	struct iovec buffer;
	char *base, *ring;
	int node, file, fd;
	off_t size;

	if (argc != 5)
		return 2;
	setvbuf(stdout, NULL, _IOLBF, 0);
	node = open(argv[1], O_RDWR);
	file = open(argv[4], O_RDONLY);
	if (node < 0 || file < 0)
		die("open");
	size = lseek(node, 0, SEEK_END);
	base = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, node, 0);
	if (base == MAP_FAILED)
		die("mmap");
	buffer = (struct iovec){ base + strtoul(argv[2], NULL, 0) * PAGE, PAGE / 2 };

	if (!strcmp(argv[3], "sqpoll")) {
		params.flags = IORING_SETUP_SQPOLL;
		params.sq_thread_idle = 10000;
	}
	fd = syscall(SYS_io_uring_setup, 4, &params);
	if (fd < 0)
		die("io_uring_setup");
	/* Both rings are in one mapping since Linux 5.4. */
	ring = mmap(NULL, params.sq_off.array + params.sq_entries * 4 +
		    params.cq_off.cqes + params.cq_entries * sizeof(*cqe),
		    PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, IORING_OFF_SQ_RING);
	sqe = mmap(NULL, params.sq_entries * sizeof(*sqe), PROT_READ | PROT_WRITE,
		   MAP_SHARED | MAP_POPULATE, fd, IORING_OFF_SQES);
	if (ring == MAP_FAILED || sqe == MAP_FAILED)
		die("mmap of the rings");

	memset(sqe, 0, sizeof(*sqe));
	sqe->opcode = IORING_OP_READ;
	sqe->fd = file;
	sqe->addr = (uintptr_t)buffer.iov_base;
	sqe->len = buffer.iov_len;
	if (!strcmp(argv[3], "worker"))
		sqe->flags = IOSQE_ASYNC;
	printf("goes\n");
	if (!strcmp(argv[3], "fixed")) {
		if (syscall(SYS_io_uring_register, fd, IORING_REGISTER_BUFFERS, &buffer, 1))
			die("register");
		sqe->opcode = IORING_OP_READ_FIXED;
	}

	((unsigned int *)(ring + params.sq_off.array))[0] = 0;
	tail = (unsigned int *)(ring + params.sq_off.tail);
	__atomic_store_n(tail, *tail + 1, __ATOMIC_RELEASE);
	if (syscall(SYS_io_uring_enter, fd, 1, 1, IORING_ENTER_GETEVENTS |
		    (params.flags & IORING_SETUP_SQPOLL ? IORING_ENTER_SQ_WAKEUP : 0), NULL, 0) < 0)
		die("io_uring_enter");
	/* With a thread that submits, the call does not wait for what it has not seen. */
	tail = (unsigned int *)(ring + params.cq_off.tail);
	while (!__atomic_load_n(tail, __ATOMIC_ACQUIRE))
		usleep(1000);
	cqe = (struct io_uring_cqe *)(ring + params.cq_off.cqes);
	printf("result %d\n", cqe->res);
	return 0;
}

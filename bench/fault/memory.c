// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * memory.c - memory GIB COUNT: kernel memory of an area of GIB, taken over COUNT
 * of them
 *
 * Two views of it: what the kernel as a whole has in slabs, vmalloc() and per-CPU
 * memory, where the node, its files in sysfs and inodes are too; and what the
 * areas are charged to the memory cgroup of this process, where there is one.
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include "bench.h"

#define CGROUP "/run/umem-bench-cgroup"

static void put(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);

	if (fd < 0 || write(fd, text, strlen(text)) < 0)
		die(path);
	close(fd);
}

/* The sum of lines "KEY NUMBER" whose key is one of those in @keys, between blanks. */
static long sum_of(const char *path, const char *keys)
{
	char key[64], wanted[68];
	long value, sum = 0;
	FILE *file = fopen(path, "r");

	if (!file)
		die(path);
	while (fscanf(file, "%60s %ld%*[^\n]", key, &value) == 2) {
		snprintf(wanted, sizeof(wanted), " %s ", key);
		if (strstr(keys, wanted))
			sum += value;
	}
	fclose(file);
	return sum;
}

static double kernel_kib(void)
{
	return sum_of("/proc/meminfo", " Slab: VmallocUsed: Percpu: KernelStack: ");
}

static double charged_kib(void)
{
	return sum_of(CGROUP "/bench/memory.stat", " kernel ") / 1024.0;
}

static void enter_cgroup(void)
{
	char pid[16];

	mkdir(CGROUP, 0755);
	if (access(CGROUP "/cgroup.procs", F_OK) &&
	    mount("bench", CGROUP, "cgroup2", 0, NULL))
		die("mount cgroup2");
	put(CGROUP "/cgroup.subtree_control", "+memory");
	mkdir(CGROUP "/bench", 0755);
	snprintf(pid, sizeof(pid), "%d", getpid());
	put(CGROUP "/bench/cgroup.procs", pid);
}

void measure_memory(int argc, char **argv)
{
	double kernel, charged;
	unsigned long gib, nr, i;

	if (argc != 2)
		exit(2);
	gib = strtoul(argv[0], NULL, 0);
	nr = strtoul(argv[1], NULL, 0);
	enter_cgroup();
	/* What is made once and for all is made now. */
	umem_create_area(gib * 1024 * MIB / PAGE);
	kernel = kernel_kib();
	charged = charged_kib();
	for (i = 0; i < nr; i++)
		umem_create_area(gib * 1024 * MIB / PAGE);
	printf("\"gib\":%lu,\"areas\":%lu,\"kernel_kib\":%.1f,\"charged_kib\":%.1f", gib, nr,
	       (kernel_kib() - kernel) / nr, (charged_kib() - charged) / nr);
}

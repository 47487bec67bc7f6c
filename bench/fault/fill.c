// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * fill.c - fill CONTENDER RUN_KIB MIB: pages per second into a fresh area that
 * nobody waits for, in runs of so many KiB
 *
 * The bytes of every contender come by memcpy from the same 2 MiB, to where its
 * interface lets them be received.  "warm" is that memcpy into memory that is there
 * already.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench.h"

void measure_fill(int argc, char **argv)
{
	const struct contender *who;
	unsigned long npages, run, pgoff;
	int pass, passes = 1;
	uint64_t start, ns = 0;

	if (argc != 3)
		exit(2);
	if (!strcmp(argv[0], "warm"))
		passes = 2;
	who = contender(passes == 2 ? "plain" : argv[0]);
	run = strtoul(argv[1], NULL, 0) * 1024 / PAGE;
	npages = strtoul(argv[2], NULL, 0) * MIB / PAGE;
	source();
	who->open(npages);
	for (pass = 0; pass < passes; pass++) {
		start = now_ns();
		for (pgoff = 0; pgoff < npages; pgoff += run)
			who->fill(pgoff, run);
		ns = now_ns() - start;
	}
	printf("\"contender\":\"%s\",\"run_kib\":%s,\"mib\":%s,\"pages_per_s\":%.0f", argv[0],
	       argv[1], argv[2], npages * 1e9 / ns);
}

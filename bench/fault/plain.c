// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * plain.c - the floor: shared memory that nobody serves
 */
#include <string.h>

#include "bench.h"

static volatile unsigned char *view;

static volatile uint64_t *plain_open(unsigned long npages)
{
	view = map_shared(plain_file(npages), npages);
	return (volatile uint64_t *)view;
}

static void plain_fill(unsigned long pgoff, unsigned long count)
{
	memcpy((unsigned char *)view + pgoff * PAGE, source(), count * PAGE);
}

/* The cost of a new page and of a copy: no filler gets below that. */
const struct contender plain = {
	.name	= "plain",
	.open	= plain_open,
	.fill	= plain_fill,
};

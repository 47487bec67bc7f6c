// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * main.c - MEASUREMENT ARGUMENTS...: runs one and prints a line of JSON
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "bench.h"

static const struct contender *const contenders[] = {
	&uffd_copy, &uffd_bare, &uffd_continue,
	&umem, &umem_touch, &umem_place, &umem_huge, &plain,
};

static const struct {
	const char *name;
	void (*run)(int argc, char **argv);
} measurements[] = {
	{ "faults", measure_faults },
	{ "fill", measure_fill },
	{ "complete", measure_complete },
	{ "memory", measure_memory },
	{ "pingpong", measure_pingpong },
};

const struct contender *contender(const char *name)
{
	for (size_t i = 0; i < sizeof(contenders) / sizeof(*contenders); i++)
		if (!strcmp(contenders[i]->name, name))
			return contenders[i];
	fprintf(stderr, "no contender %s\n", name);
	exit(2);
}

int main(int argc, char **argv)
{
	for (size_t i = 0; argc > 1 && i < sizeof(measurements) / sizeof(*measurements); i++) {
		if (strcmp(argv[1], measurements[i].name))
			continue;
		printf("{\"what\":\"%s\",", argv[1]);
		measurements[i].run(argc - 2, argv + 2);
		printf("}\n");
		fflush(stdout);
		/* Without waiting for a handler that never ends. */
		_exit(0);
	}
	fprintf(stderr, "usage: %s faults|fill|complete|memory|pingpong ARGUMENTS...\n", argv[0]);
	return 2;
}

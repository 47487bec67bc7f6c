// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * pingpong.c - pingpong ROUNDS: a byte through a pipe to another thread and one back
 *
 * The least that one task pays for waiting for another's answer.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "bench.h"

static int there[2], back[2];

static void *answerer(void *arg)
{
	char byte;

	while (read(there[0], &byte, 1) == 1)
		if (write(back[1], &byte, 1) != 1)
			die("write");
	return arg;
}

void measure_pingpong(int argc, char **argv)
{
	unsigned long rounds, i;
	pthread_t thread;
	uint64_t start;
	char byte = 0;

	if (argc != 1)
		exit(2);
	rounds = strtoul(argv[0], NULL, 0);
	if (pipe(there) || pipe(back) || pthread_create(&thread, NULL, answerer, NULL))
		die("pingpong");
	start = now_ns();
	for (i = 0; i < rounds; i++)
		if (write(there[1], &byte, 1) != 1 || read(back[0], &byte, 1) != 1)
			die("pingpong");
	printf("\"rounds\":%lu,\"us_per_round\":%.3f", rounds, (now_ns() - start) / 1e3 / rounds);
}

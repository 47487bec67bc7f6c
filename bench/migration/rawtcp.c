// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * What a link can do: the limit that page lanes are held against.
 *
 *	rawtcp serve ADDRESS PORT
 *	rawtcp ask ADDRESS PORT REQUESTS STREAM_MIB
 *
 * serve answers each request of 16 bytes by 4 KiB, or, asked for 'S', by a stream.
 * ask prints one line of JSON: latency percentiles of requests one at a time, and
 * the speed of one stream.
 */
#include <arpa/inet.h>
#include <err.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define PAGE	4096
#define CHUNK	(256 * 1024)
#define MIB	(1024UL * 1024)

struct request {
	uint64_t what;
	uint64_t mib;
};

static char buffer[CHUNK];

static double now_us(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * 1e6 + ts.tv_nsec / 1e3;
}

/* Returns 0 when the peer has closed. */
static int receive(int fd, void *to, size_t size)
{
	for (size_t have = 0; have < size; ) {
		ssize_t n = recv(fd, (char *)to + have, size - have, 0);

		if (n < 0)
			err(1, "recv");
		if (n == 0)
			return 0;
		have += n;
	}
	return 1;
}

static void transmit(int fd, const void *from, size_t size)
{
	for (size_t done = 0; done < size; ) {
		ssize_t n = send(fd, (const char *)from + done, size - done, MSG_NOSIGNAL);

		if (n < 0)
			err(1, "send");
		done += n;
	}
}

static void answer(int fd)
{
	struct request request;

	while (receive(fd, &request, sizeof(request))) {
		if (request.what != 'S') {
			transmit(fd, buffer, PAGE);
			continue;
		}
		for (uint64_t done = 0; done < request.mib * MIB; done += CHUNK)
			transmit(fd, buffer, CHUNK);
	}
	close(fd);
}

static int compare(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return x < y ? -1 : x > y;
}

static void ask(int fd, int nr, uint64_t mib)
{
	struct request page = { .what = 'P' }, stream = { .what = 'S', .mib = mib };
	double *took = calloc(nr, sizeof(*took)), began;

	if (!took)
		err(1, "memory");
	for (int i = -nr / 10; i < nr; i++) {
		began = now_us();
		transmit(fd, &page, sizeof(page));
		if (!receive(fd, buffer, PAGE))
			errx(1, "the peer has gone");
		if (i >= 0)
			took[i] = now_us() - began;
	}
	qsort(took, nr, sizeof(*took), compare);
	began = now_us();
	transmit(fd, &stream, sizeof(stream));
	for (uint64_t done = 0; done < mib * MIB; done += CHUNK)
		if (!receive(fd, buffer, CHUNK))
			errx(1, "the peer has gone");
	printf("{\"request_p50_us\": %.1f, \"request_p99_us\": %.1f, \"stream_mib_s\": %.2f}\n",
	       took[nr / 2], took[nr * 99 / 100], mib * 1e6 / (now_us() - began));
	free(took);
}

int main(int argc, char **argv)
{
	struct sockaddr_in to = { .sin_family = AF_INET };
	int fd = socket(AF_INET, SOCK_STREAM, 0), on = 1, nr;

	if (argc < 4 || fd < 0)
		errx(2, "usage: serve ADDRESS PORT | ask ADDRESS PORT REQUESTS STREAM_MIB");
	to.sin_port = htons(atoi(argv[3]));
	if (inet_pton(AF_INET, argv[2], &to.sin_addr) != 1)
		errx(2, "%s is no address", argv[2]);
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
	if (!strcmp(argv[1], "serve")) {
		if (bind(fd, (struct sockaddr *)&to, sizeof(to)) || listen(fd, 1))
			err(1, "listen");
		puts("ready");
		fflush(stdout);
		fd = accept(fd, NULL, NULL);
		if (fd < 0)
			err(1, "accept");
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
		answer(fd);
		return 0;
	}
	nr = argc == 6 ? atoi(argv[4]) : 0;
	if (nr < 10 || atoi(argv[5]) < 1)
		errx(2, "at least 10 requests, and a MiB");
	if (connect(fd, (struct sockaddr *)&to, sizeof(to)))
		err(1, "connect");
	ask(fd, nr, atoi(argv[5]));
	return 0;
}

// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * agent: a process that does what a test tells it, one line at a time.
 *
 * A test needs consumers that sleep in a page fault while it goes on, and
 * that are killed, forked and signalled there.  Python cannot be such a
 * consumer, as it holds its interpreter lock during the fault.
 *
 * In, on stdin:   SEQ SLOT COMMAND ARGUMENT...
 * Out, on stdout: SEQ ok [VALUE...]  |  SEQ err ERRNO  |  SEQ sig SIGNO
 *
 * Each slot is a thread of its own and does its commands in order.  The main
 * thread only reads and hands out.  SIGBUS and SIGSEGV of a command end that
 * command, not the agent.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define NR_SLOTS 64
#define NR_ARGS 8

struct command {
	struct command *next;
	unsigned long seq;
	char *text;
};

struct slot {
	pthread_t thread;
	int started;
	pthread_mutex_t lock;
	pthread_cond_t more;
	struct command *head, **tail;
};

static struct slot slots[NR_SLOTS];
static __thread sigjmp_buf escape;
static __thread volatile int armed;
static volatile unsigned long nr_signals;

static const struct {
	const char *name;
	long nr;
} syscalls[] = {
	{ "open", SYS_open },
	{ "close", SYS_close },
	{ "mmap", SYS_mmap },
	{ "munmap", SYS_munmap },
	{ "mremap", SYS_mremap },
	{ "mprotect", SYS_mprotect },
	{ "madvise", SYS_madvise },
	{ "read", SYS_read },
	{ "write", SYS_write },
	{ "pread", SYS_pread64 },
	{ "pwrite", SYS_pwrite64 },
	{ "pipe", SYS_pipe },
	{ "futex", SYS_futex },
	{ "ioctl", SYS_ioctl },
	{ "fallocate", SYS_fallocate },
	{ "process_vm_readv", SYS_process_vm_readv },
	{ "process_vm_writev", SYS_process_vm_writev },
	{ "gettid", SYS_gettid },
	{ "getuid", SYS_getuid },
	{ "setuid", SYS_setuid },
	{ "mlock", SYS_mlock },
	{ "mbind", SYS_mbind },
	{ "msync", SYS_msync },
	{ "kill", SYS_kill },
	{ "vmsplice", SYS_vmsplice },
	{ "ptrace", SYS_ptrace },
	{ "mincore", SYS_mincore },
};

static void on_fault(int sig)
{
	if (armed)
		siglongjmp(escape, sig);
	signal(sig, SIG_DFL);
	raise(sig);
}

static void on_signal(int sig)
{
	(void)sig;
	__atomic_add_fetch(&nr_signals, 1, __ATOMIC_SEQ_CST);
}

/* One write, so that lines of two threads never mix. */
static void answer(const char *line, int len)
{
	while (len > 0) {
		ssize_t n = write(1, line, len);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			_exit(3);
		line += n;
		len -= n;
	}
}

static volatile uint64_t *word(uint64_t addr)
{
	return (volatile uint64_t *)(uintptr_t)addr;
}

/* Fork, read a word in the child, and pass it back through a pipe. */
static int fork_peek(uint64_t addr, uint64_t *value)
{
	struct { uint64_t value; int sig; } got = { 0, -1 };
	int ends[2], status;
	pid_t pid;

	if (pipe(ends))
		return -1;
	pid = fork();
	if (pid < 0)
		return -1;
	if (!pid) {
		got.sig = sigsetjmp(escape, 1);
		armed = 1;
		if (!got.sig)
			got.value = *word(addr);
		armed = 0;
		_exit(write(ends[1], &got, sizeof(got)) != sizeof(got));
	}
	close(ends[1]);
	while (read(ends[0], &got, sizeof(got)) < 0 && errno == EINTR)
		;
	close(ends[0]);
	while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
		;
	*value = got.value;
	return got.sig;
}

/* Fork a child that exits with 0 if the word is as expected, else with 1. */
static pid_t fork_expect(uint64_t addr, uint64_t expected)
{
	pid_t pid = fork();

	if (!pid) {
		signal(SIGBUS, SIG_DFL);
		signal(SIGSEGV, SIG_DFL);
		_exit(*word(addr) != expected);
	}
	return pid;
}

static int run(char *text, char *out, size_t room)
{
	char *save = NULL, *name = strtok_r(text, " ", &save), *arg;
	uint64_t a[NR_ARGS] = { 0 };
	char *first = NULL;
	int n = 0, sig;
	long ret = 0;

	if (!name)
		return -1;
	if (!strcmp(name, "str")) {
		ret = (long)strdup(save);
		return snprintf(out, room, "ok %ld", ret);
	}
	while (n < NR_ARGS && (arg = strtok_r(NULL, " ", &save))) {
		if (!first)
			first = arg;
		a[n++] = strtoull(arg, NULL, 0);
	}

	errno = 0;
	if (!strcmp(name, "sys")) {
		for (size_t i = 0; i < sizeof(syscalls) / sizeof(*syscalls); i++) {
			if (strcmp(first, syscalls[i].name))
				continue;
			ret = syscall(syscalls[i].nr, a[1], a[2], a[3], a[4], a[5], a[6]);
			if (ret == -1 && errno)
				return snprintf(out, room, "err %d", errno);
			return snprintf(out, room, "ok %ld", ret);
		}
		return -1;
	}
	if (!strcmp(name, "alloc")) {
		void *p = NULL;

		if (posix_memalign(&p, 4096, a[0]))
			return snprintf(out, room, "err %d", ENOMEM);
		memset(p, 0, a[0]);
		return snprintf(out, room, "ok %ld", (long)p);
	}
	if (!strcmp(name, "forkpeek")) {
		uint64_t value = 0;

		sig = fork_peek(a[0], &value);
		return sig ? snprintf(out, room, "sig %d", sig) :
			     snprintf(out, room, "ok %lu", value);
	}
	if (!strcmp(name, "forkexpect"))
		return snprintf(out, room, "ok %d", fork_expect(a[0], a[1]));
	if (!strcmp(name, "forkhold")) {
		/* A child that has what we have mapped, until it is killed. */
		pid_t pid = fork();

		while (!pid)
			pause();
		return snprintf(out, room, "ok %d", pid);
	}
	if (!strcmp(name, "waitpid")) {
		int status;

		while ((ret = waitpid(a[0], &status, 0)) < 0 && errno == EINTR)
			;
		return ret < 0 ? snprintf(out, room, "err %d", errno) :
				 snprintf(out, room, "ok %d", status);
	}
	if (!strcmp(name, "signals"))
		return snprintf(out, room, "ok %lu", nr_signals);
	if (!strcmp(name, "tkill"))
		return snprintf(out, room, "ok %d", pthread_kill(slots[a[0]].thread, a[1]));
	if (!strcmp(name, "storm")) {
		/* signal a[1] to slot a[0] every a[2] microseconds, a[3] times */
		struct timespec gap = { 0, a[2] * 1000 };

		for (uint64_t i = 0; i < a[3]; i++) {
			pthread_kill(slots[a[0]].thread, a[1]);
			nanosleep(&gap, NULL);
		}
		return snprintf(out, room, "ok %lu", a[3]);
	}
	if (!strcmp(name, "cpu")) {
		struct timespec used;
		clockid_t clock;

		if (pthread_getcpuclockid(slots[a[0]].thread, &clock) ||
		    clock_gettime(clock, &used))
			return snprintf(out, room, "err %d", errno);
		return snprintf(out, room, "ok %lu", used.tv_sec * 1000000000UL + used.tv_nsec);
	}

	/* What follows touches memory and may be answered by a signal. */
	sig = sigsetjmp(escape, 1);
	if (sig) {
		armed = 0;
		return snprintf(out, room, "sig %d", sig);
	}
	armed = 1;
	if (!strcmp(name, "peek")) {
		uint64_t value = *word(a[0]);

		n = snprintf(out, room, "ok %lu", value);
	} else if (!strcmp(name, "poke")) {
		*word(a[0]) = a[1];
		n = snprintf(out, room, "ok");
	} else if (!strcmp(name, "add")) {
		uint64_t value = __atomic_add_fetch(word(a[0]), a[1], __ATOMIC_SEQ_CST);

		n = snprintf(out, room, "ok %lu", value);
	} else if (!strcmp(name, "words")) {
		/* a[1] words from a[0] on, a[2] bytes apart */
		n = snprintf(out, room, "ok");
		for (uint64_t i = 0; i < a[1] && n < (int)room - 24; i++)
			n += snprintf(out + n, room - n, " %lu", *word(a[0] + i * a[2]));
	} else if (!strcmp(name, "same")) {
		/* a[1] words from a[0] on: are all of them a[2]? the first that is not, else a[1] */
		uint64_t i = 0;

		while (i < a[1] && *word(a[0] + 8 * i) == a[2])
			i++;
		n = snprintf(out, room, "ok %lu", i);
	} else if (!strcmp(name, "fill")) {
		for (uint64_t i = 0; i < a[1]; i++)
			*word(a[0] + 8 * i) = a[2];
		n = snprintf(out, room, "ok");
	} else {
		n = -1;
	}
	armed = 0;
	return n;
}

static void *slot_main(void *arg)
{
	struct slot *slot = arg;
	const size_t room = 128 * 1024;
	char *out = malloc(room), *body = malloc(room);

	for (;;) {
		struct command *command;
		int n;

		pthread_mutex_lock(&slot->lock);
		while (!slot->head)
			pthread_cond_wait(&slot->more, &slot->lock);
		command = slot->head;
		slot->head = command->next;
		if (!slot->head)
			slot->tail = &slot->head;
		pthread_mutex_unlock(&slot->lock);

		n = run(command->text, body, room - 32);
		if (n < 0) {
			fprintf(stderr, "agent: not understood: %s\n", command->text);
			_exit(2);
		}
		n = snprintf(out, room, "%lu %s\n", command->seq, body);
		answer(out, n);
		free(command->text);
		free(command);
	}
	return NULL;
}

static void hand_out(unsigned int nr, unsigned long seq, const char *text)
{
	struct command *command = calloc(1, sizeof(*command));
	struct slot *slot = &slots[nr];

	command->seq = seq;
	command->text = strdup(text);
	if (!slot->started) {
		slot->tail = &slot->head;
		pthread_mutex_init(&slot->lock, NULL);
		pthread_cond_init(&slot->more, NULL);
		slot->started = 1;
		if (pthread_create(&slot->thread, NULL, slot_main, slot))
			_exit(4);
	}
	pthread_mutex_lock(&slot->lock);
	*slot->tail = command;
	slot->tail = &command->next;
	pthread_cond_signal(&slot->more);
	pthread_mutex_unlock(&slot->lock);
}

int main(void)
{
	struct sigaction fault = { .sa_handler = on_fault, .sa_flags = SA_NODEFER };
	struct sigaction plain = { .sa_handler = on_signal, .sa_flags = SA_RESTART };
	char *line = NULL;
	size_t size = 0;
	ssize_t len;

	sigaction(SIGBUS, &fault, NULL);
	sigaction(SIGSEGV, &fault, NULL);
	sigaction(SIGUSR1, &plain, NULL);
	while ((len = getline(&line, &size, stdin)) > 0) {
		unsigned long seq;
		unsigned int nr;
		int at;

		if (line[len - 1] == '\n')
			line[len - 1] = 0;
		if (sscanf(line, "%lu %u %n", &seq, &nr, &at) != 2 || nr >= NR_SLOTS) {
			fprintf(stderr, "agent: bad line: %s\n", line);
			_exit(2);
		}
		hand_out(nr, seq, line + at);
	}
	_exit(0);
}

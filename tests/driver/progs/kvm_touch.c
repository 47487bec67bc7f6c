// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * kvm_touch NODE NPAGES irqchip|plain [write]: a virtual machine of a few instructions
 * whose memory is an area.  Its processor, in real mode, reads the first word of
 * one page after the other and writes it to an I/O port; each is checked here
 * and told on stdout.
 *
 * With an interrupt controller in the kernel and interrupts enabled, KVM does not
 * wait for a missing page itself: it asks with FAULT_FLAG_RETRY_NOWAIT, halts the
 * processor, and has a kernel thread wait.  Without one the processor's thread
 * waits in the fault.
 *
 * With "write" it writes, to the pages whose numbers come on stdin, a value with each; it
 * says so when it has done that.
 */
#include <fcntl.h>
#include <linux/kvm.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096UL
#define CODE 0x1000
#define AREA 0x20000
#define MOST 128	/* pages, up to the end of what real mode reaches easily */

static const uint8_t code[] = {
	0xFB,				/* sti */
	0xBB, AREA >> 4 & 0xFF, AREA >> 12,	/* mov bx, AREA >> 4 */
	0x8E, 0xDB,			/* next: mov ds, bx */
	0x66, 0xA1, 0x00, 0x00,		/* mov eax, [0] */
	0x66, 0xE7, 0x10,		/* out 0x10, eax */
	0x81, 0xC3, 0x00, 0x01,		/* add bx, PAGE >> 4 */
	0xEB, 0xF1,			/* jmp next */
};

static const uint8_t writing_code[] = {
	0xFB,				/* sti */
	0x66, 0xE5, 0x10,		/* next: in eax, 0x10 */
	0x8E, 0xD8,			/* mov ds, ax */
	0x66, 0xA3, 0x00, 0x00,		/* mov [0], eax */
	0xEB, 0xF5,			/* jmp next */
};

static int call(int fd, unsigned long number, void *arg, const char *what)
{
	int ret = ioctl(fd, number, arg);

	if (ret < 0) {
		perror(what);
		exit(2);
	}
	return ret;
}

static unsigned long page;

/* What QEMU makes a machine check of. */
static void on_bus_error(int sig, siginfo_t *info, void *context)
{
	(void)sig, (void)context;
	dprintf(1, "%lu %s\n", page,
		info->si_code == BUS_MCEERR_AR ? "poisoned" : "bus error");
	_exit(0);
}

static void run_to_port(int cpu, const struct kvm_run *run, int direction)
{
	call(cpu, KVM_RUN, NULL, "KVM_RUN");
	if (run->exit_reason != KVM_EXIT_IO || run->io.direction != direction) {
		fprintf(stderr, "exit reason %u\n", run->exit_reason);
		exit(2);
	}
}

/* Its data segment is in the lower half of what it writes, the value in the upper one. */
static int write_pages(int cpu, struct kvm_run *run, unsigned long npages)
{
	unsigned long value;

	run_to_port(cpu, run, KVM_EXIT_IO_IN);
	printf("running\n");
	while (scanf("%lu %lu", &page, &value) == 2 && page < npages) {
		uint32_t word = value << 16 | (AREA + page * PAGE) >> 4;

		memcpy((char *)run + run->io.data_offset, &word, 4);
		run_to_port(cpu, run, KVM_EXIT_IO_IN);
		printf("%lu written\n", page);
	}
	return 0;
}

int main(int argc, char **argv)
{
	struct sigaction bus_error = { .sa_sigaction = on_bus_error, .sa_flags = SA_SIGINFO };
	struct kvm_userspace_memory_region region = { 0 };
	struct kvm_sregs sregs;
	struct kvm_regs regs = { .rip = CODE, .rflags = 2 };
	unsigned long npages;
	int node, kvm, vm, cpu, bad = 0;
	struct kvm_run *run;
	void *low, *area;

	bool writes = argc == 5 && !strcmp(argv[4], "write");

	if (argc != 4 && !writes)
		return 2;
	npages = strtoul(argv[2], NULL, 0);
	if (npages > MOST)
		return 2;
	node = open(argv[1], O_RDWR);
	area = mmap(NULL, npages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, node, 0);
	low = mmap(NULL, AREA, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	kvm = open("/dev/kvm", O_RDWR);
	if (node < 0 || area == MAP_FAILED || low == MAP_FAILED || kvm < 0) {
		perror("setup");
		return 2;
	}
	if (writes)
		memcpy((char *)low + CODE, writing_code, sizeof(writing_code));
	else
		memcpy((char *)low + CODE, code, sizeof(code));

	vm = call(kvm, KVM_CREATE_VM, NULL, "KVM_CREATE_VM");
	if (!strcmp(argv[3], "irqchip"))
		call(vm, KVM_CREATE_IRQCHIP, NULL, "KVM_CREATE_IRQCHIP");
	region.memory_size = AREA;
	region.userspace_addr = (uintptr_t)low;
	call(vm, KVM_SET_USER_MEMORY_REGION, &region, "low memory");
	region.slot = 1;
	region.guest_phys_addr = AREA;
	region.memory_size = npages * PAGE;
	region.userspace_addr = (uintptr_t)area;
	call(vm, KVM_SET_USER_MEMORY_REGION, &region, "area");

	cpu = call(vm, KVM_CREATE_VCPU, NULL, "KVM_CREATE_VCPU");
	run = mmap(NULL, call(kvm, KVM_GET_VCPU_MMAP_SIZE, NULL, "size"),
		   PROT_READ | PROT_WRITE, MAP_SHARED, cpu, 0);
	if (run == MAP_FAILED)
		return 2;
	call(cpu, KVM_GET_SREGS, &sregs, "KVM_GET_SREGS");
	sregs.cs.base = 0;
	sregs.cs.selector = 0;
	call(cpu, KVM_SET_SREGS, &sregs, "KVM_SET_SREGS");
	call(cpu, KVM_SET_REGS, &regs, "KVM_SET_REGS");

	sigaction(SIGBUS, &bus_error, NULL);
	setvbuf(stdout, NULL, _IOLBF, 0);
	if (writes)
		return write_pages(cpu, run, npages);
	printf("running\n");
	for (page = 0; page < npages; page++) {
		uint32_t got, expected = (page + 1) * 0x9E3779B97F4A7C15UL;

		run_to_port(cpu, run, KVM_EXIT_IO_OUT);
		memcpy(&got, (char *)run + run->io.data_offset, 4);
		printf("%lu %s\n", page, got == expected ? "good" : "bad");
		bad |= got != expected;
	}
	return bad;
}

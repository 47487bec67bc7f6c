// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * vhost NODE PAGE [RINGS]: have the kernel's vhost-net send a frame that lies in a page of an
 * area, so that its thread, and not one of ours, touches the page.
 *
 * Says "goes" when the frame is in the queue, then the frame as it came out of the tap
 * device, in hexadecimal.
 *
 * With RINGS the queue lies in the area too, in the four pages from that one on, of which
 * the kernel alone writes the second; for each line on stdin the frame goes again.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/if_tun.h>
#include <linux/vhost.h>
#include <linux/virtio_ring.h>
#include <net/if.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#define PAGE 4096UL
#define TX 1
#define ENTRIES 4
#define HEADER 10	/* struct virtio_net_hdr */
#define FRAME 60

static void die(const char *what)
{
	printf("%s: %s\n", what, strerror(errno));
	exit(2);
}

static int open_tap(int *index)
{
	struct ifreq ifr = { .ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR };
	int tap = open("/dev/net/tun", O_RDWR | O_NONBLOCK);
	int any = socket(AF_INET, SOCK_DGRAM, 0);

	strcpy(ifr.ifr_name, "umemtap%d");
	if (tap < 0 || ioctl(tap, TUNSETIFF, &ifr))
		die("tap");
	ifr.ifr_flags = IFF_UP;
	if (ioctl(any, SIOCSIFFLAGS, &ifr) || ioctl(any, SIOCGIFINDEX, &ifr))
		die("tap up");
	*index = ifr.ifr_ifindex;
	close(any);
	return tap;
}

static void show_frame(int raw)
{
	unsigned char frame[2048];
	struct pollfd poller;
	ssize_t len;

	for (;;) {
		poller = (struct pollfd){ raw, POLLIN, 0 };
		if (poll(&poller, 1, -1) != 1)
			die("poll");
		len = recv(raw, frame, sizeof(frame), 0);
		/* The kernel has something to say on a new network, too. */
		if (len == FRAME)
			break;
	}
	for (len = 0; len < FRAME; len++)
		printf("%02x", frame[len]);
	printf("\n");
}

/* Put the frame into the queue once more. */
static void send_frame(struct vring *vring, int kick)
{
	uint16_t next = vring->avail->idx;

	vring->avail->ring[next % ENTRIES] = 0;
	__atomic_store_n(&vring->avail->idx, next + 1, __ATOMIC_RELEASE);
	if (eventfd_write(kick, 1))
		die("kick");
}

int main(int argc, char **argv)
{
	struct vhost_vring_file file = { .index = TX };
	struct vhost_vring_state state = { .index = TX };
	struct vhost_memory *memory = calloc(1, sizeof(*memory) + 2 * sizeof(*memory->regions));
	struct sockaddr_ll address = { .sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_ALL) };
	struct vhost_vring_addr addr = { .index = TX };
	struct vring vring;
	char *base, *rings, line[8];
	uint64_t features = 0;
	int node, vhost, tap, raw, kick;
	off_t size;

	if (argc != 3 && argc != 4)
		return 2;
	setvbuf(stdout, NULL, _IOLBF, 0);
	node = open(argv[1], O_RDWR);
	size = lseek(node, 0, SEEK_END);
	base = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, node, 0);
	if (argc > 3)
		rings = base + strtoul(argv[3], NULL, 0) * PAGE;
	else
		rings = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE,
			     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (node < 0 || base == MAP_FAILED || rings == MAP_FAILED)
		die(argv[1]);

	tap = open_tap(&address.sll_ifindex);
	raw = socket(AF_PACKET, SOCK_RAW, htons(ETH_P_ALL));
	if (raw < 0 || bind(raw, (struct sockaddr *)&address, sizeof(address)))
		die("packet socket");

	vhost = open("/dev/vhost-net", O_RDWR);
	kick = eventfd(0, 0);
	if (vhost < 0 || kick < 0 || ioctl(vhost, VHOST_SET_OWNER) ||
	    ioctl(vhost, VHOST_SET_FEATURES, &features))
		die("vhost");
	/* The guest's addresses are ours. */
	memory->nregions = argc > 3 ? 1 : 2;
	memory->regions[0].guest_phys_addr = memory->regions[0].userspace_addr = (uintptr_t)base;
	memory->regions[0].memory_size = size;
	memory->regions[1].guest_phys_addr = memory->regions[1].userspace_addr = (uintptr_t)rings;
	memory->regions[1].memory_size = 4 * PAGE;
	if (ioctl(vhost, VHOST_SET_MEM_TABLE, memory))
		die("memory table");

	memset(rings, 0, 4 * PAGE);
	vring_init(&vring, ENTRIES, rings, PAGE);
	state.num = ENTRIES;
	addr.desc_user_addr = (uintptr_t)vring.desc;
	addr.avail_user_addr = (uintptr_t)vring.avail;
	addr.used_user_addr = (uintptr_t)vring.used;
	if (ioctl(vhost, VHOST_SET_VRING_NUM, &state) || ioctl(vhost, VHOST_SET_VRING_ADDR, &addr))
		die("ring");
	state.num = 0;
	if (ioctl(vhost, VHOST_SET_VRING_BASE, &state))
		die("ring base");
	file.fd = kick;
	if (ioctl(vhost, VHOST_SET_VRING_KICK, &file))
		die("kick");
	file.fd = tap;
	if (ioctl(vhost, VHOST_NET_SET_BACKEND, &file))
		die("backend");

	/* The header lies in ordinary memory, and says nothing; the frame in the area. */
	vring.desc[0].addr = (uintptr_t)rings + 3 * PAGE;
	vring.desc[0].len = HEADER;
	vring.desc[0].flags = VRING_DESC_F_NEXT;
	vring.desc[0].next = 1;
	vring.desc[1].addr = (uintptr_t)base + strtoul(argv[2], NULL, 0) * PAGE;
	vring.desc[1].len = FRAME;
	send_frame(&vring, kick);
	printf("goes\n");

	show_frame(raw);
	while (argc > 3 && fgets(line, sizeof(line), stdin)) {
		send_frame(&vring, kick);
		show_frame(raw);
	}
	return 0;
}

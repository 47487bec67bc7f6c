// SPDX-License-Identifier: GPL-2.0-only
/*
 * stats.c - what has happened in an area: counters, sysfs, tracepoints
 *
 * Locking: none.  Each CPU counts for itself; who reads adds up what is there at
 * the time.
 *
 * Copyright (C) 2026 The umem authors
 */
#include <linux/device.h>
#include <linux/log2.h>
#include <linux/sched/signal.h>

#include "umem.h"

#define CREATE_TRACE_POINTS
#include "trace.h"

/**
 * umem_stats_sleep() - count a sleep that is over
 * @area: the area
 * @index: the granule that it was for
 * @ns: how long it was
 */
void umem_stats_sleep(struct umem_area *area, unsigned long index, u64 ns)
{
	bool cached = umem_is_cached(area, index);
	u64 us = ns / NSEC_PER_USEC;
	int bucket = us ? min_t(int, ilog2(us), UMEM_LATENCY_BUCKETS - 1) : 0;

	trace_umem_wake(area, index, ns, cached);
	this_cpu_add(area->counts->blocked_ns, ns);
	if (cached)
		this_cpu_inc(area->counts->latency[bucket]);
	else if (fatal_signal_pending(current))
		this_cpu_inc(area->counts->nr_killed);
}

/**
 * umem_stats_read() - add up the counters
 * @area: the area
 * @stats: filled in
 */
void umem_stats_read(struct umem_area *area, struct umem_stats *stats)
{
	int cpu, i;

	memset(stats, 0, sizeof(*stats));
	for_each_possible_cpu(cpu) {
		const struct umem_counts *counts = per_cpu_ptr(area->counts, cpu);

		stats->nr_minor += READ_ONCE(counts->nr_minor);
		stats->nr_major += READ_ONCE(counts->nr_major);
		stats->nr_async += READ_ONCE(counts->nr_async);
		stats->nr_duplicate += READ_ONCE(counts->nr_duplicate);
		stats->nr_killed += READ_ONCE(counts->nr_killed);
		stats->nr_lost += READ_ONCE(counts->nr_lost);
		stats->nr_poison_hits += READ_ONCE(counts->nr_poison_hits);
		stats->nr_requested += READ_ONCE(counts->nr_requested);
		stats->nr_discarded += READ_ONCE(counts->nr_discarded);
		stats->nr_touched += READ_ONCE(counts->nr_touched);
		stats->nr_logged += READ_ONCE(counts->nr_logged);
		stats->blocked_ns += READ_ONCE(counts->blocked_ns);
		for (i = 0; i < UMEM_LATENCY_BUCKETS; i++)
			stats->latency[i] += READ_ONCE(counts->latency[i]);
	}
	stats->nr_delivered = atomic_long_read(&area->nr_delivered);
	stats->nr_cached = atomic_long_read(&area->nr_cached);
	stats->nr_poisoned = atomic_long_read(&area->nr_poisoned);
}

/* /sys/class/umem/umemN/stats/: a file for each counter, named as in the uapi. */

static ssize_t umem_stat_show(struct device *dev, struct device_attribute *attr,
			      char *buf);

#define UMEM_STAT_ATTR(name)	__ATTR(name, 0444, umem_stat_show, NULL)

/* In the order of struct umem_stats, whose members are all u64. */
static struct device_attribute umem_stat_attrs[] = {
	UMEM_STAT_ATTR(nr_minor),
	UMEM_STAT_ATTR(nr_major),
	UMEM_STAT_ATTR(nr_async),
	UMEM_STAT_ATTR(nr_duplicate),
	UMEM_STAT_ATTR(nr_killed),
	UMEM_STAT_ATTR(nr_lost),
	UMEM_STAT_ATTR(nr_poison_hits),
	UMEM_STAT_ATTR(nr_requested),
	UMEM_STAT_ATTR(nr_delivered),
	UMEM_STAT_ATTR(nr_cached),
	UMEM_STAT_ATTR(nr_poisoned),
	UMEM_STAT_ATTR(nr_discarded),
	UMEM_STAT_ATTR(nr_touched),
	UMEM_STAT_ATTR(nr_logged),
	UMEM_STAT_ATTR(blocked_ns),
};

static_assert(offsetof(struct umem_stats, latency) ==
	      ARRAY_SIZE(umem_stat_attrs) * sizeof(u64));

static ssize_t umem_stat_show(struct device *dev, struct device_attribute *attr,
			      char *buf)
{
	struct umem_stats stats;

	umem_stats_read(dev_get_drvdata(dev), &stats);
	return sysfs_emit(buf, "%llu\n",
			  ((u64 *)&stats)[attr - umem_stat_attrs]);
}

/* All buckets on one line, the one from 1 microsecond on first. */
static ssize_t latency_show(struct device *dev, struct device_attribute *attr,
			    char *buf)
{
	struct umem_stats stats;
	int i, len = 0;

	umem_stats_read(dev_get_drvdata(dev), &stats);
	for (i = 0; i < UMEM_LATENCY_BUCKETS; i++)
		len += sysfs_emit_at(buf, len, "%llu%c", stats.latency[i],
				     i < UMEM_LATENCY_BUCKETS - 1 ? ' ' : '\n');
	return len;
}
static DEVICE_ATTR_RO(latency);

static struct attribute *umem_stats_attrs[ARRAY_SIZE(umem_stat_attrs) + 2];

const struct attribute_group umem_stats_group = {
	.name	= "stats",
	.attrs	= umem_stats_attrs,
};

/**
 * umem_stats_init() - make the attributes ready
 */
void umem_stats_init(void)
{
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(umem_stat_attrs); i++)
		umem_stats_attrs[i] = &umem_stat_attrs[i].attr;
	umem_stats_attrs[i] = &dev_attr_latency.attr;
}

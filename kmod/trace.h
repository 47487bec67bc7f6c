/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * trace.h - tracepoints: the way of a granule, for perf and ftrace
 *
 * All of them name the area by the number of its node and the granule by the
 * offset of its first page.
 *
 * Copyright (C) 2026 The umem authors
 */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM umem

#if !defined(_UMEM_TRACE_H) || defined(TRACE_HEADER_MULTI_READ)
#define _UMEM_TRACE_H

#include <linux/tracepoint.h>

#include "umem.h"

TRACE_EVENT(umem_fault,
	TP_PROTO(const struct umem_area *area, unsigned long index,
		 unsigned int flags),
	TP_ARGS(area, index, flags),
	TP_STRUCT__entry(
		__field(u32, id)
		__field(unsigned long, pgoff)
		__field(unsigned int, flags)
	),
	TP_fast_assign(
		__entry->id = area->id;
		__entry->pgoff = index << area->order;
		__entry->flags = flags;
	),
	TP_printk("umem%u pgoff=%lu flags=0x%x", __entry->id, __entry->pgoff,
		  __entry->flags)
);

TRACE_EVENT(umem_request,
	TP_PROTO(const struct umem_area *area, unsigned long index, bool async),
	TP_ARGS(area, index, async),
	TP_STRUCT__entry(
		__field(u32, id)
		__field(unsigned long, pgoff)
		__field(bool, async)
	),
	TP_fast_assign(
		__entry->id = area->id;
		__entry->pgoff = index << area->order;
		__entry->async = async;
	),
	TP_printk("umem%u pgoff=%lu async=%d", __entry->id, __entry->pgoff,
		  __entry->async)
);

TRACE_EVENT(umem_deliver,
	TP_PROTO(const struct umem_area *area, u64 pgoff, u64 flags),
	TP_ARGS(area, pgoff, flags),
	TP_STRUCT__entry(
		__field(u32, id)
		__field(u64, pgoff)
		__field(u64, flags)
	),
	TP_fast_assign(
		__entry->id = area->id;
		__entry->pgoff = pgoff;
		__entry->flags = flags;
	),
	TP_printk("umem%u pgoff=%llu flags=0x%llx", __entry->id,
		  __entry->pgoff, __entry->flags)
);

TRACE_EVENT(umem_mark,
	TP_PROTO(const struct umem_area *area, unsigned long start,
		 unsigned long count, unsigned long nr_new),
	TP_ARGS(area, start, count, nr_new),
	TP_STRUCT__entry(
		__field(u32, id)
		__field(unsigned long, pgoff)
		__field(unsigned long, granules)
		__field(unsigned long, nr_new)
	),
	TP_fast_assign(
		__entry->id = area->id;
		__entry->pgoff = start << area->order;
		__entry->granules = count;
		__entry->nr_new = nr_new;
	),
	TP_printk("umem%u pgoff=%lu granules=%lu new=%lu", __entry->id,
		  __entry->pgoff, __entry->granules, __entry->nr_new)
);

TRACE_EVENT(umem_wake,
	TP_PROTO(const struct umem_area *area, unsigned long index, u64 ns,
		 bool cached),
	TP_ARGS(area, index, ns, cached),
	TP_STRUCT__entry(
		__field(u32, id)
		__field(unsigned long, pgoff)
		__field(u64, ns)
		__field(bool, cached)
	),
	TP_fast_assign(
		__entry->id = area->id;
		__entry->pgoff = index << area->order;
		__entry->ns = ns;
		__entry->cached = cached;
	),
	TP_printk("umem%u pgoff=%lu slept=%llu ns cached=%d", __entry->id,
		  __entry->pgoff, __entry->ns, __entry->cached)
);

TRACE_EVENT(umem_attach,
	TP_PROTO(const struct umem_area *area, bool again),
	TP_ARGS(area, again),
	TP_STRUCT__entry(
		__field(u32, id)
		__field(bool, again)
	),
	TP_fast_assign(
		__entry->id = area->id;
		__entry->again = again;
	),
	TP_printk("umem%u again=%d", __entry->id, __entry->again)
);

TRACE_EVENT(umem_detach,
	TP_PROTO(const struct umem_area *area),
	TP_ARGS(area),
	TP_STRUCT__entry(
		__field(u32, id)
	),
	TP_fast_assign(
		__entry->id = area->id;
	),
	TP_printk("umem%u", __entry->id)
);

#endif /* _UMEM_TRACE_H */

#undef TRACE_INCLUDE_PATH
#define TRACE_INCLUDE_PATH .
#undef TRACE_INCLUDE_FILE
#define TRACE_INCLUDE_FILE trace
#include <trace/define_trace.h>

// What the emulated ptx.cuh needs from the emulated machine. Each function acts for the thread that runs at the moment; `where` is the
// line of the kernel that called, for the reports.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>

namespace emulator {

using Where = std::source_location;

enum class Scope { kCta, kCluster };

uint32_t thread_idx();
uint32_t cta_rank_in_cluster();
uint32_t cluster_idx();
uint32_t num_clusters();

uint32_t exchange_in_warp(uint32_t value, uint32_t lane_mask, Where where);
void synchronise_warp(Where where);

uint32_t shared_memory_base();
void load_shared(uint32_t address, void* value, size_t num_bytes, Where where);
void store_shared(uint32_t address, const void* value, size_t num_bytes, Where where);
void load_global(const void* address, void* value, size_t num_bytes, Where where);
void store_global(void* address, const void* value, size_t num_bytes, Where where);

// A cluster address names the rank of its CTA in its upper byte; a shared address is one of this thread's own CTA.
uint32_t map_to_rank(uint32_t address, uint32_t cta_rank, Where where);
void init_barrier(uint32_t address, uint32_t num_arrivals, Where where);
void fence_barrier_init(Where where);
void arrive(uint32_t address, Where where);
void arrive_remotely(uint32_t cluster_address, Where where);
void arrive_and_expect(uint32_t address, uint32_t tx_bytes, Where where);
void wait(uint32_t address, uint32_t parity, Scope scope, Where where);

void copy_in_bulk(uint32_t destination, const void* source, uint32_t num_bytes, uint32_t barrier, Where where);
void store_asynchronously(uint32_t destination, uint32_t value, uint32_t barrier, Where where);

void arrive_at_cluster_barrier_relaxed(Where where);
void wait_at_cluster_barrier(Where where);

void wait_for_earlier_grids(Where where);

}  // namespace emulator

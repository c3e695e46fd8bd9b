// What each primitive does to the machine.
#include <cstring>

#include "machine.h"

namespace emulator {

namespace {

template <class Value>
Value load_global(const void* address, Where where) {
  Value value;
  check_global_read(begin(where), address, sizeof value, sizeof value, where);
  std::memcpy(&value, address, sizeof value);
  return value;
}

template <class Value>
void store_global(Value* address, Value value, Where where) {
  constexpr size_t num_bytes = sizeof value;
  const Thread& thread = begin(where);
  Tensor& tensor = find_tensor(thread, address, num_bytes, num_bytes, where);
  const size_t offset = static_cast<size_t>(reinterpret_cast<char*>(address) - tensor.address);
  if (!tensor.is_output) fail("write to an input", thread, where, tensor.name);
  if (!thread.has_waited_for_earlier_grids) fail("early write", thread, where, "this thread has not executed griddepcontrol_wait");
  if (tensor.written[offset]) fail("second write", thread, where, tensor.name + (" + " + bytes(static_cast<int64_t>(offset))) + " was written before");
  for (size_t byte = 0; byte < num_bytes; ++byte) tensor.written[offset + byte] = true;
  *address = value;
}

void wait_for_phase(uint32_t address, uint32_t parity, bool acquires_from_cluster, Where where) {
  Thread& thread = begin(where);
  Mbarrier& barrier = find_barrier(thread, *thread.cta, address, false, where);
  while ((barrier.phase & 1) == parity) {
    barrier.waiting.push_back(&thread);
    block("wait for", &barrier, parity);
  }
  thread.clock.learn(barrier.completed_in_cta);
  thread.clock.learn(barrier.last_landing(false));
  if (acquires_from_cluster) {
    thread.clock.learn(barrier.completed_in_cluster);
    thread.clock.learn(barrier.last_landing(true));
  }
}

// ---- Other CTAs -----------------------------------------------------------------------------------------------------------------

Cta& find_target(const Thread& thread, ptx::ClusterAddress address, Where where) {
  Cta& target = cluster.ctas[(address.value >> kRankShift) - 1];
  if (target.has_left) fail("absent CTA", thread, where, "CTA " + std::to_string(target.rank) + " has left");
  const Thread* const first_thread = &cluster.threads[target.rank * cluster.launch->num_threads];
  bool has_started = &target == thread.cta;
  for (uint32_t idx = 0; idx < cluster.launch->num_threads && !has_started; ++idx) has_started = thread.clock.knows(first_thread[idx].start());
  if (!has_started) {
    fail("absent CTA", thread, where, "this thread has waited for nobody of CTA " + std::to_string(target.rank) + ", which may not have started");
  }
  return target;
}

uint32_t local_address(ptx::ClusterAddress address) { return address.value & ((1u << kRankShift) - 1); }

void dispatch(Event event) {
  ++event.target->num_in_flight;
  if (event.kind != Event::Kind::kRemoteArrival) {
    event.barrier->bytes_in_flight += event.num_bytes;
    if (!cluster.earlier_grids_have_ended) statistics.bytes_prefetched += event.num_bytes;
    for (uint32_t at = event.offset; at < event.offset + event.num_bytes; at += 4) ++event.target->words[at / 4].num_in_flight;
  }
  event.sequence = ++cluster.num_dispatched;
  cluster.events.push_back(std::move(event));
}

void count_arrival(GroupBarrier& barrier) {
  ++barrier.num_arrived;
  complete_if_all_arrived(barrier);
}

// ---- Lanes ----------------------------------------------------------------------------------------------------------------------

// All lanes of the warp wait for each other in one operation on one line. True for the last one: it acts for all, then wakes them.
void meet(Thread& thread, const char* operation, Where where, void (*act)(Warp& warp, Thread* first_lane)) {
  Warp& warp = *thread.warp;
  if (warp.left.any()) fail("absent lane", thread, where, std::string(operation) + " by a warp some of whose lanes have left");
  if (warp.arrived.none()) {
    warp.operation = operation;
    warp.where = where;
  } else if (warp.operation != operation || warp.where.line() != where.line() || warp.where.column() != where.column()) {
    fail("divergence", thread, where, std::string("this lane is in ") + operation + ", others of its warp are in " + warp.operation + " at " + name(warp.where));
  }
  warp.arrived.set(thread.lane());
  if (!warp.arrived.all()) return block(operation);
  warp.arrived.reset();
  Thread* const first_lane = &thread - thread.lane();
  act(warp, first_lane);
  for (uint32_t lane = 0; lane < kWarpSize; ++lane) {
    if (first_lane + lane != &thread) cluster.runnable.push_back(first_lane + lane);
  }
}

}  // namespace

}  // namespace emulator

namespace ptx {

using namespace emulator;

// ---- Indices --------------------------------------------------------------------------------------------------------------------

uint32_t thread_idx() { return cluster.current->idx_in_cta; }
uint32_t cta_rank_in_cluster() { return cluster.current->cta->rank; }
uint32_t cta_idx() { return cluster.idx * cluster.launch->cluster_size + cta_rank_in_cluster(); }

// ---- Warp -----------------------------------------------------------------------------------------------------------------------

float shfl_xor_sync(float value, uint32_t lane_mask, Where where) {
  Thread& thread = begin(where);
  thread.warp->offered[thread.lane()] = value;
  // Hands values over, and no knowledge of memory.
  meet(thread, "a shuffle", where, [](Warp& warp, Thread*) { warp.taken = warp.offered; });
  return thread.warp->taken[thread.lane() ^ lane_mask];
}

void syncwarp(Where where) {
  meet(begin(where), "syncwarp", where, [](Warp&, Thread* first_lane) {
    Clock all;
    for (uint32_t lane = 0; lane < kWarpSize; ++lane) all.learn(first_lane[lane].clock);
    for (uint32_t lane = 0; lane < kWarpSize; ++lane) {
      first_lane[lane].clock = all;
      first_lane[lane].tick();
    }
  });
}

// ---- Shared and global memory ---------------------------------------------------------------------------------------------------

SharedAddress dynamic_shared_memory() { return kSharedMemoryBase; }

namespace {

template <class Value>
Value load_shared(SharedAddress address, Where where) {
  Value value;
  constexpr size_t num_bytes = sizeof value;
  Thread& thread = begin(where);
  Cta& cta = *thread.cta;
  const uint32_t offset = check_shared(thread, cta, address, num_bytes, num_bytes, where);
  for (uint32_t at = offset; at < offset + num_bytes; at += 4) {
    Word& word = cta.words[at / 4];
    if (word.kind == Word::Kind::kBarrier) fail("barrier read", thread, where, name(cta, at) + " is a barrier");
    if (word.num_in_flight > 0) fail("unfilled read", thread, where, name(cta, at) + " has a write on its way to it");
    if (word.kind == Word::Kind::kUnwritten) fail("unwritten read", thread, where, name(cta, at) + " was never written");
    if (!thread.clock.knows(word.write)) {
      fail("unordered read", thread, where, name(cta, at) + " was written, but this thread has not waited for that (with the scope it takes)");
    }
    const Epoch now = thread.now();
    auto known = word.reads.begin();
    while (known != word.reads.end() && known->actor != now.actor) ++known;
    if (known == word.reads.end()) {
      word.reads.push_back(now);
    } else {
      known->time = now.time;
    }
  }
  std::memcpy(&value, &cta.memory[offset], num_bytes);
  return value;
}

}  // namespace

Words ld_shared(SharedAddress address, Where where) { return load_shared<Words>(address, where); }
float ld_shared_float(SharedAddress address, Where where) { return load_shared<float>(address, where); }

void st_shared(SharedAddress address, float value, Where where) {
  Thread& thread = begin(where);
  const uint32_t offset = check_shared(thread, *thread.cta, address, sizeof value, sizeof value, where);
  check_overwrite(thread, *thread.cta, offset, sizeof value, where);
  write_shared(*thread.cta, offset, &value, sizeof value, thread.now());
}

uint16_t ld_global(const uint16_t* address, Where where) { return load_global<uint16_t>(address, where); }
Words ld_global_vector_no_allocate(const void* address, Where where) { return load_global<Words>(address, where); }
Words ld_global_vector(const void* address, Where where) { return load_global<Words>(address, where); }
void st_global(uint16_t* address, uint16_t value, Where where) { store_global(address, value, where); }
void st_global(float* address, float value, Where where) { store_global(address, value, where); }

// ---- mbarrier -------------------------------------------------------------------------------------------------------------------

void mbarrier_init(SharedAddress address, uint32_t num_arrivals, Where where) {
  Thread& thread = begin(where);
  Cta& cta = *thread.cta;
  const uint32_t offset = check_shared(thread, cta, address, 8, 8, where);
  if (num_arrivals == 0) fail("barrier not initialised", thread, where, name(cta, offset) + " would expect no arrivals");
  check_overwrite(thread, cta, offset, 8, where);
  if (cta.barriers.size() == cluster.launch->num_barriers) throw Violation{"emulator", "more barriers than the launch was said to have"};
  const auto actor = cluster.threads.size() + (cta.rank * cluster.launch->num_barriers + cta.barriers.size()) * 2;
  Mbarrier& barrier = cta.barriers
                          .emplace(offset, Mbarrier{.cta_rank = cta.rank,
                                                    .offset = offset,
                                                    .num_arrivals = num_arrivals,
                                                    .num_pending = num_arrivals,
                                                    .actor = static_cast<uint16_t>(actor)})
                          .first->second;
  cta.words[offset / 4].kind = cta.words[offset / 4 + 1].kind = Word::Kind::kBarrier;
  thread.clock.learn(barrier.init());
  thread.initialised.push_back(&barrier);
}

void fence_mbarrier_init(Where where) {
  Thread& thread = begin(where);
  for (Mbarrier* const barrier : thread.initialised) {
    barrier->is_published = true;
    thread.published.push_back(barrier->init());
  }
  thread.initialised.clear();
}

void mbarrier_arrive(SharedAddress address, Where where) {
  Thread& thread = begin(where);
  Mbarrier& barrier = find_barrier(thread, *thread.cta, address, false, where);
  arrive_once(barrier, false, thread.clock, thread, where);
  thread.tick();
}

void mbarrier_arrive_expect_tx(SharedAddress address, uint32_t tx_bytes, Where where) {
  Thread& thread = begin(where);
  Mbarrier& barrier = find_barrier(thread, *thread.cta, address, false, where);
  barrier.tx_bytes += tx_bytes;
  if (barrier.tx_bytes > kMaxTxBytes) fail("surplus bytes", thread, where, name(barrier) + " cannot count " + bytes(barrier.tx_bytes));
  arrive_once(barrier, false, thread.clock, thread, where);
  thread.tick();
}

void mbarrier_arrive_cluster(ClusterAddress address, Where where) {
  Thread& thread = begin(where);
  Cta& target = find_target(thread, address, where);
  Mbarrier& barrier = find_barrier(thread, target, local_address(address), &target != thread.cta, where);
  dispatch({.kind = Event::Kind::kRemoteArrival, .target = &target, .issuer = &thread, .where = where, .barrier = &barrier, .released = thread.clock});
  thread.tick();
}

void mbarrier_wait(SharedAddress address, uint32_t parity, Where where) { wait_for_phase(address, parity, false, where); }
void mbarrier_wait_cluster(SharedAddress address, uint32_t parity, Where where) { wait_for_phase(address, parity, true, where); }

// ---- Asynchronous copies and stores ---------------------------------------------------------------------------------------------

void cp_async_bulk(SharedAddress destination, const void* source, uint32_t num_bytes, SharedAddress barrier_address, Where where) {
  Thread& thread = begin(where);
  Cta& cta = *thread.cta;
  if (num_bytes == 0 || num_bytes % 16 != 0) fail("misaligned", thread, where, "a bulk copy of " + bytes(num_bytes) + ", not a positive multiple of 16");
  const uint32_t offset = check_shared(thread, cta, destination, num_bytes, 16, where);
  check_global_read(thread, source, num_bytes, 16, where);
  Mbarrier& barrier = find_barrier(thread, cta, barrier_address, true, where);
  check_overwrite(thread, cta, offset, num_bytes, where);
  dispatch({.kind = Event::Kind::kCopy, .target = &cta, .issuer = &thread, .where = where, .offset = offset, .source = static_cast<const char*>(source),
            .num_bytes = num_bytes, .barrier = &barrier});
}

ClusterAddress mapa(SharedAddress address, uint32_t cta_rank, Where where) {
  const Thread& thread = *cluster.current;
  if (cta_rank >= cluster.ctas.size()) fail("absent CTA", thread, where, "the cluster has no CTA " + std::to_string(cta_rank));
  check_shared(thread, cluster.ctas[cta_rank], address, 1, 1, where);
  return {(cta_rank + 1) << kRankShift | address};
}

void st_async(ClusterAddress destination, float value, ClusterAddress barrier_address, Where where) {
  Thread& thread = begin(where);
  Cta& target = find_target(thread, destination, where);
  if (destination.value >> kRankShift != barrier_address.value >> kRankShift) fail("absent CTA", thread, where, "the store and its barrier are in two CTAs");
  const uint32_t offset = check_shared(thread, target, local_address(destination), 4, 4, where);
  Mbarrier& barrier = find_barrier(thread, target, local_address(barrier_address), &target != thread.cta, where);
  check_overwrite(thread, target, offset, 4, where);
  dispatch({.kind = Event::Kind::kStore, .target = &target, .issuer = &thread, .where = where, .offset = offset, .num_bytes = 4, .value = value,
            .barrier = &barrier});
}

// ---- CTA barrier ----------------------------------------------------------------------------------------------------------------

// Stricter than some machines, which forgive threads that have left.
void bar_sync(Where where) {
  Thread& thread = begin(where);
  meet(thread, "bar_sync", where, [](Warp&, Thread*) {});
  GroupBarrier& barrier = thread.cta->barrier;
  if (thread.cta->num_alive < barrier.num_threads) fail("CTA barrier", thread, where, "threads of this CTA have left without coming here");
  const int64_t generation = barrier.generation;
  barrier.arrived.learn(thread.clock);
  thread.tick();
  count_arrival(barrier);
  while (generation == barrier.generation) {
    barrier.waiting.push_back(&thread);
    block("bar_sync");
  }
  thread.clock.learn(barrier.completed);
}

// ---- Cluster barrier ------------------------------------------------------------------------------------------------------------

void barrier_cluster_arrive_relaxed(Where where) {
  Thread& thread = begin(where);
  meet(thread, "barrier_cluster_arrive_relaxed", where, [](Warp&, Thread*) {});
  GroupBarrier& barrier = cluster.barrier;
  if (cluster.ctas.size() == 1) fail("cluster barrier", thread, where, "in a cluster of one, where nvcc makes the arrival a part of the wait");
  if (thread.cluster_barrier_generation >= 0) fail("cluster barrier", thread, where, "this thread arrives twice without waiting in between");
  thread.cluster_barrier_generation = barrier.generation;
  // Releases nothing but what the fence has published, and the fact that this thread has started.
  for (const Epoch& init : thread.published) barrier.arrived.learn(init);
  barrier.arrived.learn(thread.start());
  count_arrival(barrier);
}

void barrier_cluster_wait(Where where) {
  Thread& thread = begin(where);
  meet(thread, "barrier_cluster_wait", where, [](Warp&, Thread*) {});
  GroupBarrier& barrier = cluster.barrier;
  if (thread.cluster_barrier_generation < 0) fail("cluster barrier", thread, where, "this thread waits without having arrived");
  while (thread.cluster_barrier_generation == barrier.generation) {
    barrier.waiting.push_back(&thread);
    block("wait for the cluster barrier");
  }
  thread.cluster_barrier_generation = -1;
  thread.clock.learn(barrier.completed);
}

// ---- Programmatic dependent launch ----------------------------------------------------------------------------------------------

void griddepcontrol_wait(Where where) {
  Thread& thread = begin(where);
  while (!cluster.earlier_grids_have_ended) {
    cluster.waiting_for_earlier_grids.push_back(&thread);
    block("wait for earlier grids");
  }
  thread.has_waited_for_earlier_grids = true;
}

// Results would be right all the same, as the next grid waits for this one. But ever more grids would be under way.
void griddepcontrol_launch_dependents(Where where) {
  Thread& thread = begin(where);
  if (!thread.has_waited_for_earlier_grids) fail("early dependents", thread, where, "this thread has not executed griddepcontrol_wait");
}

}  // namespace ptx

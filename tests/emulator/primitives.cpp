// What each primitive does to the machine, and the checks that it makes first. The names of the checks stand in tests/emulator/__init__.py.
#include <cstring>

#include "machine.h"

namespace emulator {

namespace {

std::string bytes(int64_t num_bytes) { return std::to_string(num_bytes) + " bytes"; }

// ---- Shared memory --------------------------------------------------------------------------------------------------------------

uint32_t check_shared(const Thread& thread, const Cta& cta, uint32_t address, size_t num_bytes, size_t alignment, Where where) {
  const uint32_t offset = address - kSharedMemoryBase;
  if (address < kSharedMemoryBase || offset + num_bytes > cluster.launch->shared_memory_bytes) {
    fail("out of bounds", thread, where, bytes(static_cast<int64_t>(num_bytes)) + " at shared address " + std::to_string(address) + ", CTA " +
         std::to_string(cta.rank) + " has " + std::to_string(kSharedMemoryBase) + " to " +
         std::to_string(kSharedMemoryBase + cluster.launch->shared_memory_bytes));
  }
  if (address % alignment != 0) {
    fail("misaligned", thread, where, name(cta, offset) + " is not aligned to " + bytes(static_cast<int64_t>(alignment)));
  }
  return offset;
}

// Bytes that are about to be overwritten, now or later: nobody may still need them, and no other write may be on its way to them.
void check_overwrite(const Thread& thread, Cta& cta, uint32_t offset, size_t num_bytes, Where where) {
  for (uint32_t at = offset; at < offset + num_bytes; at += 4) {
    const Word& word = cta.words[at / 4];
    if (word.kind == Word::Kind::kBarrier) fail("barrier overwritten", thread, where, name(cta, at) + " is a barrier");
    if (word.num_in_flight > 0) fail("overwrite", thread, where, name(cta, at) + " has another write on its way to it");
    if (word.kind == Word::Kind::kData && !thread.clock.knows(word.write)) {
      fail("overwrite", thread, where, name(cta, at) + " holds data whose writing this thread has not waited for");
    }
    for (const Epoch& read : word.reads) {
      if (!thread.clock.knows(read)) {
        fail("overwrite", thread, where, name(cta, at) + " may still be being read by " + name(cluster.threads[read.actor]));
      }
    }
  }
}

void write_shared(Cta& cta, uint32_t offset, const void* source, size_t num_bytes, Epoch write) {
  std::memcpy(&cta.memory[offset], source, num_bytes);
  for (uint32_t at = offset; at < offset + num_bytes; at += 4) {
    Word& word = cta.words[at / 4];
    word.kind = Word::Kind::kData;
    word.write = write;
    word.reads.clear();
  }
}

// ---- Global memory --------------------------------------------------------------------------------------------------------------

Tensor& find_tensor(const Thread& thread, const void* address, size_t num_bytes, size_t alignment, Where where) {
  const char* const first = static_cast<const char*>(address);
  for (Tensor& tensor : tensors) {
    if (first < tensor.address || first >= tensor.address + tensor.num_bytes) continue;
    const std::string place = tensor.name + (" + " + bytes(first - tensor.address));
    if (first + num_bytes > tensor.address + tensor.num_bytes) {
      fail("out of bounds", thread, where, bytes(static_cast<int64_t>(num_bytes)) + " at " + place + ", which has " +
           bytes(static_cast<int64_t>(tensor.num_bytes)));
    }
    if (reinterpret_cast<uintptr_t>(first) % alignment != 0) {
      fail("misaligned", thread, where, place + " is not aligned to " + bytes(static_cast<int64_t>(alignment)));
    }
    return tensor;
  }
  fail("out of bounds", thread, where, "a global address in no tensor");
}

void check_global_read(const Thread& thread, const void* source, size_t num_bytes, size_t alignment, Where where) {
  const Tensor& tensor = find_tensor(thread, source, num_bytes, alignment, where);
  if (tensor.is_output) fail("read of the output", thread, where, std::string(tensor.name) + " is poison until it is written");
  if (!thread.has_waited_for_earlier_grids && !tensor.may_be_read_early) {
    fail("early read", thread, where, std::string(tensor.name) + " is poison to this thread: it has not executed griddepcontrol_wait");
  }
}

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

// ---- Barriers -------------------------------------------------------------------------------------------------------------------

Mbarrier& find_barrier(const Thread& thread, Cta& cta, uint32_t address, bool needs_fence, Where where) {
  const uint32_t offset = check_shared(thread, cta, address, 8, 8, where);
  const auto found = cta.barriers.find(offset);
  if (found == cta.barriers.end()) fail("barrier not initialised", thread, where, name(cta, offset) + " is not an initialised barrier");
  Mbarrier& barrier = found->second;
  if (!thread.clock.knows(barrier.init())) {
    fail("barrier not visible", thread, where, name(barrier) + " was initialised by a thread that this one has not synchronised with");
  }
  if (needs_fence && !barrier.is_published) {
    fail("barrier not visible", thread, where, name(barrier) + " was initialised without a fence for copies and other CTAs");
  }
  return barrier;
}

void complete_phase_if_due(Mbarrier& barrier, const Thread& thread, Where where) {
  if (barrier.num_pending > 0) return;
  if (barrier.tx_bytes < 0) {
    fail("surplus bytes", thread, where, name(barrier) + " got " + bytes(-barrier.tx_bytes) + " more than its phase expects");
  }
  if (barrier.tx_bytes > 0) return;
  if (barrier.bytes_in_flight > 0) {
    fail("surplus bytes", thread, where, name(barrier) + " completes its phase while " + bytes(barrier.bytes_in_flight) +
         " are on their way to it: fewer are expected than sent");
  }
  ++statistics.num_phases;
  ++barrier.phase;
  if (barrier.phase + 2 >= kLastTime) throw Violation{"emulator", "a barrier has more phases than the emulator can count"};
  barrier.num_pending = barrier.num_arrivals;
  barrier.bytes_landed = 0;
  barrier.completed_in_cta = barrier.arrived_in_cta;
  barrier.completed_in_cluster = barrier.arrived_in_cluster;
  wake(barrier.waiting);
}

void arrive_once(Mbarrier& barrier, bool is_remote, const Clock& released, const Thread& thread, Where where) {
  if (barrier.num_pending == 0) fail("surplus arrival", thread, where, name(barrier) + " has all the arrivals that its phase expects");
  (is_remote ? barrier.arrived_in_cluster : barrier.arrived_in_cta).learn(released);
  --barrier.num_pending;
  complete_phase_if_due(barrier, thread, where);
}

void count_bytes(Mbarrier& barrier, uint32_t num_bytes, const Thread& thread, Where where) {
  barrier.tx_bytes -= num_bytes;
  barrier.bytes_in_flight -= num_bytes;
  barrier.bytes_landed += num_bytes;
  complete_phase_if_due(barrier, thread, where);
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
    for (uint32_t at = event.offset; at < event.offset + event.num_bytes; at += 4) ++event.target->words[at / 4].num_in_flight;
  }
  event.sequence = ++cluster.num_dispatched;
  cluster.events.push_back(std::move(event));
}

void count_arrival(GroupBarrier& barrier) {
  ++barrier.num_arrived;
  complete_if_all_arrived(barrier);
}

// Part of an asynchronous write, from `skipped` bytes after its start.
void land(const Event& event, uint32_t skipped, const void* source, uint32_t num_bytes) {
  const uint32_t offset = event.offset + skipped;
  for (uint32_t at = offset; at < offset + num_bytes; at += 4) --event.target->words[at / 4].num_in_flight;
  write_shared(*event.target, offset, source, num_bytes, event.barrier->landing(event.target != event.issuer->cta));
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

// ---- What happens later ---------------------------------------------------------------------------------------------------------

bool happen(Event& event) {
  switch (event.kind) {
    case Event::Kind::kCtaStarts:
      for (Thread& thread : cluster.threads) {
        if (thread.cta == event.target) cluster.runnable.push_back(&thread);
      }
      return true;
    case Event::Kind::kEarlierGridsEnd:
      cluster.earlier_grids_have_ended = true;
      wake(cluster.waiting_for_earlier_grids);
      return true;
    case Event::Kind::kRemoteArrival:
      --event.target->num_in_flight;
      arrive_once(*event.barrier, event.target != event.issuer->cta, event.released, *event.issuer, event.where);
      return true;
    case Event::Kind::kStore: {
      --event.target->num_in_flight;
      land(event, 0, &event.value, 4);
      count_bytes(*event.barrier, 4, *event.issuer, event.where);
      return true;
    }
    case Event::Kind::kCopy:
      break;
  }
  // A piece, from either end: all of it, or some multiple of 16 bytes.
  const uint32_t num_units = event.num_bytes / 16;
  const uint32_t piece_bytes = random_numbers.chance(2) ? event.num_bytes : (1 + random_numbers.below(num_units)) * 16;
  const uint32_t skipped = random_numbers.chance(2) ? event.num_bytes - piece_bytes : 0;
  land(event, skipped, event.source + skipped, piece_bytes);
  if (skipped == 0) {
    event.offset += piece_bytes;
    event.source += piece_bytes;
  }
  event.num_bytes -= piece_bytes;
  if (event.num_bytes == 0) --event.target->num_in_flight;
  count_bytes(*event.barrier, piece_bytes, *event.issuer, event.where);
  return event.num_bytes == 0;
}

void leave(Cta& cta, const Thread& last) {
  cta.has_left = true;
  if (cta.num_in_flight > 0) {
    fail("early exit", last, last.where, "the CTA leaves while " + std::to_string(cta.num_in_flight) + " copies, stores or arrivals are on their way to it");
  }
  for (const auto& [offset, barrier] : cta.barriers) {
    if (barrier.tx_bytes < 0) fail("surplus bytes", last, last.where, name(barrier) + " is left with " + bytes(-barrier.tx_bytes) + " that nobody expected");
    if (barrier.tx_bytes > 0) fail("missing bytes", last, last.where, name(barrier) + " is left expecting " + bytes(barrier.tx_bytes));
  }
}

}  // namespace emulator

namespace ptx {

using namespace emulator;

// ---- Indices --------------------------------------------------------------------------------------------------------------------

uint32_t thread_idx() { return cluster.current->idx_in_cta; }
uint32_t cta_rank_in_cluster() { return cluster.current->cta->rank; }
uint32_t cluster_idx() { return cluster.idx; }
uint32_t num_clusters() { return cluster.launch->num_clusters; }
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

Vector ld_shared(SharedAddress address, Where where) {
  Vector value;
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

void st_shared(SharedAddress address, float value, Where where) {
  Thread& thread = begin(where);
  const uint32_t offset = check_shared(thread, *thread.cta, address, sizeof value, sizeof value, where);
  check_overwrite(thread, *thread.cta, offset, sizeof value, where);
  write_shared(*thread.cta, offset, &value, sizeof value, thread.now());
}

uint16_t ld_global(const uint16_t* address, Where where) { return load_global<uint16_t>(address, where); }
Vector ld_global_vector_no_allocate(const void* address, Where where) { return load_global<Vector>(address, where); }
Vector ld_global_vector(const void* address, Where where) { return load_global<Vector>(address, where); }
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
  if (thread.cluster_barrier_generation >= 0) fail("cluster barrier", thread, where, "this thread arrives twice without waiting in between");
  thread.cluster_barrier_generation = barrier.generation;
  // Releases nothing but what the fence has published, and the fact that this thread has started.
  for (const Epoch& init : thread.published) barrier.arrived.learn(init);
  barrier.arrived.learn(thread.start());
  if (!cluster.is_arrival_part_of_wait) count_arrival(barrier);
}

void barrier_cluster_wait(Where where) {
  Thread& thread = begin(where);
  meet(thread, "barrier_cluster_wait", where, [](Warp&, Thread*) {});
  GroupBarrier& barrier = cluster.barrier;
  if (thread.cluster_barrier_generation < 0) fail("cluster barrier", thread, where, "this thread waits without having arrived");
  if (cluster.is_arrival_part_of_wait) count_arrival(barrier);
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

}  // namespace ptx

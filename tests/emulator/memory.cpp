// Shared and global memory and mbarriers: the checks before each access, what accesses do, and what lands later. The names of the checks
// stand in tests/emulator/__init__.py.
#include <cstring>

#include "machine.h"

namespace emulator {

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

// ---- What happens later ---------------------------------------------------------------------------------------------------------

namespace {

// Part of an asynchronous write, from `skipped` bytes after its start.
void land(const Event& event, uint32_t skipped, const void* source, uint32_t num_bytes) {
  const uint32_t offset = event.offset + skipped;
  for (uint32_t at = offset; at < offset + num_bytes; at += 4) --event.target->words[at / 4].num_in_flight;
  write_shared(*event.target, offset, source, num_bytes, event.barrier->landing(event.target != event.issuer->cta));
}

}  // namespace

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

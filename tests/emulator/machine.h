// The emulated machine: one cluster of CTAs at a time, its threads, shared memory, barriers, and what is under way.
#pragma once

#include <ptx.cuh>

#include <array>
#include <bitset>
#include <cstdint>
#include <cstdio>
#include <map>
#include <string>
#include <vector>

#include "clock.h"

namespace emulator {

constexpr uint32_t kWarpSize = 32;
constexpr uint32_t kSharedMemoryBase = 1024;  // as on a GPU, where the first kilobyte is the system's
constexpr uint32_t kRankShift = 24;           // of a cluster address
constexpr int64_t kMaxTxBytes = (1 << 20) - 1;

// A broken promise. `check` is the name of the check that found it.
struct Violation {
  const char* check;
  std::string report;
};

// A tensor in global memory.
struct Tensor {
  const char* name;
  char* address;
  size_t num_bytes;
  bool is_output;
  bool may_be_read_early;  // before the thread has waited for earlier grids
  std::vector<bool> written = {};
};

struct Launch {
  uint32_t num_clusters;
  uint32_t cluster_size;
  uint32_t num_threads;  // of a CTA
  uint32_t shared_memory_bytes;
  uint32_t num_barriers;  // of a CTA
  bool is_dependent;        // the grid before is still running at the start
  bool earlier_grids_last;  // and ends when nothing else can happen, not at some moment
  uint64_t seed;
  std::vector<Tensor> tensors;
  void (*kernel)(const void* arguments);
  const void* arguments;
  std::string (*name_shared_memory)(const void* arguments, uint32_t offset);
};

struct Statistics {
  uint64_t num_switches = 0;      // from one thread to another
  uint64_t num_landings = 0;      // of pieces of copies, of stores and of remote arrivals
  uint64_t num_phases = 0;        // completed by mbarriers
  uint64_t bytes_prefetched = 0;  // by copies that were issued before earlier grids had ended
};

// Runs all clusters, one after the other. Throws Violation.
void run(const Launch& launch);

// ---- What the machine consists of ------------------------------------------------------------------------------------------------

struct Thread;

// Four bytes of shared memory: who wrote them last, who has read them since, and whether anything is on its way to them.
struct Word {
  enum class Kind : uint8_t { kUnwritten, kData, kBarrier };
  Kind kind = Kind::kUnwritten;
  uint8_t num_in_flight = 0;
  Epoch write;
  std::vector<Epoch> reads;
};

struct Mbarrier {
  uint32_t cta_rank;
  uint32_t offset;
  uint32_t num_arrivals;
  uint32_t num_pending;
  uint32_t phase = 0;  // number of completed phases; its lowest bit is the parity of the current one
  int64_t tx_bytes = 0;
  int64_t bytes_in_flight = 0;
  int64_t bytes_landed = 0;  // in this phase
  bool is_published = false;
  uint16_t actor;  // of writes that a wait of CTA scope makes visible; the next one: of those that take a wait of cluster scope
  Clock arrived_in_cta, arrived_in_cluster;      // what this phase's arrivals released
  Clock completed_in_cta, completed_in_cluster;  // the same, up to the last completed phase
  std::vector<Thread*> waiting = {};

  // Times of the barrier's actors: its initialisation, then a write that landed in the current phase, known to who waits for the phase.
  Epoch init() const { return {actor, 1}; }
  Epoch landing(bool is_remote) const { return {static_cast<uint16_t>(actor + is_remote), static_cast<Time>(phase + 2)}; }
  Epoch last_landing(bool is_remote) const { return {static_cast<uint16_t>(actor + is_remote), static_cast<Time>(phase + 1)}; }
};

// A barrier of all threads of a group that have not left.
struct GroupBarrier {
  uint32_t num_threads = 0;
  uint32_t num_arrived = 0;
  int64_t generation = 0;
  Clock arrived, completed;
  std::vector<Thread*> waiting = {};
};

struct Cta {
  uint32_t rank;
  uint32_t num_alive;
  uint32_t num_in_flight = 0;  // operations towards this CTA's shared memory
  bool has_left = false;
  std::vector<char> memory;
  std::vector<Word> words;
  std::map<uint32_t, Mbarrier> barriers = {};
  GroupBarrier barrier = {};
};

// Where the lanes of a warp meet.
struct Warp {
  const char* operation = nullptr;
  Where where = {};
  std::bitset<kWarpSize> arrived, left;
  std::array<float, kWarpSize> offered = {}, taken = {};
  uint32_t priority = 0;
};

struct Thread {
  uint32_t idx;  // in the cluster
  uint32_t idx_in_cta;
  Cta* cta;
  Warp* warp;
  Clock clock;
  bool has_waited_for_earlier_grids;
  int64_t cluster_barrier_generation = -1;  // the one arrived at and not yet waited for; -1: none
  std::vector<Mbarrier*> initialised = {};  // barriers that this thread has yet to publish by a fence
  std::vector<Epoch> published = {};        // and those that it has
  Where where = {};
  const char* blocked_in = nullptr;
  const Mbarrier* blocked_at = nullptr;
  uint32_t blocked_parity = 0;

  uint32_t lane() const { return idx_in_cta % kWarpSize; }
  Epoch start() const { return {static_cast<uint16_t>(idx), 1}; }
  Epoch now() const { return {static_cast<uint16_t>(idx), clock.at(idx)}; }
  void tick();
};

// Something that happens by itself at a later moment.
struct Event {
  enum class Kind { kCtaStarts, kEarlierGridsEnd, kCopy, kStore, kRemoteArrival };
  Kind kind;
  Cta* target = nullptr;
  const Thread* issuer = nullptr;
  Where where = {};
  uint32_t offset = 0;
  const char* source = nullptr;
  uint32_t num_bytes = 0;
  float value = 0;
  Mbarrier* barrier = nullptr;
  Clock released = {};
  uint64_t sequence = 0;
};

// Numbers that depend on the seed alone (splitmix64), on every host.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint32_t next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return static_cast<uint32_t>((z ^ (z >> 31)) >> 32);
  }
  uint32_t below(uint32_t bound) { return static_cast<uint32_t>((static_cast<uint64_t>(next()) * bound) >> 32); }
  bool chance(uint32_t one_in) { return one_in != 0 && below(one_in) == 0; }  // one_in == 0: never

 private:
  uint64_t state_;
};

// The cluster that runs now.
struct Cluster {
  const Launch* launch;
  uint32_t idx;
  uint32_t num_alive;
  std::vector<Cta> ctas;
  std::vector<Warp> warps;
  std::vector<Thread> threads;
  std::vector<Thread*> runnable;
  std::vector<Event> events;
  GroupBarrier barrier;
  bool earlier_grids_have_ended = false;
  std::vector<Thread*> waiting_for_earlier_grids;
  uint64_t num_dispatched = 0;
  Thread* current = nullptr;
  uint32_t preempt_one_in = 0;
};

extern Cluster cluster;
extern std::vector<Tensor> tensors;
extern Statistics statistics;
extern Random random_numbers;

// ---- Scheduler (scheduler.cpp) ------------------------------------------------------------------------------------------------------

// The current thread stops here until somebody wakes it.
void block(const char* operation, const Mbarrier* barrier = nullptr, uint32_t parity = 0);
void wake(std::vector<Thread*>& threads);
// The current thread is about to carry out the primitive at `where`; others may come first.
Thread& begin(Where where);
void complete_if_all_arrived(GroupBarrier& barrier);

// ---- Reports (reports.cpp) -----------------------------------------------------------------------------------------------------------

std::string name(const Thread& thread);
std::string name(const Cta& cta, uint32_t offset);
std::string name(const Mbarrier& barrier);
std::string name(Where where);
std::string bytes(int64_t num_bytes);
[[noreturn]] void fail(const char* check, const Thread& thread, Where where, const std::string& message);
[[noreturn]] void fail_deadlock();

// ---- Memory and barriers (memory.cpp) ----------------------------------------------------------------------------------------------------

uint32_t check_shared(const Thread& thread, const Cta& cta, uint32_t address, size_t num_bytes, size_t alignment, Where where);
void check_overwrite(const Thread& thread, Cta& cta, uint32_t offset, size_t num_bytes, Where where);
void write_shared(Cta& cta, uint32_t offset, const void* source, size_t num_bytes, Epoch write);
Tensor& find_tensor(const Thread& thread, const void* address, size_t num_bytes, size_t alignment, Where where);
void check_global_read(const Thread& thread, const void* source, size_t num_bytes, size_t alignment, Where where);
Mbarrier& find_barrier(const Thread& thread, Cta& cta, uint32_t address, bool needs_fence, Where where);
void arrive_once(Mbarrier& barrier, bool is_remote, const Clock& released, const Thread& thread, Where where);
// Lets the event happen, or a piece of it. True if nothing is left of it.
bool happen(Event& event);
// The last thread of the CTA has left.
void leave(Cta& cta, const Thread& last);

}  // namespace emulator

// Who runs next, and when what is under way lands: both drawn from the seed.
#include <optional>

#include "fiber.h"
#include "machine.h"

namespace emulator {

Cluster cluster;
std::vector<Tensor> tensors;
Statistics statistics;
Random random_numbers(0);

namespace {

std::optional<Violation> violation;

void run_current_thread() {
  try {
    cluster.launch->kernel(cluster.launch->arguments);
    Thread& thread = *cluster.current;
    thread.warp->left.set(thread.lane());
    if (thread.warp->arrived.any()) {
      fail("absent lane", thread, thread.warp->where, std::string("the lane has left, its warp waits for it in ") + thread.warp->operation);
    }
    if (thread.cta->barrier.num_arrived > 0) {
      fail("CTA barrier", thread, thread.where, "this thread leaves without coming to the barrier that others of its CTA come to");
    }
    if (thread.cluster_barrier_generation >= 0) fail("cluster barrier", thread, thread.where, "this thread arrives, and leaves without waiting");
    GroupBarrier& barrier = cluster.barrier;
    --barrier.num_threads;
    complete_if_all_arrived(barrier);
    --cluster.num_alive;
    if (--thread.cta->num_alive == 0) leave(*thread.cta, thread);
  } catch (const Violation& caught) {
    violation = caught;
  }
}

Fibers fibers(&run_current_thread);

void prepare(const Launch& launch, uint32_t cluster_idx) {
  const uint32_t num_threads = launch.cluster_size * launch.num_threads;
  const size_t num_actors = num_threads + launch.cluster_size * launch.num_barriers * 2;
  const size_t num_words = (launch.shared_memory_bytes + 3) / 4;
  cluster = Cluster{.launch = &launch, .idx = cluster_idx, .num_alive = num_threads};
  cluster.ctas.reserve(launch.cluster_size);
  for (uint32_t rank = 0; rank < launch.cluster_size; ++rank) {
    // All bits set: a NaN in every type.
    cluster.ctas.push_back({.rank = rank,
                            .num_alive = launch.num_threads,
                            .memory = std::vector<char>(num_words * 4, '\xff'),
                            .words = std::vector<Word>(num_words),
                            .barrier = {.num_threads = launch.num_threads}});
    cluster.events.push_back({.kind = Event::Kind::kCtaStarts, .target = &cluster.ctas.front() + rank});
  }
  cluster.warps.resize(num_threads / kWarpSize);
  for (Warp& warp : cluster.warps) warp.priority = random_numbers.next();
  for (uint32_t idx = 0; idx < num_threads; ++idx) {
    cluster.threads.push_back({.idx = idx,
                               .idx_in_cta = idx % launch.num_threads,
                               .cta = &cluster.ctas[idx / launch.num_threads],
                               .warp = &cluster.warps[idx / kWarpSize],
                               .clock = Clock(num_actors),
                               .has_waited_for_earlier_grids = !launch.is_dependent});
    cluster.threads[idx].tick();  // its start
    cluster.threads[idx].tick();
  }
  cluster.barrier.num_threads = num_threads;
  cluster.barrier.arrived = Clock(num_actors);
  cluster.earlier_grids_have_ended = !launch.is_dependent;
  if (launch.is_dependent && !launch.earlier_grids_last) cluster.events.push_back({.kind = Event::Kind::kEarlierGridsEnd});
  fibers.prepare(num_threads);
}

void run_cluster() {
  // A schedule has a temper: how often threads are interrupted, how late what is under way lands, and how unfair it is to some warps.
  constexpr std::array<uint32_t, 4> kPreempt = {0, 64, 8, 2};
  constexpr std::array<uint32_t, 5> kLand = {0, 256, 32, 4, 1};
  constexpr std::array<uint32_t, 3> kCandidates = {1, 2, 8};
  cluster.preempt_one_in = kPreempt[random_numbers.below(kPreempt.size())];
  const uint32_t land_one_in = kLand[random_numbers.below(kLand.size())];
  const uint32_t num_candidates = kCandidates[random_numbers.below(kCandidates.size())];

  while (cluster.num_alive > 0) {
    std::vector<Event>& events = cluster.events;
    std::vector<Thread*>& runnable = cluster.runnable;
    if (!events.empty() && (runnable.empty() || random_numbers.chance(land_one_in))) {
      uint32_t idx = random_numbers.below(static_cast<uint32_t>(events.size()));
      // A thread's remote arrivals release, so none can be overtaken by a later one of the same thread.
      for (uint32_t other = 0; events[idx].kind == Event::Kind::kRemoteArrival && other < events.size(); ++other) {
        const bool is_alike = events[other].kind == events[idx].kind && events[other].issuer == events[idx].issuer;
        if (is_alike && events[other].sequence < events[idx].sequence) idx = other;
      }
      ++statistics.num_landings;
      if (happen(events[idx])) {
        std::swap(events[idx], events.back());
        events.pop_back();
      }
    }
    if (runnable.empty()) {
      if (!events.empty()) continue;
      if (cluster.earlier_grids_have_ended) fail_deadlock();
      events.push_back({.kind = Event::Kind::kEarlierGridsEnd});  // held back until now
      continue;
    }
    uint32_t chosen = random_numbers.below(static_cast<uint32_t>(runnable.size()));
    for (uint32_t candidate = 1; candidate < num_candidates; ++candidate) {
      const uint32_t other = random_numbers.below(static_cast<uint32_t>(runnable.size()));
      if (runnable[other]->warp->priority > runnable[chosen]->warp->priority) chosen = other;
    }
    cluster.current = runnable[chosen];
    runnable[chosen] = runnable.back();
    runnable.pop_back();
    ++statistics.num_switches;
    fibers.resume(cluster.current->idx);
    if (violation) throw *violation;
  }
}

}  // namespace

void run(const Launch& launch) {
  statistics = {};
  random_numbers = Random(launch.seed);
  violation.reset();
  tensors = launch.tensors;
  for (Tensor& tensor : tensors) {
    if (tensor.is_output) tensor.written.resize(tensor.num_bytes);
  }
  for (uint32_t cluster_idx = 0; cluster_idx < launch.num_clusters; ++cluster_idx) {
    prepare(launch, cluster_idx);
    run_cluster();
  }
}

void block(const char* operation, const Mbarrier* barrier, uint32_t parity) {
  Thread& thread = *cluster.current;
  thread.blocked_in = operation;
  thread.blocked_at = barrier;
  thread.blocked_parity = parity;
  fibers.suspend();
  thread.blocked_in = nullptr;
}

void wake(std::vector<Thread*>& threads) {
  cluster.runnable.insert(cluster.runnable.end(), threads.begin(), threads.end());
  threads.clear();
}

Thread& begin(Where where) {
  if (random_numbers.chance(cluster.preempt_one_in)) {
    cluster.runnable.push_back(cluster.current);
    fibers.suspend();
  }
  cluster.current->where = where;
  return *cluster.current;
}

void complete_if_all_arrived(GroupBarrier& barrier) {
  if (barrier.num_arrived == 0 || barrier.num_arrived < barrier.num_threads) return;
  barrier.num_arrived = 0;
  ++barrier.generation;
  barrier.completed = barrier.arrived;
  wake(barrier.waiting);
}

void Thread::tick() {
  if (clock.at(idx) == kLastTime) throw Violation{"emulator", "a thread released more often than the emulator can count"};
  clock.learn({static_cast<uint16_t>(idx), static_cast<Time>(clock.at(idx) + 1)});
}

}  // namespace emulator

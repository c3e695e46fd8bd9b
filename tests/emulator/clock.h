// What happened before what, as vector clocks.
//
// An actor is a thread, or one of the two kinds of asynchronous writes that an mbarrier counts. A thread's own time advances with each
// release; a barrier's time is the number of its completed phases. A clock holds, for each actor, up to which time its holder knows what
// it did. Knowledge is handed on where the machine guarantees it (barriers, arrivals and waits of the right scope) and nowhere else, so
// an access that is ordered only by luck is found under every schedule, not only under an unlucky one.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace emulator {

using Time = int16_t;
constexpr Time kLastTime = INT16_MAX;

// Something an actor did, at a time of its own.
struct Epoch {
  uint16_t actor = 0;
  Time time = 0;
};

class Clock {
 public:
  Clock() = default;  // knows nothing
  explicit Clock(size_t num_actors) : times_(num_actors, 0) {}

  bool knows(Epoch epoch) const { return at(epoch.actor) >= epoch.time; }
  Time at(size_t actor) const { return times_.empty() ? Time{0} : times_[actor]; }

  void learn(Epoch epoch) { times_[epoch.actor] = std::max(times_[epoch.actor], epoch.time); }
  void learn(const Clock& other) {
    if (times_.size() < other.times_.size()) times_.resize(other.times_.size(), 0);
    Time* const mine = times_.data();
    const Time* const theirs = other.times_.data();
    for (size_t actor = 0; actor < other.times_.size(); ++actor) mine[actor] = mine[actor] < theirs[actor] ? theirs[actor] : mine[actor];
  }

 private:
  std::vector<Time> times_;
};

}  // namespace emulator

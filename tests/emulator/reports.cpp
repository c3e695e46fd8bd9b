// Names for what the checks report: threads, places in shared memory, barriers, lines of the kernel.
#include <cstring>

#include "machine.h"

namespace emulator {

std::string name(const Thread& thread) {
  return "cluster " + std::to_string(cluster.idx) + ", CTA " + std::to_string(thread.cta->rank) + ", warp " +
         std::to_string(thread.idx_in_cta / kWarpSize) + ", lane " + std::to_string(thread.lane());
}

std::string name(const Cta& cta, uint32_t offset) {
  return cluster.launch->name_shared_memory(cluster.launch->arguments, offset) + " of CTA " + std::to_string(cta.rank);
}

std::string name(const Mbarrier& barrier) {
  return name(cluster.ctas[barrier.cta_rank], barrier.offset) + " (phase " + std::to_string(barrier.phase) + ", " +
         std::to_string(barrier.num_pending) + " of " + std::to_string(barrier.num_arrivals) + " arrivals and " +
         std::to_string(barrier.tx_bytes) + " bytes missing)";
}

std::string name(Where where) {
  const char* const slash = std::strrchr(where.file_name(), '/');
  return (slash ? slash + 1 : where.file_name()) + (":" + std::to_string(where.line()));
}

std::string bytes(int64_t num_bytes) { return std::to_string(num_bytes) + " bytes"; }

void fail(const char* check, const Thread& thread, Where where, const std::string& message) {
  throw Violation{check, name(where) + ": " + message + " [" + name(thread) + "]"};
}

void fail_deadlock() {
  std::string report = "nobody can run, and nothing is on its way:";
  bool are_bytes_missing = false;
  // Lanes of a warp that wait for the same thing share a line.
  for (size_t first = 0; first < cluster.threads.size();) {
    const Thread& thread = cluster.threads[first];
    size_t end = first + 1;
    const auto waits_alike = [&](const Thread& other) {
      return other.warp == thread.warp && other.blocked_in == thread.blocked_in && other.blocked_at == thread.blocked_at && other.where.line() == thread.where.line();
    };
    while (end < cluster.threads.size() && waits_alike(cluster.threads[end])) ++end;
    if (thread.blocked_in != nullptr) {
      report += "\n  " + name(thread) + (end - first > 1 ? " to " + std::to_string(cluster.threads[end - 1].lane()) : "") + ": " +
                thread.blocked_in;
      if (thread.blocked_at != nullptr) {
        report += " parity " + std::to_string(thread.blocked_parity) + " of " + name(*thread.blocked_at);
        are_bytes_missing = are_bytes_missing || (thread.blocked_at->num_pending == 0 && thread.blocked_at->bytes_landed > 0);
      }
      report += " at " + name(thread.where);
    }
    first = end;
  }
  throw Violation{are_bytes_missing ? "missing bytes" : "deadlock", report};
}

}  // namespace emulator

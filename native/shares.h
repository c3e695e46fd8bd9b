// How a launch is cut up: what the host works out once, so that no thread has to.
#pragma once

#include <order.h>
#include <problem.h>

// The most vectors that a lane has of a segment.
constexpr unsigned int vectors_per_lane(unsigned int intermediate_dim) {
  const unsigned int segment = (intermediate_dim / kVectorSize + kNumSegments - 1) / kNumSegments;
  return (segment + kNumLanes - 1) / kNumLanes;
}

inline MlpDownShare share_out_evenly(unsigned int first_row, unsigned int num_rows, unsigned int first_cluster, unsigned int num_clusters) {
  return {first_cluster, first_row, num_rows / num_clusters, num_rows % num_clusters};
}

// Even shares. With stagger_rows, each cluster of the first half takes so many rows fewer than an even share rounded down, and the second half
// shares out the rest. If that would leave the first half without rows, or there is no second half, there is no stagger.
inline MlpDownShares share_out(unsigned int hidden_dim, unsigned int num_clusters, unsigned int stagger_rows) {
  const unsigned int num_early = num_clusters / 2;
  const unsigned int min_rows = hidden_dim / num_clusters;
  if (num_early == 0 || stagger_rows == 0 || stagger_rows >= min_rows) {
    return {share_out_evenly(0, hidden_dim, 0, num_clusters), {num_clusters, hidden_dim, 0, 0}};
  }
  const unsigned int early_rows = num_early * (min_rows - stagger_rows);
  return {share_out_evenly(0, early_rows, 0, num_early),
          share_out_evenly(early_rows, hidden_dim - early_rows, num_early, num_clusters - num_early)};
}
